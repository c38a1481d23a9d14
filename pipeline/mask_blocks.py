"""Masks of one block: in come states and codes as arrays, out come cloud, shadow and clear looks on the grid.

The eager half of :mod:`pipeline.mask`: growth on the mask's own lattice, its way to the grid, and what the comparison
of dates adds. Exactly local: given :func:`pipeline.growth.halo_m` of margin, results do not depend on how blocks are
cut.
"""

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.growth import grow
from pipeline.sorting import Codes
from pipeline.states import NODATA, State
from pipeline.temporal import bright_and_dark

type Flags = NDArray[np.bool_]

# Bits in which growth results travel from the raster's lattice to the grid.
CLOUD_BIT: Final = 1
SHADOW_BIT: Final = 2
NODATA_BIT: Final = 4

# Blocks run in threads of their own; OpenCV's would only fight them.
cv2.setNumThreads(1)


@dataclass(frozen=True)
class MaskParams:
    """Growth in metres on the ground, and whether dates are compared with each other."""

    open_m: float = 40.0
    cloud_grow_m: float = 100.0
    shadow_grow_m: float = 100.0
    temporal_check: bool = True


@dataclass(frozen=True)
class MaskLayers:
    """Bool (T, H, W) each: True = cloudy, True = in shadow, and True = usable (valid and neither)."""

    cloud: Flags
    shadow: Flags
    clear: Flags


def mask_block(
    *,
    state: State,
    factor: int,
    offset: tuple[int, int],
    codes: Codes | None,
    nir: Codes | None,
    days: NDArray[np.int32],
    resolution_m: float,
    params: MaskParams,
    shape: tuple[int, int] | None = None,
) -> MaskLayers:
    """Masks of one block of the grid, eager; halo as :func:`halo_m`, within ``state`` only.

    Args:
        state: uint8 (T, h, w) on a lattice ``factor`` times coarser than the grid.
        factor: Grid pixels along one state pixel (2 for SCL under a 10 m grid).
        offset: (rows, cols) of the block's pixel [0, 0] inside the state array, in grid pixels; with a
            margin around the block it includes the margin.
        codes: uint16 (T, H, W), the darkest band, or None: no temporal check, and valid is where the
            state has data.
        nir: uint16 (T, H, W) or None.
        days: int32 (T,) since 1970-01-01, ascending.
        resolution_m: Pixel size of the grid (not of the state).
        params: Growth and checks.
        shape: (H, W) of the block where ``codes`` is None; default: to the end of the state.

    Returns:
        Bool (T, H, W) layers. What the temporal check finds too bright is in ``cloud``, too dark in
        ``shadow``; it is not grown.
    """
    cells = grown_bits(state=state, resolution_m=factor * resolution_m, params=params)
    if codes is not None:
        shape = (codes.shape[1], codes.shape[2])
    elif shape is None:
        shape = (state.shape[1] * factor - offset[0], state.shape[2] * factor - offset[1])
    bits = _to_grid(cells, factor, offset, shape)
    return _unpack(checked_bits(bits, codes, nir, None, days=days, temporal_check=params.temporal_check, rejected=None))


def grown_bits(*, state: State, resolution_m: float, params: MaskParams) -> State:
    """Cloud, shadow and no-data bits (T, h, w) uint8 after growth, on the state's own lattice (``resolution_m``)."""
    cloud, shadow = grow(
        state=state,
        resolution_m=resolution_m,
        open_m=params.open_m,
        cloud_grow_m=params.cloud_grow_m,
        shadow_grow_m=params.shadow_grow_m,
    )
    bits = np.multiply(state == NODATA, np.uint8(NODATA_BIT), dtype=np.uint8)
    np.bitwise_or(bits, cloud.view(np.uint8), out=bits)
    return np.bitwise_or(bits, np.left_shift(shadow.view(np.uint8), np.uint8(1)), out=bits)


@dataclass(frozen=True)
class Unchecked:
    """The looks of one block before their dates are compared: the masks' cells, and the pixels under them.

    Attributes:
        bits: from ``grown_bits``, reaching over the block.
        factor: Grid pixels along one cell of ``bits``.
        offset: (rows, cols) of the block's [0, 0] inside ``bits``, in grid pixels.
        valid: bool (T, H, W), True = all bands have data.
        codes: uint16 (T, H, W), the darkest band.
        nir: uint16 (T, H, W) or None.
        days: int32 (T,), ascending.
        temporal_check: Whether dates are compared with each other.
        rejected: bool (T,), acquisitions of which nothing is usable.
    """

    bits: State
    factor: int
    offset: tuple[int, int]
    valid: Flags
    codes: Codes
    nir: Codes | None
    days: NDArray[np.int32]
    temporal_check: bool
    rejected: Flags

    def on_grid(self) -> State:
        """The bits (T, H, W) of the block's own pixels."""
        return _to_grid(self.bits, self.factor, self.offset, (self.codes.shape[1], self.codes.shape[2]))


def clear_looks(looks: Unchecked) -> Flags:
    """Usable looks of one block, bool (T, H, W): what ``mask_block`` calls clear, from bits that are grown already."""
    clear = looks.on_grid() == 0
    np.logical_and(clear, looks.valid, out=clear)
    if looks.temporal_check and len(looks.codes) > 1:
        bright, dark = bright_and_dark(
            codes=looks.codes, clear=clear, days=looks.days, nir=looks.nir, rejected=looks.rejected
        )
        np.logical_xor(clear, np.logical_or(bright, dark, out=bright), out=clear)  # both lie within clear
    clear[looks.rejected] = False
    return clear


def look_bits(looks: Unchecked) -> State:
    """As ``clear_looks``, and what hides the others: uint8 (T, H, W), bit 1 cloud, 2 shadow, 4 no data, 0 = clear."""
    return checked_bits(
        looks.on_grid(),
        looks.codes,
        looks.nir,
        looks.valid,
        days=looks.days,
        temporal_check=looks.temporal_check,
        rejected=looks.rejected,
    )


def _to_grid(cells: State, factor: int, offset: tuple[int, int], shape: tuple[int, int]) -> State:
    """Nearest-neighbour upsampling of (T, h, w) and the cut to the block."""
    (top, left), (height, width) = offset, shape
    if top + height > cells.shape[1] * factor or left + width > cells.shape[2] * factor or min(offset) < 0:
        raise ValueError(
            f"a block of {shape} at {offset} does not lie in a state of {cells.shape[1:]} times {factor}; "
            "read the state with the block's whole footprint"
        )
    if factor == 1:
        return np.ascontiguousarray(cells[:, top : top + height, left : left + width])
    rows = slice(top // factor, -(-(top + height) // factor))
    cols = slice(left // factor, -(-(left + width) // factor))
    wide = np.repeat(cells[:, rows, cols], factor, axis=2)[:, :, left % factor :][:, :, :width]
    out = np.empty((len(cells), height, width), np.uint8)
    for phase in range(factor):
        # Grid rows of one phase inside their cells: rows (phase - top) mod factor, and so on by factor.
        first = (phase - top) % factor
        start = (first + top) // factor - rows.start
        target = out[:, first::factor]
        target[:] = wide[:, start : start + target.shape[1]]
    return out


def checked_bits(
    bits: State,
    codes: Codes | None,
    nir: Codes | None,
    valid: Flags | None,
    *,
    days: NDArray[np.int32],
    temporal_check: bool,
    rejected: Flags | None,
) -> State:
    """Cloud, shadow and not-valid bits (T, H, W) on the grid, with the temporal check's findings."""
    out = bits.copy()
    for empty in (None if codes is None else codes == 0, None if valid is None else ~valid):
        if empty is not None:
            np.bitwise_or(out, np.left_shift(empty.view(np.uint8), np.uint8(2)), out=out)
    if codes is not None and temporal_check and len(codes) > 1:
        bright, dark = bright_and_dark(codes=codes, clear=out == 0, days=days, nir=nir, rejected=rejected)
        np.bitwise_or(out, bright.view(np.uint8), out=out)
        np.bitwise_or(out, np.left_shift(dark.view(np.uint8), np.uint8(1)), out=out)
    if rejected is not None:
        out[rejected] |= np.uint8(CLOUD_BIT)
    return out


def _unpack(bits: State) -> MaskLayers:
    return MaskLayers(cloud=(bits & CLOUD_BIT) != 0, shadow=(bits & SHADOW_BIT) != 0, clear=bits == 0)
