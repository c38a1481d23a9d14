"""The control plane alone, without pixels: how long schedules take to be planned, listed and marked.

    uv run python tests/benchmarks/control_plane.py            # both parts
    uv run python tests/benchmarks/control_plane.py --tiles 500

Part 1: ``cloudgate schedule list`` (no search) of 10 areas x 5 years of ten-day periods with full ledgers, as a
process. Part 2: MGRS tiles (18,000 by default, a planet's land) x 12 months: every tile's grid and tasks planned, all
periods listed as due, each marked done by its own compare-and-swap, and listed again.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

from pipeline import ledger as ledgers
from pipeline.agenda import listing
from pipeline.due import begun
from pipeline.errors import ConfigError
from pipeline.ledger import Entry, Ledger
from pipeline.planning import all_tasks
from pipeline.records import RunFolder
from pipeline.region import region_of
from pipeline.schedule import LoadedSchedule, load_schedule
from pipeline.tiles import tile_origin

JOB = {"catalog": "earth-search", "bands": ["blue", "green", "red", "nir"], "method": {"name": "median"}}
RUNS = 5
SCENES = 12
"""Scenes a period and tile: two satellites pass every five days."""


def tiles(count: int) -> list[str]:
    """Names of MGRS tiles that exist, spread over all zones."""
    columns = ("ABCDEFGH", "JKLMNPQR", "STUVWXYZ")
    rows = "ABCDEFGHJKLMNPQRSTUV"
    found: list[str] = []
    for band, row, zone in itertools.product("CDEFGHJKLMNPQRSTUVW", rows, range(1, 61)):
        for column in columns[(zone - 1) % 3]:
            name = f"{zone:02d}{band}{column}{row}"
            try:
                tile_origin(name)
            except ConfigError:
                continue
            found.append(name)
            if len(found) == count:
                return found
    return found


def schedule(folder: Path, areas: object, every: str, start: str) -> Path:
    """A schedule file whose stores lie in ``folder``."""
    path = folder / "schedule.yaml"
    job = JOB | {"output": {"store": f"{folder}/{{area}}.zarr"}}
    path.write_text(yaml.safe_dump({"job": job, "areas": areas, "every": every, "start": start}))
    return path


def mark(loaded: LoadedSchedule, now: datetime, *, one_by_one: bool) -> int:
    """Write every begun period down as done; how many."""
    at, marked = now.isoformat(), 0
    for series in loaded.series:
        objects = RunFolder(series.store).objects
        entries = {
            p.slot: Entry("done", at, "0123456789abcdef", [f"{p.slot:08x}{n:08x}" for n in range(SCENES)])
            for p in begun(series, loaded.spec, now)
        }
        for group in [[slot] for slot in entries] if one_by_one else [list(entries)]:

            def edit(ledger: Ledger, group: list[int] = group, entries: dict[int, Entry] = entries) -> None:
                ledger.periods |= {slot: entries[slot] for slot in group}

            ledgers.change(objects, series.area, edit)
        marked += len(entries)
    return marked


def part_1(folder: Path) -> None:
    """The list command as a process."""
    areas = tiles(10)
    path = schedule(folder, areas, "10 days", "2019-01-01")
    periods = mark(load_schedule(path), datetime.now(UTC), one_by_one=False) // len(areas)
    program = Path(sys.executable).with_name("cloudgate")
    seconds, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(RUNS):
        began = time.perf_counter()
        done = subprocess.run([program, "schedule", "list", path, "--json"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / RUNS
    listed = sum(len(some) for some in json.loads(done.stdout)["areas"].values())
    print(f"schedule list, {len(areas)} areas x {periods} ten-day periods, {listed} standings, {RUNS} runs")
    print(
        f"  median {statistics.median(seconds):.2f} s, at best {min(seconds):.2f} s; processor {processor:.2f} s a run"
    )


def part_2(folder: Path, count: int) -> None:
    """A planet, tile by tile."""
    names = tiles(count)
    (folder / "tiles.txt").write_text("\n".join(names))
    path = schedule(folder, "tiles.txt", "month", "2023-01-01")
    now, began = datetime(2024, 1, 10, tzinfo=UTC), time.perf_counter()
    step = began

    def told(what: str) -> None:
        nonlocal step
        here = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{what}: {here - step:.1f} s (processor {time.process_time():.1f} s, peak {peak:.2f} GB)", flush=True)
        step = here

    loaded = load_schedule(path)
    told(f"schedule of {len(names)} tiles loaded")
    tasks = 0
    for series in loaded.series:
        grid = region_of(series.job.area).grid(series.job.grid, [], series.job.bands)
        tasks += len(all_tasks(grid, (1, 1))) * 12
    told(f"{tasks} tasks of {len(names)} tiles x 12 months planned")
    standings, _ = listing(schedule=loaded, now=now)
    due = sum(s["state"] == "due" for some in standings.values() for s in some)
    told(f"{due} periods listed as due")
    marked = mark(loaded, now, one_by_one=True)
    told(f"{marked} periods marked done, one compare-and-swap each")
    standings, _ = listing(schedule=loaded, now=now)
    done = sum(s["state"] == "done" for some in standings.values() for s in some)
    told(f"{done} periods listed as done")
    print(f"in all {time.perf_counter() - began:.1f} s; processor {time.process_time():.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=18_000)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        arguments = parser.parse_args()
        part_1(Path(one))
        part_2(Path(other), arguments.tiles)
