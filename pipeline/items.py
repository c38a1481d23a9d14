"""One scene, normalised: in come STAC items as dicts, out come ``Item`` values that freeze and replay.

Everything after the search sees only these values: STAC 1.0 and 1.1 spellings, band aliases, asset- and
item-level projection fields are all resolved in ``pipeline.normalise``. An ``Item`` holds no secret: hrefs
are signed at read time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, timedelta
from datetime import datetime as DateTime
from typing import Any, Self

EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class Asset:
    """One raster of a scene.

    Attributes:
        href: unsigned location: URL, ``s3://`` or a path.
        crs: ``EPSG:n`` or WKT2.
        shape: (height, width) in pixels.
        transform: (a, b, c, d, e, f): x = a*col + b*row + c, y = d*col + e*row + f.
        nodata: DN that means "no data", None where there is none.
        scale: reflectance per DN.
        offset: additive offset in reflectance as the metadata say (not trusted by itself), None where silent.
        requester_pays: the reader must name itself as the one who pays for the traffic (S3).
        checksum: of the whole file, multihash in hex (``file:checksum``), None where there is none.
    """

    href: str
    crs: str
    shape: tuple[int, int]
    transform: tuple[float, float, float, float, float, float]
    nodata: float | None = 0.0
    scale: float = 1e-4
    offset: float | None = None
    requester_pays: bool = False
    checksum: str | None = None


@dataclass(frozen=True)
class Item:
    """One scene of one MGRS tile.

    Attributes:
        id: the catalog's id.
        datetime: acquisition time, UTC, ISO 8601 with ``Z``.
        collection: the catalog's collection id.
        platform: lower case (``sentinel-2a``), None where unknown.
        tile: MGRS tile such as ``33TWL``, None where unknown.
        orbit: relative orbit number, None where unknown.
        datatake: the datatake id, equal for all tiles of one pass, None where unknown.
        baseline: processing baseline such as ``05.09``, None where unknown.
        boa_offset_applied: the catalog's flag that the offset is already in the pixels, None where silent.
        cloud_cover: percent, None where unknown.
        created: processing time (ISO), to choose between duplicates.
        bbox: (west, south, east, north) degrees; west > east across the antimeridian.
        geometry: GeoJSON geometry of the valid data, degrees.
        assets: by band name; the cloud mask's raster under its profile's mask name (``scl``).
        offset_dn: the additive offset in DN that the scout decided (0 or -1000), None before.
        offset_reason: why, in words.
    """

    id: str
    datetime: str
    collection: str
    platform: str | None
    tile: str | None
    orbit: int | None
    datatake: str | None
    baseline: str | None
    boa_offset_applied: bool | None
    cloud_cover: float | None
    created: str | None
    bbox: tuple[float, float, float, float]
    geometry: Mapping[str, Any]
    assets: Mapping[str, Asset] = field(default_factory=dict)
    offset_dn: int | None = None
    offset_reason: str = ""

    @property
    def when(self) -> DateTime:
        """The acquisition time as an aware datetime (UTC)."""
        return DateTime.fromisoformat(self.datetime.replace("Z", "+00:00")).astimezone(UTC)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        assets = {
            name: Asset(**{**asset, "shape": tuple(asset["shape"]), "transform": tuple(asset["transform"])})
            for name, asset in data["assets"].items()
        }
        return cls(**{**data, "bbox": tuple(data["bbox"]), "assets": assets})


@dataclass(frozen=True)
class Acquisition:
    """One pass of one satellite over the area: one layer of a cube.

    Attributes:
        id: stable name, ``2023-08-15_sentinel-2a_R079`` where platform and orbit are known.
        day: solar day, days since 1970-01-01.
        items: its scenes, sorted by id.
    """

    id: str
    day: int
    items: tuple[Item, ...]

    @property
    def platform(self) -> str:
        """Platform, empty where unknown."""
        return self.items[0].platform or ""

    @property
    def orbit(self) -> int:
        """Relative orbit, 0 where unknown."""
        return self.items[0].orbit or 0

    @property
    def when(self) -> DateTime:
        """Time of its first scene (UTC)."""
        return min(item.when for item in self.items)


def solar_day(when: DateTime, longitude: float) -> int:
    """Local solar day at ``longitude`` (degrees, may be unwrapped beyond 180), as days since 1970-01-01."""
    local = when.astimezone(UTC) + timedelta(seconds=round(longitude / 15 * 3600))
    return (local.date() - EPOCH).days


def day_text(day: int) -> str:
    """Days since 1970-01-01 as ``YYYY-MM-DD``."""
    return (EPOCH + timedelta(days=int(day))).isoformat()


def group_acquisitions(items: list[Item], longitude: float) -> list[Acquisition]:
    """Group scenes into acquisitions, in order of time.

    Scenes belong together when platform and relative orbit (or datatake) are known and equal on one solar
    day; where neither is known, by solar day alone. One longitude (the area's centre, degrees) serves the
    whole area, so a pass is never split between two days.
    """
    groups: dict[tuple[int, str], list[Item]] = {}
    for item in items:
        day = solar_day(item.when, longitude)
        if item.orbit is not None:
            key = f"{item.platform or 'unknown'}_R{item.orbit:03d}"
        elif item.datatake is not None:
            key = f"{item.platform or 'unknown'}_{item.datatake}"
        else:
            key = item.platform or ""
        groups.setdefault((day, key), []).append(item)
    acquisitions = [
        Acquisition("_".join(filter(None, (day_text(day), key))), day, tuple(sorted(members, key=lambda i: i.id)))
        for (day, key), members in groups.items()
    ]
    return sorted(acquisitions, key=lambda a: (a.day, a.id))
