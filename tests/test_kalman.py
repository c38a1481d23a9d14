"""Interpolation of a day by a Kalman filter from both sides: against plain linear algebra, and on real series."""

import os
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pipeline import composite, kalman
from pipeline.cases import completions, predictions
from pipeline.kalman import HALO_PX, LENGTH_DAYS, NOISE, interpolate

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from series import read_series

DATA = os.environ.get("CLOUDGATE_DATA")
DAYS = np.array([18_000, 18_003, 18_003, 18_010, 18_017, 18_040, 18_055], np.int32)
TARGET = 18_012


def series(height: int = 24, width: int = 20, bands: int = 2, clear_share: float = 0.6, seed: int = 0):
    """Codes that drift over time with noise, and random clouds that are bright."""
    rng = np.random.default_rng(seed)
    start, pace = rng.uniform(1500, 3500, (bands, height, width)), rng.uniform(-300, 300, (bands, height, width))
    drift = (DAYS - TARGET)[:, None, None, None] / 60 * pace
    codes = np.rint(start + drift + rng.normal(0, 60, (len(DAYS), bands, height, width))).astype(np.uint16)
    clear = rng.random((len(DAYS), height, width)) < clear_share
    return np.where(clear[:, None], codes, 9000).astype(np.uint16), clear


def matern(days: np.ndarray) -> np.ndarray:
    u = np.abs(days) / LENGTH_DAYS
    return (1 + u) * np.exp(-u)


def by_algebra(off: np.ndarray, days: np.ndarray, target: int, noise: float = NOISE) -> tuple[np.ndarray, float]:
    """Simple kriging of one pixel's clear looks (t, B): value (B,) and variance, by a dense system."""
    if not len(days):
        return np.zeros(off.shape[1]), 1.0
    between = matern(days[:, None] - days[None].astype(float)) + noise * np.eye(len(days))
    weights = np.linalg.solve(between, matern(days.astype(float) - target))
    return weights @ off, float(1 - weights @ matern(days.astype(float) - target))


def test_both_sides_meet_in_what_plain_algebra_says():
    codes, clear = series()
    middle = composite.decay(codes=codes, clear=clear, days=DAYS, target=TARGET, tau_days=60).codes
    looks = kalman._Looks(codes, clear, middle, DAYS)
    flat = np.full(clear.shape, NOISE, np.float32)
    for target in (TARGET, 17_990, 18_003, 18_070):  # between, before all, on two looks, after all
        value, variance = kalman._meet(*kalman._sides(looks, target, flat))
        for y, x in product(range(0, 24, 5), range(0, 20, 3)):
            seen = clear[:, y, x]
            off = codes[seen, :, y, x].astype(float) - middle[:, y, x]
            expected, left = by_algebra(off, DAYS[seen], target)
            np.testing.assert_allclose(value[:, y, x], expected, atol=0.3)
            assert variance[y, x] == pytest.approx(left, abs=2e-4)


def test_each_date_is_missed_by_the_others_as_plain_algebra_says():
    codes, clear = series(8, 8)
    middle = composite.decay(codes=codes, clear=clear, days=DAYS, target=TARGET, tau_days=60).codes
    tried = 0
    for t, miss, claimed, told in kalman._misses(kalman._Looks(codes, clear, middle, DAYS)):
        np.testing.assert_array_equal(told, clear[t] & (clear.sum(axis=0) > 1))
        for y, x in np.argwhere(told):
            others = clear[:, y, x].copy()
            others[t] = False
            off = codes[:, :, y, x].astype(float) - middle[:, y, x]
            value, left = by_algebra(off[others], DAYS[others], int(DAYS[t]))
            np.testing.assert_allclose(miss[:, y, x], off[t] - value, atol=1.0)
            assert claimed[y, x] / kalman._EXPECTED_UNIT == pytest.approx(left + NOISE, abs=1e-3)
            tried += 1
    assert tried > 100


def test_one_look_is_shown_as_it_is_and_no_look_is_no_data():
    codes, clear = series()
    clear[:, :, :10] = False
    clear[3, :12, :10] = True
    made = interpolate(codes=codes, clear=clear, days=DAYS, target=TARGET, row0=0, col0=0)
    np.testing.assert_array_equal(made.codes[:, :12, :10], codes[3][:, :12, :10])
    assert (made.source_date[:12, :10] == DAYS[3]).all()
    assert (made.codes[:, 12:, :10] == 0).all()
    assert (made.source_date[12:, :10] == 0).all()
    assert np.isnan(made.sigma[:, 12:, :10]).all()
    nearest = composite.nearest(codes=codes, clear=clear, days=DAYS, target=TARGET)
    np.testing.assert_array_equal(made.source_date, nearest.source_date)


def test_a_single_look_everywhere_tells_of_no_sigma():
    codes, clear = series()
    clear[:] = False
    clear[2] = True
    made = interpolate(codes=codes, clear=clear, days=DAYS, target=TARGET, row0=0, col0=0)
    np.testing.assert_array_equal(made.codes, codes[2])
    assert np.isnan(made.sigma).all()


def test_haze_that_the_mask_missed_is_found_by_what_the_other_dates_say():
    """A hazy date beside the target misleads linear interpolation; here it weighs less, and less only where it is."""
    codes, clear = series(64, 300, clear_share=1.0, seed=3)
    hazy = codes.copy()
    hazy[3, :, :, :140] += 700
    clean = interpolate(codes=codes, clear=clear, days=DAYS, target=TARGET, row0=0, col0=0)
    made = interpolate(codes=hazy, clear=clear, days=DAYS, target=TARGET, row0=0, col0=0)
    line, plain = (
        composite.linear(codes=c, clear=clear, days=DAYS, target=TARGET).codes.astype(float) for c in (hazy, codes)
    )
    own = np.abs(made.codes.astype(float) - clean.codes)[:, :, :100].mean()
    assert own < 0.45 * np.abs(line - plain)[:, :, :100].mean()
    noise = kalman._noise(hazy, clear, DAYS, clean.codes, 0, 0).cells[: len(DAYS)] / NOISE
    assert noise[3, :, 0].min() > 3
    assert noise[3, :, -1].max() < 2
    assert made.sigma[:, :, :100].mean() > 1.1 * made.sigma[:, :, -60:].mean()


@pytest.mark.parametrize(("row0", "col0"), [(0, 0), (1_000_017, -453)])
def test_cuts_do_not_change_a_byte(row0, col0):
    codes, clear = series(2 * HALO_PX + 90, 2 * HALO_PX + 70, bands=2)
    clear[1, 100:300, 200:400] = False
    hazy = codes.copy()
    hazy[4, :, :200] += 400
    whole = interpolate(codes=hazy, clear=clear, days=DAYS, target=TARGET, row0=row0, col0=col0)
    inner = slice(HALO_PX, HALO_PX + 61), slice(HALO_PX + 13, HALO_PX + 70)
    top, left = 0, 13
    rows, cols = slice(top, inner[0].stop + HALO_PX), slice(left, inner[1].stop + HALO_PX)
    part = interpolate(
        codes=np.ascontiguousarray(hazy[:, :, rows, cols]),
        clear=np.ascontiguousarray(clear[:, rows, cols]),
        days=DAYS,
        target=TARGET,
        row0=row0 + top,
        col0=col0 + left,
        core=(slice(inner[0].start - top, inner[0].stop - top), slice(inner[1].start - left, inner[1].stop - left)),
    )
    for name in ("codes", "sigma", "source_date"):
        np.testing.assert_array_equal(getattr(whole, name)[..., inner[0], inner[1]], getattr(part, name), err_msg=name)


@pytest.mark.skipif(DATA is None, reason="CLOUDGATE_DATA is not set: the real series are not at hand")
@pytest.mark.parametrize("name", ["flanders_31uds", "flanders_31ues"])
def test_real_series_gain_over_linear_and_decay_and_sigma_covers(name):
    found = read_series(Path(str(DATA)) / name)
    for cases, least, most in ((list(predictions(found)), 0.3, 0.97), (list(completions(found)), 0.5, 0.95)):
        gains, inside = [], []
        for case in cases:
            clear = case.clear.copy()
            if case.target is not None:
                clear[case.target] = False
            hole = case.hole & clear.any(axis=0)
            looks = {"codes": case.codes, "clear": clear, "days": case.days, "target": case.day}
            made = interpolate(**looks, row0=case.row0, col0=case.col0)
            off = {
                which: (codes.astype(float) - case.truth)[:, hole]
                for which, codes in (
                    ("own", made.codes),
                    ("linear", composite.linear(**looks).codes),
                    ("decay", composite.decay(**looks).codes),
                )
            }
            rms = {which: np.sqrt((values**2).mean()) for which, values in off.items()}
            gains.append([20 * np.log10(rms[which] / rms["own"]) for which in ("linear", "decay")])
            inside.append(np.abs(off["own"]) <= 1.645 * made.sigma[:, hole])
        assert (np.mean(gains, axis=0) > least).all()
        share = np.concatenate(inside, axis=1).mean(axis=1)
        assert ((share > 0.85) & (share < most)).all(), share
