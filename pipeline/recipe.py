"""What decides the pixels of one period: a ``Recipe``, small enough to travel to every worker, the same on each."""

import pickle
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline import mask as masks
from pipeline.anchors import AnchorMap
from pipeline.block import halo_px
from pipeline.config import LEARNED, Method
from pipeline.grid import Grid
from pipeline.items import Acquisition
from pipeline.profiles import MaskRule, Profile


@dataclass(frozen=True)
class Recipe:
    """All that decides the pixels of one period; the same on every worker.

    Attributes:
        grid: of the mosaic.
        bands: in order.
        acquisitions: in time order; an item without a decided offset is not read and counts as failed.
        rule: how the mask's raster is read.
        mask_model: the detector that makes the mask from the bands instead; None where the raster is read.
        params: growth and checks.
        factor: pixels of the grid along a pixel of the mask's raster.
        phase: where its pixels start on the lattice (row, col).
        method: name and options; of a learned one where its weights lie and their hash, never the weights.
        target: the day to show, days since 1970-01-01.
        rejected: per acquisition, whether the temporal check rejects it as a whole.
        clouded: ids of items that count as cloud all over, see ``scout``.
        anchors: which acquisition to complete where.
        profile: read settings and credentials' kind (no secret).
        inside: (height, width) bool, packed bits, of a polygon area; None where all is inside.
        cut_px: (rows, columns) of a sub-block.
        ahead: whether the next sub-block is read while one is composed.
        origin: (row, col) on the lattice where the source files begin, so that sub-blocks fall on their blocks.
        threads: reads in flight.
        open_files: datasets a worker keeps open between reads.
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
    cut_px: tuple[int, int]
    origin: tuple[int, int]
    threads: int
    open_files: int = 64
    ahead: bool = True
    mask_model: str | None = None
    clouded: frozenset[str] = frozenset()

    def __getstate__(self) -> bytes:
        """Compressed for the way to the workers: maps of anchors and of a polygon are large and smooth."""
        return zlib.compress(pickle.dumps(self.__dict__, pickle.HIGHEST_PROTOCOL), 1)

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(zlib.decompress(state)))  # noqa: S301 (part of a message of our own cluster)

    @cached_property
    def days(self) -> NDArray[np.int32]:
        """(T,) int32 solar days."""
        return np.array([a.day for a in self.acquisitions], np.int32)

    @property
    def halo(self) -> int:
        """Pixels around a block that bands are read for."""
        return halo_px(self.method)

    @property
    def tells_shadow(self) -> bool:
        """Whether the method asks what hides a look."""
        return self.method.name in LEARNED

    @property
    def mask_halo(self) -> int:
        """Pixels around that in which the mask is read, for growth."""
        reach = masks.halo_m(self.params.open_m, self.params.cloud_grow_m, self.params.shadow_grow_m)
        return -(-round(reach) // round(self.grid.resolution_m)) + 2 * self.factor if reach else 0

    @property
    def outline(self) -> str:
        """The asset that says where a scene lies."""
        return self.bands[0] if self.mask_model else self.rule.asset

    def area(self, rows: tuple[int, int], cols: tuple[int, int]) -> NDArray[np.bool_] | None:
        """The part of a polygon area inside a window of the grid; None where all is inside."""
        if self.inside is None:
            return None
        first = cols[0] // 8  # of the window's bytes: a country's polygon is never unpacked as a whole
        part = np.unpackbits(self.inside[rows[0] : rows[1], first : -(-cols[1] // 8)], axis=1).view(bool)
        return part[:, cols[0] - 8 * first : cols[1] - 8 * first]
