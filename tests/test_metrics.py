"""The metrics against their definitions written out, and against cases whose answer is known."""

import numpy as np
import pytest

from pipeline import metrics

ALL = np.ones((24, 24), bool)


def scene(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 0.5, (3, 24, 24))


def test_errors_follow_their_definitions() -> None:
    truth, predicted = scene(0), scene(1)
    scored = np.random.default_rng(2).random((24, 24)) < 0.3
    difference = (predicted - truth)[:, scored]
    given = {"predicted": predicted, "truth": truth, "scored": scored}
    assert metrics.mae(**given) == pytest.approx(np.abs(difference).mean())
    assert metrics.rmse(**given) == pytest.approx(np.sqrt((difference**2).mean()))
    assert metrics.psnr(**given) == pytest.approx(10 * np.log10(1 / (difference**2).mean()))
    np.testing.assert_allclose(metrics.bias(**given), difference.mean(axis=1))


def test_only_scored_pixels_count_and_only_predictions_are_clipped() -> None:
    truth = scene()
    truth[0, 0, 0] = 1.2  # a truth above 1 stays
    predicted = truth.copy()
    predicted[:, 1, 1] = 9.0
    scored = np.zeros((24, 24), bool)
    scored[0, 0] = True
    assert metrics.mae(predicted=predicted, truth=truth, scored=scored) == pytest.approx(0.2 / 3)
    scored[0, 0], scored[1, 1] = False, True
    assert metrics.mae(predicted=predicted, truth=truth, scored=scored) == pytest.approx((1 - truth[:, 1, 1]).mean())


def test_a_uniform_error_of_one_percent_is_forty_decibel_and_biased() -> None:
    truth = scene()
    given = {"predicted": truth + 0.01, "truth": truth, "scored": ALL}
    assert metrics.psnr(**given) == pytest.approx(40.0)
    np.testing.assert_allclose(metrics.bias(**given), 0.01)
    assert metrics.psnr(predicted=truth, truth=truth, scored=ALL) == np.inf


def test_skill_is_zero_for_the_reference_and_one_for_the_truth() -> None:
    truth, other = scene(0), scene(1)
    assert metrics.skill(predicted=other, reference=other, truth=truth, scored=ALL) == pytest.approx(0.0)
    assert metrics.skill(predicted=truth, reference=other, truth=truth, scored=ALL) == pytest.approx(1.0)


def test_spectral_angle_ignores_brightness_and_skips_zero_spectra() -> None:
    truth = scene()
    assert metrics.sam_degrees(predicted=truth * 0.5, truth=truth, scored=ALL) == pytest.approx(0.0, abs=1e-5)
    a = np.zeros((2, 2, 2))
    b = np.zeros((2, 2, 2))
    a[:, 0, 0], b[:, 0, 0] = (0.3, 0.0), (0.2, 0.2)
    everywhere = np.ones((2, 2), bool)
    assert metrics.sam_degrees(predicted=a, truth=b, scored=everywhere) == pytest.approx(45.0)
    assert np.isnan(metrics.sam_degrees(predicted=a * 0, truth=b, scored=everywhere))


def test_ssim_equals_its_formula_in_one_window() -> None:
    truth, predicted = scene(0)[:1], scene(1)[:1]
    scored = np.zeros((24, 24), bool)
    scored[7:18, 7:18] = True  # eroded by 11 x 11: the window at (12, 12) alone
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    w = np.outer(axis, axis) / axis.sum() ** 2
    a, b = predicted[0, 7:18, 7:18], truth[0, 7:18, 7:18]
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (
        (w * a * a).sum() - ma**2,
        (w * b * b).sum() - mb**2,
        (w * a * b).sum() - ma * mb,
    )
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    given = {"predicted": predicted, "truth": truth, "scored": scored}
    assert metrics.ssim(**given, eroded=True) == pytest.approx(expected)
    assert metrics.ssim(**given) != pytest.approx(expected)
    assert metrics.ssim(predicted=truth, truth=truth, scored=scored) == pytest.approx(1.0)
    assert np.isnan(metrics.ssim(predicted=truth[:, :8, :8], truth=truth[:, :8, :8], scored=scored[:8, :8]))


def test_ssim_leaves_out_windows_that_touch_unknown_truth() -> None:
    """What is unknown on both sides would count as perfectly alike, and lift every score."""
    truth, predicted = scene(0), scene(1)
    scored = np.zeros((24, 24), bool)
    scored[6:12, 5:9] = True
    whole = {"predicted": np.where(scored, predicted, truth), "scored": scored}
    hidden = truth.copy()
    hidden[1, 11:, 15:] = np.nan  # in one band: windows centred on [6:, 10:] touch it
    kept = np.zeros((24, 24), bool)  # centres of windows that touch what is scored and nothing unknown
    kept[5:17, 5:14] = True
    kept[6:, 10:] = False
    expected = np.mean([metrics._ssim_map(p, t)[kept].mean() for p, t in zip(whole["predicted"], truth, strict=True)])
    assert metrics.ssim(**whole, truth=hidden) == pytest.approx(expected)
    assert metrics.ssim(**whole, truth=hidden) != pytest.approx(metrics.ssim(**whole, truth=truth), rel=1e-3)
    assert np.isnan(metrics.ssim(**whole, truth=np.where(scored, truth, np.nan)))


def test_bootstrap_resamples_blocks_and_not_cases() -> None:
    rng = np.random.default_rng(3)
    levels = np.repeat(rng.normal(1.0, 1.0, 26), 8)  # eight equal cases a date tell no more than one
    dates = np.repeat(np.arange(26), 8)
    interval = metrics.paired_block_bootstrap(differences=levels, blocks=dates)
    alone = metrics.paired_block_bootstrap(differences=levels, blocks=np.arange(len(levels)))
    standard_error = levels[::8].std() / np.sqrt(26)
    assert interval.mean == pytest.approx(levels.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert alone.high - alone.low < 0.5 * (interval.high - interval.low)
    assert interval == metrics.paired_block_bootstrap(differences=levels, blocks=dates)


def test_nothing_to_score_is_nan() -> None:
    truth, none = scene(), np.zeros((24, 24), bool)
    given = {"predicted": truth, "truth": truth, "scored": none}
    assert np.isnan(metrics.mae(**given))
    assert np.isnan(metrics.rmse(**given))
    assert np.isnan(metrics.bias(**given)).all()
    assert np.isnan(metrics.paired_block_bootstrap(differences=[], blocks=[]).mean)


def test_codes_become_reflectance() -> None:
    np.testing.assert_allclose(metrics.reflectance(np.array([1000, 1, 11000], np.uint16)), [0.0, -0.0999, 1.0])
    assert np.isnan(metrics.reflectance(np.array([0], np.uint16)))[0]
