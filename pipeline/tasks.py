"""One task on one worker: in comes a rectangle of whole shards, out come finished layers in the store.

A task streams its rectangle in sub-blocks (``pipeline.looks``), composes each and writes whole shards at its end. No
Dask graph lives inside a task.
"""

import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline import store
from pipeline.blas import one_blas_thread
from pipeline.block import NO_SIGMA, OUTSIDE, Layers, compose_block, has_uncertainty
from pipeline.errors import ReadError, StoreError
from pipeline.kept import Kept
from pipeline.looks import Looks, LookStream, release_arrays
from pipeline.read_pool import ReadPool
from pipeline.reader import keep_open
from pipeline.recipe import Recipe
from pipeline.records import RunFolder

_NO_BOUND: Final = 1_000_000
"""Reads queued at a time: the stream itself asks for one sub-block ahead and no more."""


@dataclass(frozen=True)
class Task:
    """A rectangle of whole shards: pixel rows [r0, r1) and columns [c0, c1) of the grid, and the shards in it."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    shards: tuple[tuple[int, int], ...]


@dataclass
class Report:
    """What a task did, for the run records."""

    task: Task
    seconds: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    bytes_read: int = 0
    reads: int = 0
    retries: int = 0
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    filled: int = 0
    unfilled: int = 0
    outside: int = 0
    scenes: int = 0
    memory_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    changes: Any = None
    """For ``store.keep``."""


def run_task(recipe: Recipe, task: Task, path: str, slot: int, *, fence: str | None = None) -> Report:
    """Read, mask, compose and write one task; called on a worker.

    Args:
        recipe: what decides the pixels.
        task: the rectangle.
        path: of the store.
        slot: of the period.
        fence: see ``check_fence``.

    Raises:
        StoreError: if the store cannot be written. A read that fails is reported, not raised.
    """
    began = time.perf_counter()
    forget_peak()
    report = Report(task)
    layers: dict[str, NDArray[Any]] = {}
    keep_open(recipe.open_files)
    with one_blas_thread(), ReadPool(threads=recipe.threads, ahead=_NO_BOUND, profile=recipe.profile) as pool:
        stream, kept = LookStream(recipe, task.rows, task.cols, pool), Kept()
        for looks in stream:
            if stream.failures:  # a patch that lacks a look here may have it in the next sub-block
                kept = Kept()
            _place(layers, recipe, task, looks.rows, looks.cols, _compose(recipe, looks, kept), report)
        report.failures, report.scenes = stream.failures, len(stream.seen)
        stats = pool.stats
        report.bytes_read, report.read_seconds = stats.bytes, stats.seconds
        report.reads, report.retries = stats.reads, stats.retries
    check_fence(path, slot, fence)
    composed = time.perf_counter()
    one_by_one = ((name, layers.pop(name)) for name in list(layers))  # each is let go when it is written
    report.changes = store.write_region(path, recipe.grid, slot, task.rows, task.cols, one_by_one)
    ended = time.perf_counter()
    report.seconds, report.write_seconds, report.memory_bytes = ended - began, ended - composed, peak_bytes()
    return report


def check_fence(path: str, slot: int, fence: str | None) -> None:
    """Leave to write only while the store's records name this beginning of the period (``RunFolder.fence``).

    A task that outlived its client must not write into what another run began anew; None where there are no records.

    Raises:
        StoreError: if another run did.
    """
    if fence is not None and RunFolder(path).fence(slot) != fence:
        raise StoreError(f"store {path}: another run began it anew meanwhile; nothing was written")


def forget_peak() -> None:
    """Begin to measure this process's peak of memory anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most resident bytes since ``forget_peak`` (elsewhere than on Linux: since the process began)."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compose_window(recipe: Recipe, rows: tuple[int, int], cols: tuple[int, int]) -> Layers:
    """Read, mask and compose one window of the grid in this process, without writing; the same bytes as a task.

    Raises:
        ReadError: where a task would flag a read that failed.
    """
    origin = (recipe.grid.row0 + rows[0], recipe.grid.col0 + cols[0])
    whole = replace(recipe, cut_px=(rows[1] - rows[0], cols[1] - cols[0]), origin=origin)
    with one_blas_thread(), ReadPool(threads=recipe.threads, ahead=_NO_BOUND, profile=recipe.profile) as pool:
        stream = LookStream(whole, rows, cols, pool)
        (block,) = [_compose(whole, looks) for looks in stream]
    release_arrays()
    if stream.failures:
        item, band, why = stream.failures[0]
        raise ReadError(f"{len(stream.failures)} reads failed, the first: {item} {band}: {why}")
    apply_area(block, recipe.area(rows, cols))
    return block


def _compose(recipe: Recipe, looks: Looks, kept: Kept | None = None) -> Layers:
    halo = recipe.halo
    core = (slice(halo, looks.fine.height - halo), slice(halo, looks.fine.width - halo))
    return compose_block(
        codes=looks.codes,
        clear=looks.clear,
        days=recipe.days,
        method=recipe.method,
        target=recipe.target,
        anchors=recipe.anchors,
        row0=looks.fine.row0,
        col0=looks.fine.col0,
        core=core,
        failed=looks.failed,
        bits=looks.hidden_by,
        kept=kept,
    )


def _place(
    layers: dict[str, NDArray[Any]],
    recipe: Recipe,
    task: Task,
    rows: tuple[int, int],
    cols: tuple[int, int],
    block: Layers,
    report: Report,
) -> None:
    """Copy one sub-block into the task's arrays, with the area's outline applied."""
    apply_area(block, recipe.area(rows, cols))
    report.notes += block.notes
    outside = int(np.count_nonzero(block.flags & OUTSIDE)) if recipe.inside is not None else 0
    filled = int(np.count_nonzero(block.codes[0]))
    report.outside += outside
    report.filled += filled
    report.unfilled += block.flags.size - filled - outside
    shape = (task.rows[1] - task.rows[0], task.cols[1] - task.cols[0])
    there = (
        slice(rows[0] - task.rows[0], rows[1] - task.rows[0]),
        slice(cols[0] - task.cols[0], cols[1] - task.cols[0]),
    )
    for name, values in named_layers(block, recipe.bands, has_uncertainty(recipe.method)).items():
        if name not in layers:
            layers[name] = np.empty(shape, values.dtype)
        layers[name][there] = values


def apply_area(block: Layers, inside: NDArray[np.bool_] | None) -> None:
    """Blank what lies outside a polygon area, flagged; in place."""
    if inside is None or inside.all():
        return
    outside = ~inside
    block.codes[:, outside] = 0
    block.clear_count[outside] = 0
    block.source_date[outside] = 0
    block.flags[outside] = OUTSIDE | 1
    if block.sigma is not None:
        block.sigma[:, outside] = NO_SIGMA


def named_layers(block: Layers, bands: Sequence[str], uncertainty: bool) -> dict[str, NDArray[Any]]:
    """The block's arrays by the store's layer names, in the store's order."""
    out: dict[str, NDArray[Any]] = {band: block.codes[i] for i, band in enumerate(bands)}
    out |= {"clear_count": block.clear_count, "source_date": block.source_date, "flags": block.flags}
    if uncertainty:
        assert block.sigma is not None
        out |= {f"uncertainty_{band}": block.sigma[i] for i, band in enumerate(bands)}
    return out
