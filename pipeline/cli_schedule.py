"""The commands of ``cloudgate schedule``: thin. In come arguments, out come calls of ``agenda`` and ``periodic``."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import AsJson, Debug, Log, MetricsAt, Overrides, day_of, kind, print_json
from pipeline.errors import CloudgateError, ConfigError
from pipeline.redaction import without_secrets

if TYPE_CHECKING:
    from pipeline.periodic import TickReport

app = typer.Typer(
    help="Periodic mosaics: list, tick, backfill, run.\n\nExample: [bold]cloudgate schedule tick austria.yaml[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

File = Annotated[Path, typer.Argument(help="Schedule file (YAML).", show_default=False)]
Areas = Annotated[list[str] | None, typer.Option("--area", help="Only this area; may be given several times.")]
Part = Annotated[str, typer.Option(help="Only every n-th area from i on, as i/n: several ticks side by side.")]


@app.command("list")
def list_(
    schedule: File,
    check: Annotated[bool, typer.Option("--check", help="Search for new scenes (else: last known).")] = False,
    all_: Annotated[bool, typer.Option("--all", help="Also show periods that are done or wait for their end.")] = False,
    area: Areas = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what is due, done, failed or stale (scenes appeared since).

    Example: [bold]cloudgate schedule list austria.yaml --check[/bold]
    """
    with kind(debug):
        from pipeline.agenda import listing
        from pipeline.progress import show_standings
        from pipeline.schedule import load_schedule

        loaded = load_schedule(schedule, overrides=overrides or ())
        standings, warnings = listing(schedule=loaded, areas=area or (), check=check)
        for text in warnings:
            typer.secho(f"cloudgate: {text}", err=True, fg=typer.colors.YELLOW)
        if as_json:
            print_json({"name": loaded.spec.name, "areas": standings, "warnings": warnings})
        else:
            show_standings(standings, everything=all_)


@app.command()
def tick(
    schedule: File,
    item: Annotated[
        str | None,
        typer.Option(help="A STAC Item that has just appeared (file, or - for standard input)."),
    ] = None,
    area: Areas = None,
    part: Part = "0/1",
    overrides: Overrides = None,
    log: Log = None,
    metrics: MetricsAt = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run what is due, and exit: 0 all well, 1 a period stands as failed (tried again later) or an area is broken.

    Example: [bold]cloudgate schedule tick austria.yaml --set cluster.kind=kubernetes[/bold]
    """
    with kind(debug):
        from pipeline.events import read_item
        from pipeline.journal import telling
        from pipeline.periodic import tick as run_due
        from pipeline.progress import terminal
        from pipeline.schedule import load_schedule

        loaded = load_schedule(schedule, overrides=overrides or ())
        event = read_item(_text(item)) if item else None
        with telling(log=log, metrics_at=metrics), terminal(quiet=as_json) as progress:
            report = run_due(schedule=loaded, areas=area or (), part=_part(part), item=event, progress=progress)
        _answer(report, as_json)


@app.command()
def backfill(
    schedule: File,
    first: Annotated[str, typer.Option("--from", help="First day, such as 2019-01-01.")],
    last: Annotated[str, typer.Option("--to", help="Last day.")],
    again: Annotated[bool, typer.Option("--again", help="Build the finished periods again as well.")] = False,
    area: Areas = None,
    part: Part = "0/1",
    overrides: Overrides = None,
    log: Log = None,
    metrics: MetricsAt = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build the periods of a span that are missing, failed, stale, or made by another recipe.

    Example: [bold]cloudgate schedule backfill austria.yaml --from 2019-01-01 --to 2023-12-31[/bold]
    """
    with kind(debug):
        from pipeline.journal import telling
        from pipeline.periodic import backfill as fill
        from pipeline.progress import terminal
        from pipeline.schedule import load_schedule

        loaded = load_schedule(schedule, overrides=overrides or ())
        start, end = day_of("--from", first), day_of("--to", last)
        with telling(log=log, metrics_at=metrics), terminal(quiet=as_json) as progress:
            report = fill(
                schedule=loaded,
                first=start,
                last=end,
                again=again,
                areas=area or (),
                part=_part(part),
                progress=progress,
            )
        _answer(report, as_json)


@app.command()
def run(
    schedule: File,
    every_minutes: Annotated[float, typer.Option(min=0.1, help="Minutes from the end of a tick to the next.")] = 60,
    area: Areas = None,
    overrides: Overrides = None,
    log: Log = None,
    metrics: MetricsAt = None,
    debug: Debug = False,
) -> None:
    """Tick again and again until interrupted, for a laptop or a container; servers use a timer and tick.

    Example: [bold]cloudgate schedule run austria.yaml --every-minutes 60[/bold]
    """
    with kind(debug):
        from pipeline.journal import telling
        from pipeline.periodic import tick as run_due
        from pipeline.progress import terminal
        from pipeline.schedule import load_schedule

        load_schedule(schedule, overrides=overrides or ())  # a wrong one is told at once
        while True:
            try:
                with telling(log=log, metrics_at=metrics), terminal() as progress:
                    report = run_due(
                        schedule=load_schedule(schedule, overrides=overrides or ()), areas=area or (), progress=progress
                    )
                _show(report)
            except CloudgateError as error:
                typer.secho(
                    f"cloudgate: this tick failed: {without_secrets(str(error))}", err=True, fg=typer.colors.RED
                )
            time.sleep(60 * every_minutes)


def _answer(report: "TickReport", as_json: bool) -> None:
    if as_json:
        print_json(report.__dict__ | {"failed": report.failed})
    else:
        _show(report)
    if report.failed or report.broken:
        raise typer.Exit(1)


def _show(report: "TickReport") -> None:
    from pipeline.progress import show_standings

    states: dict[str, int] = {}
    for one in report.built:
        states[one["state"]] = states.get(one["state"], 0) + 1
    print(", ".join(f"{number} {state}" for state, number in states.items()) or "nothing was due", file=sys.stdout)
    if any(report.standings.values()):
        show_standings(report.standings, everything=True)


def _text(where: str) -> str:
    try:
        return sys.stdin.read() if where == "-" else Path(where).read_text()
    except OSError as error:
        raise ConfigError(f"--item: {where} cannot be read ({error}); give the path of a STAC Item, or -") from error


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise ConfigError(f"--part: {text!r} is no part; write i/n, such as 0/8")
    return int(index), int(count)
