"""cloudgate: cloud-free Sentinel-2 mosaics from image time series. STAC in, Zarr out.

The way of the data, one file per step::

    catalog.search     items, normalised, deduplicated, frozen to a file
    region, grid       which pixels: one Grid on a lattice fixed to the CRS, obeyed by every step
    scout              what the whole area decides once: offsets, clear shares, anchors
    lazy.open_cube     a lazy (time, band, y, x) cube, one layer per acquisition
    mask.cloud_mask    cloud and shadow, grown in metres, checked in time
    lazy.compose       many looks to one value and where it comes from (composite, regression)
    mosaic.build       the same, task by task on a Dask cluster, into a Zarr store
    store.open_mosaic  the finished mosaic as plain xarray
    view.explore       the same as a map page
    periodic.tick      what is due of a schedule, period by period

Public names are imported on first use, so ``import pipeline`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.catalog import search
    from pipeline.jobfile import load_job
    from pipeline.lazy import compose, fill_series, grid_for, harmonise, open_cube
    from pipeline.mask import cloud_mask
    from pipeline.models.weights import load_model
    from pipeline.mosaic import build, plan
    from pipeline.periodic import backfill, tick
    from pipeline.schedule import load_schedule
    from pipeline.store import open_mosaic
    from pipeline.view import explore

_HOMES = {
    "backfill": "pipeline.periodic",
    "build": "pipeline.mosaic",
    "cloud_mask": "pipeline.mask",
    "compose": "pipeline.lazy",
    "explore": "pipeline.view",
    "fill_series": "pipeline.lazy",
    "grid_for": "pipeline.lazy",
    "harmonise": "pipeline.lazy",
    "load_job": "pipeline.jobfile",
    "load_model": "pipeline.models.weights",
    "load_schedule": "pipeline.schedule",
    "open_cube": "pipeline.lazy",
    "open_mosaic": "pipeline.store",
    "plan": "pipeline.mosaic",
    "search": "pipeline.catalog",
    "tick": "pipeline.periodic",
}

__all__ = [
    "backfill",
    "build",
    "cloud_mask",
    "compose",
    "explore",
    "fill_series",
    "grid_for",
    "harmonise",
    "load_job",
    "load_model",
    "load_schedule",
    "open_cube",
    "open_mosaic",
    "plan",
    "search",
    "tick",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}; public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
