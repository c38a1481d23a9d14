"""The residual U-Net on the gate: in comes a ``Batch``, out comes a ``Completed``.

Oehmcke et al. 2020, section 3.2.3, equation 4: image = gamma * UNet([X, Hagg]) + X with gamma = 0 at the start, so that
an untrained network answers the gate's X. MnasNet-B1 encoder, a crossover at the deepest scale, pixel-shuffle decoder
with skips, SAGAN self-attention (Zhang et al. 2019) after its second block, Mish everywhere. Options that leave the
paper are off by default.

Legend: B targets, C bands, F features, H and W pixels, L = H * W.
"""

from typing import Any, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.batch import Batch, Completed, Model
from pipeline.models.timegate import GateConfig, TimeGate, convolve

DEEPEST: Final = 32
"""The encoder halves five times; sides are padded to multiples of this."""
_USUAL_SIGMA: Final = 0.02
_LARGEST_LOG: Final = 6.0


class NetworkConfig(GateConfig):
    """The paper's network; every option beyond the name is an ablation or an extension of it."""

    name: Literal["paper"] = "paper"
    unet: bool = True
    """Off: the image is the gate's X."""
    with_features: bool = True
    """Show Hagg to the U-Net, not X alone."""
    encoder: Literal["mnasnet_100", "mnasnet_075", "mnasnet_050", "mnasnet_small"] = "mnasnet_100"
    crossover: int = Field(default=640, ge=1)
    widths: tuple[int, int, int, int, int] = (384, 160, 96, 64, 64)
    """Channels of the five up blocks, deepest first."""
    shuffle_kernel: Literal[1, 3] = 3
    attention: Literal["self", "windowed", "none"] = "self"
    window: int = Field(default=8, ge=2)
    """Side of an attention window, in pixels of 1/8 scale; ``windowed`` only."""
    unit: Literal["reflectance", "scale"] = "reflectance"
    """What the U-Net's answer is measured in; ``scale``: in sigmas of the prior."""
    patch_px: int = Field(default=320, gt=0)
    stride_px: int = Field(default=256, gt=0)
    border_px: int = Field(default=15, ge=0)
    """Patches and border of the paper, which cuts and does not blend: its stride is 290."""
    sigma: bool = False
    """Answer a standard deviation per pixel and band, too."""

    @model_validator(mode="after")
    def _fits(self) -> "NetworkConfig":
        if self.sigma and not self.unet:
            raise ValueError("sigma comes from the U-Net: set unet to true or sigma to false")
        return self


class SmallConfig(NetworkConfig):
    """A small form of the same network, shared over bands."""

    name: Literal["small"] = "small"  # type: ignore[assignment]
    bands: tuple[str, ...] = ()
    gate_widths: tuple[int, int] = (16, 32)
    aggregate_features: int = Field(default=8, ge=1)
    encoder: Literal["mnasnet_100", "mnasnet_075", "mnasnet_050", "mnasnet_small"] = "mnasnet_small"
    crossover: int = Field(default=192, ge=1)
    widths: tuple[int, int, int, int, int] = (64, 48, 32, 24, 24)
    patch_px: int = Field(default=128, gt=0)
    stride_px: int = Field(default=96, gt=0)
    border_px: int = Field(default=8, ge=0)


class TimeGateUNet(Model):
    """TimeGate and the fusion U-Net; any height and width, any number of steps, any bands where none are named."""

    config: NetworkConfig

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = TimeGate(config)
        self.gamma = nn.Parameter(torch.zeros(())) if config.unet else None
        self.unet: UNet | None = None
        if config.unet:
            inputs = self.gate.channels + self.gate.extra_channels
            inputs += config.aggregate_features if config.with_features else 0
            self.unet = UNet(config, inputs, self.gate.channels * (2 if config.sigma else 1))

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:
        """Complete the targets; see ``Completed``. Without U-Net ``image`` is ``aggregate``."""
        bands = batch.looks.shape[2]
        gated = self.gate(batch, with_weights=with_weights)
        x = gated.aggregate
        image, sigma = x, None
        if self.unet is not None and self.gamma is not None:
            target = batch.without_series() if self.config.bands else batch.without_series().by_band()
            seen = [x, gated.features] if self.config.with_features else [x]
            answer = self.unet(torch.cat([*seen, *self.gate.extras(target)], dim=1)).float()
            residual, *log_sigma = answer.split(self.gate.channels, dim=1)
            image = x + self.gamma * residual * (target.scale if self.config.unit == "scale" else 1.0)
            if log_sigma:
                usual = _USUAL_SIGMA if self.config.prior == "none" else target.scale
                sigma = usual * torch.exp(log_sigma[0].clamp(-_LARGEST_LOG, _LARGEST_LOG))
        completed = Completed(image, x, gated.weights, sigma, gated.heaviest)
        return completed if self.config.bands else completed.bands_together(bands)


class UNet(nn.Module):
    """(B, inputs, H, W) to (B, outputs, H, W); trained from scratch, nothing is downloaded."""

    def __init__(self, config: NetworkConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        import timm  # seconds, and only this network needs it

        encoder: Any = timm.create_model(
            config.encoder, pretrained=False, features_only=True, in_chans=inputs, act_layer=nn.Mish
        )
        self.encoder = encoder
        *skips, deepest = encoder.feature_info.channels()
        self.crossover = nn.Sequential(convolve(deepest, config.crossover, 3), convolve(config.crossover, deepest, 3))
        ups, width = [], deepest
        for skip, wider in zip([*reversed(skips), inputs], config.widths, strict=True):
            ups.append(UpBlock(width, skip, wider, config.shuffle_kernel))
            width = wider
        self.ups = nn.ModuleList(ups)
        window = config.window if config.attention == "windowed" else None
        self.attention = Attention(config.widths[1], window) if config.attention != "none" else None
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """The residual; sides that are no multiples of 32 are padded by reflection inside."""
        height, width = x_BFHW.shape[-2:]
        x_BFHW = pad_by_reflection(x_BFHW, DEEPEST)
        *skips, deepest = self.encoder(x_BFHW)
        up = self.crossover(deepest)
        for number, (block, skip) in enumerate(zip(self.ups, [*reversed(skips), x_BFHW], strict=True)):
            up = block(up, skip)
            if number == 1 and self.attention is not None:
                up = self.attention(up)
        answer: Tensor = self.head(up)[..., :height, :width]
        return answer


class UpBlock(nn.Module):
    """Twice the side by pixel shuffle to half the channels, then the skip, then two 3x3 convolutions."""

    def __init__(self, inputs: int, skip: int, outputs: int, kernel: int) -> None:
        super().__init__()
        half = inputs // 2
        widen = nn.Conv2d(inputs, 4 * half, kernel, padding=kernel // 2)
        with torch.no_grad():  # the four filters of a pixel start alike: no checkerboard (Aitken et al. 2017)
            widen.weight.copy_(widen.weight[:half].repeat_interleave(4, dim=0))
        self.widen = nn.Sequential(widen, nn.Mish())
        self.merge = nn.Sequential(convolve(half + skip, outputs, 3), convolve(outputs, outputs, 3))

    def forward(self, x_BFHW: Tensor, skip_BFHW: Tensor) -> Tensor:
        """(B, F, H, W) and a skip of twice the side to (B, outputs, 2H, 2W)."""
        merged: Tensor = self.merge(torch.cat([functional.pixel_shuffle(self.widen(x_BFHW), 2), skip_BFHW], dim=1))
        return merged


class Attention(nn.Module):
    """SAGAN self-attention over the whole image, or over windows of it; its own gamma starts at 0."""

    def __init__(self, width: int, window: int | None) -> None:
        super().__init__()
        self.window = window
        inner = max(width // 8, 1)
        self.query, self.key = nn.Conv2d(width, inner, 1), nn.Conv2d(width, inner, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """The image plus gamma times what every pixel gathers from all pixels (of its window)."""
        if self.window is None:
            return x_BFHW + self.gamma * self._gather(x_BFHW)
        b, f, h, w = x_BFHW.shape
        size = self.window
        padded = pad_by_reflection(x_BFHW, size)
        rows, columns = padded.shape[-2] // size, padded.shape[-1] // size
        cut = padded.reshape(b, f, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        found = self._gather(cut.reshape(-1, f, size, size)).reshape(b, rows, columns, f, size, size)
        whole = found.permute(0, 3, 1, 4, 2, 5).reshape(padded.shape)
        return x_BFHW + self.gamma * whole[..., :h, :w]

    def _gather(self, x_BFHW: Tensor) -> Tensor:
        q_BLF, k_BLF, v_BLF = (layer(x_BFHW).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        # SAGAN does not divide by the square root of the width
        found_BLF = functional.scaled_dot_product_attention(q_BLF, k_BLF, v_BLF, scale=1.0)
        return found_BLF.transpose(1, 2).reshape(x_BFHW.shape)


def pad_by_reflection(x: Tensor, multiple: int) -> Tensor:
    """(..., H, W) grown at the bottom and right to multiples of ``multiple``; any side, also one pixel."""
    for axis in (-2, -1):
        side = x.shape[axis]
        wanted = -(-side // multiple) * multiple
        if wanted != side:
            turn = max(2 * (side - 1), 1)
            index = torch.arange(wanted, device=x.device) % turn
            x = x.index_select(axis, torch.minimum(index, turn - index))
    return x
