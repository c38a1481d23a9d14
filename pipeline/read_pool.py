"""Many reads in flight: in come assets and grids, out come futures of their pixels, counted for the run record."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ReadError
from pipeline.grid import Grid
from pipeline.items import Asset
from pipeline.profiles import Profile
from pipeline.reader import read_codes, read_window
from pipeline.relay import repeats
from pipeline.warp import Kind


@dataclass
class ReadStats:
    """What a pool has read: for the run record.

    Attributes:
        reads: finished, failed ones included.
        failed: of them without pixels.
        retries: how often a read, or one of its requests, was repeated.
        bytes: of the arrays handed out.
        seconds: summed over threads, from the start of a read to its end, retries included.
        failures: (href without query string, message) of each failed read.
    """

    reads: int = 0
    failed: int = 0
    retries: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)


class ReadPool:
    """Threads that keep many reads in flight.

    ``submit`` waits while ``ahead`` reads are queued or running, so a job's read-ahead is bounded; arrays that are
    read but not fetched yet belong to the caller. Use it as a context manager.

    Args:
        threads: reads at a time; about the cores for files, 8 to 16 over a network.
        ahead: reads queued or running at a time, by default four per thread.
        profile: credentials, retries and GDAL settings.
    """

    def __init__(self, *, threads: int, ahead: int | None = None, profile: Profile | None = None) -> None:
        self.profile = profile
        self.stats = ReadStats()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(ahead or 4 * threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def submit(self, asset: Asset, grid: Grid, kind: Kind = "reflectance") -> Future[NDArray[Any]]:
        """Queue one ``read_window``; the future gives its array or raises its ``ReadError``."""
        return self.queue(asset, lambda: read_window(asset, grid, kind=kind, profile=self.profile))

    def submit_codes(
        self, asset: Asset, grid: Grid, offset_dn: int | None, out: NDArray[np.uint16]
    ) -> Future[NDArray[np.uint16]]:
        """Queue one ``read_codes`` into ``out``, which nobody may touch until the future is done; it gives ``out``."""

        def work() -> NDArray[np.uint16]:
            read_codes(asset, grid, offset_dn=offset_dn, out=out, profile=self.profile)
            return out

        return self.queue(asset, work)

    def queue(self, asset: Asset, work: Callable[[], NDArray[Any]]) -> Future[NDArray[Any]]:
        """Queue any work that reads ``asset``; counted like a read."""
        self._slots.acquire()
        try:
            future = self._threads.submit(self._counted, asset, work)
        except BaseException:
            self._slots.release()
            raise
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _counted(self, asset: Asset, work: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        began, before = time.perf_counter(), repeats()
        pixels: NDArray[Any] | None = None
        problem: ReadError | None = None
        try:
            pixels = work()
            return pixels
        except ReadError as error:
            problem = error
            raise
        finally:
            with self._lock:
                self.stats.reads += 1
                self.stats.retries += repeats() - before
                self.stats.seconds += time.perf_counter() - began
                if pixels is not None:
                    self.stats.bytes += pixels.nbytes
                else:
                    self.stats.failed += 1
                if problem is not None:
                    self.stats.failures.append((asset.href.split("?")[0], str(problem)))

    def close(self) -> None:
        """Drop what is queued and wait for what is running; further submits are refused."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
