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
            f"{asset.href}: no BOA offset was decided for this item; run the scout first, or set an override "
            "(0 or -1000)"
        )
    nodata = 0.0 if asset.nodata is None else asset.nodata
    shift = CODE_OFFSET + int(offset_dn)
    usual = abs(asset.scale - CODE_SCALE) < 1e-12
    if usual and dn.dtype == np.uint16 and nodata == 0 and 0 <= shift < CODE_MAX:
        codes: Codes = dn.copy()
        shift_to_codes(codes, shift)
        return codes
    if usual and dn.dtype.kind in "iu":
        wide = np.clip(dn.astype(np.int64) + shift, CODE_MIN, CODE_MAX)
    else:
        reflectance = (np.nan_to_num(dn.astype(np.float64)) + offset_dn) * asset.scale
        wide = np.clip(np.floor(reflectance / CODE_SCALE + 0.5) + CODE_OFFSET, CODE_MIN, CODE_MAX)
    codes = wide.astype(np.uint16)
    codes[invalid(dn, nodata)] = CODE_NODATA
    return codes


def shift_to_codes(dn: NDArray[np.uint16], shift: int) -> None:
    """Turn DN (h, w) of the usual scale into codes, in place: ``dn + shift`` clipped to 65534 where ``dn`` is not 0."""
    rows = max(1, 65_536 // max(dn.shape[-1], 1))  # so few that they stay in the cache through all passes
    for top in range(0, len(dn), rows):
        part = dn[top : top + rows]
        np.minimum(part, np.uint16(CODE_MAX - shift), out=part)
        if shift:
            np.add(part, np.multiply(part != 0, np.uint16(shift)), out=part)


def spread_cells(cells: NDArray[Any], factor: int, offset: tuple[int, int], shape: tuple[int, int]) -> NDArray[Any]:
    """Coarse cells (..., hc, wc) onto the fine lattice: (..., *shape), each cell repeated over its pixels.

    ``offset`` is the place (row, col) of the fine [0, 0] in fine pixels from the corner of the cell [0, 0]; the cells
    may reach farther than ``shape`` on every side.
    """
    out = cells
    for axis, (start, size) in enumerate(zip(offset, shape, strict=True), -2):
        first, last = start // factor, -(-(start + size) // factor)
        part = out[..., first:last, :] if axis == -2 else out[..., first:last]
        if factor > 1:
            part = np.repeat(part, factor, axis=axis)
        skip = start - first * factor
        out = part[..., skip : skip + size, :] if axis == -2 else part[..., skip : skip + size]
    return out


def fuse_states(states: Sequence[States]) -> States:
    """States of scenes on one lattice, (h, w) each: the first that is clear, else the first that is not NODATA."""
    fused = states[0]
    if len(states) > 1:
        fused = fused.copy()
        for cells in states[1:]:
            better = ((fused == NODATA) & (cells != NODATA)) | ((fused != CLEAR) & (cells == CLEAR))
            np.copyto(fused, cells, where=better)
    return fused


def fuse_scenes(
    codes: Sequence[Codes],
    states: Sequence[States],
    *,
    factor: int = 1,
    offset: tuple[int, int] = (0, 0),
) -> tuple[Codes, States]:
    """Scenes of one acquisition to one layer.

    The states are fused on their own lattice by ``fuse_states``, so they may cover a margin around the codes (growth
    needs one) and no code decides about growth. Codes are decided pixel by pixel: a pixel of a scene is valid when
    every band has a code and its state is not ``NODATA``; the first scene (in the order given: by item id) that is
    valid and clear there gives all bands, else the first valid one, else all are 0. Where the states say clear and
    only a scene that is not clear has codes, there is no look either.

    Args:
        codes: per scene (B, h, w) uint16, 0 = no data.
        states: per scene (hs, ws) uint8, on cells as ``factor`` and ``offset`` say.
        factor: fine pixels along a cell.
        offset: place of the fine [0, 0] in fine pixels from the corner of the cell [0, 0].

    Returns:
        codes (B, h, w) and states (hs, ws). A lone scene that is valid everywhere is returned as it is, not copied.
    """
    state = fuse_states(states)
    shape = (codes[0].shape[1], codes[0].shape[2])
    if len(codes) == 1 and state.all() and codes[0].all():
        return codes[0], state
    fused = np.zeros_like(codes[0])
    best = np.zeros(shape, np.uint8)  # 0 nothing yet, 1 valid, 2 clear
    for scene, cells in zip(codes, states, strict=True):
        seen = spread_cells(cells, factor, offset, shape)
        valid = (scene != CODE_NODATA).all(axis=0) & (seen != NODATA)
        grade = valid.astype(np.uint8) + (valid & (seen == CLEAR))
        better = grade > best
        np.copyto(fused, scene, where=better)
        np.copyto(best, grade, where=better)
    if len(codes) > 1:
        fused[:, (best == 1) & (spread_cells(state, factor, offset, shape) == CLEAR)] = CODE_NODATA
    return fused, state
