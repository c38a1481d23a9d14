"""In: the looks of a block as codes. Out: what the classical methods say about one target, for a model to start from.

Pure numpy, eager; windows stand on the same lattice as ``regression``'s, so that training and inference see the same
numbers. Arrays are reflectance in float32, missing values are NaN-free and marked.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline import composite, regression
from pipeline.bands import CODE_OFFSET, CODE_SCALE

Float32 = NDArray[np.float32]
ESTIMATES: Final = ("linear",)
"""Names of the further estimates, in order."""
CONTEXT: Final = ("looks",)
"""Names of the per-pixel facts, in order: share of clear looks."""
LEAST_SCALE: Final = np.float32(5e-4)
HALO_PX: Final = regression.HALO_PX
"""An estimate depends on nothing farther than this."""


@dataclass(frozen=True)
class Estimates:
    """What is known classically about a target.

    Attributes:
        prior: (B, H, W) float32 reflectance: the target itself where clear, the best estimate elsewhere; 0 = none.
        has_prior: (H, W) bool, True = some look shows this pixel.
        scale: (B, H, W) float32 reflectance, one sigma claimed by the prior, at least ``LEAST_SCALE``.
        estimates: (K, B, H, W) float32 reflectance in the order of ``ESTIMATES``; the prior where missing.
        context: (G, B, H, W) float32 in the order of ``CONTEXT``.
        source_date: (H, W) int32 days since 1970-01-01 of the nearest clear look used, 0 = none.
        codes: (B, H, W) uint16 codes of the prior, bit-exact where observed; 0 = no data.
    """

    prior: Float32
    has_prior: NDArray[np.bool_]
    scale: Float32
    estimates: Float32
    context: Float32
    source_date: NDArray[np.int32]
    codes: NDArray[np.uint16]


def estimate(
    *,
    codes: NDArray[np.uint16],
    clear: NDArray[np.bool_],
    days: NDArray[np.int32],
    target: int,
    anchor: int | None,
    row0: int,
    col0: int,
    core: tuple[slice, slice] | None = None,
) -> Estimates:
    """Estimate a target from the looks around it.

    Args:
        codes: (T, B, H, W) uint16 codes in time order, 0 = no data.
        clear: (T, H, W) bool, True = usable look.
        days: (T,) int32 days since 1970-01-01, ascending.
        target: the day to show; the anchor's own where there is one.
        anchor: index of the acquisition to complete, None to predict a date that shows nothing.
        row0: global lattice row of pixel [0, 0].
        col0: its column.
        core: where answers are needed, all by default; elsewhere the answer may be missing.

    Returns:
        ``Estimates`` of the whole block.
    """
    line = composite.linear(codes=codes, clear=_without(clear, anchor), days=days, target=target)
    if anchor is None:
        filled, sigma, dates = line.codes, np.full(line.codes.shape, np.nan, np.float32), line.source_date
    else:
        done = regression.fill_acquisition(
            codes=codes, clear=clear, days=days, anchor=anchor, row0=row0, col0=col0, core=core
        )
        filled, sigma, dates = done.codes, done.sigma, done.source_date
    has_prior = filled[0] != 0
    prior = _reflectance(filled)
    scale = np.maximum(np.nan_to_num(sigma * np.float32(CODE_SCALE), nan=0.02), LEAST_SCALE)
    linear = np.where(line.codes[0] != 0, _reflectance(line.codes), prior)
    share = np.broadcast_to(clear.mean(axis=0, dtype=np.float32), prior.shape)[None].astype(np.float32)
    return Estimates(prior, has_prior, scale.astype(np.float32), linear[None], share, dates, filled)


def _without(clear: NDArray[np.bool_], anchor: int | None) -> NDArray[np.bool_]:
    if anchor is None:
        return clear
    rest = clear.copy()
    rest[anchor] = False
    return rest


def _reflectance(codes: NDArray[np.uint16]) -> Float32:
    """Codes to float32 reflectance; 0 where there is no data."""
    values = (codes.astype(np.float32) - np.float32(CODE_OFFSET)) * np.float32(CODE_SCALE)
    return np.where(codes != 0, values, np.float32(0)).astype(np.float32)
