"""Whose store is it? In come a job and a store with its run records, out comes leave to go on, or a clear refusal.

A store is identified by grid, bands and layout; a period by its frozen items, time, target, mask, method and options.
Cluster, limits, paths and worker counts never matter; only a raised ``RESULT_VERSION`` refuses to go on.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from pipeline import store as stores
from pipeline.config import Job
from pipeline.errors import StoreMismatchError
from pipeline.jobfile import job_json
from pipeline.records import RunFolder

RESULT_VERSION: Final = 1
"""Raised when the same request gives other pixels than before; a store of another version is not gone on with."""


def wish_of(job: Job) -> dict[str, Any]:
    """The fields of a job that shape pixels: what a run record must agree with to go on."""
    fields = job_json(job)
    for name in ("name", "output", "cluster", "limits"):
        fields.pop(name)
    # A catalog's file may move or grow (the scenes are frozen), not both; of a polygon only the content counts.
    place = Path(job.catalog)
    if place.is_file():
        fields["catalog"] = {"path": str(place.resolve()), "sha256": _sha256(place)}
    if job.area.geojson and job.area.geojson.is_file():
        fields["area"]["geojson"] = _sha256(job.area.geojson)
    return {
        **fields,
        "result_version": RESULT_VERSION,
        "layout": stores.LAYOUT_VERSION,
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _same_catalog(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return bool(old["path"] == new["path"] or old["sha256"] == new["sha256"])
    return bool(old == new)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names[:3])


def check_store(job: Job, path: Path, run: RunFolder, *, restart: bool) -> None:
    """Refuse a store of another request; forget ours with ``restart``, or where no pixel was ever made.

    Raises:
        StoreMismatchError: with what differs and the ways out.
    """
    attrs = stores.read_attrs(path)
    if restart:
        stores.remove(path)
        run.forget()
        return
    old = run.read("request.json")
    if old is None:
        if attrs is not None:
            raise StoreMismatchError(
                f"output.store: {path} is finished and its run records ({run.path}) are gone; choose another store, or "
                "--restart"
            )
        return
    new = json.loads(json.dumps(wish_of(job), default=str))
    if _same_catalog(old["wish"]["catalog"], new["catalog"]):
        new["catalog"] = old["wish"]["catalog"]
    if old["wish"] == new:
        return
    made = any(mark.get("filled") for slot in run.slots() for mark in run.marks(slot))
    if attrs is None and not made:
        # A run that stopped before its first pixel (offset undecided, all clouded) must not stand in the way.
        stores.remove(path)
        run.forget()
    else:
        raise StoreMismatchError(
            f"output.store: {path} belongs to another request ({_differences(old['wish'], new)}); choose another store "
            "with --out, or start over with --restart (removes it)"
        )
