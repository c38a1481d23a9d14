"""Inference with a learned model: observed pixels untouched, no byte depends on how the ground was cut, no garbage."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from tiny_network import TinyNet, tiny

from pipeline import kalman, predict
from pipeline.bands import to_codes, to_reflectance
from pipeline.cases import CLOUD, SHADOW, VOID
from pipeline.errors import RunError
from pipeline.estimates import CONTEXT, Target
from pipeline.exam import lesson_weight, undistorted
from pipeline.kept import Kept
from pipeline.learnfile import Fit
from pipeline.models.batch import Batch, Completed
from pipeline.patches import collate
from pipeline.patchwork import PatchLattice
from pipeline.predict import complete, halo_px

DAYS = np.array([19000, 19007, 19012, 19020, 19031], np.int32)
ANCHOR = 2


def scene(seed=0, bands=3, height=120, width=136, clouds=9):
    """Looks with round clouds of their own, one spot that no look shows, one that only the farthest shows."""
    rng = np.random.default_rng(seed)
    ground = to_codes(0.15 + 0.1 * rng.random((bands, height // 4 + 1, width // 4 + 1))).repeat(4, 1).repeat(4, 2)
    ground = ground[:, :height, :width].astype(int)
    drift = rng.integers(-80, 80, (len(DAYS), bands, 1, 1))
    codes = (ground[None] + drift + rng.integers(-9, 9, (len(DAYS), bands, height, width))).astype(np.uint16)
    rows, cols = np.mgrid[:height, :width]
    clear = np.ones((len(DAYS), height, width), bool)
    for layer in clear:
        for _ in range(clouds):
            y, x, r = rng.integers(0, height), rng.integers(0, width), rng.integers(4, 14)
            layer[(rows - y) ** 2 + (cols - x) ** 2 < r * r] = False
    clear[:, 20:24, 30:34] = False
    clear[:, 40:44, 30:34] = False
    clear[4, 40:44, 30:34] = True
    return codes, clear


def run(codes, clear, *, model, anchor=ANCHOR, target=int(DAYS[ANCHOR]), row0=1000, col0=-3000, **more):
    return complete(Target(codes, clear, DAYS, target, anchor, row0, col0), model=model, **more)


def same(one, other):
    for name in ("codes", "sigma", "source_date", "doubtful"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_observed_pixels_pass_gaps_are_filled_and_nothing_is_invented():
    codes, clear = scene()
    made = run(codes, clear, model=tiny())
    known, seen = clear[ANCHOR], clear.any(axis=0)
    np.testing.assert_array_equal(made.codes[:, known], codes[ANCHOR][:, known])
    assert (made.source_date[known] == DAYS[ANCHOR]).all()
    assert np.isnan(made.sigma[:, known]).all()
    assert (made.codes[:, ~seen] == 0).all()
    assert (made.source_date[~seen] == 0).all()
    gap = seen & ~known
    assert gap.sum() > 500
    assert (made.codes[:, gap] != 0).all()
    assert np.isfinite(made.sigma[:, gap]).all()
    assert not made.doubtful.any()


def test_the_date_is_that_of_the_heaviest_weight():
    codes, clear = scene()
    made = run(codes, clear, model=tiny())
    gap = clear.any(axis=0) & ~clear[ANCHOR]
    distance = np.where(clear, np.abs(DAYS - DAYS[ANCHOR])[:, None, None], 999)
    np.testing.assert_array_equal(made.source_date[gap], DAYS[distance.argmin(axis=0)][gap])
    plain = run(codes, clear, model=tiny(gate=False))
    np.testing.assert_array_equal(plain.source_date, made.source_date)  # without weights: the nearest clear look


def test_without_a_gap_nothing_is_computed():
    codes, clear = scene()
    clear[ANCHOR] = True
    model = tiny()
    made = run(codes, clear, model=model)
    np.testing.assert_array_equal(made.codes, codes[ANCHOR])
    assert not model.seen
    clear[ANCHOR, 60, 70] = False
    clear[:, 0, 0] = False  # no look at all: no reason to run a patch
    run(codes, clear, model=model)
    assert 1 <= len(model.seen) <= 4


def test_all_clouded_is_no_data():
    codes, clear = scene()
    made = run(codes, np.zeros_like(clear), model=tiny())
    assert (made.codes == 0).all()
    assert (made.source_date == 0).all()


def test_no_byte_depends_on_how_the_ground_was_cut():
    codes, clear = scene(height=560, width=520, clouds=100)
    model = tiny()
    halo = halo_px(model)
    whole = run(codes, clear, model=model)
    assert ((whole.codes[0] != 0) & ~clear[ANCHOR]).sum() > 10_000
    for rows, cols in [((300, 380), (290, 350)), ((311, 377), (0, 61)), ((0, 5), (500, 520))]:
        top, left = max(rows[0] - halo, 0), max(cols[0] - halo, 0)
        around = slice(top, rows[1] + halo), slice(left, cols[1] + halo)
        part = run(
            np.ascontiguousarray(codes[:, :, *around]),
            np.ascontiguousarray(clear[:, *around]),
            model=model,
            row0=1000 + top,
            col0=-3000 + left,
            core=(slice(rows[0] - top, rows[1] - top), slice(cols[0] - left, cols[1] - left)),
        )
        for name in ("codes", "sigma", "source_date"):
            np.testing.assert_array_equal(getattr(whole, name)[..., slice(*rows), slice(*cols)], getattr(part, name))


def test_patches_over_the_edges_of_sub_blocks_are_computed_once():
    """Row by row and from left to right, as a task works; the sub-blocks see no more than the halo around them."""
    codes, clear = scene(height=230, width=190, clouds=30)
    model = tiny()
    whole = run(codes, clear, model=model)
    once = len(model.seen)
    halo, kept, most = halo_px(model), Kept(), 0
    made = {name: np.empty_like(getattr(whole, name)) for name in ("codes", "sigma", "source_date")}
    model.seen.clear()
    for top, left in product(range(0, 230, 70), range(0, 190, 50)):
        rows, cols = slice(top, min(top + 70, 230)), slice(left, min(left + 50, 190))
        low = max(top - halo, 0), max(left - halo, 0)
        around = slice(low[0], rows.stop + halo), slice(low[1], cols.stop + halo)
        part = run(
            np.ascontiguousarray(codes[:, :, *around]),
            np.ascontiguousarray(clear[:, *around]),
            model=model,
            row0=1000 + low[0],
            col0=-3000 + low[1],
            core=(slice(top - low[0], rows.stop - low[0]), slice(left - low[1], cols.stop - low[1])),
            kept=kept,
        )
        for name, values in made.items():
            values[..., rows, cols] = getattr(part, name)
        most = max(most, len(kept.answers))
    for name, values in made.items():
        np.testing.assert_array_equal(values, getattr(whole, name))
    assert len(model.seen) == once
    assert most <= 2 * (190 // 40 + 2 + 70 // 40 + 2)  # as the plan reckons (``learned.kept_bytes``)


def test_where_arrays_end_beyond_the_data_does_not_matter():
    codes, clear = scene(height=90, width=70)
    model = tiny()
    bare = run(codes, clear, model=model)
    edges = ((30, 41), (57, 20))
    padded = run(
        np.pad(codes, ((0, 0), (0, 0), *edges)),
        np.pad(clear, ((0, 0), *edges)),
        model=model,
        row0=1000 - 30,
        col0=-3000 - 57,
        core=(slice(30, 120), slice(57, 127)),
    )
    same(bare, padded)


def test_patches_are_padded_by_reflection_where_data_end():
    codes, clear = scene(height=40, width=50)
    model = tiny()
    made = run(codes, clear, model=model, row0=0, col0=0)
    assert (made.codes[:, clear.any(axis=0)] != 0).all()
    for batch in model.seen:
        assert (batch.present == 1).all()
        assert (batch.scale > 0).all()
    first = model.seen[0]  # begins at -40: the first pixel of the data lies at 40
    assert torch.equal(first.looks[0, ANCHOR, :, 24:41, 24:41], first.looks[0, ANCHOR, :, 40:57, 40:57].flip(-1, -2))
    fitted = first.context[0, CONTEXT.index("fitted"), 0]
    assert fitted[40:, 40:].any()
    assert not fitted[:40].any()  # a reflection is no further clear pixel to learn from
    assert not fitted[:, :40].any()


@pytest.mark.parametrize("n_bands", [1, 3, 4, 5, 10])
def test_any_bands_in_any_order(n_bands):
    codes, clear = scene(bands=n_bands, height=40, width=64)
    order = np.random.default_rng(1).permutation(n_bands)
    model = tiny()
    one = run(codes, clear, model=model)
    assert one.codes.shape == (n_bands, 40, 64)
    assert (one.codes[:, clear.any(axis=0)] != 0).all()
    if n_bands <= 4:  # beyond four bands the regression's own groups follow the order
        other = run(np.ascontiguousarray(codes[:, order]), clear, model=model)
        assert np.abs(other.codes.astype(int) - one.codes[order].astype(int)).max() <= 1


def test_a_date_that_shows_nothing_is_predicted():
    codes, clear = scene()
    target = int(DAYS[3]) - 2
    model = tiny()
    made = run(codes, clear, model=model, anchor=None, target=target)
    seen = clear.any(axis=0)
    assert (made.codes[:, seen] != 0).all()
    assert (made.codes[:, ~seen] == 0).all()
    assert (made.source_date[clear[3]] == DAYS[3]).all()
    assert {float(d) for d in model.seen[0].days[0]} <= {float(d) for d in DAYS - target}
    assert (model.seen[0].known == 0).all()
    bare = run(codes, clear, model=tiny(sigma=False), anchor=None, target=target)
    between = kalman.interpolate(codes=codes, clear=clear, days=DAYS, target=target, row0=1000, col0=-3000)
    np.testing.assert_allclose(bare.sigma, np.where(seen, between.sigma, np.nan), rtol=1e-5)  # the prior's own


class Broken(TinyNet):
    """Answers nonsense in a corner of every patch."""

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:
        done = super().forward(batch, with_weights=with_weights)
        image = done.image.clone()
        image[..., :32, :32] = torch.nan
        image[:, 1, 40:, 40:] = 1e9
        return replace(done, image=image, sigma=done.sigma * torch.inf)


def test_nonsense_is_replaced_by_the_prior_and_marked():
    codes, clear = scene()
    good, bad = run(codes, clear, model=tiny()), run(codes, clear, model=tiny(Broken))
    assert bad.doubtful.any()
    gap = clear.any(axis=0) & ~clear[ANCHOR]
    assert not bad.doubtful[~gap].any()
    difference = np.abs(to_reflectance(bad.codes) - to_reflectance(good.codes))[:, gap]
    assert difference.max() < 0.05
    assert np.isfinite(bad.sigma[:, gap]).all()


class Narrow(TinyNet):
    """A model on a device that holds two patches, or none."""

    holds = 2

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:
        if len(batch.prior) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().forward(batch, with_weights=with_weights)


def test_cloud_and_shadow_are_told_apart_and_nothing_hides_what_is_not_there():
    codes, clear = scene(height=64, width=64)
    codes[0, :, :, 40:] = 0
    clear[0, :, 40:] = False
    bits = np.where(clear, 0, 1).astype(np.uint8)
    bits[1][~clear[1]] = 2
    bits[3][~clear[3]] = 3
    bits[0, :, 40:] = 4
    model = tiny()
    run(codes, clear, model=model, bits=bits, row0=0, col0=0)
    batch = next(b for b in model.seen if (b.present[0, :, 0].amin(0) == 0).any())
    hidden = 1 - batch.clear[0]
    assert (hidden * (1 - batch.present[0])).sum() == 0
    cloud, shadow = hidden[:, 0].sum(dim=(1, 2)), hidden[:, 1].sum(dim=(1, 2))
    assert shadow[0] == cloud[1] == 0 < min(cloud[0], shadow[1])
    assert torch.equal(hidden[3, 0], hidden[3, 1])
    model.seen.clear()
    run(codes, clear, model=model, row0=0, col0=0)
    assert all(torch.equal(b.clear[:, :, 0], b.clear[:, :, 1]) for b in model.seen)


def test_one_polarity_from_sample_to_inference():
    """1 = good everywhere: a network is asked for a clear, whole target, and sees what is clear as 1."""
    codes, clear = scene()
    codes[0, :, :50] = 0
    clear[0, :50] = False
    model = tiny()
    run(codes, clear, model=model, within=None)
    (batch, *_) = model.seen
    assert batch.condition.shape[1] == 3
    assert (batch.condition == 1).all()
    assert undistorted(replace(batch, condition=batch.condition * 0)).condition.eq(1).all()  # examined alike
    assert (batch.looks[batch.present.expand_as(batch.looks) == 0] == 0).all()
    usable = (batch.clear.amin(dim=2) * batch.present[:, :, 0])[batch.steps]
    assert abs(float(usable.mean()) - clear.mean()) < 0.2 < float(usable.mean())
    # and in training: bits of what hides a target are 0 in its condition
    rows = [
        {
            "looks": np.full((1, 2, 4, 4), 2000, np.uint16),
            "bits": np.array([[[0, CLOUD, SHADOW, VOID]] * 4], np.uint8),
            "days": np.zeros(1, np.float32),
            "truth": np.full((2, 4, 4), 2000, np.uint16),
            "truth_bits": np.array([[0, CLOUD, SHADOW, VOID]] * 4, np.uint8),
            "hole": np.ones((4, 4), np.uint8),
            "observed": np.zeros((4, 4), bool),
            "prior": np.full((2, 4, 4), 2000, np.uint16),
            "scale": np.full((2, 4, 4), 0.01, np.float16),
            "estimates": np.full((1, 2, 4, 4), 2000, np.uint16),
            "context": np.zeros((1, 2, 4, 4), np.float16),
            "id": "one",
        }
    ]
    lesson = collate(rows)
    np.testing.assert_array_equal(lesson.given.condition[0, :, 0].numpy(), [[1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(lesson.given.clear[0, 0, :, 0].numpy(), [[1, 0, 1, 1], [1, 1, 0, 1]])
    np.testing.assert_array_equal(lesson.given.present[0, 0, 0, 0].numpy(), [1, 1, 1, 0])
    # the paper's loss counts the target's clouded pixels, unless they are asked to be left out
    for masked, counts in ((False, [1, 1, 1, 1]), (True, [1, 0, 0, 1])):
        weight = lesson_weight(lesson, Fit(mask_target_clouds=masked), True)
        np.testing.assert_array_equal(weight[0, 0, 0].numpy(), counts)


def test_out_of_memory_halves_the_batch_and_says_so(monkeypatch):
    def as_on_a_gpu(model, _device, patch_batch):
        return predict._halved.get(model, patch_batch)

    codes, clear = scene(height=200, width=200, clouds=20)
    calm = run(codes, clear, model=tiny())
    monkeypatch.setattr(predict, "_most", as_on_a_gpu)
    model = tiny(Narrow)
    made = run(codes, clear, model=model, patch_batch=8)
    np.testing.assert_allclose(made.codes.astype(int), calm.codes.astype(int), atol=1)
    assert [len(batch.prior) for batch in model.seen][:2] == [2, 2]
    assert made.notes == [
        "out of GPU memory with 8 patches at a time, went on with 4",
        "out of GPU memory with 4 patches at a time, went on with 2",
    ]
    assert run(codes, clear, model=model, patch_batch=8).notes == []  # learnt for good
    model = tiny(Narrow)
    model.holds = 0
    with pytest.raises(RunError, match=r"method\.device=cpu"):
        run(codes, clear, model=model, patch_batch=2)


def test_padding_of_shorter_series_changes_nothing_but_rounding(monkeypatch):
    codes, clear = scene(height=200, width=200, clouds=20)
    clear[0, :, 90:] = False
    clear[4, 90:] = False
    one = run(codes, clear, model=tiny())
    monkeypatch.setattr(predict, "_most", lambda *_: 32)
    model = tiny()
    many = run(codes, clear, model=model)
    assert not model.seen[0].steps.all()
    np.testing.assert_allclose(many.codes.astype(int), one.codes.astype(int), atol=1)
    np.testing.assert_array_equal(many.source_date, one.source_date)


def test_the_number_of_threads_does_not_matter():
    codes, clear = scene(height=100, width=100)
    torch.set_num_threads(2)
    one = run(codes, clear, model=tiny())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    same(one, run(codes, clear, model=tiny()))


def test_a_lattice_that_leaves_gaps_is_refused():
    with pytest.raises(ValueError, match="not overlap once everywhere; choose a stride_px of at least 28 and below 56"):
        tiny(stride_px=63)
    weights = PatchLattice(64, 40, 4).profile
    total = sum(np.pad(weights, (40 * i, 40 * (5 - i))) for i in range(6))
    np.testing.assert_allclose(total[64:200], 1, atol=1e-6)


def test_bf16_stays_close():
    codes, clear = scene()
    one, low = run(codes, clear, model=tiny()), run(codes, clear, model=tiny(), precision="bf16")
    assert 0 < np.abs(one.codes.astype(int) - low.codes.astype(int)).max() <= 30
