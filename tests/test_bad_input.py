"""Bad input through the real command line: field, value and way out in one paragraph, the right exit code, and
earlier results untouched."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_region import SmallRegion, objects, undecidable
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.layers import FLAGS
from pipeline.records import RunFolder
from pipeline.store import open_mosaic


@pytest.fixture
def run(small: SmallRegion, tmp_path: Path, cluster_fields: dict[str, Any], monkeypatch) -> Callable[..., Any]:
    """Run ``cloudgate mosaic`` on a small job with changes; gives exit code and what it said on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*options: str, **changes: Any) -> tuple[int, str]:
        fields = {
            "area": {"bbox": small.bbox((200, 400), (200, 400))},
            "grid": {"crs": "EPSG:32633", "shard_px": 128},
            "cluster": cluster_fields,
            "output": {"store": "out/m.zarr"},
        }
        job = small.fields(**fields | changes)
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        result = CliRunner().invoke(app, ["mosaic", "job.yaml", *options])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr

    return command


def _few(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [f for f in features if f["properties"]["datetime"] < "2021-06-20"]


def _items(small: SmallRegion, path: Path, change: Callable[[dict[str, Any]], None], few: bool = True) -> str:
    """A catalog of a few scenes in which ``change`` was done to every feature."""

    def every(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        features = _few(features) if few else features
        for feature in features:
            change(feature)
        return features

    return str(small.changed_items(path, every))


def _without_asset(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda feature: feature["assets"].pop(name)


def _without_projection(feature: dict[str, Any]) -> None:
    feature["properties"] = {k: v for k, v in feature["properties"].items() if not k.startswith("proj:")}
    for asset in feature["assets"].values():
        for key in [k for k in asset if k.startswith("proj:")]:
            del asset[key]


WRONG: list[tuple[str, dict[str, Any], int, tuple[str, ...]]] = [
    ("unknown field", {"banana": 1}, 2, ("banana: there is no such field", "known are name, catalog")),
    ("unknown field inside", {"mask": {"cloud_grow": 9}}, 2, ("mask.cloud_grow", "did you mean 'cloud_grow_m'?")),
    ("unknown band", {"bands": ["blue", "ultraviolet"]}, 2, ("bands", "ultraviolet", "swir16")),
    ("unknown method", {"method": {"name": "medain"}}, 2, ("method.name", "'medain'", "did you mean 'median'?")),
    ("unknown catalog", {"catalog": "earth-serach"}, 2, ("catalog", "'earth-serach'", "did you mean 'earth-search'?")),
    ("absent catalog", {"catalog": "nowhere/items.json"}, 2, ("nowhere/items.json", "no")),
    ("geographic crs", {"grid": {"crs": "EPSG:4326"}}, 2, ("grid.crs", "EPSG:4326", "utm")),
    ("unknown crs", {"grid": {"crs": "EPSG:999999"}}, 2, ("grid.crs", "EPSG:999999", "utm")),
    ("empty area", {"area": {"bbox": [15.0, 46.0, 15.0, 46.1]}}, 2, ("area.bbox", "empty", "15.0")),
    ("area upside down", {"area": {"bbox": [15.0, 46.1, 15.1, 46.0]}}, 2, ("area.bbox", "[west, south, east, north]")),
    ("swapped lon and lat", {"area": {"bbox": [46.0, 15.01, 46.05, 15.05]}}, 2, ("swapped", "[14.9", "swap them")),
    ("too wide", {"area": {"bbox": [-170.0, 0.0, 170.0, 1.0]}}, 2, ("area.bbox", "340.0 degrees", "split")),
    (
        "end before start",
        {"time": {"start": "2021-08-01", "end": "2021-07-01"}, "target": None},
        2,
        ("time", "end (2021-07-01) is before start (2021-08-01)", "swap"),
    ),
    ("target outside", {"target": "2022-01-01"}, 2, ("target", "2022-01-01", "2021-06-11 to 2021-08-08", "move")),
    (
        "target and every",
        {"time": {"start": "2021-06-11", "end": "2021-08-08", "every": "month"}},
        2,
        ("target", "2021-07-11", "time.every", "start, middle or end"),
    ),
    (
        "no items in time",
        {"time": {"start": "2020-01-01", "end": "2020-02-01"}, "target": None},
        2,
        ("no items match", "2020-01-01 to 2020-02-01", "this area has items of 2021-06-11 to 2021-08-08"),
    ),
    ("no items here", {"area": {"bbox": [3.0, 50.0, 3.1, 50.1]}}, 2, ("no items match", "move the area")),
    ("unknown mask", {"mask": {"asset": "haze"}}, 2, ("mask.asset", "'haze'", "cloud: [..]")),
    (
        "missing mask asset",
        {"mask": {"asset": "clm", "cloud": [1]}},
        2,
        ("cloud mask 'clm'", "none of 33 items", "mask.asset"),
    ),
    ("option of no method", {"method": {"name": "median", "tau_days": 3}}, 2, ("method.tau_days", "median")),
    ("unreachable catalog", {"catalog": "http://127.0.0.1:9/stac"}, 1, ("127.0.0.1:9", "answer")),
    ("all clouded", {"mask": {"asset": "scl", "cloud": [*range(1, 12)]}, "offset_dn": 0}, 1, ("clouded", "widen time")),
    (
        "no scheduler",
        {"cluster": {"kind": "address", "address": "tcp://127.0.0.1:9"}},
        1,
        ("cluster.address", "tcp://127.0.0.1:9", "dask scheduler"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "changes", "code", "said"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_request_is_told_kindly(run, tmp_path, monkeypatch, what, changes, code, said):
    monkeypatch.setattr("pipeline.cluster.ANSWER_S", 0.5)
    exit_code, message = run(**changes)
    assert exit_code == code, message
    flat = " ".join(message.split())
    for words in said:
        assert words in flat, flat
    assert "Traceback" not in message
    last = [line for line in message.splitlines() if line.startswith("cloudgate: ")]
    assert len(last) == 1
    assert len(last[0]) < 900
    assert not (tmp_path / "out" / "m.zarr" / "0" / "zarr.json").exists()
    if code == 2:
        assert not (tmp_path / "out" / "m.zarr").exists()


CHANGED: list[tuple[str, Callable[[dict[str, Any]], None], int, tuple[str, ...]]] = [
    ("asset", _without_asset("nir"), 2, ("band 'nir'", "none of", "name other bands")),
    ("mask asset", _without_asset("scl"), 2, ("cloud mask 'scl'", "mask.asset")),
    ("projection", _without_projection, 2, ("proj:", "no proj", "pixels cannot be placed", "add the field")),
    ("offset", undecidable, 2, ("cannot be decided", "offset_dn: 0 or offset_dn: -1000")),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "code", "said"), CHANGED, ids=[c[0] for c in CHANGED])
def test_items_that_lack_what_is_needed(run, small, tmp_path, what, change, code, said):
    fields: dict[str, Any] = {"target": None}
    if what == "offset":  # no other date may settle it
        fields["time"] = {"start": "2021-06-29", "end": "2021-06-29"}
    exit_code, message = run(catalog=_items(small, tmp_path / "items.json", change, few=what != "offset"), **fields)
    assert exit_code == code, message
    assert any(words in message for words in said), message
    assert said[-1] in message
    assert not (tmp_path / "out" / "m.zarr").exists()


def test_one_item_without_an_asset_is_left_out_and_listed(run, small, tmp_path):
    def one(feature):
        if feature["id"] == "S2A_33TWM_20210619_0_L2A":
            feature["assets"].pop("nir")

    code, message = run(catalog=_items(small, tmp_path / "items.json", one), target=None)
    assert code == 0, message
    dropped = json.loads((tmp_path / "out" / "m.zarr.run" / "items.json").read_text())["dropped"]
    assert [name for name, why in dropped if "nir" in why] == ["S2A_33TWM_20210619_0_L2A"]


# -- earlier results --------------------------------------------------------------------------------------------


def test_a_finished_store_outlives_every_refusal(run, small, tmp_path):
    code, message = run()
    assert code == 0, message
    store = tmp_path / "out" / "m.zarr"
    before = objects(store)
    code, message = run(method={"name": "mean"})
    assert code == 2
    assert "belongs to another request" in message
    assert "'median'" in message
    assert "--restart" in message
    for _, changes, *_ in WRONG:
        if "cluster" not in changes:
            exit_code, message = run(**changes)
            assert exit_code == 2, message
    run("--restart", time={"start": "1999-01-01", "end": "1999-02-01"}, target=None)
    run("--restart", banana=1)
    assert objects(store) == before
    code, message = run()
    assert code == 0
    assert "filled" not in message or objects(store) == before
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("dear diary")
    for options in ([], ["--restart"]):
        code, message = run("--out", "notes", *options)
        assert code == 2
        assert "notes exists and is no cloudgate store" in message
    assert (foreign / "diary.txt").read_text() == "dear diary"


def test_restart_starts_over(run, tmp_path):
    assert run()[0] == 0
    code, message = run("--restart", method={"name": "mean"})
    assert code == 0, message
    facts = open_mosaic(store=tmp_path / "out" / "m.zarr").attrs["cloudgate"]["periods"]["0"]
    assert facts["method"]["name"] == "mean"


# -- files and disks that fail ----------------------------------------------------------------------------------


def _truncated(small: SmallRegion, folder: Path, wanted: Callable[[str], bool]) -> str:
    def cut(feature: dict[str, Any]) -> None:
        if wanted(feature["id"]):
            source = Path(feature["assets"]["red"]["href"])
            target = folder / f"{feature['id']}.tif"
            target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
            feature["assets"]["red"]["href"] = str(target)

    return _items(small, folder / "items.json", cut, few=False)


def test_one_truncated_file_is_flagged_and_listed(run, small, tmp_path):
    catalog = _truncated(small, tmp_path, lambda name: name == "S2A_33TWM_20210619_0_L2A")
    code, message = run(catalog=catalog)
    assert code == 0, message
    store = tmp_path / "out" / "m.zarr"
    failed = (open_mosaic(store=store)["flags"].values & FLAGS["read_failed"]) > 0
    assert failed.any()
    manifest = RunFolder(store).read("period-0000", "manifest.json")
    assert manifest["failed"] >= 1
    assert {tuple(f[:2]) for f in manifest["failures"]} == {("S2A_33TWM_20210619_0_L2A", "red")}
    assert manifest["failed"] / manifest["reads"] < 0.05
    assert np.isfinite(open_mosaic(store=store)["red"].values[0][failed[0]]).mean() > 0.9
    shown = CliRunner().invoke(app, ["status", str(store), "--json"])
    assert json.loads(shown.stdout)["periods"][0]["failed_reads"] == manifest["failed"]


def test_many_truncated_files_publish_nothing_until_allowed(run, small, tmp_path):
    catalog = _truncated(small, tmp_path, lambda name: "33TWM" in name)
    code, message = run(catalog=catalog)
    assert code == 1, message
    assert "max_failed_fraction" in message
    assert "reads failed" in message
    assert "S2" in message
    store = tmp_path / "out" / "m.zarr"
    assert not (store / "0" / "zarr.json").exists()
    code, message = run(catalog=catalog, limits={"max_failed_fraction": 0.9})
    assert code == 0, message
    assert open_mosaic(store=store).sizes["time"] == 1


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not mount or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_says_so_and_the_run_goes_on_elsewhen(run, small, tmp_path):
    with _small_disk(tmp_path / "disk"):
        code, message = run("--out", "disk/m.zarr")
        assert code == 1, message
        assert "No space left" in message
        assert "free space" in message
        assert "run the same command again" in message or "run again" in message
        assert not (tmp_path / "disk" / "m.zarr" / "0" / "zarr.json").exists()


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_workers_that_cannot_write_say_so_and_the_same_command_goes_on(run, small, tmp_path, client):
    client.run(_limit_files, 20_000)
    try:
        code, message = run()
    finally:
        client.run(_limit_files, -1)
    assert code == 1, message
    assert "cannot write" in message
    assert "run the same command again" in message
    code, message = run()
    assert code == 0, message
    assert open_mosaic(store=tmp_path / "out" / "m.zarr").sizes["time"] == 1
    assert not list(tmp_path.rglob("*.partial"))


# -- the program itself -----------------------------------------------------------------------------------------


def test_a_program_exits_as_the_function_does(tmp_path):
    """The real process: exit code, one paragraph on standard error, nothing on standard output."""
    (tmp_path / "job.yaml").write_text("catalog: earth-search\narea: {bbox: [1, 2, 3]}\n")
    command = [sys.executable, "-m", "pipeline.cli", "mosaic", "job.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("cloudgate: job job.yaml: area.bbox")
    assert len(done.stderr.strip().splitlines()) == 1


def test_across_the_antimeridian_is_no_bad_input(run, real_data, tmp_path):
    code, message = run(
        catalog=str(real_data / "antimeridian_120m" / "items.geojson"),
        area={"bbox": [179.6, 67.2, -179.6, 67.4]},
        grid={"resolution_m": 120, "shard_px": 256},
        bands=["red"],
        time={"start": "2023-06-01", "end": "2023-06-05"},
        target=None,
        method={"name": "nearest"},
    )
    assert code == 0, message
    made = open_mosaic(store=tmp_path / "out" / "m.zarr")
    assert np.isfinite(made["red"].values).mean() > 0.5
    assert float(made["x"][-1] - made["x"][0]) < 60_000
