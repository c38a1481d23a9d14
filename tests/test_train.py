"""Training: it goes on after a kill as if nothing had happened, says what went wrong, and its weights can be used."""

import csv
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import learning
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pupil import Pupil
from safetensors import safe_open

from pipeline import models, scheme
from pipeline.errors import ConfigError, RunError, StoreMismatchError, WeightsError
from pipeline.learnfile import Fit, Training
from pipeline.models import weights
from pipeline.patches import Order, samples_each
from pipeline.prepare import prepare
from pipeline.report import Silent
from pipeline.samples import open_store
from pipeline.train import Course, _gamma, train
from pipeline.training_folder import _joined

CASES = {"patch_px": 64, "pastes": 2, "max_looks": 7, "target_max_bad": 0.3}
SKY = {"cloud_fraction_mean": [0.3, 0.3]}
SOURCES = [{"name": "sim", "simulate": {"seeds": 6, "size_px": 64, "dates": [9, 9], "vary": SKY}}]


def training(folder: Path, **changes: Any) -> Training:
    """One sample a case."""
    return learning.training(folder, **({"cases": CASES, "sources": SOURCES} | changes))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store."""
    folder = tmp_path_factory.mktemp("train")
    prepare(training(folder))
    return folder / "samples"


def steps(out: Path) -> list[dict[str, str]]:
    with (out / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stored(out: Path) -> dict[str, Any]:
    """The state as it lies there."""
    with safe_open(out / "state.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        return dict(_joined(json.loads(file.metadata()["cloudgate"]), tensors))


def test_a_training_leaves_weights_log_and_curves(samples: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Listener:
        def say(self, text: str) -> None:
            told.append(text)

        def begin(self, what: str, total: int) -> None:
            told.append(f"{what} {total}")

        def step(self, units: int, *, megabytes: float = 0.0) -> None:
            pass

        def event(self, what: str, **facts: Any) -> None:
            pass

    made = train(training(tmp_path, store=str(samples)), progress=Listener())
    assert made.finished
    assert made.epochs == 3
    assert made.stopped == "3 epochs done"
    assert 0 < made.wait_share < 1
    model, card = weights.load_model(made.weights), weights.card(made.weights)
    assert isinstance(model, Pupil)
    assert card["bands"] == ["blue", "nir"]
    assert card["data"]["places"]["validation"] == ["sim-1003"]
    assert card["scores"]["psnr"] == pytest.approx(made.best["psnr"])
    rows = steps(made.weights.parent)
    assert len(rows) == made.steps
    rates = [float(row["rate"]) for row in rows]
    assert rates[0] == rates[len(rates) // 2 - 1] == 1e-3
    assert 0 < rates[-1] < 1e-3 / 3
    with Image.open(made.weights.parent / "curves.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert any("validation PSNR" in line for line in told)
    # a finished training has nothing left to do
    again = train(training(tmp_path, store=str(samples)))
    assert again.steps == made.steps


def test_a_network_learns_and_the_best_epoch_is_kept(samples: Path, tmp_path: Path) -> None:
    fit = {"epochs": 4, "batch": 8, "rate": 0.002, "threads": 1, "accelerator": "cpu"}
    made = train(training(tmp_path, store=str(samples), fit=fit, model={"name": "pupil", "wrong": 0.1}))
    with (made.weights.parent / "epochs.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    best = min(rows, key=lambda row: row["mse"])
    assert made.best["epoch"] == best["epoch"]
    losses = [float(row["loss"]) for row in steps(made.weights.parent)]
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert weights.card(made.weights)["scores"]["mse"] == pytest.approx(best["mse"])


def test_a_killed_training_takes_the_same_steps(samples: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = train(training(tmp_path / "whole", store=str(samples)))
    an_epoch = whole.steps // 3
    out = tmp_path / "killed" / "model"
    process = learning.start(tmp_path / "killed", store=str(samples), cases=CASES, sources=SOURCES)
    deadline = time.monotonic() + 900
    while not ((out / "steps.csv").exists() and len(steps(out)) > an_epoch + 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()  # type: ignore[union-attr]
    state = stored(out)["state"]
    assert 0 < state["batch"] < an_epoch  # in mid-epoch
    resumed = train(training(tmp_path / "killed", store=str(samples)))
    assert resumed.steps == whole.steps
    assert steps(out) == steps(tmp_path / "whole" / "model")
    assert weights.content_hash(resumed.weights) == weights.content_hash(whole.weights)


def test_a_loss_that_is_no_number_stops_and_keeps_the_good_state(samples: Path, tmp_path: Path) -> None:
    fit = {"epochs": 3, "batch": 8, "checkpoint_steps": 100, "threads": 1, "accelerator": "cpu"}
    poisoned = training(tmp_path, store=str(samples), model={"name": "pupil", "poison": 8}, fit=fit)
    with pytest.raises(RunError, match=r"step 9 .*: the loss is nan on the batch of sim-100\d/") as caught:
        train(poisoned)
    assert caught.value.exit_code == 1
    state = stored(tmp_path / "model")
    assert state["state"]["step"] == 8
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert weights.load_model(tmp_path / "model" / "weights.safetensors")


def test_an_adversary_whose_loss_is_no_number_moves_nothing(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = {"epochs": 1, "batch": 16, "adversary": 0.01, "threads": 1, "accelerator": "cpu"}
    course = Course(training(tmp_path, store=str(samples), fit=fit))
    (lesson, *_) = course._loader("train", course.order, learn=True)
    monkeypatch.setattr(
        scheme, "discriminator_loss", lambda net, *_: sum(p.sum() for p in net.parameters()) * torch.nan
    )
    before = {name: value.clone() for name, value in course.scheme.model.state_dict().items()}
    with pytest.raises(scheme.NotFiniteError, match="the loss is nan"):
        course.scheme.step(lesson, rate=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in course.scheme.model.state_dict().items())
    monkeypatch.undo()
    course.scheme.step(lesson, rate=1e-3)
    assert not torch.equal(course.scheme.model.state_dict()["net.0.weight"], before["net.0.weight"])


def test_the_gamma_that_is_told_is_the_residual_networks() -> None:
    model = models.build("small")
    with torch.no_grad():
        model.gamma.fill_(0.5)
        model.unet.attention.gamma.fill_(0.01)
    assert _gamma(model) == 0.5


@pytest.mark.parametrize("adversary", [0, 0.01])
def test_time_runs_out_and_the_same_command_takes_the_very_steps(
    samples: Path, tmp_path: Path, adversary: float
) -> None:
    fit = {"epochs": 2, "batch": 8, "adversary": adversary, "threads": 1, "accelerator": "cpu"}
    whole = train(training(tmp_path, store=str(samples), fit=fit, out=str(tmp_path / "whole")))
    made = train(training(tmp_path, store=str(samples), fit=fit | {"max_minutes": 1e-6}))
    assert not made.finished
    assert made.steps == 1
    made = train(training(tmp_path, store=str(samples), fit=fit))
    assert made.finished
    assert steps(tmp_path / "model") == steps(tmp_path / "whole")
    assert weights.content_hash(made.weights) == weights.content_hash(whole.weights)


@pytest.mark.parametrize("loss", [{}, {"charbonnier": 0, "log_ratio": 1, "ssim": 0.1}])
def test_losses_and_the_adversary_go_down_the_same_road(samples: Path, tmp_path: Path, loss: dict[str, float]) -> None:
    fit = {"epochs": 1, "batch": 16, "adversary": 0.01, "threads": 1, "accelerator": "cpu"}
    made = train(training(tmp_path, store=str(samples), loss=loss, fit=fit))
    rows = steps(made.weights.parent)
    assert all(float(row["adversary"]) > 0 for row in rows)
    assert {name for name, weight in ({"charbonnier": 1} | loss).items() if weight} <= set(rows[0])
    state = stored(made.weights.parent)
    assert {"judge", "judge_optimizer"} <= set(state)
    assert not any(name.startswith("judge") for name in weights.load_model(made.weights).state_dict())


def test_it_stops_early_where_nothing_gets_better(samples: Path, tmp_path: Path) -> None:
    fit = {"epochs": 50, "batch": 16, "rate": 1e-12, "patience": 2, "threads": 1, "accelerator": "cpu"}
    made = train(training(tmp_path, store=str(samples), fit=fit))
    assert made.epochs < 50
    assert made.stopped == "no better validation for 2 epochs"
    assert train(training(tmp_path, store=str(samples), fit=fit)).epochs == made.epochs
    on = train(training(tmp_path, store=str(samples), fit=fit | {"patience": 4}))  # more of it goes on
    assert made.epochs < on.epochs < 50


def test_a_training_begins_with_given_weights_and_leaves_frozen_parts(samples: Path, tmp_path: Path) -> None:
    fit = {"epochs": 1, "batch": 8, "rate": 0.002, "threads": 1, "accelerator": "cpu"}
    first = train(training(tmp_path, store=str(samples), fit=fit, model={"name": "pupil", "wrong": 0.1}))
    there = weights.load_model(str(first.weights))
    asked = training(
        tmp_path, store=str(samples), out=str(tmp_path / "on"), fit=fit | {"frozen": ["net"]}, start=str(first.weights)
    )
    course = Course(asked)
    assert torch.equal(course.model.state_dict()["offset"], there.state_dict()["offset"])  # and not 0, as afresh
    course.run(Silent())
    on = weights.load_model(str(tmp_path / "on" / "weights.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(on.net.parameters(), there.net.parameters(), strict=True))
    assert not torch.equal(on.state_dict()["offset"], there.state_dict()["offset"])
    assert weights.card(tmp_path / "on" / "weights.safetensors")["start"] == weights.content_hash(first.weights)
    with pytest.raises(StoreMismatchError, match="start over with --restart"):  # another start is another training
        train(asked.model_copy(update={"start": None}))


def test_options_that_change_after_training_are_in_the_weights_alone(samples: Path, tmp_path: Path) -> None:
    fit = {"epochs": 1, "batch": 8, "threads": 1, "accelerator": "cpu"}
    plain = train(training(tmp_path, store=str(samples), fit=fit, out=str(tmp_path / "plain")))
    after = train(training(tmp_path, store=str(samples), fit=fit, after={"wrong": 0.1}))
    one, other = weights.load_model(str(plain.weights)), weights.load_model(str(after.weights))
    assert (one.config.wrong, other.config.wrong) == (0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert weights.card(after.weights)["recipe"]["after"] == {"wrong": 0.1}


def test_a_network_that_cannot_be_judged_stops_the_training(samples: Path, tmp_path: Path) -> None:
    course = Course(training(tmp_path, store=str(samples)))
    course._examine = lambda loader: {"mse": float("nan")}  # type: ignore[method-assign]
    with pytest.raises(RunError, match="after epoch 1: the validation error is nan"):
        course.run(Silent())
    assert not (tmp_path / "model" / "weights.safetensors").exists()


def test_processes_that_read_ahead_change_no_step(samples: Path, tmp_path: Path) -> None:
    fit = {"epochs": 1, "epoch_steps": 4, "batch": 8, "threads": 1, "accelerator": "cpu"}
    for name, loaders in (("none", None), ("two", 2)):
        train(training(tmp_path, store=str(samples), out=str(tmp_path / name), fit=fit | {"loaders": loaders}))
    assert steps(tmp_path / "none") == steps(tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"model": {"name": "timegait"}}, ConfigError, "unknown network 'timegait'"),
        ({"model": {"name": "pupil", "depth": 3}}, ConfigError, "model.depth"),
        ({"model": {"name": "pupil", "bands": ["red", "nir"]}}, ConfigError, "are not the training's bands"),
        ({"bands": ["red", "nir"]}, StoreMismatchError, "holds blue, nir, and bands are red, nir"),
        ({"cases": CASES | {"pastes": 1}}, StoreMismatchError, "was prepared with other cases"),
        ({"sources": [SOURCES[0] | {"name": "sam"}]}, StoreMismatchError, r"prepared with other sources \(sam\)"),
        (
            {"sources": [*SOURCES, {"name": "b", "simulate": {"first_seed": 9}}]},
            StoreMismatchError,
            r"other sources \(b\)",
        ),
        ({"model": {"name": "small", "patch_px": 64}}, ConfigError, "choose a stride_px of at least 24 and below 48"),
        ({"model": {"name": "small"}, "after": {"patch_px": 64}}, ConfigError, "do not overlap once everywhere"),
        ({"split": {"validation": ["sim-1"]}}, ConfigError, "there is no place 'sim-1'"),
        ({"loss": {"charbonier": 1}}, ConfigError, "charbonier: there is no such field; did you mean 'charbonnier'"),
        ({"loss": {"charbonnier": 0}}, ConfigError, "every weight is 0"),
        ({"loss": {"feat": 1}}, ConfigError, "its groups need"),
        ({"start": "robust"}, ConfigError, "start: robust is network 'compact' and model.name"),
        ({"start": "nowhere"}, WeightsError, "weights 'nowhere': no such file"),
        ({"after": {"depth": 3}}, ConfigError, "model.depth"),
        ({"model": {"name": "small"}, "after": {"unet": False}}, ConfigError, "gives a network with other parameters"),
        ({"fit": {"frozen": ["krigging"]}}, ConfigError, "has no part krigging; its parts are net"),
        ({"fit": {"accelerator": "abacus"}}, ConfigError, "fit: this machine cannot do accelerator abacus"),
    ],
)
def test_bad_requests_are_refused_before_work(
    samples: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        Course(training(tmp_path, store=str(samples), **changes))
    assert not (tmp_path / "model").exists()


def test_another_training_in_the_same_folder_is_refused(samples: Path, tmp_path: Path) -> None:
    short = Fit(max_minutes=1e-6, threads=1, accelerator="cpu").model_dump()
    train(training(tmp_path, store=str(samples), fit=short))
    with pytest.raises(StoreMismatchError, match="another folder, or start over with --restart"):
        train(training(tmp_path, store=str(samples), fit=short | {"rate": 0.1}))
    state = tmp_path / "model" / "state.safetensors"
    torch.save({"state": {}}, state)  # a pickle is never loaded
    with pytest.raises(StoreMismatchError, match=r"state.safetensors cannot be read \(SafetensorError\)"):
        train(training(tmp_path, store=str(samples), fit=short))
    state.rename(state.with_name("state.pt"))
    with pytest.raises(StoreMismatchError, match=r"state.pt is the state of an earlier version"):
        train(training(tmp_path, store=str(samples), fit=short))
    made = train(training(tmp_path, store=str(samples), fit=short | {"rate": 0.1}), restart=True)
    assert made.steps == 1


def test_training_needs_neither_gdal_nor_dask() -> None:
    code = "import sys, pipeline.train; print(sorted({'rasterio', 'osgeo', 'dask', 'distributed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_two_processes_train_one_network_with_the_parts_that_a_batch_leaves_out(samples: Path, tmp_path: Path) -> None:
    """A sample without its target leaves the kriging out: its parameters have no gradient there."""
    changes: dict[str, Any] = {
        "store": str(samples),
        "sources": SOURCES,
        "cases": CASES,
        "model": {"name": "compact", "doubt": True, "middle": True},
        "split": {"validation": ["sim-1003"]},
        "fit": {"epochs": 1, "epoch_steps": 12, "batch": 2, "threads": 1, "accelerator": "cpu", "devices": 2},
    }
    assert any(sample.target is None for sample in open_store(samples).samples)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(learning.fields(tmp_path, **changes)))
    program = Path(sysconfig.get_path("scripts")) / "cloudgate"  # each process runs the program again
    command = [str(program), "train", str(path), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    done = json.loads(told.stdout)  # one process tells
    assert done["trained"]["steps"] == len(steps(tmp_path / "model")) == 12
    assert weights.load_model(tmp_path / "model" / "weights.safetensors")


@pytest.mark.parametrize("network", [{"name": "compact", "doubt": True, "middle": True}, {"name": "small"}])
def test_mixed_precision_takes_the_steps_of_full_precision_but_for_rounding(
    samples: Path, tmp_path: Path, network: dict[str, Any]
) -> None:
    """What training does by itself on a GPU; estimates and looks stay float32, as at inference."""
    fit = {"epochs": 1, "epoch_steps": 2, "batch": 4, "threads": 1, "accelerator": "cpu"}
    loss: dict[str, float] = {"charbonnier": 0, "log_ratio": 1}
    for precision in ("32-true", "bf16-mixed"):
        out = {"out": str(tmp_path / precision), "fit": fit | {"precision": precision}}
        train(training(tmp_path, store=str(samples), model=network, loss=loss, **out))
    full, mixed = ([float(row["loss"]) for row in steps(tmp_path / name)] for name in ("32-true", "bf16-mixed"))
    assert full == pytest.approx(mixed, abs=0.02)
    assert full != mixed
    one, other = (weights.card(tmp_path / n / "weights.safetensors")["scores"] for n in ("32-true", "bf16-mixed"))
    assert one["psnr"] == pytest.approx(other["psnr"], abs=0.1)


def test_no_process_is_left_without_a_batch() -> None:
    for count, batch, world in ((3, 8, 2), (16, 32, 2), (28, 32, 8), (7, 2, 2)):
        share = samples_each(batch, count, world)
        parts = [list(Order(count, share, seed=0, rank=rank, world=world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert all(len(one) == share for part in parts for one in part)
