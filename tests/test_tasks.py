"""One task: what is written is what is composed, however it is cut; failed reads are flagged, never hidden."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import zarr
from small_region import HEIGHT, WIDTH, layers_equal, recipe

from pipeline.block import NO_DATA, OUTSIDE, READ_FAILED, Layers
from pipeline.errors import ReadError
from pipeline.grid import Grid
from pipeline.items import Item
from pipeline.looks import Looks, LookStream
from pipeline.outlines import extent
from pipeline.periods import Period
from pipeline.planning import STREAMING_GB, USABLE, peak_bytes, plan_tasks
from pipeline.read_pool import ReadPool
from pipeline.recipe import Recipe
from pipeline.scout import Scouted
from pipeline.store import publish
from pipeline.tasks import Task, _compose, compose_window, run_task

METHODS = ("median", "linear", "kalman", "regression")


@pytest.fixture(scope="module")
def whole(small):
    """Per method: job, scout's record, recipe and the whole area composed at once."""
    made = {}
    for name in METHODS:
        job = small.job(method={"name": name})
        _, seen, asked = recipe(job)
        made[name] = job, seen, asked, compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_part_of_the_area_has_the_bytes_of_the_whole(small, whole, name):
    """Given the same anchors: another area, with its own search and grid, and windows of the same grid."""
    _, seen, asked, all_of_it = whole[name]
    job = small.job(method={"name": name}, area={"bbox": small.bbox((170, 437), (101, 388))})
    _, own, part = recipe(job, seen)
    assert own is seen
    assert part.grid.shape < asked.grid.shape
    top, left = part.grid.row0 - asked.grid.row0, part.grid.col0 - asked.grid.col0
    assert min(top, left) > 50
    there = slice(top, top + part.grid.height), slice(left, left + part.grid.width)
    layers_equal(all_of_it, compose_window(part, (0, part.grid.height), (0, part.grid.width)), *there)
    corner = compose_window(asked, (asked.grid.height - 65, asked.grid.height), (3, 90))
    layers_equal(all_of_it, corner, slice(-65, None), slice(3, 90))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_task_writes_is_what_is_composed(whole, tmp_path, name):
    """Streamed in sub-blocks under a small memory, in three tasks, into 256 px shards."""
    job, _, asked, all_of_it = whole[name]
    asked = replace(asked, grid=replace(asked.grid, shard_px=256))
    height, width = asked.grid.shape
    for rows, cols in (((0, 256), (0, width)), ((256, height), (0, 512)), ((256, height), (512, width))):
        shards = tuple((r // 256, c // 256) for r in range(rows[0], rows[1], 256) for c in range(cols[0], cols[1], 256))
        report = run_task(asked, Task(rows, cols, shards), str(tmp_path / "m.zarr"), 0)
        assert report.filled + report.unfilled == (rows[1] - rows[0]) * (cols[1] - cols[0])
        assert report.reads > 0
        assert report.bytes_read > 1000
        assert not report.failures
    days = Period(0, 18789, 18847, 18789, asked.target)
    uncertain = name in ("kalman", "regression")
    publish(
        tmp_path / "m.zarr", asked.grid, job.bands, uncertainty=uncertain, schedule=[days], published=[True], attrs={}
    )
    store = zarr.open_group(str(tmp_path / "m.zarr"), path="0", mode="r")
    for number, band in enumerate(job.bands):
        np.testing.assert_array_equal(store[band][0], all_of_it.codes[number])
        if uncertain:
            np.testing.assert_array_equal(store[f"uncertainty_{band}"][0], all_of_it.sigma[number])
    for layer in ("clear_count", "source_date", "flags"):
        np.testing.assert_array_equal(store[layer][0], getattr(all_of_it, layer))


@pytest.mark.parametrize(("name", "cut"), [("median", (96, 64)), ("regression", (320, 160))])
def test_reading_ahead_does_not_matter(whole, name, cut):
    """Without it a sub-block takes its neighbour's columns inside the one array that both lie in."""
    _, _, asked, all_of_it = whole[name]
    cut = replace(asked, cut_px=cut, ahead=False)
    with ReadPool(threads=2, ahead=100) as pool:
        for looks in LookStream(cut, (0, asked.grid.height), (0, asked.grid.width), pool):
            there = (slice(*looks.rows), slice(*looks.cols))
            layers_equal(all_of_it, _compose(cut, looks), *there)


def test_reading_ahead_is_given_up_where_that_saves_more_reading(whole):
    """60 dates and an ever smaller limit: nothing is refused that would fit without it."""
    job, _, asked, _ = whole["regression"]
    looks = (asked.acquisitions * 60)[:60]
    asked = replace(asked, grid=replace(asked.grid, height=4096, width=4096, shard_px=2048), acquisitions=looks)

    def planned(limit_gb: float) -> tuple[Recipe, int]:
        limits = job.limits.model_copy(update={"memory_gb_per_worker": limit_gb})
        cut, tasks = plan_tasks(asked, job.model_copy(update={"limits": limits}))
        assert peak_bytes(cut, (tasks[0].rows[1], tasks[0].cols[1])) <= USABLE * limit_gb * 1e9
        return cut, tasks[0].cols[1]

    cuts, widths = zip(*(planned(limit) for limit in (16, 8, 4, 2, 1.6)), strict=True)
    assert (cuts[0].ahead, cuts[-1].ahead) == (True, False)
    assert (widths[0], widths[-1]) == (4096, 2048)  # nor are tasks made wider that take long as they are
    sizes = [math.prod(cut.cut_px) for cut in cuts]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("size", "shard_px", "workers", "shape"),
    [
        ((1024, 1024), 512, 1, (1024, 1024)),
        ((1024, 1024), 512, 2, (512, 1024)),
        ((1024, 1024), 512, 4, (512, 512)),
        ((1024, 1024), 512, 99, (512, 512)),
        ((1000, 1900), 100, 2, (1000, 1000)),
        ((1000, 1900), 100, 3, (500, 1000)),
        ((700, 300), 64, 8, (704, 320)),
        ((4096, 4096), 2048, 8, (2048, 2048)),
    ],
)
def test_no_worker_is_idle_while_a_task_can_be_parted(whole, size, shard_px, workers, shape):
    job, _, asked, _ = whole["median"]
    asked = replace(asked, grid=replace(asked.grid, height=size[0], width=size[1], shard_px=shard_px))
    cluster = job.cluster.model_copy(update={"workers": workers})
    _, tasks = plan_tasks(asked, job.model_copy(update={"cluster": cluster}))
    assert tasks[0].rows[1] == min(shape[0], size[0])
    assert tasks[0].cols[1] == min(shape[1], size[1])


@pytest.mark.parametrize("name", ["mean", "linear"])
def test_memory_of_streaming_methods_does_not_follow_the_dates(whole, name):
    job, _, asked, _ = whole["median"]
    grid = replace(asked.grid, height=8192, width=8192, shard_px=2048)

    def planned(name: str, dates: int) -> tuple[float, Recipe]:
        looks = (asked.acquisitions * dates)[:dates]
        method = asked.method.model_copy(update={"name": name})
        cut, tasks = plan_tasks(replace(asked, grid=grid, method=method, acquisitions=looks, anchors=None), job)
        return peak_bytes(cut, (tasks[0].rows[1], tasks[0].cols[1])), cut

    steady = USABLE * 1e9 * (STREAMING_GB[0] + STREAMING_GB[1] * len(asked.bands))
    assert all(planned(name, dates)[0] <= steady for dates in (12, 30, 60, 120, 365))
    assert planned(name, 60)[1].cut_px == (1024, 1024)  # no block of the files is cut
    assert planned("median", 60)[0] > steady  # which the limit allows


def test_the_tasks_of_a_plan_cover_the_grid_once_and_skip_what_is_done(whole):
    job, _, asked, _ = whole["median"]
    asked = replace(asked, grid=replace(asked.grid, shard_px=128))
    _, tasks = plan_tasks(asked, job)
    covered = np.zeros(asked.grid.shape, int)
    for task in tasks:
        covered[slice(*task.rows), slice(*task.cols)] += 1
    assert (covered == 1).all()
    every = {shard for task in tasks for shard in task.shards}
    assert every == set(asked.grid.shards())
    assert plan_tasks(asked, job, done=every)[1] == []
    _, left = plan_tasks(asked, job, done=every - {(4, 2)})
    assert [shard for task in left for shard in task.shards if shard == (4, 2)] == [(4, 2)]


def test_a_read_that_fails_is_flagged_and_reported(small, whole, tmp_path):
    """One file cut in half: the look is gone where it lay, the rest is as before."""
    name = "2021/6/S2A_33TWL_20210619_0_L2A"
    broken = {}

    def cut_short(features):
        for feature in features:
            if feature["id"] in name:
                source, target = Path(feature["assets"]["red"]["href"]), tmp_path / "B04.tif"
                target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
                feature["assets"]["red"]["href"] = str(target)
                broken.update(feature)
        return features

    job = small.job(catalog=str(small.changed_items(tmp_path / "items.json", cut_short)))
    _, seen, _, all_of_it = whole["median"]
    _, _, asked = recipe(job, seen)
    assert broken
    with pytest.raises(ReadError, match=r"reads failed, the first: S2A_33TWL_20210619_0_L2A red: .*B04\.tif"):
        compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    report = run_task(
        asked, Task((0, asked.grid.height), (0, asked.grid.width), ((0, 0),)), str(tmp_path / "m.zarr"), 0
    )
    assert {(item, band) for item, band, _ in report.failures} == {("S2A_33TWL_20210619_0_L2A", "red")}
    publish(
        tmp_path / "m.zarr",
        asked.grid,
        job.bands,
        uncertainty=False,
        schedule=[Period(0, 18789, 18847, 18789, asked.target)],
        published=[True],
        attrs={},
    )
    store = zarr.open_group(str(tmp_path / "m.zarr"), path="0", mode="r")
    failed = (store["flags"][0] & READ_FAILED) > 0
    south = np.arange(asked.grid.height) + asked.grid.row0 - small.grid.row0 >= 240  # where 33TWL lies
    assert failed.any()
    assert not failed[~south].any()
    counts, before = store["clear_count"][0].astype(int), all_of_it.clear_count.astype(int)
    # one look less; the temporal check, which compares dates, may judge a few others anew
    assert (counts[failed] <= before[failed]).mean() > 0.99
    assert (counts[failed] < before[failed]).mean() > 0.5
    same = ~failed & (counts == before)
    assert same[~south].mean() > 0.99
    np.testing.assert_array_equal(store["red"][0][same], all_of_it.codes[2][same])


def _streamed(asked: Recipe, rows: tuple[int, int], cols: tuple[int, int]) -> list[tuple[Looks, Layers]]:
    """The sub-blocks of a window and what is composed of them, whatever reads fail."""
    with ReadPool(threads=2, ahead=100) as pool:
        return [(replace(looks, codes=None), _compose(asked, looks)) for looks in LookStream(asked, rows, cols, pool)]


def _clearest(seen: Scouted, asked: Recipe) -> int:
    """The layer of two scenes that shows most."""
    both = [number for number, layer in enumerate(asked.acquisitions) if len(layer.items) == 2]
    return max(both, key=lambda number: seen.layers[number].clear_share)


@pytest.mark.parametrize("name", ["median", "regression"])
def test_where_a_scene_fails_its_neighbour_of_the_same_pass_serves(whole, name):
    """The scene shows nothing, so it hides nothing: as if it were not there; what the neighbour shows is no fault."""
    _, seen, asked, _ = whole[name]
    layer = _clearest(seen, asked)
    south, north = asked.acquisitions[layer].items
    assert (south.tile, north.tile) == ("33TWL", "33TWM")
    gone = replace(south, assets={**south.assets, "red": replace(south.assets["red"], href="/nowhere.tif")})

    def with_items(*items: Item) -> Recipe:
        passes = list(asked.acquisitions)
        passes[layer] = replace(passes[layer], items=items)
        # all of the southern scene is cloud, which would grow over its neighbour
        return replace(asked, acquisitions=tuple(passes), clouded=frozenset({south.id}), cut_px=(180, 75))

    rows, cols = (200, 380), (100, 250)
    failed, served = np.zeros((2, 600, 600), bool)
    alone, broken = (_streamed(with_items(*items), rows, cols) for items in ((north,), (gone, north)))
    for (looks, wanted), (_, got) in zip(alone, broken, strict=True):
        there = slice(*looks.rows), slice(*looks.cols)
        failed[there] = (got.flags & READ_FAILED) > 0
        inner = tuple(slice(asked.halo, size - asked.halo) for size in looks.fine.shape)
        served[there] = looks.clear[layer][inner]
        layers_equal(wanted, replace(got, flags=got.flags & ~np.uint16(READ_FAILED)))
    window = slice(*rows), slice(*cols)
    lies = extent(south.assets["red"], asked.grid)[window]
    failed, served = failed[window], served[window]
    assert not failed[~lies].any()
    assert not failed[served].any()
    assert (failed | served)[lies].mean() > 0.99  # but for what the comparison of dates calls
    assert 0.2 < served[lies].mean() < 0.8


def test_a_sub_block_that_loses_a_scene_keeps_none_of_it_from_its_neighbour(whole):
    """The columns it shares with a neighbour that read the scene would stand under a mask that knows it no more."""
    _, seen, asked, _ = whole["regression"]
    layer = _clearest(seen, asked)
    south = asked.acquisitions[layer].items[0].assets["red"]
    rows, cols = (200, 380), (100, 250)
    reach = cols[0] + 75 + asked.halo  # of the left sub-block

    class Failing(ReadPool):
        def submit_codes(self, asset, grid, offset_dn, out):
            def work():
                raise ReadError("made to fail")

            beyond = grid.col0 + grid.width > asked.grid.col0 + reach
            return (
                self.queue(asset, work)
                if asset is south and beyond
                else super().submit_codes(asset, grid, offset_dn, out)
            )

    def second(first_col: int) -> tuple[np.ndarray, int]:
        with Failing(threads=2, ahead=100) as pool:
            stream = LookStream(replace(asked, cut_px=(180, 75)), rows, (first_col, cols[1]), pool)
            return [looks.codes[layer].copy() for looks in stream][-1], len(stream.failures)

    streamed, told = second(cols[0])
    alone, _ = second(cols[0] + 75)
    assert told == 1
    np.testing.assert_array_equal(streamed, alone)


@pytest.mark.parametrize(("block", "cols"), [("0_0", (260, 520)), ("1_0", (0, 260))])
def test_what_a_sub_block_could_not_read_its_neighbour_does_not_pass_on(small, tmp_path, block, cols):
    """Sub-blocks share a margin; where either one failed, each must answer as it would alone."""
    more = {"method": {"name": "regression"}, "mask": {"temporal_check": False}}
    _, seen, asked = recipe(small.job(**more))
    struck = asked.acquisitions[_clearest(seen, asked)].items[1].id

    def spoil(features):
        (asset,) = (feature["assets"]["red"] for feature in features if feature["id"] == struck)
        data = bytearray(Path(asset["href"]).read_bytes())
        with rasterio.open(asset["href"]) as dataset:
            names = [f"BLOCK_{what}_{block}" for what in ("OFFSET", "SIZE")]
            start, size = (int(dataset.get_tag_item(name, "TIFF", bidx=1)) for name in names)
        data[start : start + size] = bytes(size)
        (tmp_path / "B04.tif").write_bytes(data)
        asset["href"] = str(tmp_path / "B04.tif")
        return features

    _, _, spoilt = recipe(small.job(**more, catalog=str(small.changed_items(tmp_path / "items.json", spoil))), seen)
    rows = (20, 60)
    both = (_streamed(replace(each, cut_px=(64, 128)), rows, cols) for each in (asked, spoilt))
    fewer = flagged = 0
    for (looks, before), (_, after) in zip(*both, strict=True):
        (itself,) = _streamed(replace(spoilt, cut_px=(64, 128)), looks.rows, looks.cols)
        layers_equal(itself[1], after)
        lost = after.clear_count < before.clear_count
        failed = (after.flags & READ_FAILED) > 0
        assert not (lost & ~failed).any(), looks.cols
        fewer, flagged = fewer + int(lost.sum()), flagged + int(failed.sum())
    assert 0 < fewer <= flagged


def test_a_scene_that_only_the_scout_failed_to_read_is_not_guessed_at(small, whole, tmp_path):
    """Its pixels would have to say whether the +1000 is inside: read with a guess, they would be wrong by 0.1."""
    job, seen, *_ = whole["median"]
    (name,) = [name for name, (dn, _) in seen.offsets.items() if dn and "33TWL" in name]
    unread = replace(seen, offsets={k: v for k, v in seen.offsets.items() if k != name}, unread={name: "stalled"})
    _, _, asked = recipe(job, unread)
    rows, cols = (300, 400), (100, 200)
    with pytest.raises(ReadError, match=f"{name} offset: the scout could not read it.*stalled"):
        compose_window(asked, rows, cols)
    report = run_task(asked, Task((0, asked.grid.height), (0, asked.grid.width), ((0, 0),)), str(tmp_path / "m"), 0)
    assert {item for item, _, _ in report.failures} == {name}


def test_a_scene_too_clouded_to_know_its_offset_is_cloud(whole):
    job, seen, asked, block = whole["median"]
    (name,) = [name for name, (dn, _) in seen.offsets.items() if dn and "33TWL" in name]
    _, _, hidden = recipe(job, replace(seen, clouded=(name,)))
    rows, cols = (0, asked.grid.height), (0, asked.grid.width)
    other = compose_window(hidden, rows, cols)
    fewer = block.clear_count.astype(int) - other.clear_count
    assert (fewer >= 0).mean() > 0.99  # the temporal check may judge a few others anew
    assert (fewer > 0).sum() > 1000


def test_outside_a_polygon_is_no_data_and_says_so(small, tmp_path):
    west, south, east, north = small.bbox((200, 400), (100, 400))
    ring = [[west, south], [east, south], [west, north], [west, south]]
    (tmp_path / "area.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    _, _, asked = recipe(small.job(area={"geojson": str(tmp_path / "area.geojson")}, method={"name": "regression"}))
    block = compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    outside = (block.flags & OUTSIDE) > 0
    assert 0.45 < outside.mean() < 0.55
    assert outside[20, -20]
    assert not outside[-20, 20]
    assert (block.flags[outside] == OUTSIDE | NO_DATA).all()
    assert not block.codes[:, outside].any()
    assert (block.sigma[:, outside] == 65535).all()
    assert (block.codes[:, ~outside] != 0).mean() > 0.9


def test_the_fixture_is_what_these_tests_think(small):
    assert small.grid == Grid("EPSG:32633", 10.0, (0.0, 0.0), -510240, 49998, HEIGHT, WIDTH)


def test_a_window_of_a_polygon_is_that_of_the_whole(whole):
    asked = whole["median"][2]
    inside = np.random.default_rng(0).random(asked.grid.shape) < 0.5
    drawn = replace(asked, inside=np.packbits(inside, axis=1))
    for rows, cols in (((0, 9), (0, 8)), ((3, 50), (5, 77)), ((1, 2), (asked.grid.width - 3, asked.grid.width))):
        np.testing.assert_array_equal(drawn.area(rows, cols), inside[slice(*rows), slice(*cols)])
