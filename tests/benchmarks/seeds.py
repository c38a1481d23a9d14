"""The same recipe with several seeds, each field unseen in turn: `uv run python tests/benchmarks/seeds.py OUT RECIPE`.

RECIPE is a TRAIN.yaml of two real fields, such as pipeline/weights/compact.yaml. Its samples are prepared once, so a
seed decides the start, the order and the turns. `yields` is switched on afterwards, as in the weights that ship. Each
network is scored by `cloudgate evaluate` on the field that it did not see, whole and with gamma = 0 (the U-Net left
out). Goes on where it was stopped. Prints dB above `regression` with its interval, for every seed and for the mean of
the seeds case by case. `CLOUDGATE_DATA` names the real sets.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from gamma_zero import changed

from pipeline import metrics
from pipeline.evaluate import evaluate
from pipeline.learnfile import Evaluation, load_evaluation, load_training
from pipeline.prepare import prepare
from pipeline.train import train

SCORES = Path(__file__).parents[1] / "jobs" / "evaluate_learned.yaml"
FIELDS = ("flanders_31ues", "flanders_31uds")


def trained(out: Path, recipe: Path, field: str, seed: int, store: Path) -> list[Path]:
    """Weights of this seed that never saw the field, and the same with gamma = 0."""
    base = load_training(recipe)
    split = base.split.model_copy(update={"test": (field,)})
    folder = out / f"no-{field}-{seed}"
    done = train(base.model_copy(update={"seed": seed, "store": store, "out": folder, "split": split}))
    whole, plain = folder / f"seed-{seed}.safetensors", folder / f"seed-{seed}-x.safetensors"  # names in the table
    changed(done.weights, whole, yields=True)  # as in the weights that ship
    changed(done.weights, plain, yields=True, fusion=False)
    return [whole, plain]


def scored(out: Path, field: str, found: list[Path]) -> Path:
    """The evaluation's cases.csv of all weights on the field that none of them saw."""
    asked = load_evaluation(SCORES)
    (one,) = [one for one in asked.sets if one.name == field]
    folder = out / f"scores-{field}"
    methods = ["linear", {"name": "decay", "tau_days": 15}, "regression"]
    methods += [{"name": "timegate", "weights": str(path)} for path in found]
    kept = asked.model_dump(include={"bands", "seed", "reference", "max_cases"})
    sets = [one.model_copy(update={"variants": ("base",)})]
    evaluate(Evaluation(**kept, name=f"seeds, {field}", out=folder, pictures=0, methods=methods, sets=sets))
    return folder / "cases.csv"


def told(path: Path, field: str) -> None:
    """A line for every task and network, and one for the mean over the seeds."""
    rows = list(csv.DictReader(path.open()))
    for task in ("complete", "predict"):
        psnr: dict[str, dict[str, float]] = {}
        day = {row["case"]: row["day"] for row in rows if row["task"] == task}
        for row in rows:
            if row["task"] == task:
                psnr.setdefault(row["method"], {})[row["case"]] = float(row["psnr"])
        base = np.array([psnr["regression"][case] for case in day])
        gains = {name: np.array([of[case] for case in day]) - base for name, of in psnr.items() if name != "regression"}
        for kind, ending in (("mean of the seeds", ")"), ("mean of the seeds, gamma = 0", "-x)")):
            own = [v for n, v in gains.items() if n.startswith("timegate") and n.endswith("-x)") == (ending == "-x)")]
            gains[kind] = np.mean(own, axis=0)
        for name, gain in gains.items():
            ends = metrics.paired_block_bootstrap(differences=gain, blocks=np.array(list(day.values())))
            print(f"| {field} | {task} | {name} | {ends.mean:+.2f} [{ends.low:+.2f}, {ends.high:+.2f}] | {len(day)} |")


def main() -> None:
    """Train what is missing, score, print."""
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("out", type=Path)
    wanted.add_argument("recipe", type=Path)
    wanted.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    wanted.add_argument("--fields", nargs="*", default=FIELDS, choices=FIELDS)
    given = wanted.parse_args()
    torch.set_num_threads(1)
    store = given.out / "samples"
    base = load_training(given.recipe)
    prepare(base.model_copy(update={"store": store, "out": given.out / "unused"}))
    for field in given.fields:
        found = [path for seed in given.seeds for path in trained(given.out, given.recipe, field, seed, store)]
        told(scored(given.out, field, found), field)


if __name__ == "__main__":
    main()
