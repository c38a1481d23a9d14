"""Which of the found items are used: in come raw items, out come a profile, a mask rule and no twins.

What is left out comes back with the reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from pipeline.errors import ItemError, RequestError
from pipeline.footprints import cut_at_180
from pipeline.items import Item
from pipeline.normalise import find_asset, normalise
from pipeline.profiles import MaskRule, Profile, load_profile, profile_names
from pipeline.stac import RawItem

SPLIT_OVERLAP = 0.5
"""Scenes of one tile and second are duplicates if they share more than this part of the smaller footprint;
split datastrips share only a thin strip."""


SAMPLE = 500
"""So many items are looked at to tell whose they are."""


def detect_profile(items: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Name of the profile that fits most of the items, and why.

    Signs are a catalog's own item properties, its hosts and buckets, and asset keys no other catalog has;
    without any, ``generic`` serves items with usual band names.

    Raises:
        RequestError: if no item has a band under any known name.
    """
    generic = load_profile("generic")
    items = ([item for item in items if _has_band(item, generic)] or list(items))[:SAMPLE]
    best = (0, "", "")
    for name in profile_names():
        profile = load_profile(name)
        if name == "generic" or not any(_has_band(item, profile) for item in items):
            continue
        for sign, count in _signs(items, profile):
            if count > best[0]:
                best = (count, name, f"{sign} in {count} of {len(items)} items")
    if 2 * best[0] > len(items):
        return best[1], best[2]
    if not any(_has_band(item, generic) for item in items):
        raise RequestError(
            f"profile: the items' assets ({', '.join(list(items[0].get('assets') or {})[:12])}) fit no known "
            "profile; write one (YAML: which asset is which band) and name it as profile"
        )
    return "generic", "usual band names and no catalog's own signs"


def _has_band(item: Mapping[str, Any], profile: Profile) -> bool:
    assets = item.get("assets") or {}
    return any(find_asset(assets, keys) is not None for keys in profile.bands.values())


def _signs(items: Sequence[Mapping[str, Any]], profile: Profile) -> list[tuple[str, int]]:
    told = profile.detect
    signs = []
    for start in told.properties:
        count = sum(any(key.startswith(start) for key in item.get("properties") or {}) for item in items)
        signs.append((f"properties {start}*", count))
    for host in told.hosts:
        count = sum(any(host in href for href in _hrefs(item)) for item in items)
        signs.append((f"links to {host}", count))
    signs += [(f"assets {key}", sum(key in (item.get("assets") or {}) for item in items)) for key in told.assets]
    return signs


def _hrefs(item: Mapping[str, Any]) -> list[str]:
    links = [link for link in item.get("links") or () if link.get("rel") in ("self", "collection", "root")]
    return [str(holder.get("href")) for holder in (*links, *(item.get("assets") or {}).values())]


def choose_mask(items: Sequence[Mapping[str, Any]], profile: Profile) -> MaskRule:
    """The profile's mask rule, or the alternative whose raster more of the items carry."""
    rules = (profile.mask, *profile.mask_alternatives)
    return max(rules, key=lambda rule: sum(_has_raster(item, rule.asset) for item in items))


def _has_raster(item: Mapping[str, Any], name: str) -> bool:
    return find_asset(item.get("assets") or {}, (name,)) is not None


def usable(
    found: Sequence[RawItem],
    profile: Profile,
    *,
    bands: Sequence[str] | None,
    need_mask: MaskRule | None,
    masks: Sequence[MaskRule] = (),
) -> tuple[list[Item], list[tuple[str, str]], list[str]]:
    """Normalise the items that have all that is needed.

    Args:
        found: raw items.
        profile: how their catalog speaks.
        bands: bands each item must have; None: at least one.
        need_mask: the rule whose raster each item must have; None: none is needed.
        masks: rules whose rasters are kept besides the profile's.

    Returns:
        (items, dropped as (id, why), notes). Items of another kind (neither band nor mask) are only counted
        in a note.

    Raises:
        ItemError: if no item at all has a band or the mask's raster, or one cannot be normalised.
    """
    wanted = {name: profile.bands.get(name, (name,)) for name in (bands or ())}
    raster = {need_mask.asset: (need_mask.asset,)} if need_mask else {}
    images, others = [], Counter[str]()
    for raw in found:
        if _has_band(raw.item, profile) or any(_has_raster(raw.item, name) for name in raster):
            images.append(raw)
        else:
            others[str(raw.item.get("collection") or "unnamed")] += 1
    notes = [f"{n} items of collection {name} are of another kind (no band)" for name, n in others.items()]
    for what, names in ((f"band {name!r}", keys) for name, keys in wanted.items()):
        _somewhere(found, what, names, profile, "name other bands")
    for name, keys in raster.items():
        _somewhere(found, f"cloud mask {name!r}", keys, profile, "name another one as mask.asset")
    if not bands:
        _somewhere(
            found,
            "band of the profile",
            [key for keys in profile.bands.values() for key in keys],
            profile,
            "",
        )
    items, dropped = [], []
    for raw in images:
        assets = raw.item.get("assets") or {}
        lacking = [name for name, keys in {**wanted, **raster}.items() if find_asset(assets, keys) is None]
        if not bands and not _has_band(raw.item, profile):
            lacking.append("any band")
        if lacking:
            dropped.append((str(raw.item.get("id")), f"it lacks {', '.join(lacking)} (it has {_some(assets)})"))
        else:
            items.append(normalise(raw.item, profile, base=raw.base, bands=bands, masks=masks))
    if not items:
        raise ItemError(f"assets: no item has all that is needed; {dropped[0][0]}: {dropped[0][1]}; ask for less")
    return items, dropped, notes


def _somewhere(found: Sequence[RawItem], what: str, names: Sequence[str], profile: Profile, way_out: str) -> None:
    if any(find_asset(raw.item.get("assets") or {}, names) is not None for raw in found):
        return
    first = max(found, key=lambda raw: len(raw.item.get("assets") or {})).item
    raise ItemError(
        f"assets: none of {len(found)} items has the {what} (asset {' or '.join(names[:6])}, profile "
        f"{profile.name}); "
        f"item {first.get('id')!r} has {_some(first.get('assets') or {})}; "
        + (f"{way_out} or another profile" if way_out else "name another profile")
    )


def _some(assets: Mapping[str, Any]) -> str:
    return ", ".join(list(assets)[:16]) or "no asset"


# -- duplicates ----------------------------------------------------------------------------------------------


def deduplicate(items: Sequence[Item]) -> tuple[list[Item], list[tuple[str, str]]]:
    """Keep one of the scenes with the same platform, tile and second.

    The one with the highest processing baseline stays, then the newest, then the greatest id. Split
    datastrips, whose footprints complement each other, all stay.

    Returns:
        (items in order of time, then id; dropped as (id, why)).
    """
    groups: dict[tuple[str | None, str | None], list[list[Item]]] = {}
    for item in sorted(items, key=_in_time):
        runs = groups.setdefault((item.platform, item.tile), [])
        # Reprocessing may move the time by some milliseconds, over the edge of a second.
        if runs and (item.when - runs[-1][0].when).total_seconds() <= 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    kept: list[Item] = []
    dropped = []
    for run in (run for runs in groups.values() for run in runs):
        stay: list[tuple[Item, BaseGeometry]] = []
        for item in sorted(run, key=_preference, reverse=True) if len(run) > 1 else run:
            place = cut_at_180(shape(item.geometry)) if len(run) > 1 else None
            twin = next((other for other, there in stay if place is not None and _same(place, there)), None)
            if twin is None:
                stay.append((item, place))
            else:
                dropped.append((item.id, f"duplicate of {twin.id}: {_why(item, twin)}"))
        kept += [item for item, _ in stay]
    return sorted(kept, key=_in_time), sorted(dropped)


def _in_time(item: Item) -> tuple[float, str]:
    return item.when.timestamp(), item.id


def _preference(item: Item) -> tuple[tuple[int, ...], str, str]:
    baseline = tuple(int(part) for part in item.baseline.split(".")) if item.baseline else ()
    return baseline, item.created or "", item.id


def _same(one: BaseGeometry, other: BaseGeometry) -> bool:
    smaller = min(one.area, other.area)
    return bool(one.intersection(other).area > SPLIT_OVERLAP * smaller) if smaller > 0 else one.equals(other)


def _why(item: Item, twin: Item) -> str:
    if item.baseline != twin.baseline:
        return f"baseline {item.baseline or 'unknown'} < {twin.baseline}"
    if item.created != twin.created:
        return f"made {item.created or 'at an unknown time'}, before {twin.created}"
    return "same baseline and time of making, lower id"
