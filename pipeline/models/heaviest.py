"""Which look weighs most at each pixel. In: steps one after another. Out: the number of one step, whatever came before.

Two running maxima, so that memory does not grow with the number of steps.
"""

import torch
from torch import Tensor


class Heaviest:
    """The step of the largest weight, summed over bands, and the nearest usable one for where none has a weight.

    Args:
        targets: B; what comes in may be (B*C, ...), the bands of a target side by side.
        size: (H, W).
        device: of the tensors.
    """

    def __init__(self, targets: int, size: tuple[int, int], device: torch.device) -> None:
        self.targets = targets
        self.weight = torch.zeros((targets, *size), device=device)
        self.step = torch.full((targets, *size), -1, dtype=torch.int64, device=device)
        self.away, self.nearest = torch.full_like(self.weight, torch.inf), self.step.clone()

    def see(self, step: int, weight: Tensor, usable: Tensor, days: Tensor) -> None:
        """A step passes by: its weights (N, W, H, W) and where it is usable (N, 1, H, W), 0 or more; ``days`` (B,)."""
        weight, usable = self._together(weight), self._together(usable)
        self.step = torch.where(weight > self.weight, step, self.step)
        self.weight = torch.maximum(self.weight, weight)
        away = torch.where(usable > 0, days.abs().float()[:, None, None], torch.inf)
        self.nearest = torch.where(away < self.away, step, self.nearest)
        self.away = torch.minimum(self.away, away)

    def answer(self, by_weight: Tensor, by_use: Tensor) -> Tensor:
        """(B, H, W) int64, -1 where no look has a share; by how much weight and use count (N, W, H, W)."""
        found = torch.where(self._together(by_use) > 0, self.nearest, -1)
        return torch.where((self._together(by_weight) > 0) & (self.step >= 0), self.step, found)

    def _together(self, values: Tensor) -> Tensor:
        return values.reshape(self.targets, -1, *values.shape[-2:]).sum(dim=1)
