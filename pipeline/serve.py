"""Local servers for demo, tests and benchmarks: in come a folder or items, out come URLs on loopback.

``RangeServer`` serves files with range requests, ``StacServer`` runs ``rustac serve`` on an ItemCollection.
Each runs in a process of its own, so that serving does not compete for the reader's GIL, in a session of its
own, so that Ctrl-C reaches the parent first, and watches its parent, so that even a killed parent leaves no
orphan.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.error import URLError
from urllib.parse import unquote, urlsplit

from pipeline.errors import RunError
from pipeline.faults import LATENCY_S, Faults, Striker

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 20.0
WATCH_S: Final = 0.2
SEND_BYTES: Final = 1 << 20
TYPES: Final = {".tif": "image/tiff", ".json": "application/json", ".geojson": "application/geo+json"}


class _Child:
    """A server process that ends with its context, or with its parent."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while running, else None."""
        return self._process.pid if self._process else None

    def _spawn(self, *arguments: str, stdout: Any, stderr: Any) -> subprocess.Popen[bytes]:
        package_root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (package_root, os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.serve", str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        return self._process

    def stop(self) -> None:
        """End the server; harmless when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class RangeServer(_Child):
    """Serve the files under ``root`` over loopback HTTP/1.1: GET and HEAD, one range a request, keep-alive.

    Args:
        root: folder; nothing outside it is served.
        port: 0 takes a free one.
        latency_s: added before every answer, without holding up other requests.
        faults: what goes wrong on purpose (``pipeline.faults``).

    Use as a context manager; ``url`` is valid inside. Raises ``RunError`` when the server does not start.
    """

    def __init__(self, root: Path, port: int = 0, latency_s: float = 0.0, faults: Faults | None = None) -> None:
        super().__init__()
        self.root, self.port, self.latency_s = Path(root).resolve(), port, latency_s
        self.faults = faults or Faults()

    @property
    def url(self) -> str:
        """Base URL without a trailing slash."""
        return f"http://{LOOPBACK}:{self.port}"

    def start(self) -> Self:
        """Start the server and wait until it listens."""
        if not self.root.is_dir():
            raise RunError(f"range server: {self.root} is no folder; give the folder that holds the rasters")
        process = self._spawn(
            "files", str(self.root), str(self.port), str(self.latency_s), self.faults.to_json(),
            stdout=subprocess.PIPE, stderr=None,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()  # the child binds first, so there is no race for the port
        if not line:
            self.stop()
            raise RunError(f"range server: could not listen on {LOOPBACK}:{self.port}; choose another port or 0")
        self.port = int(line)
        return self

    def __enter__(self) -> Self:
        return self.start()


class StacServer(_Child):
    """Run ``rustac serve`` on an ItemCollection and wait until it answers.

    Args:
        items: path of the ItemCollection (JSON); its hrefs must be absolute, rustac returns them as they are.
        port: 0 takes a free one.

    Raises ``RunError`` on entering when rustac is missing, ends early or does not answer.
    """

    def __init__(self, items: Path, port: int = 0) -> None:
        super().__init__()
        self.items, self.port, self._wanted = Path(items), port, port

    @property
    def url(self) -> str:
        """URL of the API's landing page."""
        return f"http://{LOOPBACK}:{self.port}"

    def start(self) -> Self:
        """Start rustac and wait until its landing page answers."""
        if not self.items.is_file():
            raise RunError(f"STAC server: {self.items} does not exist; give the path of an ItemCollection")
        executable = Path(sys.executable).parent / ("rustac.exe" if os.name == "nt" else "rustac")
        if not executable.exists():
            raise RunError(f"STAC server: no rustac beside {sys.executable}; install the package 'rustac'")
        said = ""
        for _ in range(1 if self._wanted else 5):  # someone may take the free port before rustac binds it
            self.port = self._wanted or _free_port()
            with tempfile.TemporaryFile() as log:
                process = self._spawn(
                    "guard",
                    str(executable), "serve", str(self.items.resolve()), "--addr", f"{LOOPBACK}:{self.port}",
                    stdout=log,
                    stderr=log,
                )  # fmt: skip
                if self._answers(process):
                    return self
                self.stop()
                log.seek(0)
                said = log.read().decode(errors="replace")[-800:].strip()
        raise RunError(
            f"STAC server: rustac did not answer at {self.url} within {START_TIMEOUT_S:g} s: "
            f"{said or 'it said nothing'}; check {self.items} and that the port is free"
        )

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(URLError, OSError), opener.open(self.url, timeout=2) as answer:
                # another program on the port would answer too: make sure that ours still lives
                return answer.status == HTTPStatus.OK and process.poll() is None
            time.sleep(0.03)
        return False

    def __enter__(self) -> Self:
        return self.start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- what runs in the child


def _watch_parent(parent: int, then: Any) -> None:
    """Call ``then`` in a thread once ``parent`` is no longer this process's parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        then()

    threading.Thread(target=watch, daemon=True).start()


def guard(command: list[str], parent: int) -> int:
    """Run ``command``, end it when told to end or when the parent is gone, return its exit status."""

    def die_with_me() -> None:
        if sys.platform == "linux":  # so that even SIGKILL to the guard ends the server
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    process = subprocess.Popen(command, preexec_fn=die_with_me)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    _watch_parent(parent, process.terminate)
    return process.wait()


class _Files:
    """The range server: one thread a connection, bodies sent by the kernel (``sendfile``)."""

    def __init__(self, root: str, latency_s: float, faults: Faults) -> None:
        self.root, self.latency_s = os.path.realpath(root), latency_s
        self.striker = Striker(faults)

    def serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pending = b""
        with connection, contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in pending:
                    received = connection.recv(65536)
                    if not received or len(pending) > 65536:
                        return
                    pending += received
                head, _, pending = pending.partition(b"\r\n\r\n")
                if self.latency_s:
                    time.sleep(self.latency_s)
                if not self.answer(connection, head.decode("latin-1")):
                    return

    def answer(self, connection: socket.socket, head: str) -> bool:
        """Answer one request. Returns whether the connection stays open."""
        request, *lines = head.split("\r\n")
        method, _, rest = request.partition(" ")
        target, _, version = rest.rpartition(" ")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        keep = headers.get("connection", "keep-alive" if version == "HTTP/1.1" else "close").lower() != "close"
        if method not in ("GET", "HEAD"):
            # a body may follow that is not read: the connection cannot go on
            self._refuse(connection, HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"}, keep=False)
            return False
        path = os.path.realpath(self.root + "/" + unquote(urlsplit(target).path))
        if not path.startswith(self.root + os.sep) or not Path(path).is_file():
            self._refuse(connection, HTTPStatus.NOT_FOUND, {}, keep=keep, silent=method == "HEAD")
            return keep
        kind, place = self.striker.strike(path[len(self.root) + 1 :], headers.get("range", ""))
        if kind == "latency":
            time.sleep(LATENCY_S)
        if kind in ("403", "404", "429", "503"):
            after = {"Retry-After": "1"} if kind == "429" else {}
            self._refuse(connection, HTTPStatus(int(kind)), after, keep=keep, silent=method == "HEAD")
            return keep
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
            span = byte_range(headers.get("range", ""), status.st_size)
            if headers.get("if-range", tag) != tag:
                span = None
            if span == ():
                self._refuse(
                    connection,
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                    {"Content-Range": f"bytes */{status.st_size}"},
                    keep=keep,
                )
                return keep
            first, stop = span or (0, status.st_size)
            fields = {
                "Content-Type": TYPES.get(Path(path).suffix, "application/octet-stream"),
                "Content-Length": str(stop - first),
                "Accept-Ranges": "bytes",
                "ETag": tag,
                "Last-Modified": formatdate(status.st_mtime, usegmt=True),
            }
            code = HTTPStatus.OK
            if span:
                code = HTTPStatus.PARTIAL_CONTENT
                fields["Content-Range"] = f"bytes {first}-{stop - 1}/{status.st_size}"
            connection.sendall(_head(code, fields, keep=keep))
            if method == "GET" and stop > first:
                if kind in ("stall", "truncate", "flip"):
                    return self._spoil(connection, kind, place, os.pread(file.fileno(), stop - first, first)) and keep
                connection.sendfile(file, first, stop - first)
        return keep

    def _spoil(self, connection: socket.socket, kind: str, place: float, body: bytes) -> bool:
        """Send a body that is cut, stalls or has one bit turned over. Returns whether the connection stays open."""
        if kind == "flip":
            spoilt, at = bytearray(body), int(place * len(body) * 8)
            spoilt[at // 8] ^= 1 << at % 8
            connection.sendall(spoilt)
            return True
        connection.sendall(body[: len(body) // 2])
        if kind == "stall":
            time.sleep(self.striker.faults.stall_s)
        return False

    def _refuse(
        self,
        connection: socket.socket,
        code: HTTPStatus,
        fields: dict[str, str],
        *,
        keep: bool,
        silent: bool = False,
    ) -> None:
        body = f"{code.value} {code.phrase}\n".encode()
        fields = {"Content-Type": "text/plain", "Content-Length": str(len(body)), **fields}
        connection.sendall(_head(code, fields, keep=keep) + (b"" if silent else body))


def _head(code: HTTPStatus, fields: dict[str, str], *, keep: bool) -> bytes:
    fields = {**fields, "Connection": "keep-alive" if keep else "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {code.value} {code.phrase}\r\n{lines}\r\n".encode("latin-1")


def byte_range(header: str, size: int) -> tuple[int, int] | tuple[()] | None:
    """Half-open span of one ``Range`` header (RFC 9110, 14.1.2).

    Returns:
        (first, stop); ``()`` when it cannot be satisfied; None when there is none, or several, which a server
        may answer with the whole file.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.replace(" ", ""))
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    return (start, stop) if start < stop else ()


def _serve_files(root: str, port: int, latency_s: float, faults: Faults, parent: int) -> int:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(512)
    _watch_parent(parent, lambda: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    _Files(root, latency_s, faults).serve(listener)
    return 0


def main(arguments: list[str]) -> int:
    """Entry of the child processes: ``PARENT files ROOT PORT LATENCY FAULTS`` or ``PARENT guard COMMAND...``."""
    parent, kind, *rest = arguments
    if kind == "files":
        return _serve_files(rest[0], int(rest[1]), float(rest[2]), Faults.from_json(rest[3]), int(parent))
    return guard(rest, int(parent))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
