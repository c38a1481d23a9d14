"""The job files of ``tests/jobs`` on real Sentinel-2 sets, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import xarray as xr
from small_region import recipe
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.codes import dn_to_codes
from pipeline.items import day_text
from pipeline.jobfile import load_job
from pipeline.layers import FLAGS
from pipeline.reader import read_window
from pipeline.records import RunFolder
from pipeline.store import open_mosaic
from pipeline.tasks import compose_window

JOBS = Path(__file__).parent / "jobs"


@pytest.fixture
def run(
    real_data, tmp_path, cluster_fields, monkeypatch
) -> Callable[..., tuple[xr.Dataset, dict[str, Any], RunFolder]]:
    """Run a job file; gives the mosaic, the summary and the records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOUDGATE_DATA", str(real_data))

    def command(name: str, **changes: Any) -> tuple[xr.Dataset, dict[str, Any], RunFolder]:
        store = tmp_path / f"{name}-{len(list(tmp_path.glob('*.zarr')))}.zarr"
        sets = [f"cluster.{key}={value}" for key, value in cluster_fields.items()]
        sets += [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        options = [word for one in sets for word in ("--set", one)]
        done = CliRunner().invoke(app, ["mosaic", str(JOBS / f"{name}.yaml"), "--out", str(store), "--json", *options])
        assert done.exit_code == 0, done.output
        return open_mosaic(store=store), json.loads(done.stdout), RunFolder(store)

    return command


def _sane(made: xr.Dataset, records: RunFolder, *, filled: float, bands: dict[str, tuple[float, float]]) -> None:
    """Share filled of the ground a date shows, per period; plausible medians of bands; layers agree with each other."""
    slots = sorted(int(slot) for slot in made.attrs["cloudgate"]["periods"])
    for period, slot in enumerate(slots):
        now = made.isel(time=period)
        seen = records.read(f"period-{slot:04d}", "scout.json")
        flags = now["flags"].values
        nothing = (flags & FLAGS["no_data"]) > 0
        assert 1 - nothing.mean() >= filled * max(layer["valid_share"] for layer in seen["layers"])
        kinds = sum(((flags & FLAGS[name]) > 0).astype(int) for name in ("observed_at_anchor", "composed_in_time"))
        np.testing.assert_array_equal(kinds, ~nothing)
        np.testing.assert_array_equal(np.isnat(now["source_date"].values), nothing)
        assert not (flags & FLAGS["read_failed"]).any()
        for band, (low, high) in bands.items():
            values = now[band].values
            np.testing.assert_array_equal(np.isnan(values), nothing)
            assert low < np.nanmedian(values) < high, (band, float(np.nanmedian(values)))
            assert np.nanmin(values) > -0.1


FIELDS = {"blue": (0.01, 0.12), "green": (0.02, 0.15), "red": (0.01, 0.15), "nir": (0.1, 0.5)}


@pytest.mark.parametrize(
    ("name", "filled", "bands"),
    [
        ("bolzano_10m", 0.98, FIELDS),
        ("exeter_20m_mixedcrs", 0.95, FIELDS),
        ("gfmap_2023", 0.98, FIELDS),
        ("slovenia_eolearn", 0.99, FIELDS),
        ("antimeridian_120m", 0.55, {"red": (0.05, 1.1)}),
    ],
)
def test_a_real_set_becomes_a_plausible_mosaic(run, name, filled, bands):
    made, summary, records = run(name)
    _sane(made, records, filled=filled, bands=bands)
    assert summary["periods"][0]["failed"] == 0
    offsets = {value[0] for value in records.read("period-0000", "scout.json")["offsets"].values()}
    if name in ("antimeridian_120m", "slovenia_eolearn"):
        assert offsets == {0}


def test_a_year_in_months_keeps_every_slot(run):
    made, summary, records = run("flanders_31ues")
    assert [p["slot"] for p in summary["periods"]] == list(range(6))
    assert made.sizes["time"] == sum(p["published"] for p in summary["periods"]) >= 4
    _sane(made, records, filled=0.9, bands=FIELDS)
    by_month = made["nir"].median(("y", "x")).values
    assert by_month[-1] > by_month[0]  # June grows, January does not


def test_the_white_scene_is_no_anchor_and_leaves_no_white_pixel(run):
    made, summary, records = run("flanders_31uds")
    seen = records.read("period-0000", "scout.json")
    fails = {layer["id"][:10]: layer["fails"] for layer in seen["layers"]}
    assert fails["2018-09-23"]
    assert not any(anchor.startswith("2018-09-23") for anchor in summary["periods"][0]["anchors"])
    assert {value[0] for value in seen["offsets"].values()} == {0}
    _sane(made, records, filled=1.0, bands=FIELDS)
    assert float(made["blue"].max()) < 0.25  # a white roof, 0.23 on the clear date too; the white scene is brighter
    assert float(made["blue"].quantile(0.99)) < 0.12
    dates = made["source_date"].values.astype("datetime64[D]").astype(str)
    assert "2018-09-23" not in dates


def test_the_weights_that_ship_make_a_mosaic(run):
    """January to March, each month completed by the network; where it is observed, the same bytes as `regression`."""
    made, summary, records = run("flanders_31ues", method__name="timegate", time__end="2019-03-31")
    _sane(made, records, filled=0.9, bands=FIELDS)
    assert [note for period in summary["periods"] for note in period.get("notes", [])] == []
    flags = made["flags"].values
    composed = ((flags & FLAGS["composed_in_time"]) > 0) & ((flags & FLAGS["observed_at_anchor"]) == 0)
    assert composed.sum() > 200
    assert np.isfinite(made["uncertainty_nir"].values[composed]).all()
    plain, _, _ = run("flanders_31ues", time__end="2019-03-31")
    observed = (flags & FLAGS["observed_at_anchor"]) > 0
    for band in FIELDS:
        np.testing.assert_array_equal(made[band].values[observed], plain[band].values[observed])
        off = np.abs(made[band].values - plain[band].values)[composed]
        assert 0 < off.mean() < 2 * made[f"uncertainty_{band}"].values[composed].mean()
    about = made.attrs["cloudgate"]["periods"]["0"]["method"]
    assert about["name"] == "timegate"
    assert len(about["weights_sha256"]) == 64


# -- Zagreb: two tiles, swath edges -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zagreb(real_data) -> Callable[[str], tuple[Any, Any, Any, Any]]:
    """Request, scout's record, recipe and layers of the whole extent for a target date, in this process."""
    made: dict[str, tuple[Any, Any, Any, Any]] = {}

    def at(target: str) -> tuple[Any, Any, Any, Any]:
        if target not in made:
            job = load_job(JOBS / "zagreb.yaml", overrides=[f"target={target}"])
            request, seen, asked = recipe(job)
            made[target] = request, seen, asked, compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
        return made[target]

    return at


def _raw(asked: Any, day: str) -> tuple[np.ndarray, np.ndarray]:
    """The raw same-day fusion, reckoned apart: codes (band, y, x), and the SCL of it, first scene by id where valid."""
    grid = asked.grid
    codes = np.zeros((len(asked.bands), *grid.shape), np.uint16)
    scl = np.zeros(grid.shape, np.uint8)
    scenes = [item for one in asked.acquisitions if day_text(one.day) == day for item in one.items]
    assert scenes
    for item in sorted(scenes, key=lambda item: item.id):
        classes = read_window(item.assets["scl"], grid, kind="classes")
        values = np.stack(
            [
                dn_to_codes(read_window(item.assets[band], grid, kind="reflectance"), item.assets[band], item.offset_dn)
                for band in asked.bands
            ]
        )
        take = (values != 0).all(axis=0) & (classes != 0) & (scl == 0)
        codes[:, take] = values[:, take]
        scl[take] = classes[take]
    return codes, scl


def _certainly_clear(asked: Any, day: str) -> np.ndarray:
    """Pixels that are clear whatever the order of scenes: SCL has no cloud or shadow within the growth's reach."""
    _, scl = _raw(asked, day)
    reach = int(np.ceil(100 / asked.grid.resolution_m)) + 1
    bad = np.isin(scl, (3, 8, 9, 10)).astype(np.uint8)
    near = cv2.dilate(bad, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)) > 0
    return (scl > 1) & ~near  # 1 is defective


@pytest.mark.parametrize("target", ["2023-08-15", "2023-08-18"])
def test_no_pixel_stays_empty_that_any_date_shows_clear(zagreb, target):
    _, seen, asked, block = zagreb(target)
    empty = (block.codes == 0).any(axis=0)
    np.testing.assert_array_equal(empty, block.clear_count == 0)
    days = {one.day for one, rejected in zip(asked.acquisitions, asked.rejected, strict=True) if not rejected}
    shown = np.zeros(asked.grid.shape, bool)
    for day in sorted(days):
        shown |= _certainly_clear(asked, day_text(day))
    assert shown.mean() > 0.8
    assert not (empty & shown).any()
    once = block.clear_count == 1
    assert (block.flags[once] & FLAGS["low_confidence"]).all()
    assert seen.anchors is not None


@pytest.mark.parametrize("target", ["2023-08-15", "2023-08-18"])
def test_the_anchor_s_pixels_are_bit_exact_outside_the_strip(zagreb, target):
    _, _, asked, block = zagreb(target)
    observed = (block.flags & FLAGS["observed_at_anchor"]) > 0
    blended = (block.flags & FLAGS["blended_anchors"]) > 0
    assert observed.mean() > 0.2
    assert not (observed & blended).any()
    for day in np.unique(block.source_date[observed]):
        here = observed & (block.source_date == day)
        codes, _ = _raw(asked, day_text(day))
        same = (codes[:, here] == block.codes[:, here]).all(axis=0)
        # two tiles overlap: where the first by id is clouded the second speaks
        assert same.mean() > 0.98, day


@pytest.mark.parametrize("target", ["2023-08-15", "2023-08-18"])
def test_the_seam_between_the_tiles_is_no_worse_than_in_the_raw_fusion(zagreb, target):
    _, _, asked, block = zagreb(target)
    days, counts = np.unique(block.source_date[(block.flags & FLAGS["observed_at_anchor"]) > 0], return_counts=True)
    raw, scl = _raw(asked, day_text(days[counts.argmax()]))
    tops = sorted({item.assets["red"].transform[5] for one in asked.acquisitions for item in one.items})
    southern = round((asked.grid.top - tops[0]) / asked.grid.resolution_m)  # the row where the southern tile begins
    clear = np.isin(scl, (4, 5, 6, 7)) & (raw != 0).all(axis=0) & (block.codes != 0).all(axis=0)
    assert clear[southern].mean() > 0.1
    for number, band in enumerate(asked.bands):
        ratios = [_ratio(layer[number].astype(np.float32), southern, clear) for layer in (block.codes, raw)]
        assert ratios[0] <= ratios[1] + 0.05, (band, ratios)


def _ratio(values: np.ndarray, row: int, known: np.ndarray) -> float:
    def across(at: int) -> float:
        both = known[at - 1] & known[at]
        return float(np.abs(values[at][both] - values[at - 1][both]).mean())

    return across(row) / np.mean([across(row + d) for d in (-6, -5, -4, -3, 3, 4, 5, 6)])


def test_the_zagreb_job_through_the_command(run, zagreb):
    made, summary, _ = run("zagreb")
    _, _, asked, block = zagreb("2023-08-15")
    for number, band in enumerate(asked.bands):
        expected = np.where(block.codes[number] == 0, np.nan, (block.codes[number].astype(np.float32) - 1000) / 10_000)
        np.testing.assert_allclose(made[band].values[0], expected, atol=1e-7)
    assert summary["periods"][0]["failed"] == 0
