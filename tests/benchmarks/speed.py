"""How fast is the job against a bare read, and against what a user would write instead? All side by side in one run.

    uv run python tests/benchmarks/speed.py CACHE_FOLDER [--runs 5] [--peers 1] [--methods M,M] [--grids aligned]

Scenes: 12 dates of blue, green, red, nir and SCL as simulated COGs (blocks of 1024 px), 5120 x 5120 px; the area is
4096 x 4096 px, aligned with the blocks and shifted by 300 px; from disk, and over loopback HTTP with 30 ms latency.
The floor is a bare threaded rasterio read that touches each needed block once: 2 threads on disk, over HTTP the best
of 2, 8 and 16. Ours reads, masks, grows, checks in time, composes and writes all layers: from the first task
submitted, workers warm, 2 worker processes. Peers: odc-stac or stackstac with SCL masking and xarray's median, written
to Zarr on the same two workers, without growth, check or layers.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import rasterio
from rasterio.windows import Window
from speed_data import BLOCK_PX, EPSG, NORTH_M, WEST_M, area_px, speed_scenes

from pipeline.cluster import connect
from pipeline.config import Cluster, Job
from pipeline.grid import Grid
from pipeline.handles import DEFAULTS
from pipeline.jobfile import job_from_dict
from pipeline.planning import plan_tasks
from pipeline.records import RunFolder
from pipeline.request import Request, acquisitions_of, recipe_of, resolve, survey
from pipeline.runner import RunContext, run_tasks
from pipeline.scenes import served_items
from pipeline.serve import RangeServer

BANDS = ("blue", "green", "red", "nir")


def grid_of(*, shifted: bool) -> Grid:
    row, col, height, width = area_px(shifted=shifted)
    return Grid(f"EPSG:{EPSG}", 10.0, (0.0, 0.0), round(-NORTH_M / 10) + row, round(WEST_M / 10) + col, height, width)


def request_of(items: Path, method: str, *, shifted: bool, memory_gb: float = 4) -> Request:
    job = job_from_dict(
        {
            "catalog": str(items),
            "area": {"bbox": [15.02, 45.7, 15.4, 46.0]},
            "grid": {"crs": f"EPSG:{EPSG}"},
            "bands": list(BANDS),
            "time": {"start": "2021-01-01", "end": "2022-12-31"},
            "method": {"name": method},
            "limits": {"memory_gb_per_worker": memory_gb},
        }
    )
    return replace(resolve(job), grid=grid_of(shifted=shifted))


# -- the floor --------------------------------------------------------------------------------------------------


def needed_blocks(request: Request) -> list[tuple[str, Window]]:
    """Each block of each file that the area touches, once."""
    grid, out = request.grid, []
    for item in request.found.items:
        for name in (*BANDS, request.found.mask.asset):
            asset = item.assets[name]
            scale = round(asset.transform[0] / grid.resolution_m)
            block = BLOCK_PX // scale
            row = (
                round((asset.transform[5] - grid.top) / 10 / scale),
                round((grid.left - asset.transform[2]) / 10 / scale),
            )
            rows = range(row[0] // block, -(-(row[0] + grid.height // scale) // block))
            cols = range(row[1] // block, -(-(row[1] + grid.width // scale) // block))
            href = asset.href if "://" not in asset.href else f"/vsicurl/{asset.href}"
            out += [(href, Window(c * block, r * block, block, block)) for r in rows for c in cols]
    return out


def bare_read(request: Request, threads: int) -> float:
    """Seconds to read every needed block once with plain rasterio; a file's blocks stay with one thread."""
    files: dict[str, list[Window]] = defaultdict(list)
    for href, window in needed_blocks(request):
        files[href].append(window)
    work: SimpleQueue[tuple[str, list[Window]]] = SimpleQueue()
    for pair in files.items():
        work.put(pair)

    def reader() -> None:
        with rasterio.Env(**DEFAULTS):
            while True:
                try:
                    href, windows = work.get_nowait()
                except Empty:
                    return
                with rasterio.open(href) as source:
                    for window in windows:
                        source.read(1, window=window)

    began = time.perf_counter()
    pool = [threading.Thread(target=reader) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return time.perf_counter() - began


# -- ours -------------------------------------------------------------------------------------------------------


class Ours:
    """One method on one area; scouted before, timed from the first task submitted to the last layer written."""

    def __init__(self, request: Request, client: Any, folder: Path) -> None:
        self.request, self.client, self.folder = request, client, folder
        period = request.schedule[0]
        acquisitions = acquisitions_of(request, period)
        period = replace(period, target=acquisitions[len(acquisitions) // 2].day)
        self.recipe = recipe_of(request, period, acquisitions, survey(request, period, acquisitions))

    def run(self) -> float:
        store = Path(tempfile.mkdtemp(dir=self.folder)) / "ours.zarr"
        job: Job = self.request.job
        recipe, tasks = plan_tasks(self.recipe, job)
        began = time.perf_counter()
        run_tasks(recipe, tasks, 0, RunContext(store, RunFolder(store), lambda: self.client))
        seconds = time.perf_counter() - began
        shutil.rmtree(store.parent)
        return seconds


# -- peers ------------------------------------------------------------------------------------------------------


def peer_odc_threads(request: Request, client: Any, folder: Path) -> float:
    """Without a cluster, as a script would: Dask's threads."""
    del client
    return peer_odc(request, None, folder)


def peer_odc(request: Request, client: Any, folder: Path) -> float:
    import odc.stac
    import pystac

    items = [pystac.Item.from_dict(feature) for feature in _features(request)]
    began = time.perf_counter()
    with client.as_current() if client else nullcontext():
        cube = odc.stac.load(
            items,
            bands=[*BANDS, "scl"],
            geobox=request.grid.geobox,
            chunks={"x": 1024, "y": 1024},
            groupby="solar_day",
            dtype="uint16",
            nodata=0,
        )
        _median_to_zarr(cube[list(BANDS)].to_dataarray("band"), cube["scl"], folder)
    return time.perf_counter() - began


def peer_stackstac(request: Request, client: Any, folder: Path) -> float:
    import numpy as np
    import stackstac

    began = time.perf_counter()
    with client.as_current():
        cube = stackstac.stack(
            _features(request),
            assets=[*BANDS, "scl"],
            epsg=EPSG,
            bounds=request.grid.bounds,
            resolution=10,
            rescale=False,
            dtype="uint16",
            fill_value=np.uint16(0),
            snap_bounds=False,
            chunksize=1024,
        )
        cube = cube.drop_vars([name for name in cube.coords if name not in cube.dims])
        _median_to_zarr(cube.sel(band=list(BANDS)), cube.sel(band="scl"), folder)
    return time.perf_counter() - began


def _features(request: Request) -> list[dict[str, Any]]:
    served = {item.id: item for item in request.found.items}
    features = json.loads(Path(request.job.catalog).read_text())["features"]
    out = []
    for feature in features:
        if feature["id"] in served:
            for name in (*BANDS, "scl"):
                feature["assets"][name]["href"] = served[feature["id"]].assets[name].href
            out.append(feature)
    return out


def _median_to_zarr(bands: Any, scl: Any, folder: Path) -> None:
    clear = ~scl.isin([0, 1, 3, 8, 9, 10])
    made = bands.where(clear & (bands > 0)).chunk(time=-1).median("time", skipna=True)
    made.attrs.clear()
    made.to_dataset(name="median").to_zarr(Path(tempfile.mkdtemp(dir=folder)) / "peer.zarr", consolidated=False)


# -- the table --------------------------------------------------------------------------------------------------


PEERS = (("odc-stac", peer_odc), ("odc-stac, threads", peer_odc_threads), ("stackstac", peer_stackstac))


def alternate(candidates: dict[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Median seconds of each candidate over alternating runs, after one run that does not count."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(runs + 1):
        for name, work in candidates.items():
            taken = work()
            if number:
                seconds[name].append(taken)
    for name, values in seconds.items():
        print(f"  {name}: " + " ".join(f"{v:.2f}" for v in values), flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", type=int, default=1, help="runs of each peer (a minute each); 0 leaves them out")
    parser.add_argument("--methods", default="median,regression")
    parser.add_argument("--sources", default="disk,http")
    parser.add_argument("--grids", default="aligned,shifted", help="how the area lies on the files' blocks")
    given = parser.parse_args()
    items = speed_scenes(given.cache)
    methods = given.methods.split(",")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.cache)))
        client = stack.enter_context(connect(Cluster(workers=2), memory_gb_per_worker=8))
        server = stack.enter_context(RangeServer(items.parent, latency_s=0.03))
        served = folder / "items.json"
        served.write_text(json.dumps(served_items(items, server.url)))
        rows = []
        for source in given.sources.split(","):
            for grid in given.grids.split(","):
                shifted, where = grid == "shifted", f"{source}, {grid}"
                print(where, flush=True)
                catalog = items if source == "disk" else served
                request = request_of(catalog, "median", shifted=shifted)
                floors = {
                    f"floor {n}": partial(bare_read, request, n) for n in ((2,) if source == "disk" else (2, 8, 16))
                }
                ours = {name: Ours(request_of(catalog, name, shifted=shifted), client, folder).run for name in methods}
                got = alternate({**floors, **ours}, given.runs)
                floor = min(value for name, value in got.items() if name.startswith("floor"))
                row = {"where": where, "floor": floor, **{name: got[name] for name in methods}}
                if given.peers and not shifted:
                    for name, peer in PEERS:
                        row[name] = statistics.median(peer(request, client, folder) for _ in range(given.peers))
                        print(f"  {name}: {row[name]:.1f}", flush=True)
                rows.append(row)
    report(rows, methods)


def report(rows: list[dict[str, Any]], methods: list[str]) -> None:
    """Print seconds and ratios."""
    print(
        "\n| source, grid | floor (s) |"
        + "".join(f" {m} (s) | x floor |" for m in methods)
        + "".join(f" {name} (s) |" for name, _ in PEERS)
        + " odc-stac / median |"
    )
    print("|---|---|" + "---|---|" * len(methods) + "---|---|---|")
    for row in rows:
        cells = "".join(f" {row[m]:.2f} | {row[m] / row['floor']:.2f} |" for m in methods)
        peers = " | ".join(f"{row[p]:.1f}" if p in row else "-" for p, _ in PEERS)
        factor = f"{row['odc-stac'] / row['median']:.1f}" if "odc-stac" in row and "median" in row else "-"
        print(f"| {row['where']} | {row['floor']:.2f} |{cells} {peers} | {factor} |")
    if "regression" in methods and "median" in methods:
        for row in rows:
            print(f"regression / median, {row['where']}: {row['regression'] / row['median']:.2f}")


if __name__ == "__main__":
    main()
