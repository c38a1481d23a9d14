"""The fusion U-Net: its size, where it starts, which shapes and bands it takes, what every option changes."""

from dataclasses import fields, replace

import pytest
import torch
from made_up_batch import made_up_batch

from pipeline import models
from pipeline.errors import ConfigError
from pipeline.models import weights
from pipeline.models.fusion import Attention, pad_by_reflection

torch.set_num_threads(1)
TINY = {"name": "small", "gate_widths": (4, 8), "aggregate_features": 4, "crossover": 16, "widths": (16, 16, 8, 8, 8)}


def _network(**options):
    """A tiny network in the state of some training: statistics and both gammas moved."""
    torch.manual_seed(2)
    model = models.build({**TINY, **options})
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("gamma", "opening")):
                value.fill_(0.5)
        model(made_up_batch(size=(40, 64), bands=len(model.config.bands) or 6))
    return model.eval()


@pytest.fixture(scope="module")
def paper():
    torch.manual_seed(0)
    return models.build("paper")


def test_the_paper_s_network_has_the_size_of_the_reference(paper):
    assert sum(value.numel() for value in paper.parameters()) == 14_743_782  # the paper: 15,046,582
    assert sum(value.numel() for value in paper.gate.parameters()) == 19_662
    assert paper.unet.encoder.feature_info.channels() == [16, 24, 40, 96, 320]
    assert paper.unet.encoder.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert not any(isinstance(layer, torch.nn.ReLU) for layer in paper.modules())  # Mish everywhere


def test_untrained_the_paper_s_network_answers_the_gate_s_aggregate(paper):
    got = paper(made_up_batch(size=(32, 64)), with_weights=True)
    assert torch.equal(got.image, got.aggregate)
    assert got.image.shape == (2, 6, 32, 64)
    assert got.weights.shape == (2, 5, 6, 32, 64)
    assert got.sigma is None
    got.image.square().mean().backward()
    assert paper.gamma.grad.abs() > 0


@pytest.mark.parametrize("prior", ["base", "member"])
def test_untrained_with_a_prior_the_image_is_the_prior(prior):
    torch.manual_seed(0)
    model, batch = models.build({**TINY, "prior": prior, "estimates": 1}), made_up_batch(size=(40, 33))
    assert torch.equal(model(batch).image, batch.prior)
    with torch.no_grad():
        assert torch.equal(model.eval()(batch).image, batch.prior)


@pytest.mark.parametrize("size", [(40, 64), (1, 7), (33, 31), (64, 32)])
def test_any_size_is_completed(size):
    model, batch = _network(), made_up_batch(size=size)
    with torch.no_grad():
        got = model(batch)
    assert got.image.shape == batch.prior.shape
    assert torch.isfinite(got.image).all()
    assert (got.image - got.aggregate).abs().max() > 1e-4


def test_padding_is_by_reflection():
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    wanted = torch.nn.functional.pad(x, (0, 3, 0, 1), mode="reflect")
    assert torch.equal(pad_by_reflection(x, 4), wanted)
    assert torch.equal(pad_by_reflection(wanted, 4), wanted)
    assert torch.equal(pad_by_reflection(torch.tensor([[1.0, 2.0]]), 5)[0], torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]))


@pytest.mark.parametrize("pick", [(1, 5, 0), (3, 2, 1, 0), (0, 1, 2, 3, 4), (4,)])
def test_without_named_bands_any_bands_in_any_order_are_completed_alike(pick):
    options = {
        "prior": "base",
        "estimates": 1,
        "context": 1,
        "extra_inputs": ("known", "prior", "scale"),
        "sigma": True,
    }
    model, batch = _network(**options), made_up_batch(size=(20, 24))
    axis = {"looks": 2, "prior": 1, "scale": 1, "estimates": 2, "context": 2}
    fewer = replace(
        batch, **{name: getattr(batch, name).index_select(d, torch.tensor(pick)) for name, d in axis.items()}
    )
    with torch.no_grad():
        wanted, got = model(batch, with_weights=True), model(fewer, with_weights=True)
    for name, d in {"image": 1, "aggregate": 1, "sigma": 1, "weights": 2}.items():
        part = getattr(wanted, name).index_select(d, torch.tensor(pick))
        torch.testing.assert_close(getattr(got, name), part, rtol=1e-4, atol=1e-5)


def test_order_of_the_dates_does_not_matter():
    model, batch = _network(), made_up_batch()
    order = [4, 2, 0, 1, 3]
    series = ("looks", "present", "clear", "days", "steps")
    shuffled = replace(batch, **{name: getattr(batch, name)[:, order] for name in series})
    with torch.no_grad():
        torch.testing.assert_close(model(shuffled).image, model(batch).image, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": True, "unit": "scale", "prior": "member", "estimates": 2},
        {"attention": "windowed", "window": 2, "sigma": True, "with_features": False},
        {"attention": "none", "encoder": "mnasnet_050", "shuffle_kernel": 1, "bands": ("red", "green", "nir")},
        {"unet": False, "signed_days": True},
    ],
    ids=str,
)
def test_options_build_and_learn(options):
    model = _network(**options).train()
    batch = made_up_batch(bands=3, size=(64, 64))
    got = model(replace(batch, condition=torch.rand_like(batch.condition)))
    loss = (got.image - 0.1).square().mean()
    if got.sigma is not None:
        assert (got.sigma > 0).all()
        loss = loss + got.sigma.log().mean()
    loss.backward()
    idle = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0}
    if options.get("unet") is False or options.get("with_features") is False:
        idle -= {"gate.abstract.weight", "gate.abstract.bias"}  # Hagg goes nowhere
    assert not idle


def test_sigma_starts_as_the_prior_s():
    model, batch = models.build({**TINY, "prior": "base", "sigma": True}), made_up_batch(size=(32, 32))
    with torch.no_grad():
        model.unet.head.weight.zero_()
        model.unet.head.bias.zero_()
    torch.testing.assert_close(model(batch).sigma, batch.scale)


def test_attention_by_hand_and_in_windows():
    torch.manual_seed(0)
    whole, windows = Attention(8, None), Attention(8, 4)
    windows.load_state_dict(whole.state_dict())
    x = torch.randn(1, 8, 4, 8)
    assert torch.equal(whole(x), x)  # gamma starts at 0
    with torch.no_grad():
        whole.gamma.fill_(0.7)
        windows.gamma.fill_(0.7)
        q, k, v = (layer(x).flatten(2) for layer in (whole.query, whole.key, whole.value))
        share = torch.softmax(torch.einsum("bfi,bfj->bij", q, k), dim=2)  # over all pixels j
        wanted = x + 0.7 * torch.einsum("bij,bfj->bfi", share, v).reshape(x.shape)
        torch.testing.assert_close(whole(x), wanted)
        halves = torch.cat([whole(x[..., :4]), whole(x[..., 4:])], dim=-1)
        torch.testing.assert_close(windows(x), halves)
        assert windows(x[..., :3, :7]).shape == (1, 8, 3, 7)


def test_half_precision_stays_near():
    model, batch = _network(prior="base"), made_up_batch(size=(32, 32))
    with torch.no_grad():
        wanted = model(batch).image
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(batch).image
    assert got.dtype == torch.float32
    assert (got - wanted).square().mean().sqrt() < 5e-3


def test_a_network_survives_its_file(tmp_path):
    model, batch = _network(prior="member", sigma=True), made_up_batch(size=(20, 24))
    again = weights.load_model(weights.save(model, tmp_path / "w.safetensors", card={}))
    assert again.config == model.config
    with torch.no_grad():
        one, two = model(batch, with_weights=True), again(batch, with_weights=True)
    assert all(torch.equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))


def test_the_small_network_is_small(tmp_path):
    path = weights.save(models.build("small"), tmp_path / "w.safetensors", card={})
    assert path.stat().st_size < 8e6


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="sigma comes from the U-Net"):
        models.build({"name": "paper", "unet": False, "sigma": True})
    with pytest.raises(ConfigError, match=r"model\.attention.*'global'"):
        models.build({"name": "paper", "attention": "global"})
