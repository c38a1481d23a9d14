"""The lazy cube: in come items, a grid and a mask rule, out comes a Dask-backed xarray Dataset, one layer per pass.

Nothing is read at open. Pixels come from ``pipeline.reader`` through stackstac or odc-stac (``pipeline.loaders``), and
scenes of one pass are fused by ``pipeline.codes.fuse_scenes``, the function the job uses too, so both ways give the
same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from pyproj import CRS, Transformer

from pipeline.bands import check_bands, to_reflectance
from pipeline.codes import CLEAR, CLOUD, NODATA, SHADOW, fuse_scenes
from pipeline.errors import ConfigError, ItemError, NoItemsError
from pipeline.grid import Grid
from pipeline.items import Acquisition, Item, group_acquisitions
from pipeline.loaders import Loader, Task, open_stack
from pipeline.profiles import MaskRule, Profile
from pipeline.reader import coarse_grid, mask_lattice

CHUNK_PX = 1024
"""Side of a chunk: the COG block of Sentinel-2's 10 m bands on Earth Search."""


def open_cube(
    *,
    items: Sequence[Item],
    grid: Grid,
    bands: Sequence[str],
    mask: MaskRule,
    profile: Profile | None = None,
    loader: Loader = "stackstac",
    chunk_px: int = CHUNK_PX,
    longitude: float | None = None,
) -> xr.Dataset:
    """Open scenes as a lazy cube on exactly the pixels of ``grid``.

    Args:
        items: scenes with a decided offset (``offset_dn``), any order.
        grid: the pixels.
        bands: band names or ESA's (``B04``).
        mask: which raster is the mask and what its values mean.
        profile: credentials (by kind), retries and GDAL settings of the catalog.
        loader: ``stackstac`` or ``odc``: who lays out the graph; the pixels are the same.
        chunk_px: side of the spatial chunks in pixels; chunks hold one layer.
        longitude: by which solar days are reckoned, degrees, beyond 180 east of the antimeridian; default the grid's.

    Returns:
        Dataset, every variable Dask-backed:

        - ``reflectance (time, band, y, x)`` float32, NaN = no data. Scenes of one pass are fused: the first by item id
          that is clear there gives all bands, else the first valid one.
        - ``valid (time, y, x)`` bool: every band has data and the mask knows the pixel.
        - ``state (time, y, x)`` uint8: what the mask rule alone says, before any growth (0 no data, 1 clear, 2 cloud,
          3 shadow), fused likewise. Where the mask's own pixels are coarser, ``state.attrs`` tells: a cell covers
          ``factor`` x ``factor`` pixels, the first pixel of the cube lies ``offset`` (row, col) inside its cell.

        Coordinates: ``time`` (datetime64[ns], UTC, of the first scene of the pass, unique), ``band``, ``y``, ``x``
        (pixel centres), and along time ``acquisition``, ``platform``, ``orbit`` (0 unknown), ``solar_day``.
        Attributes: ``crs``, ``transform``, ``resolution_m``, and ``row0``, ``col0``, the place of [0, 0] on the
        lattice. No token and no environment is in the graph.

    Raises:
        NoItemsError: without items.
        ItemError: if an item lacks a band, the mask or its offset.
        ConfigError: for an unknown band or loader, or a grid the loader cannot express.
    """
    names = check_bands(bands)
    if chunk_px < 1:
        raise ConfigError(f"chunk_px: must be at least 1, got {chunk_px}")
    _check_items(items)
    passes = group_acquisitions(list(items), _longitude(grid) if longitude is None else longitude)
    scenes = [item for one in passes for item in one.items]
    codes = open_stack(scenes, names, Task(grid, profile), loader=loader, chunk_px=chunk_px)
    seen = Task(grid, profile, mask)
    states = open_stack(scenes, [mask.asset], seen, loader=loader, chunk_px=chunk_px)[:, 0]
    fused = _fuse(passes, codes, states)
    factor, phase = mask_lattice([item.assets[mask.asset] for item in scenes], grid)
    _, offset = coarse_grid(grid, factor, phase)
    return _dataset(_Layers(fused, factor, offset), passes, names, grid)


def _check_items(items: Sequence[Item]) -> None:
    if not items:
        raise NoItemsError("items: there are none; widen the area or the time span")
    for item in items:
        if item.offset_dn is None:
            raise ItemError(
                f"item {item.id}: its BOA offset is not decided (offset_dn is None); run the scout first, or set it "
                "to 0 or -1000"
            )


def _longitude(grid: Grid) -> float:
    """Longitude of the grid's centre: one for the whole area, so that no pass is split between two days."""
    left, bottom, right, top = grid.bounds
    to_lonlat = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    return float(to_lonlat.transform((left + right) / 2, (bottom + top) / 2)[0])


def _fuse(passes: Sequence[Acquisition], codes: da.Array, states: da.Array) -> da.Array:
    """(time, band + 1, y, x) uint16: the bands' codes and, last, the state of each pass."""
    layers, first = [], 0
    for one in passes:
        last = first + len(one.items)
        layers.append(
            da.blockwise(
                _fuse_block,
                "kyx",
                codes[first:last],
                "nbyx",
                states[first:last],
                "nyx",
                new_axes={"k": codes.shape[1] + 1},
                concatenate=True,
                dtype=np.uint16,
                meta=np.empty((0, 0, 0), np.uint16),
            )
        )
        first = last
    return da.stack(layers)


def _fuse_block(codes: NDArray[np.uint16], states: NDArray[np.uint8]) -> NDArray[np.uint16]:
    fused, state = fuse_scenes(list(codes), list(states))
    return np.concatenate([fused, state[None].astype(np.uint16)])


@dataclass(frozen=True)
class _Layers:
    """Fused codes with the state as last band, and the mask's lattice."""

    fused: da.Array
    factor: int
    offset: tuple[int, int]


def _dataset(layers: _Layers, passes: Sequence[Acquisition], names: Sequence[str], grid: Grid) -> xr.Dataset:
    codes, state = layers.fused[:, :-1], layers.fused[:, -1].astype(np.uint8)
    reflectance = codes.map_blocks(to_reflectance, dtype=np.float32, meta=np.empty((0,) * 4, np.float32))
    along = ("time", "y", "x")
    meaning = {"flag_values": [NODATA, CLEAR, CLOUD, SHADOW], "flag_meanings": "nodata clear cloud shadow"}
    lattice = {"factor": layers.factor, "offset": list(layers.offset)}
    days = np.array([one.day for one in passes], "datetime64[D]").astype("datetime64[ns]")
    return xr.Dataset(
        {
            "reflectance": (
                ("time", "band", "y", "x"),
                reflectance,
                {"units": "1", "grid_mapping": "spatial_ref"},
            ),
            "valid": (along, (codes != 0).all(axis=1), {"grid_mapping": "spatial_ref"}),
            "state": (along, state, {**meaning, **lattice, "grid_mapping": "spatial_ref"}),
        },
        {
            "time": _times(passes),
            "band": list(names),
            "y": ("y", grid.y, {"units": "m", "standard_name": "projection_y_coordinate"}),
            "x": ("x", grid.x, {"units": "m", "standard_name": "projection_x_coordinate"}),
            "acquisition": ("time", [one.id for one in passes]),
            "platform": ("time", [one.platform for one in passes]),
            "orbit": ("time", np.array([one.orbit for one in passes], np.int16)),
            "solar_day": ("time", days),
            "spatial_ref": ((), 0, _spatial_ref(grid)),
        },
        {
            "crs": grid.crs,
            "transform": [*grid.transform][:6],
            "resolution_m": grid.resolution_m,
            "row0": grid.row0,
            "col0": grid.col0,
        },
    )


def _spatial_ref(grid: Grid) -> dict[str, Any]:
    a, b, c, d, e, f = [*grid.transform][:6]
    wkt = CRS.from_user_input(grid.crs).to_wkt()
    return {"crs_wkt": wkt, "spatial_ref": wkt, "GeoTransform": f"{c} {a} {b} {f} {d} {e}"}


def _times(passes: Sequence[Acquisition]) -> NDArray[np.datetime64]:
    """UTC times of the passes, a later one of two equal ones moved by a microsecond so that labels are unique."""
    times: list[np.datetime64] = []
    for one in passes:
        time = np.datetime64(one.when.replace(tzinfo=None), "ns")
        while time in times:
            time = time + np.timedelta64(1, "us")
        times.append(time)
    return np.array(times, "datetime64[ns]")
