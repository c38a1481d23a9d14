"""How far is it? In come the run records of a store, out comes each period's state; works while a run goes on."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import ledger as ledgers
from pipeline.errors import RequestError, StoreMismatchError
from pipeline.grid import Grid
from pipeline.items import day_text
from pipeline.jobfile import job_from_dict
from pipeline.ledger import DamagedLedger
from pipeline.periods import first_periods, periods
from pipeline.records import RunFolder


def status(store: str | Path) -> dict[str, Any]:
    """How far a store is, from its run records.

    Returns:
        ``store`` and, per period, its dates, state (``finished``, ``empty``: nothing to show, ``unfinished``), shards
        done and in all, share of filled pixels in percent, failed reads.

    Raises:
        StoreMismatchError: if no run of ours is recorded there.
    """
    run = RunFolder(store)
    record = run.read("request.json")
    if record is None:
        raise StoreMismatchError(
            f"store: no run is recorded at {run.where}; give the path of a store that `cloudgate mosaic` wrote"
        )
    grid = Grid.from_dict(record["grid"])
    shards = sum(1 for _ in grid.shards())
    out = []
    job = job_from_dict(record["job"])
    series = record["wish"].get("series", False)
    empty = _without_scenes(run) if series else set()
    for period in first_periods(job, max(run.slots(), default=-1) + 1) if series else periods(job):
        facts = tally(run.marks(period.slot))
        manifest = run.read(run.period(period.slot), "manifest.json") or {}
        ended = "empty" if manifest or period.slot in empty else "unfinished"
        pixels = facts["filled"] + facts["unfilled"]
        out.append(
            {
                "slot": period.slot,
                "start": day_text(period.start),
                "end": day_text(period.end),
                "state": "finished" if manifest.get("published") else ended,
                "shards_done": facts["shards"],
                "shards": shards,
                "filled_percent": round(100 * facts["filled"] / pixels, 3) if pixels else None,
                "failed_reads": facts["failed"],
            }
        )
    return {"store": str(store), "periods": out}


def _without_scenes(run: RunFolder) -> set[int]:
    """Slots for which a schedule found nothing to show; none where its ledger cannot be read."""
    with suppress(DamagedLedger, RequestError):
        if ledger := ledgers.load(run.objects):
            return {slot for slot, entry in ledger.periods.items() if entry.state == "empty"}
    return set()


def tally(marks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of a period's shards, summed."""
    names = ("bytes_read", "reads", "retries", "failed", "filled", "unfilled", "outside")
    out: dict[str, Any] = {name: sum(mark.get(name, 0) for mark in marks) for name in names}
    out["shards"] = len(marks)
    for name in ("seconds", "memory_bytes"):
        values = [mark[name] for mark in marks if name in mark]
        out[f"task_{name}"] = {"median": median(values), "most": max(values)} if values else {}
    out["failures"] = [f for mark in marks for f in mark.get("failures", [])][:100]
    out["notes"] = [note for mark in marks for note in mark.get("notes", [])][:100]
    return out
