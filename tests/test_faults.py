"""Flaky sources: what passes leaves no trace, what lasts is flagged and counted, what is flipped is caught or told."""

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import small_region
from small_region import InlineClient

from pipeline.errors import ReadError, TooManyFailuresError
from pipeline.faults import KINDS, Faults, Striker
from pipeline.handles import HANDLES, with_dataset
from pipeline.layers import FLAGS
from pipeline.mosaic import build
from pipeline.profiles import Profile, Retry, load_profile
from pipeline.records import RunFolder
from pipeline.relay import Source, hash_name, verified
from pipeline.serve import RangeServer
from pipeline.store import open_mosaic

QUICK = Retry(tries=4, backoff_s=0.02, request_tries=8, request_budget_s=20)


@pytest.fixture
def profile() -> Profile:
    return load_profile("generic").model_copy(update={"retry": QUICK})


def _catalog(small: small_region.SmallRegion, url: str, path: Path) -> str:
    """The small region's items, few dates, with addresses on a server and their checksums."""
    features = [
        f for f in json.loads(small.items.read_text())["features"] if f["properties"]["datetime"] < "2021-07-05"
    ]
    for feature in features:
        for asset in feature["assets"].values():
            if not asset["href"].startswith("./"):
                continue
            name = asset["href"].removeprefix("./")
            asset["file:checksum"] = "1220" + hashlib.sha256((small.folder / name).read_bytes()).hexdigest()
            asset["href"] = f"{url}/{name}"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)


def _job(small, url: str, tmp_path: Path, name: str, **more):
    (tmp_path / name).mkdir()
    part = {
        "catalog": _catalog(small, url, tmp_path / name / "items.json"),
        "area": {"bbox": small.bbox((200, 400), (200, 400))},
        "grid": {"crs": "EPSG:32633", "shard_px": 128},
        "time": {"start": "2021-06-11", "end": "2021-07-04"},
        "target": "2021-06-29",
        "bands": ["red", "nir"],
    }
    return small.job(tmp_path / f"{name}.zarr", **part | more)


@pytest.fixture
def quick(monkeypatch):
    """Short waits: what is tested is what happens, not how long it takes."""
    monkeypatch.setattr("pipeline.relay.TIMEOUT_S", (2.0, 0.4))
    monkeypatch.setattr("pipeline.relay.MOST_WAIT_S", 0.1)
    monkeypatch.setattr("pipeline.handles.MAX_WAIT_S", 0.05)
    monkeypatch.setattr("pipeline.faults.LATENCY_S", 0.05)
    monkeypatch.setenv("GDAL_HTTP_TIMEOUT", "2")
    HANDLES.close()
    yield
    HANDLES.close()


def test_transient_faults_leave_no_trace(small, tmp_path, monkeypatch, quick):
    """Flipped bits too, where files carry a checksum and the job holds them to it. What was repeated is counted."""
    place, repeated = tmp_path / "cloudgate.prom", 0
    monkeypatch.setenv("CLOUDGATE_METRICS", str(place))
    with RangeServer(small.folder) as server:
        summary = build(job=_job(small, server.url, tmp_path, "quiet"), client=InlineClient(monkeypatch))
    assert summary.periods[0]["retries"] == 0
    for name, kinds, limits in (
        ("ranges", tuple(kind for kind in KINDS if kind != "flip"), {}),
        ("files", KINDS, {"verify_checksums": True}),
    ):
        HANDLES.close()
        with RangeServer(small.folder, faults=Faults(rate=0.2, seed=1, kinds=kinds, stall_s=2)) as server:
            job = _job(small, server.url, tmp_path, name, limits=limits)
            summary = build(job=job, client=InlineClient(monkeypatch))
        assert summary.periods[0]["failed"] == 0
        assert summary.periods[0]["retries"] > 0
        repeated += summary.periods[0]["retries"]
        assert f"cloudgate_read_retries_total {repeated}.0" in place.read_text()
        same_arrays(tmp_path / "quiet.zarr", tmp_path / f"{name}.zarr")


def same_arrays(one: Path, other: Path) -> None:
    first, second = (small_region.objects(path) for path in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_lasting_faults_are_flagged_counted_and_limited(small, tmp_path, monkeypatch, quick):
    with RangeServer(small.folder, faults=Faults(vanished=("*20210629*B04*",))) as server:
        # without the temporal check, which marks a little less where a date is missing
        plain = {"mask": {"temporal_check": False}}
        job = _job(small, server.url, tmp_path, "gone", limits={"max_failed_fraction": 0.9}, **plain)
        summary = build(job=job, client=InlineClient(monkeypatch))
        assert summary.periods[0]["failed"] > 0
        made = open_mosaic(store=tmp_path / "gone.zarr").isel(time=0)
        struck = (made["flags"].values & FLAGS["read_failed"]) > 0
        assert struck.any()
        strict = _job(small, server.url, tmp_path, "strict", limits={"max_failed_fraction": 0.001})
        with pytest.raises(TooManyFailuresError, match=r"reads failed.*max_failed_fraction.*20210629.* offset: .*404"):
            build(job=strict, client=InlineClient(monkeypatch))
        assert not (tmp_path / "strict.zarr" / "0" / "zarr.json").exists()
    with RangeServer(small.folder) as server:
        whole = _job(small, server.url, tmp_path, "whole", **plain)
        build(job=whole, client=InlineClient(monkeypatch))
    all_there = open_mosaic(store=tmp_path / "whole.zarr").isel(time=0)
    counts, all_counts = (each["clear_count"].values.astype(int) for each in (made, all_there))
    assert (counts <= all_counts).all()
    assert (counts[struck] < all_counts[struck]).any()
    assert RunFolder(tmp_path / "gone.zarr").marks(0)[0]["failures"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_fault(kind, tmp_path, profile, quick):
    """Every second request is struck; windows of DEFLATE files come over right, each of a file of its own.

    They are read side by side, so that their waits are one; what strikes a file does not depend on the others.
    """
    truth = _raster(tmp_path / "0.tif", "deflate")
    for number in range(1, 10):
        shutil.copy(tmp_path / "0.tif", tmp_path / f"{number}.tif")

    def read(number: int) -> np.ndarray:
        window = rasterio.windows.Window(number * 40, 0, 100, 300)
        return with_dataset(f"{server.url}/{number}.tif", profile, lambda d: d.read(1, window=window))

    with RangeServer(tmp_path, faults=Faults(rate=0.5, seed=3, kinds=(kind,), stall_s=1)) as server:
        with ThreadPoolExecutor(10) as pool:
            for number, values in enumerate(pool.map(read, range(10))):
                np.testing.assert_array_equal(values, truth[:300, number * 40 : number * 40 + 100])


def _raster(path: Path, compress: str) -> np.ndarray:
    values = np.random.default_rng(1).integers(1, 3000, (512, 512)).astype(np.uint16)
    about = {"driver": "COG", "width": 512, "height": 512, "count": 1, "dtype": "uint16", "blocksize": 128}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 499980, 0, -10, 5100000)}
    with rasterio.open(path, "w", compress=compress, **about, **place) as sink:
        sink.write(values, 1)
    return values


@pytest.mark.parametrize(("compress", "most"), [("deflate", 0.25), ("none", 1.0), ("zstd", 1.0)])
def test_a_flipped_bit_is_mostly_caught_by_deflate(compress, most, tmp_path, profile, quick):
    """libtiff takes a DEFLATE block that decodes to too many bytes as it is, so some pass; the others let all pass."""
    truth = _raster(tmp_path / "a.tif", compress)
    wrong = 0
    with RangeServer(tmp_path, faults=Faults(rate=0.5, seed=5, kinds=("flip",))) as server:
        for row in range(0, 512, 128):
            for col in range(0, 512, 128):
                HANDLES.close()
                window = rasterio.windows.Window(col, row, 128, 128)
                try:
                    values = with_dataset(f"{server.url}/a.tif", profile, lambda d, w=window: d.read(1, window=w))
                except ReadError:
                    continue
                wrong += not np.array_equal(values, truth[row : row + 128, col : col + 128])
    assert (wrong / 16 <= most) if compress == "deflate" else wrong > 0


def test_a_checksum_of_the_whole_file_is_held(tmp_path, profile, quick):
    truth = _raster(tmp_path / "a.tif", "none")
    checksum = "1220" + hashlib.sha256((tmp_path / "a.tif").read_bytes()).hexdigest()
    with RangeServer(tmp_path, faults=Faults(rate=0.4, seed=8, kinds=("flip", "truncate"))) as server:
        copy = verified(f"{server.url}/a.tif", checksum, profile)
    with rasterio.open(copy) as source:
        np.testing.assert_array_equal(source.read(1), truth)
    with RangeServer(tmp_path) as server, pytest.raises(ReadError, match="disagree with its file:checksum"):
        verified(f"{server.url}/a.tif", "1220" + "0" * 64, profile)
    assert hash_name("d50110" + "0" * 32) == ("md5", "0" * 32)
    assert hash_name("1220" + "0" * 10) is None


def test_a_server_that_never_recovers_is_given_up_within_the_budget(tmp_path, quick):
    _raster(tmp_path / "a.tif", "deflate")
    short = Profile(name="p", bands={}, retry=Retry(tries=3, backoff_s=0.01, request_tries=50, request_budget_s=1))
    with RangeServer(tmp_path, faults=Faults(broken=("*",))) as server:
        began = time.monotonic()
        with pytest.raises(ReadError, match=r"HTTP 503.*up to 50 times and 1 s"):
            with_dataset(f"{server.url}/a.tif?sig=secret", short, lambda d: d.read(1))
        assert time.monotonic() - began < 10


def test_retry_after_is_obeyed(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"x" * 100)
    waits: list[float] = []
    monkeypatch.setattr("pipeline.relay.time.sleep", waits.append)
    with RangeServer(tmp_path, faults=Faults(rate=0.7, seed=2, kinds=("429",))) as server:
        for start in range(10):
            Source(f"{server.url}/a.bin", None).get(f"bytes={start}-20")
    assert {wait for wait in waits if wait > 0.5} == {1.0}


def test_the_same_seed_strikes_the_same_requests():
    drawn = [[Striker(Faults(rate=0.3, seed=seed)).strike("a", str(n))[0] for n in range(200)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 0.2 < sum(kind is not None for kind in drawn[0]) / 200 < 0.4
    with pytest.raises(ValueError, match="unknown kinds"):
        Faults(kinds=("banana",))
