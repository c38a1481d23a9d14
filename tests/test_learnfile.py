"""TRAIN.yaml and EVAL.yaml: every fault is answered with the field, the value and the way out."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.learnfile import job_of, label, load_evaluation, load_training

TRAIN: dict[str, Any] = {
    "store": "samples",
    "out": "model",
    "sources": [{"name": "sim", "simulate": {"seeds": 2}}],
}
EVALUATE: dict[str, Any] = {
    "out": "scores",
    "methods": ["linear", "regression"],
    "sets": [{"name": "sim", "simulate": {"seeds": 2}}],
}


def written(folder: Path, fields: dict[str, Any]) -> Path:
    path = folder / "file.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 3}, "epochs: there is no such field"),
        ({"fit": {"epoch": 3}}, "fit.epoch: there is no such field; did you mean 'epochs'?"),
        ({"sources": []}, "sources"),
        ({"sources": [{"name": "a"}]}, "give exactly one of job and simulate"),
        ({"sources": [{"name": "a", "job": {"bands": ["red"]}}]}, "job.bands has no meaning here"),
        ({"sources": [{"name": "a", "simulate": {}}, {"name": "a", "simulate": {}}]}, "'a' is named twice"),
        ({"sources": [{"name": "a b", "simulate": {}}]}, "sources.0.name"),
        ({"sources": [{"name": "a", "simulate": {"vary": {"clouds": [0, 1]}}}]}, "'clouds' is no parameter"),
        ({"sources": [{"name": "a", "simulate": {"vary": {"haze_mean": [1, 0]}}}]}, "must be [low, high]"),
        ({"sources": [{"name": "a", "simulate": {"dates": [2, 8]}}]}, "at least 3 passes"),
        ({"bands": ["B10"]}, "cirrus cannot be simulated"),
        ({"bands": ["purple"]}, "unknown band 'purple'"),
        ({"cases": {"patch_px": 50}}, "cases.patch_px"),
        ({"start": "model/weights.safetensors", "out": "model"}, "lies in out, where this training writes its own"),
        ({"split": {"validation_time": {"start": "2020-02-01", "end": "2020-01-01"}}}, "is before start"),
        (
            {
                "split": {
                    "validation_time": {"start": "2020-01-01", "end": "2020-03-01"},
                    "test_time": {"start": "2020-03-01", "end": "2020-04-01"},
                }
            },
            "overlap; the best network would be chosen on dates that test it",
        ),
        (
            {"sources": [{"name": "a", "simulate": {}}, {"name": "b", "simulate": {"first_seed": 1019}}]},
            "a (seeds 1000 to 1019) and b (1019 to 1038) draw the same places",
        ),
    ],
)
def test_a_fault_of_the_file_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_training(written(tmp_path, TRAIN | changes))
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_training(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="a mapping of fields is needed, got list"):
        load_evaluation(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["linear", "linear"]}, "linear twice"),
        (
            {"methods": [{"name": "timegate", "weights": f"{at}/model/weights.safetensors"} for at in "ab"]},
            "timegate (model/weights) twice; give options that tell them apart (weights are known by their file's name",
        ),
        ({"methods": ["linear"]}, "reference: 'regression' is not among the methods"),
        ({"methods": ["linear", "regresion"]}, "did you mean 'regression'?"),
        ({"sets": [{"name": "a", "simulate": {}, "tasks": ["guess"]}]}, "tasks"),
    ],
)
def test_a_fault_of_an_evaluation_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_evaluation(written(tmp_path, EVALUATE | changes))
    assert said in str(caught.value)


def test_inputs_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "items.json").write_text("{}")
    job = {
        "catalog": "items.json",
        "area": {"bbox": [15, 46, 15.1, 46.1]},
        "time": {"start": "2021-06-01", "end": "2021-07-01"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job | {"bands": ["red"], "method": {"name": "median"}}))
    sources = [{"name": "inline", "job": job}, {"name": "file", "job": "job.yaml"}]
    training = load_training(written(tmp_path, TRAIN | {"sources": sources}), overrides=["bands=[B04, nir]"])
    for source in training.sources:
        read = job_of(source, training.bands)
        assert read.catalog == str(tmp_path / "items.json")
        assert read.bands == ("red", "nir")


def test_methods_are_told_apart_by_their_options(tmp_path: Path) -> None:
    methods = ["regression", {"name": "decay", "tau_days": 5}, {"name": "decay"}]
    asked = load_evaluation(written(tmp_path, EVALUATE | {"methods": methods}))
    assert [label(method) for method in asked.methods] == ["regression", "decay (tau_days=5)", "decay"]
