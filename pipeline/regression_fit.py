"""In: looks on whole lattice cells. Out: ridge coefficients at the lattice's nodes, with their error.

The numerical half of :mod:`pipeline.regression`: features (gaps closed linearly in time), one Gram matrix
per cell, and the fit of every node from the Gram matrices of the cells around it. A Gram matrix is
additive, so overlapping windows, re-weighting of hazy cells and held-out patches all cost sums of small
matrices, never a second look at pixels.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.regression_lattice import CELL_PX

# Codes are centred and scaled before they are squared in float32: at 1e3 codes a unit the relative rounding
# of a cell's Gram matrix (1e-6) stays far below the ridge.
CENTRE_CODE = np.float32(2500.0)
UNIT_CODES = np.float32(1000.0)
TRUST_PX = 300.0  # held-out pixels at which the share of the fit that they support is taken at its word
CLOSED_NOISE = 2.0  # error variance of a feature closed in time, in units of the linear method's own
HUBER_K = 1.5  # a cell counts in full until its error is this many times the window's median
REWEIGHT_ROUNDS = 2
FOLDS = 4  # held-out patches: every fourth cell, in a 2 x 2 pattern

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

_blas_lock = threading.Lock()
_blas_users = 0
_blas_limits: list[threadpool_limits] = []


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread, since the order of its sums may follow the number of threads.

    The setting belongs to the process; users are counted, so that a thread that finishes first does not
    lift the limit from under another one.
    """
    global _blas_users
    with _blas_lock:
        if _blas_users == 0:
            _blas_limits.append(threadpool_limits(limits=1, user_api="blas"))
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                _blas_limits.pop().restore_original_limits()


@dataclass(frozen=True)
class Tile:
    """Neighbouring cells of one row as features: ``n`` cells, ``p`` features, ``P`` pixels a cell."""

    # (n, p + 1 + b, P): features (dates x bands, then linear per band), ones, anchor minus linear per band
    rows: Float32
    fitted: Float32  # (n, P): 1 where the anchor and at least one other look are clear
    looked: Bool  # (n, P): at least one look besides the anchor
    swing: Float32  # (n, b, P): next minus previous clear look around the anchor, NaN where one is missing
    clear: Bool  # (n, dates, P): which features were seen on their own date, and not closed in time


@dataclass(frozen=True)
class NodeFit:
    """What one node knows; coefficients are in codes per (code / UNIT_CODES)."""

    coefficients: (
        Float32  # (b, features + 1): on the date and linear rows, then the constant; added to linear
    )
    evidence: float  # 0..1: how much the anchor's clear pixels decide (0 = plain linear)
    variance: Float64  # (b,) code^2: error on held-out cells, blended with the linear method's own
    closed_variance: Float32  # (b, dates) code^2: what a date adds where it is itself a gap closed in time


def candidate_dates(days: NDArray[np.int32], anchor: int, most: int) -> list[int]:
    """The ``most`` dates nearest to the anchor, in time order; by days alone, hence the same everywhere."""
    order = sorted(
        (t for t in range(len(days)) if t != anchor),
        key=lambda t: (abs(int(days[t] - days[anchor])), t),
    )
    return sorted(order[:most])


def tile_features(
    codes: NDArray[np.uint16],
    clear: Bool,
    days: NDArray[np.int32],
    anchor: int,
    dates: Sequence[int],
) -> Tile:
    """Features of one tile.

    Args:
        codes: ``(T, b, CELL_PX, n * CELL_PX)`` uint16, 0 = no data.
        clear: ``(T, CELL_PX, n * CELL_PX)`` bool, True = usable look; False beyond the data's edge.
        days: ``(T,)`` int32, ascending.
        anchor: index of the acquisition to complete.
        dates: indices of the dates that become features, ascending, without the anchor.

    Returns:
        A :class:`Tile`. A date's gaps are closed linearly in time from all other dates **but the anchor**:
        with it, the fit would learn from its own answer.
    """
    n_bands, height, width = codes.shape[1:]
    wanted = {t: i for i, t in enumerate(dates)}
    wanted[anchor] = len(dates)
    filled = np.empty((len(dates) + 2, n_bands, height, width), np.float32)
    before = np.empty((len(wanted), n_bands, height, width), np.float32)
    before_day = np.empty((len(wanted), height, width), np.float32)
    carry = np.zeros((n_bands, height, width), np.float32)
    carry_day = np.full((height, width), -np.inf, np.float32)
    for t in range(len(days)):
        slot = wanted.get(t)
        if slot is not None:
            before[slot], before_day[slot] = carry, carry_day
        if t != anchor and clear[t].any():
            np.copyto(carry, codes[t], where=clear[t])
            np.copyto(carry_day, np.float32(days[t] - days[anchor]), where=clear[t])
    looked = carry_day > -np.inf
    carry[:] = 0.0
    carry_day[:] = np.inf
    swing = np.empty((n_bands, height, width), np.float32)
    for t in range(len(days) - 1, -1, -1):
        slot = wanted.get(t)
        if slot is not None:
            gap = ~clear[t] if t != anchor else np.ones((height, width), bool)
            if gap.any():
                share = _time_share(np.float32(days[t] - days[anchor]), before_day[slot], carry_day)
                step = carry - before[slot]
                if t == anchor:
                    both = np.isfinite(before_day[slot]) & np.isfinite(carry_day)
                    swing[:] = np.where(both, step, np.float32(np.nan))
                filled[slot] = before[slot] + step * share
            if t != anchor:
                np.copyto(filled[slot], codes[t], where=~gap)
        if t != anchor and clear[t].any():
            np.copyto(carry, codes[t], where=clear[t])
            np.copyto(carry_day, np.float32(days[t] - days[anchor]), where=clear[t])
    filled[-1] = (codes[anchor] - filled[-2]) / UNIT_CODES
    filled[:-1] -= CENTRE_CODE
    filled[:-1] /= UNIT_CODES
    n_cells = width // CELL_PX
    rows = np.empty((n_cells, (len(dates) + 2) * n_bands + 1, CELL_PX * CELL_PX), np.float32)
    by_cell = filled.reshape(-1, height, n_cells, CELL_PX).transpose(2, 0, 1, 3)
    n_features = (len(dates) + 1) * n_bands
    rows[:, :n_features].reshape(n_cells, -1, height, CELL_PX)[:] = by_cell[:, :n_features]
    rows[:, n_features] = 1.0
    rows[:, n_features + 1 :].reshape(n_cells, -1, height, CELL_PX)[:] = by_cell[:, n_features:]
    return Tile(
        rows=rows,
        fitted=_cells(clear[anchor] & looked).astype(np.float32),
        looked=_cells(looked),
        swing=swing.reshape(n_bands, height, n_cells, CELL_PX)
        .transpose(2, 0, 1, 3)
        .reshape(n_cells, n_bands, -1),
        clear=np.stack([_cells(clear[t]) for t in dates], axis=1),
    )


def _time_share(day: np.float32, previous: Float32, following: Float32) -> Float32:
    """Where ``day`` lies between two looks, 0..1; where one is missing the other is repeated."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Float32 = (day - previous) / (following - previous)
    share[~np.isfinite(previous)] = 1.0
    share[~np.isfinite(following) | (following == previous)] = 0.0
    return share


def _cells(field: Bool) -> Bool:
    """(CELL_PX, n * CELL_PX) to (n, P)."""
    n_cells = field.shape[1] // CELL_PX
    return np.ascontiguousarray(field.reshape(CELL_PX, n_cells, CELL_PX).swapaxes(0, 1)).reshape(n_cells, -1)


def cell_grams(tile: Tile) -> Float32:
    """Gram matrices ``(n, q, q)`` of a tile's rows over its fitted pixels; the ones make plain sums."""
    grams: Float32 = np.matmul(tile.rows * tile.fitted[:, None, :], tile.rows.swapaxes(1, 2))
    return grams


def fit_node(
    grams: Float32,
    weights: Float64,
    folds: NDArray[np.int64],
    clear_share: Float64,
    closed_more: Float64,
    prior_variance: Float64,
    harder: Float64,
    nearest_first: Sequence[int],
    *,
    n_bands: int,
    most_dates: int,
    least_share: float,
    ridge: float,
    evidence_px: float,
) -> NodeFit:
    """Ridge regression of (anchor minus linear) on the features, in the window of one node.

    The ridge pulls towards zero, that is towards plain linear interpolation, by ``ridge`` times the mean
    variance of the features and by ``evidence_px`` pixels' worth of it: with few clear pixels the answer
    goes over into linear smoothly. Cells whose error is large for the window (haze that the cloud detection
    missed) are weighted down by Huber's rule and the fit is repeated; the error is that on held-out cells,
    each predicted from the other three quarters.

    Args:
        grams: ``(c, q, q)`` float32, the window's cells in lattice order.
        weights: ``(c,)`` taper of the window.
        folds: ``(c,)`` 0..FOLDS-1, the held-out patch of each cell.
        clear_share: ``(dates,)`` share of clear pixels of each date in the window.
        closed_more: ``(dates,)`` share of gap pixels where a date is itself closed in time, less that of the
            fitted pixels: features that are worse where they are applied than where they were learnt.
        harder: ``(b,)`` at least 1, how much larger linear's variance is in the gaps than on clear pixels.
        prior_variance: ``(b,)`` code^2, of linear interpolation as far as the looks themselves tell.
        nearest_first: the dates' positions among the features, nearest to the anchor first.
        n_bands: bands in this group.
        most_dates: the most dates to use.
        least_share: a date must be clear on more than this share of the window.
        ridge: relative to the mean feature variance.
        evidence_px: clear pixels at which data and prior weigh the same.

    Returns:
        The fit; coefficients of unused dates are 0.
    """
    n_features = grams.shape[1] - n_bands - 1
    n_dates = n_features // n_bands - 1
    chosen = [d for d in nearest_first if clear_share[d] > least_share][:most_dates]
    used = np.concatenate([d * n_bands + np.arange(n_bands) for d in [*sorted(chosen), n_dates]])
    kept = np.concatenate([used, np.arange(n_features, grams.shape[1])])
    coefficients = np.zeros((n_bands, n_features + 1), np.float32)
    if not (grams[:, n_features, n_features] * weights).sum() > 0:
        return NodeFit(coefficients, 0.0, prior_variance, np.zeros((n_bands, n_dates), np.float32))
    sub = grams if len(kept) == grams.shape[1] else grams[:, kept[:, None], kept]
    pixels = sub[:, len(used), len(used)].astype(np.float64)
    noise = np.zeros(len(used))
    variance = CLOSED_NOISE * prior_variance / float(UNIT_CODES) ** 2
    noise[:-n_bands] = np.outer(closed_more[sorted(chosen)], variance).ravel()
    cell_weights = weights
    total = _weighted(sub, cell_weights)
    solution = _solve(total, n_bands, ridge, evidence_px, noise)
    for _ in range(REWEIGHT_ROUNDS):
        cell_weights = weights * _huber(_cell_errors(sub, pixels, solution, n_bands), pixels)
        total = _weighted(sub, cell_weights)
        solution = _solve(total, n_bands, ridge, evidence_px, noise)
    own, cross, inner, held_px = (
        np.zeros(n_bands),
        np.zeros(n_bands),
        np.zeros(n_bands),
        0.0,
    )
    for fold in range(FOLDS):
        part = _weighted(sub, np.where(folds == fold, cell_weights, 0.0))
        if part[len(used), len(used)] > 0:
            terms = _error_terms(part, _solve(total - part, n_bands, ridge, evidence_px, noise), n_bands)
            own, cross, inner = own + terms[0], cross + terms[1], inner + terms[2]
            held_px += float(part[len(used), len(used)])
    evidence = held_px / (held_px + evidence_px)
    # what held-out cells support, over all bands; generous, since a few cells measure it badly
    agreed, spent = (
        (cross / np.maximum(own, 1e-9)).sum(),
        (inner / np.maximum(own, 1e-9)).sum(),
    )
    trust = float(np.clip(2.0 * held_px / (held_px + TRUST_PX) * agreed / max(spent, 1e-9), 0.0, 1.0))
    measured = (
        np.maximum(own - 2.0 * trust * cross + trust**2 * inner, 0.0) / held_px * float(UNIT_CODES) ** 2
    )
    coefficients[:, np.append(used, n_features)] = trust * solution * float(UNIT_CODES)
    slopes = coefficients[:, :n_features].reshape(n_bands, n_dates + 1, n_bands)[:, :n_dates] / UNIT_CODES
    return NodeFit(
        coefficients,
        evidence,
        evidence * measured * harder + (1.0 - evidence) * prior_variance,
        (slopes**2 @ prior_variance).astype(np.float32),
    )


def _weighted(grams: Float32, weights: Float64) -> Float64:
    """Sum of the cells' Gram matrices (q, q)."""
    flat = weights.astype(np.float32)[None] @ grams.reshape(len(grams), -1)
    return flat.reshape(grams.shape[1:]).astype(np.float64)


def _solve(gram: Float64, n_bands: int, ridge: float, evidence_px: float, noise: Float64) -> Float64:
    """Coefficients ``(b, used + 1)``, the constant last, from a weighted Gram matrix."""
    n_used = gram.shape[0] - n_bands - 1
    count = float(gram[n_used, n_used])
    if count < 1.0:
        return np.zeros((n_bands, n_used + 1))
    mean = gram[n_used] / count
    centred = gram / count - np.outer(mean, mean)
    covariance, target = centred[:n_used, :n_used], centred[:n_used, n_used + 1 :]
    scale = float(np.trace(covariance)) / n_used
    # 1e-6 (one code squared): without any contrast in the window the system must stay regular
    pull = ridge * (1.0 + evidence_px / count) * scale + 1e-6
    slopes = np.linalg.solve(covariance + np.diag(pull + noise), target).T
    constant = mean[n_used + 1 :] * (count / (count + evidence_px)) - slopes @ mean[:n_used]
    return np.column_stack([slopes, constant])


def _error_terms[F: (np.float32, np.float64)](
    gram: NDArray[F], solution: NDArray[F], n_bands: int
) -> tuple[NDArray[F], NDArray[F], NDArray[F]]:
    """Sums over pixels of target^2, target x prediction and prediction^2, each (..., b)."""
    inputs = gram.shape[-1] - n_bands
    own = np.diagonal(gram, axis1=-2, axis2=-1)[..., inputs:]
    cross = (gram[..., inputs:, :inputs] * solution).sum(axis=-1)
    inner = ((solution @ gram[..., :inputs, :inputs]) * solution).sum(axis=-1)
    return own, cross, inner


def _cell_errors(grams: Float32, pixels: Float64, solution: Float64, n_bands: int) -> Float64:
    """(c,) root mean square error of each cell over all bands, each band in units of the window's error."""
    own, cross, inner = _error_terms(grams, solution.astype(np.float32), n_bands)
    error = np.maximum(own - 2.0 * cross + inner, 0.0).astype(np.float64)
    error /= np.maximum(error.sum(axis=0), 1e-12)
    return np.sqrt(error.sum(axis=1) / np.maximum(pixels, 1.0))


def _huber(errors: Float64, pixels: Float64) -> Float64:
    """Huber weights of cells; the scale is the median over the cells' pixels."""
    order = np.argsort(errors, kind="stable")
    half = np.searchsorted(np.cumsum(pixels[order]), 0.5 * pixels.sum())
    scale = errors[order[min(int(half), len(order) - 1)]]
    weights: Float64 = np.minimum(1.0, HUBER_K * scale / np.maximum(errors, 1e-12))
    return weights
