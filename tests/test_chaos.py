"""Processes that die, hang or never come: real schedulers, workers and clients, ended with SIGKILL."""

import contextlib
import importlib.util
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from small_region import SmallRegion, recipe

from pipeline.cluster import connect
from pipeline.config import Cluster
from pipeline.errors import RunError
from pipeline.flight import Orders
from pipeline.mosaic import build
from pipeline.planning import all_tasks
from pipeline.records import RunFolder
from pipeline.runner import RunContext, Silent, run_tasks

_spec = importlib.util.spec_from_file_location("chaos", Path(__file__).parent / "benchmarks" / "chaos.py")
assert _spec
assert _spec.loader
chaos = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chaos)


def test_killed_at_random_and_the_same_bytes_in_the_end(small: SmallRegion, tmp_path: Path, client):
    quiet = tmp_path / "quiet.zarr"
    build(job=small.job(quiet, grid={"crs": "EPSG:32633", "shard_px": 128}, target="middle"), client=client)
    found = chaos.run(
        small, tmp_path / "w", kills=4, seed=3, every=None, shard_px=128, workers=2, slower_s=0.3, wait_s=(0.2, 1.0),
        quiet=quiet,
    )  # fmt: skip
    assert sum(found["kills"].values()) == 4
    assert found["files"] > 100
    assert found["files_missing"] == found["files_too_many"] == found["files_that_differ"] == []
    assert found["tasks"] == 10
    assert found["computed_again"] <= found["in_flight_at_kills"]


def test_a_read_that_hangs_ends_with_its_worker(small: SmallRegion, tmp_path: Path):
    shutil.copytree(small.folder, tmp_path / "scenes")
    job = small.job(tmp_path / "m.zarr", catalog=str(tmp_path / "scenes" / small.items.name))
    _, _, made = recipe(job)
    scene = next(Path(i.assets["red"].href) for a in made.acquisitions for i in a.items)
    scene.unlink()
    os.mkfifo(scene)  # opening it waits for a writer that never comes
    store, run = tmp_path / "m.zarr", RunFolder(tmp_path / "m.zarr")
    (task,) = all_tasks(made.grid, (2, 2))
    with connect(Cluster(workers=1), memory_gb_per_worker=2) as client:
        before = client.run(os.getpid)
        with pytest.raises(RunError, match=r"task of rows 0 to .* took longer than limits.task_timeout_s \(1 s\) on 2"):
            run_tasks(made, [task], 0, RunContext(store, run, lambda: client, orders=Orders(timeout_s=1)))
        end, after = time.monotonic() + 120, before
        while not set(after.values()).isdisjoint(before.values()):
            assert time.monotonic() < end
            client.wait_for_workers(1, timeout=120)
            with contextlib.suppress(OSError):  # the old worker may just be going
                after = client.run(os.getpid)
    assert run.done(0) == set()


def test_a_run_whose_workers_vanish_ends_with_a_word(small: SmallRegion, tmp_path: Path):
    store = tmp_path / "m.zarr"
    _, _, made = recipe(small.job(store, grid={"crs": "EPSG:32633", "shard_px": 64}))
    tasks = all_tasks(made.grid, (1, 1))
    assert len(tasks) > 50
    with connect(Cluster(workers=1), memory_gb_per_worker=2) as client:

        class Vanish(Silent):
            """No worker is left as soon as one task is done."""

            def step(self, units, *, megabytes=0.0):
                client.cluster.scale(0)

        context = RunContext(store, RunFolder(store), lambda: client, Vanish(), orders=Orders(wait_s=2))
        with pytest.raises(RunError, match=r"no worker for 2 s \(cluster.wait_s\).*same command"):
            run_tasks(made, tasks, 0, context)


def test_tasks_that_share_a_shard_are_refused(small: SmallRegion, tmp_path: Path):
    _, _, made = recipe(small.job(tmp_path / "m.zarr"))
    task = all_tasks(made.grid, (2, 2))[0]
    with pytest.raises(ValueError, match="share a shard"):
        run_tasks(made, [task, *all_tasks(made.grid, (1, 1))], 0, RunContext(tmp_path, RunFolder("x"), lambda: None))


def test_a_task_of_an_older_run_does_not_write(small: SmallRegion, tmp_path: Path):
    from pipeline.errors import StoreError
    from pipeline.tasks import run_task

    _, _, made = recipe(small.job(tmp_path / "m.zarr"))
    RunFolder(tmp_path / "m.zarr").write({"run": "new"}, "request.json")
    with pytest.raises(StoreError, match="another run began it anew"):
        run_task(made, all_tasks(made.grid, (1, 1))[0], str(tmp_path / "m.zarr"), 0, fence="old")
    assert not (tmp_path / "m.zarr").exists()


def test_a_polite_end_releases_the_cluster(small: SmallRegion, tmp_path: Path):
    """SIGTERM, as a scheduler or container sends it: no worker process stays."""
    import subprocess
    import sys

    import psutil
    import yaml

    (tmp_path / "job.yaml").write_text(yaml.safe_dump(small.fields()))
    command = [sys.executable, "-m", "pipeline.cli", "mosaic", "job.yaml", "--out", "m.zarr"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    end, children = time.monotonic() + 180, []
    while not children:
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(psutil.Error):
            children = [child.pid for child in below if "spawn_main" in " ".join(child.cmdline())]
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < end
        time.sleep(0.1)
