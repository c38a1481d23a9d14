"""Scenes with their truth: in comes a seed, out come COGs, Earth Search items and the truth, of the demo or one tile.

The demo region lies on the real lattices of MGRS tiles 33TWL and 33TWM (EPSG:32633), cut small around their
real overlap, in the summer of 2021: harvest, growing maize, a flood in July. Its items stand on both sides of
processing baseline 04.00, because Collection-1 reprocessing (05.00) replaced some products of 2021 and left
others at 03.00 and 03.01. Their offset metadata contradict each other in the ways known from the real one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.bands import to_codes
from pipeline.errors import ConfigError
from pipeline.grid import Grid
from pipeline.phenology import SIM_BANDS, SceneParams
from pipeline.scene_files import (
    EPOCH,
    HARMONISED,
    HOLDS_OFFSET,
    NEWER,
    OLD,
    SHIFTED_UNTOLD,
    Cut,
    Pass,
    served_items,
    write_cog,
    write_region,
    write_scenes,
)
from pipeline.simulate import Region
from pipeline.skies import Acquisition
from pipeline.tiles import TILE_M, tile_origin

__all__ = [
    "DemoScenes",
    "demo_passes",
    "demo_region",
    "job_fields",
    "served_items",
    "write_demo",
    "write_scenes",
    "write_tile",
]

STATE_CLEAR, STATE_CLOUD, STATE_SHADOW, STATE_NODATA = 0, 1, 2, 255


@dataclass(frozen=True)
class DemoScenes:
    """What ``write_demo`` or ``write_tile`` left on disk.

    Attributes:
        root: the folder.
        items: path of the ItemCollection with hrefs relative to it; needs no server.
        truth: folder of the truth, see its ``truth.json``.
        bbox: (west, south, east, north) degrees of the area all tiles cover together.
        start, end, target: first and last acquisition and the date to compose for.
        bands: what was written.
        tiles: MGRS names.
        size_px: (height, width) of the whole area at 10 m; ``west_m``, ``north_m``, ``epsg`` place it.
        n_items: number of items.
    """

    root: Path
    items: Path
    truth: Path
    bbox: tuple[float, float, float, float]
    start: date
    end: date
    target: date
    bands: tuple[str, ...]
    tiles: tuple[str, ...]
    size_px: tuple[int, int]
    west_m: float
    north_m: float
    epsg: int
    n_items: int


DEMO_TARGET: Final = date(2021, 7, 11)
DEMO_CUTS: Final = (Cut("33TWM", 0, 0, 512, 768), Cut("33TWL", 400, 0, 512, 768))
DEMO_PARAMS: Final = SceneParams(
    west_m=499980.0,
    north_m=5104000.0,  # row 9602 of 33TWM; row 400 of the region is the top of 33TWL, 5100000
    width_px=768,
    height_px=912,
    flood_day=(date(2021, 7, 16) - EPOCH).days,
    gain_drift_sigma=0.035,  # fair summer weather; the default stands for a whole year with its undetected haze
)
_SWATH: Final = 502_400.0

# date, platform, relative orbit, cloud fraction, haze, products. Orbit 079's western swath edge crosses the
# region.
_DEMO: Final = (
    ("2021-06-11", "S2B", 79, 0.08, 0.006, (OLD,)),
    ("2021-06-16", "S2A", 79, 0.45, 0.012, (HARMONISED,)),
    ("2021-06-19", "S2A", 122, 0.04, 0.004, (OLD,)),
    ("2021-06-24", "S2B", 122, 0.97, 0.010, (HARMONISED,)),
    ("2021-06-29", "S2A", 122, 0.30, 0.030, (HOLDS_OFFSET,)),
    ("2021-07-04", "S2B", 122, 0.15, 0.005, (NEWER,)),
    ("2021-07-06", "S2A", 79, 0.55, 0.010, (NEWER,)),
    ("2021-07-09", "S2A", 122, 1.00, 0.010, (HARMONISED,)),  # white, and SCL calls it clear
    ("2021-07-11", "S2B", 79, 0.35, 0.006, (NEWER, replace(HARMONISED, tiles=("33TWM",)))),
    ("2021-07-14", "S2B", 122, 0.25, 0.007, (SHIFTED_UNTOLD,)),
    ("2021-07-16", "S2A", 79, 0.20, 0.005, (HARMONISED,)),
    ("2021-07-19", "S2A", 122, 0.60, 0.025, (NEWER,)),
    ("2021-07-26", "S2A", 79, 0.06, 0.005, (HARMONISED,)),
    ("2021-08-03", "S2B", 122, 0.30, 0.008, (HARMONISED,)),
    ("2021-08-05", "S2A", 79, 0.22, 0.006, (NEWER,)),
    ("2021-08-08", "S2A", 122, 0.05, 0.004, (HARMONISED,)),
)


def demo_passes() -> tuple[Pass, ...]:
    """The sixteen passes of the demo, 2021-06-11 to 2021-08-08."""
    passes = []
    for when, platform, orbit, cloud, haze, processings in _DEMO:
        acquisition = Acquisition(
            day=(date.fromisoformat(when) - EPOCH).days,
            cloud_fraction=cloud,
            haze=haze,
            swath_west_m=_SWATH if orbit == 79 else None,
            scl_blind=cloud == 1.0,
        )
        passes.append(Pass(acquisition, platform, orbit, processings))
    return tuple(passes)


def demo_region(seed: int = 0) -> Region:
    """The demo's region, from which every truth can be had again."""
    return Region(DEMO_PARAMS, seed, acquisitions=[each.acquisition for each in demo_passes()])


def write_demo(out: Path, *, seed: int = 0, bands: Sequence[str] = SIM_BANDS, threads: int = 2) -> DemoScenes:
    """Write the demo's scenes, items and truth under ``out``.

    Args:
        out: folder, made if missing; files of the same names are replaced.
        seed: of ``Region``; the same seed gives the same pixels.
        bands: of ``SIM_BANDS``.
        threads: for compression.
    """
    region, passes = demo_region(seed), demo_passes()
    items = write_region(region, passes, out, cuts=DEMO_CUTS, bands=bands, block_px=512, threads=threads)
    return _with_truth(region, items, bands, DEMO_TARGET, tuple(cut.tile for cut in DEMO_CUTS))


def write_tile(
    out: Path,
    *,
    size_px: int,
    dates: int,
    start: date,
    days: int,
    bands: Sequence[str] = ("blue", "green", "red", "nir"),
    tile: str = "33TWL",
    cloudiness: float = 0.4,
    seed: int = 0,
    block_px: int = 1024,
) -> DemoScenes:
    """Write the north-western corner of one MGRS tile: drawn passes as COGs with items and truth.

    Args:
        out: folder, made if missing; files of the same names are replaced.
        size_px: side in 10 m pixels; even, 64 to 10980.
        dates: number of passes.
        start: day of the first.
        days: length of the span; the last pass lies on its last day.
        bands: of ``SIM_BANDS``; SCL is always written.
        tile: its lattice and name.
        cloudiness: mean share of cloud, 0 to 1; single passes are mostly far clearer or far cloudier.
        seed: the same seed gives the same pixels.
        block_px: COG block of 10 m bands; those of 20 m have half of it.

    Raises:
        ConfigError: for what cannot be simulated.
    """
    if not 1 <= dates <= days:
        raise ConfigError(f"dates: {dates} passes do not fit in {days} days; at most one a day, at least one in all")
    if not 64 <= size_px <= TILE_M // 10:
        raise ConfigError(f"size_px: {size_px} is out of range; a tile has {TILE_M // 10}, at least 64 are needed")
    if block_px < 128 or block_px % 32:
        raise ConfigError(f"block_px: {block_px} must be a multiple of 32 from 128 up, such as 512 or 1024")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file; name a folder")
    epsg, west_m, north_m = tile_origin(tile)
    params = SceneParams(
        epsg=epsg,
        west_m=west_m,
        north_m=north_m,
        width_px=size_px,
        height_px=size_px,
        start_day=(start - EPOCH).days,
        n_dates=dates,
        revisit_days=(days - 1) / max(dates - 1, 1),
        cloud_fraction_mean=cloudiness,
    )
    name = tile.removeprefix("T").zfill(5)
    items = write_scenes(out, params=params, seed=seed, bands=bands, tile=name, block_px=block_px)
    region = Region(params, seed)
    middle = (params.start_day * 2 + days - 1) / 2
    target = min((a.day for a in region.acquisitions), key=lambda day: (abs(day - middle), day))
    return _with_truth(region, items, bands, EPOCH + timedelta(days=target), (name,))


def _with_truth(region: Region, items: Path, bands: Sequence[str], target: date, tiles: tuple[str, ...]) -> DemoScenes:
    """Write the truth beside the items, and say what there is."""
    params, truth = region.params, items.parent / "truth"
    collection = json.loads(items.read_text())["features"]
    west, south, east, north = np.array([feature["bbox"] for feature in collection]).T
    _write_truth(region, truth, bands=bands, target=target)
    return DemoScenes(
        root=items.parent,
        items=items,
        truth=truth,
        bbox=(float(west.min()), float(south.min()), float(east.max()), float(north.max())),
        start=EPOCH + timedelta(days=region.acquisitions[0].day),
        end=EPOCH + timedelta(days=region.acquisitions[-1].day),
        target=target,
        bands=tuple(bands),
        tiles=tiles,
        size_px=region.shape,
        west_m=params.west_m,
        north_m=params.north_m,
        epsg=params.epsg,
        n_items=len(collection),
    )


def _write_truth(region: Region, folder: Path, *, bands: Sequence[str], target: date) -> None:
    """Truth at the target date, the clear look of its pass, every pass's state, relief, and an index."""
    params, day = region.params, (target - EPOCH).days
    place = partial(write_cog, west_m=params.west_m, north_m=params.north_m, epsg=params.epsg, block_px=512)
    of_target = [k for k, acquisition in enumerate(region.acquisitions) if acquisition.day == day]
    clear = region.observe(of_target[0], bands, cloudy=False).reflectance if of_target else {}
    for name in ("surface", "clear_look", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for band in bands:
        for kind, values in (("surface", region.truth(day, band)), ("clear_look", clear.get(band))):
            if values is not None:
                metres = 10 * params.height_px // values.shape[0]
                codes = to_codes(values)
                place(folder / kind / f"{band}.tif", codes, pixel_m=metres)
    for index, acquisition in enumerate(region.acquisitions):
        seen = region.observe(index, ())
        choices = [STATE_NODATA, STATE_CLOUD, STATE_SHADOW]
        state = np.select([~seen.valid, seen.cloud, seen.shadow], choices, STATE_CLEAR)
        when = EPOCH + timedelta(days=acquisition.day)
        path = folder / "state" / f"{when}.tif"
        place(path, state.astype(np.uint8), pixel_m=10, classes=True)
    relief = np.rint(region.elevation() * 10).astype(np.uint16)
    place(folder / "elevation.tif", relief, pixel_m=10)
    notes = {
        "target": target.isoformat(),
        "seed": region.seed,
        "surface": "reflectance of the ground on the target date, uint16 (code - 1000) / 10000, 0 no data",
        "clear_look": "the pass of the target date without clouds and shadows, its gain, haze and noise kept",
        "state": "per pass: 0 clear, 1 cloud, 2 shadow, 255 outside the swath",
        "elevation": "decimetres above the sea",
    }
    (folder / "truth.json").write_text(json.dumps(notes, indent=1))


def job_fields(scenes: DemoScenes, folder: Path) -> dict[str, Any]:
    """A job that runs on these scenes, as a mapping; ``catalog`` is relative to ``folder``, where its file will lie."""
    return {
        "name": "demo",
        "catalog": scenes.items.relative_to(folder).as_posix(),
        "area": {"bbox": [round(v, 6) for v in _bbox(scenes)]},
        "grid": {"crs": f"EPSG:{scenes.epsg}", "resolution_m": 10, "shard_px": 512},
        "bands": list(scenes.bands),
        "time": {"start": scenes.start.isoformat(), "end": scenes.end.isoformat()},
        "target": scenes.target.isoformat(),
        "method": {"name": "regression"},
        "output": {"store": str(folder / "mosaic.zarr")},
        "cluster": {"kind": "local", "workers": 2},
    }


def _bbox(scenes: DemoScenes) -> tuple[float, float, float, float]:
    """Degrees of a box well inside the area both tiles cover together."""
    height, width = scenes.size_px
    grid = Grid(
        f"EPSG:{scenes.epsg}",
        10.0,
        (0.0, 0.0),
        -round(scenes.north_m / 10),
        round(scenes.west_m / 10),
        height,
        width,
    )
    return grid.padded(-12).lonlat_bounds()
