"""Events: in comes a STAC Item that has just appeared, out come the periods of a schedule that it belongs to."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pipeline.due import begun
from pipeline.errors import CloudgateError, ConfigError
from pipeline.footprints import bbox_polygon, footprint
from pipeline.items import solar_day
from pipeline.normalise import item_time
from pipeline.region import region_of
from pipeline.request import SEARCH_MARGIN_M
from pipeline.schedule import LoadedSchedule, Series


def slots_of(item: Mapping[str, Any], series: Series, schedule: LoadedSchedule, now: datetime) -> dict[int, set[str]]:
    """Slot -> ids of the new scenes that belong to it, with look-back; none outside the area or the schedule."""
    region = region_of(series.job.area)
    area = bbox_polygon(region.lonlat_bounds(SEARCH_MARGIN_M))
    slots: dict[int, set[str]] = {}
    for one in features(item):
        try:
            place, when = footprint(one), item_time(one)
        except CloudgateError as error:
            raise ConfigError(f"--item: {error}") from error
        if area.intersects(place):
            day = solar_day(when, region.centre[0])
            for period in begun(series, schedule.spec, now):
                if period.look_start <= day <= period.end:
                    slots.setdefault(period.slot, set()).add(str(one.get("id")))
    return slots


def features(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The Items of an Item or a FeatureCollection."""
    return list(item["features"]) if item.get("type") == "FeatureCollection" else [item]


def read_item(text: str) -> dict[str, Any]:
    """A STAC Item, or a FeatureCollection of them, from JSON; also wrapped in a message of a notification service.

    Raises:
        ConfigError: if it is neither.
    """
    try:
        data = json.loads(text)
        if isinstance(data, dict) and isinstance(data.get("Message"), str):
            data = json.loads(data["Message"])
    except ValueError as error:
        raise ConfigError(f"--item: not readable as JSON: {error}; give a STAC Item") from error
    if not isinstance(data, dict) or data.get("type") not in ("Feature", "FeatureCollection"):
        raise ConfigError("--item: a STAC Item (type Feature) or a FeatureCollection of them is needed")
    return data
