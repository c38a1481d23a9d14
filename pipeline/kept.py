"""What a model said of patches that reach into later sub-blocks of the same task, so that each is computed once.

In: answers as they are made, sub-block by sub-block, row by row and from left to right. Out: those still needed. This
decides no pixel: what a patch shows does not follow how the ground was cut (see ``pipeline.predict``).
"""

from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]
Key = tuple[int | None, int, tuple[Span, Span]]
"""The acquisition to complete (None: the day shows nothing), the day shown, and the global [first, last) row and column
of the part of a patch that pixels are taken from."""


@dataclass
class Kept:
    """Answers of patches that a later sub-block needs too.

    Attributes:
        answers: by ``Key``; whatever the model's caller makes of a patch.
    """

    answers: dict[Key, Any] = field(default_factory=dict)

    def forget(self, rows: Span, cols: Span) -> None:
        """Let go what neither the sub-block at these global rows and columns nor a later one needs."""
        for key in list(self.answers):
            (_, bottom), (_, right) = key[2]
            if bottom <= rows[0] or (bottom <= rows[1] and right <= cols[0]):
                del self.answers[key]

    def keep(self, key: Key, answer: Any, rows: Span, cols: Span) -> None:
        """Keep an answer if its patch reaches below or to the right of the sub-block at these rows and columns."""
        (_, bottom), (_, right) = key[2]
        if bottom > rows[1] or right > cols[1]:
            self.answers[key] = answer
