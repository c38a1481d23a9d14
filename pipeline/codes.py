"""From DN to codes, and several scenes of one pass to one layer: in come arrays of scenes, out come codes and states.

The pure numpy heart that the lazy cube and the job share, so both give the same bytes. A *state* raster says what the
mask rule alone sees, before any growth: ``NODATA``, ``CLEAR``, ``CLOUD`` or ``SHADOW``. It may lie on a coarser
lattice than the codes (SCL: 20 m under 10 m bands): a cell then covers ``factor`` x ``factor`` fine pixels, and
``offset`` is the place (row, col) of the fine [0, 0] inside the cell [0, 0].
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import CODE_MAX, CODE_MIN, CODE_NODATA, CODE_OFFSET, CODE_SCALE
from pipeline.errors import ItemError
from pipeline.items import Asset
from pipeline.warp import invalid

NODATA: Final = 0
CLEAR: Final = 1
CLOUD: Final = 2
SHADOW: Final = 3

Codes = NDArray[np.uint16]
States = NDArray[np.uint8]
_RANK: Final = np.array([NODATA, CLEAR, SHADOW, CLOUD], np.uint8)
"""State to rank and rank to state (its own inverse): cloud outranks shadow outranks clear outranks no data."""


def dn_to_codes(dn: NDArray[Any], asset: Asset, offset_dn: int | None) -> Codes:
    """Raw DN of any shape to uint16 codes (see ``pipeline.bands``), 0 where the DN is the asset's nodata.

    ``code = dn + 1000 + offset_dn`` for the usual scale of 1e-4, clipped to 1..65534, so a dark valid pixel never
    becomes nodata; other scales are rounded. Where the asset names no nodata value, 0 is it.

    Args:
        dn: as read, the raster's dtype.
        asset: its nodata and scale; its ``offset`` is *not* used.
        offset_dn: the offset decided for the item, in DN (0 or -1000).

    Raises:
        ItemError: if no offset was decided.
    """
    if offset_dn is None:
        raise ItemError(
            f"{asset.href}: no BOA offset was decided for this item; run the scout first, or set an override (0 or -1000)"
        )
    nodata = 0.0 if asset.nodata is None else asset.nodata
    shift = CODE_OFFSET + int(offset_dn)
    usual = abs(asset.scale - CODE_SCALE) < 1e-12
    if usual and dn.dtype == np.uint16 and nodata == 0 and 0 <= shift < CODE_MAX:
        codes: Codes = np.minimum(dn, np.uint16(CODE_MAX - shift))
        if shift:
            codes += np.uint16(shift)
            np.multiply(codes, dn != 0, out=codes)
        return codes
    if usual and dn.dtype.kind in "iu":
        wide = np.clip(dn.astype(np.int64) + shift, CODE_MIN, CODE_MAX)
    else:
        reflectance = (np.nan_to_num(dn.astype(np.float64)) + offset_dn) * asset.scale
        wide = np.clip(np.floor(reflectance / CODE_SCALE + 0.5) + CODE_OFFSET, CODE_MIN, CODE_MAX)
    codes = wide.astype(np.uint16)
    codes[invalid(dn, nodata)] = CODE_NODATA
    return codes


def spread_cells(
    cells: NDArray[Any], factor: int, offset: tuple[int, int], shape: tuple[int, int]
) -> NDArray[Any]:
    """Coarse cells (..., hc, wc) onto the fine lattice: (..., *shape), each cell repeated over its pixels."""
    if factor == 1:
        return cells
    rows = (np.arange(shape[0]) + offset[0]) // factor
    cols = (np.arange(shape[1]) + offset[1]) // factor
    return cells[..., rows[:, None], cols[None, :]]


def reduce_states(state: States, factor: int, offset: tuple[int, int]) -> States:
    """Fine states (h, w) to cells: cloud where any pixel of the cell is cloud, else shadow, else clear, else nodata.

    The inverse of ``spread_cells`` where a cell is of one state. Give whole cells (or a margin that is cut off): a
    cell at the rim knows only the pixels inside the window.
    """
    if factor == 1:
        return state
    h, w = state.shape
    rows, cols = -(-(h + offset[0]) // factor), -(-(w + offset[1]) // factor)
    whole = np.zeros((rows * factor, cols * factor), np.uint8)
    whole[offset[0] : offset[0] + h, offset[1] : offset[1] + w] = _RANK[state]
    ranks = whole.reshape(rows, factor, cols, factor).max(axis=(1, 3))
    reduced: States = _RANK[ranks]
    return reduced


def fuse_scenes(
    codes: Sequence[Codes],
    states: Sequence[States],
    *,
    factor: int = 1,
    offset: tuple[int, int] = (0, 0),
) -> tuple[Codes, States]:
    """Scenes of one acquisition to one layer, decided pixel by pixel on the fine lattice.

    A pixel of a scene is valid when every band has a code and its state is not ``NODATA``. The first scene (in the
    order given: by item id) that is valid and clear there gives all bands and the state, else the first valid one.
    Where none is valid all bands are 0 and the state is ``NODATA``; so leaving out scenes without a pixel in the
    window changes nothing. On a coarser mask lattice the fused fine states go to cells by ``reduce_states``.

    Args:
        codes: per scene (B, h, w) uint16, 0 = no data.
        states: per scene (h, w) uint8, or cells as ``factor`` and ``offset`` say.
        factor: fine pixels along a cell.
        offset: place of the fine [0, 0] inside the cell [0, 0].

    Returns:
        codes (B, h, w) and states on the lattice they came on. A lone scene valid everywhere is returned as it is,
        not copied.
    """
    if len(codes) == 1 and states[0].all() and codes[0].all():
        return codes[0], states[0]
    shape = codes[0].shape[1:]
    fused = np.zeros_like(codes[0])
    state = np.zeros(shape, np.uint8)
    best = np.zeros(shape, np.uint8)  # 0 nothing yet, 1 valid, 2 clear
    for scene, cells in zip(codes, states, strict=True):
        seen = spread_cells(cells, factor, offset, (shape[0], shape[1]))
        valid = (scene != CODE_NODATA).all(axis=0) & (seen != NODATA)
        grade = valid.astype(np.uint8) + (valid & (seen == CLEAR))
        better = grade > best
        if not better.any():
            continue
        np.copyto(fused, scene, where=better)
        np.copyto(state, seen, where=better)
        np.copyto(best, grade, where=better)
    return fused, reduce_states(state, factor, offset)
