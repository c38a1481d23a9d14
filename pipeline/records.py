"""What a run remembers: in come facts about a run, out come small files in ``<store>.run/`` from which it goes on.

    request.json        identity of the store and the fields of the job that shape pixels
    period-<slot>/      items.json (frozen), scout.json (offsets, clear shares, anchors), manifest.json, before.png
    period-<slot>/done/ one mark per finished shard, ``<row>.<col>.json``

Every file is written whole or not at all. Nothing here enters the mosaic.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError


class RunFolder:
    """The run records of one store."""

    def __init__(self, store: str | Path) -> None:
        store = Path(store)
        self.path = store.with_name(store.name + ".run")

    def exists(self) -> bool:
        """Whether any run was ever recorded."""
        return (self.path / "request.json").exists()

    def period(self, slot: int) -> Path:
        """The folder of one period."""
        return self.path / f"period-{slot:04d}"

    def slots(self) -> list[int]:
        """Slots that have a folder, ascending."""
        return sorted(int(p.name.removeprefix("period-")) for p in self.path.glob("period-*"))

    def read(self, *name: str) -> Any:
        """A JSON file of the folder, None where it is absent or was cut short by a crash."""
        try:
            return json.loads(self.path.joinpath(*name).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def write(self, data: Any, *name: str) -> None:
        """Write a JSON file whole (canonical: sorted keys)."""
        write_whole(self.path.joinpath(*name), json.dumps(data, sort_keys=True, indent=1).encode())

    def done(self, slot: int) -> set[tuple[int, int]]:
        """(row, col) of the finished shards of a period."""
        out = set()
        folder = self.period(slot) / "done"
        for path in folder.iterdir() if folder.is_dir() else ():
            row, _, rest = path.name.partition(".")
            col = rest.removesuffix(".json")
            if row.isdigit() and col.isdigit():
                out.add((int(row), int(col)))
        return out

    def mark(self, slot: int, shard: tuple[int, int], facts: Mapping[str, Any]) -> None:
        """Mark a shard as written."""
        path = self.period(slot) / "done" / f"{shard[0]}.{shard[1]}.json"
        write_whole(path, json.dumps(facts, sort_keys=True).encode())

    def marks(self, slot: int) -> list[dict[str, Any]]:
        """The facts of all finished shards of a period, by shard."""
        out = []
        for row, col in sorted(self.done(slot)):
            facts = self.read(self.period(slot).name, "done", f"{row}.{col}.json")
            if facts is not None:
                out.append(facts)
        return out

    def forget_period(self, slot: int) -> None:
        """Remove the records of one period."""
        shutil.rmtree(self.period(slot), ignore_errors=True)

    def forget(self) -> None:
        """Remove all records."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part.

    Raises:
        StoreError: disk full or no permission.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(
            f"run records: cannot write {path}: {error}; free space or check permissions, then run again"
        ) from error
