"""Regression on a simulated field whose truth is known, and on the real series where they are at hand."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from parcels import Field, field
from threadpoolctl import threadpool_info, threadpool_limits

from pipeline import composite
from pipeline.blas import one_blas_thread
from pipeline.cases import completions, grow
from pipeline.errors import ConfigError
from pipeline.regression import HALO_PX, Filled, RegressionOptions, fill_acquisition
from pipeline.regression_fit import cell_gram, tile_features

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from series import read_series

DATA = os.environ.get("CLOUDGATE_DATA")


def fill(f: Field, anchor: int, row0: int = 0, col0: int = 0, **kwargs: object) -> Filled:
    return fill_acquisition(codes=f.codes, clear=f.clear, days=f.days, anchor=anchor, row0=row0, col0=col0, **kwargs)


def linear(f: Field, anchor: int) -> np.ndarray:
    """Plain linear interpolation, pixel by pixel, as the definition says."""
    out = np.zeros(f.codes.shape[1:])
    for y, x in np.argwhere(~f.clear[anchor]):
        seen = [t for t in range(len(f.days)) if t != anchor and f.clear[t, y, x]]
        if seen:
            out[:, y, x] = [np.interp(f.days[anchor], f.days[seen], band[seen]) for band in f.codes[:, :, y, x].T]
    return out


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.asarray(values, float) ** 2)))


def test_it_beats_linear_and_passes_observed_pixels_through() -> None:
    f = field(160)
    ratios = []
    for anchor in range(8):
        gap = ~f.clear[anchor]
        seen = np.delete(f.clear, anchor, axis=0).any(axis=0)
        filled = fill(f, anchor)
        np.testing.assert_array_equal(filled.codes[:, ~gap], f.codes[anchor][:, ~gap])
        error = rms((filled.codes.astype(float) - f.truth[anchor])[:, gap & seen])
        ratios.append(error / rms((linear(f, anchor) - f.truth[anchor])[:, gap & seen]))
        np.testing.assert_array_equal((filled.codes != 0).all(axis=0), ~gap | seen)
        np.testing.assert_array_equal(np.isfinite(filled.sigma).all(axis=0), gap & seen)
        assert not (filled.evidence[~gap] < 1).any()
    assert max(ratios) < 1.0
    assert np.mean(ratios) < 0.75


CUTS = (
    (slice(0, 190), slice(0, 300)),
    (slice(0, 190), slice(300, 512)),
    (slice(190, 512), slice(0, 77)),
    (slice(190, 512), slice(77, 512)),
)


def assert_cuts_agree(f: Field, anchor: int, row0: int, col0: int) -> None:
    """Each of the cuts, with its halo, gives the bytes of the whole."""
    whole = fill(f, anchor, row0, col0)
    assert (whole.evidence > 0.5).any()
    for rows, cols in CUTS:
        r, c = max(rows.start - HALO_PX, 0), max(cols.start - HALO_PX, 0)
        outer = (slice(r, rows.stop + HALO_PX), slice(c, cols.stop + HALO_PX))
        core = (slice(rows.start - r, rows.stop - r), slice(cols.start - c, cols.stop - c))
        cut = Field(f.truth, f.codes[:, :, *outer], f.clear[:, *outer], f.days)
        for piece in (fill(cut, anchor, row0 + r, col0 + c), fill(cut, anchor, row0 + r, col0 + c, core=core)):
            np.testing.assert_array_equal(piece.codes[:, *core], whole.codes[:, rows, cols])
            np.testing.assert_array_equal(piece.sigma[:, *core], whole.sigma[:, rows, cols])
            np.testing.assert_array_equal(piece.evidence[core], whole.evidence[rows, cols])
            np.testing.assert_array_equal(piece.source_date[core], whole.source_date[rows, cols])


def test_bytes_do_not_depend_on_how_blocks_are_cut() -> None:
    assert_cuts_agree(field(512, times=5, bands=2), 2, 1_000_007, -333)


def test_bytes_do_not_depend_on_the_dates_that_the_rest_of_the_block_uses() -> None:
    f = field(512, times=7, bands=3, cover=0.25)
    clear = f.clear.copy()
    clear[0, :, 250:] = False  # each of these serves in a part of the area only
    clear[1, 150:] = False
    clear[4, :200, :] = False
    clear[5, :, :300] = False
    clear[3, 380:, 380:] = False  # deep under cloud
    assert_cuts_agree(Field(f.truth, f.codes, clear, f.days), 3, -12_345, 77)


def test_gram_matrices_are_exact_whatever_stands_beside_them() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(1, 65535, (6, 4, 2 * 1024)).astype(np.uint16)
    clear = rng.random((6, 2 * 1024)) < 0.6
    away = np.array([-30, -12, -5, 3, 9, 40], np.float32)
    own = (rng.integers(1, 65535, (4, 2 * 1024)).astype(np.uint16), rng.random(2 * 1024) < 0.5)
    every, _ = tile_features(codes, clear, away, own, 3, range(6))
    some, _ = tile_features(codes, clear, away, own, 3, [1, 4])
    kept = np.concatenate([np.arange(4, 8), np.arange(16, 20), np.arange(24, 33)])
    for cell in (0, 1):
        gram = cell_gram(every, cell)
        np.testing.assert_array_equal(cell_gram(some, cell), gram[kept[:, None], kept])
        pixels = slice(cell * 1024, (cell + 1) * 1024)
        rows = every.rows[:, pixels].astype(object)[:, every.fitted[pixels]] - 2500  # whole numbers of Python
        assert gram[0, 5] == np.float32(int((rows[0] * rows[5]).sum()) * 1e-3 * 1e-3)
        assert gram[28, 28] == every.fitted[pixels].sum()


def test_features_are_the_looks_closed_linearly_in_time_without_the_anchor() -> None:
    f = field(32, times=6, bands=2)
    anchor, others = 2, [0, 1, 3, 4, 5]
    codes = f.codes[others].reshape(5, 2, -1)
    clear = f.clear[others].reshape(5, -1)
    own = (f.codes[anchor].reshape(2, -1), f.clear[anchor].reshape(-1))
    days = f.days[others]
    away = (days - f.days[anchor]).astype(np.float32)
    tile, swing = tile_features(codes, clear, away, own, 2, [0, 3])
    for pixel in range(0, 1024, 7):
        seen = np.flatnonzero(clear[:, pixel])
        assert tile.looked[pixel] == (len(seen) > 0)
        if not len(seen):
            continue
        looks = codes[seen, :, pixel].astype(float)
        for row, day in ((0, days[0]), (2, days[3]), (4, f.days[anchor])):
            expected = [np.interp(day, days[seen], band) for band in looks.T]
            np.testing.assert_allclose(tile.rows[row : row + 2, pixel], expected, atol=0.51)
        np.testing.assert_array_equal(tile.low[:, pixel], looks.min(axis=0))
        np.testing.assert_array_equal(tile.high[:, pixel], looks.max(axis=0))
        earlier, later = seen[seen < 2], seen[seen >= 2]
        assert swing.both[pixel] == (len(earlier) > 0 and len(later) > 0)
        if swing.both[pixel]:
            apart = codes[later[0], :, pixel].astype(float) - codes[earlier[-1], :, pixel]
            np.testing.assert_array_equal(swing.values[:, pixel], apart)


def test_bytes_do_not_depend_on_threads() -> None:
    f = field(160, times=6, bands=3)
    anchors = [1, 2, 3, 4]
    with threadpool_limits(1, user_api="blas"):
        alone = [fill(f, anchor) for anchor in anchors]
    with threadpool_limits(2, user_api="blas"), ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda anchor: fill(f, anchor), 2 * anchors))
    for one, other in zip(2 * alone, together, strict=True):
        np.testing.assert_array_equal(other.codes, one.codes)
        np.testing.assert_array_equal(other.sigma, one.sigma)


def test_one_thread_holds_until_the_last_leaves() -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        first, second = one_blas_thread(), one_blas_thread()
        with ExitStack() as last:
            with first:
                last.enter_context(second)
                assert threads() == {1}
            assert threads() == {1}  # the first has left, the second still computes
        assert threads() == {2}


def test_outside_the_core_there_is_no_data() -> None:
    f = field(96)
    filled = fill(f, 2, core=(slice(10, 60), slice(20, 96)))
    outside = np.ones((96, 96), bool)
    outside[10:60, 20:96] = False
    assert (filled.codes[:, outside] == 0).all()
    assert (filled.source_date[outside] == 0).all()
    assert np.isnan(filled.sigma[:, outside]).all()


def test_no_seam_where_windows_and_blocks_meet() -> None:
    f = field(256, times=6, bands=1, cover=0.5)
    anchor = 3
    error = fill(f, anchor).codes[0].astype(float) - f.truth[anchor, 0]
    gap = ~f.clear[anchor] & np.delete(f.clear, anchor, axis=0).any(axis=0)
    jump = np.abs(np.diff(error, axis=1))
    both = gap[:, 1:] & gap[:, :-1]
    at_seam = np.zeros(255, bool)
    at_seam[63::64] = True
    assert both[:, at_seam].sum() > 100
    assert jump[:, at_seam][both[:, at_seam]].mean() < 1.1 * jump[:, ~at_seam][both[:, ~at_seam]].mean()


def test_undetected_haze_does_not_spoil_the_fit() -> None:
    f = field(192, cover=0.3)
    anchor = 4
    hazy = f.codes.copy()
    hazy[anchor, :, :64, :64] += 1200  # thin cloud that the mask calls clear
    gap = ~f.clear[anchor] & np.delete(f.clear, anchor, axis=0).any(axis=0)
    gap[:104, :104] = False  # the haze itself is passed through, and its residual is carried next to it
    clean = rms((fill(f, anchor).codes.astype(float) - f.truth[anchor])[:, gap])
    spoilt = fill(Field(f.truth, hazy, f.clear, f.days), anchor)
    assert rms((spoilt.codes.astype(float) - f.truth[anchor])[:, gap]) < 1.25 * clean


def test_it_goes_over_into_linear_as_clear_ground_vanishes() -> None:
    f = field(96, bands=2)
    anchor, plain = 3, None
    distance = []
    for kept in (96 * 96, 400, 40, 4, 0):
        clear = f.clear.copy()
        order = np.random.default_rng(1).permutation(96 * 96)[kept:]
        clear[anchor].reshape(-1)[order] = False
        cut = Field(f.truth, f.codes, clear, f.days)
        gap = ~f.clear[anchor]
        plain = linear(Field(f.truth, f.codes, f.clear, f.days), anchor)
        filled = fill(cut, anchor)
        seen = gap & (plain[0] > 0)
        distance.append(rms((filled.codes - plain)[:, seen]))
        if kept == 0:
            assert distance[-1] < 0.51  # only the rounding to whole codes
            assert (filled.evidence[gap] == 0).all()
            assert np.isfinite(filled.sigma[:, seen]).all()
    assert distance == sorted(distance, reverse=True)


def test_the_anchor_does_not_leak_into_its_own_features() -> None:
    f = field(64)
    anchor = 3
    other = f.codes.copy()
    other[anchor] = np.where(f.clear[anchor], other[anchor], 65000)  # hidden: must not matter
    a, b = fill(f, anchor), fill(Field(f.truth, other, f.clear, f.days), anchor)
    np.testing.assert_array_equal(a.codes, b.codes)


def test_values_stay_near_the_looks_of_their_pixel() -> None:
    f = field(96, bands=2)
    wild = f.codes.copy()
    noise = np.random.default_rng(0).integers(1, 65535, (2, 96, 96))
    wild[3] = np.where(f.clear[3], noise, 0).astype(np.uint16)
    options = RegressionOptions(margin_codes=300.0, margin_share=0.0)
    filled = fill(Field(f.truth, wild, f.clear, f.days), 3, options=options).codes.astype(int)
    looks = np.where(np.delete(f.clear, 3, axis=0)[:, None], np.delete(wild, 3, axis=0), 0).astype(int)
    gap = ~f.clear[3] & (looks.max(axis=(0, 1)) > 0)
    low = np.where(looks == 0, 99_999, looks).min(axis=0)
    assert (filled[:, gap] <= looks.max(axis=0)[:, gap] + 301).all()
    assert (filled[:, gap] >= np.maximum(low[:, gap] - 301, 1)).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 64), (1, 1), (3, 200)])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_small_fields_and_few_dates(height: int, width: int, times: int) -> None:
    f = field(200, times=times, bands=1)
    cut = Field(f.truth, f.codes[:, :, :height, :width], f.clear[:, :height, :width], f.days)
    filled = fill(cut, 0, 31, 63)
    looks = cut.clear.any(axis=0)
    np.testing.assert_array_equal(filled.codes[0] != 0, looks)
    np.testing.assert_array_equal(filled.source_date != 0, looks)


def test_nothing_clear_and_all_clear() -> None:
    f = field(64, times=3)
    none = fill(Field(f.truth, f.codes, np.zeros_like(f.clear), f.days), 1)
    assert (none.codes == 0).all()
    assert (none.source_date == 0).all()
    assert np.isnan(none.sigma).all()
    every = fill(Field(f.truth, f.truth, np.ones_like(f.clear), f.days), 1)
    np.testing.assert_array_equal(every.codes, f.truth[1])
    assert np.isnan(every.sigma).all()
    assert (every.source_date == f.days[1]).all()


def test_ties_in_time_and_many_dates_and_bands() -> None:
    f = field(64, times=40, bands=10)
    days = f.days // 7 * 7
    filled = fill(Field(f.truth, f.codes, f.clear, days), 20)
    gap = ~f.clear[20]
    error = rms((filled.codes.astype(float) - f.truth[20])[:, gap])
    plain = linear(Field(f.truth, f.codes, f.clear, days), 20)
    assert error < 0.75 * rms((plain - f.truth[20])[:, gap])


def test_a_look_without_data_in_one_band_is_no_look() -> None:
    f = field(48, times=4, bands=2)
    codes = f.codes.copy()
    codes[:, 1, 10:20, 10:20] = 0
    codes[2, 0, 30, 30] = 0
    clear = np.ones_like(f.clear)
    filled = fill(Field(f.truth, codes, clear, f.days), 2)
    assert (filled.codes[:, 10:20, 10:20] == 0).all()
    assert (filled.source_date[10:20, 10:20] == 0).all()
    assert (filled.codes[:, 30, 30] > 0).all()
    assert filled.source_date[30, 30] != f.days[2]


def test_source_date_is_the_nearest_clear_look() -> None:
    f = field(48, times=6)
    anchor = 2
    filled = fill(f, anchor)
    for y, x in [(0, 0), (7, 40), (20, 20), (47, 3), (33, 11)]:
        seen = f.days[f.clear[:, y, x]]
        best = min(seen, key=lambda d: (abs(d - f.days[anchor]), d))
        expected = f.days[anchor] if f.clear[anchor, y, x] else best
        assert filled.source_date[y, x] == expected


def coverage(pairs: list[tuple[Filled, np.ndarray, np.ndarray]]) -> np.ndarray:
    """(B,) share of true values inside the 90 % interval."""
    inside = [
        np.abs(filled.codes.astype(float) - truth)[:, hole] <= 1.645 * filled.sigma[:, hole]
        for filled, truth, hole in pairs
    ]
    return np.concatenate(inside, axis=1).mean(axis=1)


def test_sigma_covers_ninety_percent_on_a_simulated_field() -> None:
    f = field(256, times=8, bands=2, seed=4)
    filled = [fill(f, t) for t in range(1, 7)]
    share = coverage([(r, f.truth[t], np.isfinite(r.sigma[0])) for t, r in enumerate(filled, 1)])
    assert ((share > 0.85) & (share < 0.95)).all(), share


def test_sigma_grows_with_the_distance_to_clear_ground() -> None:
    f = field(192, times=6, bands=1, cover=0.0)
    clear = f.clear.copy()
    clear[3] = True
    clear[3, 40:150, 40:150] = False
    sigma = fill(Field(f.truth, f.codes, clear, f.days), 3).sigma[0]
    assert np.nanmean(sigma[85:105, 85:105]) > 1.05 * np.nanmean(sigma[40:44, 40:150])


@pytest.mark.skipif(DATA is None, reason="CLOUDGATE_DATA is not set: the real series are not at hand")
@pytest.mark.parametrize("name", ["flanders_31uds", "flanders_31ues"])
def test_real_series_gain_over_linear_and_sigma_covers(name: str) -> None:
    series = read_series(Path(str(DATA)) / name)
    gains, pairs = [], []
    for case in completions(series):
        f = Field(case.codes, case.codes, case.clear, case.days)
        filled = fill(f, case.target)
        clear = case.clear[case.target]
        np.testing.assert_array_equal(filled.codes[:, clear], case.codes[case.target][:, clear])
        error = rms((filled.codes.astype(float) - case.truth)[:, case.hole])
        plain = composite.linear(
            codes=case.codes, clear=case.clear, days=case.days, target=int(case.days[case.target])
        ).codes.astype(float)
        gains.append(20 * np.log10(rms((plain - case.truth)[:, case.hole]) / error))
        pairs.append((filled, case.truth, case.hole & np.isfinite(filled.sigma[0])))
    assert len(gains) == {"flanders_31uds": 52, "flanders_31ues": 30}[name]
    assert np.mean(gains) > {"flanders_31uds": 4.9, "flanders_31ues": 4.2}[name]
    share = coverage(pairs)
    assert ((share > 0.85) & (share < 0.95)).all(), share


def test_growth_of_a_mask_is_a_disc() -> None:
    bad = np.zeros((1, 21, 21), bool)
    bad[0, 10, 10] = True
    y, x = np.mgrid[-10:11, -10:11]
    np.testing.assert_array_equal(grow(bad, 5.0)[0], y * y + x * x <= 25)


def test_wrong_input_is_refused() -> None:
    f = field(40, times=3)
    with pytest.raises(ConfigError, match="anchor 3"):
        fill(f, 3)
    with pytest.raises(ConfigError, match="ascending"):
        fill(Field(f.truth, f.codes, f.clear, f.days[::-1].copy()), 1)
    with pytest.raises(ConfigError, match="uint16"):
        fill(Field(f.truth, f.codes.astype(np.float32), f.clear, f.days), 1)
    with pytest.raises(ConfigError, match="clear is"):
        fill(Field(f.truth, f.codes, f.clear[:, :5], f.days), 1)
    with pytest.raises(ConfigError, match="dates = 0"):
        RegressionOptions(dates=0)
