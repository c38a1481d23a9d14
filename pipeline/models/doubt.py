"""Looks whose masks miss cloud: in come looks and what a fit leaves over, out come whom to doubt and a robust middle.

A mask that misses cloud or shadow spoils both sides: clear pixels of the target that are none, beside the gap, and
values in the gap that are borrowed from such looks. Neither can be told from one value, but from what the bands, the
neighbours and the other dates say of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.batch import Batch

FLOOR = 2e-3
"""Reflectance below which deviations say nothing."""
MOST = 6.0
"""Deviations beyond this many times the usual are cut."""
NEAR = 0.1
"""Clear pixels nearer to the gap than this, in units of ``nearness``, are its edge."""
AT_FIRST = -3.0
"""Before training the logarithm of the further noise is softplus(-3) = 0.05."""
LEVEL_PX = 64.0
"""A look is levelled to the target by their common clear pixels; so many of them count as much as no change."""
LEVEL_MOST = 0.1
"""Reflectance: differences beyond it are cut before their mean is taken; they are no change of level."""


class Doubt(nn.Module):
    """How much more noise a clear pixel has than usual, as a logarithm; hardly any before training, never less."""

    def __init__(self, *, hidden: int = 12) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(16, hidden, 3, padding=1), nn.Mish(), nn.Conv2d(hidden, hidden, 1), nn.Mish()
        )
        self.tell = nn.Conv2d(hidden, 1, 1)
        nn.init.zeros_(self.tell.weight)
        nn.init.constant_(self.tell.bias, AT_FIRST)  # type: ignore[arg-type]

    def forward(self, residual: Tensor, usable: Tensor, nearness: Tensor, off: Tensor | None = None) -> Tensor:
        """(B, 1, H, W) from what the fit leaves over and how far the target lies off the middle look.

        Args:
            residual: (B, C, H, W) reflectance, 0 where not usable.
            usable: (B, 1, H, W) 1 = clear and fitted.
            nearness: (B, 1, H, W) distance to the gap, as ``Residual`` wants it.
            off: (B, C, H, W) reflectance, 0 where not usable; None = the residual stands for it.
        """
        facts = [nearness, usable]
        for one in (residual, residual if off is None else off):
            scaled = (one / _usual(one, usable)).clamp(-MOST, MOST)
            mean = scaled.mean(dim=1, keepdim=True)
            around = functional.avg_pool2d(mean, 5, 1, 2) / functional.avg_pool2d(usable, 5, 1, 2).clamp_min(0.04)
            # cloud lifts all bands, shadow lowers all; a harvest does neither
            facts += [mean, scaled.abs().mean(dim=1, keepdim=True), around, scaled.amin(1, True), scaled.amax(1, True)]
        bright = torch.asinh(residual.mean(dim=1, keepdim=True) / 0.01)
        near = usable * (nearness > -NEAR)
        # a mask that misses cloud misses it at more than one place: what the whole edge looks like, and the rest
        facts += [bright, *(_mean(bright.abs(), part).expand_as(bright) for part in (near, usable - near))]
        facts.append(torch.log(_usual(residual, usable)[:, :1] / FLOOR).expand_as(usable) * usable)
        answer: Tensor = self.tell(self.look(torch.cat(facts, dim=1)))
        return functional.softplus(answer).clamp_max(8.0) * usable


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """(B, 1, 1, 1): the mean of (B, 1, H, W) over pixels that count."""
    total = (values * counts).sum(dim=(2, 3), keepdim=True)
    return total / counts.sum(dim=(2, 3), keepdim=True).clamp_min(1.0)


def _usual(values: Tensor, usable: Tensor) -> Tensor:
    """(B, 1, 1, 1): the middle absolute value over usable pixels and all bands, at least ``FLOOR``."""
    flat = torch.where(usable > 0, values.abs(), torch.nan).flatten(1)
    return torch.nanmedian(flat, dim=1).values.nan_to_num(1.0).clamp_min(FLOOR)[:, None, None, None]


@torch.no_grad()
def middle_look(batch: Batch, clear: Tensor) -> tuple[Tensor, Tensor]:
    """The median of the clear looks, each levelled to the target, and how far they lie around it.

    One look that shows missed cloud moves a mean, an interpolation and a regression, but hardly a median.

    Args:
        batch: the series.
        clear: (B, T, 1, H, W) 1 = usable; 0 for the target itself and for padding.

    Returns:
        (B, C, H, W) reflectance, the prior where nothing is clear; and the median absolute deviation (B, C, H, W), 0
        where there is one look or none.
    """
    common = clear * batch.known[:, None]
    apart = (batch.prior[:, None] - batch.looks).clamp(-LEVEL_MOST, LEVEL_MOST) * common
    level = apart.sum(dim=(3, 4), keepdim=True) / (common.sum(dim=(3, 4), keepdim=True) + LEVEL_PX)
    looks = torch.where(clear > 0, batch.looks + level, torch.nan)
    middle = torch.nanmedian(looks, dim=1).values
    spread = torch.nanmedian((looks - middle[:, None]).abs(), dim=1).values
    return torch.where(torch.isnan(middle), batch.prior, middle), spread.nan_to_num(0.0)
