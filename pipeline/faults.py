"""Faults on purpose: in come a request and a seed, out comes what a flaky server does to it. For tests and benchmarks.

Which request is struck depends on the seed, the file, the range and how often it was asked before, not on the order of
requests, so a run meets the same faults however its threads are scheduled.
"""

import fnmatch
import hashlib
import json
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

KINDS: Final = ("latency", "403", "429", "503", "stall", "truncate", "flip")
"""Half a second of waiting; an expired token; too many requests (Retry-After: 1); unavailable; half a body, then
silence; half a body, then the end of the connection; one bit of the body turned over."""
LATENCY_S: Final = 0.5


@dataclass(frozen=True)
class Faults:
    """How flaky a server is.

    Attributes:
        rate: share of requests that are struck, each by one of ``kinds``.
        seed: another seed strikes others.
        kinds: see ``KINDS``.
        vanished: patterns of paths that are gone for good (404).
        broken: patterns of paths that fail for good (503).
        stall_s: how long a stalled answer stays silent.
    """

    rate: float = 0.0
    seed: int = 0
    kinds: tuple[str, ...] = KINDS
    vanished: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    stall_s: float = 30.0

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"unknown kinds of faults {sorted(unknown)}; known are {', '.join(KINDS)}")

    def to_json(self) -> str:
        """For a child process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Back from ``to_json``."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("kinds", "vanished", "broken"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


class Striker:
    """Draws for one server; counts what it did."""

    def __init__(self, faults: Faults) -> None:
        self.faults, self.struck = faults, Counter[str]()
        self._asked, self._lock = Counter[tuple[str, str]](), threading.Lock()

    def strike(self, path: str, span: str) -> tuple[str | None, float]:
        """What happens to one request for a span of a file: a kind, ``404`` or None; and a number in [0, 1)."""
        if any(fnmatch.fnmatch(path, pattern) for pattern in self.faults.vanished):
            return "404", 0.0
        if any(fnmatch.fnmatch(path, pattern) for pattern in self.faults.broken):
            return "503", 0.0
        with self._lock:
            turn = self._asked[path, span]
            self._asked[path, span] += 1
        digest = hashlib.sha256(f"{self.faults.seed} {path} {span} {turn}".encode()).digest()
        chance, choice, place = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8, 16))
        if chance >= self.faults.rate:
            return None, place
        kind = self.faults.kinds[int(choice * len(self.faults.kinds))]
        with self._lock:
            self.struck[kind] += 1
        return kind, place
