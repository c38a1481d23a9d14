"""Mask rasters read: the values of an item's mask raster in, a state per pixel out.

In: SCL, a class map, a bit field such as Fmask, or a cloud probability, of any shape. Out: uint8 of the
same shape: :data:`NODATA`, :data:`CLEAR`, :data:`CLOUD` or :data:`SHADOW`. What the values mean comes
from the profile or the job, as a :class:`~pipeline.profiles.MaskRule`.
"""

from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.profiles import MaskRule

type State = NDArray[np.uint8]

# States of a look at a pixel.
NODATA: Final = 0
CLEAR: Final = 1
CLOUD: Final = 2
SHADOW: Final = 3


def state_from_scl(values: NDArray[Any]) -> State:
    """State from Sen2Cor's scene classification.

    Classes 8, 9, 10 are cloud, 3 is shadow, 0 (no data) and 1 (defective) are no data, all others clear:
    among them 2 (dark or topographic shadow), which marks dark ground as often as cloud shadow, and 7
    and 11, which hide cloud that the temporal check must find.
    """
    return state_from_classes(values, cloud=(8, 9, 10), shadow=(3,), nodata=(0, 1))


def state_from_classes(
    values: NDArray[Any],
    *,
    cloud: tuple[int, ...] | list[int],
    shadow: tuple[int, ...] | list[int] = (),
    nodata: int | tuple[int, ...] | None = None,
) -> State:
    """State from a class map; classes not named are clear.

    Args:
        values: Integers of any shape.
        cloud: Classes that are cloud.
        shadow: Classes that are shadow (cloud wins where both name one).
        nodata: Class or classes that mean no data.
    """
    empty = () if nodata is None else (nodata,) if isinstance(nodata, int) else tuple(nodata)
    if values.dtype == np.uint8:
        return np.asarray(_class_table(tuple(cloud), tuple(shadow), empty)[values])
    state = np.full(values.shape, CLEAR, np.uint8)
    for classes, meaning in ((shadow, SHADOW), (cloud, CLOUD), (empty, NODATA)):
        state[np.isin(values, tuple(classes))] = meaning
    return state


def state_from_bits(
    values: NDArray[Any],
    *,
    cloud_bits: tuple[int, ...],
    shadow_bits: tuple[int, ...] = (),
    nodata: int | None = None,
) -> State:
    """State from a bit field, such as HLS Fmask (bits 1, 2: cloud and beside it; 3: shadow; 255: no data).

    Args:
        values: Unsigned integers of any shape.
        cloud_bits: Numbers (0 = lowest) of the bits that are cloud.
        shadow_bits: Numbers of the bits that are shadow; cloud wins where both are set.
        nodata: The value (not a bit) that means no data.
    """
    fields = np.arange(256, dtype=np.uint8) if values.dtype == np.uint8 else values
    state = np.full(fields.shape, CLEAR, np.uint8)
    state[(fields & _bits(shadow_bits)) != 0] = SHADOW
    state[(fields & _bits(cloud_bits)) != 0] = CLOUD
    if nodata is not None:
        state[fields == nodata] = NODATA
    return state[values] if values.dtype == np.uint8 else state


def state_from_probability(values: NDArray[Any], *, threshold: float, nodata: float | None = None) -> State:
    """State from a cloud probability: cloud from ``threshold`` on, which is in the raster's own unit.

    Args:
        values: 0-1 or 0-100 as the raster has it (MSK_CLDPRB: 0-100); NaN is no data.
        threshold: 0.4 for s2cloudless in 0-1, 40 for MSK_CLDPRB, say.
        nodata: Value that means no data.
    """
    state = np.where(values >= threshold, np.uint8(CLOUD), np.uint8(CLEAR))
    if np.issubdtype(values.dtype, np.floating):
        state[np.isnan(values)] = NODATA
    if nodata is not None:
        state[values == nodata] = NODATA
    return state


def apply_rule(values: NDArray[Any], rule: MaskRule) -> State:
    """State from a mask raster as the profile's or job's rule reads it.

    Raises:
        ConfigError: a probability rule without threshold, or a rule that finds no cloud in any value.
    """
    if rule.kind == "scl":
        empty = (0, 1) if rule.nodata is None else (0, 1, rule.nodata)
        shadow = rule.shadow if rule.cloud else rule.shadow or (3,)  # who names clouds may name no shadow
        return state_from_classes(values, cloud=rule.cloud or (8, 9, 10), shadow=shadow, nodata=empty)
    if rule.kind == "probability":
        if rule.threshold is None:
            raise ConfigError(
                f"mask {rule.asset!r}: a probability raster needs a threshold in its own unit, such as "
                "threshold: 40 for one in percent"
            )
        return state_from_probability(values, threshold=rule.threshold, nodata=rule.nodata)
    if not rule.cloud:
        raise ConfigError(f"mask {rule.asset!r}: kind {rule.kind} needs to know what is cloud, such as cloud: [1, 2]")
    if rule.kind == "bits":
        return state_from_bits(values, cloud_bits=rule.cloud, shadow_bits=rule.shadow, nodata=rule.nodata)
    return state_from_classes(values, cloud=rule.cloud, shadow=rule.shadow, nodata=rule.nodata)


@lru_cache(maxsize=32)
def _class_table(cloud: tuple[int, ...], shadow: tuple[int, ...], nodata: tuple[int, ...]) -> State:
    """State of each of the 256 values of a uint8 raster."""
    table = np.full(256, CLEAR, np.uint8)
    for classes, meaning in ((shadow, SHADOW), (cloud, CLOUD), (nodata, NODATA)):
        table[[value for value in classes if 0 <= value < 256]] = meaning
    return table


def _bits(numbers: tuple[int, ...]) -> int:
    return sum(1 << number for number in set(numbers))
