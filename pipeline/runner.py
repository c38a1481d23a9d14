"""Tasks on a Dask cluster: in come a recipe and tasks, out come marks of finished shards, with bounded concurrency.

Overviews go the same way: one future per shard of a level, each level after the one below.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.flight import Flight, Orders, on_duty
from pipeline.grid import Grid
from pipeline.locations import store_at
from pipeline.overviews import coarsen_shard, level_shards
from pipeline.recipe import Recipe
from pipeline.records import RunFolder
from pipeline.report import Progress as Progress
from pipeline.report import Silent as Silent
from pipeline.tasks import Report, Task, check_fence, run_task


@dataclass(frozen=True)
class RunContext:
    """What a run works with, whatever it is at.

    Attributes:
        path: the store.
        records: its run records.
        connect: gives the Dask client; called when there is work, so that a finished store needs no cluster.
        progress: hears what goes on.
        guard: asked before each mark; what it raises ends the work.
        orders: see ``Orders``; each period adds its own fence.
    """

    path: str | Path
    records: RunFolder
    connect: Callable[[], Any]
    progress: Progress = field(default_factory=Silent)
    guard: Callable[[], None] = lambda: None
    orders: Orders = field(default_factory=Orders)

    @property
    def where(self) -> str:
        """The store as workers find it, who may stand in another folder."""
        return store_at(self.path).absolute()

    def orders_of(self, slot: int) -> Orders:
        """The orders for one period, which workers write only while it is not begun anew."""
        return replace(self.orders, fence=self.records.fence(slot))


def run_tasks(recipe: Recipe, tasks: Sequence[Task], slot: int, context: RunContext) -> None:
    """Submit with bounded concurrency; mark each shard as its task comes back, while the guard does not raise.

    The store must have been made ready (``store.begin``).

    Raises:
        RunError: when workers or scheduler are gone, or a task hangs; what a task itself raises comes as it is.
            ValueError: if two tasks share a shard.
    """
    shards = Counter(shard for task in tasks for shard in task.shards)
    if shards and max(shards.values()) > 1:
        raise ValueError(f"tasks share a shard ({shards.most_common(1)[0][0]}); two writers could meet in it")
    progress = context.progress
    progress.begin("shards", len(shards))
    if not tasks:
        return
    client, orders = context.connect(), context.orders_of(slot)
    # A task of its own, so that the scheduler can make it again when its holders die; a copy on every worker, since
    # the scheduler would else send all tasks to the one that has it.
    shared = client.submit(_same, recipe, pure=False)

    def submit(task: Task, _key: str, more: dict[str, Any]) -> Any:
        return client.submit(work, shared, task, context.where, slot, orders, **more)

    for report in Flight(client, tasks, submit, lambda task: _name(task, slot), orders, [shared]):
        context.guard()
        store.keep(context.path, slot, report.changes)
        facts = _facts(report)
        for number, shard in enumerate(report.task.shards):
            context.records.mark(slot, shard, facts if number == 0 else {})
        for note in report.notes:
            progress.say(f"task at {report.task.rows[0]}, {report.task.cols[0]}: {note}")
        progress.step(len(report.task.shards), megabytes=report.bytes_read / 1e6)
        row, col = report.task.shards[0]
        told = {name: value for name, value in facts.items() if name != "failures"}
        progress.event("task", period=slot, task=f"{slot}-{row}-{col}", **told)


def _name(task: Task, slot: int) -> tuple[str, str]:
    place = f"the task of rows {task.rows[0]} to {task.rows[1]}, columns {task.cols[0]} to {task.cols[1]}"
    return f"task-{slot}-{task.rows[0]}-{task.cols[0]}", place


def work(recipe: Recipe, task: Task, path: str, slot: int, orders: Orders) -> Report:
    """Run one task on a worker, within its time."""
    with on_duty(orders):
        return run_task(recipe, task, path, slot, fence=orders.fence)


def coarsen(
    shard: tuple[int, int],
    level: int,
    where: tuple[str, Grid, tuple[str, ...], bool],
    slot: int,
    unit: str,
    orders: Orders,
) -> tuple[tuple[int, int], Any]:
    """Write one shard of an overview on a worker, within its time: the shard, and what ``store.keep`` wants."""
    with on_duty(orders):
        check_fence(where[0], slot, orders.fence)
        return shard, coarsen_shard(*where, slot, level, shard, unit)


def run_overviews(
    grid: Grid, layers: tuple[tuple[str, ...], bool], slot: int, context: RunContext, unit: str | None = None
) -> None:
    """Write the overviews of one period whose full resolution is written; shards marked before are left out.

    Args:
        grid: of level 0.
        layers: the store's bands, and whether it has uncertainties.
        slot: index on ``time``.
        context: see ``RunContext``.
        unit: of work that they are part of; default: the period.
    """
    of = unit or store.unit_of(slot)
    records, orders, where = context.records, context.orders_of(slot), (context.where, grid, *layers)
    levels = [(level, sorted({*shards} - records.done(slot, level))) for level, shards in level_shards(grid)]
    context.progress.begin("overviews", sum(len(shards) for _, shards in levels))
    if any(shards for _, shards in levels):
        store.begin(context.path, dict(enumerate(grid.levels())), layers, slot, of)
    for level, shards in levels:

        def submit(shard: tuple[int, int], _key: str, more: dict[str, Any], level: int = level) -> Any:
            return context.connect().submit(coarsen, shard, level, where, slot, of, orders, **more)

        def name(shard: tuple[int, int], level: int = level) -> tuple[str, str]:
            key = f"overview-{slot}-{level}-{shard[0]}-{shard[1]}"
            return key, f"shard {shard} of overview {level}"

        for shard, changes in Flight(context.connect(), shards, submit, name, orders) if shards else ():
            context.guard()
            store.keep(context.path, slot, changes, of)
            records.mark(slot, shard, {}, level)
            context.progress.step(1)


def add_overviews(context: RunContext) -> int:
    """Write the overviews of all finished periods of a store and publish them; nothing where they exist.

    Returns:
        How many levels the store has beside full resolution.

    Raises:
        StoreMismatchError: without a finished store. StoreError: if the store cannot be written.
    """
    path = context.path
    attrs = store.finished(path)
    about = attrs["cloudgate"]
    grid = Grid.from_dict(about["grid"])
    levels = len(grid.levels()) - 1
    if store.levels(path) < levels:
        layers = (tuple(attrs["bands"]), store.uncertain(path, attrs["bands"]))
        for slot in sorted(int(slot) for slot, made in about["periods"].items() if made.get("published", True)):
            run_overviews(grid, layers, slot, context, store.OVERVIEWS)
        context.guard()
        store.publish_overviews(path, levels)
    return levels


def _same(recipe: Recipe) -> Recipe:
    return recipe


def _facts(report: Report) -> dict[str, Any]:
    return {
        "seconds": round(report.seconds, 3),
        "read_seconds": round(report.read_seconds, 3),
        "write_seconds": round(report.write_seconds, 3),
        "memory_bytes": report.memory_bytes,
        "bytes_read": report.bytes_read,
        "reads": report.reads,
        "retries": report.retries,
        "failures": [list(f) for f in report.failures[:200]],
        "failed": len(report.failures),
        "filled": report.filled,
        "unfilled": report.unfilled,
        "outside": report.outside,
        "notes": report.notes,
    }
