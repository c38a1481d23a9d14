"""Where a job works: in comes its area, out come bounds in degrees for the search and the ``Grid`` of the mosaic.

Longitudes are unwrapped: across the antimeridian a region runs on beyond 180 degrees, so centre, zone, search box and
solar day come out right there too.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rasterio.features import geometry_mask
from shapely.geometry import box, shape
from shapely.geometry.base import BaseGeometry
from shapely.ops import unary_union

from pipeline.config import Area, GridSpec
from pipeline.errors import ConfigError
from pipeline.grid import Grid, crs_name, projected_crs, utm_crs
from pipeline.items import Item
from pipeline.tiles import TILE_M, tile_origin

STRIP_ROWS: Final = 2048
"""Rows of a polygon drawn at a time: a byte for each pixel of such an area would take 6.6 GB."""


@dataclass(frozen=True)
class Region:
    """An area in degrees, unwrapped (x may exceed 180).

    Attributes:
        geometry: polygon in degrees.
        polygon: whether pixels outside it are outside the area (a box only gives the bounds).
        native: (crs, box in its metres) of an MGRS tile, which lies square in its own zone only.
    """

    geometry: BaseGeometry
    polygon: bool = False
    native: tuple[str, BaseGeometry] | None = field(default=None)

    @property
    def centre(self) -> tuple[float, float]:
        """(longitude, latitude) of the middle of the bounds, longitude unwrapped."""
        west, south, east, north = self.geometry.bounds
        return (west + east) / 2, (south + north) / 2

    def lonlat_bounds(self, margin_m: float = 0.0) -> tuple[float, float, float, float]:
        """(west, south, east, north) degrees with a margin in metres; west > east across the antimeridian."""
        west, south, east, north = self.geometry.bounds
        dlat = margin_m / 111_000
        dlon = dlat / max(math.cos(math.radians(min(max(abs(south), abs(north)) + dlat, 89.0))), 0.02)
        if east - west + 2 * dlon >= 360:
            return -180.0, max(south - dlat, -90), 180.0, min(north + dlat, 90)
        return _wrap(west - dlon), max(south - dlat, -90.0), _wrap(east + dlon), min(north + dlat, 90.0)

    def crs(self, spec: GridSpec) -> str:
        """The mosaic's CRS: the given one, or the UTM zone of the centre.

        Raises:
            ConfigError: for an unknown or geographic CRS.
        """
        if spec.crs.lower() != "utm":
            return crs_name(projected_crs(spec.crs))
        return self.native[0] if self.native else utm_crs(*self.centre)

    def project(self, crs: str) -> BaseGeometry:
        """The region in a CRS, its edges densified first.

        Raises:
            ConfigError: if it lies where the CRS is not defined.
        """
        if self.native and self.native[0] == crs:
            return self.native[1]
        west, south, east, north = self.geometry.bounds
        dense = self.geometry.segmentize(max((east - west + north - south) / 100, 1e-4))
        to_crs = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
        out = shapely.transform(dense, to_crs.transform, interleaved=False)
        if not np.isfinite(out.bounds).all():
            raise ConfigError(f"grid.crs: the area {self.geometry.bounds} lies outside what {crs[:20]} covers; use utm")
        return out

    def grid(self, spec: GridSpec, items: Sequence[Item], bands: Sequence[str]) -> Grid:
        """The grid of a job, on the lattice of most items that are in its CRS (ties: lowest MGRS tile).

        Raises:
            ConfigError: for an unknown or geographic CRS, or an empty area.
        """
        crs = self.crs(spec)
        grid = Grid.around(
            self.project(crs),
            crs=crs,
            resolution_m=spec.resolution_m,
            phase_m=lattice_phase(items, bands, crs, spec.resolution_m),
            shard_px=spec.shard_px,
        )
        return replace(grid, sharded=spec.sharded)

    def inside(self, grid: Grid) -> NDArray[np.uint8] | None:
        """Which pixel centres lie inside a polygon; None where all of the grid is the area.

        Returns:
            (height, ceil(width / 8)) uint8, the bits of each row packed as ``np.packbits`` does; read-only, as the
            periods of a series share it.
        """
        return _drawn(self, grid) if self.polygon else None


@lru_cache(maxsize=1)  # of 85,000 x 77,000 px it takes 10 s and 0.8 GB, and a job has but one area
def _drawn(region: Region, grid: Grid) -> NDArray[np.uint8]:
    outline = region.project(grid.crs)
    out = np.empty((grid.height, -(-grid.width // 8)), np.uint8)
    for top in range(0, grid.height, STRIP_ROWS):
        part = grid.window((top, min(top + STRIP_ROWS, grid.height)), (0, grid.width))
        inside = geometry_mask([outline], part.shape, part.transform, invert=True)
        out[top : top + STRIP_ROWS] = np.packbits(inside, axis=1)
    out.setflags(write=False)
    return out


def _wrap(longitude: float) -> float:
    return longitude if -180 <= longitude <= 180 else (longitude + 180) % 360 - 180


def region_of(area: Area) -> Region:
    """Resolve the area of a job.

    Raises:
        ConfigError: for an unreadable or empty polygon file, or one whose coordinates are not degrees.
    """
    if area.bbox is not None:
        west, south, east, north = area.bbox
        return Region(box(west, south, east if east > west else east + 360, north))
    if area.mgrs is not None:
        return _tile_region(area.mgrs)
    assert area.geojson is not None
    return Region(_read_polygon(area.geojson), polygon=True)


def _tile_region(tile: str) -> Region:
    epsg, left, top = tile_origin(tile)
    crs = f"EPSG:{epsg}"
    square = box(left, top - TILE_M, left + TILE_M, top)
    to_lonlat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    outline = shapely.transform(square.segmentize(5000), to_lonlat.transform, interleaved=False)
    return Region(_unwrap(outline), native=(crs, square))


def _read_polygon(path: Path) -> BaseGeometry:
    try:
        data: Any = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"area.geojson: there is no file {path}; paths are relative to the job file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"area.geojson: {path} is not GeoJSON ({error})") from error
    kind = data.get("type") if isinstance(data, dict) else None
    if kind not in ("FeatureCollection", "Feature", "Polygon", "MultiPolygon"):
        raise ConfigError(
            f"area.geojson: {path} is {kind!r}; a Polygon, MultiPolygon, Feature or FeatureCollection is needed"
        )
    try:
        merged = _unwrap(unary_union([shapely.make_valid(shape(part)) for part in _geometries(data)]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, shapely.errors.ShapelyError) as error:
        raise ConfigError(
            f"area.geojson: {path} holds no geometry that can be read ({type(error).__name__}: {error}); look at its "
            "features and coordinates"
        ) from error
    if merged.is_empty or merged.area == 0:
        raise ConfigError(f"area.geojson: {path} holds no polygon with an area")
    west, south, east, north = merged.bounds
    if abs(south) > 90 or abs(north) > 90 or west < -180 or east > 540:
        raise ConfigError(
            f"area.geojson: bounds {merged.bounds} are not degrees; GeoJSON is in EPSG:4326, longitude first"
        )
    return merged


def _geometries(data: dict[str, Any]) -> list[Any]:
    """Geometries of a GeoJSON object; features without one are left out."""
    if data["type"] in ("Polygon", "MultiPolygon"):
        return [data]
    features = data["features"] if data["type"] == "FeatureCollection" else [data]
    return [feature["geometry"] for feature in features if feature.get("geometry")]


def _unwrap(geometry: BaseGeometry) -> BaseGeometry:
    """Move western longitudes beyond 180 where a geometry would else span more than half the globe."""
    west, _, east, _ = geometry.bounds
    if east - west <= 180:
        return geometry

    def shift(coords: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack([np.where(coords[:, 0] < 0, coords[:, 0] + 360, coords[:, 0]), coords[:, 1]])

    moved = unary_union([shapely.transform(part, shift) for part in getattr(geometry, "geoms", [geometry])])
    return shapely.make_valid(moved)


def lattice_phase(items: Sequence[Item], bands: Sequence[str], crs: str, resolution_m: float) -> tuple[float, float]:
    """(x, y) of the lattice that most items in ``crs`` lie on, metres in [0, resolution); (0, 0) without any."""
    wanted = CRS.from_user_input(crs)
    votes: Counter[tuple[float, float]] = Counter()
    lowest: dict[tuple[float, float], str] = {}
    for item in items:
        assets = [item.assets[band] for band in bands if band in item.assets]
        if not assets:
            continue
        asset = min(assets, key=lambda a: abs(a.transform[0]))
        if asset.crs != crs and CRS.from_user_input(asset.crs) != wanted:
            continue
        phase = tuple(
            round(float(v) % resolution_m, 4) % resolution_m for v in (asset.transform[2], asset.transform[5])
        )
        key = (phase[0], phase[1])
        votes[key] += 1
        lowest[key] = min(lowest.get(key, "~"), item.tile or "~")
    return min(votes, key=lambda key: (-votes[key], lowest[key])) if votes else (0.0, 0.0)
