"""Kill client, workers and scheduler of a running job at random, again and again; compare the store with a quiet run's.

    uv run python tests/benchmarks/chaos.py [--kills 20] [--seed 0] [--shard-px 64] [--every week] [--workers 3]

Real processes: ``dask scheduler``, ``dask worker`` (with nannies) and ``cloudgate mosaic``, all killed with SIGKILL.
The same command is started again until it exits 0. Told at the end: kills by kind, files that differ, are missing or
too many (must be none), tasks computed more than once (at most those in flight at a kill). With fewer kills it is a
test (``tests/test_chaos.py``).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import small_region

from pipeline.serve import _free_port

CLIENT = "import sys; from pipeline import planning; planning.TASK_PX = 16; from pipeline.cli import main; main()"
"""``cloudgate`` with one shard a task, so that a small region makes many tasks."""

COUNT = """
import os, time

def dask_setup(worker):
    if type(worker).__name__ != "Worker":
        return  # the nanny
    from pipeline import runner
    from pipeline.tasks import run_task

    def counted(recipe, task, path, slot, **more):
        with open(os.environ["CHAOS_COUNT"], "a") as log:
            log.write(f"{slot} {task.rows[0]} {task.cols[0]}\\n")
        time.sleep(float(os.environ["CHAOS_SLOWER_S"]))
        return run_task(recipe, task, path, slot, **more)

    runner.run_task = counted
"""
"""Preload of the workers: count the tasks that begin, and slow them down."""


@dataclass
class Cluster:
    """A scheduler and workers, brought up again whenever they are dead."""

    folder: Path
    workers: int
    slower_s: float
    port: int = field(default_factory=_free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def mend(self) -> None:
        names = ["scheduler", *(f"worker-{number}" for number in range(self.workers))]
        for name in names:
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                self.processes[name] = self._start(name)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        common = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
        if name == "scheduler":
            arguments = ["scheduler", "--port", str(self.port), *common]
        else:
            scratch = str(self.folder / "scratch")
            arguments = ["worker", self.address, "--nthreads", "1", "--death-timeout", "600", *common]
            arguments += ["--local-directory", scratch, "--preload", str(self.folder / "count.py")]
        environment = {"CHAOS_COUNT": str(self.folder / "count.txt"), "CHAOS_SLOWER_S": str(self.slower_s)}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment, "PYTHONWARNINGS": "ignore"},
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """The whole of it: a nanny would bring its worker back."""
        kill(self.processes[name])

    def kill_child(self, name: str) -> bool:
        """Only the worker process under a nanny; False where it has none now."""
        nanny = self.processes[name].pid
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(nanny)], capture_output=True, text=True
        ).stdout.split()
        for pid in found:
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(errors="ignore"):
                os.kill(int(pid), signal.SIGKILL)
                return True
        return False

    def end(self) -> None:
        for process in self.processes.values():
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def client(folder: Path, job: Path, store: Path) -> subprocess.Popen[bytes]:
    with (folder / "client.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, "mosaic", str(job), "--out", str(store), "--wait", "60"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
        )


def run(
    region: small_region.SmallRegion,
    folder: Path,
    *,
    kills: int,
    seed: int,
    every: str | None,
    shard_px: int,
    workers: int,
    slower_s: float = 0.0,
    kinds: tuple[str, ...] = ("client", "scheduler", "worker", "worker child"),
    wait_s: tuple[float, float] = (0.3, 6.0),
    most_s: float = 3600.0,
    quiet: Path | None = None,
) -> dict[str, Any]:
    """One run with ``kills``; what differs from the store of a ``quiet`` run, which is made where none is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "count.py").write_text(COUNT)
    cluster, draw = Cluster(folder, workers, slower_s), random.Random(seed)
    time_ = {"start": "2021-06-11", "end": "2021-08-08"} | ({"every": every, "lookback_days": 20} if every else {})
    fields = region.fields(
        time=time_,
        target="middle",
        grid={"crs": "EPSG:32633", "shard_px": shard_px},
        cluster={"kind": "address", "address": cluster.address, "wait_s": 300},
    )
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(fields))
    killed: Counter[str] = Counter()
    seen = 0
    exits: Counter[int] = Counter()
    began = time.monotonic()
    try:
        cluster.mend()
        if quiet is None:
            quiet = folder / "quiet.zarr"
            if client(folder, job, quiet).wait(most_s) != 0:
                raise RuntimeError((folder / "client.log").read_text()[-2000:])
            (folder / "count.txt").unlink()
        quiet_s = time.monotonic() - began
        began = time.monotonic()
        running = client(folder, job, folder / "chaos.zarr")
        following = began + draw.uniform(*wait_s)
        while True:
            time.sleep(0.05)
            cluster.mend()
            code = running.poll()
            if code is not None:
                exits[code] += 1
                if code == 0:
                    break
                if code not in (1, -signal.SIGKILL) or time.monotonic() - began > most_s:
                    raise RuntimeError(f"exit {code}: " + (folder / "client.log").read_text()[-2000:])
                running = client(folder, job, folder / "chaos.zarr")
            # Only once a task has begun since the last kill: else all die while they start on a slow machine.
            at_work = sum(_computed(folder).values())
            if sum(killed.values()) < kills and time.monotonic() > following and at_work > seen:
                kind = draw.choice(kinds)
                if _strike(kind, cluster, running, draw):
                    killed[kind] += 1
                    seen = at_work
                following = time.monotonic() + draw.uniform(*wait_s)
    finally:
        cluster.end()
    one, other = (small_region.objects(store) for store in (quiet, folder / "chaos.zarr"))
    computed = _computed(folder)
    return {
        "kills": dict(killed),
        "client_exits": {str(code): count for code, count in exits.items()},
        "files": len(one),
        "files_missing": sorted(one.keys() - other.keys()),
        "files_too_many": sorted(other.keys() - one.keys()),
        "files_that_differ": sorted(name for name in one.keys() & other.keys() if one[name] != other[name]),
        "tasks": len(computed),
        "computed_again": sum(computed.values()) - len(computed),
        "in_flight_at_kills": sum(killed.values()) * 2 * workers,
        "seconds_quiet": round(quiet_s, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def _computed(folder: Path) -> Counter[str]:
    file = folder / "count.txt"
    return Counter(file.read_text().splitlines()) if file.exists() else Counter()


def _strike(kind: str, cluster: Cluster, running: subprocess.Popen[bytes], draw: random.Random) -> bool:
    if kind == "client":
        kill(running)
    elif kind == "scheduler":
        cluster.kill("scheduler")
    else:
        name = f"worker-{draw.randrange(cluster.workers)}"
        if kind == "worker child":
            return cluster.kill_child(name)
        cluster.kill(name)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--shard-px", type=int, default=64)
    parser.add_argument("--every", default="week")
    parser.add_argument("--slower-s", type=float, default=0.2, help="each task takes so much longer")
    parser.add_argument(
        "--wait-s", type=float, nargs=2, default=(0.3, 6.0), help="least and most seconds to the next kill"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        region = small_region.write(folder / "region")
        found = run(region, folder / "work", **vars(options))
        print(json.dumps(found, indent=1))
    if found["files_missing"] or found["files_too_many"] or found["files_that_differ"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
