"""In: looks on whole lattice cells. Out: ridge coefficients at the lattice's nodes, with their error.

The numerical half of :mod:`pipeline.regression`: features (gaps closed linearly in time), one Gram matrix
per cell, and the fit of every node from the Gram matrices of the cells around it. A Gram matrix is
additive, so overlapping windows, re-weighting of hazy cells and held-out patches all cost sums of small
matrices, never a second look at pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.regression_lattice import CELL_PX

# Codes are centred and scaled before a cell's Gram matrix is rounded to float32: the rounding of the sums over
# cells (1e-6) stays far below the ridge.
CENTRE_CODE = np.float32(2500.0)
UNIT_CODES = np.float32(1000.0)
TRUST_PX = 300.0  # held-out pixels at which the share of the fit that they support is taken at its word
CLOSED_NOISE = 2.0  # error variance of a feature closed in time, in units of the linear method's own
HUBER_K = 1.5  # a cell counts in full until its error is this many times the window's median
REWEIGHT_ROUNDS = 2
ANCHOR = -1  # its place among the looks, of which it is none
FAR_DAYS = np.float32(1e30)  # no look on this side
FOLDS = 4  # held-out patches: every fourth cell, in a 2 x 2 pattern

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
UInt16 = NDArray[np.uint16]


@dataclass(frozen=True)
class Tile:
    """Some cells as features: ``n`` pixels (cell after cell), ``p`` features, ``b`` bands."""

    rows: UInt16  # (p, n) codes: dates x bands, closed in time, then linear per band
    fitted: Bool  # (n,) the anchor and at least one other look are clear
    looked: Bool  # (n,) at least one look besides the anchor
    target: Float32  # (b, n) codes: anchor minus linear where fitted, 0 elsewhere
    low: UInt16  # (b, n) least and largest of the looks
    high: UInt16
    clear: Bool  # (dates, n) which features were seen on their own date, and not closed in time


@dataclass(frozen=True)
class Swing:
    """How far the looks around the anchor lie apart."""

    values: Float32  # (b, n) codes: next minus previous clear look, 0 where one is missing
    both: Bool  # (n,) both of them are there


@dataclass(frozen=True)
class NodeFit:
    """What one node knows; coefficients are in codes per code from CENTRE_CODE."""

    dates: tuple[int, ...]  # the dates used, ascending
    coefficients: Float32  # (b, dates x b + b + 1): on dates, linear, the constant; added to linear
    evidence: float  # 0..1: how much the anchor's clear pixels decide (0 = plain linear)
    variance: Float64  # (b,) code^2: error on held-out cells, blended with the linear method's own
    closed_variance: Float32  # (b, dates) code^2: what a date adds where it is itself a gap closed in time


def tile_features(
    codes: UInt16, clear: Bool, away: Float32, anchor: tuple[UInt16, Bool], place: int, dates: Sequence[int]
) -> tuple[Tile, Swing]:
    """Features of some cells.

    Args:
        codes: ``(T, b, n)`` uint16 of the looks but the anchor, anything where not clear.
        clear: ``(T, n)`` bool, True = usable look; False beyond the data's edge.
        away: ``(T,)`` float32 days from the anchor, ascending.
        anchor: the anchor's own codes ``(b, n)`` and clear pixels ``(n,)``.
        place: how many of the looks come before the anchor.
        dates: indices of the looks that become features, ascending.

    Returns:
        A :class:`Tile` and the :class:`Swing`. A date's gaps are closed linearly in time from all other
        looks **but the anchor**: with it, the fit would learn from its own answer. Features are rounded to
        whole codes, so that sums of their products are exact whatever else is in the tile.
    """
    n_bands, pixels = codes.shape[1:]
    keep = np.negative(clear.view(np.int8), dtype=np.int16).view(np.uint16)  # all ones where clear
    slots = {t: k for k, t in enumerate(dates)} | {ANCHOR: len(dates)}
    order = [*range(place), ANCHOR, *range(place, len(codes))]
    before = np.empty((len(slots), n_bands, pixels), np.uint16)
    before_day = np.empty((len(slots), pixels), np.float32)
    carry, changed = np.zeros((n_bands, pixels), np.uint16), np.empty((n_bands, pixels), np.uint16)
    low, high = np.full((n_bands, pixels), 65535, np.uint16), np.zeros((n_bands, pixels), np.uint16)
    day = np.full(pixels, -FAR_DAYS)
    for t in order:
        if t != ANCHOR:
            _carry_on(carry, codes[t], keep[t], changed)
            np.maximum(high, carry, out=high)
            np.maximum(day, np.where(clear[t], away[t], -FAR_DAYS), out=day)
        if t in slots:
            before[slots[t]], before_day[slots[t]] = carry, day
    looked = day > -FAR_DAYS
    carry[:] = 0
    day[:] = FAR_DAYS
    rows = np.empty((len(slots), n_bands, pixels), np.uint16)
    for t in reversed(order):
        if t != ANCHOR:
            _carry_on(carry, codes[t], keep[t], changed)
            np.minimum(low, carry - np.uint16(1), out=low)  # 0, nothing yet, goes round to the largest
            np.minimum(day, np.where(clear[t], away[t], FAR_DAYS), out=day)
        if t in slots:
            k = slots[t]
            first = before[k].astype(np.float32)
            step = carry.astype(np.float32)
            step -= first
            if t == ANCHOR:
                both = (before_day[k] > -FAR_DAYS) & (day < FAR_DAYS)
                swing = Swing(step * both, both)
            step *= _time_share(np.float32(0.0) if t == ANCHOR else away[t], before_day[k], day)
            step += first
            np.rint(step, out=step)
            rows[k] = step
    low += np.uint16(1)
    fitted = anchor[1] & looked
    target = (anchor[0].astype(np.float32) - rows[-1]) * fitted
    clear = clear[np.array(dates, int)]
    return Tile(rows.reshape(-1, pixels), fitted, looked, target, low, high, clear), swing


def _carry_on(carry: UInt16, codes: UInt16, keep: UInt16, changed: UInt16) -> None:
    """Put clear codes into ``carry``; by bits, which is many times faster than a masked copy."""
    np.bitwise_xor(carry, codes, out=changed)
    changed &= keep
    carry ^= changed


def _time_share(day: np.float32, previous: Float32, following: Float32) -> Float32:
    """Where ``day`` lies between two looks, 0..1; FAR_DAYS where one is missing gives the weight to the other.

    Looks of one day share it: the former counts.
    """
    share: Float32 = day - previous
    share /= np.maximum(following - previous, np.float32(0.5))
    return share


def cell_gram(tile: Tile, cell: int) -> Float32:
    """Gram matrix ``(q, q)`` of features, ones and target over a cell's fitted pixels, in UNIT_CODES.

    Summed in float64 over whole codes, hence exact: an entry does not depend on the rows beside it.
    """
    pixels = slice(cell * CELL_PX**2, (cell + 1) * CELL_PX**2)
    n_features, n_bands = len(tile.rows), len(tile.target)
    table = np.empty((n_features + 1 + n_bands, CELL_PX**2))
    np.subtract(tile.rows[:, pixels], float(CENTRE_CODE), out=table[:n_features])
    table[n_features] = 1.0
    table[n_features + 1 :] = tile.target[:, pixels]
    fitted = tile.fitted[pixels]
    if not fitted.all():
        table[: n_features + 1] *= fitted
    unit = np.full(len(table), 1.0 / float(UNIT_CODES))
    unit[n_features] = 1.0
    gram = table @ table.T
    gram *= unit[:, None]
    gram *= unit
    return gram.astype(np.float32)


def fit_node(
    grams: Float32,
    weights: Float64,
    folds: NDArray[np.int64],
    dates: Sequence[int],
    closed_more: Float64,
    prior_variance: Float64,
    harder: Float64,
    *,
    n_bands: int,
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
        grams: ``(c, q, q)`` float32, the window's cells with fitted pixels in lattice order, of the features
            used.
        weights: ``(c,)`` taper of the window.
        folds: ``(c,)`` 0..FOLDS-1, the held-out patch of each cell.
        dates: the dates used.
        closed_more: ``(dates,)`` share of gap pixels where a date is itself closed in time, less that of the
            fitted pixels: features that are worse where they are applied than where they were learnt.
        prior_variance: ``(b,)`` code^2, of linear interpolation as far as the looks themselves tell.
        harder: ``(b,)`` at least 1, how much larger linear's variance is in the gaps than on clear pixels.
        n_bands: bands in this group.
        ridge: relative to the mean feature variance.
        evidence_px: clear pixels at which data and prior weigh the same.

    Returns:
        The fit; without fitted pixels that of :func:`no_fit`.
    """
    if not len(grams):
        return no_fit(prior_variance)
    n_used = grams.shape[1] - n_bands - 1
    pixels = grams[:, n_used, n_used].astype(np.float64)
    noise = np.zeros(n_used)
    noise[:-n_bands] = np.outer(closed_more, CLOSED_NOISE * prior_variance / float(UNIT_CODES) ** 2).ravel()
    cell_weights = weights
    total = _weighted(grams, cell_weights[None])
    for _ in range(REWEIGHT_ROUNDS):
        errors = _cell_errors(grams, pixels, _solve(total, n_bands, ridge, evidence_px, noise)[0])
        cell_weights = weights * _huber(errors, pixels)
        total = _weighted(grams, cell_weights[None])
    parts = _weighted(grams, np.where(folds == np.arange(FOLDS)[:, None], cell_weights, 0.0))
    parts = parts[parts[:, n_used, n_used] > 0]
    solutions = _solve(np.concatenate([total, total - parts]), n_bands, ridge, evidence_px, noise)
    own, cross, inner = (terms.sum(axis=0) for terms in _error_terms(parts, solutions[1:]))
    held_px = float(parts[:, n_used, n_used].sum())
    evidence = held_px / (held_px + evidence_px)
    # what held-out cells support, over all bands; generous, since a few cells measure it badly
    agreed, spent = (cross / np.maximum(own, 1e-9)).sum(), (inner / np.maximum(own, 1e-9)).sum()
    trust = float(np.clip(2.0 * held_px / (held_px + TRUST_PX) * agreed / max(spent, 1e-9), 0.0, 1.0))
    measured = np.maximum(own - 2.0 * trust * cross + trust**2 * inner, 0.0) / held_px
    variance = evidence * measured * float(UNIT_CODES) ** 2 * harder + (1.0 - evidence) * prior_variance
    coefficients = trust * solutions[0]
    coefficients[:, -1] *= float(UNIT_CODES)
    slopes = coefficients[:, : -n_bands - 1].reshape(n_bands, len(dates), n_bands)
    closed = (slopes.astype(np.float32) ** 2 @ prior_variance).astype(np.float32)
    return NodeFit(tuple(dates), coefficients.astype(np.float32), evidence, variance, closed)


def no_fit(prior_variance: Float64) -> NodeFit:
    """Plain linear: nothing to add to it."""
    n_bands = len(prior_variance)
    nothing = np.zeros((n_bands, n_bands + 1), np.float32)
    return NodeFit((), nothing, 0.0, prior_variance, np.zeros((n_bands, 0), np.float32))


def _weighted(grams: Float32, weights: Float64) -> Float64:
    """Sums of the cells' Gram matrices (k, q, q) for weights (k, c)."""
    flat = weights.astype(np.float32) @ grams.reshape(len(grams), -1)
    return flat.reshape(-1, *grams.shape[1:]).astype(np.float64)


def _solve(grams: Float64, n_bands: int, ridge: float, evidence_px: float, noise: Float64) -> Float64:
    """Coefficients ``(k, b, used + 1)``, the constant last, from weighted Gram matrices ``(k, q, q)``."""
    n_used = grams.shape[-1] - n_bands - 1
    counts = grams[:, n_used, n_used]
    count = np.maximum(counts, 1.0)
    mean = grams[:, n_used] / count[:, None]
    centred = grams / count[:, None, None] - mean[:, :, None] * mean[:, None]
    covariance, target = centred[:, :n_used, :n_used], centred[:, :n_used, n_used + 1 :]
    diagonal = np.arange(n_used)
    scale = np.maximum(covariance[:, diagonal, diagonal].mean(axis=1), 0.0)
    # 1e-6 (one code squared): without any contrast in the window the system must stay regular
    pull = ridge * (1.0 + evidence_px / count) * scale + 1e-6
    covariance[:, diagonal, diagonal] += pull[:, None] + noise
    slopes = np.linalg.solve(covariance, target).swapaxes(1, 2)
    constant = mean[:, n_used + 1 :] * (count / (count + evidence_px))[:, None]
    constant -= (slopes @ mean[:, :n_used, None])[..., 0]
    solution: Float64 = np.concatenate([slopes, constant[..., None]], axis=2)
    solution[counts < 1.0] = 0.0
    return solution


def _error_terms(grams: Float64, solutions: Float64) -> tuple[Float64, Float64, Float64]:
    """Sums over pixels of target^2, target x prediction and prediction^2, each (k, b)."""
    inputs = solutions.shape[-1]
    own = np.diagonal(grams, axis1=-2, axis2=-1)[..., inputs:]
    cross = (grams[..., inputs:, :inputs] * solutions).sum(axis=-1)
    inner = ((solutions @ grams[..., :inputs, :inputs]) * solutions).sum(axis=-1)
    return own, cross, inner


def _cell_errors(grams: Float32, pixels: Float64, solution: Float64) -> Float64:
    """(c,) root mean square error of each cell over all bands, each band in units of the window's error."""
    n_bands = len(solution)
    # prediction minus target is one linear form of the rows: its square needs one product with the matrix
    form = np.concatenate([solution, -np.eye(n_bands)], axis=1).astype(np.float32)
    sides = (grams.reshape(-1, grams.shape[-1]) @ form.T).reshape(len(grams), -1, n_bands)
    error = np.maximum((sides * form.T).sum(axis=1), 0.0).astype(np.float64)
    error /= np.maximum(error.sum(axis=0), 1e-12)
    return np.sqrt(error.sum(axis=1) / np.maximum(pixels, 1.0))


def _huber(errors: Float64, pixels: Float64) -> Float64:
    """Huber weights of cells; the scale is the median over the cells' pixels."""
    order = np.argsort(errors, kind="stable")
    half = np.searchsorted(np.cumsum(pixels[order]), 0.5 * pixels.sum())
    scale = errors[order[min(int(half), len(order) - 1)]]
    weights: Float64 = np.minimum(1.0, HUBER_K * scale / np.maximum(errors, 1e-12))
    return weights
