"""Regression where the acquisition's own clear pixels teach, the filter in time where they do not."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from parcels import Field, field

from pipeline import kalman, regression
from pipeline.cases import completions
from pipeline.completion import FULL_EVIDENCE, HALO_PX, complete, fill_series

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from series import read_series

DATA = os.environ.get("CLOUDGATE_DATA")
ANCHOR = 3


def looks_of(f: Field, row0: int = 0, col0: int = 0) -> dict:
    return {"codes": f.codes, "clear": f.clear, "days": f.days, "row0": row0, "col0": col0}


def between(f: Field) -> kalman.Interpolated:
    """The anchor's day from all other looks."""
    rest = f.clear.copy()
    rest[ANCHOR] = False
    return kalman.interpolate(**(looks_of(f) | {"clear": rest}), target=int(f.days[ANCHOR]))


def test_where_clear_ground_is_near_it_is_regression_bit_for_bit():
    f = field(128)
    made, plain = complete(**looks_of(f), anchor=ANCHOR), regression.fill_acquisition(**looks_of(f), anchor=ANCHOR)
    assert (plain.evidence >= FULL_EVIDENCE).all()
    for name in ("codes", "sigma", "source_date"):
        np.testing.assert_array_equal(getattr(made, name), getattr(plain, name), err_msg=name)


def test_in_the_middle_of_a_wide_cloud_it_is_the_filter_and_it_goes_over_without_a_step():
    f = field(640, times=8, bands=2)
    clear = f.clear.copy()
    clear[ANCHOR, :, 100:] = False
    clear[ANCHOR, :, :100] = True
    f = Field(f.truth, f.codes, clear, f.days)
    made = complete(**looks_of(f), anchor=ANCHOR, with_fit=True)
    plain = regression.fill_acquisition(**looks_of(f), anchor=ANCHOR)
    alone, looked = between(f), made.codes[0] != 0
    far = (plain.evidence == 0) & looked
    assert far[:, 400:].mean() > 0.9
    assert np.abs(made.codes[:, far].astype(int) - alone.codes[:, far]).max() <= 1  # the rounding of linear
    np.testing.assert_allclose(made.sigma[:, far], alone.sigma[:, far], rtol=1e-3)
    assert np.abs(made.fit[:, far] - alone.codes[:, far]).max() <= 1  # what a network corrects
    near = (plain.evidence >= FULL_EVIDENCE) & looked
    np.testing.assert_array_equal(made.codes[:, near], plain.codes[:, near])
    # what is added to the regression grows from nothing to all over the width of a node's way to the next
    moved = np.abs(made.codes.astype(int) - plain.codes)[:, :, 100:420].reshape(2, 640, -1, 16).mean(axis=(0, 1, 3))
    assert moved[0] == 0
    assert np.diff(moved).min() > -0.2 * moved[-1]
    assert np.diff(moved).max() < 0.5 * moved[-1]


@pytest.mark.parametrize("left", [0, 90])
def test_cuts_do_not_change_a_byte(left):
    f = field(512, times=5, bands=2)
    clear = f.clear.copy()
    clear[2, :, 200:] = False
    f = Field(f.truth, f.codes, clear, f.days)
    whole = complete(**looks_of(f, 1_000_007, -333), anchor=2)
    assert (whole.evidence < FULL_EVIDENCE).any()
    cols = slice(left + HALO_PX, left + HALO_PX + 40)
    outer = slice(left, cols.stop + HALO_PX)
    cut = Field(f.truth, f.codes[..., outer].copy(), f.clear[..., outer].copy(), f.days)
    part = complete(
        **looks_of(cut, 1_000_007, -333 + left), anchor=2, core=(slice(0, 512), slice(HALO_PX, HALO_PX + 40))
    )
    for name in ("codes", "sigma", "source_date"):
        ours = getattr(part, name)[..., HALO_PX : HALO_PX + 40]
        np.testing.assert_array_equal(ours, getattr(whole, name)[..., cols], err_msg=name)


def test_a_series_is_filled_acquisition_by_acquisition():
    f = field(48, times=5, bands=2)
    series = fill_series(**looks_of(f, 5, 9))
    for t in range(5):
        np.testing.assert_array_equal(series[t], complete(**looks_of(f, 5, 9), anchor=t).codes)
    near = fill_series(**looks_of(f, 5, 9), window_days=0)
    np.testing.assert_array_equal(near != 0, np.broadcast_to(f.clear[:, None], near.shape))


@pytest.mark.skipif(DATA is None, reason="CLOUDGATE_DATA is not set: the real series are not at hand")
def test_where_grown_masks_leave_little_ground_it_gains_on_real_fields():
    """flanders_31uds with all masks grown by 100 m: 20 of 52 targets keep too few clear pixels to learn from."""
    gains = []
    for case in completions(read_series(Path(str(DATA)) / "flanders_31uds"), "growth"):
        looks = {"codes": case.codes, "clear": case.clear, "days": case.days, "row0": case.row0, "col0": case.col0}
        others = case.clear.copy()
        others[case.target] = False
        hole = case.hole & others.any(axis=0)
        plain = regression.fill_acquisition(**looks, anchor=case.target)
        if hole.any() and plain.evidence[hole].mean() < 0.5:
            made = complete(**looks, anchor=case.target)
            off = [np.sqrt(((m.codes.astype(float) - case.truth)[:, hole] ** 2).mean()) for m in (plain, made)]
            gains.append(20 * np.log10(off[0] / off[1]))
    assert len(gains) >= 15
    assert np.mean(gains) > 0.3
