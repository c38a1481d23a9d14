"""Where a schedule stands: in come its series and the clock, out come the standings of all periods, and their ledgers.

Without ``check`` it only reads ledgers, so that thousands of areas are listed in seconds: heavy parts of the package
are imported where a search is asked for.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline import ledger as ledgers
from pipeline.due import begun, clock_warning, describe, due
from pipeline.errors import CloudgateError, ConfigError, NoItemsError
from pipeline.frozen import from_frozen, item_key
from pipeline.items import Item
from pipeline.ledger import DamagedLedger, Entry, Ledger
from pipeline.records import RunFolder
from pipeline.schedule import LoadedSchedule, Series

if TYPE_CHECKING:
    from pipeline.request import Request


def listing(
    *,
    schedule: LoadedSchedule,
    now: datetime | None = None,
    areas: Collection[str] = (),
    check: bool = False,
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Where every period of every area stands.

    Args:
        schedule: see ``load_schedule``.
        now: the clock.
        areas: only these; default all.
        check: search the catalog (once per area and span) and remember what is new; else the last known state.

    Returns:
        (area -> standings in order of time; warnings).
    """
    now = now or datetime.now(UTC)
    out, warnings = {}, []
    for series in choose(schedule, areas, (0, 1)):
        ledger, told = ledger_of(series, now)
        warnings += told
        if warning := clock_warning(ledger, now):
            warnings.append(warning)
        periods = begun(series, schedule.spec, now)
        items = None
        if check:
            slots = [s.period.slot for s in due(periods, None, ledger, now, schedule.spec) if s.look]
            try:
                items = _search(series, slots)
                ledger = _note_new(series, items, now)
            except CloudgateError as error:
                warnings.append(f"{series.area}: not searched: {error}")
        out[series.area] = [describe(s) for s in due(periods, items, ledger, now, schedule.spec)]
    return out, warnings


def choose(schedule: LoadedSchedule, areas: Collection[str], part: tuple[int, int]) -> list[Series]:
    """The series of these areas (all where none is named), every count-th of them from index on.

    Raises:
        ConfigError: an area the schedule does not have, or a part that is none.
    """
    known = [s.area for s in schedule.series]
    for name in areas:
        if name not in known:
            raise ConfigError(f"--area: the schedule has no {name!r}; it has {', '.join(known[:20])}")
    index, count = part
    if not 0 <= index < count:
        raise ConfigError(f"--part: {index}/{count} is no part; write 0/{count} to {count - 1}/{count}")
    return [s for s in schedule.series if not areas or s.area in areas][index::count]


def spans(slots: Sequence[int]) -> list[list[int]]:
    """Slots in runs without a gap."""
    out: list[list[int]] = []
    for slot in sorted(slots):
        if out and slot == out[-1][-1] + 1:
            out[-1].append(slot)
        else:
            out.append([slot])
    return out


def keys_of(request: "Request", slots: Sequence[int]) -> dict[int, list[str]]:
    """Slot -> sorted keys of its scenes, of what a search found."""
    from pipeline.request import acquisitions_of

    def items(slot: int) -> Iterator[Item]:
        for acquisition in acquisitions_of(request, request.schedule[slot]):
            yield from acquisition.items

    return {slot: sorted(item_key(item) for item in items(slot)) for slot in slots}


def _search(series: Series, slots: Sequence[int]) -> dict[int, list[str]]:
    """Slot -> keys of its scenes: one search per span of slots; where nothing is found there are none."""
    from pipeline.request import resolve

    out: dict[int, list[str]] = {}
    for span in spans(slots):
        try:
            out |= keys_of(resolve(series.job, slots=span), span)
        except NoItemsError:
            out |= {slot: [] for slot in span}
    return out


def _note_new(series: Series, items: Mapping[int, Collection[str]], now: datetime) -> Ledger:
    def edit(ledger: Ledger) -> None:
        ledger.seen = max(ledger.seen, now.isoformat())
        for slot, keys in items.items():
            if entry := ledger.periods.get(slot):
                entry.new = len(set(keys) - set(entry.items or ()))

    return ledgers.change(RunFolder(series.store).objects, series.area, edit)


# -- the ledger, made again --------------------------------------------------------------------------------------


def ledger_of(series: Series, now: datetime) -> tuple[Ledger, list[str]]:
    """An area's ledger, made again from the run records if it is damaged; and what was done about it, in words."""
    run = RunFolder(series.store)
    try:
        if (ledger := ledgers.load(run.objects)) is not None:
            return ledger, []
        made = _rebuilt(series, run, now)
        if not made.periods:
            return made, []
        run.objects.swap(ledgers.NAME, made.to_bytes(), None)
        found = f"{len(made.periods)} finished periods"
        return made, [f"{series.area}: {run.where} had no ledger; it is made again from the run records: {found}"]
    except DamagedLedger as error:
        there = run.objects.get(ledgers.NAME)
        aside = f"ledger.damaged-{now:%Y%m%dT%H%M%S}.json"
        made = _rebuilt(series, run, now)
        if there is not None:
            run.objects.put(aside, there[0])
            run.objects.swap(ledgers.NAME, made.to_bytes(), there[1])
        return made, [
            f"{series.area}: the ledger in {run.where} was damaged ({error}) and is made again from the run records: "
            f"{len(made.periods)} finished periods; the damaged one is kept as {aside}. Periods that failed are tried "
            "again"
        ]


def _rebuilt(series: Series, run: RunFolder, now: datetime) -> Ledger:
    """The ledger that the run records tell: every published period with its scenes. Failures are forgotten."""
    ledger = Ledger(series.area)
    for slot in run.slots():
        manifest = run.read(run.period(slot), "manifest.json")
        if not manifest or not manifest.get("published"):
            continue
        frozen = run.read(run.period(slot), "items.json")
        keys = sorted(item_key(i) for i in from_frozen(frozen, run.where).items) if frozen else None
        ledger.periods[slot] = Entry("done", now.isoformat(), manifest.get("key", ""), keys, message="finished")
    return ledger
