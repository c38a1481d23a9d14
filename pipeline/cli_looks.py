"""The commands that show a finished mosaic: thin. In comes a store, out come a picture, a map page, GeoTIFFs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import AsJson, Debug, kind, print_json
from pipeline.errors import ConfigError


def preview(
    store: Annotated[str, typer.Argument(help="Zarr store of a finished mosaic.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG to write; default: NAME.preview.png, .animation.png or .sheet.png beside the store, of one in a "
            "bucket here.",
        ),
    ] = None,
    period: Annotated[str, typer.Option(help="Finished period: its number from 0 (-1 is the last) or a day.")] = "-1",
    animate: Annotated[bool, typer.Option("--animate", help="All periods one after the other (animated PNG).")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="All periods side by side.")] = False,
    debug: Debug = False,
) -> None:
    """Make one picture that explains a mosaic: before, after, clear looks, source date, flags.

    Example: [bold]cloudgate preview out/graz.zarr --out graz.png[/bold]
    """
    with kind(debug):
        from pipeline.describe import beside
        from pipeline.preview import preview as draw
        from pipeline.preview import series

        if animate and sheet:
            raise ConfigError("preview: --animate and --sheet exclude each other; take one")
        ending = ".animation.png" if animate else ".sheet.png" if sheet else ".preview.png"
        target = out or Path(beside(store, ending))
        if "://" in store and out is None:
            target = Path(target.name)
        if animate or sheet:
            print(series(store=store, out=target, sheet=sheet))
        else:
            print(draw(store=store, out=target, period=period))


def view(
    stores: Annotated[list[str], typer.Argument(help="Zarr stores of finished mosaics, in one CRS.")],
    port: Annotated[
        int | None, typer.Option(help="Port on this machine; default 8765 or, if that is busy, a free one.")
    ] = None,
    at: Annotated[str | None, typer.Option(help="Begin at LONGITUDE,LATITUDE, at full resolution.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve a map page: zoom, bands and indices, before and after, provenance, and any pixel through time.

    It listens on this machine only, needs no network, and runs until Ctrl-C.

    Example: [bold]cloudgate view out/graz.zarr out/graz-median.zarr[/bold]
    """
    with kind(debug):
        from pipeline.view import serve

        def ready(url: str, opened: bool) -> None:
            if as_json:
                print(json.dumps({"url": url}), flush=True)
                return
            there = "" if opened or not browser else "; there is no browser here, so open that address in one"
            print(f"{', '.join(stores)}: shown at {url}{there}. Ctrl-C ends it.", flush=True)

        serve(stores, port=port, at=at, browser=browser and not as_json, ready=ready)


def export(
    store: Annotated[str, typer.Argument(help="Zarr store of a finished mosaic.")],
    cog: Annotated[Path | None, typer.Option(help="Folder to write Cloud-Optimized GeoTIFFs to, one a layer.")] = None,
    bands: Annotated[str | None, typer.Option(help="Bands or layers with commas; default: all.")] = None,
    period: Annotated[
        str | None, typer.Option(help="One finished period: its number from 0 (-1 is the last) or a day; default: all.")
    ] = None,
    overviews: Annotated[
        bool, typer.Option("--overviews", help="Add the overviews a store was written without.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes that make overviews.")] = 2,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write Cloud-Optimized GeoTIFFs of a mosaic for QGIS and GDAL, or add overviews to its store.

    Example: [bold]cloudgate export out/graz.zarr --cog out/graz-tif --bands red,green,blue --period 2023-08-15[/bold]
    """
    with kind(debug):
        from pipeline.export import export_cogs
        from pipeline.mosaic import complete_overviews
        from pipeline.progress import terminal

        if cog is None and not overviews:
            raise ConfigError("export: say what to write: --cog FOLDER, or --overviews")
        levels, files = None, []
        with terminal(quiet=as_json) as progress:
            if overviews:
                levels = complete_overviews(store=store, workers=workers, progress=progress)
        if cog is not None:
            names = None if bands is None else [name.strip() for name in bands.split(",") if name.strip()]
            files = export_cogs(store=store, out=cog, bands=names, period=period)
        if as_json:
            print_json({"files": files, "levels": levels})
            return
        if levels is not None:
            print(f"{store}: levels 0 to {levels}")
        for file in files:
            print(file)
