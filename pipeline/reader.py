"""Pixels of assets: in come an ``Asset`` and a ``Grid``, out comes the array of exactly that grid's pixels.

The one way to pixels, for the job (through ``read_pool.ReadPool``), for stackstac, odc-stac and the scout. It signs at
read time, keeps datasets open between windows, retries what may pass, and never hides a failure: what cannot be read is
a ``ReadError``. Values are the raster's own DN; ``dn_to_codes`` turns them into codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from rasterio.windows import Window

from pipeline.bands import CODE_NODATA, CODE_OFFSET, CODE_SCALE
from pipeline.codes import (
    CLEAR,
    CLOUD,
    NODATA,
    SHADOW,
    dn_to_codes,
    fuse_scenes,
    fuse_states,
    shift_to_codes,
    spread_cells,
)
from pipeline.grid import Grid
from pipeline.handles import HANDLES, bound_block_cache, gdal_settings, with_dataset
from pipeline.items import Asset
from pipeline.profiles import Profile
from pipeline.relay import verified
from pipeline.warp import (
    Fetch,
    Frame,
    Kind,
    lattice_ratio,
    native_offset,
    resample,
    shrink,
)

__all__ = [
    "CLEAR",
    "CLOUD",
    "NODATA",
    "SHADOW",
    "bound_block_cache",
    "close_handles",
    "coarse_grid",
    "dn_to_codes",
    "fuse_scenes",
    "fuse_states",
    "gdal_settings",
    "keep_open",
    "mask_lattice",
    "read_coarse",
    "read_codes",
    "read_window",
    "spread_cells",
]

MASK_FACTORS: Final = (1, 2, 3, 6)
"""Ratios of a mask's pixel to the grid's at which the mask is read and grown on its own lattice."""


def frame_of(asset: Asset) -> Frame:
    """Where an asset lies, as its item says."""
    return Frame(
        asset.crs,
        asset.transform,
        asset.shape,
        0.0 if asset.nodata is None else asset.nodata,
    )


def read_window(
    asset: Asset,
    grid: Grid,
    *,
    kind: Kind = "reflectance",
    profile: Profile | None = None,
) -> NDArray[Any]:
    """Read an asset onto exactly the pixels of ``grid``.

    On the raster's own lattice the pixels come as they are, each block of the file touched once. Elsewhere classes
    come by nearest neighbour and reflectance bilinear, averaged first when the grid is coarser by two or more (see
    ``pipeline.warp``). The value of a pixel never depends on the window asked for.

    Args:
        asset: unsigned; its CRS is taken as the item says, its affine and shape as the file says.
        grid: any part of the lattice; outside the raster there is no data.
        kind: ``reflectance`` or ``classes``.
        profile: credentials, retries and GDAL settings.

    Returns:
        (height, width) raw DN in the raster's dtype, the asset's nodata (0 if it names none) where there is none.

    Raises:
        ReadError: when it cannot be read, after retries.
    """
    frame = frame_of(asset)
    start = native_offset(frame, grid)
    if start is not None and _apart(start, grid, frame):
        return _absent(asset, grid, kind)
    levels = 1.0 if start is not None else shrink(frame, grid.crs, grid.resolution_m)
    budget = levels / 2 if kind == "reflectance" else levels
    return _read(asset, grid, kind, profile, budget)


def covered(asset: Asset, grid: Grid) -> NDArray[np.bool_]:
    """(height, width): which pixels of ``grid`` a raster of classes has, by the sampling that reads them."""
    frame = replace(frame_of(asset), nodata=0.0)
    height, width = frame.shape

    def fetch(r0: int, r1: int, c0: int, c1: int) -> NDArray[np.uint8]:
        rows, cols = np.arange(r0, r1), np.arange(c0, c1)
        there = ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))[None, :]
        return there.astype(np.uint8)

    return np.asarray(resample(fetch, frame, grid, "classes") != 0)


def read_codes(
    asset: Asset, grid: Grid, *, offset_dn: int | None, out: NDArray[np.uint16], profile: Profile | None = None
) -> None:
    """Read reflectance as codes straight into ``out`` (height, width) uint16; see ``read_window`` and ``dn_to_codes``.

    On the raster's own lattice, in the usual coding, no other array is made.

    Raises:
        ReadError: when it cannot be read, after retries; ``out`` then holds anything.
    """
    frame = frame_of(asset)
    start = native_offset(frame, grid)
    usual = abs(asset.scale - CODE_SCALE) < 1e-12 and frame.nodata == 0 and offset_dn is not None
    if start is None or not usual or _apart(start, grid, frame):
        out[...] = dn_to_codes(read_window(asset, grid, profile=profile), asset, offset_dn)
        return

    def into(dataset: DatasetReader) -> bool:
        file_frame = _file_frame(dataset, asset)
        if dataset.dtypes[0] != "uint16" or native_offset(file_frame, grid) != start:
            return False
        height, width = file_frame.shape
        top, bottom = max(start[0], 0), min(start[0] + grid.height, height)
        left, right = max(start[1], 0), min(start[1] + grid.width, width)
        inside = out[top - start[0] : bottom - start[0], left - start[1] : right - start[1]]
        if inside.shape != out.shape:
            out.fill(CODE_NODATA)
        dataset.read(1, window=Window(left, top, right - left, bottom - top), out=inside)
        shift_to_codes(inside, CODE_OFFSET + int(offset_dn or 0))
        return True

    if not with_dataset(_place(asset, profile), profile, into, expect=_expected(asset)):
        out[...] = dn_to_codes(read_window(asset, grid, profile=profile), asset, offset_dn)


def read_coarse(
    asset: Asset,
    grid: Grid,
    *,
    out_px: int,
    kind: Kind = "reflectance",
    profile: Profile | None = None,
) -> tuple[NDArray[Any], Grid]:
    """A cheap look at the whole grid from overviews, for the scout.

    Returns:
        (array, coarse grid): the raster on the covering grid of at most about ``out_px`` pixels a side, its pixels
        whole multiples of the lattice's; classes by nearest neighbour, reflectance averaged, from the coarsest
        overview that is still as fine as that grid.
    """
    factor = max(1, math.ceil(max(grid.shape) / max(out_px - 1, 1)))
    coarse, _ = coarse_grid(grid, factor, (0, 0))
    budget = shrink(frame_of(asset), coarse.crs, coarse.resolution_m)
    return _read(asset, coarse, kind, profile, budget), coarse


def _read(asset: Asset, grid: Grid, kind: Kind, profile: Profile | None, budget: float) -> NDArray[Any]:
    """Read from the coarsest overview that shrinks the raster by no more than ``budget``."""
    level = None
    if budget >= 2:
        overviews = with_dataset(_place(asset, profile), profile, lambda dataset: dataset.overviews(1))
        fitting = [index for index, factor in enumerate(overviews) if factor <= budget + 1e-6]
        level = fitting[-1] if fitting else None
    return with_dataset(
        _place(asset, profile),
        profile,
        lambda dataset: _pixels(dataset, asset, grid, kind),
        level=level,
        expect=_expected(asset) if level is None else None,
    )


def _place(asset: Asset, profile: Profile | None) -> str:
    """Where to read an asset: a verified copy where the job asks for it and the item has a checksum."""
    if profile and profile.verify_checksums and asset.checksum and asset.href.startswith(("http://", "https://")):
        return verified(asset.href, asset.checksum, profile)
    return asset.href


def _expected(asset: Asset) -> Callable[[DatasetReader], bool]:
    """Whether a file's header agrees with its item; a bit that came over wrong there would move pixels unseen."""

    def agrees(dataset: DatasetReader) -> bool:
        affine = dataset.transform
        if affine.is_identity:
            return True
        told = (affine.a, affine.b, affine.c, affine.d, affine.e, affine.f)
        near = all(abs(a - b) <= 1e-6 * max(1.0, abs(b)) for a, b in zip(told, asset.transform, strict=True))
        return near and (dataset.height, dataset.width) == tuple(asset.shape)

    return agrees


def _pixels(dataset: DatasetReader, asset: Asset, grid: Grid, kind: Kind) -> NDArray[Any]:
    frame = _file_frame(dataset, asset)
    fetch = _fetcher(dataset, frame)
    start = native_offset(frame, grid)
    if start is None:
        return resample(fetch, frame, grid, kind)
    row, col = start
    return fetch(row, row + grid.height, col, col + grid.width)


def _file_frame(dataset: DatasetReader, asset: Asset) -> Frame:
    """The georeference of the file itself (or of its opened overview); the item's where the file has none."""
    affine = dataset.transform
    shape = (dataset.height, dataset.width)
    if affine.is_identity:
        a, b, c, d, e, f = asset.transform
        by_row, by_col = asset.shape[0] / shape[0], asset.shape[1] / shape[1]
        numbers = (a * by_col, b * by_row, c, d * by_col, e * by_row, f)
    else:
        numbers = (affine.a, affine.b, affine.c, affine.d, affine.e, affine.f)
    return Frame(asset.crs, numbers, shape, _fill(np.dtype(dataset.dtypes[0]), asset.nodata))


def _fill(dtype: np.dtype[Any], nodata: float | None) -> float:
    """The nodata value where the dtype can hold it, else 0."""
    if nodata is None or (dtype.kind != "f" and not float(nodata).is_integer()):
        return 0.0
    if dtype.kind != "f" and not np.iinfo(dtype).min <= nodata <= np.iinfo(dtype).max:
        return 0.0
    return nodata


def _fetcher(dataset: DatasetReader, frame: Frame) -> Fetch:
    height, width = frame.shape

    def fetch(r0: int, r1: int, c0: int, c1: int) -> NDArray[Any]:
        top, bottom = max(r0, 0), min(r1, height)
        left, right = max(c0, 0), min(c1, width)
        window = Window(left, top, right - left, bottom - top)
        if (top, bottom, left, right) == (r0, r1, c0, c1):
            whole: NDArray[Any] = dataset.read(1, window=window)
            return whole
        out = np.full((r1 - r0, c1 - c0), frame.nodata, dataset.dtypes[0])
        if bottom > top and right > left:
            dataset.read(
                1,
                window=window,
                out=out[top - r0 : bottom - r0, left - c0 : right - c0],
            )
        return out

    return fetch


def _apart(start: tuple[int, int], grid: Grid, frame: Frame) -> bool:
    row, col = start
    return row >= frame.shape[0] or col >= frame.shape[1] or row + grid.height <= 0 or col + grid.width <= 0


def _absent(asset: Asset, grid: Grid, kind: Kind) -> NDArray[Any]:
    """No data, without opening the file only to learn its dtype."""
    nodata = 0.0 if asset.nodata is None else asset.nodata
    dtypes: tuple[Any, ...] = (np.uint8,) if kind == "classes" else ()
    for dtype in (*dtypes, np.uint16, np.int16):
        if _fill(np.dtype(dtype), nodata) == nodata:
            return np.full(grid.shape, nodata, dtype)
    return np.full(grid.shape, nodata, np.float32)


def keep_open(files: int) -> None:
    """How many datasets this process keeps open between reads."""
    HANDLES.keep_at_most(files)


def close_handles() -> None:
    """Close the datasets this process keeps open between reads."""
    HANDLES.close()


def mask_lattice(assets: Sequence[Asset], grid: Grid) -> tuple[int, tuple[int, int]]:
    """Whether class rasters can be read, and grown, on their own coarser lattice.

    Returns:
        (factor, phase): 2, 3 or 6 where every raster's pixels are that multiple of the grid's and all lie on one
        lattice; its cells start at global rows ``R % factor == phase[0]`` and columns ``C % factor == phase[1]``.
        Otherwise (1, (0, 0)): read them on the grid itself, by nearest neighbour.
    """
    found = {lattice_ratio(frame_of(asset), grid, MASK_FACTORS) for asset in assets}
    only = found.pop() if len(found) == 1 else None
    return (1, (0, 0)) if only is None or only[0] == 1 else only


def coarse_grid(grid: Grid, factor: int, phase: tuple[int, int]) -> tuple[Grid, tuple[int, int]]:
    """The grid of whole cells that covers ``grid``, and the place (row, col) of the fine [0, 0] in its cell [0, 0]."""
    if factor == 1:
        return grid, (0, 0)
    size = grid.resolution_m
    side = size * factor
    offset = ((grid.row0 - phase[0]) % factor, (grid.col0 - phase[1]) % factor)
    x_phase = (grid.phase_m[0] + phase[1] * size) % side
    y_phase = (grid.phase_m[1] - phase[0] * size) % side
    coarse = replace(
        grid,
        resolution_m=side,
        phase_m=(x_phase, y_phase),
        row0=round((y_phase - grid.top - offset[0] * size) / side),
        col0=round((grid.left - offset[1] * size - x_phase) / side),
        height=-(-(grid.height + offset[0]) // factor),
        width=-(-(grid.width + offset[1]) // factor),
    )
    return coarse, offset
