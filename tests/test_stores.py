"""Every kind of store passes the same tests: a folder, a bucket, an icechunk repository on disk and in a bucket."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import xarray as xr
from small_region import InlineClient, SmallRegion, objects
from view_stores import get

from pipeline import grid, planning, runner, store, tasks
from pipeline.config import Job
from pipeline.describe import beside
from pipeline.errors import ConfigError, StoreMismatchError
from pipeline.export import export_cogs
from pipeline.grid import Grid
from pipeline.jobfile import job_from_dict, job_json
from pipeline.locations import store_at
from pipeline.mosaic import build
from pipeline.objects import objects_at
from pipeline.periods import Period
from pipeline.preview import preview
from pipeline.records import RunFolder
from pipeline.status import status
from pipeline.store import open_mosaic
from pipeline.view_server import MapServer
from pipeline.view_store import ViewStore

KINDS = ("folder", "bucket", "icechunk", "icechunk-bucket")


def _where(kind: str, folder: Path, bucket: Callable[[], str]) -> str:
    place = f"{bucket()}/{folder.name}" if kind.endswith("bucket") else str(folder)
    return ("icechunk:" if kind.startswith("icechunk") else "") + f"{place}/m.zarr"


@pytest.fixture(params=KINDS[:3])
def where(request, tmp_path) -> str:
    """A place of each kind; of a repository in a bucket the tests with jobs must do, each request takes its time."""
    return _where(request.param, tmp_path, lambda: request.getfixturevalue("bucket"))


def _history(where: str) -> list[str]:
    """Messages of the commits on ``main``, the latest first, without icechunk's own first."""
    return [one.message for one in store_at(where)._open().ancestry(branch="main")][:-1]  # type: ignore[attr-defined]


# -- shards, without a job --------------------------------------------------------------------------------------

GRID = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49998, 64, 50, 32)
SHARDS = list(GRID.shards())
PERIODS = (Period(0, 19000, 19009, 19000, 19005), Period(1, 19010, 19019, 19000, 19015))


def _write(where: str, slot: int, whole: dict[str, np.ndarray], shards=SHARDS) -> None:
    """What a run does with a period's tasks: each shard written, then kept."""
    store.begin(where, {0: GRID}, (["red"], False), slot)
    for i, j in shards:
        rows, cols = (i * 32, i * 32 + 32), (j * 32, min(j * 32 + 32, 50))
        part = {name: values[slice(*rows), slice(*cols)] for name, values in whole.items()}
        store.keep(where, slot, pickle.loads(pickle.dumps(store.write_region(where, GRID, slot, rows, cols, part))))


def _publish(where: str, slot: int, published: list[bool]) -> None:
    about = {"layout": 1, "grid": GRID.to_dict(), "periods": {"0": {}}}
    store.publish(
        where, GRID, ["red"], uncertainty=False, schedule=PERIODS[: len(published)], published=published,
        attrs={"cloudgate": about}, unit=store.unit_of(slot), message=f"slot {slot}",
    )  # fmt: skip


def _whole(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    numbers = {name: rng.integers(1, 9999, GRID.shape).astype(np.uint16) for name in ("red", "clear_count", "flags")}
    return numbers | {"source_date": rng.integers(18990, 19010, GRID.shape).astype(np.int32)}


def _raw(where: str) -> xr.Dataset:
    place = store_at(where)
    return xr.open_zarr(place.source(), group="0", decode_cf=False, consolidated=None if place.consolidated else False)


def test_a_period_begun_before_another_was_published_keeps_its_shards(where):
    """Slot 0 stops half-way, slot 1 is published, slot 0 goes on with the other half."""
    first, second = _whole(0), _whole(1)
    _write(where, 0, first, SHARDS[:3])
    assert store.read_attrs(where) is None
    with pytest.raises(StoreMismatchError, match="no finished mosaic"):
        open_mosaic(store=where)
    _write(where, 1, second)
    _publish(where, 1, [False, True])
    assert open_mosaic(store=where)["time"].values.astype("datetime64[D]").astype(int).tolist() == [19015]
    _write(where, 0, first, SHARDS[3:])
    assert _raw(where)["published"].values.tolist() == [0, 1]
    _publish(where, 0, [True, True])
    raw = _raw(where)
    for name, values in first.items():
        np.testing.assert_array_equal(raw[name].values[0], values, err_msg=name)
        np.testing.assert_array_equal(raw[name].values[1], second[name], err_msg=name)
    if where.startswith("icechunk"):
        assert _history(where) == ["slot 0", "slot 1"]


def test_a_period_written_again_replaces_every_pixel(where):
    old, new = _whole(0), _whole(1)
    new["red"][32:64] = 0  # whole shards without data: their objects go
    _write(where, 0, old)
    _publish(where, 0, [True])
    _write(where, 0, new)
    seen = _raw(where)["red"].values[0]
    assert np.array_equal(seen, old["red"]) == store.replaces(where)  # elsewhere a run hides the period meanwhile
    exported = store.read_region(where, GRID, 0, (0, 32), (0, 32), "red", published=True)  # what readers see
    np.testing.assert_array_equal(exported, seen[:32, :32])
    unfinished = store.read_region(where, GRID, 0, (0, 32), (0, 32), "red")
    np.testing.assert_array_equal(unfinished, new["red"][:32, :32])
    _publish(where, 0, [True])
    for name, values in new.items():
        np.testing.assert_array_equal(_raw(where)[name].values[0], values, err_msg=name)
    if where.startswith("icechunk"):  # amended commits are swept: main has its first, and two of this period
        assert len(objects_at(where.removeprefix("icechunk:")).names("snapshots/")) == 3
    _write(where, 0, old, SHARDS[:2])
    store.discard(where, 0)
    if store.replaces(where):
        np.testing.assert_array_equal(_raw(where)["red"].values[0], new["red"])


def test_removal_takes_the_store_and_nothing_beside_it(where):
    _write(where, 0, _whole(0), SHARDS[:2])
    store.remove(where)  # a half-written one
    _write(where, 0, _whole(0))
    _publish(where, 0, [True])
    place = where.removeprefix("icechunk:")
    beside = [f"{place}.run", f"{place}2"]
    for one in beside:
        objects_at(one).put("a/b", b"mine")
    store.remove(where)
    assert objects_at(place).names() == []
    assert store.read_attrs(where) is None
    assert [objects_at(one).names() for one in beside] == [["a/b"], ["a/b"]]


def test_what_is_not_ours_is_refused_and_left_alone(where):
    place = store_at(where)
    objects_at(where.removeprefix("icechunk:")).put("readme.txt", b"mine")
    for work in (store.remove, store.read_attrs):
        with pytest.raises(StoreMismatchError, match="no cloudgate store"):
            work(where)
    assert objects_at(where.removeprefix("icechunk:")).get("readme.txt") is not None
    objects_at(where.removeprefix("icechunk:")).remove("readme.txt")
    place.begin("period-0000", lambda _: None)
    with place.publishing("", "theirs") as there:
        other = xr.Dataset({"a": ("x", np.arange(3))})
        other.to_zarr(there, group="0", zarr_format=3, consolidated=False, mode="a")
    for work in (store.remove, store.read_attrs):
        with pytest.raises(StoreMismatchError, match="another program"):
            work(where)


def test_who_looks_at_it_sees_that_something_was_published_since(where):
    _write(where, 0, _whole(0))
    _publish(where, 0, [True])
    seen = ViewStore(where)
    assert not seen.changed()
    _write(where, 1, _whole(1))
    assert not seen.changed()
    _publish(where, 1, [True, True])
    assert seen.changed()
    assert not ViewStore(where).changed()
    height, width = GRID.shape
    np.testing.assert_array_equal(seen.chunk("red", 0, 0, 0, 0)[:height, :width], _whole(0)["red"])


@pytest.mark.parametrize("where", KINDS[1::2], indirect=True)
def test_no_credentials_travel(where):
    """What goes to workers and back, and what a lazy mosaic holds, as the scheduler sees it."""
    _write(where, 0, _whole(0))
    written = store.write_region(where, GRID, 0, (0, 32), (0, 32), {"red": np.ones((32, 32), np.uint16)})
    _publish(where, 0, [True])
    lazy = open_mosaic(store=where)
    for thing in (written, lazy.__dask_graph__(), store_at(where), store_at(where).reader()):
        data = cloudpickle.dumps(thing)
        assert b"of-the-tests" not in data
    again = pickle.loads(pickle.dumps(store_at(where).reader()))
    np.testing.assert_array_equal(xr.open_zarr(again, group="0", consolidated=False)["x"], lazy["x"])


# -- jobs -------------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """A store whose first period was killed half-way and gone on with, and whose second was added."""

    kind: str
    where: str
    job: Callable[..., Job]
    killed: dict[str, Any]
    resumed_tasks: int = 0
    during: list[int] = field(default_factory=list)
    first: dict[str, np.ndarray] = field(default_factory=dict)


def _arrays(where: str, slot: int) -> dict[str, np.ndarray]:
    """Raw values of a slot in every level."""
    place, out = store_at(where), {}
    consolidated = None if place.consolidated else False
    for level in range(store.levels(where) + 1):
        raw = xr.open_zarr(place.source(), group=str(level), decode_cf=False, consolidated=consolidated)
        out |= {f"{level}/{name}": raw[name].values[slot] for name in raw.data_vars if raw[name].ndim == 3}
    return out


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    """One shard a task, and overviews of small grids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "TASK_PX", 16)
        patch.setattr(grid, "OVERVIEW_PX", 64)
        yield patch


@pytest.fixture(scope="module")
def jobs(small: SmallRegion, tmp_path_factory, bucket, patched) -> dict[str, tuple[str, Callable[..., Job]]]:
    """Per kind a store and its job of ten-day periods; of all, the first period was killed half-way."""
    out = {}
    for kind in KINDS:
        at = _where(kind, tmp_path_factory.mktemp(f"stores-{kind}"), lambda: bucket)

        def job(where: str = at, **changes: Any) -> Job:
            fields = {
                "area": {"bbox": small.bbox((40, 160), (120, 240))},
                "grid": {"crs": "EPSG:32633", "shard_px": 64},
                "bands": ["blue"],
                "time": {"start": "2021-06-11", "end": "2021-06-11", "every": "10 days"},
                "target": "middle",
                "offset_dn": 0,
                "output": {"store": where},
                "cluster": {"workers": 4},  # so that tasks are not made wider
            }
            return small.job(**(fields | changes))

        out[kind] = at, job
    request = tmp_path_factory.mktemp("killed") / "request.json"
    request.write_text(json.dumps({"slot": 0, "jobs": [job_json(job()) for _, job in out.values()]}))
    script = Path(__file__).parent / "killed.py"
    done = subprocess.run([sys.executable, script, request], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def quiet(jobs, patched, tmp_path_factory) -> str:
    """The same two periods in a folder, without a kill."""
    at = str(tmp_path_factory.mktemp("quiet") / "m.zarr")
    build(job=jobs["folder"][1](at), client=InlineClient(patched), slots=[0, 1])
    return at


@pytest.fixture(scope="module", params=KINDS)
def made(request, jobs, patched) -> Made:
    at, job = jobs[request.param]
    out = Made(request.param, at, job, status(at))
    out.killed["attrs"] = store.read_attrs(at)
    with pytest.MonkeyPatch.context() as patch:
        ran, run_task = [0], runner.run_task

        def counting(*args, **more):
            ran[0] += 1
            return run_task(*args, **more)

        patch.setattr(runner, "run_task", counting)
        build(job=job(), client=InlineClient(patch), slots=[0])
        out.resumed_tasks = ran[0]
        out.first = _arrays(at, 0)
        write = store.write_region

        def watching(*args, **more):
            out.during.append(open_mosaic(store=at).sizes["time"])
            return write(*args, **more)

        patch.setattr(tasks.store, "write_region", watching)
        build(job=job(), client=InlineClient(patch), slots=[1])
    return out


def test_a_kill_leaves_what_was_marked_and_nothing_to_read(made):
    (period,) = made.killed["periods"]
    assert (period["state"], period["shards_done"], period["shards"]) == ("unfinished", 1, 4)
    assert made.killed["attrs"] is None
    assert made.resumed_tasks == 3


def test_the_pixels_are_those_of_a_quiet_run_in_a_folder(made, quiet):
    for slot in (0, 1):
        mine, theirs = _arrays(made.where, slot), _arrays(quiet, slot)
        assert mine.keys() == theirs.keys()
        assert {name.partition("/")[0] for name in mine} == {"0", "1"}
        for name, values in theirs.items():
            np.testing.assert_array_equal(mine[name], values, err_msg=name)
    assert store.finished(made.where) == store.finished(quiet)
    if not made.kind.startswith("icechunk"):  # its objects have names of their own
        there = objects_at(made.where)
        bytes_there = {name: there.get(name)[0] for name in there.names()}
        assert bytes_there == objects(Path(quiet))


def test_a_second_period_hides_until_it_is_whole_and_leaves_the_first_alone(made):
    assert made.during == [1] * 4
    assert [p["state"] for p in status(made.where)["periods"]] == ["finished", "finished"]
    now = _arrays(made.where, 0)
    assert all(np.array_equal(now[name], values) for name, values in made.first.items())
    if made.kind.startswith("icechunk"):
        second, first = _history(made.where)
        assert first.startswith("2021-06-11 to 2021-06-20: median of ")
        assert second.startswith("2021-06-21 to 2021-06-30: median of ")
        assert store_at(made.where)._open().list_branches() == {"main"}


def test_a_finished_store_is_gone_on_with_and_that_of_another_job_refused(made, patched):
    summary = build(job=made.job(), client=InlineClient(patched), slots=[0, 1])
    assert [p["message"] for p in summary.periods] == ["finished before"] * 2
    with pytest.raises(StoreMismatchError, match=r"another series.*bands.*choose another store"):
        build(job=made.job(bands=["red"]), client=InlineClient(patched), slots=[0])


def test_what_describes_it_lies_beside_it(made, quiet, tmp_path):
    mine, theirs = (objects_at(beside(w, ".stac")) for w in (made.where, quiet))
    assert mine.names() == theirs.names() != []
    for name in mine.names():
        assert b"://127" not in mine.get(name)[0]
    files = export_cogs(store=made.where, out=tmp_path / "cog", bands=["blue", "flags"], period=0)
    assert [f.name for f in files] == ["mosaic_2021-06-15_blue.tif", "mosaic_2021-06-15_flags.tif"]
    ours = preview(store=made.where, out=tmp_path / "a.png").read_bytes()
    assert ours == preview(store=quiet, out=tmp_path / "b.png").read_bytes()


def _page(where: str) -> dict[str, bytes]:
    """What the map page of a store is told, by what it asks for."""
    out = {}
    with MapServer([where], 0) as server:
        facts = json.loads(get(f"{server.url}api/mosaics")[1])["stores"][0]
        assert facts.pop("token")
        left, _, _, top = facts["bounds"]
        span = json.loads(get(f"{server.url}api/layer/0/1?layer=rgb:blue,blue,blue")[1])["range"]
        wanted = [f"{what}/0?x={left + 405}&y={top - 305}" for what in ("api/pixel", "api/looks/0")]
        wanted += ["api/before/0/1", "before/0/1.png?range=0,1,0,1,0,1", "api/layer/0/1?layer=flags"]
        wanted += [f"tile/0/1/0/0/0.png?layer=rgb:blue,blue,blue&range={','.join(map(str, span))}"]
        for address in wanted:
            status, out[address] = get(server.url + address)
            assert status == 200, (address, out[address])
    return out | {"facts": json.dumps(facts).encode()}


def test_the_map_page_shows_it_and_is_told_no_secret(made, quiet):
    told = _page(made.where)
    assert told == _page(quiet)
    assert not [address for address, data in told.items() if b"of-the-tests" in data]
    (look,) = json.loads(told[next(address for address in told if "looks" in address)])["looks"]
    assert look["values"]["blue"] > 0  # read from its source


def test_no_secret_lies_in_the_store_or_its_records(made):
    for place in (made.where.removeprefix("icechunk:"), RunFolder(made.where).where):
        there = objects_at(place)
        assert len(there.names()) > 10
        assert not [name for name in there.names() if b"of-the-tests" in there.get(name)[0]]


def test_other_places_are_refused_before_any_work(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, said in [
        ("gs://bucket/m.zarr", "gs:// is no kind of store"),
        ("icechunk:gs://bucket/m", "gs:// is no kind of store"),
        ("s3://bucket", "needs a bucket and a name"),
        ("s3://key:word@bucket/m.zarr", "the name of the bucket holds other signs"),
    ]:
        with pytest.raises(ConfigError, match=said):
            build(job=job_from_dict(small.fields(output={"store": place})))
    with pytest.raises(ConfigError, match=r"output.cog: .*`cloudgate export s3://b/m.zarr --cog FOLDER"):
        build(job=job_from_dict(small.fields(output={"store": "s3://b/m.zarr", "cog": True})))
    assert not list(tmp_path.iterdir())
