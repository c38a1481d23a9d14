"""``cloudgate simulate``: what it writes is a catalog with truth and a job that runs as it is."""

import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import yaml
from typer.testing import CliRunner

from pipeline.bands import to_reflectance
from pipeline.cli import app
from pipeline.store import open_mosaic

SMALL = [
    "--size-px",
    "128",
    "--dates",
    "4",
    "--days",
    "16",
    "--start",
    "2022-08-01",
    "--seed",
    "3",
    "--block-px",
    "128",
]


def _simulate(out, *more):
    return CliRunner().invoke(app, ["simulate", "--out", str(out), *SMALL, *more])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that the command wrote, and what it printed."""
    out = tmp_path_factory.mktemp("simulated") / "scenes"
    said = _simulate(out, "--tile", "32UPU", "--cloudiness", "0.2", "--bands", "B02, red, swir16")
    assert said.exit_code == 0, said.output
    return out, said.output


def test_what_was_asked_for_is_what_is_written(written):
    out, said = written
    features = json.loads((out / "items.json").read_text())["features"]
    assert [f["properties"]["datetime"][:10] for f in features] == [
        "2022-08-01",
        "2022-08-06",
        "2022-08-11",
        "2022-08-16",
    ]
    assert {f["id"].split("_")[1] for f in features} == {"32UPU"}
    first = features[0]["assets"]
    with rasterio.open(out / first["red"]["href"]) as red, rasterio.open(out / first["swir16"]["href"]) as swir:
        assert (red.shape, red.crs.to_epsg(), red.res) == ((128, 128), 32632, (10, 10))
        assert (swir.shape, swir.bounds) == ((64, 64), red.bounds)
        assert (red.bounds.left, red.bounds.top) == (600000, 5400000)  # the tile's own corner
    assert "4 scenes of 128 x 128 px, 2022-08-01 to 2022-08-16" in said
    assert f"cloudgate mosaic {out / 'job.yaml'}" in said.replace("\n", "")


def test_its_job_runs_and_the_mosaic_is_near_the_truth(written, tmp_path):
    out, _ = written
    store = tmp_path / "mosaic.zarr"
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "mosaic", str(out / "job.yaml")]
    done = subprocess.run(
        [*command, "--out", str(store), "--set", "cluster.workers=1", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["periods"][0]["published"]
    made = open_mosaic(store=store).isel(time=0)
    assert str(made.time.values)[:10] == json.loads((out / "truth" / "truth.json").read_text())["target"]
    with rasterio.open(out / "truth" / "clear_look" / "red.tif") as source:
        rows = ((source.bounds.top - made.y.values) / 10).astype(int)
        cols = ((made.x.values - source.bounds.left) / 10).astype(int)
        truth = to_reflectance(source.read(1)[np.ix_(rows, cols)])
    assert made.red.shape[0] >= 100
    assert float(np.nanmean(np.abs(made.red.values - truth))) < 0.02
    assert float(np.isfinite(made.red.values).mean()) > 0.99


def test_the_seed_is_the_scene(tmp_path):
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", "4"))):
        assert _simulate(tmp_path / name, *more).exit_code == 0
    pictures = {}
    for name in "abc":
        job = yaml.safe_load((tmp_path / name / "job.yaml").read_text())
        assert job["bands"] == ["blue", "green", "red", "nir"]
        paths = sorted((tmp_path / name).rglob("B04.tif"))
        assert len(paths) == 4
        with rasterio.open(paths[0]) as source:
            pictures[name] = source.read(1)
    np.testing.assert_array_equal(pictures["a"], pictures["b"])
    assert (pictures["a"] != pictures["c"]).mean() > 0.5


def test_cloudiness_is_the_share_of_cloud(tmp_path):
    shares = []
    for cloudiness in ("0.02", "0.9"):
        out = tmp_path / cloudiness
        assert _simulate(out, "--dates", "12", "--bands", "red", "--cloudiness", cloudiness).exit_code == 0
        states = [rasterio.open(path).read(1) for path in sorted((out / "truth" / "state").glob("*.tif"))]
        assert len(states) == 12
        shares.append(np.mean([(state == 1).mean() for state in states]))
    assert shares[0] < 0.3 < 0.6 < shares[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--dates", "20"], "dates: 20 passes do not fit in 16 days"),
        (["--size-px", "20000"], "size_px: 20000 is out of range"),
        (["--size-px", "129"], "use even numbers"),
        (["--block-px", "100"], "block_px: 100 must be a multiple of 32"),
        (["--start", "1.8.2022"], "start: '1.8.2022' is no date"),
        (["--bands", "blue,puce"], "unknown band 'puce'"),
        (["--bands", "coastal"], "'coastal' is not simulated; choose from"),
        (["--tile", "99ZZZ"], "'99ZZZ' is no MGRS tile"),
        (["--cloudiness", "3"], "--cloudiness"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_anything_is_written(tmp_path, wrong, said):
    answer = _simulate(tmp_path / "scenes", *wrong)
    assert answer.exit_code == 2
    assert said in " ".join(answer.output.split())
    assert not (tmp_path / "scenes").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "scenes").write_text("mine")
    answer = _simulate(tmp_path / "scenes")
    assert answer.exit_code == 2
    assert "is a file; name a folder" in " ".join(answer.output.split())
    assert (tmp_path / "scenes").read_text() == "mine"
