"""The mosaic in its place: in come finished layers by whole shards, out comes a Zarr v3 store that plain xarray opens.

Layers are written first, into places no reader looks at yet; ``publish`` then writes shapes, ``time`` and
``published`` with the consolidated metadata last, so a half-written period is never taken for a finished one. Where
that place is, in a folder, a bucket or a repository, is ``pipeline.locations``' business.
Arrays lie in group ``0`` as ``(time, y, x)``, overviews in ``1``, ``2``, ...; attributes and conventions stand on the
root and on the groups.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.array import AsyncArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StorePath

from pipeline import conventions
from pipeline.bands import BANDS
from pipeline.errors import StoreMismatchError
from pipeline.grid import Grid
from pipeline.layers import LayerSpec, array_metadata, layer_specs
from pipeline.locations import store_at
from pipeline.metadata import Times, put_array, put_levels
from pipeline.objects import telling
from pipeline.periods import Period

if TYPE_CHECKING:
    import xarray as xr

LAYOUT_VERSION = 1
GROUP = "0"


def unit_of(slot: int) -> str:
    """The unit of work that writes a period."""
    return f"period-{slot:04d}"


OVERVIEWS = "overviews"
"""The unit of work that gives a finished store its overviews."""


def _array(store: Store, group: str, name: str, spec: LayerSpec, grid: Grid, slots: int) -> zarr.Array[Any]:
    """The array as it will be, without touching its metadata where it lies."""
    place = StorePath(store, f"{group}/{name}")
    return zarr.Array(AsyncArray(metadata=array_metadata(spec, grid, slots, overview=group != GROUP), store_path=place))


def begin(
    path: str | Path, grids: Mapping[int, Grid], layers: tuple[Sequence[str], bool], slot: int, unit: str | None = None
) -> None:
    """Make the store ready for shards of a period, where it must know of their arrays first.

    Args:
        path: the store.
        grids: the levels that will be written.
        layers: the bands, and whether there are uncertainties.
        slot: index on ``time``.
        unit: what the shards are part of; default: the period.

    Raises:
        StoreError: disk full, no permission, not reachable; as all that follow.
    """
    place = store_at(path)

    def prepare(store: Store) -> None:
        zarr.open_group(store, mode="a", use_consolidated=False)
        for level, grid in grids.items():
            zarr.open_group(store, path=str(level), mode="a", use_consolidated=False)
            for name, spec in layer_specs(layers[0], uncertainty=layers[1]).items():
                there = sync(store.get(f"{level}/{name}/zarr.json", default_buffer_prototype()))
                if there is None or json.loads(there.to_bytes())["shape"][0] <= slot:
                    put_array(store, level, name, spec, grid, slot + 1)

    with telling(f"write {place.where}"):
        place.begin(unit or unit_of(slot), prepare)


def write_region(
    path: str | Path,
    grid: Grid,
    slot: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    layers: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]],
    *,
    group: str = GROUP,
    unit: str | None = None,
) -> Any:
    """Write whole shards of one period.

    Args:
        path: the store.
        grid: the mosaic's grid, or the level's.
        slot: index on ``time``.
        rows: [r0, r1) of the region in the grid; must begin at a shard and end at one or at the grid's edge.
        cols: [c0, c1), likewise.
        layers: name -> (rows, cols) array of the layer's dtype (codes for bands), or pairs of them, taken one by one.
        group: the level.
        unit: what the shards are part of; default: the period.

    Returns:
        What ``keep`` must be given before the shards count as done; may be pickled, holds no pixels.

    Raises:
        StoreError: see ``begin``. ValueError: a region that cuts a shard.
    """
    for (start, stop), size in ((rows, grid.height), (cols, grid.width)):
        if start % grid.shard_px or (stop % grid.shard_px and stop != size):
            raise ValueError(f"region {rows} x {cols} cuts a shard of {grid.shard_px} px; two writers could meet in it")
    specs = layer_specs(tuple(BANDS), uncertainty=True)
    place = store_at(path)
    with telling(f"write {place.where}"):
        store = place.writer(unit or unit_of(slot))
        for name, values in layers.items() if isinstance(layers, Mapping) else layers:
            array = _array(store, group, name, specs[name], grid, slot + 1)
            array[slot, rows[0] : rows[1], cols[0] : cols[1]] = values.astype(specs[name].dtype, copy=False)
        return place.changes(store)


def keep(path: str | Path, slot: int, changes: Any, unit: str | None = None) -> None:
    """Make shards last that a worker wrote; ``changes`` is what ``write_region`` gave. Call before marking them."""
    place = store_at(path)
    with telling(f"write {place.where}"):
        place.keep(unit or unit_of(slot), changes)


def discard(path: str | Path, slot: int) -> None:
    """Forget the shards of a period that were kept and not published."""
    place = store_at(path)
    with telling(f"write {place.where}"):
        place.discard(unit_of(slot))


def read_region(
    path: str | Path,
    grid: Grid,
    slot: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    name: str,
    *,
    group: str = GROUP,
    unit: str | None = None,
    published: bool = False,
) -> NDArray[Any]:
    """Read back what ``write_region`` wrote: (rows, cols) of one layer, fill where nothing is.

    ``published`` reads what readers see, otherwise what was written last, be it of a period that is not whole yet.
    """
    place = store_at(path)
    with telling(f"read {place.where}"):
        store = place.reader() if published else place.written(unit or unit_of(slot))
        array = _array(store, group, name, layer_specs(tuple(BANDS), uncertainty=True)[name], grid, slot + 1)
        return np.asarray(array[slot, rows[0] : rows[1], cols[0] : cols[1]])


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
    unit: str = "",
    message: str = "published",
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
        unit: of work, see ``unit_of``; none where only metadata change.
        message: for stores with a history.

    Raises:
        StoreError: see ``begin``.
    """
    times = Times(
        np.array([period.target for period in schedule], np.int64),
        np.array([[period.start, period.end + 1] for period in schedule], np.int64),
        np.array(published, np.uint8),
    )
    everything = {"Conventions": "CF-1.11", "bands": list(bands), **attrs}
    specs = layer_specs(bands, uncertainty=uncertainty)
    _publish(path, grid.levels(levels), specs, times, everything, (unit, message))


def publish_overviews(path: str | Path, levels: int) -> None:
    """Make overviews visible that were written for all published periods of a finished store.

    Raises:
        StoreMismatchError: without a finished store. StoreError: see ``begin``.
    """
    attrs = finished(path)
    store = store_at(path).reader()
    there = [zarr.open_array(store, path=f"{GROUP}/{name}", mode="r") for name in ("time", "time_bnds", "published")]
    times = Times(*(np.asarray(array[:]) for array in there))
    grid = Grid.from_dict(attrs["cloudgate"]["grid"])
    own = {name: value for name, value in attrs.items() if name not in conventions.level_attributes(grid)}
    specs = layer_specs(attrs["bands"], uncertainty=uncertain(path, attrs["bands"]))
    _publish(path, grid.levels(levels), specs, times, own, (OVERVIEWS, f"overviews: levels 1 to {levels}"))


def open_root(path: str | Path) -> zarr.Group:
    """The root group of a published store as readers see it, by the consolidated metadata, which are written last.

    Raises:
        FileNotFoundError, ValueError: if nothing is published.
    """
    place = store_at(path)
    if not place.holds("zarr.json"):
        raise FileNotFoundError(f"{place.where} holds no group")
    return zarr.open_group(place.reader(), mode="r", use_consolidated=place.consolidated)


def levels(path: str | Path) -> int:
    """How many overviews readers of a store find."""
    with telling(f"read {path}"):
        try:
            root = open_root(path)
        except (FileNotFoundError, ValueError):
            return 0
        return sum(1 for name in root.group_keys() if name.isdigit()) - 1


def uncertain(path: str | Path, bands: Sequence[str]) -> bool:
    """Whether a published store of these bands has uncertainties."""
    return store_at(path).holds(f"{GROUP}/uncertainty_{bands[0]}/zarr.json")


def _publish(
    path: str | Path,
    grids: Sequence[Grid],
    specs: Mapping[str, LayerSpec],
    times: Times,
    attrs: Mapping[str, Any],
    what: tuple[str, str],
) -> None:
    """Write the metadata of all levels and show them to readers; ``what``: unit, message."""
    place = store_at(path)
    with telling(f"publish {place.where}"), place.publishing(*what) as store:
        put_levels(store, grids, specs, times, attrs, consolidated=place.consolidated)


def replaces(path: str | Path) -> bool:
    """Whether readers see a period's old pixels until its new ones are whole, so that it need not be hidden."""
    return store_at(path).replaces


def read_attrs(path: str | Path) -> dict[str, Any] | None:
    """Attributes of a published store, None where nothing was published yet.

    Raises:
        StoreMismatchError: if another program's data lie at ``path``. StoreError: see ``begin``.
    """
    place = store_at(path)
    with telling(f"read {place.where}"):
        if not place.holds(f"{GROUP}/zarr.json"):
            if not _half_written(place.names()):
                raise StoreMismatchError(f"output.store: {path} exists and is no cloudgate store; choose another path")
            return None
        attrs = dict(zarr.open_group(place.reader(), path=GROUP, mode="r").attrs)
    if "cloudgate" not in attrs:
        raise StoreMismatchError(f"output.store: {path} was written by another program; choose another path")
    return attrs


def exists(path: str | Path) -> bool:
    """Whether anything of a store is there, published or not.

    Raises:
        StoreError: see ``begin``.
    """
    place = store_at(path)
    with telling(f"read {place.where}"):
        return place.exists()


def _half_written(names: set[str]) -> bool:
    """Whether what lies there can be what a stopped run left: level 0, perhaps overviews, nothing else; or nothing."""
    names = names - {"zarr.json"}
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
    place = store_at(path)
    with telling(f"remove {place.where}"):
        place.remove()


def open_mosaic(*, store: str | Path, group: str = GROUP) -> "xr.Dataset":
    """Open a finished mosaic lazily.

    Args:
        store: path or URL of the Zarr store, as in ``output.store``.
        group: level, ``"0"`` is full resolution.

    Returns:
        Dataset, one variable per layer, dims ``(time, y, x)``, Dask-backed in whole shards: bands and ``uncertainty_*``
        float32 reflectance (NaN = no data), ``source_date`` datetime64 (NaT = none), ``clear_count`` and ``flags``
        uint16. Only finished periods. ``spatial_ref`` is a coordinate.

    Raises:
        StoreMismatchError: if there is no mosaic at that path, no finished period yet, or no such level.
    """
    import xarray as xr  # half of the time it takes to start a command that shows a picture

    path, place = store, store_at(store)
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
    consolidated = None if place.consolidated else False
    with telling(f"read {place.where}"):
        dataset = xr.open_zarr(place.source(), group=group, decode_cf=False, chunks={}, consolidated=consolidated)
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
    known = layer_specs(dataset.attrs["bands"], uncertainty=True)  # a store lists its arrays in any order
    ordered = [name for name in (*known, *dataset.data_vars) if name in dataset.data_vars]
    dataset = dataset[list(dict.fromkeys(ordered))]
    return dataset.isel(time=np.flatnonzero(dataset["published"].values)).drop_vars("published")
