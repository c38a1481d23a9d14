"""Learned models: in comes a ``Batch`` (series around targets with classical estimates), out comes a ``Completed``.

    batch          what a model is, is given and gives back: dims, units, polarity
    timegate       the gate over time (Oehmcke et al. 2020, Algorithms 1 and 2)
    fusion         the residual U-Net on top of it (equation 4)
    kriging        residuals of clear pixels carried into the gap, with a learned kernel
    compact        the network that ships: kriging, a gate over estimates, a small U-Net; shared over bands
    losses         what training minimises
    discriminator  the adversary of the Pix2Pix scheme
    weights        safetensors files with the configuration inside: save, load, hash

``build`` makes an untrained network from its configuration, ``weights.load_model`` one with its weights.
Torch begins here; nothing below this floor imports it.
"""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.models.batch import Model, ModelConfig
from pipeline.models.compact import Compact, CompactConfig
from pipeline.models.fusion import NetworkConfig, SmallConfig, TimeGateUNet

NETWORKS: Final[dict[str, tuple[type[ModelConfig], type[Model]]]] = {
    "paper": (NetworkConfig, TimeGateUNet),
    "small": (SmallConfig, TimeGateUNet),
    "compact": (CompactConfig, Compact),
}
"""Every network by the ``name`` of its configuration: the class that reads the configuration, and the network's."""


def build(config: str | Mapping[str, Any] | ModelConfig) -> Model:
    """An untrained network.

    Args:
        config: a name (all defaults), a mapping with ``name`` and options, or a finished configuration.

    Returns:
        The network, float32 on the CPU, in training mode; seed torch before for the same start.

    Raises:
        ConfigError: for an unknown name, an unknown option or a value that cannot be used.
    """
    known = read_config(config)
    return NETWORKS[known.name][1](known)


def read_config(config: str | Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """The checked configuration of a network; arguments and errors as ``build``."""
    if isinstance(config, ModelConfig):
        return config
    given = {"name": config} if isinstance(config, str) else dict(config)
    name = given.get("name")
    if name not in NETWORKS:
        raise ConfigError(f"model: unknown network {name!r}; known are {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name][0].model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # several options that do not go together
            raise ConfigError(f"model: {first['msg'].removeprefix('Value error, ')} (network {name!r})") from error
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"model.{where}: {first['msg']}, got {first['input']!r} (network {name!r})") from error
