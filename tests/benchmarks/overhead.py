"""What a task costs beside reading and computing, on a cluster of two worker processes.

    uv run python tests/benchmarks/overhead.py                   # 1,000 and 100 tasks, three runs each in turn
    uv run python tests/benchmarks/overhead.py --runs 1 --profile

A simulated scene of two dates and one band is made into a mosaic of 25 x 40 shards of 64 px, one shard a task, by the
real runner (``build``: search, scout, tasks, overviews, publishing), and a part of it into one of 10 x 10 shards. The
planner would put 1,024 such shards into one task; only that is overruled here.

- **overhead per task**: workers x wall time from the first task's submission to the last one's mark, less the time that
  workers spent in tasks reading and computing (``seconds - write_seconds`` of the run records), by the tasks. So it
  holds scheduling, messages, marks, log lines, writing shards and idle workers. Asked: under 20 ms.
- **cost per task**: that wall time by the tasks; at 1,000 within 20 % of that at 100.
- **run beside tasks**: the whole of ``build`` less that wall time: search, scout, overviews, publishing; the cluster is
  up before.
- **processor**: of the client, with the scheduler in its process, and of both workers, by the tasks, everything counted
  (scout, reading, computing, overviews). Unlike the others it says something on a machine that does other work too.
- **resume**: ``build`` on the finished store of 1,000 shards, and the whole command as a process. Asked: the decision
  in under 2 s.

Medians of the runs. Client and workers need three cores to be as quick as they can.
"""

import argparse
import cProfile
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from pipeline import planning
from pipeline.cluster import connect
from pipeline.config import Cluster
from pipeline.grid import Grid
from pipeline.jobfile import job_from_dict
from pipeline.mosaic import build
from pipeline.records import RunFolder
from pipeline.report import Silent
from pipeline.scenes import DemoScenes, job_fields, write_tile

WORKERS = 2
SHARD_PX = 64
SHAPES = {1000: (25, 40), 100: (10, 10)}
EDGE_PX = 8
"""A box in degrees covers a little more than the pixels it is made for."""


class Watch(Silent):
    """When steps began, when the last task was marked."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.last = 0.0

    def begin(self, what: str, total: int) -> None:
        self.began[what] = time.perf_counter()

    def event(self, what: str, **facts: Any) -> None:
        if what == "task":
            self.last = time.perf_counter()


def job_of(folder: Path, made: DemoScenes, tasks: int, store: Path, cluster: dict[str, Any]) -> dict[str, Any]:
    """The job's fields: so many shards, from a little inside the scene's corner."""
    rows, cols = (n * SHARD_PX - 2 * EDGE_PX for n in SHAPES[tasks])
    top, left = EDGE_PX - round(made.north_m / 10), EDGE_PX + round(made.west_m / 10)
    crs = f"EPSG:{made.epsg}"
    return job_fields(made, folder) | {
        "catalog": str(made.items),
        "area": {"bbox": [round(v, 7) for v in Grid(crs, 10.0, (0.0, 0.0), top, left, rows, cols).lonlat_bounds()]},
        "grid": {"crs": crs, "shard_px": SHARD_PX},
        "bands": ["red"],
        "method": {"name": "median"},
        "output": {"store": str(store)},
        "cluster": cluster,
    }


def measure(fields: dict[str, Any], client: Any) -> dict[str, float]:
    """One run from nothing."""
    watch, job = Watch(), job_from_dict(fields)
    began, own, theirs = time.perf_counter(), time.process_time(), sum(client.run(time.process_time).values())
    summary = build(job=job, client=client, progress=watch)
    whole, own = time.perf_counter() - began, time.process_time() - own
    theirs = sum(client.run(time.process_time).values()) - theirs
    marks = RunFolder(summary.store).marks(0)
    wall, tasks = watch.last - watch.began["shards"], len(marks)
    reading_and_computing = sum(mark["seconds"] - mark["write_seconds"] for mark in marks)
    return {
        "tasks": tasks,
        "overhead_ms": 1e3 * (WORKERS * wall - reading_and_computing) / tasks,
        "of_it_writing_ms": 1e3 * sum(mark["write_seconds"] for mark in marks) / tasks,
        "cost_ms": 1e3 * wall / tasks,
        "beside_s": whole - wall,
        "client_processor_ms": 1e3 * own / tasks,
        "workers_processor_ms": 1e3 * theirs / tasks,
    }


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tasks", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--profile", action="store_true", help="also tell where the client's time goes (slows it down)")
    options = parser.parse_args()
    chosen = planning.layout
    planning.layout = lambda recipe, job: ((1, 1), chosen(recipe, job)[1])
    results: dict[int, list[dict[str, float]]] = {tasks: [] for tasks in options.tasks}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = write_tile(folder, size_px=40 * SHARD_PX, dates=2, start=date(2021, 6, 11), days=6, bands=("red",))
        with connect(Cluster(workers=WORKERS), memory_gb_per_worker=4) as client:
            cluster = {"kind": "address", "address": client.scheduler.address, "workers": WORKERS}
            measure(job_of(folder, made, 100, folder / "warm.zarr", cluster), client)
            for run in range(options.runs):
                for tasks in options.tasks:
                    fields = job_of(folder, made, tasks, folder / f"{tasks}-{run}.zarr", cluster)
                    results[tasks].append(measure(fields, client))
            if options.profile:
                profile = cProfile.Profile()
                profile.runcall(measure, job_of(folder, made, 1000, folder / "profiled.zarr", cluster), client)
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        for tasks, runs in results.items():
            told = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
            print(f"{tasks}: {told}")
        if len(results) < 2:
            return
        ratio = [big["cost_ms"] / small["cost_ms"] for big, small in zip(*(results[n] for n in SHAPES), strict=True)]
        print(f"cost per task at 1,000 against 100: x{statistics.median(ratio):.2f}")
        resume(job_of(folder, made, 1000, folder / "1000-0.zarr", {"kind": "local"}), folder, options.runs)


def resume(fields: dict[str, Any], folder: Path, runs: int) -> None:
    """The finished store again: in this process, then as a command."""
    seconds: dict[str, list[float]] = {"build": [], "the command": []}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    for _ in range(max(runs, 3)):
        began = time.perf_counter()
        assert build(job=job_from_dict(fields)).periods[0]["message"] == "finished before"
        seconds["build"].append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([Path(sys.executable).with_name("cloudgate"), "mosaic", path], check=True, capture_output=True)
        seconds["the command"].append(time.perf_counter() - began)
    for what, took in seconds.items():
        print(f"resume of the finished store, {what}: median {statistics.median(took):.2f} s, best {min(took):.2f} s")


if __name__ == "__main__":
    main()
