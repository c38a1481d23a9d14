"""How long a job of 10,000 tasks takes to plan. Run: uv run python tests/benchmarks/planning.py

In comes nothing, out come printed seconds: the plan of 100 x 100 shards of 2048 px, and of the same half done. The
aim is under 10 s.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import small_region

from pipeline.planning import all_tasks, layout, plan_tasks


def main() -> None:
    """Plan, and print."""
    with tempfile.TemporaryDirectory() as folder:
        small = small_region.write(Path(folder))
        job = small.job(method={"name": "regression"})
        _, _, recipe = small_region.recipe(job)
    recipe = replace(recipe, grid=replace(recipe.grid, height=100 * 2048, width=100 * 2048, shard_px=2048))
    began = time.perf_counter()
    tasks = all_tasks(recipe.grid, (1, 1))
    print(f"{len(tasks)} tasks of one shard: {time.perf_counter() - began:.3f} s")
    began = time.perf_counter()
    _, chosen = plan_tasks(recipe, job)
    shards = sum(len(task.shards) for task in chosen)
    took = time.perf_counter() - began
    print(f"plan of {shards} shards in {len(chosen)} tasks of {layout(recipe, job)[0]} shards: {took:.3f} s")
    done = {shard for task in tasks[::2] for shard in task.shards}
    began = time.perf_counter()
    _, left = plan_tasks(recipe, job, done=done)
    print(f"the same, {len(done)} shards done, {len(left)} tasks left: {time.perf_counter() - began:.3f} s")


if __name__ == "__main__":
    main()
