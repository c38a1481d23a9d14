"""Timings of the per-pixel kernels, one thread, against what one would write with numpy alone.

    OMP_NUM_THREADS=1 python tests/benchmarks/kernels.py

12 looks of 1024 x 1024 px, 60 % clear; best of ``--repeat`` runs in processor seconds (all is single-
threaded), so that a busy machine distorts little. The masks' growth runs on 12
states of 2048 x 2048 px at 20 m (opening 40 m, growth 100 m).
"""

import argparse
import time
import warnings
from collections.abc import Callable

import cv2
import numpy as np

from pipeline import composite, mask

LOOKS = 12
SIDE = 1024


def best(run: Callable[[], object], repeat: int) -> float:
    """Processor seconds of the fastest of ``repeat`` runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def block(bands: int) -> dict[str, object]:
    """Random codes: the networks do the same steps whatever the data."""
    rng = np.random.default_rng(0)
    return {
        "codes": rng.integers(1100, 5000, (LOOKS, bands, SIDE, SIDE)).astype(np.uint16),
        "clear": rng.random((LOOKS, SIDE, SIDE)) < 0.6,
        "days": np.arange(17000, 17000 + 5 * LOOKS, 5).astype(np.int32),
        "target": 17031,
    }


def time_composites(repeat: int) -> None:
    """Every method on one and on four bands; the geometric median on a sixteenth, scaled up."""
    one, four = block(1), block(4)
    print(f"{'method':<12}{'1 band':>9}{'4 bands':>9}")
    for name, method in composite.METHODS.items():
        if name == "geomedian":
            part = {k: v[..., : SIDE // 16, :] if k in ("codes", "clear") else v for k, v in four.items()}
            print(f"{name:<12}{'':>9}{16 * best(lambda m=method, p=part: m(**p), 1):9.3f}")
            continue
        seconds = [best(lambda m=method, b=b: m(**b), repeat) for b in (one, four)]
        print(f"{name:<12}{seconds[0]:9.3f}{seconds[1]:9.3f}")
    looks = np.where(one["clear"], one["codes"][:, 0], np.nan).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        print(f"{'nanmedian':<12}{best(lambda: np.nanmedian(looks, axis=0), 1):9.3f}   (float32, gaps already NaN)")
        print(f"{'nanmean':<12}{best(lambda: np.nanmean(looks, axis=0), 1):9.3f}")


def time_masks(repeat: int) -> None:
    """Growth, the temporal check with and without infrared, and a whole block."""
    rng = np.random.default_rng(0)
    noise = [cv2.resize(rng.random((64, 64), np.float32), (2048, 2048)) for _ in range(LOOKS)]
    state = np.select([np.stack(noise) > 0.6, np.stack(noise) < 0.3], [mask.CLOUD, mask.SHADOW], mask.CLEAR)
    state = state.astype(np.uint8)
    meters = {"resolution_m": 20.0, "open_m": 40.0, "cloud_grow_m": 100.0, "shadow_grow_m": 100.0}
    print(f"{'grow':<28}{best(lambda: mask.grow(state=state, **meters), repeat):9.3f}")
    blue, nir = block(2)["codes"].transpose(1, 0, 2, 3).copy()
    given = {"codes": blue, "clear": block(1)["clear"], "days": block(1)["days"]}
    print(f"{'temporal check, blue':<28}{best(lambda: mask.temporal_check(**given), repeat):9.3f}")
    print(f"{'temporal check, blue + nir':<28}{best(lambda: mask.temporal_check(**given, nir=nir), repeat):9.3f}")
    whole = {"state": state[:, :530, :530], "factor": 2, "offset": (9, 9), "resolution_m": 10.0}
    whole |= {"codes": blue, "nir": nir, "days": given["days"], "params": mask.MaskParams()}
    print(f"{'mask_block, all of it':<28}{best(lambda: mask.mask_block(**whole), repeat):9.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    times = parser.parse_args().repeat
    time_composites(times)
    time_masks(times)
