"""In: looks around an acquisition and its gaps. Out: the gaps filled, for a group of bands.

The middle of :mod:`pipeline.regression`: which cells and nodes of the lattice have work to do
(:func:`plan`), then the cells are read once, the nodes fitted, their predictions blended bilinearly and the
residual of the clear pixels carried into the gaps (:class:`Group`). The numbers behind a node are in
:mod:`pipeline.regression_fit`.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.regression_fit import (
    CENTRE_CODE,
    UNIT_CODES,
    NodeFit,
    Tile,
    candidate_dates,
    cell_grams,
    fit_node,
    tile_features,
)
from pipeline.regression_lattice import (
    BLEND,
    CELL_PX,
    GRID_PX,
    GRID_REACH,
    MOST_CANDIDATES,
    NEAR,
    REACH_CELLS,
    STRIDE_CELLS,
    TAPER,
    UPSAMPLE,
    Lattice,
    RegressionOptions,
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


class Group:
    """A group of bands being filled: cells first, then nodes, then the predictions."""

    def __init__(
        self,
        codes: UInt16,
        clear: Bool,
        days: Int32,
        anchor: int,
        lattice: Lattice,
        options: RegressionOptions,
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
                rows = overlap(y * CELL_PX - lat.top, CELL_PX, height)
                cols = overlap(x * CELL_PX - lat.left, (end - x) * CELL_PX, width)
                if rows.inner == slice(0, CELL_PX) and cols.inner == slice(0, (end - x) * CELL_PX):
                    codes = self.codes[:, :, rows.outer, cols.outer]
                    clear = self.clear[:, rows.outer, cols.outer]
                else:  # the data end inside a cell: what is missing is not clear
                    codes = np.zeros((*self.codes.shape[:2], CELL_PX, (end - x) * CELL_PX), np.uint16)
                    clear = np.zeros((len(self.days), CELL_PX, (end - x) * CELL_PX), bool)
                    codes[:, :, rows.inner, cols.inner] = self.codes[:, :, rows.outer, cols.outer]
                    clear[:, rows.inner, cols.inner] = self.clear[:, rows.outer, cols.outer]
                yield (
                    y,
                    x,
                    end,
                    tile_features(codes, clear, self.days, self.anchor, self.dates),
                )

    def _read_cells(self) -> None:
        """Gram matrices of the needed cells, and the features of those to predict."""
        lat, n_rows = self.lattice, self.n_features + 1 + self.n_bands
        # entry 0 is the cell that shows nothing: windows are full everywhere, so all sums have one shape
        self.index = np.where(lat.needed, np.cumsum(lat.needed).reshape(lat.shape), 0)
        n_cells = int(lat.needed.sum()) + 1
        self.grams = np.zeros((n_cells, n_rows, n_rows), np.float32)
        self.clear_px = np.zeros((n_cells, len(self.dates)), np.int32)
        # pixels where a date's feature is closed in time, and all of them (last): in the gaps, and where
        # fitted
        self.closed_gap = np.zeros((n_cells, len(self.dates) + 1), np.int32)
        self.closed_fit = np.zeros((n_cells, len(self.dates) + 1), np.int32)
        self.looked_px = np.zeros(n_cells, np.int32)
        # squares of the swing summed per band, then the number of pixels: in the gaps, and where fitted
        self.swing_gap = np.zeros((n_cells, self.n_bands + 1))
        self.swing_fit = np.zeros((n_cells, self.n_bands + 1))
        self.at = {(int(y), int(x)): i for i, (y, x) in enumerate(np.argwhere(lat.predicted))}
        pixels = CELL_PX * CELL_PX
        self.rows = np.empty((len(self.at), n_rows, pixels), np.float32)
        self.fitted = np.empty((len(self.at), pixels), np.float32)
        self.looked = np.empty((len(self.at), pixels), bool)
        self.imputed = np.empty((len(self.at), len(self.dates), pixels), bool)
        for y, x, end, tile in self._tiles():
            cells = self.index[y, x:end]
            mine = cells > 0
            cells = cells[mine]
            self.grams[cells] = cell_grams(tile)[mine]
            self.clear_px[cells] = tile.clear.sum(axis=2, dtype=np.int32)[mine]
            fitted = tile.fitted.astype(bool)
            for counts, where in ((self.closed_gap, tile.looked & ~fitted), (self.closed_fit, fitted)):
                counts[cells, :-1] = (~tile.clear & where[:, None]).sum(axis=2, dtype=np.int32)[mine]
                counts[cells, -1] = where.sum(axis=1, dtype=np.int32)[mine]
            self.looked_px[cells] = tile.looked.sum(axis=1, dtype=np.int32)[mine]
            both = np.isfinite(tile.swing[:, 0])
            squares = np.where(both[:, None], tile.swing, 0.0).astype(np.float64) ** 2
            for sums, where in ((self.swing_gap, both & ~fitted), (self.swing_fit, both & fitted)):
                sums[cells, :-1] = (squares * where[:, None]).sum(axis=2)[mine]
                sums[cells, -1] = where.sum(axis=1)[mine]
            for k in range(end - x):
                at = self.at.get((y, x + k))
                if at is not None:
                    self.rows[at], self.fitted[at], self.looked[at] = (
                        tile.rows[k],
                        tile.fitted[k],
                        tile.looked[k],
                    )
                    np.logical_not(tile.clear[k], out=self.imputed[at])

    def _fit(self, node: tuple[int, int]) -> NodeFit:
        lat = self.lattice
        ys = node[0] * STRIDE_CELLS - lat.first[0] + np.arange(-REACH_CELLS, REACH_CELLS)
        xs = node[1] * STRIDE_CELLS - lat.first[1] + np.arange(-REACH_CELLS, REACH_CELLS)
        cells = np.zeros((len(ys), len(xs)), np.int64)
        rows, cols = (ys >= 0) & (ys < lat.shape[0]), (xs >= 0) & (xs < lat.shape[1])
        cells[np.ix_(rows, cols)] = self.index[np.ix_(ys[rows], xs[cols])]
        window = cells.ravel()
        looked = max(int(self.looked_px[window].sum()), 1)
        near_gap, fit = self.swing_gap[window[NEAR]].sum(axis=0), self.swing_fit[window].sum(axis=0)
        prior = _linear_variance((self.swing_gap[window] + self.swing_fit[window]).T @ TAPER)
        harder = np.ones(self.n_bands)
        if near_gap[-1] > 0 and fit[-1] > 0:
            harder = np.maximum(_linear_variance(near_gap) / _linear_variance(fit), 1.0)
        away = np.abs(self.days[self.dates] - self.days[self.anchor])
        return fit_node(
            self.grams[window],
            TAPER,
            ((ys + lat.first[0]) % 2 * 2)[:, None].repeat(len(xs), axis=1).ravel()
            + ((xs + lat.first[1]) % 2)[None].repeat(len(ys), axis=0).ravel(),
            self.clear_px[window].sum(axis=0) / looked,
            np.maximum(_share(self.closed_gap[window[NEAR]]) - _share(self.closed_fit[window]), 0.0),
            prior,
            harder,
            np.argsort(away, kind="stable").tolist(),
            n_bands=self.n_bands,
            most_dates=self.options.dates,
            least_share=self.options.least_clear_share,
            ridge=self.options.ridge,
            evidence_px=self.options.evidence_px,
        )

    def _corners(self, y: int, x: int) -> list[NodeFit]:
        j, i = (
            (y + self.lattice.first[0]) // STRIDE_CELLS,
            (x + self.lattice.first[1]) // STRIDE_CELLS,
        )
        return [self.fits[n] for n in ((j, i), (j, i + 1), (j + 1, i), (j + 1, i + 1))]

    def _predict(self) -> tuple[Float32, Float32, Float32]:
        """To be added to linear (n, b, P) in codes, the evidence (n, P) and the variance (n, b, P)."""
        n, b, pixels = len(self.at), self.n_bands, CELL_PX * CELL_PX
        added = np.empty((n, b, pixels), np.float32)
        evidence = np.empty((n, pixels), np.float32)
        variance = np.empty((n, b, pixels), np.float32)
        for (y, x), k in self.at.items():
            corners = self._corners(y, x)
            share = BLEND[
                (y + self.lattice.first[0]) % STRIDE_CELLS,
                (x + self.lattice.first[1]) % STRIDE_CELLS,
            ]
            spoken = np.concatenate([c.coefficients for c in corners]) @ self.rows[k, : self.n_features + 1]
            added[k] = _blend(spoken.reshape(4, b, pixels), share)
            known = np.array([[c.evidence, *c.variance] for c in corners], np.float32)[:, :, None]
            blended = _blend(known, share)
            closed = np.concatenate([c.closed_variance for c in corners]) @ self.imputed[k].astype(np.float32)
            evidence[k], variance[k] = (
                blended[0],
                blended[1:] + _blend(closed.reshape(4, b, pixels), share),
            )
        return added, evidence, variance

    def _residual(self, added: Float32) -> Float32:
        """(n, b, P) what the fit leaves over on clear pixels, carried into the gaps.

        Near a pixel the residual is a line in what the fit adds to linear there (``added``), so that a
        parcel takes more from its like than from its neighbours. The line's moments are Gaussian means over
        clear pixels; where it has no hold it flattens to their mean, and fades where none is near.

        Source: He, Sun & Tang 2013 (guided filter), with missing pixels.
        """
        lat, b, per = self.lattice, self.n_bands, CELL_PX // GRID_PX
        grid = np.zeros((4 * b + 1, lat.shape[0] + 2, per, lat.shape[1] + 2, per), np.float32)
        cells = np.array(list(self.at), np.int64).reshape(-1, 2) + 1
        for start in range(0, len(cells), RUN_CELLS):  # a few cells at a time stay in the cache
            run = slice(start, start + RUN_CELLS)
            seen, guide = self.fitted[run, None], added[run] * self.fitted[run, None]
            left = self.rows[run, self.n_features + 1 :] * UNIT_CODES * seen - guide
            moments = np.concatenate([left, guide, left * guide, guide * guide, seen], axis=1)
            grid[:, cells[run, 0], :, cells[run, 1]] = _pooled(moments)
        flat = grid.reshape(4 * b + 1, (lat.shape[0] + 2) * per, -1)
        smooth = _gaussian(
            _gaussian(flat, 1, self.options.residual_sigma_px), 2, self.options.residual_sigma_px
        )
        count = smooth[-1] / np.float32(GRID_PX * GRID_PX)
        mean = smooth[:-1].reshape(4, b, *count.shape) / np.maximum(smooth[-1], np.float32(1e-3))
        left_mean, guide_mean, product, square = mean
        slope = (product - left_mean * guide_mean) / (
            np.maximum(square - guide_mean**2, 0) + GUIDE_SHRINK * square + GUIDE_NOISE_CODES**2
        )
        fade = count / (count + np.float32(RESIDUAL_FLOOR))
        line = np.concatenate([(left_mean - slope * guide_mean) * fade, slope * fade])
        result = np.empty_like(added)
        for (y, x), k in self.at.items():
            rows, cols = (slice((at + 1) * per - 1, (at + 2) * per + 1) for at in (y, x))
            near = UPSAMPLE @ np.ascontiguousarray(line[:, rows, cols]) @ UPSAMPLE.T
            result[k] = near[:b].reshape(b, -1) + near[b:].reshape(b, -1) * added[k]
        return result

    def write(self, out: UInt16, sigma: Float32, model: Bool, gap: Bool, growth: Float32) -> None:
        """Fill the gaps of ``out``, ``sigma`` and ``model`` in place."""
        added, evidence, variance = self._predict()
        if self.options.residual_sigma_px > 0:
            added += self._residual(added)
        lat, n_dates = self.lattice, len(self.dates)
        linear = self.rows[:, self.n_features - self.n_bands : self.n_features]
        for (y, x), k in self.at.items():
            rows = overlap(y * CELL_PX - lat.top, CELL_PX, gap.shape[0])
            cols = overlap(x * CELL_PX - lat.left, CELL_PX, gap.shape[1])
            here = (
                gap[rows.outer, cols.outer] & self.looked[k].reshape(CELL_PX, CELL_PX)[rows.inner, cols.inner]
            )
            if not here.any():
                continue
            looks = self.rows[k, : n_dates * self.n_bands].reshape(n_dates, self.n_bands, -1)
            low, high = looks.min(axis=0), looks.max(axis=0)
            margin = (high - low) * np.float32(self.options.margin_share) + np.float32(
                self.options.margin_codes / 1e3
            )
            value = (
                np.clip(linear[k] + added[k] / UNIT_CODES, low - margin, high + margin) * UNIT_CODES
                + CENTRE_CODE
            )
            codes = np.clip(np.rint(value), 1, 65534).astype(np.uint16)
            inner = (slice(None), rows.inner, cols.inner)
            outer = (slice(None), rows.outer, cols.outer)
            out[outer] = np.where(here, codes.reshape(-1, CELL_PX, CELL_PX)[inner], out[outer])
            spread = (
                np.sqrt(variance[k]).reshape(-1, CELL_PX, CELL_PX)[inner] * growth[rows.outer, cols.outer]
            )
            sigma[outer] = np.where(here, spread, sigma[outer])
            spoke = (evidence[k] > 0.5).reshape(CELL_PX, CELL_PX)[rows.inner, cols.inner]
            model[rows.outer, cols.outer] |= here & spoke


def _blend(corners: Float32, share: Float32) -> Float32:
    """Bilinear mean of (4, b, 1 or P) with the shares (4, P), summed in a fixed order."""
    mixed: Float32 = corners[0] * share[0]
    for k in range(1, 4):
        mixed = mixed + corners[k] * share[k]
    return mixed


def _pooled(fields: Float32) -> Float32:
    """(n, c, P) summed over squares of GRID_PX pixels, (n, c, steps, steps)."""
    per = CELL_PX // GRID_PX
    tall = fields.reshape(len(fields), -1, per, GRID_PX, CELL_PX)
    rows: Float32 = tall[:, :, :, 0]
    for k in range(1, GRID_PX):
        rows = rows + tall[:, :, :, k]
    wide = rows.reshape(len(fields), -1, per, per, GRID_PX)
    sums: Float32 = wide[..., 0]
    for k in range(1, GRID_PX):
        sums = sums + wide[..., k]
    return sums


def _gaussian(grid: Float32, axis: int, sigma_px: float) -> Float32:
    """Truncated Gaussian along one axis of the residual grid; plain sums, the same at every position."""
    taps = np.exp(-0.5 * (np.arange(-GRID_REACH, GRID_REACH + 1) * GRID_PX / sigma_px) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    pad = [(0, 0)] * grid.ndim
    pad[axis] = (GRID_REACH, GRID_REACH)
    padded = np.pad(grid, pad)
    smooth = np.zeros_like(grid)
    for k, tap in enumerate(taps):
        part = slice(k, k + grid.shape[axis])
        smooth += tap * (padded[:, part] if axis == 1 else padded[..., part])
    return smooth


def _share(counts: Int32) -> Float64:
    """(dates,) share of the pixels, summed over cells, from counts whose last column is all of them."""
    total = counts.sum(axis=0)
    return total[:-1] / max(int(total[-1]), 1)


def _linear_variance(swing: Float64) -> Float64:
    """(b,) code^2 of linear interpolation's error, from sums of squared swings (b + 1,) with the count last.

    Half of the mean square between the looks before and after, and 50 codes of noise; where no pixel has
    both looks, 300 codes.
    """
    if swing[-1] <= 0:
        return np.full(len(swing) - 1, 300.0**2)
    variance: Float64 = 0.5 * swing[:-1] / swing[-1] + 50.0**2
    return variance
