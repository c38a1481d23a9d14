"""MGRS tiles of Sentinel-2: in comes a name such as ``33TWM``, out comes where its rasters lie.

The tiling is fixed: a raster starts at the 100 km square's north-western corner, moved outwards to a multiple of 60 m
(the coarsest band), and is 109.8 km wide.
"""

import math
import warnings
from functools import cache

from mgrs import MGRS
from mgrs.core import MGRSError

from pipeline.errors import ConfigError

TILE_M = 109_800


@cache
def tile_origin(tile: str) -> tuple[int, float, float]:
    """(EPSG code, left, top) in metres of the rasters of an MGRS tile.

    Raises:
        ConfigError: if there is no such tile.
    """
    name = tile.removeprefix("T").zfill(5)
    try:
        with warnings.catch_warnings():
            # The south-west corner of a tile at the edge of a latitude band lies in the band below, which mgrs notes.
            warnings.simplefilter("ignore", RuntimeWarning)
            zone, hemisphere, easting, northing = MGRS().MGRSToUTM(f"{name}0000000000")
    except (MGRSError, ValueError, OverflowError) as error:
        raise ConfigError(f"tile: {tile!r} is no MGRS tile; it looks like 33TWM") from error
    left, top = round(easting), round(northing) + 100_000
    return (32600 if hemisphere == "N" else 32700) + zone, math.floor(left / 60) * 60.0, math.ceil(top / 60) * 60.0
