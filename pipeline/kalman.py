"""In: the looks of a block as codes. Out: what they say of one day that none of them shows, with one sigma.

Each pixel goes through the season as a Gaussian process about its own mean, seen with noise; a Kalman filter comes from
both ends of the series to the day that is asked for, date by date. How noisy a date is (haze, gain, what its mask
missed) is learnt nearby: from how far it lies from what the other dates say of it. Linear interpolation is led by two
looks and all of their noise, a weighted mean lags behind what grows.

Pure numpy, eager; a pixel depends on the same acquisitions wherever blocks are cut and on nothing farther than
``HALO_PX``. Codes are uint16 (reflectance * 10000 + 1000, 0 = no data).

Sources: Hartikainen & Sarkka 2010, doi:10.1109/MLSP.2010.5589113 (a Matern process as a state); Fraser & Potter 1969,
doi:10.1109/TAC.1969.1099196 (two filters that meet); Rasmussen & Williams 2006, section 5.4 (leaving one out).
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline import composite
from pipeline.bands import complete_looks

LENGTH_DAYS: Final = 20.0
"""Of the Matern 3/2 covariance (1 + d / LENGTH) exp(-d / LENGTH)."""
NOISE: Final = 0.15
"""Variance of a usual date's noise, in units of the process's variance."""
CENTRE_TAU_DAYS: Final = 60.0
"""A pixel's own mean weighs its looks by exp(-days / tau)."""
CELL_PX: Final = 32
"""Side of the squares, fixed to the global pixel index, for which the noise of dates is reckoned ..."""
REACH_CELLS: Final = 5
"""... from the squares within so many of them, in each direction."""
HALO_PX: Final = CELL_PX * (REACH_CELLS + 2)
"""Nothing farther than this matters to a pixel."""
SAMPLE_PX: Final = 4
"""Every so many pixels, in both directions, tell of the noise."""
LEAST_NOISE, MOST_NOISE = 0.25, 16.0
"""Bounds of a date's noise, in units of a usual one's."""
UNSEEN_NOISE: Final = 4.0
"""Noise of a date of which nothing is known nearby ..."""
UNSEEN_SAMPLES: Final = 8.0
"""... which counts as much as so many samples."""
SIGMA: Final = np.float32(0.95)
"""Factor on sigma, set on pasted holes."""
TILE_PX: Final = 64
"""Side of the squares that are worked on at a time: the states of both sides stay in the cache."""
MOST_OFF: Final = 4000
"""Codes: a sample lies no farther off than this."""

Codes = NDArray[np.uint16]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Interpolated:
    """One day of a block."""

    codes: Codes
    """``(B, H, W)``; 0 where no look is clear."""
    sigma: Float32
    """``(B, H, W)`` one sigma in codes of a look on that day; NaN where the looks nearby tell of none."""
    source_date: Int32
    """``(H, W)`` days since 1970-01-01 of the clear look nearest to the day; 0 = none."""


def interpolate(
    *,
    codes: Codes,
    clear: Flags,
    days: Int32,
    target: int,
    row0: int,
    col0: int,
    core: tuple[slice, slice] | None = None,
    within: Flags | None = None,
) -> Interpolated:
    """Estimate what a day shows from the clear looks before and after it.

    Args:
        codes: ``(T, B, H, W)`` uint16 codes, 0 = no data. Pass the same acquisitions for every block of an area.
        clear: ``(T, H, W)`` bool, True = usable look; without data in some band it counts as not clear.
        days: ``(T,)`` int32 days since 1970-01-01, ascending, ties allowed.
        target: the day, in the same days.
        row0: global row of pixel [0, 0].
        col0: its global column.
        core: rows and columns to answer for, where the rest is halo; default all.
        within: bool, of the core's shape: where an answer is wanted at all; elsewhere it may be no data.

    Returns:
        :class:`Interpolated` of the core, eager.

    Raises:
        ValueError: shapes, dtypes or the order of days do not fit.
    """
    middle = composite.decay(codes=codes, clear=clear, days=days, target=target, tau_days=CENTRE_TAU_DAYS)
    clear = complete_looks(codes=codes, clear=clear)
    noise = _noise(codes, clear, days, middle.codes, row0, col0)
    rows, cols = core or (slice(0, codes.shape[2]), slice(0, codes.shape[3]))
    inner = _Looks(codes[:, :, rows, cols], clear[:, rows, cols], middle.codes[:, rows, cols], days)
    out, sigma = np.zeros(inner.middle.shape, np.uint16), np.full(inner.middle.shape, np.nan, np.float32)
    for ys, xs in product(*(_steps(size) for size in out.shape[1:])):
        if within is not None and not within[ys, xs].any():
            continue
        part = inner.part(ys, xs)
        first = row0 + rows.start + ys.start, col0 + cols.start + xs.start
        near = _between_cells(noise.cells, noise.first, first, part.middle.shape[1:])
        value, variance = _meet(*_sides(part, target, near[: len(days)]))
        value += part.middle
        seen = part.middle[0] != 0
        out[:, ys, xs] = np.where(seen, np.clip(np.rint(value), 1, 65534), 0).astype(np.uint16)
        spread = SIGMA * np.sqrt((variance + np.float32(NOISE)) * near[len(days) :])
        sigma[:, ys, xs] = np.where(seen, spread, np.float32(np.nan))
    return Interpolated(out, sigma, middle.source_date[rows, cols])


def _steps(size: int) -> list[slice]:
    return [slice(start, min(start + TILE_PX, size)) for start in range(0, size, TILE_PX)]


@dataclass(frozen=True)
class _Looks:
    """Looks and each pixel's own mean (B, H, W), codes."""

    codes: Codes
    clear: Flags
    middle: Codes
    days: Int32

    def part(self, rows: slice, cols: slice) -> "_Looks":
        return _Looks(self.codes[:, :, rows, cols], self.clear[:, rows, cols], self.middle[:, rows, cols], self.days)

    def off(self, look: int) -> Float32:
        """(B, H, W) how far a look lies from the mean, codes."""
        return np.subtract(self.codes[look], self.middle, dtype=np.float32)


# -- the filter -------------------------------------------------------------------------------------------------


class _State:
    """What one side knows of value and slope (per length): means (B, H, W) and how its covariance differs from 1.

    The covariance of the process itself is the unit matrix in these units, so what differs from it only fades.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value, self.slope = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.vv, self.vs, self.ss = (np.zeros(shape[1:], np.float32) for _ in range(3))

    def go(self, days: float) -> None:
        """Go on by so many days."""
        u = days / LENGTH_DAYS
        fade = math.exp(-u)
        a, b, c, d = (np.float32(x) for x in (fade * (1 + u), fade * u, -fade * u, fade * (1 - u)))
        self.value, self.slope = a * self.value + b * self.slope, c * self.value + d * self.slope
        vv, vs, ss = self.vv, self.vs, self.ss
        self.vv = a * a * vv + np.float32(2) * a * b * vs + b * b * ss
        self.vs = a * c * vv + (a * d + b * c) * vs + b * d * ss
        self.ss = c * c * vv + np.float32(2) * c * d * vs + d * d * ss

    def see(self, off: Float32, clear: Flags, noise: Float32) -> None:
        """Learn from a look: how far it lies from the mean (B, H, W), where it is clear, its noise (H, W)."""
        known = self.vv + np.float32(1)
        share = clear / (known + noise)
        to_value, to_slope = known * share, self.vs * share
        news = off - self.value
        self.value = self.value + to_value * news
        self.slope = self.slope + to_slope * news
        self.ss = self.ss - to_slope * self.vs
        self.vs = self.vs - to_value * self.vs
        self.vv = self.vv - to_value * known

    def mirrored(self) -> "_State":
        """The same, seen with time running the other way."""
        out = copy(self)
        out.slope, out.vs = -self.slope, -self.vs
        return out


def _sides(looks: _Looks, target: int, noise: Float32) -> tuple[_State, _State]:
    """What the looks up to the target say of it, and what those after it say."""
    sides = []
    split = int(np.searchsorted(looks.days, target, side="right"))
    for order in (range(split), reversed(range(split, len(looks.days)))):
        state, day = _State(looks.middle.shape), None
        for t in order:
            if day is not None:
                state.go(abs(int(looks.days[t]) - day))
            day = int(looks.days[t])
            if looks.clear[t].any():
                state.see(looks.off(t), looks.clear[t], noise[t])
        if day is not None:
            state.go(abs(target - day))
        sides.append(state)
    return sides[0], sides[1].mirrored()


def _meet(past: _State, future: _State) -> tuple[Float32, Float32]:
    """Value (B, H, W) and its variance (H, W), in units of the process's, where both sides meet."""
    one = np.float32(1)
    vv, vs, ss = -one, np.float32(0), -one
    value, slope = np.float32(0), np.float32(0)
    for side in (past, future):
        a, c = side.vv + one, side.ss + one
        inverse = one / (a * c - side.vs * side.vs)
        a, b, c = a * inverse, -side.vs * inverse, c * inverse
        vv, vs, ss = vv + c, vs + b, ss + a
        value = value + c * side.value + b * side.slope
        slope = slope + b * side.value + a * side.slope
    inverse = one / (vv * ss - vs * vs)
    return np.asarray((ss * value - vs * slope) * inverse), np.asarray(ss * inverse)


# -- the noise of each date -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Noise:
    """By cell, the first of which has the global index ``first`` (y, x)."""

    first: tuple[int, int]
    cells: Float32
    """(T + B, cells y, cells x): T variances of the dates' noise, in units of the process's variance, then those of the
    process by band, code^2; NaN where nothing tells them."""


def _noise(codes: Codes, clear: Flags, days: Int32, middle: Codes, row0: int, col0: int) -> _Noise:
    """How noisy each date is nearby: from the misses of the other dates at every ``SAMPLE_PX``-th pixel."""
    first = row0 // CELL_PX, col0 // CELL_PX
    ys, xs = (slice(-at % SAMPLE_PX, None, SAMPLE_PX) for at in (row0, col0))
    looks = _Looks(codes[:, :, ys, xs], clear[:, ys, xs], middle[:, ys, xs], days)
    per = CELL_PX // SAMPLE_PX
    lead = tuple(
        (at - cell * CELL_PX + SAMPLE_PX - 1) // SAMPLE_PX for at, cell in zip((row0, col0), first, strict=True)
    )
    shape = tuple(-(-(at + size) // per) for at, size in zip(lead, looks.middle.shape[1:], strict=True))
    squares = np.zeros((len(days), codes.shape[1], *shape), np.int64)
    expected, count = np.zeros((len(days), *shape), np.int64), np.zeros((len(days), *shape), np.int64)
    for t, miss, variance, told in _misses(looks):
        squares[t] = _by_cell(miss * miss * told, lead, shape, per)
        expected[t] = _by_cell(variance * told, lead, shape, per)
        count[t] = _by_cell(told.astype(np.int64), lead, shape, per)
    squares_near, expected_near, count_near = (_near(sums) for sums in (squares, expected, count))
    with np.errstate(invalid="ignore", divide="ignore"):  # where no date was tried nearby
        missed = squares_near.sum(axis=1) / expected_near
        told = count_near.any(axis=0)
        usual = np.zeros(shape)
        usual[told] = np.nanmedian(missed[:, told], axis=0)
        relative = missed / usual
        relative = np.where(np.isfinite(relative), relative, 0.0) * count_near + UNSEEN_NOISE * UNSEEN_SAMPLES
        relative = np.clip(relative / (count_near + UNSEEN_SAMPLES), LEAST_NOISE, MOST_NOISE)
        relative[:, ~(usual > 0)] = 1.0
        scale = (squares_near / relative[:, None]).sum(axis=0) * _EXPECTED_UNIT / expected_near.sum(axis=0)
    return _Noise(first, np.concatenate([relative * NOISE, scale]).astype(np.float32))


_EXPECTED_UNIT: Final = 1 << 12
"""Variances are summed in whole parts of this: exact, hence the same in whatever order."""


def _misses(looks: _Looks) -> Iterator[tuple[int, Int64, Int64, Flags]]:
    """Per date: how far the others miss it (B, h, w) codes, the variance they claim (h, w), where that was tried."""
    usual = np.full(looks.middle.shape[1:], NOISE, np.float32)
    before: list[_State] = []
    state = _State(looks.middle.shape)
    for t in range(len(looks.days)):
        if t:
            state.go(float(looks.days[t] - looks.days[t - 1]))
        before.append(copy(state))  # its arrays are replaced, never changed
        state.see(looks.off(t), looks.clear[t], usual)
    state = _State(looks.middle.shape)
    others = looks.clear.sum(axis=0) > 1
    for t in reversed(range(len(looks.days))):
        if t + 1 < len(looks.days):
            state.go(float(looks.days[t + 1] - looks.days[t]))
        off = looks.off(t)
        value, variance = _meet(before.pop(), state.mirrored())
        miss = np.clip(np.rint(off - value), -MOST_OFF, MOST_OFF).astype(np.int64)
        claimed = np.rint((variance + np.float32(NOISE)) * _EXPECTED_UNIT).astype(np.int64)
        yield t, miss, claimed, looks.clear[t] & others
        state.see(off, looks.clear[t], usual)


def _by_cell(values: Int64, lead: tuple[int, ...], shape: tuple[int, ...], per: int) -> Int64:
    """Sums over the cells of (..., h, w) samples, of which ``lead`` are missing before the first."""
    padded = np.zeros((*values.shape[:-2], shape[0] * per, shape[1] * per), np.int64)
    padded[..., lead[0] : lead[0] + values.shape[-2], lead[1] : lead[1] + values.shape[-1]] = values
    sums: Int64 = padded.reshape(*values.shape[:-2], shape[0], per, shape[1], per).sum(axis=(-3, -1))
    return sums


def _near(sums: Int64) -> Float64:
    """Sums over the cells around each, the farther the less."""
    taps = 0.5 + 0.5 * np.cos(np.pi * np.arange(-REACH_CELLS, REACH_CELLS + 1) / (REACH_CELLS + 1))
    near = sums.astype(np.float64)
    for axis in (-2, -1):
        near = ndimage.correlate1d(near, taps, axis=axis, mode="constant")
    return near


def _between_cells(cells: Float32, first: tuple[int, int], start: tuple[int, int], shape: tuple[int, ...]) -> Float32:
    """(k, H, W) values of the pixels from global ``start`` on, bilinear between the middles of (k, y, x) cells.

    Beyond the outermost middles the outermost value.
    """
    out = cells
    for axis, (cell, begin, size) in enumerate(zip(first, start, shape, strict=True), 1):
        at = (np.arange(begin, begin + size) + 0.5) / CELL_PX - 0.5 - cell
        low = np.floor(at).astype(np.intp)
        one, two = (np.take(out, np.clip(low + k, 0, cells.shape[axis] - 1), axis=axis) for k in (0, 1))
        share = (at - low).astype(np.float32)
        out = one + (two - one) * (share[:, None] if axis == 1 else share)
    return out
