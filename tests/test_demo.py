"""The demo on a smaller region: its scores, what it leaves, that it works offline, and that no server stays."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from pipeline import scenes
from pipeline.config import LEARNED, METHODS
from pipeline.demo import BANDS, methods_here, run_demo
from pipeline.jobfile import load_job
from pipeline.mosaic import build, plan
from pipeline.runner import Silent
from pipeline.scene_files import Cut
from pipeline.store import open_mosaic


def _children() -> set[int]:
    """Processes below this one, but for Python's own resource tracker."""
    return {
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline())
    }


@pytest.fixture(scope="module")
def smaller():
    """The demo's passes over an eighth of its ground; the southern tile begins 1.2 km below the top."""
    with pytest.MonkeyPatch.context() as patch:
        small = replace(scenes.DEMO_PARAMS, width_px=288, height_px=304, north_m=5_101_200.0)
        patch.setattr(scenes, "DEMO_PARAMS", small)
        patch.setattr(scenes, "DEMO_CUTS", (Cut("33TWM", 0, 0, 192, 288), Cut("33TWL", 120, 0, 184, 288)))
        yield


@pytest.fixture(scope="module")
def demo(smaller, tmp_path_factory):
    """(folder, result, processes left over) of one run."""
    folder, before = tmp_path_factory.mktemp("demo") / "d", _children()
    result = run_demo(folder)
    return folder, result, _children() - before


def test_it_leaves_what_it_says(demo):
    folder, result, left = demo
    assert left == set()
    assert {p.name for p in folder.iterdir()} >= {"mosaic.zarr", "preview.png", "job.yaml", "scenes"}
    assert result.summary.periods[0]["published"]
    made = open_mosaic(store=folder / "mosaic.zarr")
    assert np.isfinite(made["red"].values).mean() > 0.98
    with Image.open(folder / "preview.png") as picture:
        assert min(picture.size) > 300


def test_every_method_is_scored_and_regression_beats_interpolation(demo):
    scores = {score.method: score for score in demo[1].scores}
    assert set(scores) == set(methods_here(BANDS, Silent())) >= set(METHODS) - set(LEARNED)
    assert "timegate" in scores  # with the weights that come with the package
    assert scores["timegate"].gap_psnr > scores["regression"].gap_psnr - 0.2
    assert scores["timegate"].unfilled == scores["regression"].unfilled
    assert scores["regression"].gap_psnr > scores["linear"].gap_psnr + 1
    classical = set(scores) - set(LEARNED)
    assert max(classical, key=lambda name: scores[name].gap_psnr) == "regression"
    assert scores["regression"].unfilled == scores["median"].unfilled


def test_it_works_without_its_servers(demo, monkeypatch):
    """From the files alone: the job as it is (finished), and with another method."""
    folder, result, _ = demo
    monkeypatch.chdir(folder.parent)
    job = yaml.safe_load((folder / "job.yaml").read_text())
    assert not Path(job["catalog"]).is_absolute()
    frozen = json.loads((folder / "mosaic.zarr.run" / "items.json").read_text())["items"]
    hrefs = [item["assets"][name]["href"] for item in frozen for name in ("blue", "green", "red", "nir", "scl")]
    assert all(Path(href).is_file() for href in hrefs)
    again = load_job(folder / "job.yaml")
    assert build(job=again, client=object()).periods[0]["message"] == "finished before"
    other = load_job(folder / "job.yaml", overrides=["method.name=median"], store=str(folder.parent / "median.zarr"))
    assert plan(job=other).periods[0]["scenes"] == result.summary.periods[0]["scenes"]


def test_an_interruption_leaves_no_server(smaller, tmp_path, monkeypatch):
    class Interrupts(Silent):
        """Stops the run when the servers are up and the scout is done."""

        def begin(self, what, total):
            """Like Ctrl-C."""
            if what == "shards":
                raise KeyboardInterrupt

    before = _children()
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "d", progress=Interrupts())
    assert _children() - before == set()
