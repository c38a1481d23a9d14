"""What all commands share: in comes a command's work, out come errors as one kind paragraph with their exit code."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import Annotated, Any

import typer

from pipeline.errors import CloudgateError, ConfigError
from pipeline.redaction import without_secrets

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: key=value with dotted keys, e.g. method.name=median."),
]
Log = Annotated[
    str | None,
    typer.Option("--log", envvar="CLOUDGATE_LOG", help="Append JSON lines to this file too; - is standard error."),
]
MetricsAt = Annotated[
    str | None,
    typer.Option("--metrics", envvar="CLOUDGATE_METRICS", help="Prometheus metrics: a file, or a port on loopback."),
]


@contextmanager
def kind(debug: bool) -> Iterator[None]:
    """Errors raised on purpose become one paragraph and their exit code."""
    logging.getLogger("distributed").setLevel(logging.ERROR)
    try:
        yield
    except CloudgateError as error:
        if debug:
            raise
        typer.secho(f"cloudgate: {without_secrets(str(error))}", err=True, fg=typer.colors.RED)
        raise typer.Exit(error.exit_code) from None


def print_json(data: Any) -> None:
    """Print an answer for a program."""
    typer.echo(json.dumps(data, indent=1, default=str))


def day_of(name: str, text: str) -> date:
    """The day that ``text`` says.

    Raises:
        ConfigError: for other text; ``name`` is the option it came from.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is no date; write it as 2021-06-11") from None
