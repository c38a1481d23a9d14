"""Losses and the adversary: known answers, what must not count, and nothing taken silently for something else."""

import math
from dataclasses import replace

import pytest
import torch
from made_up_batch import made_up_batch
from safetensors.torch import save_file
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.models import losses
from pipeline.models.batch import Completed
from pipeline.models.discriminator import Discriminator, discriminator_loss, generator_loss
from pipeline.models.losses import Loss, LossConfig

torch.set_num_threads(1)
BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")
PLAIN = ("charbonnier", "l1", "mse", "gradient", "ssim")


@pytest.fixture
def case():
    """An image, its truth and a mask of what counts, the left half."""
    torch.manual_seed(0)
    truth = torch.rand(2, 6, 24, 32)
    counts = torch.zeros(2, 1, 24, 32)
    counts[..., :16] = 1
    return truth + 0.1 * torch.randn_like(truth), truth, counts


@pytest.mark.parametrize("name", PLAIN)
def test_a_perfect_image_costs_nothing_and_what_does_not_count_costs_nothing(case, name):
    image, truth, counts = case
    loss = getattr(losses, name)
    assert abs(float(loss(truth, truth, counts))) < 1e-6
    image.requires_grad_()
    one = loss(image, truth, counts)
    one.backward()
    assert one > 0.005
    assert image.grad[..., :16].abs().max() > 0
    assert image.grad[..., 16:].abs().max() == 0
    wild = image.detach().clone()
    wild[..., 16:] = 7.0
    torch.testing.assert_close(loss(wild, truth, counts), one.detach())
    assert float(loss(wild, truth, torch.zeros_like(counts))) == 0


def test_the_plain_terms_by_hand(case):
    image, truth, counts = case
    left = (image - truth)[..., :16]
    torch.testing.assert_close(losses.l1(image, truth, counts), left.abs().mean())
    torch.testing.assert_close(losses.mse(image, truth, counts), left.square().mean())
    torch.testing.assert_close(losses.charbonnier(image, truth, counts, 1e-6), left.abs().mean(), atol=1e-5, rtol=0)
    wanted = (left.diff(dim=-2).abs().mean() + left.diff(dim=-1).abs().mean()) / 2
    torch.testing.assert_close(losses.gradient(image, truth, counts), wanted)


def test_counts_may_be_more_or_less_than_one(case):
    image, truth, counts = case
    weighted = counts + 0.1
    error = (image - truth).abs()
    wanted = (error * weighted).sum() / (weighted.sum() * 6)
    torch.testing.assert_close(losses.l1(image, truth, weighted), wanted)


def test_ssim_is_the_one_of_the_metrics(case):
    from scipy.ndimage import correlate1d

    image, truth, _ = case
    steps = torch.arange(-5, 6)
    line = torch.exp(-0.5 * (steps / 1.5) ** 2).double()
    line = (line / line.sum()).numpy()

    def smooth(x):
        return correlate1d(correlate1d(x, line, axis=-1, mode="nearest"), line, axis=-2, mode="nearest")

    i, t = image.double().numpy(), truth.double().numpy()
    mi, mt = smooth(i), smooth(t)
    vi, vt, c = smooth(i * i) - mi**2, smooth(t * t) - mt**2, smooth(i * t) - mi * mt
    wanted = ((2 * mi * mt + 1e-4) * (2 * c + 9e-4) / ((mi**2 + mt**2 + 1e-4) * (vi + vt + 9e-4))).mean()
    got = 1 - losses.ssim(image, truth, torch.ones_like(truth[:, :1]))
    assert abs(float(got) - wanted) < 1e-5


def test_ssim_of_flat_images_stays_finite():
    flat = torch.full((1, 3, 8, 8), 0.3, requires_grad=True)
    loss = losses.ssim(flat, torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(flat.grad).all()


def test_the_best_sigma_is_the_error(case):
    image, truth, counts = case
    error = (image - truth)[..., :16].square().mean().sqrt()
    at = [
        float(losses.gaussian_nll(image, torch.full_like(image, float(error) * f), truth, counts))
        for f in (0.8, 1, 1.25)
    ]
    assert at[1] < min(at[0], at[2])
    assert at[1] == pytest.approx(0.5 + math.log(error), abs=1e-4)


def test_the_log_ratio_counts_decibels_over_the_prior(case):
    _, truth, counts = case
    prior = truth + 0.1
    image = truth + 0.1 / math.sqrt(10)  # 10 dB better
    assert float(losses.log_ratio(image, truth, counts, prior)) == pytest.approx(-math.log(10), abs=1e-3)
    counts[1] = 0  # a target without a hole
    assert float(losses.log_ratio(image, truth, counts, prior)) == pytest.approx(-math.log(10), abs=1e-3)
    assert float(losses.log_ratio(image, truth, counts * 0, prior)) == 0


def test_terms_are_summed_by_their_weights(case):
    image, truth, counts = case
    loss = Loss(LossConfig(charbonnier=0, l1=2.0, mse=0.5, nll=0.1, log_ratio=0.3, ssim=1.0, gradient=0.7), BANDS)
    total, terms = loss(Completed(image, image, sigma=torch.full_like(image, 0.1)), truth, counts, prior=truth + 0.2)
    assert terms.keys() == {"l1", "mse", "nll", "log_ratio", "ssim", "gradient"}
    wanted = 2 * terms["l1"] + 0.5 * terms["mse"] + 0.1 * terms["nll"] + 0.3 * terms["log_ratio"]
    torch.testing.assert_close(total, wanted + terms["ssim"] + 0.7 * terms["gradient"])


def test_terms_that_cannot_be_computed_are_refused(case):
    image, truth, counts = case
    with pytest.raises(ConfigError, match="answers no sigma"):
        Loss(LossConfig(nll=1.0), BANDS)(Completed(image, image), truth, counts)
    with pytest.raises(ConfigError, match="no prior to compare with"):
        Loss(LossConfig(log_ratio=1.0), BANDS)(Completed(image, image), truth, counts)
    with pytest.raises(ConfigError, match="every weight is 0"):
        Loss(LossConfig(charbonnier=0), BANDS)
    with pytest.raises(ConfigError, match=r"need swir16, swir22, which the training lacks"):
        Loss(LossConfig(feat=1.0), BANDS[:4])


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16's convolutions with random numbers under timm's names: real shapes, not ImageNet's values."""
    torch.manual_seed(0)
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    widths |= {17: (256, 512)} | dict.fromkeys((19, 21, 24, 26, 28), (512, 512))
    tensors = {}
    for number, (inputs, outputs) in widths.items():
        tensors[f"features.{number}.weight"] = torch.randn(outputs, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
        tensors[f"features.{number}.bias"] = torch.zeros(outputs)
    path = tmp_path_factory.mktemp("vgg") / "model.safetensors"
    save_file(tensors, path)
    return path


def test_feat_compares_features_of_blocks_three_to_five(case, vgg_file):
    image, truth, counts = case
    loss = Loss(LossConfig(charbonnier=0, feat=1.0, feat_weights=str(vgg_file)), BANDS)
    maps = loss.features.maps(truth[:, :3])
    assert [tuple(one.shape) for one in maps] == [(2, 256, 6, 8), (2, 512, 3, 4), (2, 512, 1, 2)]
    assert all((one >= 0).all() for one in maps)  # after the ReLU
    image.requires_grad_()
    total, _ = loss(Completed(image, image), truth, counts)
    total.backward()
    assert image.grad.abs().sum() > 0
    assert not any(value.requires_grad for value in loss.parameters())
    groups = [(truth[:, [2, 1, 0]], image[:, [2, 1, 0]]), (truth[:, 3:], image[:, 3:])]
    ones = torch.ones_like(counts)
    with torch.no_grad():
        by_hand = [
            functional.smooth_l1_loss(a, b)
            for one, two in groups
            for a, b in zip(loss.features.maps(one), loss.features.maps(two), strict=True)
        ]
        torch.testing.assert_close(loss.features(image, truth, ones), torch.stack(by_hand).mean())
        assert loss.features(image, truth, ones * 0) == 0  # the image was copied into the missing truth


def test_feat_without_its_weights_is_refused_and_not_replaced(tmp_path, monkeypatch, vgg_file):
    feat = {"charbonnier": 0, "feat": 1.0}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be downloaded.*nothing else is put in its place"):
        Loss(LossConfig(**feat), BANDS)
    with pytest.raises(ConfigError, match=r"gone.*no safetensors file that can be read"):
        Loss(LossConfig(**feat, feat_weights=str(tmp_path / "gone.safetensors")), BANDS)
    torch.save({"features.0.weight": torch.ones(3)}, tmp_path / "vgg16.pth")
    with pytest.raises(ConfigError, match="no safetensors file that can be read"):
        Loss(LossConfig(**feat, feat_weights=str(tmp_path / "vgg16.pth")), BANDS)
    save_file({"features.0.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="holds no VGG16"):
        Loss(LossConfig(**feat, feat_weights=str(tmp_path / "other.safetensors")), BANDS)


def test_the_adversary_sees_series_of_any_length_in_any_order():
    torch.manual_seed(0)
    net, batch = Discriminator(6).eval(), made_up_batch(size=(32, 48))
    assert sum(value.numel() for value in net.parameters()) == 809_857  # the paper's: 1,064,916
    order = [2, 0, 4, 1, 3]
    series = ("looks", "present", "clear", "days", "steps")
    shuffled = replace(batch, **{name: getattr(batch, name)[:, order] for name in series})
    wild = replace(batch, looks=batch.looks.clone())
    wild.looks[~batch.steps] = 40.0
    with torch.no_grad():
        logits = net(batch, batch.prior)
        assert logits.shape == (2, 1, 6, 10)
        for other in (shuffled, wild):
            torch.testing.assert_close(net(other, batch.prior), logits)
        assert (net(batch, batch.prior.flip(0)) - logits).abs().max() > 1e-3
        assert (net(replace(batch, steps=batch.steps & False), batch.prior) - logits).abs().max() > 1e-3


def test_the_adversary_learns_to_tell_and_the_generator_to_deceive():
    torch.manual_seed(0)
    net, batch = Discriminator(6, width=16), made_up_batch(targets=4, size=(32, 32))
    truth, known = batch.prior, torch.ones(4, 1, 32, 32)
    image = (truth + 0.15 * torch.randn_like(truth)).requires_grad_()
    adam = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999))
    costs = []
    for _ in range(25):
        adam.zero_grad()
        cost = discriminator_loss(net, batch, truth, image, known)
        cost.backward()
        adam.step()
        costs.append(float(cost.detach()))
    assert costs[-1] < 0.5 * costs[0]
    assert image.grad is None
    generator_loss(net, batch, image, known).backward()
    assert image.grad.abs().max() > 0


def test_where_the_truth_is_unknown_the_adversary_learns_nothing():
    torch.manual_seed(0)
    net, batch = Discriminator(6).eval(), made_up_batch(size=(32, 32))
    image, truth = batch.prior, batch.prior.flip(0)
    unknown = torch.zeros(2, 1, 32, 32)
    assert float(discriminator_loss(net, batch, truth, image, unknown).detach()) == 0
    assert float(generator_loss(net, batch, image, unknown).detach()) == 0
    known = unknown.clone()
    known[..., :16] = 1
    other = torch.where(known > 0, truth, 9.0)  # a truth that is wild where it is unknown
    with torch.no_grad():
        one, two = (discriminator_loss(net, batch, given, image, known) for given in (truth, other))
    assert float(one) == float(two) > 0
