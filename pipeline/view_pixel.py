"""One pixel through time: in come a ``ViewStore`` and a place, out come its composites and all looks behind them.

Looks are read one pixel each from the sources, through the scenes that the run froze, by the same code and with the
same masks as the job, so a look is called clear here exactly where the job used it.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline import learned
from pipeline import mask as masks
from pipeline.anchors import INTERPOLATE
from pipeline.bands import CODE_MIN, CODE_NODATA, complete_looks, to_reflectance
from pipeline.block import compose_block
from pipeline.config import LEARNED, Method
from pipeline.errors import ConfigError, RunError
from pipeline.estimates import Target
from pipeline.frozen import from_frozen
from pipeline.grid import Grid
from pipeline.items import day_text
from pipeline.jobfile import job_from_dict
from pipeline.layers import FLAGS
from pipeline.looks import Looks, LookStream, release_arrays
from pipeline.periods import Period, first_periods, periods
from pipeline.read_pool import ReadPool
from pipeline.reader import spread_cells
from pipeline.recipe import Recipe
from pipeline.region import region_of
from pipeline.request import Request, acquisitions_of, recipe_of
from pipeline.scout import Scouted
from pipeline.view_store import ViewStore
from pipeline.view_tiles import SIGMA_NONE

TRIES: Final = 2
"""A page does not wait as long for a source as a job does."""
THREADS: Final = 16

AVERAGES: Final = ("mean", "decay", "nearest", "linear")
"""Methods that show a weighted mean of looks, whatever the looks show."""
_BRIGHT: Final = CODE_MIN + 60_000


def pixel_at(store: ViewStore, x: float, y: float) -> tuple[int, int]:
    """(row, col) of a place in the store's CRS.

    Raises:
        ConfigError: for a place outside the mosaic.
    """
    left, bottom, right, top = store.grid.bounds
    if not (left <= x < right and bottom < y <= top):
        raise ConfigError(
            f"place: {x:.0f}, {y:.0f} lies outside the mosaic, which reaches from {left:.0f} to {right:.0f} east and "
            f"{bottom:.0f} to {top:.0f} north"
        )
    return int((top - y) // store.grid.resolution_m), int((x - left) // store.grid.resolution_m)


def composites(store: ViewStore, row: int, col: int) -> list[dict[str, Any]]:
    """What each finished period says at a pixel: reflectance by band (None = no data) and where it comes from."""
    out = []
    places = [(name, period.slot) for period in store.periods for name in store.layers]
    every = dict(zip(places, store.several(lambda place: int(store.value(*place, row, col)), places), strict=True))
    for period in store.periods:
        raw = {name: every[name, period.slot] for name in store.layers}
        values = {}
        for band in store.bands:
            seen = float(to_reflectance(np.array([raw[band]], np.uint16))[0])
            values[band] = None if raw[band] == CODE_NODATA else round(seen, 4)
        sigma = {b: raw[f"uncertainty_{b}"] for b in store.bands if f"uncertainty_{b}" in raw}
        out.append(
            {
                "slot": period.slot,
                "target": period.target,
                "method": period.method,
                "values": values,
                "sigma": {band: None if code == SIGMA_NONE else round(code * 1e-4, 4) for band, code in sigma.items()},
                "source_date": day_text(raw["source_date"]) if raw["source_date"] else None,
                "clear_count": raw["clear_count"],
                "flags": [name.replace("_", " ") for name, bit in FLAGS.items() if raw["flags"] & bit],
            }
        )
    return out


# -- looks ------------------------------------------------------------------------------------------------------


def frozen_request(store: ViewStore, slot: int) -> tuple[Request, Period]:
    """The request that a store's run froze for a period, without searching.

    Raises:
        RequestError: where the run records are absent or damaged.
    """
    run, part = store.run, store.run.period(slot)
    record = run.read("request.json")
    if record is None:
        raise ConfigError(f"looks: {run.where} is not there, and only it knows the scenes behind the mosaic")
    job = job_from_dict((run.read(part, "begun.json") or {}).get("job") or record["job"])
    schedule = first_periods(job, slot + 1) if record["wish"].get("series") else periods(job)
    if slot >= len(schedule):
        raise ConfigError(f"looks: the run in {run.where} holds no records of period {slot}")
    # A series freezes each period's own scenes, any other run all of them once.
    own = run.read(part, "items.json")
    found = from_frozen(own or run.read("items.json"), f"{run.where}/{part if own else ''}/items.json")
    retry = found.profile.retry.model_copy(update={"tries": TRIES})
    found = replace(found, profile=found.profile.model_copy(update={"retry": retry}))
    return Request(job, region_of(job.area), found, Grid.from_dict(record["grid"]), tuple(schedule)), schedule[slot]


def recipe_at(store: ViewStore, slot: int, *, surroundings: bool = False) -> tuple[Recipe, Method]:
    """What decided the looks of one period, with the scout's decisions as they were frozen, and the method.

    The recipe shows only what a look itself shows: neither a polygon nor, unless they are asked for, the surroundings
    that the method looks at.

    Raises:
        RequestError: where the run records are absent or damaged.
    """
    request, period = frozen_request(store, slot)
    record = store.run.read(store.run.period(slot), "scout.json")
    if record is None:
        raise ConfigError(f"looks: the run in {store.run.where} holds no records of period {slot}")
    method = request.job.method
    if not surroundings:
        request = replace(request, job=request.job.model_copy(update={"method": Method(name="median")}))
    made = recipe_of(request, period, acquisitions_of(request, period), Scouted.from_dict(record))
    return replace(made, inside=None, threads=THREADS), method


def looks_at(store: ViewStore, slot: int, row: int, col: int) -> dict[str, Any]:
    """All looks of one pixel in a period, read from the sources.

    Returns:
        ``looks``, in order of time: ``date``, ``id``, ``state`` (clear, cloud, shadow, changed: the temporal check,
        rejected: the whole acquisition, unread), ``values`` by band, ``share`` in the composite where the method tells;
        looks without data are left out. ``failures``: messages of what could not be read. ``gated``: ``gated_shares``
        knows the shares.

    Raises:
        RequestError: where the run records are absent. RunError: if no source can be read.
    """
    recipe, method = recipe_at(store, slot)
    with ReadPool(threads=THREADS, profile=recipe.profile) as pool:
        stream = LookStream(recipe, (row, row + 1), (col, col + 1), pool)
        seen = next(iter(stream))
    failed = {item for item, _, _ in stream.failures}
    codes, clear = seen.codes[:, :, 0, 0].copy(), seen.clear[:, 0, 0].copy()
    valid = codes.min(axis=1) != CODE_NODATA
    if failed and not valid.any():
        raise RunError(f"the sources cannot be reached: {stream.failures[0][2]}")
    states = _states(recipe, seen, clear)
    shares = shares_of(recipe, method, clear, (row, col))
    looks = []
    for layer, acquisition in enumerate(recipe.acquisitions):
        unread = not valid[layer] and any(item.id in failed for item in acquisition.items)
        if not valid[layer] and not unread:
            continue
        values = to_reflectance(codes[layer])
        looks.append(
            {
                "date": day_text(acquisition.day),
                "id": acquisition.id,
                "state": "unread" if unread else states[layer],
                "values": {}
                if unread
                else {band: round(float(v), 4) for band, v in zip(recipe.bands, values, strict=True)},
                "share": None if shares is None else round(float(shares[layer]), 4),
            }
        )
    messages = list(dict.fromkeys(f"{item}: {why}" for item, _, why in stream.failures))
    return {"looks": looks, "failures": messages[:5], "failed": len(failed), "gated": method.name in LEARNED}


def _states(recipe: Recipe, seen: Looks, clear: NDArray[np.bool_]) -> list[str]:
    """Why each look is clear or not, in the job's own order: cloud, shadow, the temporal check, the whole scene."""
    assert seen.bits is not None
    cells = spread_cells(seen.bits, recipe.factor, seen.bits_offset, (1, 1))[:, 0, 0]
    out = []
    for layer, bits in enumerate(cells):
        if clear[layer]:
            out.append("clear")
        elif recipe.rejected[layer]:
            out.append("rejected")
        elif bits & masks.CLOUD_BIT:
            out.append("cloud")
        elif bits & masks.SHADOW_BIT:
            out.append("shadow")
        else:
            out.append("changed")
    return out


# -- shares -----------------------------------------------------------------------------------------------------


def shares_of(
    recipe: Recipe, method: Method, clear: NDArray[np.bool_], place: tuple[int, int]
) -> NDArray[np.float64] | None:
    """The share each look has in the composite at (row, col), summing to one.

    Returns:
        (T,) shares; None where nothing is clear, or the method is no weighted mean of looks.
    """
    if method.name not in AVERAGES or not clear.any():
        return None
    # The job's own code composes looks of which each is bright in one band alone: a band's answer is that look's share.
    codes = np.full((len(clear), len(clear), 1, 1), CODE_MIN, np.uint16)
    codes[range(len(clear)), range(len(clear))] = _BRIGHT
    made = compose_block(
        codes=codes,
        clear=clear[:, None, None],
        days=recipe.days,
        method=method,
        target=recipe.target,
        anchors=recipe.anchors,
        row0=recipe.grid.row0 + place[0],
        col0=recipe.grid.col0 + place[1],
    )
    weights = (made.codes[:, 0, 0].astype(float) - CODE_MIN) / (_BRIGHT - CODE_MIN)
    return np.asarray(weights / weights.sum())


def gated_shares(store: ViewStore, slot: int, row: int, col: int) -> dict[str, Any]:
    """What each look adds to a pixel of a learned method: the model runs once more on all that it saw around it.

    Returns:
        ``shares`` by acquisition (mean over bands; the looks that add nothing are left out), ``rest``: what comes from
        the model's estimates instead of single looks, ``said`` where there are no shares and why.

    Raises:
        RequestError: where the run records or the weights are absent. RunError: if a source cannot be read.
    """
    recipe, method = recipe_at(store, slot, surroundings=True)
    if method.name not in LEARNED:
        raise ConfigError(f"shares: {method.name} is no gated method")
    made_by = store.period(slot).weights
    if recipe.method.options["weights_sha256"] != made_by:
        return {"shares": {}, "rest": None, "said": "The weights that made this mosaic have changed since."}
    try:
        with ReadPool(threads=THREADS, profile=recipe.profile) as pool:
            stream = LookStream(recipe, (row, row + 1), (col, col + 1), pool)
            seen = next(iter(stream))
            if stream.failures:
                raise RunError(f"the sources cannot be reached: {stream.failures[0][2]}")
            shares = _gated(recipe, seen)
    finally:
        release_arrays()
    if shares is None:
        return {"shares": {}, "rest": None, "said": "This network tells no shares."}
    by_look = {a.id: round(float(v), 4) for a, v in zip(recipe.acquisitions, shares, strict=True) if v}
    return {"shares": by_look, "rest": round(1 - float(shares.sum()), 4), "said": ""}


def _gated(recipe: Recipe, seen: Looks) -> NDArray[np.float64] | None:
    """(T,) shares at the middle pixel of ``seen``, over all anchors that speak there."""
    halo = recipe.halo
    row, col = seen.fine.row0 + halo, seen.fine.col0 + halo
    speaking = [(INTERPOLATE, 1.0)]
    if recipe.anchors is not None:
        speaking = [(layer, float(weight[0, 0])) for layer, weight in recipe.anchors.at(row, col, 1, 1)]
    clear = complete_looks(codes=seen.codes, clear=seen.clear)
    total = sum(weight for _, weight in speaking)
    out = np.zeros(len(recipe.acquisitions))
    for layer, weight in speaking:
        if layer != INTERPOLATE and clear[layer, halo, halo]:
            out[layer] += weight / total  # passed through as it is
            continue
        anchor = None if layer == INTERPOLATE else layer
        asked = Target(seen.codes, seen.clear, recipe.days, recipe.target, anchor, seen.fine.row0, seen.fine.col0)
        part = learned.look_shares(recipe.method, asked, pixel=(halo, halo), bits=seen.hidden_by)
        if part is None:
            return None
        out += part * weight / total
    return out
