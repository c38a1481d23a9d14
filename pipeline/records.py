"""What a run remembers: in come facts about a run, out come small objects in ``<store>.run/`` from which it goes on.

    request.json        identity of the store and the fields of the job that shape pixels
    period-<slot>/      items.json (frozen), begun.json (id of this beginning; of a series its identity too),
                        scout.json (offsets, clear shares, anchors), manifest.json, before.npz
    period-<slot>/done/ one mark per finished shard, ``<row>.<col>.json``; ``done-<level>/`` those of an overview
    lock                who works on the store (``pipeline.lock``)

They lie beside the store, on disk or in its bucket, for every kind of store. Every object is written whole or not at
all. Nothing here enters the mosaic.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from pipeline.objects import FileObjects, objects_at, write_whole

__all__ = ["RunFolder", "write_whole"]

_READERS: Final = 16
"""Marks read at a time: in a bucket each takes a round trip."""


class RunFolder:
    """The run records of one store.

    Attributes:
        where: the folder, for messages.
        objects: its objects, for what is not named here (lock, ledger).
    """

    def __init__(self, store: str | Path) -> None:
        self.where = str(store).removeprefix("icechunk:").rstrip("/") + ".run"
        self.objects = objects_at(self.where)

    @property
    def path(self) -> Path:
        """The folder on disk.

        Raises:
            ValueError: if it lies in a bucket.
        """
        if isinstance(self.objects, FileObjects):
            return self.objects.path
        raise ValueError(f"{self.where} is no folder on disk")

    def exists(self) -> bool:
        """Whether any run was ever recorded."""
        return self.objects.get("request.json") is not None

    def period(self, slot: int) -> str:
        """The name of one period's part."""
        return f"period-{slot:04d}"

    def slots(self) -> list[int]:
        """Slots that have records, ascending."""
        parts = {name.partition("/")[0] for name in self.objects.names("period-")}
        return sorted(int(part.removeprefix("period-")) for part in parts)

    def read(self, *name: str) -> Any:
        """A JSON object of the folder, None where it is absent or was cut short by a crash."""
        data = self.read_bytes(*name)
        try:
            return None if data is None else json.loads(data)
        except json.JSONDecodeError:
            return None

    def write(self, data: Any, *name: str) -> None:
        """Write a JSON object whole (canonical: sorted keys)."""
        self.write_bytes(json.dumps(data, sort_keys=True, indent=1).encode(), *name)

    def read_bytes(self, *name: str) -> bytes | None:
        """Any object of the folder, None where it is absent."""
        found = self.objects.get("/".join(name))
        return found[0] if found else None

    def write_bytes(self, data: bytes, *name: str) -> None:
        """Write any object whole."""
        self.objects.put("/".join(name), data)

    def done(self, slot: int, level: int = 0) -> set[tuple[int, int]]:
        """(row, col) of the finished shards of a period, or of an overview of it."""
        out = set()
        for name in self.objects.names(self._done(slot, level)):
            row, _, col = name.rpartition("/")[2].removesuffix(".json").partition(".")
            if row.isdigit() and col.isdigit():
                out.add((int(row), int(col)))
        return out

    def _done(self, slot: int, level: int) -> str:
        return f"{self.period(slot)}/done{f'-{level}' if level else ''}/"

    def mark(self, slot: int, shard: tuple[int, int], facts: Mapping[str, Any], level: int = 0) -> None:
        """Mark a shard as written."""
        name = f"{self._done(slot, level)}{shard[0]}.{shard[1]}.json"
        self.objects.put(name, json.dumps(facts, sort_keys=True).encode())

    def marks(self, slot: int) -> list[dict[str, Any]]:
        """The facts of all finished shards of a period, by shard."""
        part = self.period(slot)
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(
                lambda shard: self.read(part, "done", f"{shard[0]}.{shard[1]}.json"), sorted(self.done(slot))
            )
            return [facts for facts in found if facts is not None]

    def fence(self, slot: int) -> str | None:
        """Who may write a period: the run's id, and that of the period's beginning if any; None: no records."""
        ids = [
            (self.read("request.json") or {}).get("run"),
            (self.read(self.period(slot), "begun.json") or {}).get("id"),
        ]
        return "-".join(filter(None, ids)) or None

    def forget_period(self, slot: int) -> None:
        """Remove the records of one period."""
        self.objects.clear(f"{self.period(slot)}/")

    def forget(self) -> None:
        """Remove what the runs of this store recorded; first the record that says that there is any."""
        for name in ("request.json", "items.json", "period-"):
            self.objects.clear(name)
