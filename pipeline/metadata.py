"""Metadata of a store's levels: in come grids, layers, times and attributes, out come ``zarr.json`` and coordinates.

Written in the order in which a reader may meet them: the coarsest level first, the root last, and where a store has
consolidated metadata, those at the very end. The JSON has no blanks: indented, metadata were 3 % of the demo's mosaic,
and who reads over a network fetches all of the root's.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from pipeline import conventions
from pipeline.grid import Grid
from pipeline.layers import LayerSpec, array_metadata

TIME_CHUNK: Final = 512
"""Slots in one chunk of a coordinate along ``time``: fixed, so that growing never rewrites a chunk's place."""


class _Compact(WrapperStore[Store]):
    """A store whose metadata are written without blanks; zarr's own switch for that is one for the whole process."""

    async def set(self, key: str, value: Buffer) -> None:
        if key.endswith("zarr.json"):
            text = json.dumps(json.loads(value.to_bytes()), separators=(",", ":"))
            value = default_buffer_prototype().buffer.from_bytes(text.encode())
        await super().set(key, value)


def _put(group: zarr.Group, name: str, values: NDArray[Any], dims: Sequence[str], attrs: Mapping[str, Any]) -> None:
    """Write a small coordinate in one chunk; along ``time`` the chunk has room, so that it never changes."""
    chunks = tuple(TIME_CHUNK if dim == "time" else size for dim, size in zip(dims, values.shape, strict=True))
    there = group.get(name)
    if isinstance(there, zarr.Array) and there.chunks == chunks and there.dtype == values.dtype:
        # Readers of what was published before may look at any moment: nothing of it is taken away and put back.
        if there.shape != values.shape:
            there.resize(values.shape)
        if dict(there.attrs) != dict(attrs):
            there.attrs.put(dict(attrs))
        if not np.array_equal(there[...], values):
            there[...] = values
        return
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=chunks,
        dtype=values.dtype,
        dimension_names=list(dims),
        attributes=dict(attrs),
        compressors=[BloscCodec(cname="zstd", clevel=3, typesize=values.dtype.itemsize)],
        fill_value=0,
        overwrite=True,
    )
    array[...] = values


@dataclass(frozen=True)
class Times:
    """What stands along ``time``, per slot: the day shown, first day and the one after the last, whether finished."""

    days: NDArray[np.int64]
    bounds: NDArray[np.int64]
    published: NDArray[np.uint8]


def put_array(store: Store, level: int, name: str, spec: LayerSpec, grid: Grid, slots: int) -> None:
    """Write the metadata of a layer's array, or of its overview."""
    more = {"resampling_method": spec.resampling} if level else {}
    metadata = array_metadata(replace(spec, attrs={**spec.attrs, **more}), grid, slots, overview=level > 0)
    for key, buffer in metadata.to_buffer_dict(default_buffer_prototype()).items():
        sync(store.set(f"{level}/{name}/{key}", buffer))


def _put_coordinates(group: zarr.Group, grid: Grid, times: Times) -> None:
    _put(group, "x", grid.x, ["x"], {"standard_name": "projection_x_coordinate", "units": "m", "axis": "X"})
    _put(group, "y", grid.y, ["y"], {"standard_name": "projection_y_coordinate", "units": "m", "axis": "Y"})
    _put(group, "spatial_ref", np.array(0, np.int64), [], conventions.spatial_ref(grid))
    units = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}
    _put(group, "time_bnds", times.bounds, ["time", "nv"], units)
    _put(group, "time", times.days, ["time"], {**units, "standard_name": "time", "bounds": "time_bnds", "axis": "T"})
    flags = {"long_name": "period is finished", "flag_values": [0, 1], "flag_meanings": "unfinished finished"}
    _put(group, "published", times.published, ["time"], flags)


def put_levels(
    store: Store,
    grids: Sequence[Grid],
    specs: Mapping[str, LayerSpec],
    times: Times,
    attrs: Mapping[str, Any],
    *,
    consolidated: bool,
) -> None:
    """Write shapes, coordinates and attributes of all levels.

    Args:
        store: where.
        grids: of the levels, the finest first.
        specs: the layers, alike in all levels.
        times: what stands along ``time``.
        attrs: of level 0; ``cloudgate`` only there and on the root.
        consolidated: write consolidated metadata last.
    """
    store = _Compact(store)
    root = zarr.open_group(store, mode="a")  # keeps what was consolidated before until the new stands
    for level, grid in reversed(list(enumerate(grids))):
        group = zarr.open_group(store, path=str(level), mode="a", use_consolidated=False)
        for name, spec in specs.items():
            put_array(store, level, name, spec, grid, len(times.days))
        _put_coordinates(group, grid, times)
        about = {k: v for k, v in attrs.items() if k != "cloudgate"} if level else attrs  # once is enough
        group.attrs.put({**conventions.level_attributes(grid), **about})
    root.attrs.put({**conventions.root_attributes(grids), **attrs})
    if consolidated:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            zarr.consolidate_metadata(store)
