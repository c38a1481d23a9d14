"""Cases with known truth: what is pasted, where it is scored, and what is random."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline import cases
from pipeline.cases import CLOUD, SHADOW, VOID, Series
from pipeline.config import Mask
from pipeline.learnfile import Simulated
from pipeline.places import simulated_place

BANDS = ("blue", "nir")


@pytest.fixture(scope="module")
def place() -> Series:
    """A simulated place with some clear dates and some clouded."""
    return simulated_place("sim", Simulated(size_px=64, dates=(10, 10), scl_share=0), 3, BANDS)


@pytest.fixture(scope="module")
def real(place: Series) -> Series:
    """The same as a real one: nobody knows what lies under its clouds."""
    return replace(place, name="real", truth=None)


def test_a_paste_hides_truth_under_real_cloud(real: Series) -> None:
    made = list(cases.completions(real, max_bad=0.1))
    assert len(made) == 2 * len(cases.targets(real, max_bad=0.1)) >= 2
    for case in made:
        assert case.target is not None
        assert case.hole.any()
        assert not case.clear[case.target][case.hole].any()
        assert (case.truth[:, case.hole] != 0).all()
        hidden, shown = case.codes[case.target], case.truth
        assert (hidden != shown)[:, case.hole].mean() > 0.9  # cloud, not the ground
        np.testing.assert_array_equal(hidden[:, case.observed], shown[:, case.observed])
        assert (np.abs(case.days - case.day) <= cases.WINDOW_DAYS).all()
    assert len({case.id for case in made}) == len(made)


def test_cases_depend_on_the_seed_alone(real: Series) -> None:
    one, again, other = (list(cases.completions(real, max_bad=0.1, seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(one, again, strict=True))
    assert any(not np.array_equal(a.codes, b.codes) for a, b in zip(one, other, strict=True))


def test_variants_share_their_hole(real: Series) -> None:
    scl = replace(real, other={"scl": np.zeros_like(real.bits)})
    base = list(cases.completions(scl, max_bad=0.1))
    for variant in ("inputs", "growth", "growth of looks", "scl"):
        for case, plain in zip(cases.completions(scl, variant, max_bad=0.1), base, strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(case.hole, plain.hole)
            clearer = case.clear & ~plain.clear
            assert clearer.any() == (variant == "scl")


def test_a_predicted_date_shows_nothing(real: Series) -> None:
    for case in cases.predictions(real, max_bad=0.1):
        assert case.target is None
        assert case.day not in case.days
        assert not case.observed.any()
        assert case.hole.mean() > 0.9


def test_simulated_holes_are_the_own_clouds_and_truth_lies_under_them(place: Series) -> None:
    made = list(cases.simulated(place))
    assert made
    for case in made:
        assert case.target is not None
        np.testing.assert_array_equal(case.hole, ~case.clear[case.target])
        clear = case.clear[case.target]
        gap = np.abs(case.codes[case.target].astype(int) - case.truth)[:, case.hole].mean()
        assert gap > 20 * np.abs(case.codes[case.target].astype(int) - case.truth)[:, clear].mean()


def test_paper_cases_keep_the_targets_own_clouds_as_their_condition(real: Series) -> None:
    made = list(cases.papers(real))
    assert len(made) == len(real.days)
    clouded = [case for case in made if (case.truth_bits & (CLOUD | SHADOW)).any()]
    assert clouded
    for case in made:
        assert case.target is None
        np.testing.assert_array_equal(case.hole, (case.truth_bits & VOID) == 0)


def test_dropping_looks_keeps_the_target_and_the_order(real: Series) -> None:
    case = next(cases.completions(real, max_bad=0.1))
    assert case.target is not None
    few = cases.nearest_looks(case, 3)
    assert len(few.days) == 3
    assert few.target is not None
    assert few.days[few.target] == case.day
    np.testing.assert_array_equal(few.codes[few.target], case.codes[case.target])
    assert (np.diff(few.days) >= 0).all()
    assert np.abs(few.days - case.day).max() <= np.sort(np.abs(case.days - case.day))[2]


def test_worse_masks_miss_cloud_and_nothing_else(real: Series) -> None:
    case = next(c for c in cases.completions(real, max_bad=0.1))
    worse = cases.with_worse_masks(case, 0.25, 0, np.random.default_rng(1))
    assert not (case.clear & ~worse.clear).any()
    hidden = ~case.clear
    assert 0.15 < (worse.clear & hidden)[hidden].mean() < 0.35
    np.testing.assert_array_equal(worse.codes, case.codes)
    assert case.target is not None
    assert 0 < worse.hole.sum() < case.hole.sum()
    assert not worse.hole[worse.observed].any()
    eroded = cases.with_worse_masks(case, 0.0, 3, np.random.default_rng(5))
    assert (eroded.clear & hidden).any()
    whole = cases.without_target(case)
    np.testing.assert_array_equal(cases.with_worse_masks(whole, 0.2, 1, np.random.default_rng(1)).hole, whole.hole)


def test_a_simulated_mask_is_read_as_asked() -> None:
    raw = Mask(open_m=0, cloud_grow_m=0, shadow_grow_m=0, temporal_check=False)
    spec = Simulated(size_px=64, dates=(8, 8), scl_share=1)
    usual, plain = (simulated_place("sim", s, 3, BANDS) for s in (spec, spec.model_copy(update={"mask": raw})))
    np.testing.assert_array_equal(usual.codes, plain.codes)
    assert (plain.bits != 0).sum() < (usual.bits != 0).sum()


def test_holes_lie_in_the_core(real: Series) -> None:
    inner = replace(real, core=(slice(10, 50), slice(20, 64)))
    outside = np.ones(real.bits.shape[1:], bool)
    outside[inner.core] = False
    for case in (*cases.completions(inner, max_bad=0.2), *cases.predictions(inner, max_bad=0.2)):
        assert not case.hole[outside].any()


def test_what_a_case_hides_does_not_judge_its_looks(real):
    """The comparison of dates runs after the paste: another truth under the hole changes no mask."""
    checked = replace(real, judged=cases.compared(real.codes, real.bits, real.days, real.bands))
    one = next(cases.completions(checked, max_bad=0.3))
    target = int(np.flatnonzero(checked.days == one.day)[0])
    other = checked.codes.copy()
    other[target][:, one.hole] = 9000
    changed = cases.completions(replace(checked, codes=other), max_bad=0.3)
    (same,) = [case for case in changed if case.id == one.id]
    assert (same.truth != one.truth).any()
    np.testing.assert_array_equal(*(cases.checked_in_time(case, real.bands).bits for case in (one, same)))
    assert not (one.hole & (checked.judged[target] != 0)).any()
