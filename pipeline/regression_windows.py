"""In: looks around an acquisition and its gaps. Out: the gaps filled, for a group of bands.

The middle of :mod:`pipeline.regression`: the cells of the lattice that have work to do are
read once, with the dates that their nodes use, the nodes fitted, their predictions blended bilinearly and the
residual of the clear pixels carried into the gaps (:class:`Group`). The numbers behind a node are in
:mod:`pipeline.regression_fit`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.regression_fit import (
    CENTRE_CODE,
    NodeFit,
    Swing,
    Tile,
    cell_gram,
    fit_node,
    no_fit,
    tile_features,
)
from pipeline.regression_lattice import (
    BLEND,
    CELL_PX,
    GRID_PX,
    GRID_REACH,
    NEAR,
    STRIDE_CELLS,
    TAPER,
    UPSAMPLE,
    RegressionOptions,
    Windows,
    overlap,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
UInt16 = NDArray[np.uint16]
Int32 = NDArray[np.int32]

RUN_CELLS = 16  # cells of a row worked on at a time: the working set stays in the cache
RESIDUAL_FLOOR = 0.01  # below this share of clear ground within reach a residual fades out
GUIDE_SHRINK = np.float32(0.1)  # of the guide's mean square: what the line must overcome
GUIDE_NOISE_CODES = np.float32(50.0)


@dataclass(frozen=True)
class Held:
    """One cell kept for prediction."""

    tile: Tile
    dates: list[int]  # the tile's, as places among the candidates
    pixels: slice


class Group:
    """A group of bands being filled: cells first, then nodes, then the predictions."""

    def __init__(self, codes: UInt16, windows: Windows, options: RegressionOptions) -> None:
        self.codes, self.windows, self.options = codes, windows, options
        self.lattice = windows.lattice
        self.n_bands = codes.shape[1]
        self._read_cells()
        self.fits = {node: self._fit(node) for node in self.lattice.nodes}

    def _tiles(self) -> Iterator[tuple[NDArray[np.int64], list[int], Tile, Swing]]:
        """Runs of needed cells of a row: (cells, dates, features)."""
        lat, win = self.lattice, self.windows
        for y in range(lat.shape[0]):
            columns = np.flatnonzero(lat.needed[y])
            for start in range(0, len(columns), RUN_CELLS):
                xs = columns[start : start + RUN_CELLS]
                cells = y * lat.shape[1] + xs
                dates = np.flatnonzero(win.wanted[y, xs].any(axis=0)).tolist()
                times = [win.candidates[d] for d in dates]
                # looks that show nothing here, and are not asked for, cost nothing
                shown = win.clear_px[:, cells].any(axis=1)
                shown[times] = True
                shown[win.anchor] = False
                looks = np.flatnonzero(shown)
                codes, clear = self._load(y, xs, [*looks.tolist(), win.anchor])
                tile, swing = tile_features(
                    codes[:-1],
                    clear[:-1],
                    (win.days[looks] - win.days[win.anchor]).astype(np.float32),
                    (codes[-1], clear[-1]),
                    int((looks < win.anchor).sum()),
                    np.searchsorted(looks, times).tolist(),
                )
                yield cells, dates, tile, swing

    def _load(self, y: int, xs: NDArray[np.int64], times: list[int]) -> tuple[UInt16, Bool]:
        """Codes ``(times, b, n)`` and clear looks ``(times, n)`` of some cells, cell after cell.

        Where the data end inside a cell, what is missing is not clear.
        """
        lat, height, width = self.lattice, *self.codes.shape[2:]
        codes = np.zeros((len(times), self.n_bands, len(xs), CELL_PX, CELL_PX), np.uint16)
        clear = np.zeros((len(times), len(xs), CELL_PX, CELL_PX), bool)
        rows = overlap(y * CELL_PX - lat.top, CELL_PX, height)
        for k, x in enumerate(xs.tolist()):
            cols = overlap(x * CELL_PX - lat.left, CELL_PX, width)
            for i, t in enumerate(times):
                codes[i, :, k, rows.inner, cols.inner] = self.codes[t, :, rows.outer, cols.outer]
                clear[i, k, rows.inner, cols.inner] = self.windows.clear[t, rows.outer, cols.outer]
        return codes.reshape(len(times), self.n_bands, -1), clear.reshape(len(times), -1)

    def _read_cells(self) -> None:
        """Gram matrices of the needed cells, and the features of those to predict."""
        lat, win = self.lattice, self.windows
        n_cells = lat.shape[0] * lat.shape[1] + 1
        learnt = np.append(lat.needed.ravel(), False) & (win.fitted_px > 0)
        self.gram_at = np.where(learnt, np.cumsum(learnt) - 1, -1)
        n_rows = (len(win.candidates) + 1) * self.n_bands + 1 + self.n_bands
        self.grams = np.empty((int(learnt.sum()), n_rows, n_rows), np.float32)
        # squares of the swing summed per band, then the number of pixels: in the gaps, and where fitted
        self.swing_gap = np.zeros((n_cells, self.n_bands + 1))
        self.swing_fit = np.zeros((n_cells, self.n_bands + 1))
        predicted = lat.predicted.ravel()
        self.held: dict[int, Held] = {}
        for cells, dates, tile, swing in self._tiles():
            kept = _places(dates, len(win.candidates), self.n_bands)
            squares = swing.values**2
            for sums, where in (
                (self.swing_gap, swing.both & ~tile.fitted),
                (self.swing_fit, swing.both & tile.fitted),
            ):
                sums[cells, :-1] = (squares * where).reshape(self.n_bands, len(cells), -1).sum(axis=2).T
                sums[cells, -1] = np.count_nonzero(where.reshape(len(cells), -1), axis=1)
            for k, cell in enumerate(cells.tolist()):
                if learnt[cell]:
                    self.grams[self.gram_at[cell]][kept[:, None], kept] = cell_gram(tile, k)
                if predicted[cell]:
                    self.held[cell] = Held(tile, dates, slice(k * CELL_PX**2, (k + 1) * CELL_PX**2))

    def _fit(self, node: tuple[int, int]) -> NodeFit:
        win = self.windows
        window, folds = win.cells(node)
        near_gap, fit = self.swing_gap[window[NEAR]].sum(axis=0), self.swing_fit[window].sum(axis=0)
        prior = _linear_variance((self.swing_gap[window] + self.swing_fit[window]).T @ TAPER)
        dates = win.chosen[node]
        if dates is None:
            return no_fit(prior)
        harder = np.ones(self.n_bands)
        if near_gap[-1] > 0 and fit[-1] > 0:
            harder = np.maximum(_linear_variance(near_gap) / _linear_variance(fit), 1.0)
        at = self.gram_at[window]
        some = at >= 0
        kept = _places(dates, len(win.candidates), self.n_bands)
        return fit_node(
            self.grams[at[some][:, None, None], kept[:, None], kept],
            TAPER[some],
            folds[some],
            dates,
            win.closed_more(window)[dates],
            prior,
            harder,
            n_bands=self.n_bands,
            ridge=self.options.ridge,
            evidence_px=self.options.evidence_px,
        )

    def _corners(self, cell: int) -> tuple[list[NodeFit], Float32]:
        """The four nodes around a cell, and their shares in its pixels (4, P)."""
        y, x = (at + first for at, first in zip(divmod(cell, self.lattice.shape[1]), self.lattice.first, strict=True))
        j, i = y // STRIDE_CELLS, x // STRIDE_CELLS
        fits = [self.fits[n] for n in ((j, i), (j, i + 1), (j + 1, i), (j + 1, i + 1))]
        return fits, BLEND[y % STRIDE_CELLS, x % STRIDE_CELLS]

    def _add(self, held: Held, corners: list[NodeFit], share: Float32) -> Float32:
        """(b, P) to be added to linear, in codes."""
        # the dates of these four alone: the order of a product's sums must not follow the rest of the tile
        dates = sorted({d for c in corners for d in c.dates})
        n_rows = (len(dates) + 1) * self.n_bands
        table = np.empty((n_rows + 1, CELL_PX**2), np.float32)
        rows = held.tile.rows[:, held.pixels]
        if dates != held.dates:
            rows = rows[_places([held.dates.index(d) for d in dates], len(held.dates), self.n_bands)[:n_rows]]
        np.subtract(rows, CENTRE_CODE, out=table[:-1])
        table[-1] = 1.0
        spread = np.zeros((4, self.n_bands, n_rows + 1), np.float32)
        for k, corner in enumerate(corners):
            own = [dates.index(d) for d in corner.dates]
            spread[k][:, _places(own, len(dates), self.n_bands)[: -self.n_bands]] = corner.coefficients
        spoken = spread.reshape(-1, n_rows + 1) @ table
        return _blend(spoken.reshape(4, self.n_bands, -1), share)

    def _doubt(self, held: Held, corners: list[NodeFit], share: Float32) -> tuple[Float32, Float32]:
        """Evidence (P,) and variance (b, P) code^2."""
        known = np.array([[c.evidence, *c.variance] for c in corners], np.float32)[:, :, None]
        blended = _blend(known, share)
        dates = sorted({d for c in corners for d in c.dates})
        closed = np.zeros((4, self.n_bands, len(dates)), np.float32)
        for k, corner in enumerate(corners):
            closed[k][:, [dates.index(d) for d in corner.dates]] = corner.closed_variance
        imputed = ~held.tile.clear[[held.dates.index(d) for d in dates], held.pixels]
        added = (closed.reshape(4 * self.n_bands, -1) @ imputed.astype(np.float32)).reshape(4, -1, CELL_PX**2)
        return blended[0], blended[1:] + _blend(added, share)

    def _residual(self, added: Float32) -> Float32:
        """(2 b, y, x) what the fit leaves over on clear pixels, smoothed, on a grid of GRID_PX.

        Near a pixel the residual is a line in what the fit adds to linear there (``added``), so that a
        parcel takes more from its like than from its neighbours: constants, then slopes. The line's moments
        are Gaussian means over clear pixels; where it has no hold it flattens to their mean, and fades where
        none is near.

        Source: He, Sun & Tang 2013 (guided filter), with missing pixels.
        """
        lat, b, per = self.lattice, self.n_bands, CELL_PX // GRID_PX
        grid = np.zeros((4 * b + 1, lat.shape[0] + 2, per, lat.shape[1] + 2, per), np.float32)
        moments = np.empty((4 * b + 1, CELL_PX**2), np.float32)
        left, guide, product, square = (moments[k * b : (k + 1) * b] for k in range(4))
        for k, (cell, held) in enumerate(self.held.items()):
            if not self.windows.fitted_px[cell]:
                continue
            seen = held.tile.fitted[held.pixels]
            moments[-1] = seen
            np.multiply(added[k], moments[-1], out=guide)
            np.subtract(held.tile.target[:, held.pixels], guide, out=left)
            np.multiply(left, guide, out=product)
            np.multiply(guide, guide, out=square)
            y, x = divmod(cell, lat.shape[1])
            grid[:, y + 1, :, x + 1] = _pooled(moments)
        flat = grid.reshape(4 * b + 1, (lat.shape[0] + 2) * per, -1)
        smooth = _gaussian(flat, self.options.residual_sigma_px)
        count = smooth[-1] / np.float32(GRID_PX * GRID_PX)
        mean = smooth[:-1].reshape(4, b, *count.shape) / np.maximum(smooth[-1], np.float32(1e-3))
        left_mean, guide_mean, product, square = mean
        slope = (product - left_mean * guide_mean) / (
            np.maximum(square - guide_mean**2, 0) + GUIDE_SHRINK * square + GUIDE_NOISE_CODES**2
        )
        fade = count / (count + np.float32(RESIDUAL_FLOOR))
        return np.concatenate([(left_mean - slope * guide_mean) * fade, slope * fade])

    def write(
        self, out: UInt16, sigma: Float32, evidence: Float32, gap: Bool, growth: Float32, fit: Float32 | None = None
    ) -> None:
        """Fill the gaps of ``out``, ``sigma`` and ``evidence`` in place; and ``fit`` wherever it was predicted."""
        lat = self.lattice
        around = {cell: self._corners(cell) for cell in self.held}
        added = np.zeros((len(self.held), self.n_bands, CELL_PX**2), np.float32)
        for k, (cell, held) in enumerate(self.held.items()):
            if any(corner.evidence > 0 for corner in around[cell][0]):
                added[k] = self._add(held, *around[cell])
        line = self._residual(added) if self.options.residual_sigma_px > 0 else None
        for k, (cell, held) in enumerate(self.held.items()):
            y, x = divmod(cell, lat.shape[1])
            rows = overlap(y * CELL_PX - lat.top, CELL_PX, gap.shape[0])
            cols = overlap(x * CELL_PX - lat.left, CELL_PX, gap.shape[1])
            looked = held.tile.looked[held.pixels].reshape(CELL_PX, CELL_PX)
            if fit is not None:
                spoken = (held.tile.rows[-self.n_bands :, held.pixels] + added[k]).reshape(-1, CELL_PX, CELL_PX)
                np.copyto(
                    fit[:, rows.outer, cols.outer],
                    spoken[:, rows.inner, cols.inner],
                    where=looked[rows.inner, cols.inner],
                )
            here = gap[rows.outer, cols.outer] & looked[rows.inner, cols.inner]
            if not here.any():
                continue
            value = added[k]
            if line is not None:
                value = value + _upsampled(line, y, x, value)
            codes = self._clipped(held, value)
            sure, variance = self._doubt(held, *around[cell])
            spread = np.sqrt(variance).reshape(-1, CELL_PX, CELL_PX)[:, rows.inner, cols.inner]
            outer = (slice(None), rows.outer, cols.outer)
            np.copyto(out[outer], codes[:, rows.inner, cols.inner], where=here)
            np.copyto(sigma[outer], spread * growth[rows.outer, cols.outer], where=here)
            least = evidence[outer[1:]]
            np.minimum(least, sure.reshape(CELL_PX, CELL_PX)[rows.inner, cols.inner], out=least, where=here)

    def _clipped(self, held: Held, added: Float32) -> UInt16:
        """(b, CELL_PX, CELL_PX) codes of linear plus ``added``, held near the looks of each pixel."""
        low, high = (at[:, held.pixels].astype(np.float32) for at in (held.tile.low, held.tile.high))
        margin = (high - low) * np.float32(self.options.margin_share) + np.float32(self.options.margin_codes)
        value = held.tile.rows[-self.n_bands :, held.pixels] + added
        np.maximum(value, low - margin, out=value)
        np.minimum(value, high + margin, out=value)
        codes: UInt16 = np.clip(np.rint(value), 1, 65534).astype(np.uint16)
        return codes.reshape(-1, CELL_PX, CELL_PX)


def _places(dates: list[int], n_dates: int, n_bands: int) -> NDArray[np.int64]:
    """Rows of a Gram matrix that belong to some of its ``n_dates``: theirs, linear, the ones, the target."""
    first = [d * n_bands for d in dates]
    own = np.add.outer(first, np.arange(n_bands)).ravel() if first else np.empty(0, np.int64)
    return np.concatenate([own, n_dates * n_bands + np.arange(2 * n_bands + 1)]).astype(np.int64)


def _upsampled(line: Float32, y: int, x: int, added: Float32) -> Float32:
    """(b, P) the residual's line in a cell, at what the fit adds there."""
    per = CELL_PX // GRID_PX
    rows, cols = (slice((at + 1) * per - 1, (at + 2) * per + 1) for at in (y, x))
    near = UPSAMPLE @ np.ascontiguousarray(line[:, rows, cols]) @ UPSAMPLE.T
    constant, slope = near.reshape(2, len(added), -1)
    result: Float32 = slope * added
    result += constant
    return result


def _blend(corners: Float32, share: Float32) -> Float32:
    """Bilinear mean of (4, b, 1 or P) with the shares (4, P), summed in a fixed order."""
    mixed: Float32 = corners[0] * share[0]
    for k in range(1, 4):
        mixed = mixed + corners[k] * share[k]
    return mixed


def _pooled(fields: Float32) -> Float32:
    """(c, P) summed over squares of GRID_PX pixels, (c, steps, steps)."""
    per = CELL_PX // GRID_PX
    tall = fields.reshape(-1, per, GRID_PX, CELL_PX)
    rows: Float32 = tall[:, :, 0] + tall[:, :, 1]
    for k in range(2, GRID_PX):
        rows += tall[:, :, k]
    wide = rows.reshape(-1, per, per, GRID_PX)
    sums: Float32 = wide[..., 0] + wide[..., 1]
    for k in range(2, GRID_PX):
        sums += wide[..., k]
    return sums


def _gaussian(grid: Float32, sigma_px: float) -> Float32:
    """Truncated Gaussian along the last two axes of the residual grid; the same sums at every position."""
    taps = np.exp(-0.5 * (np.arange(-GRID_REACH, GRID_REACH + 1) * GRID_PX / sigma_px) ** 2)
    smooth = grid
    for axis in (1, 2):
        smooth = ndimage.correlate1d(smooth, taps / taps.sum(), axis=axis, mode="constant")
    return smooth


def _linear_variance(swing: Float64) -> Float64:
    """(b,) code^2 of linear interpolation's error, from sums of squared swings (b + 1,) with the count last.

    Half of the mean square between the looks before and after, and 50 codes of noise; where no pixel has
    both looks, 300 codes.
    """
    if swing[-1] <= 0:
        return np.full(len(swing) - 1, 300.0**2)
    variance: Float64 = 0.5 * swing[:-1] / swing[-1] + 50.0**2
    return variance
