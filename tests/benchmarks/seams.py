"""Does a mosaic show where two tiles meet? The jump across a tile's edge against the jumps beside it.

    uv run python tests/benchmarks/seams.py [--seeds 12] [--methods median,linear,regression]

Each seed is another simulated ground of 5.4 x 5.8 km under two overlapping tiles (the tests' region). Per method and
band: mean |difference| between the rows on both sides of an edge (the southern tile's first row, the northern's last),
divided by the mean over the rows 2 to 40 away; the sums run over both edges and all seeds. ``ground`` is the same for a
look without clouds: what the landscape itself has at these rows by chance, 1 for ever more seeds.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import to_reflectance
from pipeline.tasks import compose_window

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_region import BANDS, CUTS, SmallRegion, jump, recipe, write

METHODS = "median,linear,regression"


def jumps(region: SmallRegion, method: str) -> NDArray[np.float64]:
    """(edges, bands, [across the edge, inside]) of one method, or of the ground."""
    asked = recipe(region.job(method={"name": "median" if method == "ground" else method}))[2]
    top, left = asked.grid.row0 - region.grid.row0, asked.grid.col0 - region.grid.col0
    if method == "ground":
        look = region.region.observe(0, BANDS, cloudy=False).reflectance
        rows, cols = slice(top, top + asked.grid.height), slice(left, left + asked.grid.width)
        values = np.stack([look[band][rows, cols] for band in BANDS])
    else:
        values = to_reflectance(compose_window(asked, (0, asked.grid.height), (0, asked.grid.width)).codes)
    edges = (CUTS[1].row - top, CUTS[0].height - top)
    return np.array([[jump(band, edge, np.isfinite(band)) for band in values] for edge in edges])


def main() -> None:
    """Simulate, compose, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--methods", default=METHODS)
    asked = parser.parse_args()
    methods = ["ground", *asked.methods.split(",")]
    sums = {method: np.zeros((2, len(BANDS), 2)) for method in methods}
    print(f"jump across the edge / jump inside, {asked.seeds} seeds\n{'':12}" + "".join(f"{band:>8}" for band in BANDS))
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            region = write(Path(folder), seed)
            for method in methods:
                sums[method] += jumps(region, method)
    for method, both in sums.items():
        across, inside = both.sum(axis=0).T
        print(f"{method:12}" + "".join(f"{ratio:8.3f}" for ratio in across / inside))


if __name__ == "__main__":
    main()
