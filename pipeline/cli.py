"""The command line: thin. In come arguments, out come calls of the Python API, and errors as one kind paragraph."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from pipeline.cli_jobs import mosaic, plan, search, status
from pipeline.cli_learning import evaluate, train
from pipeline.cli_looks import export, preview, view
from pipeline.cli_schedule import app as schedule_app
from pipeline.cli_trying import demo, doctor, simulate

app = typer.Typer(
    name="cloudgate",
    help="Cloud-free Sentinel-2 mosaics from image time series: STAC in, Zarr out. Start with: cloudgate demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_commands: Sequence[Callable[..., None]] = (
    demo,
    simulate,
    mosaic,
    plan,
    search,
    status,
    preview,
    view,
    export,
    train,
    evaluate,
    doctor,
)
for _command in _commands:
    app.command()(_command)
app.add_typer(schedule_app, name="schedule")


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


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice: what is being released is not cut short
    sys.exit(143)


def main() -> None:
    """Entry point of the command ``cloudgate``."""
    # What ends a job politely (a scheduler, a container's stop) must release its cluster too.
    signal.signal(signal.SIGTERM, _end)
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
