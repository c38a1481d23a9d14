"""Memory and time of the scout over a country. Run: uv run python tests/benchmarks/scout.py [--dates 30] [--side 10]

In comes nothing, out come printed figures: scenes of ``side`` x ``side`` tiles on so many dates, all showing the same
small rasters (300 m) of ground and classes, so that what is measured is what the scout holds, not the disk.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from pipeline.config import Method
from pipeline.grid import Grid
from pipeline.items import Asset, Item, group_acquisitions
from pipeline.mask import MaskParams
from pipeline.profiles import load_profile
from pipeline.scout import coarse_grid, scout
from pipeline.tasks import forget_peak, peak_bytes

SIDE_PX, SIZE_M, TILE_M = 366, 300.0, 109_800
CRS = "EPSG:32633"


def _raster(path: Path, values: np.ndarray) -> str:
    """Without a place of its own: the items say where it lies."""
    about = {"driver": "GTiff", "width": SIDE_PX, "height": SIDE_PX, "count": 1, "compress": "deflate"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", dtype=values.dtype.name, **about) as sink:
            sink.write(values, 1)
    return str(path)


def _item(number: int, day: int, row: int, col: int, hrefs: dict[str, str]) -> Item:
    place = (SIZE_M, 0.0, 300_000.0 + col * TILE_M, 0.0, -SIZE_M, 5_500_000.0 - row * TILE_M)
    assets = {name: Asset(href, CRS, (SIDE_PX, SIDE_PX), place) for name, href in hrefs.items()}
    when = np.datetime64("2023-01-01T10:00:00") + np.timedelta64(day, "D")
    tile, nowhere = f"{row:02d}{col:02d}", (0.0, 0.0, 1.0, 1.0)
    return Item(
        f"{number:06d}", f"{when}Z", "c", "sentinel-2a", tile, 79, None, "03.00", None, 5.0, None, nowhere, {}, assets
    )


def main() -> None:
    """Scout, and print."""
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dates", type=int, default=30)
    parser.add_argument("--side", type=int, default=10, help="tiles along a side")
    asked = parser.parse_args()
    draw, across = np.random.default_rng(0), asked.side * TILE_M
    with tempfile.TemporaryDirectory() as folder:
        blue = draw.integers(200, 900, (SIDE_PX, SIDE_PX)).astype(np.uint16)
        scl = np.where(draw.random(blue.shape) < 0.2, 9, 4).astype(np.uint8)
        hrefs = {name: _raster(Path(folder) / f"{name}.tif", values) for name, values in (("blue", blue), ("scl", scl))}
        places = [
            (day, row, col) for day in range(asked.dates) for row in range(asked.side) for col in range(asked.side)
        ]
        acquisitions = group_acquisitions([_item(n, *place, hrefs) for n, place in enumerate(places)], 15.0)
        grid = Grid(CRS, 10.0, (0.0, 0.0), -550_000, 30_000, across // 10, across // 10)
        profile = load_profile("earth-search")
        forget_peak()
        before, began = peak_bytes(), time.perf_counter()
        seen = scout(
            acquisitions=acquisitions,
            grid=grid,
            bands=("blue",),
            rule=profile.mask,
            params=MaskParams(),
            profile=profile,
            method=Method(name="median"),
            target=19400,
        )
        seconds, held = time.perf_counter() - began, peak_bytes() - before
    coarse, _ = coarse_grid(grid, 0)
    shares = {round(float(layer.clear_share), 3) for layer in seen.layers}
    print(
        f"{len(places)} scenes in {len(acquisitions)} acquisitions on {coarse.height} x {coarse.width} cells: "
        f"{held / 1e6:.0f} MB at the peak, {seconds:.1f} s (clear shares {sorted(shares)})"
    )


if __name__ == "__main__":
    main()
