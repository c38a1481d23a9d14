"""What a schedule remembers of one area: in come outcomes of periods, out comes one JSON object, ``ledger.json``.

It lies in ``<store>.run/`` and is changed by compare-and-swap only: read it, change a copy, write the copy if nobody
was quicker, else begin again. So any number of ticks, workers and people may write at the same time and no outcome is
lost. A ledger that cannot be read is set aside and made again from the run records (``pipeline.periodic``).
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal, Self

from pipeline.errors import RequestError, StoreError
from pipeline.objects import Objects

FORMAT: Final = "cloudgate-ledger"
VERSION: Final = 1
NAME: Final = "ledger.json"
TRIES: Final = 50

Outcome = Literal["running", "done", "empty", "failed"]


@dataclass
class Entry:
    """What is known of one period.

    Attributes:
        state: running, done, empty (no scene, or none clear: nothing could be published) or failed.
        at: when it was written (ISO, UTC).
        key: the period's identity (``identity.period_key``) that was built.
        items: keys of its scenes, sorted; None where they are not known (ledger made again from the store).
        attempts: tries that failed, or were killed, in a row.
        retry_at: when the next try is due (ISO, UTC); empty where none is.
        message: what happened, in words.
        new: scenes that appeared since, as the last search saw them.
        run: id of the run.
    """

    state: Outcome
    at: str
    key: str = ""
    items: list[str] | None = None
    attempts: int = 0
    retry_at: str = ""
    message: str = ""
    new: int = 0
    run: str = ""


@dataclass
class Ledger:
    """The memory of one area: when the clock was last read, and an entry per period by slot."""

    area: str
    seen: str = ""
    periods: dict[int, Entry] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        periods = {str(slot): vars(self.periods[slot]) for slot in sorted(self.periods)}
        data = {"format": FORMAT, "version": VERSION, "area": self.area, "seen": self.seen, "periods": periods}
        return json.dumps(data).encode()  # no indent: the quick encoder knows none

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of ``to_bytes``.

        Raises:
            DamagedLedger: if it is cut short, no ledger, or holds what no ledger holds.
            RequestError: if a newer cloudgate wrote it.
        """
        try:
            plain = json.loads(data)
            if plain["format"] != FORMAT:
                raise ValueError(f"its format is {plain['format']!r}")
            if plain["version"] != VERSION:
                raise RequestError(
                    f"ledger: version {plain['version']} is not {VERSION}, which this cloudgate knows; update cloudgate"
                )
            entries = {int(slot): Entry(**entry) for slot, entry in plain["periods"].items()}
            for entry in entries.values():
                if entry.state not in ("running", "done", "empty", "failed"):
                    raise ValueError(f"a period's state is {entry.state!r}")
                instant(entry.at)
            return cls(plain["area"], plain["seen"], entries)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedLedger(f"{type(error).__name__}: {error}") from error


class DamagedLedger(ValueError):
    """The ledger's bytes are no ledger."""


def instant(text: str) -> datetime:
    """An ISO time as an aware datetime."""
    return datetime.fromisoformat(text).astimezone(UTC)


def load(objects: Objects) -> Ledger | None:
    """The ledger, None where there is none.

    Raises:
        DamagedLedger: as ``Ledger.from_bytes``.
    """
    there = objects.get(NAME)
    return Ledger.from_bytes(there[0]) if there else None


def change(objects: Objects, area: str, edit: Callable[[Ledger], None]) -> Ledger:
    """Read, edit and write the ledger back, again from the start where somebody was quicker.

    Args:
        objects: where it lies.
        area: its name, for a new one.
        edit: changes a ledger in place; called once per try.

    Returns:
        The ledger as it was written.

    Raises:
        StoreError: if it cannot be written. DamagedLedger: as ``load``.
    """
    for attempt in range(TRIES):
        there = objects.get(NAME)
        ledger = Ledger.from_bytes(there[0]) if there else Ledger(area)
        edit(ledger)
        if objects.swap(NAME, ledger.to_bytes(), there[1] if there else None):
            return ledger
        time.sleep(min(0.002 * 2**attempt, 0.2))
    raise StoreError(f"ledger: {TRIES} times somebody else was quicker to change that of {area}; run the command again")
