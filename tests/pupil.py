"""The smallest network that keeps to the contract, for tests of training; also the entry of processes to be killed."""

import sys

import torch
from torch import nn

from pipeline import models
from pipeline.models.batch import Batch, Completed, Model, ModelConfig


class PupilConfig(ModelConfig):
    name: str = "pupil"
    wrong: float = 0.0
    """Added to every answer at the start; to be unlearned."""
    poison: int = -1
    """From this forward pass in training mode on, the answer is NaN."""


class Pupil(Model):
    """A 3 x 3 convolution on prior and scale, band by band, and a residual weighted by gamma = 0."""

    def __init__(self, config: PupilConfig) -> None:
        super().__init__()
        self.config = config
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Mish(), nn.Conv2d(8, 1, 3, padding=1))
        self.gamma = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.tensor(config.wrong))
        self.register_buffer("running", torch.zeros(()))
        self.passes = 0

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:
        n, c, h, w = batch.prior.shape
        facts = torch.stack([batch.prior, batch.scale, batch.known.expand(-1, c, -1, -1)], 2).flatten(0, 1)
        step = self.net(facts).view(n, c, h, w)
        self.passes += self.training
        if self.training and 0 <= self.config.poison < self.passes:
            step = step * torch.nan
        if self.training:  # as batch norm's mean: the forward pass alone moves it
            self.running.lerp_(step.detach().mean(), 0.1)
        share = batch.steps[:, :, None, None, None] * torch.ones_like(batch.looks)
        weights = share / share.sum(dim=1, keepdim=True) if with_weights else None
        return Completed(batch.prior + self.offset + self.gamma * step * batch.scale, batch.prior, weights)


models.NETWORKS["pupil"] = (PupilConfig, Pupil)

if __name__ == "__main__":
    from pipeline.cli import main

    sys.argv[0] = "cloudgate"
    main()
