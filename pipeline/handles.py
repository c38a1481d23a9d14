"""Open rasters: in come an href and a catalog's ``Profile``, out comes an open dataset, lent to one thread at a time.

Datasets stay open between reads in one LRU for the process, since opening costs as much as reading. Faults are told
apart here: what may pass is retried with doubling, jittered waits, through the relay and after GDAL's cache of that
address is cleared (else a truncated answer would be served again); a 403 renews the token; the rest is a ``ReadError``
at once. Messages carry GDAL's own words, which rasterio keeps in the chain of causes, and never a query string.
"""

import atexit
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, Literal

import rasterio
import rasterio.cache
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.session import DummySession

from pipeline.errors import ReadError
from pipeline.profiles import Profile
from pipeline.redaction import redact
from pipeline.relay import Source, relayed, repeated
from pipeline.signing import auth_settings, sign

DEFAULTS: Final = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_VERSION": "2TLS",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_LOW_SPEED_TIME": "20",  # a stalled answer is given up long before that
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1000",
    "GDAL_HTTP_MAX_RETRY": "0",  # retries are counted and recorded here, not inside GDAL
    "GDAL_NUM_THREADS": "1",
}
RELAYED: Final = {"GDAL_HTTP_TIMEOUT": "3600", "GDAL_HTTP_LOW_SPEED_TIME": "0", "GDAL_HTTP_HEADERS": ""}
"""The relay itself knows how long to wait, and has the credentials."""
BLOCK_CACHE_BYTES: Final = 64 * 2**20
"""Larger costs page faults and memory; raise it where windows cut through blocks and come back to them."""
MAX_OPEN: Final = 400
MAX_WAIT_S: Final = 60.0

_PASSING: Final = re.compile(
    r"HTTP (?:response|error) code ?: ?(408|425|429|5\d\d)|timed? ?out|too slow|could(?:n't| not) resolve|connect",
    re.IGNORECASE,
)
_LASTING: Final = re.compile(
    r"HTTP (?:response|error) code ?: ?(400|401|404|405|410)\b|no such file|NoSuchKey|key does not exist|NoSuchBucket",
    re.IGNORECASE,
)
_FORBIDDEN: Final = re.compile(r"HTTP (?:response|error) code ?: ?403\b|AccessDenied|Access Denied", re.IGNORECASE)
Fault = Literal["transient", "permanent", "forbidden"]


def gdal_settings(profile: Profile | None) -> dict[str, str]:
    """GDAL settings for reads: our defaults, then the environment's own, then the profile's, then its credentials.

    Returned values may hold credentials from the environment: apply them with ``gdal_env`` in the reading thread,
    never store them.
    """
    settings = {key: value for key, value in DEFAULTS.items() if key not in os.environ}
    return {**settings, **profile.gdal, **auth_settings(profile.auth)} if profile else settings


def gdal_env(settings: Mapping[str, object]) -> rasterio.Env:
    """Settings for the reads inside; credentials are GDAL's own business.

    With keys of AWS in the environment rasterio would make a session of boto3 for every read, of any file: some 15 ms
    each, to tell GDAL what it finds there by itself.
    """
    return rasterio.Env(session=DummySession(), **settings)


def is_remote(href: str) -> bool:
    """Whether reads of this href go over a network."""
    return "://" in href and not href.startswith("file://")


def vsi_path(href: str) -> str:
    """The name GDAL opens: URLs and buckets by GDAL's own clients (no boto3), files as they are."""
    for scheme, prefix in (
        ("s3://", "/vsis3/"),
        ("gs://", "/vsigs/"),
        ("az://", "/vsiaz/"),
    ):
        if href.startswith(scheme):
            return prefix + href.removeprefix(scheme)
    if href.startswith(("http://", "https://")):
        return f"/vsicurl/{href}"
    return href.removeprefix("file://")


def words(error: BaseException) -> str:
    """Everything GDAL said about an error, without query strings; rasterio shows only the last line."""
    said: list[str] = []
    step: BaseException | None = error
    while step is not None and len(said) < 6:
        text = redact(str(step)).strip()
        if text and "See previous exception" not in text and not any(text in line for line in said):
            said.append(text)
        step = step.__cause__ or step.__context__
    return "; ".join(said) or type(error).__name__


def classify(text: str, *, remote: bool) -> Fault:
    """Whether waiting may help.

    A remote raster that cannot be parsed may be a cut-off answer, so it may pass; a local one stays broken.
    """
    if _FORBIDDEN.search(text):
        return "forbidden"
    if _LASTING.search(text):
        return "permanent"
    return "transient" if remote or _PASSING.search(text) else "permanent"


class Handles:
    """Datasets that are open but not in use, the longest unused closed first."""

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: OrderedDict[int, tuple[tuple[str, int | None], str, DatasetReader]] = OrderedDict()
        self._by_key: dict[tuple[str, int | None], list[int]] = {}
        self._next = 0
        self._pid = os.getpid()

    def keep_at_most(self, limit: int) -> None:
        """Keep at most so many open; a dataset holds one decoded block of its file (2 MB for 1024 px of uint16)."""
        with self._lock:
            self._limit = limit

    def take(self, href: str, level: int | None) -> tuple[str, DatasetReader] | None:
        """The signed address and an open dataset that nobody else holds, None if there is none."""
        with self._lock:
            self._after_fork()
            numbers = self._by_key.get((href, level))
            if not numbers:
                return None
            number = numbers.pop()
            _, address, dataset = self._idle.pop(number)
            return address, dataset

    def give(self, href: str, level: int | None, address: str, dataset: DatasetReader) -> None:
        """Hand a dataset back for the next read."""
        closing: list[DatasetReader] = []
        with self._lock:
            self._after_fork()
            self._idle[self._next] = ((href, level), address, dataset)
            self._by_key.setdefault((href, level), []).append(self._next)
            self._next += 1
            while len(self._idle) > self._limit:
                number, (key, _, old) = self._idle.popitem(last=False)
                self._by_key[key].remove(number)
                if not self._by_key[key]:
                    del self._by_key[key]
                closing.append(old)
        for old in closing:
            old.close()

    def close(self) -> None:
        """Close every dataset that is not in use."""
        with self._lock:
            closing = [dataset for _, _, dataset in self._idle.values()]
            self._idle.clear()
            self._by_key.clear()
        for dataset in closing:
            dataset.close()

    def __len__(self) -> int:
        return len(self._idle)

    def _after_fork(self) -> None:
        """A forked child must not use its parent's file descriptors."""
        if self._pid != os.getpid():
            self._idle.clear()
            self._by_key.clear()
            self._pid = os.getpid()


HANDLES: Final = Handles()
atexit.register(HANDLES.close)  # datasets left to the interpreter's end complain on stderr
_bounded = threading.Event()
_believed: Final[set[str]] = set()


def bound_block_cache(size_bytes: int = BLOCK_CACHE_BYTES) -> None:
    """Bound GDAL's cache of decoded blocks for this process (its default is 5 % of the machine's memory)."""
    with gdal_env({"GDAL_CACHEMAX": size_bytes}):
        _bounded.set()


def with_dataset[T](
    href: str,
    profile: Profile | None,
    action: Callable[[DatasetReader], T],
    *,
    level: int | None = None,
    expect: Callable[[DatasetReader], bool] | None = None,
) -> T:
    """Run ``action`` on the open dataset of ``href``, again after a fault that may pass.

    The first attempt reads straight from the source. The others go through the relay, which retries each HTTP request
    by itself (``pipeline.relay``), and after bytes that cannot be decoded asks until two answers agree.

    Args:
        href: unsigned location.
        profile: credentials, retry policy and GDAL settings; None for plain files and public addresses.
        action: reads from the dataset; run again as a whole on a retry.
        level: overview to open, None for full resolution.
        expect: whether a remote file's header is as its item says; if not, it is read again with care, and then
            believed.

    Raises:
        ReadError: when it cannot be read; ``transient`` says whether waiting may help.
    """
    if not _bounded.is_set() and "GDAL_CACHEMAX" not in os.environ:
        bound_block_cache()
    http = href.startswith(("http://", "https://"))
    settings = gdal_settings(profile)
    tries, backoff = (profile.retry.tries, profile.retry.backoff_s) if profile else (4, 0.5)
    refused: str | None = None
    source: Source | None = None
    attempt = 1
    while True:
        address = ""
        try:
            if source is not None:
                believe = source.agree or href in _believed
                with (
                    relayed(source) as address,
                    gdal_env({**settings, **RELAYED}),
                    _open(address, level) as dataset,
                ):
                    _check_header(dataset, href, None if believe else expect)
                    result = action(dataset)
                    if source.agree and expect and not expect(dataset):
                        _believed.add(href)
                    return result
            with gdal_env(settings):
                # After a fault only a fresh dataset will do: others that are idle may hold the same stale token.
                first = attempt == 1 and refused is None
                address, idle = (HANDLES.take(href, level) if first else None) or ("", None)
                if idle is None:
                    address = sign(href, profile.auth, refused=refused) if profile else href
                    idle = _open(address, level)
                try:
                    _check_header(idle, href, expect if http and href not in _believed else None)
                    result = action(idle)
                except BaseException:
                    idle.close()
                    raise
                HANDLES.give(href, level, address, idle)
                return result
        except (RasterioError, CPLE_BaseError, OSError) as error:
            said = words(error)
        finally:
            repeated(source.repeats() if source is not None else 0)
        if source is not None and source.gave_up is not None:
            raise source.gave_up
        fault = classify(said, remote=is_remote(href))
        with gdal_env(settings):
            _forget(address, href)
        if fault == "forbidden" and refused is None:
            refused = address  # once: a token may have run out since the dataset was opened
            repeated(1)
            continue
        if (fault != "transient" and not (fault == "forbidden" and http)) or attempt >= tries:
            raise ReadError(_message(href, said, fault, attempt), transient=fault == "transient")
        if http:
            # What neither server nor connection complained of may be bytes that came over wrong.
            source = Source(href, profile, agree=attempt > 1 or not _PASSING.search(said))
        time.sleep(min(backoff * 2 ** (attempt - 1), MAX_WAIT_S) * random.uniform(0.5, 1.5))  # noqa: S311 - a jitter
        repeated(1)
        attempt += 1


def _check_header(dataset: DatasetReader, href: str, expect: Callable[[DatasetReader], bool] | None) -> None:
    if expect is not None and not expect(dataset):
        raise OSError(f"the header of {redact(href)} is not what its item says")


def _open(address: str, level: int | None) -> DatasetReader:
    options = {} if level is None else {"OVERVIEW_LEVEL": level}
    dataset: DatasetReader = rasterio.open(vsi_path(address), sharing=False, **options)
    return dataset


def _forget(address: str, href: str) -> None:
    """Drop what GDAL remembers of an address: the parts of a cut-off answer, or that it was not there."""
    if is_remote(href):
        rasterio.cache.invalidate(vsi_path(address or href))


def _message(href: str, said: str, fault: Fault, tries: int) -> str:
    way_out = {
        "transient": f"tried {tries} times; wait and run again, it goes on where it stopped",
        "permanent": "check that the file is there and whole, or search again",
        "forbidden": "check the credentials and auth.kind of the profile",
    }[fault]
    return f"cannot read {redact(href)}: {said}; {way_out}"
