"""Scores of the masks on the real Flanders series against their derived mask ``clm``.

    CLOUDGATE_DATA=... python tests/benchmarks/mask_scores.py

"Positive" is what a mask takes away: precision, recall of all that ``clm`` marks and of its kinds, what
is still affected among the looks left clear ("leak"), and the share of clear ground lost. ``clm`` was
itself derived from a comparison in time, so it flatters the temporal check on what both call a change.
"""

import json
import os
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from pipeline import mask

SITES = ("flanders_31uds", "flanders_31ues")
STEPS = {
    "SCL alone": mask.MaskParams(open_m=0, cloud_grow_m=0, shadow_grow_m=0, temporal_check=False),
    "SCL + opening + growth": mask.MaskParams(temporal_check=False),
    "SCL + check": mask.MaskParams(open_m=0, cloud_grow_m=0, shadow_grow_m=0),
    "SCL + opening + growth + check": mask.MaskParams(),
}


def read(site: str) -> dict[str, NDArray]:
    """The whole series of a site: codes of blue and nir, SCL, clm and days."""
    folder = Path(os.environ["CLOUDGATE_DATA"]) / site
    features = json.loads((folder / "items.geojson").read_text())["features"]
    features.sort(key=lambda feature: feature["properties"]["datetime"])
    found: dict[str, list] = {key: [] for key in ("blue", "nir", "scl", "clm")}
    for feature in features:
        for key, layers in found.items():
            with rasterio.open(folder / feature["assets"][key]["href"]) as source:
                layers.append(source.read(1))
    series = {key: np.stack(layers) for key, layers in found.items()}
    for key in ("blue", "nir"):
        series[key] = np.where(series[key] == 0, 0, series[key].astype(np.uint32) + 1000).astype(np.uint16)
    dates = [feature["properties"]["datetime"][:10] for feature in features]
    return series | {"days": np.array(dates, "datetime64[D]").astype(np.int64).astype(np.int32)}


def score(clear: NDArray[np.bool_], clm: NDArray[np.uint8]) -> list[float]:
    """Precision, recall (all, thick, thin, shadow), leak (all, thick), clear ground lost."""
    away, affected = ~clear, clm != 0
    return [
        affected[away].mean(),
        away[affected].mean(),
        *(away[clm == kind].mean() for kind in (1, 2, 3)),
        affected[clear].mean(),
        (clm == 1)[clear].mean(),
        away[~affected].mean(),
    ]


def masked(series: dict[str, NDArray], params: mask.MaskParams) -> mask.MaskLayers:
    """The masks of a series read by ``read``."""
    return mask.mask_block(
        state=mask.state_from_scl(series["scl"]),
        factor=2,
        offset=(0, 0),
        codes=series["blue"],
        nir=series["nir"],
        days=series["days"],
        resolution_m=10,
        params=params,
    )


def main() -> None:
    """Print one row per step and site, in Markdown."""
    if "CLOUDGATE_DATA" not in os.environ:
        raise SystemExit("set CLOUDGATE_DATA to the folder that holds flanders_31uds and flanders_31ues")
    print("| site | mask | precision | recall | thick | thin | shadow | leak | thick leak | clear lost |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for site in SITES:
        series = read(site)
        clear_dates = (series["clm"] != 0).mean(axis=(1, 2)) < 0.01
        for name, params in STEPS.items():
            for nir in (series["nir"], None) if params.temporal_check else (series["nir"],):
                layers = masked(series if nir is not None else series | {"nir": None}, params)
                label = name + (", no nir" if nir is None else "")
                print(
                    f"| {site} | {label} | " + " | ".join(f"{v:.3f}" for v in score(layers.clear, series["clm"])), "|"
                )
        before, after = (masked(series, STEPS[name]) for name in ("SCL + opening + growth", name))
        alarms = (before.clear & ~after.clear)[clear_dates].mean(axis=(1, 2))
        print(f"{site}, {clear_dates.sum()} truly clear dates: marked by the check alone, mean and largest share")
        print(f"{alarms.mean():.3f} {alarms.max():.3f}")


if __name__ == "__main__":
    main()
