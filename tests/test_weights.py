"""Weights on disk: what is saved comes back, and nothing else is let in."""

import json
import pickle
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import models
from pipeline.errors import ConfigError, WeightsError
from pipeline.models import weights
from pipeline.models.batch import Completed, Model, ModelConfig

CARD = {"data": "made up", "seed": 7, "scores": {"psnr": 31.5}}


class ScaleConfig(ModelConfig):
    name: Literal["scale"] = "scale"
    width: int = 3


class Scale(Model):
    """The smallest network with parameters, running statistics and a counter."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Sequential(nn.Conv2d(1, config.width, 1), nn.BatchNorm2d(config.width))

    def forward(self, batch, *, with_weights=False):
        return Completed(batch.prior, batch.prior)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "scale", (ScaleConfig, Scale))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = models.build({"name": "scale", "width": 5, "bands": ("red", "nir")})
    return model, weights.save(model, tmp_path / "new" / "w.safetensors", card=CARD)


def test_what_is_saved_comes_back(saved):
    model, path = saved
    again = weights.load_model(path)
    assert again.config == model.config
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert weights.card(path) == CARD
    assert list(path.parent.iterdir()) == [path]  # no part is left


def test_the_hash_follows_the_content(saved, tmp_path):
    model, path = saved
    same = weights.save(model, tmp_path / "same.safetensors", card=CARD)
    assert weights.content_hash(path) == weights.content_hash(same)
    assert len(weights.content_hash(path)) == 64
    with torch.no_grad():
        next(model.parameters())[0] += 1e-6
    other = weights.save(model, tmp_path / "other.safetensors", card=CARD)
    assert weights.content_hash(other) != weights.content_hash(path)


def test_weights_that_ship_go_by_name(saved, monkeypatch):
    _, path = saved
    monkeypatch.setattr(weights, "SHIPPED", path.parent)
    assert weights.load_model("w").config.name == "scale"
    assert weights.content_hash("w") == weights.content_hash(path)
    with pytest.raises(WeightsError, match=r"'huge'.*weights that ship: w$"):
        weights.load_model("huge")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.safetensors'?: no such file"):
        weights.load_model(tmp_path / "gone.safetensors")


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("protocol", ["torch", 2, 5])
def test_pickles_are_refused_unread(tmp_path, protocol):
    path = tmp_path / "w.safetensors"
    if protocol == "torch":
        torch.save({"a": _Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(_Bomb(), protocol=protocol))
    with pytest.raises(WeightsError, match=r"pickle.*never loaded"):
        weights.load_model(path)
    with pytest.raises(WeightsError, match=r"pickle.*never loaded"):
        weights.card(path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_cut_file_is_damaged(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="damaged or no safetensors file"):
        weights.load_model(path)


def test_a_flipped_bit_is_noticed(saved):
    _, path = saved
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match="not those that were saved"):
        weights.load_model(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"cloudgate": "no json"}, {"cloudgate": "[]"}])
def test_a_foreign_file_is_refused(tmp_path, metadata):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(3)}, path, metadata)
    with pytest.raises(WeightsError, match="cloudgate did not write"):
        weights.load_model(path)


def _rewrite(path, change):
    """The file again with its metadata changed, tensors and digest as they were."""
    with weights.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["cloudgate"])
    change(about)
    save_file(load_file(path), path, {"cloudgate": json.dumps(about)})


def test_another_layout_network_option_or_width_is_refused(saved):
    _, path = saved
    _rewrite(path, lambda about: about["config"].update(width=4))
    with pytest.raises(WeightsError, match=r"do not fit network 'scale'.*size mismatch"):
        weights.load_model(path)
    _rewrite(path, lambda about: about["config"].update(depth=4))
    with pytest.raises(WeightsError, match=r"model\.depth"):
        weights.load_model(path)
    _rewrite(path, lambda about: about["config"].update(name="huge"))
    with pytest.raises(WeightsError, match="unknown network 'huge'; known are"):
        weights.load_model(path)
    _rewrite(path, lambda about: about.update(layout=9))
    with pytest.raises(WeightsError, match="layout 9, this version reads 1"):
        weights.load_model(path)


def test_weights_that_are_not_finite_are_refused(saved):
    model, path = saved
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    weights.save(model, path, card=CARD)
    with pytest.raises(WeightsError, match=r"layer\.0\.weight holds NaN"):
        weights.load_model(path)


def test_bands_must_be_those_of_the_network(saved):
    model, _ = saved
    assert weights.check_bands(model, ("nir", "red")) == (1, 0)
    with pytest.raises(WeightsError, match=r"trained on red, nir; the job lacks nir"):
        weights.check_bands(model, ("red", "green"))
    with pytest.raises(WeightsError, match=r"does not know blue, green"):
        weights.check_bands(model, ("red", "blue", "nir", "green"))
    assert weights.check_bands(models.build("scale"), ("swir22", "red", "blue")) == (0, 1, 2)


def test_unknown_networks_and_options_are_named():
    with pytest.raises(ConfigError, match="unknown network 'huge'; known are"):
        models.build("huge")
    with pytest.raises(ConfigError, match=r"model\.width.*'wide' \(network 'scale'\)"):
        models.build({"name": "scale", "width": "wide"})
    with pytest.raises(ConfigError, match="unknown network None"):
        models.build({})


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path):
    path = tmp_path / "w.safetensors"
    for padding in range(0, 264, 8):
        weights.save(models.build({"name": "scale"}), path, card=CARD | {"padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert weights.card(path)["padding"] == "x" * padding
