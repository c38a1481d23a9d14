"""Where items come from: in comes a location, out come raw STAC items and the base of their hrefs.

A location is a STAC API, a static catalog (local or http), an ItemCollection file, or a folder. Only JSON is
read here; nothing is interpreted. Searches go by POST with retries, and every page is fetched before work
starts.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pystac.errors import STACError
from pystac_client import Client
from pystac_client.conformance import ConformanceClasses
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from pystac_client.warnings import PystacClientWarning
from urllib3 import Retry

from pipeline.errors import CatalogError, RequestError
from pipeline.normalise import resolve_href
from pipeline.redaction import without_credentials

_JSON_TYPES = {"FeatureCollection", "Feature", "Catalog", "Collection"}
_IN_FOLDER = ("catalog.json", "collection.json", "items.geojson", "items.json")


@dataclass(frozen=True)
class RawItem:
    """A STAC item as found, and the location its relative hrefs start from (None where unknown)."""

    item: dict[str, Any]
    base: str | None


@dataclass
class ItemFiles:
    """Items read from files; ``frozen`` holds the whole JSON if the file is a frozen search of ours."""

    source: str
    items: list[RawItem] = field(default_factory=list)
    frozen: dict[str, Any] | None = None

    def collections(self) -> list[str]:
        """Collection ids of the items, sorted."""
        return sorted({str(raw.item["collection"]) for raw in self.items if raw.item.get("collection")})


class ItemApi:
    """A STAC API."""

    def __init__(self, url: str, stac_io: StacApiIO) -> None:
        self.source = without_credentials(url)
        with _as_catalog_error(self.source), warnings.catch_warnings():
            warnings.simplefilter("ignore", PystacClientWarning)
            self._client = Client.open(url, stac_io=stac_io)
            if not self._client.conforms_to(ConformanceClasses.ITEM_SEARCH):
                self._client.add_conforms_to("ITEM_SEARCH")  # it has a search link, so it can search

    def collections(self) -> list[str]:
        """Ids of all collections of the server, sorted; empty where it has no list."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PystacClientWarning)
                return sorted(collection.id for collection in self._client.get_collections())
        except (APIError, STACError, KeyError, NotImplementedError):  # the last is pystac-client's for "has no list"
            return []

    @property
    def filters_clouds(self) -> bool:
        """Whether the server can filter by a property (``query`` or ``filter``)."""
        return self._conforms(ConformanceClasses.QUERY) or self._conforms(ConformanceClasses.FILTER)

    def search(
        self,
        *,
        bbox: Sequence[float],
        span: tuple[datetime, datetime] | None,
        collections: Sequence[str] = (),
        geometry: Mapping[str, Any] | None = None,
        max_cloud_cover: float | None = None,
        page_limit: int = 100,
        max_items: int | None = None,
    ) -> list[RawItem]:
        """All items of all pages.

        Args:
            bbox: (west, south, east, north) degrees; west > east makes two searches, merged by id.
            span: first and last instant (UTC).
            collections: ids; empty for all.
            geometry: GeoJSON polygon sent instead of the box.
            max_cloud_cover: percent; sent only where the server says it can filter.
            page_limit: items per page (big pages make servers fail).
            max_items: stop after so many.

        Raises:
            CatalogError: if the server does not answer, after retries.
        """
        asked: dict[str, Any] = {"limit": page_limit, "max_items": max_items, "method": self._method()}
        if collections:
            asked["collections"] = list(collections)
        if span:
            asked["datetime"] = "/".join(f"{when:%Y-%m-%dT%H:%M:%SZ}" for when in span)
        if max_cloud_cover is not None and self._conforms(ConformanceClasses.QUERY):
            asked["query"] = {"eo:cloud_cover": {"lte": max_cloud_cover}}
        elif max_cloud_cover is not None and self._conforms(ConformanceClasses.FILTER):
            asked["filter"] = {"op": "<=", "args": [{"property": "eo:cloud_cover"}, max_cloud_cover]}
            asked["filter_lang"] = "cql2-json"
        west, south, east, north = bbox
        boxes = [bbox] if west <= east else [(west, south, 180.0, north), (-180.0, south, east, north)]
        places: list[dict[str, Any]] = (
            [{"intersects": dict(geometry)}] if geometry is not None else [{"bbox": list(b)} for b in boxes]
        )
        found: dict[tuple[str, str], RawItem] = {}
        with _as_catalog_error(self.source), warnings.catch_warnings():
            warnings.simplefilter("ignore", PystacClientWarning)
            for place in places:
                for item in self._client.search(**asked, **place).items_as_dicts():
                    found[str(item.get("collection")), str(item["id"])] = RawItem(item, _self_link(item))
        return list(found.values())

    def _conforms(self, what: ConformanceClasses) -> bool:
        return bool(self._client.conforms_to(what))

    def _method(self) -> str:
        links = [link for link in self._client.links if link.rel == "search"]
        told = {link.extra_fields.get("method") for link in links}
        return "GET" if told == {"GET"} else "POST"


def open_source(location: str, *, timeout_s: float = 60.0) -> ItemApi | ItemFiles:
    """Open a catalog by URL or path; files are read whole.

    Raises:
        RequestError: if a path does not exist or holds no STAC.
        CatalogError: if a URL does not answer.
    """
    stac_io = StacApiIO(
        timeout=(min(timeout_s, 15.0), timeout_s),
        max_retries=Retry(
            total=6,
            connect=2,  # a server that is not there should not hold the user up
            allowed_methods=None,  # POST too: a search changes nothing
            status_forcelist=[408, 429, 500, 502, 503, 504],
            backoff_factor=0.5,
            backoff_jitter=0.2,
            respect_retry_after_header=True,
            retry_after_max=120,
        ),
    )
    if "://" in location and not location.startswith("file://"):
        data = _fetch(location, stac_io)
        links = {link.get("rel") for link in data.get("links") or ()}
        if data.get("type") not in ("FeatureCollection", "Feature") and ("search" in links or "conformsTo" in data):
            return ItemApi(location, stac_io)
        return _files(location, data, stac_io)
    path = Path(resolve_href(location, str(Path.cwd() / "x")))
    if not path.exists():
        raise RequestError(f"catalog: there is no file or folder {path}; correct the path")
    if path.is_dir():
        return _folder(path, stac_io)
    return _files(str(path), _fetch(str(path), stac_io), stac_io)


def _folder(path: Path, stac_io: StacApiIO) -> ItemFiles:
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return _files(str(path / name), _fetch(str(path / name), stac_io), stac_io)
    out = ItemFiles(str(path))
    for file in sorted([*path.glob("*.json"), *path.glob("*.geojson")]):
        data = _fetch(str(file), stac_io)
        if data.get("type") in _JSON_TYPES:
            out.items += _files(str(file), data, stac_io).items
    if not out.items:
        raise RequestError(
            f"catalog: the folder {path} holds no STAC; it needs a catalog.json, an items.geojson or item files"
        )
    return out


def _files(location: str, data: dict[str, Any], stac_io: StacApiIO) -> ItemFiles:
    out = ItemFiles(without_credentials(location))
    if data.get("format") == "cloudgate-items":
        out.frozen = data
    elif data.get("type") in _JSON_TYPES:
        out.items = list(_walk(location, data, stac_io))
    else:
        raise RequestError(
            f"catalog: {out.source} is JSON but no STAC (type {data.get('type')!r}); an ItemCollection, a "
            "Catalog, a Collection or a STAC API is needed"
        )
    return out


def _walk(location: str, data: dict[str, Any], stac_io: StacApiIO) -> Iterator[RawItem]:
    """Items of a static catalog in the order of its links; every location is read once."""
    seen = {location}
    level = [(location, data)]
    with ThreadPoolExecutor(8 if "://" in location else 1) as pool:
        while level:
            wanted: list[str] = []
            for place, node in level:
                if node.get("type") == "FeatureCollection":
                    yield from (RawItem(item, place) for item in node.get("features") or ())
                elif node.get("type") == "Feature":
                    yield RawItem(node, place)
                else:
                    for link in node.get("links") or ():
                        if link.get("rel") in ("child", "item", "items"):
                            target = resolve_href(link["href"], place)
                            if target not in seen:
                                seen.add(target)
                                wanted.append(target)
            level = list(zip(wanted, pool.map(lambda place: _fetch(place, stac_io), wanted), strict=True))


def _fetch(location: str, stac_io: StacApiIO) -> dict[str, Any]:
    if "://" in location:
        with _as_catalog_error(without_credentials(location)):
            text = stac_io.read_text(location)
    else:
        try:
            text = Path(location).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"catalog: {location} cannot be read ({error}); a link of the catalog points to it, or its "
                "path is wrong"
            ) from error
    try:
        data = json.loads(text)
    except ValueError as error:
        kind = CatalogError if "://" in location else RequestError
        raise kind(
            f"catalog: {without_credentials(location)} is not JSON ({error}); give a STAC API, catalog or "
            "ItemCollection"
        ) from error
    return data if isinstance(data, dict) else {}


def _self_link(item: Mapping[str, Any]) -> str | None:
    links = [link["href"] for link in item.get("links") or () if link.get("rel") == "self"]
    return next((href for href in links if "://" in href), None)


class _as_catalog_error:
    """Context: whatever a server does wrong becomes one ``CatalogError`` that names it."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (APIError, STACError, OSError, ValueError, KeyError, TypeError)):
            status = getattr(error, "status_code", None)
            what = f"it answered HTTP {status}" if status else "it cannot be reached or did not answer properly"
            raise CatalogError(
                f"catalog {self._url}: {what}, after retries ({str(error)[:200]}); check the address and the "
                "network, wait and try again, or use another catalog or a frozen search"
            ) from error
