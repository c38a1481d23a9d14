"""Where a raster lies on a grid, as its item says: in come an asset and a grid, out come windows and outlines."""

import math
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from pipeline.grid import Grid
from pipeline.items import Asset

EDGE_POINTS: Final = 65
"""Points of an outline's edge that are projected: 1.7 km apart on a Sentinel-2 tile."""
WIDEST_M: Final = 3e6
"""A raster that looks wider than this in a projection may be folded by it."""
SPARE_PX: Final = 3
"""Pixels beyond a raster's outline that are counted in: where it is averaged, blocks at its edge reach beyond it."""


def touches(asset: Asset, grid: Grid) -> bool:
    """Whether an asset may have pixels in the grid; only a shared CRS lets us say no without reading."""
    if asset.crs != grid.crs:
        return True
    a, _, c, _, e, f = asset.transform
    left, bottom, right, top = grid.bounds
    return c < right and c + a * asset.shape[1] > left and f > bottom and f + e * asset.shape[0] < top


def extent(asset: Asset, grid: Grid) -> NDArray[np.bool_]:
    """(H, W) bool: where a scene that could not be read might have had pixels."""
    if asset.crs != grid.crs:
        return np.ones(grid.shape, bool)
    a, _, c, _, e, f = asset.transform
    inside_x = (grid.x > c) & (grid.x < c + a * asset.shape[1])
    inside_y = (grid.y < f) & (grid.y > f + e * asset.shape[0])
    return np.asarray(inside_y[:, None] & inside_x[None, :])


def window_of(asset: Asset, grid: Grid) -> tuple[int, int, int, int] | None:
    """(r0, r1, c0, c1): rows [r0, r1) and columns [c0, c1) of a grid that hold all pixels that an asset gives it.

    None where it gives none; all of the grid where only a part of the asset's outline can be projected.
    """
    bounds = _bounds(asset.crs, asset.transform, asset.shape, grid.crs)
    if bounds is None:
        return None
    (left, bottom, right, top), size = bounds, grid.resolution_m
    edges = np.array([grid.top - top, grid.top - bottom, left - grid.left, right - grid.left]) / size
    spare = (-SPARE_PX, SPARE_PX) * 2
    most = (grid.height, grid.height, grid.width, grid.width)
    r0, r1, c0, c1 = (round(float(v)) for v in np.clip(np.rint(edges) + spare, 0, most))
    return (r0, r1, c0, c1) if r0 < r1 and c0 < c1 else None


@lru_cache(maxsize=4096)
def _bounds(
    crs: str, transform: tuple[float, float, float, float, float, float], shape: tuple[int, int], target: str
) -> tuple[float, float, float, float] | None:
    """(left, bottom, right, top) of a raster in another CRS, as far as its edges bend there.

    None where no point of its outline is defined there, without end where only some are.
    """
    (height, width), along = shape, np.linspace(0, 1, EDGE_POINTS)
    none, full = np.zeros(EDGE_POINTS), np.ones(EDGE_POINTS)
    cols = np.stack([along, full, along, none]) * width
    rows = np.stack([none, along, full, along]) * height
    a, b, c, d, e, f = transform
    project = Transformer.from_crs(crs, target, always_xy=True).transform
    x, y = np.asarray(project(a * cols + b * rows + c, d * cols + e * rows + f))
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return None
    if not known.all() or max(np.ptp(x), np.ptp(y)) > WIDEST_M:
        return -math.inf, -math.inf, math.inf, math.inf
    bend = max(float(np.abs(p[:, 1:-1] - (p[:, :-2] + p[:, 2:]) / 2).max()) for p in (x, y))
    return float(x.min()) - bend, float(y.min()) - bend, float(x.max()) + bend, float(y.max()) + bend
