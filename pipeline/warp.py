"""Resampling onto the lattice: in come a raster's georeference and a way to fetch pixels, out come a grid's pixels.

Pure NumPy and pyproj, no files. Every step works pixel by pixel on *global* lattice indices (coordinates of a pixel
are computed from its global row and column, the projection is evaluated on nodes fixed to the lattice), so the bytes
of a pixel never depend on which window was asked for. GDAL's warper does not promise that: its scale factors and its
approximation come from the window. It agrees with GDAL's bilinear within 1 DN (tested).
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer

from pipeline.grid import Grid

Kind = Literal["reflectance", "classes"]
Raster = NDArray[Any]
Fetch = Callable[[int, int, int, int], Raster]
"""``fetch(r0, r1, c0, c1)`` gives the pixels of rows [r0, r1) and columns [c0, c1), nodata outside the raster."""

ON_LATTICE: Final = 1e-3
"""Two lattices coincide when they are nowhere farther apart than this, in pixels."""
NODE_PX: Final = 16
"""Spacing of the nodes at which the projection is evaluated; linear in between. Over 16 px of 10 to 120 m the
curvature between neighbouring UTM zones is below 1e-3 px (tested against the exact transformation)."""
STRIP_PX: Final = 2048
STRIP_ROWS: Final = 32
OUTSIDE: Final = -1e9
TIE: Final = 1e-6
"""Shift in pixels that makes nearest neighbour on a pixel edge fall to one side whatever the rounding."""


@dataclass(frozen=True)
class Frame:
    """Where a raster lies: CRS (``EPSG:n`` or WKT2), affine as six numbers (see ``Asset``), shape and nodata value."""

    crs: str
    transform: tuple[float, float, float, float, float, float]
    shape: tuple[int, int]
    nodata: float = 0.0

    @property
    def affine(self) -> Affine:
        """The transform as an Affine (pixel corner to CRS)."""
        return Affine(*self.transform)

    def reduced(self, factor: int) -> "Frame":
        """The frame of ``factor`` x ``factor`` blocks counted from the top left corner."""
        a, b, c, d, e, f = self.transform
        rows, cols = self.shape
        return Frame(
            self.crs,
            (a * factor, b * factor, c, d * factor, e * factor, f),
            (-(-rows // factor), -(-cols // factor)),
            self.nodata,
        )


@lru_cache(maxsize=512)
def same_crs(one: str, other: str) -> bool:
    """Whether two CRS texts mean the same CRS."""
    return one == other or bool(CRS.from_user_input(one).equals(CRS.from_user_input(other), True))


def native_offset(frame: Frame, grid: Grid) -> tuple[int, int] | None:
    """(row, col) of the grid's [0, 0] in the raster where both share CRS, resolution and lattice, else None."""
    shift = _steps(frame, grid, 1)
    if shift is None:
        return None
    return grid.row0 - shift[0], grid.col0 - shift[1]


def lattice_ratio(frame: Frame, grid: Grid, factors: tuple[int, ...]) -> tuple[int, tuple[int, int]] | None:
    """The ratio of the raster's pixel to the grid's and the phase of its pixels on the grid's lattice.

    Returns (factor, (row, col)): a raster pixel covers ``factor`` x ``factor`` lattice pixels and starts at global
    rows ``R % factor == row`` and columns ``C % factor == col``; None where the lattices do not fit so.
    """
    for factor in factors:
        start = _steps(frame, grid, factor)
        if start is not None:
            return factor, (start[0] % factor, start[1] % factor)
    return None


def _steps(frame: Frame, grid: Grid, factor: int) -> tuple[int, int] | None:
    """Global (row, col) of the raster's corner if its pixels are ``factor`` lattice pixels and on the lattice."""
    a, b, c, d, e, f = frame.transform
    size, side = grid.resolution_m, grid.resolution_m * factor
    if b or d or a <= 0 or e >= 0:
        return None
    far = max(frame.shape)
    if max(abs(a - side), abs(e + side)) * far > ON_LATTICE * size:
        return None
    col, row = (c - grid.phase_m[0]) / size, (grid.phase_m[1] - f) / size
    if max(abs(col - round(col)), abs(row - round(row))) > ON_LATTICE:
        return None
    return (round(row), round(col)) if same_crs(frame.crs, grid.crs) else None


_local = threading.local()


def _transformer(source: str, target: str) -> Transformer:
    cache: dict[tuple[str, str], Transformer] = _local.__dict__.setdefault("transformers", {})
    key = (source, target)
    if key not in cache:
        cache[key] = Transformer.from_crs(source, target, always_xy=True)
    return cache[key]


def _apply(
    affine: Affine, x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (
        affine.a * x + affine.b * y + affine.c,
        affine.d * x + affine.e * y + affine.f,
    )


@lru_cache(maxsize=4096)
def shrink(frame: Frame, crs: str, resolution_m: float) -> float:
    """How many raster pixels fit along one grid pixel (above 1: downsampling), judged at the raster's centre."""
    rows, cols = frame.shape
    at = np.array([[cols / 2, rows / 2], [cols / 2 + 1, rows / 2], [cols / 2, rows / 2 + 1]])
    x, y = _apply(frame.affine, at[:, 0], at[:, 1])
    if not same_crs(frame.crs, crs):
        x, y = _transformer(frame.crs, crs).transform(x, y)
    area = abs((x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0]))
    return float(resolution_m / math.sqrt(area)) if np.isfinite(area) and area > 0 else 1.0


def resample(fetch: Fetch, frame: Frame, grid: Grid, kind: Kind) -> Raster:
    """Pixels of ``grid`` from a raster on another lattice or CRS.

    Classes come by nearest neighbour. Reflectance is averaged over whole blocks while two or more raster pixels fit
    along a grid pixel, then bilinear; a pixel is valid where the raster pixel it falls in is, and takes its value
    from the valid ones of its four neighbours.

    Args:
        fetch: gives the raster's pixels.
        frame: where the raster lies.
        grid: the target.
        kind: ``classes`` or ``reflectance``.

    Returns:
        (height, width) in the raster's dtype, ``frame.nodata`` where it has no data.
    """
    factor = int(shrink(frame, grid.crs, grid.resolution_m) + 1e-6) if kind == "reflectance" else 1
    if factor >= 2:
        fetch, frame = _block_means(fetch, frame, factor), frame.reduced(factor)
    aligned = frame.transform[1] == 0 == frame.transform[3] and same_crs(frame.crs, grid.crs)
    where = _separable(frame, grid) if aligned else _nodes(frame, grid)
    near = (where.rows, where.cols) if isinstance(where, _Nodes) else where
    rows, cols = _span(near[0], frame.shape[0]), _span(near[1], frame.shape[1])
    if rows is None or cols is None:
        return np.full(grid.shape, frame.nodata, fetch(0, 1, 0, 1).dtype)
    source = fetch(*rows, *cols)
    sample = _Nearest(source, rows[0], cols[0]) if kind == "classes" else _Bilinear(source, rows[0], cols[0], frame)
    if not isinstance(where, _Nodes):
        return sample(where)
    out = np.empty(grid.shape, source.dtype)
    for row in range(0, grid.height, STRIP_ROWS):  # strips stay in the processor's cache
        out[row : row + STRIP_ROWS] = sample(where.strip(row, row + STRIP_ROWS))
    return out


Where = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Row and column coordinates in the raster, in pixels from its corner: (h, 1) and (1, w), or both (h, w)."""


def _separable(frame: Frame, grid: Grid) -> Where:
    a, _, c, _, e, f = frame.transform
    rows = np.arange(grid.row0, grid.row0 + grid.height) + 0.5
    cols = np.arange(grid.col0, grid.col0 + grid.width) + 0.5
    y = np.asarray(grid.phase_m[1] - rows * grid.resolution_m, np.float64)
    x = np.asarray(grid.phase_m[0] + cols * grid.resolution_m, np.float64)
    return ((y - f) / e)[:, None], ((x - c) / a)[None, :]


@dataclass(frozen=True)
class _Nodes:
    """Raster coordinates, exact at nodes of the lattice, linear between them."""

    rows: NDArray[np.float64]
    cols: NDArray[np.float64]
    at_row: tuple[NDArray[np.intp], NDArray[np.float64]]
    at_col: tuple[NDArray[np.intp], NDArray[np.float64]]

    def strip(self, first: int, last: int) -> Where:
        """Coordinates of the rows [first, last) of the grid."""
        i, g = self.at_row[0][first:last], self.at_row[1][first:last, None]
        return self._between(self.rows, i, g), self._between(self.cols, i, g)

    def _between(self, nodes: NDArray[np.float64], i: NDArray[np.intp], g: NDArray[np.float64]) -> NDArray[np.float64]:
        j, k = self.at_col
        along = nodes[i] * (1 - g) + nodes[i + 1] * g
        fine: NDArray[np.float64] = along[:, j] * (1 - k) + along[:, j + 1] * k
        return fine


def _nodes(frame: Frame, grid: Grid) -> _Nodes:
    """The nodes around a grid; far outside the raster where the projection is not defined."""
    row_node, row_part = np.divmod(np.arange(grid.row0, grid.row0 + grid.height) + 0.5, NODE_PX)
    col_node, col_part = np.divmod(np.arange(grid.col0, grid.col0 + grid.width) + 0.5, NODE_PX)
    nodes_r = np.arange(row_node[0], row_node[-1] + 2) * NODE_PX
    nodes_c = np.arange(col_node[0], col_node[-1] + 2) * NODE_PX
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x, y = np.meshgrid(grid.phase_m[0] + nodes_c * grid.resolution_m, grid.phase_m[1] - nodes_r * grid.resolution_m)
    if not same_crs(frame.crs, grid.crs):
        x, y = _transformer(grid.crs, frame.crs).transform(x, y)
    undefined = ~(np.isfinite(x) & np.isfinite(y))
    x[undefined] = y[undefined] = 0.0
    cols, rows = _apply(~frame.affine, x, y)
    rows[undefined] = cols[undefined] = OUTSIDE
    return _Nodes(
        rows,
        cols,
        ((row_node - row_node[0]).astype(np.intp), row_part / NODE_PX),
        ((col_node - col_node[0]).astype(np.intp), col_part / NODE_PX),
    )


def _span(coords: NDArray[np.float64], size: int) -> tuple[int, int] | None:
    """First and one-past-last raster index that ``coords`` need, one pixel of margin, None if all lie outside."""
    low, high = float(coords.min()), float(coords.max())
    if not (low < size + 1 and high > -1):
        return None
    return max(math.floor(max(low, -1.0)) - 1, -2), min(math.floor(min(high, size + 1.0)) + 2, size + 2)


def _index(coords: NDArray[np.float64], start: int, size: int) -> NDArray[np.intp]:
    """Index of the pixel each coordinate falls in, within a window of ``size`` from ``start``, kept inside it.

    The window's rim lies outside the raster or outside the need, so keeping to it is harmless.
    """
    inside = np.floor(coords + TIE) - start
    index: NDArray[np.intp] = np.clip(inside, 0, size - 1).astype(np.intp)
    return index


class _Nearest:
    """Samples a window (its [0, 0] is raster pixel (row, col)) by nearest neighbour."""

    def __init__(self, source: Raster, row: int, col: int) -> None:
        self.source, self.row, self.col = source, row, col

    def __call__(self, where: Where) -> Raster:
        height, width = self.source.shape
        rows, cols = _index(where[0], self.row, height), _index(where[1], self.col, width)
        if rows.shape[1] == 1 and cols.shape[0] == 1:
            return self.source[rows[:, 0]][:, cols[0]]
        rows *= width
        rows += cols
        return self.source.ravel().take(rows)


def invalid(values: Raster, nodata: float) -> NDArray[np.bool_]:
    """True where a raster has no data (NaN always counts as none)."""
    missing: NDArray[np.bool_] = values == nodata
    if values.dtype.kind == "f":
        missing |= np.isnan(values)
    return missing


class _Bilinear:
    """Samples a window (its [0, 0] is raster pixel (row, col)) bilinearly, invalid neighbours left out."""

    def __init__(self, source: Raster, row: int, col: int, frame: Frame) -> None:
        self.row, self.col, self.nodata, self.dtype = row, col, frame.nodata, source.dtype
        self.values = source.astype(np.float32)
        self.bad = invalid(source, frame.nodata)
        self.holes = bool(self.bad.any())
        if self.holes:
            self.values[self.bad] = 0

    def __call__(self, where: Where) -> Raster:
        height, width = self.values.shape
        i, g = _lower(where[0], self.row, height)
        j, k = _lower(where[1], self.col, width)
        mixed = _blend(self.values, i, j, g, k)
        if not self.holes:
            return _as(mixed, self.dtype)
        _mend(mixed, self.bad, (i, j, g, k))
        out = _as(mixed, self.dtype)
        out[self.bad[_index(where[0], self.row, height), _index(where[1], self.col, width)]] = self.nodata
        return out


def _lower(coords: NDArray[np.float64], start: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The lower neighbour of each coordinate (pixel centres) and the weight of the upper one."""
    centre = coords - 0.5
    low = np.floor(centre)
    part = np.subtract(centre, low, out=centre).astype(np.float32)
    low -= start
    return np.clip(low, 0, size - 2, out=low).astype(np.intp), part


def _blend(
    values: NDArray[np.float32],
    i: NDArray[np.intp],
    j: NDArray[np.intp],
    g: NDArray[np.float32],
    k: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Weighted mean of four neighbours, along columns first. Exact in float32 for uint16 at integer ratios up to 6."""
    if i.shape[1] == 1 and j.shape[0] == 1:
        across = values[:, j[0]]
        across *= 1 - k
        upper = values[:, j[0] + 1]
        upper *= k
        across += upper
        out: NDArray[np.float32] = across[i[:, 0]]
        out *= 1 - g
        below = across[i[:, 0] + 1]
        below *= g
        out += below
        return out
    flat, width = values.ravel(), values.shape[1]
    at = i * width
    at += j
    mixed = _along(flat, at, k)
    at += width
    low = _along(flat, at, k)
    low -= mixed
    low *= g
    mixed += low
    return mixed


def _along(flat: NDArray[np.float32], at: NDArray[np.intp], k: NDArray[np.float32]) -> NDArray[np.float32]:
    """``v[at] + (v[at + 1] - v[at]) * k``, leaving ``at`` as it was."""
    left: NDArray[np.float32] = flat.take(at, mode="clip")
    at += 1
    right = flat.take(at, mode="clip")
    at -= 1
    right -= left
    right *= k
    left += right
    return left


def _mend(mixed: NDArray[np.float32], bad: NDArray[np.bool_], at: tuple[Any, Any, Any, Any]) -> None:
    """Divide by the weight of the valid neighbours where one of the four is invalid, in place."""
    i, j, g, k = at
    near = bad[:-1, :-1] | bad[1:, :-1] | bad[:-1, 1:] | bad[1:, 1:]
    rows, cols = np.nonzero(near[i, j])
    if not len(rows):
        return
    i, j, g, k = (np.broadcast_to(part, mixed.shape)[rows, cols] for part in at)
    weight = np.zeros(len(rows), np.float32)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = (g if down else 1 - g) * (k if right else 1 - k)
        weight += np.where(bad[i + down, j + right], np.float32(0), share)
    mixed[rows, cols] /= np.where(weight > 0, weight, np.float32(1))


def _as(values: NDArray[np.float32], dtype: np.dtype[Any]) -> Raster:
    if dtype.kind == "f":
        return values.astype(dtype, copy=False)
    values += np.float32(0.5)
    return np.floor(values, out=values).astype(dtype)


def _block_means(fetch: Fetch, frame: Frame, factor: int) -> Fetch:
    """A fetch of means over ``factor`` x ``factor`` blocks of valid pixels, strip by strip to bound the memory."""

    def reduced(r0: int, r1: int, c0: int, c1: int) -> Raster:
        step = max(1, STRIP_PX // factor)
        parts = [strip(r, min(r + step, r1), c0, c1) for r in range(r0, r1, step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def strip(r0: int, r1: int, c0: int, c1: int) -> Raster:
        source = fetch(r0 * factor, r1 * factor, c0 * factor, c1 * factor)
        good = ~invalid(source, frame.nodata)
        blocks = (r1 - r0, factor, c1 - c0, factor)
        total = np.where(good, source, 0).astype(np.float64).reshape(blocks).sum(axis=(1, 3))
        count = good.reshape(blocks).sum(axis=(1, 3))
        mean = total / np.maximum(count, 1)
        if source.dtype.kind != "f":
            mean = np.floor(mean + 0.5)
        mean[count == 0] = frame.nodata
        return mean.astype(source.dtype)

    return reduced
