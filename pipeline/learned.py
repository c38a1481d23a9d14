"""Methods that are learned models, as the engine sees them: in come a method's options, out come its model and answers.

Nothing here imports torch before a learned method is asked for: it is an extra. A recipe carries where the weights lie
and the hash of their content, never the weights; each process reads them once and checks the hash.
"""

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.config import LEARNED, Method
from pipeline.errors import ConfigError, RunError
from pipeline.estimates import CONTEXT, ESTIMATES, Target

if TYPE_CHECKING:
    from pipeline.models.batch import Model
    from pipeline.predict import Completion

DEVICES: Final = ("auto", "cpu", "cuda")
PRECISIONS: Final = ("fp32", "bf16")
_NO_PIXELS: Final = ("device", "patch_batch")
"""Options that say how to compute, not what."""

_reading = threading.Lock()


@dataclass(frozen=True)
class LearnedOptions:
    """How a model is run."""

    weights: str = "robust"
    """A file that ``cloudgate train`` wrote, or the name of weights that come with the package."""
    device: str = "auto"
    """auto (a GPU where there is one) | cpu | cuda."""
    patch_batch: int | None = None
    """Patches at a time on a GPU, 16 by default; halved where memory runs out. The CPU always takes one."""
    precision: str = "fp32"
    """bf16 lets torch compute in bfloat16 where it deems that safe."""

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str) or not self.weights:
            raise ConfigError(f"method.weights: a file or a name such as robust is needed, got {self.weights!r}")
        if self.device not in DEVICES:
            raise ConfigError(f"method.device: {self.device!r} is none of {', '.join(DEVICES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"method.precision: {self.precision!r} is none of {', '.join(PRECISIONS)}")
        batch = self.patch_batch
        if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
            raise ConfigError(f"method.patch_batch: a whole number of patches from 1 on is needed, got {batch!r}")


@dataclass(frozen=True)
class _Ready(LearnedOptions):
    """Options after ``prepare``: with what the weights' file decides."""

    weights_sha256: str = ""
    channels: tuple[int, ...] = ()
    """Which band each of the network's channels wants."""


def options_of(method: Method) -> LearnedOptions:
    """The options of a learned method as a job gives them, checked.

    Raises:
        ConfigError: for an option it does not have, or a value it cannot use.
    """
    known = [f.name for f in fields(LearnedOptions)]
    for name in method.options:
        if name not in known:
            raise ConfigError(
                f"method.{name}: {method.name} has no such option; its options are: {', '.join(sorted(known))}"
            )
    return LearnedOptions(**method.options)


def _ready(method: Method) -> _Ready:
    """The options of a prepared method; of another one with its bands as they come."""
    if "weights_sha256" in method.options:
        return _Ready(**method.options)
    from pipeline.models.weights import content_hash

    options = options_of(method)
    return _Ready(**vars(options), weights_sha256=content_hash(options.weights))


def prepare(method: Method, bands: Sequence[str]) -> Method:
    """The method as workers need it: with the hash of its weights and the order of its channels.

    Args:
        method: as a job gives it; one that is not learned comes back as it is.
        bands: the job's.

    Returns:
        The method; a few hundred bytes more.

    Raises:
        ConfigError: torch is not installed, or an option is wrong. WeightsError: the weights cannot be used, or not
            for these bands.
    """
    if method.name not in LEARNED:
        return method
    options = options_of(method)
    _need_torch()
    from pipeline.models.weights import SHIPPED, check_bands, content_hash, find

    sha256, path = content_hash(options.weights), find(options.weights)
    channels = check_bands(_read(options.weights, sha256), bands)
    place = options.weights if path.parent == SHIPPED else str(path.absolute())  # workers have what ships
    return method.model_copy(update={"weights": place, "weights_sha256": sha256, "channels": channels})


def check_device(method: Method) -> None:
    """Refuse a device that this machine does not have (``ConfigError``)."""
    if method.name in LEARNED:
        from pipeline import predict

        predict.pick_device(options_of(method).device)


def identity(method: Method) -> dict[str, Any]:
    """What of a method shapes pixels, as JSON values: of weights their content, not where they lie."""
    out: dict[str, Any] = method.model_dump(mode="json")
    if method.name not in LEARNED:
        return out
    options = options_of(method)
    _need_torch()
    from pipeline.models.weights import content_hash

    out |= {"precision": options.precision, "weights_sha256": content_hash(options.weights)}
    return {name: value for name, value in out.items() if name not in ("weights", *_NO_PIXELS)}


def halo_px(method: Method) -> int:
    """How far around a block the method looks, in pixels of the grid."""
    from pipeline import predict

    options = _ready(method)
    return predict.halo_px(_read(options.weights, options.weights_sha256))


def complete(method: Method, target: Target, **more: Any) -> "Completion":
    """``predict.complete`` with the method's model, on its device; the model is read once per process.

    Raises:
        RunError: other weights lie here than those the job was prepared with, or the GPU cannot hold a patch.
    """
    from pipeline import predict

    options = _ready(method)
    model = _on_device(options.weights, options.weights_sha256, predict.pick_device(options.device))
    return predict.complete(
        target,
        model=model,
        patch_batch=options.patch_batch,
        precision="bf16" if options.precision == "bf16" else "fp32",
        channels=options.channels,
        **more,
    )


def look_shares(method: Method, target: Target, *, pixel: tuple[int, int], **more: Any) -> NDArray[np.float64] | None:
    """``shares.at_pixel`` with the method's model, on the CPU.

    Raises:
        RunError: other weights lie here than those the method was prepared with.
    """
    from pipeline import shares

    options = _ready(method)
    return shares.at_pixel(
        target,
        model=_read(options.weights, options.weights_sha256),
        pixel=pixel,
        precision="bf16" if options.precision == "bf16" else "fp32",
        channels=options.channels,
        **more,
    )


def scratch_bytes(method: Method, looks: int, bands: int) -> tuple[float, float]:
    """(bytes per pixel of a block, bytes whatever its size) that the method takes beside its looks."""
    options = _ready(method)
    model = _read(options.weights, options.weights_sha256)
    per_pixel = 4.0 * bands * (3 * len(ESTIMATES) + len(CONTEXT) + 6) + 3 * looks
    return per_pixel, TORCH_BYTES + model.patch_bytes(looks, bands)


def kept_bytes(method: Method, shape: tuple[int, int], bands: int) -> float:
    """Bytes of ``kept.Kept`` at the most, where (rows of a sub-block, columns of a task) are ``shape``."""
    from pipeline import predict

    options = _ready(method)
    lattice = predict.lattice_of(_read(options.weights, options.weights_sha256))
    along_cols, along_rows = (size // lattice.stride_px + 2 for size in reversed(shape))
    # over an edge lie two rows of patches at the most, since neighbours overlap by less than half
    return 2.0 * (along_cols + along_rows) * lattice.patch_px**2 * 4 * (2 * bands + 1)


TORCH_BYTES: Final = 350e6
"""Resident size that torch adds to a process."""


def _need_torch() -> None:
    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"method.name: timegate needs {package}, which is not installed; install it with "
                "pip install 'cloudgate[learn]', or take method.name=regression"
            )


def _read(weights: str, sha256: str) -> "Model":
    with _reading:
        return _read_once(weights, sha256)


@lru_cache(maxsize=16)
def _read_once(weights: str, sha256: str) -> "Model":
    from pipeline.models.weights import content_hash, load_model

    found = content_hash(weights)
    if found != sha256:
        raise RunError(
            f"weights {weights}: the file here has other content ({found[:12]}) than the job was planned with "
            f"({sha256[:12]}); bring the same file to every worker and run the same command again"
        )
    return load_model(weights).requires_grad_(False)


def _on_device(weights: str, sha256: str, device: str) -> "Model":
    model = _read(weights, sha256)
    with _reading:
        return model if device == "cpu" else _moved(weights, sha256, device)


@lru_cache(maxsize=16)
def _moved(weights: str, sha256: str, device: str) -> "Model":
    import copy

    return copy.deepcopy(_read_once(weights, sha256)).to(device)
