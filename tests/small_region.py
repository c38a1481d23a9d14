"""A small simulated region of two overlapping tiles, and jobs on it, for the tests of the main job."""

import itertools
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Job
from pipeline.grid import Grid
from pipeline.jobfile import job_from_dict
from pipeline.periods import periods
from pipeline.planning import plan_tasks
from pipeline.request import Request, acquisitions_of, recipe_of, resolve, survey
from pipeline.scene_files import Cut, write_region
from pipeline.scenes import DEMO_PARAMS, DEMO_TARGET, demo_passes
from pipeline.scout import Scouted
from pipeline.simulate import Region

BANDS = ("blue", "green", "red", "nir")
HEIGHT, WIDTH = 576, 544
NORTH_M = 5_102_400.0
CUTS = (Cut("33TWM", 0, 0, 352, WIDTH), Cut("33TWL", 240, 0, 336, WIDTH))
"""33TWL begins at row 240 of the region, as on the real lattice (5 100 000 m); 33TWM ends at row 352."""


@dataclass(frozen=True)
class SmallRegion:
    """Scenes on disk: 16 passes, 33 items, 4 bands and SCL, both sides of baseline 04.00."""

    folder: Path
    items: Path
    region: Region

    @property
    def grid(self) -> Grid:
        """The whole ground in 10 m pixels."""
        west = round(DEMO_PARAMS.west_m / 10)
        return Grid("EPSG:32633", 10.0, (0.0, 0.0), -round(NORTH_M / 10), west, HEIGHT, WIDTH)

    def bbox(self, rows: tuple[int, int], cols: tuple[int, int]) -> list[float]:
        """Degrees around a window of the region; the grid made of it covers at least the window."""
        return [round(v, 7) for v in self.grid.window(rows, cols).lonlat_bounds()]

    def fields(self, **changes: Any) -> dict[str, Any]:
        """A job as a mapping, most of the region by default; a change of None removes the field."""
        fields: dict[str, Any] = {
            "catalog": str(self.items),
            "area": {"bbox": self.bbox((8, HEIGHT - 8), (8, WIDTH - 8))},
            "grid": {"crs": "EPSG:32633", "shard_px": 512},
            "bands": list(BANDS),
            "time": {"start": "2021-06-11", "end": "2021-08-08"},
            "target": DEMO_TARGET.isoformat(),
            "method": {"name": "median"},
        } | changes
        return {name: value for name, value in fields.items() if value is not None}

    def job(self, store: Path | None = None, **changes: Any) -> Job:
        """A checked job."""
        if store:
            changes["output"] = {"store": str(store)}
        return job_from_dict(self.fields(**changes))

    def changed_items(self, path: Path, change: Any) -> Path:
        """A catalog beside this one with absolute hrefs, after ``change(features) -> features``."""
        features = json.loads(self.items.read_text())["features"]
        for feature in features:
            for asset in feature["assets"].values():
                if asset["href"].startswith("./"):
                    asset["href"] = str(self.folder / asset["href"])
        path.write_text(json.dumps({"type": "FeatureCollection", "features": change(features)}))
        return path


def write(folder: Path, seed: int = 0) -> SmallRegion:
    """Simulate and write the scenes (about 3 s)."""
    passes = demo_passes()
    params = replace(DEMO_PARAMS, width_px=WIDTH, height_px=HEIGHT, north_m=NORTH_M)
    region = Region(params, seed, acquisitions=[one.acquisition for one in passes])
    items = write_region(region, passes, folder, cuts=CUTS, bands=BANDS, block_px=256)
    return SmallRegion(folder, items, region)


def undecidable(feature: dict[str, Any]) -> None:
    """Make an item say nothing of its offset, if it is the pass with +1000 inside; the others have none."""
    if not feature["id"].endswith("20210629_1_L2A"):  # the one with +1000 inside
        feature["properties"]["earthsearch:boa_offset_applied"] = True
        return
    feature["properties"].pop("earthsearch:boa_offset_applied", None)
    told = ("s2:processing_baseline", "processing:version")
    feature["properties"] = {
        name: value
        for name, value in feature["properties"].items()
        if name not in told and "_N05" not in str(value)  # the product's name tells the baseline too
    }
    for asset in feature["assets"].values():
        asset.pop("raster:bands", None)


def recipe(job: Job, seen: Scouted | None = None) -> tuple[Request, Scouted, Any]:
    """Search and scout a job of one period; its recipe with the sub-block chosen."""
    request = resolve(job)
    period = periods(job)[0]
    acquisitions = acquisitions_of(request, period)
    seen = seen or survey(request, period, acquisitions)
    made, _ = plan_tasks(recipe_of(request, period, acquisitions, seen), job)
    return request, seen, made


def objects(store: Path) -> dict[str, bytes]:
    """Every file of a store by its relative path."""
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def same_objects(one: Path, other: Path) -> None:
    """Assert that two stores hold the same files with the same bytes."""
    first, second = objects(one), objects(other)
    assert first.keys() == second.keys()
    assert len(first) > 10
    assert [name for name in first if first[name] != second[name]] == []


class InlineFuture:
    """Work that is done when its result is asked for."""

    def __init__(self, work: Any) -> None:
        self.work = work

    key = ""

    def result(self) -> Any:
        """Do it."""
        return self.work()


class InlineClient:
    """A Dask client's part that ``build`` uses, in this process: deferred work, finished in any order.

    Attributes:
        peak: the most futures that were in flight at once.
        order: keys of the tasks in the order they finished; overviews do not count.
    """

    def __init__(
        self, monkeypatch: Any, *, workers: int = 2, seed: int = 0, resources: dict[str, float] | None = None
    ) -> None:
        self.workers, self.random, self.resources = workers, random.Random(seed), resources or {}
        self.flying: list[InlineFuture] = []
        self.peak, self.order = 0, []
        monkeypatch.setattr("pipeline.flight.Landings", lambda: self)

    def scheduler_info(self, n_workers: int = 5) -> dict[str, Any]:
        """As many workers as were asked for."""
        return {"workers": {number: {"resources": self.resources} for number in range(self.workers)}}

    def replicate(self, futures: Any) -> None:
        """Nothing to copy."""

    def submit(self, function: Any, *args: Any, key: str = "", **_: Any) -> InlineFuture:
        """Defer the work."""

        def work() -> Any:
            if key.startswith("task-"):
                self.order.append(key)
            return function(*(arg.result() if isinstance(arg, InlineFuture) else arg for arg in args))

        future = InlineFuture(work)
        future.key = key
        return future

    def subscribe_topic(self, topic: str, handler: Any) -> None:
        """Nobody cries."""

    def cancel(self, futures: Any) -> None:
        """What was deferred is never done."""
        self.flying.clear()

    def add(self, future: InlineFuture) -> None:
        """One more in flight."""
        self.flying.append(future)

    def get(self, timeout_s: float) -> InlineFuture:
        """One of those in flight, drawn."""
        self.peak = max(self.peak, len(self.flying))
        return self.flying.pop(self.random.randrange(len(self.flying)))


class SomeWorkers:
    """A Dask client that uses only some of its workers."""

    def __init__(self, client: Any, count: int) -> None:
        self.client = client
        self.chosen = sorted(client.scheduler_info(n_workers=-1)["workers"])[:count]

    def scheduler_info(self, n_workers: int = 5) -> dict[str, Any]:
        """Those some."""
        return {"workers": {key: {} for key in self.chosen}}

    def __getattr__(self, name: str) -> Any:
        """The rest as the client does it."""
        return getattr(self.client, name)

    def replicate(self, futures: Any) -> None:
        """To those some."""
        self.client.replicate(futures, workers=self.chosen)

    def submit(self, *args: Any, **more: Any) -> Any:
        """On those some."""
        return self.client.submit(*args, workers=self.chosen, **more)


def layers_equal(one: Any, other: Any, rows: slice = slice(None), cols: slice = slice(None)) -> None:
    """Assert that ``other`` is the window of ``one``, in every layer of two ``block.Layers``."""
    for name in ("codes", "clear_count", "source_date", "flags", "sigma"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None), name
        if first is not None:
            np.testing.assert_array_equal(first[..., rows, cols], second, err_msg=name)


def jump(values: NDArray[np.float32], row: int, known: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean |difference| across the edge above ``row``, and across those 2 to 40 rows away, over known pixels."""

    def across(at: int) -> float:
        both = known[at - 1] & known[at]
        return float(np.abs(values[at][both] - values[at - 1][both]).mean())

    inside = [across(row + d) for d in itertools.chain(range(-40, -1), range(2, 41))]
    return across(row), float(np.mean(inside))
