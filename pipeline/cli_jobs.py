"""The commands of a job: thin. In come a job file and overrides, out come scenes, a plan, a mosaic, how far it is."""

import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import AsJson, Debug, Log, MetricsAt, Overrides, kind, print_json

Out = Annotated[str | None, typer.Option(help="Store to write, instead of the job's output.store.", show_default=False)]
JobFile = Annotated[Path, typer.Argument(help="Job file (YAML).", show_default=False)]


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
    with kind(debug):
        from pipeline.frozen import save_items
        from pipeline.jobfile import load_job
        from pipeline.progress import show_items
        from pipeline.request import resolve

        found = resolve(load_job(job, overrides=overrides or ())).found
        if save:
            save_items(found, save)
        if as_json:
            print_json({"items": [item.to_dict() for item in found.items], "dropped": found.dropped})
        else:
            show_items(found)


def plan(
    job: JobFile,
    out: Out = None,
    overrides: Overrides = None,
    scout: Annotated[bool, typer.Option(help="Look at the scenes coarsely, to decide offsets and anchors.")] = True,
    calibrate: Annotated[
        bool, typer.Option(help="Estimate the time: from the store's records, or by composing a small part.")
    ] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a job would do: scenes, tasks, bytes, memory, time, offsets, anchors. Writes nothing.

    Example: [bold]cloudgate plan job.yaml[/bold]
    """
    with kind(debug):
        from pipeline.jobfile import load_job
        from pipeline.mosaic import plan as make_plan
        from pipeline.progress import show_plan

        made = make_plan(job=load_job(job, overrides=overrides or (), store=out), scouting=scout, calibrate=calibrate)
        if as_json:
            print_json({**made.__dict__, "grid": made.grid.to_dict()})
        else:
            show_plan(made)


def mosaic(
    job: JobFile,
    out: Out = None,
    overrides: Overrides = None,
    restart: Annotated[bool, typer.Option(help="Remove an existing store of this path and start over.")] = False,
    wait: Annotated[float, typer.Option(help="Wait so many seconds if another run works on the store.")] = 0.0,
    log: Log = None,
    metrics: MetricsAt = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a job: search, mask, compose, write the mosaic. Run it again to go on where it stopped.

    Example: [bold]cloudgate mosaic job.yaml --set method.name=median --out out/median.zarr[/bold]
    """
    with kind(debug):
        from pipeline.jobfile import load_job
        from pipeline.journal import telling
        from pipeline.mosaic import build
        from pipeline.progress import period_line, terminal

        with telling(log=log, metrics_at=metrics), terminal(quiet=as_json) as progress:
            summary = build(
                job=load_job(job, overrides=overrides or (), store=out), restart=restart, progress=progress, wait_s=wait
            )
        if as_json:
            print_json(summary.__dict__)
            return
        for period in summary.periods:
            print(period_line(period))
        print(f"{summary.store}: done in {summary.seconds:.1f} s; look at it with: cloudgate preview {summary.store}")


def status(
    store: Annotated[str, typer.Argument(help="Zarr store of a job.", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until all ended.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say how far a store is: periods, shards, failed reads; while a run goes on and after.

    Example: [bold]cloudgate status out/graz.zarr --watch[/bold]
    """
    with kind(debug):
        from pipeline.progress import show_status
        from pipeline.status import status as look

        while True:
            found = look(store)
            if as_json:
                print_json(found)
            else:
                show_status(found)
            if not watch or all(period["state"] != "unfinished" for period in found["periods"]):
                return
            time.sleep(5)
