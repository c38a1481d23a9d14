"""Plots and pictures of an evaluation: in come errors by bin and answers, out come PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.bands import rgb_bands, to_reflectance
from pipeline.cases import Case
from pipeline.items import day_text
from pipeline.preview import stretch

INK, FAINT, GRID = "#1c2026", "#787e86", "#e6e6e2"
COLOURS: Final = ("#2f6f9f", "#c8742c", "#4f8f57", "#7f5ca8", "#b0413e", "#8c7a2f", "#3f8f8f", "#c05f8f", "#5f6670")
ERROR_TOP: Final = 0.05
"""Reflectance at the bright end of error maps."""

Bins = NDArray[np.float64]


def by_gap(
    totals: Mapping[str, tuple[Bins, Bins]],
    gap_days: Sequence[int],
    looks: Sequence[int],
    path: Path,
    *,
    title: str,
) -> Path:
    """PSNR of each method by the days to the nearest clear look and by the number of clear looks, pooled over pixels.

    Args:
        totals: by method, for both plots: (bins, 2) summed squared error (mean over bands) and pixels.
        gap_days: upper edges of the bins in days, the last bin is open.
        looks: upper edges of the bins in looks, likewise.
        path: PNG to write.
        title: of the picture.
    """
    figure = _page(f"{title}: error by gap", 9.6, 3.9)
    names = ("days from the target to the nearest clear look", "clear looks within the window")
    for place, (what, edges) in enumerate(zip(names, (gap_days, looks), strict=True)):
        axes = figure.add_subplot(1, 2, place + 1)
        pixels = next(iter(totals.values()))[place][:, 1]
        ticks = _bin_names(edges)
        for (method, bins), colour in zip(totals.items(), _colours(len(totals)), strict=True):
            squared, count = bins[place].T
            with np.errstate(invalid="ignore", divide="ignore"):
                psnr = -10 * np.log10(squared / count)
            axes.plot(ticks, psnr, color=colour, marker="o", markersize=4, linewidth=1.7, label=method)
        shares = 100 * pixels / max(pixels.sum(), 1)
        axes.set_xticks(range(len(ticks)), [f"{t}\n{s:.0f} %" for t, s in zip(ticks, shares, strict=True)])
        _plain(axes, f"{what} (share of pixels below)", "PSNR (dB)")
    _legend(figure, len(totals))
    return _saved(figure, path)


def by_date(offsets: Mapping[str, NDArray[np.int64]], window_days: int, path: Path, *, title: str) -> Path:
    """The share each date contributes: how far from the target the looks lie that the filled pixels come from.

    Args:
        offsets: by method, signed days of every filled pixel's source date (a gate's heaviest weight).
        window_days: looks reach so far.
        path: PNG to write.
        title: of the picture.
    """
    figure = _page(f"{title}: where filled pixels come from in time", 9.6, 3.6)
    axes = figure.add_subplot(1, 1, 1)
    step = 5
    edges = np.arange(-window_days - step / 2, window_days + step, step)
    middle = (edges[:-1] + edges[1:]) / 2
    groups: dict[bytes, list[str]] = {}
    for method, days in offsets.items():
        share = 100 * np.histogram(days, edges)[0] / max(days.size, 1)
        groups.setdefault(share.tobytes(), []).append(method)
    for (values, methods), colour in zip(groups.items(), _colours(len(groups)), strict=True):
        axes.step(middle, np.frombuffer(values), where="mid", color=colour, linewidth=1.7, label=", ".join(methods))
    axes.axvline(0, color=FAINT, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    _plain(axes, "days from the target (negative: before it)", f"share of filled pixels (% in {step} days)")
    _legend(figure, len(groups))
    return _saved(figure, path)


def picture(
    case: Case,
    answers: Mapping[str, tuple[NDArray[np.uint16], float]],
    bands: Sequence[str],
    path: Path,
    *,
    title: str,
) -> Path:
    """One case: what was given, the truth, and each answer with its error.

    Args:
        case: the case.
        answers: by method, (B, H, W) codes and PSNR in dB.
        bands: names, in order.
        path: PNG to write.
        title: of the picture.
    """
    shown = rgb_bands(list(bands))
    index = [list(bands).index(name) for name in shown]
    truth = to_reflectance(case.truth)
    panels: list[tuple[str, NDArray[Any] | None, NDArray[np.float64] | None]] = []
    if case.target is not None:
        panels.append(("given", stretch(to_reflectance(case.codes[case.target])[index], truth[index]), None))
    panels.append(("truth", stretch(truth[index], truth[index]), None))
    for method, (codes, psnr) in answers.items():
        made = to_reflectance(codes)
        panels.append((f"{method}, {psnr:.1f} dB", stretch(made[index], truth[index]), None))
        error = np.abs(made.astype(np.float64) - truth).mean(axis=0)
        panels.append((f"error of {method}", None, np.where(case.hole, error, np.nan)))
    height, width = case.hole.shape
    figure = _page(f"{title}, {day_text(case.day)}", 2.7 * len(panels), 2.7 * height / width + 1.0)
    figure.text(0.01, 0.02, f"{', '.join(shown)}; outlined: what was to be filled", color=FAINT, fontsize=8)
    for place, (name, image, off) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        if image is not None:
            axes.imshow(image, interpolation="nearest")
            if not case.hole.all():
                axes.contour(case.hole, levels=[0.5], colors="#ffffff", linewidths=0.7)
        if off is not None:
            drawn = axes.imshow(off, cmap="magma", vmin=0, vmax=ERROR_TOP, interpolation="nearest")
            bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03, ticks=[0, ERROR_TOP])
            bar.ax.tick_params(labelsize=7, colors=FAINT)
        axes.set_title(name, fontsize=9, color=INK, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(GRID)
    return _saved(figure, path)


def _page(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, color=INK, x=0.01, ha="left", fontsize=11)
    return figure


def _plain(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _legend(figure: Figure, count: int) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(count, 5), frameon=False, fontsize=8)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _bin_names(edges: Sequence[int]) -> list[str]:
    low = [0, *(edge + 1 for edge in edges)]
    return [f"{a}-{b}" if a != b else str(a) for a, b in zip(low, edges, strict=False)] + [f"{edges[-1] + 1}+"]


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path
