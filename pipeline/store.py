"""The mosaic on disk: in come finished layers by whole shards, out comes a Zarr v3 store that plain xarray opens.

Layers are written first, into places no reader looks at yet; ``publish`` then writes shapes, ``time`` and
``published`` with the consolidated metadata last, so a half-written period is never taken for a finished one.
Arrays lie in group ``0`` as ``(time, y, x)``; attributes and conventions stand on the root and on the group.
"""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec
from zarr.core.array import AsyncArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import StorePath

from pipeline import conventions
from pipeline.bands import BANDS, CODE_OFFSET, CODE_SCALE
from pipeline.errors import StoreError, StoreMismatchError
from pipeline.grid import CHUNK_PX, Grid
from pipeline.periods import Period

LAYOUT_VERSION = 1
GROUP = "0"
TIME_CHUNK = 512
"""Slots in one chunk of a coordinate along ``time``: fixed, so that growing never rewrites a chunk's place."""

FLAGS = {
    "no_data": 1,
    "observed_at_anchor": 2,
    "composed_in_time": 4,
    "model_only": 8,
    "read_failed": 16,
    "low_confidence": 32,
    "other_season": 64,
    "sar_guided": 128,
    "outside_area": 256,
    "blended_anchors": 512,
}
"""Bits of the ``flags`` layer."""


@dataclass(frozen=True)
class LayerSpec:
    """One array of the store: dtype, fill value, CF attributes."""

    dtype: str
    fill: int
    attrs: Mapping[str, Any] = field(default_factory=dict)


def layer_specs(bands: Sequence[str], *, uncertainty: bool) -> dict[str, LayerSpec]:
    """The arrays of a mosaic by name, in order: bands, provenance layers, uncertainties where the method fills them."""
    specs = {
        band: LayerSpec(
            "uint16",
            0,
            {
                "long_name": f"surface reflectance, {band}",
                "standard_name": "surface_bidirectional_reflectance",
                "units": "1",
                "scale_factor": CODE_SCALE,
                "add_offset": -CODE_OFFSET * CODE_SCALE,
                "_FillValue": 0,
                "wavelength_nm": BANDS[band].wavelength_nm,
            },
        )
        for band in bands
    }
    specs["clear_count"] = LayerSpec("uint16", 0, {"long_name": "clear looks in the span", "units": "1"})
    specs["source_date"] = LayerSpec(
        "int32",
        0,
        {
            "long_name": "date of the look that the pixel shows",
            "units": "days since 1970-01-01",
            "_FillValue": 0,
        },
    )
    specs["flags"] = LayerSpec(
        "uint16",
        0,
        {
            "long_name": "what made the pixel",
            "flag_masks": list(FLAGS.values()),
            "flag_meanings": " ".join(FLAGS),
        },
    )
    if uncertainty:
        for band in bands:
            specs[f"uncertainty_{band}"] = LayerSpec(
                "uint16",
                65535,
                {
                    "long_name": f"one sigma of the reflectance, {band}",
                    "units": "1",
                    "scale_factor": CODE_SCALE,
                    "_FillValue": 65535,
                },
            )
    return specs


def _array_metadata(spec: LayerSpec, grid: Grid, slots: int) -> ArrayV3Metadata:
    shard = (1, grid.shard_px, grid.shard_px)
    chunk = (1, min(CHUNK_PX, grid.shard_px), min(CHUNK_PX, grid.shard_px))
    blosc = BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=np.dtype(spec.dtype).itemsize)
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, blosc.to_dict()]
    sharding: dict[str, Any] = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk),
            "codecs": inner,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    return ArrayV3Metadata.from_dict(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [slots, grid.height, grid.width],
            "data_type": spec.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": spec.fill,
            "codecs": [sharding],
            "dimension_names": ["time", "y", "x"],
            "attributes": {**spec.attrs, "grid_mapping": "spatial_ref"},
        }
    )


def _array(store: zarr.storage.LocalStore, name: str, spec: LayerSpec, grid: Grid, slots: int) -> zarr.Array[Any]:
    """The array as it will be, without touching its metadata on disk."""
    place = StorePath(store, f"{GROUP}/{name}")
    return zarr.Array(AsyncArray(metadata=_array_metadata(spec, grid, slots), store_path=place))


def write_region(
    path: str | Path,
    grid: Grid,
    slot: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    layers: Mapping[str, NDArray[Any]],
) -> int:
    """Write whole shards of one period.

    Args:
        path: the store.
        grid: the mosaic's grid.
        slot: index on ``time``.
        rows: [r0, r1) of the region in the grid; must begin at a shard and end at one or at the grid's edge.
        cols: [c0, c1), likewise.
        layers: name -> (rows, cols) array of the layer's dtype (codes for bands).

    Returns:
        Bytes of the arrays before compression.

    Raises:
        StoreError: disk full or no permission. ValueError: a region that cuts a shard.
    """
    for (start, stop), size in ((rows, grid.height), (cols, grid.width)):
        if start % grid.shard_px or (stop % grid.shard_px and stop != size):
            raise ValueError(f"region {rows} x {cols} cuts a shard of {grid.shard_px} px; two writers could meet in it")
    specs = layer_specs(tuple(BANDS), uncertainty=True)
    store = zarr.storage.LocalStore(path)
    total = 0
    try:
        for name, values in layers.items():
            array = _array(store, name, specs[name], grid, slot + 1)
            array[slot, rows[0] : rows[1], cols[0] : cols[1]] = values.astype(specs[name].dtype, copy=False)
            total += values.nbytes
    except OSError as error:
        raise StoreError(
            f"store {path}: writing failed: {error}; free space or check permissions, then run the same command again: "
            "it goes on after the last finished shard"
        ) from error
    return total


def _put(group: zarr.Group, name: str, values: NDArray[Any], dims: Sequence[str], attrs: Mapping[str, Any]) -> None:
    """Write a small coordinate in one chunk; along ``time`` the chunk has room, so that it never changes."""
    chunks = tuple(TIME_CHUNK if dim == "time" else size for dim, size in zip(dims, values.shape, strict=True))
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


def _put_coordinates(group: zarr.Group, grid: Grid, schedule: Sequence[Period], published: Sequence[bool]) -> None:
    _put(group, "x", grid.x, ["x"], {"standard_name": "projection_x_coordinate", "units": "m", "axis": "X"})
    _put(group, "y", grid.y, ["y"], {"standard_name": "projection_y_coordinate", "units": "m", "axis": "Y"})
    _put(group, "spatial_ref", np.array(0, np.int64), [], conventions.spatial_ref(grid))
    days = np.array([period.target for period in schedule], np.int64)
    bounds = np.array([[period.start, period.end + 1] for period in schedule], np.int64)
    units = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}
    _put(group, "time_bnds", bounds, ["time", "nv"], units)
    _put(group, "time", days, ["time"], {**units, "standard_name": "time", "bounds": "time_bnds", "axis": "T"})
    flags = {"long_name": "period is finished", "flag_values": [0, 1], "flag_meanings": "unfinished finished"}
    _put(group, "published", np.array(published, np.uint8), ["time"], flags)


def publish(
    path: str | Path,
    grid: Grid,
    bands: Sequence[str],
    *,
    uncertainty: bool,
    schedule: Sequence[Period],
    published: Sequence[bool],
    attrs: Mapping[str, Any],
) -> None:
    """Make written periods visible: shapes, coordinates, ``published`` and attributes, consolidated metadata last.

    Args:
        path: the store.
        grid: its grid.
        bands: its bands in order.
        uncertainty: whether ``uncertainty_<band>`` arrays exist.
        schedule: the periods of slots 0..n-1.
        published: per slot, whether the period is finished.
        attrs: group attributes (identity, provenance of each period); JSON values.

    Raises:
        StoreError: disk full or no permission.
    """
    store = zarr.storage.LocalStore(path)
    for partial in Path(path).rglob("*.partial"):  # a killed writer's
        partial.unlink(missing_ok=True)
    everything = {**conventions.attributes(grid), "Conventions": "CF-1.11", "bands": list(bands), **attrs}
    try:
        zarr.open_group(store, mode="a", use_consolidated=False).attrs.put(everything)
        group = zarr.open_group(store, path=GROUP, mode="a", use_consolidated=False)
        for name, spec in layer_specs(bands, uncertainty=uncertainty).items():
            metadata = _array_metadata(spec, grid, len(schedule))
            for key, buffer in metadata.to_buffer_dict(default_buffer_prototype()).items():
                sync(store.set(f"{GROUP}/{name}/{key}", buffer))
        _put_coordinates(group, grid, schedule, published)
        group.attrs.put(everything)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            zarr.consolidate_metadata(store)
    except OSError as error:
        raise StoreError(
            f"store {path}: publishing failed: {error}; free space or check permissions, then run the same command "
            "again"
        ) from error


def read_attrs(path: str | Path) -> dict[str, Any] | None:
    """Attributes of a published store, None where nothing was published yet.

    Raises:
        StoreMismatchError: if another program's data lie at ``path``.
    """
    path = Path(path)
    if not (path / GROUP / "zarr.json").exists():
        half_written = path.is_dir() and {p.name for p in path.iterdir()} <= {GROUP, "zarr.json"}
        if path.exists() and not half_written:
            raise StoreMismatchError(f"output.store: {path} exists and is no cloudgate store; choose another path")
        return None
    attrs = dict(zarr.open_group(str(path), path=GROUP, mode="r").attrs)
    if "cloudgate" not in attrs:
        raise StoreMismatchError(f"output.store: {path} was written by another program; choose another path")
    return attrs


def remove(path: str | Path) -> None:
    """Remove a store of ours, or what a run left of one; anything else at ``path`` is refused.

    Raises:
        StoreMismatchError: if another program's data lie there.
    """
    read_attrs(path)
    shutil.rmtree(path, ignore_errors=True)


def open_mosaic(*, store: str | Path, group: str = GROUP) -> xr.Dataset:
    """Open a finished mosaic lazily.

    Args:
        store: path of the Zarr store.
        group: level, ``"0"`` is full resolution.

    Returns:
        Dataset, one variable per layer, dims ``(time, y, x)``, Dask-backed in whole shards: bands and ``uncertainty_*``
        float32 reflectance (NaN = no data), ``source_date`` datetime64 (NaT = none), ``clear_count`` and ``flags``
        uint16. Only finished periods. ``spatial_ref`` is a coordinate.

    Raises:
        StoreMismatchError: if there is no mosaic at that path, or no finished period yet.
    """
    path = Path(store)
    if read_attrs(path) is None:
        raise StoreMismatchError(
            f"store: there is no finished mosaic at {path}; run `cloudgate status {path}` to see how far it is"
        )
    dataset = xr.open_zarr(str(path), group=group, decode_cf=False, chunks={})
    scaled = [name for name in dataset.data_vars if "scale_factor" in dataset[name].attrs]
    for name in scaled:
        values = dataset[name]
        scale, offset = values.attrs["scale_factor"], values.attrs.get("add_offset", 0.0)
        codes = round(offset / scale)
        real = (values.astype("float32") + np.float32(codes)) / np.float32(
            1 / scale
        )  # division rounds to the nearest float32
        keep = {k: v for k, v in values.attrs.items() if k not in ("scale_factor", "add_offset", "_FillValue")}
        decoded = real.where(values != values.attrs["_FillValue"])
        decoded.attrs = keep
        dataset[name] = decoded
    dataset = xr.decode_cf(dataset, mask_and_scale=True, decode_coords="all")
    ordered = [name for name in (*dataset.attrs["bands"], *dataset.data_vars) if name in dataset.data_vars]
    dataset = dataset[list(dict.fromkeys(ordered))]
    return dataset.isel(time=np.flatnonzero(dataset["published"].values)).drop_vars("published")
