"""Tasks on a Dask cluster: in come a recipe and tasks, out come marks of finished shards, with bounded concurrency.

Overviews go the same way: one future per shard of a level, each level after the one below.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distributed import as_completed
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from pipeline import store
from pipeline.errors import RunError
from pipeline.grid import Grid
from pipeline.overviews import coarsen_shard, level_shards
from pipeline.recipe import Recipe
from pipeline.records import RunFolder
from pipeline.report import Progress as Progress
from pipeline.report import Silent as Silent
from pipeline.tasks import Report, Task, run_task


def run_tasks(
    recipe: Recipe,
    tasks: Sequence[Task],
    path: Path,
    slot: int,
    run: RunFolder,
    client: Any,
    progress: Progress,
    *,
    guard: Callable[[], None] = lambda: None,
) -> None:
    """Submit with bounded concurrency; mark each shard as its task comes back, while ``guard`` does not raise."""
    progress.begin("shards", sum(len(task.shards) for task in tasks))
    if not tasks:
        return
    # A task of its own, so that the scheduler can make it again when its holders die; a copy on every worker, since
    # the scheduler would else send all tasks to the one that has it.
    shared = client.submit(_same, recipe, pure=False)
    client.replicate([shared])

    def submit(task: Task) -> Any:
        return client.submit(
            run_task,
            shared,
            task,
            str(path.absolute()),
            slot,
            pure=False,
            retries=1,
            key=f"task-{slot}-{task.rows[0]}-{task.cols[0]}-{time.monotonic_ns()}",
        )

    for report in _bounded(client, submit, tasks):
        guard()
        for number, shard in enumerate(report.task.shards):
            run.mark(slot, shard, _facts(report) if number == 0 else {})
        for note in report.notes:
            progress.say(f"task at {report.task.rows[0]}, {report.task.cols[0]}: {note}")
        progress.step(len(report.task.shards), megabytes=report.bytes_read / 1e6)


def run_overviews(
    path: Path,
    grid: Grid,
    layers: tuple[tuple[str, ...], bool],
    slot: int,
    run: RunFolder,
    client: Any,
    progress: Progress,
    *,
    guard: Callable[[], None] = lambda: None,
) -> None:
    """Write the overviews of one period whose full resolution is written; shards marked before are left out.

    Args:
        path: the store.
        grid: of level 0.
        layers: the store's bands, and whether it has uncertainties.
        slot: index on ``time``.
        run: its records.
        client: a Dask client.
        progress: hears of each shard.
        guard: asked before each mark; what it raises ends the work.
    """
    levels = [(level, sorted({*shards} - run.done(slot, level))) for level, shards in level_shards(grid)]
    progress.begin("overviews", sum(len(shards) for _, shards in levels))
    for level, shards in levels:

        def submit(shard: tuple[int, int], level: int = level) -> Any:
            key = f"overview-{slot}-{level}-{shard[0]}-{shard[1]}-{time.monotonic_ns()}"
            return client.submit(
                coarsen_shard, str(path.absolute()), grid, *layers, slot, level, shard, pure=False, retries=1, key=key
            )

        for shard in _bounded(client, submit, shards):
            guard()
            run.mark(slot, shard, {}, level)
            progress.step(1)


def add_overviews(
    path: Path, run: RunFolder, client: Any, progress: Progress, *, guard: Callable[[], None] = lambda: None
) -> int:
    """Write the overviews of all finished periods of a store and publish them; nothing where they exist.

    Returns:
        How many levels the store has beside full resolution.

    Raises:
        StoreMismatchError: without a finished store. StoreError: if the store cannot be written.
    """
    attrs = store.finished(path)
    about = attrs["cloudgate"]
    grid = Grid.from_dict(about["grid"])
    levels = len(grid.levels()) - 1
    if store.levels(path) < levels:
        layers = (tuple(attrs["bands"]), store.uncertain(path, attrs["bands"]))
        for slot in sorted(int(slot) for slot, made in about["periods"].items() if made.get("published", True)):
            run_overviews(path, grid, layers, slot, run, client, progress, guard=guard)
        guard()
        store.publish_overviews(path, levels)
    return levels


def _bounded[Work](client: Any, submit: Callable[[Work], Any], work: Iterable[Work]) -> Iterator[Any]:
    """Results of submitted work as they come, two futures per worker in flight."""
    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    queue = iter(work)
    flight = as_completed([submit(one) for _, one in zip(range(2 * workers), queue, strict=False)], loop=client.loop)
    for future in flight:
        yield _result(future)
        following = next(queue, None)
        if following is not None:
            flight.add(submit(following))


def _same(recipe: Recipe) -> Recipe:
    return recipe


def _result(future: Any) -> Any:
    """What a finished task returned.

    Raises:
        RunError: if the workers that held it died; what a task itself raises comes as it is.
    """
    try:
        return future.result()
    except (KilledWorker, FutureCancelledError) as error:
        raise RunError(
            f"a task's workers died ({type(error).__name__}), most likely for want of memory; raise "
            "limits.memory_gb_per_worker, or lower cluster.workers or grid.shard_px, then run the same command again: "
            "it goes on after the last finished shard"
        ) from error


def _facts(report: Report) -> dict[str, Any]:
    return {
        "seconds": round(report.seconds, 3),
        "read_seconds": round(report.read_seconds, 3),
        "bytes_read": report.bytes_read,
        "reads": report.reads,
        "failures": [list(f) for f in report.failures[:200]],
        "failed": len(report.failures),
        "filled": report.filled,
        "unfilled": report.unfilled,
        "outside": report.outside,
        "notes": report.notes,
    }
