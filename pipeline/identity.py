"""Whose store is it? In come a job and a store with its run records, out comes leave to go on, or a clear refusal.

A store is identified by grid, bands and layout; a period by its frozen items, time, target, mask, method and options.
Cluster, limits, paths and worker counts never matter; only a raised ``RESULT_VERSION`` refuses to go on. A plain job is
one request, so all its fields must agree; a *series*, written period by period by a schedule, only agrees on its store,
and each period carries its own identity.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from pipeline import learned
from pipeline import store as stores
from pipeline.block import has_uncertainty
from pipeline.config import Job
from pipeline.errors import StoreMismatchError
from pipeline.jobfile import job_json
from pipeline.periods import Period
from pipeline.records import RunFolder

RESULT_VERSION: Final = 3
"""Raised when the same request gives other pixels than before; a store of another version is not gone on with."""


def wish_of(job: Job, *, series: bool = False) -> dict[str, Any]:
    """The fields of a job that a run record must agree with to go on: what shapes pixels; of a series, the store's."""
    fields = job_json(job)
    if series:
        return {
            **{name: fields[name] for name in ("grid", "bands")},
            "area": _area(job),
            "start": fields["time"]["start"],
            "every": fields["time"]["every"],
            "uncertainty": has_uncertainty(job.method),
            "series": True,
            "result_version": RESULT_VERSION,
            "layout": stores.LAYOUT_VERSION,
        }
    for name in ("name", "output", "cluster", "limits"):
        fields.pop(name)
    # A catalog's file may move or grow (the scenes are frozen), not both; of a polygon only the content counts.
    place = Path(job.catalog)
    if place.is_file():
        fields["catalog"] = {"path": str(place.resolve()), "sha256": _sha256(place)}
    return {
        **fields,
        "area": _area(job),
        "method": learned.identity(job.method),
        "result_version": RESULT_VERSION,
        "layout": stores.LAYOUT_VERSION,
    }


def _area(job: Job) -> dict[str, Any]:
    area: dict[str, Any] = job.area.model_dump(mode="json")
    if job.area.geojson and job.area.geojson.is_file():
        area["geojson"] = _sha256(job.area.geojson)
    return area


def recipe_key(job: Job) -> str:
    """Short name of what makes pixels of looks: method with options, mask, target, look-back, offset, cloud limit."""
    fields = job_json(job) | {"method": learned.identity(job.method)}
    names = ("method", "mask", "target", "offset_dn", "max_cloud_cover")
    return _short([{name: fields[name] for name in names}, job.time.lookback_days, RESULT_VERSION])


def period_key(job: Job, period: Period, items: Iterable[str]) -> str:
    """The identity of a period, the key under which a schedule does it once: recipe, days, target and its scenes."""
    return _short([recipe_key(job), period.look_start, period.start, period.end, period.target, sorted(items)])


def _short(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _same_catalog(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return bool(old["path"] == new["path"] or old["sha256"] == new["sha256"])
    return bool(old == new)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names[:3])


def _check_series(old: dict[str, Any], new: dict[str, Any], path: str) -> None:
    if old == new:
        return
    if new["start"] != old["start"]:
        earlier = new["start"] < old["start"]
        raise StoreMismatchError(
            f"start: {new['start']} is {'earlier' if earlier else 'later'} than {old['start']}, the start of {path}; "
            + ("a period before it has no slot on time. " if earlier else "the slots on time count from there. ")
            + "Keep the start, or choose another store"
        )
    raise StoreMismatchError(
        f"output.store: {path} belongs to another series ({_differences(old, new)}); choose another store, or restore "
        "these fields"
    )


def _was_made(run: RunFolder) -> bool:
    """Whether a pixel was ever made, by what runs recorded."""
    return any(mark.get("filled") for slot in run.slots() for mark in run.marks(slot))


def check_store(job: Job, path: str, run: RunFolder, *, restart: bool, series: bool = False) -> None:
    """Refuse a store of another request; forget ours with ``restart``, or where no pixel was ever made.

    ``series`` says that a schedule writes it, period by period.

    Raises:
        StoreMismatchError: with what differs and the ways out.
    """
    attrs = stores.read_attrs(path)
    if restart:
        # Records first: a crash in between must not leave marks of shards that are gone.
        run.forget()
        stores.remove(path)
        return
    old = run.read("request.json")
    if old is not None and not stores.exists(path) and _was_made(run):
        anew = f"remove {run.where} to begin the series anew" if series else "begin anew with --restart"
        raise StoreMismatchError(
            f"output.store: {path} is gone, and its run records ({run.where}) know of pixels that were made there; put "
            f"it back, or {anew}"
        )
    if old is None:
        if attrs is not None:
            raise StoreMismatchError(
                f"output.store: {path} is finished and its run records ({run.where}) are gone; choose another "
                "store, or --restart"
            )
        # What a run left that ended before its records were whole, or while --restart removed them.
        run.forget()
        stores.remove(path)
        return
    new = json.loads(json.dumps(wish_of(job, series=series), default=str))
    if series != old["wish"].get("series", False):
        raise StoreMismatchError(
            f"output.store: {path} was begun by {'`cloudgate mosaic`' if series else 'a schedule'}; choose another "
            f"store{'' if series else ', or let `cloudgate schedule tick` go on with it'}"
        )
    if series:
        _check_series(old["wish"], new, path)
        return
    if _same_catalog(old["wish"]["catalog"], new["catalog"]):
        new["catalog"] = old["wish"]["catalog"]
    if old["wish"] == new:
        return
    if attrs is None and not _was_made(run):
        # A run that stopped before its first pixel (offset undecided, all clouded) must not stand in the way.
        run.forget()
        stores.remove(path)
    else:
        raise StoreMismatchError(
            f"output.store: {path} belongs to another request ({_differences(old['wish'], new)}); choose another store "
            "with --out, or start over with --restart (removes it)"
        )
