"""Every catalog's spelling becomes the same ``Item``; what the metadata say is handed on, not judged."""

import json

import pytest
from catalog_samples import cdse, changed, dea, deafrica, earth_search, hls, planetary_computer
from pyproj import CRS
from shapely.geometry import shape

from pipeline.errors import ItemError
from pipeline.footprints import bbox_polygon, cut_at_180, footprint
from pipeline.items import Item
from pipeline.normalise import normalise, resolve_href, without_credentials
from pipeline.profiles import MaskRule, Profile, load_profile

EARTH_SEARCH = load_profile("earth-search")
TILE = (10980, 10980)


def test_earth_search_keeps_both_sides_of_the_contradiction():
    item = normalise(earth_search(), EARTH_SEARCH)
    assert item.boa_offset_applied is True
    assert item.assets["blue"].offset == -0.1
    assert item.baseline == "05.09"
    assert item.offset_dn is None  # the scout decides, not the catalog
    assert (item.platform, item.tile, item.orbit) == ("sentinel-2a", "33TWM", 79)
    assert item.datatake == "S2A_20230815T095031"
    assert item.assets["blue"].href.endswith("/B02.tif")  # never the requester-pays twin
    assert item.assets["swir16"].shape == (5490, 5490)
    assert item.assets["scl"].scale == 1.0
    assert item.assets["scl"].offset is None


@pytest.mark.parametrize(("said", "heard"), [(False, False), ("true", True), ("false", False), (None, None)])
def test_the_flag_is_heard_as_said(said, heard):
    item = normalise(changed(earth_search(), earthsearch__boa_offset_applied=said), EARTH_SEARCH)
    assert item.boa_offset_applied is heard


def test_planetary_computer_says_nothing_of_offsets_and_loses_its_token():
    item = normalise(planetary_computer(), load_profile("planetary-computer"))
    blue = item.assets["blue"]
    assert (blue.scale, blue.offset, blue.nodata) == (1e-4, None, 0.0)
    assert (item.baseline, item.boa_offset_applied) == ("05.09", None)
    assert (item.platform, item.tile, item.orbit) == ("sentinel-2a", "33TWM", 79)
    assert item.datatake == "S2A_20230815T095031"
    assert item.created == "2023-08-15T19:30:58.000Z"
    assert item.assets["SCL"].shape == (5490, 5490)
    assert "sig" not in json.dumps(item.to_dict())
    assert blue.href.endswith("_B02_10m.tif")


def test_cdse_stac_1_1():
    item = normalise(cdse(), load_profile("cdse"))
    blue = item.assets["blue"]
    assert blue.href.startswith("s3://eodata/")
    assert "B02_10m" in blue.href
    assert (blue.scale, blue.offset, blue.crs, blue.shape) == (1e-4, -0.1, "EPSG:32633", TILE)
    assert (item.assets["SCL_20m"].scale, item.assets["SCL_20m"].offset) == (1.0, None)
    assert (item.baseline, item.tile, item.orbit, item.platform) == ("05.11", "33TWM", 79, "sentinel-2b")
    assert item.datatake == "S2B_20240812T095029"
    bare = cdse()
    for key in ("processing:version", "grid:code", "sat:relative_orbit", "platform", "eopf:datatake_id"):
        del bare["properties"][key]
    told_by_id = normalise(bare, load_profile("cdse"))
    for name in ("baseline", "tile", "orbit", "platform", "datatake"):
        assert getattr(told_by_id, name) == getattr(item, name), name


def test_cdse_over_https_where_the_profile_prefers_it():
    profile = load_profile("cdse").model_copy(update={"prefer": ("https", "s3")})
    assert normalise(cdse(), profile).assets["blue"].href.startswith("https://download.")


def test_hls_is_placed_by_its_tile():
    item = normalise(hls(), load_profile("hls"))
    red = item.assets["red"]
    assert (red.crs, red.shape) == ("EPSG:32633", (3660, 3660))
    assert red.transform == (30.0, 0.0, 499980.0, 0.0, -30.0, 5200020.0)
    assert (red.nodata, red.scale) == (-9999.0, 1e-4)
    assert item.datetime == "2023-08-15T09:57:57.401000Z"
    assert item.tile == "33TWM"


@pytest.mark.parametrize(
    ("sample", "name", "crs", "tile"),
    [(dea, "dea", "EPSG:32756", "56JLQ"), (deafrica, "deafrica", "EPSG:32736", "36MZC")],
)
def test_projection_at_item_level_with_overrides(sample, name, crs, tile):
    profile = load_profile(name)
    item = normalise(sample(), profile)
    red, cloud = item.assets["red"], item.assets[profile.mask.asset]
    assert (red.crs, red.shape, len(red.transform), item.tile) == (crs, TILE, 6, tile)
    assert cloud.shape == (5490, 5490)
    assert cloud.transform[0] == 20.0
    assert red.nodata == (-999.0 if name == "dea" else 0.0)
    assert cloud.nodata is None  # the raster's own no data is the mask rule's matter


LAEA = CRS.from_proj4("+proj=laea +lat_0=50.72 +lon_0=-3.51 +datum=WGS84 +units=m")


@pytest.mark.parametrize(
    ("fields", "crs"),
    [
        ({"proj:epsg": 32633}, "EPSG:32633"),
        ({"proj:code": "EPSG:32633"}, "EPSG:32633"),
        ({"proj:epsg": None, "proj:code": None, "proj:wkt2": CRS(32633).to_wkt()}, "EPSG:32633"),
        ({"proj:projjson": CRS(32633).to_json_dict()}, "EPSG:32633"),
        ({"proj:code": None, "proj:wkt2": LAEA.to_wkt()}, None),
    ],
)
@pytest.mark.parametrize("level", ["item", "asset"])
def test_every_spelling_of_a_crs_at_both_levels(fields, crs, level):
    raw = earth_search()
    del raw["properties"]["proj:epsg"]
    for holder in [raw["properties"]] if level == "item" else raw["assets"].values():
        holder.update(fields)
    found = normalise(raw, EARTH_SEARCH).assets["red"].crs
    assert found == crs if crs else CRS(found) == LAEA


def test_asset_projection_beats_the_items():
    raw = earth_search()
    raw["assets"]["red"]["proj:code"] = "EPSG:3035"
    item = normalise(raw, EARTH_SEARCH)
    assert item.assets["red"].crs == "EPSG:3035"
    assert item.assets["blue"].crs == "EPSG:32633"


@pytest.mark.parametrize("field", ["proj:epsg", "proj:shape", "proj:transform"])
def test_an_item_without_projection_is_refused_by_name(field):
    raw = earth_search()
    for holder in (raw["properties"], *raw["assets"].values()):
        holder.pop(field, None)
    with pytest.raises(ItemError) as error:
        normalise(raw, EARTH_SEARCH)
    said = str(error.value)
    assert "S2A_33TWM_20230815_0_L2A" in said
    assert ("proj:code" if field == "proj:epsg" else field) in said
    assert "add the field" in said


@pytest.mark.parametrize(
    "fields",
    [
        {"proj:transform": [10, 0, 499980]},
        {"proj:transform": [0, 0, 499980, 0, 0, 5200020]},
        {"proj:shape": [10980]},
        {"proj:shape": [0, 10980]},
        {"proj:code": "EPSG:999999"},
    ],
)
def test_broken_projection_is_refused_with_its_value(fields):
    raw = earth_search()
    raw["assets"]["red"].update(fields)
    (value,) = fields.values()
    with pytest.raises(ItemError, match="red") as error:
        normalise(raw, EARTH_SEARCH)
    assert str(value) in str(error.value)
    assert "red" not in normalise(raw, EARTH_SEARCH, bands=["blue"]).assets  # a band not asked for does no harm


@pytest.mark.parametrize(
    "spelling",
    [
        {"raster:bands": [{"scale": 0.0002, "offset": -0.2, "nodata": 7}]},
        {"raster:scale": 0.0002, "raster:offset": -0.2, "nodata": 7},
        {"bands": [{"name": "B04", "raster:scale": 0.0002, "raster:offset": -0.2, "nodata": 7}]},
    ],
)
def test_scale_offset_and_nodata_in_every_spelling(spelling):
    raw = earth_search()
    del raw["assets"]["red"]["raster:bands"]
    raw["assets"]["red"].update(spelling)
    red = normalise(raw, EARTH_SEARCH).assets["red"]
    assert (red.scale, red.offset, red.nodata) == (0.0002, -0.2, 7.0)


def test_an_explicit_offset_of_zero_is_not_silence():
    raw = earth_search()
    raw["assets"]["red"]["raster:bands"] = [{"offset": 0}]
    assert normalise(raw, EARTH_SEARCH).assets["red"].offset == 0.0


@pytest.mark.parametrize(
    ("href", "base", "absolute"),
    [
        ("./red.tif", "https://x.org/a/item.json", "https://x.org/a/red.tif"),
        ("../red.tif", "/data/a/item.json", "/data/red.tif"),
        ("red.tif", "s3://bucket/a/item.json", "s3://bucket/a/red.tif"),
        ("s3://b/red.tif", "/data/item.json", "s3://b/red.tif"),
        ("/abs/red.tif", "/data/item.json", "/abs/red.tif"),
        ("file:///abs/red.tif", None, "/abs/red.tif"),
        ("file:///abs/with%20blank.tif", None, "/abs/with blank.tif"),
    ],
)
def test_relative_hrefs(href, base, absolute):
    assert resolve_href(href, base) == absolute


def test_a_relative_href_without_base_is_refused():
    raw = earth_search()
    raw["assets"]["red"]["href"] = "./red.tif"
    with pytest.raises(ItemError, match=r"\./red\.tif.*relative"):
        normalise(raw, EARTH_SEARCH)


def test_requester_pays_is_kept_and_avoided_where_free():
    raw = earth_search()
    raw["properties"]["storage:schemes"] = {"paid": {"requester_pays": True}}
    raw["assets"]["red"].update({"href": "s3://paid/red.tif", "storage:refs": ["paid"]})
    raw["assets"]["blue"].update({"href": "s3://paid/blue.tif", "storage:requester_pays": True})
    raw["assets"]["blue"]["alternate"] = {"https": {"href": "https://free.org/blue.tif"}}
    profile = EARTH_SEARCH.model_copy(update={"prefer": ("s3", "https")})
    item = normalise(raw, profile)
    assert item.assets["red"].requester_pays
    assert (item.assets["blue"].href, item.assets["blue"].requester_pays) == (
        "https://free.org/blue.tif",
        False,
    )


@pytest.mark.parametrize(
    ("href", "clean"),
    [
        ("https://me:pw@x.org/a.tif", "https://x.org/a.tif"),
        ("https://x.org/a.tif?X-Amz-Signature=1&b=2", "https://x.org/a.tif"),
        ("https://x.org/a.tif?version=3", "https://x.org/a.tif?version=3"),
    ],
)
def test_credentials_go_and_harmless_queries_stay(href, clean):
    assert without_credentials(href) == clean


def test_absolute_orbit_tells_the_relative_one():
    raw = earth_search()
    for key in ("s2:product_uri", "s2:datatake_id"):
        del raw["properties"][key]
    raw["properties"]["s2:granule_id"] = "S2A_OPER_MSI_L2A_TL_2APS_20230815T155057_A042547_T33TWM_N05.09"
    assert normalise(raw, EARTH_SEARCH).orbit == 79
    raw["properties"]["platform"] = "sentinel-2b"
    raw["properties"]["s2:granule_id"] = "S2B_OPER_MSI_L2A_TL_2BPS_20230810T130104_A033567_T33TWM_N05.09"
    assert normalise(raw, EARTH_SEARCH).orbit == 79


def test_one_digit_zones_get_their_zero():
    assert normalise(changed(earth_search(), grid__code="MGRS-1WCR"), EARTH_SEARCH).tile == "01WCR"


@pytest.mark.parametrize("text", [None, "yesterday"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(ItemError, match=r"S2A_33TWM.*datetime"):
        normalise(changed(earth_search(), datetime=text), EARTH_SEARCH)


def test_masks_asked_for_and_alternatives_are_kept():
    raw = earth_search()
    raw["assets"]["clm"] = {**raw["assets"]["scl"], "href": "https://x.org/clm.tif"}
    rule = MaskRule(kind="classes", asset="clm", cloud=(1,))
    assert set(normalise(raw, EARTH_SEARCH, bands=["red"], masks=[rule]).assets) == {"red", "scl", "clm"}
    assert set(normalise(raw, load_profile("generic"), bands=["red"]).assets) == {"red", "scl", "clm"}


def test_items_survive_json():
    for sample, name in ((earth_search, "earth-search"), (hls, "hls"), (cdse, "cdse"), (dea, "dea")):
        item = normalise(sample(), load_profile(name))
        assert Item.from_dict(json.loads(json.dumps(item.to_dict()))) == item


def test_normalising_does_not_touch_the_item():
    raw = earth_search()
    normalise(raw, EARTH_SEARCH)
    assert raw == earth_search()


# -- footprints across 180 degrees ---


def _ring(*lons: float) -> dict:
    west, east = lons
    corners = [[west, 60], [east, 60], [east, 61], [west, 61], [west, 60]]
    return {"type": "Polygon", "coordinates": [corners]}


@pytest.mark.parametrize(
    "geometry",
    [
        _ring(179, -179),  # jumps
        _ring(179, 181),  # reaches beyond
        _ring(-181, -179),
        {
            "type": "MultiPolygon",
            "coordinates": [_ring(179, 180)["coordinates"], _ring(-180, -179)["coordinates"]],
        },
    ],
)
def test_every_spelling_of_a_footprint_across_180(geometry):
    place = cut_at_180(shape(geometry))
    assert place.area == pytest.approx(2.0)
    assert place.bounds == (-180.0, 60.0, 180.0, 61.0)
    assert place.equals(bbox_polygon((179, 60, -179, 61)))
    item = normalise(changed(earth_search(), geometry=geometry, bbox=None), EARTH_SEARCH)
    assert item.bbox == pytest.approx((179, 60, -179, 61))


def test_without_geometry_the_box_is_the_footprint():
    raw = changed(earth_search(), geometry=None, bbox=[179, 60, 0, -179, 61, 100])
    assert footprint(raw).area == pytest.approx(2.0)
    item = normalise(raw, EARTH_SEARCH)
    assert item.bbox == (179.0, 60.0, -179.0, 61.0)
    assert shape(item.geometry).area == pytest.approx(2.0)
    with pytest.raises(ItemError, match="neither geometry nor bbox"):
        footprint(changed(raw, bbox=None))


def test_a_profile_can_be_all_new():
    profile = Profile(name="mine", bands={"red": ("Rot",)}, scale=0.001, nodata=None)
    raw = earth_search()
    raw["assets"] = {
        "ROT": {
            "href": "https://x.org/rot.tif",
            **{k: raw["assets"]["red"][k] for k in ("proj:shape", "proj:transform")},
        }
    }
    red = normalise(raw, profile).assets["red"]
    assert (red.scale, red.nodata, red.href) == (0.001, None, "https://x.org/rot.tif")
