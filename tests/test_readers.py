"""Other programs open a store without our code and see the numbers in the right place: viewers, tilers, GDAL."""

import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
import xproj  # noqa: F401  (the .proj accessor, for topozarr)
import zarr
from fastapi import FastAPI
from morecantile import tms
from PIL import Image
from pyproj import Transformer
from rio_tiler.io.xarray import XarrayReader
from starlette.testclient import TestClient
from titiler.xarray.factory import TilerFactory
from titiler.xarray.io import Reader
from topozarr import create_pyramid

from pipeline import store
from pipeline.bands import to_codes
from pipeline.grid import Grid
from pipeline.overviews import coarsen_shard, level_shards
from pipeline.periods import Period

GRID = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49999, 700, 516, 256)
EAST, SOUTH = 320, 200
"""Where the bright square begins, in pixels of level 0; it is 128 px wide, so every level shows its edges exactly."""


def _write(path: Path, grid: Grid) -> Path:
    values = np.full(grid.shape, 0.1)
    values += np.random.default_rng(0).uniform(0, 0.02, grid.shape)
    values[SOUTH : SOUTH + 128, EAST : EAST + 128] = 0.5
    codes = to_codes(values)
    for i, j in grid.shards():
        (r0, r1), (c0, c1) = (
            (k * grid.shard_px, min((k + 1) * grid.shard_px, n)) for k, n in zip((i, j), grid.shape, strict=True)
        )
        part = codes[r0:r1, c0:c1]
        layers = {"red": part, "clear_count": part * 0 + np.uint16(3), "flags": part * 0 + np.uint16(4)}
        layers["source_date"] = np.full(part.shape, 19005, np.int32)
        store.write_region(path, grid, 0, (r0, r1), (c0, c1), layers)
    for level, shards in level_shards(grid):
        for shard in shards:
            coarsen_shard(path, grid, ("red",), False, 0, level, shard)
    about = {
        "layout": 1,
        "grid": grid.to_dict(),
        "periods": {"0": {"start": "2022-01-08", "end": "2022-01-17", "target": "2022-01-13"}},
    }
    period = Period(0, 19000, 19009, 19000, 19005)
    store.publish(
        path,
        grid,
        ("red",),
        uncertainty=False,
        schedule=[period],
        published=[True],
        attrs={"title": "square", "cloudgate": about},
        levels=len(grid.levels()) - 1,
    )
    return path


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("readers") / "m.zarr", GRID)


def _corner_lonlat() -> tuple[float, float]:
    """The middle of the bright square in degrees."""
    x, y = GRID.left + (EAST + 64) * 10, GRID.top - (SOUTH + 64) * 10
    return Transformer.from_crs(GRID.crs, "EPSG:4326", always_xy=True).transform(x, y)


def test_rio_tiler_reads_every_level_in_place(square):
    lon, lat = _corner_lonlat()
    for level in range(3):
        data = xr.open_zarr(str(square), group=str(level), decode_coords="all")["red"].isel(time=0)
        with XarrayReader(data) as reader:
            assert reader.crs.to_epsg() == 32633
            assert reader.bounds[0] == GRID.left
            assert reader.bounds[3] == GRID.top
            assert reader.point(lon, lat).array[0] == pytest.approx(0.5, abs=1e-6)
            assert reader.point(lon - 0.012, lat).array[0] < 0.13


@pytest.mark.filterwarnings("ignore:This module is experimental")
def test_rio_tiler_finds_the_levels_by_the_conventions(square):
    from rio_tiler.experimental.zarr import GroupReader

    with GroupReader(zarr.open_group(square, mode="r")) as reader:
        assert reader.crs.to_epsg() == 32633
        assert reader.bounds == GRID.bounds
        red = next(v for v in reader.list_variables() if v["name"] == "red")
        assert red["multiscale"]
        assert reader.minzoom < reader.maxzoom


@pytest.mark.parametrize("level", [0, 1, 2])
def test_titiler_serves_tiles_that_show_the_square_where_it_is(square, level):
    app = FastAPI()
    app.include_router(TilerFactory(reader=Reader).router)
    lon, lat = _corner_lonlat()
    grid = tms.get("WebMercatorQuad")
    tile = grid.tile(lon, lat, 13)
    asked = {"url": str(square), "group": str(level), "variable": "red", "sel": "time=2022-01-13", "rescale": "0,0.5"}
    answer = TestClient(app).get(f"/tiles/WebMercatorQuad/13/{tile.x}/{tile.y}.png", params=asked)
    assert answer.status_code == 200
    picture = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))
    west, south, east, north = grid.xy_bounds(tile)
    step = (np.arange(256) + 0.5) / 256
    to_utm = Transformer.from_crs("EPSG:3857", GRID.crs, always_xy=True)
    x, y = to_utm.transform(*np.meshgrid(west + step * (east - west), north - step * (north - south)))
    rows, cols = (GRID.top - y) / 10 - SOUTH, (x - GRID.left) / 10 - EAST
    inside = (rows > 0) & (rows < 128) & (cols > 0) & (cols < 128)
    shown = (picture[..., 0] > 200) & (picture[..., 3] > 0)
    assert inside.sum() > 500
    assert (shown != inside).sum() < 0.06 * inside.sum()  # its edge, half a pixel of a tile


def test_averages_are_those_of_topozarr(square, tmp_path):
    codes = xr.open_zarr(str(square), group="0", decode_cf=False)[["red"]].isel(time=slice(0, 1))
    codes["red"].attrs = {}
    plain = codes.assign_coords(x=GRID.x, y=GRID.y).drop_vars("spatial_ref", errors="ignore").load()
    plain = plain.proj.assign_crs(spatial_ref="EPSG:32633")
    create_pyramid(plain, levels=3, method="mean").write(str(tmp_path / "topozarr.zarr"))
    for level in ("1", "2"):
        ours = zarr.open_array(square, path=f"{level}/red", mode="r")[0].astype(int)
        theirs = zarr.open_array(tmp_path / "topozarr.zarr", path=f"{level}/red", mode="r")[0].astype(int)
        height, width = (min(a, b) for a, b in zip(ours.shape, theirs.shape, strict=True))
        assert height >= ours.shape[0] - 1  # an odd edge: they drop it, we keep it
        difference = ours[:height, :width] - theirs[:height, :width]
        assert np.abs(difference).max() <= 1  # halves: they round to even, we round up


def test_gdal_reads_an_unsharded_store_with_place_and_coding(square, tmp_path):
    path = _write(tmp_path / "plain.zarr", replace(GRID, sharded=False))
    for level, name in itertools.product((0, 1, 2), ("red", "flags")):
        array = zarr.open_array(path, path=f"{level}/{name}", mode="r")
        np.testing.assert_array_equal(array[:], zarr.open_array(square, path=f"{level}/{name}", mode="r")[:])
        with rasterio.open(f'ZARR:"{path}":/{level}/{name}') as opened:
            assert opened.crs.to_epsg() == 32633
            assert tuple(opened.transform)[:6] == (10.0 * 2**level, 0, GRID.left, 0, -10.0 * 2**level, GRID.top)
            np.testing.assert_array_equal(opened.read(1), array[0])
            if name == "red":
                assert (opened.scales, opened.offsets, opened.nodata) == ((1e-4,), (-0.1,), 0)
