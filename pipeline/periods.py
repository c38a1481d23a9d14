"""Which mosaics a job asks for: in comes a time span, out come ``Period`` values, each with its slot on ``time``.

Periods lie on the calendar (months, quarters, years, ISO weeks, days 1-10, 11-20 and 21-end of a month), or begin on
the days on which a cron expression fires. The first begins on the job's start, whatever the calendar says.
"""

import calendar
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from itertools import islice, takewhile

from cronsim import CronSim

from pipeline.config import CALENDAR, Job
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
    """First day of the period after the one that contains ``day``."""
    if every == "week":
        return day + timedelta(days=7 - day.weekday())
    if every == "10 days":
        if day.day <= 20:
            return day.replace(day=11 if day.day <= 10 else 21)
        return day.replace(day=1) + timedelta(days=calendar.monthrange(day.year, day.month)[1])
    if every not in CALENDAR:
        return next(CronSim(every, datetime.combine(day, time(23, 59, 59)))).date()
    months = {"month": 1, "quarter": 3, "year": 12}[every]
    first = (day.month - 1) // months * months + months
    return date(day.year + first // 12, first % 12 + 1, 1)


def endless(job: Job) -> Iterator[Period]:
    """All periods since the job's start, without end; the last day of the year 9999 is not met in practice."""
    start, slot = job.time.start, 0
    while True:
        end = job.time.end if job.time.every is None else _next(start, job.time.every) - timedelta(days=1)
        yield _period(job, slot, start, end)
        start, slot = end + timedelta(days=1), slot + 1


def _period(job: Job, slot: int, start: date, end: date) -> Period:
    first, last = (start - EPOCH).days, (end - EPOCH).days
    if isinstance(job.target, date):
        target = (job.target - EPOCH).days
    else:
        target = {"start": first, "middle": (first + last) // 2, "end": last}[job.target]
    return Period(slot, first, last, first - job.time.lookback_days, target)


def periods(job: Job) -> list[Period]:
    """The periods of a job, in order; one where ``time.every`` is absent. The last is cut at ``time.end``."""
    last = (job.time.end - EPOCH).days
    out = list(takewhile(lambda period: period.start <= last, endless(job)))
    if out[-1].end > last:
        out[-1] = _period(job, out[-1].slot, EPOCH + timedelta(days=out[-1].start), job.time.end)
    return out


def first_periods(job: Job, count: int) -> list[Period]:
    """The first ``count`` periods of a series that goes on: whole ones, whatever ``time.end`` says."""
    return list(islice(endless(job), count))
