"""The adversary of the Pix2Pix scheme. In: a batch and an image. Out: logits, one per patch, "this is the true target".

Isola et al. 2017, conditioned on the whole series (Oehmcke et al. 2020, section 4.1.3): every step is encoded alone and
a maximum over steps makes one map of any number of them. Training only; the generator alone is exported.
Legend: B targets, T steps, C bands, F features, H and W pixels.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.batch import Batch

WEIGHT: Final = 0.01
"""Weight of ``generator_loss`` beside a reconstruction loss of weight 1 (Pix2Pix: lambda = 100 on the latter)."""
BETAS: Final = (0.5, 0.999)
"""Adam's, for both networks."""
_KNOWN_SHARE: Final = 0.5


class Discriminator(nn.Module):
    """PatchGAN with 4x4 convolutions; 0.8 million parameters at 6 bands (the paper's: 1,064,916, layers not given)."""

    def __init__(self, bands: int, width: int = 64) -> None:
        super().__init__()
        self.series = _first(bands + 3, width)
        self.candidate = _first(bands + 3, width)
        self.trunk = nn.Sequential(
            *_inner(2 * width, 2 * width, stride=2),
            *_inner(2 * width, 4 * width, stride=1),
            nn.Conv2d(4 * width, 1, 4, padding=1),
        )

    def forward(self, batch: Batch, image: Tensor) -> Tensor:
        """Logits (B, 1, H/4 - 2, W/4 - 2) for ``image`` (B, C, H, W) as the target of ``batch``; sides from 16 px."""
        shape = batch.steps.shape
        seen_BTFHW = torch.cat([batch.looks, batch.present, batch.clear], dim=2)
        coded = self.series(seen_BTFHW.flatten(0, 1)).unflatten(0, shape)
        coded = coded.masked_fill(~batch.steps[:, :, None, None, None], -torch.inf).amax(dim=1)
        coded = coded.masked_fill(coded == -torch.inf, 0.0)  # a target without any step
        own = self.candidate(torch.cat([image, batch.condition], dim=1))
        logits: Tensor = self.trunk(torch.cat([coded, own], dim=1))
        return logits


def discriminator_loss(net: Discriminator, batch: Batch, truth: Tensor, image: Tensor, known: Tensor) -> Tensor:
    """Half the cross-entropy of the true target called true and of the completed one called false.

    Args:
        net: the adversary.
        batch: what the generator was given.
        truth: (B, C, H, W) reflectance.
        image: (B, C, H, W) the generator's answer; no gradient goes back into it.
        known: (B, 1, H, W), 1 = the truth is known; elsewhere the image is copied into it, so that holes do not give
            the answer away, and patches that are mostly unknown do not count.
    """
    image = image.detach()
    pasted = torch.where(known > 0, truth, image)
    true, false = net(batch, pasted), net(batch, image)
    return (_entropy(true, 1.0, known) + _entropy(false, 0.0, known)) / 2


def generator_loss(net: Discriminator, batch: Batch, image: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of the completed target called true; arguments as ``discriminator_loss``."""
    return _entropy(net(batch, image), 1.0, known)


def _entropy(logits: Tensor, wanted: float, known: Tensor) -> Tensor:
    share = functional.interpolate(known, size=logits.shape[-2:], mode="area")
    counts = (share >= _KNOWN_SHARE).float()
    each = functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, wanted), reduction="none")
    return (each * counts).sum() / counts.sum().clamp_min(1.0)


def _first(inputs: int, outputs: int) -> nn.Sequential:
    """No batch norm on the first layer (Isola et al. 2017)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2))


def _inner(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.2),
    ]
