"""The demo: in comes a folder, out come a simulated region, a mosaic of it made by the main job, and its errors.

Scenes are written as COGs with items shaped as Earth Search shapes them, served on loopback (STAC API and HTTP range
requests), and run through the same code as any job. What stays behind works without the servers.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.bands import to_reflectance
from pipeline.block import check_method
from pipeline.config import LEARNED, METHODS, Job, Method
from pipeline.errors import RequestError
from pipeline.grid import Grid
from pipeline.items import day_text
from pipeline.jobfile import load_job
from pipeline.mosaic import Summary, build
from pipeline.preview import preview
from pipeline.reader import close_handles
from pipeline.records import RunFolder
from pipeline.request import Request, acquisitions_of, recipe_of, resolve, survey
from pipeline.runner import Progress, Silent
from pipeline.scenes import job_fields, served_items, write_demo
from pipeline.scout import Scouted
from pipeline.serve import RangeServer, StacServer
from pipeline.tasks import compose_window

BANDS = ("blue", "green", "red", "nir")


@dataclass(frozen=True)
class Score:
    """Errors of one method against the truth, reflectance: in the gaps of the target date, and everywhere."""

    method: str
    gap_mae: float
    gap_psnr: float
    all_mae: float
    unfilled: int


@dataclass
class DemoResult:
    """What the demo made."""

    folder: Path
    summary: Summary
    scores: list[Score] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(out: Path, *, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Run the demo in a folder.

    Leaves ``mosaic.zarr``, ``preview.png``, ``job.yaml``, ``scenes/`` (COGs, items, truth). An existing demo in the
    folder is replaced.

    Raises:
        RunError: if a server does not start, or the job fails.
    """
    progress = progress or Silent()
    out = Path(out)
    marks = [time.perf_counter()]
    progress.say(f"simulating two MGRS tiles, 16 passes, under {out / 'scenes'}")
    scenes = write_demo(out / "scenes", seed=seed, bands=BANDS)
    (out / "job.yaml").write_text(_job_text(job_fields(scenes, out)))
    marks.append(time.perf_counter())
    with RangeServer(scenes.items.parent) as files, tempfile.TemporaryDirectory() as folder:
        served = Path(folder) / "items.json"
        served.write_text(json.dumps(served_items(scenes.items, files.url)))
        with StacServer(served) as api:
            progress.say(f"serving {scenes.n_items} items at {api.url} and their COGs at {files.url}")
            job = load_job(out / "job.yaml")
            request = resolve(job.model_copy(update={"catalog": api.url}))
            request = replace(request, job=job)
            result = DemoResult(out, build(job=job, restart=True, progress=progress, request=request))
            marks.append(time.perf_counter())
            result.scores = score_methods(request, scenes.truth, progress)
        close_handles()
        _keep_offline(out / "mosaic.zarr", files.url, scenes.items.parent)
    preview(store=out / "mosaic.zarr", out=out / "preview.png")
    marks.append(time.perf_counter())
    result.seconds = dict(zip(("simulate", "job", "scores"), np.diff(marks).round(1).tolist(), strict=True))
    return result


def _job_text(job: dict[str, Any]) -> str:
    return (
        "# The demo's job. Run it again, or try: cloudgate mosaic job.yaml --set method.name=median --out median.zarr\n"
        + (yaml.safe_dump(job, sort_keys=False))
    )


def _keep_offline(store: Path, url: str, folder: Path) -> None:
    """Point the frozen items at the files, since the server is about to end."""
    run = RunFolder(store)
    items = (run.read_bytes("items.json") or b"").decode()
    run.write_bytes(items.replace(f"{url}/", f"{folder.absolute().as_posix()}/").encode(), "items.json")


def truth_at(folder: Path, kind: str, grid: Grid, bands: tuple[str, ...]) -> NDArray[np.float32]:
    """(band, y, x) float32 reflectance of the truth on the grid, NaN outside; ``kind`` is surface or clear_look."""
    out = np.zeros((len(bands), *grid.shape), np.uint16)
    for number, band in enumerate(bands):
        out[number] = _window(folder / kind / f"{band}.tif", grid, 0)
    return to_reflectance(out)


def _window(path: Path, grid: Grid, fill: int) -> NDArray[Any]:
    with rasterio.open(path) as source:
        window = rasterio.windows.from_bounds(*grid.bounds, transform=source.transform).round()
        return np.asarray(source.read(1, window=window, boundless=True, fill_value=fill))


def methods_here(bands: Sequence[str], progress: Progress) -> tuple[str, ...]:
    """The methods that can run here; ``progress`` hears of learned ones without their packages or weights."""
    able = [name for name in METHODS if name not in LEARNED]
    for name in LEARNED:
        try:
            check_method(Method(name=name), bands)
            able.append(name)
        except RequestError as error:
            progress.say(f"{name} is left out: {error}")
    return tuple(able)


def score_methods(request: Request, truth: Path, progress: Progress) -> list[Score]:
    """Compose the whole area with each method that can run here; compare with the truth of the target's pass."""
    methods = methods_here(request.job.bands, progress)
    grid, period = request.grid, request.schedule[0]
    acquisitions = acquisitions_of(request, period)
    wanted = truth_at(truth, "clear_look", grid, request.job.bands)
    known = np.isfinite(wanted).all(axis=0)
    state = _window(truth / "state" / f"{day_text(period.target)}.tif", grid, 255)
    gaps = known & (state > 0)
    scores, seen = [], dict[bool, Scouted]()
    progress.begin("methods", len(methods))
    for name in methods:
        method = Method(name=name)
        job: Job = request.job.model_copy(update={"method": method})
        asked = replace(request, job=job)
        if method.shows_date not in seen:  # all that the scout asks of a method whose options are the default ones
            seen[method.shows_date] = survey(asked, period, acquisitions)
        recipe = recipe_of(asked, period, acquisitions, seen[method.shows_date])
        block = compose_window(recipe, (0, grid.height), (0, grid.width))
        made = to_reflectance(block.codes)
        filled = np.isfinite(made).all(axis=0)
        predicted = np.nan_to_num(made)
        scores.append(
            Score(
                name,
                metrics.mae(predicted=predicted, truth=wanted, scored=gaps & filled),
                metrics.psnr(predicted=predicted, truth=wanted, scored=gaps & filled),
                metrics.mae(predicted=predicted, truth=wanted, scored=known & filled),
                int(np.count_nonzero(~filled)),
            )
        )
        progress.step(1)
    return scores
