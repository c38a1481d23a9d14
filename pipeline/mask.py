"""Cloud masks: rasters of cloud classes in, ``cloud``, ``shadow`` and ``clear`` per look out.

In: the mask raster of each acquisition (SCL, a class map, Fmask bits, a cloud probability), on a lattice
as coarse as the grid or coarser; and the darkest band's codes (with the near infrared if there is one).
Out: :class:`MaskLayers` on the grid, bool, True = affected, and ``clear = valid & ~cloud & ~shadow``.

The way: :func:`apply_rule` turns values into a state; :func:`grow` opens and grows cloud and shadow in
metres on the raster's own lattice; :func:`mask_block` brings both to the grid and adds what the temporal
check finds (:mod:`pipeline.temporal`). :func:`cloud_mask` does the same lazily on a cube. All of it is
exactly local: given :func:`halo_m` of margin, results do not depend on how blocks are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final

import cv2
import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.bands import temporal_bands
from pipeline.errors import ConfigError
from pipeline.growth import grow as grow
from pipeline.growth import halo_m as halo_m
from pipeline.mask_models import mask_model
from pipeline.profiles import MaskRule
from pipeline.sorting import Codes
from pipeline.states import (
    CLEAR,
    CLOUD,
    NODATA,
    SHADOW,
    State,
    apply_rule,
    state_from_bits,
    state_from_classes,
    state_from_probability,
    state_from_scl,
)
from pipeline.temporal import bright_and_dark

__all__ = [
    "CLEAR",
    "CLOUD",
    "NODATA",
    "SHADOW",
    "MaskLayers",
    "MaskParams",
    "MaskRule",
    "apply_rule",
    "cloud_mask",
    "grow",
    "halo_m",
    "mask_block",
    "mask_model",
    "scene_fails",
    "state_from_bits",
    "state_from_classes",
    "state_from_probability",
    "state_from_scl",
    "temporal_check",
]

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


def temporal_check(*, codes: Codes, clear: Flags, days: NDArray[np.int32], nir: Codes | None = None) -> Flags:
    """Clear looks that are brighter or darker than the other dates allow; bool (T, H, W).

    Args:
        codes: uint16 (T, H, W), the darkest band (blue), 0 = no data.
        clear: bool (T, H, W), True = usable so far; only these can be marked.
        days: int32 (T,) since 1970-01-01, ascending.
        nir: uint16 (T, H, W) or None; without it only deep shadow is found.

    Returns:
        True = missed cloud, haze or shadow. Halo 0. Lasting changes (harvest, ploughing, snow) can be
        marked on their first dates; a pixel's last look never is. See :mod:`pipeline.temporal`.
    """
    bright, dark = bright_and_dark(codes=codes, clear=clear, days=days, nir=nir)
    return bright | dark


def scene_fails(suspicious_share: float, *, max_share: float = 0.5) -> bool:
    """Whether an acquisition fails the temporal check as a whole, and so can be no anchor.

    Args:
        suspicious_share: Share (0-1) of its clear pixels that :func:`temporal_check` marks, from coarse
            data over the whole area; 0 where none is clear.
        max_share: On real series truly clear dates stay below 0.3, missed white scenes reach 0.9 to 1.
    """
    return bool(suspicious_share > max_share)


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
    return _unpack(
        _checked_bits(bits, codes, nir, None, days=days, temporal_check=params.temporal_check, rejected=None)
    )


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


def clear_looks(
    *,
    bits: State,
    factor: int,
    offset: tuple[int, int],
    valid: Flags,
    codes: Codes,
    nir: Codes | None,
    days: NDArray[np.int32],
    temporal_check: bool,
    rejected: Flags,
) -> Flags:
    """Usable looks of one block, bool (T, H, W): what ``mask_block`` calls clear, from bits that are grown already.

    Args:
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
    clear = _to_grid(bits, factor, offset, (codes.shape[1], codes.shape[2])) == 0
    np.logical_and(clear, valid, out=clear)
    if temporal_check and len(codes) > 1:
        bright, dark = bright_and_dark(codes=codes, clear=clear, days=days, nir=nir, rejected=rejected)
        np.logical_xor(clear, np.logical_or(bright, dark, out=bright), out=clear)  # both lie within clear
    clear[rejected] = False
    return clear


def look_bits(
    *,
    bits: State,
    factor: int,
    offset: tuple[int, int],
    valid: Flags,
    codes: Codes,
    nir: Codes | None,
    days: NDArray[np.int32],
    temporal_check: bool,
    rejected: Flags,
) -> State:
    """As ``clear_looks``, and what hides the others: uint8 (T, H, W), bit 1 cloud, 2 shadow, 4 no data, 0 = clear."""
    there = _to_grid(bits, factor, offset, (codes.shape[1], codes.shape[2]))
    return _checked_bits(there, codes, nir, valid, days=days, temporal_check=temporal_check, rejected=rejected)


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


def _checked_bits(
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


def cloud_mask(
    *,
    cube: xr.Dataset,
    params: MaskParams | None = None,
    darkest_band: str | None = None,
    rejected: Sequence[bool] | None = None,
) -> xr.Dataset:
    """Masks of a cube, lazy where the cube is lazy (nothing is computed here), eager on numpy.

    Args:
        cube: ``reflectance (time, band, y, x)`` float32 (NaN none), ``valid (time, y, x)`` bool, ``state
            (time, y, x)`` uint8 brought to the grid by nearest neighbour, with ``state.attrs``:
            ``factor`` and ``offset`` ([rows, cols] of the cube's [0, 0] inside its state cell);
            ``cube.attrs["resolution_m"]``.
        params: Growth and checks; default :class:`MaskParams`.
        darkest_band: The band that the temporal check compares; default: that of the shortest wavelength.
        rejected: Per time, whether the scout rejects the acquisition as a whole: all of it is cloud then.

    Returns:
        ``cloud``, ``shadow`` (True = affected) and ``clear`` (time, y, x) bool, equal to what
        :func:`mask_block` gives on the same data. Where the cube ends there is no cloud beyond.

    Raises:
        ConfigError: the cube lacks a variable, an attribute or the darkest band, or ``rejected`` is not one per time.
    """
    params = params or MaskParams()
    _check_cube(cube, darkest_band, params)
    resolution_m = float(cube.attrs["resolution_m"])
    names = [str(name) for name in cube["band"].values]
    looked_at: list[str] = []
    if params.temporal_check:
        dark, infrared = temporal_bands(names)
        looked_at = [darkest_band or names[dark], *([names[infrared]] if infrared is not None else [])]
    # A job reckons in solar days; a cube made elsewhere may have times only.
    when = cube["solar_day"] if "solar_day" in cube.coords else cube["time"]
    days = when.values.astype("datetime64[D]").astype(np.int64).astype(np.int32)
    barred = None if rejected is None else np.array(rejected, bool)
    if barred is not None and barred.shape != days.shape:
        raise ConfigError(
            f"cloud_mask: rejected says {barred.size} times yes or no, and the cube has {len(days)} times"
        )
    reflectance = cube["reflectance"].transpose("time", "band", "y", "x")
    arrays = [cube["valid"].transpose("time", "y", "x").data, _bits_on_grid(cube, resolution_m, params)]
    arrays += [reflectance.sel(band=name).data for name in looked_at]

    def finish(valid: Flags, bits: State, *refl: NDArray[np.float32]) -> State:
        codes, nir, *_ = [*(reflectance_to_codes(r) for r in refl), None, None]
        return _checked_bits(bits, codes, nir, valid, days=days, temporal_check=params.temporal_check, rejected=barred)

    if any(isinstance(array, da.Array) for array in arrays):
        # One chunk in time: dates are compared with each other. Chunks in space follow the pixels'.
        yx = next(a for a in (*arrays[2:], *arrays) if isinstance(a, da.Array)).chunks[-2:]
        lazy = [da.asarray(array).rechunk((-1, *yx)) for array in arrays]
        checked = da.map_blocks(finish, *lazy, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    else:
        checked = finish(*arrays)
    dims, coords = (
        ("time", "y", "x"),
        {name: cube.coords[name] for name in ("time", "y", "x") if name in cube.coords},
    )
    layers = {
        "cloud": (checked & CLOUD_BIT) != 0,
        "shadow": (checked & SHADOW_BIT) != 0,
        "clear": checked == 0,
    }
    return xr.Dataset({name: (dims, data) for name, data in layers.items()}, coords=coords, attrs=cube.attrs)


def reflectance_to_codes(reflectance: NDArray[np.float32]) -> Codes:
    """Codes uint16 from reflectance float32: rounded, clipped to 1..65534; NaN becomes 0."""
    codes = np.clip(np.rint(reflectance * np.float32(1e4) + np.float32(1000)), 1, 65534)
    return np.nan_to_num(codes, copy=False, nan=0).astype(np.uint16)


def _check_cube(cube: xr.Dataset, darkest_band: str | None, params: MaskParams) -> None:
    missing = [name for name in ("reflectance", "valid", "state") if name not in cube]
    if missing:
        raise ConfigError(f"cloud_mask: the cube lacks {missing}; make it with open_cube, which reads the mask too")
    if "resolution_m" not in cube.attrs or not {"factor", "offset"} <= set(cube["state"].attrs):
        raise ConfigError(
            "cloud_mask: cube.attrs['resolution_m'] and state.attrs 'factor' and 'offset' say how the mask lies under "
            "the grid and are not there; xarray drops attributes in arithmetic (use xr.set_options(keep_attrs=True))"
        )
    names = [str(name) for name in cube["band"].values]
    if params.temporal_check and darkest_band is not None and darkest_band not in names:
        raise ConfigError(
            f"cloud_mask: the temporal check compares the darkest band {darkest_band!r}, and the cube has {names}; "
            "add the band, name another as darkest_band, or set temporal_check=False"
        )


def _bits_on_grid(cube: xr.Dataset, resolution_m: float, params: MaskParams) -> State | da.Array:
    """Growth on the cells of the mask's own lattice, brought back to the grid; lazy if the state is."""
    state = cube["state"].transpose("time", "y", "x")
    factor, offset = int(state.attrs["factor"]), tuple(int(o) for o in state.attrs["offset"])
    cells, cell_m = state.data, factor * resolution_m
    # Whole slices from the lattice's own phase: chunk borders may lie anywhere, cells stay in phase.
    for axis, start in zip((1, 2), offset, strict=True):
        if start:
            first = cells[(slice(None),) * axis + (slice(0, 1),)]
            cells = _module(cells).concatenate([_module(cells).repeat(first, start, axis=axis), cells], axis=axis)
        cells = cells[(slice(None),) * axis + (slice(None, None, factor),)]
    if isinstance(cells, da.Array):
        reach = int(halo_m(params.open_m, params.cloud_grow_m, params.shadow_grow_m) / cell_m + 1e-9)
        depth = {0: 0, 1: reach, 2: reach}
        grown = da.map_overlap(
            lambda block: grown_bits(state=block, resolution_m=cell_m, params=params),
            cells,
            depth=depth,
            boundary=NODATA,
            dtype=np.uint8,
            meta=np.empty((0, 0, 0), np.uint8),
        )
    else:
        grown = grown_bits(state=np.ascontiguousarray(cells), resolution_m=cell_m, params=params)
    for axis, start in zip((1, 2), offset, strict=True):
        grown = _module(grown).repeat(grown, factor, axis=axis)
        grown = grown[(slice(None),) * axis + (slice(start, start + state.shape[axis]),)]
    return grown


def _module(array: State | da.Array) -> ModuleType:
    return da if isinstance(array, da.Array) else np
