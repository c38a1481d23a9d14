"""In: looks around an acquisition. Out: that acquisition completed under its clouds, with one sigma.

Interpolation in time ignores what the acquisition itself shows in its clear pixels. Here those pixels
teach, window by window, how the acquisition follows from the other dates (all bands of a group together),
and the clouded pixels are filled accordingly; what the fit leaves over nearby is carried into the gap. Pure
numpy, nothing lazy, no I/O.

All arrays are uint16 codes (reflectance * 10000 + 1000, 0 = no data); windows stand on a lattice fixed to
the global pixel index, so that the answer at a pixel does not depend on how blocks were cut.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from pipeline.bands import complete_looks
from pipeline.blas import one_blas_thread
from pipeline.errors import ConfigError
from pipeline.regression_lattice import GRID_PX, HALO_PX, RegressionOptions, Windows, plan
from pipeline.regression_windows import Bool, Float32, Group, Int32, UInt16

__all__ = ["HALO_PX", "Filled", "RegressionOptions", "fill_acquisition"]

DISTANCE_CAP_PX = 128  # sigma grows up to here; below HALO_PX
GROUP_BANDS = 4  # bands that serve as features for each other
SIGMA_NEAR, SIGMA_FAR = (
    0.9,
    1.5,
)  # factors on sigma beside a clear pixel and at DISTANCE_CAP_PX, set on pasted holes
DEFAULTS = RegressionOptions()


@dataclass(frozen=True)
class Filled:
    """One acquisition, completed."""

    codes: UInt16
    """``(B, H, W)``; the anchor's clear pixels bit-exact; 0 = no look at all (or outside ``core``)."""
    sigma: Float32
    """``(B, H, W)`` one sigma in codes (1 = 1e-4 reflectance) where filled, NaN elsewhere."""
    source_date: Int32
    """``(H, W)`` days since 1970-01-01: own day where observed, else of the nearest clear look; 0 = none."""
    evidence: Float32
    """``(H, W)`` 0 to 1, how much clear pixels of the anchor decide in a gap; 0 = plain linear. 1 elsewhere."""
    fit: Float32 | None = None
    """``(B, H, W)`` codes, what the fit says before any residual, on clear pixels too; NaN beyond its cells."""


def fill_acquisition(
    *,
    codes: UInt16,
    clear: Bool,
    days: Int32,
    anchor: int,
    row0: int,
    col0: int,
    options: RegressionOptions = DEFAULTS,
    core: tuple[slice, slice] | None = None,
    with_fit: bool = False,
) -> Filled:
    """Complete one acquisition from the looks around it by target-conditioned regression.

    Args:
        codes: ``(T, B, H, W)`` uint16 codes, 0 = no data. Pass the same acquisitions for every block of an
        area.
        clear: ``(T, H, W)`` bool, True = usable look; without data in some band it counts as not clear.
        days: ``(T,)`` int32 days since 1970-01-01, ascending, ties allowed.
        anchor: index of the acquisition to complete.
        row0: global lattice row of pixel [0, 0].
        col0: its global lattice column.
        options: see :class:`RegressionOptions`.
        core: rows and columns to fill, where the rest is halo; default all. Outside, the result is no data.
        with_fit: also give what the fit says about clear pixels near gaps, for whoever learns from its errors.

    Returns:
        :class:`Filled`, eager. A pixel depends on nothing farther than ``HALO_PX``.

    Raises:
        ConfigError: shapes, dtypes, order of days or the anchor's index do not fit.

    Source: science notes, section 4.1; the features of all bands of a group serve each band.
    """
    _check(codes, clear, days, anchor)
    clear = complete_looks(codes=codes, clear=clear)
    n_times, n_bands, height, width = codes.shape
    inside = np.zeros((height, width), bool)
    area = core if core is not None else (slice(None), slice(None))
    inside[area] = True
    gap = inside & ~clear[anchor]
    out = np.zeros((n_bands, height, width), np.uint16)
    np.copyto(out[:, *area], codes[anchor][:, *area], where=clear[anchor][area])
    sigma = np.full((n_bands, height, width), np.nan, np.float32)
    source_date = np.zeros((height, width), np.int32)
    source_date[area] = _nearest_look(clear[:, *area], days, anchor)
    evidence = np.ones((height, width), np.float32)
    fit = np.full(sigma.shape, np.nan, np.float32) if with_fit else None
    lattice = plan(gap, row0, col0)
    if n_times > 1 and lattice.nodes:
        growth = _growth(clear[anchor], row0, col0)
        with one_blas_thread():
            windows = Windows(clear, days, anchor, lattice, options)
            for bands in _groups(n_bands):
                part = Group(codes[:, bands], windows, options)
                part.write(out[bands], sigma[bands], evidence, gap, growth, None if fit is None else fit[bands])
    return Filled(out, sigma, source_date, evidence, fit)


def _check(codes: UInt16, clear: Bool, days: Int32, anchor: int) -> None:
    if codes.ndim != 4 or codes.dtype != np.uint16:
        raise ConfigError(f"codes are {codes.dtype} of shape {codes.shape}: pass uint16 (time, band, y, x)")
    if clear.shape != codes.shape[:1] + codes.shape[2:] or clear.dtype != np.bool_:
        raise ConfigError(f"clear is {clear.dtype} of shape {clear.shape}: pass bool (time, y, x) as the codes have it")
    if days.shape != codes.shape[:1] or (np.diff(days) < 0).any():
        raise ConfigError(f"days {days.tolist()}: pass one day an acquisition, ascending")
    if not 0 <= anchor < len(days):
        raise ConfigError(f"anchor {anchor}: must be an index into the {len(days)} acquisitions")


def _groups(n_bands: int) -> list[slice]:
    """Neighbouring bands in groups of nearly equal size."""
    n = -(-n_bands // GROUP_BANDS)
    edges = [round(i * n_bands / n) for i in range(n + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _nearest_look(clear: Bool, days: Int32, anchor: int) -> Int32:
    """(H, W) day of the nearest clear look, the anchor's own first; ties go to the earlier look."""
    nearest = np.zeros(clear.shape[1:], np.int32)
    found = np.zeros(clear.shape[1:], bool)
    for t in sorted(
        range(len(days)),
        key=lambda t: (t != anchor, abs(int(days[t] - days[anchor])), t),
    ):
        np.copyto(nearest, days[t], where=clear[t] & ~found)
        found |= clear[t]
        if found.all():
            break
    return nearest


def _growth(anchor_clear: Bool, row0: int, col0: int) -> Float32:
    """(H, W) factor on sigma by the distance to the nearest clear pixel, in steps of GRID_PX."""
    top, left = row0 % GRID_PX, col0 % GRID_PX
    height, width = anchor_clear.shape
    shape = (-(-(top + height) // GRID_PX), -(-(left + width) // GRID_PX))
    padded = np.zeros((shape[0] * GRID_PX, shape[1] * GRID_PX), bool)
    padded[top : top + height, left : left + width] = anchor_clear
    some = padded.reshape(shape[0], GRID_PX, shape[1], GRID_PX).any(axis=(1, 3))
    far = ndimage.distance_transform_edt(~some) * GRID_PX if some.any() else np.full(shape, np.inf)
    share = np.minimum(far, DISTANCE_CAP_PX) / DISTANCE_CAP_PX
    factor = (SIGMA_NEAR + (SIGMA_FAR - SIGMA_NEAR) * share).astype(np.float32)
    full = np.repeat(np.repeat(factor, GRID_PX, axis=0), GRID_PX, axis=1)
    return full[top : top + height, left : left + width]
