"""The demo's scenes: real COGs, items in Earth Search's shape, contradictory offsets, tiles of one ground."""

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from pystac_client import Client
from shapely.geometry import shape

from pipeline.bands import to_reflectance
from pipeline.errors import ConfigError
from pipeline.phenology import SceneParams
from pipeline.scenes import DemoScenes, demo_region, served_items, write_demo, write_scenes
from pipeline.serve import RangeServer, StacServer

BANDS = ("blue", "red", "nir", "swir16")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoScenes:
    return write_demo(tmp_path_factory.mktemp("demo"), seed=0, bands=BANDS)


@pytest.fixture(scope="module")
def features(demo: DemoScenes) -> dict[str, dict[str, Any]]:
    return {feature["id"]: feature for feature in json.loads(demo.items.read_text())["features"]}


def pixels(demo: DemoScenes, feature: dict[str, Any], asset: str) -> np.ndarray:
    with rasterio.open(demo.root / feature["assets"][asset]["href"]) as source:
        return source.read(1)


def keys(value: Any, path: str = "") -> set[str]:
    """Every key path of a JSON tree, list entries merged."""
    if isinstance(value, dict):
        return {p for key, inner in value.items() for p in {f"{path}/{key}"} | keys(inner, f"{path}/{key}")}
    if isinstance(value, list):
        return {p for inner in value for p in keys(inner, f"{path}[]")}
    return set()


def test_what_the_demo_holds(demo: DemoScenes, features: dict[str, dict[str, Any]]) -> None:
    days = {feature["properties"]["datetime"][:10] for feature in features.values()}
    baselines = {feature["properties"]["s2:processing_baseline"] for feature in features.values()}
    assert demo.n_items == len(features) == 33
    assert len(days) == 16
    assert 55 <= (demo.end - demo.start).days <= 62
    assert baselines == {"03.00", "03.01", "05.00"}
    assert {feature["properties"]["grid:code"] for feature in features.values()} == {
        "MGRS-33TWL",
        "MGRS-33TWM",
    }
    size = sum(path.stat().st_size for path in demo.root.rglob("*") if path.is_file())
    assert size < 160e6


def test_item_has_earth_searchs_shape(features: dict[str, dict[str, Any]]) -> None:
    folder = os.environ.get("CLOUDGATE_DATA")
    if not folder:
        pytest.skip("CLOUDGATE_DATA is not set: no original item to compare with")
    source = next(Path(folder).glob("zagreb_graz_2tiles_120m/s2/S2A_33TWL_20230815*/source-item.json"))
    original = json.loads(source.read_text())
    ours = features["S2A_33TWL_20210716_1_L2A"]
    # links to catalog and parent are written by whatever API serves the item
    without = [{k: v for k, v in item.items() if k != "links"} for item in (original, ours)]
    assert keys(without[0]) == keys(without[1])
    assert list(original) == list(ours) or set(original) == set(ours)
    assert list(original["properties"]) == list(ours["properties"])
    assert list(original["assets"]) == list(ours["assets"])
    for name, asset in original["assets"].items():
        same = {k: v for k, v in asset.items() if k not in ("href", "proj:shape")}
        mine = {k: v for k, v in ours["assets"][name].items() if k not in ("href", "proj:shape")}
        assert same == mine, name
    for name, value in original["properties"].items():
        assert isinstance(ours["properties"][name], int | float if isinstance(value, int | float) else type(value))


def test_items_are_valid_stac(features: dict[str, dict[str, Any]]) -> None:
    for feature in features.values():
        item = pystac.Item.from_dict(feature)
        assert shape(item.geometry).is_valid
        assert item.bbox is not None
        np.testing.assert_allclose(shape(item.geometry).bounds, item.bbox)
        assert 14.9 < item.bbox[0] < item.bbox[2] < 15.2
        assert 45.9 < item.bbox[1] < item.bbox[3] < 46.2


def test_cogs_match_their_items(demo: DemoScenes, features: dict[str, dict[str, Any]]) -> None:
    feature = features["S2B_33TWL_20210704_0_L2A"]
    for name, metres, dtype in (("blue", 10, "uint16"), ("swir16", 20, "uint16"), ("scl", 20, "uint8")):
        asset = feature["assets"][name]
        with rasterio.open(demo.root / asset["href"]) as source:
            assert source.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert source.profile["compress"] == "deflate"
            assert source.overviews(1)
            assert source.nodata == 0
            assert source.dtypes[0] == dtype
            assert list(source.shape) == asset["proj:shape"]
            assert [*source.transform][:6] == asset["proj:transform"]
            assert source.crs.to_epsg() == feature["properties"]["proj:epsg"]
            assert source.transform.a == metres


def test_tiles_show_the_same_ground(demo: DemoScenes, features: dict[str, dict[str, Any]]) -> None:
    north, south = features["S2A_33TWM_20210619_0_L2A"], features["S2A_33TWL_20210619_0_L2A"]
    np.testing.assert_array_equal(pixels(demo, north, "red")[400:], pixels(demo, south, "red")[:112])
    np.testing.assert_array_equal(pixels(demo, north, "scl")[200:], pixels(demo, south, "scl")[:56])
    assert north["properties"]["s2:datatake_id"] == south["properties"]["s2:datatake_id"]
    assert north["properties"]["datetime"] < south["properties"]["datetime"]
    tops = {north["assets"]["red"]["proj:transform"][5], south["assets"]["red"]["proj:transform"][5]}
    assert all((5_200_020 - top) % 20 == 0 and (5_100_000 - top) % 20 == 0 for top in tops)


@pytest.mark.parametrize(
    ("scene", "flag", "offset", "shift"),
    [
        ("S2B_33TWL_20210704_0_L2A", False, 0, 0),  # 03.01: no offset anywhere
        ("S2A_33TWL_20210726_1_L2A", True, -0.1, 0),  # harmonised, yet metadata give the offset again
        ("S2A_33TWL_20210629_1_L2A", False, -0.1, 1000),  # true metadata
        ("S2B_33TWL_20210714_1_L2A", False, -0.1, 0),  # flag denies what was done
    ],
)
def test_offsets(
    demo: DemoScenes, features: dict[str, dict[str, Any]], scene: str, flag: bool, offset: float, shift: int
) -> None:
    feature = features[scene]
    assert feature["properties"]["earthsearch:boa_offset_applied"] is flag
    assert feature["assets"]["red"]["raster:bands"][0]["offset"] == offset
    region = demo_region(0)
    day = (date.fromisoformat(feature["properties"]["datetime"][:10]) - date(1970, 1, 1)).days
    index = next(k for k, a in enumerate(region.acquisitions) if a.day == day)
    seen = region.observe(index, ("red",)).reflectance["red"][400:]
    dn = pixels(demo, feature, "red").astype(float)
    assert np.nanmedian(dn - shift - seen * 1e4) == pytest.approx(0, abs=6)
    dark = np.percentile(dn[dn > 0], 1)
    assert (dark >= 900) == (shift == 1000)  # the pixel check can tell them apart


def test_duplicate_swath_and_white_scene(demo: DemoScenes, features: dict[str, dict[str, Any]]) -> None:
    first, second = features["S2B_33TWM_20210711_0_L2A"], features["S2B_33TWM_20210711_1_L2A"]
    takes = [f["properties"]["s2:datatake_id"].rpartition("_N")[0] for f in (first, second)]
    assert takes[0] == takes[1]
    assert first["properties"]["datetime"] == second["properties"]["datetime"]
    assert first["properties"]["s2:processing_baseline"] < second["properties"]["s2:processing_baseline"]
    assert first["properties"]["created"] < second["properties"]["created"]

    edge = pixels(demo, first, "red") == 0
    assert 0.02 < edge.mean() < 0.5
    assert first["properties"]["s2:nodata_pixel_percentage"] == pytest.approx(100 * edge.mean(), abs=0.5)
    corner = features["S2A_33TWM_20210619_0_L2A"]
    ratio = shape(first["geometry"]).area / shape(corner["geometry"]).area
    assert ratio == pytest.approx(1 - edge.mean(), abs=0.01)

    white = features["S2A_33TWL_20210709_1_L2A"]
    assert white["properties"]["eo:cloud_cover"] < 2
    assert np.percentile(pixels(demo, white, "red"), 5) > 4000


def test_truth_fits_what_was_seen(demo: DemoScenes, features: dict[str, dict[str, Any]]) -> None:
    def truth(path: str) -> np.ndarray:
        with rasterio.open(demo.truth / path) as source:
            assert source.shape in (demo.size_px, tuple(side // 2 for side in demo.size_px))
            assert (source.transform.c, source.transform.f) == (demo.west_m, demo.north_m)
            return source.read(1)

    assert json.loads((demo.truth / "truth.json").read_text())["target"] == demo.target.isoformat()
    state = truth(f"state/{demo.target}.tif")[400:]
    seen = pixels(demo, features["S2B_33TWL_20210711_0_L2A"], "red").astype(float) * 1e-4
    surface = to_reflectance(truth("surface/red.tif"))[400:]
    look = to_reflectance(truth("clear_look/red.tif"))[400:]
    clear = state == 0
    assert set(np.unique(state)) == {0, 1, 2, 255}
    # haze below the truth's cloud threshold remains in what was seen
    assert np.median(np.abs(seen - look)[clear]) < 2e-4
    assert np.median(np.abs(seen - surface)[clear]) < 0.012
    assert np.abs(seen - look)[state == 1].mean() > 0.2
    assert (seen[state == 255] == 0).all()
    assert len(list((demo.truth / "state").glob("*.tif"))) == 16


def test_search_and_read_through_the_servers(demo: DemoScenes, tmp_path: Path) -> None:
    with RangeServer(demo.root) as files:
        path = tmp_path / "served.json"
        path.write_text(json.dumps(served_items(demo.items, files.url)))
        with StacServer(path) as stac:
            found = list(
                Client.open(stac.url)
                .search(
                    collections=["sentinel-2-l2a"],
                    bbox=demo.bbox,
                    datetime="2021-07-01/2021-07-12",
                    method="POST",
                )
                .items()
            )
            assert len(found) == 9
            href = found[0].assets["nir"].href
            assert href.startswith(files.url)
            with rasterio.open(href) as far:
                near = demo.root / href.removeprefix(files.url + "/")
                with rasterio.open(near) as source:
                    np.testing.assert_array_equal(far.read(1), source.read(1))
    assert not any("://127" in line for line in demo.items.read_text().splitlines())


def test_write_scenes_is_reproducible(tmp_path: Path) -> None:
    params = SceneParams(width_px=256, height_px=192, n_dates=2, north_m=5100000.0)
    made = [write_scenes(tmp_path / name, params=params, seed=4, bands=("red", "swir22")) for name in "ab"]
    first, second = (sorted(path.parent.rglob("*.tif")) for path in made)
    assert len(first) == 6
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with pytest.raises(ConfigError, match="b99"):
        write_scenes(tmp_path / "c", params=params, bands=("b99",))
