"""The gate over time: in comes a ``Batch``, out come an aggregate of its looks and abstract features.

Oehmcke et al. 2020 (doi:10.1145/3423336.3429345), Algorithms 1 and 2, equations 1-3: a small convolutional network
looks at each step alone and gives it a weight per band and pixel; the aggregate is the weighted mean. Where the paper
is silent the readings are ours and stand at the place. Options that leave the paper are off by default.

Legend: B targets, T steps, N steps of all targets in a row, C bands, W weight channels (C or 1), F features, H and W
pixels. Polarity everywhere: 1 = good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.models.batch import Batch, ModelConfig
from pipeline.models.heaviest import Heaviest

EPSILON: Final = 1e-6
WEAK: Final = 1e-3
"""Where a pixel's weights add up to less, the gate has no opinion."""
_LARGEST_G: Final = 10.0  # exp(10) = 22026 leaves float16 sums of many steps finite
_DAYS: Final = 30.0
_USUAL_SCALE: Final = 0.01


class GateConfig(ModelConfig):
    """Options of the gate; the defaults are the paper's."""

    bands: tuple[str, ...] = ("blue", "green", "red", "nir", "swir16", "swir22")
    weights: Literal["per_band", "shared"] = "per_band"
    """One weight per band, or one for all bands, which cannot distort spectra."""
    gate_widths: tuple[int, int] = (32, 64)
    aggregate_features: int = Field(default=32, ge=1)
    """Channels of Hagg."""
    signed_days: bool = False
    """Tell looks before the target from looks after it."""
    hard_mask: bool = False
    """Looks that are missing, clouded or shaded get no weight, whatever the network thinks."""
    condition: bool = True
    """Use the target's own clear and present channels."""
    floor: bool = False
    """While training every step keeps at least the weight epsilon (the paper's -(1 - epsilon))."""
    fallback: bool = True
    """Where the weights add up to less than 1e-3, the mean of the clear looks (or the prior) is taken, not 0."""
    prior: Literal["none", "member", "base"] = "none"
    """``base``: X = prior + opening * weighted deviations from it. ``member``: the prior is a step of its own with
    weight 1 + Htime, all others are scaled by the opening. The opening starts at 0: untrained, X equals the prior."""
    estimates: int = Field(default=0, ge=0)
    """How many of the batch's further estimates join the series as steps at distance 0."""
    extra_inputs: tuple[Literal["known", "prior", "scale"], ...] = ()
    """What else about the target every step is shown."""
    context: int = Field(default=0, ge=0)
    """How many of the batch's context channels every step is shown."""


@dataclass(frozen=True)
class Gated:
    """The gate's answer.

    Attributes:
        aggregate: (B, C, H, W) float32 reflectance, X of equation 3; 0 where nothing is known.
        features: (B, F, H, W) float32, Hagg.
        weights: (B, T, C, H, W) float32, each look's share in ``aggregate``; None unless asked for.
        heaviest: (targets, H, W) int64, the step that weighs most, see ``Completed``; None where all came at once.
    """

    aggregate: Tensor
    features: Tensor
    weights: Tensor | None = None
    heaviest: Tensor | None = None


class _Steps(NamedTuple):
    """Steps in a row; ``about`` tells an estimate's kind and uncertainty and is None for looks."""

    looks_NCHW: Tensor
    present_N1HW: Tensor
    clear_N2HW: Tensor
    days_N: Tensor
    about_NAHW: Tensor | None = None


@dataclass(frozen=True)
class _Sums:
    """All that is kept of a series when its steps have passed by; parts of a series add up."""

    weight_BWHW: Tensor
    weighted_BCHW: Tensor
    usable_B1HW: Tensor
    usable_looks_BCHW: Tensor
    peak_BFHW: Tensor

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.weight_BWHW + other.weight_BWHW,
            self.weighted_BCHW + other.weighted_BCHW,
            self.usable_B1HW + other.usable_B1HW,
            self.usable_looks_BCHW + other.usable_looks_BCHW,
            torch.maximum(self.peak_BFHW, other.peak_BFHW),
        )


class _Blend(NamedTuple):
    """How sums become the aggregate: each look's share is by_weight * Htime + by_use * usable."""

    by_weight_BWHW: Tensor
    by_use_BWHW: Tensor
    of_prior_BWHW: Tensor

    def aggregate(self, sums: _Sums, target: Batch) -> Tensor:
        """X, (B, C, H, W)."""
        looks_BCHW = self.by_weight_BWHW * sums.weighted_BCHW + self.by_use_BWHW * sums.usable_looks_BCHW
        return looks_BCHW + self.of_prior_BWHW * target.prior

    def shares(self, htime_BTWHW: Tensor, usable_BT1HW: Tensor, bands: int) -> Tensor:
        """Each look's share in X, (B, T, C, H, W)."""
        shares = self.by_weight_BWHW.unsqueeze(1) * htime_BTWHW + self.by_use_BWHW.unsqueeze(1) * usable_BT1HW
        return shares.expand(-1, -1, bands, -1, -1)


class TimeGate(nn.Module):
    """Weights every step by looking at it alone; any number of steps in any order.

    With ``bands`` empty every band is a sample of its own, and answers are (B*C, ..., 1, H, W).
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = len(config.bands) or 1
        self.out = self.channels if config.weights == "per_band" else 1
        narrow, wide = config.gate_widths
        sides = 2 if config.signed_days else 1
        # a positive slope: with a negative one the ReLU in the decay never opens
        self.decay_slope = nn.Parameter(torch.ones(sides))
        self.decay_offset = nn.Parameter(torch.zeros(sides))
        self.combine = nn.Conv2d(self.channels + sides + 2, narrow, 1, bias=False)
        self.kinds = config.estimates + (config.prior == "member")
        self.combine_about = nn.Conv2d(self.kinds + self.channels, narrow, 1, bias=False) if self.kinds else None
        self.combine_norm = nn.Sequential(nn.BatchNorm2d(narrow), nn.Mish())
        self.extra_channels = self.channels * config.context
        self.extra_channels += sum(1 if name == "known" else self.channels for name in config.extra_inputs)
        asked = 3 * config.condition + self.extra_channels
        # no batch norm here: a condition that is the same everywhere (all clear) has no variance to divide by, and what
        # training normalised with its own mean would be blown up with the running one
        self.conditioning = nn.Sequential(nn.Conv2d(asked, narrow, 1), nn.Mish()) if asked else None
        self.spatial = convolve(narrow, wide, 3)
        # no Mish after the last one: the ReLU of equation 1 follows
        self.last = nn.Sequential(nn.Conv2d(wide, self.out, 1, bias=False), nn.BatchNorm2d(self.out))
        self.abstract = nn.Conv2d(self.out, config.aggregate_features, 1)
        self.opening = nn.Parameter(torch.zeros(())) if config.prior != "none" else None

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Gated:
        """Aggregate the looks of each target: all at once where gradients are wanted, else streamed."""
        if (bands := batch.looks.shape[2]) != self.channels and self.config.bands:
            raise ValueError(f"this gate takes {self.channels} bands, the batch has {bands}")
        if self.training or torch.is_grad_enabled():
            return self.at_once(batch, with_weights=with_weights)
        return self.streamed(batch, with_weights=with_weights)

    def at_once(self, batch: Batch, *, with_weights: bool = False) -> Gated:
        """All steps in one pass, so that batch norm sees the whole series; padded steps enter nothing."""
        if not self.config.bands:
            batch = batch.by_band()
        real_BT = batch.steps
        size = len(real_BT)
        looks = _Steps(batch.looks[real_BT], batch.present[real_BT], batch.clear[real_BT], batch.days[real_BT])
        estimates = self._estimates(batch)
        shown = self.shown(batch)
        if shown is not None:
            whose_N = real_BT.nonzero()[:, 0]
            shown = torch.cat([shown[whose_N], *[shown] * len(estimates)])
        htime_NWHW = self._htime([looks, *estimates], shown)
        first = len(looks.days_N)
        mine, others = htime_NWHW[:first], [htime_NWHW[i : i + size] for i in range(first, len(htime_NWHW), size)]
        htime_BTWHW = mine.new_zeros((*real_BT.shape, *mine.shape[1:])).index_put((real_BT,), mine)
        usable_BT1HW = _usable(batch.present, batch.clear) * real_BT[:, :, None, None, None]
        sums = self._nothing(batch) + self._collect(htime_BTWHW, batch.looks, usable_BT1HW, real_BT)
        sums, prior_weight = self._join(sums, estimates, others, batch)
        blend = self._blend(sums, prior_weight, batch)
        weights = blend.shares(htime_BTWHW, usable_BT1HW, self.channels) if with_weights else None
        return Gated(blend.aggregate(sums, batch), _features(sums), weights)

    def streamed(self, batch: Batch, *, with_weights: bool = False) -> Gated:
        """Step by step with running sums and a running maximum: memory does not grow with the number of steps.

        Equal to ``at_once`` within 1e-5 in evaluation mode. Only ``with_weights`` keeps something of every step.
        """
        target = batch.without_series() if self.config.bands else batch.without_series().by_band()
        shown = self.shown(target)
        sums = self._nothing(target)
        kept: list[tuple[Tensor, Tensor]] = []
        most = Heaviest(len(batch.days), (batch.looks.shape[-2], batch.looks.shape[-1]), batch.days.device)
        for t in range(batch.steps.shape[1]):
            step, real_B1 = self._step(batch, t)
            real_B1111 = real_B1[:, :, None, None, None]
            htime_B1WHW = self._htime([step], shown).unsqueeze(1) * real_B1111
            usable_B11HW = _usable(step.present_N1HW, step.clear_N2HW).unsqueeze(1) * real_B1111
            sums = sums + self._collect(htime_B1WHW, step.looks_NCHW.unsqueeze(1), usable_B11HW, real_B1)
            most.see(t, htime_B1WHW[:, 0], usable_B11HW[:, 0], batch.days[:, t])
            if with_weights:
                kept.append((htime_B1WHW, usable_B11HW))
        estimates = self._estimates(target)
        others = [self._htime([step], shown) for step in estimates]
        sums, prior_weight = self._join(sums, estimates, others, target)
        blend = self._blend(sums, prior_weight, target)
        weights = torch.cat([blend.shares(*one, self.channels) for one in kept], dim=1) if kept else None
        heaviest = most.answer(blend.by_weight_BWHW, blend.by_use_BWHW)
        return Gated(blend.aggregate(sums, target), _features(sums), weights, heaviest)

    def shown(self, target: Batch) -> Tensor | None:
        """(B, Q, H, W): what every step is told about the target, None where nothing is asked for."""
        parts = [target.condition, *self.extras(target)] if self.config.condition else self.extras(target)
        return torch.cat(parts, dim=1) if parts else None

    def extras(self, target: Batch) -> list[Tensor]:
        """The extra inputs and the context that were asked for, each (B, ?, H, W), ``extra_channels`` in all."""
        config = self.config
        if config.context > target.context.shape[1]:
            raise ValueError(f"this gate takes {config.context} context channels, got {target.context.shape[1]}")
        sources = {"known": target.known, "prior": target.prior, "scale": _log_scale(target.scale)}
        parts = [sources[name] for name in config.extra_inputs]
        return [*parts, target.context[:, : config.context].flatten(1, 2)] if config.context else parts

    def _htime(self, parts: Sequence[_Steps], shown_NQHW: Tensor | None) -> Tensor:
        """Algorithm 1 and equation 1: the weights of steps in a row, (N, W, H, W) float32, 0 or more."""
        x_NFHW = self.combine_norm(torch.cat([self._mix(part) for part in parts]))
        if self.conditioning is not None:
            x_NFHW = x_NFHW + self.conditioning(shown_NQHW)
        g_NWHW = self.last(self.spatial(x_NFHW)).float()
        htime_NWHW = torch.expm1(g_NWHW.clamp(0.0, _LARGEST_G))
        if self.config.floor and self.training:
            htime_NWHW = htime_NWHW + EPSILON
        if self.config.hard_mask:
            htime_NWHW = htime_NWHW * torch.cat([_usable(part.present_N1HW, part.clear_N2HW) for part in parts])
        return htime_NWHW

    def _mix(self, steps: _Steps) -> Tensor:
        """The first convolution of Algorithm 1; the decay of the distance is spread over the pixels by ``present``."""
        days_ND = steps.days_N[:, None]
        days_ND = torch.cat([-days_ND, days_ND], dim=1).relu() if self.config.signed_days else days_ND.abs()
        decay_ND = torch.exp(-torch.relu(self.decay_slope * days_ND / _DAYS + self.decay_offset))
        seen_NDHW = steps.present_N1HW * decay_ND[:, :, None, None]
        mixed: Tensor = self.combine(torch.cat([steps.looks_NCHW, seen_NDHW, steps.clear_N2HW], dim=1))
        if self.combine_about is not None and steps.about_NAHW is not None:
            mixed = mixed + self.combine_about(steps.about_NAHW)
        return mixed

    def _step(self, batch: Batch, t: int) -> tuple[_Steps, Tensor]:
        """Step ``t`` of every target and (B, 1) whether it is real."""
        looks, present, clear = batch.looks[:, t], batch.present[:, t], batch.clear[:, t]
        days, real = batch.days[:, t], batch.steps[:, t : t + 1]
        if not self.config.bands:
            bands = looks.shape[1]
            looks = looks.flatten(0, 1).unsqueeze(1)
            present, clear, days, real = (x.repeat_interleave(bands, dim=0) for x in (present, clear, days, real))
        return _Steps(looks, present, clear, days), real

    def _estimates(self, target: Batch) -> list[_Steps]:
        """The classical estimates that join the series, the prior first where it is a member."""
        if not self.kinds:
            return []
        if self.config.estimates > target.estimates.shape[1]:
            raise ValueError(f"this gate takes {self.config.estimates} estimates, got {target.estimates.shape[1]}")
        images = [target.prior] if self.config.prior == "member" else []
        images += target.estimates[:, : self.config.estimates].unbind(1)
        there, log_scale = _has_prior(target).float(), _log_scale(target.scale)
        clear, days = there.expand(-1, 2, -1, -1), target.prior.new_zeros(len(target.prior))
        kind_KB = torch.eye(self.kinds, device=days.device)[:, None, :, None, None].expand(
            -1, len(days), -1, *there.shape[2:]
        )
        return [
            _Steps(image, there, clear, days, torch.cat([kind, log_scale], dim=1))
            for image, kind in zip(images, kind_KB, strict=True)
        ]

    def _collect(self, htime_BTWHW: Tensor, looks_BTCHW: Tensor, usable_BT1HW: Tensor, real_BT: Tensor) -> _Sums:
        abstract_BTFHW = self.abstract(htime_BTWHW.flatten(0, 1)).unflatten(0, htime_BTWHW.shape[:2])
        hidden = ~real_BT[:, :, None, None, None]
        return _Sums(
            htime_BTWHW.sum(dim=1),
            (htime_BTWHW * looks_BTCHW).sum(dim=1),
            usable_BT1HW.sum(dim=1),
            (usable_BT1HW * looks_BTCHW).sum(dim=1),
            abstract_BTFHW.float().masked_fill(hidden, -torch.inf).amax(dim=1),
        )

    def _nothing(self, target: Batch) -> _Sums:
        b, c, h, w = target.prior.shape
        zeros = target.prior.new_zeros
        peak = target.prior.new_full((b, self.config.aggregate_features, h, w), -torch.inf)
        return _Sums(zeros(b, self.out, h, w), zeros(b, c, h, w), zeros(b, 1, h, w), zeros(b, c, h, w), peak)

    def _join(
        self, sums: _Sums, estimates: Sequence[_Steps], htimes: Sequence[Tensor], target: Batch
    ) -> tuple[_Sums, Tensor]:
        """Sums with the classical estimates in them, and the weight of the prior as a member, kept apart."""
        prior_weight_BWHW = torch.zeros_like(sums.weight_BWHW)
        there_B1HW = _has_prior(target).float()
        for number, (steps, htime_BWHW) in enumerate(zip(estimates, htimes, strict=True)):
            htime_BWHW = htime_BWHW * there_B1HW
            real_B1 = torch.ones_like(htime_BWHW[:, :1, 0, 0], dtype=torch.bool)
            # an estimate is no look: it never counts among those that are usable
            one = self._collect(
                htime_BWHW.unsqueeze(1),
                steps.looks_NCHW.unsqueeze(1),
                torch.zeros_like(there_B1HW).unsqueeze(1),
                real_B1,
            )
            if number == 0 and self.config.prior == "member":
                prior_weight_BWHW = htime_BWHW
                one = replace(
                    one, weight_BWHW=torch.zeros_like(htime_BWHW), weighted_BCHW=torch.zeros_like(one.weighted_BCHW)
                )
            sums = sums + one
        return sums, prior_weight_BWHW

    def _blend(self, sums: _Sums, prior_weight_BWHW: Tensor, target: Batch) -> _Blend:
        """Equations 2 and 3, and what happens where the gate has no opinion or a prior is at hand."""
        total = sums.weight_BWHW
        by_weight, by_use = 1.0 / (total + EPSILON), torch.zeros_like(total)
        if self.config.fallback and not (self.config.floor and self.training):
            weak = total < WEAK
            by_use = 1.0 / sums.usable_B1HW.clamp_min(EPSILON)
            # epsilon, too, is a weight of the clear looks: a single one comes out as it went in
            by_use = torch.where(weak, by_use, by_use * EPSILON * by_weight)
            by_weight = by_weight.masked_fill(weak, 0.0)
        if self.opening is None:
            return _Blend(by_weight, by_use, torch.zeros_like(total))
        if self.config.prior == "base":
            opened = self.opening / (total + WEAK)  # goes over to the prior without a step where weights are weak
        else:
            # not below 0, where weights would cancel; the gradient passes, so that it can open again
            opening = self.opening + (self.opening.clamp_min(0.0) - self.opening).detach()
            opened = opening / (opening * total + 1.0 + prior_weight_BWHW)
        has = _has_prior(target)
        return _Blend(
            torch.where(has, opened, by_weight),
            torch.where(has, 0.0, by_use),
            torch.where(has, 1.0 - opened * total, 0.0),
        )


def convolve(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """Convolution, batch norm, Mish: what follows every convolution but the last."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.Mish()
    )


def _usable(present: Tensor, clear: Tensor) -> Tensor:
    """(..., 1, H, W): present, free of cloud and free of shadow."""
    return present * clear.prod(dim=-3, keepdim=True)


def _has_prior(target: Batch) -> Tensor:
    """(B, 1, H, W) bool: some band of the prior is not 0."""
    return (target.prior != 0).any(dim=1, keepdim=True)


def _log_scale(scale: Tensor) -> Tensor:
    return torch.log(scale / _USUAL_SCALE)


def _features(sums: _Sums) -> Tensor:
    """Hagg; 0 where a target has no step at all."""
    return sums.peak_BFHW.masked_fill(sums.peak_BFHW == -torch.inf, 0.0)
