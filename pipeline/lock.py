"""One writer a store: in come run records, out comes the lock on them, held until the block ends.

On disk it is a file lock (``<store>.run/lock``): the system frees it when its owner dies, however it dies. In a bucket
it is a lease that its owner renews; one that was not renewed for ``LEASE_S`` is taken over, so a second run watches it
so long before it gives up. The object tells who holds it. Locks are re-entrant within a thread: a schedule's tick
holds the lock and calls ``build``, which holds it again.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from pipeline.errors import StoreBusyError, StoreError
from pipeline.objects import BucketObjects, FileObjects, Objects, store_error

NAME: Final = "lock"
LEASE_S: Final = 30.0
"""A lease that was not renewed for so long is free; its owner renews it three times as often."""
POLL_S: Final = 0.5
OPEN_TRIES: Final = 20
"""How often the lock's folder is made again when others take it away; each time another owner has just left."""
UNSURE_S: Final = 180.0
"""How long a writer waits to learn whether its lease is still its own."""
GO_ON: Final = "run the same command again: it goes on where it stopped"


class Records(Protocol):
    """What is locked: run records."""

    objects: Objects


class Held:
    """A lock that is held.

    Attributes:
        lost: why it is ours no more.
        renewed: by ``_now``, when a lease was surely ours for the last time; None for a file lock: none can be lost.
    """

    def __init__(self, renewed: float | None = None) -> None:
        self.lost: str | None = None
        self.renewed = renewed

    def check(self) -> None:
        """Make sure that the lock is ours still; call before writing.

        A lease that was not renewed in time (the bucket does not answer, this machine slept) may be another's by now:
        then this waits until it is renewed or known to be lost.

        Raises:
            StoreBusyError: with who took it, or that it could not be renewed.
        """
        end = _now() + UNSURE_S
        while not self.lost and self.renewed is not None and _now() - self.renewed > LEASE_S:
            if _now() > end:
                self.lost = f"the lease on the store could not be renewed for {_now() - self.renewed:.0f} s; {GO_ON}"
            time.sleep(POLL_S)
        if self.lost:
            raise StoreBusyError(self.lost)


def _now() -> float:
    """Seconds that go on while the machine sleeps, as the others' clocks do."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


_mine = threading.local()


@contextmanager
def hold(run: Records, *, wait_s: float = 0.0) -> Iterator[Held]:
    """Hold the lock of a store's run records.

    Args:
        run: the records (anything with ``objects``).
        wait_s: wait so long for another owner before giving up; 0 refuses as soon as the owner is known to live: at
            once on disk, when it renews its lease in a bucket (up to 10 s).

    Raises:
        StoreBusyError: if another run holds it, with who and since when. StoreError: if the place cannot be written, or
            ignores conditional writes (then no lock is possible).
    """
    held: dict[str, Held] = _mine.__dict__.setdefault("held", {})
    if isinstance(run.objects, FileObjects):
        key, taking = str(run.objects.path.absolute()), _file(run.objects.path, wait_s)
    else:
        assert isinstance(run.objects, BucketObjects)
        key, taking = run.objects.where, _lease(run.objects, wait_s)
    if key in held:
        yield held[key]
        return
    with taking as lock:
        held[key] = lock
        try:
            yield lock
        finally:
            del held[key]


def _about() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pids": _pids(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": Path(sys.argv[0]).name,
        "owner": uuid.uuid4().hex,
    }


def _pids() -> str | None:
    """Where process numbers mean the same: this boot of this machine, and its namespace (a container has its own)."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return None


def _busy(where: str, owner: dict[str, Any]) -> StoreBusyError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
    return StoreBusyError(
        f"another run works on {where.removesuffix('.run')} ({who}); wait for it (--wait SECONDS), look at it with "
        "`cloudgate status`, or end it: then the same command takes over and goes on where it stopped"
    )


def _parse(data: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        owner = json.loads(data)
        if isinstance(owner, dict):
            return owner
    return {}


# -- on disk ----------------------------------------------------------------------------------------------------


@contextmanager
def _file(folder: Path, wait_s: float) -> Iterator[Held]:
    end = time.monotonic() + wait_s
    while (file := _try_file(folder)) is None:
        if time.monotonic() >= end:
            with suppress(OSError):
                raise _busy(str(folder), _parse((folder / NAME).read_bytes()))
            continue  # it was freed meanwhile
        time.sleep(min(POLL_S, max(0.0, end - time.monotonic())))
    try:
        with suppress(OSError):  # a full disk: who holds it is not known then, the lock itself holds
            os.truncate(file, 0)
            os.pwrite(file, json.dumps(_about(), sort_keys=True).encode(), 0)
        yield Held()
    finally:
        with suppress(OSError):
            (folder / NAME).unlink()  # while it is ours; whoever waits for it notices and opens another
            folder.rmdir()  # where nothing was recorded
        os.close(file)  # frees the lock, as does the end of the process


def _try_file(folder: Path) -> int | None:
    """An open file that is locked, None where somebody else has it."""
    path = folder / NAME
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(file)
    return None


def _open(path: Path) -> int:
    """The lock's file in its folder, which an owner who just leaves may take away between the two calls."""
    left = OPEN_TRIES
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            left -= 1
            if not left or not isinstance(error, FileNotFoundError | FileExistsError):
                raise store_error(f"lock {path}", error) from error


# -- in a bucket ------------------------------------------------------------------------------------------------


@contextmanager
def _lease(objects: BucketObjects, wait_s: float) -> Iterator[Held]:
    about = _about()
    tag, asked = _take(objects, about, time.monotonic() + wait_s)
    held, stop = Held(asked), threading.Event()
    state = {"tag": tag}

    def renew() -> None:
        while not stop.wait(LEASE_S / 3):
            asked = _now()
            try:
                new = objects.swap(NAME, _data(about), state["tag"])
                now = objects.get(NAME) if new is None else None
            except StoreError:
                continue  # ``check`` waits meanwhile
            if new is None and now and _parse(now[0]).get("owner") == about["owner"]:
                new = now[1]  # a renewal before arrived, its answer did not
            if new is None:
                held.lost = str(_busy(objects.where, _parse(now[0]) if now else {}))
                return
            state["tag"], held.renewed = new, asked

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join(timeout=LEASE_S)
        if not held.lost:
            # Freed by a swap, not removed: a removal could hit the lease of whoever took over.
            with suppress(StoreError):
                objects.swap(NAME, b"{}", state["tag"])


def _data(about: dict[str, Any]) -> bytes:
    # A renewal must change the object, since some servers' ETag is a digest of the bytes.
    return json.dumps({**about, "beat": uuid.uuid4().hex}, sort_keys=True).encode()


def _take(objects: BucketObjects, about: dict[str, Any], end: float) -> tuple[str, float]:
    """Create the lease, or take over one that is free or whose owner is dead; the tag of ours, and since when.

    Whether an owner still renews is watched here, by this machine's own clock; clocks are never compared.
    """
    seen: tuple[str, float] | None = None
    while True:
        now, asked = objects.get(NAME), _now()
        if now is None:
            tag = objects.swap(NAME, _data(about), None)
            if tag is not None:
                _enforced(objects)
                return tag, asked
            continue
        owner = _parse(now[0])
        if not owner.get("owner") or _dead_here(owner) or (seen and seen[0] == now[1] and _stale(seen[1])):
            tag = objects.swap(NAME, _data(about), now[1])
            if tag is not None:
                _enforced(objects)
                return tag, asked
            continue
        alive = seen is not None and seen[0] != now[1]
        if seen is None or alive:
            seen = now[1], time.monotonic()
        if alive and time.monotonic() >= end:
            raise _busy(objects.where, owner)
        time.sleep(POLL_S)


def _stale(since: float) -> bool:
    return time.monotonic() - since > LEASE_S


def _dead_here(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is gone."""
    if owner.get("host") != socket.gethostname() or owner.get("pids") is None or owner["pids"] != _pids():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError):
        return False
    return False


def _enforced(objects: BucketObjects) -> None:
    """Make sure that the server enforces conditions, else there is no lock at all.

    Raises:
        StoreError: if it does not.
    """
    if objects.swap(NAME, b"{}", None) is not None:
        raise StoreError(
            f"{objects.where}: this object store ignores conditional writes (If-None-Match), so two runs could write "
            "at the same time unseen; use a store that knows them (Amazon S3, MinIO, R2, Ceph), or a local directory"
        )
