"""In: a folder of STAC items with one COG a band. Out: the series as arrays, and the cases of task A made
from it.

Task A (completing an acquisition): on a date that is clear, the bad area of another date is pasted with its
real cloudy pixels; the holed date stays among the inputs and has to be completed; what is under the paste
is the truth.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from scipy import ndimage

Variant = Literal["base", "inputs", "growth", "growth of looks", "scl"]

OFFSET_CODE = 1000  # the inner coding: code = reflectance * 10000 + 1000
WINDOW_D = 60  # looks within this many days of the target are used
SCL_BAD = (3, 8, 9, 10)  # cloud shadow, cloud medium, cloud high, thin cirrus
GROWTH_M = 100.0
TARGET_BAD_SHARE = 0.01  # a target is clear but for less than this
DONOR_BAD_SHARE = (0.15, 0.90)  # the date whose bad area is pasted
LOOK_BAD_SHARE = 0.5  # a target needs two looks in its window that are better than this


@dataclass(frozen=True)
class Series:
    """One place through time."""

    name: str
    codes: NDArray[np.uint16]  # (T, B, H, W), 0 = no data
    days: NDArray[np.int32]  # (T,) days since 1970-01-01, ascending
    bad: NDArray[np.bool_]  # (T, H, W) from `clm`: cloud, haze or shadow, no growth
    scl_bad: NDArray[np.bool_]  # (T, H, W) the plain reading of SCL
    scl: NDArray[np.uint8]  # (T, H, W) classes as shipped, put on the 10 m grid
    bands: tuple[str, ...]
    resolution_m: float


@dataclass(frozen=True)
class Case:
    """One pasted hole: inputs as a method sees them, and where to score what it returns."""

    codes: NDArray[np.uint16]  # (T, B, H, W) the looks of the window, with the paste's cloudy pixels in the target
    clear: NDArray[np.bool_]  # (T, H, W)
    days: NDArray[np.int32]  # (T,)
    target: int  # index of the target date in these arrays
    truth: NDArray[np.uint16]  # (B, H, W)
    hole: NDArray[np.bool_]  # (H, W) where to score
    date: int  # the target's day: the block of the bootstrap


def read_series(folder: Path, bands: tuple[str, ...] = ("blue", "green", "red", "nir")) -> Series:
    """Read a set such as ``flanders_31uds``: bands, ``clm`` and ``scl`` of all its Sentinel-2 items, by
    date."""
    items = sorted((folder / "s2").glob("*/*.json"), key=_datetime)
    if not items:
        raise FileNotFoundError(f"no items under {folder / 's2'}: point CLOUDGATE_DATA at the folder of the sets")
    with rasterio.open(items[0].parent / f"{bands[0]}.tif") as first:
        shape, resolution_m = first.shape, first.res[0]
    codes, clm, scl, days = [], [], [], []
    for item in items:
        dn = np.stack([_read(item.parent / f"{band}.tif", shape) for band in bands]).astype(np.int32)
        codes.append(np.where(dn > 0, np.clip(dn + OFFSET_CODE, 1, 65534), 0).astype(np.uint16))
        clm.append(_read(item.parent / "clm.tif", shape))
        scl.append(_read(item.parent / "scl.tif", shape))
        days.append(np.datetime64(_datetime(item)[:10], "D").astype(np.int32))
    void = (np.stack(codes) == 0).any(axis=1)
    return Series(
        name=folder.name,
        codes=np.stack(codes),
        days=np.array(days, np.int32),
        bad=(np.stack(clm) != 0) | void,
        scl_bad=np.isin(np.stack(scl), SCL_BAD) | void,
        scl=np.stack(scl).astype(np.uint8),
        bands=bands,
        resolution_m=resolution_m,
    )


def _datetime(item: Path) -> str:
    return str(json.loads(item.read_text())["properties"]["datetime"])


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.generic]:
    """One asset on the 10 m grid; coarser ones by nearest neighbour, since classes cannot be averaged."""
    with rasterio.open(path) as asset:
        return asset.read(1, out_shape=shape, resampling=rasterio.enums.Resampling.nearest)


def grow(bad: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """Grow True areas of (..., H, W) by a disc."""
    if radius_px <= 0:
        return bad
    far = np.stack(
        [
            ndimage.distance_transform_edt(~b) if b.any() else np.full(b.shape, np.inf)
            for b in bad.reshape(-1, *bad.shape[-2:])
        ]
    )
    return (far <= radius_px).reshape(bad.shape)


def targets(series: Series) -> list[int]:
    """Dates that are clear and have at least two usable looks within the window."""
    share = series.bad.mean(axis=(1, 2))
    near = np.abs(series.days[:, None] - series.days[None]) <= WINDOW_D
    np.fill_diagonal(near, False)
    looks = (near & (share < LOOK_BAD_SHARE)[None]).sum(axis=1)
    return [int(t) for t in np.flatnonzero((share < TARGET_BAD_SHARE) & (looks >= 2))]


def cases(series: Series, variant: Variant = "base", *, pastes: int = 2, seed: int = 0) -> Iterator[Case]:
    """Task A: ``pastes`` cases per target.

    The hole, its donor and its quarter turn are the same in all variants of one seed, so that they can be
    compared.

    Args:
        series: the place.
        variant: ``base``: masks from ``clm``, no growth. ``inputs``: the hole is pasted on a random half of
            the other looks too. ``growth``: all masks grown by 100 m; ``growth of looks``: all but the hole.
            ``scl``: the masks are the plain reading of SCL; the pasted hole stays known.
        pastes: holes per target.
        seed: of donors, turns and halves.
    """
    rng = np.random.default_rng(seed)
    share = series.bad.mean(axis=(1, 2))
    donors = np.flatnonzero((share >= DONOR_BAD_SHARE[0]) & (share <= DONOR_BAD_SHARE[1]))
    for target in targets(series):
        for donor in rng.choice(donors[donors != target], size=pastes, replace=False):
            turns = int(rng.integers(4))
            half = rng.permutation(len(series.days)) % 2 == 0
            yield _case(series, variant, target, int(donor), turns, half)


def _case(
    series: Series,
    variant: Variant,
    target: int,
    donor: int,
    turns: int,
    half: NDArray[np.bool_],
) -> Case:
    hole = np.rot90(series.bad[donor], turns)
    cloudy = np.rot90(series.codes[donor], turns, axes=(1, 2))
    used = np.flatnonzero(np.abs(series.days - series.days[target]) <= WINDOW_D)
    at = int(np.flatnonzero(used == target)[0])
    codes = series.codes[used].copy()
    bad = (series.scl_bad if variant == "scl" else series.bad)[used].copy()
    pasted = half[used] if variant == "inputs" else np.zeros(len(used), bool)
    pasted[at] = True
    bad |= pasted[:, None, None] & hole
    codes = np.where((pasted[:, None, None] & hole)[:, None], cloudy, codes)
    if variant.startswith("growth"):
        grown = grow(bad, GROWTH_M / series.resolution_m)
        if variant == "growth of looks":
            grown[at] = bad[at]
        bad = grown
    # score only what is truth: the target's own few bad pixels are none
    scored = hole & ~series.bad[target]
    return Case(
        codes,
        ~bad & (codes != 0).all(axis=1),
        series.days[used],
        at,
        series.codes[target],
        scored,
        int(series.days[target]),
    )
