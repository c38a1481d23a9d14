"""Training samples, written once: in comes TRAIN.yaml, out comes a store of patches that ``train`` reads quickly.

Place by place: read or simulate the series, hide something in it, ask the classical estimates on the same lattice
windows as at inference, cut patches (xbatcher; edges are padded by reflection, never dropped), write each as one Zarr
chunk. A case counts when its line is written, so that a killed preparation goes on with the next one.
"""

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from xbatcher import BatchGenerator

from pipeline import cases, estimates
from pipeline.bands import CODE_NODATA, to_codes
from pipeline.cases import CLOUD, SHADOW, VOID, Case, Series
from pipeline.errors import ConfigError, NothingClearError, StoreMismatchError
from pipeline.learnfile import Cases, Training
from pipeline.objects import write_whole
from pipeline.places import Place, places
from pipeline.report import Progress, Silent
from pipeline.samples import ABOUT, ARRAYS, COMPLETE, DONE, LAYOUT, done_cases, group_samples, patch_dims

PAPER_CLOUD, PAPER_MISSING = 0.50, 0.33
"""A patch of mode ``paper`` has at most so much cloud and so much missing (Oehmcke et al. 2020, section 4.1.1)."""
FLOAT16_MAX: Final = 6e4
_FITTED: Final = estimates.CONTEXT.index("fitted")


@dataclass(frozen=True)
class Prepared:
    """What a preparation left: samples in all, by place, and those that were there before."""

    store: Path
    samples: int
    places: dict[str, int]
    kept: int


def prepare(training: Training, *, restart: bool = False, progress: Progress | None = None) -> Prepared:
    """Write the training store, or go on with one that was interrupted.

    Args:
        training: TRAIN.yaml; ``bands``, ``seed``, ``sources`` and ``cases`` decide the samples.
        restart: remove what is there and start over.
        progress: hears of each place.

    Raises:
        StoreMismatchError: the store was made from another request. NothingClearError: a source without a sample.
        ConfigError, NoItemsError: a source that cannot be used. CatalogError, ReadError: as a job.
    """
    progress = progress or Silent()
    store, about = training.store, _about(training)
    if restart and (store / ABOUT).is_file():  # a training store, and nobody's other folder
        shutil.rmtree(store)
    _check_identity(store, about)
    found = [(source.name, place) for source in training.sources for place in _places(training, source.name)]
    store.mkdir(parents=True, exist_ok=True)
    write_whole(store / ABOUT, json.dumps(about, indent=1).encode())
    kept, counts = 0, dict.fromkeys((name for name, _ in found), 0)
    groups = {place.name: _place_of(training, source, place) for source, place in found}
    progress.begin("places", len(found))
    for source, place in found:
        folder = store / place.name
        if (folder / COMPLETE).is_file():
            kept += len(group_samples(store, place.name, place.name))
        else:
            _write_place(folder, place.read(), _rules(training, source), training.seed)
        counts[source] += len(group_samples(store, place.name, place.name))
        progress.step(1)
    for source, count in counts.items():
        if not count:
            cut = sum(len(done_cases(store / place.name)) for name, place in found if name == source)
            raise NothingClearError(_no_patch(training, source, cut) if cut else _nothing(training, source))
    write_whole(store / COMPLETE, json.dumps({"groups": groups}, indent=1).encode())
    return Prepared(store, sum(counts.values()), counts, kept)


def _places(training: Training, source: str) -> list[Place]:
    (spec,) = [one for one in training.sources if one.name == source]
    rules = training.cases
    block_px = max(rules.patch_px, rules.block_px // rules.patch_px * rules.patch_px)
    return places(spec, training.bands, block_px=block_px, max_blocks=rules.max_blocks, seed=training.seed)


def _place_of(training: Training, source: str, place: Place) -> str:
    """What splits go by: each simulated seed is a place of its own, blocks of one area are one place."""
    simulated = any(one.simulate for one in training.sources if one.name == source)
    return place.name if simulated else source


def _rules(training: Training, source: str) -> Cases:
    """How samples are cut, with what a simulated source says of its own."""
    (spec,) = [one.simulate for one in training.sources if one.name == source]
    own = {} if spec is None else {"pastes": spec.pastes, "max_cases": spec.max_cases}
    return training.cases.model_copy(update={name: value for name, value in own.items() if value is not None})


def _about(training: Training) -> dict[str, Any]:
    """What decides the samples, as JSON."""
    asked = json.loads(training.model_dump_json(include={"bands", "seed", "sources", "cases"}))
    for source in asked["sources"]:
        del source["weight"]  # how often a sample serves is not what it is
    known = {"estimates": list(estimates.ESTIMATES), "context": list(estimates.CONTEXT), "version": estimates.VERSION}
    return {"layout": LAYOUT, **asked, **known}


def _check_identity(store: Path, about: dict[str, Any]) -> None:
    path = store / ABOUT
    if not path.is_file():
        if store.exists() and any(store.iterdir()):
            raise ConfigError(f"store: {store} holds other files; name a folder of its own")
        return
    there = json.loads(path.read_text())
    other = [name for name in about if there.get(name) != about[name]]
    if other:
        raise StoreMismatchError(
            f"store: {store} was prepared with other {', '.join(other)}; name another store, or start over with "
            "--restart"
        )


def _nothing(training: Training, source: str) -> str:
    rules = training.cases
    return (
        f"source {source}: no sample can be cut: no date is clear enough to learn from (bad share under "
        f"{rules.target_max_bad:g}, two more looks within {rules.window_days} days), or no date has clouds to paste; "
        "widen the time span, raise cases.target_max_bad, or look at the masks"
    )


def _no_patch(training: Training, source: str, cut: int) -> str:
    rules = _rules(training, source)
    return (
        f"source {source}: {cut} dates could be learned from, but none of their patches of {rules.patch_px} px serves: "
        f"one needs known ground on {100 * rules.min_valid:g} % of its pixels (an area smaller than a patch has less) "
        f"and a gap on {100 * rules.min_hole:g} %; lower cases.patch_px, min_valid or min_hole, or take a larger area"
    )


# -- one place ------------------------------------------------------------------------------------------------------


def _write_place(folder: Path, series: Series, rules: Cases, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    done = {line["id"] for line in done_cases(folder)}
    height, width = (part.stop - part.start for part in series.core)
    padded = tuple(-(-size // rules.patch_px) * rules.patch_px for size in (height, width))
    arrays = _arrays(folder, series, rules, padded)
    whole = (folder / DONE).read_bytes() if (folder / DONE).exists() else b""
    write_whole(folder / DONE, whole[: whole.rfind(b"\n") + 1])  # a line cut off by a kill is dropped
    with (folder / DONE).open("a") as lines:
        for number, case in enumerate(training_cases(series, rules, seed)):
            if case.id in done:
                continue
            patches = _write_case(arrays, number, case, series, rules, padded)
            lines.write(json.dumps(_line(case, patches)) + "\n")
            lines.flush()
    write_whole(folder / COMPLETE, b"{}")


def _line(case: Case, patches: list[tuple[int, float, float]]) -> dict[str, Any]:
    days = [int(day) for day in case.days]
    return {"id": case.id, "day": case.day, "days": days, "target": case.target, "patches": patches}


def training_cases(series: Series, rules: Cases, seed: int) -> Iterator[Case]:
    """The cases of one place as they are learned from; a case depends on the seed and its id alone."""
    window, of_place = rules.window_days, zlib.crc32(f"{seed} {series.name}".encode())
    if rules.mode == "paper":
        made: Iterator[Case] = cases.papers(series, window_days=window)
    else:
        made = cases.completions(
            series, pastes=rules.pastes, seed=of_place, window_days=window, max_bad=rules.target_max_bad
        )
    own = cases.simulated(series, window_days=window) if series.truth is not None and rules.mode == "complete" else ()
    for case in _some([*made, *own], rules.max_cases, of_place):
        rng = np.random.default_rng([seed, zlib.crc32(case.id.encode())])
        if rules.mode == "complete" and rng.random() < rules.whole_share:
            whole = cases.without_target(case)
            case = replace(whole, id=f"{case.id}/whole", hole=whole.hole & _core(series))
        if rules.mode == "complete" and rng.random() < rules.thin_share and len(case.days) > 3:
            keep = rng.permutation(len(case.days))[: rng.integers(3, len(case.days) + 1)]
            case = cases.with_looks(case, keep)
        case = cases.nearest_looks(case, rules.max_looks)
        if rng.random() < rules.omit_share:
            case = cases.with_worse_masks(case, rng.uniform(*rules.omit), rules.omit_edge_px, rng)
        if series.judged is not None:
            case = cases.checked_in_time(case, series.bands)
        if len(case.days) > 1:
            yield case


def _some(given: list[Case], most: int | None, seed: int) -> list[Case]:
    """At most so many cases, drawn by the seed, in their order."""
    if most is None or len(given) <= most:
        return given
    return [given[i] for i in np.sort(np.random.default_rng([seed, 3]).permutation(len(given))[:most])]


def _core(series: Series) -> NDArray[np.bool_]:
    inside = np.zeros(series.bits.shape[1:], bool)
    inside[series.core] = True
    return inside


def _arrays(folder: Path, series: Series, rules: Cases, padded: tuple[int, ...]) -> zarr.Group:
    """The place's arrays, made or opened; there is room for every case that may come, and empty room costs nothing."""
    if (folder / DONE).exists():
        return zarr.open_group(folder / ARRAYS, mode="r+")
    group = zarr.open_group(folder / ARRAYS, mode="w")
    count = len(series.days) * (rules.pastes + 1)
    bands, side = len(series.bands), rules.patch_px
    for name, kinds, dtype in (
        ("looks", {"time": rules.max_looks, "band": bands}, "uint16"),
        ("bits", {"time": rules.max_looks}, "uint8"),
        ("truth", {"band": bands}, "uint16"),
        ("truth_bits", {}, "uint8"),
        ("hole", {}, "uint8"),
        ("prior", {"band": bands}, "uint16"),
        ("scale", {"band": bands}, "float16"),
        ("estimates", {"estimate": len(estimates.ESTIMATES), "band": bands}, "uint16"),
        ("context", {"fact": len(estimates.CONTEXT), "band": bands}, "float16"),
    ):
        sizes = {"case": count, **kinds, "y": padded[0], "x": padded[1]}
        group.create_array(
            name,
            shape=tuple(sizes.values()),
            chunks=(1, *kinds.values(), side, side),
            dtype=dtype,
            fill_value=0,
            dimension_names=list(sizes),
        )
    return group


def _write_case(
    arrays: zarr.Group, number: int, case: Case, series: Series, rules: Cases, padded: tuple[int, ...]
) -> list[tuple[int, float, float]]:
    """Write a case's patches; (number among all windows of the place, share of known truth, share of hole) of each."""
    asked = estimates.Target(case.codes, case.clear, case.days, case.day, case.target, case.row0, case.col0)
    known = estimates.estimate(asked, core=series.core)
    prior = np.where(known.has_prior, to_codes(known.prior), np.uint16(CODE_NODATA))
    layers: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
        "looks": (("time", "band"), _all_steps(case.codes, rules)),
        "bits": (("time",), _all_steps(case.bits, rules)),
        "truth": (("band",), case.truth),
        "truth_bits": ((), case.truth_bits),
        "hole": ((), case.hole.astype(np.uint8)),
        "prior": (("band",), prior),
        "scale": (("band",), np.clip(known.scale, 0, FLOAT16_MAX).astype(np.float16)),
        "estimates": (("estimate", "band"), to_codes(known.estimates)),
        "context": (("fact", "band"), np.clip(known.context, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)),
    }
    block = xr.Dataset(
        {name: ((*dims, "y", "x"), _padded(v, series.core, padded)) for name, (dims, v) in layers.items()}
    )
    ground = _ground(series, padded)
    for name in ("hole", "truth"):
        block[name] = block[name] * ground
    # a reflection is for the eyes of convolutions: no second witness for the kriging, and no ground to a target's share
    block["context"][{"fact": _FITTED}] *= ground
    if rules.mode == "paper":
        block["truth_bits"] = block["truth_bits"] | np.where(ground, np.uint8(0), np.uint8(VOID))
    windows = BatchGenerator(block, input_dims=patch_dims(block, rules.patch_px), preload_batch=False)
    across, patches = padded[1] // rules.patch_px, []
    for position, patch in enumerate(windows):
        valid = float((patch["truth"].values != CODE_NODATA).all(axis=0).mean())
        hole = float(patch["hole"].values.mean())
        if not _serves(patch, rules, valid, hole):
            continue
        y, x = (k * rules.patch_px for k in divmod(position, across))
        for name, values in patch.data_vars.items():
            there = (slice(y, y + rules.patch_px), slice(x, x + rules.patch_px))
            inner = (slice(None),) * (values.ndim - 2)
            array = cast(zarr.Array[Any], arrays[str(name)])
            array[(slice(number, number + 1), *inner, *there)] = values.values[None]
        patches.append((number * len(windows) + position, round(valid, 4), round(hole, 4)))
    return patches


def _all_steps(values: NDArray[Any], rules: Cases) -> NDArray[Any]:
    """(T, ...) with empty steps up to the store's number of looks."""
    out = np.zeros((rules.max_looks, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    return out


def _serves(patch: xr.Dataset, rules: Cases, valid: float, hole: float) -> bool:
    """Whether a patch is worth a sample."""
    if rules.mode == "complete":
        return valid >= rules.min_valid and hole >= rules.min_hole
    bits = patch["truth_bits"].values
    clouded, missing = float(((bits & (CLOUD | SHADOW)) != 0).mean()), float(((bits & VOID) != 0).mean())
    return clouded <= PAPER_CLOUD and missing <= PAPER_MISSING and valid >= rules.min_valid


def _padded(values: NDArray[Any], core: tuple[slice, slice], padded: tuple[int, ...]) -> NDArray[Any]:
    """The core of (..., y, x), continued by reflection to whole patches."""
    inner = values[..., core[0], core[1]]
    widths = [(0, 0)] * (inner.ndim - 2) + [(0, padded[0] - inner.shape[-2]), (0, padded[1] - inner.shape[-1])]
    return np.pad(inner, widths, mode="reflect")


def _ground(series: Series, padded: tuple[int, ...]) -> NDArray[np.bool_]:
    """(y, x) bool, False where there is no ground but only padding: nothing is learned there."""
    out = np.zeros(padded, bool)
    out[: series.core[0].stop - series.core[0].start, : series.core[1].stop - series.core[1].start] = True
    return out
