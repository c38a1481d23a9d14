"""Cloud detectors as plug-ins: the bands of one acquisition in, a state per pixel out.

In: reflectance (B, H, W) float32 (NaN none) and the bands' names. Out: uint8 (H, W) of
:mod:`pipeline.states`. The detectors are optional extras, imported when called for; what they need and
cannot have is a :class:`~pipeline.errors.ConfigError` that says how to get it.

OmniCloudMask (Wright et al. 2025, github.com/DPIRD-DMA/OmniCloudMask, MIT): red, green and near infrared
at 10 to 50 m in any unit, so Level-2A will do; clouds and shadows; weights are fetched at first use.
s2cloudless (github.com/sentinel-hub/sentinel2-cloud-detector; weights inside the wheel): ten bands of
Level-1C, B10 among them, so it cannot be had from Level-2A; clouds only.

A detector looks at a pixel's surroundings, so what it says would depend on how a job is cut. It is therefore
run on cells of a lattice fixed to the origin of the CRS, each with the same margin around it
(:func:`lattice_window`, :func:`state_on_lattice`): a pixel's state is the same in every block that holds it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.grid import Grid
from pipeline.states import CLEAR, CLOUD, NODATA, SHADOW, State

type MaskModel = Callable[[NDArray[np.float32], Sequence[str]], State]

OMNICLOUDMASK_BANDS: Final = ("red", "green", "nir")
# Its smallest patch; the library refuses anything smaller.
OMNICLOUDMASK_LEAST_PX: Final = 32
# What fetches its weights; some of their errors are not OSErrors.
DOWNLOADERS: Final = frozenset({"huggingface_hub", "httpx", "requests", "urllib3", "gdown"})
# 0 clear, 1 thick cloud, 2 thin cloud, 3 shadow.
OMNICLOUDMASK_STATES: Final = (CLEAR, CLOUD, CLOUD, SHADOW)

S2CLOUDLESS_BANDS: Final = (
    "coastal", "blue", "red", "rededge1", "nir", "nir08", "nir09", "cirrus", "swir16", "swir22",
)  # fmt: skip
# Probability, and the radius in pixels over which it is averaged, as in SEN12MS-CR-TS; growth is ours.
S2CLOUDLESS_THRESHOLD: Final = 0.4
S2CLOUDLESS_AVERAGE_PX: Final = 4

BANDS_OF: Final = {"omnicloudmask": OMNICLOUDMASK_BANDS, "s2cloudless": S2CLOUDLESS_BANDS}
"""The detectors, and the bands each needs."""
CELL_PX: Final = 256
"""Side of a cell of the lattice on which detectors run."""
CONTEXT_PX: Final = 64
"""Margin around a cell that its detector sees too."""


def mask_model(name: str, *, device: str | None = None, weights_dir: Path | None = None) -> MaskModel:
    """A cloud detector by name, as ``detect(reflectance, bands) -> state``.

    Args:
        name: ``omnicloudmask`` or ``s2cloudless``.
        device: Torch device for omnicloudmask, such as ``cpu`` or ``cuda``; default: its own choice.
        weights_dir: Where omnicloudmask keeps its weights; default: its own cache folder.

    Returns:
        A function of reflectance float32 (B, H, W), NaN where there is none, and the B band names; it
        gives uint8 (H, W): no data where a needed band is NaN. It raises ConfigError where bands are
        missing, the block is too small, or weights cannot be had.

    Raises:
        ConfigError: unknown name, or the package is not installed.
    """
    if name == "omnicloudmask":
        package = _package(name)
        return lambda reflectance, bands: _omnicloudmask(package, reflectance, bands, device, weights_dir)
    if name == "s2cloudless":
        detector = _package(name).S2PixelCloudDetector(
            threshold=S2CLOUDLESS_THRESHOLD,
            all_bands=False,
            average_over=S2CLOUDLESS_AVERAGE_PX,
            dilation_size=None,
        )
        return lambda reflectance, bands: _s2cloudless(detector, reflectance, bands)
    raise ConfigError(f"mask model {name!r} is not known; there are omnicloudmask and s2cloudless")


def check_mask_model(name: str, bands: Sequence[str]) -> None:
    """Refuse a detector that cannot work, before any work starts.

    Raises:
        ConfigError: unknown name, package not installed, or a band it needs is not among ``bands``.
    """
    mask_model(name)
    _check_bands(name, bands)


def lattice_window(cells: Grid) -> Grid:
    """What to read to know the state on ``cells``: all lattice cells that they touch, with the margin."""

    def span(start: int, size: int) -> tuple[int, int]:
        first, last = start // CELL_PX, -(-(start + size) // CELL_PX)
        return first * CELL_PX - CONTEXT_PX - start, last * CELL_PX + CONTEXT_PX - start

    return cells.window(span(cells.row0, cells.height), span(cells.col0, cells.width))


def state_on_lattice(
    name: str, *, reflectance: NDArray[np.float32], bands: Sequence[str], seen: Grid, cells: Grid
) -> State:
    """Run a detector, lattice cell by lattice cell; parts without any data are not looked at.

    Args:
        name: As in :func:`mask_model`.
        reflectance: (B, H, W) float32 on ``seen``, NaN none.
        bands: The B names.
        seen: What ``lattice_window(cells)`` gives.
        cells: Where the state is wanted.

    Returns:
        uint8 (h, w) on ``cells``; the same at a pixel whatever ``cells`` is.

    Raises:
        ConfigError: as the detector.
    """
    detect, side = mask_model(name), CELL_PX + 2 * CONTEXT_PX
    core = slice(CONTEXT_PX, CONTEXT_PX + CELL_PX)
    state = np.full(seen.shape, NODATA, np.uint8)
    for row in range(0, seen.height - 2 * CONTEXT_PX, CELL_PX):
        for col in range(0, seen.width - 2 * CONTEXT_PX, CELL_PX):
            around = (slice(row, row + side), slice(col, col + side))
            here = reflectance[:, *around]
            if np.isfinite(here[:, core, core]).all(axis=0).any():
                state[around][core, core] = detect(here, bands)[core, core]
    top, left = cells.row0 - seen.row0, cells.col0 - seen.col0
    return np.ascontiguousarray(state[top : top + cells.height, left : left + cells.width])


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        weights = (
            "; its weights are downloaded at first use: on a machine without network, copy them "
            "there and pass weights_dir"
            if name == "omnicloudmask"
            else "; its weights are inside the package"
        )
        raise ConfigError(
            f"mask model {name!r} is not installed ({error}); pip install cloudgate[{name}]{weights}"
        ) from error


def _check_bands(name: str, bands: Sequence[str]) -> None:
    needed = BANDS_OF[name]
    lacking = [band for band in needed if band not in bands]
    if lacking:
        hint = "; cirrus (B10) exists in Level-1C only" if "cirrus" in lacking else ""
        raise ConfigError(
            f"mask model {name!r} needs the bands {list(needed)}, and {lacking} are not among {list(bands)}{hint}; "
            "add them to bands, or choose another mask source"
        )


def _needed(
    name: str, reflectance: NDArray[np.float32], bands: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The needed bands in their order, 0 where one of them is missing, and where that is."""
    _check_bands(name, bands)
    needed = BANDS_OF[name]
    stack = reflectance[[list(bands).index(band) for band in needed]].astype(np.float32)
    empty = np.isnan(stack).any(axis=0)
    stack[:, empty] = 0
    return stack, empty


def _omnicloudmask(
    package: ModuleType,
    reflectance: NDArray[np.float32],
    bands: Sequence[str],
    device: str | None,
    weights_dir: Path | None,
) -> State:
    stack, empty = _needed("omnicloudmask", reflectance, bands)
    if min(empty.shape) < OMNICLOUDMASK_LEAST_PX:
        raise ConfigError(
            f"mask model 'omnicloudmask' needs at least {OMNICLOUDMASK_LEAST_PX} px each way, got {empty.shape}; "
            "give it a larger block"
        )
    try:
        classes = package.predict_from_array(
            stack, inference_device=device, no_data_value=0, destination_model_dir=weights_dir
        )
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in DOWNLOADERS:
            raise
        raise ConfigError(
            f"mask model 'omnicloudmask': its weights could not be had ({error}); run it once where there is a network "
            "and pass that folder as weights_dir, or choose another mask source"
        ) from error
    state = np.array(OMNICLOUDMASK_STATES, np.uint8)[np.asarray(classes).reshape(empty.shape).astype(np.intp)]
    state[empty] = NODATA
    return state


def _s2cloudless(detector: object, reflectance: NDArray[np.float32], bands: Sequence[str]) -> State:
    stack, empty = _needed("s2cloudless", reflectance, bands)
    cloudy = detector.get_cloud_masks(np.moveaxis(stack, 0, -1)[None])  # type: ignore[attr-defined]
    state = np.where(np.asarray(cloudy)[0] > 0, np.uint8(CLOUD), np.uint8(CLEAR))
    state[empty] = NODATA
    return state
