"""The heart: in come the looks of one block as arrays, out come all layers of that block. Pure functions of numpy.

Both entrances end here: the job calls ``compose_block`` task by task, the lazy way maps it over Dask blocks. Nothing
depends on how blocks were cut: windows lie on the lattice (``row0``, ``col0``), everything else is per pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import completion, composite, kalman, learned, regression
from pipeline.anchors import INTERPOLATE, AnchorMap
from pipeline.config import LEARNED, Method
from pipeline.errors import ConfigError
from pipeline.estimates import Target
from pipeline.kept import Kept

NO_SIGMA = 65535
SEASON_DAYS = 90
"""A look further than this from the date shown is from another season."""
LOW_CONFIDENCE_SIGMA = 500
"""Codes (0.05 reflectance): an uncertainty above this in any band is low confidence."""

LEAST_LOOKS = 2
"""Fewer clear looks than this are low confidence."""

NO_DATA, OBSERVED, COMPOSED, READ_FAILED, LOW, SEASON, OUTSIDE, BLENDED = 1, 2, 4, 16, 32, 64, 256, 512

Codes = NDArray[np.uint16]


@dataclass(frozen=True)
class Layers:
    """All layers of a block.

    Attributes:
        codes: (band, y, x) uint16, 0 = no data.
        clear_count: (y, x) uint16, clear looks.
        source_date: (y, x) int32, days since 1970-01-01, 0 = none.
        flags: (y, x) uint16, bits as ``pipeline.store.FLAGS``.
        sigma: (band, y, x) uint16 in codes, 65535 = none; None for methods without uncertainty.
        notes: what the run should tell, such as a GPU's batch halved for memory.
    """

    codes: Codes
    clear_count: NDArray[np.uint16]
    source_date: NDArray[np.int32]
    flags: NDArray[np.uint16]
    sigma: NDArray[np.uint16] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Looks:
    """The looks of a block with its halo, and where they lie; see ``compose_block``."""

    codes: Codes
    clear: NDArray[np.bool_]
    days: NDArray[np.int32]
    row0: int
    col0: int
    core: tuple[slice, slice]
    bits: NDArray[np.uint8] | None = None
    kept: Kept | None = None

    @property
    def inner(self) -> tuple[Codes, NDArray[np.bool_]]:
        """Codes and clear looks of the core."""
        rows, cols = self.core
        return self.codes[:, :, rows, cols], self.clear[:, rows, cols]


@dataclass
class _Part:
    """One anchor's answer: codes (band, y, x), date, sigma in codes (NaN = none), observed, not to be relied on."""

    codes: Codes
    source_date: NDArray[np.int32]
    sigma: NDArray[np.float32] | None
    observed: NDArray[np.bool_]
    day: int | NDArray[np.int32]  # of the anchor; where anchors meet, of each pixel's own
    doubtful: NDArray[np.bool_] | None = None
    notes: tuple[str, ...] = ()


def has_uncertainty(method: Method) -> bool:
    """Whether the method fills the ``uncertainty`` layers."""
    return method.name in ("kalman", "regression") or method.name in LEARNED


def halo_px(method: Method) -> int:
    """How far around a block the method looks, in pixels of the grid."""
    if method.name in LEARNED:
        return learned.halo_px(method)
    return {"kalman": kalman.HALO_PX, "regression": completion.HALO_PX}.get(method.name, 0)


def _options(method: Method) -> Any:
    """The method's own options, checked.

    Raises:
        ConfigError: for an option the method does not have, or a value it cannot use.
    """
    given = method.options
    if method.name == "regression":
        known = {f.name for f in fields(regression.RegressionOptions)}
    else:
        known = {"tau_days"} if method.name == "decay" else set()
    for name in given:
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"method.{name}: {method.name} has no such option; its options are: {listed}")
    try:
        return regression.RegressionOptions(**given) if method.name == "regression" else given
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method: {error}") from error


def check_method(method: Method, bands: Sequence[str]) -> None:
    """Refuse, before any work starts, what a method cannot do.

    Raises:
        ConfigError: an option that it does not have, a value that it cannot use, a package that is not installed.
        WeightsError: a model's weights cannot be used, or not for these bands.
    """
    if method.name in LEARNED:
        learned.prepare(method, bands)
        return
    options = _options(method)
    tau = options.get("tau_days", 1) if isinstance(options, dict) else 1
    if not isinstance(tau, int | float) or not tau > 0:
        raise ConfigError(f"method.tau_days: must be a number of days above 0, got {tau!r}")


def compose_block(
    *,
    codes: Codes,
    clear: NDArray[np.bool_],
    days: NDArray[np.int32],
    method: Method,
    target: int,
    anchors: AnchorMap | None,
    row0: int,
    col0: int,
    core: tuple[slice, slice] | None = None,
    failed: NDArray[np.bool_] | None = None,
    bits: NDArray[np.uint8] | None = None,
    kept: Kept | None = None,
) -> Layers:
    """Compose the looks of one block.

    Args:
        codes: (T, B, H, W) uint16 codes in time order, halo included; 0 = no data.
        clear: (T, H, W) bool, True = usable look.
        days: (T,) int32 solar days since 1970-01-01, ascending.
        method: name and options.
        target: the day to show.
        anchors: which acquisition to complete where (methods that show a date); None = interpolate everywhere.
        row0: global row of ``codes[..., 0, :]``.
        col0: global column of ``codes[..., 0]``.
        core: the part without halo, all of it by default; only this part comes back.
        failed: (H, W) bool, a read failed here.
        bits: (T, H, W) uint8, what hides a look: 1 cloud, 2 shadow, 4 no data; for learned methods, which take a look
            that is not clear for both clouded and shaded without it.
        kept: for learned methods, what earlier sub-blocks of the same looks leave for this one and those after it.

    Returns:
        ``Layers`` of the core.
    """
    rows, cols = core or (slice(0, codes.shape[2]), slice(0, codes.shape[3]))
    looks = _Looks(codes, clear, days, row0, col0, (rows, cols), bits, kept)
    inner, inner_clear = looks.inner
    height, width = inner.shape[2:]
    count = composite.clear_count(inner_clear)
    if not method.shows_date:
        function = composite.METHODS[method.name]
        out = function(codes=inner, clear=inner_clear, days=days, target=target, **_options(method))
        whole = _Part(out.codes, out.source_date, None, np.zeros((height, width), bool), target)
        parts: list[tuple[_Part, NDArray[np.float32] | None]] = [(whole, None)]
    else:
        where = [(INTERPOLATE, np.ones((height, width), np.float32))]
        if anchors is not None:
            where = anchors.at(row0 + rows.start, col0 + cols.start, height, width)
        parts = [(_complete(looks, method, target, layer, weight), weight) for layer, weight in where]
    merged, blended = _blend(parts)
    flags = _flags(merged, blended, count, failed=None if failed is None else failed[rows, cols])
    sigma = None
    if has_uncertainty(method):
        raw = merged.sigma if merged.sigma is not None else np.full(merged.codes.shape, np.nan, np.float32)
        known = np.isfinite(raw) & (merged.codes != 0)
        sigma = np.where(known, np.clip(np.rint(np.nan_to_num(raw)), 0, NO_SIGMA - 1), NO_SIGMA).astype(np.uint16)
    notes = tuple(note for part, _ in parts for note in part.notes)
    return Layers(merged.codes, count, merged.source_date, flags, sigma, notes)


def _complete(looks: _Looks, method: Method, target: int, layer: int, weight: NDArray[np.float32]) -> _Part:
    """The core of one anchor, its gaps completed; or interpolation at the target where there is none."""
    days, (rows, cols) = looks.days, looks.core
    inner, inner_clear = looks.inner
    if layer != INTERPOLATE and method.name == "regression":
        filled = completion.complete(
            codes=looks.codes,
            clear=looks.clear,
            days=days,
            anchor=layer,
            row0=looks.row0,
            col0=looks.col0,
            core=looks.core,
            options=_options(method),
        )
        return _Part(
            filled.codes[:, rows, cols],
            filled.source_date[rows, cols],
            filled.sigma[:, rows, cols],
            inner_clear[layer],
            int(days[layer]),
        )
    if method.name in LEARNED:
        anchor = None if layer == INTERPOLATE else layer
        done = learned.complete(
            method,
            Target(looks.codes, looks.clear, days, target, anchor, looks.row0, looks.col0),
            core=looks.core,
            bits=looks.bits,
            kept=looks.kept,
            within=weight > 0,  # all anchors have the same looks, so that none has to stand in for another
        )
        observed = np.zeros(inner_clear.shape[1:], bool) if layer == INTERPOLATE else inner_clear[layer]
        day = target if layer == INTERPOLATE else int(days[layer])
        return _Part(done.codes, done.source_date, done.sigma, observed, day, done.doubtful, tuple(done.notes))
    day = target if layer == INTERPOLATE else int(days[layer])
    part = _between(looks, method, day)
    if layer != INTERPOLATE:
        part.observed = inner_clear[layer]
        np.copyto(part.codes, inner[layer], where=part.observed[None])
        np.copyto(part.source_date, np.int32(day), where=part.observed)
        if part.sigma is not None:
            np.copyto(part.sigma, np.float32(np.nan), where=part.observed[None])
    return part


def _between(looks: _Looks, method: Method, day: int) -> _Part:
    """A day from the clear looks around it."""
    inner, inner_clear = looks.inner
    none = np.zeros(inner_clear.shape[1:], bool)
    if method.name in ("nearest", "linear"):
        out = composite.METHODS[method.name](codes=inner, clear=inner_clear, days=looks.days, target=day)
        return _Part(out.codes, out.source_date, None, none, day)
    made = kalman.interpolate(
        codes=looks.codes,
        clear=looks.clear,
        days=looks.days,
        target=day,
        row0=looks.row0,
        col0=looks.col0,
        core=looks.core,
    )
    return _Part(made.codes, made.source_date, made.sigma, none, day)


def _blend(parts: list[tuple[_Part, NDArray[np.float32] | None]]) -> tuple[_Part, NDArray[np.bool_]]:
    """Weigh the anchors' answers; a pixel that one of them owns keeps its codes bit for bit."""
    first, weight = parts[0]
    none = np.zeros(first.observed.shape, bool)
    if len(parts) == 1 or weight is None:
        return first, none
    weights: NDArray[Any] = np.stack([w for _, w in parts if w is not None])
    present = np.stack([p.codes[0] != 0 for p, _ in parts])
    weights = np.where(present, weights, 0)
    total = weights.sum(axis=0)
    # Where the owner has nothing, whoever has something speaks.
    lost = (total == 0) & present.any(axis=0)
    weights = np.where(lost, present, weights)
    total = np.where(lost, present.sum(axis=0), total)
    weights = weights / np.where(total == 0, 1, total)
    heaviest = weights.argmax(axis=0)
    blended = (weights.max(axis=0) < 1) & (total > 0)
    day = np.full(none.shape, first.day, np.int32)
    out = _Part(first.codes.copy(), first.source_date.copy(), None, first.observed.copy(), day)
    if any(p.sigma is not None for p, _ in parts):
        out.sigma = np.full(first.codes.shape, np.nan, np.float32)
    mean = np.zeros(first.codes.shape, np.float64)
    spread = np.zeros(first.codes.shape, np.float64)
    for i, (part, _) in enumerate(parts):
        own = heaviest == i
        np.copyto(out.codes, part.codes, where=own[None])
        np.copyto(out.source_date, part.source_date, where=own)
        np.copyto(out.observed, part.observed, where=own)
        np.copyto(day, part.day, where=own)
        if part.doubtful is not None:
            out.doubtful = np.where(own, part.doubtful, none if out.doubtful is None else out.doubtful)
        mean += weights[i] * part.codes
        if out.sigma is not None and part.sigma is not None:
            np.copyto(out.sigma, part.sigma, where=own[None])
            # the answers are made of the same looks, so that their errors hardly cancel
            spread += weights[i] * np.nan_to_num(part.sigma)
    np.copyto(out.codes, np.floor(mean + 0.5).astype(np.uint16), where=blended[None])
    if out.sigma is not None:
        np.copyto(out.sigma, spread.astype(np.float32), where=blended[None] & (spread > 0))
    return out, blended


def _flags(
    part: _Part,
    blended: NDArray[np.bool_],
    count: NDArray[np.uint16],
    *,
    failed: NDArray[np.bool_] | None,
) -> NDArray[np.uint16]:
    has_data = (part.codes != 0).all(axis=0)
    observed = part.observed & has_data & ~blended
    flags = np.where(has_data, np.where(observed, OBSERVED, COMPOSED), NO_DATA).astype(np.uint16)
    # A single look, even the anchor's own, has no other to confirm it; the temporal check may have found it odd.
    low = count < LEAST_LOOKS
    if part.sigma is not None:
        low |= np.nan_to_num(part.sigma).max(axis=0) > LOW_CONFIDENCE_SIGMA
    if part.doubtful is not None:
        low |= part.doubtful
    far = np.abs(part.source_date.astype(np.int64) - part.day) > SEASON_DAYS
    flags |= np.where(has_data & low, np.uint16(LOW), np.uint16(0))
    flags |= np.where(has_data & far & (part.source_date != 0), np.uint16(SEASON), np.uint16(0))
    flags |= np.where(has_data & blended, np.uint16(BLENDED), np.uint16(0))
    if failed is not None:
        flags |= np.where(failed, np.uint16(READ_FAILED), np.uint16(0))
    return flags
