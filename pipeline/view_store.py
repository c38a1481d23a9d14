"""A mosaic opened for looking: in come the place of a store and a rectangle, out come its numbers at any zoom.

It may lie in a folder, a bucket or an icechunk repository; of the latter the commit is read that it was opened at.

Level k has pixels of 2^k times the grid's, counted from the grid's top-left corner. Where the store holds no such
level, it is made from the next finer one by taking every second pixel, chunk by chunk, so memory stays bounded.
Chunks that were read are kept, up to a limit.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline import store as stores
from pipeline.errors import StoreMismatchError
from pipeline.grid import Grid
from pipeline.locations import store_at
from pipeline.objects import telling
from pipeline.records import RunFolder

CHUNK: Final = 512
KEPT_BYTES: Final = 256_000_000
COARSEST_PX: Final = 256
"""Levels go up until the mosaic is no larger than this."""
FEW_PX: Final = 2048
"""A mosaic of at most this side is quick to read without overviews."""
SAMPLE_PX: Final = 1024
"""A level of at most this side is read whole for percentiles; of a larger one some chunks are."""
SAMPLE_CHUNKS: Final = 12
READERS: Final = 16
"""Chunks read at a time where several are wanted: in a bucket each takes round trips."""


@dataclass(frozen=True)
class ViewPeriod:
    """One finished period of a store."""

    slot: int
    start: str
    end: str
    target: str
    method: str
    weights: str
    """Hash of a learned method's weights, else empty."""
    anchors: tuple[str, ...]


@dataclass
class _Kept:
    """Values by key, the longest unused dropped first; who asks for what another thread is making waits for it."""

    limit: int
    size: int = 0
    held: OrderedDict[Any, Future[NDArray[Any]]] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Any, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        with self.lock:
            future = self.held.get(key)
            if future is not None:
                self.held.move_to_end(key)
            else:
                mine: Future[NDArray[Any]] = Future()
                self.held[key] = mine
        if future is not None:
            return future.result()
        try:
            value = make()
        except BaseException as error:
            with self.lock:
                self.held.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result(value)
        with self.lock:
            self.size += value.nbytes
            for old in list(self.held):
                if self.size <= self.limit:
                    break
                if self.held[old].done() and old != key:
                    self.size -= self.held.pop(old).result().nbytes
        return value


class ViewStore:
    """One store, opened for looking.

    Attributes:
        path: the store, as it was named.
        name: the last part of that.
        title: what the job was called.
        grid: full resolution.
        bands: in order.
        layers: all arrays of level 0.
        periods: finished ones, in order of time.
        levels: how many levels can be asked for, stored or not.
        stored: the levels that lie on disk.
        notes: what the reader of the page should know.
        token: changes whenever the store does.

    Raises:
        StoreMismatchError: where there is no mosaic, or none is finished. StoreError: where it cannot be reached.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.run = RunFolder(self.path)
        self.token = _token(self.path)
        attrs = _attributes(self.path, self.run)
        about = attrs["cloudgate"]
        self.name = Path(self.path.rstrip("/")).name
        self.title = str(attrs.get("title") or Path(self.name).stem)
        self.grid = Grid.from_dict(about["grid"])
        self.bands = tuple(str(band) for band in attrs["bands"])
        self.periods = tuple(
            ViewPeriod(
                slot,
                str(said.get("start", "")),
                str(said.get("end", "")),
                str(said.get("target", "")),
                str(said.get("method", {}).get("name", "")),
                str(said.get("method", {}).get("weights_sha256", "")),
                tuple(said.get("anchors", ())),
            )
            for slot, said in sorted(_published(about).items())
        )
        self._levels = self._open()
        self.layers = tuple(self._levels[0])
        self.levels = 1
        while max(self.shape(self.levels - 1)) > COARSEST_PX:
            self.levels += 1
        self.stored = tuple(sorted(self._levels))
        self.notes = self._notes()
        self._kept = _Kept(KEPT_BYTES)

    def _open(self) -> dict[int, dict[str, zarr.Array[Any]]]:
        """Arrays by level and name."""
        out: dict[int, dict[str, zarr.Array[Any]]] = {}
        with telling(f"read {self.path}"):
            try:
                root = stores.open_root(self.path)
            except (FileNotFoundError, ValueError) as error:
                raise _damaged(self.path, error) from error
            for level in sorted(int(name) for name in root.group_keys() if name.isdigit()):
                group = root[str(level)]
                assert isinstance(group, zarr.Group)
                out[level] = {name: array for name, array in group.arrays() if array.ndim == 3}
        return out

    def _notes(self) -> tuple[str, ...]:
        out = []
        if len(self.stored) < self.levels and max(self.grid.shape) > FEW_PX:
            out.append(
                "This store has no overviews: zoomed-out pictures read every pixel and come slowly. "
                f"Make them with: cloudgate export {self.path} --overviews"
            )
        if not self.run.exists():
            out.append(
                f"There is no {self.run.where} beside the store, so looks and the picture before cannot be shown."
            )
        return tuple(out)

    def shape(self, level: int) -> tuple[int, int]:
        """(rows, columns) of a level."""
        return -(-self.grid.height // 2**level), -(-self.grid.width // 2**level)

    def period(self, slot: int) -> ViewPeriod:
        """The finished period of a slot.

        Raises:
            StoreMismatchError: if it is not finished.
        """
        for period in self.periods:
            if period.slot == slot:
                return period
        known = ", ".join(str(period.slot) for period in self.periods)
        raise StoreMismatchError(f"period: {slot} is not finished in {self.path}; finished are {known}")

    def chunk(self, name: str, slot: int, level: int, row: int, col: int) -> NDArray[Any]:
        """(512, 512) raw values of one chunk of a level, counted from the top-left; fill beyond the edge."""
        return self._kept.get((name, slot, level, row, col), lambda: self._make(name, slot, level, row, col))

    def _make(self, name: str, slot: int, level: int, row: int, col: int) -> NDArray[Any]:
        fill = self._levels[0][name].fill_value
        out = np.full((CHUNK, CHUNK), fill, self._levels[0][name].dtype)
        height, width = self.shape(level)
        rows, cols = min(height - row * CHUNK, CHUNK), min(width - col * CHUNK, CHUNK)
        if rows <= 0 or cols <= 0:
            return out
        array = self._levels.get(level, {}).get(name)
        if array is not None and array.shape[0] > slot:
            with telling(f"read {self.path}"):
                out[:rows, :cols] = array[slot, row * CHUNK : row * CHUNK + rows, col * CHUNK : col * CHUNK + cols]
            return out
        half = CHUNK // 2
        for i in range(2):
            for j in range(2):
                if i * half < rows and j * half < cols:
                    finer = self.chunk(name, slot, level - 1, 2 * row + i, 2 * col + j)
                    out[i * half : (i + 1) * half, j * half : (j + 1) * half] = finer[::2, ::2]
        return out

    def window(self, name: str, slot: int, level: int, row: int, col: int, size: int) -> NDArray[Any]:
        """(size, size) raw values of the tile (row, col) of a level; ``size`` divides 512."""
        per = CHUNK // size
        whole = self.chunk(name, slot, level, row // per, col // per)
        top, left = row % per * size, col % per * size
        return whole[top : top + size, left : left + size]

    def value(self, name: str, slot: int, row: int, col: int) -> Any:
        """The raw value of one pixel at full resolution."""
        return self.chunk(name, slot, 0, row // CHUNK, col // CHUNK)[row % CHUNK, col % CHUNK]

    def several[K, T](self, ask: Callable[[K], T], keys: Sequence[K]) -> list[T]:
        """The answers for some keys, asked for side by side."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(ask, keys))

    def sample(self, name: str, slot: int) -> NDArray[Any]:
        """Raw values from all over the mosaic, flat: a coarse level, or some chunks where there is none."""
        level = min((k for k in self.stored if max(self.shape(k)) <= SAMPLE_PX), default=self.stored[-1])
        height, width = self.shape(level)
        down, across = -(-height // CHUNK), -(-width // CHUNK)
        places = [(i, j) for i in range(down) for j in range(across)]
        step = max(1, len(places) // SAMPLE_CHUNKS)
        parts = []
        for i, j in places[step // 2 :: step]:
            part = self.chunk(name, slot, level, i, j)[: height - i * CHUNK, : width - j * CHUNK]
            parts.append(part[::2, ::2].ravel() if step > 1 else part.ravel())
        return np.concatenate(parts)

    def changed(self) -> bool:
        """Whether the store was written since it was opened."""
        return _token(self.path) != self.token


def _published(about: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What is known of each finished period, by slot."""
    return {int(slot): said for slot, said in about["periods"].items() if said.get("published", True)}


def _token(path: str) -> str:
    with telling(f"read {path}"):
        return store_at(path).version()


def _damaged(path: str, error: Exception) -> StoreMismatchError:
    return StoreMismatchError(f"store: {path} is damaged ({error}); write it again")


def _attributes(path: str, run: RunFolder) -> dict[str, Any]:
    """The attributes of a store with a finished period, or an error that says what is there instead."""
    with telling(f"read {path}"):
        nothing = not store_at(path).names()
    if nothing and not run.exists():
        raise StoreMismatchError(
            f"store: there is nothing at {path}; make a mosaic with `cloudgate mosaic JOB.yaml`, or try `cloudgate "
            "demo`"
        )
    try:
        attrs = stores.read_attrs(path)
    except StoreMismatchError:
        raise StoreMismatchError(
            f"store: {path} was not written by cloudgate; give the path of a store that `cloudgate mosaic` wrote"
        ) from None
    except (ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    if attrs is None or not _published(attrs["cloudgate"]):
        raise StoreMismatchError(
            f"store: no period of {path} is finished yet; see how far it is with `cloudgate status {path}` and go on "
            "with the same `cloudgate mosaic` command"
        )
    return attrs
