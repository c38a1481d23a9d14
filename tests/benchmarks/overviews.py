"""What do overviews cost a job? The same job without and with them, in turns; ratios of time and of bytes on disk.

    uv run cloudgate demo --out demo
    uv run python tests/benchmarks/overviews.py demo/job.yaml [--runs 3] [--set method.name=median ...]

One cluster for all runs, scenes frozen by the first, so that only the jobs are compared.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from pipeline.cluster import connect
from pipeline.config import Job
from pipeline.jobfile import load_job
from pipeline.mosaic import build
from pipeline.request import resolve


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _with(job: Job, store: Path, *, overviews: bool) -> Job:
    return job.model_copy(
        update={"output": job.output.model_copy(update={"store": str(store), "overviews": overviews})}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    job = load_job(asked.job, overrides=asked.set)
    request, ratios = resolve(job), []
    with (
        tempfile.TemporaryDirectory() as folder,
        connect(job.cluster, memory_gb_per_worker=job.limits.memory_gb_per_worker) as client,
    ):
        wish = _with(job, Path(folder) / "warm.zarr", overviews=True)
        build(job=wish, client=client, request=replace(request, job=wish))
        for number in range(asked.runs):
            seconds, sizes = {}, {}
            for overviews in (False, True):
                store = Path(folder) / f"{number}-{overviews}.zarr"
                began = time.perf_counter()
                wish = _with(job, store, overviews=overviews)
                build(job=wish, client=client, request=replace(request, job=wish))
                seconds[overviews], sizes[overviews] = time.perf_counter() - began, _bytes(store)
                shutil.rmtree(store)
            ratios.append((seconds[True] / seconds[False], sizes[True] / sizes[False]))
            print(f"{seconds[False]:.1f} s without, {seconds[True]:.1f} s with: x {ratios[-1][0]:.2f}", flush=True)
    time_ratio, size_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"median: time x {time_ratio:.2f}, size x {size_ratio:.3f}")


if __name__ == "__main__":
    main()
