"""What work tells while it goes: in come steps and news, out comes whatever a listener makes of them."""

from typing import Any, Protocol


class Progress(Protocol):
    """What a run tells while it goes; the command line draws it."""

    def say(self, text: str) -> None:
        """One line of news."""

    def begin(self, what: str, total: int) -> None:
        """A step of ``total`` units begins."""

    def step(self, units: int, *, megabytes: float = 0.0) -> None:
        """So many units are done, so many megabytes were read for them."""

    def event(self, what: str, **facts: Any) -> None:
        """Something happened (a task came back, a period ended), for machines."""


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Drop it."""

    def begin(self, what: str, total: int) -> None:
        """Drop it."""

    def step(self, units: int, *, megabytes: float = 0.0) -> None:
        """Drop it."""

    def event(self, what: str, **facts: Any) -> None:
        """Drop it."""
