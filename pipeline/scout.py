"""The scout: in come items and a grid, out comes what must be decided once for the whole area before any task runs.

A cheap pass over coarse overviews of the cloud mask and the darkest band decides each item's BOA offset, each
acquisition's clear share, whether it fails the temporal check as a whole, and the anchors. The decision is frozen with
the items; every task obeys it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pipeline import mask as masks
from pipeline.anchors import AnchorMap, Candidate, build_map, choose
from pipeline.bands import darkest
from pipeline.codes import dn_to_codes
from pipeline.config import Method
from pipeline.errors import ReadError, RunError
from pipeline.grid import Grid
from pipeline.items import Acquisition, Asset, Item
from pipeline.mask_reading import read_classes
from pipeline.offsets import View, decide_offsets, told
from pipeline.outlines import window_of
from pipeline.profiles import MaskRule, Profile
from pipeline.reader import read_window

COARSE_PX: Final = 400
"""Side of the coarse view of the whole area, in cells."""
THREADS: Final = 8

Read = Callable[[Asset, Grid, str], NDArray[Any]]


@dataclass(frozen=True)
class Layer:
    """One acquisition as the scout saw it: shares are of the area (valid) and of its own valid ground (clear)."""

    id: str
    day: int
    valid_share: float
    clear_share: float
    suspicious_share: float
    fails: bool


@dataclass(frozen=True)
class Scouted:
    """The scout's decisions.

    Attributes:
        offsets: item id -> (offset in DN, reason).
        layers: one per acquisition, in time order.
        anchors: which acquisition to complete where; None for methods that show a span.
        unread: item id -> message of scenes that could not be read; their offset is there if it is told without pixels.
        clouded: ids of scenes so clouded that nothing decides their offset: all of them counts as cloud.
    """

    offsets: dict[str, tuple[int, str]]
    layers: tuple[Layer, ...]
    anchors: AnchorMap | None
    unread: dict[str, str]
    clouded: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "offsets": {key: list(value) for key, value in self.offsets.items()},
            "layers": [layer.__dict__ for layer in self.layers],
            "anchors": self.anchors.to_dict() if self.anchors else None,
            "unread": self.unread,
            "clouded": list(self.clouded),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        return cls(
            {key: (value[0], value[1]) for key, value in data["offsets"].items()},
            tuple(Layer(**layer) for layer in data["layers"]),
            AnchorMap.from_dict(data["anchors"]) if data["anchors"] else None,
            data["unread"],
            tuple(data.get("clouded", ())),  # records of before know none
        )

    def apply(self, items: Sequence[Item]) -> list[Item]:
        """The items with their decided offsets."""
        return [
            replace(item, offset_dn=self.offsets[item.id][0], offset_reason=self.offsets[item.id][1])
            for item in items
            if item.id in self.offsets
        ]


def coarse_grid(grid: Grid, margin_m: float, most_px: int = COARSE_PX) -> tuple[Grid, int]:
    """(grid of coarse cells around ``grid`` with a margin, side of a cell in pixels), on the global lattice."""
    margin = round(margin_m / grid.resolution_m)
    cell = 1
    while max(grid.shape) / cell > most_px:
        cell *= 2
    top, left = (grid.row0 - margin) // cell, (grid.col0 - margin) // cell
    bottom = -(-(grid.row0 + grid.height + margin) // cell)
    right = -(-(grid.col0 + grid.width + margin) // cell)
    coarse = Grid(
        grid.crs, grid.resolution_m * cell, grid.phase_m, top, left, bottom - top, right - left, grid.shard_px
    )
    return coarse, cell


def scout(
    *,
    acquisitions: Sequence[Acquisition],
    grid: Grid,
    bands: Sequence[str],
    rule: MaskRule | None,
    params: masks.MaskParams,
    profile: Profile,
    method: Method,
    target: int,
    override_dn: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scouted:
    """Look at all acquisitions coarsely and decide what holds for the whole area.

    Args:
        acquisitions: in time order.
        grid: the mosaic's grid.
        bands: bands of the job.
        rule: how the mask's raster is read; None where a detector makes the mask, far too slow for a mere look: all
            valid pixels count as clear then, and only the temporal check judges them.
        params: growth and checks.
        profile: offset policy, read settings.
        method: its anchor settings.
        target: the day to show, days since 1970-01-01.
        override_dn: the job's own offset for every item.
        progress: called with (done, all) after each item.

    Raises:
        ItemError: for an item whose offset cannot be decided. RunError: if no item at all can be read.
    """
    coarse, cell = coarse_grid(grid, method.blend_m if method.shows_date else 0)
    dark = bands[darkest(bands)]
    items = [item for acquisition in acquisitions for item in acquisition.items]
    views, unread = _look(items, coarse, dark, rule, profile, progress)
    offsets, clouded = decide_offsets(views.values(), dark, profile, override_dn)
    sure = {item.id: told(item, dark, profile, override_dn) for item in items if item.id in unread}
    for name in clouded:
        np.copyto(views[name].state, masks.CLOUD, where=views[name].state != masks.NODATA)
    state, codes = _fuse(acquisitions, views, offsets, dark, coarse)
    layers, footprints = _judge(acquisitions, state, codes, coarse, cell, grid, params)
    anchors = None
    if method.shows_date:
        candidates = [
            Candidate(i, layer.day - target, layer.clear_share, acquisitions[i].orbit, layer.fails, footprints[i])
            for i, layer in enumerate(layers)
        ]
        chosen = choose(candidates, min_clear=method.anchor_min_clear, max_days=method.anchor_max_days)
        anchors = build_map(
            chosen,
            anywhere=footprints.any(axis=0),
            cell_px=cell,
            row0=coarse.row0,
            col0=coarse.col0,
            blend_cells=method.blend_m / coarse.resolution_m,
        )
    offsets |= {name: answer for name, answer in sure.items() if answer is not None}
    return Scouted(offsets, layers, anchors, unread, clouded)


def decide(
    *,
    items: Sequence[Item],
    grid: Grid,
    band: str,
    rule: MaskRule,
    profile: Profile,
    override_dn: int | None = None,
) -> tuple[list[Item], dict[str, str]]:
    """Only the offsets: (items with ``offset_dn``, item id -> why it is left out: unreadable, or all cloud).

    Raises:
        ItemError: where nothing decides. RunError: if no item can be read.
    """
    coarse, _ = coarse_grid(grid, 0)
    views, unread = _look(items, coarse, band, rule, profile, None)
    offsets, clouded = decide_offsets(views.values(), band, profile, override_dn)
    left_out = unread | {name: f"all cloud, offset unknown: {offsets.pop(name)[1]}" for name in clouded}
    return Scouted(offsets, (), None, left_out).apply(items), left_out


def _look(
    items: Sequence[Item],
    coarse: Grid,
    dark: str,
    rule: MaskRule | None,
    profile: Profile,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, View], dict[str, str]]:
    """Each scene on the cells it may reach: a country's are many, and each covers but a small part of it."""
    views: dict[str, View] = {}
    unread: dict[str, str] = {}

    def one(item: Item) -> View | str:
        names = [dark] if rule is None else [dark, rule.asset]
        spans = [span for name in names if (span := window_of(item.assets[name], coarse))] or [(0, 1, 0, 1)]
        r0, r1, c0, c1 = zip(*spans, strict=True)
        rows, cols = (min(r0), max(r1)), (min(c0), max(c1))
        part, place = coarse.window(rows, cols), (slice(*rows), slice(*cols))
        try:
            values = read_window(item.assets[dark], part, kind="reflectance", profile=profile)
            if rule is None:
                unknown = np.zeros(part.shape, np.uint8)
                return View(item, unknown, np.full_like(unknown, masks.CLEAR), values, place)
            classes, state = read_classes(item.assets[rule.asset], part, rule, profile)
        except ReadError as error:
            return str(error)
        return View(item, classes, state, values, place)

    with ThreadPoolExecutor(THREADS) as pool:
        for number, (item, view) in enumerate(zip(items, pool.map(one, items), strict=True), 1):
            if isinstance(view, str):
                unread[item.id] = view
            else:
                views[item.id] = view
            if progress:
                progress(number, len(items))
    if items and not views:
        first = next(iter(unread.values()))
        raise RunError(f"scout: none of the {len(items)} scenes can be read; the first failed with: {first}")
    return views, unread


def _fuse(
    acquisitions: Sequence[Acquisition],
    views: dict[str, View],
    offsets: dict[str, tuple[int, str]],
    dark: str,
    coarse: Grid,
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """State and codes per acquisition, (T, h, w): first clear scene by id, else the first with data.

    Each view is let go as it is fused.
    """
    state = np.zeros((len(acquisitions), *coarse.shape), np.uint8)
    codes = np.zeros(state.shape, np.uint16)
    for layer, acquisition in enumerate(acquisitions):
        for item in acquisition.items:
            view = views.pop(item.id, None)
            if view is None:
                continue
            there, pixels = state[layer][view.place], codes[layer][view.place]
            values = dn_to_codes(view.dark, item.assets[dark], offsets[item.id][0])
            seen = np.where(values == 0, masks.NODATA, view.state)
            take = (seen != masks.NODATA) & ((there == masks.NODATA) | ((there != masks.CLEAR) & (seen == masks.CLEAR)))
            np.copyto(there, seen, where=take)
            np.copyto(pixels, values, where=take)
    return state, codes


def _judge(
    acquisitions: Sequence[Acquisition],
    state: NDArray[np.uint8],
    codes: NDArray[np.uint16],
    coarse: Grid,
    cell: int,
    grid: Grid,
    params: masks.MaskParams,
) -> tuple[tuple[Layer, ...], NDArray[np.bool_]]:
    """Clear shares within the area, and which acquisitions the temporal check rejects as a whole."""
    days = np.array([a.day for a in acquisitions], np.int32)
    layers = masks.mask_block(
        state=state,
        factor=1,
        offset=(0, 0),
        codes=codes,
        nir=None,
        days=days,
        resolution_m=coarse.resolution_m,
        params=params,
    )
    footprints = codes != 0
    cloud, shadow = masks.grow(
        state=state,
        resolution_m=coarse.resolution_m,
        open_m=params.open_m,
        cloud_grow_m=params.cloud_grow_m,
        shadow_grow_m=params.shadow_grow_m,
    )
    before = footprints & ~cloud & ~shadow & (state != masks.NODATA)
    rows = slice(max(grid.row0 // cell - coarse.row0, 0), -(-(grid.row0 + grid.height) // cell) - coarse.row0)
    cols = slice(max(grid.col0 // cell - coarse.col0, 0), -(-(grid.col0 + grid.width) // cell) - coarse.col0)
    out = []
    for i, acquisition in enumerate(acquisitions):
        valid = footprints[i][rows, cols]
        clear, claimed = layers.clear[i][rows, cols], before[i][rows, cols]
        ground, claimed_count = max(int(np.count_nonzero(valid)), 1), max(int(np.count_nonzero(claimed)), 1)
        suspicious = 1 - np.count_nonzero(clear & claimed) / claimed_count if claimed.any() else 0.0
        fails = params.temporal_check and masks.scene_fails(suspicious)
        out.append(
            Layer(
                acquisition.id,
                acquisition.day,
                round(np.count_nonzero(valid) / valid.size, 4),
                round(np.count_nonzero(clear) / ground, 4),
                round(suspicious, 4),
                bool(fails),
            )
        )
    return tuple(out), footprints
