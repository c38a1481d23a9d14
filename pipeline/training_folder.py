"""What a training keeps on disk: in come its request, state and rows of the log, out come files to go on from.

The state is written whole or not at all, as safetensors with the rest as JSON: nothing is ever unpickled. A folder
belongs to one request: another one is refused.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from pipeline.errors import StoreMismatchError
from pipeline.logs import append, cut, rows_of
from pipeline.objects import write_whole

STATE: Final = "state.safetensors"
_OLD_STATE: Final = "state.pt"
_KEY: Final = "cloudgate"
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
            for name in (REQUEST, STATE, _OLD_STATE, STEPS, EPOCHS, WEIGHTS, CURVES):
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

    def load(self) -> tuple[State, dict[str, Any]]:
        """How far the training was and its tensors, none of a new one; rows of the log beyond it are dropped."""
        state, there = State(), {}
        path = self.out / STATE
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
                    there = _joined(json.loads(file.metadata()[_KEY]), tensors)
                state = State(**there.pop("state"))
            except Exception as error:
                raise unreadable(path, error) from error
        elif (self.out / _OLD_STATE).is_file():
            raise StoreMismatchError(
                f"out: {self.out / _OLD_STATE} is the state of an earlier version, which this one does not read; start "
                "over with --restart, or name another folder"
            )
        if self.writes:
            cut(self.out / STEPS, "step", state.step)
            cut(self.out / EPOCHS, "epoch", state.epoch - 1)
        return state, there

    def save(self, state: State, tensors: Mapping[str, Any]) -> None:
        """Write the state, whole or not at all."""
        if not self.writes:
            return
        kept = {f.name: getattr(state, f.name) for f in fields(State)}
        found: dict[str, Tensor] = {}
        about = json.dumps(_parted({"state": kept, **tensors}, found))
        write_whole(self.out / STATE, to_bytes(found, {_KEY: about}))

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


def _parted(value: Any, found: dict[str, Tensor]) -> Any:
    """A tree as JSON, its tensors put into ``found``; mappings as pairs, since an optimiser's keys are numbers."""
    if isinstance(value, Tensor):
        name = str(len(found))
        found[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _parted(one, found)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return [_parted(one, found) for one in value]
    return value


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that ``_parted`` took apart."""
    if isinstance(value, list):
        return [_joined(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _joined(one, tensors) for key, one in value["pairs"]}
