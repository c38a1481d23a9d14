"""Exports of a finished store: in come a store and a wish, out come Cloud-Optimized GeoTIFFs with their STAC Items."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import store as stores
from pipeline.bands import BANDS, check_bands, rgb_bands
from pipeline.cog import write_cog, write_colour_vrt
from pipeline.describe import choose_slots, item_id, published, stac_collection, stac_item
from pipeline.errors import ConfigError
from pipeline.grid import Grid
from pipeline.layers import layer_specs
from pipeline.objects import write_whole


def export_cogs(
    *,
    store: str | Path,
    out: str | Path,
    bands: Sequence[str] | None = None,
    period: int | str | None = None,
    slots: Sequence[int] | None = None,
) -> list[Path]:
    """Write the layers of finished periods as Cloud-Optimized GeoTIFFs, one file each, in bounded memory.

    Beside them: a VRT that opens as a colour picture, and STAC (a Collection, an Item per period), so that the folder
    is a catalog for `cloudgate search` and jobs.

    Args:
        store: path or URL of the Zarr store.
        out: folder to write; files of the same name are replaced when the new ones are whole.
        bands: bands or layers to write, all by default.
        period: which finished period: its number from 0 (-1 is the last) or a day it shows; all by default.
        slots: instead of ``period``, places on the store's ``time``.

    Returns:
        The GeoTIFFs.

    Raises:
        StoreMismatchError: without a finished mosaic. ConfigError: for a layer or period that is not there.
        StoreError: if a file cannot be written.
    """
    if "://" in str(out):
        raise ConfigError(f"export: {out} is no folder on disk; write the GeoTIFFs to one and copy them")
    attrs = stores.finished(store)
    uncertainty = stores.uncertain(store, attrs["bands"])
    specs = layer_specs(attrs["bands"], uncertainty=uncertainty)
    names = _layers(bands, list(specs)) if bands is not None else list(specs)
    wanted = list(slots) if slots is not None else choose_slots(attrs, period)
    grid, folder = Grid.from_dict(attrs["cloudgate"]["grid"]), Path(out)
    made = []
    for slot in wanted:
        name = item_id(attrs, published(attrs)[slot])
        for layer in names:
            made.append(folder / f"{name}_{layer}.tif")
            write_cog(str(store), grid, slot, layer, specs[layer], made[-1])
        colours = rgb_bands(attrs["bands"])
        if set(colours) <= set(names):
            write_colour_vrt([folder / f"{name}_{band}.tif" for band in colours], grid, folder / f"{name}.vrt")
        files = exported(attrs, slot, folder, uncertainty=uncertainty)
        _write_item(attrs, slot, folder, uncertainty, files)
    _write_json(folder / "collection.json", _collection(attrs, folder, uncertainty))
    return made


def _layers(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    esa = {band.esa: band.name for band in BANDS.values()}
    names = [esa.get(name.upper(), name) for name in asked]
    for name in names:
        if name not in known:
            raise ConfigError(f"bands: the store has no layer {name!r}; it has {', '.join(known)}")
    if not names:
        check_bands(names)
    return list(dict.fromkeys(names))


def exported(attrs: Mapping[str, Any], slot: int, folder: str | Path, *, uncertainty: bool) -> dict[str, str]:
    """Layer -> path of the GeoTIFFs of a period that lie in a folder."""
    name = item_id(attrs, published(attrs)[slot]) if slot in published(attrs) else ""
    files = {
        layer: Path(folder) / f"{name}_{layer}.tif" for layer in layer_specs(attrs["bands"], uncertainty=uncertainty)
    }
    return {layer: str(path) for layer, path in files.items() if name and path.exists()}


def _write_item(attrs: Mapping[str, Any], slot: int, folder: Path, uncertainty: bool, files: Mapping[str, str]) -> None:
    """An Item of what is in the folder: only layers that were exported, none of the store's."""
    hrefs = {layer: f"./{Path(path).name}" for layer, path in files.items()}
    item = stac_item(attrs, slot, uncertainty=uncertainty, store="", cogs=hrefs)
    item["assets"] = {name: asset for name, asset in item["assets"].items() if name in hrefs}
    item["stac_extensions"] = [uri for uri in item["stac_extensions"] if "/zarr/" not in uri]
    if not set(item["properties"]["renders"]["colour"]["assets"]) <= set(hrefs):
        del item["properties"]["renders"]
        item["stac_extensions"] = [uri for uri in item["stac_extensions"] if "/render/" not in uri]
    _write_json(folder / f"{item['id']}.json", item)


def _collection(attrs: Mapping[str, Any], folder: Path, uncertainty: bool) -> dict[str, Any]:
    collection = stac_collection(attrs, uncertainty=uncertainty)
    collection["links"] = [
        link for link in collection["links"] if link["rel"] != "item" or (folder / link["href"]).exists()
    ]
    return collection


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
