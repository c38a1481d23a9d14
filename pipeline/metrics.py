"""In: predicted and true reflectance, pixels to score. Out: errors, and intervals of their differences.

Arrays are ``(B, H, W)`` float reflectance (0-1), ``scored`` is ``(H, W)`` bool, True = pixel counts.
Predictions are clipped to 0-1 here and only here. Nothing is lazy. NaN means that nothing could be scored.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

SSIM_SIGMA_PX = 1.5
SSIM_RADIUS_PX = 5  # an 11 x 11 window
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # K = (.01, .03), data range 1


def reflectance(codes: ArrayLike) -> Float64:
    """Codes (reflectance * 10000 + 1000; 0 = no data) to float64 reflectance, NaN where there is no data."""
    values = np.asarray(codes, np.float64)
    return np.where(values == 0, np.nan, (values - 1000.0) * 1e-4)


def _errors(predicted: ArrayLike, truth: ArrayLike, scored: Bool) -> Float64:
    """(B, n) signed errors on the scored pixels."""
    difference = np.clip(np.asarray(predicted, np.float64), 0.0, 1.0) - np.asarray(truth, np.float64)
    return difference[:, scored]


def mae(*, predicted: ArrayLike, truth: ArrayLike, scored: Bool) -> float:
    """Mean absolute error over the scored pixels and all bands, reflectance."""
    errors = _errors(predicted, truth, scored)
    return float(np.abs(errors).mean()) if errors.size else float("nan")


def rmse(*, predicted: ArrayLike, truth: ArrayLike, scored: Bool) -> float:
    """Root mean square error over the scored pixels and all bands, reflectance."""
    errors = _errors(predicted, truth, scored)
    return float(np.sqrt((errors**2).mean())) if errors.size else float("nan")


def psnr(*, predicted: ArrayLike, truth: ArrayLike, scored: Bool) -> float:
    """20 log10(1 / RMSE) in dB, data range 1; it flatters dark land: print MAE and skill beside it."""
    error = rmse(predicted=predicted, truth=truth, scored=scored)
    return float("inf") if error == 0 else float(-20.0 * np.log10(error))


def bias(*, predicted: ArrayLike, truth: ArrayLike, scored: Bool) -> Float64:
    """(B,) signed mean error of each band, reflectance; positive = too bright."""
    errors = _errors(predicted, truth, scored)
    return errors.mean(axis=1) if errors.size else np.full(errors.shape[0], np.nan)


def skill(*, predicted: ArrayLike, reference: ArrayLike, truth: ArrayLike, scored: Bool) -> float:
    """1 - RMSE / RMSE of the reference (linear interpolation in time): 0 = no better, 1 = perfect."""
    own = rmse(predicted=predicted, truth=truth, scored=scored)
    other = rmse(predicted=reference, truth=truth, scored=scored)
    return float("nan") if other == 0 else 1.0 - own / other


def sam_degrees(*, predicted: ArrayLike, truth: ArrayLike, scored: Bool) -> float:
    """Mean over scored pixels of the angle between spectra, degrees; zero spectra are skipped."""
    p = np.clip(np.asarray(predicted, np.float64), 0.0, 1.0)[:, scored]
    t = np.asarray(truth, np.float64)[:, scored]
    lengths = np.linalg.norm(p, axis=0) * np.linalg.norm(t, axis=0)
    some = lengths > 0
    if not some.any():
        return float("nan")
    cosine = np.clip((p * t).sum(axis=0)[some] / lengths[some], -1.0, 1.0)
    return float(np.degrees(np.arccos(cosine)).mean())


def ssim(*, predicted: ArrayLike, truth: ArrayLike, scored: Bool, eroded: bool = False) -> float:
    """Structural similarity of the whole fused image, averaged where it matters.

    Gaussian window of 11 x 11 px, sigma 1.5, K = (.01, .03), range 1, population covariance; per band, then
    the mean.

    Args:
        predicted: ``(B, H, W)`` reflectance, the prediction pasted into the observed truth (no zeros as
        filling).
        truth: ``(B, H, W)`` reflectance, NaN where it is unknown (in any band): windows that touch such a pixel are
            left out, in all bands, as there is nothing to compare with.
        scored: ``(H, W)`` bool.
        eroded: average over the windows that lie in ``scored`` as a whole, instead of those that touch it.

    Returns:
        -1..1; NaN where no whole window of the image qualifies. Only windows that lie in the image are used.
    """
    window = np.ones((2 * SSIM_RADIUS_PX + 1,) * 2, bool)
    where = ndimage.binary_erosion(scored, window) if eroded else ndimage.binary_dilation(scored, window)
    inside = np.zeros_like(where)
    inside[SSIM_RADIUS_PX:-SSIM_RADIUS_PX, SSIM_RADIUS_PX:-SSIM_RADIUS_PX] = True
    t = np.asarray(truth, np.float64)
    known = np.isfinite(t).all(axis=0)
    where &= inside & ndimage.binary_erosion(known, window)
    if not where.any():
        return float("nan")
    p = np.where(known, np.clip(np.asarray(predicted, np.float64), 0.0, 1.0), 0.0)
    t = np.where(known, t, 0.0)
    return float(np.mean([_ssim_map(a, b)[where].mean() for a, b in zip(p, t, strict=True)]))


def _ssim_map(a: Float64, b: Float64) -> Float64:
    def local(field: Float64) -> Float64:
        return ndimage.gaussian_filter(field, SSIM_SIGMA_PX, radius=SSIM_RADIUS_PX)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    return likeness / ((mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2))


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_block_bootstrap(
    *,
    differences: ArrayLike,
    blocks: ArrayLike,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean of paired differences, resampling whole blocks.

    Args:
        differences: ``(n,)`` score of one method minus that of another, case by case.
        blocks: ``(n,)`` label of each case's block (its date): cases of a block are not independent.
        level: of the interval.
        draws: resamples.
        seed: of the resampling.

    Returns:
        Mean and interval, in the unit of the differences; an interval of one block is as wide as that block
        (zero).

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile), on blocks.
    """
    values = np.asarray(differences, np.float64)
    if values.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    _, block = np.unique(np.asarray(blocks), return_inverse=True)
    sums, counts = np.bincount(block, values), np.bincount(block)
    picked = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[picked].sum(axis=1) / counts[picked].sum(axis=1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(values.mean()), float(low), float(high))
