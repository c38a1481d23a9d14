"""Which pixels: in come a CRS, a resolution and an area, out comes a ``Grid`` that every step obeys.

A grid lies on a *lattice* fixed to the origin of its CRS: pixel edges are at ``phase + k * resolution``. Every pixel
has a global index (row, col) on that lattice, so windows of the regression and patches of a model can lie at the
same places whatever area, shard or task is asked for. Rows count downwards (north is row-negative).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from pipeline.errors import ConfigError
from pipeline.tables import table_html

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

CHUNK_PX = 512
OVERVIEW_PX = 256
"""The coarsest level of a mosaic is at most this wide and high."""


def projected_crs(text: str) -> CRS:
    """Parse a projected CRS whose unit is the metre.

    Raises:
        ConfigError: for an unknown CRS, a geographic one, or one in feet.
    """
    try:
        crs = CRS.from_user_input(text)
    except CRSError as error:
        raise ConfigError(
            f"grid.crs: {text!r} is no known CRS; use utm or a projected EPSG code such as EPSG:32633"
        ) from error
    if not crs.is_projected:
        raise ConfigError(
            f"grid.crs: {text!r} is geographic (degrees); use utm or a projected EPSG code such as EPSG:3035"
        )
    if any(abs(axis.unit_conversion_factor - 1) > 1e-9 for axis in crs.axis_info[:2]):
        raise ConfigError(f"grid.crs: {text!r} is not in metres; use utm or a CRS in metres such as EPSG:3035")
    return crs


def crs_name(crs: CRS) -> str:
    """``EPSG:n`` where the CRS has a code, else its WKT2."""
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.to_wkt()


def utm_crs(lon: float, lat: float) -> str:
    """The UTM zone (WGS 84) of a point in degrees, with the exceptions for Norway and Svalbard, as ``EPSG:n``."""
    lon = (lon + 180) % 360 - 180
    zone = int((lon + 180) // 6) + 1
    if 56 <= lat < 64 and 3 <= lon < 12:
        zone = 32
    if 72 <= lat <= 84 and 0 <= lon < 42:
        zone = 31 + 2 * int((lon + 3) // 12)
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


@dataclass(frozen=True)
class Grid:
    """A rectangle of pixels on the lattice of a CRS.

    Attributes:
        crs: ``EPSG:n`` or WKT2, projected, in metres.
        resolution_m: pixel size in metres.
        phase_m: (x, y) of a lattice corner in metres, each in [0, resolution_m).
        row0: global row of the top row (rows count southwards: top edge y = phase_y - row0 * resolution).
        col0: global column of the left column.
        height: rows.
        width: columns.
        shard_px: side of a Zarr shard, the unit of writing, in pixels.
        sharded: whether a shard's chunks lie in one object; each is an object of its own where not.
    """

    crs: str
    resolution_m: float
    phase_m: tuple[float, float]
    row0: int
    col0: int
    height: int
    width: int
    shard_px: int = 2048
    sharded: bool = True

    @classmethod
    def around(
        cls,
        geometry: BaseGeometry,
        *,
        crs: str,
        resolution_m: float,
        phase_m: tuple[float, float] = (0.0, 0.0),
        shard_px: int = 2048,
    ) -> Self:
        """The smallest grid on the lattice that covers ``geometry`` (in the coordinates of ``crs``)."""
        left, bottom, right, top = geometry.bounds
        px, py = (p % resolution_m for p in phase_m)
        slack = 1e-6  # of a pixel: an edge on the lattice stays on it
        col0 = math.floor((left - px) / resolution_m + slack)
        col1 = math.ceil((right - px) / resolution_m - slack)
        row0 = math.floor((py - top) / resolution_m + slack)
        row1 = math.ceil((py - bottom) / resolution_m - slack)
        if col1 <= col0 or row1 <= row0:
            raise ConfigError(
                f"area: it is empty at {resolution_m} m (bounds {tuple(round(v, 1) for v in geometry.bounds)} in "
                f"{crs[:20]}); give an area of at least one pixel"
            )
        return cls(crs, float(resolution_m), (px, py), row0, col0, row1 - row0, col1 - col0, shard_px)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def left(self) -> float:
        """Left edge (x) in metres."""
        return self.phase_m[0] + self.col0 * self.resolution_m

    @property
    def top(self) -> float:
        """Top edge (y) in metres."""
        return self.phase_m[1] - self.row0 * self.resolution_m

    @property
    def transform(self) -> Affine:
        """Affine of the top-left corner, north up."""
        return Affine(self.resolution_m, 0.0, self.left, 0.0, -self.resolution_m, self.top)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in metres."""
        return (
            self.left,
            self.top - self.height * self.resolution_m,
            self.left + self.width * self.resolution_m,
            self.top,
        )

    @property
    def geobox(self) -> "GeoBox":
        """The same rectangle as an odc-geo GeoBox."""
        from odc.geo.geobox import GeoBox  # slow to import, and few ask for it

        return GeoBox(self.shape, self.transform, self.crs)

    @property
    def x(self) -> NDArray[np.float64]:
        """Pixel centres (x) in metres, ascending."""
        return np.asarray(self.left + (np.arange(self.width) + 0.5) * self.resolution_m, np.float64)

    @property
    def y(self) -> NDArray[np.float64]:
        """Pixel centres (y) in metres, descending."""
        return np.asarray(self.top - (np.arange(self.height) + 0.5) * self.resolution_m, np.float64)

    @property
    def footprint(self) -> BaseGeometry:
        """The rectangle as a shapely box in the grid's CRS."""
        return box(*self.bounds)

    def window(self, rows: tuple[int, int], cols: tuple[int, int]) -> "Grid":
        """The sub-grid of rows [r0, r1) and columns [c0, c1), which may reach beyond this grid."""
        return replace(
            self,
            row0=self.row0 + rows[0],
            col0=self.col0 + cols[0],
            height=rows[1] - rows[0],
            width=cols[1] - cols[0],
        )

    def padded(self, px: int) -> "Grid":
        """The grid grown by ``px`` pixels on each side."""
        return self.window((-px, self.height + px), (-px, self.width + px))

    def coarser(self) -> "Grid":
        """The next level: pixels of twice the side from the same corner; an odd edge is rounded up."""
        side = 2 * self.resolution_m
        phase = (self.left % side, self.top % side)
        return replace(
            self,
            resolution_m=side,
            phase_m=phase,
            row0=round((phase[1] - self.top) / side),
            col0=round((self.left - phase[0]) / side),
            height=-(-self.height // 2),
            width=-(-self.width // 2),
        )

    def levels(self, count: int | None = None) -> list["Grid"]:
        """This grid and its coarser ones: ``count`` of them, or down to ``OVERVIEW_PX``."""
        out = [self]
        while len(out) <= count if count is not None else max(out[-1].shape) > OVERVIEW_PX:
            out.append(out[-1].coarser())
        return out

    def shards(self) -> Iterator[tuple[int, int]]:
        """(row, col) of each shard, row by row."""
        for i in range(math.ceil(self.height / self.shard_px)):
            for j in range(math.ceil(self.width / self.shard_px)):
                yield i, j

    def lonlat_bounds(self, margin_m: float = 0.0) -> tuple[float, float, float, float]:
        """(west, south, east, north) in degrees of the grid grown by ``margin_m``; west > east across 180 degrees."""
        left, bottom, right, top = self.bounds
        edge = box(left - margin_m, bottom - margin_m, right + margin_m, top + margin_m).exterior.segmentize(
            max((right - left + top - bottom) / 40, 1.0)
        )
        to_lonlat = Transformer.from_crs(self.crs, "EPSG:4326", always_xy=True)
        lon, lat = to_lonlat.transform(*np.asarray(edge.coords).T)
        middle, _ = to_lonlat.transform((left + right) / 2, (bottom + top) / 2)
        lon = middle + (np.asarray(lon) - middle + 180) % 360 - 180  # unwrapped around the middle
        west, east = float(lon.min()), float(lon.max())
        return ((west + 180) % 360 - 180, float(min(lat)), (east + 180) % 360 - 180 or east, float(max(lat)))

    def _repr_html_(self) -> str:
        """For notebooks: size, place and shards."""
        wide, high = (n * self.resolution_m / 1000 for n in (self.width, self.height))
        return table_html(
            f"Grid of {self.width} x {self.height} px at {self.resolution_m:g} m",
            {
                "CRS": self.crs[:60],
                "covers": f"{wide:.3g} x {high:.3g} km",
                "left, bottom, right, top": ", ".join(f"{edge:.0f}" for edge in self.bounds),
                "west, south, east, north": ", ".join(f"{edge:.5f}" for edge in self.lonlat_bounds()),
                "shards": f"{sum(1 for _ in self.shards())} of {self.shard_px} px",
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {**asdict(self), "phase_m": list(self.phase_m)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        return cls(**{**data, "phase_m": tuple(data["phase_m"])})
