"""The same weights with gamma = 0: `uv run python tests/benchmarks/gamma_zero.py IN.safetensors OUT.safetensors`.

The residual U-Net's answer is left out, its sigma stays; for `cloudgate evaluate` to compare the two.
"""

import sys
from pathlib import Path

from pipeline import models
from pipeline.models import weights


def switched_off(source: Path, out: Path) -> None:
    """Read, switch off, write."""
    model = weights.load_model(str(source))
    plain = models.build(model.config.model_copy(update={"fusion": False}))
    plain.load_state_dict(model.state_dict())
    weights.save(plain, out, card=weights.card(source) | {"gamma": 0})


if __name__ == "__main__":
    switched_off(Path(sys.argv[1]), Path(sys.argv[2]))
