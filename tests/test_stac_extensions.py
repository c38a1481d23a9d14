"""What the STAC extensions ask of our items, as our own assertions.

pystac brings the schemas of the core; those of the extensions lie in the net and in no package that could be found, so
the rules below are written from the extensions' published texts (projection 2.0, raster 2.0, eo 2.0, processing 1.2,
zarr 1.1, render 2.0): every field has a known name, a value of the right kind, and stands where it may stand.
"""

import re
from collections.abc import Iterator
from typing import Any

import pystac
import pytest

from pipeline.bands import BANDS
from pipeline.describe import EXTENSIONS, stac_collection, stac_item
from pipeline.grid import Grid

COMMON_NAMES = re.compile(
    "coastal|blue|green|green05|yellow|red|rededge|rededge07[158]|nir|nir08|nir09|cirrus|swir16|swir22|pan|lwir|lwir1[12]"
)
DATA_TYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float32", "float64"}


def _numbers(value: Any, *lengths: int) -> bool:
    return len(value) in lengths and all(type(v) in (int, float) for v in value)


FIELDS = {
    "proj:code": lambda v: re.fullmatch(r"[A-Z]+:\d+", v),
    "proj:wkt2": lambda v: isinstance(v, str),
    "proj:bbox": lambda v: _numbers(v, 4),
    "proj:shape": lambda v: len(v) == 2 and all(type(n) is int for n in v),
    "proj:transform": lambda v: _numbers(v, 6, 9),
    "raster:sampling": lambda v: v in ("area", "point"),
    "raster:spatial_resolution": lambda v: v > 0,
    "raster:scale": lambda v: type(v) is float,
    "raster:offset": lambda v: type(v) is float,
    "eo:common_name": lambda v: COMMON_NAMES.fullmatch(v),
    "eo:center_wavelength": lambda v: 0.3 < v < 3,
    "processing:level": lambda v: re.fullmatch(r"L\d[A-C]?", v),
    "processing:lineage": lambda v: isinstance(v, str),
    "processing:software": lambda v: all(isinstance(version, str) for version in v.values()),
    "zarr:consolidated": lambda v: isinstance(v, bool),
    "zarr:node_type": lambda v: v in ("array", "group"),
    "zarr:zarr_format": lambda v: v in (2, 3),
}
PLACES = {
    "proj": {"properties", "assets"},
    "raster": {"assets", "bands"},
    "eo": {"properties", "assets", "bands"},
    "processing": {"properties", "assets", "providers"},
    "zarr": {"assets"},
}
PREFIXES = {"projection": "proj"}


def _fields(node: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """(place, name, value) of every field with a prefix; lists and what has names of its own pass their place on."""
    if isinstance(node, list):
        for entry in node:
            yield from _fields(entry, place)
    elif isinstance(node, dict):
        for name, value in node.items():
            if ":" in name:
                yield place, name, value
            elif name in ("properties", "assets", "item_assets", "bands", "providers"):
                yield from _fields(value, "assets" if name == "item_assets" else name)
            elif place in ("assets", "") or name == "summaries":
                yield from _fields(value, place)


def _check(thing: dict[str, Any]) -> None:
    used = set()
    for place, name, value in _fields(thing, ""):
        prefix = name.partition(":")[0]
        if prefix == "cloudgate":
            continue
        assert name in FIELDS, f"{name} is no field of its extension"
        assert FIELDS[name](value), f"{name}: {value!r}"
        assert place in PLACES[prefix], f"{name} stands in {place}"
        used.add(prefix)
    declared = {name for name, url in EXTENSIONS.items() if url in thing["stac_extensions"]}
    assert len(declared) == len(thing["stac_extensions"])
    assert used == {PREFIXES.get(name, name) for name in declared - {"render"}}


def _check_bands(assets: dict[str, Any]) -> None:
    for name, asset in assets.items():
        for band in asset.get("bands", []):
            assert band["name"] == name
            assert band["data_type"] in DATA_TYPES
            assert isinstance(band["unit"], str)
            assert type(band.get("nodata", 0)) in (int, float)
            assert ("eo:common_name" in band) == (name in BANDS)


@pytest.mark.parametrize("crs", ["EPSG:32633", "+proj=laea +lat_0=46 +lon_0=15 +datum=WGS84 +units=m"])
@pytest.mark.parametrize("exported", [(), ("red", "green", "blue", "flags")])
def test_items_and_collections_hold_what_their_extensions_ask_for(crs, exported):
    bands = [name for name in BANDS if name != "cirrus"]
    grid = Grid(crs, 10.0, (0.0, 0.0), -510000, 49998, 300, 280, 256)
    period = {"start": "2021-07-01", "end": "2021-07-31", "target": "2021-07-16", "method": {"name": "regression"}}
    about = {"layout": 1, "grid": grid.to_dict(), "periods": {"0": period | {"code_version": "0.1.0", "items": 12}}}
    attrs = {"title": "a region", "bands": bands, "cloudgate": about}
    cogs = {name: f"../m.cog/{name}.tif" for name in exported}
    item = stac_item(attrs, 0, uncertainty=True, store="../m.zarr", cogs=cogs)
    collection = stac_collection(attrs, uncertainty=True)
    pystac.validation.validate_dict(item, extensions=[])
    pystac.validation.validate_dict(collection, extensions=[])
    _check(item)
    _check(collection)
    _check_bands(item["assets"])
    _check_bands(collection["item_assets"])
    properties = item["properties"]
    assert ("proj:code" in properties) != ("proj:wkt2" in properties)
    assert collection["item_assets"].keys() == item["assets"].keys()
    for shown in properties["renders"].values():
        assert set(shown["assets"]) <= item["assets"].keys()
        assert all(_numbers(pair, 2) and pair[0] < pair[1] for pair in shown["rescale"])
    processors = [p for p in collection["providers"] if "processing:level" in p]
    assert processors
    assert all({"producer", "processor"} & set(p["roles"]) for p in processors)


def test_a_field_of_the_wrong_name_kind_or_place_is_found():
    good = {"stac_extensions": [EXTENSIONS["zarr"]], "assets": {"a": {"zarr:zarr_format": 3}}}
    _check(good)
    for bad in (
        {"assets": {"a": {"zarr:format": 3}}},
        {"assets": {"a": {"zarr:zarr_format": "3"}}},
        {"properties": {"zarr:zarr_format": 3}},
        {"assets": {"a": {}}},
    ):
        with pytest.raises(AssertionError):
            _check({"stac_extensions": good["stac_extensions"], **bad})
