"""A picture that explains a mosaic: in comes a finished store, out comes one PNG.

Panels: true colour before (the least cloudy acquisition, kept small by each run) and after, clear looks, source date,
flags; with scale bar, dates and legends; or all periods, one after the other or side by side. Reads the overview that
fits, so a huge store takes seconds; without overviews every n-th pixel, for which all must be decoded.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.bands import rgb_bands, to_reflectance
from pipeline.describe import choose_slots, published
from pipeline.errors import StoreError
from pipeline.items import day_text
from pipeline.layers import FLAGS
from pipeline.objects import telling
from pipeline.records import RunFolder
from pipeline.store import finished, levels, open_root

RGB = NDArray[np.uint8]
Panel = tuple[str, Image.Image, list[tuple[str, tuple[int, int, int]]]]
"""Title, picture, legend."""

INK, PAPER, FAINT = (28, 32, 38), (250, 250, 248), (120, 126, 134)
NO_DATA = (214, 214, 210)
# Sequential ramp, dark blue to yellow, even in lightness (own stops after the idea of perceptual colour maps).
RAMP = np.array([(40, 26, 94), (49, 80, 140), (40, 128, 142), (70, 174, 118), (168, 208, 72), (250, 230, 60)], float)
FLAG_COLOURS: dict[str, tuple[int, int, int]] = {
    "no_data": NO_DATA,
    "outside_area": (238, 238, 236),
    "observed_at_anchor": (86, 150, 96),
    "composed_in_time": (92, 132, 190),
    "model_only": (150, 100, 180),
    "blended_anchors": (226, 178, 72),
    "low_confidence": (214, 116, 60),
    "other_season": (170, 130, 90),
    "read_failed": (196, 52, 60),
    "sar_guided": (110, 110, 160),
}
"""Later entries paint over earlier ones."""
PANEL_PX = 460
FEW_LOOKS = 6
"""Below this many clear looks the legend names each count."""
MARGIN = 18
HEADER = 64


def preview(*, store: str | Path, out: str | Path, period: int | str = -1) -> Path:
    """Write the preview of one period of a finished mosaic.

    Args:
        store: the Zarr store.
        out: PNG to write.
        period: number among the finished periods from 0 (-1 is the last), or a day it shows.

    Returns:
        The path written.

    Raises:
        StoreMismatchError: without a finished mosaic. ConfigError: for a period that is not there.
    """
    level = _Level(store)
    (slot,) = choose_slots(level.attrs, period)
    return _save(_panels(level, slot, before=_before(store, slot)), out)


def series(*, store: str | Path, out: str | Path, sheet: bool = False) -> Path:
    """Write all finished periods in true colour, stretched alike: an animated PNG, or a contact sheet.

    Args:
        store: the Zarr store.
        out: PNG to write.
        sheet: side by side instead of one after the other.

    Returns:
        The path written.

    Raises:
        StoreMismatchError: without a finished mosaic.
    """
    level = _Level(store, most_px=PANEL_PX)
    names = rgb_bands(level.attrs["bands"])
    periods = published(level.attrs)
    slots = list(periods)

    def colours(slot: int) -> NDArray[np.float32]:
        return np.stack([to_reflectance(level.read(name, slot)) for name in names])

    some = sorted({round(i) for i in np.linspace(0, len(slots) - 1, min(len(slots), 12))})
    reference = np.concatenate([colours(slots[i])[:, ::2, ::2].reshape(3, -1, 1) for i in some], axis=1)
    days = {slot: str(periods[slot]["target"]) for slot in slots}
    if sheet:
        panels: list[Panel] = [(days[slot], _fit(stretch(colours(slot), reference)), []) for slot in slots]
        subtitle = f"{len(slots)} periods, stretched alike  |  {_colours_name(names)}  |  grey: no data"
        return _save(_compose(panels, title=level.title, subtitle=subtitle, extent_m=level.extent_m), out)
    frames = [
        _frame(stretch(colours(slot), reference), f"{level.title}  {days[slot]}", level.extent_m) for slot in slots
    ]
    return _save(frames[0], out, save_all=True, append_images=frames[1:], duration=900, loop=0)


class _Level:
    """The finest level of at most ``most_px``; where there is none, every n-th pixel of the coarsest.

    Read with zarr alone: xarray takes longer to import than all of a picture to make.
    """

    def __init__(self, store: str | Path, most_px: int = 2 * PANEL_PX) -> None:
        self.attrs = finished(store)
        self.where = f"read {store}"
        with telling(self.where):
            root = open_root(store)
            for number in range(levels(store) + 1):
                self.group = root[str(number)]
                shape = self._array("flags").shape[1:]
                if max(shape) <= most_px:
                    break
            x = np.asarray(self._array("x")[:])
        step = math.ceil(max(shape) / most_px)
        self.every = slice(step // 2, None, step)
        self.title = str(self.attrs.get("title", Path(store).stem))
        self.extent_m = abs(float(x[-1] - x[0])) * x.size / max(x.size - 1, 1)

    def _array(self, name: str) -> "zarr.Array[Any]":
        assert isinstance(self.group, zarr.Group)
        array = self.group[name]
        assert isinstance(array, zarr.Array)
        return array

    def read(self, name: str, slot: int) -> NDArray[Any]:
        """(y, x) raw values of a layer."""
        with telling(self.where):
            return np.asarray(self._array(name)[slot, self.every, self.every])


def _save(picture: Image.Image, out: str | Path, **options: Any) -> Path:
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out, format="PNG", optimize=True, **options)
    except OSError as error:
        raise StoreError(f"preview: cannot write {out}: {error}; choose another place with --out") from error
    return out


def _frame(image: RGB, label: str, extent_m: float) -> Image.Image:
    """One picture of an animation with its label above."""
    picture = _fit(image)
    page = Image.new("RGB", (max(picture.width, 330), picture.height + 34), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((8, 8), label, INK, _font(16))
    page.paste(picture, (0, 34))
    _scale_bar(draw, 10, 34 + picture.height - 16, picture.width, extent_m)
    return page


def _before(store: str | Path, slot: int) -> tuple[str, NDArray[np.float32]] | None:
    """(date and name, (3, y, x) reflectance) of the least cloudy acquisition, where the run kept it."""
    run = RunFolder(store)
    kept = run.read_bytes(run.period(slot), "before.npz")
    if kept is None:
        return None
    with np.load(io.BytesIO(kept), allow_pickle=False) as data:
        return str(data["name"]), to_reflectance(data["codes"])


def stretch(image: NDArray[np.float32], reference: NDArray[np.float32]) -> RGB:
    """(3, y, x) reflectance to (y, x, 3) uint8; one linear stretch per band from percentiles of ``reference``."""
    out = np.empty((*image.shape[1:], 3), np.uint8)
    known = np.isfinite(reference).all(axis=0)
    low = np.percentile(reference[:, known], 0.5, axis=1) if known.any() else np.zeros(3)
    high = np.percentile(reference[:, known], 99.2, axis=1) if known.any() else np.full(3, 0.3)
    spread = max(float((high - low).max()), 0.02)
    for band in range(3):
        unit = np.clip((np.nan_to_num(image[band]) - low[band]) / spread, 0, 1) ** 0.8
        out[..., band] = (unit * 255 + 0.5).astype(np.uint8)
    out[~np.isfinite(image).all(axis=0)] = NO_DATA
    return out


def ramp(values: NDArray[Any], low: float, high: float) -> RGB:
    """(y, x) numbers to colours; NaN becomes grey."""
    unit = np.clip((np.nan_to_num(values.astype(float)) - low) / max(high - low, 1e-9), 0, 1) * (len(RAMP) - 1)
    lower = np.minimum(unit.astype(int), len(RAMP) - 2)
    part = (unit - lower)[..., None]
    out = (RAMP[lower] * (1 - part) + RAMP[lower + 1] * part).astype(np.uint8)
    out[~np.isfinite(values.astype(float))] = NO_DATA
    return out


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fit(image: RGB) -> Image.Image:
    height, width = image.shape[:2]
    scale = PANEL_PX / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(image).resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def _panels(level: _Level, slot: int, *, before: tuple[str, NDArray[np.float32]] | None) -> Image.Image:
    """Draw the panels of one period; see ``preview``."""
    names, about = rgb_bands(level.attrs["bands"]), published(level.attrs)[slot]
    after = np.stack([to_reflectance(level.read(name, slot)) for name in names])
    panels: list[Panel] = []
    if before is not None:
        panels.append((f"before: {before[0]}", _fit(stretch(before[1], after)), []))
    panels.append((f"after: {about['target']}", _fit(stretch(after, after)), []))
    count = level.read("clear_count", slot).astype(float)
    top = max(float(count.max()), 1.0)
    ticks = range(round(top) + 1) if top < FEW_LOOKS else sorted({0, round(top / 2), round(top)})
    panels.append(("clear looks", _fit(ramp(count, 0, top)), [(str(t), _colour(t, 0, top)) for t in ticks]))
    panels.append(_source_date_panel(level.read("source_date", slot)))
    panels.append(_flags_panel(level.read("flags", slot)))
    subtitle = _subtitle(about, names, level.attrs.get("proj:code", "own CRS"))
    return _compose(panels, title=level.title, subtitle=subtitle, extent_m=level.extent_m)


def _colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    r, g, b = ramp(np.array([[value]], float), low, high)[0, 0]
    return int(r), int(g), int(b)


def _colours_name(names: Sequence[str]) -> str:
    own = f"shown as red, green, blue: {', '.join(names)}"
    return "true colour" if tuple(names) == ("red", "green", "blue") else own


def _subtitle(about: Mapping[str, Any], names: Sequence[str], crs: str) -> str:
    anchors = ", ".join(about.get("anchors", []))
    parts = (
        about.get("method", {}).get("name", ""),
        f"looks {about['start']} to {about['end']}" if "start" in about else "",
        f"anchors {anchors}" if anchors else "",
        _colours_name(names),
        crs,
    )
    return "  |  ".join(filter(None, parts))


def _source_date_panel(dates: NDArray[np.int32]) -> Panel:
    """The dates the pixels show; the legend names the commonest."""
    known = dates != 0
    days = np.where(known, dates.astype(float), np.nan)
    if not known.any():
        return "source date", _fit(ramp(days, 0, 1)), []
    values, counts = np.unique(days[known], return_counts=True)
    low, high = float(values[0]), float(values[-1])
    commonest = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)[:6]
    legend = [
        (f"{day_text(int(day))} {100 * count / days.size:.1f} %", _colour(day, low, high)) for count, day in commonest
    ]
    return "source date", _fit(ramp(days, low, high)), legend


def _flags_panel(flags: NDArray[np.uint16]) -> Panel:
    image = np.empty((*flags.shape, 3), np.uint8)
    image[:] = NO_DATA
    legend = []
    for name, colour in FLAG_COLOURS.items():
        there = (flags & FLAGS[name]) > 0
        if there.any():
            image[there] = colour
            legend.append((f"{name.replace('_', ' ')} {100 * there.mean():.1f} %", colour))
    return "flags (a pixel can have several)", _fit(image), legend


def _compose(
    panels: Sequence[Panel],
    *,
    title: str,
    subtitle: str,
    extent_m: float,
) -> Image.Image:
    columns = min(3, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    cell_w = max(max(p[1].width for p in panels), 330) + MARGIN
    heights = [
        28 + max(p[1].height for p in line) + 24 * max(math.ceil(len(p[2]) / 2) for p in line) + MARGIN
        for line in lines
    ]
    page = Image.new("RGB", (columns * cell_w + MARGIN, HEADER + sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 12), title, INK, _font(22))
    draw.text((MARGIN, 40), subtitle, FAINT, _font(14))
    y = HEADER
    for line, height in zip(lines, heights, strict=True):
        for index, (name, image, legend) in enumerate(line):
            x = MARGIN + index * cell_w
            draw.text((x, y), name, INK, _font(16))
            page.paste(image, (x, y + 24))
            if line is lines[0] and index == 0:
                _scale_bar(draw, x + 10, y + 24 + image.height - 16, image.width, extent_m)
            for i, (text, colour) in enumerate(legend):
                left, top = x + i % 2 * (cell_w // 2), y + 32 + image.height + i // 2 * 24
                draw.rectangle((left, top + 3, left + 14, top + 15), fill=colour, outline=FAINT)
                draw.text((left + 20, top), text, INK, _font(13))
        y += height
    return page


def _scale_bar(draw: ImageDraw.ImageDraw, x: int, y: int, width_px: int, extent_m: float) -> None:
    if extent_m <= 0:
        return
    rough = extent_m / 4
    unit = 10 ** math.floor(math.log10(rough))
    length = max(step * unit for step in (1, 2, 5) if step * unit <= rough)
    px = round(length / extent_m * width_px)
    draw.rectangle((x - 4, y - 16, x + px + 8, y + 8), fill=(255, 255, 255))
    draw.line((x, y + 2, x + px, y + 2), fill=INK, width=3)
    draw.text((x, y - 15), f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m", INK, _font(13))
