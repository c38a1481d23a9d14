"""The words for bands: in come names, out come wavelengths, native resolutions and the code numbers.

Reflectance travels through cloudgate as *codes*: uint16 ``round(reflectance * 10000) + 1000``, ESA's own coding
since processing baseline 04.00, so negative reflectance survives and a DN with BOA offset -1000 is its own code.
0 is "no data"; valid codes are 1..65534; 65535 never occurs in data, so kernels use it as a sentinel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

CODE_SCALE: Final = 1e-4
CODE_OFFSET: Final = 1000
"""Code of zero reflectance; ``reflectance = (code - CODE_OFFSET) * CODE_SCALE``."""
CODE_NODATA: Final = 0
CODE_MIN: Final = 1
CODE_MAX: Final = 65534


@dataclass(frozen=True)
class Band:
    """One spectral band. Wavelength in nanometres (Sentinel-2A centre), native resolution in metres."""

    name: str
    esa: str
    wavelength_nm: float
    resolution_m: int


BANDS: Final[dict[str, Band]] = {
    band.name: band
    for band in (
        Band("coastal", "B01", 442.7, 60),
        Band("blue", "B02", 492.7, 10),
        Band("green", "B03", 559.8, 10),
        Band("red", "B04", 664.6, 10),
        Band("rededge1", "B05", 704.1, 20),
        Band("rededge2", "B06", 740.5, 20),
        Band("rededge3", "B07", 782.8, 20),
        Band("nir", "B08", 832.8, 10),
        Band("nir08", "B8A", 864.7, 20),
        Band("nir09", "B09", 945.1, 60),
        Band("cirrus", "B10", 1373.5, 60),
        Band("swir16", "B11", 1613.7, 20),
        Band("swir22", "B12", 2202.4, 20),
    )
}
"""All Sentinel-2 bands by common name, in order of wavelength (``cirrus`` exists in L1C only)."""


def check_bands(names: Sequence[str]) -> tuple[str, ...]:
    """Return ``names`` as a tuple of known band names without repeats, ESA names (``B04``) translated.

    Raises:
        ConfigError: for an unknown or repeated band, or none at all.
    """
    by_esa = {band.esa: band.name for band in BANDS.values()}
    out: list[str] = []
    for name in names:
        known = by_esa.get(name.upper(), name)
        if known not in BANDS:
            raise ConfigError(f"bands: unknown band {name!r}; known are {', '.join(BANDS)} (or B01..B12, B8A)")
        if known in out:
            raise ConfigError(f"bands: {name!r} is named twice; name each band once")
        out.append(known)
    if not out:
        raise ConfigError("bands: the list is empty; name at least one band, for example [red, green, blue]")
    return tuple(out)


def darkest(names: Sequence[str]) -> int:
    """Index of the band in which clear land is darkest and cloud stands out most: the shortest wavelength."""
    return min(range(len(names)), key=lambda i: BANDS[names[i]].wavelength_nm)


def temporal_bands(names: Sequence[str]) -> tuple[int, int | None]:
    """Indices of the bands that the temporal check compares: the darkest, and a near infrared if there is another."""
    dark = darkest(names)
    infrared = [names.index(name) for name in ("nir", "nir08") if name in names and names.index(name) != dark]
    return dark, infrared[0] if infrared else None


def rgb_bands(names: Sequence[str]) -> tuple[str, str, str]:
    """Three of the bands for red, green, blue: true colour where there, else the longest to the shortest wavelength."""
    if {"red", "green", "blue"} <= set(names):
        return "red", "green", "blue"
    ordered = sorted(names, key=lambda name: BANDS[name].wavelength_nm)
    return ordered[-1], ordered[len(ordered) // 2], ordered[0]


def complete_looks(*, codes: NDArray[np.uint16], clear: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``clear`` (T, H, W) without the looks that lack a band in ``codes`` (T, B, H, W); itself where none does."""
    complete = clear
    has_data = np.empty(clear.shape[1:], bool)
    for t, looks in enumerate(clear):  # one by one: small temporaries, and a look that shows nothing costs nothing
        if not looks.any():
            continue
        full = looks.copy()
        for band in codes[t]:
            full &= np.not_equal(band, CODE_NODATA, out=has_data)
        if not np.array_equal(full, looks):
            if complete is clear:
                complete = clear.copy()
            complete[t] = full
    return complete


def to_reflectance(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Codes of any shape to float32 reflectance (about 0 to 1), NaN where the code is 0."""
    out = (codes.astype(np.float32) - np.float32(CODE_OFFSET)) / np.float32(1 / CODE_SCALE)
    out[codes == CODE_NODATA] = np.nan
    return out


def to_codes(reflectance: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Reflectance of any shape to uint16 codes: rounded, clipped to 1..65534, NaN becomes 0."""
    scaled = np.rint(np.asarray(reflectance, np.float64) / CODE_SCALE) + CODE_OFFSET
    missing = np.isnan(scaled)
    codes = np.clip(np.where(missing, CODE_MIN, scaled), CODE_MIN, CODE_MAX).astype(np.uint16)
    codes[missing] = CODE_NODATA
    return codes
