"""How much inference costs beside the model: `uv run python tests/benchmarks/inference.py [--weights FILE]`.

One block of made-up looks, nothing is read. Alternately: the bare forward pass over the batches that `complete` makes,
`complete` itself, and the estimates it begins with. Then a larger block in sub-blocks, as a task with little memory
does, without and with the patches that its neighbours computed, and megapixels a second of two processes with a thread
each; on a GPU the paper's scene, 5000 x 5000 px with 20 dates and 6 bands.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from pipeline import models, predict
from pipeline.errors import WeightsError
from pipeline.estimates import HALO_PX, Target, estimate
from pipeline.kept import Kept
from pipeline.models.batch import Batch, Model
from pipeline.models.weights import load_model


def looks(size: int, dates: int, bands: int, cloud: float, seed: int = 0) -> Target:
    """A block as ``complete`` wants it: patchy ground, square clouds on about ``cloud`` of each date."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1200, 4500, (bands, size // 16 + 1, size // 16 + 1))
    ground = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :size, :size]
    days = (19_000 + np.sort(rng.choice(400, dates, replace=False))).astype(np.int32)
    codes = np.empty((dates, bands, size, size), np.uint16)
    clear = np.empty((dates, size, size), bool)
    for t in range(dates):
        codes[t] = ground + rng.integers(-60, 60, (bands, 1, 1)) + rng.integers(-15, 15, (bands, size, size))
        blobs = rng.random((size // 48 + 1, size // 48 + 1)) >= cloud
        clear[t] = blobs.repeat(48, axis=0).repeat(48, axis=1)[:size, :size]
    anchor = dates // 2
    return Target(codes, clear, days, int(days[anchor]), anchor, row0=0, col0=0)


def network(weights: str) -> Model:
    """The weights' network, or an untrained one by its name (small, paper)."""
    try:
        return load_model(weights)
    except WeightsError:
        print(f"no weights {weights!r}: an untrained network of that name; the cost is the same")
        return models.build(weights).eval()


class Recorder(torch.nn.Module):
    """Passes batches on and keeps them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.batches: list[Batch] = []
        self.calls = 0

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Any:
        """As the model."""
        self.batches.append(batch)
        self.calls += 1
        return self.model(batch, with_weights=with_weights)


def seconds(work: Callable[[], Any]) -> float:
    """Of one call, the GPU's work included."""
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def beside_the_model(model: Model, block: Target, repeats: int) -> dict[str, float]:
    """Ratios to the bare forward pass, alternating, medians."""
    recorder = Recorder(model)
    predict.complete(block, model=recorder)

    def bare() -> None:
        with torch.inference_mode(), predict.one_thread():
            for batch in recorder.batches:
                model(batch, with_weights=True)

    times: dict[str, list[float]] = {"bare": [], "complete": [], "estimates": []}
    for _ in range(repeats):
        times["bare"].append(seconds(bare))
        times["complete"].append(seconds(lambda: predict.complete(block, model=model)))
        times["estimates"].append(seconds(lambda: estimate(block)))
    around = [(c - e) / b - 1 for b, c, e in zip(*times.values(), strict=True)]
    return {
        "patches": len(recorder.batches),
        "bare_s": statistics.median(times["bare"]),
        "complete_s": statistics.median(times["complete"]),
        "estimates_s": statistics.median(times["estimates"]),
        "added_without_estimates": statistics.median(around),
        "added_with_estimates": statistics.median(c / b - 1 for b, c, _ in zip(*times.values(), strict=True)),
    }


def in_sub_blocks(model: Model, block: Target, cut: tuple[int, int], kept: Kept | None) -> int:
    """Complete a block sub-block by sub-block, each with its halo; how many patches that took."""
    recorder, halo = Recorder(model), predict.halo_px(model)
    height, width = block.clear.shape[1:]
    for top, left in product(range(0, height, cut[0]), range(0, width, cut[1])):
        core = slice(top, min(top + cut[0], height)), slice(left, min(left + cut[1], width))
        rows, cols = (slice(max(part.start - halo, 0), part.stop + halo) for part in core)
        part = replace(
            block,
            codes=np.ascontiguousarray(block.codes[:, :, rows, cols]),
            clear=np.ascontiguousarray(block.clear[:, rows, cols]),
            row0=block.row0 + rows.start,
            col0=block.col0 + cols.start,
        )
        inner = tuple(
            slice(c.start - around.start, c.stop - around.start) for c, around in zip(core, (rows, cols), strict=True)
        )
        predict.complete(part, model=recorder, core=inner, kept=kept)
        recorder.batches.clear()
    return recorder.calls


def little_memory(model: Model, block: Target, cut: tuple[int, int]) -> dict[str, Any]:
    """A block in sub-blocks, each for itself and with its neighbours' patches: patches and seconds."""
    counts: list[int] = []
    alone = seconds(lambda: counts.append(in_sub_blocks(model, block, cut, None)))
    shared = seconds(lambda: counts.append(in_sub_blocks(model, block, cut, Kept())))
    return {"sub_blocks_px": cut, "patches_alone_kept": counts, "seconds_alone_kept": [alone, shared]}


def _one_process(weights: str, block: Target) -> None:
    predict.complete(block, model=network(weights))


def two_processes(weights: str, block: Target) -> float:
    """Megapixels a second of two processes, a block each, libraries and weights loaded before."""
    context = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        small = looks(64, 3, block.codes.shape[1], 0.5)
        list(pool.map(_one_process, [weights] * 2, [small] * 2))
        begun = time.perf_counter()
        list(pool.map(_one_process, [weights] * 2, [block] * 2))
        return 2 * block.codes[0, 0].size / 1e6 / (time.perf_counter() - begun)


def on_gpu(model: Model) -> dict[str, float]:
    """The paper's scene in blocks of 1000 px with their halo; bf16 beside fp32."""
    bands = len(model.config.bands) or 6
    halo = predict.halo_px(model)
    block = looks(1000 + 2 * halo, 20, bands, 0.35)
    core = slice(halo, halo + 1000), slice(halo, halo + 1000)
    model = model.to("cuda")
    predict.complete(block, model=model, core=core)
    fp32 = predict.complete(block, model=model, core=core).codes.astype(int)
    bf16 = predict.complete(block, model=model, core=core, precision="bf16").codes.astype(int)
    took = seconds(lambda: [predict.complete(block, model=model, core=core) for _ in range(25)])
    return {
        "scene_5000_px_20_dates_s": took,
        "bands": bands,
        "bf16_rmse": float(np.sqrt(np.mean((fp32 - bf16) ** 2))) / 1e4,
    }


def main() -> None:
    """Measure and print one JSON object."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--weights", default="robust", help="a file, shipped weights, or a network's name")
    asked.add_argument("--size", type=int, default=384, help="side of the block for the first figures")
    asked.add_argument("--dates", type=int, default=12)
    asked.add_argument("--bands", type=int, default=4)
    asked.add_argument("--cloud", type=float, default=0.35)
    asked.add_argument(
        "--cut", type=int, nargs="*", default=[512, 256], help="rows and columns of a sub-block; none: skip"
    )
    asked.add_argument("--area", type=int, default=1024, help="side of the block for all but the first figures")
    asked.add_argument("--repeats", type=int, default=5)
    given = asked.parse_args()
    model = network(given.weights)
    block = looks(given.size, given.dates, len(model.config.bands) or given.bands, given.cloud)
    out: dict[str, Any] = {"network": model.config.name, "estimates_halo_px": HALO_PX, **vars(given)}
    out |= beside_the_model(model, block, given.repeats)
    area = looks(given.area, given.dates, len(model.config.bands) or given.bands, given.cloud)
    if given.cut:
        out |= little_memory(model, area, (given.cut[0], given.cut[1]))
    out["two_processes_mpx_per_s"] = two_processes(given.weights, area)
    out["gpu"] = on_gpu(model) if torch.cuda.is_available() else "not measured, no device"
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
