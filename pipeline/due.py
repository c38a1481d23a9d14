"""What is due? In come periods, scenes, the ledger and the clock, out comes where every period stands. Nothing else.

Pure functions: no file, no search, no clock of their own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Literal

from pipeline.items import EPOCH, day_text
from pipeline.ledger import Entry, Ledger, instant
from pipeline.periods import Period, endless
from pipeline.schedule import Schedule, Series

State = Literal["waiting", "due", "running", "done", "stale", "empty", "failed"]
CLOCK_SLACK = timedelta(minutes=5)
"""Clocks of machines differ by so much without anybody being wrong."""


@dataclass(frozen=True)
class Standing:
    """Where a period stands.

    Attributes:
        period: which.
        state: waiting (not over, or its delay is not), due (never finished), running, done, stale (scenes appeared
            since), empty (nothing could be published), failed.
        run: whether to build it now.
        why: in words.
        at: when it becomes due or is tried again; None where nothing is awaited.
        look: whether its scenes should be searched now.
    """

    period: Period
    state: State
    run: bool = False
    why: str = ""
    at: datetime | None = None
    look: bool = False


def ripe_at(period: Period, spec: Schedule) -> datetime:
    """When a period is due: the delay after the end of its last day (UTC)."""
    end = datetime.combine(EPOCH, datetime.min.time(), UTC) + timedelta(days=period.end + 1)
    return end + timedelta(days=spec.delay_days)


def begun(series: Series, spec: Schedule, now: datetime) -> list[Period]:
    """The periods that began by now, in order."""
    today = (now.date() - EPOCH).days
    last = min(today, (spec.end - EPOCH).days) if spec.end else today
    return list(takewhile(lambda period: period.start <= last, endless(series.job)))


def due(
    periods: Sequence[Period],
    items: Mapping[int, Collection[str]] | None,
    ledger: Ledger,
    now: datetime,
    spec: Schedule,
    *,
    events: Collection[int] = (),
) -> list[Standing]:
    """Where every period stands, and which are to be built now.

    Args:
        periods: those that began, in order.
        items: slot -> keys of the scenes a search found for it; None, or a slot left out: not searched.
        ledger: what happened so far.
        now: the clock.
        spec: delay, revisits, retries.
        events: slots that a new scene was announced for; they are built without waiting for their end and delay.

    Returns:
        One standing per period, in order.
    """
    ripe = [p.slot for p in periods if ripe_at(p, spec) <= now]
    window = {*ripe[len(ripe) - min(spec.revisit, len(ripe)) :], *events}
    return [_stand(p, items, ledger.periods.get(p.slot), now, spec, window, events) for p in periods]


def _stand(
    period: Period,
    items: Mapping[int, Collection[str]] | None,
    entry: Entry | None,
    now: datetime,
    spec: Schedule,
    window: Collection[int],
    events: Collection[int],
) -> Standing:
    ripe, slot = ripe_at(period, spec), period.slot
    awaited = ripe > now and slot not in events
    if entry is None:
        if awaited:
            return Standing(period, "waiting", why="not over, or late scenes may still come", at=ripe)
        return Standing(period, "due", run=True, why="never built", look=True)
    fresh = len(set(items[slot]) - set(entry.items or ())) if items is not None and slot in items else None
    if entry.state == "running":
        return _killed(period, entry, now, spec, slot in events)
    if entry.state == "failed":
        return _failed(period, entry, now, spec, bool(fresh) or slot in events, slot in window)
    state: State = "empty" if entry.state == "empty" else "done"
    if awaited:
        return Standing(period, state, why="before its end; checked again then", at=ripe)
    soon = early(entry, ripe, now)
    look = soon or slot in window
    new = entry.new if fresh is None else fresh
    if new:
        why = f"{new} new scenes" if look else f"{new} new scenes; too old to be revisited, a backfill rebuilds it"
        return Standing(period, "stale", run=look, why=why, look=look)
    if soon and fresh is None:
        return Standing(period, "due", run=True, why="built before its end, to be checked", look=True)
    return Standing(period, state, why=entry.message if state == "empty" else "", look=look)


def early(entry: Entry, ripe: datetime, now: datetime) -> bool:
    """Whether it was built before its end, or by a clock that was wrong."""
    return instant(entry.at) < ripe or instant(entry.at) > now + CLOCK_SLACK


def _killed(period: Period, entry: Entry, now: datetime, spec: Schedule, new: bool) -> Standing:
    """Of a run that goes on, or did not live to tell; one that ends its runs again and again waits, and is given up."""
    why = f"since {entry.at} (or it was killed)"
    if entry.attempts and not new and instant(entry.at) <= now + CLOCK_SLACK:
        if entry.attempts > spec.retries.most:
            return Standing(period, "failed", why=f"gave up after {entry.attempts} runs that were killed or failed")
        again = instant(entry.at) + spec.retries.wait(entry.attempts)
        if again > now:
            return Standing(period, "running", why=f"{why}, after {entry.attempts} tries", at=again)
    return Standing(period, "running", run=True, why=why, look=True)


def _failed(period: Period, entry: Entry, now: datetime, spec: Schedule, new: bool, look: bool) -> Standing:
    if new:
        return Standing(period, "failed", run=True, why=f"new scenes since; {entry.message}", look=True)
    if entry.attempts > spec.retries.most:
        return Standing(period, "failed", why=f"gave up after {entry.attempts} tries; {entry.message}", look=look)
    again = instant(entry.retry_at) if entry.retry_at else now
    if again <= now or instant(entry.at) > now + CLOCK_SLACK:
        return Standing(period, "failed", run=True, why=f"try {entry.attempts + 1}; {entry.message}", look=True)
    return Standing(period, "failed", why=f"try {entry.attempts} failed; {entry.message}", at=again)


def clock_warning(ledger: Ledger, now: datetime) -> str | None:
    """In words, if the clock stands before a time the ledger has seen."""
    if not ledger.seen or instant(ledger.seen) <= now + CLOCK_SLACK:
        return None
    back = instant(ledger.seen) - now
    return (
        f"{ledger.area}: the clock went backwards: it is {now:%Y-%m-%d %H:%M} UTC, but the ledger was written at "
        f"{instant(ledger.seen):%Y-%m-%d %H:%M} ({back.total_seconds() / 3600:.1f} h later); mend the clock (NTP). "
        "Nothing is lost: what was built stays, periods that are not over now wait for their end and are checked again"
    )


def describe(standing: Standing) -> dict[str, object]:
    """A standing as plain values."""
    p = standing.period
    return {
        "slot": p.slot,
        "start": day_text(p.start),
        "end": day_text(p.end),
        "state": standing.state,
        "why": standing.why,
        "at": standing.at.isoformat() if standing.at else None,
    }
