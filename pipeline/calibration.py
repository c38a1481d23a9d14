"""How long a job will take: in come recipes and a store's run records, out comes an estimate in seconds.

Where tasks of the same method, mask and bands were done for the store before, their recorded seconds tell. Else a
window of the mosaic is read, composed and written for real, in this process and to a temporary folder. Both are scaled
by looks times pixels. What other work on the machine, a network that gets slower or retries cost is not known before.
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pipeline import store as stores
from pipeline.block import has_uncertainty
from pipeline.config import LEARNED, Job
from pipeline.errors import CloudgateError, ReadError
from pipeline.grid import Grid
from pipeline.jobfile import job_json
from pipeline.looks import cuts
from pipeline.planning import plan_tasks
from pipeline.recipe import Recipe
from pipeline.records import RunFolder
from pipeline.tasks import Task, compose_window, named_layers

SIDE_PX: Final = 1024
"""Side of the window: a block of most catalogs' files, so that none is decoded for a part of it only."""
LEARNED_SIDE_PX: Final = 256
"""Side where a network takes far longer than reading."""
AGAIN_S: Final = 4.0
"""After a quicker first window the one beside it is taken too, with files open and code warm, and counts instead."""
START_S: Final = 4.0
"""Until local worker processes are up with everything imported; a guess for a laptop."""
TASK_S: Final = 0.02
"""What a task costs beside reading, computing and writing, rounded up (3 ms by ``tests/benchmarks/overhead.py``)."""
OVERVIEWS: Final = 0.7
"""Overviews take about so much of the time that writing full resolution takes; a guess."""


@dataclass(frozen=True)
class Rate:
    """What work costs one worker.

    Attributes:
        seconds: for one look at one pixel, read, composed and written.
        write_seconds: the part of it that is writing.
        around: whether pixels that a method looks at around its sub-blocks are counted too.
        basis: where it is known from, in words.
    """

    seconds: float
    write_seconds: float
    around: bool
    basis: str

    def of(self, recipe: Recipe, tasks: Sequence[Task], *, overviews: bool) -> float:
        """Seconds of one worker for all these tasks."""
        work = sum(work_px(recipe, task.rows, task.cols, around=self.around) for task in tasks)
        more = OVERVIEWS * self.write_seconds if overviews else 0.0
        return work * (self.seconds + more) + TASK_S * len(tasks)


def estimate(job: Job, recipes: Mapping[int, Recipe], *, scout_s: float) -> dict[str, Any]:
    """The wall time of a job from now on.

    Args:
        job: the job; the records of its store, if any, say what is done already.
        recipes: slot -> recipe of each period that has scenes, offsets decided.
        scout_s: how long the scout took for them.

    Returns:
        ``seconds`` in all, ``workers``, ``basis`` (in words) and ``periods``: slot -> seconds of its tasks that are not
        done yet. ``seconds`` is None where the window could not be read; then ``basis`` says why.
    """
    workers, run = job.cluster.workers, _records(job)
    left = {slot: plan_tasks(recipe, job, done=run.done(slot) if run else ()) for slot, recipe in recipes.items()}
    out: dict[str, Any] = {"seconds": 0.0, "workers": workers, "basis": "all tasks are done", "periods": {}}
    most, tasks = max(left.values(), key=lambda one: len(one[1]), default=(None, []))
    if most is None or not tasks:
        return out
    try:
        rate = (_recorded(run) if run else None) or _calibrated(most)
    except ReadError as error:
        return {**out, "seconds": None, "basis": f"not known: {error}"}
    for slot, (recipe, tasks) in left.items():
        # In the last round of tasks some workers have none.
        rounds = math.ceil(len(tasks) / workers) / max(len(tasks), 1)
        out["periods"][slot] = round(rate.of(recipe, tasks, overviews=job.output.overviews) * rounds, 1)
    start_s = START_S if job.cluster.kind.startswith("local") else 0.0
    return {**out, "seconds": round(sum(out["periods"].values()) + scout_s + start_s, 1), "basis": rate.basis}


def work_px(recipe: Recipe, rows: tuple[int, int], cols: tuple[int, int], *, around: bool) -> float:
    """Looks times pixels of a rectangle, ``around``: with what its sub-blocks look at beside their own."""
    halo = 2 * recipe.halo if around else 0
    sides = [
        sum(stop - start + halo for start, stop in cuts(span, -span[0], size))
        for span, size in zip((rows, cols), recipe.cut_px, strict=True)
    ]
    return float(len(recipe.acquisitions) * sides[0] * sides[1])


# -- measured before --------------------------------------------------------------------------------------------


def _records(job: Job) -> RunFolder | None:
    """The records of a store that this job began; None where there are none, or not to be reached (a run will tell)."""
    try:
        run = RunFolder(job.output.store) if job.output.store else None
        record = run.read("request.json") if run else None
    except CloudgateError:
        return None
    wanted = job_json(job)
    same = record and all(record["job"].get(name) == wanted[name] for name in ("method", "mask", "bands", "grid"))
    return run if same else None


def _recorded(run: RunFolder) -> Rate | None:
    """From the tasks of the newest period that has any."""
    grid = Grid.from_dict(run.read("request.json")["grid"])
    for slot in reversed(run.slots()):
        scouted, marks = run.read(run.period(slot), "scout.json"), run.marks(slot)
        timed = [mark for mark in marks if "seconds" in mark]
        if scouted and timed:
            share = len(marks) / sum(1 for _ in grid.shards())
            work = len(scouted["layers"]) * grid.height * grid.width * share
            seconds, writing = (sum(mark.get(name, 0.0) for mark in timed) for name in ("seconds", "write_seconds"))
            told = f"{len(timed)} tasks of {run.where}, {seconds / len(timed):.1f} s each"
            return Rate(seconds / work, writing / work, around=False, basis=told)
    return None


# -- measured now -----------------------------------------------------------------------------------------------


def _calibrated(recipe: Recipe) -> Rate:
    """From one or two windows in the middle of the mosaic, on the blocks of its source files.

    Raises:
        ReadError: if a scene cannot be read.
    """
    grid = recipe.grid
    side = LEARNED_SIDE_PX if recipe.method.name in LEARNED else SIDE_PX
    (rows, *_), columns = (
        _middle(size, first - origin, min(side, cut))
        for size, first, origin, cut in zip(
            grid.shape, (grid.row0, grid.col0), recipe.origin, recipe.cut_px, strict=True
        )
    )
    took = wrote = 0.0
    for cols in columns[:2]:
        if took > AGAIN_S:
            break
        began = time.perf_counter()
        block = compose_window(recipe, rows, cols)
        composed = time.perf_counter()
        small = replace(grid.window(rows, cols), shard_px=side)
        with tempfile.TemporaryDirectory() as folder:
            layers = named_layers(block, recipe.bands, has_uncertainty(recipe.method))
            stores.write_region(folder, small, 0, (0, small.height), (0, small.width), layers)
        took, wrote = time.perf_counter() - began, time.perf_counter() - composed
    whole = replace(recipe, cut_px=(grid.height, grid.width))  # the window was one sub-block
    work = work_px(whole, rows, cols, around=True)
    told = f"a window of {small.height} x {small.width} px read, composed and written here in {took:.1f} s"
    return Rate(took / work, wrote / work, around=True, basis=told)


def _middle(size: int, offset: int, side: int) -> list[tuple[int, int]]:
    """Parts of [0, size) cut where ``position + offset`` is a multiple of ``side``: whole ones first, by the middle."""
    parts = cuts((0, size), offset, side)
    return sorted(parts, key=lambda part: (part[0] - part[1], abs(part[0] + part[1] - size)))
