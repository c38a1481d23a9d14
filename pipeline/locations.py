"""Where a store lies: in comes ``output.store`` as it was written, out comes what reads, writes and publishes there.

    out/graz.zarr                 files in a folder
    s3://bucket/graz.zarr         objects in a bucket of any S3 endpoint
    icechunk:out/graz             an icechunk repository in a folder (``pipeline.transactions``)
    icechunk:s3://bucket/graz     one in a bucket

Layout, metadata and identity are the same for every kind and live in ``pipeline.store``; nothing else asks which it is.
"""

import re
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore, ObjectStore

from pipeline.objects import in_bucket, objects_at, s3_store
from pipeline.transactions import PREFIX, Repository


class Location(Protocol):
    """One place of a store. A *unit* of work is what is published in one step: a period, or overviews added later.

    Attributes:
        where: the place, for messages and to name it elsewhere.
        consolidated: readers find groups by consolidated metadata.
        replaces: readers see a period's old pixels until its new ones are whole, so it need not be hidden meanwhile.
    """

    @property
    def where(self) -> str:
        """See the class."""

    @property
    def consolidated(self) -> bool:
        """See the class."""

    @property
    def replaces(self) -> bool:
        """See the class."""

    def absolute(self) -> str:
        """The place as a worker in another folder must name it."""

    def holds(self, key: str) -> bool:
        """Whether readers find an object."""

    def names(self) -> set[str]:
        """What lies at the top of the place; nothing where there is no store."""

    def exists(self) -> bool:
        """Whether anything of a store is there, published or not."""

    def version(self) -> str:
        """What changes whenever something is published, fit for an address; empty where nothing was."""

    def reader(self) -> Store:
        """What readers see."""

    def source(self) -> str | Store:
        """What xarray opens."""

    def begin(self, unit: str, prepare: Callable[[Store], None]) -> None:
        """Make ready for a unit's shards; ``prepare`` writes their arrays' metadata where those must come first."""

    def writer(self, unit: str) -> Store:
        """Where a worker writes shards of a unit."""

    def changes(self, written: Store) -> Any:
        """What the worker hands back of a ``writer``, for ``keep``."""

    def keep(self, unit: str, changes: Any) -> None:
        """Make a worker's shards last; called before they are marked as done."""

    def written(self, unit: str) -> Store:
        """Where shards of a unit can be read back before they are published."""

    def publishing(self, unit: str, message: str) -> AbstractContextManager[Store]:
        """Where a unit's metadata are written; when the block ends, readers see the unit."""

    def discard(self, unit: str) -> None:
        """Forget what was kept of a unit and not published."""

    def remove(self) -> None:
        """Remove the store."""


def store_at(where: str | Path) -> Location:
    """The location that ``output.store`` names.

    Raises:
        ConfigError: for another kind of URL.
    """
    text = str(where).rstrip("/")
    remote = in_bucket(text.removeprefix(PREFIX))
    if text.startswith(PREFIX):
        return Repository(text)
    return Bucket(text) if remote else Folder(str(Path(text)))


class _Plain:
    """Shards are written where readers look, hidden by the metadata that come last."""

    consolidated: ClassVar = True
    replaces: ClassVar = False

    @abstractmethod
    def reader(self) -> Store:
        """See ``Location``."""

    @abstractmethod
    def names(self) -> set[str]:
        """See ``Location``."""

    def exists(self) -> bool:
        """See ``Location``."""
        return bool(self.names())

    def begin(self, unit: str, prepare: Callable[[Store], None]) -> None:
        """Nothing to make ready."""

    def writer(self, unit: str) -> Store:  # noqa: ARG002 - units share the place
        """See ``Location``."""
        return self.reader()

    written = writer

    def changes(self, written: Store) -> None:
        """Nothing to hand back."""

    def keep(self, unit: str, changes: Any) -> None:
        """It lasts already."""

    @contextmanager
    def publishing(self, unit: str, message: str) -> Iterator[Store]:  # noqa: ARG002 - no history
        """See ``Location``: the last object written is the one that readers go by."""
        yield self.reader()

    def discard(self, unit: str) -> None:
        """It is written over."""


@dataclass(frozen=True)
class Folder(_Plain):
    """A folder on disk."""

    where: str

    def absolute(self) -> str:
        """See ``Location``."""
        return str(Path(self.where).absolute())

    def holds(self, key: str) -> bool:
        """See ``Location``."""
        return (Path(self.where) / key).exists()

    def names(self) -> set[str]:
        """See ``Location``."""
        path = Path(self.where)
        if path.is_dir():
            return {entry.name for entry in path.iterdir()}
        return {path.name} if path.exists() else set()

    def version(self) -> str:
        """See ``Location``: the metadata that are written last."""
        try:
            return f"{(Path(self.where) / 'zarr.json').stat().st_mtime_ns:x}"
        except OSError:
            return ""

    def reader(self) -> Store:
        """See ``Location``."""
        return LocalStore(self.where)

    def source(self) -> str:
        """See ``Location``; of a path xarray knows when it was changed."""
        return self.where

    @contextmanager
    def publishing(self, unit: str, message: str) -> Iterator[Store]:
        """See ``Location``; what a killed writer left goes first."""
        for partial in Path(self.where).rglob("*.partial"):
            partial.unlink(missing_ok=True)
        with super().publishing(unit, message) as store:
            yield store

    def remove(self) -> None:
        """See ``Location``."""
        shutil.rmtree(self.where, ignore_errors=True)


@dataclass(frozen=True)
class Bucket(_Plain):
    """Objects under a prefix of a bucket. A killed writer leaves nothing there: an upload is whole or not at all."""

    where: str

    def absolute(self) -> str:
        """See ``Location``."""
        return self.where

    def holds(self, key: str) -> bool:
        """See ``Location``."""
        return sync(self.reader().exists(key))

    def names(self) -> set[str]:
        """See ``Location``."""
        found = s3_store(self.where).list_with_delimiter()
        return {*found["common_prefixes"], *(meta["path"] for meta in found["objects"])}

    def version(self) -> str:
        """See ``Location``: the metadata that are written last, which may come again with the same bytes."""
        try:
            root = s3_store(self.where).head("zarr.json")
        except FileNotFoundError:
            return ""
        return re.sub(r"\W", "", f"{root['e_tag']}{root['last_modified'].timestamp():.0f}")

    def reader(self) -> Store:
        """See ``Location``."""
        return BucketStore(s3_store(self.where))

    source = reader

    def remove(self) -> None:
        """See ``Location``."""
        objects_at(self.where).clear("")


class BucketStore(ObjectStore[Any]):
    """zarr's store of a bucket that travels to other processes by its address only; each finds its own credentials."""

    def __reduce__(self) -> tuple[Callable[[str, bool], "BucketStore"], tuple[str, bool]]:
        return _opened, (f"s3://{self.store.config['bucket']}/{self.store.prefix}", self.read_only)


def _opened(url: str, read_only: bool) -> BucketStore:
    return BucketStore(s3_store(url), read_only=read_only)
