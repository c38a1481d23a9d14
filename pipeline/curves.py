"""Training curves: in come the rows of each epoch, out comes one picture of loss, PSNR, SSIM and gamma."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

INK, FAINT, OWN, BAR = "#1c2026", "#787e86", "#2f6f9f", "#c8742c"


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path, *, title: str) -> Path | None:
    """Draw training curves; nothing where no epoch is finished.

    Args:
        rows: of ``epochs.csv``, one an epoch.
        path: PNG to write.
        title: of the picture.
    """
    if not rows:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] + 1 for row in rows]
    best = min(range(len(rows)), key=lambda i: rows[i]["mse"])
    panels = [
        ("loss", "training loss", "mean over the epoch's steps"),
        ("psnr", "PSNR (dB)", "validation, on the holes"),
    ]
    panels += [("ssim", "SSIM", "validation, windows that touch the holes")]
    if not all(math.isnan(row["gamma"]) for row in rows):
        panels.append(("gamma", "gamma", "weight of the residual network"))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    figure.suptitle(f"{title}: {len(rows)} epochs, best is {round(epochs[best])}", color=INK, x=0.01, ha="left")
    for place, (name, label, what) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        values = [row[name] for row in rows]
        axes.plot(epochs, values, color=OWN, linewidth=1.8, marker="o" if len(rows) < 25 else None, markersize=3)
        if name == "psnr":
            bar = rows[-1]["prior_psnr"]
            axes.axhline(bar, color=BAR, linewidth=1.2, linestyle="--")
            axes.annotate(f"prior {bar:.2f}", (epochs[-1], bar), color=BAR, fontsize=8, ha="right", va="bottom")
        if name == "loss" and min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
        axes.axvline(epochs[best], color=FAINT, linewidth=0.8, linestyle=":")
        axes.set_title(what, fontsize=9, color=FAINT, loc="left")
        axes.set_ylabel(label, color=INK)
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e2", linewidth=0.8)
        if axes.get_yscale() == "linear":
            axes.ticklabel_format(axis="y", useOffset=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
