"""The same weights with gamma = 0: `uv run python tests/benchmarks/gamma_zero.py IN.safetensors OUT.safetensors`.

The residual U-Net's answer is left out, its sigma stays; for `cloudgate evaluate` to compare the two.
"""

import sys
from pathlib import Path

from pipeline import models
from pipeline.models import weights


def changed(source: Path, out: Path, **options: bool | int) -> None:
    """The same weights in a network with other options."""
    model = weights.load_model(str(source))
    other = models.build(model.config.model_copy(update=options))
    other.load_state_dict(model.state_dict())
    weights.save(other, out, card=weights.card(source) | {"changed": options})


if __name__ == "__main__":
    changed(Path(sys.argv[1]), Path(sys.argv[2]), fusion=False)
