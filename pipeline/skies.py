"""The simulated sky: in come a ground and a pass, out come clouds, their shadows, haze and the swath.

Clouds are power-law noise above a threshold, with an optical depth; their shadow is the same field moved
along the sun's direction; haze is additive and strongest in blue.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.landscape import Ground
from pipeline.patterns import power_noise
from pipeline.phenology import F32, SceneParams

Mask = NDArray[np.bool_]

# blue green red re1 re2 re3 nir nir08 swir16 swir22
CLOUD: Final = np.array([0.71, 0.69, 0.70, 0.71, 0.72, 0.73, 0.74, 0.74, 0.50, 0.38], np.float32)
"""Reflectance of thick cloud; ice and water absorb in the short-wave infrared."""
HAZE: Final = np.array([1.0, 0.72, 0.50, 0.43, 0.37, 0.32, 0.27, 0.25, 0.06, 0.03], np.float32)
"""Path reflectance of haze relative to blue (Angstrom exponent about 2, none in the SWIR)."""
SKYLIGHT: Final = np.array([0.10, 0.06, 0.03, 0.02, 0.0, -0.02, -0.03, -0.03, -0.08, -0.09], np.float32)
"""Added to the transmission in a shadow: the blue sky still lights it."""


@dataclass(frozen=True)
class Acquisition:
    """One pass over the region; what is None is drawn from the region's params and seed.

    Attributes:
        day: days since 1970-01-01.
        cloud_fraction: share of the region under cloud, 0 to 1.
        haze: mean path reflectance in blue.
        swath_west_m, swath_east_m: easting of a swath's edge at the region's north side; the edge leans like
            Sentinel-2's descending track. None: the swath reaches beyond the region.
        scl_blind: SCL calls the whole scene clear whatever lies over it (as real SCL did on some white
        scenes).
    """

    day: int
    cloud_fraction: float | None = None
    haze: float | None = None
    swath_west_m: float | None = None
    swath_east_m: float | None = None
    scl_blind: bool = False


SWATH_LEAN: Final = 0.2547
"""Metres east per metre north along a swath's edge (from a real product's footprint at 46 degrees north)."""


@dataclass(frozen=True)
class Sky:
    """What stood between ground and sensor, each (H, W) float32.

    ``opacity`` 0..1 and optical ``depth`` of the clouds, ``shadow`` 0..1, ``tone`` of the clouds' light,
    ``haze``: path reflectance in blue.
    """

    opacity: F32
    depth: F32
    shadow: F32
    tone: F32
    haze: F32


def draw_acquisitions(params: SceneParams, seed: int) -> tuple[Acquisition, ...]:
    """``n_dates`` acquisitions from ``start_day``, every ``revisit_days``.

    Cloud cover from a U-shaped beta law.
    """
    rng = np.random.default_rng([seed, 2])
    days = params.start_day + np.floor(np.arange(params.n_dates) * params.revisit_days).astype(int)
    mean = min(max(params.cloud_fraction_mean, 1e-3), 0.999)
    spread = params.cloud_fraction_concentration
    cover = rng.beta(mean * spread, (1 - mean) * spread, params.n_dates)
    haze = params.haze_mean * rng.gamma(1.2, 1 / 1.2, params.n_dates)
    return tuple(
        Acquisition(day=int(day), cloud_fraction=float(c), haze=float(h))
        for day, c, h in zip(days, cover, haze, strict=True)
    )


def draw_sky(ground: Ground, acquisition: Acquisition, rng: np.random.Generator) -> Sky:
    """Opacity, optical depth, shadow, brightness structure of the clouds and haze of one pass, all (H, W)."""
    params = ground.params
    shape = ground.index.shape
    size = params.cloud_size_m / 10 * float(np.exp(rng.normal(0, 0.5)))
    beta = float(rng.uniform(2.9, 3.5))
    billows = power_noise(shape, beta=beta, rng=rng, outer_px=size)
    veil = power_noise(shape, beta=3.3, rng=rng, outer_px=700)
    drawn_fraction, cirrus = (float(rng.random()), bool(rng.random() < params.cirrus_rate))
    fraction = acquisition.cloud_fraction if acquisition.cloud_fraction is not None else drawn_fraction
    depth = np.zeros(shape, np.float32)
    if fraction > 0:
        # fields broken by wide gaps: the veil moves the threshold, so clouds come in groups
        field = billows + np.float32(0.55) * veil
        edge = float(np.quantile(field[::4, ::4], 1 - min(fraction, 0.9995)))
        depth = (field - np.float32(edge)).clip(0) ** np.float32(1.35) * np.float32(params.cloud_optical_depth)
        if fraction > 0.97:
            depth += np.float32(2.0)
    if cirrus and fraction < 0.97:
        streaks = gaussian_filter(veil, (1.5, 9.0))
        depth += np.float32(0.22) * (streaks - np.float32(0.6)).clip(0)
    opacity = 1 - np.exp(-depth)
    azimuth, elevation = np.radians(ground.sun(acquisition.day))
    height = float(rng.uniform(*params.cloud_height_m))
    reach = height / np.tan(elevation) / 10
    move = (round(reach * np.cos(azimuth)), round(-reach * np.sin(azimuth)))
    # the noise is periodic, so what rolls in over the edge is a cloud that lies beyond it
    shadow = np.roll(opacity, move, axis=(0, 1))
    relief = billows - np.roll(billows, (4, -3), axis=(0, 1))  # billows are brighter on their sunny side
    tone = 1 + np.float32(0.09) * (billows.clip(-2, 2) + np.float32(4) * relief.clip(-0.5, 0.5)) * opacity
    haze = acquisition.haze if acquisition.haze is not None else params.haze_mean
    haze_field = np.float32(haze) * np.exp(np.float32(0.45) * np.roll(veil, 97, axis=1))
    return Sky(opacity, depth, gaussian_filter(shadow, 1.2), tone, haze_field)


def swath(params: SceneParams, acquisition: Acquisition) -> Mask:
    """(H, W) bool: inside the swath; whole 20 m pixels only, as in the products."""
    row, col = np.arange(0, params.height_px, 2), np.arange(0, params.width_px, 2)
    south_m, east_m = row[:, None] * 10.0, params.west_m + col[None, :] * 10.0
    inside = np.ones((row.size, col.size), bool)
    if acquisition.swath_west_m is not None:
        inside &= east_m >= acquisition.swath_west_m - SWATH_LEAN * south_m
    if acquisition.swath_east_m is not None:
        inside &= east_m <= acquisition.swath_east_m - SWATH_LEAN * south_m
    return inside.repeat(2, axis=0).repeat(2, axis=1)


def look_through(
    params: SceneParams, ground: F32, sky: Sky, column: int, rng: np.random.Generator, *, cloudy: bool
) -> F32:
    """The ground seen through haze, shadow and cloud, with the sensor's noise."""
    seen = ground
    if cloudy:
        kept = np.float32(params.shadow_transmission) + SKYLIGHT[column]
        seen = seen * (1 - (1 - kept) * sky.shadow)
    seen = seen * (1 - np.float32(0.8) * HAZE[column] * sky.haze) + HAZE[column] * sky.haze
    if cloudy:
        seen += sky.opacity * (CLOUD[column] * sky.tone - seen)
    noise = rng.standard_normal(seen.shape, dtype=np.float32)
    noise *= np.float32(params.noise_sigma) + np.float32(params.noise_relative_sigma) * seen
    out: F32 = seen + noise
    return out
