"""In: looks around an acquisition, clear where usable. Out: that acquisition completed under its clouds, with one sigma.

Interpolation in time ignores what the acquisition itself shows in its clear pixels. Here those pixels teach, window by
window, how the acquisition follows from the other dates (all bands of a group together), and the clouded pixels are
filled accordingly; what the fit leaves over nearby is carried into the gap. Pure numpy, nothing lazy, no I/O.

All arrays are uint16 codes (reflectance * 10000 + 1000, 0 = no data); windows stand on a lattice fixed to the global
pixel index, so that the answer at a pixel does not depend on how blocks were cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import ConfigError
from pipeline.regression_fit import (
    CELL_PX,
    CENTRE_CODE,
    REACH_CELLS,
    STRIDE_CELLS,
    UNIT_CODES,
    NodeFit,
    Tile,
    candidate_dates,
    cell_grams,
    fit_node,
    one_blas_thread,
    tile_features,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
UInt16 = NDArray[np.uint16]
Int32 = NDArray[np.int32]

GRID_PX = 4  # residuals are smoothed on a grid of this step: the Gaussian is far wider
GRID_REACH = 6  # steps to either side
HALO_PX = CELL_PX + STRIDE_CELLS * CELL_PX + REACH_CELLS * CELL_PX  # residual's reach + node's + window's
DISTANCE_CAP_PX = 128  # sigma grows up to here; below HALO_PX
RUN_CELLS = 16  # cells of a row worked on at a time: the working set stays in the cache
GROUP_BANDS = 4  # bands that serve as features for each other
MOST_CANDIDATES = 32  # dates that get features at all


@dataclass(frozen=True)
class RegressionOptions:
    """How the regression is done; the defaults are what the benchmark was measured with."""

    dates: int = 14
    """Most dates used as features in a window: the nearest ones that are clear enough."""
    least_clear_share: float = 0.3
    """A date serves in a window when it is clear on more than this share (0-1) of it."""
    ridge: float = 0.003
    """Ridge, relative to the mean variance of the features; it pulls towards linear interpolation."""
    evidence_px: float = 30.0
    """Clear pixels of the anchor (weighted by the window's taper) at which data and linear weigh the same."""
    residual_sigma_px: float = 10.0
    """Sigma of the Gaussian that carries the clear pixels' residual into the gap, in pixels; 0 = none."""
    margin_codes: float = 500.0
    """A filled value may leave the range of the looks at its pixel by this (500 = 0.05 reflectance) ..."""
    margin_share: float = 0.5
    """... plus this share of that range."""

    def __post_init__(self) -> None:
        bounds = {
            "dates": (1, MOST_CANDIDATES),
            "least_clear_share": (0.0, 1.0),
            "ridge": (1e-6, 1e3),
            "evidence_px": (0.0, 1e6),
            "residual_sigma_px": (0.0, 4.0 * GRID_PX),
            "margin_codes": (0.0, 65535.0),
            "margin_share": (0.0, 100.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"regression option {name} = {value}: must lie between {low} and {high}")


@dataclass(frozen=True)
class Filled:
    """One acquisition, completed."""

    codes: UInt16
    """``(B, H, W)``; the anchor's clear pixels bit-exact; 0 = no look at all (or outside ``core``)."""
    sigma: Float32
    """``(B, H, W)`` one sigma in codes (1 = 1e-4 reflectance) where filled; NaN where observed or not filled."""
    source_date: Int32
    """``(H, W)`` days since 1970-01-01: own day where observed, else of the nearest clear look in time; 0 = none."""
    model: Bool
    """``(H, W)`` True where the regression itself spoke; False = observed, or fallen back to plain linear."""


@dataclass(frozen=True)
class _Lattice:
    """Where the array lies on the lattice of cells, and which cells and nodes have work to do."""

    top: int  # rows of padding before the array
    left: int
    first: tuple[int, int]  # global index of the first cell (y, x)
    shape: tuple[int, int]  # cells (y, x)
    predicted: Bool  # cells that hold gaps, and their neighbours (whose residuals are carried into the gaps)
    nodes: list[tuple[int, int]]  # global node indices
    needed: Bool  # cells in the window of some node


def fill_acquisition(
    *,
    codes: UInt16,
    clear: Bool,
    days: Int32,
    anchor: int,
    row0: int,
    col0: int,
    options: RegressionOptions = RegressionOptions(),  # noqa: B008 (frozen)
    core: tuple[slice, slice] | None = None,
) -> Filled:
    """Complete one acquisition from the looks around it by target-conditioned regression.

    Args:
        codes: ``(T, B, H, W)`` uint16 codes, 0 = no data. Pass the same acquisitions for every block of an area.
        clear: ``(T, H, W)`` bool, True = usable look.
        days: ``(T,)`` int32 days since 1970-01-01, ascending, ties allowed.
        anchor: index of the acquisition to complete.
        row0: global lattice row of pixel [0, 0].
        col0: its global lattice column.
        options: see :class:`RegressionOptions`.
        core: rows and columns to fill, where the rest is halo; default all. Outside, the result is no data.

    Returns:
        :class:`Filled`, eager. A pixel depends on nothing farther than ``HALO_PX``.

    Raises:
        ConfigError: shapes, dtypes, order of days or the anchor's index do not fit.

    Source: science notes, section 4.1; the features of all bands of a group serve each band.
    """
    _check(codes, clear, days, anchor)
    n_times, n_bands, height, width = codes.shape
    inside = np.zeros((height, width), bool)
    inside[core if core is not None else (slice(None), slice(None))] = True
    observed = clear[anchor] & inside
    gap = inside & ~clear[anchor]
    out = np.where(observed, codes[anchor], np.uint16(0))
    sigma = np.full((n_bands, height, width), np.nan, np.float32)
    source_date = _nearest_look(clear, days, anchor)
    source_date[~inside] = 0
    model = np.zeros((height, width), bool)
    lattice = _plan(gap, row0, col0)
    if n_times > 1 and lattice.nodes:
        growth = _growth(clear[anchor], row0, col0)
        with one_blas_thread():
            for bands in _groups(n_bands):
                part = _Group(codes[:, bands], clear, days, anchor, lattice, options)
                part.write(out[bands], sigma[bands], model, gap, growth)
    return Filled(out, sigma, source_date, model)


def fill_series(
    *,
    codes: UInt16,
    clear: Bool,
    days: Int32,
    row0: int,
    col0: int,
    options: RegressionOptions = RegressionOptions(),  # noqa: B008 (frozen)
    window_days: int | None = None,
) -> UInt16:
    """Every acquisition completed: a series without gaps.

    Args:
        codes: ``(T, B, H, W)`` uint16 codes, 0 = no data.
        clear: ``(T, H, W)`` bool, True = usable look.
        days: ``(T,)`` int32 days since 1970-01-01, ascending.
        row0: global lattice row of pixel [0, 0].
        col0: its global lattice column.
        options: see :class:`RegressionOptions`.
        window_days: use only looks within this many days of each acquisition; default all.

    Returns:
        ``(T, B, H, W)`` uint16, eager; observed values bit-exact, 0 only where a pixel has no clear look at all.
    """
    filled = np.empty_like(codes)
    for t, day in enumerate(days):
        used = np.arange(len(days)) if window_days is None else np.flatnonzero(np.abs(days - day) <= window_days)
        filled[t] = fill_acquisition(
            codes=codes[used],
            clear=clear[used],
            days=days[used],
            anchor=int(np.searchsorted(used, t)),
            row0=row0,
            col0=col0,
            options=options,
        ).codes
    return filled


def _check(codes: UInt16, clear: Bool, days: Int32, anchor: int) -> None:
    if codes.ndim != 4 or codes.dtype != np.uint16:
        raise ConfigError(f"codes are {codes.dtype} of shape {codes.shape}: pass uint16 (time, band, y, x)")
    if clear.shape != codes.shape[:1] + codes.shape[2:] or clear.dtype != np.bool_:
        raise ConfigError(f"clear is {clear.dtype} of shape {clear.shape}: pass bool (time, y, x) as the codes have it")
    if days.shape != codes.shape[:1] or (np.diff(days) < 0).any():
        raise ConfigError(f"days {days.tolist()}: pass one day an acquisition, ascending")
    if not 0 <= anchor < len(days):
        raise ConfigError(f"anchor {anchor}: must be an index into the {len(days)} acquisitions")


def _groups(n_bands: int) -> list[slice]:
    """Neighbouring bands in groups of nearly equal size."""
    n = -(-n_bands // GROUP_BANDS)
    edges = [round(i * n_bands / n) for i in range(n + 1)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _nearest_look(clear: Bool, days: Int32, anchor: int) -> Int32:
    """(H, W) day of the nearest clear look; the anchor's own day where it is clear; ties go to the earlier look."""
    nearest = np.zeros(clear.shape[1:], np.int32)
    found = np.zeros(clear.shape[1:], bool)
    for t in sorted(range(len(days)), key=lambda t: (t != anchor, abs(int(days[t] - days[anchor])), t)):
        nearest[clear[t] & ~found] = days[t]
        found |= clear[t]
        if found.all():
            break
    return nearest


def _plan(gap: Bool, row0: int, col0: int) -> _Lattice:
    first = (row0 // CELL_PX, col0 // CELL_PX)
    top, left = row0 - first[0] * CELL_PX, col0 - first[1] * CELL_PX
    shape = (-(-(top + gap.shape[0]) // CELL_PX), -(-(left + gap.shape[1]) // CELL_PX))
    padded = np.zeros((shape[0] * CELL_PX, shape[1] * CELL_PX), bool)
    padded[top : top + gap.shape[0], left : left + gap.shape[1]] = gap
    holds_gap = padded.reshape(shape[0], CELL_PX, shape[1], CELL_PX).any(axis=(1, 3))
    predicted = ndimage.binary_dilation(holds_gap, np.ones((3, 3), bool))
    nodes: set[tuple[int, int]] = set()
    for y, x in np.argwhere(predicted):
        j, i = (y + first[0]) // STRIDE_CELLS, (x + first[1]) // STRIDE_CELLS
        nodes |= {(j, i), (j, i + 1), (j + 1, i), (j + 1, i + 1)}
    needed = predicted.copy()
    for j, i in nodes:
        y, x = j * STRIDE_CELLS - first[0], i * STRIDE_CELLS - first[1]
        needed[max(y - REACH_CELLS, 0) : max(y + REACH_CELLS, 0), max(x - REACH_CELLS, 0) : max(x + REACH_CELLS, 0)] = (
            True
        )
    return _Lattice(top, left, first, shape, predicted, sorted(nodes), needed)


def _growth(anchor_clear: Bool, row0: int, col0: int) -> Float32:
    """(H, W) factor on sigma by the distance to the nearest clear pixel, in steps of GRID_PX."""
    top, left = row0 % GRID_PX, col0 % GRID_PX
    height, width = anchor_clear.shape
    shape = (-(-(top + height) // GRID_PX), -(-(left + width) // GRID_PX))
    padded = np.zeros((shape[0] * GRID_PX, shape[1] * GRID_PX), bool)
    padded[top : top + height, left : left + width] = anchor_clear
    some = padded.reshape(shape[0], GRID_PX, shape[1], GRID_PX).any(axis=(1, 3))
    far = ndimage.distance_transform_edt(~some) * GRID_PX if some.any() else np.full(shape, np.inf)
    share = np.minimum(far, DISTANCE_CAP_PX) / DISTANCE_CAP_PX
    factor = (SIGMA_NEAR + (SIGMA_FAR - SIGMA_NEAR) * share).astype(np.float32)
    full = np.repeat(np.repeat(factor, GRID_PX, axis=0), GRID_PX, axis=1)
    return full[top : top + height, left : left + width]


SIGMA_NEAR, SIGMA_FAR = 1.0, 1.5


class _Group:
    """A group of bands being filled: cells first, then nodes, then the predictions."""

    def __init__(
        self, codes: UInt16, clear: Bool, days: Int32, anchor: int, lattice: _Lattice, options: RegressionOptions
    ) -> None:
        self.codes, self.clear, self.days, self.anchor = codes, clear, days, anchor
        self.lattice, self.options = lattice, options
        self.n_bands = codes.shape[1]
        self.dates = candidate_dates(days, anchor, MOST_CANDIDATES)
        self.n_features = (len(self.dates) + 1) * self.n_bands
        self._read_cells()
        self.fits = {node: self._fit(node) for node in lattice.nodes}

    def _tiles(self) -> Iterator[tuple[int, int, int, Tile]]:
        """Runs of needed cells: (cell row, first column, end column, features)."""
        lat = self.lattice
        height, width = self.clear.shape[1:]
        for y in range(lat.shape[0]):
            columns = np.flatnonzero(lat.needed[y])
            if not len(columns):
                continue
            for x in range(int(columns[0]), int(columns[-1]) + 1, RUN_CELLS):
                end = min(x + RUN_CELLS, int(columns[-1]) + 1)
                rows = _overlap(y * CELL_PX - lat.top, CELL_PX, height)
                cols = _overlap(x * CELL_PX - lat.left, (end - x) * CELL_PX, width)
                if rows.inner == slice(0, CELL_PX) and cols.inner == slice(0, (end - x) * CELL_PX):
                    codes = self.codes[:, :, rows.outer, cols.outer]
                    clear = self.clear[:, rows.outer, cols.outer]
                else:  # the data end inside a cell: what is missing is not clear
                    codes = np.zeros((*self.codes.shape[:2], CELL_PX, (end - x) * CELL_PX), np.uint16)
                    clear = np.zeros((len(self.days), CELL_PX, (end - x) * CELL_PX), bool)
                    codes[:, :, rows.inner, cols.inner] = self.codes[:, :, rows.outer, cols.outer]
                    clear[:, rows.inner, cols.inner] = self.clear[:, rows.outer, cols.outer]
                yield y, x, end, tile_features(codes, clear, self.days, self.anchor, self.dates)

    def _read_cells(self) -> None:
        """Gram matrices of the needed cells, and the features of those to predict."""
        lat, n_rows = self.lattice, self.n_features + 1 + self.n_bands
        # entry 0 is the cell that shows nothing: windows are full everywhere, so all sums have one shape
        self.index = np.where(lat.needed, np.cumsum(lat.needed).reshape(lat.shape), 0)
        n_cells = int(lat.needed.sum()) + 1
        self.grams = np.zeros((n_cells, n_rows, n_rows), np.float32)
        self.clear_px = np.zeros((n_cells, len(self.dates)), np.int32)
        self.looked_px = np.zeros(n_cells, np.int32)
        self.swing = np.zeros((n_cells, self.n_bands + 1))  # sum of squares per band, then the number of pixels
        self.at = {(int(y), int(x)): i for i, (y, x) in enumerate(np.argwhere(lat.predicted))}
        pixels = CELL_PX * CELL_PX
        self.rows = np.empty((len(self.at), n_rows, pixels), np.float32)
        self.fitted = np.empty((len(self.at), pixels), np.float32)
        self.looked = np.empty((len(self.at), pixels), bool)
        for y, x, end, tile in self._tiles():
            cells = self.index[y, x:end]
            mine = cells > 0
            cells = cells[mine]
            self.grams[cells] = cell_grams(tile)[mine]
            self.clear_px[cells] = tile.clear_px[mine]
            self.looked_px[cells] = tile.looked.sum(axis=1, dtype=np.int32)[mine]
            both = np.isfinite(tile.swing[:, 0])
            squares = np.where(both[:, None], tile.swing, 0.0).astype(np.float64) ** 2
            self.swing[cells, :-1] = squares.sum(axis=2)[mine]
            self.swing[cells, -1] = both.sum(axis=1)[mine]
            for k in range(end - x):
                at = self.at.get((y, x + k))
                if at is not None:
                    self.rows[at], self.fitted[at], self.looked[at] = tile.rows[k], tile.fitted[k], tile.looked[k]

    def _fit(self, node: tuple[int, int]) -> NodeFit:
        lat = self.lattice
        ys = node[0] * STRIDE_CELLS - lat.first[0] + np.arange(-REACH_CELLS, REACH_CELLS)
        xs = node[1] * STRIDE_CELLS - lat.first[1] + np.arange(-REACH_CELLS, REACH_CELLS)
        cells = np.zeros((len(ys), len(xs)), np.int64)
        rows, cols = (ys >= 0) & (ys < lat.shape[0]), (xs >= 0) & (xs < lat.shape[1])
        cells[np.ix_(rows, cols)] = self.index[np.ix_(ys[rows], xs[cols])]
        window = cells.ravel()
        looked = max(int(self.looked_px[window].sum()), 1)
        swing = (self.swing[window] * TAPER[:, None]).sum(axis=0)
        prior = 0.5 * swing[:-1] / swing[-1] + 50.0**2 if swing[-1] > 0 else np.full(self.n_bands, 300.0**2)
        away = np.abs(self.days[self.dates] - self.days[self.anchor])
        return fit_node(
            self.grams[window],
            TAPER,
            ((ys + lat.first[0]) % 2 * 2)[:, None].repeat(len(xs), axis=1).ravel()
            + ((xs + lat.first[1]) % 2)[None].repeat(len(ys), axis=0).ravel(),
            self.clear_px[window].sum(axis=0) / looked,
            prior,
            np.argsort(away, kind="stable").tolist(),
            n_bands=self.n_bands,
            most_dates=self.options.dates,
            least_share=self.options.least_clear_share,
            ridge=self.options.ridge,
            evidence_px=self.options.evidence_px,
        )

    def _corners(self, y: int, x: int) -> list[NodeFit]:
        j, i = (y + self.lattice.first[0]) // STRIDE_CELLS, (x + self.lattice.first[1]) // STRIDE_CELLS
        return [self.fits[n] for n in ((j, i), (j, i + 1), (j + 1, i), (j + 1, i + 1))]

    def _predict(self) -> tuple[Float32, Float32, Float32]:
        """What is to be added to linear (n, b, P) in codes, the evidence (n, P) and the variance (n, b, P)."""
        n, b, pixels = len(self.at), self.n_bands, CELL_PX * CELL_PX
        added = np.empty((n, b, pixels), np.float32)
        evidence = np.empty((n, pixels), np.float32)
        variance = np.empty((n, b, pixels), np.float32)
        for (y, x), k in self.at.items():
            corners = self._corners(y, x)
            share = BLEND[(y + self.lattice.first[0]) % STRIDE_CELLS, (x + self.lattice.first[1]) % STRIDE_CELLS]
            spoken = np.concatenate([c.coefficients for c in corners]) @ self.rows[k, : self.n_features + 1]
            added[k] = _blend(spoken.reshape(4, b, pixels), share)
            known = np.array([[c.evidence, *c.variance] for c in corners], np.float32)[:, :, None]
            blended = _blend(known, share)
            evidence[k], variance[k] = blended[0], blended[1:]
        return added, evidence, variance

    def _residual(self, added: Float32) -> Float32:
        """(n, b, P) what the fit leaves over on clear pixels, carried into the gaps by a normalised Gaussian."""
        lat, per = self.lattice, CELL_PX // GRID_PX
        left_over = (self.rows[:, self.n_features + 1 :] * UNIT_CODES - added) * self.fitted[:, None]
        both = np.concatenate([left_over, self.fitted[:, None]], axis=1)
        sums = both.reshape(len(both), -1, per, GRID_PX, per, GRID_PX).sum(axis=(3, 5))
        grid = np.zeros((self.n_bands + 1, lat.shape[0] + 2, per, lat.shape[1] + 2, per), np.float32)
        cells = np.array(list(self.at), np.int64).reshape(-1, 2)
        grid[:, cells[:, 0] + 1, :, cells[:, 1] + 1] = sums.transpose(0, 1, 2, 3)
        flat = grid.reshape(self.n_bands + 1, (lat.shape[0] + 2) * per, -1)
        smooth = _gaussian(_gaussian(flat, 1, self.options.residual_sigma_px), 2, self.options.residual_sigma_px)
        carried = smooth[:-1] / (smooth[-1] + np.float32(GRID_PX * GRID_PX * RESIDUAL_FLOOR))
        result = np.empty_like(added)
        for (y, x), k in self.at.items():
            near = carried[:, (y + 1) * per - 1 : (y + 2) * per + 1, (x + 1) * per - 1 : (x + 2) * per + 1]
            result[k] = (UPSAMPLE @ near @ UPSAMPLE.T).reshape(self.n_bands, -1)
        return result

    def write(self, out: UInt16, sigma: Float32, model: Bool, gap: Bool, growth: Float32) -> None:
        """Fill the gaps of ``out``, ``sigma`` and ``model`` in place."""
        added, evidence, variance = self._predict()
        if self.options.residual_sigma_px > 0:
            added += self._residual(added)
        lat, n_dates = self.lattice, len(self.dates)
        linear = self.rows[:, self.n_features - self.n_bands : self.n_features]
        for (y, x), k in self.at.items():
            rows = _overlap(y * CELL_PX - lat.top, CELL_PX, gap.shape[0])
            cols = _overlap(x * CELL_PX - lat.left, CELL_PX, gap.shape[1])
            here = gap[rows.outer, cols.outer] & self.looked[k].reshape(CELL_PX, CELL_PX)[rows.inner, cols.inner]
            if not here.any():
                continue
            looks = self.rows[k, : n_dates * self.n_bands].reshape(n_dates, self.n_bands, -1)
            low, high = looks.min(axis=0), looks.max(axis=0)
            margin = (high - low) * np.float32(self.options.margin_share) + np.float32(self.options.margin_codes / 1e3)
            value = np.clip(linear[k] + added[k] / UNIT_CODES, low - margin, high + margin) * UNIT_CODES + CENTRE_CODE
            codes = np.clip(np.rint(value), 1, 65534).astype(np.uint16)
            inner = (slice(None), rows.inner, cols.inner)
            outer = (slice(None), rows.outer, cols.outer)
            out[outer] = np.where(here, codes.reshape(-1, CELL_PX, CELL_PX)[inner], out[outer])
            spread = np.sqrt(variance[k]).reshape(-1, CELL_PX, CELL_PX)[inner] * growth[rows.outer, cols.outer]
            sigma[outer] = np.where(here, spread, sigma[outer])
            spoke = (evidence[k] > 0.5).reshape(CELL_PX, CELL_PX)[rows.inner, cols.inner]
            model[rows.outer, cols.outer] |= here & spoke


@dataclass(frozen=True)
class _Overlap:
    outer: slice  # in the array
    inner: slice  # in the piece


def _overlap(start: int, length: int, size: int) -> _Overlap:
    """Where a piece of ``length`` at ``start`` meets an axis of ``size``."""
    low, high = max(start, 0), min(start + length, size)
    return _Overlap(slice(low, high), slice(low - start, high - start))


def _blend(corners: Float32, share: Float32) -> Float32:
    """Bilinear mean of (4, b, 1 or P) with the shares (4, P), summed in a fixed order."""
    mixed: Float32 = corners[0] * share[0]
    for k in range(1, 4):
        mixed = mixed + corners[k] * share[k]
    return mixed


def _gaussian(grid: Float32, axis: int, sigma_px: float) -> Float32:
    """Truncated Gaussian along one axis of the residual grid; plain sums, the same at every position."""
    taps = np.exp(-0.5 * (np.arange(-GRID_REACH, GRID_REACH + 1) * GRID_PX / sigma_px) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    pad = [(0, 0)] * grid.ndim
    pad[axis] = (GRID_REACH, GRID_REACH)
    padded = np.pad(grid, pad)
    smooth = np.zeros_like(grid)
    for k, tap in enumerate(taps):
        smooth += tap * np.take(padded, range(k, k + grid.shape[axis]), axis=axis)
    return smooth


def _taper() -> Float64:
    """(cells of a window,) raised cosine by the distance of the cell's centre from the node."""
    offset = np.arange(-REACH_CELLS, REACH_CELLS) + 0.5
    profile = 0.5 + 0.5 * np.cos(np.pi * offset / (REACH_CELLS + 0.5))
    return np.outer(profile, profile).ravel()


def _blend_shares() -> Float32:
    """(STRIDE, STRIDE, 4, P) bilinear shares of the four nodes around each pixel of a cell, by the cell's place."""
    side = STRIDE_CELLS * CELL_PX
    far = (np.arange(side) + 0.5) / side
    shares = np.empty((STRIDE_CELLS, STRIDE_CELLS, 4, CELL_PX, CELL_PX), np.float32)
    for j in range(STRIDE_CELLS):
        for i in range(STRIDE_CELLS):
            v = far[j * CELL_PX : (j + 1) * CELL_PX, None]
            u = far[None, i * CELL_PX : (i + 1) * CELL_PX]
            shares[j, i] = np.stack([(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u])
    return shares.reshape(STRIDE_CELLS, STRIDE_CELLS, 4, -1)


def _upsampling() -> Float32:
    """(CELL_PX, CELL_PX / GRID_PX + 2) bilinear weights from the residual grid to a cell's pixels."""
    steps = CELL_PX // GRID_PX + 2
    position = (np.arange(CELL_PX) + 0.5) / GRID_PX + 0.5
    return np.maximum(1.0 - np.abs(position[:, None] - np.arange(steps)[None]), 0.0).astype(np.float32)


RESIDUAL_FLOOR = 0.01  # below this share of clear ground within reach a residual fades out
TAPER = _taper()
BLEND = _blend_shares()
UPSAMPLE = _upsampling()
