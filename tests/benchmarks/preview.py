"""How long does a preview of a huge store take, and how much memory? 20,000 x 20,000 px with overviews.

    uv run python tests/benchmarks/preview.py FOLDER [--side 20000]

The store is written here: real shards along a diagonal (a region's mosaic is seldom full), nothing elsewhere, and all
overviews of them. The preview then runs in a process of its own, measured from start to end, imports and all.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pipeline import store
from pipeline.grid import Grid
from pipeline.overviews import coarsen_shard, level_shards
from pipeline.periods import Period

BANDS = ("blue", "green", "red", "nir")


def write(path: Path, side: int) -> None:
    grid = Grid("EPSG:32633", 10.0, (0.0, 0.0), -520000, 50000, side, side)
    rng = np.random.default_rng(0)
    part = {band: rng.integers(1200, 4000, (2048, 2048)).astype(np.uint16) for band in BANDS}
    part |= {"clear_count": np.full((2048, 2048), 5, np.uint16), "flags": np.full((2048, 2048), 4, np.uint16)}
    part |= {"source_date": np.full((2048, 2048), 19005, np.int32)}
    for i, j in grid.shards():
        if abs(i - j) <= 1:
            rows, cols = ((k * 2048, min((k + 1) * 2048, side)) for k in (i, j))
            layers = {name: values[: rows[1] - rows[0], : cols[1] - cols[0]] for name, values in part.items()}
            store.write_region(path, grid, 0, rows, cols, layers)
    for level, shards in level_shards(grid):
        for shard in shards:
            coarsen_shard(path, grid, BANDS, False, 0, level, shard)
    period = {"start": "2022-01-08", "end": "2022-01-17", "target": "2022-01-13", "method": {"name": "median"}}
    about = {"layout": 1, "grid": grid.to_dict(), "periods": {"0": period}}
    store.publish(
        path,
        grid,
        BANDS,
        uncertainty=False,
        schedule=[Period(0, 19000, 19009, 19000, 19005)],
        published=[True],
        attrs={"title": "huge", "cloudgate": about},
        levels=len(grid.levels()) - 1,
    )


CODE = """
import resource, sys, time
began = time.perf_counter()
from pipeline.preview import preview
preview(store=sys.argv[1], out=sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
cpu = time.process_time()
print(f"{time.perf_counter() - began:.2f} s with imports, {cpu:.2f} s of processor, peak {peak:.2f} GB")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=20000)
    asked = parser.parse_args()
    path = asked.folder / "huge.zarr"
    shutil.rmtree(path, ignore_errors=True)
    began = time.perf_counter()
    write(path, asked.side)
    print(f"store of {asked.side} x {asked.side} px written in {time.perf_counter() - began:.0f} s")
    for _ in range(3):
        subprocess.run([sys.executable, "-c", CODE, str(path), str(asked.folder / "huge.png")], check=True)


if __name__ == "__main__":
    main()
