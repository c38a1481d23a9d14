"""What a job will take: in come a recipe and limits, out come tasks that fit the workers' memory, and a plan to read.

A task is a rectangle of whole shards; it streams sub-blocks whose side is chosen so that a worker stays under its
limit. Re-cutting never changes a pixel.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from pipeline import learned
from pipeline.block import has_uncertainty
from pipeline.config import LEARNED, Job
from pipeline.errors import ConfigError
from pipeline.frozen import SearchResult
from pipeline.grid import Grid
from pipeline.items import Acquisition, Item, day_text
from pipeline.periods import Period
from pipeline.recipe import Recipe
from pipeline.scout import Scouted
from pipeline.tables import columns_html, table_html
from pipeline.tasks import Task

WORKER_BASE_BYTES: Final = 420e6
"""Resident size of a worker with all libraries loaded, before any pixel (measured 300 to 400 MB)."""
USABLE: Final = 0.85
"""Part of the limit that the plan fills; the rest is for the allocator and GDAL's cache."""
OPEN_FILE_BYTES: Final = 2.6e6
"""An open file holds a decoded block of 1024 x 1024 px of uint16 and its index."""
OPEN_SHARE: Final = 0.1
"""Part of the limit that files kept open between reads may take."""
TASK_PX: Final = 2048
"""Shards smaller than this are taken together into one task of about this side."""
WIDEST: Final = 4
"""Tasks are made wider, up to so many times, while every worker has one: fewer edges are read twice."""
CUTS_PX: Final = (
    (2048, 2048),
    (2048, 1024),
    (1024, 1024),
    (1024, 512),
    (512, 512),
    (512, 256),
    (256, 256),
    (256, 128),
    (128, 128),
)
"""Sub-blocks, best first; methods that do not look around need none above 1024."""
FILE_BLOCK_PX: Final = 1024
"""Side of the blocks that Sentinel-2 COGs come in."""
SMALL_PX: Final = 512
"""With smaller sub-blocks a task takes many minutes, as each decodes blocks of the files: it is not made wider. Nor are
tasks made smaller than this for the sake of idle workers."""
WAITING: Final = 1.5
"""What a task takes more where reading and composing take turns: assumed, between 1 (busy cores) and 2."""
STREAMING: Final = frozenset({"mean", "linear", "nearest", "decay"})
"""Methods that aggregate over time: a worker's memory must not follow the dates, however roomy the limit is."""
STREAMING_GB: Final = (1.0, 0.2)
"""What they take of the limit at most, and what more per band: so that with up to 60 dates no block of the source files
need be decoded twice."""


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


def block_bytes(recipe: Recipe, task_cols: int) -> float:
    """Peak bytes of one sub-block: its looks, the next one's if read ahead, the strip's masks, the method's scratch."""
    looks, bands, cut_px = len(recipe.acquisitions), len(recipe.bands), recipe.cut_px
    pixels = (cut_px[0] + 2 * recipe.halo) * (min(cut_px[1], task_cols) + 2 * recipe.halo)
    around = 2 * (recipe.halo + recipe.mask_halo)
    cells = (cut_px[0] + around) * (task_cols + around) / recipe.factor**2
    per_pixel: float = looks * bands * 2 * (2 if recipe.ahead else 1) + looks * 3 + 40
    if recipe.method.name == "regression" or recipe.method.name in LEARNED:
        per_pixel += looks * 4 + min(looks, 33) * (min(bands, 4) * 2 + 1) + 80 + bands * 4
    elif recipe.method.name == "kalman":
        # each pixel's own mean, and the states of both filters at every sixteenth pixel
        per_pixel += bands * 6 + looks * (2 * bands + 3) * 4 / 16 + 24
    fixed = 0.0
    if recipe.method.name in LEARNED:
        scratch, fixed = learned.scratch_bytes(recipe.method, looks, bands)
        per_pixel += scratch
        fixed += learned.kept_bytes(recipe.method, (cut_px[0], task_cols), bands)
    if recipe.method.name == "geomedian":
        per_pixel += looks * bands * 4
    if recipe.method.name == "medoid":
        per_pixel += looks * 4
    if recipe.mask_model:
        cells *= 1 + 2 * bands / max(looks, 1)  # a detector reads all bands of a few scenes at a time
    return pixels * per_pixel + cells * looks * 3 + fixed


def task_bytes(recipe: Recipe, rows: int, cols: int) -> float:
    """Bytes of the finished layers a task holds until it writes them."""
    per_pixel = len(recipe.bands) * (4 if has_uncertainty(recipe.method) else 2) + 8
    return float(rows * cols * per_pixel)


def open_files(limit_gb: float) -> int:
    """How many files a worker keeps open between reads: opening again is cheap beside running out of memory."""
    return int(min(max(limit_gb * 1e9 * OPEN_SHARE / OPEN_FILE_BYTES, 32), 400))


def peak_bytes(recipe: Recipe, shape: tuple[int, int]) -> float:
    """Peak resident bytes of a worker with tasks of ``shape`` (rows, columns)."""
    scenes = sum(len(acquisition.items) for acquisition in recipe.acquisitions)
    files = min(recipe.open_files, scenes * (len(recipe.bands) + 1)) * OPEN_FILE_BYTES
    polygon = 0 if recipe.inside is None else recipe.inside.nbytes
    return WORKER_BASE_BYTES + files + polygon + block_bytes(recipe, shape[1]) + task_bytes(recipe, *shape)


def choose_cut(recipe: Recipe, shape: tuple[int, int], limit_gb: float) -> Recipe | None:
    """The recipe with the sub-block that fits the limit and reads least again, None if none fits.

    Where the method does not look around, reading ahead is given up before a block of the source files is cut, and so
    decoded twice. Elsewhere blocks at every edge are decoded twice, and it is given up where that makes the sub-block
    so much larger that it pays.
    """
    fitting = [
        cutting
        for cut in (CUTS_PX if recipe.halo else CUTS_PX[2:])
        for ahead in (True, False)
        if peak_bytes(cutting := replace(recipe, cut_px=cut, ahead=ahead), shape) <= limit_gb * 1e9 * USABLE
    ]
    return min(fitting, key=_decoded_again, default=None) if recipe.halo else next(iter(fitting), None)


def _decoded_again(recipe: Recipe) -> float:
    """How often the sub-blocks of a large area make a block of the files be decoded, with what waiting is worth."""
    rows, cols = recipe.cut_px  # columns of the halo are taken from the neighbour, rows are read again
    blocks = (1 + (rows + 2 * recipe.halo) / FILE_BLOCK_PX) * (1 + cols / FILE_BLOCK_PX)
    return blocks * FILE_BLOCK_PX**2 / (rows * cols) * (1 if recipe.ahead else WAITING)


def layout(recipe: Recipe, job: Job) -> tuple[tuple[int, int], Recipe]:
    """(shards of a task as rows and columns, recipe with its sub-blocks) that fit the memory of a worker.

    Raises:
        ConfigError: if the limit cannot hold any sub-block.
    """
    grid, limit = recipe.grid, job.limits.memory_gb_per_worker
    found = None
    if recipe.method.name in STREAMING:
        found = _fit(recipe, job, min(limit, STREAMING_GB[0] + STREAMING_GB[1] * len(recipe.bands)))
    found = found or _fit(recipe, job, limit)
    if found is None:
        rows, cols = (n * grid.shard_px for n in _least_shards(grid, job.cluster.workers))
        least = replace(recipe, cut_px=CUTS_PX[-1], ahead=False, open_files=open_files(limit))
        needed = peak_bytes(least, (rows, cols)) / USABLE / 1e9
        raise ConfigError(
            f"limits.memory_gb_per_worker: {limit} GB cannot hold {len(recipe.acquisitions)} acquisitions x "
            f"{len(recipe.bands)} bands with shards of {grid.shard_px} px, about {needed:.1f} GB are needed; raise it, "
            "or lower grid.shard_px"
        )
    return found


def _fit(recipe: Recipe, job: Job, limit_gb: float) -> tuple[tuple[int, int], Recipe] | None:
    """The widest tasks with the largest sub-blocks in so much memory, None if nothing fits."""
    grid = recipe.grid
    recipe = replace(recipe, open_files=open_files(limit_gb))
    least = _least_shards(grid, job.cluster.workers)
    best = None
    for wide in (1, 2, WIDEST):
        shards = (least[0], min(least[1] * wide, math.ceil(grid.width / grid.shard_px)))
        tasks = _tasks(grid, shards)
        if best and (tasks < job.cluster.workers or (tasks < 4 * job.cluster.workers and tasks % job.cluster.workers)):
            break
        if best and recipe.halo and min(best[1].cut_px) < SMALL_PX:
            break
        cutting = choose_cut(recipe, (shards[0] * grid.shard_px, shards[1] * grid.shard_px), limit_gb)
        if cutting is None or (best and (cutting.cut_px, cutting.ahead) < (best[1].cut_px, best[1].ahead)):
            break
        best = shards, cutting
    return best


def _least_shards(grid: Grid, workers: int) -> tuple[int, int]:
    """(rows, columns) of a task in shards: about ``TASK_PX``, smaller, to ``SMALL_PX``, where workers would be idle."""
    group = max(1, TASK_PX // grid.shard_px)
    rows, cols = (min(group, math.ceil(size / grid.shard_px)) for size in grid.shape)
    least = max(1, SMALL_PX // grid.shard_px)
    while _tasks(grid, (rows, cols)) < workers and max(rows, cols) >= 2 * least:
        if rows >= cols:  # wide tasks have fewer edges within a strip
            rows = math.ceil(rows / 2)
        else:
            cols = math.ceil(cols / 2)
    return rows, cols


def _tasks(grid: Grid, shards: tuple[int, int]) -> int:
    """How many tasks of so many shards cover the grid."""
    return math.prod(math.ceil(size / (grid.shard_px * n)) for size, n in zip(grid.shape, shards, strict=True))


def plan_tasks(recipe: Recipe, job: Job, done: Collection[tuple[int, int]] = ()) -> tuple[Recipe, list[Task]]:
    """Cut the grid into tasks that fit the memory, leaving out those whose shards are all done.

    Returns:
        The recipe with its sub-block chosen, and the tasks, row by row.

    Raises:
        ConfigError: if the limit cannot hold any sub-block.
    """
    shards, recipe = layout(recipe, job)
    finished = set(done)
    tasks = [task for task in all_tasks(recipe.grid, shards) if not finished.issuperset(task.shards)]
    return recipe, tasks


def all_tasks(grid: Grid, group: tuple[int, int]) -> list[Task]:
    """Rectangles of ``group`` (rows, columns) shards, row by row; the last of a row or column may be smaller."""
    rows, cols = math.ceil(grid.height / grid.shard_px), math.ceil(grid.width / grid.shard_px)
    side = grid.shard_px
    return [
        Task(
            (i * side, min((i + group[0]) * side, grid.height)),
            (j * side, min((j + group[1]) * side, grid.width)),
            tuple((a, b) for a in range(i, min(i + group[0], rows)) for b in range(j, min(j + group[1], cols))),
        )
        for i in range(0, rows, group[0])
        for j in range(0, cols, group[1])
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
        estimate: how long it will take (``calibration.estimate``); None where that was not asked for.
    """

    grid: Grid
    source: str
    profile: str
    dropped: list[tuple[str, str]]
    periods: list[dict[str, Any]] = field(default_factory=list)
    estimate: dict[str, Any] | None = None

    def _repr_html_(self) -> str:
        """For notebooks: where from, the grid, and a line for each period."""
        names = {
            "acquisitions": "acquisitions",
            "scenes": "scenes",
            "tasks": "tasks",
            "decoded_gb": "decoded (GB)",
            "peak_memory_gb": "peak memory (GB)",
            "anchors": "anchors",
        }
        shown = {key: label for key, label in names.items() if any(key in period for period in self.periods)}
        rows = [(f"{p['start']} to {p['end']}", p["target"], *(p.get(key, "") for key in shown)) for p in self.periods]
        where = table_html("Plan", {"scenes from": self.source, "profile": self.profile, "left out": len(self.dropped)})
        return where + self.grid._repr_html_() + columns_html("Periods", ["looks of", "shows", *shown.values()], rows)

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
            shards, recipe = layout(recipe, job)
            shape = (shards[0] * self.grid.shard_px, shards[1] * self.grid.shard_px)
            pixels = self.grid.height * self.grid.width * len(acquisitions)
            entry |= {
                "shards": _tasks(self.grid, (1, 1)),
                "tasks": _tasks(self.grid, shards),
                "sub_block_px": list(recipe.cut_px),
                "decoded_gb": round(pixels * (2 * len(recipe.bands) + 1 / recipe.factor**2) / 1e9, 3),
                "peak_memory_gb": round(peak_bytes(recipe, shape) / 1e9, 2),
            }
        if seen is not None:
            entry["layers"] = [dict(layer.__dict__) for layer in seen.layers]
            entry["offsets"] = {key: {"dn": dn, "why": why} for key, (dn, why) in seen.offsets.items()}
            if seen.anchors is not None:
                entry["anchors"] = [
                    acquisitions[layer].id if layer >= 0 else "interpolation" for layer in seen.anchors.layers
                ]
        self.periods.append(entry)
