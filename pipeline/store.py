"""The mosaic on disk: in come finished layers by whole shards, out comes a Zarr v3 store that plain xarray opens.

Layers are written first, into places no reader looks at yet; ``publish`` then writes shapes, ``time`` and
``published`` with the consolidated metadata last, so a half-written period is never taken for a finished one.
Arrays lie in group ``0`` as ``(time, y, x)``, overviews in ``1``, ``2``, ...; attributes and conventions stand on the
root and on the groups.
"""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec
from zarr.core.array import AsyncArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StorePath

from pipeline import conventions
from pipeline.bands import BANDS
from pipeline.errors import StoreError, StoreMismatchError
from pipeline.grid import Grid
from pipeline.layers import LayerSpec, array_metadata, layer_specs
from pipeline.periods import Period

LAYOUT_VERSION = 1
GROUP = "0"
TIME_CHUNK = 512
"""Slots in one chunk of a coordinate along ``time``: fixed, so that growing never rewrites a chunk's place."""


def _array(
    store: zarr.storage.LocalStore, group: str, name: str, spec: LayerSpec, grid: Grid, slots: int
) -> zarr.Array[Any]:
    """The array as it will be, without touching its metadata on disk."""
    place = StorePath(store, f"{group}/{name}")
    return zarr.Array(AsyncArray(metadata=array_metadata(spec, grid, slots, overview=group != GROUP), store_path=place))


def write_region(
    path: str | Path,
    grid: Grid,
    slot: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    layers: Mapping[str, NDArray[Any]],
    *,
    group: str = GROUP,
) -> int:
    """Write whole shards of one period.

    Args:
        path: the store.
        grid: the mosaic's grid, or the level's.
        slot: index on ``time``.
        rows: [r0, r1) of the region in the grid; must begin at a shard and end at one or at the grid's edge.
        cols: [c0, c1), likewise.
        layers: name -> (rows, cols) array of the layer's dtype (codes for bands).
        group: the level.

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
            array = _array(store, group, name, specs[name], grid, slot + 1)
            array[slot, rows[0] : rows[1], cols[0] : cols[1]] = values.astype(specs[name].dtype, copy=False)
            total += values.nbytes
    except OSError as error:
        raise StoreError(
            f"store {path}: writing failed: {error}; free space or check permissions, then run the same command again: "
            "it goes on after the last finished shard"
        ) from error
    return total


def read_region(
    path: str | Path,
    grid: Grid,
    slot: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    name: str,
    *,
    group: str = GROUP,
) -> NDArray[Any]:
    """Read back what ``write_region`` wrote, published or not: (rows, cols) of one layer, fill where nothing is."""
    array = _array(
        zarr.storage.LocalStore(path), group, name, layer_specs(tuple(BANDS), uncertainty=True)[name], grid, slot + 1
    )
    return np.asarray(array[slot, rows[0] : rows[1], cols[0] : cols[1]])


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


@dataclass(frozen=True)
class _Times:
    """What stands along ``time``, per slot: the day shown, first day and the one after the last, whether finished."""

    days: NDArray[np.int64]
    bounds: NDArray[np.int64]
    published: NDArray[np.uint8]


def _put_coordinates(group: zarr.Group, grid: Grid, times: _Times) -> None:
    _put(group, "x", grid.x, ["x"], {"standard_name": "projection_x_coordinate", "units": "m", "axis": "X"})
    _put(group, "y", grid.y, ["y"], {"standard_name": "projection_y_coordinate", "units": "m", "axis": "Y"})
    _put(group, "spatial_ref", np.array(0, np.int64), [], conventions.spatial_ref(grid))
    units = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}
    _put(group, "time_bnds", times.bounds, ["time", "nv"], units)
    _put(group, "time", times.days, ["time"], {**units, "standard_name": "time", "bounds": "time_bnds", "axis": "T"})
    flags = {"long_name": "period is finished", "flag_values": [0, 1], "flag_meanings": "unfinished finished"}
    _put(group, "published", times.published, ["time"], flags)


def publish(
    path: str | Path,
    grid: Grid,
    bands: Sequence[str],
    *,
    uncertainty: bool,
    schedule: Sequence[Period],
    published: Sequence[bool],
    attrs: Mapping[str, Any],
    levels: int = 0,
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
        levels: how many overviews all published periods have.

    Raises:
        StoreError: disk full or no permission.
    """
    times = _Times(
        np.array([period.target for period in schedule], np.int64),
        np.array([[period.start, period.end + 1] for period in schedule], np.int64),
        np.array(published, np.uint8),
    )
    everything = {"Conventions": "CF-1.11", "bands": list(bands), **attrs}
    _publish(path, grid.levels(levels), layer_specs(bands, uncertainty=uncertainty), times, everything)


def publish_overviews(path: str | Path, levels: int) -> None:
    """Make overviews visible that were written for all published periods of a finished store.

    Raises:
        StoreMismatchError: without a finished store. StoreError: disk full or no permission.
    """
    attrs = finished(path)
    store = zarr.storage.LocalStore(path)
    there = [zarr.open_array(store, path=f"{GROUP}/{name}", mode="r") for name in ("time", "time_bnds", "published")]
    times = _Times(*(np.asarray(array[:]) for array in there))
    grid = Grid.from_dict(attrs["cloudgate"]["grid"])
    own = {name: value for name, value in attrs.items() if name not in conventions.level_attributes(grid)}
    specs = layer_specs(attrs["bands"], uncertainty=uncertain(path, attrs["bands"]))
    _publish(path, grid.levels(levels), specs, times, own)


def levels(path: str | Path) -> int:
    """How many overviews readers of a store find: of the consolidated metadata, which are written last."""
    try:
        root = zarr.open_group(zarr.storage.LocalStore(path), mode="r", use_consolidated=True)
    except (FileNotFoundError, ValueError):
        return 0
    return sum(1 for name in root.group_keys() if name.isdigit()) - 1


def uncertain(path: str | Path, bands: Sequence[str]) -> bool:
    """Whether a published store of these bands has uncertainties."""
    return f"uncertainty_{bands[0]}" in zarr.open_group(zarr.storage.LocalStore(path), path=GROUP, mode="r")


def _publish(
    path: str | Path, grids: Sequence[Grid], specs: Mapping[str, LayerSpec], times: _Times, attrs: Mapping[str, Any]
) -> None:
    """Write the levels' metadata, the coarsest first, then the root's, consolidated last."""
    store = zarr.storage.LocalStore(path)
    for partial in Path(path).rglob("*.partial"):  # a killed writer's
        partial.unlink(missing_ok=True)
    try:
        root = zarr.open_group(store, mode="a")  # keeps what was consolidated before until the new stands
        for level, grid in reversed(list(enumerate(grids))):
            group = zarr.open_group(store, path=str(level), mode="a", use_consolidated=False)
            for name, spec in specs.items():
                more = {"resampling_method": spec.resampling} if level else {}
                metadata = array_metadata(
                    replace(spec, attrs={**spec.attrs, **more}), grid, len(times.days), overview=level > 0
                )
                for key, buffer in metadata.to_buffer_dict(default_buffer_prototype()).items():
                    sync(store.set(f"{level}/{name}/{key}", buffer))
            _put_coordinates(group, grid, times)
            about = {k: v for k, v in attrs.items() if k != "cloudgate"} if level else attrs  # once is enough
            group.attrs.put({**conventions.level_attributes(grid), **about})
        root.attrs.put({**conventions.root_attributes(grids), **attrs})
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
        if path.exists() and not _half_written(path):
            raise StoreMismatchError(f"output.store: {path} exists and is no cloudgate store; choose another path")
        return None
    attrs = dict(zarr.open_group(str(path), path=GROUP, mode="r").attrs)
    if "cloudgate" not in attrs:
        raise StoreMismatchError(f"output.store: {path} was written by another program; choose another path")
    return attrs


def _half_written(path: Path) -> bool:
    """Whether a folder without metadata can be what a stopped run left: level 0, perhaps overviews, nothing else."""
    names = {p.name for p in path.iterdir()} - {"zarr.json"} if path.is_dir() else {"a file"}
    return not names or (GROUP in names and names <= {str(level) for level in range(20)})


def finished(path: str | Path) -> dict[str, Any]:
    """Attributes of a store with a finished period.

    Raises:
        StoreMismatchError: if there is none at ``path``.
    """
    attrs = read_attrs(path)
    if attrs is None:
        raise StoreMismatchError(
            f"store: there is no finished mosaic at {path}; run `cloudgate status {path}` to see how far it is"
        )
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
        StoreMismatchError: if there is no mosaic at that path, no finished period yet, or no such level.
    """
    path = Path(store)
    about = finished(path)
    coarsest = levels(path)
    if group not in [str(level) for level in range(coarsest + 1)]:
        raise StoreMismatchError(
            f"group: {path} has no level {group!r}; "
            + (
                f"its levels are 0 to {coarsest}"
                if coarsest
                else f"it has no overviews yet: make them with `cloudgate export {path} --overviews`"
            )
        )
    dataset = xr.open_zarr(str(path), group=group, decode_cf=False, chunks={})
    dataset.attrs["cloudgate"] = about["cloudgate"]
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
