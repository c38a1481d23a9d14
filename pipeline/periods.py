"""Which mosaics a job asks for: in comes a time span, out come ``Period`` values, each with its slot on ``time``."""

import calendar
from dataclasses import dataclass
from datetime import date, timedelta

from pipeline.config import Job
from pipeline.items import EPOCH


@dataclass(frozen=True)
class Period:
    """One mosaic in time. All days are days since 1970-01-01, inclusive.

    Attributes:
        slot: ordinal since the job's start, the index on the store's ``time``.
        start: first solar day.
        end: last solar day.
        look_start: first day from which looks are used (start minus look-back).
        target: the day the mosaic shows.
    """

    slot: int
    start: int
    end: int
    look_start: int
    target: int


def _next(day: date, every: str) -> date:
    """First day of the period after the one that contains ``day``; periods lie on the calendar."""
    if every == "week":
        return day + timedelta(days=7 - day.weekday())
    if every == "10 days":
        if day.day <= 20:
            return day.replace(day=11 if day.day <= 10 else 21)
        return day.replace(day=1) + timedelta(days=calendar.monthrange(day.year, day.month)[1])
    months = {"month": 1, "quarter": 3, "year": 12}[every]
    first = (day.month - 1) // months * months + months
    return date(day.year + first // 12, first % 12 + 1, 1)


def periods(job: Job) -> list[Period]:
    """The periods of a job, in order; one where ``time.every`` is absent. The last is cut at ``time.end``."""
    out: list[Period] = []
    start = job.time.start
    while start <= job.time.end:
        end = (
            job.time.end
            if job.time.every is None
            else min(_next(start, job.time.every) - timedelta(days=1), job.time.end)
        )
        first, last = (start - EPOCH).days, (end - EPOCH).days
        if isinstance(job.target, date):
            target = (job.target - EPOCH).days
        else:
            target = {"start": first, "middle": (first + last) // 2, "end": last}[job.target]
        out.append(Period(len(out), first, last, first - job.time.lookback_days, target))
        start = end + timedelta(days=1)
    return out
