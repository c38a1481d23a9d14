"""In: the looks of a block as codes. Out: what the classical methods say about one target, for a model to start from.

Pure numpy, eager; windows stand on the same lattice as ``regression``'s, so that training and inference see the same
numbers. Arrays are reflectance in float32; missing values are marked, never NaN.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline import completion, composite, kalman
from pipeline.bands import CODE_OFFSET, CODE_SCALE, complete_looks
from pipeline.regression_lattice import CELL_PX

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Codes = NDArray[np.uint16]

ESTIMATES: Final = ("fit", "linear", "decay", "previous", "next")
"""Further estimates, in order: the regression before its residual (on clear pixels too), linear interpolation and decay
mean in time, the clear looks before and after the target; the prior where one of them is missing."""
CONTEXT: Final = ("distance", "fitted", "days_previous", "days_next", "looks", "spread")
"""Per-pixel facts, in order: signed distance to the edge of the gap (units of ``FAR_PX``; above 0 inside the gap, below
on the target's clear pixels, at most 1), 1 where the fit spoke, days to the clear looks before and after (units of 30
days, at most 4; 4 = none), clear looks (logarithm of 1 + count), standard deviation of the looks over time
(reflectance)."""
VERSION: Final = 2
"""Raised when the same looks give other estimates; samples of another version are not trained on."""
FAR_PX: Final = 64
MOST_DAYS: Final = 120.0
LEAST_SCALE: Final = np.float32(1e-3)
"""No prior is trusted further than this, in reflectance."""
UNKNOWN_SCALE: Final = np.float32(0.03)
"""Sigma where the prior claims none (plain interpolation of a single look)."""
HALO_PX: Final = completion.HALO_PX
"""An estimate depends on nothing farther than this."""
FIT_REACH_PX: Final = 2 * CELL_PX
"""How far beyond ``core`` a gap may lie and still decide whether a pixel of it gets a fit."""


@dataclass(frozen=True)
class Target:
    """What is asked for, and the looks around it.

    Attributes:
        codes: (T, B, H, W) uint16 codes in time order, 0 = no data.
        clear: (T, H, W) bool, True = usable look.
        days: (T,) int32 days since 1970-01-01, ascending.
        day: to show; the anchor's own where there is one.
        anchor: index of the acquisition to complete, None to predict a date that shows nothing.
        row0: global lattice row of pixel [0, 0].
        col0: its column.
    """

    codes: Codes
    clear: Bool
    days: NDArray[np.int32]
    day: int
    anchor: int | None
    row0: int
    col0: int


@dataclass(frozen=True)
class Estimates:
    """What is known classically about a target.

    Attributes:
        prior: (B, H, W) float32 reflectance: the target itself where clear, the best estimate elsewhere; 0 = none.
        has_prior: (H, W) bool, True = some look shows this pixel.
        known: (H, W) bool, True = the target itself is clear here.
        scale: (B, H, W) float32 reflectance, one sigma claimed by the prior, at least ``LEAST_SCALE``.
        estimates: (K, B, H, W) float32 reflectance in the order of ``ESTIMATES``; the prior where missing.
        context: (G, B, H, W) float32 in the order of ``CONTEXT``.
        source_date: (H, W) int32 days since 1970-01-01 of the nearest clear look used, 0 = none.
        codes: (B, H, W) uint16 codes of the prior, bit-exact where observed; 0 = no data.
        sigma: (B, H, W) float32 codes, one sigma as the completion gives it, without an anchor the filter in time; NaN
            where they give none.
    """

    prior: Float32
    has_prior: Bool
    known: Bool
    scale: Float32
    estimates: Float32
    context: Float32
    source_date: NDArray[np.int32]
    codes: Codes
    sigma: Float32


def estimate(target: Target, *, core: tuple[slice, slice] | None = None) -> Estimates:
    """Estimate a target from the looks around it.

    Args:
        target: what is asked for, with its looks.
        core: where answers are needed, all by default; elsewhere the prior may be missing.

    Returns:
        ``Estimates`` of the whole block.
    """
    codes, days, day, anchor = target.codes, target.days, target.day, target.anchor
    usable = complete_looks(codes=codes, clear=target.clear)
    rest = usable.copy()
    if anchor is not None:
        rest[anchor] = False
    line = composite.linear(codes=codes, clear=rest, days=days, target=day)
    mean = composite.decay(codes=codes, clear=rest, days=days, target=day)
    before, after = (
        _look_beside(codes, rest, days, day, past=True),
        _look_beside(codes, rest, days, day, past=False),
    )
    known, fit = np.zeros(usable.shape[1:], bool), np.full(line.codes.shape, np.nan, np.float32)
    if anchor is None:
        inside = np.zeros(known.shape, bool)
        inside[core or ...] = True
        between = kalman.interpolate(
            codes=codes, clear=rest, days=days, target=day, row0=target.row0, col0=target.col0, within=inside
        )
        filled, sigma, dates = between.codes, between.sigma, between.source_date
    else:
        done = completion.complete(
            codes=codes,
            clear=target.clear,
            days=days,
            anchor=anchor,
            row0=target.row0,
            col0=target.col0,
            core=core,
            with_fit=True,
        )
        assert done.fit is not None
        filled, sigma, dates, fit, known = done.codes, done.sigma, done.source_date, done.fit, usable[anchor]
    prior = _reflectance(filled)
    fitted = np.isfinite(fit[0])
    swing = np.abs(_reflectance(after[0]) - _reflectance(before[0])) * ((before[0] != 0) & (after[0] != 0))
    unsure = np.where(swing > 0, np.float32(0.5) * swing + np.float32(0.005), UNKNOWN_SCALE)
    scale = np.where(np.isfinite(sigma), sigma * np.float32(CODE_SCALE), unsure)
    others = [(np.nan_to_num(fit, nan=0.0) - CODE_OFFSET) * np.float32(CODE_SCALE) * fitted]
    others += [_reflectance(each) for each in (line.codes, mean.codes, before[0], after[0])]
    there = [fitted] + [each[0] != 0 for each in (line.codes, mean.codes, before[0], after[0])]
    return Estimates(
        prior=prior,
        has_prior=filled[0] != 0,
        known=known,
        scale=np.maximum(scale, LEAST_SCALE).astype(np.float32),
        estimates=np.stack([np.where(m, e, prior) for e, m in zip(others, there, strict=True)]).astype(np.float32),
        context=_context(codes, rest, day, known, fitted, before[1], after[1]),
        source_date=dates,
        codes=filled,
        sigma=sigma,
    )


def _look_beside(
    codes: Codes, clear: Bool, days: NDArray[np.int32], target: int, *, past: bool
) -> tuple[Codes, NDArray[np.int32]]:
    """The clear look before (not after) the target, or after it: codes (B, H, W), 0 = none, and its day (H, W)."""
    value, day = np.zeros(codes.shape[1:], np.uint16), np.zeros(clear.shape[1:], np.int32)
    chosen = [t for t in range(len(days)) if (days[t] <= target) == past]
    for t in chosen if past else reversed(chosen):
        np.copyto(value, codes[t], where=clear[t])
        np.copyto(day, days[t], where=clear[t])
    return value, day


def _context(
    codes: Codes,
    clear: Bool,
    target: int,
    known: Bool,
    fitted: Bool,
    before: NDArray[np.int32],
    after: NDArray[np.int32],
) -> Float32:
    """(G, B, H, W) in the order of ``CONTEXT``."""
    inside = _distance(~known) if known.any() else np.full(known.shape, FAR_PX, np.float32)
    outside = _distance(np.pad(known, 1))[1:-1, 1:-1]  # what lies beyond the array is not known either
    distance = np.where(known, -outside, inside) / np.float32(FAR_PX)
    away = [
        np.where(day != 0, np.minimum(np.abs(day - target), MOST_DAYS), MOST_DAYS) / 30.0 for day in (before, after)
    ]
    count = clear.sum(axis=0, dtype=np.float32)
    flat = np.stack([distance, fitted, *away, np.log1p(count)]).astype(np.float32)
    out = np.empty((len(CONTEXT), *codes.shape[1:]), np.float32)
    out[:-1] = flat[:, None]
    for band in range(codes.shape[1]):
        values = _reflectance(codes[:, band]) * clear
        mean = values.sum(axis=0) / np.maximum(count, 1)
        square = (values**2).sum(axis=0) / np.maximum(count, 1)
        out[-1, band] = np.sqrt(np.maximum(square - mean**2, 0.0))
    return out


def _distance(inside: Bool) -> Float32:
    """Pixels to the nearest False, at most ``FAR_PX``; so that it does not depend on what lies farther."""
    return np.minimum(ndimage.distance_transform_edt(inside), FAR_PX).astype(np.float32)


def _reflectance(codes: Codes) -> Float32:
    """Codes to float32 reflectance; 0 where there is no data."""
    values = (codes.astype(np.float32) - np.float32(CODE_OFFSET)) * np.float32(CODE_SCALE)
    return np.where(codes != 0, values, np.float32(0)).astype(np.float32)
