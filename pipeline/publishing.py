"""The end of a period: in come its written shards, out comes a mosaic that readers find.

Overviews, metadata last, then what stands beside the store: STAC, GeoTIFFs where asked for; and, at the beginning, the
small picture of the least cloudy acquisition that ``cloudgate preview`` shows as "before".
"""

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import learned
from pipeline import store as stores
from pipeline.bands import rgb_bands
from pipeline.block import has_uncertainty
from pipeline.describe import beside, describe
from pipeline.errors import ReadError
from pipeline.export import export_cogs, exported
from pipeline.frozen import digest
from pipeline.identity import RESULT_VERSION
from pipeline.items import EPOCH, Acquisition, Item, day_text
from pipeline.periods import Period
from pipeline.reader import dn_to_codes, read_window
from pipeline.records import RunFolder
from pipeline.request import Request, acquisitions_of
from pipeline.runner import RunContext, run_overviews
from pipeline.scout import Scouted, coarse_grid


def publish_period(request: Request, period: Period, seen: Scouted, context: RunContext) -> None:
    """Overviews, then metadata in one go; earlier published periods stay published. STAC and GeoTIFFs follow.

    Raises:
        StoreError: if something cannot be written.
    """
    job, grid, path = request.job, request.grid, context.path
    levels = _overviews(request, period, context)
    context.guard()
    old = stores.read_attrs(path)
    about: dict[str, Any] = (
        dict(old["cloudgate"])
        if old
        else {
            "layout": stores.LAYOUT_VERSION,
            "grid": grid.to_dict(),
            "periods": {},
        }
    )
    acquisitions = acquisitions_of(request, period)
    items = seen.apply([i for a in acquisitions for i in a.items])
    about["periods"] = {
        **about["periods"],
        str(period.slot): {
            "start": day_text(period.start),
            "end": day_text(period.end),
            "target": day_text(period.target),
            "items": len(items),
            "items_digest": digest(items),
            "anchors": anchor_names(seen, acquisitions),
            "method": learned.identity(job.method),
            "mask": json.loads(job.mask.model_dump_json()),
            "code_version": version("cloudgate"),
            "result_version": RESULT_VERSION,
        },
    }
    scenes = f"{len(items)} scenes ({about['periods'][str(period.slot)]['items_digest'][:8]})"
    message = f"{day_text(period.start)} to {day_text(period.end)}: {job.method.name} of {scenes}"
    _write_metadata(request, about, path, levels, unit=stores.unit_of(period.slot), message=message)
    if job.output.cog:
        context.progress.say("writing Cloud-Optimized GeoTIFFs")
        export_cogs(store=path, out=beside(path, ".cog"), slots=[period.slot])
    _describe(request, period.slot, items, path)


def lower_period(request: Request, slot: int, path: str | Path) -> None:
    """Hide a published period from readers until it is written again; the others stay as they are.

    A store that replaces a period in one step goes on showing the old one.
    """
    stores.discard(path, slot)
    old = stores.read_attrs(path)
    if old and not stores.replaces(path) and str(slot) in old["cloudgate"]["periods"]:
        about = dict(old["cloudgate"])
        about["periods"] = {**about["periods"], str(slot): {**about["periods"][str(slot)], "published": False}}
        _write_metadata(request, about, path, stores.levels(path))
        _describe(request, slot, [], path)


def _write_metadata(
    request: Request, about: dict[str, Any], path: str | Path, levels: int, *, unit: str = "", message: str = "metadata"
) -> None:
    """Shapes, coordinates, ``published`` and attributes of a store whose periods are those of ``about``."""
    job = request.job
    # A store keeps its first title: Items and GeoTIFFs of earlier periods are named by it.
    title = (stores.read_attrs(path) or {}).get("title", job.name)
    by_slot = sorted(about["periods"].items(), key=lambda entry: int(entry[0]))  # whatever the order of writing
    about = {**about, "periods": dict(by_slot)}
    # A period shows the date it was made for, though the job's target is another by now.
    targets = {int(slot): (date.fromisoformat(made["target"]) - EPOCH).days for slot, made in by_slot}
    schedule = [replace(p, target=targets.get(p.slot, p.target)) for p in request.schedule[: max(targets) + 1]]
    stores.publish(
        path,
        request.grid,
        job.bands,
        uncertainty=has_uncertainty(job.method),
        schedule=schedule,
        published=[about["periods"].get(str(p.slot), {"published": False}).get("published", True) for p in schedule],
        attrs={"title": title, "source": "Copernicus Sentinel-2", "cloudgate": about},
        levels=levels,
        unit=unit,
        message=message,
    )


def _describe(request: Request, slot: int, items: Sequence[Item], path: str | Path) -> None:
    attrs, job = stores.finished(path), request.job
    uncertainty = has_uncertainty(job.method)
    cogs = exported(attrs, slot, beside(path, ".cog"), uncertainty=uncertainty) if job.output.cog else {}
    describe(
        store=path,
        attrs=attrs,
        uncertainty=uncertainty,
        slot=slot,
        sources=items,
        source=request.found.source,
        cogs=cogs,
    )


def _overviews(request: Request, period: Period, context: RunContext) -> int:
    """Write the period's overviews where they are asked for, or where the store's other periods have them: how many."""
    job, grid = request.job, request.grid
    if not (job.output.overviews or stores.levels(context.path)):
        return 0
    run_overviews(grid, (job.bands, has_uncertainty(job.method)), period.slot, context)
    return len(grid.levels()) - 1


def anchor_names(seen: Scouted, acquisitions: Sequence[Acquisition]) -> list[str]:
    """Ids of a period's anchors, ``interpolation`` where none is near; empty for methods without."""
    if seen.anchors is None:
        return []
    return [acquisitions[layer].id if layer >= 0 else "interpolation" for layer in seen.anchors.layers]


def keep_before(
    request: Request, acquisitions: Sequence[Acquisition], seen: Scouted, run: RunFolder, slot: int
) -> None:
    """Keep a small colour picture of the least cloudy acquisition, for ``cloudgate preview``."""
    best = max(
        range(len(seen.layers)),
        key=lambda i: (not seen.layers[i].fails, seen.layers[i].clear_share * seen.layers[i].valid_share, -i),
    )
    coarse, _ = coarse_grid(request.grid, 0, most_px=900)
    names = rgb_bands(request.job.bands)
    codes = np.zeros((3, *coarse.shape), np.uint16)

    def one(work: tuple[int, str, Item]) -> tuple[int, Any]:
        number, band, item = work
        asset = item.assets[band]
        return number, dn_to_codes(
            read_window(asset, coarse, profile=request.found.profile), asset, seen.offsets[item.id][0]
        )

    work = [
        (n, band, item) for n, band in enumerate(names) for item in acquisitions[best].items if item.id in seen.offsets
    ]
    try:
        with ThreadPoolExecutor(8) as pool:
            for number, values in pool.map(one, work):
                np.copyto(codes[number], values, where=codes[number] == 0)
    except ReadError:
        return  # only a picture; the tasks will meet the same fault and report it
    buffer = io.BytesIO()
    label = f"{day_text(acquisitions[best].day)} ({100 * seen.layers[best].clear_share:.0f} % clear)"
    np.savez_compressed(buffer, codes=codes, name=np.array(label))
    run.write_bytes(buffer.getvalue(), run.period(slot), "before.npz")
