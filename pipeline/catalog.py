"""The search: in come a catalog, an area and a span, out comes a ``SearchResult`` of usable items.

A result freezes to a JSON file (``save_items``) that replays without network (``load_items``, or as
``catalog``). What was left out is listed with the reason; nothing is dropped silently.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shapely.geometry import mapping, shape
from shapely.geometry.base import BaseGeometry

from pipeline.errors import ConfigError, ItemError, NoItemsError
from pipeline.footprints import bbox_polygon, cut_at_180, footprint
from pipeline.frozen import SearchResult, digest, from_frozen, load_items, save_items
from pipeline.items import EPOCH, solar_day
from pipeline.normalise import item_time
from pipeline.profiles import MaskRule, Profile, load_profile, profile_names
from pipeline.selection import choose_mask, deduplicate, detect_profile, usable
from pipeline.stac import ItemApi, ItemFiles, RawItem, open_source

__all__ = ["SearchResult", "centre_longitude", "digest", "load_items", "save_items", "search"]


def search(
    *,
    catalog: str,
    bbox: Sequence[float],
    start: date,
    end: date,
    profile: str | None = None,
    collection: str | None = None,
    bands: Sequence[str] | None = None,
    mask: MaskRule | None = None,
    need_mask: bool = True,
    max_cloud_cover: float | None = None,
    geometry: BaseGeometry | Mapping[str, Any] | None = None,
    timeout_s: float = 60.0,
) -> SearchResult:
    """Search a catalog; the server's answer is always filtered again on our side.

    Args:
        catalog: a profile's name, a STAC API URL, or the path (or URL) of an ItemCollection, a static
            catalog, a folder of them, or a frozen search.
        bbox: (west, south, east, north) degrees; west > east crosses the antimeridian.
        start: first solar day (at the centre of ``bbox``), inclusive.
        end: last solar day, inclusive.
        profile: name or ``.yaml`` path; default: by the catalog's address, else detected from the items.
        collection: collection id; default: the profile's, for files all.
        bands: band names every item must have; default: whatever the profile knows, at least one.
        mask: the cloud mask's rule; default: the profile's, or the alternative that most items carry.
        need_mask: whether items without the mask's raster are unusable.
        max_cloud_cover: percent; scenes that are cloudier are left out, those that do not tell stay.
        geometry: polygon in degrees (GeoJSON or shapely) that scenes must meet as well.
        timeout_s: seconds to wait for each answer of a server.

    Returns:
        The usable items, eager (only JSON is read, no pixel).

    Raises:
        ConfigError: for an unknown catalog or profile, or a box out of range.
        NoItemsError: if nothing matches; says what was searched and where to look.
        ItemError: if a band or the mask's raster is missing, or an item cannot be placed.
        RequestError: if a file is absent or holds no STAC.
        CatalogError: if a server does not answer, after retries.
    """
    area = _area(bbox, geometry)
    longitude = centre_longitude(bbox)
    days = ((start - EPOCH).days, (end - EPOCH).days)
    if days[1] < days[0]:
        raise ConfigError(f"time: end ({end}) is before start ({start}); swap them")
    known, ref, why, location = _locate(catalog, profile)
    source = open_source(location, timeout_s=timeout_s)
    if isinstance(source, ItemFiles) and source.frozen is not None:
        return _replay(
            source,
            area,
            days,
            longitude,
            max_cloud_cover=max_cloud_cover,
            bands=bands,
            mask=mask if need_mask else None,
        )
    wanted = _collections(source, known, collection)
    if isinstance(source, ItemApi):
        found = source.search(
            bbox=bbox,
            span=_utc_span(start, end),
            collections=wanted,
            geometry=_asked_geometry(geometry, bbox, known, max_cloud_cover),
            max_cloud_cover=max_cloud_cover,
            page_limit=known.page_limit if known else 100,
        )
    else:
        found = source.items
    counts = [f"{len(found)} items in {source.source}"]
    kept = found
    steps: list[tuple[str, Callable[[RawItem], bool]]] = [
        ("in the collection", lambda raw: not wanted or raw.item.get("collection") in wanted),
        ("in the area", lambda raw: _meets(footprint(raw.item), area)),
        ("in the time span", lambda raw: days[0] <= solar_day(item_time(raw.item), longitude) <= days[1]),
        ("clear enough", lambda raw: _clear_enough(raw.item, max_cloud_cover)),
    ]
    for name, keep in steps:
        if kept:  # the count of the first filter that leaves nothing is the last one said
            kept = [raw for raw in kept if keep(raw)]
            counts.append(f"{len(kept)} {name}")
    if not kept:
        raise NoItemsError(_nothing(source, found, counts, bbox, (start, end), wanted, max_cloud_cover))
    if known is None:
        ref, why = detect_profile([raw.item for raw in kept])
        known = load_profile(ref)
    rule = mask or choose_mask([raw.item for raw in kept], known)
    items, dropped, notes = usable(kept, known, bands=bands, need_mask=rule if need_mask else None, masks=(rule,))
    items, duplicates = deduplicate(items)
    if any(asset.requester_pays for item in items for asset in item.assets.values()):
        notes.append("some assets are requester-pays: reading them costs the account whose keys are used")
    if isinstance(source, ItemApi) and max_cloud_cover is not None and source.filters_clouds:
        notes.append("the server filtered by cloud cover: scenes that do not tell theirs may be missing")
    return SearchResult(items, known, ref, why, rule, dropped + duplicates, source.source, longitude, notes)


# -- the request ---------------------------------------------------------------------------------------------


def centre_longitude(bbox: Sequence[float]) -> float:
    """Longitude of the centre of a box, degrees, unwrapped from its western edge (may exceed 180)."""
    west, _, east, _ = bbox
    return west + ((east - west) % 360) / 2


def _area(bbox: Sequence[float], geometry: BaseGeometry | Mapping[str, Any] | None) -> BaseGeometry:
    west, south, east, north = bbox
    if max(abs(south), abs(north)) > 90:
        raise ConfigError(
            f"area.bbox: latitudes {south} and {north} must lie within -90..90; are longitude and latitude "
            "swapped? The order is [west, south, east, north]"
        )
    if max(abs(west), abs(east)) > 180 or north <= south or west == east:
        raise ConfigError(
            f"area.bbox: [{west}, {south}, {east}, {north}] is empty or out of range; the order is "
            "[west, south, east, north] in degrees"
        )
    area = bbox_polygon(bbox)
    if geometry is None:
        return area
    polygon = geometry if isinstance(geometry, BaseGeometry) else shape(geometry)
    return area.intersection(cut_at_180(polygon))


def _utc_span(start: date, end: date) -> tuple[datetime, datetime]:
    """The span padded by a day on either side: solar days begin half a day before or after UTC days."""
    return (
        datetime.combine(start - timedelta(days=1), time.min, UTC),
        datetime.combine(end + timedelta(days=1), time(23, 59, 59), UTC),
    )


def _asked_geometry(
    geometry: BaseGeometry | Mapping[str, Any] | None,
    bbox: Sequence[float],
    profile: Profile | None,
    max_cloud_cover: float | None,
) -> dict[str, Any] | None:
    """The polygon to send: none where the server takes boxes only, or across 180 degrees.

    None together with a filter either: Earth Search then answers with nothing.
    """
    if geometry is None or bbox[0] > bbox[2] or max_cloud_cover is not None or (profile and profile.bbox_only):
        return None
    return dict(mapping(geometry)) if isinstance(geometry, BaseGeometry) else dict(geometry)


def _locate(catalog: str, profile: str | None) -> tuple[Profile | None, str, str, str]:
    """(profile or None, its reference, why, location) of a request."""
    known = load_profile(profile) if profile else None
    ref, why = (profile, "named in the request") if profile else ("", "")
    if profile and profile.endswith((".yaml", ".yml")):
        ref = str(Path(profile).absolute())
    if catalog in profile_names():
        named = load_profile(catalog)
        if named.endpoint is None:
            raise ConfigError(
                f"catalog: the profile {catalog!r} has no address of its own; give the URL or path as "
                f"catalog and {catalog!r} as profile"
            )
        if known is None:
            known, ref, why = named, catalog, "the catalog's name"
        return known, ref, why, named.endpoint
    if "://" in catalog:
        if known is None:
            host = urlsplit(catalog).hostname
            for name in profile_names():
                endpoint = load_profile(name).endpoint
                if endpoint and host == urlsplit(endpoint).hostname:
                    known, ref, why = load_profile(name), name, f"the host {host}"
        return known, ref, why, catalog
    if not Path(catalog).exists() and len(Path(catalog).parts) == 1 and not Path(catalog).suffix:
        near = get_close_matches(catalog, profile_names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"catalog: there is none named {catalog!r}; {hint}Known are {', '.join(profile_names())}; or "
            "give the URL of a STAC API, or the path of an ItemCollection or static catalog"
        )
    return known, ref, why, catalog


def _collections(source: ItemApi | ItemFiles, profile: Profile | None, asked: str | None) -> tuple[str, ...]:
    """Collection ids to search; a name the source lacks is tried in its other spellings."""
    if asked is None:
        if isinstance(source, ItemFiles):
            return ()
        default = profile.default_collection if profile else None
        names = (default,) if isinstance(default, str) else default or ()
        if not names:
            offered = source.collections()
            names = tuple(offered) if len(offered) == 1 else tuple(n for n in offered if n == "sentinel-2-l2a")
            if offered and not names:
                raise ConfigError(
                    f"collection: {source.source} has {len(offered)} of them ({', '.join(offered[:20])}); name one"
                )
        return tuple(names)
    spellings = {asked}
    for name, others in (profile.collections if profile else {}).items():
        if asked == name or asked in others:
            spellings |= {name, *others}
    offered = source.collections()
    if offered and not spellings & set(offered):
        raise NoItemsError(
            f"collection: {source.source} has no collection {asked!r}; it has {', '.join(offered[:20])}; "
            "name one of them"
        )
    return tuple(sorted(spellings & set(offered))) if offered else (asked,)


# -- filters -------------------------------------------------------------------------------------------------


def _meets(place: BaseGeometry, area: BaseGeometry) -> bool:
    return bool(place.intersects(area) and not place.touches(area))


def _clear_enough(item: Mapping[str, Any], max_cloud_cover: float | None) -> bool:
    cloud = (item.get("properties") or {}).get("eo:cloud_cover")
    return max_cloud_cover is None or cloud is None or float(cloud) <= max_cloud_cover


def _nothing(
    source: ItemApi | ItemFiles,
    found: list[RawItem],
    counts: list[str],
    bbox: Sequence[float],
    span: tuple[date, date],
    collections: Sequence[str],
    max_cloud_cover: float | None,
) -> str:
    """Why nothing was found and where to look, in one paragraph."""
    west, south, east, north = bbox
    swapped = (south, west, north, east)
    hints = []
    if isinstance(source, ItemFiles):
        here = [r for r in found if _meets(footprint(r.item), bbox_polygon(bbox))]
        there = [r for r in found if _meets(footprint(r.item), bbox_polygon(swapped))]
        others = here
    else:
        others = here = found or source.search(bbox=bbox, span=None, collections=collections, max_items=1)
        swap_valid = max(abs(west), abs(east)) <= 90 and west < east
        there = (
            source.search(bbox=swapped, span=_utc_span(*span), collections=collections, max_items=1)
            if swap_valid and not here
            else []
        )
    if there and not here:
        hints.append(f"with longitude and latitude swapped, {list(swapped)}, there are items: swap them")
    if others:
        times = sorted(f"{item_time(raw.item):%Y-%m-%d}" for raw in others)
        shown = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
        hints.append(f"this area has items of {shown}: move time.start and time.end, or allow more cloud")
    elif isinstance(source, ItemFiles) and found and not there:
        west, south, east, north = _extent(found)
        hints.append(f"the items lie within [{west:.2f}, {south:.2f}, {east:.2f}, {north:.2f}]: move the area")
    names = source.collections()
    if names and not others:
        hints.append(f"collections there: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}")
    asked = f"bbox {list(bbox)}, solar days {span[0]} to {span[1]}"
    asked += f", collection {', '.join(collections)}" if collections else ""
    asked += f", cloud cover at most {max_cloud_cover} %" if max_cloud_cover is not None else ""
    way = "; ".join(hints) or "check the area, the dates and the collection"
    return f"no items match {asked} ({'; '.join(counts)}); {way}"


def _extent(found: Iterable[RawItem]) -> tuple[float, float, float, float]:
    bounds = [footprint(raw.item).bounds for raw in found]
    return (
        min(b[0] for b in bounds),
        min(b[1] for b in bounds),
        max(b[2] for b in bounds),
        max(b[3] for b in bounds),
    )


def _replay(
    source: ItemFiles,
    area: BaseGeometry,
    days: tuple[int, int],
    longitude: float,
    *,
    max_cloud_cover: float | None,
    bands: Sequence[str] | None,
    mask: MaskRule | None,
) -> SearchResult:
    """The part of a frozen search that a request asks for."""
    frozen = from_frozen(source.frozen, source.source)
    items = [
        item
        for item in frozen.items
        if days[0] <= solar_day(item.when, longitude) <= days[1]
        and _meets(cut_at_180(shape(item.geometry)), area)
        and (max_cloud_cover is None or item.cloud_cover is None or item.cloud_cover <= max_cloud_cover)
    ]
    if not items:
        raise NoItemsError(
            f"no items match: the frozen search {source.source} holds {len(frozen.items)}, none of them in "
            "the area and the solar days asked for; search the catalog again"
        )
    needed = [*(bands or ()), *([mask.asset] if mask else [])]
    for item in items:
        lacking = [name for name in needed if name not in item.assets]
        if lacking:
            raise ItemError(
                f"assets: item {item.id!r} of the frozen search {source.source} lacks {', '.join(lacking)}; "
                f"it has {', '.join(item.assets)}; search the catalog again with these bands"
            )
    return replace(frozen, items=items, mask=mask or frozen.mask, source=source.source, longitude=longitude)
