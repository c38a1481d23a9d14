"""Work in flight on a Dask cluster: in come jobs to submit, out come results as they land; nothing waits forever.

Whatever dies is told apart. A worker that dies takes nothing with it: the scheduler gives its task to another. A task
that takes longer than ``limits.task_timeout_s`` ends with its worker process, which says so, and is tried once more.
When all workers are gone for ``cluster.wait_s``, or the scheduler is, the run ends with a clear word; marks stay.
"""

import faulthandler
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from distributed import get_worker
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from pipeline.cluster import check_versions, within
from pipeline.errors import RunError

POLL_S: Final = 2.0
"""Workers and the scheduler are looked at this often while nothing comes back, and every tenth time while it does."""
ANSWER_S: Final = 30.0
HUNG: Final = "cloudgate-hung"
"""Topic on which a worker says that its task took too long, before it ends itself."""
GO_ON: Final = "run the same command again: it goes on after the last finished shard"


@dataclass(frozen=True)
class Orders:
    """What workers and the run are told beside recipe and tasks.

    Attributes:
        timeout_s: a task that takes longer ends with its worker process.
        wait_s: how long the run waits while there is no worker at all.
        width: tasks kept in flight at least, so that a cluster that grows on demand sees the demand.
        resources: what a task asks of its worker.
        fence: only the run of this id may write (``request.json``); None where there are no records.
        versions: of the packages that must agree; see ``cluster.versions``.
        environment: settings to adopt where a worker has none of its own.
    """

    timeout_s: float = 1800.0
    wait_s: float = 120.0
    width: int = 2
    resources: Mapping[str, float] = field(default_factory=dict)
    fence: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class Landings:
    """Futures in the order they end."""

    def __init__(self) -> None:
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def add(self, future: Any) -> None:
        """Wait for one more."""
        future.add_done_callback(self._ended.put)

    def get(self, timeout_s: float) -> Any:
        """The next that ended, None if none did in time."""
        try:
            return self._ended.get(timeout=timeout_s)
        except queue.Empty:
            return None


class Flight[Job]:
    """Jobs in flight, two per worker; iterate over the results of those that landed.

    Args:
        client: a Dask client.
        jobs: what to do.
        submit: (job, key, more arguments of ``client.submit``) -> future.
        name: of a job: the beginning of its key, and words for messages.
        orders: see ``Orders``.
        shared: futures that every worker should hold a copy of.
    """

    def __init__(
        self,
        client: Any,
        jobs: Iterable[Job],
        submit: Callable[[Job, str, dict[str, Any]], Any],
        name: Callable[[Job], tuple[str, str]],
        orders: Orders,
        shared: Sequence[Any] = (),
    ) -> None:
        self.client, self.orders, self.submit, self.name, self.shared = client, orders, submit, name, list(shared)
        self.waiting, self.flying = iter(jobs), dict[str, tuple[Any, Job]]()
        self.landings, self.hung = Landings(), Counter[str]()
        self.workers: set[str] = set()
        self.alive = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        self.client.subscribe_topic(HUNG, lambda event: self.hung.update([event[1]["key"]]))
        try:
            self._watch()
            self._fill()
            looked = time.monotonic()
            while self.flying:
                future = self.landings.get(POLL_S)
                if future is None or time.monotonic() - looked > 10 * POLL_S:
                    self._watch()
                    looked = time.monotonic()
                if future is not None:
                    _, job = self.flying.pop(future.key)
                    result = self._result(future, job)
                    self._fill()
                    yield result
        finally:
            with suppress(Exception):
                self.client.unsubscribe_topic(HUNG)
            if self.flying:
                with suppress(Exception):
                    within(ANSWER_S, lambda: self.client.cancel([future for future, _ in self.flying.values()]))

    def _fill(self) -> None:
        asked = {"resources": dict(self.orders.resources)} if self.orders.resources else {}
        while len(self.flying) < max(2 * len(self.workers), self.orders.width):
            job = next(self.waiting, None)
            if job is None:
                return
            key = f"{self.name(job)[0]}-{time.monotonic_ns()}"
            future = self.submit(job, key, {"pure": False, "retries": 1, "key": key, **asked})
            self.flying[key] = future, job
            self.landings.add(future)

    def _watch(self) -> None:
        """Look after workers, scheduler and tasks that hang.

        Raises:
            RunError: when waiting makes no sense any more.
        """
        for key, times in list(self.hung.items()):
            if key in self.flying and times > 1:
                raise self._hung(self.flying[key][1], times)
        try:
            known = within(ANSWER_S, lambda: self.client.scheduler_info(n_workers=-1))["workers"]
            asked = self.orders.resources
            found = {w for w, about in known.items() if not asked or asked.keys() <= about["resources"].keys()}
        except (OSError, RuntimeError, TimeoutError, ValueError):
            found = set()
        now = time.monotonic()
        if found - self.workers and self.shared:
            with suppress(Exception):
                within(ANSWER_S, lambda: self.client.replicate(self.shared))
        self.workers = found
        if found:
            self.alive = now
        elif now - self.alive > self.orders.wait_s:
            with_what = f" with {', '.join(self.orders.resources)}" if self.orders.resources else ""
            raise RunError(
                f"there is no worker{with_what} for {self.orders.wait_s:g} s (cluster.wait_s); see the logs, bring "
                f"workers up, then {GO_ON}"
            )

    def _hung(self, job: Job, times: int) -> RunError:
        return RunError(
            f"{self.name(job)[1]} took longer than limits.task_timeout_s ({self.orders.timeout_s:g} s) on {times} "
            f"workers, which ended themselves; see the logs for what it waited for, mend the source or raise the "
            f"limit, then {GO_ON}"
        )

    def _result(self, future: Any, job: Job) -> Any:
        try:
            return future.result()
        except KilledWorker as error:
            if self.hung[future.key]:
                raise self._hung(job, max(self.hung[future.key], 2)) from error
            raise RunError(
                f"{self.name(job)[1]}: its workers died one after the other, most likely for want of memory; raise "
                f"limits.memory_gb_per_worker, or lower cluster.workers or grid.shard_px, then {GO_ON}"
            ) from error
        except FutureCancelledError as error:
            raise RunError(
                f"the connection to the Dask scheduler was lost ({error.reason}); bring the cluster up, then {GO_ON}"
            ) from error


# -- on a worker ------------------------------------------------------------------------------------------------

_one_at_a_time: Final = threading.Lock()


@contextmanager
def on_duty(orders: Orders) -> Iterator[None]:
    """What a worker does around a job: settings, versions, one job at a time (memory is reckoned so), its time limit.

    Raises:
        RunError: if the worker has other versions than the run.
    """
    for name, value in orders.environment.items():
        os.environ.setdefault(name, value)
    check_versions(orders.versions)
    with _one_at_a_time, deadline(orders.timeout_s):
        yield


@contextmanager
def deadline(timeout_s: float) -> Iterator[None]:
    """End this worker process, with a word to scheduler and log, if the block takes too long.

    A read that hangs cannot be stopped otherwise. Any other process only runs the block.
    """
    try:
        worker = get_worker()
        key = worker.get_current_task()
    except ValueError:
        yield
        return

    def give_up() -> None:
        sys.stderr.write(f"cloudgate: {key} took longer than {timeout_s:g} s; this worker ends itself. Its threads:\n")
        faulthandler.dump_traceback(file=sys.stderr)
        with suppress(Exception):
            worker.log_event(HUNG, {"key": key})
            time.sleep(1.0)  # until the word is sent
        os._exit(75)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
