"""The main job: in comes a ``Job``, out comes a mosaic in Zarr with its run records. The file that reads like the flow.

search -> grid -> scout -> tasks -> publish. Each step's answer is frozen in ``<store>.run/``, so the same command goes
on where it stopped.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from pipeline import store as stores
from pipeline.block import has_uncertainty
from pipeline.calibration import estimate
from pipeline.cluster import connect, environment_of, logs_of, versions, within
from pipeline.config import Cluster, Job, Limits
from pipeline.errors import (
    ConfigError,
    NoItemsError,
    NothingClearError,
    RunError,
    TooManyFailuresError,
)
from pipeline.flight import Orders
from pipeline.frozen import digest, from_frozen, frozen_bytes, item_key
from pipeline.grid import Grid
from pipeline.identity import check_store, period_key, wish_of
from pipeline.items import Acquisition, day_text
from pipeline.jobfile import job_from_dict, job_json
from pipeline.journal import recording
from pipeline.locations import store_at
from pipeline.lock import hold
from pipeline.periods import Period, first_periods, periods
from pipeline.planning import Plan, plan_tasks
from pipeline.publishing import anchor_names, keep_before, lower_period, publish_period
from pipeline.recipe import Recipe
from pipeline.records import RunFolder
from pipeline.region import region_of
from pipeline.request import Request, acquisitions_of, check_job, recipe_of, resolve, survey
from pipeline.runner import Progress, RunContext, Silent, add_overviews, run_tasks
from pipeline.scout import Scouted
from pipeline.status import tally


@dataclass
class Summary:
    """What a run made."""

    store: str
    periods: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def plan(*, job: Job, scouting: bool = True, calibrate: bool = True) -> Plan:
    """What a job would do, without doing it: periods, tasks, scenes, bytes, memory, time, and what the scout decided.

    Args:
        job: see ``load_job``.
        scouting: look at the scenes coarsely, to decide offsets and anchors.
        calibrate: estimate the time, from the store's records or by composing a small part; needs ``scouting``.

    Raises:
        RequestError: as ``build``, before any work. CatalogError: if the catalog does not answer.
    """
    request = resolve(job)
    out = Plan.of(request.grid, request.found)
    began, recipes = time.perf_counter(), dict[int, Recipe]()
    for period in request.schedule:
        acquisitions = acquisitions_of(request, period)
        seen, recipe = None, None
        if acquisitions:
            seen = survey(request, period, acquisitions) if scouting else None
            recipe = recipes[period.slot] = recipe_of(request, period, acquisitions, seen)
        out.add(period, acquisitions, recipe, job, seen)
    if scouting and calibrate:
        out.estimate = estimate(job, recipes, scout_s=time.perf_counter() - began)
    return out


# -- the run ----------------------------------------------------------------------------------------------------


def build(
    *,
    job: Job,
    restart: bool = False,
    progress: Progress | None = None,
    client: Any = None,
    request: Request | None = None,
    slots: Sequence[int] | None = None,
    anew: bool = False,
    wait_s: float = 0.0,
) -> Summary:
    """Run a job: one mosaic per period, task by task, resumable.

    Args:
        job: see ``load_job``; ``output.store`` must be given.
        restart: remove a store of this path and start over.
        progress: hears what goes on.
        client: a Dask client to use instead of ``job.cluster``.
        request: an answer of ``resolve`` to use instead of searching.
        slots: write only these periods of a series that goes on (``time.end`` does not count), each into its slot and
            without touching the others. A finished period is written again where its scenes are others than before, a
            half-written one begun again where its recipe is another too.
        anew: write the periods of ``slots`` again in any case.
        wait_s: if another run works on the store, wait so long for it before refusing.

    Returns:
        What was made, per period.

    Raises:
        RequestError: before any work (unknown field, no items, another store). RunError: later; finished shards stay.
    """
    progress = progress or Silent()
    began = time.perf_counter()
    if not job.output.store:
        raise ConfigError("output.store: this field is required; write output: {store: out/NAME.zarr} or give --out")
    path = store_at(job.output.store).where
    run = RunFolder(path)
    check_job(job)
    if job.output.cog and "://" in path:
        raise ConfigError(
            f"output.cog: GeoTIFFs are written to a folder on disk, not beside {path}; leave it out and run `cloudgate "
            f"export {path} --cog FOLDER` afterwards"
        )
    summary = Summary(path)
    with hold(run, wait_s=wait_s) as lock:
        seen: dict[int, Scouted] = {}
        if restart:  # everything that can fail before anything is removed
            request = request or resolve(job)
            seen = _survey_all(request, progress)
        check_store(job, path, run, restart=restart, series=slots is not None)
        if slots is None:
            request = _request(job, run, progress, request)
            wanted = list(request.schedule)
        else:
            request, wanted = _series_request(job, path, run, request, slots)
        with recording(progress, run.objects, path) as progress, ExitStack() as stack:
            connected = _connector(job.cluster, job.limits, client, stack, progress)
            context = RunContext(path, run, connected, progress, lock.check, _orders(job.cluster, job.limits))
            if job.output.overviews and stores.read_attrs(path):
                add_overviews(context)
            for period in wanted:
                if slots is not None:
                    _begin_slot(request, period, path, run, anew=anew)
                made = _build_period(request, period, context, seen.get(period.slot))
                summary.periods.append(made)
                state = "finished" if made["published"] else "empty"
                progress.event("period", period=period.slot, state=state, message=made["message"])
    summary.seconds = time.perf_counter() - began
    if not any(p["published"] for p in summary.periods):
        first = next(p["message"] for p in summary.periods)
        raise NothingClearError(f"{first}; nothing was published")
    return summary


def complete_overviews(*, store: str, workers: int = 2, progress: Progress | None = None) -> int:
    """Give a finished store the overviews it was written without; nothing where it has them.

    Returns:
        How many levels it has beside full resolution.

    Raises:
        StoreMismatchError: without a finished mosaic. StoreError: if the store cannot be written.
    """
    stores.finished(store)
    run, progress = RunFolder(store), progress or Silent()
    limits = job_from_dict(record["job"]).limits if (record := run.read("request.json")) else Limits()
    with hold(run) as lock, ExitStack() as stack:
        connected = _connector(cluster := Cluster(workers=workers), limits, None, stack, progress)
        return add_overviews(RunContext(store, run, connected, progress, lock.check, _orders(cluster, limits)))


def _connector(
    cluster: Cluster, limits: Limits, client: Any, stack: ExitStack, progress: Progress
) -> Callable[[], Any]:
    """What gives the client, somebody else's or a cluster of ours that is brought up when it is first asked for."""

    @cache
    def connected() -> Any:
        if client is not None:
            return client
        made = stack.enter_context(connect(cluster, memory_gb_per_worker=limits.memory_gb_per_worker))
        if link := getattr(made, "dashboard_link", None):
            progress.say(f"dashboard: {link}")
        return made

    return connected


def _request(job: Job, run: RunFolder, progress: Progress, request: Request | None) -> Request:
    """Resolve the job, or replay what an earlier run of it froze."""
    record = run.read("request.json")
    if record is not None:
        region = region_of(job.area)
        found = from_frozen(run.read("items.json"), f"{run.where}/items.json")
        progress.say(f"going on with {len(found.items)} frozen scenes of {run.where}")
        return Request(job, region, found, Grid.from_dict(record["grid"]), tuple(periods(job)))
    request = request or resolve(job)
    found = request.found
    progress.say(f"{len(found.items)} scenes from {found.source} ({found.profile.name}: {found.profile_why})")
    for note in found.notes:
        progress.say(note)
    run.write_bytes(frozen_bytes(found), "items.json")
    run.write(
        {"wish": wish_of(job), "job": job_json(job), "grid": request.grid.to_dict(), "run": uuid.uuid4().hex},
        "request.json",
    )
    return request


def _series_request(
    job: Job, path: str, run: RunFolder, request: Request | None, slots: Sequence[int]
) -> tuple[Request, list[Period]]:
    """The periods of a series to write; the grid is the one of the first run."""
    if job.time.every is None:
        raise ConfigError("time.every: a series needs it; write for example every: month")
    if min(slots) < 0:
        raise ConfigError(f"slot {min(slots)}: a period before the start ({job.time.start}) has no slot on time")
    request = request or resolve(job, slots=slots)
    record = run.read("request.json")
    if record is None:
        wish = wish_of(job, series=True)
        run.write(
            {"wish": wish, "job": job_json(job), "grid": request.grid.to_dict(), "run": uuid.uuid4().hex},
            "request.json",
        )
    grid = Grid.from_dict(record["grid"]) if record else request.grid
    schedule = tuple(first_periods(job, max([*slots, *_slots_of(path)]) + 1))
    return replace(request, job=job, grid=grid, schedule=schedule), [schedule[slot] for slot in slots]


def _slots_of(path: str) -> list[int]:
    attrs = stores.read_attrs(path)
    return [int(slot) for slot in attrs["cloudgate"]["periods"]] if attrs else []


def _begin_slot(request: Request, period: Period, path: str, run: RunFolder, *, anew: bool) -> None:
    """Freeze a period's scenes; what an earlier run made of others, or half made by another recipe, is taken back."""
    name = run.period(period.slot)
    items = [item for a in acquisitions_of(request, period) for item in a.items]
    if not items:
        return  # scenes that a catalog forgot do not undo a mosaic
    before, begun = run.read(name, "items.json"), run.read(name, "begun.json") or {}
    key = period_key(request.job, period, map(item_key, items))
    published = (run.read(name, "manifest.json") or {}).get("published")
    other = before is None or before.get("digest") != digest(items) or (begun.get("key") != key and not published)
    if other or anew:
        # The frozen scenes go first and come last: a kill at any point between leaves a period that is begun again.
        # Marks must never outlive their shards.
        run.objects.remove(f"{name}/items.json")
        run.objects.remove(f"{name}/manifest.json")
        lower_period(request, period.slot, path)
        run.forget_period(period.slot)
        # with the job of this period: a schedule may change its mask or method over the years
        run.write({"key": key, "id": uuid.uuid4().hex, "job": job_json(request.job)}, name, "begun.json")
        run.write_bytes(frozen_bytes(replace(request.found, items=items)), name, "items.json")


def _build_period(request: Request, period: Period, context: RunContext, seen: Scouted | None) -> dict[str, Any]:
    job, run = request.job, context.records
    name = run.period(period.slot)
    outcome: dict[str, Any] = {
        "slot": period.slot,
        "start": day_text(period.start),
        "end": day_text(period.end),
        "target": day_text(period.target),
    }
    manifest = run.read(name, "manifest.json")
    if manifest and manifest.get("published"):
        return {**outcome, **manifest, "message": "finished before"}
    acquisitions = acquisitions_of(request, period)
    if not acquisitions:
        message = f"no scene from {day_text(period.look_start)} to {day_text(period.end)}"
        empty = _leave_empty(outcome, message, period, context)
        if len(request.schedule) == 1:
            raise NoItemsError(f"{message}; widen time or the area")
        return empty
    context.connect()  # a cluster that does not come up is told before the scout begins
    seen = _scouted(request, period, acquisitions, context, seen)
    recipe = recipe_of(request, period, acquisitions, seen)
    recipe, tasks = plan_tasks(recipe, job, done=run.done(period.slot))
    began = time.perf_counter()
    if tasks:
        stores.begin(context.path, {0: request.grid}, (job.bands, has_uncertainty(job.method)), period.slot)
    try:
        run_tasks(recipe, tasks, period.slot, context)
    except RunError:
        _keep_logs(context)
        raise
    facts = tally(run.marks(period.slot))
    outcome |= facts | {
        "seconds": round(time.perf_counter() - began, 2),
        "scenes": sum(len(a.items) for a in acquisitions),
    }
    _check_failures(facts, job)
    if not facts["filled"]:
        span = f"{day_text(period.look_start)} to {day_text(period.end)}"
        message = f"no look is clear anywhere from {span}: all {len(acquisitions)} acquisitions are clouded"
        empty = _leave_empty(outcome, message, period, context)
        if len(request.schedule) == 1:
            raise NothingClearError(f"{message}; widen time or lookback_days, or loosen mask")
        return empty
    publish_period(request, period, seen, context)
    key = period_key(job, period, [item_key(item) for a in acquisitions for item in a.items])
    outcome |= {"published": True, "message": "finished", "key": key, "anchors": anchor_names(seen, acquisitions)}
    run.write(outcome, name, "manifest.json")
    return outcome


def _scouted(
    request: Request, period: Period, acquisitions: Sequence[Acquisition], context: RunContext, seen: Scouted | None
) -> Scouted:
    """The scout's answer: the recorded one where any shard was made by it, as all of them must agree."""
    run, name = context.records, context.records.period(period.slot)
    record = run.read(name, "scout.json")
    if record and record["unread"] and not run.done(period.slot):
        # Nothing was made by it: what could not be read then is tried again, and tasks it sent out may not write now.
        run.write({**(run.read(name, "begun.json") or {}), "id": uuid.uuid4().hex}, name, "begun.json")
        record = None
    if record:
        return Scouted.from_dict(record)
    seen = seen or _survey(request, period, acquisitions, context.progress)
    run.write(seen.to_dict(), name, "scout.json")
    keep_before(request, acquisitions, seen, run, period.slot)
    return seen


def _leave_empty(outcome: dict[str, Any], message: str, period: Period, context: RunContext) -> dict[str, Any]:
    """Write down that a period shows nothing; the next run looks again."""
    context.progress.say(f"{outcome['start']}: {message}, its slot stays empty")
    outcome = {**outcome, "published": False, "message": message}
    context.records.write(outcome, context.records.period(period.slot), "manifest.json")
    return outcome


def _orders(spec: Cluster, limits: Limits) -> Orders:
    return Orders(
        timeout_s=limits.task_timeout_s,
        wait_s=spec.wait_s,
        width=2 * spec.workers if spec.kind in ("kubernetes", "gateway", "slurm") else 2,
        resources=spec.resources,
        versions=versions(),
        environment=environment_of(spec),
    )


def _keep_logs(context: RunContext) -> None:
    """Keep what the cluster logged before it is released, in the records."""
    client = context.connect()
    if hasattr(client, "get_worker_logs") and (said := logs_of(client)):
        context.records.write_bytes(said.encode(), "cluster.log")
        context.progress.say(f"logs of the cluster: {context.records.where}/cluster.log")


def _survey(request: Request, period: Period, acquisitions: Sequence[Acquisition], progress: Progress) -> Scouted:
    progress.begin("scout", sum(len(a.items) for a in acquisitions))
    last, limit = [time.monotonic()], request.job.limits.task_timeout_s

    def step(_done: int, _all: int) -> None:
        last[0] = time.monotonic()
        progress.step(1)

    try:
        return within(limit, lambda: survey(request, period, acquisitions, step), lambda: last[0])
    except TimeoutError as error:
        raise RunError(
            f"the scout waits for a scene for more than limits.task_timeout_s ({limit:g} s); mend the source or raise "
            "the limit, then run the same command again"
        ) from error


def _survey_all(request: Request, progress: Progress) -> dict[int, Scouted]:
    """The scout's answers for every period that has scenes."""
    wanted = {period.slot: (period, acquisitions_of(request, period)) for period in request.schedule}
    return {
        slot: _survey(request, period, acquisitions, progress)
        for slot, (period, acquisitions) in wanted.items()
        if acquisitions
    }


def _check_failures(facts: dict[str, Any], job: Job) -> None:
    share = facts["failed"] / max(facts["reads"], 1)
    if share > job.limits.max_failed_fraction:
        listed = "; ".join(f"{item} {band}: {why}" for item, band, why in facts["failures"][:5])
        raise TooManyFailuresError(
            f"{facts['failed']} of {facts['reads']} reads failed ({100 * share:.1f} %, limits.max_failed_fraction "
            f"allows {100 * job.limits.max_failed_fraction:.1f} %): {listed}. Nothing was published; mend the source "
            "and --restart, or raise the limit and run the same command to publish what there is"
        )
