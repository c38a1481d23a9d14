"""What a fit leaves over, carried into the gap: in come residuals on clear pixels and a series, out comes a correction.

Kriging (a Gaussian process) of the residuals with a learned kernel: two pixels are alike when they lie near each other
**and** went through the season alike. A pixel in the gap thus takes most from clear pixels of its own crop or its own
field. The kernel's lengths, its noise and the weight of each date are learned with the rest of the model; what remains
unexplained comes with the answer.

Source: Rasmussen & Williams 2006, chapter 2 (posterior mean and variance); Wilson et al. 2016, arXiv:1511.02222 (a
kernel learned by gradients).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEAST_SHARE = 0.3
"""A date serves where it is clear on more than this share of the patch."""
POINTS_AT_ONCE = 1024
"""Pixels answered at a time where no gradient comes back, so that their likeness to the keys stays in the cache."""
TEXTURE_FLOOR = 3e-3
"""Reflectance added to a date's contrast, so that a date without any says nothing."""


@dataclass(frozen=True)
class Residual:
    """What is known of a residual.

    Attributes:
        values: (B, C, H, W) what the fit leaves over, in units of its error; 0 where unknown.
        usable: (B, 1, H, W) 1 = known here.
        nearness: (B, 1, H, W) the smaller, the sooner a pixel becomes a key.
        doubt: (B, 1, H, W) logarithm of how much more noise a pixel has than usual; what a mask missed has much.
    """

    values: Tensor
    usable: Tensor
    nearness: Tensor
    doubt: Tensor


@dataclass(frozen=True)
class _Solved:
    """A solved system: its keys (B, M, 2 + F), 1 = holds one (B, M), and what each says (B, M, C)."""

    model: "Kriging"
    keys: Tensor
    there: Tensor
    says: Tensor

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Correction (B, N, C) at points (B, N, 2 + F), and the squared likeness of the most alike key (B, N, 1).

        The latter is what that key alone explains: a cheap lower bound of what all keys explain.
        """
        if not torch.is_grad_enabled() and points.shape[1] > POINTS_AT_ONCE:
            parts = [self.at(part) for part in torch.split(points, POINTS_AT_ONCE, dim=1)]
            said, alike = zip(*parts, strict=True)
            return torch.cat(said, dim=1), torch.cat(alike, dim=1)
        across = self.model._kernel(points, self.keys) * self.there[:, None]
        return across @ self.says, across.amax(dim=2, keepdim=True) ** 2


class Kriging(nn.Module):
    """Residuals of clear pixels carried into the gap by similarity in space and series.

    Args:
        dates: most dates compared, the nearest in time.
    """

    def __init__(self, *, dates: int = 14) -> None:
        super().__init__()
        self.dates = dates
        # two Laplace kernels, near and far; lengths in pixels and in standard deviations of the series
        self.log_space = nn.Parameter(torch.tensor([2.7, 4.0]))
        self.log_series = nn.Parameter(torch.tensor([-0.3, 0.2]))
        self.mixture = nn.Parameter(torch.zeros(2))
        self.log_noise = nn.Parameter(torch.tensor(-2.0))
        self.fade = nn.Parameter(torch.tensor(0.3))  # weight of a date 30 days away: exp(-fade)

    def forward(
        self, alike: tuple[Tensor, Tensor], known: Residual, asked: Tensor, *, keys: int, learned_at: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Carry residuals into the pixels asked for.

        Args:
            alike: series (B, D, C, H, W), standardised values on the dates compared, no missing ones; and (B, D) the
                weight of each date, from ``date_weights``; 0 = not compared.
            known: what is carried.
            asked: (B, 1, H, W) 1 = an answer is wanted; elsewhere it is 0 and all is left.
            keys: most clear pixels that speak.
            learned_at: a gradient comes back from so many pixels of each target only, drawn at random (the answer is
                the same); None = from all.

        Returns:
            Correction (B, C, H, W) in the unit of the residual, and the variance left (B, 1, H, W): 1 where nothing
            is known, near 0 where alike clear pixels lie beside.
        """
        h, w = asked.shape[-2:]
        with torch.autocast(asked.device.type, enabled=False):  # a factorisation needs all of float32
            points = self._points(*alike)
            solved = self._solved(points, known, min(keys, h * w))
            wanted = asked.flatten(1)
            # only what is asked for, padded to the sample that asks for most
            most = max(int(wanted.sum(dim=1).max()), 1)
            at = torch.argsort(wanted, dim=1, descending=True, stable=True)[:, :most]
            if learned_at is None or most <= learned_at:
                correction, said = solved.at(_take(points, at))
            else:
                with torch.no_grad():
                    correction, said = solved.at(_take(points, at))
                some = torch.randperm(most, device=at.device)[:learned_at]
                again = solved.at(_take(points, at[:, some]))
                correction, said = (
                    whole.index_copy(1, some, part) for whole, part in zip((correction, said), again, strict=True)
                )
            real = torch.gather(wanted, 1, at)[..., None]
            left = 1.0 - _put((said / (1.0 + self.log_noise.exp())).clamp(0.0, 1.0) * real, at, h, w)
            return _put(correction * real, at, h, w), left

    def _solved(self, points: Tensor, known: Residual, most: int) -> "_Solved":
        """The linear system of the clear pixels that come first, solved once for all that is asked."""
        at, there = _nearest(known.usable.flatten(1), known.nearness.flatten(1), most)
        keys = _take(points, at)
        kernel = self._kernel(keys, keys) * (there[:, :, None] * there[:, None])
        noise = torch.exp(self.log_noise + torch.gather(known.doubt.flatten(1), 1, at))
        # a place without a pixel stays regular and says nothing
        factor = torch.linalg.cholesky(kernel + torch.diag_embed(noise + (1.0 - there)))
        values = _take(known.values.flatten(2).transpose(1, 2), at) * there[..., None]  # (B, M, C)
        return _Solved(self, keys, there, torch.cholesky_solve(values, factor))

    def _points(self, series: Tensor, weights: Tensor) -> Tensor:
        """(B, N, 2 + F): where a pixel lies (from the middle, pixels), and how it went through the season."""
        h, w = series.shape[-2:]
        place = _places(h, w, series.device)
        place = (place - place.mean(dim=0))[None].expand(len(series), -1, -1)
        return torch.cat([place, self._features(series, weights)], dim=2)

    def _features(self, series: Tensor, weights: Tensor) -> Tensor:
        """(B, N, F): scaled so that the squared distance is a weighted mean over dates and bands."""
        b, d, c, h, w = series.shape
        share = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-6)
        # the root's slope at 0 is infinite: dates that are not compared must not reach it
        scaled = (
            series * (share.clamp_min(1e-6) / c).sqrt()[:, :, None, None, None] * (share > 0)[:, :, None, None, None]
        )
        return scaled.reshape(b, d * c, h * w).transpose(1, 2)

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, N, M) between points (B, N, 2 + F) and (B, M, 2 + F)."""
        near, alike = _squared(a[..., :2], b[..., :2]), _squared(a[..., 2:], b[..., 2:])
        mixture, space, series = self.mixture.softmax(dim=0), (-2 * self.log_space).exp(), (-2 * self.log_series).exp()
        first, second = (_laplace(near * space[k] + alike * series[k], mixture[k]) for k in range(2))
        return first + second if first.requires_grad else first.add_(second)

    def date_weights(self, days: Tensor, share: Tensor) -> Tensor:
        """(B, D) weights of dates from days to the target (B, D) and their clear share (B, D)."""
        weight: Tensor = torch.exp(-self.fade * days.abs() / 30.0) * (share > LEAST_SHARE)
        return weight


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, M) squared distances between rows of (B, N, F) and (B, M, F)."""
    inner = torch.baddbmm((a**2).sum(-1)[:, :, None] + (b**2).sum(-1)[:, None], a, b.transpose(1, 2), alpha=-2.0)
    return inner.clamp_min(0.0) if inner.requires_grad else inner.clamp_min_(0.0)


def _laplace(squared: Tensor, height: Tensor) -> Tensor:
    """``height * exp(-distance)``; without a gradient in place, as this is where nearly all time goes."""
    if squared.requires_grad:
        return height * torch.exp(-torch.sqrt(squared + 1e-6))
    return squared.add_(1e-6).sqrt_().neg_().exp_().mul_(height)


def _nearest(usable: Tensor, nearness: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Indices (B, M) of the usable pixels that come first, and (B, M) 1 = holds one; ties go to the lower index."""
    order = torch.where(usable > 0, nearness, torch.full_like(nearness, torch.inf))
    at = torch.argsort(order, dim=1, stable=True)[:, :most]
    return at, torch.gather(usable, 1, at)


def _take(values: Tensor, at: Tensor) -> Tensor:
    """Rows (B, M, F) of (B, N, F)."""
    return torch.gather(values, 1, at[..., None].expand(-1, -1, values.shape[-1]))


def _put(rows: Tensor, at: Tensor, h: int, w: int) -> Tensor:
    """(B, C, H, W) with rows (B, M, C) at their pixels (B, M), 0 elsewhere."""
    b, _, c = rows.shape
    out = rows.new_zeros((b, h * w, c)).scatter(1, at[..., None].expand(-1, -1, c), rows)
    return out.transpose(1, 2).reshape(b, c, h, w)


def _places(h: int, w: int, device: torch.device) -> Tensor:
    """(N, 2) pixel positions."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.stack([y, x], dim=-1).reshape(-1, 2).float()


def closed_series(looks: Tensor, clear: Tensor, days: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The dates nearest to the target with their gaps closed linearly in time, standardised over the patch.

    Args:
        looks: (B, T, C, H, W) reflectance.
        clear: (B, T, 1, H, W) 1 = usable; 0 for the target itself and for padding.
        days: (B, T) signed days from the target.
        most: dates kept.

    Returns:
        series (B, D, C, H, W), days (B, D), clear share (B, D); a date clear on nothing has share 0.
    """
    order = torch.argsort(days, dim=1, stable=True)
    looks, clear = _pick(looks, order), _pick(clear, order) > 0
    days = torch.gather(days, 1, order)
    t = looks.shape[1]
    looked = (clear.any(dim=1, keepdim=True)).float()
    seen = clear.float().sum(dim=(2, 3, 4)) / looked.sum(dim=(2, 3, 4)).clamp_min(1.0)  # (B, T)
    worth = torch.where(seen > LEAST_SHARE, days.abs(), days.abs() + 1e6)
    best = torch.argsort(worth, dim=1, stable=True)[:, :most].sort(dim=1).values
    steps = torch.arange(t, device=looks.device)[None, :, None, None, None]
    before = _pick(torch.where(clear, steps, -1).cummax(dim=1).values, best)
    after = _pick(torch.where(clear, steps, t).flip(1).cummin(dim=1).values.flip(1), best)
    early, late = before.clamp_min(0), after.clamp_max(t - 1)
    early, late = torch.where(before < 0, late, early), torch.where(after >= t, early, late)
    clock = days[:, :, None, None, None].expand(-1, -1, 1, *looks.shape[3:])
    first, second = clock.gather(1, early), clock.gather(1, late)
    days, seen = torch.gather(days, 1, best), torch.gather(seen, 1, best)
    share = ((days[:, :, None, None, None] - first) / (second - first).clamp_min(0.5)).clamp(0.0, 1.0)
    wide = (-1, -1, looks.shape[2], -1, -1)
    values = looks.gather(1, early.expand(wide))
    values = values + (looks.gather(1, late.expand(wide)) - values) * share
    count = looked.sum(dim=(3, 4), keepdim=True).clamp_min(1.0)
    mean = (values * looked).sum(dim=(3, 4), keepdim=True) / count
    centred = (values - mean) * looked
    contrast = (centred**2).sum(dim=(3, 4), keepdim=True).div(count).sqrt()
    return centred / (contrast + TEXTURE_FLOOR), days, seen


def _pick(values: Tensor, at: Tensor) -> Tensor:
    """Steps (B, D, ...) of (B, T, ...)."""
    index = at.reshape(*at.shape, *([1] * (values.dim() - 2))).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)
