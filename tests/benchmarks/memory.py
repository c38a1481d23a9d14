"""How much memory does a worker take? Peak resident size of one worker process, for limits of 2, 4 and 8 GB.

    uv run python tests/benchmarks/memory.py CACHE_FOLDER [--methods median,regression] [--looks 60] [--limits 2,4,8]

Scenes are those of the speed benchmark; for 60 dates and 10 bands the same files are used again under other names,
dates and band names, which takes as much memory as different ones would. One shard of 2048 px is made in a fresh worker
with one process; the limit is also the worker's own (a worker above it would be killed). Then 12 against 60 dates for
the methods that stream.
"""

import argparse
import resource
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from speed import request_of
from speed_data import speed_scenes

from pipeline.bands import BANDS
from pipeline.cluster import connect
from pipeline.config import Cluster
from pipeline.items import Asset, Item
from pipeline.planning import peak_bytes, plan_tasks
from pipeline.records import RunFolder
from pipeline.request import Request, acquisitions_of, recipe_of, survey
from pipeline.runner import RunContext, run_tasks

FOUR = ("blue", "green", "red", "nir")
TEN = tuple(name for name, band in BANDS.items() if band.resolution_m < 60)


def many(request: Request, looks: int, bands: tuple[str, ...], folder: Path) -> Request:
    """The request with so many looks, one a day, and these bands, from the same files under links in ``folder``."""
    items = []
    for number in range(looks):
        source = request.found.items[number % len(request.found.items)]
        when = request.found.items[0].when + timedelta(days=number)
        assets = {**source.assets, **{name: source.assets[FOUR[i % 4]] for i, name in enumerate(bands)}}
        assets = {name: _linked(assets[name], folder / f"{number:03d}-{name}.tif") for name in (*bands, "scl")}
        items.append(_renamed(source, f"{number:03d}", when.strftime("%Y-%m-%dT%H:%M:%SZ"), assets))
    job = request.job.model_copy(update={"bands": bands})
    return replace(request, job=job, found=replace(request.found, items=items))


def _linked(asset: Asset, link: Path) -> Asset:
    if not link.is_symlink():
        link.symlink_to(asset.href)
    return replace(asset, href=str(link))


def _renamed(item: Item, name: str, when: str, assets: dict) -> Item:
    return replace(item, id=name, datetime=when, assets=assets)


def peak_gb(request: Request, limit_gb: float) -> tuple[float, float]:
    """(planned, measured) peak of one worker in GB over the first task."""
    job = request.job.model_copy(
        update={"limits": request.job.limits.model_copy(update={"memory_gb_per_worker": limit_gb})}
    )
    period = request.schedule[0]
    acquisitions = acquisitions_of(request, period)
    period = replace(period, target=acquisitions[len(acquisitions) // 2].day)
    recipe = recipe_of(request, period, acquisitions, survey(request, period, acquisitions))
    recipe, tasks = plan_tasks(recipe, job)
    shape = (tasks[0].rows[1] - tasks[0].rows[0], tasks[0].cols[1] - tasks[0].cols[0])
    planned = peak_bytes(recipe, shape)
    with tempfile.TemporaryDirectory() as folder, connect(Cluster(workers=1), memory_gb_per_worker=limit_gb) as client:
        store = Path(folder) / "a.zarr"
        run_tasks(recipe, tasks[:1], 0, RunContext(store, RunFolder(store), lambda: client))
        (peak,) = client.run(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).values()
    return planned / 1e9, peak * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--methods", default="median,regression")
    parser.add_argument("--looks", type=int, default=60)
    parser.add_argument("--limits", default="2,4,8")
    parser.add_argument("--streaming", default="linear,mean")
    given = parser.parse_args()
    items = speed_scenes(given.cache)
    with tempfile.TemporaryDirectory() as links:

        def peak(method: str, looks: int, bands: tuple[str, ...], limit: float) -> tuple[float, float]:
            request = request_of(items, method, shifted=False)
            return peak_gb(many(request, looks, bands, Path(links)), limit)

        limits = [float(text) for text in given.limits.split(",")]
        print("| method | dates x bands | limit (GB) | planned (GB) | measured peak (GB) |\n|---|---|---|---|---|")
        for method in filter(None, given.methods.split(",")):
            for bands in (FOUR, TEN):
                for limit in limits:
                    planned, most = peak(method, given.looks, bands, limit)
                    name = f"{given.looks} x {len(bands)}"
                    print(f"| {method} | {name} | {limit:g} | {planned:.2f} | {most:.2f} |", flush=True)
        for method in filter(None, given.streaming.split(",")):
            for limit in limits:
                (_, few), (_, most) = (peak(method, looks, FOUR, limit) for looks in (12, 60))
                said = f"12 dates {few:.2f} GB, 60 dates {most:.2f} GB, ratio {most / few:.2f}"
                print(f"{method}, limit {limit:g} GB: {said}", flush=True)


if __name__ == "__main__":
    main()
