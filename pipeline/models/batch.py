"""What a model is, is given and gives back; dims, units and polarity of every array are fixed here.

Legend: B batch, T time steps, C bands, K estimates, G context channels, H and W pixels (y, x).
One polarity throughout: **1 = good** (there, clear). Missing values are 0 and marked, never NaN.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

FEATURES = 128
"""Feature maps of a look that a network holds at its widest place."""


@dataclass(frozen=True)
class Batch:
    """Series around targets, and what is known classically about each target.

    Attributes:
        looks: (B, T, C, H, W) float32 reflectance (about 0 to 1), 0 where not present; any order of steps.
        present: (B, T, 1, H, W) float32, 1 = the look has data here (one for all bands), 0 = missing.
        clear: (B, T, 2, H, W) float32 0..1, 1 = fully visible; channel 0 free of cloud, channel 1 free of shadow.
        days: (B, T) float32 signed days from the target (negative = before it).
        steps: (B, T) bool, True = a real step, False = padding.
        condition: (B, 3, H, W) float32, the target's own clear (2) and present (1); all ones at inference.
        prior: (B, C, H, W) float32 reflectance, the best classical estimate of the target, 0 where there is none.
        scale: (B, C, H, W) float32 reflectance, above 0: one sigma that the prior claims.
        estimates: (B, K, C, H, W) float32 reflectance, further classical estimates in the order of
            ``pipeline.estimates.ESTIMATES``; the prior's value where one of them is missing.
        context: (B, G, C, H, W) float32, per-pixel facts in the order of ``pipeline.estimates.CONTEXT``.
        known: (B, 1, H, W) float32, 1 = the target itself is clear here (passed through bit-exact afterwards).
    """

    looks: Tensor
    present: Tensor
    clear: Tensor
    days: Tensor
    steps: Tensor
    condition: Tensor
    prior: Tensor
    scale: Tensor
    estimates: Tensor
    context: Tensor
    known: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def without_series(self) -> Self:
        """What is known about the targets alone: the same batch with no steps (views, nothing is copied)."""
        none = {name: getattr(self, name)[:, :0] for name in ("looks", "present", "clear", "days", "steps")}
        return replace(self, **none)

    def by_band(self) -> Self:
        """Every band as a sample of its own, (B*C, ..., 1, H, W) with the bands of one target side by side (a copy)."""
        bands = self.looks.shape[2]
        return type(self)(
            looks=self.looks.movedim(2, 1).flatten(0, 1).unsqueeze(2),
            prior=self.prior.flatten(0, 1).unsqueeze(1),
            scale=self.scale.flatten(0, 1).unsqueeze(1),
            estimates=self.estimates.movedim(2, 1).flatten(0, 1).unsqueeze(2),
            context=self.context.movedim(2, 1).flatten(0, 1).unsqueeze(2),
            **{
                name: getattr(self, name).repeat_interleave(bands, dim=0)
                for name in ("present", "clear", "days", "steps", "condition", "known")
            },
        )


@dataclass(frozen=True)
class Completed:
    """What a model answers.

    Attributes:
        image: (B, C, H, W) float32 reflectance.
        aggregate: (B, C, H, W) float32 reflectance, the gate's X before the residual network.
        weights: (B, T, C, H, W) float32, each look's share in ``aggregate`` (0 at padding); None unless asked for.
        sigma: (B, C, H, W) float32 reflectance, one sigma, or None for models without it.
        heaviest: (B, H, W) int64, the step of the largest weight, summed over bands before they are normalised, -1
            where no look has a share; None for models without weights, and while gradients are wanted.
    """

    image: Tensor
    aggregate: Tensor
    weights: Tensor | None = None
    sigma: Tensor | None = None
    heaviest: Tensor | None = None

    def bands_together(self, bands: int) -> Self:
        """The inverse of ``Batch.by_band`` for an answer: (B*C, ..., 1, H, W) to (B, ..., C, H, W)."""

        def together(part: Tensor) -> Tensor:
            return part.reshape(-1, bands, *part.shape[1:]).squeeze(-3).movedim(1, -3)

        weights, sigma = (None if part is None else together(part) for part in (self.weights, self.sigma))
        return type(self)(together(self.image), together(self.aggregate), weights, sigma, self.heaviest)


class ModelConfig(BaseModel):
    """What every network's configuration has; it travels inside the weights file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Which network, a key of ``pipeline.models.NETWORKS``."""
    bands: tuple[str, ...] = Field(default=())
    """Band names in the order of the channels; empty: weights shared over bands, any subset in any order."""
    patch_px: int = Field(default=128, gt=0)
    """Side of the patches at inference; see ``pipeline.predict.PatchLattice``."""
    stride_px: int = Field(default=96, gt=0)
    """From patch to patch."""
    border_px: int = Field(default=8, ge=0)
    """Outermost pixels of a patch that are not used."""

    @model_validator(mode="after")
    def _patches_overlap(self) -> Self:
        used = self.patch_px - 2 * self.border_px
        if not 0 < used - self.stride_px <= self.stride_px:
            raise ValueError(
                f"patches of {self.patch_px} px every {self.stride_px} px without {self.border_px} px of border do not "
                f"overlap once everywhere; choose a stride_px of at least {-(-used // 2)} and below {used}"
            )
        return self


class Model(nn.Module, ABC):
    """A network that completes targets; ``pipeline.models.build`` makes one from its configuration."""

    config: ModelConfig

    def patch_bytes(self, looks: int, bands: int) -> float:
        """Bytes that one patch of so many looks takes at the peak on a CPU; a network that measured it tells better."""
        return 4.0 * self.config.patch_px**2 * looks * (2 * bands + FEATURES)

    @abstractmethod
    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:
        """Complete the targets of ``batch``; the looks' shares come along where asked for."""
