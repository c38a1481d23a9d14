"""Overviews: in come whole shards of one level, out comes one shard of the next, at half the resolution.

Reflectance and its sigma are averaged over the valid pixels of each 2 x 2; classes, counts and dates take the
commonest value of the pixels that hold data (ties: the first, row by row). A pixel has data where any of its four has,
in all layers alike. The sigma's average is the sigma of the averaged value if the four errors are alike, which errors
of filled gaps nearly are; it is never too small. Shard by shard: a worker holds one layer of 2 x 2 shards at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.grid import Grid
from pipeline.layers import FLAGS, LayerSpec, layer_specs
from pipeline.store import read_region, write_region

type Quarters = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def coarsen_shard(
    path: str | Path,
    grid: Grid,
    bands: tuple[str, ...],
    uncertainty: bool,
    slot: int,
    level: int,
    shard: tuple[int, int],
    unit: str | None = None,
) -> Any:
    """Write one shard of a level of one period from up to 2 x 2 shards of the level below; called on a worker.

    Args:
        path: the store.
        grid: of level 0.
        bands: of the store.
        uncertainty: whether the store has uncertainties.
        slot: index on ``time``.
        level: to write, 1 or more.
        shard: (row, col) among the shards of ``level``.
        unit: of work that the shard is part of; default: the period.

    Returns:
        What ``store.keep`` must be given before the mark.

    Raises:
        StoreError: if the store cannot be written.
    """
    below, here = grid.levels(level)[-2:]
    rows, cols = _window(shard[0], here.height, here.shard_px), _window(shard[1], here.width, here.shard_px)
    source = [(2 * a, min(2 * b, size)) for (a, b), size in zip((rows, cols), below.shape, strict=True)]

    def coarse() -> Iterator[tuple[str, NDArray[Any]]]:
        for name, spec in layer_specs(bands, uncertainty=uncertainty).items():
            values = read_region(path, below, slot, source[0], source[1], name, group=str(level - 1), unit=unit)
            yield name, coarsen(values, name, spec)

    return write_region(path, here, slot, rows, cols, coarse(), group=str(level), unit=unit)


def _window(index: int, size: int, shard_px: int) -> tuple[int, int]:
    return index * shard_px, min((index + 1) * shard_px, size)


def coarsen(values: NDArray[Any], name: str, spec: LayerSpec) -> NDArray[Any]:
    """(rows, cols) codes of a layer to (ceil(rows / 2), ceil(cols / 2)) of the same dtype; missing is ``spec.fill``."""
    if spec.resampling == "average":
        return average(values, spec.fill)
    if name == "flags":
        return mode(values, (values & FLAGS["no_data"]) > 0)
    return mode(values, values == spec.fill if name == "source_date" else None)


def average(values: NDArray[np.uint16], fill: int) -> NDArray[np.uint16]:
    """Mean of the values in each 2 x 2 that are not ``fill``, rounded half up; ``fill`` where there is none."""
    values = _even(values, fill)
    missing = values == fill
    some = bool(missing.any())
    if some and fill:
        values = np.where(missing, np.uint16(0), values)
    rows = values[0::2].astype(np.uint32) + values[1::2]
    total = rows[:, 0::2] + rows[:, 1::2]
    if not some:
        return ((total + 2) >> 2).astype(np.uint16)
    empty = missing[0::2].view(np.uint8) + missing[1::2].view(np.uint8)
    count = np.uint8(4) - (empty[:, 0::2] + empty[:, 1::2])
    mean = (total + (count >> 1)) // np.maximum(count, 1)
    return np.where(count > 0, mean, fill).astype(np.uint16)


def mode(values: NDArray[Any], missing: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Commonest value of each 2 x 2 among those not ``missing`` (all, where all are missing); ties: the first."""
    if values.shape[0] % 2 or values.shape[1] % 2:
        # An odd edge is doubled, which leaves the commonest value of the real pixels as it is.
        values = np.pad(values, [(0, n % 2) for n in values.shape], mode="edge")
        if missing is not None:
            missing = np.pad(missing, [(0, n % 2) for n in missing.shape], mode="edge")
    a, b, c, d = quarters = _quarters(values)
    out = a.copy()
    mixed = np.nonzero((a != b) | (a != c) | (a != d))
    if mixed[0].size:
        four = np.stack([quarter[mixed] for quarter in quarters])
        gone = np.zeros(four.shape, bool) if missing is None else np.stack([m[mixed] for m in _quarters(missing)])
        gone &= ~gone.all(axis=0)
        votes = sum((four == one) & ~other for one, other in zip(four, gone, strict=True))
        out[mixed] = four[np.where(gone, 0, votes).argmax(axis=0), np.arange(four.shape[1])]
    return out


def _quarters(values: NDArray[Any]) -> Quarters:
    return values[0::2, 0::2], values[0::2, 1::2], values[1::2, 0::2], values[1::2, 1::2]


def _even(values: NDArray[Any], fill: int) -> NDArray[Any]:
    odd = [(0, n % 2) for n in values.shape]
    return np.pad(values, odd, constant_values=fill) if odd != [(0, 0), (0, 0)] else values


def level_shards(grid: Grid) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(level, its shards) of a mosaic's overviews, each to be finished before the next."""
    for number, level in enumerate(grid.levels()[1:], 1):
        yield number, list(level.shards())
