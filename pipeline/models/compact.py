"""The network that ships. In: a ``Batch`` with classical estimates. Out: the targets completed, with one sigma.

Small, shared over bands (any subset, any order) and normalised by the error that the prior claims, so that it carries
over to places, bands and sensors it never saw. Three steps, each of which may be left out:

    kriging   what the regression leaves over on clear pixels, carried into the gap (``pipeline.models.kriging``); clear
              pixels that look like cloud or shadow which the mask missed are doubted and say less
    gate      X: shares of the estimates and of the nearest clear looks, per pixel and band (TimeGate's idea, applied to
              estimates with known uncertainty instead of raw looks); starts at the kriging, without it at the prior
    fusion    X + gamma * U-Net(...), gamma = 0 at the start

Sources: Oehmcke et al. 2020, doi:10.1145/3423336.3429345 (equations 1 to 4); the gate over estimates and the scaling by
local error are ours.
"""

from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.estimates import CONTEXT, ESTIMATES
from pipeline.models.activation import Mish, mish
from pipeline.models.batch import Batch, Completed, Model, ModelConfig
from pipeline.models.doubt import Doubt, middle_look
from pipeline.models.kriging import Kriging, Residual, closed_series

type Answer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

LIMIT = 8.0
"""Deviations beyond this many sigmas are cut before the network sees them."""
_FIT = ESTIMATES.index("fit")
_DISTANCE, _FITTED = CONTEXT.index("distance"), CONTEXT.index("fitted")


class CompactConfig(ModelConfig):
    """The compact network."""

    name: Literal["compact"] = "compact"
    patch_px: int = Field(256, ge=32, description="side of a patch at inference, pixels")
    stride_px: int = Field(176, ge=16, description="from patch to patch, pixels")
    border_px: int = Field(8, ge=0, description="outermost pixels of a patch that are not used")
    kriging: bool = Field(True, description="carry what the fit leaves over into the gap")
    keys: int = Field(1024, ge=16, description="most clear pixels that speak in a patch")
    keys_training: int = Field(384, ge=16, description="the same while it learns, where patches are smaller")
    learned_at: int | None = Field(
        512, ge=1, description="pixels of a target from which the kernel's gradient comes back; null: all"
    )
    dates: int = Field(14, ge=1, description="most dates compared by the kernel")
    doubt: bool = Field(False, description="clear pixels that look like missed cloud or shadow say less")
    middle: bool = Field(False, description="the middle of the looks, levelled to the target, among the estimates")
    gate: bool = Field(True, description="choose among the estimates; else X is the kriging or the prior")
    local: bool = Field(False, description="the gate opens pixel by pixel, not everywhere alike")
    yields: bool = Field(False, description="the gate opens only as far as the kriging leaves a pixel unexplained")
    fusion: bool = Field(True, description="the residual U-Net")
    width: int = Field(16, ge=4, description="channels of the U-Net at full resolution")
    abstract: int = Field(8, ge=0, description="channels of the abstract features (maximum over members); 0 = none")
    sigma: bool = Field(True, description="put out one sigma")


class Compact(Model):
    """See the module; ``forward`` answers for every pixel, whether the target is clear there or not."""

    config: CompactConfig

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        self.members = ("prior", *ESTIMATES, *(["middle"] if config.middle else []), "kriging")
        self.kriging = Kriging(dates=config.dates) if config.kriging else None
        self.doubt = Doubt() if config.doubt else None
        channels = 2 * (len(self.members) - 1) + len(CONTEXT) + 5 + config.middle
        members = len(self.members)
        self.gate = Gate(channels, members, abstract=config.abstract, local=config.local) if config.gate else None
        inner = channels + 1 + (config.abstract if config.gate else 0)
        self.fusion = UNet(inner, 2, width=config.width) if config.fusion or config.sigma else None
        self.gamma = nn.Parameter(torch.zeros(()))
        self.to(memory_format=torch.channels_last)  # a third quicker on a CPU

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:
        """Complete the targets; ``weights`` are the shares of the looks just before and after the target."""
        shape = batch.prior.shape
        estimates, left, about = self._estimates(batch)
        members = torch.cat([batch.prior[:, None], estimates], dim=1)  # (B, M, C, H, W)
        z = ((members - batch.prior[:, None]) / batch.scale[:, None]).clamp(-LIMIT, LIMIT)
        facts = _facts(batch, z, left, about)
        z = z.movedim(2, 1).flatten(0, 1)  # (B*C, M, H, W)
        opening = left.repeat_interleave(batch.prior.shape[1], dim=0) if self.config.yields else None
        if torch.is_grad_enabled() or z.device.type != "cpu":
            x, image, sigma, shares = self._chosen(z, facts, opening)
        else:  # a band at a time: they share nothing from here on, and memory is that of one
            bands = [slice(n, n + 1) for n in range(len(z))]
            parts = [self._chosen(z[n], facts[n], None if opening is None else opening[n]) for n in bands]
            joined = (None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))
            x, image, sigma, shares = cast(Answer, tuple(joined))
        return Completed(
            image=batch.prior + batch.scale * image.view(shape),
            aggregate=batch.prior + batch.scale * x.view(shape),
            weights=self._look_shares(batch, shares) if with_weights and shares is not None else None,
            sigma=None if sigma is None else batch.scale * sigma.view(shape),
            heaviest=None if shares is None or torch.is_grad_enabled() else self._heaviest(batch, shares),
        )

    def patch_bytes(self, looks: int, bands: int) -> float:
        """See ``Model``: bands go through gate and U-Net one by one, and the kriging answers some pixels at a time."""
        return (
            4.0 * self.config.patch_px**2 * (looks * ((5 if self.config.middle else 2) * bands + 10) + 30 * bands + 900)
        )

    def _chosen(self, z: Tensor, facts: Tensor, opening: Tensor | None) -> Answer:
        """X, the image and its sigma (N, 1, H, W) in units of the prior's, and the shares in X (N, M, H, W)."""
        x, abstract, shares = z[:, -1:], None, None  # the kriging; without it, the prior
        if self.gate is not None:
            x, abstract, shares = self.gate(z, facts, opening)
        if self.fusion is None:
            return x, x, None, shares
        out = self.fusion(torch.cat([facts, x, *([] if abstract is None else [abstract])], dim=1))
        image = x + self.gamma * out[:, :1] if self.config.fusion else x
        return x, image, torch.exp(out[:, 1:].clamp(-4.0, 4.0)) if self.config.sigma else None, shares

    def _estimates(self, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(B, K+1, C, H, W) with the kriging as the last, what it leaves unexplained (B, 1, H, W), further facts."""
        fit, fitted = batch.estimates[:, _FIT], batch.context[:, _FITTED, :1]
        usable = batch.known * fitted
        others = ((batch.days != 0) & batch.steps)[:, :, None, None, None]
        clear = batch.present * batch.clear.amin(dim=2, keepdim=True) * others
        more, about = [], []
        if self.config.middle:
            middle, spread = middle_look(batch, clear)
            more, about = [middle], [torch.log(spread / batch.scale + 0.1)]
        kriged, left = batch.prior, 1.0 - usable
        if self.kriging is not None and bool(usable.any()):
            series, days, share = closed_series(batch.looks, clear, batch.days, self.config.dates)
            nearness = -batch.context[:, _DISTANCE, :1]
            residual = (batch.prior - fit) * usable
            doubt = torch.zeros_like(nearness)
            if self.doubt is not None:
                doubt = self.doubt(residual, usable, nearness, *((batch.prior - m) * usable for m in more))
            gap = fitted * (1.0 - batch.known)
            correction, left = self.kriging(
                (series, self.kriging.date_weights(days, share)),
                Residual(residual, usable, nearness, doubt),
                gap,
                keys=self.config.keys_training if self.training else self.config.keys,
                learned_at=self.config.learned_at if self.training else None,
            )
            # each target by itself: whoever shares the batch must not change what it gets
            has = usable.flatten(1).any(dim=1)[:, None, None, None]
            kriged = torch.where(has & (gap > 0), fit + correction, batch.prior)
            left = torch.where(has, left * (1.0 - batch.known), 1.0)
        return torch.cat([batch.estimates, *(m[:, None] for m in (*more, kriged))], dim=1), left, about

    def _look_shares(self, batch: Batch, shares: Tensor) -> Tensor:
        """(B, T, C, H, W): the shares of the looks just before and after the target, at their steps."""
        out = torch.zeros_like(batch.looks)
        for share, at in self._neighbours(batch, shares):
            out.scatter_add_(1, at[:, None, None].expand(-1, 1, *share.shape[1:]), share[:, None].to(out.dtype))
        return out

    def _heaviest(self, batch: Batch, shares: Tensor) -> Tensor:
        """(B, H, W) of the two the one with the larger share over all bands, see ``Completed``."""
        (before, first), (after, second) = ((one.sum(dim=1), at) for one, at in self._neighbours(batch, shares))
        larger = torch.where(after > before, second, first)
        return torch.where(torch.maximum(before, after) > 0, larger, -1)

    def _neighbours(self, batch: Batch, shares: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For the looks just before and after the target: their shares (B, C, H, W) and their steps (B, H, W)."""
        b, t, c, h, w = batch.looks.shape
        by_member = shares.view(b, c, len(self.members), h, w)
        usable = ((batch.present * batch.clear.amin(dim=2, keepdim=True))[:, :, 0] > 0) & batch.steps[:, :, None, None]
        clock = batch.days[:, :, None, None].expand(b, t, h, w)
        found = []
        for name, side in (("previous", clock <= 0), ("next", clock > 0)):
            nearest, at = torch.where(usable & side & (clock != 0), clock.abs(), torch.inf).min(dim=1)
            found.append((by_member[:, :, self.members.index(name)] * torch.isfinite(nearest)[:, None], at))
        return found


def _facts(batch: Batch, z: Tensor, left: Tensor, about: list[Tensor]) -> Tensor:
    """(B*C, channels, H, W): what the gate and the U-Net know about every pixel of a band."""
    bands = batch.prior.shape[1]
    others = z[:, 1:]
    across = others.mean(dim=2, keepdim=True).expand_as(others)
    residual = ((batch.prior - batch.estimates[:, _FIT]) / batch.scale).clamp(-LIMIT, LIMIT) * batch.known
    context = batch.context.clone()
    context[:, -1] = torch.log(context[:, -1] / batch.scale + 0.1)  # spread of the looks in units of the claimed error
    every = torch.cat(
        [
            others,
            across,
            context,
            residual[:, None],
            batch.known[:, None].expand(-1, -1, bands, -1, -1),
            left[:, None].expand(-1, -1, bands, -1, -1),
            batch.prior[:, None] * 4.0,
            torch.log(batch.scale[:, None]) + 4.5,
            *(one[:, None] for one in about),
        ],
        dim=1,
    )
    return every.movedim(2, 1).flatten(0, 1)


class Gate(nn.Module):
    """Shares of the estimates: a weight for each from its deviation and the facts, normalised to one.

    ``X = start + alpha * (sum of shares times members - start)``, where the start is the last member, ``alpha = 0`` at
    first: an untrained gate answers with the start. With ``local`` alpha is a number times a share of each pixel: where
    nothing speaks against the start it can stay. An opening given from outside (N, 1, H, W), 0 to 1, holds it back
    further. The members share all weights but one vector each.
    """

    def __init__(self, facts: int, members: int, *, abstract: int, local: bool, hidden: int = 16) -> None:
        super().__init__()
        self.common = nn.Sequential(nn.Conv2d(facts, hidden, 3, padding=1), Mish(), nn.Conv2d(hidden, hidden, 1))
        self.own = nn.Conv2d(2, hidden, 1)
        self.kind = nn.Parameter(torch.randn(members, hidden) * 0.2)
        self.weigh = nn.Conv2d(hidden, 1, 1)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.abstract = nn.Conv2d(hidden, abstract, 1) if abstract else None
        self.opens = nn.Sequential(Mish(), nn.Conv2d(hidden, 1, 1), nn.Sigmoid()) if local else None

    def forward(self, z: Tensor, facts: Tensor, opening: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """X (N, 1, H, W) in sigmas from the prior, abstract features (N, A, H, W), shares in X (N, M, H, W)."""
        seen = self.common(facts)
        weights, features = [], None
        for one, kind in zip(z.unbind(dim=1), self.kind, strict=True):  # one at a time stays in the cache
            own = self.own(torch.stack([one, one.abs()], dim=1))
            hidden = mish(own.add_(seen).add_(kind[:, None, None]))
            weights.append(self.weigh(hidden))
            if self.abstract is not None:
                told = self.abstract(hidden)
                features = told if features is None else torch.maximum(features, told)
        shares = torch.cat(weights, dim=1).softmax(dim=1)
        start = z[:, -1:]
        alpha = self.alpha if self.opens is None else self.alpha * self.opens(seen)
        alpha = alpha if opening is None else alpha * opening
        return start + alpha * ((shares * z).sum(dim=1, keepdim=True) - start), features, alpha * shares


class UNet(nn.Module):
    """Two steps down and up again, padded by reflection, pixel-shuffle upwards; any height and width."""

    def __init__(self, inputs: int, outputs: int, *, width: int) -> None:
        super().__init__()
        wide, wider = width * 2, width * 3
        self.first = _pair(inputs, width)
        self.down = nn.Sequential(nn.Conv2d(width, wide, 2, stride=2), _pair(wide, wide))
        self.deep = nn.Sequential(nn.Conv2d(wide, wider, 2, stride=2), _pair(wider, wider, dilation=2))
        self.up = nn.Sequential(nn.Conv2d(wider, wide * 4, 1), nn.PixelShuffle(2))
        self.join = _pair(2 * wide, wide)
        self.top = nn.Sequential(nn.Conv2d(wide, width * 4, 1), nn.PixelShuffle(2))
        self.last = _pair(2 * width, width)
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W)."""
        h, w = x.shape[-2:]
        x = functional.pad(x, (0, -w % 4, 0, -h % 4), mode="replicate")
        first = self.first(x)
        down = self.down(first)
        middle = self.join(torch.cat([self.up(self.deep(down)), down], dim=1))
        out: Tensor = self.out(self.last(torch.cat([self.top(middle), first], dim=1)))
        return out[..., :h, :w]


def _pair(inputs: int, outputs: int, *, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, padding_mode="replicate"),
        Mish(),
        nn.Conv2d(outputs, outputs, 3, padding=1, padding_mode="replicate"),
        Mish(),
    )
