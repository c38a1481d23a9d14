"""The speed benchmark's scenes, made once: in comes a cache folder, out comes an ItemCollection of simulated COGs.

Twelve dates of four bands and SCL over 5120 x 5120 px: a job of 4096 x 4096 px fits in it aligned with the COG blocks
(1024 px, SCL 512 px) and shifted by 300 px, halo included. Nothing is mirrored or repeated, so that the pixels
compress and decode like real ones.

    python tests/benchmarks/speed_data.py CACHE_FOLDER
"""

import json
import shutil
import sys
import time
from pathlib import Path

from pipeline.phenology import SceneParams
from pipeline.scenes import write_scenes

SIZE_PX = 5120
BLOCK_PX = 1024
WEST_M, NORTH_M, EPSG = 499980.0, 5100000.0, 32633
PARAMS = SceneParams(epsg=EPSG, west_m=WEST_M, north_m=NORTH_M, width_px=SIZE_PX, height_px=SIZE_PX, n_dates=12)
SEED = 1


def speed_scenes(cache: Path, *, threads: int = 1) -> Path:
    """Path of ``items.json`` of the scenes under ``cache``, which are made when they are not there yet (minutes)."""
    folder = cache / f"speed-{SIZE_PX}px-{PARAMS.n_dates}dates-seed{SEED}"
    done = folder / "made.json"
    if not done.exists() or json.loads(done.read_text())["params"] != repr(PARAMS):
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.monotonic()
        write_scenes(folder, params=PARAMS, seed=SEED, block_px=BLOCK_PX, threads=threads)
        seconds = round(time.monotonic() - begin, 1)
        # written last: an interrupted run leaves no half-made scenes that look finished
        done.write_text(json.dumps({"params": repr(PARAMS), "seconds": seconds}))
    return folder / "items.json"


def area_px(*, shifted: bool, side_px: int = 4096) -> tuple[int, int, int, int]:
    """First row and column and height and width of the benchmark's area inside the scenes, in 10 m pixels."""
    start = 300 if shifted else 0
    return start, start, side_px, side_px


def main() -> None:
    items = speed_scenes(Path(sys.argv[1]))
    size = sum(path.stat().st_size for path in items.parent.rglob("*.tif"))
    made = json.loads((items.parent / "made.json").read_text())
    print(f"{items}: {size / 1e9:.2f} GB, made in {made['seconds']} s")


if __name__ == "__main__":
    main()
