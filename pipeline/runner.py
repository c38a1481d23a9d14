"""Tasks on a Dask cluster: in come a recipe and tasks, out come marks of finished shards, with bounded concurrency."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from distributed import as_completed
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from pipeline.errors import RunError
from pipeline.recipe import Recipe
from pipeline.records import RunFolder
from pipeline.tasks import Report, Task, run_task


class Progress(Protocol):
    """What a run tells while it goes; the command line draws it."""

    def say(self, text: str) -> None:
        """One line of news."""

    def begin(self, what: str, total: int) -> None:
        """A step of ``total`` units begins."""

    def step(self, units: int, *, megabytes: float = 0.0) -> None:
        """So many units are done, so many megabytes were read for them."""


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Drop it."""

    def begin(self, what: str, total: int) -> None:
        """Drop it."""

    def step(self, units: int, *, megabytes: float = 0.0) -> None:
        """Drop it."""


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
    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    # A task of its own, so that the scheduler can make it again when its holders die; a copy on every worker, since
    # the scheduler would else send all tasks to the one that has it.
    shared = client.submit(_same, recipe, pure=False)
    client.replicate([shared])
    queue = iter(tasks)

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

    flight = as_completed([submit(task) for _, task in zip(range(2 * workers), queue, strict=False)], loop=client.loop)
    for future in flight:
        report = _result(future)
        guard()
        for number, shard in enumerate(report.task.shards):
            run.mark(slot, shard, _facts(report) if number == 0 else {})
        progress.step(len(report.task.shards), megabytes=report.bytes_read / 1e6)
        following = next(queue, None)
        if following is not None:
            flight.add(submit(following))


def _same(recipe: Recipe) -> Recipe:
    return recipe


def _result(future: Any) -> Report:
    """The report of a finished task.

    Raises:
        RunError: if the workers that held it died; what a task itself raises comes as it is.
    """
    try:
        report: Report = future.result()
    except (KilledWorker, FutureCancelledError) as error:
        raise RunError(
            f"a task's workers died ({type(error).__name__}), most likely for want of memory; raise "
            "limits.memory_gb_per_worker, or lower cluster.workers or grid.shard_px, then run the same command again: "
            "it goes on after the last finished shard"
        ) from error
    return report


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
    }
