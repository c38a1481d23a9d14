"""Temporal check: the looks of a strip and their clear flags in, what is too bright or too dark out.

In: codes of the darkest band, if there is one also of the near infrared, ``clear (T, H, W)`` bool, days.
Out: two bool (T, H, W), True = brighter (missed cloud, haze) or darker (missed shadow) than the other
dates allow. Eager numpy; strictly per pixel (halo 0), so the result does not depend on how a block is
cut; it depends on the looks given, that is on the time span of the request.

The reference of a pixel is the first quartile of its clear looks in a window of time: low enough to lie
on the ground as long as a quarter of the looks that passed for clear are so, and unlike the minimum not
dragged down by one missed shadow. Windows are shared by the dates of 30-day bins counted from
1970-01-01, which costs a third of a window per date. No pixel loses its last look: where all would be
marked (a missed shadow has drawn the reference down, say), the least odd is left. How the margins were
found, what they score, and what did not work: tests/benchmarks/NOTES_mask.md.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.sorting import Codes, Words, filled_quantile, quantile_fillers, strip_px, strips

BIN_DAYS: Final = 30
# A bin's window reaches this much beyond it: each date is compared with those within 20 to 50 days.
REACH_DAYS: Final = 20
# Where acquisitions are rarer, the window takes in at least so many (clear or not).
LEAST_LOOKS: Final = 5

# Brighter: above reference + offset + share * reference (in reflectance of the darkest band).
BRIGHT_OFFSET: Final = 0.02
BRIGHT_SHARE: Final = 0.25
# With two clear looks there is no telling which is the odd one; only a plain cloud is called then.
BRIGHT_OFFSET_TWO: Final = 0.07
# Darker: near infrared below share * reference - offset (so that water's noise does not count) and the
# darkest band no brighter than share * reference (a harvest darkens only the near infrared).
DARK_NIR_SHARE: Final = 0.8
DARK_NIR_OFFSET: Final = 0.01
DARK_SHARE: Final = 1.1
# Without near infrared only deep shadow can be told: darkest band below share * reference - offset.
DARK_ALONE_SHARE: Final = 0.5
DARK_ALONE_OFFSET: Final = 0.005

LEAST_CLEAR: Final = 3  # clear looks in the window for the full rule


def bright_and_dark(
    *,
    codes: Codes,
    clear: NDArray[np.bool_],
    days: NDArray[np.int32],
    nir: Codes | None = None,
    rejected: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Looks among the clear ones that are brighter, and that are darker, than other dates allow.

    Args:
        codes: uint16 (T, H, W), the darkest band (blue); 0 = no data.
        clear: bool (T, H, W), True = usable so far.
        days: int32 (T,), days since 1970-01-01, ascending.
        nir: uint16 (T, H, W) or None, the near infrared; sharpens the shadow test much.
        rejected: bool (T,) or None, acquisitions that count for nothing: none of their looks is a pixel's last.

    Returns:
        bright and dark, bool (T, H, W), never both, and True only where ``clear``. A pixel with one
        clear look in the window is never called; with two only brightness beyond doubt is. Of a pixel's
        clear looks one at least is not called, though it be the least odd of odd ones: it has no other
        beside it, and whoever composes can tell it by that.
    """
    looks, height, width = codes.shape
    bright, dark = np.zeros(codes.shape, bool), np.zeros(codes.shape, bool)
    windows = time_windows(days)
    longest = max((stop - start for _, start, stop in windows), default=1)
    for ys, xs in strips(height, width, strip_px(2 * looks + 3 * longest)):
        block = codes[:, ys, xs]
        shape = (looks, block.shape[1] * block.shape[2])
        values = np.ascontiguousarray(block).reshape(shape)
        infrared = None if nir is None else np.ascontiguousarray(nir[:, ys, xs]).reshape(shape)
        looked = np.ascontiguousarray(clear[:, ys, xs]).reshape(shape)
        usable = _usable(values, infrared, looked)
        hot, cold = np.zeros(shape, bool), np.zeros(shape, bool)
        for members, start, stop in windows:
            part = slice(start, stop)
            near = None if infrared is None else infrared[part]
            limits = _limits(values[part], near, usable[part])
            _call(
                limits,
                values[members],
                None if infrared is None else infrared[members],
                usable[members],
                hot[members],
                cold[members],
            )
        called = hot | cold
        left, candidates = looked & ~called, called
        if rejected is not None:
            left[rejected] = False
            candidates = called & ~rejected[:, None]
        lost = np.flatnonzero(~left.any(axis=0) & candidates.any(axis=0))
        if lost.size:
            _spare_the_last(values, infrared, usable, windows, candidates, lost, hot, cold)
        bright[:, ys, xs] = hot.reshape(block.shape)
        dark[:, ys, xs] = cold.reshape(block.shape)
    return bright, dark


def time_windows(days: NDArray[np.int32]) -> list[tuple[slice, int, int]]:
    """For each bin with dates: its dates as a slice, and the first and past-the-last look compared."""
    bins = np.floor_divide(days, BIN_DAYS)
    found: list[tuple[slice, int, int]] = []
    for number in np.unique(bins):
        members = slice(int(np.searchsorted(bins, number)), int(np.searchsorted(bins, number, "right")))
        first, last = number * BIN_DAYS - REACH_DAYS, (number + 1) * BIN_DAYS + REACH_DAYS
        start, stop = int(np.searchsorted(days, first)), int(np.searchsorted(days, last))
        middle = number * BIN_DAYS + (BIN_DAYS - 1) / 2
        while stop - start < min(LEAST_LOOKS, len(days)):
            later = days[stop] - middle if stop < len(days) else np.inf
            earlier = middle - days[start - 1] if start else np.inf
            start, stop = (start - 1, stop) if earlier <= later else (start, stop + 1)
        found.append((members, start, stop))
    return found


def _usable(values: Codes, infrared: Codes | None, clear: NDArray[np.bool_]) -> Words:
    """All ones where a look is clear and its bands have data."""
    words = np.minimum(values, clear.astype(np.uint16))
    if infrared is not None:
        np.minimum(words, infrared, out=words)
    return np.negative(words, out=words)


def _limits(values: Codes, infrared: Codes | None, usable: Words) -> tuple[Codes, Codes, Codes]:
    """Per pixel of one window: bright above, dark below (darkest band), dark below (infrared)."""
    fill, share = quantile_fillers(usable, 4)
    count = np.zeros(share.shape, np.uint16)
    for words in usable:
        np.subtract(count, words, out=count)  # minus 65535 is plus 1
    level = _reference(values, usable, fill, share)
    offset = np.where(count >= LEAST_CLEAR, np.float32(BRIGHT_OFFSET), np.float32(BRIGHT_OFFSET_TWO))
    above = _as_codes(level * np.float32(1 + BRIGHT_SHARE) + offset)
    np.copyto(above, np.iinfo(np.uint16).max, where=count < 2)
    if infrared is None:
        below = _as_codes(level * np.float32(DARK_ALONE_SHARE) - np.float32(DARK_ALONE_OFFSET))
        below_nir = np.full_like(below, np.iinfo(np.uint16).max)
    else:
        below = _as_codes(level * np.float32(DARK_SHARE))
        level = _reference(infrared, usable, fill, share)
        below_nir = _as_codes(level * np.float32(DARK_NIR_SHARE) - np.float32(DARK_NIR_OFFSET))
    np.multiply(below, count >= LEAST_CLEAR, out=below)
    return above, below, below_nir


def _reference(values: Codes, usable: Words, fill: Words, share: Words) -> NDArray[np.float32]:
    """First quartile of the usable looks as reflectance, at least 0."""
    filled = np.bitwise_and(values, usable)
    np.bitwise_or(filled, fill, out=filled)
    quartile = np.empty_like(share)
    filled_quantile(filled, share, parts=4, spare=np.empty_like(share), out=quartile)
    np.maximum(quartile, np.uint16(1000), out=quartile)
    return (quartile.astype(np.float32) - np.float32(1000)) * np.float32(1e-4)


def _as_codes(reflectance: NDArray[np.float32]) -> Codes:
    """Rounded codes; ``reflectance`` is overwritten."""
    np.multiply(reflectance, np.float32(1e4), out=reflectance)
    np.add(reflectance, np.float32(1000.5), out=reflectance)
    np.maximum(reflectance, np.float32(0), out=reflectance)
    np.minimum(reflectance, np.float32(65534), out=reflectance)
    return reflectance.astype(np.uint16)


def _call(
    limits: tuple[Codes, Codes, Codes],
    values: Codes,
    infrared: Codes | None,
    usable: Words,
    bright: NDArray[np.bool_],
    dark: NDArray[np.bool_],
) -> None:
    """Compare each date of a bin with the limits of its window."""
    above, below, below_nir = limits
    for t, words in enumerate(usable):
        looked = words.astype(bool)
        np.greater(values[t], above, out=bright[t])
        bright[t] &= looked
        np.less(values[t], below, out=dark[t])
        if infrared is not None:
            dark[t] &= infrared[t] < below_nir
        dark[t] &= looked
        dark[t] &= ~bright[t]


def _spare_the_last(
    values: Codes,
    infrared: Codes | None,
    usable: Words,
    windows: list[tuple[slice, int, int]],
    candidates: NDArray[np.bool_],
    at: NDArray[np.intp],
    bright: NDArray[np.bool_],
    dark: NDArray[np.bool_],
) -> None:
    """Take back the call on one look of each pixel ``at``, of those called: on that which oversteps its limit least.

    Overstepping is in codes, of the darkest band where bright, of the infrared (if there is one) where dark; of equals
    the earlier is left.
    """
    over = np.empty((len(values), at.size), np.int32)
    for members, start, stop in windows:
        part = slice(start, stop)
        near = None if infrared is None else infrared[part, at]
        above, below, below_nir = (
            limit.astype(np.int32) for limit in _limits(values[part, at], near, usable[part, at])
        )
        under = below - values[members, at] if infrared is None else below_nir - infrared[members, at]
        over[members] = np.where(bright[members, at], values[members, at] - above, under)
    over[~candidates[:, at]] = np.iinfo(np.int32).max
    spared = over.argmin(axis=0)
    bright[spared, at] = False
    dark[spared, at] = False
