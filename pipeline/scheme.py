"""What a step of training does to the networks: in comes a lesson, out come moved weights and the loss.

The network alone, or with the adversary of the Pix2Pix scheme (one step of each, in turn; the network alone is kept).
Fabric wraps both, so that precision, devices and strategy are its business.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import ConfigError
from pipeline.exam import lesson_weight
from pipeline.jobfile import explain
from pipeline.learnfile import Training
from pipeline.models.batch import Batch, Completed, Model
from pipeline.models.discriminator import BETAS, Discriminator, discriminator_loss, generator_loss
from pipeline.models.losses import Loss, LossConfig
from pipeline.models.weights import load_model
from pipeline.patches import Lesson

FEW: Final = 1
QUICK: Final = 10.0
"""Parameters of so few numbers (gamma, the gate's opening) move so many times as fast, and do not decay: what opens a
branch from 0 would hold all behind it back."""


class NotFiniteError(Exception):
    """The loss or a gradient is no number; no weight was moved by it."""


class Scheme:
    """The network, its optimiser, its loss and, where asked for, its adversary.

    Raises:
        ConfigError: an unknown network or loss, or options that do not fit the bands.
    """

    def __init__(self, training: Training, fabric: Fabric, *, paper: bool) -> None:
        self.fit, self.fabric, self.paper = training.fit, fabric, paper
        torch.manual_seed(training.seed)
        self.model = build_model(training)
        self.frozen = _freeze(self.model, self.fit.frozen)
        self.loss = _loss(training).to(fabric.device)
        betas = BETAS if self.fit.adversary else (0.9, 0.999)
        self.net = fabric.setup_module(_Plain(self.model))
        self.optimizer = self._adam(self.model, betas)
        self.judge: nn.Module | None = None
        if self.fit.adversary:
            self.judge = fabric.setup_module(_Judge(Discriminator(len(training.bands))))
            self.judge_optimizer = self._adam(self.judge, betas)

    def _adam(self, module: nn.Module, betas: tuple[float, float]) -> Any:
        learning = [p for p in module.parameters() if p.requires_grad]
        few = [p for p in learning if p.numel() <= FEW]
        many = [p for p in learning if p.numel() > FEW]
        groups = [
            {"params": many, "weight_decay": self.fit.weight_decay, "pace": 1.0},
            {"params": few, "weight_decay": 0.0, "pace": QUICK},
        ]
        adam = torch.optim.Adam([group for group in groups if group["params"]], lr=self.fit.rate, betas=betas)
        return cast(Any, self.fabric.setup_optimizers(adam))

    def step(self, lesson: Lesson, *, rate: float) -> dict[str, float]:
        """One step down; the loss before it, and its terms.

        Raises:
            NotFiniteError: the loss or its gradient is no number; the network is left as it was.
        """
        modules = [self.net] if self.judge is None else [self.net, self.judge]
        before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]  # running means
        try:
            return self._moved(lesson, rate)
        except NotFiniteError:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
            raise

    def _moved(self, lesson: Lesson, rate: float) -> dict[str, float]:
        self.net.train()
        for part in self.frozen:
            part.eval()  # their running means stay too
        counts = lesson_weight(lesson, self.fit, self.paper)
        made = self.answer(lesson.given)
        loss, terms = self.loss(made, lesson.truth, counts, prior=lesson.given.prior)
        if self.judge is None:
            self._grade(loss, self.net, self.optimizer)
            _descend(self.optimizer, rate)
        else:
            known = ((lesson.hole + lesson.seen) > 0).float()
            given, image = _mapping(lesson.given), made.image.float()
            fooled = self.judge(given, lesson.truth, image, known, fool=True)
            terms["adversary"] = fooled.detach()
            loss = loss + self.fit.adversary * fooled
            self._grade(loss, self.net, self.optimizer)
            caught = self.judge(given, lesson.truth, image.detach(), known, fool=False)
            self._grade_and_descend(caught, rate)
        return {"loss": float(loss.detach())} | {name: float(value) for name, value in terms.items()}

    def _grade_and_descend(self, caught: Tensor, rate: float) -> None:
        """Both networks move, or neither; the network's gradient is there already."""
        judge = cast(nn.Module, self.judge)
        if self.fit.precision == "16-mixed":  # its scaler takes one optimiser after the other, and skips bad gradients
            self._check(caught)
            _descend(self.optimizer, rate)
            self._grade(caught, judge, self.judge_optimizer)
        else:
            self._grade(caught, judge, self.judge_optimizer)
            _descend(self.optimizer, rate)
        _descend(self.judge_optimizer, rate)

    def _grade(self, loss: Tensor, net: nn.Module, optimizer: Any) -> None:
        """The gradient of a loss, clipped."""
        self._check(loss)
        optimizer.zero_grad()
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(net, optimizer, max_norm=self.fit.clip, error_if_nonfinite=False)
        # with 16-bit floats an overflow is usual: the scaler skips the step and lowers the scale
        if norm is not None and not torch.isfinite(norm) and self.fit.precision != "16-mixed":
            raise NotFiniteError(f"the gradient's norm is {float(norm)}")

    def _check(self, loss: Tensor) -> None:
        """All processes stop where one has to: the others would wait for its gradient for ever."""
        if not torch.isfinite(loss):
            self.fabric.all_reduce(torch.zeros((), device=loss.device), reduce_op="min")
            raise NotFiniteError(f"the loss is {float(loss.detach())}")
        if not self.fabric.all_reduce(torch.ones((), device=loss.device), reduce_op="min"):
            raise NotFiniteError("the loss of another process is no number; here it is finite")

    def answer(self, given: Batch) -> Completed:
        """The network's answer to a batch that is learned from."""
        return Completed(**self.net(_mapping(given)))

    @torch.no_grad()
    def examined(self, given: Batch) -> Completed:
        """The answer in evaluation; past the wrapper of several devices, which may have batches of unequal number."""
        self.model.eval()
        with self.fabric.autocast():
            return cast(Completed, self.model(given))

    def agree(self) -> None:
        """Running means are those of the first process everywhere, whose network is the one that is kept."""
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Any]:
        """All that a training needs to go on, the scale of 16-bit gradients among it."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["precision"] = self.fabric.strategy.precision.state_dict()
        if self.judge is not None:
            state |= {"judge": self.judge.state_dict(), "judge_optimizer": self.judge_optimizer.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.judge is not None:
            self.judge.load_state_dict(state["judge"])
            self.judge_optimizer.load_state_dict(state["judge_optimizer"])


def _descend(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["pace"]
    optimizer.step()


class _Autocast(MixedPrecision):
    """Mixed precision that leaves inputs as they are: reflectance in bfloat16 is off by up to 0.001."""

    def convert_input(self, data: Any) -> Any:
        """As it came; torch lowers what it deems safe, as at inference."""
        return data


class _Plain(nn.Module):
    """The network with plain mappings as in- and output, which Fabric can convert and distribute."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        made = self.model(Batch(**given))
        return {f.name: getattr(made, f.name) for f in fields(made) if getattr(made, f.name) is not None}


class _Judge(nn.Module):
    """The adversary with both its losses, on plain mappings."""

    def __init__(self, net: Discriminator) -> None:
        super().__init__()
        self.net = net

    def forward(self, given: dict[str, Tensor], truth: Tensor, image: Tensor, known: Tensor, *, fool: bool) -> Tensor:
        batch = Batch(**given)
        if fool:
            return generator_loss(self.net, batch, image, known)
        return discriminator_loss(self.net, batch, truth, image, known)


def _mapping(given: Batch) -> dict[str, Tensor]:
    return {f.name: getattr(given, f.name) for f in fields(given)}


def fabric_of(training: Training) -> Fabric:
    """Devices, strategy and precision as TRAIN.yaml asks for them; ``ConfigError`` where this machine cannot."""
    fit = training.fit
    precision = fit.precision
    if precision == "auto":
        on_gpu = fit.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
        precision = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"
    strategy = fit.strategy
    if fit.devices > 1 and strategy in ("auto", "ddp"):  # a batch without a clear target pixel leaves the kriging out
        strategy = "ddp_find_unused_parameters_true"
    try:
        if precision == "32-true":
            return Fabric(accelerator=fit.accelerator, devices=fit.devices, strategy=strategy, precision=precision)
        kind = Fabric(accelerator=fit.accelerator, devices=1).device.type
        mixed = _Autocast(precision, kind)
        return Fabric(accelerator=fit.accelerator, devices=fit.devices, strategy=strategy, plugins=mixed)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"fit: this machine cannot do accelerator {fit.accelerator}, devices {fit.devices}, "
            f"strategy {fit.strategy}, precision {precision}: {error}"
        ) from error


def build_model(training: Training) -> Model:
    """The network before this training: fresh, or with what ``training.start`` has of it.

    Raises:
        ConfigError: an unknown network or option, one made for other bands than the training's, or a start that is
            another network. WeightsError: a start that cannot be read.
    """
    config = models.read_config(training.model)
    if config.bands and config.bands != training.bands:
        raise ConfigError(
            f"model.bands: {', '.join(config.bands)} are not the training's bands {', '.join(training.bands)}; make "
            "them the same, or leave model.bands out for weights shared over bands"
        )
    model = models.build(config)
    if training.start is not None:
        given = load_model(training.start)
        if given.config.name != config.name:
            raise ConfigError(
                f"start: {training.start} is network {given.config.name!r} and model.name is {config.name!r}; name "
                "weights of the same network, or leave start out"
            )
        if given.config.bands != config.bands:
            made, asked = (", ".join(bands) or "any" for bands in (given.config.bands, config.bands))
            raise ConfigError(
                f"start: {training.start} is made for bands {made}, and this network for {asked}; name weights "
                "of the same bands in the same order"
            )
        own = model.state_dict()
        model.load_state_dict(
            own | {name: v for name, v in given.state_dict().items() if name in own and own[name].shape == v.shape}
        )
    return model


def _freeze(model: Model, names: tuple[str, ...]) -> list[nn.Module]:
    """The parts of these names, which learn no more."""
    parts = dict(model.named_children())
    if unknown := [name for name in names if name not in parts]:
        raise ConfigError(
            f"fit.frozen: network {model.config.name!r} with these options has no part {', '.join(unknown)}; its parts "
            f"are {', '.join(parts)}"
        )
    for name in names:
        parts[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("fit.frozen: nothing is left to learn; name fewer parts")
    return [parts[name] for name in names]


def _loss(training: Training) -> Loss:
    try:
        config = LossConfig.model_validate(training.loss)
    except ValidationError as error:
        raise ConfigError(explain(error, "loss", LossConfig)) from error
    return Loss(config, training.bands)
