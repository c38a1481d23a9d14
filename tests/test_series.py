"""A series is built period by period: a period is of one recipe, whatever changed or was killed between."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from small_region import InlineClient, SmallRegion, objects, same_objects
from typer.testing import CliRunner

from pipeline import mosaic, runner
from pipeline.cli import app
from pipeline.config import Job
from pipeline.errors import NothingClearError, StoreError, StoreMismatchError
from pipeline.flight import Orders
from pipeline.mosaic import build
from pipeline.objects import objects_at
from pipeline.records import RunFolder
from pipeline.status import status
from pipeline.store import open_mosaic
from pipeline.view_pixel import frozen_request
from pipeline.view_store import ViewStore


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_in(monkeypatch: pytest.MonkeyPatch, owner: Any, step: str) -> Iterator[None]:
    """The process ends when it comes to this step."""

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, kill)
        with pytest.raises(Killed):
            yield


@pytest.fixture
def series(small: SmallRegion, tmp_path: Path):
    """A job of ten-day periods on a corner of the region, with these changes."""

    def job(store: str = "m.zarr", *, method: str = "median", **changes: Any) -> Job:
        place = store.removeprefix("icechunk:")
        where = store.removesuffix(place) + str(tmp_path / place)
        fields = {"area": {"bbox": small.bbox((40, 160), (120, 240))}, "bands": ["blue"], "offset_dn": 0}
        fields |= {"grid": {"crs": "EPSG:32633", "shard_px": 128}, "method": {"name": method}}
        fields |= {"time": {"start": "2021-06-11", "end": "2021-07-10", "every": "10 days"}}
        fields |= {"target": "middle"} | changes
        return small.job(**fields, output={"store": where, "overviews": False})

    return job


def test_a_half_built_period_of_another_recipe_is_begun_again(series, monkeypatch, tmp_path):
    client = InlineClient(monkeypatch)
    with killed_in(monkeypatch, mosaic, "publish_period"):
        build(job=series(), slots=[0], client=client)
    assert RunFolder(tmp_path / "m.zarr").done(0)  # shards of the median
    build(job=series(method="p25"), slots=[0], client=client)
    build(job=series("fresh.zarr", method="p25"), slots=[0], client=client)
    same_objects(tmp_path / "m.zarr", tmp_path / "fresh.zarr")
    with killed_in(monkeypatch, mosaic, "publish_period"):
        build(job=series(), slots=[1], client=client)
    ran = len(client.order)
    build(job=series(), slots=[1], client=client)
    assert len(client.order) == ran  # of the same recipe it goes on
    assert build(job=series(), slots=[0], client=client).periods[0]["message"] == "finished before"  # and stays


def test_the_dates_of_other_periods_stay_when_the_target_changes(series, monkeypatch, tmp_path):
    client = InlineClient(monkeypatch)
    build(job=series(), slots=[0], client=client)
    build(job=series(target="end"), slots=[1], client=client)
    shown = open_mosaic(store=tmp_path / "m.zarr")
    assert [str(day)[:10] for day in shown["time"].values] == ["2021-06-15", "2021-06-30"]
    assert [p["target"] for p in shown.attrs["cloudgate"]["periods"].values()] == ["2021-06-15", "2021-06-30"]


@pytest.mark.parametrize("step", ["lower_period", "forget_period", "frozen_bytes"])
@pytest.mark.parametrize("kind", ["", "icechunk:"], ids=["folder", "icechunk"])
def test_a_kill_while_a_period_is_taken_back_leaves_no_hole(series, monkeypatch, tmp_path, kind, step):
    client, job = InlineClient(monkeypatch), series(f"{kind}m.zarr")
    with killed_in(monkeypatch, mosaic, "publish_period"):
        build(job=job, slots=[0], client=client)
    with killed_in(monkeypatch, RunFolder if step == "forget_period" else mosaic, step):
        build(job=job, slots=[0], anew=True, client=client)
    build(job=job, slots=[0], client=client)
    fresh = series("fresh.zarr")
    build(job=fresh, slots=[0], client=client)
    xr.testing.assert_equal(open_mosaic(store=job.output.store), open_mosaic(store=fresh.output.store))
    assert np.isfinite(open_mosaic(store=job.output.store)["blue"]).any()


@pytest.mark.parametrize("kind", ["", "icechunk:"])
def test_a_store_that_is_gone_is_not_taken_for_finished(series, monkeypatch, tmp_path, kind):
    client, job = InlineClient(monkeypatch), series(f"{kind}m.zarr")
    build(job=job, slots=[0], client=client)
    shutil.move(tmp_path / "m.zarr", tmp_path / "away")
    with pytest.raises(StoreMismatchError, match=r"m.zarr is gone, and its run records .*remove .*m.zarr.run to begin"):
        build(job=job, slots=[0, 1], client=client)
    shutil.move(tmp_path / "away", tmp_path / "m.zarr")
    build(job=job, slots=[0, 1], client=client)
    alone = series("one.zarr", time={"start": "2021-06-11", "end": "2021-06-20"})
    with killed_in(monkeypatch, mosaic, "publish_period"):
        build(job=alone, client=client)
    shutil.rmtree(tmp_path / "one.zarr")
    with pytest.raises(StoreMismatchError, match="put it back, or begin anew with --restart"):
        build(job=alone, client=client)
    assert build(job=alone, client=client, restart=True).periods[0]["published"]


def test_a_store_keeps_its_title_and_each_period_its_job(series, monkeypatch, tmp_path):
    client = InlineClient(monkeypatch)
    build(job=series(name="first"), slots=[0], client=client)
    build(job=series(name="second", method="p25"), slots=[1], client=client)
    names = {path.name for path in (tmp_path / "m.stac").glob("*.json")}
    assert names == {"collection.json", "first_2021-06-15.json", "first_2021-06-25.json"}
    store = ViewStore(tmp_path / "m.zarr")
    assert [frozen_request(store, slot)[0].job.method.name for slot in (0, 1)] == ["median", "p25"]


def test_records_that_cannot_be_removed_are_told(tmp_path, monkeypatch):
    folder = objects_at(str(tmp_path / "m.zarr.run"))
    folder.put("period-0000/done/0.0.json", b"{}")
    with monkeypatch.context() as patch:
        refuse = PermissionError(13, "Permission denied")
        patch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(refuse))
        with pytest.raises(StoreError, match=r"cannot remove .*period-0000"):
            folder.clear("period-0000/")
    folder.clear("period-0000/")
    assert folder.names() == []


def test_a_task_of_a_killed_tick_does_not_write_into_the_period_begun_again(series, monkeypatch, tmp_path):
    client, kept = InlineClient(monkeypatch), []
    submit = client.submit
    monkeypatch.setattr(client, "submit", lambda *a, **m: kept.append(submit(*a, **m)) or kept[-1])
    build(job=series(), slots=[0], client=client)
    zombies = [future for future in kept if future.key.startswith("task-")]
    before = objects(tmp_path / "m.zarr")
    for zombie in zombies:  # of the same beginning: a second try writes the same
        zombie.result()
    assert objects(tmp_path / "m.zarr") == before
    old = RunFolder(tmp_path / "m.zarr").fence(0)
    build(job=series(method="p25"), slots=[0], anew=True, client=client)
    after = objects(tmp_path / "m.zarr")
    assert after != before
    for zombie in zombies:
        with pytest.raises(StoreError, match="another run began it anew"):
            zombie.result()
    with pytest.raises(StoreError, match="another run began it anew"):
        runner.coarsen((0, 0), 1, (str(tmp_path / "m.zarr"), None, (), False), 0, "", Orders(fence=old))
    assert objects(tmp_path / "m.zarr") == after


def test_status_tells_an_empty_slot_and_watching_ends(series, small, monkeypatch, tmp_path):
    catalog = small.changed_items(
        tmp_path / "items.json", lambda fs: [f for f in fs if f["properties"]["datetime"] > "2021-06-21"]
    )
    client, job = InlineClient(monkeypatch), series(catalog=str(catalog))
    build(job=job, slots=[0, 1], client=client)
    store = tmp_path / "m.zarr"
    assert [p["state"] for p in status(store)["periods"]] == ["empty", "finished"]
    watched = CliRunner().invoke(app, ["status", str(store), "--watch", "--json"])
    assert watched.exit_code == 0, watched.output
    build(job=series(), slots=[0], client=client)  # it is looked for again, and its scenes came
    assert [p["state"] for p in status(store)["periods"]] == ["finished", "finished"]


def test_status_of_a_job_of_which_nothing_is_clear(series, small, tmp_path, monkeypatch):
    mask = {"asset": "scl", "cloud": list(range(1, 12)), "temporal_check": False}
    job = series(time={"start": "2021-06-11", "end": "2021-06-20"}, target="2021-06-15", mask=mask)
    with pytest.raises(NothingClearError):
        build(job=job, client=InlineClient(monkeypatch))
    assert [p["state"] for p in status(tmp_path / "m.zarr")["periods"]] == ["empty"]
