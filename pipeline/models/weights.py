"""Weights on disk. In: a network, or a file's path or name. Out: a safetensors file that says what it is, the network.

The file holds the tensors and one metadata entry, JSON: layout version, the network's configuration, the card (data,
recipe, seed, scores) and a digest of the tensors. Nothing is ever unpickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from pipeline.errors import ConfigError, WeightsError
from pipeline.models import build
from pipeline.models.batch import Model

SUFFIX: Final = ".safetensors"
SHIPPED: Final = Path(__file__).parent.parent / "weights"
"""Weights that come with the package, one file per name."""
_KEY: Final = "cloudgate"  # one entry: with several, safetensors writes them in random order and hashes differ
_LAYOUT: Final = 1
_PICKLES: Final = (b"PK\x03\x04", b"\x80")  # torch.save as zip, and plain pickle from protocol 2 on


def save(model: Model, path: str | Path, *, card: Mapping[str, Any]) -> Path:
    """Write a network's weights, whole or not at all; the same weights and card give the same bytes.

    Args:
        model: the network; its ``config`` goes into the file.
        path: the file to write, replaced where it exists.
        card: what a user should know, JSON values: data, recipe, seed, bands, scores, limits.

    Returns:
        The path.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    about = {
        "layout": _LAYOUT,
        "config": model.config.model_dump(mode="json"),
        "card": dict(card),
        "digest": _digest(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(to_bytes(tensors, {_KEY: json.dumps(about, sort_keys=True)}))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load_model(source: str | Path) -> Model:
    """Read a network with its weights.

    Args:
        source: a file, or the name of weights that come with the package (``robust``).

    Returns:
        The network in evaluation mode, float32 on the CPU.

    Raises:
        WeightsError: no such file or name; a pickle, foreign or damaged file; a network or layout that this version
            does not know; values that are not finite.
    """
    path = find(source)
    about, tensors = _read(path)
    try:
        model = build(about["config"])
    except ConfigError as error:
        raise WeightsError(f"weights {path}: {error}; they may come from a newer cloudgate") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).split("\n\t", 1)[-1].split("\n", 1)[0]
        raise WeightsError(f"weights {path}: the tensors do not fit network {model.config.name!r}: {first}") from error
    return model.eval()


def card(source: str | Path) -> dict[str, Any]:
    """What the file says about itself: the card that ``save`` was given. Arguments and errors as ``load_model``."""
    found: dict[str, Any] = _about(find(source))["card"]
    return found


def find(source: str | Path) -> Path:
    """The file behind a path or a shipped name; ``WeightsError`` where there is none."""
    path = Path(source)
    if path.is_file():
        return path
    if path.name == str(source) and not path.suffix:
        shipped = SHIPPED / f"{source}{SUFFIX}"
        if shipped.is_file():
            return shipped
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob(f"*{SUFFIX}"))) or "none"
    raise WeightsError(f"weights {str(source)!r}: no such file; name a {SUFFIX} file or weights that ship: {names}")


def content_hash(source: str | Path) -> str:
    """SHA-256 of the file behind a path or a shipped name, 64 hex digits; part of a mosaic's identity."""
    with find(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_bands(model: Model, bands: Sequence[str]) -> tuple[int, ...]:
    """Check that a network can complete these bands.

    Args:
        model: the network; with ``config.bands`` empty it takes any bands in any order.
        bands: the job's band names, in the job's order.

    Returns:
        Position in ``bands`` of each channel of the network: it wants ``bands[i]`` for each ``i``, in this order.

    Raises:
        WeightsError: the network needs a band that the job lacks, or the job wants one that the network never learned.
    """
    known = model.config.bands
    if not known:
        return tuple(range(len(bands)))
    if lacking := [name for name in known if name not in bands]:
        raise WeightsError(
            f"bands: network {model.config.name!r} was trained on {', '.join(known)}; the job lacks "
            f"{', '.join(lacking)}: add them to bands, or take weights that are shared over bands"
        )
    if unknown := [name for name in bands if name not in known]:
        raise WeightsError(
            f"bands: network {model.config.name!r} was trained on {', '.join(known)} and does not know "
            f"{', '.join(unknown)}: leave them out, or take weights that are shared over bands"
        )
    return tuple(bands.index(name) for name in known)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a file that is whole."""
    about = _about(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, has no __iter__)
    if _digest(tensors) != about["digest"]:
        raise WeightsError(f"weights {path}: the values are not those that were saved; copy the file again")
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"weights {path}: {name} holds NaN or infinity; take an earlier checkpoint")
    return about, tensors


def _about(path: Path) -> dict[str, Any]:
    """The metadata of a file, checked as far as the header goes."""
    with path.open("rb") as raw:
        start = raw.read(9)
    if start.startswith(_PICKLES) and start[8:] != b"{":  # a header's length may begin with any byte; then comes JSON
        raise WeightsError(
            f"weights {path}: this is a pickle (torch.save), which is never loaded because it can run code; "
            f"give a {SUFFIX} file that cloudgate train wrote"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"weights {path}: damaged or no safetensors file ({error}); copy it again") from error
    try:
        about: dict[str, Any] = json.loads(metadata[_KEY])
        layout, *_ = (about[key] for key in ("layout", "config", "card", "digest"))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsError(
            f"weights {path}: a safetensors file that cloudgate did not write (it names no network); "
            "give one that cloudgate train wrote"
        ) from error
    if layout != _LAYOUT:
        raise WeightsError(f"weights {path}: layout {layout!r}, this version reads {_LAYOUT}; update cloudgate")
    return about


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values: safetensors itself notices a cut file, not a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
