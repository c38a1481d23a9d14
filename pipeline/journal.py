"""What happened, for machines: in come events of a run, out come JSON lines and Prometheus metrics.

Every line holds time, run, store and what happened; a task's line also its period and task id. On disk the lines are
appended to ``<store>.run/log.jsonl`` while the run goes on; in a bucket, which cannot append, they are written as
``log-<run>.jsonl``, ``log-<run>.2.jsonl``, ... every half a minute and at the end. ``CLOUDGATE_LOG`` names another
file for the lines (``-``: standard error), ``CLOUDGATE_METRICS`` a file for Prometheus' textfile collector, or a port
on loopback.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server, write_to_textfile

from pipeline.errors import ConfigError, StoreError
from pipeline.objects import FileObjects, Objects
from pipeline.redaction import without_secrets

EVERY_S: Final = 30.0
PART_LINES: Final = 5_000
MOST_BYTES: Final = 50_000_000
"""A log that grew so large is put aside as ``log.1.jsonl``, over the one before."""
_LAST: Final = "cloudgate_last_success_timestamp_seconds"


class Hears(Protocol):
    """What hears of a run; see ``runner.Progress``."""

    def say(self, text: str) -> None:
        """One line of news."""

    def begin(self, what: str, total: int) -> None:
        """A step begins."""

    def step(self, units: int, *, megabytes: float = 0.0) -> None:
        """Units are done."""

    def event(self, what: str, **facts: Any) -> None:
        """Something happened."""


class Journal:
    """Writes events down and passes everything on."""

    def __init__(self, inner: Hears, objects: Objects, store: str) -> None:
        self.inner, self.objects = inner, objects
        self.common = {"run": uuid.uuid4().hex[:12], "store": store}
        self.lines: list[str] = []
        self.part = 1
        self.kept = time.monotonic()
        self.mute = False

    def say(self, text: str) -> None:
        """One line of news."""
        self._write("say", {"text": text})
        self.inner.say(without_secrets(text))

    def begin(self, what: str, total: int) -> None:
        """A step of ``total`` units begins."""
        self._write("begin", {"what": what, "total": total})
        self.inner.begin(what, total)

    def step(self, units: int, *, megabytes: float = 0.0) -> None:
        """So many units are done."""
        self.inner.step(units, megabytes=megabytes)

    def event(self, what: str, **facts: Any) -> None:
        """Something happened: a task came back, a period was finished, a run began, ended or failed."""
        self._write(what, facts)
        if (place := os.environ.get("CLOUDGATE_METRICS")) and not self.mute:
            try:
                metrics(place).take(what, facts)
            except OSError as error:  # a port that another run has, a folder that is not there: no reason to stop
                self.mute = True
                self.say(f"CLOUDGATE_METRICS={place}: {error}; this run goes on without metrics")
        self.inner.event(what, **facts)

    def close(self) -> None:
        """Keep what a bucket has not got yet."""
        self._keep()

    def _write(self, what: str, facts: dict[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = without_secrets(json.dumps({"time": at, "event": what, **self.common, **facts}, default=str))
        if (also := os.environ.get("CLOUDGATE_LOG")) == "-":
            sys.stderr.write(line + "\n")
        elif also:
            append(Path(also), line)
        if isinstance(self.objects, FileObjects):
            append(self.objects.path / "log.jsonl", line)
            return
        self.lines.append(line)
        if time.monotonic() - self.kept > EVERY_S:
            self._keep()

    def _keep(self) -> None:
        """Put what a bucket has not got; a log that cannot be written never stops a run."""
        if self.lines:
            name = f"log-{self.common['run']}" + (f".{self.part}" if self.part > 1 else "")
            with suppress(StoreError):
                self.objects.put(f"{name}.jsonl", ("\n".join(self.lines) + "\n").encode())
                if len(self.lines) >= PART_LINES:  # written anew each time, so none may grow for ever
                    self.lines, self.part = [], self.part + 1
        self.kept = time.monotonic()


@contextmanager
def recording(inner: Hears, objects: Objects, store: str) -> Iterator[Journal]:
    """A journal of one run: says when it began and how it ended."""
    journal = Journal(inner, objects, store)
    journal.event("run", state="begun")
    try:
        yield journal
    except BaseException as error:
        journal.event("run", state="failed", message=f"{type(error).__name__}: {error}")
        raise
    else:
        journal.event("run", state="ended")
    finally:
        journal.close()


@contextmanager
def telling(*, log: str | None, metrics_at: str | None) -> Iterator[None]:
    """Have every run inside tell more: what ``--log`` and ``--metrics`` name, as the environment would.

    Raises:
        ConfigError: a file that cannot be written, a port that is taken.
    """
    given = {"CLOUDGATE_LOG": log, "CLOUDGATE_METRICS": metrics_at}
    before = {name: os.environ.get(name) for name in given}
    try:
        if log and log != "-":
            Path(log).open("a").close()
        if metrics_at:
            metrics(metrics_at).write()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--log, --metrics: {error}; give a file in a folder that can be written, - for standard error (log), or a "
            "free port on this machine (metrics)"
        ) from error
    try:
        os.environ.update({name: value for name, value in given.items() if value})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def append(path: Path, line: str) -> None:
    """Append one line; a log that cannot be written never stops a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MOST_BYTES:
            path.replace(path.with_suffix(".1.jsonl"))
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError:
        return


class Metrics:
    """Prometheus metrics of this process, to a file (whole or not at all) or on a loopback port."""

    def __init__(self, place: str) -> None:
        registry = self.registry = CollectorRegistry()
        self.path = None if place.isdigit() else Path(place)
        self.tasks = Counter("cloudgate_tasks", "Tasks that came back", registry=registry)
        self.bytes = Counter("cloudgate_bytes_read", "Bytes read from sources", registry=registry)
        self.reads = Counter("cloudgate_reads", "Reads", registry=registry)
        self.failed = Counter("cloudgate_failed_reads", "Reads that failed after all retries", registry=registry)
        told = "Times a read, or one of its requests, was repeated"
        self.retries = Counter("cloudgate_read_retries", told, registry=registry)
        self.seconds = Histogram(
            "cloudgate_task_seconds", "Seconds a task took", registry=registry, buckets=(1, 3, 10, 30, 100, 300, 1000)
        )
        self.memory = Gauge("cloudgate_task_peak_bytes", "Most memory a task's worker held", registry=registry)
        self.periods = Counter("cloudgate_periods", "Periods by outcome", ["state"], registry=registry)
        self.last = Gauge(_LAST, "When a period was published", registry=registry)
        if self.path and (last := _last_success(self.path)):  # the next process of a schedule goes on with it
            self.last.set(last)
        self.server = start_http_server(int(place), addr="127.0.0.1", registry=registry) if place.isdigit() else None

    def close(self) -> None:
        """Free the port."""
        if self.server:
            server, thread = self.server
            server.shutdown()
            server.server_close()
            thread.join()

    def take(self, what: str, facts: dict[str, Any]) -> None:
        """Count an event."""
        if what == "task":
            self.tasks.inc()
            self.bytes.inc(facts.get("bytes_read", 0))
            self.reads.inc(facts.get("reads", 0))
            self.failed.inc(facts.get("failed", 0))
            self.retries.inc(facts.get("retries", 0))
            self.seconds.observe(facts.get("seconds", 0.0))
            self.memory.set(max(facts.get("memory_bytes", 0), self.memory._value.get()))
        elif what == "run" and facts.get("state") == "failed":
            self.periods.labels("failed").inc()
        elif what == "period":
            self.periods.labels(facts.get("state", "unknown")).inc()
            if facts.get("state") == "finished":
                self.last.set_to_current_time()
        with suppress(OSError):  # a full disk must not stop the run
            self.write()

    def write(self) -> None:
        """Renew the file, if it is one.

        Raises:
            OSError: if it cannot be written.
        """
        if self.path:
            write_to_textfile(str(self.path), self.registry)


def _last_success(path: Path) -> float:
    """Seconds since 1970 of what an earlier process told, 0 where none did."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{_LAST} "):
                return float(line.partition(" ")[2])
    return 0.0


@cache
def metrics(place: str) -> Metrics:
    """The metrics of this process for a file or port, made once."""
    return Metrics(place)
