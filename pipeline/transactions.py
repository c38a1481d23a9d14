"""Icechunk repositories: in come a period's shards on a work branch, out comes one commit on ``main``.

A unit of work (a period, or overviews added later) has a branch beside ``main`` with one commit. Workers write chunks
through forks of a session on it and hand back what they changed (about 100 bytes a chunk, no pixels). The run merges
that into the commit with ``amend`` and only then marks the shards; at the end ``main`` is moved to the branch, and what
no branch names is removed (it was never on ``main``: amended commits, chunks of killed tasks). So a
reader of ``main`` meets whole periods only, a kill loses nothing that was marked, and history has one commit a period.

Only the run that holds the store's lock commits: workers that amend break each other (dynamical-org/reformatters#633),
and on local files icechunk itself cannot tell two committers apart (earth-mover/icechunk#804).
"""

import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync

from pipeline.errors import StoreError
from pipeline.objects import in_bucket, need, objects_at, s3_keys, s3_place, s3_unsigned, split_s3

PREFIX: Final = "icechunk:"
MAIN: Final = "main"
_UNIT: Final = re.compile(r"period-\d{4,}|overviews")
_KEYS_FOR: Final = timedelta(minutes=5)
"""Credentials are asked for again so often; whoever finds them (a role, a profile) knows when they really end."""


@dataclass(frozen=True)
class Repository:
    """A store in an icechunk repository, ``icechunk:PATH`` or ``icechunk:s3://BUCKET/PREFIX``; see ``Location``."""

    where: str
    consolidated: ClassVar = False
    replaces: ClassVar = True

    @property
    def place(self) -> str:
        """Path or URL of the repository."""
        return self.where.removeprefix(PREFIX)

    def absolute(self) -> str:
        """See ``Location``."""
        return self.where if in_bucket(self.place) else PREFIX + str(Path(self.place).absolute())

    # -- readers ------------------------------------------------------------------------------------------------

    def holds(self, key: str) -> bool:
        """See ``Location``."""
        return self.exists() and sync(self.reader().exists(key))

    def names(self) -> set[str]:
        """See ``Location``; of a repository, what is on ``main``, and branches that are not ours."""
        if not self.exists():
            return {name.partition("/")[0] for name in objects_at(self.place).names()}
        foreign = {name for name in self._open().list_branches() if name != MAIN and not _UNIT.fullmatch(name)}
        return foreign | set(sync(_listed(self.reader())))

    def version(self) -> str:
        """See ``Location``: the commit that readers see."""
        return str(self._open().lookup_branch(MAIN)) if self.exists() else ""

    def reader(self) -> Store:
        """See ``Location``."""
        return self._open().readonly_session(branch=MAIN).store

    source = reader

    # -- a unit of work -----------------------------------------------------------------------------------------

    def begin(self, unit: str, prepare: Callable[[Store], None]) -> None:
        """See ``Location``: the unit's branch with its one commit, on top of ``main``."""
        repo = _icechunk().Repository.open_or_create(_storage(self.place))
        if unit not in repo.list_branches():
            repo.create_branch(unit, repo.lookup_branch(MAIN))
        _onto_main(repo, unit)
        session = repo.writable_session(unit)
        prepare(session.store)
        if session.snapshot_id == repo.lookup_branch(MAIN):
            session.commit(f"{unit}: begun", allow_empty=True)
        elif session.has_uncommitted_changes:
            session.amend(f"{unit}: begun")

    def writer(self, unit: str) -> Store:
        """See ``Location``."""
        return self._open().writable_session(unit).fork().store

    def changes(self, written: Any) -> Any:
        """See ``Location``: the fork, which names chunks; it can be pickled and holds no credentials."""
        return written.session

    def keep(self, unit: str, changes: Any) -> None:
        """See ``Location``."""
        session = self._open().writable_session(unit)
        session.merge(changes)
        session.amend(f"{unit}: unfinished")

    def written(self, unit: str) -> Store:
        """See ``Location``."""
        repo = self._open()
        return repo.readonly_session(branch=unit if unit in repo.list_branches() else MAIN).store

    @contextmanager
    def publishing(self, unit: str, message: str) -> Iterator[Store]:
        """See ``Location``. What is published again in the same words (after a kill) takes the place of its commit."""
        repo = self._open()
        if unit in repo.list_branches():
            _onto_main(repo, unit)
            base, session = repo.lookup_branch(MAIN), repo.writable_session(unit)
            yield session.store
            repo.reset_branch(MAIN, session.amend(message, allow_empty=True), from_snapshot_id=base)
            repo.delete_branch(unit)
            with suppress(_icechunk().IcechunkError):  # what cannot be removed now is when the next unit ends
                repo.garbage_collect(datetime.now(UTC))  # commits that were amended, chunks of killed tasks
            return
        session = repo.writable_session(MAIN)
        yield session.store
        if next(iter(repo.ancestry(branch=MAIN))).message == message:
            session.amend(message, allow_empty=True)
        else:
            session.commit(message, allow_empty=True)

    def discard(self, unit: str) -> None:
        """See ``Location``."""
        if self.exists() and unit in (repo := self._open()).list_branches():
            repo.delete_branch(unit)

    def remove(self) -> None:
        """See ``Location``."""
        if in_bucket(self.place):
            objects_at(self.place).clear("")
        else:
            shutil.rmtree(self.place, ignore_errors=True)

    def exists(self) -> bool:
        """See ``Location``."""
        return bool(_icechunk().Repository.exists(_storage(self.place)))

    def _open(self) -> Any:
        return _icechunk().Repository.open(_storage(self.place))


def _onto_main(repo: Any, unit: str) -> None:
    """Lay a unit's commit on top of ``main`` where that has moved since: another period was published meanwhile.

    Raises:
        StoreError: if the branch holds more than the unit's commit.
    """
    tip, base = repo.lookup_branch(unit), repo.lookup_branch(MAIN)
    if tip == base:
        return
    before = [entry.id for entry in islice(repo.ancestry(branch=unit), 2)][1]
    if before == base:
        return
    if before not in {entry.id for entry in repo.ancestry(branch=MAIN)}:
        raise StoreError(
            f"branch {unit} of the repository does not begin on {MAIN}; delete it, or start over: --restart"
        )
    session, old = repo.writable_session(MAIN), repo.readonly_session(snapshot_id=tip).store
    diff = repo.diff(from_snapshot_id=before, to_snapshot_id=tip)
    for path in sorted(diff.new_groups):
        sync(_copy(old, session.store, f"{path}/zarr.json", lambda there, _: there is None))
    for path in sorted(diff.new_arrays | diff.updated_arrays):
        sync(_copy(old, session.store, f"{path}/zarr.json", _shorter))
    for path, chunks in sorted(diff.updated_chunks.items()):
        for chunk in chunks:
            sync(_copy(old, session.store, f"{path}/c/{'/'.join(map(str, chunk))}", lambda *_: True))
    repo.reset_branch(unit, session.flush(f"{unit}: unfinished"), from_snapshot_id=tip)


def _shorter(there: Buffer | None, mine: Buffer) -> bool:
    """Whether an array's metadata ``there`` know fewer slots of time than ``mine``."""
    slots = [json.loads(one.to_bytes())["shape"][0] for one in (there, mine) if one is not None]
    return there is None or slots[0] < slots[1]


async def _copy(source: Store, target: Store, key: str, wanted: Callable[[Buffer | None, Buffer], bool]) -> None:
    """Copy an object, which may be gone in the source, where ``wanted`` (what is there, what comes)."""
    key, prototype = key.lstrip("/"), default_buffer_prototype()
    there, mine = await target.get(key, prototype), await source.get(key, prototype)
    if mine is None:
        await target.delete(key)
    elif wanted(there, mine):
        await target.set(key, mine)


async def _listed(store: Store) -> list[str]:
    names: AsyncIterator[str] = store.list_dir("")
    return [name async for name in names]


# -- the library ------------------------------------------------------------------------------------------------


@cache
def _icechunk() -> Any:
    try:
        import icechunk
    except ImportError as error:
        raise need("icechunk", error) from error
    if "ICECHUNK_LOG" not in os.environ:
        icechunk.set_logs_filter("error")  # else each opening warns of concurrent commits, which the lock prevents
    return icechunk


def _storage(place: str) -> Any:
    ice = _icechunk()
    if not in_bucket(place):
        return ice.local_filesystem_storage(place)
    bucket, prefix = split_s3(place)
    endpoint, region = s3_place()
    access = {"anonymous": True} if s3_unsigned() else {"get_credentials": _credentials}
    return ice.s3_storage(
        bucket=bucket,
        prefix=prefix,
        region=region,
        endpoint_url=endpoint,
        allow_http=True,
        force_path_style=endpoint is not None,
        **access,
    )


def _credentials() -> Any:
    """This process's credentials; a session that travels names this function, never what it returns."""
    access, secret, token = s3_keys()
    return _icechunk().S3StaticCredentials(access, secret, token, datetime.now(UTC) + _KEYS_FOR)
