"""The lazy way: in come a cube and its clouds as Dask-backed xarray, out comes a composite, not computed yet.

Each block ends in ``block.compose_block``, the same function that a job's task ends in, so both give the same bytes
where they see the same ground (``trim_px``: the cube must reach as far around as the method looks).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, datetime
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline import completion, learned, regression
from pipeline.anchors import AnchorMap
from pipeline.bands import BANDS, CODE_MAX, to_codes, to_reflectance
from pipeline.block import NO_SIGMA, check_method, compose_block, halo_px, has_uncertainty
from pipeline.config import LEARNED, METHODS, Area, GridSpec, Method
from pipeline.cube import open_cube as open_items
from pipeline.errors import ConfigError, ItemError
from pipeline.frozen import SearchResult
from pipeline.grid import Grid
from pipeline.items import EPOCH
from pipeline.jobfile import explain
from pipeline.loaders import Loader
from pipeline.region import region_of
from pipeline.scout import decide

Blocks = Callable[[NDArray[np.uint16], NDArray[np.bool_], int, int, tuple[slice, slice]], NDArray[Any]]


def grid_for(
    *,
    found: SearchResult,
    bbox: tuple[float, float, float, float],
    crs: str = "utm",
    resolution_m: float = 10,
    bands: Sequence[str] = ("red",),
) -> Grid:
    """The pixels for an area: the grid that a job would use.

    Args:
        found: from ``search``; the grid lies on the lattice of most of its items.
        bbox: (west, south, east, north) degrees; west > east crosses the antimeridian.
        crs: ``utm`` (zone of the centre) or a projected EPSG code.
        resolution_m: pixel size in metres.
        bands: whose rasters give the lattice.

    Raises:
        ConfigError: for a wrong box or CRS.
    """
    try:
        area, spec = Area(bbox=bbox), GridSpec(crs=crs, resolution_m=resolution_m)
    except ValidationError as error:
        raise ConfigError(explain(error, "grid_for")) from error
    return region_of(area).grid(spec, found.items, bands)


def harmonise(*, found: SearchResult, grid: Grid, offset_dn: int | None = None) -> SearchResult:
    """Decide each item's BOA offset, as a job's scout does. Reads coarse overviews, so it is not lazy.

    Args:
        found: from ``search``.
        grid: the area to look at.
        offset_dn: 0 or -1000 to decide for all items without looking.

    Returns:
        The same result with ``offset_dn`` and its reason in every item; items that cannot be read are left out and
        listed.

    Raises:
        ItemError: where nothing decides. RunError: if no item can be read.
    """
    if offset_dn not in (None, 0, -1000):
        raise ConfigError(f"offset_dn: {offset_dn!r} is no BOA offset; give 0 or -1000, or leave it out")
    shared = set.intersection(*(set(item.assets) for item in found.items)) & set(BANDS)
    if not shared:
        raise ItemError("harmonise: no band is in all items; name the bands in search, which leaves other items out")
    band = min(shared, key=lambda name: BANDS[name].wavelength_nm)
    items, unread = decide(
        items=found.items, grid=grid, band=band, rule=found.mask, profile=found.profile, override_dn=offset_dn
    )
    return replace(found, items=items, dropped=[*found.dropped, *unread.items()])


def open_cube(
    *,
    found: SearchResult,
    grid: Grid,
    bands: Sequence[str],
    loader: Loader = "stackstac",
    chunk_px: int = 1024,
) -> xr.Dataset:
    """Open the scenes of a search as a lazy cube on exactly the pixels of ``grid``; no pixel is read.

    Args:
        found: from ``harmonise``: its items have decided offsets.
        grid: the pixels; open it padded (``grid.padded(n)``) where a method looks around, and trim the composite.
        bands: band names or ESA's (``B04``).
        loader: ``stackstac`` or ``odc``: who lays out the graph; the pixels are the same.
        chunk_px: side of the spatial chunks.

    Returns:
        Dataset, Dask-backed: ``reflectance (time, band, y, x)`` float32 (NaN = no data), ``valid (time, y, x)`` bool
        and ``state (time, y, x)`` uint8 (0 no data, 1 clear, 2 cloud, 3 shadow, before growth). One layer per
        acquisition; see ``pipeline.cube.open_cube``.

    Raises:
        ItemError: if an item lacks a band, the mask, or its offset (call ``harmonise`` first).
        ConfigError: for an unknown band or loader.
    """
    return open_items(
        items=found.items,
        grid=grid,
        bands=bands,
        mask=found.mask,
        profile=found.profile,
        loader=loader,
        chunk_px=chunk_px,
        longitude=found.longitude,
    )


def compose(
    *,
    cube: xr.Dataset,
    clouds: xr.Dataset,
    method: str = "regression",
    target: date | str | None = None,
    anchors: AnchorMap | None = None,
    trim_px: int = 0,
    **options: Any,
) -> xr.Dataset:
    """Compose a cube, lazily.

    Args:
        cube: from ``open_cube``: ``reflectance (time, band, y, x)`` float32, NaN = no data.
        clouds: from ``cloud_mask``: ``clear (time, y, x)`` bool; learned methods ask for ``cloud`` and ``shadow`` too.
        method: see ``pipeline.config.METHODS``.
        target: the day to show; default the middle of the cube's days.
        anchors: which acquisition to complete where, from ``scout``; by default the one nearest to the target,
            everywhere (nothing can be looked at without computing). Only for methods that show a date.
        trim_px: pixels to cut off on each side of the result; give the margin the cube was opened with.
        options: of the method, such as ``tau_days`` of decay.

    Returns:
        Dataset with dims ``(y, x)``, Dask-backed: one float32 reflectance per band (NaN = no data), ``clear_count``
        uint16, ``source_date`` datetime64 (NaT = none), ``flags`` uint16, and ``uncertainty_<band>`` float32 for
        kalman, regression and timegate.

    Raises:
        ConfigError: for an unknown method or option, or a target that is no date.
    """
    if method not in METHODS:
        raise ConfigError(f"method: unknown method {method!r}; known are {', '.join(METHODS)}")
    spec = Method.model_validate({"name": method, **options})
    bands = [str(name) for name in cube["band"].values]
    check_method(spec, bands)
    marks = clouds["clear"].data
    if told := spec.name in LEARNED:
        marks = clouds["cloud"].data * np.uint8(1) + clouds["shadow"].data * np.uint8(2)
        marks = da.where(clouds["clear"].data, np.uint8(0), da.where(marks == 0, np.uint8(4), marks))
    spec = learned.prepare(spec, bands)
    days = cube["solar_day"].values.astype("datetime64[D]").astype(np.int32)
    day = _day(target, days)
    if anchors is None and spec.shows_date:
        nearest = int(np.argmin(np.abs(days.astype(int) - day)))
        anchors = AnchorMap(1 << 20, 0, 0, (nearest,), np.ones((1, 2, 2), np.float32))

    def block(
        codes: NDArray[np.uint16], marks: NDArray[Any], row0: int, col0: int, core: tuple[slice, slice]
    ) -> NDArray[Any]:
        made = compose_block(
            codes=codes,
            clear=marks == 0 if told else marks,
            bits=marks if told else None,
            days=days,
            method=spec,
            target=day,
            anchors=anchors,
            row0=row0,
            col0=col0,
            core=core,
        )
        flat = [
            *made.codes,
            made.clear_count,
            made.source_date,
            made.flags,
            *(made.sigma if made.sigma is not None else ()),
        ]
        return np.stack([layer.astype(np.int32) for layer in flat])

    names = [*bands, "clear_count", "source_date", "flags"]
    names += [f"uncertainty_{band}" for band in bands] if has_uncertainty(spec) else []
    stacked = _map(cube, marks, halo_px(spec), block, (len(names),), np.int32)
    if trim_px:
        stacked = stacked[:, trim_px:-trim_px, trim_px:-trim_px]
    inner = slice(trim_px, -trim_px or None)
    coords = {"y": cube["y"][inner], "x": cube["x"][inner], "time": np.datetime64(EPOCH) + np.timedelta64(day, "D")}
    variables = {name: (("y", "x"), _decode(name, bands, stacked[i])) for i, name in enumerate(names)}
    return xr.Dataset(variables, coords, {**cube.attrs, "bands": bands, "method": method})


def fill_series(
    *, cube: xr.Dataset, clouds: xr.Dataset, window_days: int | None = None, **options: Any
) -> xr.DataArray:
    """Every acquisition of a cube completed as by the method regression: a gap-free series, lazily.

    Args:
        cube: from ``open_cube``.
        clouds: from ``cloud_mask``.
        window_days: use only looks within so many days of each acquisition; default all.
        options: of the regression, see ``pipeline.regression.RegressionOptions``.

    Returns:
        ``(time, band, y, x)`` float32 reflectance, Dask-backed; clear pixels as they were, NaN only where no look of a
        pixel is clear.

    Raises:
        ConfigError: for an unknown option.
    """
    check_method(Method.model_validate({"name": "regression", **options}), ())
    settings = regression.RegressionOptions(**options)
    days = cube["solar_day"].values.astype("datetime64[D]").astype(np.int32)
    shape = (cube.sizes["time"], cube.sizes["band"])

    def block(
        codes: NDArray[np.uint16], clear: NDArray[np.bool_], row0: int, col0: int, core: tuple[slice, slice]
    ) -> NDArray[Any]:
        filled = completion.fill_series(
            codes=codes, clear=clear, days=days, row0=row0, col0=col0, options=settings, window_days=window_days
        )
        return to_reflectance(filled[:, :, core[0], core[1]])

    data = _map(cube, clouds["clear"].data, completion.HALO_PX, block, shape, np.float32)
    return cube["reflectance"].copy(data=data)


def _day(target: date | str | None, days: NDArray[np.int32]) -> int:
    if target is None:
        return int(days[0] + days[-1]) // 2
    try:
        chosen = date.fromisoformat(target) if isinstance(target, str) else target
    except ValueError as error:
        raise ConfigError(f"target: {target!r} is no date; write it as 2023-08-15") from error
    if isinstance(chosen, datetime):  # pandas' timestamps are such, too
        chosen = chosen.date()
    if not isinstance(chosen, date):
        raise ConfigError(f"target: {target!r} is no date; give one, or text such as 2023-08-15")
    return (chosen - EPOCH).days


def _map(cube: xr.Dataset, marks: Any, depth: int, block: Blocks, leading: tuple[int, ...], dtype: Any) -> da.Array:
    """Map ``block`` over spatial chunks with ``depth`` pixels of neighbours; nothing is computed.

    ``marks`` is what goes along with the codes: (time, y, x), clear looks or what hides them.
    """
    reflectance, clear = da.asarray(cube["reflectance"].data), da.asarray(marks)
    spatial = _large_enough(reflectance.chunks[2:], depth)
    codes = da.map_blocks(to_codes, reflectance, dtype=np.uint16, meta=np.empty((0,) * 4, np.uint16))
    codes = codes.rechunk((-1, -1, *spatial))
    clear = clear.rechunk((-1, *spatial))
    starts = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in spatial]
    row0, col0 = int(cube.attrs["row0"]), int(cube.attrs["col0"])

    def one(codes: NDArray[np.uint16], clear: NDArray[np.bool_], block_info: Any = None) -> NDArray[Any]:
        i, j = block_info[0]["chunk-location"][-2:]
        before = (depth if i else 0, depth if j else 0)
        size = (int(np.diff(starts[0])[i]), int(np.diff(starts[1])[j]))
        core = (slice(before[0], before[0] + size[0]), slice(before[1], before[1] + size[1]))
        top, left = row0 + int(starts[0][i]) - before[0], col0 + int(starts[1][j]) - before[1]
        return block(np.ascontiguousarray(codes), np.ascontiguousarray(clear), top, left, core)

    if depth:
        # along an axis of one chunk there is no neighbour, and the cube may be narrower than the halo
        rows, cols = (depth if len(sizes) > 1 else 0 for sizes in spatial)
        codes = da.overlap.overlap(codes, {2: rows, 3: cols}, boundary="none")
        clear = da.overlap.overlap(clear, {1: rows, 2: cols}, boundary="none")
    out_axes = len(leading) + 2
    clear = clear[:, None]
    chunks = (*((n,) for n in leading), *spatial)

    def named(codes: NDArray[np.uint16], clear: NDArray[np.bool_], block_info: Any = None) -> NDArray[Any]:
        return one(codes, clear[:, 0], block_info)

    return da.map_blocks(
        named,
        codes,
        clear,
        dtype=dtype,
        chunks=chunks,
        drop_axis=[0] if out_axes == 3 else None,
        meta=np.empty((0,) * out_axes, dtype),
    )


def _large_enough(chunks: tuple[tuple[int, ...], ...], depth: int) -> tuple[tuple[int, ...], ...]:
    """Join chunks until each holds at least ``depth`` pixels, as overlapping needs."""
    out = []
    for sizes in chunks:
        joined: list[int] = []
        for size in sizes:
            if joined and (joined[-1] < depth or size < depth):
                joined[-1] += size
            else:
                joined.append(size)
        out.append(tuple(joined))
    return tuple(out)


def _decode(name: str, bands: list[str], layer: da.Array) -> da.Array:
    if name in bands:
        return layer.astype(np.uint16).map_blocks(to_reflectance, dtype=np.float32)
    if name == "source_date":
        return da.map_blocks(_to_dates, layer, dtype="datetime64[ns]")
    if name.startswith("uncertainty_"):
        return da.map_blocks(_to_sigma, layer, dtype=np.float32)
    return layer.astype(np.uint16)


def _to_dates(days: NDArray[np.int32]) -> NDArray[np.datetime64]:
    dates = days.astype("datetime64[D]").astype("datetime64[ns]")
    dates[days == 0] = np.datetime64("NaT", "ns")
    return dates


def _to_sigma(codes: NDArray[np.int32]) -> NDArray[np.float32]:
    sigma = codes.astype(np.float32) / np.float32(10_000)
    sigma[(codes == NO_SIGMA) | (codes > CODE_MAX)] = np.nan
    return sigma
