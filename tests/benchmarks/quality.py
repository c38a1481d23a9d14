"""In: the real series under ``CLOUDGATE_DATA``. Out: a table of methods on the variants of task A (see
series.py).

    uv run python tests/benchmarks/quality.py [--sites flanders_31uds,...] [--variants base,...] [--seed 0]

Columns: PSNR mean and median over cases (dB, range 1), MAE and SAM, skill against linear, difference of
PSNR to linear with a 95 % interval (paired, blocks of one date). Below each table the share of truth inside
regression's 90 % interval per band. Negative results are kept in NOTES.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from series import Case, Series, Variant, cases, read_series

from pipeline import composite, mask, metrics
from pipeline.regression import fill_acquisition

SITES = ("flanders_31uds", "flanders_31ues")
VARIANTS = ("base", "inputs", "growth", "growth of looks", "scl", "scl+check")
GROUND_PX = 200  # a target with less clear ground has nothing to learn from

Method = Callable[[Case], NDArray[np.uint16]]


def _classical(function: Callable[..., composite.Composed]) -> Method:
    def run(case: Case) -> NDArray[np.uint16]:
        target = int(case.days[case.target])
        return function(codes=case.codes, clear=case.clear, days=case.days, target=target).codes

    return run


METHODS: dict[str, Method] = {
    "median": _classical(composite.median),
    "nearest": _classical(composite.nearest),
    "decay 15 d": _classical(composite.decay),
    "linear": _classical(composite.linear),
}


@dataclass(frozen=True)
class Scores:
    """What one method reached, case by case."""

    psnr: NDArray[np.float64]
    mae: NDArray[np.float64]
    sam: NDArray[np.float64]
    rmse: NDArray[np.float64]
    seconds: float


def score(made: list[NDArray[np.uint16]], given: list[Case], seconds: float) -> Scores:
    """Score on the pasted pixels; a pixel that no look shows is left out for all methods alike."""
    rows = []
    for codes, case in zip(made, given, strict=True):
        looks = np.delete(case.clear, case.target, axis=0).any(axis=0)
        what = {
            "predicted": metrics.reflectance(codes),
            "truth": metrics.reflectance(case.truth),
            "scored": case.hole & looks,
        }
        rows.append((metrics.psnr(**what), metrics.mae(**what), metrics.sam_degrees(**what), metrics.rmse(**what)))
    return Scores(*(np.array(column) for column in zip(*rows, strict=True)), seconds)


def checked(case: Case, bands: tuple[str, ...]) -> Case:
    """The case with its masks checked in time, as the product does it."""
    blue, nir = bands.index("blue"), bands.index("nir")
    doubtful = mask.temporal_check(
        codes=np.ascontiguousarray(case.codes[:, blue]),
        clear=case.clear,
        days=case.days,
        nir=np.ascontiguousarray(case.codes[:, nir]),
    )
    return replace(case, clear=case.clear & ~doubtful)


def evaluate(series: Series, variant: str, seed: int) -> None:
    """Print the table of one site and variant; ``scl+check`` is ``scl`` with the temporal check."""
    given = list(cases(series, cast(Variant, variant.removesuffix("+check")), seed=seed))
    if variant.endswith("+check"):
        given = [checked(case, series.bands) for case in given]
    dates = np.array([case.date for case in given])
    scores = {}
    for name, method in METHODS.items():
        begun = time.perf_counter()
        made = [method(case) for case in given]
        scores[name] = score(made, given, time.perf_counter() - begun)
    begun = time.perf_counter()
    filled = [
        fill_acquisition(codes=c.codes, clear=c.clear, days=c.days, anchor=c.target, row0=0, col0=0) for c in given
    ]
    seconds = time.perf_counter() - begun
    scores["regression"] = score([f.codes for f in filled], given, seconds)
    for result, case in zip(filled, given, strict=True):
        clear = case.clear[case.target]
        if not np.array_equal(result.codes[:, clear], case.codes[case.target][:, clear]):
            raise AssertionError(f"observed pixels changed on day {case.date}")
    n_dates = len(set(dates.tolist()))
    print(f"\n{series.name} | {variant} | {n_dates} targets, {len(given)} cases, seed {seed}")
    head = f"{'method':<12}{'PSNR':>7}{'median':>8}{'MAE':>8}{'SAM':>7}{'skill':>7}"
    print(f"{head}  {'vs linear, dB':<23}{'s':>5}")
    bar = scores["linear"]
    for name, own in scores.items():
        gain = metrics.paired_block_bootstrap(differences=own.psnr - bar.psnr, blocks=dates)
        skill = 1 - own.rmse.mean() / bar.rmse.mean()
        print(
            f"{name:<12}{own.psnr.mean():7.2f}{np.median(own.psnr):8.2f}{own.mae.mean():8.4f}"
            f"{own.sam.mean():7.2f}{skill:7.2f}  {gain!s:<23}{own.seconds:5.1f}"
        )
    inside = np.concatenate(
        [
            (np.abs(f.codes.astype(float) - c.truth) <= 1.645 * f.sigma)[:, c.hole & np.isfinite(f.sigma[0])]
            for f, c in zip(filled, given, strict=True)
        ],
        axis=1,
    ).mean(axis=1)
    shares = "  ".join(f"{band} {100 * share:.1f}" for band, share in zip(series.bands, inside, strict=True))
    worst = (scores["regression"].psnr - bar.psnr).min()
    print(f"90 % interval covers (%): {shares}; worst case vs linear {worst:+.1f} dB")
    enough = np.array([case.clear[case.target].sum() >= GROUND_PX for case in given])
    if not enough.all() and enough.any():
        gain = (scores["regression"].psnr - bar.psnr)[enough]
        interval = metrics.paired_block_bootstrap(differences=gain, blocks=dates[enough])
        print(f"{enough.sum()} cases whose target shows {GROUND_PX} clear px or more: {interval} dB vs linear")


def main() -> int:
    """Run what was asked for; exit 2 where the data are not at hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", default=",".join(SITES))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root = os.environ.get("CLOUDGATE_DATA")
    if root is None:
        print("CLOUDGATE_DATA is not set: set it to the folder that holds flanders_31uds", file=sys.stderr)
        return 2
    for site in given.sites.split(","):
        series = read_series(Path(root) / site)
        for variant in given.variants.split(","):
            evaluate(series, variant, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
