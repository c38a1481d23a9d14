"""A job, resolved: in comes a ``Job``, out come its scenes, grid and periods, and a ``Recipe`` for each period."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from pipeline import learned
from pipeline import mask as masks
from pipeline.block import check_method
from pipeline.catalog import search
from pipeline.config import Job, Mask
from pipeline.frozen import SearchResult
from pipeline.grid import Grid
from pipeline.handles import is_remote
from pipeline.items import EPOCH, Acquisition, group_acquisitions
from pipeline.mask_models import check_mask_model
from pipeline.periods import Period, first_periods, periods
from pipeline.planning import cut_origin
from pipeline.profiles import load_profile, profile_names
from pipeline.reader import mask_lattice
from pipeline.recipe import Recipe
from pipeline.region import Region, region_of
from pipeline.scout import Scouted, scout

SEARCH_MARGIN_M = 5000.0
"""Scenes so far around the area are used too, for growth, windows of the regression and strips between anchors."""


@dataclass(frozen=True)
class Request:
    """A job, resolved: where, which scenes, on which pixels, when."""

    job: Job
    region: Region
    found: SearchResult
    grid: Grid
    schedule: tuple[Period, ...]


def check_job(job: Job) -> None:
    """Refuse a method or a mask that cannot work with these bands here, before anything is read or written.

    Raises:
        ConfigError: a wrong option, or a package or a GPU that is not there. WeightsError: weights that cannot serve.
    """
    check_method(job.method, job.bands)
    if job.cluster.kind == "local":
        learned.check_device(job.method)
    if job.mask.model:
        check_mask_model(job.mask.model, job.bands)


def resolve(job: Job, *, slots: Sequence[int] | None = None) -> Request:
    """Check a job and search its catalog; nothing is written.

    Args:
        job: the request.
        slots: search for these periods of a series only; its schedule then reaches to the last of them.

    Raises:
        RequestError: every fault of the request. CatalogError: if the catalog does not answer.
    """
    check_job(job)
    region = region_of(job.area)
    region.crs(job.grid)
    schedule = tuple(periods(job) if slots is None else first_periods(job, max(slots) + 1))
    wanted = [schedule[slot] for slot in slots] if slots is not None else schedule
    known = load_profile(job.profile or (job.catalog if job.catalog in profile_names() else "generic"))
    found = search(
        catalog=job.catalog,
        bbox=region.lonlat_bounds(SEARCH_MARGIN_M),
        start=EPOCH + timedelta(days=min(period.look_start for period in wanted)),
        end=EPOCH + timedelta(days=max(period.end for period in wanted)),
        profile=job.profile,
        collection=job.collection,
        bands=job.bands,
        mask=job.mask.rule((known.mask, *known.mask_alternatives)),
        need_mask=job.mask.model is None,
        max_cloud_cover=None if job.max_cloud_cover >= 100 else job.max_cloud_cover,
    )
    grid = region.grid(job.grid, found.items, job.bands)
    return Request(job, region, found, grid, schedule)


def acquisitions_of(request: Request, period: Period) -> list[Acquisition]:
    """The acquisitions whose solar day lies in the period or its look-back, in time order."""
    grouped = group_acquisitions(list(request.found.items), request.found.longitude)
    return [a for a in grouped if period.look_start <= a.day <= period.end]


def mask_params(job: Job, kind: str) -> masks.MaskParams:
    """The job's growth and checks; the opening depends on the kind of raster."""
    return reading(job.mask, kind)


def reading(asked: Mask, kind: str) -> masks.MaskParams:
    """Growth and checks as a mask's fields ask for them."""
    return masks.MaskParams(
        open_m=asked.opening_m(kind),
        cloud_grow_m=asked.cloud_grow_m,
        shadow_grow_m=asked.shadow_grow_m,
        temporal_check=asked.temporal_check,
    )


def recipe_of(request: Request, period: Period, acquisitions: Sequence[Acquisition], seen: Scouted | None) -> Recipe:
    """Everything that decides the pixels of one period, for the workers; ``seen`` is None for a mere plan."""
    job, grid, found = request.job, request.grid, request.found
    everything = [i for a in acquisitions for i in a.items]
    usable = {item.id: item for item in seen.apply(everything)} if seen else {}
    layers = tuple(
        replace(
            a,
            items=tuple(
                usable.get(i.id, replace(i, offset_dn=None, offset_reason=seen.unread.get(i.id, "not looked at")))
                if seen
                else replace(i, offset_dn=0, offset_reason="not looked at")
                for i in a.items
            ),
        )
        for a in acquisitions
    )
    model = job.mask.model
    assets = [item.assets[job.bands[0] if model else found.mask.asset] for a in acquisitions for item in a.items]
    factor, phase = (1, (0, 0)) if model else mask_lattice(assets, grid)
    remote = any(is_remote(asset.href) for asset in assets)
    return Recipe(
        grid=grid,
        bands=job.bands,
        acquisitions=layers,
        rule=found.mask,
        mask_model=model,
        params=mask_params(job, found.mask.kind),
        factor=factor,
        phase=phase,
        method=learned.prepare(job.method, job.bands),
        target=period.target,
        rejected=tuple(layer.fails for layer in seen.layers) if seen else (False,) * len(acquisitions),
        clouded=frozenset(seen.clouded) if seen else frozenset(),
        anchors=seen.anchors if seen else None,
        profile=found.profile.model_copy(update={"verify_checksums": job.limits.verify_checksums}),
        inside=request.region.inside(grid),
        cut_px=(1024, 1024),
        origin=cut_origin(grid, [item for a in acquisitions for item in a.items], job.bands),
        threads=job.cluster.reads_per_worker or (8 if remote else 2),
    )


def survey(
    request: Request,
    period: Period,
    acquisitions: Sequence[Acquisition],
    progress: Callable[[int, int], None] | None = None,
) -> Scouted:
    """Run the scout for one period; ``progress`` hears (done, all) after each scene."""
    job, found = request.job, request.found
    return scout(
        acquisitions=acquisitions,
        grid=request.grid,
        bands=job.bands,
        rule=None if job.mask.model else found.mask,
        params=mask_params(job, found.mask.kind),
        profile=found.profile,
        method=job.method,
        target=period.target,
        override_dn=job.offset_dn,
        progress=progress,
    )
