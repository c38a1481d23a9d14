"""A schedule at work: in come its series and the clock, out come mosaics of what is due, a ledger and a report.

One tick searches once per area and span, builds what ``due`` says, one period at a time, and exits; whatever calls it
(cron, a systemd timer, a CronJob, an orchestrator, ``schedule run``) may call it as often as it likes.
"""

import traceback
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Any

from pipeline import hooks
from pipeline import ledger as ledgers
from pipeline.agenda import choose, keys_of, ledger_of, spans
from pipeline.cluster import answers, connect
from pipeline.due import Standing, begun, clock_warning, describe, due, early, ripe_at
from pipeline.errors import (
    CloudgateError,
    ConfigError,
    NoItemsError,
    NothingClearError,
    StoreBusyError,
    TooManyFailuresError,
)
from pipeline.events import slots_of
from pipeline.identity import period_key
from pipeline.items import EPOCH, day_text
from pipeline.ledger import DamagedLedger, Entry, Ledger
from pipeline.lock import hold
from pipeline.mosaic import build
from pipeline.periods import Period
from pipeline.records import RunFolder
from pipeline.redaction import without_secrets
from pipeline.request import Request, resolve
from pipeline.runner import Progress, Silent
from pipeline.schedule import LoadedSchedule, Series


@dataclass
class TickReport:
    """What a tick did.

    Attributes:
        built: one report per period that was built, as the hooks get it.
        standings: area -> every period that is not simply done or waiting, after the tick.
        warnings: clock, hooks, areas that another run works on, ledgers made again.
        broken: area -> why nothing could be done there, or not all of it.
    """

    built: list[dict[str, Any]] = field(default_factory=list)
    standings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The periods that stand as failed, in this tick or since an earlier one."""
        return [
            {"area": area, **one} for area, some in self.standings.items() for one in some if one["state"] == "failed"
        ]


@dataclass
class Ticker:
    """What all areas of a tick share."""

    schedule: LoadedSchedule
    now: datetime
    progress: Progress
    report: TickReport
    stack: ExitStack
    client: Any = None
    ours: bool = True
    lost: bool = False
    announced: Mapping[int, set[str]] = field(default_factory=dict)
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def connected(self, series: Series) -> Any:
        """The cluster, brought up when the first period needs it and kept for the tick."""
        if self.client is None:
            job = series.job
            self.client = self.stack.enter_context(
                connect(job.cluster, memory_gb_per_worker=job.limits.memory_gb_per_worker)
            )
        return self.client

    def let_go(self) -> None:
        """Release a cluster of ours that does not answer any more, so that the next period gets another."""
        if self.ours and not answers(self.client):
            self.client = None
            with suppress(Exception):
                self.stack.close()

    def warn(self, text: str) -> None:
        """Something a person should read."""
        text = without_secrets(text)  # hooks may say anything
        self.report.warnings.append(text)
        self.progress.say(text)


def tick(
    *,
    schedule: LoadedSchedule,
    now: datetime | None = None,
    areas: Collection[str] = (),
    part: tuple[int, int] = (0, 1),
    item: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> TickReport:
    """Run what is due and return.

    Args:
        schedule: see ``load_schedule``.
        now: the clock, aware; default: the machine's.
        areas: only these; default all.
        part: (index, count): only every count-th area, for several ticks side by side.
        item: a STAC Item (or FeatureCollection of them) that has just appeared: only the areas and periods it belongs
            to are searched and built, without waiting for their end.
        progress: hears what goes on.
        client: a Dask client to use instead of the job's cluster.

    Returns:
        What was built, what failed, what to know. A period that fails is recorded, tried again later and reported; it
        does not stop the others.

    Raises:
        ConfigError: for an unknown area or an item without time or place. RunError: the cluster does not come up.
    """
    now = now or datetime.now(UTC)
    with ExitStack() as stack:
        ticker = Ticker(schedule, now, progress or Silent(), TickReport(), stack, client, client is None)
        for series in choose(schedule, areas, part):
            wanted = None
            if item is not None:
                ticker.announced = wanted = slots_of(item, series, schedule, now)
                if not wanted:
                    continue
            _locked(ticker, series, lambda s=series, w=wanted: _tick_area(ticker, s, w))  # type: ignore[misc]
    return ticker.report


def backfill(
    *,
    schedule: LoadedSchedule,
    first: date,
    last: date,
    again: bool = False,
    now: datetime | None = None,
    areas: Collection[str] = (),
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    client: Any = None,
) -> TickReport:
    """Build what is missing, failed, stale or made by another recipe among the periods that touch a span of days.

    Args:
        schedule: see ``load_schedule``.
        first: first day.
        last: last day.
        again: build the finished ones again as well.
        now: as for ``tick``, as are the others.
        areas: only these.
        part: (index, count) of the areas.
        progress: hears what goes on.
        client: a Dask client to use.

    Raises:
        ConfigError: a span that begins before the schedule's start, or ends before it begins. Else as ``tick``.
    """
    now = now or datetime.now(UTC)
    if last < first:
        raise ConfigError(f"--to ({last}) is before --from ({first}); swap them")
    if first < schedule.spec.start:
        raise ConfigError(
            f"--from: {first} is earlier than the schedule's start ({schedule.spec.start}); a period before it has no "
            "slot on time. Begin there, or make another schedule with another store"
        )
    days = ((first - EPOCH).days, (last - EPOCH).days)
    with ExitStack() as stack:
        ticker = Ticker(schedule, now, progress or Silent(), TickReport(), stack, client, client is None)
        for series in choose(schedule, areas, part):
            _locked(ticker, series, lambda s=series: _backfill_area(ticker, s, days, again))  # type: ignore[misc]
    return ticker.report


# -- one area ----------------------------------------------------------------------------------------------------


def _locked(ticker: Ticker, series: Series, work: Callable[[], None]) -> None:
    """Do one area's work under its lock; an area that another run works on, or that is broken, is told and left."""
    try:
        with hold(RunFolder(series.store)):
            work()
    except StoreBusyError as error:
        ticker.warn(f"{series.area}: left out of this tick: {error}")
    except (CloudgateError, DamagedLedger) as error:
        if ticker.lost:
            raise  # no other area would fare better
        ticker.report.broken[series.area] = without_secrets(str(error))
        ticker.warn(f"{series.area}: cannot be worked on: {error}")


def _tick_area(ticker: Ticker, series: Series, events: Collection[int] | None) -> None:
    spec, now = ticker.schedule.spec, ticker.now
    ledger = _opened(ticker, series)
    periods = begun(series, spec, now)
    standings = due(periods, None, ledger, now, spec, events=events or ())
    slots = [s.period.slot for s in standings if s.look and (events is None or s.period.slot in events)]
    for request, some in _searched(ticker, series, slots, periods):
        items = keys_of(request, some)
        _missed(ticker, request, some)
        for one in due(periods, items, ledger, now, spec, events=events or ()):
            if one.period.slot in some:
                if one.run:
                    _build(ticker, series, request, one.period, items[one.period.slot])
                else:
                    _checked(ticker, series, one, ledger)
    _summarise(ticker, series, periods)


def _missed(ticker: Ticker, request: Request, slots: Sequence[int]) -> None:
    """Tell which scenes announced for these slots the catalog does not show, or which cannot be used."""
    announced = {scene for slot in slots for scene in ticker.announced.get(slot, ())}
    missing = announced - {item.id for item in request.found.items}
    if missing:
        ticker.warn(
            f"announced, but not (yet) in {request.found.source}, or not usable: {', '.join(sorted(missing)[:5])}; a "
            "later tick finds them"
        )


def _backfill_area(ticker: Ticker, series: Series, days: tuple[int, int], again: bool) -> None:
    spec, now = ticker.schedule.spec, ticker.now
    ledger = _opened(ticker, series)
    periods = [p for p in begun(series, spec, now) if p.end >= days[0] and p.start <= days[1]]
    waiting = [p for p in periods if ripe_at(p, spec) > now]
    if waiting:
        ticker.progress.say(f"{series.area}: {len(waiting)} periods are not due yet and are left to later ticks")
    periods = [p for p in periods if p not in waiting]
    for request, some in _searched(ticker, series, [p.slot for p in periods], periods):
        for period in (p for p in periods if p.slot in some):
            items = keys_of(request, [period.slot])[period.slot]
            entry = ledger.periods.get(period.slot)
            new = set(items) - set((entry.items if entry else None) or ())
            done = entry and entry.state in ("done", "empty") and not new
            other = bool(entry and entry.key and entry.key != period_key(series.job, period, entry.items or ()))
            if not done or again or other:
                _build(ticker, series, request, period, items, anew=again or other)
    _summarise(ticker, series, periods)


def _opened(ticker: Ticker, series: Series) -> Ledger:
    """The ledger of an area, made again if damaged; what its clock tells."""
    ledger, told = ledger_of(series, ticker.now)
    for text in told:
        ticker.warn(text)
    if warning := clock_warning(ledger, ticker.now):
        ticker.warn(warning)
    return ledger


def _searched(
    ticker: Ticker, series: Series, slots: Sequence[int], periods: Sequence[Period]
) -> Iterator[tuple[Request, list[int]]]:
    """One search per span of slots; a search that finds nothing or fails is the outcome of its periods."""
    by_slot = {p.slot: p for p in periods}
    for span in spans(slots):
        try:
            request = resolve(series.job, slots=span)
        except CloudgateError as error:
            for slot in span:
                entry = _entry(series, slot)
                if entry and entry.state in ("done", "empty"):
                    # Neither scenes that a catalog forgot nor one that does not answer undo a mosaic.
                    if not isinstance(error, NoItemsError):
                        ticker.warn(f"{series.area} {day_text(by_slot[slot].start)}: not searched: {error}")
                    continue
                _failed(ticker, series, by_slot[slot], error, ())
        else:
            yield request, span


def _checked(ticker: Ticker, series: Series, standing: Standing, ledger: Ledger) -> None:
    """A period built before its end, of which nothing is missing, is from now on as good as any."""
    slot, ripe = standing.period.slot, ripe_at(standing.period, ticker.schedule.spec)
    if standing.state in ("done", "empty") and ripe <= ticker.now and early(ledger.periods[slot], ripe, ticker.now):
        _record(ticker, series, slot, lambda entry: replace(entry, at=ticker.now.isoformat(), new=0))


def _entry(series: Series, slot: int) -> Entry | None:
    """A period's entry as it stands now."""
    ledger = ledgers.load(RunFolder(series.store).objects)
    return ledger.periods.get(slot) if ledger else None


def _record(ticker: Ticker, series: Series, slot: int, edit: Callable[[Entry], Entry]) -> Entry:
    """Change one period's entry (a fresh one where there is none)."""

    def change(ledger: Ledger) -> None:
        ledger.seen = ticker.now.isoformat()
        ledger.periods[slot] = edit(ledger.periods.get(slot, Entry("running", ticker.now.isoformat())))

    return ledgers.change(RunFolder(series.store).objects, series.area, change).periods[slot]


def _build(
    ticker: Ticker, series: Series, request: Request, period: Period, items: Sequence[str], *, anew: bool = False
) -> None:
    """Build one period and write down what became of it."""
    at = ticker.now.isoformat()
    before = _entry(series, period.slot)
    anew = anew or bool(before and before.message.startswith(TooManyFailuresError.__name__))  # read failed shards again
    ticker.progress.say(f"{series.area} {day_text(period.start)} to {day_text(period.end)}: {len(items)} scenes")
    try:
        client = ticker.connected(series)
    except CloudgateError as error:
        _failed(ticker, series, period, error, items)
        ticker.lost = True
        raise  # no other period would fare better
    killed = bool(before and before.state == "running")  # the try before did not live to tell

    def begin(entry: Entry) -> Entry:
        return replace(entry, state="running", at=at, attempts=entry.attempts + killed, run=ticker.run)

    _record(ticker, series, period.slot, begin)
    try:
        summary = build(
            job=series.job, request=request, slots=[period.slot], anew=anew, client=client, progress=ticker.progress
        )
    except StoreBusyError:
        raise
    except Exception as error:
        if not isinstance(error, CloudgateError):
            ticker.progress.say(traceback.format_exc())
        _failed(ticker, series, period, error, items)
        ticker.let_go()
        return
    # The key of what was made, which may be older than this recipe: its scenes are the same.
    key = summary.periods[0].get("key", "")
    made = Entry("done", at, key, list(items), message="finished", run=ticker.run)
    _record(ticker, series, period.slot, lambda _: made)
    _tell(ticker, series, period, made, summary.periods[0])


def _failed(ticker: Ticker, series: Series, period: Period, error: Exception, items: Sequence[str]) -> None:
    """Write a failure down with the time of the next try; a period that nothing shows is empty, not failed."""
    at = ticker.now.isoformat()
    message = without_secrets(f"{type(error).__name__}: {error}")
    if isinstance(error, NoItemsError | NothingClearError):
        key = period_key(series.job, period, items)
        empty = Entry("empty", at, key, list(items), message=without_secrets(str(error)), run=ticker.run)
        _tell(ticker, series, period, _record(ticker, series, period.slot, lambda _: empty), {})
        return

    def edit(entry: Entry) -> Entry:
        attempts = entry.attempts + 1
        retry = (ticker.now + ticker.schedule.spec.retries.wait(attempts)).isoformat()
        return Entry("failed", at, entry.key, list(items), attempts, retry, message, run=ticker.run)

    _tell(ticker, series, period, _record(ticker, series, period.slot, edit), {})


def _tell(ticker: Ticker, series: Series, period: Period, entry: Entry, outcome: Mapping[str, Any]) -> None:
    """Report one period, and call the hooks."""
    report = {
        "schedule": ticker.schedule.spec.name,
        "area": series.area,
        "store": series.store,
        "run": ticker.run,
        "slot": period.slot,
        "start": day_text(period.start),
        "end": day_text(period.end),
        "state": entry.state,
        "message": entry.message,
        "attempts": entry.attempts,
        "retry_at": entry.retry_at or None,
        "key": entry.key,
        "outcome": dict(outcome),
    }
    ticker.report.built.append(report)
    ticker.progress.say(f"{series.area} {report['start']}: {entry.state}: {entry.message}")
    spec = ticker.schedule.spec
    for fault in hooks.call(spec.on_success if entry.state == "done" else spec.on_failure, report):
        ticker.warn(fault)


def _summarise(ticker: Ticker, series: Series, periods: Sequence[Period]) -> None:
    ledger = ledgers.load(RunFolder(series.store).objects) or Ledger(series.area)
    standings = due(periods, None, ledger, ticker.now, ticker.schedule.spec)
    ticker.report.standings[series.area] = [describe(s) for s in standings if s.state not in ("done", "waiting")]
