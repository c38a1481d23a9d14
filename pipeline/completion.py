"""In: looks around an acquisition. Out: that acquisition completed classically, whatever it shows itself.

Where its clear pixels teach how it follows from the other dates, ``regression`` decides. Where they are too far or too
few, as in the middle of a wide cloud, regression would be plain linear interpolation; there ``kalman`` takes linear's
place, as smoothly as the regression lets go. Pure numpy, eager.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline import composite, kalman, regression
from pipeline.regression import Filled, RegressionOptions

HALO_PX: Final = max(regression.HALO_PX, kalman.HALO_PX)
"""Nothing farther than this matters to a pixel."""
FULL_EVIDENCE: Final = np.float32(0.9)
"""Where the acquisition's clear pixels decide this much, they decide all."""
DEFAULTS: Final = RegressionOptions()

Codes = NDArray[np.uint16]
Flags = NDArray[np.bool_]
Int32 = NDArray[np.int32]


def complete(
    *,
    codes: Codes,
    clear: Flags,
    days: Int32,
    anchor: int,
    row0: int,
    col0: int,
    options: RegressionOptions = DEFAULTS,
    core: tuple[slice, slice] | None = None,
    with_fit: bool = False,
) -> Filled:
    """Complete one acquisition; arguments, result and errors are those of ``regression.fill_acquisition``.

    A pixel depends on nothing farther than ``HALO_PX``.
    """
    looks: dict[str, Any] = {"codes": codes, "days": days, "row0": row0, "col0": col0}
    filled = regression.fill_acquisition(
        **looks, clear=clear, anchor=anchor, options=options, core=core, with_fit=with_fit
    )
    weak = np.isfinite(filled.sigma[0]) & (filled.evidence < FULL_EVIDENCE)
    if not weak.any():
        return filled
    part = _around(weak)
    rest = clear.copy()
    rest[anchor] = False
    day = int(days[anchor])
    between = kalman.interpolate(**looks, clear=rest, target=day, core=part, within=weak[part])
    line = composite.linear(codes=codes[:, :, *part], clear=rest[:, *part], days=days, target=day).codes
    weight = np.where(weak[part], 1 - filled.evidence[part] / FULL_EVIDENCE, np.float32(0))
    step = weight * (between.codes.astype(np.float32) - line)
    moved = np.clip(np.rint(filled.codes[:, *part] + step), 1, 65534).astype(np.uint16)
    np.copyto(filled.codes[:, *part], moved, where=weak[part])
    if filled.fit is not None:  # whoever corrects the fit starts from the same
        filled.fit[:, *part] += step
    sigma = filled.sigma[:, *part]
    sigma += weight * np.where(np.isfinite(between.sigma), between.sigma - sigma, np.float32(0))
    return filled


def fill_series(
    *,
    codes: Codes,
    clear: Flags,
    days: Int32,
    row0: int,
    col0: int,
    options: RegressionOptions = DEFAULTS,
    window_days: int | None = None,
) -> Codes:
    """Every acquisition completed: a series without gaps.

    Args:
        codes: ``(T, B, H, W)`` uint16 codes, 0 = no data.
        clear: ``(T, H, W)`` bool, True = usable look.
        days: ``(T,)`` int32 days since 1970-01-01, ascending.
        row0: global lattice row of pixel [0, 0].
        col0: its global lattice column.
        options: see :class:`RegressionOptions`.
        window_days: use only looks within this many days of each acquisition; default all.

    Returns:
        ``(T, B, H, W)`` uint16, eager; observed values bit-exact, 0 only where a pixel has no clear look at
        all.
    """
    filled = np.empty_like(codes)
    for t, day in enumerate(days):
        used = np.arange(len(days)) if window_days is None else np.flatnonzero(np.abs(days - day) <= window_days)
        filled[t] = complete(
            codes=codes[used],
            clear=clear[used],
            days=days[used],
            anchor=int(np.searchsorted(used, t)),
            row0=row0,
            col0=col0,
            options=options,
        ).codes
    return filled


def _around(where: Flags) -> tuple[slice, slice]:
    """The smallest rectangle that holds all that is True."""
    rows, cols = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
