"""Places to learn from and to score on: in comes a source of TRAIN.yaml or EVAL.yaml, out come ``Series`` in memory.

A region of one's own is read through the product's lazy cube and masks, block by block with the margin that the
regression's windows need; a simulated place is drawn from its seed. GDAL and Dask are met here, not in training.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from pipeline import lazy, mask
from pipeline.bands import temporal_bands, to_codes
from pipeline.cases import CLOUD, SHADOW, VOID, Bits, Codes, Series, compared
from pipeline.completion import HALO_PX
from pipeline.config import Job, Mask
from pipeline.errors import ConfigError, NoItemsError
from pipeline.grid import Grid
from pipeline.items import group_acquisitions
from pipeline.learnfile import Simulated, Source, job_of
from pipeline.phenology import SceneParams
from pipeline.request import Request, mask_params, reading, resolve
from pipeline.simulate import Region

LEAST_LOOKS = 3


@dataclass(frozen=True)
class Place:
    """A series that has not been read yet."""

    name: str
    read: Callable[[], Series]


def places(
    source: Source,
    bands: Sequence[str],
    *,
    block_px: int,
    max_blocks: int | None = None,
    seed: int = 0,
    other_mask: Mask | None = None,
) -> list[Place]:
    """The places of a source; a catalog is searched, but no pixel is read before ``Place.read``.

    Args:
        source: a region of one's own, or the simulator.
        bands: in order.
        block_px: a larger area comes in blocks of this side, each with the margin of ``completion.HALO_PX``.
        max_blocks: at most so many blocks, drawn by the seed.
        seed: see ``max_blocks``.
        other_mask: a second reading of the masks, for the variants ``scl`` and ``scl+check`` of an evaluation.

    Raises:
        ConfigError: where the source's job cannot be used. NoItemsError: with fewer than three looks.
        CatalogError, ReadError: as a job; also from ``Place.read``.
    """
    if source.simulate is not None:
        spec = source.simulate
        seeds = range(spec.first_seed, spec.first_seed + spec.seeds)
        return [Place(f"{source.name}-{s}", partial(simulated_place, source.name, spec, s, bands)) for s in seeds]
    job = job_of(source, bands)
    if job.mask.model:
        raise ConfigError(
            f"source {source.name}: mask.source: {job.mask.model} is not available here; name a raster of the items as "
            "mask.asset, or source: scl"
        )
    request = resolve(job)
    looks = len(group_acquisitions(list(request.found.items), request.found.longitude))
    if looks < LEAST_LOOKS:
        raise NoItemsError(
            f"source {source.name}: {looks} acquisitions from {job.time.start} to {job.time.end} are too few; at least "
            f"{LEAST_LOOKS} are needed: widen the time span"
        )

    @cache
    def decided() -> Request:
        return replace(request, found=lazy.harmonise(found=request.found, grid=request.grid, offset_dn=job.offset_dn))

    blocks = _chosen(source.name, request.grid, block_px, max_blocks, seed)
    margin = 0 if blocks[0][1] == request.grid else HALO_PX

    def read(name: str, block: Grid) -> Series:
        return _read(decided(), name, block, margin, other_mask)

    return [Place(name, partial(read, name, block)) for name, block in blocks]


def _blocks(grid: Grid, block_px: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    rows = [(r, min(r + block_px, grid.height)) for r in range(0, grid.height, block_px)]
    cols = [(c, min(c + block_px, grid.width)) for c in range(0, grid.width, block_px)]
    return list(itertools.product(rows, cols))


def _chosen(name: str, grid: Grid, block_px: int, max_blocks: int | None, seed: int) -> list[tuple[str, Grid]]:
    blocks = [(f"{name}.{rows[0]}.{cols[0]}", grid.window(rows, cols)) for rows, cols in _blocks(grid, block_px)]
    if len(blocks) == 1:
        return [(name, grid)]
    if max_blocks is not None and max_blocks < len(blocks):
        picked = np.sort(np.random.default_rng([seed, 7]).choice(len(blocks), max_blocks, replace=False))
        blocks = [blocks[i] for i in picked]
    return blocks


def _read(request: Request, name: str, core: Grid, margin_px: int, other_mask: Mask | None) -> Series:
    job, kind = request.job, request.found.mask.kind
    params = replace(mask_params(job, kind), temporal_check=False)  # of a case, once its hole is there
    reach = -(-round(mask.halo_m(params.open_m, params.cloud_grow_m, params.shadow_grow_m)) // round(core.resolution_m))
    margin = max(margin_px, reach)
    grid = core.padded(margin)
    cube = lazy.open_cube(found=request.found, grid=grid, bands=job.bands)
    clouds = mask.cloud_mask(cube=cube, params=params)
    layers = cube[["reflectance", "valid"]].assign(cloud=clouds["cloud"], shadow=clouds["shadow"]).compute()
    codes = to_codes(layers["reflectance"].values)
    void = ~layers["valid"].values | (codes == 0).any(axis=1)
    bits = _bits(layers["cloud"].values, layers["shadow"].values, void)
    inside = slice(margin - margin_px, grid.height - margin + margin_px)
    across = slice(margin - margin_px, grid.width - margin + margin_px)
    rest = slice(margin_px, margin_px + core.height), slice(margin_px, margin_px + core.width)
    series = Series(
        name=name,
        codes=np.ascontiguousarray(codes[:, :, inside, across]),
        bits=np.ascontiguousarray(bits[:, inside, across]),
        days=cube["solar_day"].values.astype("datetime64[D]").astype(np.int32),
        bands=job.bands,
        resolution_m=core.resolution_m,
        row0=grid.row0 + inside.start,
        col0=grid.col0 + across.start,
        core=rest,
        truth=None,
        other={},
    )
    if job.mask.temporal_check:
        series = replace(series, judged=compared(series.codes, series.bits, series.days, series.bands))
    if other_mask is not None:
        series = replace(series, other={"scl": _other_mask(request, job, series, other_mask)})
    return series if margin_px else _trimmed(series)


def _other_mask(request: Request, job: Job, series: Series, other: Mask) -> Bits:
    """The same looks by another reading of the masks."""
    changed = job.model_copy(update={"mask": other})
    asked = resolve(changed)
    offsets = {item.id: item for item in request.found.items}
    found = replace(asked.found, items=[offsets.get(item.id, item) for item in asked.found.items])
    height, width = series.bits.shape[1:]
    grid = replace(request.grid, row0=series.row0, col0=series.col0, height=height, width=width)
    cube = lazy.open_cube(found=found, grid=grid, bands=job.bands)
    clouds = mask.cloud_mask(cube=cube, params=mask_params(changed, found.mask.kind)).compute()
    return _bits(clouds["cloud"].values, clouds["shadow"].values, (series.bits & VOID) != 0)


def _trimmed(series: Series) -> Series:
    """The series without the rows and columns at its edges that no look shows."""
    there = ((series.bits & VOID) == 0).any(axis=0)
    rows, cols = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    if not rows.size:
        return series
    cut = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
    return replace(
        series,
        codes=np.ascontiguousarray(series.codes[:, :, *cut]),
        bits=np.ascontiguousarray(series.bits[:, *cut]),
        judged=None if series.judged is None else np.ascontiguousarray(series.judged[:, *cut]),
        other={name: np.ascontiguousarray(bits[:, *cut]) for name, bits in series.other.items()},
        row0=series.row0 + int(rows[0]),
        col0=series.col0 + int(cols[0]),
        core=(slice(0, cut[0].stop - cut[0].start), slice(0, cut[1].stop - cut[1].start)),
    )


def _bits(cloud: NDArray[np.bool_], shadow: NDArray[np.bool_], void: NDArray[np.bool_]) -> Bits:
    out = cloud * np.uint8(CLOUD) | shadow * np.uint8(SHADOW) | void * np.uint8(VOID)
    return out.astype(np.uint8)


def scene_params(spec: Simulated, seed: int) -> SceneParams:
    """The parameters of one simulated place: drawn evenly from the ranges, the same for the same seed."""
    rng = np.random.default_rng([seed, 11])
    drawn: dict[str, float] = {}
    for field, (low, high) in sorted(spec.vary.items()):
        value = float(rng.uniform(low, high))
        drawn[field] = value if isinstance(getattr(SceneParams, field), float) else round(value)
    return SceneParams(
        width_px=spec.size_px,
        height_px=spec.size_px,
        n_dates=int(rng.integers(spec.dates[0], spec.dates[1] + 1)),
        **drawn,  # type: ignore[arg-type]  # names and kinds were checked with the file
    )


def simulated_place(name: str, spec: Simulated, seed: int, bands: Sequence[str]) -> Series:
    """Draw one simulated place, ``name-seed``, with the truth of every pass under its clouds."""
    params = scene_params(spec, seed)
    region = Region(params, seed)
    imperfect = np.random.default_rng([seed, 12]).random() < spec.scl_share
    looks = [region.observe(i, bands) for i in range(len(region.acquisitions))]
    codes = np.stack([_on_grid(look.reflectance, bands, region.shape) for look in looks])
    clean = [region.observe(i, bands, cloudy=False) for i in range(len(region.acquisitions))]
    days = np.array([look.day for look in looks], np.int32)
    void = (codes == 0).any(axis=1)
    if imperfect:
        dark, nir = temporal_bands(bands)
        layers = mask.mask_block(
            state=mask.state_from_scl(np.stack([look.scl for look in looks])),
            factor=2,
            offset=(0, 0),
            codes=np.ascontiguousarray(codes[:, dark]),
            nir=None if nir is None else np.ascontiguousarray(codes[:, nir]),
            days=days,
            resolution_m=10.0,
            params=reading(spec.mask, "scl"),
        )
        bits = _bits(layers.cloud, layers.shadow, void)
    else:
        bits = _bits(np.stack([look.cloud for look in looks]), np.stack([look.shadow for look in looks]), void)
    return Series(
        name=f"{name}-{seed}",
        codes=codes,
        bits=bits,
        days=days,
        bands=tuple(bands),
        resolution_m=10.0,
        row0=-round(params.north_m / 10),
        col0=round(params.west_m / 10),
        core=(slice(0, params.height_px), slice(0, params.width_px)),
        truth=np.stack([_on_grid(look.reflectance, bands, region.shape) for look in clean]),
        other={},
        surface=np.stack(
            [_on_grid({band: region.truth(int(d), band) for band in bands}, bands, region.shape) for d in days]
        ),
    )


def _on_grid(native: Mapping[str, NDArray[np.float32]], bands: Sequence[str], shape: tuple[int, int]) -> Codes:
    """(B, H, W) codes at 10 m; 20 m bands by nearest neighbour."""
    out = np.empty((len(bands), *shape), np.uint16)
    for number, band in enumerate(bands):
        values = to_codes(native[band])
        out[number] = values if values.shape == shape else values.repeat(2, axis=0).repeat(2, axis=1)
    return out
