"""HTTP with patience: in come a range and an address, out come its bytes, each request retried by itself.

GDAL reads straight from a server as long as all goes well. Once a read met a fault, it is repeated through a relay on
loopback in the same process, which asks for each range until it has it whole: after 408, 425, 429 (as long as
Retry-After says) and 5xx, after a cut or stalled body, after a lost connection, and once with a new token after 403;
within ``Retry.request_tries`` and ``request_budget_s``. After a body that cannot be decoded, a range is asked for until
two answers agree. Files with a ``file:checksum`` can be fetched whole and compared.
"""

import hashlib
import itertools
import os
import random
import secrets
import tempfile
import threading
import time
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import requests

from pipeline.errors import ReadError
from pipeline.profiles import Auth, Profile, Retry
from pipeline.redaction import redact
from pipeline.signing import auth_settings, sign

TIMEOUT_S: Final = (10.0, 20.0)
"""(to connect, between two pieces of an answer)."""
MOST_WAIT_S: Final = 30.0
REFUSALS: Final = 3
"""So often one request may be refused (401, 403) before it counts."""
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
_HASHES: Final = {
    "1114": "sha1", "1220": "sha256", "1340": "sha512", "2030": "sha384", "1440": "sha3_512", "1530": "sha3_384",
    "1620": "sha3_256", "d50110": "md5",
}  # fmt: skip
"""Beginnings of a multihash (code and length in hex), as the STAC file extension has it, and hashlib's names."""


def _wait(answer: requests.Response | None, attempt: int, backoff_s: float) -> float:
    said = answer.headers.get("Retry-After", "") if answer is not None else ""
    if said.isdigit():
        return min(float(said), MOST_WAIT_S)
    if said:
        try:
            return min(max(0.0, parsedate_to_datetime(said).timestamp() - time.time()), MOST_WAIT_S)
        except ValueError:
            pass
    return min(backoff_s * 2**attempt, MOST_WAIT_S) * random.uniform(0.5, 1.5)  # noqa: S311 - a jitter


class Source:
    """One remote file, asked for with patience.

    Args:
        href: unsigned.
        profile: credentials and retry policy.
        agree: ask for each range until two answers agree.
    """

    def __init__(self, href: str, profile: Profile | None, *, agree: bool = False) -> None:
        self.href, self.agree = href, agree
        self.auth, self.retry = (profile.auth, profile.retry) if profile else (Auth(), Retry())
        self.gave_up: ReadError | None = None
        self._repeats = itertools.count()
        self._refused: str | None = None
        name, _, value = auth_settings(self.auth).get("GDAL_HTTP_HEADERS", "").partition(": ")
        self._headers = {"Accept-Encoding": "identity"} | ({name: value} if value else {})

    def get(self, span: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one range (``bytes=a-b``, or empty for all of it); the body is whole.

        Raises:
            ReadError: when the budget is spent.
        """
        if not self.agree or method == "HEAD":
            return self._once(span, method)
        seen: dict[str, int] = {}
        for _ in range(self.retry.request_tries):
            answer = self._once(span, method)
            digest = hashlib.sha256(answer[2]).hexdigest()
            seen[digest] = seen.get(digest, 0) + 1
            if seen[digest] == 2:
                return answer
        raise ReadError(f"cannot read {redact(self.href)}: no two answers agree", transient=True)

    def repeats(self) -> int:
        """How many requests were sent again since this was last asked."""
        done, self._repeats = self._repeats, itertools.count()
        return next(done)

    def _once(self, span: str, method: str) -> tuple[int, dict[str, str], bytes]:
        end, problem, refusals = time.monotonic() + self.retry.request_budget_s, "", 0
        for attempt in range(self.retry.request_tries):
            answer: requests.Response | None = None
            try:
                address = sign(self.href, self.auth, refused=self._refused)
                headers = {"Range": span} if span else {}
                answer = _session().request(
                    method, address, headers={**headers, **self._headers}, timeout=TIMEOUT_S, stream=True
                )
                # A server may trickle: the whole answer has to come within the budget too.
                body = b"".join(_until(answer, end)) if method == "GET" else b""
                whole = method == "HEAD" or len(body) == int(answer.headers.get("Content-Length", len(body)))
                if answer.status_code < 300 and whole:
                    return answer.status_code, dict(answer.headers), body
                problem = f"HTTP {answer.status_code}" if answer.status_code >= 300 else "the answer was cut short"
                refusals += answer.status_code in (401, 403)
                if answer.status_code in (401, 403) and refusals <= REFUSALS:
                    self._refused = address  # a token that ran out is renewed; a server that errs is asked again
                elif answer.status_code >= 300 and answer.status_code not in _PASSING:
                    return answer.status_code, dict(answer.headers), body
            except requests.RequestException as error:
                problem = type(error).__name__
            finally:
                if answer is not None:
                    answer.close()  # what is cut or stalled would keep its socket until somebody collects it
            wait = _wait(answer, attempt, self.retry.backoff_s)
            if attempt + 1 == self.retry.request_tries or time.monotonic() + wait > end:
                break
            time.sleep(wait)
            next(self._repeats)
        self.gave_up = ReadError(
            f"cannot read {redact(self.href)}: {problem}; one request was tried for up to {self.retry.request_tries} "
            f"times and {self.retry.request_budget_s:g} s; wait and run again, it goes on where it stopped",
            transient=True,
        )
        raise self.gave_up


_told = threading.local()


def repeated(times: int) -> None:
    """Note how often the read that this thread is at, or one of its requests, was repeated."""
    _told.times = repeats() + times


def repeats() -> int:
    """What ``repeated`` was told in this thread so far."""
    return int(getattr(_told, "times", 0))


def _until(answer: requests.Response, end: float) -> Any:
    for piece in answer.iter_content(1 << 18):
        if time.monotonic() > end:
            raise requests.Timeout
        yield piece


_local = threading.local()


def _session() -> requests.Session:
    """One session a thread: connections are kept, and sessions are not made for sharing."""
    session: requests.Session | None = getattr(_local, "session", None)
    if session is None:
        session = _local.session = requests.Session()
    return session


# -- the relay --------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Pass one range on."""
        source = self.server.sources.get(self.path.split("/")[1])
        status, headers, body = 404, dict[str, str](), b""
        if source is not None:
            try:
                status, headers, body = source.get(self.headers.get("Range", ""), self.command)
            except ReadError:
                status = 504
        self.send_response(status)
        for name in ("Content-Range", "Content-Type", "ETag", "Last-Modified", "Accept-Ranges"):
            if name in headers:
                self.send_header(name, headers[name])
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    sources: dict[str, Source]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is no news."""


_lock = threading.Lock()
_running: dict[int, _Server] = {}  # by process: a forked child has its own


def _server() -> _Server:
    with _lock:
        server = _running.get(os.getpid())
        if server is None:
            server = _running[os.getpid()] = _Server(("127.0.0.1", 0), _Handler)
            server.sources = {}
            threading.Thread(target=server.serve_forever, daemon=True, name="relay").start()
        return server


class relayed:
    """Context in which a remote file can be read at an address on loopback; a name nobody can guess guards it."""

    def __init__(self, source: Source) -> None:
        self.source, self.name = source, secrets.token_urlsafe(16)

    def __enter__(self) -> str:
        server = _server()
        server.sources[self.name] = self.source
        # Proxies of the environment are not for loopback; GDAL is told by its own setting.
        return f"http://127.0.0.1:{server.server_port}/{self.name}/{Path(self.source.href.split('?')[0]).name}"

    def __exit__(self, *error: object) -> None:
        _server().sources.pop(self.name, None)


# -- whole files ------------------------------------------------------------------------------------------------

_kept: dict[str, str] = {}
_fetching: dict[str, threading.Lock] = {}
_folder: list[tempfile.TemporaryDirectory[str]] = []


def hash_name(checksum: str) -> tuple[str, str] | None:
    """(hashlib's name, digest in hex) of a multihash in hex, None for one that is not known here."""
    checksum = checksum.lower()
    for start, name in _HASHES.items():
        if checksum.startswith(start) and len(checksum) - len(start) == 2 * hashlib.new(name).digest_size:
            return name, checksum[len(start) :]
    return None


def verified(href: str, checksum: str, profile: Profile | None) -> str:
    """A file on this machine that agrees with the checksum; fetched once by each process, kept until it ends.

    Raises:
        ReadError: when three fetches disagree, or it cannot be fetched.
    """
    known = hash_name(checksum)
    if known is None:
        return href
    with _lock:
        gate = _fetching.setdefault(href, threading.Lock())
    with gate:
        if href in _kept:
            return _kept[href]
        for turn in range(3):
            source = Source(href, profile)
            try:
                status, _, body = source.get("")
            finally:
                repeated(source.repeats() + (turn > 0))
            if status >= 300:
                raise ReadError(f"cannot read {redact(href)}: HTTP {status}")
            if hashlib.new(known[0], body).hexdigest() == known[1]:
                with _lock:
                    if not _folder:
                        _folder.append(tempfile.TemporaryDirectory(prefix="cloudgate-"))
                path = Path(_folder[0].name) / f"{secrets.token_hex(8)}{Path(href.split('?')[0]).suffix}"
                path.write_bytes(body)
                _kept[href] = str(path)
                return str(path)
    raise ReadError(f"cannot read {redact(href)}: three fetches disagree with its file:checksum", transient=True)
