"""A scene's states: in come its mask raster and a rule, out come states on a grid, no data where the raster ends.

Beyond its edge a raster says nothing, whatever 0 means in it: in Fmask, in class maps and in probabilities 0 is clear
ground, and clear ground would win over the cloud of the scene that lies beside it in the same pass.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.grid import Grid
from pipeline.items import Asset
from pipeline.profiles import MaskRule, Profile
from pipeline.reader import covered, read_window
from pipeline.states import NODATA, State, apply_rule


def read_state(asset: Asset, grid: Grid, rule: MaskRule, profile: Profile | None = None) -> State:
    """States of a scene on the pixels of ``grid``; see ``read_classes``."""
    return read_classes(asset, grid, rule, profile)[1]


def read_classes(
    asset: Asset, grid: Grid, rule: MaskRule, profile: Profile | None = None
) -> tuple[NDArray[Any], State]:
    """Values of a scene's mask raster and what they mean.

    Args:
        asset: the raster.
        grid: any part of the lattice.
        rule: what its values mean; a value that means no data comes from the rule, else from the item.
        profile: credentials, retries and GDAL settings.

    Returns:
        (height, width) in the raster's dtype, and uint8 states; ``NODATA`` outside the raster.

    Raises:
        ReadError: when it cannot be read, after retries. ConfigError: a rule that cannot be applied.
    """
    nodata = rule.nodata
    if nodata is None and rule.kind == "scl":
        nodata = 0
    elif nodata is None and asset.nodata is not None and math.isfinite(asset.nodata) and asset.nodata % 1 == 0:
        nodata = int(asset.nodata)
    if nodata is not None:
        asset, rule = replace(asset, nodata=float(nodata)), rule.model_copy(update={"nodata": nodata})
    values = read_window(asset, grid, kind="classes", profile=profile)
    state = apply_rule(values, rule)
    if nodata is None or not _holds(values.dtype, nodata):
        state[~covered(asset, grid)] = NODATA
    return values, state


def _holds(dtype: np.dtype[Any], value: int) -> bool:
    return dtype.kind == "f" or bool(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max)
