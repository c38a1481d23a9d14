"""The main job: in comes a ``Job``, out comes a mosaic in Zarr with its run records. The file that reads like the flow.

search -> grid -> scout -> tasks -> publish. Each step's answer is frozen in ``<store>.run/``, so the same command goes
on where it stopped.
"""

import io
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import store as stores
from pipeline.bands import rgb_bands
from pipeline.block import check_method, has_uncertainty
from pipeline.cluster import connect
from pipeline.config import Job
from pipeline.errors import (
    ConfigError,
    NoItemsError,
    NothingClearError,
    ReadError,
    StoreMismatchError,
    TooManyFailuresError,
)
from pipeline.frozen import digest, load_items, save_items
from pipeline.grid import Grid
from pipeline.identity import RESULT_VERSION, check_store, wish_of
from pipeline.items import Acquisition, Item, day_text
from pipeline.jobfile import job_from_dict, job_json
from pipeline.periods import Period, periods
from pipeline.planning import Plan, plan_tasks
from pipeline.reader import dn_to_codes, read_window
from pipeline.records import RunFolder, write_whole
from pipeline.region import region_of
from pipeline.request import Request, acquisitions_of, recipe_of, resolve, survey
from pipeline.runner import Progress, Silent, run_tasks
from pipeline.scout import Scouted, coarse_grid


@dataclass
class Summary:
    """What a run made."""

    store: str
    periods: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def plan(job: Job, *, scouting: bool = True) -> Plan:
    """What a job would do, without doing it: periods, tasks, scenes, bytes, memory, and what the scout decided.

    Raises:
        As ``build``, before any work.
    """
    request = resolve(job)
    out = Plan.of(request.grid, request.found)
    for period in request.schedule:
        acquisitions = acquisitions_of(request, period)
        seen, recipe = None, None
        if acquisitions:
            seen = survey(request, period, acquisitions) if scouting else None
            recipe = recipe_of(request, period, acquisitions, seen)
        out.add(period, acquisitions, recipe, job, seen)
    return out


# -- the run ----------------------------------------------------------------------------------------------------


def build(
    *,
    job: Job,
    restart: bool = False,
    progress: Progress | None = None,
    client: Any = None,
    request: Request | None = None,
) -> Summary:
    """Run a job: one mosaic per period, task by task, resumable.

    Args:
        job: see ``load_job``; ``output.store`` must be given.
        restart: remove a store of this path and start over.
        progress: hears what goes on.
        client: a Dask client to use instead of ``job.cluster``.
        request: an answer of ``resolve`` to use instead of searching.

    Returns:
        What was made, per period.

    Raises:
        RequestError: before any work (unknown field, no items, another store). RunError: later; finished shards stay.
    """
    progress = progress or Silent()
    began = time.perf_counter()
    if not job.output.store:
        raise ConfigError("output.store: this field is required; write output: {store: out/NAME.zarr} or give --out")
    path = Path(job.output.store)
    run = RunFolder(path)
    check_method(job.method)
    if restart:
        request = request or resolve(job)  # before anything is removed
    check_store(job, path, run, restart=restart)
    request = _request(job, run, progress, request)
    summary = Summary(str(path))
    with _client(job, client) as connected:
        if link := getattr(connected, "dashboard_link", None):
            progress.say(f"dashboard: {link}")
        for period in request.schedule:
            summary.periods.append(_build_period(request, period, path, run, connected, progress))
    summary.seconds = time.perf_counter() - began
    if not any(p["published"] for p in summary.periods):
        first = next(p["message"] for p in summary.periods)
        raise NothingClearError(f"{first}; nothing was published")
    return summary


class _Given:
    """A client that somebody else owns."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __enter__(self) -> Any:
        return self.client

    def __exit__(self, *error: object) -> None:
        return None


def _client(job: Job, client: Any) -> Any:
    return (
        _Given(client)
        if client is not None
        else connect(job.cluster, memory_gb_per_worker=job.limits.memory_gb_per_worker)
    )


def _request(job: Job, run: RunFolder, progress: Progress, request: Request | None) -> Request:
    """Resolve the job, or replay what an earlier run of it froze."""
    record = run.read("request.json")
    if record is not None:
        region = region_of(job.area)
        found = load_items(run.path / "items.json")
        progress.say(f"going on with {len(found.items)} frozen scenes of {run.path}")
        return Request(job, region, found, Grid.from_dict(record["grid"]), tuple(periods(job)))
    request = request or resolve(job)
    found = request.found
    progress.say(f"{len(found.items)} scenes from {found.source} ({found.profile.name}: {found.profile_why})")
    for note in found.notes:
        progress.say(note)
    save_items(found, run.path / "items.json")
    run.write({"wish": wish_of(job), "job": job_json(job), "grid": request.grid.to_dict()}, "request.json")
    return request


def _build_period(
    request: Request, period: Period, path: Path, run: RunFolder, client: Any, progress: Progress
) -> dict[str, Any]:
    job = request.job
    name = run.period(period.slot).name
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
        if len(request.schedule) == 1:
            raise NoItemsError(f"{message}; widen time or the area")
        progress.say(f"{outcome['start']}: {message}, its slot stays empty")
        return {**outcome, "published": False, "message": message}
    record = run.read(name, "scout.json")
    seen = Scouted.from_dict(record) if record else _survey(request, period, acquisitions, progress)
    if not record:
        run.write(seen.to_dict(), name, "scout.json")
        _keep_before(request, acquisitions, seen, run.period(period.slot) / "before.npz")
    recipe = recipe_of(request, period, acquisitions, seen)
    recipe, tasks = plan_tasks(recipe, job, done=run.done(period.slot))
    began = time.perf_counter()
    run_tasks(recipe, tasks, path, period.slot, run, client, progress)
    facts = _tally(run.marks(period.slot))
    outcome |= facts | {
        "seconds": round(time.perf_counter() - began, 2),
        "scenes": sum(len(a.items) for a in acquisitions),
    }
    _check_failures(facts, job)
    if not facts["filled"]:
        span = f"{day_text(period.look_start)} to {day_text(period.end)}"
        message = f"no look is clear anywhere from {span}: all {len(acquisitions)} acquisitions are clouded"
        if len(request.schedule) == 1:
            raise NothingClearError(f"{message}; widen time or lookback_days, or loosen mask")
        progress.say(f"{outcome['start']}: {message}, its slot stays empty")
        return {**outcome, "published": False, "message": message}
    _publish(request, period, seen, path)
    outcome |= {"published": True, "message": "finished", "anchors": _anchor_names(seen, acquisitions)}
    run.write(outcome, name, "manifest.json")
    return outcome


def _survey(request: Request, period: Period, acquisitions: Sequence[Acquisition], progress: Progress) -> Scouted:
    progress.begin("scout", sum(len(a.items) for a in acquisitions))
    return survey(request, period, acquisitions, lambda _done, _all: progress.step(1))


def _anchor_names(seen: Scouted, acquisitions: Sequence[Acquisition]) -> list[str]:
    if seen.anchors is None:
        return []
    return [acquisitions[layer].id if layer >= 0 else "interpolation" for layer in seen.anchors.layers]


def status(store: str | Path) -> dict[str, Any]:
    """How far a store is, from its run records.

    Returns:
        ``store`` and, per period, its dates, state (``finished``, ``unfinished``), shards done and in all, share of
        filled pixels in percent, failed reads.

    Raises:
        StoreMismatchError: if no run of ours is recorded there.
    """
    run = RunFolder(store)
    record = run.read("request.json")
    if record is None:
        raise StoreMismatchError(
            f"store: no run is recorded at {run.path}; give the path of a store that `cloudgate mosaic` wrote"
        )
    grid = Grid.from_dict(record["grid"])
    shards = sum(1 for _ in grid.shards())
    out = []
    for period in periods(job_from_dict(record["job"])):
        facts = _tally(run.marks(period.slot))
        manifest = run.read(run.period(period.slot).name, "manifest.json") or {}
        pixels = facts["filled"] + facts["unfilled"]
        out.append(
            {
                "slot": period.slot,
                "start": day_text(period.start),
                "end": day_text(period.end),
                "state": "finished" if manifest.get("published") else "unfinished",
                "shards_done": facts["shards"],
                "shards": shards,
                "filled_percent": round(100 * facts["filled"] / pixels, 3) if pixels else None,
                "failed_reads": facts["failed"],
            }
        )
    return {"store": str(store), "periods": out}


def _tally(marks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("bytes_read", "reads", "failed", "filled", "unfilled", "outside")
    out: dict[str, Any] = {name: sum(mark.get(name, 0) for mark in marks) for name in names}
    out["shards"] = len(marks)
    out["failures"] = [f for mark in marks for f in mark.get("failures", [])][:100]
    return out


def _check_failures(facts: dict[str, Any], job: Job) -> None:
    share = facts["failed"] / max(facts["reads"], 1)
    if share > job.limits.max_failed_fraction:
        listed = "; ".join(f"{item} {band}: {why}" for item, band, why in facts["failures"][:5])
        raise TooManyFailuresError(
            f"{facts['failed']} of {facts['reads']} reads failed ({100 * share:.1f} %, limits.max_failed_fraction "
            f"allows {100 * job.limits.max_failed_fraction:.1f} %): {listed}. Nothing was published; mend the source "
            "and --restart, or raise the limit and run the same command to publish what there is"
        )


def _keep_before(request: Request, acquisitions: Sequence[Acquisition], seen: Scouted, path: Path) -> None:
    """Keep a small colour picture of the least cloudy acquisition, for ``cloudgate preview``."""
    best = max(
        range(len(seen.layers)),
        key=lambda i: (not seen.layers[i].fails, seen.layers[i].clear_share * seen.layers[i].valid_share, -i),
    )
    coarse, _ = coarse_grid(request.grid, 0, most_px=900)
    names = rgb_bands(request.job.bands)
    codes = np.zeros((3, *coarse.shape), np.uint16)

    def one(work: tuple[int, str, Item]) -> tuple[int, Any]:
        number, band, item = work
        asset = item.assets[band]
        return number, dn_to_codes(
            read_window(asset, coarse, profile=request.found.profile), asset, seen.offsets[item.id][0]
        )

    work = [
        (n, band, item) for n, band in enumerate(names) for item in acquisitions[best].items if item.id in seen.offsets
    ]
    try:
        with ThreadPoolExecutor(8) as pool:
            for number, values in pool.map(one, work):
                np.copyto(codes[number], values, where=codes[number] == 0)
    except ReadError:
        return  # only a picture; the tasks will meet the same fault and report it
    buffer = io.BytesIO()
    label = f"{day_text(acquisitions[best].day)} ({100 * seen.layers[best].clear_share:.0f} % clear)"
    np.savez_compressed(buffer, codes=codes, name=np.array(label))
    write_whole(path, buffer.getvalue())


def _publish(request: Request, period: Period, seen: Scouted, path: Path) -> None:
    """Write metadata last; earlier published periods stay published."""
    job, grid = request.job, request.grid
    old = stores.read_attrs(path)
    about: dict[str, Any] = (
        dict(old["cloudgate"])
        if old
        else {
            "layout": stores.LAYOUT_VERSION,
            "grid": grid.to_dict(),
            "periods": {},
        }
    )
    acquisitions = acquisitions_of(request, period)
    items = seen.apply([i for a in acquisitions for i in a.items])
    about["periods"] = {
        **about["periods"],
        str(period.slot): {
            "start": day_text(period.start),
            "end": day_text(period.end),
            "target": day_text(period.target),
            "items": len(items),
            "items_digest": digest(items),
            "anchors": _anchor_names(seen, acquisitions),
            "method": json.loads(job.method.model_dump_json()),
            "mask": json.loads(job.mask.model_dump_json()),
            "code_version": version("cloudgate"),
            "result_version": RESULT_VERSION,
        },
    }
    last = max(int(slot) for slot in about["periods"])
    schedule = [p for p in request.schedule if p.slot <= last]
    stores.publish(
        path,
        grid,
        job.bands,
        uncertainty=has_uncertainty(job.method),
        schedule=schedule,
        published=[str(p.slot) in about["periods"] for p in schedule],
        attrs={"title": job.name, "source": "Copernicus Sentinel-2", "cloudgate": about},
    )
