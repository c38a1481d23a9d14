"""Training: in come TRAIN.yaml and its prepared store, out come weights, a log and curves; it goes on after a kill.

One loop over Lightning Fabric (precision, devices, strategy). The state is saved every so many steps, and the order of
samples, their augmentation and the random numbers of a step depend on seed, epoch and number alone, so that a resumed
training takes the very steps the interrupted one would have taken. Imports neither GDAL nor Dask.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from pipeline import models
from pipeline.curves import draw_curves
from pipeline.errors import ConfigError, RunError, StoreMismatchError
from pipeline.exam import exam_pixels, scores, timed, undistorted
from pipeline.learnfile import Training
from pipeline.models import weights
from pipeline.models.batch import Model
from pipeline.patches import Lesson, Order, Patches, checked_store, collate, samples_each
from pipeline.report import Progress, Silent
from pipeline.samples import Sample, Store, sources_of, split_samples
from pipeline.scheme import NotFiniteError, Scheme, fabric_of
from pipeline.training_folder import CURVES, EPOCHS, STATE, STEPS, WEIGHTS, Records, State, unreadable

GPU_LOADERS: Final = 4
"""Processes that read ahead for each GPU, unless ``fit.loaders`` says otherwise."""


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        weights: the best network by validation error; ``method.weights`` takes it.
        epochs, steps: done in all, earlier runs included.
        best: the row of the best epoch, see ``epochs.csv``.
        stopped: why it ended.
        finished: False where the same command would go on.
        wait_share: of this run's time, spent waiting for samples.
        seconds: of this run.
        rank: of this process where several train; 0 is the one that writes.
    """

    weights: Path
    epochs: int
    steps: int
    best: dict[str, float]
    stopped: str
    finished: bool
    wait_share: float
    seconds: float
    rank: int = 0


def train(training: Training, *, restart: bool = False, progress: Progress | None = None) -> Trained:
    """Train a network, or go on with a training that was interrupted.

    Args:
        training: TRAIN.yaml, its store prepared.
        restart: forget what ``training.out`` holds and start over.
        progress: hears of each epoch.

    Raises:
        ConfigError: an unknown network, loss or split.
        StoreMismatchError: no finished store, one of other bands or estimates, an ``out`` that was trained otherwise.
        RunError: a loss that is no number; the good state stays.
    """
    progress = progress or Silent()
    course = Course(training, restart=restart)
    return course.run(progress)


class Course:
    """One training: its samples, network, optimiser and how far it is."""

    def __init__(self, training: Training, *, restart: bool = False) -> None:
        self.training, self.fit = training, training.fit
        self.store = checked_store(training)
        self.parts = split_samples(self.store.samples, training.split, seed=training.seed)
        self.parts["train"] = _weighted(self.parts["train"], self.store.samples, training)
        self.fabric = fabric_of(training)
        self.fabric.launch()
        if self.fit.threads:
            torch.set_num_threads(self.fit.threads)  # a launch of several processes sets its own
        rank, world, count = self.fabric.global_rank, self.fabric.world_size, len(self.parts["train"])
        if count < world:
            raise ConfigError(f"fit.devices: {world} of them have {count} samples to learn from; ask for fewer")
        ahead = min(GPU_LOADERS, (os.cpu_count() or 1) // world - 1) if self.fabric.device.type == "cuda" else 0
        self.loaders = max(ahead, 0) if self.fit.loaders is None else self.fit.loaders
        self.scheme = Scheme(training, self.fabric, paper=self.paper)
        self.model = self.scheme.model
        self.saved = _saved(self.model, training)
        share = samples_each(self.fit.batch, count, world)
        seed, most = training.seed, self.fit.epoch_steps
        self.order = Order(count, share, seed=seed, rank=rank, world=world, most=most)
        self.exam = Order(len(self.parts["validation"]), share, seed=None, rank=rank, world=world)
        self.waited = self.spent = 0.0
        # once, before any work: the file may be another training's, and change
        self.start = None if training.start is None else weights.content_hash(training.start)
        request, writes = _request(training, self.store) | {"start": self.start}, self.fabric.is_global_zero
        refused: StoreMismatchError | None = None
        with self.fabric.rank_zero_first():
            try:
                self.records = Records(training.out, request, restart=restart and writes, writes=writes)
                self.state, there = self.records.load()
            except StoreMismatchError as error:  # each process says so, and none waits for the other
                refused = error
        if refused is not None:
            raise refused
        if there:
            try:
                self.scheme.load_state_dict(there)
            except Exception as error:
                raise unreadable(training.out / STATE, error) from error

    # -- the way ---------------------------------------------------------------------------------------------------

    def run(self, progress: Progress) -> Trained:
        """Go through the epochs that are left."""
        began, fit, state = time.perf_counter(), self.fit, self.state
        progress = progress if self.fabric.is_global_zero else Silent()
        train = self._loader("train", self.order, learn=True)
        exam = self._loader("validation", self.exam, learn=False)
        counts = ", ".join(f"{len(numbers)} {part}{self._by_source(numbers)}" for part, numbers in self.parts.items())
        size = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        progress.say(f"{counts} samples; {size:,} parameters; from epoch {state.epoch + 1} of {fit.epochs}")
        progress.begin("epochs", fit.epochs)
        if state.epoch:
            progress.step(state.epoch)
        stopped, state.ended = "", self._ended()  # a patience that was raised since goes on
        while not (stopped or state.ended):
            limit = math.inf if fit.max_minutes is None else began + 60 * fit.max_minutes
            if not self._epoch(train, limit):
                stopped = f"{fit.max_minutes:g} minutes are over"
                break
            row = self._examine(exam)
            if not math.isfinite(row["mse"]):
                raise self._unexamined(row["mse"])
            self._finish_epoch(row)
            state.ended = self._ended()
            if not state.ended and self._over(limit):
                stopped = f"{fit.max_minutes:g} minutes are over"
            progress.step(1)
            progress.say(_line(row, state))
            self._save()
        self._save()
        if self.fabric.is_global_zero:
            draw_curves(state.epochs, self.training.out / CURVES, title=self.training.name)
        best = state.epochs[state.best_epoch] if state.epochs else {}
        wait = self.waited / max(self.spent, 1e-9)
        return Trained(
            self.training.out / WEIGHTS,
            state.epoch,
            state.step,
            best,
            stopped or state.ended,
            bool(state.ended),
            wait,
            time.perf_counter() - began,
            self.fabric.global_rank,
        )

    def _ended(self) -> str:
        """Why there is nothing left to do; empty where there is."""
        state, fit = self.state, self.fit
        if state.epoch >= fit.epochs:
            return f"{fit.epochs} epochs done"
        if fit.patience is not None and state.epoch - 1 - state.best_epoch >= fit.patience:
            return f"no better validation for {fit.patience} epochs"
        return ""

    def _epoch(self, loader: DataLoader[Any], limit: float) -> bool:
        """The rest of an epoch; False where time ran out."""
        state, fit = self.state, self.fit
        self.order.epoch, self.order.first = state.epoch, state.batch
        for waited, lesson in timed(loader):
            began, rate = time.perf_counter(), self._rate()
            torch.manual_seed(1_000_003 * self.training.seed + state.step)
            try:
                terms = self.scheme.step(lesson.to(self.fabric.device), rate=rate)
            except NotFiniteError as error:
                raise self._nonsense(str(error), lesson) from error
            state.step += 1
            state.batch += 1
            self.waited += waited
            self.spent += waited + time.perf_counter() - began
            self.records.log(STEPS, {"step": state.step, "epoch": state.epoch, "rate": rate, **terms})
            if state.step % fit.checkpoint_steps == 0:
                self._save()
            if self._over(limit):
                self._save()
                return state.batch >= len(self.order)
        return True

    def _over(self, limit: float) -> bool:
        """Whether time is over by the first process' clock: all stop at the same step."""
        return math.isfinite(limit) and bool(self.fabric.broadcast(time.perf_counter() > limit))

    def _rate(self) -> float:
        """Constant, then linear to 0 (Oehmcke et al. 2020, section 4.1.2)."""
        total = self.fit.epochs * len(self.order)
        start = self.fit.constant_share * total
        left = (total - self.state.step) / max(total - start, 1)
        return self.fit.rate * min(1.0, max(left, 0.0))

    # -- how good it is --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _examine(self, loader: DataLoader[Any]) -> dict[str, float]:
        """Errors on the validation samples' holes, of the network and of its prior."""
        self.exam.epoch = self.exam.first = 0
        self.scheme.agree()
        sums = torch.zeros(7, dtype=torch.float64)  # as ``scores`` gives them
        for _, lesson in timed(loader):
            there = lesson.to(self.fabric.device)
            made = self.scheme.examined(undistorted(there.given)).image.float().cpu()
            scored = exam_pixels(lesson, self.paper)
            for truth, image, prior, where in zip(lesson.truth, made, lesson.given.prior, scored, strict=True):
                sums += torch.tensor(scores(truth.numpy(), image.numpy(), prior.numpy(), where.numpy()))
        total: Any = self.fabric.all_reduce(sums, reduce_op="sum")
        squared, count, psnr, prior, cases, ssim, similar = (float(v) for v in total)
        row = {
            "epoch": float(self.state.epoch),
            "step": float(self.state.step),
            "mse": squared / count if count else math.nan,
        }
        row |= {"psnr": psnr / max(cases, 1), "ssim": ssim / max(similar, 1), "prior_psnr": prior / max(cases, 1)}
        gamma = _gamma(self.model)
        return row | {"loss": self.records.loss_of(self.state.epoch), "gamma": gamma, "rate": self._rate()}

    def _finish_epoch(self, row: dict[str, float]) -> None:
        state = self.state
        state.epochs.append(row)
        self.records.log(EPOCHS, row)
        if row["mse"] < state.best_mse:
            state.best_mse, state.best_epoch = row["mse"], state.epoch
            if self.fabric.is_global_zero:
                self.saved.load_state_dict(self.model.state_dict())
                weights.save(self.saved, self.training.out / WEIGHTS, card=self._card(row))
        state.epoch += 1
        state.batch = 0

    def _card(self, row: Mapping[str, float]) -> dict[str, Any]:
        """What the weights say about themselves."""
        training, places = self.training, {part: self._places(part) for part in self.parts}
        asked = json.loads(training.model_dump_json())
        return {
            "name": training.name,
            "bands": list(training.bands),
            "data": {
                "samples": {part: len(numbers) for part, numbers in self.parts.items()},
                "places": places,
                "sources": {"sources": sources_of(asked), "cases": asked["cases"]},
            },
            "recipe": {name: asked[name] for name in ("model", "after", "loss", "fit", "split")},
            "start": self.start,
            "seed": training.seed,
            "scores": dict(row),
            "versions": {name: version(name) for name in ("cloudgate", "torch", "lightning")},
        }

    def _by_source(self, numbers: Sequence[int]) -> str:
        """How many samples each source gives; nothing where there is one source."""
        names = [source.name for source in self.training.sources]
        found = Counter(_source(self.store.samples[number].place, names) for number in numbers)
        return f" ({', '.join(f'{found[name]} {name}' for name in names)})" if len(names) > 1 and numbers else ""

    def _places(self, part: str) -> list[str]:
        return sorted({self.store.samples[number].place for number in self.parts[part]})

    def _save(self) -> None:
        self.records.save(self.state, self.scheme.state_dict())

    def _nonsense(self, what: str, lesson: Lesson) -> RunError:
        """The error that ends a training whose numbers went wrong; the last good state is written first."""
        self._save()
        self.fabric.barrier()  # Lightning ends all processes where one has failed
        return RunError(
            f"training stopped at step {self.state.step + 1} (epoch {self.state.epoch + 1}): {what} on the batch of "
            f"{', '.join(lesson.ids)}; the state before it is kept in {self.training.out / STATE}: look at these "
            "samples, or lower fit.rate or fit.clip and start over with --restart"
        )

    def _unexamined(self, error: float) -> RunError:
        """The error that ends a training whose network cannot be judged; the state of the last checkpoint stays."""
        return RunError(
            f"training stopped after epoch {self.state.epoch + 1}: the validation error is {error}: the network gives "
            "no numbers, or no pixel of the validation samples can be scored; what was best before, if anything, is in "
            f"{self.training.out / WEIGHTS}: lower fit.rate or fit.clip, or name other places in split.validation, "
            "and start over with --restart"
        )

    # -- small parts -----------------------------------------------------------------------------------------------

    @property
    def paper(self) -> bool:
        """Whether the samples are those of mode ``paper``."""
        return bool(self.store.about["cases"]["mode"] == "paper")

    def _loader(self, part: str, order: Order, *, learn: bool) -> DataLoader[Any]:
        data = Patches(self.store, self.parts[part], seed=self.training.seed, fit=self.fit if learn else None)
        return DataLoader(
            data,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=(loaders := self.loaders if learn else min(self.loaders, 1)),
            multiprocessing_context="spawn" if loaders else None,
            persistent_workers=loaders > 0,
        )


def _weighted(numbers: Sequence[int], samples: Sequence[Sample], training: Training) -> list[int]:
    """Each training sample as often as its source's weight says; fractions are drawn by the seed."""
    weights = {source.name: source.weight for source in training.sources}
    rng = np.random.default_rng([training.seed, 21])
    out: list[int] = []
    for number in numbers:
        weight = weights[_source(samples[number].place, weights)]
        out += [number] * (int(weight) + bool(rng.random() < weight % 1))
    return out


def _source(place: str, names: Container[str]) -> str:
    """Simulated places are called ``source-seed``, an area as its source."""
    return place if place in names else place.rpartition("-")[0]


def _saved(model: Model, training: Training) -> Model:
    """The network as it is saved: with the options of ``after``, which must leave its parameters alone."""
    if not training.after:
        return model
    other = models.build({**model.config.model_dump(mode="json"), **training.after})
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (model, other)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"after: {training.after} gives a network with other parameters than model {training.model}; only options "
            "that leave them alone can change once it is trained"
        )
    return other


def _gamma(model: nn.Module) -> float:
    """The residual network's weight, NaN where there is none; attention has a gamma of its own, deeper inside."""
    gamma = getattr(model, "gamma", None)
    return float(gamma.detach()) if isinstance(gamma, torch.Tensor) else math.nan


_FREE: Final = (
    "devices",
    "strategy",
    "accelerator",
    "loaders",
    "threads",
    "max_minutes",
    "checkpoint_steps",
    "patience",
)
"""Fields of ``fit`` that may change from one run to the next."""


def _request(training: Training, store: Store) -> dict[str, Any]:
    """What must stay the same for a training to go on."""
    asked = json.loads(training.model_dump_json(include={"bands", "seed", "model", "after", "loss", "split", "fit"}))
    asked["fit"] = {name: value for name, value in asked["fit"].items() if name not in _FREE}
    if not training.fit.frozen:  # as trainings that began before there was such a thing
        del asked["fit"]["frozen"]
    if not training.after:
        del asked["after"]
    return {**asked, "weights": {source.name: source.weight for source in training.sources}, "store": store.about}


def _line(row: Mapping[str, float], state: State) -> str:
    gamma = "" if math.isnan(row["gamma"]) else f", gamma {row['gamma']:.4f}"
    best = " (best so far)" if state.best_epoch == state.epoch - 1 else ""
    return (
        f"epoch {state.epoch}: loss {row['loss']:.5f}, validation PSNR {row['psnr']:.2f} dB (prior "
        f"{row['prior_psnr']:.2f}), SSIM {row['ssim']:.4f}{gamma}{best}"
    )
