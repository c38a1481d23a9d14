"""A small training request on simulated places, its store written once, for the tests of the learned part."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.learnfile import Training

HERE = Path(__file__).parent


def fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """TRAIN.yaml as a mapping: five simulated places of 64 x 64 px, patches of 32 px."""
    return {
        "store": str(folder / "samples"),
        "out": str(folder / "model"),
        "bands": ["blue", "nir"],
        "sources": [{"name": "sim", "simulate": {"seeds": 5, "size_px": 64, "dates": [6, 7]}}],
        "cases": {"patch_px": 32, "pastes": 1, "max_looks": 7, "target_max_bad": 0.2},
        "split": {"validation": ["sim-1003"], "test": ["sim-1004"]},
        "model": {"name": "pupil"},
        "fit": {"epochs": 3, "batch": 4, "checkpoint_steps": 2, "threads": 1, "accelerator": "cpu"},
    } | changes


def training(folder: Path, **changes: Any) -> Training:
    """The same, checked."""
    return Training(**fields(folder, **changes))


def start(folder: Path, *options: str, **changes: Any) -> subprocess.Popen[str]:
    """``cloudgate train`` in a process of its own."""
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(fields(folder, **changes)))
    command = [sys.executable, str(HERE / "pupil.py"), "train", str(path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
    )
