"""A store written period by period: each in its slot, the others untouched; revisits lower, rewrite and raise."""

from datetime import date
from itertools import islice

import numpy as np
import pytest
import xarray as xr
from small_region import InlineClient, SmallRegion, objects, same_objects

from pipeline import tasks
from pipeline.config import TimeSpec
from pipeline.errors import ConfigError, NothingClearError, StoreError, StoreMismatchError
from pipeline.items import EPOCH
from pipeline.mosaic import build
from pipeline.periods import first_periods, periods
from pipeline.records import RunFolder
from pipeline.request import acquisitions_of, resolve, survey
from pipeline.status import status
from pipeline.store import open_mosaic

BANDS = ("blue",)


@pytest.fixture
def series(small: SmallRegion, tmp_path, monkeypatch):
    """A job of one ten-day period after the other since 2021-06-11 on a corner of the region; its client."""
    client = InlineClient(monkeypatch)

    def job(name: str = "m.zarr", **changes):
        time = {"start": "2021-06-11", "end": "2021-06-11", "every": "10 days", **changes.pop("time", {})}
        area = {"bbox": small.bbox((40, 160), (120, 240))}
        fields = {
            "area": area,
            "grid": {"crs": "EPSG:32633", "shard_px": 64},
            "bands": list(BANDS),
            "time": time,
            "offset_dn": 0,
        }
        return small.job(tmp_path / name, **(fields | {"target": "middle"} | changes))

    return job, client


def _clearest(job, slot: int) -> str:
    """The scene of a period that the mosaic would miss most."""
    request = resolve(job, slots=[slot])
    acquisitions = acquisitions_of(request, request.schedule[slot])
    seen = survey(request, request.schedule[slot], acquisitions)
    shares = [layer.clear_share * layer.valid_share for layer in seen.layers]
    return next(i.id for i in acquisitions[shares.index(max(shares))].items if i.tile == "33TWM")


def _slot(store, slot: int) -> dict[str, bytes]:
    """The array objects of one slot."""
    return {name: data for name, data in objects(store).items() if f"/c/{slot}/" in name and name.count("/") == 5}


def test_periods_go_into_their_slots_in_any_order_and_end_as_the_same_bytes(series, tmp_path):
    job, client = series
    for slots in ([2], [0], [1, 3]):
        build(job=job("a.zarr"), client=client, slots=slots)
    build(job=job("b.zarr"), client=client, slots=range(4))
    same_objects(tmp_path / "a.zarr", tmp_path / "b.zarr")
    days = open_mosaic(store=tmp_path / "a.zarr")["time"].values.astype("datetime64[D]")
    assert [str(d) for d in days] == ["2021-06-15", "2021-06-25", "2021-07-05", "2021-07-15"]
    plain = job("c.zarr", time={"end": "2021-07-20"})
    build(job=plain, client=client)
    assert _slot(tmp_path / "c.zarr", 1) == _slot(tmp_path / "a.zarr", 1)  # a plain job of the span makes the same


def test_an_empty_slot_stays_hidden_between_published_ones(series, tmp_path):
    job, client = series
    build(job=job(), client=client, slots=[0])
    build(job=job(), client=client, slots=[2])
    raw = xr.open_zarr(str(tmp_path / "m.zarr"), group="0", decode_cf=False)
    assert raw["published"].values.tolist() == [1, 0, 1]
    assert not raw["blue"].isel(time=1).values.any()
    assert open_mosaic(store=tmp_path / "m.zarr").sizes["time"] == 2
    assert [p["state"] for p in status(tmp_path / "m.zarr")["periods"]] == ["finished", "unfinished", "finished"]


def test_a_late_scene_rewrites_its_period_and_nothing_else(series, small, tmp_path, monkeypatch):
    job, client = series
    late = _clearest(job(), 1)
    catalog = small.changed_items(tmp_path / "items.json", lambda fs: [f for f in fs if f["id"] != late])
    build(job=job(catalog=str(catalog)), client=client, slots=[0, 1, 2])
    before = {slot: _slot(tmp_path / "m.zarr", slot) for slot in range(3)}
    assert all(before.values())
    small.changed_items(tmp_path / "items.json", lambda fs: fs)
    seen = []
    write = tasks.store.write_region

    def watching(path, *args):
        seen.append(xr.open_zarr(str(path), group="0", decode_cf=False)["published"].values.tolist())
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.store, "write_region", watching)
        again = build(job=job(catalog=str(catalog)), client=client, slots=[0, 1, 2])
    assert [p["message"] for p in again.periods] == ["finished before", "finished", "finished before"]
    assert seen
    assert all(flags == [1, 0, 1] for flags in seen)  # no reader takes the half-written period for a finished one
    after = {slot: _slot(tmp_path / "m.zarr", slot) for slot in range(3)}
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert after[1] != before[1]
    build(job=job("fresh.zarr"), client=client, slots=[0, 1, 2])
    same_objects(tmp_path / "m.zarr", tmp_path / "fresh.zarr")  # as if the scene had been there from the start


def test_a_revisit_that_dies_halfway_is_hidden_and_goes_on(series, small, tmp_path, monkeypatch):
    job, client = series
    late = _clearest(job(), 1)
    catalog = small.changed_items(tmp_path / "items.json", lambda fs: [f for f in fs if f["id"] != late])
    build(job=job(catalog=str(catalog)), client=client, slots=[0, 1])
    small.changed_items(tmp_path / "items.json", lambda fs: fs)
    write = tasks.store.write_region

    def dies(path, slot_grid, slot, rows, cols, layers):
        write(path, slot_grid, slot, rows, cols, islice(layers, 2))
        raise StoreError("store: no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tasks.store, "write_region", dies)
        with pytest.raises(StoreError):
            build(job=job(catalog=str(catalog)), client=client, slots=[1])
    assert open_mosaic(store=tmp_path / "m.zarr").sizes["time"] == 1
    build(job=job(catalog=str(catalog)), client=client, slots=[1])
    build(job=job("fresh.zarr"), client=client, slots=[0, 1])
    same_objects(tmp_path / "m.zarr", tmp_path / "fresh.zarr")


def test_a_catalog_that_forgets_does_not_undo_a_mosaic(series, small, tmp_path):
    job, client = series
    gone = {i.id for i in resolve(job(), slots=[1]).found.items}
    catalog = small.changed_items(tmp_path / "items.json", lambda fs: fs)
    build(job=job(catalog=str(catalog)), client=client, slots=[0, 1])
    before = objects(tmp_path / "m.zarr")
    small.changed_items(tmp_path / "items.json", lambda fs: [f for f in fs if f["id"] not in gone])
    request = resolve(job(catalog=str(catalog)), slots=[0, 1])
    assert build(job=job(catalog=str(catalog)), client=client, request=request, slots=[0, 1]).periods[1]["published"]
    assert objects(tmp_path / "m.zarr") == before


def test_a_series_refuses_other_starts_grids_and_plain_jobs(series, tmp_path):
    job, client = series
    build(job=job(), client=client, slots=[0])
    before = objects(tmp_path / "m.zarr")
    for changes, said in (
        ({"time": {"start": "2021-06-01"}}, "start: 2021-06-01 is earlier than 2021-06-11"),
        ({"time": {"start": "2021-06-12", "end": "2021-06-12"}}, "start: 2021-06-12 is later than 2021-06-11"),
        ({"grid": {"crs": "EPSG:32633", "shard_px": 128}}, "belongs to another series"),
        ({"method": {"name": "regression"}}, "uncertainty"),
    ):
        with pytest.raises(StoreMismatchError, match=said):
            build(job=job(**changes), client=client, slots=[1])
    with pytest.raises(StoreMismatchError, match="was begun by a schedule"):
        build(job=job(), client=client)
    with pytest.raises(ConfigError, match="slot -1: a period before the start"):
        build(job=job(), client=client, slots=[-1])
    assert objects(tmp_path / "m.zarr") == before
    build(job=job("plain.zarr"), client=client)
    with pytest.raises(StoreMismatchError, match="begun by `cloudgate mosaic`"):
        build(job=job("plain.zarr"), client=client, slots=[0])
    assert RunFolder(tmp_path / "plain.zarr").exists()


def test_a_period_without_scenes_says_so(series, tmp_path):
    job, client = series
    with pytest.raises(NothingClearError, match="no scene from 2021-05-21"):
        build(
            job=job(time={"start": "2021-05-21"}),
            client=client,
            request=resolve(job(time={"start": "2021-05-21"}), slots=[0, 1, 2]),
            slots=[0, 1],
        )


def _spans(every: str, start: str, count: int) -> list[tuple[str, str]]:
    class Job:
        time = TimeSpec(start=date.fromisoformat(start), end=date.fromisoformat(start), every=every)
        target = "middle"

    def text(day: int) -> str:
        return str(date.fromordinal(EPOCH.toordinal() + day))

    return [(text(p.start), text(p.end)) for p in first_periods(Job, count)]  # type: ignore[arg-type]


def test_a_series_has_whole_periods_and_cron_days_begin_them():
    assert _spans("month", "2024-01-15", 2) == [("2024-01-15", "2024-01-31"), ("2024-02-01", "2024-02-29")]
    assert _spans("0 0 1,16 * *", "2024-02-10", 3) == [
        ("2024-02-10", "2024-02-15"),
        ("2024-02-16", "2024-02-29"),
        ("2024-03-01", "2024-03-15"),
    ]
    assert _spans("30 6 * * 1", "2024-12-30", 2) == [("2024-12-30", "2025-01-05"), ("2025-01-06", "2025-01-12")]
    assert np.all(np.diff([p.slot for p in periods(_job_of_a_decade())]) == 1)


def _job_of_a_decade():
    class Job:
        time = TimeSpec(start=date(2020, 1, 1), end=date(2029, 12, 31), every="10 days")
        target = "end"

    assert len(periods(Job)) == 360
    return Job


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("monht", "did you mean 'month'"),
        ("* * * * *", "several times a day"),
        ("0 0 30 2 *", "no cron expression that ever fires"),
        ("61 0 * * *", "Bad minute"),
    ],
)
def test_lengths_that_make_no_periods_are_refused(every, said):
    with pytest.raises(ValueError, match=said):
        TimeSpec(start=date(2024, 1, 1), end=date(2024, 2, 1), every=every)
