"""What training minimises. In: a ``Completed``, the truth and what counts. Out: one number, and its parts for the log.

Every term is a mean over pixels that count; what does not count can hold anything. Reflectance throughout.
Legend: B targets, C bands, H and W pixels.
"""

from pathlib import Path
from typing import Final

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.models.batch import Completed

DOWNLOAD: Final = "timm"
_VGG: Final = "vgg16.tv_in1k"
_VGG_LAYERS: Final = (15, 22, 29)  # relu3_3, relu4_3, relu5_3
_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SSIM_REACH: Final = 5


class LossConfig(BaseModel):
    """Weight of every term in the sum; 0 leaves it out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    charbonnier: float = Field(default=1.0, ge=0)
    """sqrt(error^2 + epsilon^2) - epsilon: L1 that is smooth at 0."""
    charbonnier_epsilon: float = Field(default=1e-3, gt=0)
    l1: float = Field(default=0.0, ge=0)
    mse: float = Field(default=0.0, ge=0)
    gradient: float = Field(default=0.0, ge=0)
    """L1 of the differences between neighbours in both directions."""
    ssim: float = Field(default=0.0, ge=0)
    """1 - SSIM (Gaussian window of 11 px, sigma 1.5) of the prediction pasted into the truth."""
    nll: float = Field(default=0.0, ge=0)
    """Gaussian negative log likelihood; needs a network that answers sigma."""
    log_ratio: float = Field(default=0.0, ge=0)
    """Mean over targets of log(squared error / squared error of the prior): every scene counts alike."""
    feat: float = Field(default=0.0, ge=0)
    """Smooth L1 between VGG16 features of blocks 3 to 5 (Johnson et al. 2016), each group of bands apart."""
    feat_groups: tuple[tuple[str, str, str], ...] = (("red", "green", "blue"), ("nir", "swir16", "swir22"))
    feat_weights: str = DOWNLOAD
    """VGG16 trained on ImageNet: ``timm`` downloads it, a path reads a safetensors file with timm's names."""


class Loss(nn.Module):
    """The weighted sum of the terms that are asked for.

    Args:
        config: the terms.
        bands: names of the truth's bands, in order; FEAT picks its groups by name.

    Raises:
        ConfigError: all weights 0; FEAT without its bands or without its weights.
    """

    def __init__(self, config: LossConfig, bands: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        terms = ("charbonnier", "l1", "mse", "gradient", "ssim", "nll", "log_ratio", "feat")
        self.weights = {name: getattr(config, name) for name in terms if getattr(config, name) > 0}
        if not self.weights:
            raise ConfigError(f"loss: every weight is 0; give one of {', '.join(terms)}")
        self.features = FeatureLoss(config, bands) if "feat" in self.weights else None

    def forward(
        self, completed: Completed, truth: Tensor, counts: Tensor, *, prior: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its terms, unweighted.

        Args:
            completed: a network's answer.
            truth: (B, C, H, W) float32 reflectance, any finite value where unknown.
            counts: (B, 1, H, W) float32, how much a pixel counts, 0 = not at all. The paper's way is every present
                pixel of the target, its clouds included, which the condition explains.
            prior: (B, C, H, W) float32 reflectance, for ``log_ratio`` only.

        Returns:
            A scalar, 0 where nothing counts, and detached scalars by name.
        """
        image = completed.image.float()
        found: dict[str, Tensor] = {}
        for name in self.weights:
            if name == "charbonnier":
                found[name] = charbonnier(image, truth, counts, self.config.charbonnier_epsilon)
            elif name == "nll":
                if completed.sigma is None:
                    raise ConfigError("loss.nll: this network answers no sigma; set model.sigma to true, or nll to 0")
                found[name] = gaussian_nll(image, completed.sigma.float(), truth, counts)
            elif name == "log_ratio":
                if prior is None:
                    raise ConfigError("loss.log_ratio: there is no prior to compare with; set log_ratio to 0")
                found[name] = log_ratio(image, truth, counts, prior)
            elif name == "feat" and self.features is not None:
                found[name] = self.features(image, truth, counts)
            else:
                found[name] = _PLAIN[name](image, truth, counts)
        total = torch.stack([self.weights[name] * value for name, value in found.items()]).sum()
        return total, {name: value.detach() for name, value in found.items()}


def masked_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of (B, C, H, W) weighted by (B, 1, H, W); 0, with a gradient of 0, where nothing counts."""
    # where, not a product: an infinite value that does not count stays out
    kept = torch.where(counts > 0, values, torch.zeros((), dtype=values.dtype, device=values.device)) * counts
    return kept.sum() / (counts.sum() * values.shape[1]).clamp_min(1e-6)


def charbonnier(image: Tensor, truth: Tensor, counts: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Smooth L1 without a threshold; 0 for a perfect image."""
    return masked_mean(torch.sqrt((image - truth).square() + epsilon**2) - epsilon, counts)


def l1(image: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    """Mean absolute error."""
    return masked_mean((image - truth).abs(), counts)


def mse(image: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    """Mean squared error."""
    return masked_mean((image - truth).square(), counts)


def gradient(image: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    """L1 of the error's differences between neighbours that both count, mean of the two directions."""
    error = image - truth
    down = masked_mean(error.diff(dim=-2).abs(), torch.minimum(counts[..., 1:, :], counts[..., :-1, :]))
    right = masked_mean(error.diff(dim=-1).abs(), torch.minimum(counts[..., 1:], counts[..., :-1]))
    return (down + right) / 2


def ssim(image: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    """1 - SSIM of the image pasted into the truth, at pixels that count; windows at the edge repeat it."""
    image = torch.where(counts > 0, image, truth)
    mean_i, mean_t = _smooth(image), _smooth(truth)
    # rounding leaves variances a little below 0, where the ratio could blow up
    var_i = (_smooth(image.square()) - mean_i.square()).clamp_min(0)
    var_t = (_smooth(truth.square()) - mean_t.square()).clamp_min(0)
    covariance = _smooth(image * truth) - mean_i * mean_t
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_i * mean_t + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_i.square() + mean_t.square() + c1) * (var_i + var_t + c2))
    return masked_mean(1 - likeness, counts)


def gaussian_nll(image: Tensor, sigma: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    """Negative log likelihood of the truth, up to a constant; its best sigma is the true error's."""
    return masked_mean(0.5 * ((image - truth) / sigma).square() + torch.log(sigma), counts)


def log_ratio(image: Tensor, truth: Tensor, counts: Tensor, prior: Tensor) -> Tensor:
    """Mean over targets that count of log(MSE / MSE of the prior); below 0 the prior is beaten (10/ln 10 dB each)."""
    terms = []
    for one, true, count, start in zip(image, truth, counts, prior, strict=True):
        if bool((count > 0).any()):
            own = mse(one[None], true[None], count[None])
            theirs = mse(start[None], true[None], count[None])
            terms.append(torch.log((own + 1e-8) / (theirs + 1e-8)))
    return torch.stack(terms).mean() if terms else (image * 0.0).sum()


_PLAIN: Final = {"l1": l1, "mse": mse, "gradient": gradient, "ssim": ssim}


def _smooth(x: Tensor) -> Tensor:
    """The SSIM window's weighted mean around every pixel, (B, C, H, W)."""
    steps = torch.arange(-_SSIM_REACH, _SSIM_REACH + 1, device=x.device, dtype=x.dtype)
    line = torch.exp(-0.5 * (steps / 1.5).square())
    line = line / line.sum()
    flat = functional.pad(x.flatten(0, 1).unsqueeze(1), [_SSIM_REACH] * 4, mode="replicate")
    smooth = functional.conv2d(functional.conv2d(flat, line[None, None, :, None]), line[None, None, None, :])
    return smooth.reshape(x.shape)


class FeatureLoss(nn.Module):
    """FEAT: smooth L1 between VGG16 feature maps relu3_3, relu4_3 and relu5_3, equal weights, groups of three bands.

    Reflectance is clipped to 0..1 and normalised as ImageNet; the image is copied into pixels of the truth that do not
    count. The VGG16 is frozen. Nothing takes its place where its weights cannot be had.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, config: LossConfig, bands: tuple[str, ...]) -> None:
        super().__init__()
        if lacking := sorted({name for group in config.feat_groups for name in group} - set(bands)):
            raise ConfigError(
                f"loss.feat: its groups need {', '.join(lacking)}, which the training lacks ({', '.join(bands)}); "
                "name other bands in loss.feat_groups, or set feat to 0"
            )
        self.groups = [[bands.index(name) for name in group] for group in config.feat_groups]
        self.layers = _vgg16(config.feat_weights).eval().requires_grad_(False)
        mean, spread = (torch.tensor(values)[:, None, None] for values in _IMAGENET)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("spread", spread, persistent=False)

    def forward(self, image: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
        """Mean over groups and layers."""
        truth = torch.where(counts > 0, truth, image.detach())
        parts = [
            functional.smooth_l1_loss(mine, wanted)
            for group in self.groups
            for mine, wanted in zip(self.maps(image[:, group]), self.maps(truth[:, group]), strict=True)
        ]
        return torch.stack(parts).mean()

    def maps(self, triple: Tensor) -> list[Tensor]:
        """The three feature maps of (B, 3, H, W) reflectance; H and W at least 16."""
        x, found = (triple.clamp(0, 1) - self.mean) / self.spread, []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in _VGG_LAYERS:
                found.append(x)
        return found


def _vgg16(source: str) -> nn.Sequential:
    """The convolutions of VGG16 up to relu5_3, with ImageNet weights."""
    import timm  # seconds, and only this term needs it

    way_out = (
        "give loss.feat_weights the path of the file model.safetensors of timm's vgg16.tv_in1k, or set loss.feat to 0; "
        "nothing else is put in its place"
    )
    if source == DOWNLOAD:
        try:
            vgg = timm.create_model(_VGG, pretrained=True)
        except Exception as error:  # whatever a hub client raises without a network
            raise ConfigError(f"loss.feat: {_VGG} could not be downloaded ({error}); {way_out}") from error
        return vgg.get_submodule("features")[: _VGG_LAYERS[-1] + 1]  # type: ignore[index]
    try:
        tensors = load_file(Path(source))
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"loss.feat_weights: {source!r} is no safetensors file that can be read ({error}); {way_out}"
        ) from error
    with torch.device("meta"):
        layers = timm.create_model(_VGG, pretrained=False).get_submodule("features")[: _VGG_LAYERS[-1] + 1]  # type: ignore[index]
    own = {name.removeprefix("features."): tensors[name] for name in tensors if name.startswith("features.")}
    try:
        layers.load_state_dict({name: own[name] for name in layers.state_dict()}, assign=True)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"loss.feat_weights: {source!r} holds no VGG16 ({error}); {way_out}") from error
    return layers
