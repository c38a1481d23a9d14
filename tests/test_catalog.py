"""From a request to frozen items: real files, real servers on loopback, nothing patched."""

import json
import os
import threading
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from catalog_samples import (
    cdse,
    changed,
    dea,
    deafrica,
    earth_search,
    hls,
    moved,
    planetary_computer,
    polygon,
)

from pipeline.catalog import centre_longitude, digest, load_items, save_items, search
from pipeline.errors import CatalogError, ConfigError, ItemError, NoItemsError, RequestError
from pipeline.items import solar_day
from pipeline.normalise import normalise
from pipeline.profiles import MaskRule, load_profile
from pipeline.selection import deduplicate, detect_profile
from pipeline.serve import StacServer

BOX = (15.2, 46.1, 15.4, 46.3)
AUGUST = {"bbox": BOX, "start": date(2023, 8, 1), "end": date(2023, 8, 31)}


def collection_file(path: Path, *items: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(items)}))
    return str(path)


def day(number: int, **changes) -> dict:
    """An Earth Search item of a day in August 2023."""
    text = f"202308{number:02d}"
    uri = f"S2A_MSIL2A_{text}T095031_N0509_R079_T33TWM_{text}T155057.SAFE"
    return changed(
        earth_search(),
        **{
            "id": f"S2A_33TWM_{text}_0_L2A",
            "datetime": f"2023-08-{number:02d}T09:57:57.401000Z",
            "s2__product_uri": uri,
            "s2__datatake_id": f"GS2A_{text}T095031_042547_N05.09",
            **changes,
        },
    )


def ids(result) -> list[str]:
    return [item.id for item in result.items]


# -- files ---


@pytest.mark.parametrize("form", ["items", "folder of a collection", "catalog", "folder", "loose items"])
def test_every_kind_of_file_gives_the_same_items(tmp_path, form):
    days = [day(n) for n in (5, 10, 15)]
    for item in days:
        for asset in item["assets"].values():
            asset["href"] = "./" + asset["href"].rsplit("/", 1)[1]
    if form in ("items", "folder of a collection"):
        where = collection_file(tmp_path / "items.geojson", *days)
        where = where if form == "items" else str(tmp_path)
        folder = [tmp_path] * 3
    elif form == "loose items":
        for item in days:
            (tmp_path / f"{item['id']}.json").write_text(json.dumps(item))
        where, folder = str(tmp_path), [tmp_path] * 3
    else:
        child = tmp_path / "s2" / "collection.json"
        folder = [child.parent / item["id"] for item in days]
        for item, at in zip(days, folder, strict=True):
            at.mkdir(parents=True)
            (at / "item.json").write_text(json.dumps(item))
        links = [{"rel": "item", "href": f"./{item['id']}/item.json"} for item in days]
        links.append({"rel": "root", "href": "../catalog.json"})
        child.write_text(json.dumps({"type": "Collection", "id": "s2", "links": links}))
        root = {"type": "Catalog", "id": "c", "links": [{"rel": "child", "href": "./s2/collection.json"}]}
        (tmp_path / "catalog.json").write_text(json.dumps(root))
        where = str(tmp_path / "catalog.json") if form == "catalog" else str(tmp_path)
    result = search(catalog=where, **AUGUST)
    assert ids(result) == [item["id"] for item in days]
    assert [item.assets["red"].href for item in result.items] == [str(at / "B04.tif") for at in folder]
    assert (result.profile_ref, result.mask.asset) == ("earth-search", "scl")


def test_solar_days_are_inclusive_and_cut_at_the_areas_centre(tmp_path):
    item = moved(changed(day(15), datetime="2023-08-15T23:30:00Z"), 170.0, -45.0, 171.0, -44.0)
    where = collection_file(tmp_path / "items.json", item)
    box = (170.2, -44.8, 170.6, -44.4)
    assert solar_day(normalise(item, load_profile("earth-search")).when, centre_longitude(box)) == 19585
    only = {"catalog": where, "bbox": box}
    assert ids(search(**only, start=date(2023, 8, 16), end=date(2023, 8, 16))) == [item["id"]]
    for other in (15, 17):
        with pytest.raises(NoItemsError):
            search(**only, start=date(2023, 8, other), end=date(2023, 8, other))


def test_cloud_cover_area_and_polygon_filter(tmp_path):
    cloudy = day(5, eo__cloud_cover=80.0)
    silent = day(6)
    del silent["properties"]["eo:cloud_cover"]
    beside = moved(day(7), 16.0, 46.0, 17.0, 47.0)
    touching = moved(day(8), 15.4, 46.0, 17.0, 47.0)
    where = collection_file(tmp_path / "items.json", cloudy, silent, day(10), beside, touching)
    assert ids(search(catalog=where, **AUGUST)) == [i["id"] for i in (cloudy, silent, day(10))]
    few = search(catalog=where, max_cloud_cover=20, **AUGUST)
    assert ids(few) == [silent["id"], day(10)["id"]]
    wide = {**AUGUST, "bbox": (15.2, 46.1, 16.9, 46.3)}
    there = polygon(16.5, 46.1, 16.8, 46.3)
    assert ids(search(catalog=where, geometry=there, **wide)) == [beside["id"], touching["id"]]


def test_an_area_across_180_degrees_finds_both_sides(tmp_path):
    west = moved(day(5), 178.0, 60.0, 179.5, 61.0)
    east = moved(day(6), -179.9, 60.0, -178.0, 61.0)
    across = changed(day(7), bbox=[179.0, 60.0, -179.0, 61.0], geometry=polygon(179.0, 60.0, 181.0, 61.0))
    far = moved(day(8), 0.0, 60.0, 1.0, 61.0)
    where = collection_file(tmp_path / "items.json", west, east, across, far)
    result = search(catalog=where, **{**AUGUST, "bbox": (179.2, 60.2, -179.5, 60.8)})
    assert ids(result) == [i["id"] for i in (west, east, across)]
    assert result.longitude == pytest.approx(179.85)


# -- duplicates ---


def _twins(*items: dict) -> tuple[list[str], list[tuple[str, str]]]:
    kept, dropped = deduplicate([normalise(item, load_profile("earth-search")) for item in items])
    return [item.id for item in kept], dropped


def test_the_highest_baseline_stays_as_a_number():
    kept, dropped = _twins(
        day(15, id="old", s2__processing_baseline="04.00", created="2024-01-01T00:00:00Z"),
        day(15, id="new", s2__processing_baseline="05.10"),
        day(15, id="older", s2__processing_baseline="05.9", created="2025-01-01T00:00:00Z"),
    )
    assert kept == ["new"]
    assert dropped == [
        ("old", "duplicate of new: baseline 04.00 < 05.10"),
        ("older", "duplicate of new: baseline 05.09 < 05.10"),
    ]


def test_then_the_newest_stays_even_across_the_edge_of_a_second():
    kept, dropped = _twins(
        day(15, id="a", created="2023-09-01T00:00:00Z", datetime="2023-08-15T09:57:57.998Z"),
        day(15, id="b", created="2023-08-20T00:00:00Z", datetime="2023-08-15T09:57:58.001Z"),
    )
    assert kept == ["a"]
    assert dropped[0][0] == "b"
    assert "before 2023-09-01" in dropped[0][1]


def test_split_datastrips_and_other_tiles_platforms_and_times_stay():
    north = moved(day(15, id="north"), 15.0, 46.45, 16.4, 46.92)
    south = moved(day(15, id="south"), 15.0, 45.93, 16.4, 46.50)
    others = [
        day(15, id="other tile", grid__code="MGRS-33TWL"),
        day(15, id="other satellite", platform="sentinel-2b"),
        day(15, id="later", datetime="2023-08-15T11:38:00Z"),
    ]
    kept, dropped = _twins(north, south, *others)
    assert sorted(kept) == sorted(["north", "south", *(i["id"] for i in others)])
    assert not dropped
    redone = [changed(i, id=f"{i['id']} again", s2__processing_baseline="05.10") for i in (north, south)]
    kept, dropped = _twins(north, south, *redone)
    assert sorted(kept) == ["north again", "south again"]
    assert [name for name, _ in dropped] == ["north", "south"]


def test_order_is_by_time_then_id_whatever_the_input(tmp_path):
    days = [day(20), day(5), day(5, id="S2A_33TWL_20230805_0_L2A", grid__code="MGRS-33TWL"), day(10)]
    one = search(catalog=collection_file(tmp_path / "a.json", *days), **AUGUST)
    two = search(catalog=collection_file(tmp_path / "b.json", *reversed(days)), **AUGUST)
    expected = [days[2]["id"], days[1]["id"], days[3]["id"], days[0]["id"]]
    assert ids(one) == ids(two) == expected
    assert digest(one.items) == digest(two.items)


# -- profiles and what is missing ---


@pytest.mark.parametrize(
    ("sample", "name", "sign"),
    [
        (earth_search, "earth-search", "earthsearch:"),
        (planetary_computer, "planetary-computer", "sentinel2l2a01"),
        (cdse, "cdse", "eodata"),
        (hls, "hls", "lpdaac"),
        (dea, "dea", "dea-public-data"),
        (deafrica, "deafrica", "deafrica-sentinel-2"),
    ],
)
def test_the_profile_is_detected_and_the_result_says_why(sample, name, sign):
    found, why = detect_profile([sample()])
    assert found == name
    assert sign in why


def test_usual_names_without_signs_are_generic(tmp_path):
    item = day(10)
    item["properties"].pop("earthsearch:boa_offset_applied")
    item["assets"] = {k: {**v, "href": f"/data/{k}.tif"} for k, v in item["assets"].items()}
    item["assets"]["clm"] = item["assets"].pop("scl")
    result = search(catalog=collection_file(tmp_path / "items.json", item), **AUGUST)
    assert result.profile_ref == "generic"
    assert (result.mask.asset, result.mask.kind, result.mask.cloud) == ("clm", "classes", (1, 2))
    item["assets"] = {"Kanal1": item["assets"]["red"]}
    with pytest.raises(RequestError, match=r"Kanal1.*no known profile"):
        search(catalog=collection_file(tmp_path / "items.json", item), **AUGUST)


def test_a_missing_band_names_what_is_there(tmp_path):
    where = collection_file(tmp_path / "items.json", day(10))
    with pytest.raises(ItemError, match=r"band 'nir08'.*S2A_33TWM_20230810_0_L2A.*swir16"):
        search(catalog=where, bands=["red", "nir08"], **AUGUST)


def test_a_missing_mask_names_what_is_there(tmp_path):
    item = day(10)
    item["assets"] = {key: item["assets"][key] for key in ("red", "blue")}
    where = collection_file(tmp_path / "items.json", item)
    with pytest.raises(ItemError, match=r"cloud mask 'scl'.*red, blue.*mask\.asset"):
        search(catalog=where, bands=["red"], **AUGUST)
    assert search(catalog=where, bands=["red"], need_mask=False, **AUGUST).items
    with pytest.raises(ItemError, match=r"cloud mask 'clp'"):
        search(catalog=where, mask=MaskRule(kind="probability", asset="clp", threshold=0.4), **AUGUST)


def test_items_that_lack_something_are_dropped_and_listed(tmp_path):
    broken = day(5)
    del broken["assets"]["red"]
    result = search(catalog=collection_file(tmp_path / "items.json", broken, day(10)), bands=["red"], **AUGUST)
    assert ids(result) == [day(10)["id"]]
    assert result.dropped[0][0] == broken["id"]
    assert "it lacks red" in result.dropped[0][1]
    assert set(result.items[0].assets) == {"red", "scl"}


def test_an_item_without_projection_is_refused_in_a_search(tmp_path):
    broken = day(5)
    del broken["properties"]["proj:epsg"]
    with pytest.raises(ItemError, match=broken["id"]):
        search(catalog=collection_file(tmp_path / "items.json", broken, day(10)), **AUGUST)


# -- bad requests ---


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"bbox": (46.1, 15.2, 46.3, 15.4)}, NoItemsError, r"swapped, \[15\.2, 46\.1.*swap them"),
        ({"bbox": (46.1, 115.2, 46.3, 115.4)}, ConfigError, r"115\.2.*-90\.\.90.*swapped"),
        ({"bbox": (1.0, 2.0, 3.0, 4.0)}, NoItemsError, r"items lie within \[15\.00, 45\.93"),
        ({"bbox": (15.0, 46.0, 15.0, 47.0)}, ConfigError, "empty"),
        ({"start": date(2024, 1, 1), "end": date(2024, 1, 2)}, NoItemsError, "2023-08-05 to 2023-08-10"),
        ({"start": date(2023, 9, 1)}, ConfigError, r"end \(2023-08-31\) is before start"),
        ({"max_cloud_cover": 5.0}, NoItemsError, "2 in the time span; 0 clear enough"),
        ({"collection": "sentinel-9"}, NoItemsError, "'sentinel-9'; it has sentinel-2-l2a"),
        ({"profile": "nobody"}, ConfigError, "'nobody'.*known are"),
        ({"catalog": "earth-serch"}, ConfigError, "did you mean 'earth-search'"),
        ({"catalog": "demo"}, ConfigError, "no address of its own"),
        ({"catalog": "absent/items.json"}, RequestError, r"absent/items\.json; correct the path"),
    ],
)
def test_bad_requests_say_what_value_and_way_out(tmp_path, change, error, said):
    where = collection_file(tmp_path / "items.json", day(5), day(10))
    with pytest.raises(error, match=said) as raised:
        search(**{"catalog": where, **AUGUST, **change})
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"type": "Topology"}'])
def test_a_file_that_is_no_stac_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RequestError, match=r"x\.json"):
        search(catalog=str(tmp_path / "x.json"), **AUGUST)


def test_a_catalog_that_does_not_answer():
    with pytest.raises(CatalogError, match=r"http://127\.0\.0\.1:1\b.*check the address") as raised:
        search(catalog="http://127.0.0.1:1", **AUGUST)
    assert raised.value.exit_code == 1


# -- frozen ---


def test_a_frozen_search_replays_and_narrows(tmp_path):
    signed = changed(planetary_computer(), id="pc")
    where = collection_file(tmp_path / "items.json", signed)
    result = search(catalog=where, bands=["red"], **AUGUST)
    save_items(result, tmp_path / "run" / "frozen.json")
    text = (tmp_path / "run" / "frozen.json").read_text()
    assert "sig=" not in text
    Path(where).unlink()
    assert load_items(tmp_path / "run" / "frozen.json") == result
    again = search(catalog=str(tmp_path / "run" / "frozen.json"), bands=["red"], **AUGUST)
    assert again.items == result.items
    save_items(result, tmp_path / "twice.json")
    assert (tmp_path / "twice.json").read_text() == text
    frozen = str(tmp_path / "twice.json")
    with pytest.raises(NoItemsError, match="frozen search"):
        search(catalog=frozen, **{**AUGUST, "end": date(2023, 8, 2)})
    with pytest.raises(ItemError, match=r"lacks blue; it has SCL, red"):
        search(catalog=frozen, bands=["blue"], **AUGUST)


def test_the_digest_knows_content_not_places(tmp_path):
    items = search(catalog=collection_file(tmp_path / "a.json", day(5), day(10)), **AUGUST).items
    there = [day(5), day(10)]
    for item in there:
        for asset in item["assets"].values():
            asset["href"] = "http://127.0.0.1:9/x/" + asset["href"].rsplit("/", 1)[1]
    moved_items = search(catalog=collection_file(tmp_path / "b.json", *there), **AUGUST).items
    assert digest(items) == digest(moved_items) == digest(items[::-1])
    assert digest(items) != digest(items[:1])
    whole = moved(day(5), 15, 46, 16, 47)  # a server may write 46 where the file says 46.0
    parts = [
        search(catalog=collection_file(tmp_path / "d.json", item), **AUGUST).items
        for item in (whole, moved(day(5), 15.0, 46.0, 16.0, 47.0))
    ]
    assert digest(parts[0]) == digest(parts[1])
    there[0]["properties"]["s2:processing_baseline"] = "05.10"
    assert digest(items) != digest(search(catalog=collection_file(tmp_path / "c.json", *there), **AUGUST).items)


def test_a_frozen_file_changed_by_hand_is_refused(tmp_path):
    result = search(catalog=collection_file(tmp_path / "a.json", day(5)), **AUGUST)
    save_items(result, tmp_path / "f.json")
    text = (tmp_path / "f.json").read_text()
    for broken, said in (
        (text.replace('"05.09"', '"05.10"'), "digest"),
        (text.replace('"version": 1', '"version": 9'), "version 9"),
        (text.replace('"source"', '"sauce"'), "damaged"),
        ("{}", "no frozen search"),
    ):
        (tmp_path / "f.json").write_text(broken)
        with pytest.raises(RequestError, match=said):
            load_items(tmp_path / "f.json")


# -- servers ---


def test_rustac_gives_what_the_file_gives_and_we_filter(tmp_path):
    items = [day(n, eo__cloud_cover=float(n)) for n in range(1, 29)]
    where = collection_file(tmp_path / "items.json", *items)
    with StacServer(tmp_path / "items.json") as server:
        for asked in ({}, {"max_cloud_cover": 12.0}, {"start": date(2023, 8, 9), "end": date(2023, 8, 9)}):
            by_file = search(catalog=where, **{**AUGUST, **asked})
            by_api = search(catalog=server.url, **{**AUGUST, **asked})
            assert by_api.items == by_file.items
            assert by_api.items
        with pytest.raises(NoItemsError, match="swap them"):
            search(catalog=server.url, **{**AUGUST, "bbox": (46.1, 15.2, 46.3, 15.4)})
        with pytest.raises(NoItemsError, match="it has sentinel-2-l2a"):
            search(catalog=server.url, collection="sentinel-9", **AUGUST)


def test_rustac_across_180_degrees_merges_two_searches(tmp_path):
    west = moved(day(5), 178.0, 60.0, 179.5, 61.0)
    east = moved(day(6), -179.9, 60.0, -178.0, 61.0)
    halves = [polygon(179.0, 60.0, 180.0, 61.0), polygon(-180.0, 60.0, -179.0, 61.0)]
    both = {"type": "MultiPolygon", "coordinates": [half["coordinates"] for half in halves]}
    across = changed(day(7), bbox=[179.0, 60.0, -179.0, 61.0], geometry=both)
    collection_file(tmp_path / "items.json", west, east, across, day(8))
    asked = {**AUGUST, "bbox": (179.2, 60.2, -179.5, 60.8)}
    with StacServer(tmp_path / "items.json") as server:
        found = search(catalog=server.url, **asked)
    assert found.items == search(catalog=str(tmp_path / "items.json"), **asked).items
    assert ids(found) == [i["id"] for i in (west, east, across)]


class _Api(BaseHTTPRequestHandler):
    """A small STAC API with pages of two, which can fail first and tells what it was asked."""

    items: list = []  # noqa: RUF012
    fail: list = []  # noqa: RUF012
    asked: list = []  # noqa: RUF012
    conforms: list = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def _send(self, status: int, data: dict, **headers: str) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        root = f"http://127.0.0.1:{self.server.server_port}"
        if self.path.startswith("/collections"):
            self._send(200, {"collections": [], "links": []})
            return
        links = [
            {"rel": "self", "href": root},
            {"rel": "root", "href": root},
            {"rel": "search", "href": f"{root}/search", "method": "POST", "type": "application/geo+json"},
        ]
        said = ["core", "item-search", *self.conforms]
        conforms = [f"https://api.stacspec.org/v1.0.0/{part}" for part in said]
        catalog = {"type": "Catalog", "id": "small", "description": "d", "stac_version": "1.0.0"}
        self._send(200, {**catalog, "links": links, "conformsTo": conforms})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.fail:
            self._send(self.fail.pop(0), {"code": "busy"}, Retry_After="0")
            return
        self.asked.append(body)
        first = int(body.get("token", 0))
        page = {"type": "FeatureCollection", "features": self.items[first : first + 2], "links": []}
        if first + 2 < len(self.items):
            href = f"http://127.0.0.1:{self.server.server_port}/search"
            more = {"token": str(first + 2)}
            page["links"] = [{"rel": "next", "href": href, "method": "POST", "body": more, "merge": True}]
        self._send(200, page)


@pytest.fixture
def api():
    _Api.items, _Api.fail, _Api.asked, _Api.conforms = [day(n) for n in (5, 10, 12, 15, 20)], [], [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_search_by_post_is_tried_again_and_reads_all_pages(api):
    _Api.fail = [503, 429, 502]
    result = search(catalog=api, profile="earth-search", **AUGUST)
    assert len(result.items) == 5
    assert not _Api.fail
    assert [body.get("token") for body in _Api.asked] == [None, "2", "4"]
    assert _Api.asked[0]["datetime"] == "2023-07-31T00:00:00Z/2023-09-01T23:59:59Z"
    assert _Api.asked[0]["limit"] == 100


def test_what_no_retry_can_mend_is_said(api):
    _Api.fail = [400]
    with pytest.raises(CatalogError, match=rf"{api}.*HTTP 400"):
        search(catalog=api, profile="earth-search", **AUGUST)


@pytest.mark.parametrize(
    ("conforms", "sent"),
    [
        ([], {}),
        (["item-search#query"], {"query": {"eo:cloud_cover": {"lte": 30.0}}}),
        (
            ["item-search#filter"],
            {
                "filter": {"op": "<=", "args": [{"property": "eo:cloud_cover"}, 30.0]},
                "filter-lang": "cql2-json",
            },
        ),
    ],
)
def test_clouds_are_filtered_by_the_server_only_where_it_can(api, conforms, sent):
    _Api.conforms = conforms
    _Api.items = [day(5), day(10, eo__cloud_cover=90.0)]  # this server ignores all filters
    result = search(catalog=api, profile="earth-search", max_cloud_cover=30.0, **AUGUST)
    assert ids(result) == [day(5)["id"]]
    assert {k: v for k, v in _Api.asked[0].items() if k in ("query", "filter", "filter-lang")} == sent
    assert bool(result.notes) == bool(conforms)


def test_polygons_go_out_as_boxes_where_the_catalog_takes_no_others(api):
    slanted = {"type": "Polygon", "coordinates": [[[15.2, 46.1], [15.4, 46.1], [15.3, 46.3], [15.2, 46.1]]]}
    _Api.items = [hls()]
    assert ids(search(catalog=api, profile="hls", geometry=slanted, **AUGUST)) == [hls()["id"]]
    assert "intersects" not in _Api.asked[0]
    assert _Api.asked[0]["bbox"] == list(BOX)
    _Api.items = [day(5)]
    search(catalog=api, profile="earth-search", geometry=slanted, **AUGUST)
    assert _Api.asked[-1]["intersects"] == slanted


# -- real sets ---

DATA = os.environ.get("CLOUDGATE_DATA")
REAL = [
    ("zagreb_graz_2tiles_120m", (15.0, 45.5, 16.4, 46.5), 10, "earth-search", "scl"),
    ("flanders_31uds", (3.01, 50.81, 3.03, 50.82), 118, "generic", "scl"),
    ("flanders_31ues", (4.05, 50.74, 4.07, 50.75), 72, "generic", "scl"),
    ("bolzano_10m", (11.34, 46.48, 11.36, 46.5), 12, "generic", "scl"),
    ("exeter_20m_mixedcrs", (-3.56, 50.69, -3.46, 50.75), 5, "generic", "scl"),
    ("antimeridian_120m", (178.2, 66.6, -179.1, 68.4), 5, "generic", "scl"),
    ("gfmap_2023", (4.26, 51.3, 4.27, 51.32), 19, "generic", "scl"),
    ("slovenia_eolearn", (14.55, 45.86, 14.57, 45.88), 5, "generic", "clm"),
]


@pytest.mark.skipif(not DATA, reason="CLOUDGATE_DATA is not set: the real sets are not here")
@pytest.mark.parametrize(("name", "bbox", "count", "profile", "mask"), REAL, ids=[r[0] for r in REAL])
def test_real_sets(name, bbox, count, profile, mask):
    span = {"bbox": bbox, "start": date(2015, 1, 1), "end": date(2024, 12, 31)}
    results = [
        search(catalog=str(Path(DATA or "", name, part)), **span)
        for part in ("items.geojson", "", "s2/collection.json")
    ]
    result = results[0]
    assert (len(result.items), result.profile_ref, result.mask.asset) == (count, profile, mask)
    assert len({digest(one.items) for one in results}) == 1
    assert all(Path(asset.href).is_file() for item in result.items for asset in item.assets.values())
    assert len(result.dropped) == (63 if name == "slovenia_eolearn" else 0)
    if name == "exeter_20m_mixedcrs":
        kinds = [item.assets["red"].crs[:16] for item in result.items]
        assert kinds[:2] == ["EPSG:27700", "EPSG:32630"]
        assert all(kind.startswith("PROJCRS") for kind in kinds[2:])
    if name == "zagreb_graz_2tiles_120m":
        assert {(item.orbit, item.boa_offset_applied) for item in result.items} <= {(79, True), (122, True)}
