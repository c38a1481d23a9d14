"""Compositing per pixel: T looks of uint16 codes in, one value per band and the date it comes from out.

In: ``codes (T, B, H, W)`` uint16 (0 = no data, 65535 reserved), ``clear (T, H, W)`` bool (True = usable),
``days (T,)`` int32 since 1970-01-01 ascending, ``target`` in the same days. Out: :class:`Composed`.

Every method is eager numpy, single-threaded (the ufuncs release the GIL: run blocks in threads), and
elementwise in space: a pixel's bits do not depend on how the block was cut. A look counts at a pixel
where it is clear **and all its bands have data**, so that no composite mixes the bands of different
looks unknowingly (``bands.complete_looks``). Where no look counts, codes and date are 0.

The work goes strip by strip, small enough for all T looks of a strip to stay in the processor's second
cache, and without boolean indexing: masks are uint16 words of all ones or zeros, so that masking is a
bitwise and. Roundings are half up. Sources: science reference, section 4 (median, medoid: Flood 2013,
doi:10.3390/rs5126481; geometric median: Roberts 2017, doi:10.1109/TGRS.2017.2723896).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.sorting import Codes, Words, filled_quantile, quantile_fillers, strip_px, strips

DECAY_TAU_DAYS: Final = 15.0

# The geometric median stops when a step is shorter than this many codes (1 code = 1e-4 reflectance).
GEOMEDIAN_EPS: Final = 0.05
GEOMEDIAN_MAXITERS: Final = 1000


@dataclass(frozen=True)
class Composed:
    """A composite of one block.

    Attributes:
        codes: uint16 (B, H, W); 0 where no look counts.
        source_date: int32 (H, W), days since 1970-01-01; 0 where no look counts. For medoid and nearest
            the look shown, for all others the clear look nearest to the target (ties: the earlier).
    """

    codes: Codes
    source_date: NDArray[np.int32]


@dataclass(frozen=True)
class _Strip:
    """One strip of the block, ready for a kernel; n pixels, flattened."""

    values: Codes  # (T, B, rows, cols), a view of the input
    usable: Words  # (T, n): all ones where the look counts, else 0
    near: Words  # (n,): key of the usable look nearest to the target, 0 = none
    keys: tuple[int, ...]  # key of each look: T for the nearest to the target, 1 for the farthest
    days: tuple[int, ...]
    target: int
    rows: Words  # (T, n) scratch
    spare: Words  # (n,) scratch

    @property
    def bands(self) -> int:
        return int(self.values.shape[1])

    def masked(self, band: int) -> Words:
        """The strip's scratch filled with one band, 0 where a look does not count: (T, n)."""
        shape = (len(self.days), *self.values.shape[2:])
        np.bitwise_and(self.values[:, band], self.usable.reshape(shape), out=self.rows.reshape(shape))
        return self.rows


# A kernel writes (B, n) codes and says which look it shows: a key per pixel, or None for the nearest.
type _Kernel = Callable[[_Strip, Codes], Words | None]


def median(*, codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int) -> Composed:
    """Per-band median over the clear looks; of an even number the mean of the middle two, half up."""
    return _compose(codes, clear, days, target, lambda strip, out: _quantile(strip, out, parts=2))


def p25(*, codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int) -> Composed:
    """Per-band first quartile over the clear looks, linear between ranks (numpy's default), half up."""
    return _compose(codes, clear, days, target, lambda strip, out: _quantile(strip, out, parts=4))


def mean(*, codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int) -> Composed:
    """Per-band mean over the clear looks, exact, half up."""
    return _compose(codes, clear, days, target, _mean)


def medoid(*, codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int) -> Composed:
    """The clear look nearest (Euclid over bands) to the per-band median; ties: see :class:`Composed`.

    Differences in one band count up to sqrt(2**32 / B) codes only (1.6 in reflectance for 15 bands, more
    for fewer), which keeps the distances exact integers.
    """
    return _compose(codes, clear, days, target, _medoid)


def geomedian(*, codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int) -> Composed:
    """Geometric median over the clear looks (library ``geomad``), converged to 0.05 codes, half up.

    In one dimension the geometric median is the median, and of one or two looks it is their mean; those
    are taken directly, since the library's iteration stops where it starts there.
    """
    if codes.shape[1] == 1:
        return median(codes=codes, clear=clear, days=days, target=target)
    return _compose(codes, clear, days, target, _geomedian)


def nearest(*, codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int) -> Composed:
    """The clear look nearest in time to the target, as it is; tie: the earlier."""
    return _compose(codes, clear, days, target, _nearest)


def linear(*, codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int) -> Composed:
    """Linear in time between the last clear look at or before the target and the first one after it.

    A clear look on the target day gives exactly its codes; where one side is missing the other side's
    nearest look is replicated. Exact in the integers, half up.
    """
    return _compose(codes, clear, days, target, _linear)


def decay(
    *,
    codes: Codes,
    clear: NDArray[np.bool_],
    days: NDArray[np.int32],
    target: int,
    tau_days: float = DECAY_TAU_DAYS,
) -> Composed:
    """Mean over the clear looks with weights exp(-abs(day - target) / tau_days); float32, half up."""
    if not tau_days > 0:
        raise ConfigError(f"decay: tau_days must be above 0, got {tau_days!r}; the default is 15 days")
    return _compose(codes, clear, days, target, lambda strip, out: _decay(strip, out, tau_days))


METHODS: Final[dict[str, Callable[..., Composed]]] = {
    "median": median,
    "p25": p25,
    "mean": mean,
    "medoid": medoid,
    "geomedian": geomedian,
    "nearest": nearest,
    "linear": linear,
    "decay": decay,
}


def clear_count(clear: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """Number of clear looks, uint16 (H, W), from ``clear`` bool (T, H, W)."""
    return np.asarray(np.add.reduce(clear.view(np.uint8), axis=0, dtype=np.uint16))


def _compose(codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32], target: int, kernel: _Kernel) -> Composed:
    """Check the arrays, run ``kernel`` on every strip, and put dates to the looks it shows."""
    _check(codes, clear, days)
    looks, bands, height, width = codes.shape
    keys, day_of_key = _nearness(days, target)
    out = np.empty((bands, height, width), np.uint16)
    dates = np.empty((height, width), np.int32)
    px = strip_px(4 * looks + 2 * bands)
    usable, rows = np.empty((looks, px), np.uint16), np.empty((looks, px), np.uint16)
    spare, near, flat = (np.empty(px, np.uint16), np.empty(px, np.uint16), np.empty((bands, px), np.uint16))
    for ys, xs in strips(height, width, px):
        values = codes[:, :, ys, xs]
        n = values.shape[2] * values.shape[3]
        strip = _Strip(
            values=values,
            usable=usable[:, :n],
            near=near[:n],
            keys=keys,
            days=tuple(int(d) for d in days),
            target=int(target),
            rows=rows[:, :n],
            spare=spare[:n],
        )
        _fill_usable(strip, clear[:, ys, xs])
        shown = kernel(strip, flat[:, :n])
        out[:, ys, xs] = flat[:, :n].reshape(values.shape[1:])
        shown = strip.near if shown is None else shown
        dates[ys, xs] = np.take(day_of_key, shown, mode="clip").reshape(values.shape[2:])
    return Composed(codes=out, source_date=dates)


def _check(codes: Codes, clear: NDArray[np.bool_], days: NDArray[np.int32]) -> None:
    if codes.ndim != 4 or codes.dtype != np.uint16:
        raise ValueError(f"codes must be uint16 (T, B, H, W), got {codes.dtype} {codes.shape}")
    if clear.dtype != np.bool_ or clear.shape != (codes.shape[0], *codes.shape[2:]):
        raise ValueError(f"clear must be bool (T, H, W) of codes {codes.shape}, got {clear.dtype} {clear.shape}")
    if days.shape != codes.shape[:1] or not 1 <= len(days) < np.iinfo(np.uint16).max:
        raise ValueError(f"days must hold one day for each of the {codes.shape[0]} looks (1..65534)")
    if np.any(np.diff(days) < 0):
        raise ValueError(f"days must ascend, got {days.tolist()}: sort the looks by time first")


def _nearness(days: NDArray[np.int32], target: int) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    """Key of each look, T (nearest to target; tie: the earlier) to 1, and the day of each key (0: 0)."""
    order = np.argsort(np.abs(days.astype(np.int64) - target), kind="stable")
    keys = np.empty(len(days), np.int64)
    keys[order] = np.arange(len(days), 0, -1)
    day_of_key = np.zeros(len(days) + 1, np.int32)
    day_of_key[keys] = days
    return tuple(int(k) for k in keys), day_of_key


def _fill_usable(strip: _Strip, clear: NDArray[np.bool_]) -> None:
    """Fill ``usable`` (clear and complete) and ``near`` of a strip."""
    words, whole = strip.usable.reshape(clear.shape), strip.rows.reshape(clear.shape)
    np.copyto(words, clear)
    np.copyto(whole, strip.values[:, 0])
    for band in range(1, strip.bands):
        np.minimum(whole, strip.values[:, band], out=whole)
    np.minimum(words, whole, out=words)
    np.negative(words, out=words)  # 1 -> 65535
    strip.near.fill(0)
    for t, key in enumerate(strip.keys):
        np.bitwise_and(strip.usable[t], np.uint16(key), out=strip.spare)
        np.maximum(strip.near, strip.spare, out=strip.near)


def _chosen_words(shown: Words, key: int, out: Words) -> Words:
    """All ones where ``shown`` is the look of this key."""
    np.copyto(out, shown == key)
    return np.negative(out, out=out)


def _quantile(strip: _Strip, out: Codes, *, parts: int) -> None:
    """Masked quantile 1/parts (2: median, 4: first quartile), linear between ranks, half up."""
    fill, share = quantile_fillers(strip.usable, parts)
    for band in range(strip.bands):
        filled = np.bitwise_or(strip.masked(band), fill, out=strip.rows)
        filled_quantile(filled, share, parts=parts, spare=strip.spare, out=out[band])


def _mean(strip: _Strip, out: Codes) -> None:
    """Sum in uint32, divide once; exact for up to 65534 looks."""
    count = np.zeros(strip.near.shape, np.uint16)
    for words in strip.usable:
        np.subtract(count, words, out=count)  # minus 65535 is plus 1
    inverse = (1.0 / np.arange(1, len(strip.days) + 1)).astype(np.float64)
    share = np.take(np.concatenate([[0.0], inverse]), count, mode="clip")
    total = np.empty(strip.near.shape, np.uint32)
    for band in range(strip.bands):
        np.copyto(total, 0)
        for values in strip.masked(band):
            np.add(total, values, out=total)
        _round_half_up(np.multiply(total, share), out[band])


def _round_half_up(values: NDArray[np.float64], out: Codes) -> None:
    """Round half up into uint16; overwrites ``values``.

    The tiny addend makes quotients of integers exact: a quotient with a divisor below 32768 that is not
    a half lies at least 1.5e-5 from one, and float64 errs by some 1e-11 here.
    """
    np.add(values, 0.5 + 1e-6, out=values)
    np.copyto(out, values, casting="unsafe")


def _nearest(strip: _Strip, out: Codes) -> None:
    _pick(strip, strip.near, range(len(strip.days)), out)


def _pick(strip: _Strip, shown: Words, looks: range, out: Codes) -> None:
    """Write the codes of the look whose key is ``shown`` (0: none), of those in ``looks``."""
    words = np.empty_like(shown)
    out.fill(0)
    for t in looks:
        _chosen_words(shown, strip.keys[t], words)
        shape = strip.values.shape[2:]
        for band in range(strip.bands):
            np.bitwise_and(strip.values[t, band], words.reshape(shape), out=strip.spare.reshape(shape))
            np.bitwise_or(out[band], strip.spare, out=out[band])


def _nearest_key(strip: _Strip, looks: range) -> Words:
    """Key of the usable look nearest to the target among ``looks``; 0 = none."""
    best = np.zeros_like(strip.near)
    for t in looks:
        np.bitwise_and(strip.usable[t], np.uint16(strip.keys[t]), out=strip.spare)
        np.maximum(best, strip.spare, out=best)
    return best


def _linear(strip: _Strip, out: Codes) -> None:
    """A + (b - a) * share, with share per pixel from a table over the pairs (look before, look after)."""
    split = sum(day <= strip.target for day in strip.days)
    before, after = range(split), range(split, len(strip.days))
    key_a, key_b = _nearest_key(strip, before), _nearest_key(strip, after)
    first, second = np.empty_like(out), np.empty_like(out)
    _pick(strip, key_a, before, first)
    _pick(strip, key_b, after, second)
    table = np.zeros((len(strip.days) + 1, len(strip.days) + 1))
    for a in before:
        for b in after:
            past, ahead = strip.target - strip.days[a], strip.days[b] - strip.target
            table[strip.keys[a], strip.keys[b]] = past / (past + ahead)
    pair = np.multiply(key_a, table.shape[1], dtype=np.int64)
    share = np.take(table.ravel(), np.add(pair, key_b, out=pair), mode="clip")
    only_after, only_before = key_a == 0, key_b == 0
    start, step = np.empty(strip.near.shape), np.empty(strip.near.shape)
    for band in range(strip.bands):
        np.copyto(first[band], second[band], where=only_after)
        np.copyto(second[band], first[band], where=only_before)
        np.copyto(start, first[band])
        np.subtract(second[band], start, out=step)
        np.multiply(step, share, out=step)
        _round_half_up(np.add(start, step, out=step), out[band])


def _decay(strip: _Strip, out: Codes, tau_days: float) -> None:
    """Weighted sums in float32, dates in order; weights are relative to the nearest of all dates."""
    gaps = [abs(day - strip.target) for day in strip.days]
    # 1e-30: so that a pixel seen only long ago still divides by something float32 can hold.
    weights = [np.float32(max(math.exp((min(gaps) - gap) / tau_days), 1e-30)) for gap in gaps]
    norm, one = (np.zeros(strip.near.shape, np.float32), np.empty(strip.near.shape, np.float32))
    for weight, words in zip(weights, strip.usable, strict=True):
        np.copyto(one, np.minimum(words, np.uint16(1), out=strip.spare))
        np.add(norm, np.multiply(one, weight, out=one), out=norm)
    np.copyto(norm, 1, where=strip.near == 0)
    total = np.empty_like(norm)
    for band in range(strip.bands):
        total.fill(0)
        for weight, values in zip(weights, strip.masked(band), strict=True):
            np.copyto(one, values)
            np.add(total, np.multiply(one, weight, out=one), out=total)
        np.divide(total, norm, out=total)
        np.copyto(out[band], np.add(total, np.float32(0.5), out=total), casting="unsafe")


def _medoid(strip: _Strip, out: Codes) -> Words:
    """Distances as exact uint32; among the least distant the key nearest in time wins."""
    _quantile(strip, out, parts=2)
    reach = np.uint16(min(math.isqrt((2**32 - 2) // strip.bands), 65535))
    shape = strip.values.shape[2:]
    distance = np.zeros((len(strip.days), *strip.near.shape), np.uint32)
    square, low = (np.empty(strip.near.shape, np.uint32), np.empty(strip.near.shape, np.uint16))
    for t in range(len(strip.days)):
        for band in range(strip.bands):
            value, middle = strip.values[t, band], out[band].reshape(shape)
            np.minimum(value, middle, out=low.reshape(shape))
            np.maximum(value, middle, out=strip.spare.reshape(shape))
            np.minimum(np.subtract(strip.spare, low, out=low), reach, out=low)
            np.add(distance[t], np.multiply(low, low, dtype=np.uint32, out=square), out=distance[t])
        np.invert(strip.usable[t], out=low)
        np.multiply(low, np.uint32(0x10001), dtype=np.uint32, out=square)  # all ones where not usable
        np.bitwise_or(distance[t], square, out=distance[t])
    least = np.minimum.reduce(distance, axis=0)
    shown = np.zeros_like(strip.near)
    for t, key in enumerate(strip.keys):
        np.copyto(low, distance[t] == least)
        np.multiply(low, np.uint16(key), out=low)
        np.maximum(shown, np.bitwise_and(low, strip.usable[t], out=low), out=shown)
    _pick(strip, shown, range(len(strip.days)), out)
    return shown


def _geomedian(strip: _Strip, out: Codes) -> None:
    """Library call with every pixel as a row of its own: inside a row it starts from its neighbour."""
    gm = import_module("geomad.pcm").gm  # carries no types
    _mean(strip, out)
    count = np.add.reduce(strip.usable & np.uint16(1), axis=0, dtype=np.uint16)
    todo = np.flatnonzero(count > 2)
    if not todo.size:
        return
    stack = np.empty((todo.size, 1, strip.bands, len(strip.days)), np.float32)
    absent = strip.usable[:, todo] == 0
    for band in range(strip.bands):
        looks = strip.masked(band)[:, todo].astype(np.float32)
        looks[absent] = np.nan
        stack[:, 0, band, :] = looks.T
    found = gm(stack, maxiters=GEOMEDIAN_MAXITERS, eps=GEOMEDIAN_EPS, num_threads=1, nocheck=True)
    out[:, todo] = np.floor(found[:, 0, :].T + np.float32(0.5)).astype(np.uint16)
