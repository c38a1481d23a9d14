"""Evaluation: methods on the same cases, tasks apart, every file that a report promises."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pupil
import pytest
import torch
from PIL import Image

from pipeline import models
from pipeline.errors import NothingClearError, WeightsError
from pipeline.evaluate import Report, evaluate
from pipeline.learnfile import Evaluation
from pipeline.models import weights

SIMULATED = {"seeds": 1, "size_px": 64, "dates": [10, 10], "scl_share": 1.0}


def asked(out: Path, **changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "out": out,
        "bands": ["blue", "nir"],
        "methods": ["linear", "regression", "median"],
        "sets": [{"name": "sim", "simulate": SIMULATED}],
        "max_cases": 3,
    }
    return Evaluation(**(fields | changes))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return evaluate(asked(tmp_path_factory.mktemp("eval")))


def test_a_report_holds_tables_plots_and_pictures(report: Report) -> None:
    names = {path.name for path in report.files}
    assert {"cases.csv", "summary.csv", "sim_complete_simulated_gaps.png", "sim_complete_simulated_dates.png"} <= names
    assert {f"sim_complete_simulated_{kind}.png" for kind in ("best", "median", "worst")} <= names
    for path in report.files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert np.asarray(picture.convert("L")).std() > 5
    with (report.files[0].parent / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows[:3]] == ["linear", "regression", "median"]


def test_tasks_are_never_mixed(report: Report) -> None:
    cases = {task: {row["case"] for row in report.rows if row["task"] == task} for task in ("complete", "predict")}
    assert cases["complete"]
    assert cases["predict"]
    assert not cases["complete"] & cases["predict"]
    for task in cases:
        rows = [row for row in report.summary if row["task"] == task]
        assert [row["method"] for row in rows] == ["linear", "regression", "median"]
        assert len({row["cases"] for row in rows}) == 1


def test_numbers_say_what_the_product_does(report: Report) -> None:
    by_method = {row["method"]: row for row in report.summary if row["task"] == "complete"}
    assert by_method["regression"]["gain"] == 0
    assert by_method["linear"]["gain_low"] <= by_method["linear"]["gain"] <= by_method["linear"]["gain_high"]
    assert by_method["linear"]["skill"] == 0
    assert by_method["regression"]["changed_gain"] == 0
    assert by_method["linear"]["changed_gain"] == pytest.approx(
        by_method["linear"]["changed_psnr"] - by_method["regression"]["changed_psnr"]
    )
    assert 0.5 < by_method["regression"]["covered"] <= 1
    assert np.isnan(by_method["linear"]["covered"])
    # methods that pass observed ground through are as wrong there as the masks are, and equally so
    assert by_method["linear"]["observed_mae"] == by_method["regression"]["observed_mae"]
    assert by_method["linear"]["observed_mae"] < by_method["median"]["observed_mae"]
    # every method is scored on the same pixels
    for case in {row["case"] for row in report.rows}:
        assert len({row["pixels"] for row in report.rows if row["case"] == case}) == 1


def test_real_masks_are_pasted_in_every_variant(small: Any, tmp_path: Path) -> None:
    job = {name: value for name, value in small.fields().items() if name not in ("bands", "target", "method")}
    job["area"] = {"bbox": small.bbox((300, 420), (100, 220))}
    variants = ["base", "inputs", "growth", "scl", "scl+check"]
    one = {"name": "own", "job": job, "tasks": ["complete"], "variants": variants}
    made = evaluate(
        asked(tmp_path, sets=[one], pastes=1, pictures=0, target_max_bad=0.3, methods=["linear", "regression"])
    )
    assert [row["variant"] for row in made.summary[::2]] == variants
    holes = {v: [row["case"] for row in made.rows if row["variant"] == v] for v in variants}
    assert all(names == holes["base"] for names in holes.values())
    by_variant = {row["variant"]: row["psnr"] for row in made.summary if row["method"] == "linear"}
    assert len(set(by_variant.values())) == len(variants)


def test_weights_are_scored_beside_the_classical_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.NETWORKS, "pupil", (pupil.PupilConfig, pupil.Pupil))
    torch.manual_seed(0)
    path = weights.save(models.build("pupil"), tmp_path / "own.safetensors", card={})
    both = ["regression", {"name": "timegate", "weights": str(path)}]
    made = evaluate(asked(tmp_path / "out", methods=both, max_cases=1, pictures=1))
    scores = {row["method"]: row["psnr"] for row in made.summary if row["task"] == "complete"}
    assert set(scores) == {"regression", "timegate (own)"}
    assert scores["timegate (own)"] == pytest.approx(scores["regression"], abs=0.3)  # gamma = 0: the prior


def test_the_sigma_of_the_weights_that_ship_is_calibrated_where_they_never_learned(
    real_data: Path, tmp_path: Path
) -> None:
    job = {
        "catalog": str(real_data / "flanders_31ues" / "items.geojson"),
        "area": {"bbox": [4.057, 50.742, 4.069, 50.750]},
        "time": {"start": "2017-01-01", "end": "2020-12-31"},
        "mask": {"asset": "clm", "cloud": [1, 2], "shadow": [3], "cloud_grow_m": 0, "shadow_grow_m": 0}
        | {"temporal_check": False},
    }
    sets = [{"name": "flanders_31ues", "job": job, "tasks": ["complete"]}]
    bands, methods = ["blue", "green", "red", "nir"], ["regression", "timegate"]
    made = evaluate(asked(tmp_path, bands=bands, methods=methods, sets=sets, max_cases=10, pictures=0))
    scores = {row["method"]: row for row in made.summary}
    assert 0.85 < scores["timegate"]["covered"] < 0.97  # 0.94 over all 30 cases
    assert scores["timegate"]["gain"] > 0.3  # 1.0 over all 30 cases


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    overcast = {"cloud_fraction_mean": [0.95, 0.95], "cloud_fraction_concentration": [200, 200]}
    grey = {"name": "grey", "simulate": SIMULATED | {"vary": overcast}, "tasks": ["predict"]}
    with pytest.raises(NothingClearError, match="set grey: there is no case to score"):
        evaluate(asked(tmp_path, sets=[{"name": "sim", "simulate": SIMULATED, "tasks": ["predict"]}, grey]))
    with (tmp_path / "cases.csv").open(newline="") as file:
        assert {row["set"] for row in csv.DictReader(file)} == {"sim"}  # what was done before it stays
    with pytest.raises(WeightsError, match=r"none\.safetensors"):
        evaluate(asked(tmp_path, methods=["regression", {"name": "timegate", "weights": "none.safetensors"}]))
