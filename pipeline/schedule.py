"""Periodic mosaics: in comes ``SCHEDULE.yaml``, out comes one ``Series`` (a job that goes on) per area.

Only small parts of the package are imported here, so that listing a schedule starts quickly.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.config import Area, Day, Job, TimeSpec
from pipeline.errors import ConfigError
from pipeline.jobfile import explain, job_from_dict, read_yaml, set_field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names of areas: they become parts of paths."""


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _one_or_more(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class Hook(_Base):
    """What to call with a JSON report: a command (report on standard input) or an address (report as body)."""

    command: tuple[str, ...] | None = Field(
        None, min_length=1, description="program and arguments, run without a shell; the report comes on standard input"
    )
    webhook: str | None = Field(None, description="http(s) address that the report is posted to")
    timeout_s: float = Field(60, gt=0, description="seconds it may take")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.command is None) == (self.webhook is None):
            raise ValueError("give exactly one of command and webhook")
        if self.webhook and not self.webhook.startswith(("http://", "https://")):
            raise ValueError("webhook must begin with http:// or https://")
        return self


Hooks = Annotated[tuple[Hook, ...], BeforeValidator(_one_or_more)]


class Retries(_Base):
    """When a failed period is tried again: after wait_hours, then factor times as long each time."""

    most: int = Field(5, ge=0, description="tries after the first; then the period stays failed until a backfill")
    wait_hours: float = Field(1, ge=0, description="wait before the second try")
    factor: float = Field(2, ge=1, description="each wait is so many times the one before")
    longest_hours: float = Field(24, ge=0, description="no wait is longer")

    def wait(self, attempts: int) -> timedelta:
        """How long to wait after so many failed tries (at least 1)."""
        return timedelta(hours=min(self.wait_hours * self.factor ** (attempts - 1), self.longest_hours))


class Schedule(_Base):
    """Which mosaics to make, period by period."""

    name: str = Field("schedule", description="shown in logs and reports")
    job: str | dict[str, Any] = Field(
        description="job template: a file relative to this one, or its fields; its time and area may be left out"
    )
    areas: dict[str, Area] | tuple[str, ...] | Path | None = Field(
        None,
        description="name: area pairs, a list of MGRS tiles, or a text file with one MGRS tile a line; default: the "
        "job's area. The job's output.store then holds {area}",
    )
    every: str = Field(
        description="month, 10 days, week (ISO), quarter, year, or a cron expression on whose days periods begin"
    )
    start: Day = Field(description="first day of the first period; slots on time count from here, so it never changes")
    end: Day | None = Field(None, description="no period begins after this day")
    lookback_days: int = Field(0, ge=0, description="also use looks from so many days before each period")
    delay_days: float = Field(3, ge=0, description="a period is due so many days after its end, for late scenes")
    revisit: int = Field(2, ge=0, description="so many of the newest due periods are searched again for late scenes")
    retries: Retries = Retries()
    on_success: Hooks = Field((), description="called when a period was published")
    on_failure: Hooks = Field((), description="called when a period failed or could show nothing")

    @field_validator("every")
    @classmethod
    def _every(cls, value: str) -> str:
        TimeSpec.check_every(value)
        return value

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.end and self.end < self.start:
            raise ValueError(f"end ({self.end}) is before start ({self.start}); swap them")
        return self


@dataclass(frozen=True)
class Series:
    """One area of a schedule: its name and its job, whose ``time.end`` says nothing (``Schedule.end`` does)."""

    area: str
    job: Job

    @property
    def store(self) -> str:
        """Where its mosaic goes."""
        assert self.job.output.store is not None
        return self.job.output.store


@dataclass(frozen=True)
class LoadedSchedule:
    """A checked schedule and the series of its areas, in order."""

    spec: Schedule
    series: tuple[Series, ...]


def load_schedule(path: Path | str, *, overrides: Sequence[str] = ()) -> LoadedSchedule:
    """Read a schedule.

    Args:
        path: YAML file; the job template and what it reads are relative to it, stores to the working directory.
        overrides: ``key=value`` pairs for the job template, such as ``cluster.kind=kubernetes``.

    Raises:
        ConfigError: for a missing file, an unknown field, a value out of range, or areas that would share a store.
    """
    path = Path(path)
    data = read_yaml(path, "schedule")
    try:
        spec = Schedule(**data)
    except ValidationError as error:
        raise ConfigError(explain(error, f"schedule {path}", Schedule)) from error
    template, folder = _template(spec, path)
    for assignment in overrides:
        _check_override(assignment.partition("=")[0], spec, path)
        set_field(template, assignment)
    if "lookback_days" not in spec.model_fields_set and isinstance(template.get("time"), dict):
        spec = spec.model_copy(update={"lookback_days": _lookback(template["time"], path)})
    series = tuple(
        Series(name, _job(spec, template, area, name, folder, path)) for name, area in _areas(spec, template, path)
    )
    _check_stores(series, path)
    return LoadedSchedule(spec, series)


def _check_override(field: str, spec: Schedule, path: Path) -> None:
    """What the schedule says of all areas and periods is not the job's to change."""
    own = field if field == "time" or field.startswith("time.") else ""
    if (field == "area" or field.startswith("area.")) and spec.areas is not None:
        own = "areas"
    if own:
        raise ConfigError(
            f"--set {field}: a schedule says that itself; change {own.removeprefix('time.')} in {path} (start, every "
            "and lookback_days for time, areas for area)"
        )


def _lookback(time: dict[str, Any], path: Path) -> int:
    """The template's, where the schedule names none: a job that is scheduled looks as far back as it did alone."""
    days = time.get("lookback_days", 0)
    if not isinstance(days, int) or days < 0:
        raise ConfigError(f"schedule {path}: job.time.lookback_days: {days!r} is no number of days; write 0 or more")
    return days


def _template(spec: Schedule, path: Path) -> tuple[dict[str, Any], Path]:
    if isinstance(spec.job, dict):
        return dict(spec.job), path.parent
    file = path.parent / spec.job
    return read_yaml(file, "job"), file.parent


def _areas(spec: Schedule, template: dict[str, Any], path: Path) -> list[tuple[str, Any]]:
    if spec.areas is None:
        return [(str(template.get("name", "area")), template.get("area"))]
    if isinstance(spec.areas, dict):
        named: list[tuple[str, Any]] = list(spec.areas.items())
    else:
        tiles = spec.areas if isinstance(spec.areas, tuple) else _tiles(path.parent / spec.areas)
        named = [(tile, {"mgrs": tile}) for tile in tiles]
    if not named:
        raise ConfigError(f"schedule {path}: areas: there is none; name one, or leave the field out")
    for name, _ in named:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"schedule {path}: areas: {name!r} cannot be part of a path; use letters, digits, . _ and -"
            )
    return named


def _tiles(path: Path) -> list[str]:
    try:
        return [line for line in map(str.strip, path.read_text().splitlines()) if line and not line.startswith("#")]
    except OSError as error:
        raise ConfigError(
            f"areas: {path} cannot be read ({error}); give a text file with one MGRS tile a line"
        ) from error


def _job(spec: Schedule, template: dict[str, Any], area: Any, name: str, folder: Path, path: Path) -> Job:
    time = {"start": spec.start, "end": spec.start, "every": spec.every, "lookback_days": spec.lookback_days}
    output = dict(template.get("output") or {})
    output["store"] = str(output.get("store") or "").replace("{area}", name)
    fields = template | {"time": time, "output": output, "area": area}
    job = job_from_dict(fields, folder=folder, what=f"schedule {path}, job of {name}")
    if not job.output.store:
        raise ConfigError(f"schedule {path}: job.output.store: this field is required; write out/{{area}}.zarr")
    return job


def _check_stores(series: Sequence[Series], path: Path) -> None:
    owners: dict[str, str] = {}
    for one in series:
        place = one.store if "://" in one.store else str(Path(one.store).absolute())
        if place in owners:
            raise ConfigError(
                f"schedule {path}: the areas {owners[place]} and {one.area} would both write {one.store}, so the "
                "schedule would overlap itself; put {area} into job.output.store and name each area once"
            )
        owners[place] = one.area
