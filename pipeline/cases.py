"""Cases with known truth: in comes a series of looks, out come series with a hole at one date, and what lies under it.

*Completing an acquisition* (task A): on a date that is clear, the bad area of another date is pasted with its real
cloudy pixels; the holed date stays among the looks. *Predicting a date* (task B): the date is taken out altogether. Of
simulated places the truth is known everywhere, so their own clouds are holes too. Pure numpy, eager, no I/O; what is
random depends on the seed alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline import growth
from pipeline.bands import CODE_NODATA, temporal_bands
from pipeline.states import CLEAR
from pipeline.states import CLOUD as CLOUD_STATE
from pipeline.temporal import bright_and_dark

Codes = NDArray[np.uint16]
Bits = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Variant = Literal["base", "inputs", "growth", "growth of looks", "scl"]

CLOUD: Final = 1
SHADOW: Final = 2
VOID: Final = 4
"""Bits of a look at a pixel; 0 = clear."""

WINDOW_DAYS: Final = 60
GROWTH_M: Final = 100.0
TARGET_BAD_SHARE: Final = 0.01
"""A target is clear but for less than this."""
DONOR_BAD_SHARE: Final = (0.15, 0.90)
"""Of the date whose bad area is pasted."""
LOOK_BAD_SHARE: Final = 0.5
"""A target needs two looks in its window that are better than this."""
WORSE: Final = "worse"
"""Ends the id of a case whose masks were made worse."""
OWN_HOLE_SHARE: Final = (0.05, 0.90)
"""Of the clouds that a simulated date is scored under."""


@dataclass(frozen=True)
class Series:
    """One place through time.

    Attributes:
        name: of the place.
        codes: (T, B, H, W) uint16, 0 = no data.
        bits: (T, H, W) uint8, sum of ``CLOUD``, ``SHADOW`` and ``VOID``; 0 = clear.
        days: (T,) int32 days since 1970-01-01, ascending.
        bands: in order.
        resolution_m: pixel size.
        row0, col0: of [0, 0] on the lattice fixed to the CRS.
        core: rows and columns without margin; holes and scores lie here.
        truth: (T, B, H, W) uint16 codes without clouds, of simulated places; None of real ones.
        surface: (T, B, H, W) uint16 codes of the ground alone, without sky, gain and noise, of simulated places.
        other: {variant: (T, H, W) uint8}, further masks such as the plain reading of SCL.
        judged: ``bits`` with the dates compared, where the product would do so, else None: they choose targets, holes
            and truth, as a scene that its mask wrongly calls clear is no truth. The looks of a case begin with
            ``bits``, since the comparison must not see what the case hides: see ``checked_in_time``.
    """

    name: str
    codes: Codes
    bits: Bits
    days: NDArray[np.int32]
    bands: tuple[str, ...]
    resolution_m: float
    row0: int
    col0: int
    core: tuple[slice, slice]
    truth: Codes | None
    other: dict[str, Bits]
    surface: Codes | None = None
    judged: Bits | None = None

    @property
    def trusted(self) -> Bits:
        """(T, H, W) uint8 by which truth is chosen."""
        return self.bits if self.judged is None else self.judged

    @property
    def bad_share(self) -> NDArray[np.float64]:
        """(T,) share of the core that a look does not show clear."""
        return np.asarray((self.trusted[:, *self.core] != 0).mean(axis=(1, 2)), np.float64)


@dataclass(frozen=True)
class Case:
    """One hole: the looks as a method sees them, and what should come out.

    Attributes:
        id: unique among all places.
        place: name of the series.
        codes: (T, B, H, W) uint16; in the target the paste's cloudy pixels.
        bits: (T, H, W) uint8 as in ``Series``.
        days: (T,) int32 ascending.
        target: index of the target among the looks; None where it is taken out.
        day: of the target, days since 1970-01-01.
        truth: (B, H, W) uint16, 0 = unknown.
        truth_bits: (H, W) uint8 of ``truth``: 0 = clear, else its own clouds (mode ``paper``) or ``VOID``.
        hole: (H, W) bool: to be filled, truth known.
        row0, col0: on the lattice.
    """

    id: str
    place: str
    codes: Codes
    bits: Bits
    days: NDArray[np.int32]
    target: int | None
    day: int
    truth: Codes
    truth_bits: Bits
    hole: Flags
    row0: int
    col0: int

    @property
    def clear(self) -> Flags:
        """(T, H, W) bool, True = usable look."""
        return np.asarray(self.bits == 0)

    @property
    def observed(self) -> Flags:
        """(H, W) bool, True = the target itself is among the looks and clear here."""
        return np.zeros(self.hole.shape, bool) if self.target is None else np.asarray(self.bits[self.target] == 0)


def grow(bad: Flags, radius_px: float) -> Flags:
    """Grow True areas of (T, H, W) by a disc."""
    state = np.where(bad, np.uint8(CLOUD_STATE), np.uint8(CLEAR))
    return growth.grow(state=state, resolution_m=1.0, open_m=0, cloud_grow_m=radius_px, shadow_grow_m=0)[0]


def targets(series: Series, *, max_bad: float = TARGET_BAD_SHARE, window_days: int = WINDOW_DAYS) -> list[int]:
    """Dates that are clear (but for ``max_bad``) and have at least two usable looks within the window."""
    share = series.bad_share
    near = np.abs(series.days[:, None] - series.days[None]) <= window_days
    np.fill_diagonal(near, False)
    looks = (near & (share < LOOK_BAD_SHARE)[None]).sum(axis=1)
    return [int(t) for t in np.flatnonzero((share < max_bad) & (looks >= 2))]


def donors(series: Series) -> NDArray[np.intp]:
    """Dates whose bad area can be pasted."""
    share = series.bad_share
    return np.flatnonzero((share >= DONOR_BAD_SHARE[0]) & (share <= DONOR_BAD_SHARE[1]))


def completions(
    series: Series,
    variant: Variant = "base",
    *,
    pastes: int = 2,
    seed: int = 0,
    window_days: int = WINDOW_DAYS,
    max_bad: float = TARGET_BAD_SHARE,
) -> Iterator[Case]:
    """Task A on a real series: ``pastes`` cases per target.

    The hole, its donor and its quarter turn are the same in all variants of one seed, so that they can be compared.

    Args:
        series: the place.
        variant: ``base``: as they are. ``inputs``: the hole is pasted on a random half of the other looks too.
            ``growth``: all masks grown by 100 m; ``growth of looks``: all but the hole. ``scl``: the masks are
            ``series.other["scl"]``; the pasted hole stays known.
        pastes: holes per target.
        seed: of donors, turns and halves.
        window_days: looks so near to the target are used.
        max_bad: of a target, see ``targets``.
    """
    rng = np.random.default_rng(seed)
    found = donors(series)
    for target in targets(series, max_bad=max_bad, window_days=window_days):
        others = found[found != target]
        if not others.size:
            continue
        picked = rng.choice(others, size=pastes, replace=others.size < pastes)
        for number, donor in enumerate(picked):
            turns = int(rng.integers(4))
            half = rng.permutation(len(series.days)) % 2 == 0
            case = _pasted(series, variant, target, int(donor), turns, half, window_days)
            yield replace(case, id=f"{case.id}/{number}")


def _pasted(
    series: Series, variant: Variant, target: int, donor: int, turns: int, half: Flags, window_days: int
) -> Case:
    if series.codes.shape[2] != series.codes.shape[3]:
        turns -= turns % 2  # only half turns keep the shape
    spot = np.rot90(series.trusted[donor], turns)
    hole = spot != 0
    cloudy = np.rot90(series.codes[donor], turns, axes=(1, 2))
    used = np.flatnonzero(np.abs(series.days - series.days[target]) <= window_days)
    at = int(np.flatnonzero(used == target)[0])
    pasted = half[used] if variant == "inputs" else np.zeros(len(used), bool)
    pasted[at] = True
    on = pasted[:, None, None] & hole
    codes = np.where(on[:, None], cloudy, series.codes[used])
    bits = np.where(on, spot, series.other.get(variant, series.bits)[used])
    if variant.startswith("growth"):
        grown = np.where(grow(bits != 0, GROWTH_M / series.resolution_m) & (bits == 0), np.uint8(CLOUD), bits)
        if variant == "growth of looks":
            grown[at] = bits[at]
        bits = grown
    return replace(
        _case(series, target, "complete"),
        codes=codes,
        bits=bits,
        days=series.days[used],
        target=at,
        # score only what is truth: the target's own few bad pixels are none
        hole=_in_core(series, hole & (series.trusted[target] == 0)),
    )


def predictions(series: Series, *, window_days: int = WINDOW_DAYS, max_bad: float = TARGET_BAD_SHARE) -> Iterator[Case]:
    """Task B: each target is taken out of the looks; to be predicted as a whole."""
    for target in targets(series, max_bad=max_bad, window_days=window_days):
        yield without_target(_windowed(series, target, "predict", window_days))


def simulated(series: Series, *, window_days: int = WINDOW_DAYS) -> Iterator[Case]:
    """Task A on a simulated place: each pass under its own clouds, as far as the mask knows them.

    What the mask misses is passed through as observed; its error shows in the columns of observed ground.
    """
    if series.truth is None:
        raise ValueError(f"{series.name} is no simulated place: it has no truth under its clouds")
    share = series.bad_share
    for target in np.flatnonzero((share >= OWN_HOLE_SHARE[0]) & (share <= OWN_HOLE_SHARE[1])):
        case = _windowed(series, int(target), "clouds", window_days)
        if len(case.days) > 2:
            yield replace(case, hole=_in_core(series, series.bits[target] != 0) & (case.truth[0] != CODE_NODATA))


def papers(series: Series, *, window_days: int = WINDOW_DAYS) -> Iterator[Case]:
    """Training cases after Oehmcke et al. 2020: any date, its own clouds included, is predicted from all others.

    ``truth_bits`` tells the target's own clouds, which the model is given as its condition; ``hole`` is all that the
    target shows. Which patches of it are too cloudy is for the caller to decide.
    """
    for target in range(len(series.days)):
        case = _windowed(series, target, "paper", window_days)
        if len(case.days) <= 2:
            continue
        shown = _in_core(series, (series.codes[target] != CODE_NODATA).all(axis=0))
        bits = np.where(shown, series.trusted[target] & (CLOUD | SHADOW), VOID).astype(np.uint8)
        truth = np.where(shown, series.codes[target], np.uint16(CODE_NODATA))
        yield replace(without_target(replace(case, truth=truth, truth_bits=bits)), hole=shown)


def without_target(case: Case) -> Case:
    """The case with its target taken out of the looks: everything known of it is the hole."""
    if case.target is None:
        return case
    keep = np.arange(len(case.days)) != case.target
    known = (case.truth != CODE_NODATA).all(axis=0) & ((case.truth_bits & VOID) == 0)
    return replace(case, codes=case.codes[keep], bits=case.bits[keep], days=case.days[keep], target=None, hole=known)


def with_looks(case: Case, keep: Sequence[int] | NDArray[np.intp]) -> Case:
    """The case with some of its looks only, in time order; the target's own look always stays."""
    chosen = {int(i) for i in keep} | ({case.target} if case.target is not None else set())
    kept = np.array(sorted(chosen), np.intp)
    target = None if case.target is None else int(np.flatnonzero(kept == case.target)[0])
    return replace(case, codes=case.codes[kept], bits=case.bits[kept], days=case.days[kept], target=target)


def with_worse_masks(case: Case, share: float, edge_px: int, rng: np.random.Generator) -> Case:
    """The case as masks show it that miss cloud: patches of it (``share`` in all) and up to ``edge_px`` of its edges.

    What is missed counts as clear, on the target too; the hole is what is left to fill.
    """
    bits = case.bits.copy()
    for look in bits:
        hidden = (look & (CLOUD | SHADOW)) != 0
        if not hidden.any():
            continue
        field = ndimage.gaussian_filter(rng.standard_normal(hidden.shape), 5.0)
        missed = hidden & (field < np.quantile(field[hidden], share))
        if edge := int(rng.integers(edge_px + 1)):
            missed |= hidden & ~ndimage.binary_erosion(hidden, iterations=edge, border_value=1)
        look[missed] &= np.uint8(VOID)
    hole = case.hole if case.target is None else case.hole & (bits[case.target] != 0)
    return replace(case, id=f"{case.id}/{WORSE}", bits=bits, hole=hole)


def checked_in_time(case: Case, bands: Sequence[str]) -> Case:
    """The case with its masks checked in time, as the product does it, the truth under the hole unseen."""
    return replace(case, bits=compared(case.codes, case.bits, case.days, bands))


def compared(codes: Codes, bits: Bits, days: NDArray[np.int32], bands: Sequence[str]) -> Bits:
    """The bits with what the comparison of dates adds."""
    dark, nir = temporal_bands(bands)
    bright, deep = bright_and_dark(
        codes=np.ascontiguousarray(codes[:, dark]),
        clear=bits == 0,
        days=days,
        nir=None if nir is None else np.ascontiguousarray(codes[:, nir]),
    )
    return bits | bright * np.uint8(CLOUD) | deep * np.uint8(SHADOW)


def nearest_looks(case: Case, count: int) -> Case:
    """The case with at most ``count`` looks, those nearest to the target in time."""
    if len(case.days) <= count:
        return case
    order = np.argsort(np.abs(case.days.astype(np.int64) - case.day), kind="stable")
    return with_looks(case, order[:count])


def _windowed(series: Series, target: int, kind: str, window_days: int) -> Case:
    used = np.flatnonzero(np.abs(series.days - series.days[target]) <= window_days)
    case = _case(series, target, kind)
    at = int(np.flatnonzero(used == target)[0])
    return replace(case, codes=series.codes[used], bits=series.bits[used], days=series.days[used], target=at)


def _case(series: Series, target: int, kind: str) -> Case:
    """The target's truth; of a real place its own bad pixels are unknown."""
    day, nothing = int(series.days[target]), np.zeros(series.bits.shape[1:], bool)
    truth = series.codes[target] if series.truth is None else series.truth[target]
    unknown = (truth == CODE_NODATA).any(axis=0)
    if series.truth is None:
        unknown |= series.trusted[target] != 0
    void = np.where(_in_core(series, ~unknown), np.uint8(0), np.uint8(VOID))
    return Case(
        id=f"{series.name}/{day}/{kind}",
        place=series.name,
        codes=series.codes,
        bits=series.bits,
        days=series.days,
        target=target,
        day=day,
        truth=np.where(unknown, np.uint16(CODE_NODATA), truth),
        truth_bits=void,
        hole=nothing,
        row0=series.row0,
        col0=series.col0,
    )


def _in_core(series: Series, where: Flags) -> Flags:
    out = np.zeros_like(where)
    out[series.core] = where[series.core]
    return out
