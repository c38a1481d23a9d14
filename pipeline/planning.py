"""What a job will take: in come a recipe and limits, out come tasks that fit the workers' memory, and a plan to read.

A task is a rectangle of whole shards; it streams sub-blocks whose side is chosen so that a worker stays under its
limit. Re-cutting never changes a pixel.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from pipeline.block import has_uncertainty
from pipeline.config import Job
from pipeline.errors import ConfigError
from pipeline.frozen import SearchResult
from pipeline.grid import Grid
from pipeline.items import Acquisition, Item, day_text
from pipeline.periods import Period
from pipeline.scout import Scouted
from pipeline.tasks import CUTS_PX, Recipe, Task

WORKER_BASE_BYTES: Final = 420e6
"""Resident size of a worker with all libraries loaded, before any pixel (measured 300 to 400 MB)."""
USABLE: Final = 0.85
"""Part of the limit that the plan fills; the rest is for the allocator and GDAL's cache."""
TASK_PX: Final = 2048
"""Shards smaller than this are taken together into one task of about this side."""


def cut_origin(grid: Grid, items: Sequence[Item], bands: Sequence[str]) -> tuple[int, int]:
    """(row, col) on the lattice where most source files in the grid's CRS begin; (0, 0) where none is."""
    votes: Counter[tuple[int, int]] = Counter()
    for item in items:
        asset = item.assets[bands[0]]
        if asset.crs == grid.crs:
            left = round((asset.transform[2] - grid.phase_m[0]) / grid.resolution_m)
            top = round((grid.phase_m[1] - asset.transform[5]) / grid.resolution_m)
            votes[(top, left)] += 1
    return min(votes, key=lambda key: (-votes[key], key)) if votes else (0, 0)


def block_bytes(recipe: Recipe, cut_px: int) -> float:
    """Peak bytes of one sub-block: looks, the next one's reads, masks, the method's scratch."""
    side = cut_px + 2 * recipe.halo
    looks, bands = len(recipe.acquisitions), len(recipe.bands)
    per_pixel = looks * bands * 2 * 2 + looks * 7 + 40
    if recipe.method.name == "regression":
        per_pixel += min(looks, 40) * min(bands, 4) * 5 + bands * 16
    if recipe.method.name == "geomedian":
        per_pixel += looks * bands * 4
    if recipe.method.name == "medoid":
        per_pixel += looks * 4
    return float(side * side * per_pixel)


def task_bytes(recipe: Recipe, rows: int, cols: int) -> float:
    """Bytes of the finished layers a task holds until it writes them."""
    per_pixel = len(recipe.bands) * (4 if has_uncertainty(recipe.method) else 2) + 8
    return float(rows * cols * per_pixel)


def peak_bytes(recipe: Recipe, cut_px: int, task_px: int) -> float:
    """Peak resident bytes of a worker."""
    return WORKER_BASE_BYTES + block_bytes(recipe, cut_px) + task_bytes(recipe, task_px, task_px)


def choose_cut(recipe: Recipe, task_px: int, limit_gb: float) -> int:
    """The largest sub-block that fits the limit.

    Raises:
        ConfigError: if not even the smallest does.
    """
    limit = limit_gb * 1e9 * USABLE
    preferred = [cut for cut in CUTS_PX if cut <= (2048 if recipe.halo else 1024)]
    for cut in preferred:
        if peak_bytes(recipe, cut, task_px) <= limit:
            return cut
    needed = peak_bytes(recipe, preferred[-1], task_px) / USABLE / 1e9
    raise ConfigError(
        f"limits.memory_gb_per_worker: {limit_gb} GB cannot hold {len(recipe.acquisitions)} acquisitions x "
        f"{len(recipe.bands)} bands with shards of {task_px} px, about {needed:.1f} GB are needed; raise it, or lower "
        "grid.shard_px"
    )


def shards_per_task(grid: Grid) -> int:
    """Side of a task in shards."""
    return max(1, TASK_PX // grid.shard_px)


def plan_tasks(recipe: Recipe, job: Job, done: Collection[tuple[int, int]] = ()) -> tuple[Recipe, list[Task]]:
    """Cut the grid into tasks that fit the memory, leaving out those whose shards are all done.

    Returns:
        The recipe with its sub-block chosen, and the tasks, row by row.

    Raises:
        ConfigError: if the limit cannot hold any sub-block.
    """
    grid = recipe.grid
    group = shards_per_task(grid)
    side = min(group * grid.shard_px, max(grid.shape))
    recipe = replace(recipe, cut_px=choose_cut(recipe, side, job.limits.memory_gb_per_worker))
    finished = set(done)
    return recipe, [t for t in all_tasks(grid, group) if not finished.issuperset(t.shards)]


def all_tasks(grid: Grid, group: int) -> list[Task]:
    """Rectangles of ``group`` x ``group`` shards, row by row; the last of a row or column may be smaller."""
    rows, cols = math.ceil(grid.height / grid.shard_px), math.ceil(grid.width / grid.shard_px)
    side = grid.shard_px
    return [
        Task(
            (i * side, min((i + group) * side, grid.height)),
            (j * side, min((j + group) * side, grid.width)),
            tuple((a, b) for a in range(i, min(i + group, rows)) for b in range(j, min(j + group, cols))),
        )
        for i in range(0, rows, group)
        for j in range(0, cols, group)
    ]


@dataclass
class Plan:
    """What a job would do.

    Attributes:
        grid: of the mosaic.
        source: where the scenes come from.
        profile: how the catalog speaks, and why.
        dropped: (item id, why).
        periods: per period: days, scenes, tasks, bytes, memory, and the scout's view.
    """

    grid: Grid
    source: str
    profile: str
    dropped: list[tuple[str, str]]
    periods: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, grid: Grid, found: SearchResult) -> Self:
        """An empty plan for a search."""
        return cls(grid, found.source, f"{found.profile.name}: {found.profile_why}", found.dropped)

    def add(
        self,
        period: Period,
        acquisitions: Sequence[Acquisition],
        recipe: Recipe | None,
        job: Job,
        seen: Scouted | None,
    ) -> None:
        """Reckon one period; ``recipe`` and ``seen`` are None where it has no scene or was not scouted."""
        entry: dict[str, Any] = {
            "slot": period.slot,
            "start": day_text(period.start),
            "end": day_text(period.end),
            "target": day_text(period.target),
            "acquisitions": len(acquisitions),
            "scenes": sum(len(a.items) for a in acquisitions),
        }
        if recipe is not None:
            group = shards_per_task(self.grid)
            side = min(group * self.grid.shard_px, max(self.grid.shape))
            cut = choose_cut(recipe, side, job.limits.memory_gb_per_worker)
            rows, cols = (math.ceil(n / self.grid.shard_px) for n in self.grid.shape)
            pixels = self.grid.height * self.grid.width * len(acquisitions)
            entry |= {
                "shards": rows * cols,
                "tasks": math.ceil(rows / group) * math.ceil(cols / group),
                "sub_block_px": cut,
                "decoded_gb": round(pixels * (2 * len(recipe.bands) + 1 / recipe.factor**2) / 1e9, 3),
                "peak_memory_gb": round(peak_bytes(recipe, cut, side) / 1e9, 2),
            }
        if seen is not None:
            entry["layers"] = [dict(layer.__dict__) for layer in seen.layers]
            entry["offsets"] = {key: {"dn": dn, "why": why} for key, (dn, why) in seen.offsets.items()}
            if seen.anchors is not None:
                entry["anchors"] = [
                    acquisitions[layer].id if layer >= 0 else "interpolation" for layer in seen.anchors.layers
                ]
        self.periods.append(entry)
