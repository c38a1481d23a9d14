"""Logs of a training: in come rows, out come CSV files that agree with the last saved state after a kill."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from pipeline.objects import write_whole


def append(path: Path, row: Mapping[str, float]) -> None:
    """One more row; the first writes the head too."""
    fresh = not path.is_file() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a log; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cut(path: Path, column: str, last: int) -> None:
    """Drop the rows of a log that a killed run wrote after its last state."""
    rows = [row for row in rows_of(path) if row.get(column) and None not in row.values() and float(row[column]) <= last]
    if not path.is_file():
        return
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_whole(path, buffer.getvalue().encode())
