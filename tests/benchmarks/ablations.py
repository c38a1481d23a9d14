"""What each option is worth: `uv run python tests/benchmarks/ablations.py OUT [--steps 200] [--only NAME ...]`.

One seed and the same number of steps each, on samples of the recipe `robust` with fewer places and looks, without
flanders_31ues; scored on it (and on simulated places kept out) as dB above the prior. Goes on where it was stopped: a
variant counts when its row is written. The paper's options are tried on the paper's network in its small form, the
shipped network's on itself. The number of dates is tried at evaluation, through `compose_block`, with the weights that
ship. `--paper` builds and counts the paper's network and trains it for a few steps. Writes
OUT/ablations.csv and prints a table.
"""

import argparse
import csv
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import cases, learned, metrics, models
from pipeline.config import Method
from pipeline.errors import ConfigError
from pipeline.estimates import ESTIMATES
from pipeline.evaluate import compose_case
from pipeline.exam import exam_pixels, undistorted
from pipeline.learnfile import Training, load_training
from pipeline.logs import rows_of
from pipeline.models.weights import load_model
from pipeline.patches import Patches, collate
from pipeline.places import places
from pipeline.prepare import prepare
from pipeline.samples import Sample, open_store, split_samples
from pipeline.train import train
from pipeline.training_folder import STEPS

RECIPE = Path(__file__).parents[2] / "pipeline" / "weights" / "robust.yaml"
UNSEEN = "flanders_31ues"
BANDS = ["blue", "green", "red", "nir"]
COMPACT = {"name": "compact", "doubt": True, "middle": True, "local": True}
SMALL = {"name": "small", "prior": "base", "extra_inputs": ["known", "prior", "scale"], "unit": "scale"}
RATIO = {"charbonnier": 0, "log_ratio": 1}
"""Loss of the small network, which answers no sigma; the compact one keeps the recipe's."""
VARIANTS: dict[str, dict[str, Any]] = {
    # the network that ships, from the whole to its parts
    "compact": {"model": COMPACT},
    "compact: kriging only": {"model": COMPACT | {"gate": False, "fusion": False}},
    "compact: kriging and gate": {"model": COMPACT | {"fusion": False}},
    "compact: no kriging": {"model": COMPACT | {"kriging": False, "doubt": False}},
    "compact: no doubt": {"model": COMPACT | {"doubt": False}},
    "compact: no middle": {"model": COMPACT | {"middle": False}},
    "compact: gate alike everywhere": {"model": COMPACT | {"local": False}},
    "compact: gate that yields": {"model": COMPACT | {"yields": True}},
    # the paper's network in its small form
    "small": {"model": SMALL, "loss": RATIO},
    "small: gate only": {"model": SMALL | {"unet": False}, "loss": RATIO},
    "small: no Hagg": {"model": SMALL | {"with_features": False}, "loss": RATIO},
    "small: no prior": {"model": {"name": "small"}, "loss": RATIO},
    "small: no condition": {"model": SMALL | {"condition": False}, "loss": RATIO},
    "small: attention none": {"model": SMALL | {"attention": "none"}, "loss": RATIO},
    "small: attention windowed": {"model": SMALL | {"attention": "windowed"}, "loss": RATIO},
    "small: signed days": {"model": SMALL | {"signed_days": True}, "loss": RATIO},
    "small: hard mask": {"model": SMALL | {"hard_mask": True}, "loss": RATIO},
    "small: prior a member": {"model": SMALL | {"prior": "member"}, "loss": RATIO},
    "small: no extra inputs": {"model": SMALL | {"extra_inputs": []}, "loss": RATIO},
    "small: estimates and context": {"model": SMALL | {"estimates": len(ESTIMATES), "context": 1}, "loss": RATIO},
    "small: a weight per band": {"model": SMALL | {"bands": BANDS}, "loss": RATIO},
    "small: one weight for all bands": {"model": SMALL | {"bands": BANDS, "weights": "shared"}, "loss": RATIO},
    "small: Charbonnier": {"model": SMALL, "loss": {"charbonnier": 1}},
    "small: L1": {"model": SMALL, "loss": {"charbonnier": 0, "l1": 1}},
    "small: MSE": {"model": SMALL, "loss": {"charbonnier": 0, "mse": 1}},
    "small: FEAT": {
        "model": SMALL,
        "loss": {"charbonnier": 0, "feat": 1, "feat_groups": [["red", "green", "blue"], ["nir", "red", "green"]]},
    },
    "small: Pix2Pix": {"model": SMALL, "loss": {"charbonnier": 1}, "fit": {"adversary": 0.01}},
    "small: paper samples, no prior": {"model": {"name": "small"}, "loss": {"charbonnier": 1}, "mode": "paper"},
    "small: paper samples, no prior, target's clouds masked": {
        "model": {"name": "small"},
        "loss": {"charbonnier": 1},
        "mode": "paper",
        "fit": {"mask_target_clouds": True},
    },
    "small: complete samples, no prior": {"model": {"name": "small"}, "loss": {"charbonnier": 1}},
}
MOST_LOOKS = 10
"""The nearest looks of a sample: the paper's gate costs as many convolutions as there are looks."""
DATES = (1, 3, 6, 12, None)
Row = dict[str, Any]


def named(variant: str) -> str:
    """The variant as a file's name."""
    return re.sub(r"[^\w]+", "_", variant)


def asked(out: Path, name: str, given: argparse.Namespace) -> Training:
    """TRAIN.yaml of a variant: the recipe with another network, loss or sample mode, and few steps."""
    variant = VARIANTS[name]
    mode = variant.get("mode", "complete")
    folder = out / named(name)
    base = load_training(RECIPE).model_dump(mode="json")
    base |= {"store": str(out / f"samples-{mode}"), "out": str(folder), "name": name, "model": variant["model"]}
    base["loss"] = variant.get("loss", base["loss"])
    if base["loss"].get("feat") and given.vgg:
        base["loss"] = base["loss"] | {"feat_weights": str(given.vgg)}
    base |= {"after": {}}  # what is changed in weights that ship
    base["split"]["test"] = [UNSEEN]
    base["cases"] |= {"mode": mode, "max_looks": MOST_LOOKS}
    places = 12 if mode == "paper" else 40  # in paper mode every date is a target: fewer places do
    for source in base["sources"]:
        if source["simulate"]:
            source["simulate"]["seeds"] = places
    base["split"]["validation"] = [f"made-{100000 + places - 1}", f"missed-{200000 + places - 1}"]
    base["fit"] |= {"epochs": 1, "epoch_steps": given.steps, "batch": given.batch} | variant.get("fit", {})
    return Training(**base)


def scored(weights: Path, training: Training, groups: dict[str, list[int]], store_path: Path) -> Row:
    """Gain over the prior in dB, of the image and of X alone, by group of samples; mean with an interval by date."""
    model, store = load_model(str(weights)), open_store(store_path)
    out: Row = {}
    for group, numbers in groups.items():
        data = Patches(store, numbers, seed=training.seed, fit=None)
        gains, days = [], []
        with torch.inference_mode():
            for i, number in enumerate(numbers):
                lesson = collate([data[(0, i)]])
                made, where = model(undistorted(lesson.given)), exam_pixels(lesson, False)[0].numpy()
                if not where.any():
                    continue
                both = [
                    metrics.psnr(predicted=np.clip(image[0].numpy(), 0, 1), truth=lesson.truth[0].numpy(), scored=where)
                    for image in (made.image, made.aggregate, lesson.given.prior)
                ]
                gains.append([both[0] - both[2], both[1] - both[2], both[0] - both[1]])
                days.append(f"{store.samples[number].place}/{store.samples[number].day}")
        for column, name in enumerate(("", " X", " image-X")):
            values = np.array([gain[column] for gain in gains])
            ends = metrics.paired_block_bootstrap(differences=values, blocks=np.array(days))
            out |= {f"{group}{name}": ends.mean, f"{group}{name} low": ends.low, f"{group}{name} high": ends.high}
    return out


def groups_of(samples: tuple[Sample, ...], training: Training, most: int) -> dict[str, list[int]]:
    """Samples to score on: the unseen field (clean masks, worse masks, date taken out) and unseen simulated places."""
    parts = split_samples(samples, training.split, seed=training.seed)

    def some(numbers: Iterator[int]) -> list[int]:
        found = list(numbers)
        return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))]

    def kind(sample: Sample) -> str:
        if sample.place != UNSEEN:
            return sample.place.split("-")[0]
        if sample.target is None:
            return "no date"
        return "worse masks" if sample.case.endswith(cases.WORSE) else "unseen"

    both = [*parts["test"], *parts["validation"]]
    names = ("unseen", "worse masks", "no date", "made", "missed")
    return {name: some(n for n in both if kind(samples[n]) == name) for name in names}


def one(out: Path, name: str, given: argparse.Namespace) -> Row:
    """Train and score a variant."""
    training = asked(out, name, given)
    prepare(training)
    began = time.perf_counter()
    try:
        done = train(training)
    except ConfigError as error:
        return {"variant": name, "note": str(error)}
    took = time.perf_counter() - began
    size = sum(p.numel() for p in load_model(str(done.weights)).parameters())
    row = {"variant": name, "note": "", "steps": given.steps, "parameters": size, "training_s": round(took)}
    complete = asked(out, "compact", given)
    prepare(complete)
    groups = groups_of(open_store(complete.store).samples, complete, given.most)
    return row | scored(done.weights, training, groups, complete.store)


def by_dates(weights: str, most: int) -> list[Row]:
    """The shipped weights and `regression` on the unseen field with the nearest 1, 3, 6, 12 or all other looks."""
    training = load_training(RECIPE)
    (source,) = [one for one in training.sources if one.name == UNSEEN]
    (place,) = places(source, training.bands, block_px=1024)
    series = place.read()
    given = list(cases.completions(series, max_bad=0.01))
    given = [given[i] for i in np.unique(np.linspace(0, len(given) - 1, min(most, len(given))).round().astype(int))]
    methods = {"regression": Method(name="regression"), "timegate": Method(name="timegate", weights=weights)}  # type: ignore[call-arg]
    ready = {name: learned.prepare(method, training.bands) for name, method in methods.items()}
    rows = []
    for count in DATES:
        psnr: dict[str, list[float]] = {name: [] for name in ready}
        for case in given:
            near = case if count is None else cases.nearest_looks(case, count + 1)
            made = {name: compose_case(method, near) for name, method in ready.items()}
            where = case.hole & np.logical_and.reduce([(layers.codes != 0).all(axis=0) for layers in made.values()])
            if not where.any():
                continue
            truth = np.nan_to_num(metrics.reflectance(case.truth))
            for name, layers in made.items():
                image = np.clip(np.nan_to_num(metrics.reflectance(layers.codes)), 0, 1)
                psnr[name].append(metrics.psnr(predicted=image, truth=truth, scored=where))
        mean = {f"psnr {name}": float(np.mean(values)) for name, values in psnr.items()}
        label = f"dates at evaluation: {'all' if count is None else count}"
        rows.append({"variant": label, "note": f"{len(psnr['timegate'])} cases", **mean})
    return rows


def paper(out: Path, steps: int) -> Row:
    """The paper's network: counted, and trained for a few steps in the paper's sample mode."""
    bands = ["blue", "green", "red", "nir", "swir16", "swir22"]
    training = Training(
        name="paper",
        store=out / "samples-paper-6-bands",
        out=out / "paper",
        bands=bands,
        sources=[{"name": "sim", "simulate": {"seeds": 4, "size_px": 96, "dates": [8, 10]}}],
        cases={"mode": "paper", "patch_px": 96, "max_looks": 6},
        split={"validation": ["sim-1003"]},
        model={"name": "paper"},
        loss={"charbonnier": 0, "mse": 1},
        fit={
            "epochs": 2,
            "epoch_steps": max(steps // 2, 1),
            "batch": 2,
            "accelerator": "cpu",
            "threads": 1,
            "patience": None,
        },
    )  # type: ignore[arg-type]
    prepare(training)
    began = time.perf_counter()
    train(training)
    loss = [float(row["loss"]) for row in rows_of(training.out / STEPS)]
    third = max(len(loss) // 3, 1)
    size = sum(p.numel() for p in models.build("paper").parameters())
    note = f"MSE {np.mean(loss[:third]):.5f} in the first {third} steps, {np.mean(loss[-third:]):.5f} in the last"
    took = round(time.perf_counter() - began)
    return {"variant": "paper", "note": note, "steps": len(loss), "parameters": size, "training_s": took}


def written(out: Path, rows: list[Row]) -> None:
    """OUT/ablations.csv, as far as it goes."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (out / "ablations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main() -> None:
    """Run what is not done yet, then print the table."""
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("out", type=Path)
    wanted.add_argument("--steps", type=int, default=200)
    wanted.add_argument("--batch", type=int, default=4)
    wanted.add_argument("--most", type=int, default=60, help="samples of a group to score on")
    wanted.add_argument("--vgg", type=Path, help="VGG16 for FEAT, a safetensors file as loss.feat_weights takes it")
    wanted.add_argument("--only", nargs="*", help="variants, default all")
    wanted.add_argument("--weights", default="compact", help="for the number of dates")
    wanted.add_argument("--paper", type=int, default=0, metavar="STEPS", help="train the paper's network so long")
    given = wanted.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    work = {name: (lambda name=name: [one(given.out, name, given)]) for name in VARIANTS}
    work["dates"] = lambda: by_dates(given.weights, given.most)
    if given.paper:
        work = {"paper": lambda: [paper(given.out, given.paper)]} | work
    for name, run in work.items():
        path = given.out / "rows" / f"{named(name)}.json"
        if not path.is_file():
            if given.only is not None and name not in given.only:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(run()))
        rows += json.loads(path.read_text())
        written(given.out, rows)
    for row in rows:
        shown = [f"{row[g]:+.2f} [{row[g + ' low']:+.2f}, {row[g + ' high']:+.2f}]" for g in SHOWN if g in row]
        shown += [f"{k.removeprefix('psnr ')} {v:.2f} dB" for k, v in row.items() if k.startswith("psnr ")]
        print("|", row["variant"], "|", " | ".join([*shown, row["note"]]), "|")


SHOWN = ("unseen", "unseen image-X", "worse masks", "no date", "made", "missed")

if __name__ == "__main__":
    main()
