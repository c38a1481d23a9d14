"""What a training keeps on disk: in come its request, state and rows of the log, out come files to go on from.

The state is written whole or not at all. A folder belongs to one request: another one is refused.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch

from pipeline.errors import StoreMismatchError
from pipeline.logs import append, cut, rows_of
from pipeline.objects import write_whole

STATE: Final = "state.pt"
REQUEST: Final = "training.json"
STEPS: Final = "steps.csv"
EPOCHS: Final = "epochs.csv"
WEIGHTS: Final = "weights.safetensors"
CURVES: Final = "curves.png"


@dataclass
class State:
    """How far a training is."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_mse: float = math.inf
    best_epoch: int = -1
    ended: str = ""
    epochs: list[dict[str, float]] = field(default_factory=list)


class Records:
    """The folder of one training.

    Args:
        out: the folder.
        request: what must stay the same for a training to go on.
        restart: forget what the folder holds.
        writes: False in processes that leave writing to another.

    Raises:
        StoreMismatchError: the folder holds a training with another request.
    """

    def __init__(self, out: Path, request: Mapping[str, Any], *, restart: bool, writes: bool) -> None:
        self.out, self.writes = out, writes
        path = out / REQUEST
        if restart:
            for name in (REQUEST, STATE, STEPS, EPOCHS, WEIGHTS, CURVES):
                (out / name).unlink(missing_ok=True)
        if path.is_file():
            there = json.loads(path.read_text())
            other = sorted(name for name in request if there.get(name) != request[name])
            if other:
                raise StoreMismatchError(
                    f"out: {out} holds a training with other {', '.join(other)}; name another folder, or start over "
                    "with --restart"
                )
        write_whole(path, json.dumps(request, indent=1).encode())

    def load(self, device: torch.device) -> tuple[State, dict[str, Any]]:
        """How far the training was and its tensors, none of a new one; rows of the log beyond it are dropped."""
        state, there = State(), {}
        path = self.out / STATE
        if path.is_file():
            try:
                there = torch.load(path, map_location=device, weights_only=True)
                state = State(**there.pop("state"))
            except Exception as error:
                raise unreadable(path, error) from error
        if self.writes:
            cut(self.out / STEPS, "step", state.step)
            cut(self.out / EPOCHS, "epoch", state.epoch - 1)
        return state, there

    def save(self, state: State, tensors: Mapping[str, Any]) -> None:
        """Write the state, whole or not at all."""
        if not self.writes:
            return
        kept = {f.name: getattr(state, f.name) for f in fields(State)}
        buffer = io.BytesIO()
        torch.save({"state": kept, **tensors}, buffer)
        write_whole(self.out / STATE, buffer.getvalue())

    def log(self, name: str, row: Mapping[str, float]) -> None:
        """Add a row to a table."""
        if self.writes:
            append(self.out / name, row)

    def loss_of(self, epoch: int) -> float:
        """Mean loss of the steps of an epoch so far."""
        own = [float(row["loss"]) for row in rows_of(self.out / STEPS) if int(row["epoch"]) == epoch]
        return sum(own) / len(own) if own else math.nan


def unreadable(path: Path, error: Exception) -> StoreMismatchError:
    """The error of a state that cannot be taken up."""
    return StoreMismatchError(f"out: {path} cannot be read ({type(error).__name__}); start over with --restart")
