"""Which acquisition a mosaic shows where: in come clear shares and coarse footprints, out comes an ``AnchorMap``.

Methods that show a date complete, swath by swath, the acquisition nearest to the target that shows enough ground: the
anchor. Where an anchor's footprint ends, a strip goes over to the next anchor, or to interpolation in time. The map is
decided once for the whole area and frozen, so every task and every sub-area sees the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray

INTERPOLATE = -1
"""Layer number that stands for "no anchor here": interpolation in time at the target."""
_WHOLE = 1 - 1 / 1024  # a weight above this is 1: bilinear sums of ones miss it by a rounding


@dataclass(frozen=True)
class Candidate:
    """One acquisition as the scout saw it.

    Attributes:
        layer: its index in time.
        days_off: days from the target, signed.
        clear_share: clear share of its own valid ground in the area, 0 to 1.
        swath: what its footprint repeats with (relative orbit), 0 where unknown.
        fails: the temporal check rejects it as a whole.
        footprint: (h, w) bool on the coarse lattice, True where it has data.
    """

    layer: int
    days_off: int
    clear_share: float
    swath: int
    fails: bool
    footprint: NDArray[np.bool_]


@dataclass(frozen=True)
class AnchorMap:
    """Weights of the anchors on a coarse lattice; they sum to one in every cell.

    Attributes:
        cell_px: side of a coarse cell in pixels of the grid.
        row0: global index of the top cell row: it begins at pixel row ``row0 * cell_px``.
        col0: likewise for columns.
        layers: index in time of each anchor, ``INTERPOLATE`` for none.
        weights: (n, h, w) float32.
    """

    cell_px: int
    row0: int
    col0: int
    layers: tuple[int, ...]
    weights: NDArray[np.float32]

    def at(self, row0: int, col0: int, height: int, width: int) -> list[tuple[int, NDArray[np.float32]]]:
        """The anchors that speak in a window of pixels, with their (height, width) float32 weights.

        Weights are bilinear between cell centres, a function of the global pixel index only.
        """
        rows, row_parts = self._position(row0, height, self.row0, self.weights.shape[1])
        cols, col_parts = self._position(col0, width, self.col0, self.weights.shape[2])
        out = []
        for layer, field in zip(self.layers, self.weights, strict=True):
            near = field[np.ix_(rows, cols)]
            below = field[np.ix_(rows + 1, cols)]
            if near.min() == near.max() == below.min() == below.max() == field[np.ix_(rows, cols + 1)].max():
                weight = np.full((height, width), near.flat[0], np.float32)
            else:
                left = near * (1 - row_parts)[:, None] + below * row_parts[:, None]
                right = field[np.ix_(rows, cols + 1)] * (1 - row_parts)[:, None]
                right += field[np.ix_(rows + 1, cols + 1)] * row_parts[:, None]
                weight = left * (1 - col_parts) + right * col_parts
            weight[weight > _WHOLE] = 1
            weight[weight < 1 - _WHOLE] = 0
            if weight.any():
                out.append((layer, weight))
        return out

    def _position(self, first: int, size: int, origin: int, cells: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        place = (np.arange(first, first + size) + 0.5) / self.cell_px - 0.5 - origin
        place = np.clip(place, 0, cells - 1)
        lower = np.minimum(np.floor(place).astype(np.intp), max(cells - 2, 0))
        return lower, (place - lower).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; weights in 1/1000."""
        thousandths = np.rint(self.weights * 1000).astype(int)
        return {
            "cell_px": self.cell_px,
            "row0": self.row0,
            "col0": self.col0,
            "layers": list(self.layers),
            "weights_permille": thousandths.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        weights = (np.asarray(data["weights_permille"], np.float32) / np.float32(1000)).astype(np.float32)
        return cls(data["cell_px"], data["row0"], data["col0"], tuple(data["layers"]), weights)


def choose(candidates: Sequence[Candidate], *, min_clear: float, max_days: int) -> list[Candidate]:
    """One anchor per swath: nearest to the target among those that show enough ground; nearest first.

    Ties go to the clearer, then the earlier.
    """
    best: dict[int, Candidate] = {}

    def rank(c: Candidate) -> tuple[int, float, int]:
        return abs(c.days_off), -round(c.clear_share, 3), c.layer

    for c in candidates:
        if c.fails or c.clear_share < min_clear or abs(c.days_off) > max_days or not c.footprint.any():
            continue
        if c.swath not in best or rank(c) < rank(best[c.swath]):
            best[c.swath] = c
    return sorted(best.values(), key=rank)


def build_map(
    anchors: Sequence[Candidate],
    *,
    anywhere: NDArray[np.bool_],
    cell_px: int,
    row0: int,
    col0: int,
    blend_cells: float,
) -> AnchorMap:
    """Weights of the chosen anchors: each gives way to the next over ``blend_cells`` inside the edge of its footprint.

    Where beyond that edge nothing was ever seen, there is nothing to go over to, and no strip.

    Args:
        anchors: from ``choose``, the first has precedence.
        anywhere: (h, w) bool on the coarse lattice, True where any acquisition has data.
        cell_px: side of a coarse cell in pixels.
        row0: global index of the top cell row.
        col0: global index of the left cell column.
        blend_cells: width of the strip in cells.
    """
    # Two cells at least, so that every pixel lies between cell centres.
    pad = [(0, max(0, 2 - size)) for size in anywhere.shape]
    rest = np.ones([size + more for size, (_, more) in zip(anywhere.shape, pad, strict=True)], np.float32)
    layers, fields = [], []
    for anchor in anchors:
        lacking = np.pad(anywhere & ~anchor.footprint, pad, mode="edge")
        share = np.ones_like(rest)
        if lacking.any():
            # A cell next to missing data may miss data itself: its distance is 1, its weight 0.
            distance = cv2.distanceTransform((~lacking).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            share = np.clip((distance - 1.5) / max(blend_cells, 0.5), 0, 1).astype(np.float32)
        weight = (np.rint(rest * share * 1000) / 1000).astype(np.float32)
        if weight.any():
            layers.append(anchor.layer)
            fields.append(weight)
            rest = (np.rint((rest - weight) * 1000) / 1000).astype(np.float32)
    if rest.any():
        layers.append(INTERPOLATE)
        fields.append(rest)
    return AnchorMap(cell_px, row0, col0, tuple(layers), np.stack(fields))
