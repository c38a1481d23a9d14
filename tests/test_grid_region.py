"""Grids lie on the lattice, whatever area is asked for; areas resolve, across the antimeridian too."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rasterio.features import geometry_mask
from shapely.geometry import box

from pipeline.config import Area, GridSpec
from pipeline.errors import ConfigError
from pipeline.grid import Grid, projected_crs, utm_crs
from pipeline.items import Asset, Item
from pipeline.region import lattice_phase, region_of


def test_a_grid_covers_its_area_on_the_lattice():
    grid = Grid.around(box(500003, 5099981, 500041, 5100000), crs="EPSG:32633", resolution_m=10, phase_m=(0, 0))
    assert grid.bounds == (500000, 5099980, 500050, 5100000)
    assert (grid.row0, grid.col0, grid.shape) == (-510000, 50000, (2, 5))
    assert tuple(grid.geobox.affine)[:6] == tuple(grid.transform)[:6]
    assert grid.x[0] == 500005
    assert grid.y[0] == 5099995


def test_an_edge_on_the_lattice_stays_on_it_and_phases_hold():
    grid = Grid.around(box(500000, 5099940, 500120, 5100060), crs="EPSG:32633", resolution_m=120, phase_m=(60, 20))
    assert (grid.left - 60) % 120 == 0
    assert (grid.top - 20) % 120 == 0
    assert grid.window((1, 2), (0, 1)).top == grid.top - 120
    assert grid.padded(3).padded(-3) == grid
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_shards_cover_the_grid():
    grid = Grid("EPSG:32633", 10.0, (0.0, 0.0), 0, 0, 130, 65, shard_px=64)
    assert list(grid.shards()) == [(i, j) for i in range(3) for j in range(2)]


@pytest.mark.parametrize(
    ("lon", "lat", "code"),
    [
        (15, 46, 32633),
        (5, 60, 32632),
        (9, 78, 32633),
        (180, 65, 32601),
        (-179.9, 65, 32601),
        (170.5, -43, 32759),
        (539, 10, 32660),
    ],
)
def test_utm_zones(lon, lat, code):
    assert utm_crs(lon, lat) == f"EPSG:{code}"


@pytest.mark.parametrize(
    ("crs", "said"), [("EPSG:4326", "geographic"), ("EPSG:99999", "no known CRS"), ("EPSG:2263", "metres")]
)
def test_a_crs_that_cannot_serve(crs, said):
    with pytest.raises(ConfigError, match=said):
        projected_crs(crs)


def test_a_box_across_the_antimeridian():
    region = region_of(Area(bbox=(179.5, 65.0, -179.5, 66.0)))
    assert region.centre == (180.0, 65.5)
    west, south, east, north = region.lonlat_bounds(5000)
    assert 179 < west < 179.5
    assert -179.5 < east < -179
    grid = region.grid(GridSpec(resolution_m=120), [], ["red"])
    assert grid.crs == "EPSG:32601"
    assert 350 < grid.width < 450
    assert (south, north) == pytest.approx((64.955, 66.045), abs=1e-3)


def test_a_polygon_file_split_at_180_and_its_outside(tmp_path):
    rings = [[[179.9, 65], [180, 65], [180, 65.1], [179.9, 65]]], [[[-180, 65], [-179.9, 65], [-180, 65.1], [-180, 65]]]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "MultiPolygon", "coordinates": rings}))
    region = region_of(Area(geojson=tmp_path / "a.geojson"))
    assert region.geometry.bounds == pytest.approx((179.9, 65, 180.1, 65.1))
    grid = region.grid(GridSpec(resolution_m=100), [], ["red"])
    drawn = region.inside(grid)
    assert drawn is not None
    inside = np.unpackbits(drawn, axis=1, count=grid.width)
    assert 0.4 < inside.mean() < 0.6


def test_a_polygon_is_drawn_once_in_strips_as_it_would_be_at_once(tmp_path, monkeypatch):
    """The periods of a series share it, though each search makes its region anew."""
    angles = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    radius = 0.03 * (1 + 0.4 * np.random.default_rng(0).random(300))
    ring = np.stack([15 + radius * np.cos(angles), 46 + radius * np.sin(angles)], axis=1)
    shape = {"type": "Polygon", "coordinates": [[*ring.tolist(), ring[0].tolist()]]}
    (tmp_path / "a.geojson").write_text(json.dumps(shape))
    monkeypatch.setattr("pipeline.region.STRIP_ROWS", 37)
    one, other = (region_of(Area(geojson=tmp_path / "a.geojson")) for _ in range(2))
    grid = one.grid(GridSpec(), [], ["red"])
    drawn = one.inside(grid)
    assert drawn is other.inside(grid)
    at_once = geometry_mask([one.project(grid.crs)], grid.shape, grid.transform, invert=True)
    assert 0.5 < at_once.mean() < 0.9
    np.testing.assert_array_equal(np.unpackbits(drawn, axis=1, count=grid.width), at_once)
    assert drawn is not one.inside(grid.padded(1))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no file"),
        ("{", "not GeoJSON"),
        ('{"type": "Point", "coordinates": [1, 2]}', "'Point'"),
        ('{"type": "Polygon", "coordinates": [[[5e5, 5e6], [6e5, 5e6], [6e5, 6e6], [5e5, 5e6]]]}', "not degrees"),
        ('{"type": "Feature", "properties": {}, "geometry": null}', "no polygon with an area"),
        ('{"type": "FeatureCollection"}', "holds no geometry that can be read"),
        ('{"type": "Polygon", "coordinates": [1, 2]}', "holds no geometry that can be read"),
        ('{"type": "Polygon", "coordinates": [[[15, 46], [16, null], [16, 47], [15, 46]]]}', "holds no geometry"),
    ],
)
def test_a_polygon_file_that_cannot_serve(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.geojson").write_text(content)
    with pytest.raises(ConfigError, match=said):
        region_of(Area(geojson=tmp_path / "a.geojson"))


def test_an_mgrs_tile_lies_square_in_its_zone():
    grid = region_of(Area(mgrs="33TWM")).grid(GridSpec(), [], ["red"])
    assert grid.bounds == (499980, 5090220, 609780, 5200020)
    assert grid.shape == (10980, 10980)


def _item(tile: str, left: float, top: float, crs: str = "EPSG:32633") -> Item:
    asset = Asset("x.tif", crs, (10, 10), (120.0, 0.0, left, 0.0, -120.0, top))
    return Item(
        tile,
        "2023-08-01T10:00:00Z",
        "c",
        None,
        tile,
        None,
        None,
        None,
        None,
        None,
        None,
        (0, 0, 1, 1),
        {},
        {"red": asset},
    )


def test_the_lattice_is_that_of_most_items_ties_to_the_lowest_tile():
    wl, wm, other = _item("33TWL", 499980, 5100000), _item("33TWM", 499980, 5200020), _item("32TXX", 7, 7, "EPSG:32632")
    assert lattice_phase([wm, wl, other, other, other], ["red"], "EPSG:32633", 120) == (499980 % 120, 0)
    assert lattice_phase([wm, wl, replace(wm, id="b")], ["red"], "EPSG:32633", 120) == (499980 % 120, 5200020 % 120)
    assert lattice_phase([other], ["red"], "EPSG:32633", 120) == (0.0, 0.0)


def test_bounds_in_degrees_wrap():
    grid = Grid("EPSG:32601", 100.0, (0.0, 0.0), -72000, 2700, 100, 1000)
    west, south, east, north = grid.lonlat_bounds()
    assert west > 0 > east
    assert north > south
    assert np.isclose((east - west) % 360, 2.2, atol=0.3)
