"""The heart: pass-through is bit-exact, flags say what happened, anchors blend only in their strip."""

import numpy as np
import pytest

from pipeline.anchors import INTERPOLATE, AnchorMap
from pipeline.block import (
    BLENDED,
    COMPOSED,
    LOW,
    LOW_CONFIDENCE_SIGMA,
    NO_DATA,
    NO_SIGMA,
    OBSERVED,
    READ_FAILED,
    SEASON,
    _blend,
    _flags,
    _Part,
    check_method,
    compose_block,
)
from pipeline.config import LEARNED, METHODS, SHOWS_DATE, Method
from pipeline.errors import ConfigError

DAYS = np.array([19000, 19005, 19010, 19015, 19140], np.int32)
TARGET = 19006


def _looks(seed=0, bands=3, size=48):
    rng = np.random.default_rng(seed)
    ground = rng.integers(1200, 4000, (bands, size, size))
    drift = rng.integers(-60, 60, (len(DAYS), bands, 1, 1))
    noise = rng.integers(-20, 20, (len(DAYS), bands, size, size))
    codes = (ground[None] + drift + noise).astype(np.uint16)
    clear = rng.random((len(DAYS), size, size)) < 0.7
    clear[:, :3, :3] = False
    clear[4] = False
    clear[4, 10, 10] = True
    clear[:4, 10, 10] = False
    codes[0, :, 20:24, 20:24] = 0
    clear[0, 20:24, 20:24] = False
    return codes, clear


def _compose(name, codes, clear, anchors=None, **more):
    return compose_block(
        codes=codes,
        clear=clear,
        days=DAYS,
        method=Method(name=name),
        target=TARGET,
        anchors=anchors,
        row0=7,
        col0=-3,
        **more,
    )


ONE = AnchorMap(1024, -1, -1, (1,), np.ones((1, 3, 3), np.float32))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in LEARNED])
def test_every_pixel_that_any_look_shows_is_filled_and_no_other(name):
    codes, clear = _looks()
    made = _compose(name, codes, clear, ONE)
    seen = clear.any(axis=0)
    np.testing.assert_array_equal((made.codes != 0).all(axis=0), seen)
    np.testing.assert_array_equal((made.flags & NO_DATA) > 0, ~seen)
    np.testing.assert_array_equal(made.clear_count, clear.sum(axis=0))
    np.testing.assert_array_equal(made.source_date != 0, seen)
    assert np.isin(made.source_date, [0, *DAYS]).all()
    assert made.flags[10, 10] & SEASON
    low = seen & (made.clear_count < 2)
    if made.sigma is not None:
        low |= np.where(made.sigma == NO_SIGMA, 0, made.sigma).max(axis=0) > LOW_CONFIDENCE_SIGMA
    assert low[10, 10]
    np.testing.assert_array_equal((made.flags & LOW) > 0, low)
    assert (made.sigma is not None) == (name in ("kalman", "regression"))


@pytest.mark.parametrize("name", [name for name in SHOWS_DATE if name not in LEARNED])
def test_the_anchor_passes_through_bit_exact(name):
    codes, clear = _looks()
    made = _compose(name, codes, clear, ONE)
    seen = clear[1]
    np.testing.assert_array_equal(made.codes[:, seen], codes[1][:, seen])
    np.testing.assert_array_equal((made.flags & OBSERVED) > 0, seen)
    assert (made.source_date[seen] == DAYS[1]).all()
    if made.sigma is not None:
        assert (made.sigma[:, seen] == NO_SIGMA).all()


def test_two_anchors_blend_in_the_strip_and_nowhere_else():
    codes, clear = _looks()
    weights = np.clip((np.arange(60) - 20) / 10, 0, 1).astype(np.float32)
    weights = np.broadcast_to(weights, (60, 60))
    anchors = AnchorMap(1, 7, -3, (1, 2), np.stack([1 - weights, weights]))
    made = _compose("linear", codes, clear, anchors)
    first, second = (
        _compose("linear", codes, clear, ONE),
        _compose("linear", codes, clear, AnchorMap(1024, -1, -1, (2,), np.ones((1, 3, 3), np.float32))),
    )
    np.testing.assert_array_equal(made.codes[..., :20], first.codes[..., :20])
    np.testing.assert_array_equal(made.codes[..., 31:], second.codes[..., 31:])
    seen = clear.any(axis=0)
    strip = (made.flags & BLENDED) > 0
    assert strip[:, 21:30][seen[:, 21:30]].all()
    assert not strip[:, :20].any()
    assert not strip[:, 31:].any()
    middle = np.floor(0.5 * first.codes[..., 25].astype(float) + 0.5 * second.codes[..., 25] + 0.5)
    np.testing.assert_array_equal(made.codes[..., 25], middle)
    assert not (made.flags[strip] & OBSERVED).any()
    assert (made.flags[strip] & COMPOSED).all()


def test_sigma_between_anchors_is_not_less_for_being_told_twice():
    """Both answers come from the same looks: their errors do not cancel as independent ones would."""
    codes, clear = _looks()
    half = np.full((2, 60, 60), 0.5, np.float32)
    made = _compose("regression", codes, clear, AnchorMap(1, 7, -3, (1, 2), half))
    whole = np.ones((1, 3, 3), np.float32)
    alone = [_compose("regression", codes, clear, AnchorMap(1024, -1, -1, (i,), whole)) for i in (1, 2)]
    strip = ((made.flags & BLENDED) > 0) & np.logical_and.reduce([(one.sigma != NO_SIGMA).all(axis=0) for one in alone])
    assert strip.any()
    mean = np.mean([one.sigma.astype(float) for one in alone], axis=0)
    np.testing.assert_allclose(made.sigma[:, strip], mean[:, strip], atol=1)


def test_another_season_is_reckoned_from_the_anchor_that_owns_the_pixel():
    shown = np.full((1, 1, 4), 2000, np.uint16)
    seen = np.zeros((1, 4), bool)
    parts = [
        (_Part(shown, np.full((1, 4), 100, np.int32), None, seen, day), np.array([row], np.float32))
        for day, row in ((0, [1, 1, 0, 0]), (60, [0, 0, 1, 1]))
    ]
    flags = _flags(*_blend(parts), np.full((1, 4), 9, np.uint16), failed=None)
    assert ((flags & SEASON) > 0).tolist() == [[True, True, False, False]]


def test_without_an_anchor_it_interpolates_at_the_target():
    codes, clear = _looks()
    nothing = AnchorMap(1024, -1, -1, (INTERPOLATE,), np.ones((1, 3, 3), np.float32))
    for name, shown in (("linear", "linear"), ("kalman", "kalman"), ("regression", "kalman")):
        made = _compose(name, codes, clear, nothing)
        np.testing.assert_array_equal(made.codes, _compose(shown, codes, clear, None).codes)
        assert not (made.flags & OBSERVED).any()


def test_failed_reads_and_cores():
    codes, clear = _looks()
    failed = np.zeros(clear.shape[1:], bool)
    failed[5:9, 5:9] = True
    whole = _compose("median", codes, clear, failed=failed)
    core = (slice(4, 30), slice(6, 41))
    part = _compose("median", codes, clear, failed=failed, core=core)
    np.testing.assert_array_equal((whole.flags & READ_FAILED) > 0, failed)
    np.testing.assert_array_equal(part.codes, whole.codes[:, core[0], core[1]])
    np.testing.assert_array_equal(part.flags, whole.flags[core])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"name": "median", "dates": 3}, "method.dates: median has no such option; its options are: none"),
        ({"name": "regression", "datez": 3}, "method.datez: regression has no such option"),
        ({"name": "decay", "tau_days": -1}, "method.tau_days"),
        ({"name": "regression", "dates": 0}, "dates = 0: must lie between"),
        ({"name": "timegate", "wieghts": "a"}, "method.wieghts: timegate has no such option; its options are: device"),
        ({"name": "timegate", "weights_sha256": "a"}, "timegate has no such option"),
        ({"name": "timegate", "device": "tpu"}, "method.device: 'tpu' is none of auto, cpu, cuda"),
        ({"name": "timegate", "precision": "fp8"}, "method.precision: 'fp8' is none of"),
        ({"name": "timegate", "patch_batch": 0}, "method.patch_batch: a whole number"),
        ({"name": "timegate", "weights": 3}, "method.weights: a file or a name"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(spec, said):
    with pytest.raises(ConfigError, match=said):
        check_method(Method.model_validate(spec), ("red",))
