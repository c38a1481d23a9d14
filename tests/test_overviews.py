"""Overviews: the numbers of a plain reckoning, whatever the shards; resumable; in the right place for other tools."""

import json
import shutil
from pathlib import Path
from statistics import multimode

import numpy as np
import pytest
import rioxarray  # noqa: F401  (the .rio accessor)
import xarray as xr
import zarr
from small_region import InlineClient

from pipeline import conventions, store
from pipeline.errors import StoreMismatchError
from pipeline.grid import Grid
from pipeline.mosaic import build
from pipeline.overviews import average, coarsen_shard, level_shards, mode
from pipeline.periods import Period
from pipeline.records import RunFolder

GRID = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49999, 700, 515, 128)
BANDS = ("red", "nir")
PERIOD = Period(0, 19000, 19009, 19000, 19005)


def _layers(seed: int = 0):
    rng = np.random.default_rng(seed)
    nothing = rng.random(GRID.shape) < 0.3
    nothing[:130, :130] = True
    layers = {band: np.where(nothing, 0, rng.integers(1, 65535, GRID.shape)).astype(np.uint16) for band in BANDS}
    layers["clear_count"] = rng.integers(0, 4, GRID.shape).astype(np.uint16)
    layers["source_date"] = np.where(nothing, 0, rng.integers(18990, 18993, GRID.shape)).astype(np.int32)
    layers["flags"] = np.where(nothing, 1, rng.choice([2, 4, 36], GRID.shape)).astype(np.uint16)
    for band in BANDS:
        layers[f"uncertainty_{band}"] = np.where(nothing, 65535, rng.integers(0, 3000, GRID.shape)).astype(np.uint16)
    return layers


def _write(path: Path, grid: Grid = GRID, *, order: int = 1) -> dict[str, np.ndarray]:
    layers = _layers()
    for i, j in grid.shards():
        rows, cols = (
            (k * grid.shard_px, min((k + 1) * grid.shard_px, n)) for k, n in zip((i, j), grid.shape, strict=True)
        )
        part = {name: values[slice(*rows), slice(*cols)] for name, values in layers.items()}
        store.write_region(path, grid, 0, rows, cols, part)
    for level, shards in level_shards(grid):
        for shard in shards[::order]:
            coarsen_shard(path, grid, BANDS, True, 0, level, shard)
    about = {"layout": 1, "grid": grid.to_dict(), "periods": {"0": {}}}
    store.publish(
        path,
        grid,
        BANDS,
        uncertainty=True,
        schedule=[PERIOD],
        published=[True],
        attrs={"title": "t", "cloudgate": about},
        levels=len(grid.levels()) - 1,
    )
    return layers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("overviews") / "m.zarr"
    return path, _write(path)


def _plain_average(values, fill):
    """Pixel by pixel, as the docstring says it."""
    out = np.full([-(-n // 2) for n in values.shape], fill, values.dtype)
    for row, col in np.ndindex(*out.shape):
        four = values[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        known = four[four != fill].astype(int)
        if known.size:
            out[row, col] = int(np.floor(known.mean() + 0.5))
    return out


def _plain_mode(values, missing):
    out = np.zeros([-(-n // 2) for n in values.shape], values.dtype)
    for row, col in np.ndindex(*out.shape):
        part = (slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2))
        known = values[part][~missing[part]]
        out[row, col] = multimode((known if known.size else values[part].ravel()).tolist())[0]
    return out


@pytest.mark.parametrize("shape", [(6, 8), (7, 5), (1, 1), (2, 3)])
@pytest.mark.parametrize("fill", [0, 65535])
def test_averages_and_modes_are_those_of_a_plain_reckoning(shape, fill):
    rng = np.random.default_rng(sum(shape) + fill)
    values = rng.choice([fill, 1, 2, 65534, 65530], shape).astype(np.uint16)
    np.testing.assert_array_equal(average(values, fill), _plain_average(values, fill))
    full = np.where(values == fill, 7, values)
    np.testing.assert_array_equal(average(full, fill), _plain_average(full, fill))
    classes = rng.integers(0, 3, shape).astype(np.int32)
    np.testing.assert_array_equal(mode(classes, classes == 0), _plain_mode(classes, classes == 0))
    np.testing.assert_array_equal(mode(classes, None), _plain_mode(classes, np.zeros(shape, bool)))


def test_levels_halve_down_to_256_px_and_agree_on_where_there_is_data(made):
    path, layers = made
    levels = [store.open_mosaic(store=path, group=str(level)) for level in range(3)]
    assert [tuple(level["red"].shape[1:]) for level in levels] == [(700, 515), (350, 258), (175, 129)]
    with pytest.raises(StoreMismatchError, match="levels are 0 to 2"):
        store.open_mosaic(store=path, group="3")
    red = zarr.open_array(path, path="1/red", mode="r")[0]
    np.testing.assert_array_equal(red, _plain_average(layers["red"], 0))
    for level in levels:
        nothing = np.isnan(level["red"].values)
        assert 0 < nothing.mean() < 0.4
        np.testing.assert_array_equal(nothing, (level["flags"].values & 1) > 0)
        np.testing.assert_array_equal(nothing, np.isnat(level["source_date"].values))
        np.testing.assert_array_equal(nothing, np.isnan(level["uncertainty_nir"].values))
        assert level.attrs["cloudgate"]["periods"] == {"0": {}}


def test_shards_and_their_order_do_not_change_the_numbers(made, tmp_path):
    path, _ = made
    other = tmp_path / "other.zarr"
    _write(other, Grid(**{**GRID.__dict__, "shard_px": 300}), order=-1)
    for level in ("1", "2"):
        for name in ("red", "flags", "uncertainty_red", "source_date", "clear_count"):
            arrays = [zarr.open_array(where, path=f"{level}/{name}", mode="r")[0] for where in (path, other)]
            np.testing.assert_array_equal(*arrays)


def test_the_conventions_hold_and_faults_are_seen(made):
    path, _ = made
    root = zarr.open_group(path, mode="r")
    attrs, groups = dict(root.attrs), {name: dict(group.attrs) for name, group in root.groups()}
    assert conventions.faults(attrs, groups) == []
    for change, fault in [
        (lambda a, g: a["zarr_conventions"].pop(0), "multiscales is not declared"),
        (lambda a, g: a.update({"proj:wkt2": "x"}), "exactly one of proj:code"),
        (lambda a, g: a.update({"spatial:shape": [1, 1]}), "must not stand beside"),
        (lambda a, g: g.pop("2"), "asset '2' is no group"),
        (lambda a, g: g["1"].update({"spatial:transform": [1, 0, 0, 0, -1, 0]}), "differs from the group's"),
        (lambda a, g: a["multiscales"]["layout"][1].pop("transform"), "needs a level of the layout"),
    ]:
        broken = json.loads(json.dumps([attrs, groups]))
        change(*broken)
        assert any(fault in found for found in conventions.faults(*broken)), fault


def test_every_level_lies_in_the_same_place_for_xarray_and_rioxarray(made):
    path, _ = made
    tree = xr.open_datatree(path, engine="zarr", decode_coords="all", chunks={})
    assert sorted(tree.children) == ["0", "1", "2"]
    for level in range(3):
        data = xr.open_zarr(str(path), group=str(level), decode_coords="all")
        assert data.rio.crs.to_epsg() == 32633
        expected = (10.0 * 2**level, 0.0, GRID.left, 0.0, -10.0 * 2**level, GRID.top)
        assert tuple(data.rio.transform())[:6] == expected
        assert float(data["x"][0]) == GRID.left + 5.0 * 2**level
        assert tree[str(level)]["red"].shape == data["red"].shape
        bare = data.drop_vars("spatial_ref")
        assert bare.rio.crs.to_epsg() == 32633  # from the proj: convention alone


# -- in a job ---------------------------------------------------------------------------------------------------


def _files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_overviews_are_added_later_and_resumed_to_the_same_bytes(small, monkeypatch, tmp_path):
    path, run = tmp_path / "m.zarr", RunFolder(tmp_path / "m.zarr")
    job, client = small.job(path, grid={"crs": "EPSG:32633", "shard_px": 256}), InlineClient(monkeypatch)
    build(job=job.model_copy(update={"output": job.output.model_copy(update={"overviews": False})}), client=client)
    assert store.levels(path) == 0
    with pytest.raises(StoreMismatchError, match=r"export .*--overviews"):
        store.open_mosaic(store=path, group="1")
    assert build(job=job, client=client).periods[0]["message"] == "finished before"
    assert store.levels(path) == 2
    whole = _files(path)

    # as a kill leaves it: no metadata, a level and a shard missing, another shard written but not marked, half a file
    for file in path.rglob("zarr.json"):
        file.unlink()
    shutil.rmtree(path / "2")
    shutil.rmtree(run.path / run.period(0) / "done-2")
    (path / "1" / "red" / "c" / "0" / "1" / "1").unlink()
    (path / "1" / "red" / "c" / "0" / "1" / "1.1234.partial").write_bytes(b"short")
    for shard in ("1.1", "0.1"):
        (run.path / run.period(0) / "done-1" / f"{shard}.json").unlink()
    (run.path / run.period(0) / "manifest.json").unlink()
    build(job=job, client=client)
    assert _files(path) == whole


def test_overviews_keep_the_limits_of_the_job(small, monkeypatch, tmp_path):
    class Client(InlineClient):
        def submit(self, function, *args, key="", **more):
            told.append((key.split("-")[0], args[-1], more.get("resources")))
            return super().submit(function, *args, key=key, **more)

    told: list = []
    job = small.job(
        tmp_path / "m.zarr",
        area={"bbox": small.bbox((40, 400), (40, 400))},
        grid={"crs": "EPSG:32633", "shard_px": 128},
        bands=["red"],
        limits={"task_timeout_s": 77},
        cluster={"resources": {"GPU": 1}},
    )
    build(job=job, client=Client(monkeypatch, resources={"GPU": 1}))
    orders = [(orders.timeout_s, asked) for kind, orders, asked in told if kind == "overview"]
    assert len(orders) > 2
    assert all(one == (77, {"GPU": 1}) for one in orders)


def test_a_new_period_of_a_store_with_overviews_gets_them_unasked(small, monkeypatch, tmp_path):
    path, client = tmp_path / "m.zarr", InlineClient(monkeypatch)
    fields = {
        "area": {"bbox": small.bbox((100, 420), (100, 420))},
        "time": {"start": "2021-06-11", "end": "2021-08-08", "every": "month"},
    }
    job = small.job(path, **fields, target="middle")
    build(job=job, client=client)
    run = RunFolder(path)
    run.forget_period(2)
    shutil.rmtree(path / "1")
    shutil.rmtree(path / "0" / "red" / "c" / "2")
    job = job.model_copy(update={"output": job.output.model_copy(update={"overviews": False})})
    build(job=job, client=client)
    assert (path / "1" / "red" / "c" / "2").exists()
