"""One writer a store: refusal with a name, waiting, take-over from the dead, on disk and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import lock
from pipeline.errors import StoreBusyError, StoreError
from pipeline.lock import hold
from pipeline.objects import objects_at
from pipeline.records import RunFolder

HOLDER = """
import sys, time
from pipeline import lock
from pipeline.lock import hold
from pipeline.records import RunFolder
lock.LEASE_S = 3.0
with hold(RunFolder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def holder(store: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, store, str(seconds)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(params=["disk", "bucket"])
def store(request, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "m.zarr")
    return request.getfixturevalue("bucket") + f"/{tmp_path.name}/m.zarr"


def test_a_second_run_is_refused_with_a_name(store, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_S", 3.0)
    with holder(store, 60) as other:
        # In a bucket the owner's next sign of life is waited for; its process renews with the usual period.
        if store.startswith("s3"):
            monkeypatch.setattr(lock, "LEASE_S", 30.0)
        with (
            pytest.raises(StoreBusyError, match=rf"process {other.pid} on .*--wait.*takes over"),
            hold(RunFolder(store)),
        ):
            pass


def test_a_second_run_waits(store):
    with holder(store, 1.0):
        began = time.monotonic()
        with hold(RunFolder(store), wait_s=30):
            assert time.monotonic() - began > 0.3


def test_a_dead_owner_s_lock_is_taken_over(store):
    with holder(store, 60) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with hold(RunFolder(store)) as mine:
            mine.check()


def test_locks_are_reentrant_and_leave_nothing(store):
    run = RunFolder(store)
    with hold(run), hold(RunFolder(store)):
        pass
    if not store.startswith("s3"):
        assert not run.path.exists()
    with hold(run):
        pass


def test_a_folder_that_its_last_owner_just_took_away_is_made_again(tmp_path, monkeypatch):
    run, opened = RunFolder(str(tmp_path / "m.zarr")), os.open

    def after_the_owner_left(path, *args):
        monkeypatch.setattr(lock.os, "open", opened)
        Path(path).parent.rmdir()
        return opened(path, *args)

    monkeypatch.setattr(lock.os, "open", after_the_owner_left)
    with hold(run):
        assert (run.path / lock.NAME).exists()


def test_a_place_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "m.zarr.run").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot lock .*m\.zarr\.run"), hold(RunFolder(str(tmp_path / "m.zarr"))):
        pass


def test_a_lease_of_a_dead_machine_ends(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    run = RunFolder(f"{bucket}/{tmp_path.name}/m.zarr")
    elsewhere = {"host": "elsewhere", "pid": 1, "owner": "x", "since": "2026"}
    run.objects.put(lock.NAME, json.dumps(elsewhere).encode())
    began = time.monotonic()
    with hold(run):
        assert time.monotonic() - began >= 1.0


def test_who_lost_the_lease_is_told(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_S", 0.6)
    run = RunFolder(f"{bucket}/{tmp_path.name}/m.zarr")
    with hold(run) as mine:
        run.objects.put(lock.NAME, json.dumps({"host": "thief", "pid": 7, "owner": "y"}).encode())
        time.sleep(1.0)
        with pytest.raises(StoreBusyError, match="process 7 on thief"):
            mine.check()
    taken = run.objects.get(lock.NAME)
    assert taken is not None
    assert b"thief" in taken[0]  # what is not ours is left alone


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_compare_and_swap(kind, tmp_path, request):
    where = str(tmp_path / "x.run") if kind == "disk" else request.getfixturevalue("bucket") + f"/{tmp_path.name}/x.run"
    objects = objects_at(where)
    first = objects.swap("ledger.json", b"1", None)
    assert first
    assert objects.swap("ledger.json", b"2", None) is None
    second = objects.swap("ledger.json", b"2", first)
    assert second
    assert objects.swap("ledger.json", b"3", first) is None
    assert objects.get("ledger.json") == (b"2", second)
    objects.put("period-0001/done/0.0.json", b"{}")
    assert objects.names() == ["ledger.json", "period-0001/done/0.0.json"]
    assert objects.names("period-0001/done/") == ["period-0001/done/0.0.json"]
    objects.clear("period-")
    objects.remove("ledger.json")
    objects.remove("ledger.json")
    assert objects.names() == []
    assert objects.get("ledger.json") is None


def test_a_process_number_of_another_namespace_says_nothing():
    about = lock._about() | {"pid": 2**22 + 1}
    assert lock._dead_here(about)
    assert not lock._dead_here(about | {"pids": "another boot pid:[1]"})
    assert not lock._dead_here({key: value for key, value in about.items() if key != "pids"})


def test_a_writer_does_not_trust_a_lease_that_was_not_renewed(monkeypatch):
    monkeypatch.setattr(lock, "UNSURE_S", 0.0)
    lock.Held(lock._now()).check()
    with pytest.raises(StoreBusyError, match="could not be renewed"):
        lock.Held(lock._now() - 2 * lock.LEASE_S).check()
