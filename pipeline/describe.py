"""STAC of the result: in comes a published store, out comes ``NAME.stac/``, a Collection and an Item a finished period.

STAC 1.1 with projection, raster and eo in ``bands``, processing, zarr, render, ``derived_from`` links to the scenes.
All hrefs are relative, so store, ``NAME.stac`` and ``NAME.cog`` can be moved together. The same store gives the same
bytes. `cloudgate search` and jobs take the folder as a catalog; pixels are read from it where there are COGs.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from shapely.geometry import mapping

from pipeline.bands import BANDS, rgb_bands
from pipeline.conventions import level_attributes
from pipeline.errors import ConfigError
from pipeline.footprints import bbox_polygon
from pipeline.grid import Grid
from pipeline.items import Item
from pipeline.layers import LayerSpec, layer_specs
from pipeline.objects import objects_at

EXTENSIONS: Final = {
    name: f"https://stac-extensions.github.io/{name}/v{version}/schema.json"
    for name, version in (
        ("projection", "2.0.0"),
        ("raster", "2.0.0"),
        ("eo", "2.0.0"),
        ("processing", "1.2.0"),
        ("zarr", "1.1.0"),
        ("render", "2.0.0"),
    )
}
ZARR_TYPE: Final = "application/vnd.zarr; version=3"
COG_TYPE: Final = "image/tiff; application=geotiff; profile=cloud-optimized"
_LICENCE: Final = "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice"
_WHOLE: Final[Mapping[str, Any]] = {
    "type": ZARR_TYPE,
    "title": "the whole store: full resolution in group 0, overviews in 1, 2, ...",
    "roles": ["data", "overview"],
    "zarr:consolidated": True,
    "zarr:node_type": "group",
    "zarr:zarr_format": 3,
}
_STRETCH: Final = (0.0, 0.3)
"""Reflectance shown from black to white."""


def beside(store: str | Path, ending: str) -> str:
    """``NAME.zarr`` to ``NAME`` and another ending: where what describes a store lies."""
    return str(store).removeprefix("icechunk:").rstrip("/").removesuffix(".zarr") + ending


def item_id(attrs: Mapping[str, Any], period: Mapping[str, Any]) -> str:
    """Id of a period's Item: the job's name and the day it shows."""
    return f"{_slug(attrs)}_{period['target']}"


def _slug(attrs: Mapping[str, Any]) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", str(attrs.get("title", "mosaic"))).strip("-") or "mosaic"


def published(attrs: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The finished periods of a store's attributes by slot, in order."""
    every = {int(slot): about for slot, about in attrs["cloudgate"]["periods"].items()}
    return {slot: every[slot] for slot in sorted(every) if every[slot].get("published", True)}


def choose_slots(attrs: Mapping[str, Any], period: int | str | None) -> list[int]:
    """Slots of finished periods: all for None, one by number (-1 is the last) or by a day it shows or spans.

    Raises:
        ConfigError: if it is not there.
    """
    there = published(attrs)
    slots = list(there)
    if period is None:
        return slots
    text = str(period)
    if text.removeprefix("-").isdigit():
        if -len(slots) <= int(text) < len(slots):
            return [slots[int(text)]]
    else:
        found = [slot for slot in slots if there[slot].get("target") == text]
        found = found or [s for s in slots if there[s].get("start", "~") <= text <= there[s].get("end", "")]
        if found:
            return found[:1]
    days = ", ".join(str(there[slot].get("target")) for slot in slots[:12]) + (" ..." if len(slots) > 12 else "")
    raise ConfigError(
        f"period: {text} is not there; the store has {len(slots)} finished periods (0 to {len(slots) - 1}), which show "
        f"{days}"
    )


def describe(
    *,
    store: str | Path,
    attrs: Mapping[str, Any],
    uncertainty: bool,
    slot: int,
    sources: Sequence[Item],
    source: str,
    cogs: Mapping[str, str],
) -> None:
    """Write or renew ``NAME.stac/`` after a period was published, or hidden (then its Item goes).

    Args:
        store: path or URL of the store.
        attrs: attributes of its group ``0``.
        uncertainty: whether it has uncertainties.
        slot: the period that changed.
        sources: the scenes it was made of.
        source: where they were found: the address of a STAC API, or a file.
        cogs: layer -> path or URL of the period's exported GeoTIFF.

    Raises:
        StoreError: disk full or no permission.
    """
    where = beside(store, ".stac")
    folder = objects_at(where)
    periods = published(attrs)
    before = folder.get("collection.json")
    collection = stac_collection(attrs, uncertainty=uncertainty)
    if slot in periods:
        files = {name: _relative(path, where) for name, path in cogs.items()}
        item = stac_item(attrs, slot, uncertainty=uncertainty, store=_relative(str(store), where), cogs=files)
        item["links"] += _derived_from(sources, source, where)
        folder.put(f"{item['id']}.json", _json(item))
    folder.put("collection.json", _json(collection))
    wanted = {link["href"] for link in collection["links"] if link["rel"] == "item"}
    old = json.loads(before[0])["links"] if before else []
    for link in old:
        if link["rel"] == "item" and link["href"] not in wanted:
            folder.remove(PurePosixPath(link["href"]).name)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _relative(target: str, folder: str) -> str:
    """An href from a file in ``folder`` to ``target``, both on disk or in one bucket."""
    target = target.removeprefix("icechunk:")
    if "://" in target:
        return f"../{target.rstrip('/').rpartition('/')[2]}"
    return Path(os.path.relpath(Path(target).absolute(), Path(folder).absolute())).as_posix()


def _derived_from(sources: Sequence[Item], source: str, where: str) -> list[dict[str, Any]]:
    """Links to the scenes: their address in an API; of a file, the file, with the scene's id as fragment."""
    api = "://" in source and not source.endswith((".json", ".geojson"))
    local = _relative(source, where) if "://" not in source and "://" not in where else source
    out = []
    for item in sorted(sources, key=lambda item: (item.datetime, item.id)):
        href = f"{source.rstrip('/')}/collections/{item.collection}/items/{item.id}" if api else f"{local}#{item.id}"
        out.append({"rel": "derived_from", "href": href, "type": "application/geo+json", "title": item.id})
    return out


def stac_item(
    attrs: Mapping[str, Any], slot: int, *, uncertainty: bool, store: str, cogs: Mapping[str, str]
) -> dict[str, Any]:
    """The Item of one period.

    Args:
        attrs: attributes of the store's group ``0``.
        slot: the period.
        uncertainty: whether the store has uncertainties.
        store: href of the store.
        cogs: layer -> href of a GeoTIFF; the others point into the store.
    """
    grid, period = Grid.from_dict(attrs["cloudgate"]["grid"]), published(attrs)[slot]
    bbox = grid.lonlat_bounds()
    place = level_attributes(grid)
    crs = {name: place[name] for name in ("proj:code", "proj:wkt2") if name in place}
    assets: dict[str, Any] = {"zarr": {"href": store, **_WHOLE}}
    for name, about in _assets(attrs, uncertainty).items():
        tiff = {"href": cogs.get(name, ""), "type": COG_TYPE}
        array = {"href": f"{store}/0/{name}", "type": ZARR_TYPE, "zarr:node_type": "array", "zarr:zarr_format": 3}
        assets[name] = (tiff if name in cogs else array) | about
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": sorted(EXTENSIONS.values()),
        "id": item_id(attrs, period),
        "collection": _slug(attrs),
        "bbox": list(bbox),
        "geometry": mapping(bbox_polygon(bbox)),
        "properties": {
            # Noon, so that the solar day is the same everywhere.
            "datetime": f"{period['target']}T12:00:00Z",
            "start_datetime": f"{period['start']}T00:00:00Z",
            "end_datetime": f"{period['end']}T23:59:59Z",
            "title": f"{attrs.get('title', 'mosaic')}, {period['target']}",
            "gsd": grid.resolution_m,
            **crs,
            "proj:shape": list(grid.shape),
            "proj:transform": list(grid.transform)[:6],
            "proj:bbox": list(grid.bounds),
            "processing:level": "L3",
            "processing:software": {"cloudgate": period.get("code_version", "unknown")},
            "processing:lineage": _lineage(period),
            "renders": _renders(attrs["bands"], cogs),
            "cloudgate:slot": slot,
            "cloudgate:method": period.get("method", {}),
            "cloudgate:mask": period.get("mask", {}),
            "cloudgate:anchors": period.get("anchors", []),
            "cloudgate:items_digest": period.get("items_digest", ""),
        },
        "assets": assets,
        "links": [
            {"rel": rel, "href": "./collection.json", "type": "application/json"}
            for rel in ("root", "parent", "collection")
        ],
    }


def _assets(attrs: Mapping[str, Any], uncertainty: bool) -> dict[str, dict[str, Any]]:
    """What is said of every layer in Items and in the Collection, wherever it lies."""
    grid = Grid.from_dict(attrs["cloudgate"]["grid"])
    return {
        name: {
            "title": spec.attrs["long_name"],
            "roles": ["data"] if name in attrs["bands"] else ["metadata"],
            "bands": [_band(name, spec, grid)],
        }
        for name, spec in layer_specs(attrs["bands"], uncertainty=uncertainty).items()
    }


def _band(name: str, spec: LayerSpec, grid: Grid) -> dict[str, Any]:
    attrs = spec.attrs
    out: dict[str, Any] = {
        "name": name,
        "description": attrs["long_name"],
        "data_type": spec.dtype,
        "unit": attrs.get("units", "1"),
        "raster:sampling": "area",
        "raster:spatial_resolution": grid.resolution_m,
    }
    if "_FillValue" in attrs:
        out["nodata"] = attrs["_FillValue"]
    if "scale_factor" in attrs:
        out |= {"raster:scale": attrs["scale_factor"], "raster:offset": attrs.get("add_offset", 0.0)}
    if name in BANDS:
        common = {"rededge1": "rededge071", "rededge2": "rededge075", "rededge3": "rededge078"}.get(name, name)
        out |= {"eo:common_name": common, "eo:center_wavelength": round(BANDS[name].wavelength_nm / 1000, 4)}
    return out


def _lineage(period: Mapping[str, Any]) -> str:
    method, mask = period.get("method", {}), period.get("mask", {})
    source = mask.get("asset") or mask.get("source") or "the catalog's own"
    anchors = f", anchors {', '.join(period['anchors'])}" if period.get("anchors") else ""
    scenes = f"{period.get('items', 'unknown')} Sentinel-2 scenes"
    return f"{method.get('name', 'unknown')} of {scenes}, cloud mask {source}{anchors}; no terrain or BRDF correction"


def _renders(bands: Sequence[str], cogs: Mapping[str, str]) -> dict[str, Any]:
    names = list(rgb_bands(bands))
    low, high = _STRETCH
    # A tiler shows GeoTIFFs in stored numbers, what it opens with xarray in reflectance.
    stretch = [round(low * 1e4 + 1000), round(high * 1e4 + 1000)] if set(names) <= set(cogs) else [low, high]
    title = "true colour" if names == ["red", "green", "blue"] else "colour, longest to shortest wavelength"
    return {"colour": {"title": title, "assets": names, "rescale": [stretch] * 3, "resampling": "average"}}


def stac_collection(attrs: Mapping[str, Any], *, uncertainty: bool) -> dict[str, Any]:
    """The Collection of a store's finished periods."""
    grid, periods = Grid.from_dict(attrs["cloudgate"]["grid"]), published(attrs)
    spans = [(about["start"], about["end"]) for about in periods.values()]
    first, last = min((s for s, _ in spans), default=None), max((e for _, e in spans), default=None)
    interval = [f"{first}T00:00:00Z" if first else None, f"{last}T23:59:59Z" if last else None]
    title = attrs.get("title", "mosaic")
    assets = _assets(attrs, uncertainty)
    return {
        "type": "Collection",
        "stac_version": "1.1.0",
        "stac_extensions": sorted(EXTENSIONS[name] for name in ("raster", "eo", "processing", "zarr")),
        "id": _slug(attrs),
        "title": title,
        "description": f"{title}: cloud-free Sentinel-2 mosaics, one Item a period, with the provenance of every pixel",
        "keywords": ["Sentinel-2", "mosaic", "cloud-free", "surface reflectance"],
        "license": "other",
        "providers": [
            {"name": "ESA / Copernicus", "roles": ["producer", "licensor"], "url": "https://sentinels.copernicus.eu"},
            {"name": "cloudgate", "roles": ["processor"], "processing:level": "L3"},
        ],
        "extent": {"spatial": {"bbox": [list(grid.lonlat_bounds())]}, "temporal": {"interval": [interval]}},
        "summaries": {"gsd": [grid.resolution_m], "bands": [assets[name]["bands"][0] for name in attrs["bands"]]},
        "item_assets": {"zarr": dict(_WHOLE), **assets},
        "links": [
            {"rel": "root", "href": "./collection.json", "type": "application/json"},
            {"rel": "license", "href": _LICENCE, "title": "Copernicus Sentinel data terms"},
            *(
                {"rel": "item", "href": f"./{item_id(attrs, about)}.json", "type": "application/geo+json"}
                for about in periods.values()
            ),
        ],
    }
