"""The main job: the same bytes whatever the workers, order, shards and kills; seams, periods, bounded flight."""

import json
import re

import numpy as np
import pytest
import xarray as xr
import zarr
from small_region import (
    BANDS,
    CUTS,
    InlineClient,
    SmallRegion,
    SomeWorkers,
    jump,
    objects,
    recipe,
    same_objects,
)

from pipeline import planning, runner
from pipeline.bands import to_reflectance
from pipeline.cluster import connect
from pipeline.config import Cluster
from pipeline.errors import NoItemsError, NothingClearError, StoreMismatchError
from pipeline.grid import Grid
from pipeline.items import EPOCH
from pipeline.layers import FLAGS
from pipeline.mosaic import build, plan
from pipeline.planning import all_tasks
from pipeline.records import RunFolder
from pipeline.request import resolve
from pipeline.scenes import DEMO_TARGET, demo_passes
from pipeline.status import status
from pipeline.store import open_mosaic
from pipeline.tasks import Report, compose_window

LAYERS = {"blue", "green", "red", "nir", "clear_count", "source_date", "flags"}


def one_shard(monkeypatch):
    """Plan tasks of one shard; the sub-block is what it would be."""
    chosen = planning.layout
    monkeypatch.setattr(planning, "layout", lambda recipe, job: ((1, 1), chosen(recipe, job)[1]))


@pytest.fixture
def small_tasks(monkeypatch):
    """One shard a task, so that even a small area is many tasks."""
    one_shard(monkeypatch)


def _part(small: SmallRegion, **changes):
    """Fields of a job on a part of the region: nine shards of 128 px across the tile boundary and the swath edge."""
    return {
        "area": {"bbox": small.bbox((180, 470), (120, 410))},
        "grid": {"crs": "EPSG:32633", "shard_px": 128},
    } | changes


# -- the same bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["median", "linear", "regression"])
def test_order_of_tasks_and_number_of_workers_do_not_change_a_byte(small, tmp_path, monkeypatch, small_tasks, method):
    orders = []
    for workers, seed in ((1, 0), (4, 2)) if method == "regression" else ((1, 0), (2, 1), (4, 2)):
        client = InlineClient(monkeypatch, workers=workers, seed=seed)
        store = tmp_path / f"{workers}.zarr"
        summary = build(job=small.job(store, **_part(small, method={"name": method})), client=client)
        assert summary.periods[0]["published"]
        assert len(client.order) == summary.periods[0]["shards"] == 9
        assert client.peak <= 2 * workers
        orders.append([key.rsplit("-", 1)[0] for key in client.order])
        same_objects(tmp_path / "1.zarr", store)
    assert orders[0] != orders[-1]


def test_worker_processes_give_the_bytes_of_this_process(small, tmp_path, monkeypatch, small_tasks, client):
    build(job=small.job(tmp_path / "here.zarr", **_part(small)), client=InlineClient(monkeypatch))
    monkeypatch.undo()
    one_shard(monkeypatch)
    with connect(Cluster(workers=4), memory_gb_per_worker=2) as four:
        for count, workers in ((1, client), (2, client), (4, four)):
            store = tmp_path / f"{count}.zarr"
            build(job=small.job(store, **_part(small)), client=SomeWorkers(workers, count))
            same_objects(tmp_path / "here.zarr", store)


@pytest.mark.parametrize("method", ["median", "regression"])
def test_shards_of_512_and_2048_hold_the_same_pixels(small, tmp_path, monkeypatch, small_tasks, method):
    for side in (512, 2048):
        job = small.job(
            tmp_path / f"{side}.zarr", grid={"crs": "EPSG:32633", "shard_px": side}, method={"name": method}
        )
        client = InlineClient(monkeypatch, workers=1)
        build(job=job, client=client)
        assert len(client.order) == {512: 4, 2048: 1}[side]
    few, one = (zarr.open_group(str(tmp_path / f"{side}.zarr"), path="0", mode="r") for side in (512, 2048))
    assert few["red"].shards == (1, 512, 512)
    assert one["red"].shards == (1, 2048, 2048)
    assert set(few) == set(one) > LAYERS
    for name in few:
        np.testing.assert_array_equal(few[name][...], one[name][...], err_msg=name)


# -- going on ---------------------------------------------------------------------------------------------------


class Killed(Exception):
    """What ends a run in the middle."""


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(small, tmp_path, monkeypatch, small_tasks):
    whole, store = tmp_path / "whole.zarr", tmp_path / "store.zarr"
    build(job=small.job(whole, **_part(small)), client=InlineClient(monkeypatch))
    job, run = small.job(store, **_part(small)), RunFolder(store)
    begun = []

    def dies_at_the_fifth(recipe, task, *where, **more):
        begun.append(task)
        if len(begun) == 5:
            raise Killed
        return real(recipe, task, *where, **more)

    real = runner.run_task
    monkeypatch.setattr(runner, "run_task", dies_at_the_fifth)
    with pytest.raises(Killed):
        build(job=job, client=InlineClient(monkeypatch))
    assert len(run.done(0)) == 4
    with pytest.raises(StoreMismatchError, match="no finished mosaic"):
        open_mosaic(store=store)
    state = status(store)["periods"][0]
    assert (state["state"], state["shards_done"], state["shards"]) == ("unfinished", 4, 9)

    # What a kill leaves besides: a shard written but not marked, one cut short, and zarr's own partial file.
    done = sorted(run.done(0))
    run.objects.remove(f"{run.period(0)}/done/{done[0][0]}.{done[0][1]}.json")
    shard = store / "0" / "red" / "c" / "0" / str(done[0][0]) / str(done[0][1])
    shard.write_bytes(shard.read_bytes()[:100])
    shard.with_suffix(".3f0c.partial").write_bytes(b"cut short")
    begun.clear()
    begun += [None] * 10  # counts on, dies no more
    build(job=job, client=InlineClient(monkeypatch, seed=5))
    assert len(begun) == 10 + 6
    same_objects(whole, store)

    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    summary = build(job=job, client=InlineClient(monkeypatch))
    assert summary.periods[0]["message"] == "finished before"
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    assert status(store)["periods"][0]["state"] == "finished"


def test_a_store_of_another_request_is_refused_until_restart(small, tmp_path, monkeypatch):
    store = tmp_path / "store.zarr"
    build(job=small.job(store, **_part(small)), client=InlineClient(monkeypatch))
    before = objects(store)
    other = small.job(store, **_part(small, method={"name": "mean"}))
    with pytest.raises(StoreMismatchError, match=r"(?s)method: .*median.* there, .*mean.* now.*--out.*--restart"):
        build(job=other, client=InlineClient(monkeypatch))
    assert objects(store) == before
    # what never matters: workers, limits, the job's name
    same = small.job(store, **_part(small, name="other", cluster={"workers": 7}, limits={"memory_gb_per_worker": 9}))
    assert build(job=same, client=InlineClient(monkeypatch)).periods[0]["message"] == "finished before"
    build(job=other, client=InlineClient(monkeypatch), restart=True)
    assert open_mosaic(store=store).attrs["cloudgate"]["periods"]["0"]["method"]["name"] == "mean"


def test_a_restart_whose_search_fails_keeps_the_old_store(small, tmp_path, monkeypatch):
    store = tmp_path / "store.zarr"
    build(job=small.job(store, **_part(small)), client=InlineClient(monkeypatch))
    before = objects(store)
    nothing = small.job(store, **_part(small, time={"start": "1999-01-01", "end": "1999-02-01"}, target=None))
    with pytest.raises(NoItemsError):
        build(job=nothing, client=InlineClient(monkeypatch), restart=True)
    assert objects(store) == before
    assert RunFolder(store).exists()


def test_a_moved_folder_is_still_the_same_request(small, tmp_path, monkeypatch):
    """Paths never matter: the frozen scenes decide. Another catalog in another place is another request."""
    store = tmp_path / "store.zarr"
    build(job=small.job(store, **_part(small)), client=InlineClient(monkeypatch))
    moved = tmp_path / "moved.json"
    moved.write_bytes(small.items.read_bytes())
    again = small.job(store, **_part(small, catalog=str(moved)))
    assert build(job=again, client=InlineClient(monkeypatch)).periods[0]["message"] == "finished before"
    other = small.changed_items(tmp_path / "other.json", lambda features: features[1:])
    with pytest.raises(StoreMismatchError, match="catalog: "):
        build(job=small.job(store, **_part(small, catalog=str(other))), client=InlineClient(monkeypatch))


def test_another_polygon_under_the_same_path_is_another_request(small, tmp_path, monkeypatch):
    outline = tmp_path / "area.geojson"
    store = tmp_path / "store.zarr"

    def polygon(cols):
        west, south, east, north = small.bbox((200, 300), cols)
        ring = [[west, south], [east, south], [east, north], [west, south]]
        outline.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))

    polygon((200, 300))
    job = small.job(store, **_part(small, area={"geojson": str(outline)}))
    build(job=job, client=InlineClient(monkeypatch))
    flags = open_mosaic(store=store)["flags"].values
    outside = (flags & FLAGS["outside_area"]) > 0
    assert 0.4 < outside.mean() < 0.6
    assert ((flags[outside] & FLAGS["no_data"]) > 0).all()
    assert build(job=job, client=InlineClient(monkeypatch)).periods[0]["message"] == "finished before"
    polygon((200, 320))
    with pytest.raises(StoreMismatchError, match="area"):
        build(job=job, client=InlineClient(monkeypatch))


# -- what comes out ---------------------------------------------------------------------------------------------


def test_the_store_says_what_it_is(small, tmp_path, monkeypatch):
    store = tmp_path / "store.zarr"
    summary = build(
        job=small.job(store, **_part(small, method={"name": "regression"})), client=InlineClient(monkeypatch)
    )
    made, plain = open_mosaic(store=store), xr.open_zarr(store, group="0")
    assert set(made.data_vars) == LAYERS | {f"uncertainty_{band}" for band in ("blue", "green", "red", "nir")}
    assert made.sizes == {"time": 1, "y": made.sizes["y"], "x": made.sizes["x"]}
    assert made["time"].values == np.datetime64(DEMO_TARGET)
    # time_bnds are the first day and the end of the last
    bounds = plain["time_bnds"].values.astype("datetime64[D]")
    np.testing.assert_array_equal(bounds, np.array([["2021-06-11", "2021-08-09"]], "datetime64[D]"))
    facts = made.attrs["cloudgate"]["periods"]["0"]
    assert re.fullmatch("[0-9a-f]{64}", facts["items_digest"])
    assert facts["items"] == 32  # 33 less the duplicate
    assert facts["anchors"][0].startswith(DEMO_TARGET.isoformat())
    assert "small" not in json.dumps(made.attrs)
    assert str(small.folder) not in "".join(str(p.read_bytes()) for p in store.rglob("zarr.json"))

    values, flags = made["red"].values[0], made["flags"].values[0]
    observed = (flags & FLAGS["observed_at_anchor"]) > 0
    none = (flags & FLAGS["no_data"]) > 0
    composed = (flags & FLAGS["composed_in_time"]) > 0
    np.testing.assert_array_equal(none, np.isnan(values))
    np.testing.assert_array_equal(observed.astype(int) + composed + none, 1)
    assert summary.periods[0]["unfilled"] == none.sum()
    assert summary.periods[0]["filled"] == (~none).sum()
    shown = made["source_date"].values[0]
    assert set(np.unique(shown[observed]).astype("datetime64[D]").astype(str)) == {a[:10] for a in facts["anchors"]}
    assert (np.isnat(shown) == none).all()
    sigma = made["uncertainty_red"].values[0]
    assert np.isfinite(sigma[composed]).mean() > 0.95
    assert np.isnan(sigma[observed]).all()
    assert 0.0005 < np.nanmedian(sigma) < 0.05


@pytest.mark.parametrize("method", ["median", "regression"])
def test_no_seam_where_two_tiles_meet(small, method):
    """The jump across a tile's edge is what the ground itself has there: a clear look of the target's pass."""
    _, _, made = recipe(small.job(method={"name": method}))
    block = compose_window(made, (0, made.grid.height), (0, made.grid.width))
    rows = slice(made.grid.row0 - small.grid.row0, made.grid.row0 - small.grid.row0 + made.grid.height)
    cols = slice(made.grid.col0 - small.grid.col0, made.grid.col0 - small.grid.col0 + made.grid.width)
    pass_of_target = [one.acquisition.day for one in demo_passes()].index((DEMO_TARGET - EPOCH).days)
    ground = small.region.observe(pass_of_target, BANDS, cloudy=False).reflectance
    values = to_reflectance(block.codes)
    for edge in (CUTS[1].row - rows.start, CUTS[0].height - rows.start):  # the southern tile's top, the northern's end
        for number, band in enumerate(BANDS):
            look = ground[band][rows, cols]
            known = np.isfinite(values[number]) & np.isfinite(look)
            natural = np.divide(*jump(look, edge, known))
            ratio = np.divide(*jump(values[number], edge, known)) / natural
            assert ratio <= 1.1, (edge, band)
            stepped = values[number] + np.where(np.arange(len(look)) >= edge, 0.03, 0)[:, None]
            assert np.divide(*jump(stepped, edge, known)) / natural > 1.1, "a step of 0.03 would be seen"


# -- periods ----------------------------------------------------------------------------------------------------


def test_an_empty_period_keeps_its_slot_and_the_others_are_published(small, tmp_path, monkeypatch):
    store = tmp_path / "months.zarr"
    fields = _part(small, target="middle", time={"start": "2021-05-01", "end": "2021-08-31", "every": "month"})

    def no_july(features):
        return [f for f in features if "-07-" not in f["properties"]["datetime"]]

    items = small.changed_items(tmp_path / "items.json", no_july)
    job = small.job(store, **fields | {"catalog": str(items)})
    summary = build(job=job, client=InlineClient(monkeypatch))
    assert [p["published"] for p in summary.periods] == [False, True, False, True]
    assert [p["slot"] for p in summary.periods] == [0, 1, 2, 3]
    assert "no scene from 2021-05-01 to 2021-05-31" in summary.periods[0]["message"]
    made = open_mosaic(store=store)
    targets = np.array(["2021-06-15", "2021-08-16"], "datetime64[D]")
    np.testing.assert_array_equal(made["time"].values.astype("datetime64[D]"), targets)
    assert np.isfinite(made["red"].values).mean(axis=(1, 2)).min() > 0.8
    raw = zarr.open_group(str(store), path="0", mode="r")
    np.testing.assert_array_equal(raw["published"][:], [0, 1, 0, 1])
    assert raw["red"].shape[0] == 4
    assert not raw["red"][0].any()
    assert not raw["red"][2].any()
    states = [p["state"] for p in status(store)["periods"]]
    assert states == ["empty", "finished", "empty", "finished"]
    # each published slot is what a job of that month alone would hold
    alone = tmp_path / "june.zarr"
    june = fields | {"time": {"start": "2021-06-01", "end": "2021-06-30"}, "catalog": str(items)}
    build(job=small.job(alone, **june), client=InlineClient(monkeypatch))
    single = zarr.open_group(str(alone), path="0", mode="r")
    for name in LAYERS:
        np.testing.assert_array_equal(raw[name][1], single[name][0], err_msg=name)


def test_a_clouded_period_stays_empty_and_a_clouded_job_publishes_nothing(small, tmp_path, monkeypatch):
    clouded = _part(small, mask={"asset": "scl", "cloud": list(range(1, 12))}, offset_dn=0)
    store = tmp_path / "clouded.zarr"
    job = small.job(store, **clouded)
    with pytest.raises(NothingClearError, match=r"all \d+ acquisitions are clouded; widen time"):
        build(job=job, client=InlineClient(monkeypatch))
    with pytest.raises(StoreMismatchError, match="no finished mosaic"):
        open_mosaic(store=store)
    # nothing was made, so another request may take the place
    build(job=small.job(store, **_part(small)), client=InlineClient(monkeypatch))
    assert open_mosaic(store=store).sizes["time"] == 1
    months = clouded | {"target": "middle", "time": {"start": "2021-06-01", "end": "2021-08-31", "every": "month"}}
    with pytest.raises(NothingClearError, match="nothing was published"):
        build(job=small.job(tmp_path / "months.zarr", **months), client=InlineClient(monkeypatch))


# -- plans and size ---------------------------------------------------------------------------------------------


def test_a_plan_says_what_the_run_then_does_and_writes_nothing(small, tmp_path, monkeypatch):
    store = tmp_path / "store.zarr"
    job = small.job(store, **_part(small, method={"name": "linear"}))
    planned = plan(job=job)
    assert not list(tmp_path.iterdir())
    entry = planned.periods[0]
    summary = build(job=job, client=InlineClient(monkeypatch))
    made = summary.periods[0]
    assert entry["shards"] == made["shards"]
    assert entry["scenes"] == made["scenes"] == 32
    assert entry["anchors"] == made["anchors"]
    assert entry["peak_memory_gb"] < job.limits.memory_gb_per_worker
    assert "2021-07-09_sentinel-2a_R122" in [layer["id"] for layer in entry["layers"] if layer["fails"]]
    unscouted = plan(job=job, scouting=False)
    assert unscouted.periods[0]["tasks"] == entry["tasks"]
    assert unscouted.estimate is None


@pytest.mark.parametrize("method", ["median", "regression"])
def test_a_plan_tells_how_long_the_job_takes(method, small, tmp_path, monkeypatch, small_tasks):
    """From a part that is composed on the spot; from what its tasks took, once some are done; nothing in the end."""
    store = tmp_path / "store.zarr"
    area = {"bbox": small.bbox((100, 355), (100, 355))}
    job = small.job(store, **_part(small, area=area, method={"name": method}))
    found = plan(job=job).estimate
    assert 0 < found["periods"][0] < found["seconds"] < 600
    assert "px read, composed and written here" in found["basis"]
    assert plan(job=job, calibrate=False).estimate is None
    if method == "regression":
        return
    build(job=job, client=InlineClient(monkeypatch))
    run = RunFolder(store)
    done = sorted(run.done(0))
    assert plan(job=job).estimate == {"seconds": 0.0, "workers": 2, "basis": "all tasks are done", "periods": {}}
    for row, col in done[1:]:
        run.objects.remove(f"{run.period(0)}/done/{row}.{col}.json")
    run.mark(0, done[0], {"seconds": 100.0, "write_seconds": 10.0})
    half = plan(job=job).estimate
    assert half["basis"] == f"1 tasks of {store}.run, 100.0 s each"
    rounds = np.ceil((len(done) - 1) / 2)
    assert half["periods"][0] == pytest.approx(rounds * (100 + 7), rel=0.4)  # shards at the edge are smaller
    other = plan(job=small.job(store, **_part(small, area=area, method={"name": "mean"}))).estimate
    assert "here" in other["basis"]


def test_a_finished_store_needs_no_cluster(small, tmp_path, monkeypatch):
    job = small.job(tmp_path / "store.zarr", **_part(small, bands=["red"]))
    build(job=job, client=InlineClient(monkeypatch))
    gone = job.model_copy(update={"cluster": Cluster(kind="address", address="tcp://127.0.0.1:9", wait_s=1)})
    assert build(job=gone).periods[0]["message"] == "finished before"


def test_ten_thousand_tasks_are_never_in_flight_at_once(small, tmp_path, monkeypatch):
    request = resolve(small.job(tmp_path / "huge.zarr"))
    huge = Grid(request.grid.crs, 10.0, (0.0, 0.0), request.grid.row0, request.grid.col0, 100 * 2048, 100 * 2048)
    tasks = all_tasks(huge, (1, 1))
    assert len(tasks) == 10_000
    assert sum((t.rows[1] - t.rows[0]) * (t.cols[1] - t.cols[0]) for t in tasks) == huge.height * huge.width
    assert len({shard for t in tasks for shard in t.shards}) == 10_000
    client = InlineClient(monkeypatch, workers=3, seed=1)
    monkeypatch.setattr(runner, "run_task", lambda recipe, task, path, slot, **more: Report(task, reads=1))
    marked = []

    class Run:
        """Keeps marks in memory."""

        def fence(self, slot):
            """No records."""

        def mark(self, slot, shard, facts):
            """One more."""
            marked.append(shard)

    runner.run_tasks(None, tasks, 0, runner.RunContext(tmp_path, Run(), lambda: client))
    assert client.peak == 6
    assert sorted(marked) == [(i, j) for i in range(100) for j in range(100)]


def test_every_task_s_facts_are_kept_once(small, tmp_path, monkeypatch):
    store = tmp_path / "store.zarr"
    summary = build(job=small.job(store, **_part(small)), client=InlineClient(monkeypatch))
    marks, made = RunFolder(store).marks(0), open_mosaic(store=store)
    assert len(marks) == 9
    assert sum(mark.get("reads", 0) for mark in marks) == summary.periods[0]["reads"] > 100
    assert summary.periods[0]["filled"] + summary.periods[0]["unfilled"] == made["flags"].size
