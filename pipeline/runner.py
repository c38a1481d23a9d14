"""Tasks on a Dask cluster: in come a recipe and tasks, out come marks of finished shards, with bounded concurrency.

Overviews go the same way: one future per shard of a level, each level after the one below.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.flight import Flight, Orders, on_duty
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
    orders: Orders | None = None,
) -> None:
    """Submit with bounded concurrency; mark each shard as its task comes back, while ``guard`` does not raise.

    Raises:
        RunError: when workers or scheduler are gone, or a task hangs; what a task itself raises comes as it is.
            ValueError: if two tasks share a shard.
    """
    shards = Counter(shard for task in tasks for shard in task.shards)
    if shards and max(shards.values()) > 1:
        raise ValueError(f"tasks share a shard ({shards.most_common(1)[0][0]}); two writers could meet in it")
    progress.begin("shards", len(shards))
    if not tasks:
        return
    told = orders or Orders()
    where = str(path) if ":" in str(path) else str(Path(path).absolute())  # workers may stand in another folder
    # A task of its own, so that the scheduler can make it again when its holders die; a copy on every worker, since
    # the scheduler would else send all tasks to the one that has it.
    shared = client.submit(_same, recipe, pure=False)

    def submit(task: Task, _key: str, more: dict[str, Any]) -> Any:
        return client.submit(work, shared, task, where, slot, told, **more)

    for report in Flight(client, tasks, submit, lambda task: _name(task, slot), told, [shared]):
        guard()
        for number, shard in enumerate(report.task.shards):
            run.mark(slot, shard, _facts(report) if number == 0 else {})
        for note in report.notes:
            progress.say(f"task at {report.task.rows[0]}, {report.task.cols[0]}: {note}")
        progress.step(len(report.task.shards), megabytes=report.bytes_read / 1e6)
        row, col = report.task.shards[0]
        facts = {name: value for name, value in _facts(report).items() if name != "failures"}
        progress.event("task", period=slot, task=f"{slot}-{row}-{col}", **facts)


def _name(task: Task, slot: int) -> tuple[str, str]:
    place = f"the task of rows {task.rows[0]} to {task.rows[1]}, columns {task.cols[0]} to {task.cols[1]}"
    return f"task-{slot}-{task.rows[0]}-{task.cols[0]}", place


def work(recipe: Recipe, task: Task, path: str, slot: int, orders: Orders) -> Report:
    """Run one task on a worker, within its time."""
    with on_duty(orders):
        return run_task(recipe, task, path, slot, fence=orders.fence)


def coarsen(
    shard: tuple[int, int], level: int, where: tuple[str, Grid, tuple[str, ...], bool], slot: int, orders: Orders
) -> tuple[int, int]:
    """Write one shard of an overview on a worker, within its time."""
    with on_duty(orders):
        return coarsen_shard(*where, slot, level, shard)


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
    orders: Orders | None = None,
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
        orders: see ``Orders``.
    """
    told, where = orders or Orders(), (str(Path(path).absolute()), grid, *layers)
    levels = [(level, sorted({*shards} - run.done(slot, level))) for level, shards in level_shards(grid)]
    progress.begin("overviews", sum(len(shards) for _, shards in levels))
    for level, shards in levels:

        def submit(shard: tuple[int, int], _key: str, more: dict[str, Any], level: int = level) -> Any:
            return client.submit(coarsen, shard, level, where, slot, told, **more)

        def name(shard: tuple[int, int], level: int = level) -> tuple[str, str]:
            key = f"overview-{slot}-{level}-{shard[0]}-{shard[1]}"
            return key, f"shard {shard} of overview {level}"

        for shard in Flight(client, shards, submit, name, told):
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


def _same(recipe: Recipe) -> Recipe:
    return recipe


def _facts(report: Report) -> dict[str, Any]:
    return {
        "seconds": round(report.seconds, 3),
        "read_seconds": round(report.read_seconds, 3),
        "memory_bytes": report.memory_bytes,
        "bytes_read": report.bytes_read,
        "reads": report.reads,
        "failures": [list(f) for f in report.failures[:200]],
        "failed": len(report.failures),
        "filled": report.filled,
        "unfilled": report.unfilled,
        "outside": report.outside,
        "notes": report.notes,
    }
