"""Simulated Sentinel-2 looks: in come ``SceneParams`` and a seed, out come truth and observations.

Recipe of the project's protocol: the ground of ``landscape``; per look a gain drift, haze (additive,
strongest in blue), clouds from power-law noise with an optical depth, their shadow moved along the sun's
direction, noise, a sub-pixel shift, and an imperfect SCL (omission, commission, edges not grown enough).
Sentinel-1 and relief too. Everything is eager numpy, deterministic in (params, acquisitions, seed) and
independent of the order of calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from pipeline.errors import ConfigError
from pipeline.landscape import Ground, half, index_on
from pipeline.patterns import power_noise
from pipeline.phenology import COVERS, F32, HARD, SIM_BANDS, SceneParams
from pipeline.skies import Acquisition, Sky, draw_acquisitions, draw_sky, look_through, swath

Mask = NDArray[np.bool_]

CLOUD_ALPHA: Final = 0.05
"""From this opacity on a pixel is cloud (or shadow) in the truth."""

SCL_NODATA, SCL_DARK, SCL_SHADOW, SCL_GREEN, SCL_BARE, SCL_WATER, SCL_UNSURE = 0, 2, 3, 4, 5, 6, 7
SCL_MEDIUM, SCL_HIGH, SCL_CIRRUS = 8, 9, 10


@dataclass(frozen=True)
class Observation:
    """One look and its truth.

    Attributes:
        day: days since 1970-01-01.
        reflectance: per band float32 at native resolution, (H, W) or (H/2, W/2); NaN outside the swath.
        scl: (H/2, W/2) uint8, the imperfect scene classification, 0 outside the swath.
        cloud, shadow: (H, W) bool, the truth; a shadow under a cloud counts as cloud only.
        valid: (H, W) bool, inside the swath.
        optical_depth: (H, W) float32 of the clouds, 0 where clear.
        sun_azimuth_deg, sun_elevation_deg: direction of the sun.
    """

    day: int
    reflectance: dict[str, F32]
    scl: NDArray[np.uint8]
    cloud: Mask
    shadow: Mask
    valid: Mask
    optical_depth: F32
    sun_azimuth_deg: float
    sun_elevation_deg: float


class Region:
    """A piece of simulated ground and the passes over it; MGRS tiles are windows of it.

    Args:
        params: shape of the region, ground, looks and mask.
        seed: any integer >= 0; the same seed gives the same bytes.
        acquisitions: the passes, ascending in time; drawn from the params when None.
    """

    def __init__(
        self, params: SceneParams, seed: int = 0, *, acquisitions: Sequence[Acquisition] | None = None
    ) -> None:
        self.params, self.seed = params, seed
        self.acquisitions = tuple(acquisitions) if acquisitions is not None else draw_acquisitions(params, seed)
        self.ground = Ground(params, seed)
        self.shape = (params.height_px, params.width_px)

    def truth(self, day: int, band: str) -> F32:
        """Surface reflectance on ``day`` (days since 1970): no sky, no noise, no shift, gain 1.

        Returns:
            float32 at the band's native resolution: (H, W) at 10 m or (H/2, W/2) at 20 m, no missing values.
        """
        base, slope, _ = self.ground.spectra(day)
        return self.ground.paint(
            (base, slope), _known(band), index=index_on(self.ground, day), shade=self.ground.shade(day)
        )

    def observe(
        self, index: int, bands: Sequence[str] = ("blue", "green", "red", "nir"), *, cloudy: bool = True
    ) -> Observation:
        """What the satellite saw on pass ``index``.

        Args:
            index: of ``acquisitions``.
            bands: of ``SIM_BANDS``; a band's values do not depend on which others are asked for.
            cloudy: False leaves clouds and shadows out and keeps all else (drift, haze, noise, shift): the
                look a perfect completion of this acquisition would restore.
        """
        acquisition = self.acquisitions[index]
        rng = np.random.default_rng([self.seed, 3, index])
        sky = draw_sky(self.ground, acquisition, rng)
        green = self.ground.spectra(acquisition.day)[2]
        table = self._table_of_the_day(acquisition.day, rng)
        shift = tuple(rng.uniform(-1, 1, 2) * self.params.misregistration_px)
        shown, shade = (index_on(self.ground, acquisition.day), self.ground.shade(acquisition.day))
        valid = swath(self.params, acquisition)
        cloud = (sky.opacity > CLOUD_ALPHA) & valid
        shadow = (sky.shadow > CLOUD_ALPHA) & ~cloud & valid
        scl = self._scl(
            acquisition, sky, shown, green, cloud, shadow, valid, np.random.default_rng([self.seed, 4, index])
        )
        coarse_sky = Sky(*(half(part) for part in (sky.opacity, sky.depth, sky.shadow, sky.tone, sky.haze)))
        reflectance = {}
        for band in bands:
            ground = self.ground.paint(table, _known(band), index=shown, shade=shade, shift_px=(shift[0], shift[1]))
            above = sky if ground.shape == self.shape else coarse_sky
            noise = np.random.default_rng([self.seed, 5, index, SIM_BANDS.index(band)])
            seen = look_through(self.params, ground, above, SIM_BANDS.index(band), noise, cloudy=cloudy)
            seen[~(valid if ground.shape == self.shape else valid[::2, ::2])] = np.nan
            reflectance[band] = seen
        azimuth, elevation = self.ground.sun(acquisition.day)
        return Observation(acquisition.day, reflectance, scl, cloud, shadow, valid, sky.depth, azimuth, elevation)

    def _table_of_the_day(self, day: int, rng: np.random.Generator) -> tuple[F32, F32]:
        """Spectra with the day's gain errors.

        One for all, one per band, one per cover (view angle, aerosol).
        """
        base, slope, _ = self.ground.spectra(day)
        sigma, own = self.params.gain_drift_sigma, self.params.cover_drift_sigma
        everywhere = rng.normal(0, 0.8 * sigma) + rng.normal(0, 0.6 * sigma, len(SIM_BANDS))
        cover = rng.normal(0, own, (len(COVERS), 1)) * np.ones(len(SIM_BANDS)) + rng.normal(
            0, 0.5 * own, (len(COVERS), len(SIM_BANDS))
        )
        gain = np.exp(everywhere + cover[self.ground.parcels.cover]).astype(np.float32)
        return base * gain, slope * gain

    def _scl(
        self,
        acquisition: Acquisition,
        sky: Sky,
        shown: NDArray[np.uint16],
        green: F32,
        cloud: Mask,
        shadow: Mask,
        valid: Mask,
        rng: np.random.Generator,
    ) -> NDArray[np.uint8]:
        """The imperfect scene classification, (H/2, W/2) uint8."""
        params = self.params
        ground = self._ground_classes(green)[shown[::2, ::2]]
        bright = self.ground.parcels.soil[:, 0][shown[::2, ::2]]
        opacity, dark = half(sky.opacity), half(sky.shadow)
        chance = power_noise(opacity.shape, beta=2.6, rng=rng, outer_px=60)
        scl = ground.copy()
        if acquisition.scl_blind:
            scl[chance > np.quantile(chance, 0.99)] = SCL_MEDIUM
        else:
            cloud20, shadow20 = _any_of_four(cloud), _any_of_four(shadow)
            if params.scl_underdilation_px:
                cloud20 = binary_erosion(cloud20, iterations=params.scl_underdilation_px, border_value=1)
                shadow20 = binary_erosion(shadow20, iterations=params.scl_underdilation_px, border_value=1)
            # thin cloud and weak shadow are missed first, in patches
            missed = _top(chance - 3 * opacity, cloud20, params.scl_omission_fraction)
            unseen = _top(chance - 3 * dark, shadow20, params.scl_shadow_omission_fraction)
            false = _top(chance + 20 * bright, ~cloud20 & ~shadow20, params.scl_commission_fraction)
            scl[shadow20] = SCL_SHADOW
            scl[unseen] = np.where(dark[unseen] > 0.6, SCL_DARK, ground[unseen])
            scl[cloud20] = np.select(
                [opacity[cloud20] > 0.6, opacity[cloud20] > 0.25], [SCL_HIGH, SCL_MEDIUM], SCL_CIRRUS
            )
            scl[missed] = np.where(opacity[missed] > 0.3, SCL_UNSURE, ground[missed])
            scl[false] = SCL_MEDIUM
        scl[~valid[::2, ::2]] = SCL_NODATA
        return scl

    def _ground_classes(self, green: F32) -> NDArray[np.uint8]:
        """SCL class per parcel of clear ground: vegetation, not vegetated or water."""
        classes = np.where(green > 0.35, SCL_GREEN, SCL_BARE).astype(np.uint8)
        for name in HARD:
            first, stop = self.ground.parcels.start[name]
            classes[first:stop] = SCL_WATER if name in ("water", "turbid") else SCL_BARE
        return classes

    def elevation(self) -> F32:
        """(H, W) float32 metres above the sea, 10 m pixels."""
        elevation: F32 = self.ground.elevation_m
        return elevation

    def radar(self, day: int) -> dict[str, F32]:
        """Sentinel-1 backscatter on ``day`` (days since 1970): ``vv`` and ``vh``, (H, W) float32 in dB.

        Soil answers to rain (VV), canopies to their volume (VH); water is a mirror, roofs shine. Speckle of
        about five looks, drawn from the seed and the day. No missing values.
        """
        parcels = self.ground.parcels
        rng = np.random.default_rng([self.seed, 6, day])
        _, _, green = self.ground.spectra(day)
        wet = self.ground.weather.wetness(day)
        wooded = np.isin(parcels.cover, [COVERS.index("broadleaf forest"), COVERS.index("conifer forest")])
        hard = {name: parcels.cover == COVERS.index(name) for name in HARD}
        roughness = (parcels.soil[:, 1] * 1e4 % 1.0 - 0.5) * 3.0
        vv = -12.5 + 3.0 * wet * (1 - green) + roughness * (1 - green) - 1.0 * green
        vh = -21.5 + 1.5 * wet * (1 - green) + roughness * (1 - green) * 0.7 + 5.5 * green
        vv, vh = np.where(wooded, -8.5, vv), np.where(wooded, -14.5 + 0.8 * green, vh)
        roofs, mirror = (hard["tile roof"] | hard["light roof"], hard["water"] | hard["turbid"])
        vv = np.select([roofs, mirror, hard["asphalt"]], [-3.0, -20.5, -16.0], vv)
        vh = np.select([roofs, mirror, hard["asphalt"]], [-11.0, -27.5, -23.5], vh)
        shown = index_on(self.ground, day)
        out = {}
        for name, level in (("vv", vv), ("vh", vh)):
            speckle = rng.standard_gamma(5.0, self.shape, dtype=np.float32) / np.float32(5)
            power = (10 ** (level / 10)).astype(np.float32)[shown] * speckle
            out[name] = (10 * np.log10(np.maximum(power, 1e-4))).astype(np.float32)
        return out


def _known(band: str) -> str:
    if band not in SIM_BANDS:
        raise ConfigError(f"bands: {band!r} is not simulated; choose from {', '.join(SIM_BANDS)}")
    return band


def _any_of_four(flags: Mask) -> Mask:
    """(H, W) to (H/2, W/2): True where any of 2 x 2 pixels is."""
    return flags[::2, ::2] | flags[1::2, ::2] | flags[::2, 1::2] | flags[1::2, 1::2]


def _top(score: F32, among: Mask, fraction: float) -> Mask:
    """True at the ``fraction`` of the pixels ``among`` whose score is highest."""
    if fraction <= 0 or not among.any():
        return np.zeros(among.shape, bool)
    return among & (score > np.quantile(score[among], 1 - min(fraction, 1.0)))
