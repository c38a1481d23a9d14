"""One spelling for all catalogs: in come STAC items as dicts and a ``Profile``, out come ``Item`` values.

Understands STAC 1.0 and 1.1: projection fields at asset or item level, as code, number, WKT2 or PROJJSON;
``raster:bands``, ``bands``, ``raster:scale``; relative hrefs, ``alternate`` assets, requester-pays. What the
metadata say about the BOA offset (flag, explicit offset, processing baseline) is handed on faithfully;
nothing is decided here.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from pyproj import CRS
from pyproj.exceptions import CRSError
from shapely.geometry import mapping

from pipeline.errors import ItemError
from pipeline.footprints import as_floats, bbox_polygon, item_bbox
from pipeline.grid import crs_name
from pipeline.items import Asset, Item
from pipeline.profiles import MaskRule, Profile
from pipeline.redaction import without_credentials
from pipeline.tiles import tile_origin

_TILE = re.compile(r"(?:^|[._-])T?(\d{1,2}[C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V])(?=[._-]|$)")
# relative orbit = (absolute + shift) mod 143 + 1, by satellite (ESA's cycle of 143 orbits)
_ORBIT_SHIFT = {"sentinel-2a": 2, "sentinel-2b": -27}


def normalise(
    item: Mapping[str, Any],
    profile: Profile,
    *,
    base: str | None = None,
    bands: Sequence[str] | None = None,
    masks: Sequence[MaskRule] = (),
) -> Item:
    """Turn one STAC item into an ``Item``.

    Args:
        item: STAC 1.0 or 1.1 item; it is not changed.
        profile: how its catalog speaks.
        base: location of the JSON that relative hrefs start from (URL or path).
        bands: band names to keep; default: all of the profile that the item has.
        masks: rules whose rasters are kept too, besides those of the profile.

    Returns:
        The item with one ``Asset`` per band under its band name, and per mask raster under its rule's asset
        name; what the item lacks is left out. No credential stays in an href.

    Raises:
        ItemError: if time, footprint or a kept raster's projection is missing or broken.
    """
    props: Mapping[str, Any] = item.get("properties") or {}
    name = str(item.get("id", ""))
    words = [name] + [str(props[key]) for key in ("s2:product_uri", "s2:granule_id", "title") if props.get(key)]
    platform = _platform(props, name)
    tile = _tile(props, words)
    raw: Mapping[str, Any] = item.get("assets") or {}
    assets: dict[str, Asset] = {}
    for band in bands if bands is not None else tuple(profile.bands):
        key = find_asset(raw, profile.bands.get(band, (band,)))
        if key is not None:
            assets[band] = _asset(item, key, profile, base, tile, is_mask=False)
    for rule in (*masks, profile.mask, *profile.mask_alternatives):
        key = find_asset(raw, (rule.asset,))
        if key is not None and rule.asset not in assets:
            assets[rule.asset] = _asset(item, key, profile, base, tile, is_mask=True)
    flag = props.get(profile.offset.flag) if profile.offset.flag else None
    cloud = props.get("eo:cloud_cover")
    return Item(
        id=name,
        datetime=item_time(item).isoformat().replace("+00:00", "Z"),
        collection=str(item.get("collection") or ""),
        platform=platform,
        tile=tile,
        orbit=_orbit(props, words, platform),
        datatake=_datatake(props, words),
        baseline=_baseline(props, words),
        boa_offset_applied=None if flag is None else str(flag).lower() in ("true", "1"),
        cloud_cover=None if cloud is None else float(cloud),
        created=next((str(props[k]) for k in ("created", "s2:generation_time", "updated") if props.get(k)), None),
        bbox=item_bbox(item),
        geometry=as_floats(item.get("geometry") or mapping(bbox_polygon(item_bbox(item)))),
        assets=assets,
    )


def find_asset(assets: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Key of the first of ``names`` that ``assets`` has; case matters only where both spellings exist."""
    folded: dict[str, str] | None = None
    for name in names:
        key: str | None = name
        if name not in assets:
            if folded is None:
                folded = {key.casefold(): key for key in reversed(list(assets))}
            key = folded.get(name.casefold())
        if key is not None and isinstance(assets[key], Mapping) and assets[key].get("href"):
            return key
    return None


def item_time(item: Mapping[str, Any]) -> datetime:
    """Acquisition time (UTC): ``datetime``, else ``start_datetime``.

    Raises:
        ItemError: if both are missing or not ISO 8601.
    """
    props = item.get("properties") or {}
    text = props.get("datetime") or props.get("start_datetime")
    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        raise ItemError(
            f"item {item.get('id')!r}: properties.datetime is {text!r}, not an ISO 8601 time; "
            "correct the item or take it out of the catalog"
        ) from None
    return when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)


# -- assets --------------------------------------------------------------------------------------------------


def _asset(
    item: Mapping[str, Any], key: str, profile: Profile, base: str | None, tile: str | None, *, is_mask: bool
) -> Asset:
    raw = item["assets"][key]
    where = f"item {item.get('id')!r}, asset {key!r}"
    crs, size, affine = _projection(item, raw, profile, tile, where)
    href, pays = _href(item, raw, profile, base, where)
    band: Mapping[str, Any] = next(iter(raw.get("raster:bands") or raw.get("bands") or ()), {})
    meta = {field: _first(raw, band, field) for field in ("scale", "offset", "nodata")}
    silent_nodata = None if is_mask else profile.nodata
    return Asset(
        href=href,
        crs=crs,
        shape=size,
        transform=affine,
        nodata=silent_nodata if meta["nodata"] is None else float(meta["nodata"]),
        scale=1.0 if is_mask else float(profile.scale if meta["scale"] is None else meta["scale"]),
        offset=None if is_mask or meta["offset"] is None else float(meta["offset"]),
        requester_pays=pays,
        checksum=raw.get("file:checksum"),
    )


def _first(asset: Mapping[str, Any], band: Mapping[str, Any], field: str) -> Any:
    for holder in (band, asset):
        for key in (f"raster:{field}", field):
            if holder.get(key) is not None:
                return holder[key]
    return None


def _projection(
    item: Mapping[str, Any], raw: Mapping[str, Any], profile: Profile, tile: str | None, where: str
) -> tuple[str, tuple[int, int], tuple[float, float, float, float, float, float]]:
    levels = (raw, item.get("properties") or {})
    crs = next((text for level in levels if (text := _crs(level, where))), None)
    size = next((level["proj:shape"] for level in levels if level.get("proj:shape")), None)
    affine = next((level["proj:transform"] for level in levels if level.get("proj:transform")), None)
    if profile.tile_resolution_m and tile and (crs is None or size is None or affine is None):
        epsg, left, top = tile_origin(tile)
        px, res = round(109_800 / profile.tile_resolution_m), profile.tile_resolution_m
        return f"EPSG:{epsg}", (px, px), (res, 0.0, left, 0.0, -res, top)
    for field, value in (("proj:code", crs), ("proj:shape", size), ("proj:transform", affine)):
        if value is None:
            raise ItemError(
                f"{where}: it has no {field} (nor the item), so its pixels cannot be placed; add the field "
                "to the item, take another catalog, or set tile_resolution_m in the profile if its rasters "
                "are whole MGRS tiles"
            )
    if affine is None or size is None or crs is None or len(affine) not in (6, 9) or len(size) != 2:
        raise ItemError(
            f"{where}: proj:shape needs 2 numbers and proj:transform 6 or 9, got {size} and {affine}; correct the item"
        )
    a, b, c, d, e, f = (float(v) for v in affine[:6])
    if a * e - b * d == 0 or min(size) < 1:
        raise ItemError(
            f"{where}: proj:shape {size} and proj:transform {affine} span no area; the order is [a, b, c, d, "
            "e, f] with x = a*col + b*row + c; correct the item"
        )
    return crs, (int(size[0]), int(size[1])), (a, b, c, d, e, f)


def _crs(level: Mapping[str, Any], where: str) -> str | None:
    for field in ("proj:code", "proj:epsg", "proj:wkt2", "proj:projjson"):
        value = level.get(field)
        if value:
            text = json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else str(value)
            try:
                return _crs_text(f"EPSG:{text}" if field == "proj:epsg" else text)
            except CRSError as error:
                raise ItemError(f"{where}: {field} {text[:60]!r} is no known CRS; correct the item") from error
    return None


@lru_cache(maxsize=256)
def _crs_text(text: str) -> str:
    return crs_name(CRS.from_user_input(text))


def _href(
    item: Mapping[str, Any], raw: Mapping[str, Any], profile: Profile, base: str | None, where: str
) -> tuple[str, bool]:
    """The reachable spelling that the profile prefers, free of charge before requester-pays."""
    choices = [raw, *(alt for alt in (raw.get("alternate") or {}).values() if alt.get("href"))]
    ranked = []
    for order, choice in enumerate(choices):
        href = str(choice["href"])
        scheme = urlsplit(href).scheme if "://" in href else ""
        rank = profile.prefer.index(scheme) if scheme in profile.prefer else len(profile.prefer)
        pays = _requester_pays(item, choice, scheme)
        ranked.append((pays, rank if scheme in ("s3", "https") else -1, order, href))
    pays, _, _, href = min(ranked)
    return resolve_href(without_credentials(href), base, where), pays


def _requester_pays(item: Mapping[str, Any], choice: Mapping[str, Any], scheme: str) -> bool:
    if scheme != "s3":
        return False
    props = item.get("properties") or {}
    schemes = {**(item.get("storage:schemes") or {}), **(props.get("storage:schemes") or {})}
    refs: Iterator[Any] = (schemes.get(ref) or {} for ref in choice.get("storage:refs") or ())
    told = choice.get("storage:requester_pays", props.get("storage:requester_pays", False))
    return bool(told) or any(ref.get("requester_pays") for ref in refs)


def resolve_href(href: str, base: str | None, where: str = "link") -> str:
    """An absolute location: URLs and absolute paths as they are, others from ``base`` (the JSON naming them).

    Raises:
        ItemError: for a relative href without base.
    """
    if href.startswith("file://"):
        return unquote(urlsplit(href).path)
    if "://" in href or Path(href).is_absolute():
        return href
    if base is None:
        raise ItemError(f"{where}: href {href!r} is relative and its item has no known location; make it absolute")
    if "://" in base:
        scheme, rest = base.split("://", 1)  # urljoin knows no s3
        return scheme + urljoin("http://" + rest, href).removeprefix("http")
    return os.path.normpath(Path(base).absolute().parent / href)


# -- names ---------------------------------------------------------------------------------------------------


def _platform(props: Mapping[str, Any], name: str) -> str | None:
    if props.get("platform"):
        return str(props["platform"]).lower()
    found = re.match(r"S2([A-D])_", name)
    return f"sentinel-2{found.group(1).lower()}" if found else None


def _tile(props: Mapping[str, Any], words: Sequence[str]) -> str | None:
    code = str(props.get("grid:code") or "")
    text = code.removeprefix("MGRS-") if code.startswith("MGRS-") else ""
    text = text or str(props.get("s2:mgrs_tile") or "")
    if not text and props.get("mgrs:utm_zone") and props.get("mgrs:grid_square"):
        text = f"{props['mgrs:utm_zone']}{props.get('mgrs:latitude_band', '')}{props['mgrs:grid_square']}"
    text = text or str(props.get("odc:region_code") or "")
    for word in (text, *words):
        found = _TILE.search(word)
        if found:
            return found.group(1).zfill(5)
    return None


def _orbit(props: Mapping[str, Any], words: Sequence[str], platform: str | None) -> int | None:
    if props.get("sat:relative_orbit"):
        return int(props["sat:relative_orbit"])
    for word in words:
        found = re.search(r"_R(\d{3})(?=_|\.|$)", word)
        if found:
            return int(found.group(1))
    absolute = props.get("sat:absolute_orbit") or next(
        (m.group(1) for word in words if (m := re.search(r"_A(\d{6})(?=_|$)", word))), None
    )
    if absolute is not None and platform in _ORBIT_SHIFT:
        return (int(absolute) + _ORBIT_SHIFT[platform]) % 143 + 1
    return None


def _datatake(props: Mapping[str, Any], words: Sequence[str]) -> str | None:
    """Satellite and start of the datatake, ``S2A_20230815T095031``: the same for tiles and reprocessings."""
    told = [str(props[key]) for key in ("s2:datatake_id", "eopf:datatake_id") if props.get(key)]
    for pattern in (r"^G?(S2[A-D])_(\d{8}T\d{6})_", r"^(S2[A-D])_MSIL\w\w_(\d{8}T\d{6})_"):
        for word in (*told, *words):
            found = re.match(pattern, word)
            if found:
                return f"{found.group(1)}_{found.group(2)}"
    return None


def _baseline(props: Mapping[str, Any], words: Sequence[str]) -> str | None:
    text = str(props.get("s2:processing_baseline") or props.get("processing:version") or "")
    found = re.fullmatch(r"N?(\d{1,2})\.(\d{1,2})", text)
    for word in words:
        found = found or re.search(r"_N(\d{2})\.?(\d{2})(?=_|\.|$)", word)
    return f"{found.group(1).zfill(2)}.{found.group(2).zfill(2)}" if found else None
