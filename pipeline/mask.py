"""Cloud masks: rasters of cloud classes in, ``cloud``, ``shadow`` and ``clear`` per look out.

In: the mask raster of each acquisition (SCL, a class map, Fmask bits, a cloud probability), on a lattice
as coarse as the grid or coarser; and the darkest band's codes (with the near infrared if there is one).
Out: :class:`MaskLayers` on the grid, bool, True = affected, and ``clear = valid & ~cloud & ~shadow``.

The way: :func:`apply_rule` turns values into a state; :func:`grow` opens and grows cloud and shadow in
metres on the raster's own lattice; :func:`mask_block` brings both to the grid and adds what the temporal
check finds (:mod:`pipeline.temporal`). :func:`cloud_mask` does the same lazily on a cube. All of it is
exactly local: given :func:`halo_m` of margin, results do not depend on how blocks are cut. What works on plain arrays
lies in :mod:`pipeline.mask_blocks`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import temporal_bands
from pipeline.errors import ConfigError
from pipeline.growth import grow as grow
from pipeline.growth import halo_m as halo_m
from pipeline.mask_blocks import (
    CLOUD_BIT,
    SHADOW_BIT,
    Flags,
    MaskLayers,
    MaskParams,
    Unchecked,
    checked_bits,
    clear_looks,
    grown_bits,
    look_bits,
    mask_block,
)
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

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

__all__ = [
    "CLEAR",
    "CLOUD",
    "CLOUD_BIT",
    "NODATA",
    "SHADOW",
    "SHADOW_BIT",
    "MaskLayers",
    "MaskParams",
    "MaskRule",
    "Unchecked",
    "apply_rule",
    "clear_looks",
    "cloud_mask",
    "grow",
    "grown_bits",
    "halo_m",
    "look_bits",
    "mask_block",
    "mask_model",
    "scene_fails",
    "state_from_bits",
    "state_from_classes",
    "state_from_probability",
    "state_from_scl",
    "temporal_check",
]


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


def cloud_mask(
    *,
    cube: "xr.Dataset",
    params: MaskParams | None = None,
    darkest_band: str | None = None,
    rejected: Sequence[bool] | None = None,
) -> "xr.Dataset":
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
    import dask.array as da  # a third of the time it takes a worker to start, and no task needs them
    import xarray as xr

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
        return checked_bits(bits, codes, nir, valid, days=days, temporal_check=params.temporal_check, rejected=barred)

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


def _check_cube(cube: "xr.Dataset", darkest_band: str | None, params: MaskParams) -> None:
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


def _bits_on_grid(cube: "xr.Dataset", resolution_m: float, params: MaskParams) -> "State | da.Array":
    """Growth on the cells of the mask's own lattice, brought back to the grid; lazy if the state is."""
    import dask.array as da

    state = cube["state"].transpose("time", "y", "x")
    factor, offset = int(state.attrs["factor"]), tuple(int(o) for o in state.attrs["offset"])
    cells, cell_m = state.data, factor * resolution_m
    module: ModuleType = da if isinstance(cells, da.Array) else np
    # Whole slices from the lattice's own phase: chunk borders may lie anywhere, cells stay in phase.
    for axis, start in zip((1, 2), offset, strict=True):
        if start:
            first = cells[(slice(None),) * axis + (slice(0, 1),)]
            cells = module.concatenate([module.repeat(first, start, axis=axis), cells], axis=axis)
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
        grown = module.repeat(grown, factor, axis=axis)
        grown = grown[(slice(None),) * axis + (slice(start, start + state.shape[axis]),)]
    return grown
