"""The weights that come with the package: no seam, any bands, small areas, untouched where observed."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.estimates import Target
from pipeline.learned import LearnedOptions
from pipeline.models.weights import SHIPPED, load_model
from pipeline.patchwork import patch_places
from pipeline.predict import complete, halo_px, lattice_of

DEFAULT = LearnedOptions().weights
OTHERS = [path.stem for path in sorted(SHIPPED.glob("*.safetensors")) if path.stem != DEFAULT]

DAYS = np.array([19000, 19007, 19012, 19020, 19031, 19043], np.int32)
ANCHOR = 2


@pytest.fixture(scope="module")
def shipped():
    return load_model(DEFAULT)


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_are_no_default_pass_what_is_observed_and_fill_the_rest(name):
    _, codes, clear = _scene(height=60, width=60)
    made = _run(load_model(name), codes, clear)
    np.testing.assert_array_equal(made.codes[:, clear[ANCHOR]], codes[ANCHOR][:, clear[ANCHOR]])
    assert (made.codes[:, clear.any(axis=0)] != 0).all()


def _scene(bands=4, height=300, width=280, seed=0):
    """Parcels that grow at their own pace, the dates' gain, noise; round clouds on every date."""
    rng = np.random.default_rng(seed)
    parcel = rng.integers(0, 40, (height // 20 + 1, width // 20 + 1)).repeat(20, 0).repeat(20, 1)[:height, :width]
    start, pace = rng.uniform(0.03, 0.35, (bands, 40)), rng.uniform(-0.002, 0.002, (bands, 40))
    days = (DAYS - DAYS[ANCHOR])[:, None, None, None]
    truth = (start[:, parcel] + pace[:, parcel] * days) * rng.uniform(0.95, 1.05, (len(DAYS), 1, 1, 1))
    truth = truth + rng.normal(0, 0.003, truth.shape)
    codes = np.clip(np.rint(truth * 10_000) + 1000, 1, 65534).astype(np.uint16)
    rows, cols = np.mgrid[:height, :width]
    clear = np.ones((len(DAYS), height, width), bool)
    for layer, _ in itertools.product(clear, range(14 * height * width // (300 * 280) + 1)):
        y, x, r = rng.integers(0, height), rng.integers(0, width), rng.integers(8, 30)
        layer[(rows - y) ** 2 + (cols - x) ** 2 < r * r] = False
    cloudy = np.where(clear[:, None], codes, 8000).astype(np.uint16)
    return codes, cloudy, clear


def _run(model, codes, clear, **more):
    place = {"row0": 40, "col0": 7} | {name: more.pop(name) for name in ("row0", "col0") if name in more}
    return complete(Target(codes, clear, DAYS, int(DAYS[ANCHOR]), ANCHOR, **place), model=model, **more)


@pytest.mark.parametrize("name", [DEFAULT, *OTHERS])
def test_the_lattice_leaves_no_seam(name):
    """Shifted by half a patch the picture stays within 1e-3 in a gap of 220 x 220 px, and edges do not show."""
    model = load_model(name)
    truth, codes, clear = _scene()
    clear[ANCHOR, 40:260, 30:250] = False
    usual = lattice_of(model)
    moved = replace(usual, shift_px=usual.patch_px // 2)
    one, other = _run(model, codes, clear), _run(model, codes, clear, lattice=moved)
    gap = ~clear[ANCHOR] & clear.any(axis=0)
    difference = (one.codes.astype(float) - other.codes)[:, gap] / 1e4
    assert np.sqrt((difference**2).mean()) < 1e-3  # 0.0007 and 0.0008
    error = one.codes.astype(float) - truth[ANCHOR]  # the ground's own edges are not the lattice's
    steps = np.abs(np.diff(error, axis=1))[:, 45:255, 35:245].mean(axis=(0, 2))
    rows = np.arange(45, 255) + 1 + 40
    edge = np.isin(rows % usual.stride_px, [usual.border_px, usual.border_px + usual.ramp_px])
    assert edge.any()
    assert steps[edge].mean() / steps[~edge].mean() < 1.1


@pytest.mark.parametrize("beyond", [2, 20])
def test_a_gap_beside_a_patch_does_not_change_a_byte(shipped, beyond):
    """What a patch learns from must not follow which gaps of its neighbours a task has to fill too."""
    _, codes, clear = _scene(height=128, width=420, seed=5)
    lattice = lattice_of(shipped)
    clear[ANCHOR] = True
    clear[ANCHOR, 50:70, 100:110] = False
    places = patch_places(~clear[ANCHOR], lattice, 40, 7)
    right = max(col for _, col in places) + lattice.patch_px - 7
    clear[ANCHOR, 50:70, right + beyond : right + beyond + 6] = False
    whole = _run(shipped, codes, clear)
    part = _run(shipped, codes, clear, core=(slice(0, 128), slice(0, 120)))
    for name in ("codes", "sigma", "source_date"):
        np.testing.assert_array_equal(getattr(whole, name)[..., :120], getattr(part, name), err_msg=name)


@pytest.mark.parametrize("n_bands", [3, 4, 5, 10])
def test_any_bands_in_any_order_on_a_small_area(shipped, n_bands):
    truth, codes, clear = _scene(bands=n_bands, height=40, width=64)
    order = np.random.default_rng(n_bands).permutation(n_bands)
    made = _run(shipped, np.ascontiguousarray(codes[:, order]), clear)
    gap = ~clear[ANCHOR] & clear.any(axis=0)
    assert gap.sum() > 100
    assert (made.codes[:, gap] != 0).all()
    off = np.abs(made.codes[:, gap].astype(float) - truth[ANCHOR][order][:, gap]) / 1e4
    assert off.mean() < 0.02
    if n_bands <= 4:  # more bands than that are regressed in groups, in the order given
        straight = _run(shipped, codes, clear)
        assert np.abs(straight.codes[order].astype(int) - made.codes.astype(int)).max() <= 2


def test_identity_single_look_and_nothing(shipped):
    _, codes, clear = _scene(height=60, width=60)
    whole = clear.copy()
    whole[ANCHOR] = True
    np.testing.assert_array_equal(_run(shipped, codes, whole).codes, codes[ANCHOR])
    made = _run(shipped, codes, clear)
    np.testing.assert_array_equal(made.codes[:, clear[ANCHOR]], codes[ANCHOR][:, clear[ANCHOR]])
    nothing = _run(shipped, codes, np.zeros_like(clear))
    assert (nothing.codes == 0).all()
    single = np.zeros_like(clear)
    single[4] = True
    alone = _run(shipped, codes, single)
    assert (np.abs(alone.codes.astype(int) - codes[4].astype(int)) / 1e4).mean() < 0.02
    assert (alone.source_date == DAYS[4]).all()


@pytest.mark.parametrize("name", [DEFAULT, *OTHERS])
def test_x_of_a_single_clear_look_is_that_look(name, monkeypatch):
    """The gate's aggregate, equation 3, to 1e-5: with one look to choose from there is nothing to weigh."""
    model, made = load_model(name), []
    forward = type(model).forward

    def heard(self, batch, **more):
        made.append((batch, forward(self, batch, **more)))
        return made[-1][1]

    monkeypatch.setattr(type(model), "forward", heard)
    _, codes, clear = _scene(height=60, width=60)
    single = np.zeros_like(clear)
    single[4] = True
    _run(model, codes, single)
    assert made
    for batch, done in made:
        look = int((batch.clear.amin(dim=2) * batch.present[:, :, 0]).sum(dim=(2, 3)).argmax())
        inside = batch.present[:, look].expand_as(done.aggregate) > 0
        assert inside.any()
        assert float((done.aggregate - batch.looks[:, look])[inside].abs().max()) < 1e-5


def test_cuts_and_threads_do_not_change_a_byte(shipped):
    _, codes, clear = _scene(height=420, width=300, seed=3)
    whole = _run(shipped, codes, clear)
    top = max(380 - halo_px(shipped), 0)
    torch.set_num_threads(2)
    part = _run(
        shipped,
        np.ascontiguousarray(codes[:, :, top:]),
        np.ascontiguousarray(clear[:, top:]),
        row0=40 + top,
        core=(slice(380 - top, 420 - top), slice(50, 114)),
    )
    torch.set_num_threads(1)
    for name in ("codes", "sigma", "source_date"):
        np.testing.assert_array_equal(getattr(whole, name)[..., 380:420, 50:114], getattr(part, name), err_msg=name)


def test_bf16_stays_within_a_ten_thousandth(shipped):
    _, codes, clear = _scene(height=120, width=120)
    full, low = _run(shipped, codes, clear), _run(shipped, codes, clear, precision="bf16")
    difference = (full.codes.astype(float) - low.codes) / 1e4
    assert np.sqrt((difference**2).mean()) < 1e-4  # 1e-5 in the gap, the most 1e-4
    assert np.abs(difference).max() < 1e-3
