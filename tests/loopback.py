"""A real HTTP server on loopback that serves a folder with range requests, for tests of the reader."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class RangeHandler(BaseHTTPRequestHandler):
    """Serves files under ``root``; subclasses refuse or cut answers short."""

    protocol_version = "HTTP/1.1"
    root = Path()
    requests: list[str] = []  # noqa: RUF012 - one list for each subclass, set there
    cut_short = False

    def log_message(self, *_):
        """Quiet."""

    def refuse(self, status: int) -> None:
        """Answer with an empty body."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        """The same without a body."""
        self.do_GET()

    def do_GET(self):
        """A whole file or one range of it."""
        self.requests.append(self.path)
        path = self.root / urlsplit(self.path).path.lstrip("/")
        if not path.is_file():
            return self.refuse(404)
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, len(data) - 1
        if asked:
            first = int(asked.group(1))
            last = min(int(asked.group(2) or last), last)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "HEAD":
            return None
        body = data[first : last + 1]
        if self.cut_short:
            self.cut_short = False
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server on a free port until the block ends; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
