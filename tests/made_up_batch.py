"""A small batch of made-up numbers for the networks: a stable scene, looks with a date's gain, clouds, a prior."""

import torch

from pipeline.models.batch import Batch


def made_up_batch(*, targets=2, steps=5, bands=6, size=(12, 16), estimates=2, context=2, seed=0):
    """Every field random but plausible; clouds are white and marked, missing looks are 0, the last step is padding."""
    torch.manual_seed(seed)
    h, w = size
    scene = 0.05 + 0.4 * torch.rand(targets, 1, bands, h, w)
    looks = scene * (0.9 + 0.2 * torch.rand(targets, steps, 1, 1, 1)) + 0.01 * torch.randn(targets, steps, bands, h, w)
    present = (torch.rand(targets, steps, 1, h, w) > 0.1).float()
    clear = (torch.rand(targets, steps, 2, h, w) > 0.25).float()
    looks = torch.where(clear[:, :, :1] > 0, looks, 0.8) * present
    real = torch.ones(targets, steps, dtype=torch.bool)
    real[0, -1] = steps == 1
    return Batch(
        looks=looks,
        present=present,
        clear=clear,
        days=torch.randint(-60, 60, (targets, steps)).float(),
        steps=real,
        condition=torch.ones(targets, 3, h, w),
        prior=scene[:, 0] + 0.01 * torch.randn(targets, bands, h, w),
        scale=0.005 + 0.02 * torch.rand(targets, bands, h, w),
        estimates=scene + 0.02 * torch.randn(targets, estimates, bands, h, w),
        context=torch.rand(targets, context, bands, h, w),
        known=(torch.rand(targets, 1, h, w) > 0.5).float(),
    )
