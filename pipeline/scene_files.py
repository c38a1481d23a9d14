"""Scenes on disk: in come a region and its passes, out come COGs and an Earth Search v1 ItemCollection."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import from_origin

from pipeline.errors import ConfigError
from pipeline.phenology import SIM_BANDS, SceneParams
from pipeline.scene_items import FILES, SceneFacts, footprint, item
from pipeline.simulate import Observation, Region
from pipeline.skies import SWATH_LEAN, Acquisition

EPOCH: Final = date(1970, 1, 1)
REPROCESSED_GAIN: Final = 1.004
"""Products of another baseline differ by some per mille in level: aerosol and calibration were redone."""


@dataclass(frozen=True)
class Cut:
    """A tile's window of the region.

    MGRS name, first row and column and size in 10 m pixels of the region.
    """

    tile: str
    row: int
    col: int
    height: int
    width: int


@dataclass(frozen=True)
class Processing:
    """One processing of a pass.

    Attributes:
        baseline: such as ``03.01``.
        sequence: number in the item's id.
        boa_offset_applied: what the item claims.
        dn_shift: what the pixels really hold: 1000 where ESA's offset is still inside, else 0.
        tiles: the tiles it exists for, all when empty.
    """

    baseline: str
    sequence: int = 0
    boa_offset_applied: bool = False
    dn_shift: int = 0
    tiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """One datatake over the region and the products made of it."""

    acquisition: Acquisition
    platform: str
    relative_orbit: int
    processings: tuple[Processing, ...]


OLD: Final = Processing("03.00")
NEWER: Final = Processing("03.01")
HARMONISED: Final = Processing("05.00", 1, boa_offset_applied=True)
HOLDS_OFFSET: Final = Processing("05.00", 1, boa_offset_applied=False, dn_shift=1000)
SHIFTED_UNTOLD: Final = Processing("05.00", 1, boa_offset_applied=False)


def write_scenes(
    out: Path,
    *,
    params: SceneParams,
    seed: int = 0,
    bands: Sequence[str] = ("blue", "green", "red", "nir"),
    tile: str = "33TWL",
    block_px: int = 1024,
    threads: int = 2,
) -> Path:
    """Write one tile of any size with drawn acquisitions: ``cloudgate simulate`` and the speed benchmark.

    Args:
        out: folder for ``items.json`` and the COGs.
        params: size, place, dates and cloudiness.
        seed: of ``Region``.
        bands: of ``SIM_BANDS``; SCL is always written.
        tile: MGRS name that the items carry.
        block_px: COG block of 10 m bands; those of 20 m have half of it.
        threads: for compression.

    Returns:
        path of the ItemCollection.
    """
    region = Region(params, seed)
    passes = [
        Pass(acquisition, "S2A" if k % 2 else "S2B", 122, (NEWER,)) for k, acquisition in enumerate(region.acquisitions)
    ]
    cut = Cut(tile, 0, 0, params.height_px, params.width_px)
    return write_region(region, passes, out, cuts=(cut,), bands=bands, block_px=block_px, threads=threads)


def write_region(
    region: Region,
    passes: Sequence[Pass],
    out: Path,
    *,
    cuts: Sequence[Cut],
    bands: Sequence[str],
    block_px: int,
    threads: int = 2,
) -> Path:
    """Write every pass of a region, cut into tiles: COGs, item beside each scene, and ``out/items.json``."""
    unknown = [band for band in bands if band not in SIM_BANDS]
    if unknown:
        raise ConfigError(f"bands: {unknown[0]!r} is not simulated; choose from {', '.join(SIM_BANDS)}")
    out.mkdir(parents=True, exist_ok=True)
    features = []
    with ThreadPoolExecutor(threads) as pool:
        for index, one in enumerate(passes):
            observation = region.observe(index, bands)
            for processing in one.processings:
                for cut in cuts:
                    if processing.tiles and cut.tile not in processing.tiles:
                        continue
                    facts = _facts(region, one, processing, cut, observation)
                    features.append(_write_scene(out, facts, cut, observation, processing, block_px, pool.map))
    features.sort(key=lambda feature: (feature["properties"]["datetime"], feature["id"]))
    path = out / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}, indent=1))
    return path


def served_items(items: Path, base_url: str) -> dict[str, Any]:
    """The ItemCollection of ``items`` with the hrefs of existing files made absolute under ``base_url``.

    ``base_url`` must serve the folder in which ``items`` lies.
    """
    collection: dict[str, Any] = json.loads(items.read_text())
    for feature in collection["features"]:
        for asset in feature["assets"].values():
            if "://" not in asset["href"]:
                asset["href"] = f"{base_url.rstrip('/')}/{asset['href'].removeprefix('./')}"
    return collection


def _facts(region: Region, one: Pass, processing: Processing, cut: Cut, seen: Observation) -> SceneFacts:
    params, day = region.params, EPOCH + timedelta(days=seen.day)
    first = time(9, 50, 31) if one.relative_orbit == 79 else time(10, 0, 31)
    datatake = datetime.combine(day, first, tzinfo=UTC) - timedelta(seconds=2 * (one.platform == "S2B"))
    north_m = params.north_m - 10 * cut.row
    # the satellite flies south at 6.8 km of ground a second: the southern tile is sensed later
    along = timedelta(seconds=460.6 + (5_100_000 - north_m) / 6800)
    days_back = (date(2023, 8, 18) - day).days
    absolute = (42590 if one.platform == "S2A" else 33681) - round(days_back * 14.3)
    old = float(processing.baseline) < 4
    made = datatake + (timedelta(hours=4, minutes=7) if old else timedelta(days=561, hours=6, minutes=3))
    west_m = params.west_m + 10 * cut.col
    edge = one.acquisition.swath_west_m
    if edge is not None:
        edge -= SWATH_LEAN * 10 * cut.row
    return SceneFacts(
        tile=cut.tile, epsg=params.epsg, west_m=west_m, north_m=north_m, shape=(cut.height, cut.width),
        sensed=datatake + along, datatake=datatake, platform=one.platform, relative_orbit=one.relative_orbit,
        absolute_orbit=absolute, baseline=processing.baseline, sequence=processing.sequence, processed=made,
        boa_offset_applied=processing.boa_offset_applied, offset=0 if old else -0.1,
        sun_azimuth_deg=seen.sun_azimuth_deg, sun_elevation_deg=seen.sun_elevation_deg,
        footprint=footprint(
            west_m=west_m, north_m=north_m, shape=(cut.height, cut.width), edge_west_m=edge, lean=SWATH_LEAN
        ),
    )  # fmt: skip


def _write_scene(
    out: Path, facts: SceneFacts, cut: Cut, seen: Observation, processing: Processing, block_px: int, run: Any
) -> dict[str, Any]:
    """COGs of one scene and its item, which is returned with hrefs relative to ``out``."""
    folder = out / facts.prefix
    folder.mkdir(parents=True, exist_ok=True)
    gain = np.float32(REPROCESSED_GAIN if float(processing.baseline) >= 4 else 1.0)
    layers: dict[str, NDArray[Any]] = {"scl": _window(seen.scl, cut, 2)}
    for band, values in seen.reflectance.items():
        values = _window(values, cut, 1 if values.shape == seen.cloud.shape else 2)
        layers[band] = to_dn(values * gain, processing.dn_shift)

    def write(name: str) -> None:
        metres = 10 * cut.height // layers[name].shape[0]
        write_cog(
            folder / FILES[name], layers[name], west_m=facts.west_m, north_m=facts.north_m, epsg=facts.epsg,
            pixel_m=metres, block_px=max(128, block_px * 10 // metres), classes=name == "scl",
        )  # fmt: skip

    list(run(write, layers))
    hrefs = {name: f"./{facts.prefix}/{FILES[name]}" for name in layers}
    return item(facts, scl=layers["scl"], hrefs=hrefs)


def _window(values: NDArray[Any], cut: Cut, step: int) -> NDArray[Any]:
    rows = slice(cut.row // step, (cut.row + cut.height) // step)
    return values[rows, cut.col // step : (cut.col + cut.width) // step]


def to_dn(reflectance: NDArray[np.float32], shift: int) -> NDArray[np.uint16]:
    """Digital numbers as ESA codes them: ``round(reflectance * 10000) + shift``, 1..65535, 0 where NaN."""
    scaled = np.rint(reflectance * np.float32(1e4)) + np.float32(shift)
    return np.where(np.isnan(scaled), 0, np.clip(scaled, 1, 65535)).astype(np.uint16)


def write_cog(
    path: Path,
    values: NDArray[Any],
    *,
    west_m: float,
    north_m: float,
    epsg: int,
    pixel_m: int,
    block_px: int,
    classes: bool = False,
) -> None:
    """Write (H, W) as a COG as Earth Search has them: deflate with predictor 2, overviews, nodata 0."""
    method = Resampling.nearest if classes else Resampling.average
    with rasterio.open(
        path, "w", driver="COG", width=values.shape[1], height=values.shape[0], count=1, dtype=values.dtype,
        crs=f"EPSG:{epsg}", transform=from_origin(west_m, north_m, pixel_m, pixel_m), nodata=0,
        blocksize=block_px, compress="deflate", predictor=2, overview_predictor=2,
        overview_resampling=method.name,
    ) as sink:  # fmt: skip
        sink.write(values, 1)
