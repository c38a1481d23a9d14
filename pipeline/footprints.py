"""Where scenes lie: in come raw STAC items or boxes in degrees, out come polygons cut at the antimeridian."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from shapely import force_2d, get_parts, transform
from shapely.affinity import translate
from shapely.errors import GEOSException
from shapely.geometry import MultiPolygon, box, shape
from shapely.geometry.base import BaseGeometry
from shapely.ops import unary_union

from pipeline.errors import ItemError


def footprint(item: Mapping[str, Any]) -> BaseGeometry:
    """Footprint of a raw item in degrees within -180..180, cut at the antimeridian; else its bbox.

    Raises:
        ItemError: if it has neither.
    """
    geometry = item.get("geometry")
    if geometry:
        try:
            return cut_at_180(shape(geometry))
        except (GEOSException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ItemError(
                f"item {item.get('id')!r}: geometry is not readable as GeoJSON ({error}); correct the item"
            ) from error
    return bbox_polygon(item_bbox(item))


def bbox_polygon(bbox: Sequence[float]) -> BaseGeometry:
    """A box of degrees as polygon; west > east crosses the antimeridian and gives two parts."""
    west, south, east, north = bbox
    if west > east:
        return MultiPolygon([box(west, south, 180, north), box(-180, south, east, north)])
    return box(west, south, east, north)


def cut_at_180(geometry: BaseGeometry) -> BaseGeometry:
    """Polygons in degrees; a part that jumps over or reaches beyond 180 is cut in two within -180..180."""
    parts = []
    for part in get_parts(geometry):
        west, _, east, _ = part.bounds
        if east - west > 180 and west >= -180 and east <= 180:  # no scene is so wide: it jumps from 179 to -179
            part = transform(force_2d(part), lambda xy: np.column_stack((xy[:, 0] % 360, xy[:, 1])))
        part = part if part.is_valid else part.buffer(0)
        for shift in (-360, 0, 360):
            piece = translate(part, xoff=shift).intersection(box(-180, -90, 180, 90))
            if not piece.is_empty:
                parts.append(piece)
    return parts[0] if len(parts) == 1 else unary_union(parts)


def as_floats(value: Any) -> Any:
    """GeoJSON with lists and floats only: a server may write 46 where the file said 46.0."""
    if isinstance(value, Mapping):
        return {key: as_floats(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_floats(part) for part in value]
    return float(value) if isinstance(value, int) else value


def item_bbox(item: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """(west, south, east, north) of a raw item in degrees, west > east across the antimeridian.

    Raises:
        ItemError: if it has neither bbox nor geometry.
    """
    values = item.get("bbox")
    if values and len(values) in (4, 6):
        half = len(values) // 2
        return float(values[0]), float(values[1]), float(values[half]), float(values[half + 1])
    if not item.get("geometry"):
        raise ItemError(f"item {item.get('id')!r}: it has neither geometry nor bbox; correct the item")
    parts = list(get_parts(footprint(item)))
    south, north = min(p.bounds[1] for p in parts), max(p.bounds[3] for p in parts)
    west, east = min(p.bounds[0] for p in parts), max(p.bounds[2] for p in parts)
    if west <= -180 and east >= 180:  # cut at the antimeridian: from the western edge of the eastern-hemisphere part
        west = min(p.bounds[0] for p in parts if p.bounds[2] >= 180)
        east = max(p.bounds[2] for p in parts if p.bounds[0] <= -180)
    return west, south, east, north
