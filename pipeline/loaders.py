"""stackstac and odc-stac as ways to a lazy stack: in come items and a grid, out comes a Dask array of codes or states.

Both libraries lay out the graph; the pixels always come from ``pipeline.reader``, wrapped as stackstac's ``reader=``
and odc-stac's ``driver=``, so both give the same bytes as a direct ``read_window``. Neither sees the items' own
projection metadata (stackstac reads only ``proj:epsg``, odc-stac changed its mind about them twice): each asset is
handed over with its footprint *on the grid*, and the grid is checked afterwards. The href they carry is a description
of the asset without any token; signing happens inside the read.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, Literal
from urllib.parse import quote, unquote

import dask.array as da
import numpy as np
import pystac
import xarray as xr
from numpy.typing import NDArray
from odc.loader import RasterLoadParams, RasterSource, RioDriver
from odc.stac import load as odc_load
from pyproj import CRS
from rasterio.windows import Window
from stackstac import stack
from stackstac.raster_spec import RasterSpec

from pipeline.codes import dn_to_codes
from pipeline.errors import ConfigError, ItemError
from pipeline.grid import Grid
from pipeline.items import Asset, Item
from pipeline.mask_reading import read_state
from pipeline.outlines import window_of
from pipeline.profiles import MaskRule, Profile
from pipeline.reader import read_window

Loader = Literal["stackstac", "odc"]

_SCHEME: Final = "cloudgate:///"
_FIRST: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Stand-in time of the first layer: the loaders sort by time, we keep our own order."""


@dataclass(frozen=True)
class Task:
    """What every read of one stack has in common. Pickled into the graph: holds no token.

    Attributes:
        grid: the whole grid.
        profile: credentials (by kind), retries and GDAL settings.
        rule: how classes become states; None for bands.
    """

    grid: Grid
    profile: Profile | None = None
    rule: MaskRule | None = None

    def read(self, href: str, rows: tuple[int, int], cols: tuple[int, int]) -> NDArray[Any]:
        """Codes, or states where there is a rule, of rows and columns of the grid."""
        asset, offset_dn = _described(href)
        window = self.grid.window(rows, cols)
        if self.rule is None:
            return dn_to_codes(read_window(asset, window, profile=self.profile), asset, offset_dn)
        return read_state(asset, window, self.rule, self.profile)

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint8]:
        """Of the stack."""
        return np.uint16 if self.rule is None else np.uint8


def _describe(asset: Asset, offset_dn: int | None) -> str:
    return _SCHEME + quote(json.dumps({"asset": asdict(asset), "offset_dn": offset_dn}), safe="")


def _described(href: str) -> tuple[Asset, int | None]:
    data = json.loads(unquote(href.removeprefix(_SCHEME)))
    asset = data["asset"]
    asset |= {"shape": tuple(asset["shape"]), "transform": tuple(asset["transform"])}
    return Asset(**asset), data["offset_dn"]


def open_stack(items: Sequence[Item], names: Sequence[str], task: Task, *, loader: Loader, chunk_px: int) -> da.Array:
    """A lazy stack of scenes, nothing read.

    Args:
        items: scenes in the order of the layers; each has every name and a decided offset.
        names: bands, or the mask's raster alone.
        task: grid, and how to read.
        loader: ``stackstac`` or ``odc``.
        chunk_px: side of a chunk in pixels.

    Returns:
        (item, name, y, x): uint16 codes, or uint8 states where ``task`` has a rule; 0 = no data. Chunks hold one scene
        and one name.

    Raises:
        ConfigError: for an unknown loader, or a CRS that stackstac cannot express.
    """
    loaders = {"stackstac": _stackstac, "odc": _odc}
    if loader not in loaders:
        raise ConfigError(f"loader: unknown {loader!r}; use one of {', '.join(loaders)}")
    scenes = [_Scene.of(number, item, names, task.grid) for number, item in enumerate(items)]
    return loaders[loader](scenes, names, task, chunk_px)


@dataclass(frozen=True)
class _Scene:
    """A scene as both loaders understand it: hrefs, and one footprint as a rectangle of the grid's own pixels."""

    number: int
    hrefs: Mapping[str, str]
    span: tuple[int, int, int, int] | None

    @classmethod
    def of(cls, number: int, item: Item, names: Sequence[str], grid: Grid) -> "_Scene":
        assets = {name: _asset(item, name) for name in names}
        spans = [span for asset in assets.values() if (span := window_of(asset, grid))]
        r0, r1, c0, c1 = zip(*spans, strict=True) if spans else ((0,),) * 4
        return cls(
            number,
            {name: _describe(asset, item.offset_dn) for name, asset in assets.items()},
            (min(r0), max(r1), min(c0), max(c1)) if spans else None,
        )

    @property
    def time(self) -> datetime:
        return _FIRST + timedelta(seconds=self.number)

    def projection(self, grid: Grid) -> dict[str, Any]:
        """``proj:shape`` and ``proj:transform`` of the footprint, on the grid; one pixel where it lies elsewhere."""
        r0, r1, c0, c1 = self.span or (0, 1, 0, 1)
        part = grid.window((r0, r1), (c0, c1))
        return {"proj:shape": [r1 - r0, c1 - c0], "proj:transform": [*part.transform][:6]}


def _asset(item: Item, name: str) -> Asset:
    asset = item.assets.get(name)
    if asset is None:
        raise ItemError(
            f"item {item.id}: it has no asset {name!r} (it has {', '.join(item.assets)}); "
            "drop the item or the band, or choose another profile"
        )
    return asset


def _scatter(part: da.Array, numbers: Sequence[int], count: int, task: Task, chunk_px: int) -> da.Array:
    """Put the layers a loader kept back in their places; the scenes it dropped, off the grid, have no data."""
    if list(numbers) == list(range(count)):
        return part
    empty = da.zeros((1, *part.shape[1:]), dtype=task.dtype, chunks=(1, 1, chunk_px, chunk_px))
    place = {number: index for index, number in enumerate(numbers)}
    return da.concatenate([part[place[n] : place[n] + 1] if n in place else empty for n in range(count)], axis=0)


class StackstacReader:
    """Our reader as stackstac's ``reader=``: reads when asked, keeps nothing that cannot be pickled."""

    def __init__(self, *, url: str, task: Task, **_: Any) -> None:
        self.url, self.task = url, task

    def read(self, window: Window) -> NDArray[Any]:
        """The pixels of a window of the grid."""
        rows, cols = window.toranges()
        return self.task.read(self.url, rows, cols)

    def close(self) -> None:
        """Nothing to do: open datasets belong to ``pipeline.handles``."""


def _stackstac(scenes: list[_Scene], names: Sequence[str], task: Task, chunk_px: int) -> da.Array:
    grid = task.grid
    epsg = CRS.from_user_input(grid.crs).to_epsg()
    if epsg is None:
        raise ConfigError(
            f"loader: stackstac needs a grid whose CRS has an EPSG code, got {grid.crs[:40]}...; use loader: odc"
        )
    seen = [scene for scene in scenes if scene.span]
    if not seen:
        shape = (len(scenes), len(names), *grid.shape)
        return da.zeros(shape, dtype=task.dtype, chunks=(1, 1, chunk_px, chunk_px))
    cube = stack(
        [_plain_item(scene, names, grid, epsg) for scene in seen],
        assets=list(names),
        epsg=epsg,
        resolution=grid.resolution_m,
        bounds=grid.bounds,
        snap_bounds=False,
        xy_coords="center",
        chunksize=(1, 1, chunk_px, chunk_px),
        dtype=np.dtype(task.dtype),
        fill_value=task.dtype(0),
        rescale=False,
        sortby_date=False,
        properties=False,
        band_coords=False,
        errors_as_nodata=(),
        reader=partial(StackstacReader, task=task),
    )
    spec: RasterSpec = cube.attrs["spec"]
    _check_grid("stackstac", tuple(spec.transform)[:6], cube.shape[2:], grid)
    return _scatter(cube.data, [int(str(name)) for name in cube["id"].values], len(scenes), task, chunk_px)


def _plain_item(scene: _Scene, names: Sequence[str], grid: Grid, epsg: int) -> dict[str, Any]:
    west, south, east, north = grid.lonlat_bounds()
    return {
        "id": str(scene.number),
        "bbox": [west, south, east, north],
        "properties": {"datetime": scene.time.isoformat()},
        "assets": {name: {"href": scene.hrefs[name], "proj:epsg": epsg, **scene.projection(grid)} for name in names},
    }


class OdcReader:
    """One source of odc-stac, read by us."""

    def __init__(self, source: RasterSource, task: Task) -> None:
        self.source, self.task = source, task

    def read(
        self,
        cfg: RasterLoadParams,  # noqa: ARG002 - odc-stac's protocol
        dst_geobox: Any,
        *,
        dst: NDArray[Any] | None = None,
        selection: Any = None,  # noqa: ARG002
    ) -> tuple[tuple[slice, slice], NDArray[Any]]:
        """The pixels of a part of the grid, and where in that part they belong: everywhere."""
        grid = self.task.grid
        height, width = (int(side) for side in dst_geobox.shape)
        row = round((grid.top - dst_geobox.affine.f) / grid.resolution_m)
        col = round((dst_geobox.affine.c - grid.left) / grid.resolution_m)
        pixels = self.task.read(self.source.uri, (row, row + height), (col, col + width))
        if dst is not None:
            dst[...] = pixels
            pixels = dst
        return (slice(0, height), slice(0, width)), pixels


class OdcDriver(RioDriver):
    """Our reader as odc-stac's ``driver=``. Captures no environment, so no secret gets into the graph."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def capture_env(self) -> dict[str, Any]:
        """Nothing: GDAL's settings are applied inside each read."""
        return {}

    @contextmanager
    def restore_env(self, env: dict[str, Any], load_state: Any) -> Iterator[Any]:  # noqa: ARG002
        """Nothing to restore."""
        yield None

    def open(self, src: RasterSource, ctx: Any) -> OdcReader:  # type: ignore[override]  # noqa: ARG002
        """A reader of one source; nothing is opened yet."""
        return OdcReader(src, self.task)


def _odc(scenes: list[_Scene], names: Sequence[str], task: Task, chunk_px: int) -> da.Array:
    grid = task.grid
    with warnings.catch_warnings():  # odc-geo 0.5 calls a shapely function that 2.1 deprecates
        warnings.filterwarnings("ignore", message=r"The 'shapely\.ops\.transform", category=DeprecationWarning)
        loaded: xr.Dataset = odc_load(
            [_pystac_item(scene, names, task) for scene in scenes],
            bands=list(names),
            geobox=grid.geobox,
            groupby="id",
            chunks={"x": chunk_px, "y": chunk_px},
            dtype=np.dtype(task.dtype).name,
            driver=OdcDriver(task),
        )
    box = loaded.odc.geobox
    _check_grid("odc-stac", tuple(box.affine)[:6], tuple(box.shape), grid)
    times = np.array([scene.time.replace(tzinfo=None) for scene in scenes], "datetime64[ns]")
    if not np.array_equal(loaded["time"].values.astype("datetime64[ns]"), times):
        raise ItemError("odc-stac put the layers in another order than asked; report this, or use loader: stackstac")
    return da.stack([loaded[name].data for name in names], axis=1)


def _pystac_item(scene: _Scene, names: Sequence[str], task: Task) -> pystac.Item:
    grid = task.grid
    west, south, east, north = grid.lonlat_bounds()
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = pystac.Item(
        str(scene.number),
        {"type": "Polygon", "coordinates": [ring]},
        [west, south, east, north],
        scene.time,
        {},
    )
    item.stac_extensions = [
        "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
        "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    ]
    code = CRS.from_user_input(grid.crs).to_epsg()
    crs = {"proj:code": f"EPSG:{code}"} if code else {"proj:code": None, "proj:wkt2": grid.crs}
    for name in names:
        extra = {
            **crs,
            **scene.projection(grid),
            "raster:bands": [{"data_type": np.dtype(task.dtype).name, "nodata": 0}],
        }
        item.add_asset(
            name,
            pystac.Asset(scene.hrefs[name], media_type=pystac.MediaType.COG, roles=["data"], extra_fields=extra),
        )
    return item


def _check_grid(loader: str, transform: tuple[float, ...], shape: tuple[int, ...], grid: Grid) -> None:
    """A loader that builds another grid than asked shifts the whole cube without a word; never let it."""
    want = tuple(grid.transform)[:6]
    if tuple(shape) != grid.shape or not np.allclose(transform, want, rtol=0, atol=1e-6 * grid.resolution_m):
        raise ConfigError(
            f"loader: {loader} made a grid of {shape} at {transform} where {grid.shape} at {want} was asked; "
            "use the other loader"
        )
