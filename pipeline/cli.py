"""The command line: thin. In come arguments, out come calls of the Python API, and errors as one kind paragraph."""

import json
import os
import signal
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli_schedule import app as schedule_app
from pipeline.console import AsJson, Debug, Overrides
from pipeline.console import kind as _kind
from pipeline.console import print_json as _print_json
from pipeline.errors import ConfigError

app = typer.Typer(
    name="cloudgate",
    help="Cloud-free Sentinel-2 mosaics from image time series: STAC in, Zarr out. Start with: cloudgate demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.add_typer(schedule_app, name="schedule")

JobFile = Annotated[Path, typer.Argument(help="Job file (YAML).", show_default=False)]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"cloudgate {version('cloudgate')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("cloudgate-demo"),
    seed: Annotated[int, typer.Option(help="Another seed, another sky.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Simulate a region, serve it like a catalog, run the main job on it, and score every method. Needs no network.

    Example: [bold]cloudgate demo --out demo[/bold]
    """
    with _kind(debug):
        from pipeline.demo import run_demo
        from pipeline.progress import show_demo, terminal

        with terminal(quiet=as_json) as progress:
            result = run_demo(out, seed=seed, progress=progress)
        if as_json:
            _print_json(
                {"scores": [s.__dict__ for s in result.scores], "seconds": result.seconds, **result.summary.__dict__}
            )
            return
        for period in result.summary.periods:
            print(_period_line(period))
        show_demo(result)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("cloudgate-scenes"),
    size_px: Annotated[int, typer.Option(help="Side in 10 m pixels, even.")] = 1024,
    dates: Annotated[int, typer.Option(help="Number of passes.")] = 12,
    start: Annotated[str, typer.Option(help="Day of the first pass.")] = "2021-06-11",
    days: Annotated[int, typer.Option(help="Days from the first pass to the last, both counted.")] = 60,
    bands: Annotated[str, typer.Option(help="Names with commas; SCL is always written.")] = "blue,green,red,nir",
    tile: Annotated[str, typer.Option(help="MGRS tile whose north-western corner is simulated.")] = "33TWL",
    cloudiness: Annotated[float, typer.Option(min=0, max=1, help="Mean share of cloud.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another ground and sky.")] = 0,
    block_px: Annotated[int, typer.Option(help="Block of the COGs at 10 m.")] = 1024,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Simulate scenes of one tile: COGs with STAC items, their truth, and a job that runs on them. Needs no network.

    Example: [bold]cloudgate simulate --out scenes --size-px 512 --dates 8[/bold]
    """
    with _kind(debug):
        import yaml

        from pipeline.bands import check_bands
        from pipeline.demo import demo_job
        from pipeline.scenes import write_tile

        made = write_tile(
            out,
            size_px=size_px,
            dates=dates,
            start=_day(start),
            days=days,
            bands=check_bands([name.strip() for name in bands.split(",") if name.strip()]),
            tile=tile,
            cloudiness=cloudiness,
            seed=seed,
            block_px=block_px,
        )
        job = out / "job.yaml"
        fields = demo_job(made, out) | {"name": f"simulated-{made.tiles[0]}", "bands": list(made.bands)}
        job.write_text(yaml.safe_dump(fields, sort_keys=False))
        if as_json:
            _print_json(made.__dict__ | {"job": job})
            return
        size = sum(path.stat().st_size for path in out.rglob("*.tif"))
        print(f"{made.items}: {made.n_items} scenes of {size_px} x {size_px} px, {made.start} to {made.end}")
        print(f"{made.truth}: the truth of {made.target}; {size / 1e6:.1f} MB in all")
        print(f"run the job on them with: cloudgate mosaic {job}")


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"start: {text!r} is no date; write it as 2021-06-11") from None


@app.command()
def mosaic(
    job: JobFile,
    out: Annotated[str | None, typer.Option(help="Store to write, instead of the job's output.store.")] = None,
    overrides: Overrides = None,
    restart: Annotated[bool, typer.Option(help="Remove an existing store of this path and start over.")] = False,
    wait: Annotated[float, typer.Option(help="Wait so many seconds if another run works on the store.")] = 0.0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a job: search, mask, compose, write the mosaic. Run it again to go on where it stopped.

    Example: [bold]cloudgate mosaic job.yaml --set method.name=median --out out/median.zarr[/bold]
    """
    with _kind(debug):
        from pipeline.jobfile import load_job
        from pipeline.mosaic import build
        from pipeline.progress import terminal

        with terminal(quiet=as_json) as progress:
            summary = build(
                job=load_job(job, overrides=overrides or (), store=out), restart=restart, progress=progress, wait_s=wait
            )
        if as_json:
            _print_json(summary.__dict__)
            return
        for period in summary.periods:
            print(_period_line(period))
        print(f"{summary.store}: done in {summary.seconds:.1f} s; look at it with: cloudgate preview {summary.store}")


def _period_line(period: dict[str, Any]) -> str:
    if not period["published"]:
        return f"{period['start']} to {period['end']}: not published: {period['message']}"
    total = max(period["filled"] + period["unfilled"], 1)
    anchors = f", anchors {', '.join(period['anchors'])}" if period.get("anchors") else ""
    failed = f", {period['failed']} of {period['reads']} reads failed" if period["failed"] else ""
    return (
        f"{period['start']} to {period['end']}, shown {period['target']}: {period['scenes']} scenes, "
        f"{100 * period['filled'] / total:.2f} % filled ({period['unfilled']} px without a clear look), "
        f"{period['bytes_read'] / 1e6:.0f} MB read in {period['seconds']:.1f} s{failed}{anchors}"
    )


@app.command()
def plan(
    job: JobFile,
    out: Annotated[str | None, typer.Option(help="Store to write, instead of the job's output.store.")] = None,
    overrides: Overrides = None,
    scout: Annotated[bool, typer.Option(help="Look at the scenes coarsely, to decide offsets and anchors.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a job would do: scenes, tasks, bytes, memory, offsets, anchors. Writes nothing.

    Example: [bold]cloudgate plan job.yaml[/bold]
    """
    with _kind(debug):
        from pipeline.jobfile import load_job
        from pipeline.mosaic import plan as make_plan
        from pipeline.progress import show_plan

        made = make_plan(job=load_job(job, overrides=overrides or (), store=out), scouting=scout)
        if as_json:
            _print_json({**made.__dict__, "grid": made.grid.to_dict()})
        else:
            show_plan(made)


@app.command()
def search(
    job: JobFile,
    overrides: Overrides = None,
    save: Annotated[Path | None, typer.Option(help="Freeze the result to this file; it replays as a catalog.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the scenes a job would use, and those it would not, with the reason.

    Example: [bold]cloudgate search job.yaml --save items.json[/bold]
    """
    with _kind(debug):
        from pipeline.frozen import save_items
        from pipeline.jobfile import load_job
        from pipeline.progress import show_items
        from pipeline.request import resolve

        found = resolve(load_job(job, overrides=overrides or ())).found
        if save:
            save_items(found, save)
        if as_json:
            _print_json({"items": [item.to_dict() for item in found.items], "dropped": found.dropped})
        else:
            show_items(found)


@app.command()
def status(
    store: Annotated[str, typer.Argument(help="Zarr store of a job.", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until all is finished.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say how far a store is: periods, shards, failed reads; while a run goes on and after.

    Example: [bold]cloudgate status out/graz.zarr --watch[/bold]
    """
    with _kind(debug):
        import time

        from pipeline.progress import show_status
        from pipeline.status import status as look

        while True:
            found = look(store)
            if as_json:
                _print_json(found)
            else:
                show_status(found)
            if not watch or all(period["state"] == "finished" for period in found["periods"]):
                return
            time.sleep(5)


@app.command()
def preview(
    store: Annotated[Path, typer.Argument(help="Zarr store of a finished mosaic.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: beside the store.")] = None,
    period: Annotated[str, typer.Option(help="Finished period: its number from 0 (-1 is the last) or a day.")] = "-1",
    animate: Annotated[bool, typer.Option("--animate", help="All periods one after the other (animated PNG).")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="All periods side by side.")] = False,
    debug: Debug = False,
) -> None:
    """Make one picture that explains a mosaic: before, after, clear looks, source date, flags.

    Example: [bold]cloudgate preview out/graz.zarr --out graz.png[/bold]
    """
    with _kind(debug):
        from pipeline.preview import preview as draw
        from pipeline.preview import series

        if animate and sheet:
            raise ConfigError("preview: --animate and --sheet exclude each other; take one")
        target = out or store.with_suffix(".series.png" if animate or sheet else ".preview.png")
        if animate or sheet:
            print(series(store=store, out=target, sheet=sheet))
        else:
            print(draw(store=store, out=target, period=period))


@app.command()
def view(
    stores: Annotated[list[Path], typer.Argument(help="Zarr stores of finished mosaics, in one CRS.")],
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
    with _kind(debug):
        from pipeline.view import serve

        def ready(url: str, opened: bool) -> None:
            if as_json:
                print(json.dumps({"url": url}), flush=True)
                return
            there = "" if opened or not browser else "; there is no browser here, so open that address in one"
            print(f"{', '.join(map(str, stores))}: shown at {url}{there}. Ctrl-C ends it.", flush=True)

        serve(stores, port=port, at=at, browser=browser and not as_json, ready=ready)


@app.command()
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
    with _kind(debug):
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
            _print_json({"files": files, "levels": levels})
            return
        if levels is not None:
            print(f"{store}: levels 0 to {levels}")
        for file in files:
            print(file)


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="TRAIN.yaml, see tests/jobs/train.yaml.", show_default=False)],
    prepare: Annotated[bool, typer.Option("--prepare", help="Only write the training samples.")] = False,
    overrides: Overrides = None,
    restart: Annotated[bool, typer.Option(help="Forget what is there and start over.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a network on one's own region or on simulated scenes. Run it again to go on where it stopped.

    The samples are written first (needs GDAL); a machine that finds them written needs neither GDAL nor Dask.

    Example: [bold]cloudgate train train.yaml --set fit.epochs=50[/bold]
    """
    with _kind(debug):
        from pipeline.learnfile import load_training
        from pipeline.progress import terminal
        from pipeline.samples import is_complete

        training = load_training(file, overrides=overrides or ())
        answer: dict[str, Any] = {}
        with terminal(quiet=as_json) as progress:
            if prepare or not is_complete(training.store):
                from pipeline.prepare import prepare as write

                written = write(training, restart=restart and prepare, progress=progress)
                answer["prepared"] = written.__dict__
                progress.say(f"{written.store}: {written.samples} samples of {len(written.places)} sources")
            if not prepare:
                from pipeline.train import train as learn

                trained = learn(training, restart=restart, progress=progress)
                answer["trained"] = trained.__dict__
        if as_json:
            _print_json(answer)
        elif not prepare:
            best = trained.best
            print(
                f"{trained.weights}: {trained.stopped}; best epoch {int(best['epoch']) + 1}, validation PSNR "
                f"{best['psnr']:.2f} dB (prior {best['prior_psnr']:.2f}); {trained.seconds:.0f} s, of which "
                f"{100 * trained.wait_share:.0f} % waiting for samples"
                if best
                else f"{training.out}: {trained.stopped}; no epoch finished yet, the same command goes on"
            )


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="EVAL.yaml, see tests/jobs/evaluate.yaml.", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare methods and weights on series with known truth; writes tables, plots and pictures.

    Example: [bold]cloudgate evaluate evaluate.yaml --set max_cases=10[/bold]
    """
    with _kind(debug):
        from pipeline.evaluate import evaluate as score
        from pipeline.learnfile import load_evaluation
        from pipeline.progress import show_report, terminal

        asked = load_evaluation(file, overrides=overrides or ())
        with terminal(quiet=as_json) as progress:
            report = score(asked, progress=progress)
        if as_json:
            _print_json({"summary": report.summary, "files": report.files})
        else:
            show_report(asked.name, asked.reference, report)


@app.command()
def doctor(
    catalog: Annotated[str | None, typer.Option(help="Also ask this catalog (profile or URL).")] = None,
    job: Annotated[
        Path | None, typer.Option(help="Also check what this job or schedule needs: catalog, keys, store, cluster.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check this installation: libraries, GDAL, memory, cores, a test read and write; and say what to do.

    Example: [bold]cloudgate doctor --catalog earth-search --job job.yaml[/bold]
    """
    with _kind(debug):
        from pipeline.doctor import check
        from pipeline.progress import show_checks

        checks = check(catalog=catalog, job=job)
        if as_json:
            _print_json([c.__dict__ for c in checks])
        else:
            show_checks(checks)
        if not all(c.ok for c in checks):
            raise typer.Exit(1)


def main() -> None:
    """Entry point of the command ``cloudgate``."""
    # What ends a job politely (a scheduler, a container's stop) must release its cluster too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    code = 0
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        typer.secho(
            "cloudgate: interrupted; the same command goes on where it stopped", err=True, fg=typer.colors.YELLOW
        )
        code = 130
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    end = time.monotonic() + 5
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    for thread in others:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in others):  # a read that hangs must not hold up the end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
