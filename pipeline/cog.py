"""Cloud-Optimized GeoTIFFs for QGIS and GDAL: in come layers of a mosaic, out come files, one a layer, same numbers.

A layer is copied window by window into a plain GeoTIFF beside the target, which GDAL's COG driver then turns into
blocks and overviews; neither step holds a layer in memory. A small VRT puts three bands together as a colour picture.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.shutil import copy as gdal_copy
from rasterio.windows import Window

from pipeline.bands import CODE_OFFSET, CODE_SCALE
from pipeline.errors import StoreError
from pipeline.grid import Grid
from pipeline.layers import LayerSpec
from pipeline.store import read_region

_COLOURS: Final = {"red": ColorInterp.red, "green": ColorInterp.green, "blue": ColorInterp.blue}
_BLOCK_PX: Final = 512
_CACHE_BYTES: Final = 256 * 2**20
"""Of GDAL while it makes overviews."""


def write_cog(store: str, grid: Grid, slot: int, name: str, spec: LayerSpec, out: Path) -> None:
    """Write one layer of one period as a Cloud-Optimized GeoTIFF; an existing file is replaced when the new is whole.

    The numbers are the store's own, with ``scale``, ``offset`` and ``nodata`` as GDAL's metadata. Overviews are
    averages for reflectance and sigma, majorities for classes.

    Args:
        store: the mosaic.
        grid: of level 0.
        slot: index on ``time``.
        name: the layer.
        spec: its coding.
        out: the file.

    Raises:
        StoreError: if the file cannot be written.
    """
    whole, partial = out.with_name(f".{out.name}.whole"), out.with_name(f".{out.name}.partial")
    attrs = spec.attrs
    nodata = attrs.get("_FillValue")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES):
            with rasterio.open(
                whole,
                "w",
                driver="GTiff",
                dtype=spec.dtype,
                count=1,
                height=grid.height,
                width=grid.width,
                crs=grid.crs,
                transform=grid.transform,
                nodata=nodata,
                tiled=True,
                blockxsize=_BLOCK_PX,
                blockysize=_BLOCK_PX,
                compress="ZSTD",
                zstd_level=1,
                bigtiff="IF_SAFER",
            ) as target:
                target.set_band_description(1, name)
                target.colorinterp = [_COLOURS.get(name, ColorInterp.gray)]
                target.scales, target.offsets = [attrs.get("scale_factor", 1.0)], [attrs.get("add_offset", 0.0)]
                target.update_tags(1, **{key: str(attrs[key]) for key in ("long_name", "units") if key in attrs})
                for rows, cols in _windows(grid):
                    values = read_region(store, grid, slot, rows, cols, name, published=True)
                    target.write(values, 1, window=Window.from_slices(rows, cols))
            gdal_copy(
                whole,
                partial,
                driver="COG",
                compress="DEFLATE",
                predictor="YES",
                blocksize=_BLOCK_PX,
                overview_resampling="AVERAGE" if spec.resampling == "average" else "MODE",
                bigtiff="IF_SAFER",
                num_threads="ALL_CPUS",
            )
        partial.replace(out)
    except (OSError, RasterioError) as error:
        raise StoreError(
            f"export: cannot write {out}: {error}; free space or check permissions, then run again"
        ) from error
    finally:
        for rest in (whole, partial):
            with suppress(OSError):
                rest.unlink()


def _windows(grid: Grid) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Windows of whole shards, none wider than 4096 px: a layer of a window is 64 MB at most."""
    side = max(grid.shard_px, 4096 // grid.shard_px * grid.shard_px)
    return [
        ((row, min(row + side, grid.height)), (col, min(col + side, grid.width)))
        for row in range(0, math.ceil(grid.height / side) * side, side)
        for col in range(0, math.ceil(grid.width / side) * side, side)
    ]


def write_colour_vrt(files: Sequence[Path], grid: Grid, out: Path) -> None:
    """Write a VRT of three COGs that opens as a colour picture; the files are named relative to it."""
    left, top, side = grid.left, grid.top, grid.resolution_m
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{number}"><NoDataValue>0</NoDataValue>'
        f"<ColorInterp>{colour}</ColorInterp><Offset>{-CODE_OFFSET * CODE_SCALE}</Offset><Scale>{CODE_SCALE}</Scale>"
        f'<SimpleSource><SourceFilename relativeToVRT="1">{escape(file.name)}</SourceFilename>'
        f"<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for number, (file, colour) in enumerate(zip(files, ("Red", "Green", "Blue"), strict=True), 1)
    )
    out.write_text(
        f'<VRTDataset rasterXSize="{grid.width}" rasterYSize="{grid.height}"><SRS>{escape(grid.crs)}</SRS>'
        f"<GeoTransform>{left!r}, {side!r}, 0.0, {top!r}, 0.0, {-side!r}</GeoTransform>{bands}</VRTDataset>\n"
    )
