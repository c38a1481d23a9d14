"""What stands beside a store: STAC for other programs, GeoTIFFs of the same numbers, both as a catalog again."""

import json
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from contextlib import closing
from pathlib import Path
from socket import socket

import numpy as np
import pystac
import pytest
import rasterio
import rioxarray  # noqa: F401  (the .rio accessor)
import zarr
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.render import RenderExtension
from rasterio.enums import ColorInterp
from shapely.geometry import box, shape
from small_region import InlineClient, SmallRegion
from typer.testing import CliRunner

from pipeline import describe, export
from pipeline.cli import app
from pipeline.cog import _windows
from pipeline.describe import EXTENSIONS
from pipeline.errors import ConfigError, StoreError, StoreMismatchError
from pipeline.grid import Grid
from pipeline.mosaic import build
from pipeline.store import open_mosaic

MONTHS = {"start": "2021-06-11", "end": "2021-08-08", "every": "month"}


@pytest.fixture(scope="module")
def monthly(small: SmallRegion, tmp_path_factory) -> Path:
    """Three months of a part of the region, with GeoTIFFs."""
    store = tmp_path_factory.mktemp("results") / "m.zarr"
    with pytest.MonkeyPatch.context() as patch:
        job = small.job(
            store, name="Small region", time=MONTHS, target="middle", area={"bbox": small.bbox((150, 450), (90, 490))}
        )
        job = job.model_copy(update={"output": job.output.model_copy(update={"cog": True})})
        assert all(p["published"] for p in build(job=job, client=InlineClient(patch)).periods)
    return store


def _items(folder: Path) -> list[pystac.Item]:
    return sorted(pystac.Collection.from_file(str(folder / "collection.json")).get_items(), key=lambda i: i.id)


def test_the_collection_and_items_are_valid_and_tell_what_the_store_is(monthly, small):
    folder = monthly.parent / "m.stac"
    collection = pystac.Collection.from_file(str(folder / "collection.json"))
    items = _items(folder)
    # pystac brings the schemas of the core; test_stac_extensions.py asserts what extensions ask
    pystac.validation.validate_dict(collection.to_dict(), extensions=[])
    assert [item.id for item in items] == [f"Small-region_2021-0{d}" for d in ("6-20", "7-16", "8-04")]
    mosaic = open_mosaic(store=monthly)
    scenes = {f["id"] for f in json.loads(small.items.read_text())["features"]}
    for number, item in enumerate(items):
        pystac.validation.validate_dict(item.to_dict(include_self_link=False), extensions=[])
        assert set(item.stac_extensions) == set(EXTENSIONS.values())
        projection = ProjectionExtension.ext(item)
        assert projection.epsg == 32633
        assert tuple(projection.shape) == mosaic["red"].shape[1:]
        assert tuple(projection.transform)[:6] == tuple(mosaic.rio.transform())[:6]
        assert shape(item.geometry).equals(box(*item.bbox))
        render = RenderExtension.ext(item).renders["colour"]
        assert render.assets == ["red", "green", "blue"]
        assert np.datetime64(item.datetime.date()) == mosaic["time"].values[number].astype("datetime64[D]")
        store = item.assets["zarr"]
        assert (store.extra_fields["zarr:consolidated"], store.extra_fields["zarr:zarr_format"]) == (True, 3)
        assert Path(store.get_absolute_href()) == monthly
        band = item.assets["red"].to_dict()["bands"][0]
        assert (band["raster:scale"], band["raster:offset"], band["nodata"]) == (1e-4, -0.1, 0)
        assert (band["eo:common_name"], band["eo:center_wavelength"]) == ("red", 0.6646)
        assert item.properties["processing:software"].keys() == {"cloudgate"}
        assert "median of" in item.properties["processing:lineage"]
        links = [link for link in item.links if link.rel == "derived_from"]
        assert {link.title for link in links} <= scenes
        assert len(links) > 3
        assert Path(links[0].get_absolute_href().partition("#")[0]).resolve() == small.items.resolve()
        text = (folder / f"{item.id}.json").read_text()
        assert str(monthly.parent) not in text


def test_rustac_serves_the_collection(monthly):
    folder = monthly.parent / "m.stac"
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "rustac"), "serve", "--addr", f"127.0.0.1:{port}"]
    command += ["--load-collection-items", "collection.json"]
    # in the folder: rustac takes relative links from where it runs
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asked = f"http://127.0.0.1:{port}/search?collections=Small-region&datetime=2021-07-01T00:00:00Z/2021-07-31T00:00:00Z"
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=20) as answer:
                    found = json.load(answer)["features"]
                break
            except OSError:
                assert time.monotonic() < end, "rustac does not answer"
                time.sleep(0.1)
        assert [item["id"] for item in found] == ["Small-region_2021-07-16"]
    finally:
        server.terminate()
        server.wait()


def test_geotiffs_hold_the_store_s_numbers_with_overviews_and_colours(monthly):
    arrays = zarr.open_group(monthly, path="0", mode="r")
    for number, item in enumerate(_items(monthly.parent / "m.stac")):
        for name in ("red", "nir", "flags", "clear_count", "source_date"):
            with rasterio.open(item.assets[name].get_absolute_href()) as cog:
                np.testing.assert_array_equal(cog.read(1), arrays[name][number])
                assert cog.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
                assert cog.crs.to_epsg() == 32633
                assert tuple(cog.bounds) == tuple(item.properties["proj:bbox"])
                if name in ("red", "nir"):
                    assert (cog.scales, cog.offsets, cog.nodata) == ((1e-4,), (-0.1,), 0)
                assert cog.colorinterp[0] == (ColorInterp.red if name == "red" else ColorInterp.gray)
        with rasterio.open(monthly.parent / "m.cog" / f"{item.id}.vrt") as colour:
            assert colour.colorinterp == (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
            np.testing.assert_array_equal(colour.read(3), arrays["blue"][number])
    assert not list(monthly.parent.rglob(".*"))


def test_overviews_of_a_large_geotiff_average_over_valid_pixels(tmp_path):
    from test_readers import _write

    grid = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49999, 1400, 1200, 512)
    store = _write(tmp_path / "m.zarr", grid)
    tracemalloc.start()
    (red,) = export.export_cogs(store=store, out=tmp_path / "tif", bands=["B04"])
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    with rasterio.open(red) as cog:
        assert cog.overviews(1) == [2, 4]
    with rasterio.open(red, overview_level=0) as half:
        ours = zarr.open_array(store, path="1/red", mode="r")[0].astype(int)
        assert np.abs(half.read(1).astype(int) - ours).max() <= 1
    assert all(
        r1 - r0 <= 4096 and c1 - c0 <= 4096
        for (r0, r1), (c0, c1) in _windows(Grid(**{**grid.__dict__, "height": 20000, "width": 9000}))
    )


def _search(catalog: Path, small: SmallRegion, tmp_path: Path, **changes) -> list:
    job = {**small.fields(), "catalog": str(catalog), "area": {"bbox": small.bbox((150, 450), (90, 490))}, **changes}
    (tmp_path / "job.yaml").write_text(json.dumps(job, default=str))
    return ["search", str(tmp_path / "job.yaml"), "--json"]


def test_our_own_results_are_a_catalog_and_a_job_runs_on_them(monthly, small, tmp_path, monkeypatch):
    for folder in ("m.stac", "m.cog"):
        done = CliRunner().invoke(app, _search(monthly.parent / folder, small, tmp_path))
        assert done.exit_code == 0, done.output
        assert [item["id"] for item in json.loads(done.stdout)["items"]] == [
            f"Small-region_2021-0{d}" for d in ("6-20", "7-16", "8-04")
        ]
    changes = {
        "catalog": str(monthly.parent / "m.stac"),
        "method": {"name": "median"},
        "mask": {"temporal_check": False, "cloud_grow_m": 0},
    }
    job = small.job(
        tmp_path / "quarter.zarr", target="2021-07-16", area={"bbox": small.bbox((150, 450), (90, 490))}, **changes
    )
    assert build(job=job, client=InlineClient(monkeypatch)).periods[0]["scenes"] == 3
    quarter, months = open_mosaic(store=tmp_path / "quarter.zarr"), open_mosaic(store=monthly)
    common = months.sel(x=quarter.x, y=quarter.y)["red"].values
    known = np.isfinite(common).any(axis=0)
    expected = np.nanmedian(np.where(known, common, 0), axis=0)
    assert known.mean() > 0.9
    np.testing.assert_allclose(quarter["red"].values[0][known], expected[known], atol=1.01e-4)


# -- bad input --------------------------------------------------------------------------------------------------


def _fails(code: int, *command: str) -> str:
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


def test_wrong_wishes_are_answered_kindly(monthly, tmp_path):
    store = str(monthly)
    assert "--cog FOLDER, or --overviews" in _fails(2, "export", store)
    assert "3 finished periods (0 to 2), which show 2021-06-20" in _fails(
        2, "export", store, "--cog", str(tmp_path), "--period", "3"
    )
    assert "period: 2020-01-01 is not there" in _fails(
        2, "export", store, "--cog", str(tmp_path), "--period", "2020-01-01"
    )
    assert "no layer 'swir22'; it has blue" in _fails(
        2, "export", store, "--cog", str(tmp_path), "--bands", "red,swir22"
    )
    assert "no finished mosaic" in _fails(2, "export", str(tmp_path / "none.zarr"), "--cog", str(tmp_path))
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in _fails(
        1, "export", store, "--cog", str(tmp_path / "file"), "--bands", "red", "--period", "0"
    )
    with pytest.raises(ConfigError, match="no folder on disk"):
        export.export_cogs(store=monthly, out="s3://bucket/x")
    other = tmp_path / "other.zarr"
    zarr.create_group(other, path="0", attributes={"mine": 1})
    for arguments in (["--cog", str(tmp_path / "x")], ["--overviews"]):
        assert "another program" in _fails(2, "export", str(other), *arguments)
    half = tmp_path / "half.zarr"
    (half / "0" / "red" / "c").mkdir(parents=True)
    for arguments in (["--cog", str(tmp_path / "x")], ["--overviews"]):
        assert "no finished mosaic" in _fails(2, "export", str(half), *arguments)
    assert not (tmp_path / "x").exists()


def test_a_period_is_found_by_number_or_day(monthly):
    attrs = open_mosaic(store=monthly).attrs
    assert [describe.choose_slots(attrs, wish) for wish in (None, 0, "-1", "2021-07-16", "2021-07-02")] == [
        [0, 1, 2],
        [0],
        [2],
        [1],
        [1],
    ]
    with pytest.raises(StoreMismatchError):
        export.export_cogs(store=monthly.parent / "none.zarr", out=monthly.parent / "x")
    assert issubclass(StoreError, Exception)
