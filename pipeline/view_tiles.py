"""Pictures of a mosaic: in come a ``ViewStore``, a place and what to show, out come map tiles and their legends.

What to show is a short text: ``rgb:red,green,blue``, ``index:ndvi``, ``source_date``, ``clear_count``, ``flags``,
``uncertainty:red``. With the numbers of ``describe`` a tile depends on nothing but its address, so browsers keep it.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.bands import CODE_NODATA, CODE_OFFSET, CODE_SCALE, rgb_bands
from pipeline.errors import ConfigError
from pipeline.items import day_text
from pipeline.layers import FLAGS
from pipeline.preview import FEW_LOOKS, FLAG_COLOURS, RAMP
from pipeline.scout import coarse_grid
from pipeline.view_store import CHUNK, ViewStore

RGBA = NDArray[np.uint8]
Colour = tuple[int, int, int]

TILE: Final = 256
BEFORE_PX: Final = 900
"""Side of the coarse picture that each run keeps; see ``mosaic``."""
SIGMA_NONE: Final = 65535
WHOLE_PX: Final = 1024
POOLED_PERIODS: Final = 4
"""Percentiles come from so many periods together, so that colours stay while time moves."""

INDICES: Final[dict[str, tuple[str, str, str]]] = {
    "ndvi": ("nir", "red", "vegetation"),
    "ndwi": ("green", "nir", "water"),
    "nbr": ("nir", "swir22", "burnt ground"),
}
"""Normalised differences (a - b) / (a + b): names of a and b, and what it tells."""
_STOPS: Final[dict[str, list[Colour]]] = {
    "ndvi": [(110, 70, 40), (196, 156, 98), (240, 232, 190), (150, 192, 92), (56, 138, 60), (10, 78, 44)],
    "ndwi": [(124, 84, 46), (206, 174, 122), (242, 240, 232), (130, 186, 214), (44, 116, 178), (10, 52, 110)],
    "nbr": [(90, 26, 70), (190, 78, 62), (244, 214, 150), (200, 214, 140), (92, 160, 92), (20, 92, 72)],
}
VISIBLE: Final = {"coastal", "blue", "green", "red"}
FIXED: Final = {"ndvi": (-0.2, 1.0), "ndwi": (-0.8, 0.8), "nbr": (-0.5, 1.0)}


@dataclass(frozen=True)
class Shown:
    """What a tile shows: ``kind`` is rgb, index, source_date, clear_count, uncertainty or flags."""

    kind: str
    names: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """How many numbers its stretch takes: a low and a high for each channel."""
        return {"rgb": 6, "flags": 0}.get(self.kind, 2)


def parse(text: str, store: ViewStore) -> Shown:
    """Read what to show.

    Raises:
        ConfigError: for a layer the store does not have.
    """
    kind, _, rest = text.partition(":")
    names = tuple(name for name in rest.split(",") if name)
    if kind == "rgb" and len(names) == 3:
        needed: tuple[str, ...] = names
    elif kind == "index" and names and names[0] in INDICES:
        needed = INDICES[names[0]][:2]
    elif kind == "uncertainty" and len(names) == 1:
        needed = (f"uncertainty_{names[0]}",)
    elif kind in ("source_date", "clear_count", "flags") and not names:
        needed = (kind,)
    else:
        raise ConfigError(f"layer: {text!r} is unknown; write rgb:red,green,blue, index:ndvi, source_date, flags ...")
    for name in needed:
        if name not in store.layers:
            raise ConfigError(f"layer: {text!r} needs {name}, {store.path} has {', '.join(store.layers)}")
    return Shown(kind, names)


def choices(store: ViewStore) -> dict[str, Any]:
    """What the store can show: band combinations and indices that its bands allow, by name, and its other layers."""
    have = set(store.bands)
    combos = {
        "True colour": ("red", "green", "blue"),
        "Colour infrared": ("nir", "red", "green"),
        "Short-wave infrared": ("swir22", "nir", "red"),
        "Agriculture": ("swir16", "nir", "blue"),
        "Red edge": ("nir", "rededge1", "red"),
    }
    fitting = {title: list(names) for title, names in combos.items() if have >= set(names)}
    return {
        "combos": fitting or {"First bands": list(rgb_bands(store.bands))},
        "indices": {name: about for name, (a, b, about) in INDICES.items() if {a, b} <= have},
        "layers": [name for name in ("source_date", "clear_count", "flags") if name in store.layers],
        "uncertainty": [band for band in store.bands if f"uncertainty_{band}" in store.layers],
    }


def default_layer(store: ViewStore) -> str:
    """As near to true colour as the bands allow."""
    return f"rgb:{','.join(rgb_bands(store.bands))}"


# -- numbers ----------------------------------------------------------------------------------------------------


def index_of(first: NDArray[np.uint16], second: NDArray[np.uint16]) -> NDArray[np.float32]:
    """(a - b) / (a + b) of two bands' codes, clipped to -1..1; NaN without data or where both reflect nothing."""
    a, b = (codes.astype(np.float32) - CODE_OFFSET for codes in (first, second))
    total = a + b
    known = (first != CODE_NODATA) & (second != CODE_NODATA) & (total > 10)
    return np.where(known, np.clip((a - b) / np.where(known, total, 1), -1, 1), np.float32(np.nan))


def numbers_of(shown: Shown, arrays: list[NDArray[Any]]) -> NDArray[np.float32]:
    """The raw arrays of a layer with one number per pixel as float32: index, days, looks or sigma; NaN = none."""
    if shown.kind == "index":
        return index_of(arrays[0], arrays[1])
    values = arrays[0].astype(np.float32)
    if shown.kind == "uncertainty":
        return np.where(arrays[0] == SIGMA_NONE, np.float32(np.nan), values * np.float32(CODE_SCALE))
    return np.where(values == 0, np.float32(np.nan), values) if shown.kind == "source_date" else values


def arrays_of(shown: Shown) -> tuple[str, ...]:
    """Names of the store's arrays that a layer is made of."""
    if shown.kind == "rgb":
        return shown.names
    if shown.kind == "index":
        return INDICES[shown.names[0]][:2]
    return (f"uncertainty_{shown.names[0]}",) if shown.kind == "uncertainty" else (shown.kind,)


def describe(store: ViewStore, slot: int, shown: Shown, *, cut: float | None) -> dict[str, Any]:
    """The stretch and the legend of a layer, from a coarse level.

    Args:
        store: the mosaic.
        slot: period.
        shown: the layer.
        cut: percent to cut off at either end; None for a fixed scale.

    Returns:
        ``range``: numbers for ``tile`` (reflectance, index, days, looks or sigma); ``legend``: ``kind`` bands, ramp or
        classes with what to draw.
    """
    if shown.kind == "flags":
        return {
            "range": [],
            "legend": {"kind": "classes", "unit": "a pixel can have several", "entries": _flag_entries(store, slot)},
        }
    slots = [period.slot for period in store.periods]
    pooled = [slots[round(i)] for i in np.linspace(0, len(slots) - 1, min(len(slots), POOLED_PERIODS))]
    names = arrays_of(shown)
    parts = iter(store.several(lambda place: store.sample(*place), [(name, one) for one in pooled for name in names]))
    samples = [[next(parts) for _ in names] for _ in pooled]
    if shown.kind == "rgb":
        spans = [_code_span(np.concatenate([s[i] for s in samples]), cut) for i in range(3)]
        if set(shown.names) <= VISIBLE:  # one width for all keeps hues as the eye knows them
            width = max(high - low for low, high in spans)
            spans = [(low, low + width) for low, _ in spans]
        return {
            "range": [round(edge, 4) for span in spans for edge in span],
            "legend": {"kind": "bands", "names": list(shown.names)},
        }
    values = np.concatenate([numbers_of(shown, sample) for sample in samples])
    values = values[np.isfinite(values)]
    low, high = _span(shown, values, cut)
    return {"range": [low, high], "legend": _ramp_legend(store, slot, shown, low, high)}


def _code_span(codes: NDArray[np.uint16], cut: float | None) -> tuple[float, float]:
    known = codes[codes != CODE_NODATA]
    if cut is None or not known.size:
        return 0.0, 0.3
    low, high = (np.percentile(known, [cut, 100 - cut]) - CODE_OFFSET) * CODE_SCALE
    return float(low), float(max(high, low + 0.02))


def _span(shown: Shown, values: NDArray[np.float32], cut: float | None) -> tuple[float, float]:
    if not values.size:
        return 0.0, 1.0
    if shown.kind == "clear_count":
        return 0.0, max(float(values.max()), 1.0)
    if shown.kind == "source_date":
        return float(values.min()), float(max(values.max(), values.min() + 1))
    if shown.kind == "index" and cut is None:
        return FIXED[shown.names[0]]
    if shown.kind == "uncertainty":
        return 0.0, round(max(float(np.percentile(values, 100 - (cut or 1.0))), 0.005), 4)
    low, high = (round(float(v), 3) for v in np.percentile(values, [cut or 1.0, 100 - (cut or 1.0)]))
    return low, max(high, low + 0.05)


def _css(colour: Any) -> str:
    r, g, b = (int(v) for v in colour[:3])
    return f"rgb({r} {g} {b})"


def _stops(shown: Shown) -> NDArray[np.float64]:
    return np.asarray(_STOPS[shown.names[0]], float) if shown.kind == "index" else RAMP


def _ramp_legend(store: ViewStore, slot: int, shown: Shown, low: float, high: float) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": "ramp", "colours": [_css(stop) for stop in _stops(shown)]}
    if shown.kind == "source_date":
        out["ticks"] = [day_text(int(low)), day_text(int(high))]
        days = store.sample("source_date", slot)
        values, counts = np.unique(days[days != 0], return_counts=True)
        commonest = np.argsort(counts)[::-1][:6]
        colours = _table(shown)
        out["entries"] = [
            {
                "label": day_text(int(values[i])),
                "colour": _css(colours[round(255 * float(np.clip((values[i] - low) / (high - low), 0, 1)))]),
                "percent": round(100 * float(counts[i]) / max(int(counts.sum()), 1), 1),
            }
            for i in commonest
        ]
    elif shown.kind == "clear_count":
        out["ticks"] = [f"{v:g}" for v in (range(int(high) + 1) if high < FEW_LOOKS else (0, high / 2, high))]
        out["unit"] = "clear looks"
    else:
        middle = (low + high) / 2
        out["ticks"] = [f"{v:.2f}" if shown.kind == "index" else f"{v:.3f}" for v in (low, middle, high)]
        named = f"one sigma of {shown.names[0]}; blank where none is known, as where observed"
        out["unit"] = shown.names[0].upper() if shown.kind == "index" else named
    return out


def _flag_entries(store: ViewStore, slot: int) -> list[dict[str, Any]]:
    flags = store.sample("flags", slot)
    entries = []
    for name, colour in FLAG_COLOURS.items():
        share = float(((flags & FLAGS[name]) != 0).mean())
        if share > 0:
            entries.append({"label": name.replace("_", " "), "colour": _css(colour), "percent": round(100 * share, 1)})
    return entries


# -- pictures ---------------------------------------------------------------------------------------------------


def _table(shown: Shown) -> RGBA:
    """(256, 4) colours of a ramp."""
    stops = _stops(shown)
    at = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)]
    return np.stack([*channels, np.full(256, 255.0)], axis=-1).astype(np.uint8)


@lru_cache(64)
def _curve(low: float, high: float, gamma: float) -> NDArray[np.uint8]:
    """(65536,) brightness of every code: a linear stretch, then the gamma."""
    reflectance = (np.arange(65536, dtype=np.float32) - CODE_OFFSET) * np.float32(CODE_SCALE)
    unit = np.clip((reflectance - low) / max(high - low, 1e-4), 0, 1) ** (1 / gamma)
    return (unit * 255 + 0.5).astype(np.uint8)


def paint(shown: Shown, arrays: list[NDArray[Any]], span: list[float], gamma: float = 1.0) -> RGBA:
    """Colours (y, x, 4) of the raw arrays of a layer; transparent where there is nothing.

    Args:
        shown: the layer.
        arrays: as ``arrays_of`` names them, (y, x) each.
        span: low and high for each channel, as ``describe`` gives them.
        gamma: above 1 brightens the middle (rgb only).
    """
    out = np.zeros((*arrays[0].shape, 4), np.uint8)
    if shown.kind == "rgb":
        for channel, codes in enumerate(arrays):
            out[..., channel] = _curve(span[2 * channel], span[2 * channel + 1], gamma)[codes]
        out[..., 3] = np.where(np.minimum.reduce(arrays) != CODE_NODATA, np.uint8(255), np.uint8(0))
    elif shown.kind == "flags":
        for name, colour in FLAG_COLOURS.items():
            out[(arrays[0] & FLAGS[name]) != 0] = (*colour, 255)
    else:
        values = numbers_of(shown, arrays)
        known = np.isfinite(values)
        unit = np.clip((np.where(known, values, 0) - span[0]) / max(span[1] - span[0], 1e-9), 0, 1)
        out[:] = _table(shown)[(unit * 255 + 0.5).astype(np.uint8)]
        out[~known] = 0
    return out


def tile(
    store: ViewStore, slot: int, place: tuple[int, int, int], shown: Shown, span: list[float], gamma: float = 1.0
) -> bytes:
    """The PNG of one map tile: 256 x 256 pixels; ``place`` is its level, row and column from the top-left corner.

    Raises:
        ConfigError: for a tile outside the mosaic, or a stretch of the wrong length.
    """
    level, row, col = place
    height, width = store.shape(level) if 0 <= level < store.levels else (0, 0)
    if not (0 <= row * TILE < height and 0 <= col * TILE < width):
        raise ConfigError(f"tile: level {level}, row {row}, column {col} lies outside the mosaic")
    if len(span) != shown.numbers:
        raise ConfigError(f"range: {shown.kind} takes {shown.numbers} numbers, got {len(span)}")
    arrays = [store.window(name, slot, level, row, col, TILE) for name in arrays_of(shown)]
    picture = paint(shown, arrays, span, gamma)
    picture[height - row * TILE :] = 0
    picture[:, width - col * TILE :] = 0
    return _png(picture)


def whole(store: ViewStore, slot: int, shown: Shown, *, cut: float | None) -> Image.Image:
    """The whole mosaic in one picture of at most 1024 px a side."""
    level = next(k for k in range(store.levels) if max(store.shape(k)) <= WHOLE_PX or k == store.levels - 1)
    height, width = store.shape(level)
    arrays = [
        np.block(
            [
                [store.chunk(name, slot, level, i, j) for j in range(-(-width // CHUNK))]
                for i in range(-(-height // CHUNK))
            ]
        )[:height, :width]
        for name in arrays_of(shown)
    ]
    return Image.fromarray(paint(shown, arrays, describe(store, slot, shown, cut=cut)["range"], gamma=1.3))


def _png(picture: RGBA) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def before_of(store: ViewStore, slot: int) -> dict[str, Any] | None:
    """The least cloudy acquisition that the run kept, or None.

    ``label``, ``bounds`` (left, bottom, right, top) and ``bands``: which are shown as red, green and blue.
    """
    kept = _before(store, slot)
    if kept is None:
        return None
    grid, _ = coarse_grid(store.grid, 0, most_px=BEFORE_PX)
    if grid.shape != kept[1].shape[1:]:
        return None
    return {"label": kept[0], "bounds": list(grid.bounds), "bands": list(rgb_bands(store.bands))}


def before_png(store: ViewStore, slot: int, span: list[float], gamma: float) -> bytes:
    """The PNG of that acquisition, on the bounds that ``before_of`` names.

    Raises:
        ConfigError: where the run kept none.
    """
    kept = _before(store, slot)
    if kept is None:
        raise ConfigError(f"before: {store.run.where} holds no picture of period {slot}")
    return _png(paint(Shown("rgb", rgb_bands(store.bands)), list(kept[1]), span, gamma))


def _before(store: ViewStore, slot: int) -> tuple[str, NDArray[np.uint16]] | None:
    """(date and clear share, (3, y, x) codes)."""
    data = store.run.read_bytes(store.run.period(slot), "before.npz")
    if data is None:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as kept:
        return str(kept["name"]), kept["codes"]
