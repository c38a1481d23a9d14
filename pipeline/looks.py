"""The looks of a task, streamed: in come a recipe and a rectangle, out come its sub-blocks as codes and clear looks.

A rectangle is worked in strips of rows, a strip in sub-blocks from left to right. The mask's rasters are read and grown
once for a strip. Bands go straight into the sub-block's array; where sub-blocks overlap (the method looks around), the
overlap is copied from the left neighbour instead of read again. While one sub-block is composed, the reads of the
next are in flight, if memory allows. Cuts fall on the blocks of the source files. None of this changes a byte of what
comes out.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline import mask as masks
from pipeline.bands import temporal_bands, to_reflectance
from pipeline.errors import ReadError
from pipeline.grid import Grid
from pipeline.items import Item
from pipeline.mask_models import lattice_window, state_on_lattice
from pipeline.mask_reading import read_state
from pipeline.outlines import extent, touches
from pipeline.read_pool import ReadPool
from pipeline.reader import coarse_grid, fuse_scenes, fuse_states, read_codes, spread_cells
from pipeline.recipe import Recipe

Span = tuple[int, int]
Codes = NDArray[np.uint16]
Failure = tuple[str, str, str]
"""(item id, band or mask asset, message)."""

MASK_ROWS: Final = 128
"""Rows of a sub-block whose looks are checked at a time."""

_held = threading.local()
"""Two arrays that a thread keeps from task to task."""


def release_arrays() -> None:
    """Give back the memory that this thread keeps for its next task."""
    _held.__dict__.clear()


@dataclass(frozen=True)
class Looks:
    """One sub-block with its halo.

    Attributes:
        rows: [r0, r1) of the core in the mosaic's grid.
        cols: [c0, c1) likewise.
        fine: the grid of the arrays, halo included.
        codes: (T, B, H, W) uint16; valid until the next sub-block is asked for.
        clear: (T, H, W) bool.
        failed: (H, W) bool, a read failed here; None where none did.
        bits: (T, h, w) uint8 on the mask's cells: cloud, shadow and no data as ``mask.grown_bits`` gives them.
        bits_offset: (row, col) of the arrays' [0, 0] inside ``bits``, in grid pixels.
        hidden_by: (T, H, W) uint8, what hides a look, temporal check included: 1 cloud, 2 shadow, 4 no data; None where
            the method does not ask.
    """

    rows: Span
    cols: Span
    fine: Grid
    codes: Codes
    clear: NDArray[np.bool_]
    failed: NDArray[np.bool_] | None
    bits: NDArray[np.uint8]
    bits_offset: tuple[int, int]
    hidden_by: NDArray[np.uint8] | None = None


@dataclass
class _Strip:
    """The masks of one strip of rows: by layer the scenes' states and those that cannot be read, then grown bits."""

    cells: Grid
    offset: tuple[int, int]
    futures: list[list[tuple[Item, Future[NDArray[np.uint8]]]]]
    states: list[dict[str, NDArray[np.uint8]]] = field(default_factory=list)
    failed: list[list[Item]] = field(default_factory=list)
    bits: NDArray[np.uint8] | None = None


@dataclass
class _Block:
    """Reads in flight for one sub-block: of each layer its scenes, each with its array and its bands' reads.

    Once gathered, ``bits`` are the strip's, made without the scenes whose bands could not be read here (``lost``).
    """

    rows: Span
    cols: Span
    fine: Grid
    fresh: int
    codes: Codes
    layers: list[list[tuple[Item, Codes, list[Future[Codes]]]]]
    bits: NDArray[np.uint8] | None = None
    lost: bool = False


def _undecided(item: Item) -> NDArray[np.uint8]:
    raise ReadError(f"the scout could not read it, so what its pixels mean is not decided: {item.offset_reason}")


def cuts(span: Span, shift: int, size: int) -> list[Span]:
    """Cut [start, stop) where ``position + shift`` is a multiple of ``size``."""
    edges = [span[0]]
    following = span[0] + size - (span[0] + shift) % size
    while following < span[1]:
        edges.append(following)
        following += size
    edges.append(span[1])
    return list(itertools.pairwise(edges))


class LookStream:
    """Iterate over the sub-blocks of a rectangle; ``failures`` and ``seen`` fill as it goes."""

    def __init__(self, recipe: Recipe, rows: Span, cols: Span, pool: ReadPool) -> None:
        self.recipe, self.rows, self.cols, self.pool = recipe, rows, cols, pool
        self.failures: list[Failure] = []
        self.seen: set[str] = set()
        self._turn = 0

    def __iter__(self) -> Iterator[Looks]:
        recipe, grid = self.recipe, self.recipe.grid
        # Without a halo cuts on the files' blocks let each be read once. With one, blocks at an edge are read twice
        # wherever it lies, and equal parts waste least on halos.
        shift = (-self.rows[0], -self.cols[0])
        if not recipe.halo:
            shift = (grid.row0 - recipe.origin[0], grid.col0 - recipe.origin[1])
        row_cuts = cuts(self.rows, shift[0], recipe.cut_px[0])
        col_cuts = cuts(self.cols, shift[1], recipe.cut_px[1])
        places = [(rows, cols) for rows in row_cuts for cols in col_cuts]
        strip, block = self._ask_strip(places[0][0]), self._ask_block(*places[0], None)
        for following in [*places[1:], None]:
            if strip.bits is None:
                self._grow(strip)
            told = len(self.failures)
            failed = self._gather(strip, block)
            if block.lost and block.fresh:  # the columns of its neighbour hold the lost scene, and its mask no more
                del self.failures[told:]
                block = self._ask_block(block.rows, block.cols, None)
                failed = self._gather(strip, block)
            here, now = strip, block
            if following is None:
                yield self._mask(here, now, failed)
                return
            same = following[0] == now.rows
            strip = strip if same else self._ask_strip(following[0])
            # what a neighbour lost is tried again, instead of copied without a word
            left = now if same and recipe.halo and not now.lost else None
            if recipe.ahead:
                block = self._ask_block(*following, left)
                yield self._mask(here, now, failed)
            else:
                yield self._mask(here, now, failed)
                block = self._ask_block(*following, left)

    # -- masks ----------------------------------------------------------------------------------------------

    def _ask_strip(self, rows: Span) -> _Strip:
        recipe = self.recipe
        fine = recipe.grid.window(rows, self.cols).padded(recipe.halo)
        cells, offset = coarse_grid(fine.padded(recipe.mask_halo), recipe.factor, recipe.phase)
        futures = []
        for acquisition in recipe.acquisitions:
            scenes = [item for item in acquisition.items if touches(item.assets[recipe.outline], cells)]
            futures.append(
                [(item, self.pool.queue(item.assets[recipe.outline], self._state_of(item, cells))) for item in scenes]
            )
        return _Strip(cells, (offset[0] + recipe.mask_halo, offset[1] + recipe.mask_halo), futures)

    def _state_of(self, item: Item, cells: Grid) -> Callable[[], NDArray[np.uint8]]:
        """What gives the scene's state on the cells: its class raster, or a cloud detector."""
        recipe = self.recipe
        if item.offset_dn is None:
            return partial(_undecided, item)
        if not recipe.mask_model:
            return lambda: self._state_read(item, cells)

        def detect() -> NDArray[np.uint8]:
            seen = lattice_window(cells)
            codes = np.empty((len(recipe.bands), *seen.shape), np.uint16)
            for out, band in zip(codes, recipe.bands, strict=True):
                read_codes(item.assets[band], seen, offset_dn=item.offset_dn, out=out, profile=recipe.profile)
            name = recipe.mask_model or ""
            return state_on_lattice(name, reflectance=to_reflectance(codes), bands=recipe.bands, seen=seen, cells=cells)

        return detect

    def _state_read(self, item: Item, cells: Grid) -> NDArray[np.uint8]:
        rule = self.recipe.rule
        state = read_state(item.assets[rule.asset], cells, rule, self.recipe.profile)
        if item.id in self.recipe.clouded:
            state[state != masks.NODATA] = masks.CLOUD
        return state

    def _grow(self, strip: _Strip) -> None:
        """Gather a strip's states, fuse them by acquisition, and grow."""
        recipe = self.recipe
        strip.bits = np.empty((len(recipe.acquisitions), *strip.cells.shape), np.uint8)
        for layer, scenes in enumerate(strip.futures):
            states, failed = [], []
            for item, future in scenes:
                try:
                    states.append((item.id, future.result()))
                except ReadError as error:
                    asset = "offset" if item.offset_dn is None else recipe.mask_model or recipe.rule.asset
                    self.failures.append((item.id, asset, str(error)))
                    failed.append(item)
            fused = fuse_states([state for _, state in states]) if states else np.zeros(strip.cells.shape, np.uint8)
            strip.bits[layer] = self._grown(fused)
            # Fusing bands needs the scenes' own states only where scenes meet.
            strip.states.append(dict(states) if len(states) > 1 else {})
            strip.failed.append(failed)
            scenes.clear()

    def _grown(self, state: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Grown bits of one layer's state."""
        resolution_m = self.recipe.grid.resolution_m * self.recipe.factor
        (bits,) = masks.grown_bits(state=state[None], resolution_m=resolution_m, params=self.recipe.params)
        return bits

    # -- bands ----------------------------------------------------------------------------------------------

    def _array(self, shape: tuple[int, ...]) -> Codes:
        """One of this thread's two arrays in turn: fresh memory costs as much as the copying it would be used for."""
        self._turn = 1 - self._turn if self.recipe.ahead else 0
        if not hasattr(_held, "arrays"):
            _held.arrays = [np.empty(0, np.uint16), np.empty(0, np.uint16)]
        size = int(np.prod(shape))
        if _held.arrays[self._turn].size < size:
            _held.arrays[self._turn] = np.empty(0, np.uint16)  # let go before taking more
            _held.arrays[self._turn] = np.empty(size, np.uint16)
        return _held.arrays[self._turn][:size].reshape(shape)

    def _ask_block(self, rows: Span, cols: Span, left: _Block | None) -> _Block:
        """Send the reads of a sub-block; with a left neighbour only of the columns it does not have."""
        recipe = self.recipe
        fine = recipe.grid.window(rows, cols).padded(recipe.halo)
        codes = self._array((len(recipe.acquisitions), len(recipe.bands), *fine.shape))
        fresh = 0
        if left is not None:
            fresh = max(left.fine.col0 + left.fine.width - fine.col0, 0)
            # Plane by plane, since both may lie in one array: the last sub-block of a strip is narrower, none is wider,
            # so what is still to be copied is never written over.
            for scenes, theirs in zip(codes, left.codes, strict=True):
                for plane, its in zip(scenes, theirs, strict=True):
                    plane[:, :fresh] = its[:, left.fine.width - fresh :]
        part = fine.window((0, fine.height), (fresh, fine.width))
        layers = []
        for layer, acquisition in enumerate(recipe.acquisitions):
            scenes = [item for item in acquisition.items if touches(item.assets[recipe.bands[0]], part)]
            own = codes[layer, :, :, fresh:]
            if not scenes:
                own.fill(0)
            asked = []
            for item in scenes:
                array = own if len(scenes) == 1 else np.empty(own.shape, np.uint16)
                reads = [
                    self.pool.submit_codes(item.assets[band], part, item.offset_dn, array[number])
                    for number, band in enumerate(recipe.bands)
                    if item.offset_dn is not None
                ]
                asked.append((item, array, reads))
            layers.append(asked)
        return _Block(rows, cols, fine, fresh, codes, layers)

    def _gather(self, strip: _Strip, block: _Block) -> NDArray[np.bool_] | None:
        """Wait for a sub-block's reads and fuse its scenes; where a read failed, None if nowhere."""
        failed = np.zeros(block.fine.shape, bool)
        block.bits = strip.bits
        offset = self._inside(strip, block)
        for layer, scenes in enumerate(block.layers):
            masked = strip.failed[layer]
            good, gone = [], [extent(item.assets[self.recipe.outline], block.fine) for item in masked]
            lost = set()
            for item, array, reads in scenes:
                self.seen.add(item.id)
                if self._wait(item, reads) and item not in masked:
                    good.append((item.id, array))
                    continue
                gone.append(extent(item.assets[self.recipe.bands[0]], block.fine))
                if item not in masked:
                    lost.add(item.id)
            own = block.codes[layer, :, :, block.fresh :]
            if scenes and not good:
                own.fill(0)
            elif len(scenes) > 1:
                own[...] = self._fuse(strip.states[layer], good, (offset[0], offset[1] + block.fresh))
            if lost:
                block.lost = True
                self._mask_without(lost, layer, strip, block)
            if gone:
                failed |= np.logical_or.reduce(gone) & ~self._served(layer, block, offset)
            scenes.clear()
        return failed if failed.any() else None

    def _inside(self, strip: _Strip, block: _Block) -> Span:
        """(row, col) of a sub-block's [0, 0] in its strip's cells, in grid pixels."""
        return strip.offset[0], strip.offset[1] + block.cols[0] - self.cols[0]

    def _mask_without(self, lost: set[str], layer: int, strip: _Strip, block: _Block) -> None:
        """Make the mask of a pass of the scenes that are left: a scene that shows nothing hides nothing either."""
        assert strip.bits is not None
        assert block.bits is not None
        if left := [state for name, state in strip.states[layer].items() if name not in lost]:
            if block.bits is strip.bits:  # which serves the strip's other sub-blocks too
                block.bits = strip.bits.copy()
            block.bits[layer] = self._grown(fuse_states(left))

    def _served(self, layer: int, block: _Block, offset: Span) -> NDArray[np.bool_]:
        """(H, W) bool: where a pass is clear in a scene that was read; nothing is lost there."""
        assert block.bits is not None
        hidden = spread_cells(block.bits[layer], self.recipe.factor, offset, block.fine.shape)
        return np.asarray(np.minimum.reduce(block.codes[layer]) != 0) & (hidden == 0)

    def _wait(self, item: Item, reads: list[Future[Codes]]) -> bool:
        """Wait for all bands of a scene; False where any failed."""
        faults: list[Failure] = []
        for band, future in zip(self.recipe.bands, reads, strict=bool(reads)):
            try:
                future.result()
            except ReadError as error:
                faults.append((item.id, band, str(error)))
        self.failures += faults
        return bool(reads) and not faults

    def _fuse(self, states: dict[str, NDArray[np.uint8]], good: list[tuple[str, Codes]], offset: Span) -> Codes:
        there = [(array, states[name]) for name, array in good if name in states]
        if len(there) < 2:  # the others only touch the strip with their bands
            return there[0][0] if there else good[0][1]
        arrays, cells = zip(*there, strict=True)
        return fuse_scenes(arrays, cells, factor=self.recipe.factor, offset=offset)[0]

    def _mask(self, strip: _Strip, block: _Block, failed: NDArray[np.bool_] | None) -> Looks:
        recipe = self.recipe
        assert block.bits is not None
        dark, nir = temporal_bands(recipe.bands)
        offset = self._inside(strip, block)
        look = masks.look_bits if recipe.tells_shadow else masks.clear_looks
        marks = np.empty((len(block.codes), *block.fine.shape), np.uint8)
        for top in range(
            0, block.fine.height, MASK_ROWS
        ):  # what is only passed on need not be held for the whole block
            codes = block.codes[:, :, top : top + MASK_ROWS]
            unchecked = masks.Unchecked(
                bits=block.bits,
                factor=recipe.factor,
                offset=(offset[0] + top, offset[1]),
                valid=np.minimum.reduce(codes, axis=1) != 0,
                codes=codes[:, dark],
                nir=None if nir is None else codes[:, nir],
                days=recipe.days,
                temporal_check=recipe.params.temporal_check,
                rejected=np.array(recipe.rejected, bool),
            )
            marks[:, top : top + MASK_ROWS] = look(unchecked)
        clear, hidden_by = (marks == 0, marks) if recipe.tells_shadow else (marks.view(bool), None)
        return Looks(block.rows, block.cols, block.fine, block.codes, clear, failed, block.bits, offset, hidden_by)
