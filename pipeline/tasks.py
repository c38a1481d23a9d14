"""One task on one worker: in comes a rectangle of whole shards, out come finished layers in the store.

A task streams its rectangle in sub-blocks cut along the blocks of the source files, so that each is decoded once;
while one sub-block is composed, the reads of the next are in flight. No Dask graph lives inside a task.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline import mask as masks
from pipeline import store
from pipeline.anchors import AnchorMap
from pipeline.bands import darkest
from pipeline.block import NO_SIGMA, OUTSIDE, Layers, compose_block, halo_px, has_uncertainty
from pipeline.config import Method
from pipeline.errors import ReadError
from pipeline.grid import Grid
from pipeline.items import Acquisition, Asset, Item
from pipeline.profiles import MaskRule, Profile
from pipeline.reader import ReadPool, coarse_grid, dn_to_codes, fuse_scenes

CUTS_PX: Final = (2048, 1024, 512, 256, 128)
"""Sides a sub-block may have."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the pixels of one period; the same on every worker.

    Attributes:
        grid: of the mosaic.
        bands: in order.
        acquisitions: in time order, offsets decided.
        rule: how the mask's raster is read.
        params: growth and checks.
        factor: pixels of the grid along a pixel of the mask's raster.
        phase: where its pixels start on the lattice (row, col).
        method: name and options.
        target: the day to show, days since 1970-01-01.
        rejected: per acquisition, whether the temporal check rejects it as a whole.
        anchors: which acquisition to complete where.
        profile: read settings and credentials' kind (no secret).
        inside: (height, width) bool, packed bits, of a polygon area; None where all is inside.
        cut_px: side of a sub-block.
        origin: (row, col) on the lattice where the source files begin, so that sub-blocks fall on their blocks.
        threads: reads in flight.
    """

    grid: Grid
    bands: tuple[str, ...]
    acquisitions: tuple[Acquisition, ...]
    rule: MaskRule
    params: masks.MaskParams
    factor: int
    phase: tuple[int, int]
    method: Method
    target: int
    rejected: tuple[bool, ...]
    anchors: AnchorMap | None
    profile: Profile
    inside: NDArray[np.uint8] | None
    cut_px: int
    origin: tuple[int, int]
    threads: int

    @cached_property
    def days(self) -> NDArray[np.int32]:
        """(T,) int32 solar days."""
        return np.array([a.day for a in self.acquisitions], np.int32)

    @property
    def halo(self) -> int:
        """Pixels around a block that bands are read for."""
        return halo_px(self.method)

    @property
    def mask_halo(self) -> int:
        """Pixels around that in which the mask is read, for growth."""
        reach = masks.halo_m(self.params.open_m, self.params.cloud_grow_m, self.params.shadow_grow_m)
        return -(-round(reach) // round(self.grid.resolution_m)) + 2 * self.factor if reach else 0

    def area(self, rows: tuple[int, int], cols: tuple[int, int]) -> NDArray[np.bool_] | None:
        """The part of a polygon area inside a window of the grid; None where all is inside."""
        if self.inside is None:
            return None
        whole = np.unpackbits(self.inside, axis=1, count=self.grid.width).view(bool)
        return whole[rows[0] : rows[1], cols[0] : cols[1]]


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
    bytes_read: int = 0
    reads: int = 0
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    filled: int = 0
    unfilled: int = 0
    outside: int = 0
    scenes: int = 0


@dataclass
class _Pending:
    """Reads in flight for one sub-block."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    scenes: list[list[tuple[Item, Future[NDArray[Any]], list[Future[NDArray[Any]]]]]]


def run_task(recipe: Recipe, task: Task, path: str, slot: int) -> Report:
    """Read, mask, compose and write one task; called on a worker.

    Raises:
        StoreError: if the store cannot be written. A read that fails is reported, not raised.
    """
    began = time.perf_counter()
    report = Report(task)
    layers: dict[str, NDArray[Any]] = {}
    with (
        threadpool_limits(1),
        ReadPool(threads=recipe.threads, ahead=1_000_000, profile=recipe.profile) as pool,
    ):
        for rows, cols, block in _blocks(recipe, task, pool, report):
            _place(layers, recipe, task, rows, cols, block, report)
        report.bytes_read, report.read_seconds, report.reads = (
            pool.stats.bytes,
            pool.stats.seconds,
            pool.stats.reads,
        )
    for name in list(layers):
        store.write_region(path, recipe.grid, slot, task.rows, task.cols, {name: layers.pop(name)})
    report.seconds = time.perf_counter() - began
    return report


def compose_window(recipe: Recipe, rows: tuple[int, int], cols: tuple[int, int]) -> Layers:
    """Read, mask and compose one window of the grid in this process, without writing; the same bytes as a task.

    Raises:
        ReadError: where a task would flag a read that failed.
    """
    report = Report(Task(rows, cols, ()))
    with threadpool_limits(1), ReadPool(threads=recipe.threads, ahead=1_000_000, profile=recipe.profile) as pool:
        block = _compose(recipe, _submit(recipe, rows, cols, pool), report)
    if report.failures:
        item, band, why = report.failures[0]
        raise ReadError(f"{len(report.failures)} reads failed, the first: {item} {band}: {why}")
    apply_area(block, recipe.area(rows, cols))
    return block


def _blocks(
    recipe: Recipe, task: Task, pool: ReadPool, report: Report
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Layers]]:
    """Compose sub-block after sub-block, the reads of the next in flight."""
    windows = [
        (rows, cols)
        for rows in _cuts(task.rows, recipe.grid.row0 - recipe.origin[0], recipe.cut_px)
        for cols in _cuts(task.cols, recipe.grid.col0 - recipe.origin[1], recipe.cut_px)
    ]
    seen: set[str] = set()
    ahead = _submit(recipe, *windows[0], pool)
    for number in range(len(windows)):
        now = ahead
        if number + 1 < len(windows):
            ahead = _submit(recipe, *windows[number + 1], pool)
        seen.update(item.id for scenes in now.scenes for item, _, _ in scenes)
        yield now.rows, now.cols, _compose(recipe, now, report)
    report.scenes = len(seen)


def _cuts(span: tuple[int, int], shift: int, size: int) -> list[tuple[int, int]]:
    """Cut [start, stop) where ``position + shift`` is a multiple of ``size``."""
    edges = [span[0]]
    following = span[0] + size - (span[0] + shift) % size
    while following < span[1]:
        edges.append(following)
        following += size
    edges.append(span[1])
    return list(zip(edges[:-1], edges[1:], strict=True))


def _touches(asset: Asset, grid: Grid) -> bool:
    """Whether an asset may have pixels in the grid; only a shared CRS lets us say no without reading."""
    if asset.crs != grid.crs:
        return True
    a, _, c, _, e, f = asset.transform
    left, bottom, right, top = grid.bounds
    return c < right and c + a * asset.shape[1] > left and f > bottom and f + e * asset.shape[0] < top


def _submit(recipe: Recipe, rows: tuple[int, int], cols: tuple[int, int], pool: ReadPool) -> _Pending:
    fine = recipe.grid.window(rows, cols).padded(recipe.halo)
    cells, _ = coarse_grid(fine.padded(recipe.mask_halo), recipe.factor, recipe.phase)
    scenes = []
    for acquisition in recipe.acquisitions:
        pending = []
        for item in acquisition.items:
            if not _touches(item.assets[recipe.rule.asset], cells):
                continue
            classes = pool.submit(item.assets[recipe.rule.asset], cells, "classes")
            bands = [pool.submit(item.assets[band], fine, "reflectance") for band in recipe.bands]
            pending.append((item, classes, bands))
        scenes.append(pending)
    return _Pending(rows, cols, scenes)


def _compose(recipe: Recipe, pending: _Pending, report: Report) -> Layers:
    fine = recipe.grid.window(pending.rows, pending.cols).padded(recipe.halo)
    cells, offset = coarse_grid(fine.padded(recipe.mask_halo), recipe.factor, recipe.phase)
    offset = (offset[0] + recipe.mask_halo, offset[1] + recipe.mask_halo)
    codes = np.zeros((len(recipe.acquisitions), len(recipe.bands), *fine.shape), np.uint16)
    state = np.zeros((len(recipe.acquisitions), *cells.shape), np.uint8)
    failed = np.zeros(fine.shape, bool)
    for layer, scenes in enumerate(pending.scenes):
        seen_codes, seen_states = [], []
        for item, classes, bands in scenes:
            read = _gather(recipe, item, classes, bands, report)
            if read is None:
                failed |= _extent(item.assets[recipe.rule.asset], fine)
                continue
            seen_states.append(read[0])
            seen_codes.append(read[1])
        scenes.clear()  # the raw arrays are not needed any more
        if seen_codes:
            codes[layer], state[layer] = fuse_scenes(seen_codes, seen_states, factor=recipe.factor, offset=offset)
    clear = mask_looks(recipe, codes, state, offset)
    core = (slice(recipe.halo, fine.height - recipe.halo), slice(recipe.halo, fine.width - recipe.halo))
    return compose_block(
        codes=codes,
        clear=clear,
        days=recipe.days,
        method=recipe.method,
        target=recipe.target,
        anchors=recipe.anchors,
        row0=fine.row0,
        col0=fine.col0,
        core=core,
        failed=failed if failed.any() else None,
    )


def mask_looks(
    recipe: Recipe, codes: NDArray[np.uint16], state: NDArray[np.uint8], offset: tuple[int, int]
) -> NDArray[np.bool_]:
    """(T, H, W) bool: usable looks after growth, the temporal check, and the scout's rejections."""
    layers = masks.mask_block(
        state=state,
        factor=recipe.factor,
        offset=offset,
        codes=codes[:, darkest(recipe.bands)],
        nir=codes[:, recipe.bands.index("nir")] if "nir" in recipe.bands else None,
        days=recipe.days,
        resolution_m=recipe.grid.resolution_m,
        params=recipe.params,
    )
    clear = layers.clear
    for band in range(codes.shape[1]):
        np.logical_and(clear, codes[:, band], out=clear)
    clear[np.array(recipe.rejected, bool)] = False
    return clear


def _gather(
    recipe: Recipe,
    item: Item,
    classes: Future[NDArray[Any]],
    bands: Sequence[Future[NDArray[Any]]],
    report: Report,
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]] | None:
    """State and codes of one scene, None where any of its reads failed."""
    faults = []
    state, codes = None, None
    try:
        state = masks.apply_rule(classes.result(), recipe.rule)
    except ReadError as error:
        faults.append((item.id, recipe.rule.asset, str(error)))
    for number, (band, future) in enumerate(zip(recipe.bands, bands, strict=True)):
        try:
            values = dn_to_codes(future.result(), item.assets[band], item.offset_dn)
        except ReadError as error:
            faults.append((item.id, band, str(error)))
            continue
        if codes is None:
            codes = np.empty((len(recipe.bands), *values.shape), np.uint16)
        codes[number] = values
    report.failures += faults
    return None if faults or state is None or codes is None else (state, codes)


def _extent(asset: Asset, grid: Grid) -> NDArray[np.bool_]:
    """(H, W) bool: where a scene that could not be read might have had pixels."""
    if asset.crs != grid.crs:
        return np.ones(grid.shape, bool)
    a, _, c, _, e, f = asset.transform
    inside_x = (grid.x > c) & (grid.x < c + a * asset.shape[1])
    inside_y = (grid.y < f) & (grid.y > f + e * asset.shape[0])
    return np.asarray(inside_y[:, None] & inside_x[None, :])


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
    report.outside += int(np.count_nonzero(block.flags & OUTSIDE))
    empty = int(np.count_nonzero((block.flags & 1) > 0)) - int(np.count_nonzero(block.flags & OUTSIDE))
    report.unfilled += empty
    report.filled += block.flags.size - empty - int(np.count_nonzero(block.flags & OUTSIDE))
    shape = (task.rows[1] - task.rows[0], task.cols[1] - task.cols[0])
    there = (
        slice(rows[0] - task.rows[0], rows[1] - task.rows[0]),
        slice(cols[0] - task.cols[0], cols[1] - task.cols[0]),
    )
    for name, values in named_layers(block, recipe.bands, has_uncertainty(recipe.method)).items():
        if name not in layers:
            layers[name] = np.zeros(shape, values.dtype)
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
