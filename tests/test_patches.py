"""The training store: written once, resumed after a kill, split by place and time, the same for the same seed."""

import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from pipeline import estimates
from pipeline.cases import CLOUD, VOID
from pipeline.errors import ConfigError, NoItemsError, NothingClearError, StoreMismatchError
from pipeline.items import EPOCH
from pipeline.learnfile import Cases, Fit, Simulated, Source, Span, Split
from pipeline.patches import Lesson, Order, Patches, collate
from pipeline.places import places, simulated_place
from pipeline.prepare import _serves, prepare, training_cases
from pipeline.samples import DONE, Sample, Store, open_store, split_samples

CLEAR_SKY = {"cloud_fraction_mean": [0.2, 0.2], "cloud_fraction_concentration": [3, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished store."""
    folder = tmp_path_factory.mktemp("learn")
    prepare(learning.training(folder))
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return open_store(folder / "samples")


def lessons(store: Store, *, epoch: int = 0, seed: int = 0, fit: Fit | None = None, every: int = 5) -> Lesson:
    """Some of the samples, at most twenty."""
    data = Patches(store, range(0, len(store.samples), every)[:20], seed=seed, fit=fit)
    return collate([data[(epoch, number)] for number in range(len(data))])


# -- what is written ------------------------------------------------------------------------------------------------


def test_samples_hold_what_a_network_is_given(store: Store) -> None:
    made = lessons(store)
    given, count = made.given, len(made.ids)
    assert len(store.samples) > 40
    assert given.looks.shape == (count, 7, 2, 32, 32)
    assert given.estimates.shape == (count, len(estimates.ESTIMATES), 2, 32, 32)
    assert given.context.shape == (count, len(estimates.CONTEXT), 2, 32, 32)
    assert all(torch.isfinite(getattr(given, name)).all() for name in given.__dataclass_fields__)
    assert (given.scale > 0).all()
    assert (given.condition == 1).all() or bool((made.hole * (given.condition.amin(1, keepdim=True) == 0)).sum() == 0)
    # the truth is known under every hole, and a prior is a guess at it
    where = (made.hole > 0).expand_as(made.truth)
    assert (made.truth[where] != 0).float().mean() > 0.99
    assert (given.prior - made.truth)[where].abs().mean() < 0.05
    assert not (made.hole * given.known).any()
    seen = (made.seen > 0).expand_as(made.truth)
    assert torch.equal(given.prior[seen], made.truth[seen])


def test_complete_mode_keeps_the_target_and_drops_it_in_some_samples(store: Store) -> None:
    whole = [sample for sample in store.samples if sample.target is None]
    assert 0.05 < len(whole) / len(store.samples) < 0.6
    for sample in store.samples:
        if sample.target is None:
            assert sample.day not in sample.days
        else:
            assert sample.days[sample.target] == sample.day


def test_the_prior_is_that_of_inference_on_the_whole_block(folder: Path, store: Store) -> None:
    training = learning.training(folder)
    series = simulated_place("sim", training.sources[0].simulate or Simulated(), 1001, training.bands)
    case = next(c for c in training_cases(series, training.cases, training.seed) if c.target is not None)
    asked = estimates.Target(case.codes, case.clear, case.days, case.day, case.target, case.row0, case.col0)
    known = estimates.estimate(asked)
    (first, *_) = (number for number, s in enumerate(store.samples) if s.case == case.id)
    sample, data = store.samples[first], Patches(store, [first], seed=0, fit=None)
    row, col = divmod(sample.number % 4, 2)
    there = (slice(32 * row, 32 * row + 32), slice(32 * col, 32 * col + 32))
    np.testing.assert_array_equal(data[(0, 0)]["prior"], known.codes[:, *there])


def test_edges_are_padded_not_dropped(tmp_path: Path) -> None:
    spec = {"name": "sim", "simulate": {"seeds": 1, "size_px": 80, "dates": [8, 8]}}
    rules = {"patch_px": 64, "min_valid": 0.05, "min_hole": 0.0, "pastes": 1, "target_max_bad": 0.3}
    prepare(learning.training(tmp_path, sources=[spec], cases=rules))
    store = open_store(tmp_path / "samples")
    assert {sample.number % 4 for sample in store.samples} == {0, 1, 2, 3}
    corner = next(i for i, s in enumerate(store.samples) if s.number % 4 == 3)
    made = Patches(store, [corner], seed=0, fit=None)[(0, 0)]
    assert (made["truth"][:, 16:, :] == 0).all()
    assert (made["truth"][:, :16, :16] != 0).all()
    assert made["looks"][0, 0, 20:].any()  # continued by reflection, which is no second witness of the ground
    right = [i for i, s in enumerate(store.samples) if s.number % 4 == 1]
    data = Patches(store, right, seed=0, fit=None)
    fitted = np.stack([data[(0, n)]["context"][estimates.CONTEXT.index("fitted")] for n in range(len(right))])
    assert fitted[..., :16].any()
    assert not fitted[..., 16:].any()
    few = learning.training(tmp_path, sources=[spec], cases=rules | {"min_valid": 0.5}, store=str(tmp_path / "few"))
    prepare(few)
    assert {sample.number % 4 for sample in open_store(tmp_path / "few").samples} == {0}


def test_a_large_area_comes_in_blocks_with_their_margin(small: Any) -> None:
    job = {name: value for name, value in small.fields().items() if name not in ("bands", "target", "method")}
    found = places(Source(name="region", job=job), ("blue", "nir"), block_px=128, max_blocks=2, seed=1)
    assert len(found) == 2
    assert all(place.name.startswith("region.") for place in found)
    series = found[0].read()
    rows, cols = series.core
    assert series.codes.shape[2] - (rows.stop - rows.start) == 2 * 224
    assert rows.stop - rows.start <= 128
    assert cols.start == 224


def test_a_region_of_ones_own_becomes_samples(small: Any, tmp_path: Path) -> None:
    job = {name: value for name, value in small.fields().items() if name not in ("bands", "target", "method")}
    job["area"] = {"bbox": small.bbox((30, 330), (120, 420))}
    cases = {"patch_px": 64, "pastes": 1, "target_max_bad": 0.3, "max_looks": 8}
    made = prepare(learning.training(tmp_path, sources=[{"name": "own", "job": job}], cases=cases))
    store = open_store(made.store)
    assert made.places == {"own": len(store.samples)}
    assert {sample.place for sample in store.samples} == {"own"}
    lesson = lessons(store)
    where = (lesson.hole > 0).expand_as(lesson.truth)
    assert (lesson.given.prior - lesson.truth)[where].abs().mean() < 0.05


def test_paper_mode_predicts_a_clouded_date_from_the_others(tmp_path: Path) -> None:
    sources = [{"name": "sim", "simulate": {"seeds": 2, "size_px": 64, "dates": [7, 7]}}]
    training = learning.training(tmp_path, sources=sources, cases={"mode": "paper", "patch_px": 32})
    prepare(training)
    store = open_store(tmp_path / "samples")
    assert all(sample.target is None for sample in store.samples)
    made = lessons(store)
    clouded = 1 - made.given.condition[:, :2].amin(dim=1)
    assert clouded.any()
    assert clouded.mean(dim=(1, 2)).max() <= 0.5
    fit = Fit(drop_looks=1, insert_target=0.5)
    varied, again = lessons(store, fit=fit, every=1), lessons(store, fit=fit, every=1)
    assert torch.equal(varied.given.looks, again.given.looks)  # so that a resumed training drops the same
    assert torch.equal(varied.given.days, again.given.days)
    steps = varied.given.steps.sum(dim=1)
    assert steps.min() >= 3
    assert len(set(steps.tolist())) > 1
    inserted = ((varied.given.days == 0) & varied.given.steps).any(dim=1)
    assert 0.1 < inserted.float().mean() < 0.9


def test_shares_are_the_papers_and_the_products_unless_told_otherwise(store: Store) -> None:
    """Defaults: half of the samples lose looks, a twentieth gets its target, a quarter of the cases loses the date."""
    sample = {
        "looks": np.zeros((9, 2, 4, 4), np.uint16),
        "bits": np.zeros((9, 4, 4), np.uint8),
        "days": np.arange(1, 10, dtype=np.float32),
        "truth": np.ones((2, 4, 4), np.uint16),
        "truth_bits": np.zeros((4, 4), np.uint8),
    }
    about = store.about | {"cases": store.about["cases"] | {"mode": "paper"}}
    data = Patches(replace(store, about=about), [0], seed=0, fit=Fit())
    made = [data._varied(dict(sample), Fit(), np.random.default_rng([1, n])) for n in range(4000)]
    lengths = np.array([(one["days"] != 0).sum() for one in made])
    assert lengths.min() == 3
    # drawn evenly from 3 to 9, so a seventh of those that may lose looks keeps all
    assert abs((lengths < 9).mean() - 0.5 * 6 / 7) < 0.03
    assert abs(np.mean([(one["days"] == 0).any() for one in made]) - 0.05) < 0.012
    training = learning.training(Path("unused"))
    series = simulated_place("sim", training.sources[0].simulate or Simulated(), 1001, training.bands)
    cases = [c for seed in range(60) for c in training_cases(series, training.cases, seed)]
    assert abs(np.mean([case.target is None for case in cases]) - 0.25) < 0.06


@pytest.mark.parametrize(("cloud", "missing", "serves"), [(0.5, 0, 1), (0.55, 0, 0), (0, 0.3, 1), (0, 0.35, 0)])
def test_a_target_of_the_paper_has_at_most_half_cloud_and_a_third_missing(
    cloud: float, missing: float, serves: bool
) -> None:
    bits = np.zeros((20, 20), np.uint8)
    bits[: int(20 * cloud)] = CLOUD
    bits[: int(20 * missing)] |= VOID
    patch = xr.Dataset({"truth_bits": (("y", "x"), bits)})
    assert _serves(patch, Cases(mode="paper"), 1 - missing, 1.0) == bool(serves)


def test_padding_is_missing_to_a_target_of_the_paper(tmp_path: Path) -> None:
    spec = {"name": "sim", "simulate": {"seeds": 1, "size_px": 80, "dates": [8, 8], "vary": CLEAR_SKY}}
    rules = {"mode": "paper", "patch_px": 64, "min_valid": 0.05}
    prepare(learning.training(tmp_path, sources=[spec], cases=rules))
    assert {sample.number % 4 for sample in open_store(tmp_path / "samples").samples} == {0}  # 80 of 128 px are ground


# -- a killed preparation -------------------------------------------------------------------------------------------


def test_a_killed_preparation_goes_on(folder: Path, tmp_path: Path) -> None:
    process = learning.start(tmp_path, "--prepare")
    first = tmp_path / "samples" / "sim-1000" / DONE
    deadline = time.monotonic() + 900
    while not (first.exists() and first.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]
    with pytest.raises(StoreMismatchError, match="was interrupted; run `cloudgate train --prepare` again"):
        open_store(tmp_path / "samples")
    with first.open("a") as lines:
        lines.write('{"id": "sim-1000/half a li')
    made = prepare(learning.training(tmp_path))
    whole, resumed = open_store(folder / "samples"), open_store(tmp_path / "samples")
    assert resumed.samples == whole.samples
    assert made.samples == len(whole.samples)
    for place in ("sim-1000", "sim-1004"):
        one, other = (zarr.open_group(s.path / place / "arrays.zarr", mode="r") for s in (whole, resumed))
        for name in ("looks", "prior", "hole", "scale"):
            np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]))


def test_a_store_of_another_request_is_refused(folder: Path) -> None:
    with pytest.raises(StoreMismatchError, match="prepared with other seed") as caught:
        prepare(learning.training(folder, seed=5))
    assert caught.value.exit_code == 2
    (folder / "other").mkdir()
    (folder / "other" / "thing.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        prepare(learning.training(folder, store=str(folder / "other")))
    with pytest.raises(ConfigError, match="holds other files"):  # and never removes them
        prepare(learning.training(folder, store=str(folder / "other")), restart=True)
    assert (folder / "other" / "thing.txt").read_text() == "mine"
    with pytest.raises(StoreMismatchError, match="cloudgate train --prepare"):
        open_store(folder / "nowhere")


def test_an_area_without_a_clear_look_says_so(tmp_path: Path) -> None:
    overcast = {"cloud_fraction_mean": [0.95, 0.95], "cloud_fraction_concentration": [200, 200]}
    source = {"name": "grey", "simulate": {"seeds": 1, "size_px": 64, "dates": [6, 6], "vary": overcast}}
    with pytest.raises(NothingClearError, match="source grey: no sample can be cut: no date is clear enough") as caught:
        prepare(learning.training(tmp_path, sources=[source]))
    assert caught.value.exit_code == 1


def test_an_area_smaller_than_a_patch_is_not_blamed_on_the_clouds(tmp_path: Path) -> None:
    cases = {"patch_px": 96, "pastes": 1, "max_looks": 7, "target_max_bad": 0.2}
    with pytest.raises(NothingClearError, match=r"sim: \d+ dates could .* patches of 96 px .* lower cases.patch_px"):
        prepare(learning.training(tmp_path, cases=cases, split={}))


def test_too_few_dates_say_so(small: Any, tmp_path: Path) -> None:
    job = {name: value for name, value in small.fields().items() if name not in ("bands", "target", "method")}
    job["time"] = {"start": "2021-06-11", "end": "2021-06-16"}
    with pytest.raises(NoItemsError, match="2 acquisitions from 2021-06-11 to 2021-06-16 are too few") as caught:
        prepare(learning.training(tmp_path, sources=[{"name": "own", "job": job}]))
    assert caught.value.exit_code == 2


# -- who learns from what -------------------------------------------------------------------------------------------


def assert_apart(samples: tuple[Sample, ...], parts: dict[str, list[int]], *, gap_days: int | None) -> None:
    """No id and no (place, target) serves two parts; by place, no place; by time, no target within the gap."""
    ids = {part: {samples[i].id for i in numbers} for part, numbers in parts.items()}
    targets = {part: {(samples[i].place, samples[i].day) for i in numbers} for part, numbers in parts.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not ids[one] & ids[other]
        assert not targets[one] & targets[other]
        if gap_days is None:
            assert not {place for place, _ in targets[one]} & {place for place, _ in targets[other]}
        else:
            apart = [abs(a - b) for _, a in targets[one] for _, b in targets[other]]
            assert not apart or min(apart) > gap_days


def test_places_are_split_by_their_whole_name(store: Store) -> None:
    parts = split_samples(store.samples, Split(validation=("sim-1003",), test=("sim-1004",)), seed=0)
    assert_apart(store.samples, parts, gap_days=None)
    assert all(parts.values())
    other = {"sim-1003": "sim-1", "sim-1004": "sim-11"}
    renamed = tuple(replace(s, place=other.get(s.place, s.place)) for s in store.samples)
    parts = split_samples(renamed, Split(validation=("sim-1",)), seed=0)
    assert {renamed[i].place for i in parts["validation"]} == {"sim-1"}
    assert "sim-11" in {renamed[i].place for i in parts["train"]}
    with pytest.raises(ConfigError, match="no place 'sim-10'"):
        split_samples(store.samples, Split(validation=("sim-10",)), seed=0)


def test_time_blocks_are_kept_apart(store: Store) -> None:
    days = sorted({sample.day for sample in store.samples})

    def when(day: int) -> date:
        return date.fromordinal(EPOCH.toordinal() + day)

    block = Span(start=when(days[-2]), end=when(days[-1]))
    parts = split_samples(store.samples, Split(validation_time=block, gap_days=6), seed=0)
    assert parts["train"]
    assert parts["validation"]
    assert_apart(store.samples, parts, gap_days=6)
    both = Split(validation_time=block, test_time=Span(start=when(days[0]), end=when(days[0])), gap_days=4)
    parts = split_samples(store.samples, both, seed=0)
    assert parts["test"]
    assert_apart(store.samples, parts, gap_days=4)
    with pytest.raises(ConfigError, match="no sample is left to train on"):
        split_samples(store.samples, Split(validation_time=block, gap_days=400), seed=0)


def test_nothing_named_splits_by_place_or_else_by_time(store: Store) -> None:
    parts = split_samples(store.samples, Split(), seed=0)
    assert len({store.samples[i].place for i in parts["validation"]}) == 1
    assert_apart(store.samples, parts, gap_days=None)
    one = tuple(s for s in store.samples if s.place == "sim-1000")
    parts = split_samples(one, Split(gap_days=3), seed=0)
    assert_apart(one, parts, gap_days=3)
    last = date.fromordinal(EPOCH.toordinal() + max(s.day for s in one))
    parts = split_samples(one, Split(test_time=Span(start=last, end=last), gap_days=3), seed=0)
    assert {one[i].day for i in parts["test"]} == {max(s.day for s in one)}  # and what validates lies before it
    assert_apart(one, parts, gap_days=3)


# -- what is random -------------------------------------------------------------------------------------------------


def test_order_and_augmentation_follow_seed_epoch_and_number(store: Store) -> None:
    fit = Fit()
    one, again = lessons(store, epoch=2, fit=fit), lessons(store, epoch=2, fit=fit)
    assert torch.equal(one.truth, again.truth)
    for other in (lessons(store, epoch=3, fit=fit), lessons(store, epoch=2, seed=1, fit=fit)):
        assert not torch.equal(one.truth, other.truth)
    order = Order(10, 3, seed=4)
    order.epoch = 1
    batches = list(order)
    assert len(batches) == len(order) == 3
    assert len({number for batch in batches for _, number in batch}) == 9
    order.first = 2
    assert list(order) == batches[2:]
    halves = [Order(13, 3, seed=4, rank=rank, world=2) for rank in (0, 1)]
    seen = [number for half in halves for batch in half for _, number in batch]
    assert len(halves[0]) == len(halves[1]) == 2
    assert len(set(seen)) == 12
    exam = [number for rank in (0, 1) for batch in Order(13, 3, seed=None, rank=rank, world=2) for _, number in batch]
    assert sorted(exam) == list(range(13))


def test_an_epoch_can_end_early_and_the_next_draws_anew() -> None:
    order = Order(20, 4, seed=0, most=3)
    assert len(order) == len(list(order)) == 3
    first = {number for batch in order for _, number in batch}
    order.epoch = 1
    assert {number for batch in order for _, number in batch} != first
    assert len(Order(20, 4, seed=None, most=3)) == 5  # examined is everything


def test_flips_move_all_arrays_alike(store: Store) -> None:
    plain, turned = lessons(store), lessons(store, epoch=1, fit=Fit())
    error = (plain.given.prior - plain.truth).abs() * plain.hole
    moved = (turned.given.prior - turned.truth).abs() * turned.hole
    torch.testing.assert_close(error.sum(dim=(1, 2, 3)), moved.sum(dim=(1, 2, 3)))
    assert not torch.equal(error, moved)


def test_shorter_series_are_padded_with_steps_that_do_not_count(store: Store) -> None:
    made = lessons(store).given
    padding = ~made.steps
    assert padding.any()
    assert (made.present[padding] == 0).all()
    assert (made.looks[padding] == 0).all()
