"""A network that is built in no time: a gate over looks and a small convolution, weights shared over bands."""

from typing import Literal

import torch
from torch import nn

from pipeline import models
from pipeline.models import weights
from pipeline.models.batch import Batch, Completed, Model, ModelConfig


class TinyConfig(ModelConfig):
    name: Literal["tiny"] = "tiny"
    patch_px: int = 64
    stride_px: int = 40
    border_px: int = 4
    width: int = 8
    gate: bool = True
    """Tell each look's share."""
    sigma: bool = True
    """Tell an uncertainty."""
    mad: bool = False
    """Answer NaN."""


class TinyNet(Model):
    """Answers prior + a bit of its convolution; remembers the batches it saw."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = config
        self.net = nn.Sequential(
            nn.Conv2d(3, config.width, 5, padding=2), nn.Mish(), nn.Conv2d(config.width, 1, 5, padding=2)
        )
        self.seen: list[Batch] = []

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:
        self.seen.append(batch)
        near = torch.exp(-batch.days.abs() / 10)[:, :, None, None, None]
        opened = batch.clear.amin(dim=2, keepdim=True) * batch.present * near * batch.steps[:, :, None, None, None]
        shares = (opened / (opened.sum(dim=1, keepdim=True) + 1e-6)).expand_as(batch.looks)
        aggregate = (shares * batch.looks).sum(dim=1)
        b, c, h, w = batch.prior.shape
        facts = torch.stack([batch.prior, aggregate, batch.known.expand_as(batch.prior)], dim=2)
        image = batch.prior + 0.05 * self.net(facts.reshape(b * c, 3, h, w)).reshape(b, c, h, w)
        sigma = batch.scale * 0.8 if self.config.sigma else None
        if self.config.mad:
            image = image * torch.nan
        heaviest = torch.where(shares.sum(dim=2).amax(dim=1) > 0, shares.sum(dim=2).argmax(dim=1), -1)
        weights = shares if self.config.gate and with_weights else None
        return Completed(image, aggregate, weights, sigma, heaviest if self.config.gate else None)


def tiny(kind: type[TinyNet] = TinyNet, **options) -> TinyNet:
    """One with options."""
    return kind(TinyConfig(**options)).eval()


def register(monkeypatch) -> None:
    """Let files name the network, in this process."""
    monkeypatch.setitem(models.NETWORKS, "tiny", (TinyConfig, TinyNet))


def save(path, *, seed: int = 0, **options):
    """A file with weights of its own."""
    model = tiny(**options)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return weights.save(model, path, card={"data": "none", "seed": seed})
