"""Compositing kernels against plain float references, their corner cases, and their cut-independence."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import composite
from pipeline.bands import complete_looks
from pipeline.composite import METHODS, Composed, clear_count
from pipeline.errors import ConfigError

TARGET = 17030


def scene(
    *, looks: int, bands: int = 2, share_clear: float = 0.6, seed: int = 0, low: int = 1, high: int = 65535
) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    return {
        "codes": rng.integers(low, high, (looks, bands, 13, 17)).astype(np.uint16),
        "clear": rng.random((looks, 13, 17)) < share_clear,
        "days": np.sort(rng.integers(TARGET - 30, TARGET + 30, looks)).astype(np.int32),
        "target": TARGET,
    }


def usable(block: dict[str, object]) -> NDArray[np.bool_]:
    return block["clear"] & (block["codes"].min(axis=1) != 0)


def reference(block: dict[str, object], reduce: Callable[..., NDArray[np.float64]]) -> NDArray[np.uint16]:
    looks = np.where(usable(block)[:, None], block["codes"].astype(float), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nan_to_num(np.floor(reduce(looks) + 0.5)).astype(np.uint16)


def per_pixel(
    block: dict[str, object], rule: Callable[[NDArray[np.float64], NDArray[np.int64]], tuple[list[int], int]]
) -> Composed:
    """Slow reference: ``rule(values (m, B), days (m,))`` of the usable looks -> codes and date."""
    codes, days, good = block["codes"], block["days"], usable(block)
    out = np.zeros(codes.shape[1:], np.uint16)
    dates = np.zeros(codes.shape[2:], np.int32)
    for y, x in np.ndindex(dates.shape):
        seen = good[:, y, x]
        if seen.any():
            out[:, y, x], dates[y, x] = rule(codes[seen, :, y, x].astype(float), days[seen].astype(int))
    return Composed(codes=out, source_date=dates)


def nearest_index(days: NDArray[np.int64]) -> int:
    return min(range(len(days)), key=lambda i: (abs(days[i] - TARGET), i))


def rule_nearest(values: NDArray[np.float64], days: NDArray[np.int64]) -> tuple[list[int], int]:
    i = nearest_index(days)
    return [int(v) for v in values[i]], int(days[i])


def rule_linear(values: NDArray[np.float64], days: NDArray[np.int64]) -> tuple[list[int], int]:
    near = int(days[nearest_index(days)])
    past, ahead = np.flatnonzero(days <= TARGET), np.flatnonzero(days > TARGET)
    # Of several looks on one day the first counts, on both sides.
    a = next(i for i in past if days[i] == days[past[-1]]) if past.size else ahead[0]
    b = ahead[0] if ahead.size else a
    before, after = TARGET - int(days[a]), int(days[b]) - TARGET
    whole = before + after
    if a == b or whole == 0:
        return [int(v) for v in values[a]], near
    return [
        (2 * (int(p) * after + int(q) * before) + whole) // (2 * whole)
        for p, q in zip(values[a], values[b], strict=True)
    ], near


def rule_decay(values: NDArray[np.float64], days: NDArray[np.int64]) -> tuple[list[int], int]:
    weights = np.exp(-np.abs(days - TARGET) / 15.0)
    mixed = (values * weights[:, None]).sum(0) / weights.sum()
    return [math.floor(v + 0.5) for v in mixed], int(days[nearest_index(days)])


def rule_medoid(values: NDArray[np.float64], days: NDArray[np.int64]) -> tuple[list[int], int]:
    middle = np.floor(np.median(values, axis=0) + 0.5)
    distance = ((values - middle) ** 2).sum(1)
    i = min(range(len(days)), key=lambda i: (distance[i], abs(days[i] - TARGET), i))
    return [int(v) for v in values[i]], int(days[i])


@pytest.mark.parametrize("share_clear", [0.0, 0.15, 0.6, 1.0])
@pytest.mark.parametrize("looks", [1, 2, 3, 4, 5, 8, 12, 25, 60])
def test_statistics_equal_numpy(looks: int, share_clear: float) -> None:
    block = scene(looks=looks, share_clear=share_clear, seed=looks, low=looks % 2)
    assert np.array_equal(METHODS["median"](**block).codes, reference(block, lambda x: np.nanmedian(x, 0)))
    assert np.array_equal(METHODS["p25"](**block).codes, reference(block, lambda x: np.nanpercentile(x, 25, 0)))
    assert np.array_equal(METHODS["mean"](**block).codes, reference(block, lambda x: np.nanmean(x, 0)))


@pytest.mark.parametrize(
    ("name", "rule"),
    [("nearest", rule_nearest), ("linear", rule_linear), ("decay", rule_decay), ("medoid", rule_medoid)],
)
@pytest.mark.parametrize("looks", [1, 2, 7, 12])
@pytest.mark.parametrize("share_clear", [0.2, 0.7])
def test_time_methods_equal_a_plain_loop(name: str, rule: Callable, looks: int, share_clear: float) -> None:
    block = scene(looks=looks, bands=3, share_clear=share_clear, seed=3 * looks, low=1000, high=9000)
    got, expected = METHODS[name](**block), per_pixel(block, rule)
    if name == "decay":  # float32 sums against float64: a half may fall to the other side
        off = got.codes.astype(int) - expected.codes
        assert np.abs(off).max() <= 1
        assert np.mean(off != 0) < 0.002
    else:
        assert np.array_equal(got.codes, expected.codes)
    assert np.array_equal(got.source_date, expected.source_date)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_nothing_clear_one_clear_all_clear(name: str) -> None:
    block = scene(looks=5, low=1000, high=9000)
    none = METHODS[name](**(block | {"clear": np.zeros((5, 13, 17), bool)}))
    assert not none.codes.any()
    assert not none.source_date.any()
    single = np.zeros((5, 13, 17), bool)
    single[3] = True
    one = METHODS[name](**(block | {"clear": single}))
    assert np.array_equal(one.codes, block["codes"][3])
    assert (one.source_date == block["days"][3]).all()
    every = METHODS[name](**(block | {"clear": np.ones((5, 13, 17), bool)}))
    assert every.codes.min() >= block["codes"].min()
    assert every.codes.max() <= block["codes"].max()
    assert every.source_date.all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_bits_do_not_depend_on_the_cut(name: str) -> None:
    block = scene(looks=9, bands=3, share_clear=0.5, seed=5, low=1000, high=9000)
    whole = METHODS[name](**block)
    for ys, xs in [(slice(0, 7), slice(0, 17)), (slice(3, 13), slice(5, 6)), (slice(12, 13), slice(2, 17))]:
        part = METHODS[name](
            codes=block["codes"][:, :, ys, xs],
            clear=block["clear"][:, ys, xs],
            days=block["days"],
            target=TARGET,
        )
        assert np.array_equal(part.codes, whole.codes[:, ys, xs])
        assert np.array_equal(part.source_date, whole.source_date[ys, xs])


def test_strips_of_any_size_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    block = scene(looks=9, bands=3, share_clear=0.5, seed=6, low=1000, high=9000)
    whole = {name: method(**block) for name, method in METHODS.items()}
    for px in (1, 7, 40):  # below, and not a multiple of, the 17 px of a row
        monkeypatch.setattr(composite, "strip_px", lambda bytes_per_px, px=px: px)
        for name, method in METHODS.items():
            assert np.array_equal(method(**block).codes, whole[name].codes), (name, px)


def test_a_look_that_lacks_a_band_does_not_count() -> None:
    block = scene(looks=3, share_clear=1.0, low=1000, high=9000)
    block["codes"][1, 0, :5] = 0
    assert not complete_looks(codes=block["codes"], clear=block["clear"])[1, :5].any()
    for method in METHODS.values():
        without = method(
            codes=block["codes"][[0, 2], :, :5],
            clear=block["clear"][[0, 2], :5],
            days=block["days"][[0, 2]],
            target=TARGET,
        )
        assert np.array_equal(method(**block).codes[:, :5], without.codes)


def test_linear_passes_a_look_on_the_target_day_through_exactly() -> None:
    block = scene(looks=5, share_clear=1.0)
    block["days"] = np.array([TARGET - 9, TARGET - 4, TARGET, TARGET + 2, TARGET + 3], np.int32)
    assert np.array_equal(METHODS["linear"](**block).codes, block["codes"][2])


def test_linear_replicates_ends() -> None:
    block = scene(looks=3, share_clear=1.0)
    block["days"] = np.array([TARGET + 1, TARGET + 4, TARGET + 6], np.int32)
    assert np.array_equal(METHODS["linear"](**block).codes, block["codes"][0])
    block["days"] = block["days"] - 20
    assert np.array_equal(METHODS["linear"](**block).codes, block["codes"][2])


def test_nearest_prefers_the_earlier_of_two_equally_near() -> None:
    block = scene(looks=2, share_clear=1.0)
    block["days"] = np.array([TARGET - 3, TARGET + 3], np.int32)
    got = METHODS["nearest"](**block)
    assert np.array_equal(got.codes, block["codes"][0])
    assert (got.source_date == TARGET - 3).all()


def test_geomedian_minimises_the_sum_of_distances() -> None:
    block = scene(looks=9, bands=4, share_clear=0.8, seed=8, low=1500, high=4000)
    found = METHODS["geomedian"](**block).codes.astype(float)
    looks = np.where(usable(block)[:, None], block["codes"].astype(float), np.nan)

    def cost(at: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.nansum(np.sqrt(((looks - at) ** 2).sum(1)), axis=0)

    several = usable(block).sum(0) > 2
    for shift in np.random.default_rng(0).normal(0, 30, (40, 4)):
        assert (cost(found) <= cost(found + shift[:, None, None]) + 2.0)[several].all()
    assert (cost(found) <= cost(METHODS["median"](**block).codes.astype(float)) + 2.0)[several].all()


def test_geomedian_of_one_band_is_the_median() -> None:
    block = scene(looks=7, bands=1)
    assert np.array_equal(METHODS["geomedian"](**block).codes, METHODS["median"](**block).codes)


def test_trimmed_views_work_like_copies() -> None:
    """Blocks come in with a halo that is cut off by a view: not contiguous."""
    block = scene(looks=6, low=1000, high=9000)
    view = block | {"codes": block["codes"][:, :, 2:-2, 3:-1], "clear": block["clear"][:, 2:-2, 3:-1]}
    copy = view | {"codes": view["codes"].copy(), "clear": view["clear"].copy()}
    for method in METHODS.values():
        assert np.array_equal(method(**view).codes, method(**copy).codes)


def test_clear_count() -> None:
    clear = np.random.default_rng(1).random((300, 4, 5)) < 0.95
    counted = clear_count(clear)
    assert counted.dtype == np.uint16
    assert np.array_equal(counted, clear.sum(0))


def test_inputs_are_left_alone_and_checked() -> None:
    block = scene(looks=4)
    kept = {name: np.copy(block[name]) for name in ("codes", "clear", "days")}
    for method in METHODS.values():
        method(**block)
    assert all(np.array_equal(block[name], kept[name]) for name in kept)
    with pytest.raises(ValueError, match="uint16"):
        METHODS["median"](**(block | {"codes": block["codes"].astype(np.float32)}))
    with pytest.raises(ValueError, match="ascend"):
        METHODS["median"](**(block | {"days": block["days"][::-1]}))
    with pytest.raises(ConfigError, match="tau_days"):
        METHODS["decay"](**block, tau_days=0)
