"""In: where an array with gaps lies. Out: its lattice: cells and nodes with work to do, and their dates.

The lowest part of :mod:`pipeline.regression`: its options, the lattice fixed to the global pixel index, what
the clear looks alone decide (:class:`Windows`) and the constant weights that belong to it. A cell is a square
of pixels; nodes stand on corners of cells; a node is fitted on the window of cells around it, and a pixel
blends the four nodes around it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import ConfigError

CELL_PX = 32  # side of a cell: pixels share one Gram matrix
STRIDE_CELLS = 2  # nodes stand on every second corner of the cells
REACH_CELLS = 4  # a node is fitted on the cells within this many cells of it, in each of the four directions
GRID_PX = 4  # residuals are smoothed on a grid of this step: the Gaussian is far wider
GRID_REACH = 6  # steps to either side
HALO_PX = CELL_PX * (1 + STRIDE_CELLS + REACH_CELLS)  # residual's reach, way to a node, half its window
MOST_CANDIDATES = 32  # dates that get features at all

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int32 = NDArray[np.int32]
UInt32 = NDArray[np.uint32]


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
    residual_sigma_px: float = 7.0
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
class Lattice:
    """Where the array lies on the lattice of cells, and which cells and nodes have work to do."""

    top: int  # rows of padding before the array
    left: int
    first: tuple[int, int]  # global index of the first cell (y, x)
    shape: tuple[int, int]  # cells (y, x)
    predicted: Bool  # cells that hold gaps, and their neighbours (whose residuals are carried into the gaps)
    nodes: list[tuple[int, int]]  # global node indices
    needed: Bool  # cells in the window of some node


def plan(gap: Bool, row0: int, col0: int) -> Lattice:
    """The lattice under ``gap`` (H, W), True = to be filled, whose pixel [0, 0] is global (row0, col0)."""
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
        needed[
            max(y - REACH_CELLS, 0) : max(y + REACH_CELLS, 0),
            max(x - REACH_CELLS, 0) : max(x + REACH_CELLS, 0),
        ] = True
    return Lattice(top, left, first, shape, predicted, sorted(nodes), needed)


class Windows:
    """What the clear looks alone tell of cells and nodes: the same for all groups of bands."""

    def __init__(self, clear: Bool, days: Int32, anchor: int, lattice: Lattice, options: RegressionOptions) -> None:
        self.clear, self.days, self.anchor, self.lattice = clear, days, anchor, lattice
        self.candidates = candidate_dates(days, anchor, MOST_CANDIDATES)
        bits = np.stack([_cell_bits(layer, lattice) for layer in clear])
        self.clear_px = _count(bits)  # (T, cells + 1), the last cell being the one that shows nothing
        looked = np.zeros_like(bits[0])
        for t in range(len(days)):
            if t != anchor:
                looked |= bits[t]
        fitted = bits[anchor] & looked
        gap = looked & ~fitted
        self.looked_px, self.fitted_px, self.gap_px = (_count(at[None])[0] for at in (looked, fitted, gap))
        unseen = ~bits[self.candidates]
        # pixels where a date's feature is closed in time: in the gaps, and where fitted
        self.closed_gap, self.closed_fit = _count(unseen & gap), _count(unseen & fitted)
        nearest = np.argsort(np.abs(days[self.candidates] - days[anchor]), kind="stable")
        self.chosen = {node: self._choose(node, nearest.tolist(), options) for node in lattice.nodes}
        self.wanted = self._wanted()

    def cells(self, node: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The cells of a node's window, row by row, and their global parity (the held-out patch)."""
        lat = self.lattice
        ys, xs = (
            at * STRIDE_CELLS - first + np.arange(-REACH_CELLS, REACH_CELLS)
            for at, first in zip(node, lat.first, strict=True)
        )
        flat = ys[:, None] * lat.shape[1] + xs[None]
        within = ((ys >= 0) & (ys < lat.shape[0]))[:, None] & ((xs >= 0) & (xs < lat.shape[1]))
        folds = ((ys + lat.first[0]) % 2 * 2)[:, None] + (xs + lat.first[1]) % 2
        return np.where(within, flat, lat.shape[0] * lat.shape[1]).ravel(), folds.ravel()

    def closed_more(self, window: NDArray[np.int64]) -> Float64:
        """(candidates,) share of gap pixels where a date is closed in time, less that of fitted pixels."""
        near = window[NEAR]
        in_gap = self.closed_gap[:, near].sum(axis=1) / max(int(self.gap_px[near].sum()), 1)
        in_fit = self.closed_fit[:, window].sum(axis=1) / max(int(self.fitted_px[window].sum()), 1)
        return np.maximum(in_gap - in_fit, 0.0)

    def _choose(self, node: tuple[int, int], nearest_first: list[int], options: RegressionOptions) -> list[int] | None:
        """The dates a node uses, as places among the candidates; None where nothing can be fitted."""
        window, _ = self.cells(node)
        if not self.fitted_px[window].any():
            return None
        looked = max(int(self.looked_px[window].sum()), 1)
        share = self.clear_px[:, window].sum(axis=1)[self.candidates] / looked
        enough = [d for d in nearest_first if share[d] > options.least_clear_share]
        return sorted(enough[: options.dates])

    def _wanted(self) -> Bool:
        """(cells y, x, candidates) dates some node learns from in a cell, or adds to it."""
        lat = self.lattice
        learnt = np.zeros((*lat.shape, len(self.candidates)), bool)
        applied = np.zeros_like(learnt)
        for node, dates in self.chosen.items():
            if dates:
                y, x = (at * STRIDE_CELLS - first for at, first in zip(node, lat.first, strict=True))
                for field, reach in ((learnt, REACH_CELLS), (applied, STRIDE_CELLS)):
                    rows = slice(max(y - reach, 0), max(y + reach, 0))
                    field[rows, max(x - reach, 0) : max(x + reach, 0), dates] = True
        learnt &= (self.fitted_px[:-1] > 0).reshape(lat.shape)[..., None]
        return learnt | (applied & lat.predicted[..., None])


@dataclass(frozen=True)
class Overlap:
    """Where a piece meets an array, along one axis."""

    outer: slice  # in the array
    inner: slice  # in the piece


def overlap(start: int, length: int, size: int) -> Overlap:
    """Where a piece of ``length`` at ``start`` meets an axis of ``size``."""
    low, high = max(start, 0), min(start + length, size)
    return Overlap(slice(low, high), slice(low - start, high - start))


def candidate_dates(days: NDArray[np.int32], anchor: int, most: int) -> list[int]:
    """The ``most`` dates nearest to the anchor, in time order; by days alone, hence the same everywhere."""
    order = sorted(
        (t for t in range(len(days)) if t != anchor),
        key=lambda t: (abs(int(days[t] - days[anchor])), t),
    )
    return sorted(order[:most])


def _cell_bits(field: Bool, lat: Lattice) -> UInt32:
    """(cells y, CELL_PX, cells x) a bit for each pixel of a row of a cell."""
    padded = np.zeros((lat.shape[0] * CELL_PX, lat.shape[1] * CELL_PX), bool)
    padded[lat.top : lat.top + field.shape[0], lat.left : lat.left + field.shape[1]] = field
    return np.packbits(padded, axis=1).view(np.uint32).reshape(lat.shape[0], CELL_PX, lat.shape[1])


def _count(bits: UInt32) -> Int32:
    """(k, cells + 1) number of set bits per cell; the last cell shows nothing."""
    counts = np.bitwise_count(bits).sum(axis=2, dtype=np.int32).reshape(len(bits), -1)
    return np.pad(counts, ((0, 0), (0, 1)))


def _taper() -> Float64:
    """(cells of a window,) raised cosine by the distance of the cell's centre from the node."""
    offset = np.arange(-REACH_CELLS, REACH_CELLS) + 0.5
    profile = 0.5 + 0.5 * np.cos(np.pi * offset / (REACH_CELLS + 0.5))
    return np.outer(profile, profile).ravel()


def _blend_shares() -> Float32:
    """(STRIDE, STRIDE, 4, P) bilinear shares of the four nodes, by the cell's place between them."""
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


TAPER = _taper()
BLEND = _blend_shares()
UPSAMPLE = _upsampling()
NEAR = np.sort(TAPER)[-4 * STRIDE_CELLS**2] <= TAPER
