"""What grows in the simulated parcels: in come ``SceneParams`` and a day, out come spectra of parcels.

Each parcel has a land cover, a soil and a calendar of its own. Its spectrum on a day is soil, leaf and
straw mixed by a double-logistic greenness (Beck et al. 2006, doi:10.1016/j.rse.2005.10.021) cut by harvest,
mowing and ploughing; rain darkens soil for days. The spectral library holds round values typical of
Sentinel-2 L2A over central Europe.
"""

from dataclasses import dataclass, field
from datetime import date
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

F32 = NDArray[np.float32]

SIM_BANDS: Final = (
    "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22",
)  # fmt: skip
"""The ten land bands, in order of wavelength: the columns of every spectral table here."""

PIXEL_M: Final = 10.0
EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()


@dataclass(frozen=True)
class SceneParams:
    """All that shapes a simulated region; sizes in metres or 10 m pixels, reflectance 0 to 1, days as days.

    The calibration knobs are those with ``sigma``, ``rate``, ``fraction``, ``mean`` and ``spread`` in their names,
    ``parcel_*`` and ``misregistration_px``. The defaults were set so that simple methods score on pasted clouds as
    they do on a real series over fields in Flanders (+-60 days, four bands, eight seeds, true masks; dB, real in
    brackets): median 30.5 (30.4), nearest look 31.0 (29.8), decay mean 32.6 (32.1), linear 32.7 (31.4), regression
    37.4 (36.1).
    """

    epsg: int = 32633
    west_m: float = 499980.0
    north_m: float = 5104000.0
    width_px: int = 1024
    height_px: int = 1024
    # --- ground
    district_m: float = 1500.0
    parcel_width_m: float = 95.0
    parcel_length_m: float = 260.0
    forest_fraction: float = 0.22
    villages_per_km2: float = 0.08
    water: bool = True
    relief_m: float = 160.0
    phenology_spread_days: float = 8.0
    event_rate_per_year: float = 0.35
    rain_rate_per_day: float = 0.12
    texture_sigma: float = 0.07
    greenness_texture_sigma: float = 0.09
    seasonal_gain: float = 0.06
    flood_day: int | None = None
    flood_depth_m: float = 3.0
    # --- looks
    start_day: int = 18789
    n_dates: int = 12
    revisit_days: float = 5.0
    cloud_fraction_mean: float = 0.4
    cloud_fraction_concentration: float = 0.9
    cloud_size_m: float = 2600.0
    cloud_optical_depth: float = 4.0
    cloud_height_m: tuple[float, float] = (700.0, 2200.0)
    cirrus_rate: float = 0.25
    haze_mean: float = 0.016
    gain_drift_sigma: float = 0.075
    cover_drift_sigma: float = 0.012
    noise_sigma: float = 0.0012
    noise_relative_sigma: float = 0.008
    misregistration_px: float = 0.2
    shadow_transmission: float = 0.4
    # --- the imperfect mask
    scl_omission_fraction: float = 0.06
    scl_commission_fraction: float = 0.01
    scl_shadow_omission_fraction: float = 0.25
    scl_underdilation_px: int = 1

    def __post_init__(self) -> None:
        if self.width_px < 64 or self.height_px < 64 or self.width_px % 2 or self.height_px % 2:
            raise ConfigError(
                f"size: cannot simulate {self.width_px} x {self.height_px} px; use even numbers from 64 up"
            )


# blue  green  red   re1   re2   re3   nir   nir08 swir16 swir22
LEAF: Final[dict[str, tuple[float, ...]]] = {
    "crop": (0.028, 0.062, 0.028, 0.100, 0.330, 0.430, 0.455, 0.475, 0.200, 0.090),
    "maize": (0.024, 0.058, 0.025, 0.095, 0.350, 0.450, 0.480, 0.500, 0.215, 0.095),
    "grass": (0.034, 0.074, 0.042, 0.120, 0.290, 0.360, 0.385, 0.405, 0.230, 0.120),
    "broadleaf": (0.019, 0.043, 0.021, 0.080, 0.260, 0.335, 0.355, 0.375, 0.165, 0.070),
    "conifer": (0.015, 0.028, 0.017, 0.052, 0.135, 0.170, 0.185, 0.195, 0.090, 0.040),
}
SOIL_LIGHT: Final = (0.080, 0.112, 0.148, 0.172, 0.192, 0.212, 0.230, 0.248, 0.320, 0.270)
SOIL_DARK: Final = (0.048, 0.066, 0.086, 0.104, 0.118, 0.132, 0.146, 0.160, 0.230, 0.190)
STRAW: Final = (0.068, 0.104, 0.142, 0.180, 0.215, 0.240, 0.265, 0.285, 0.335, 0.235)
LITTER: Final = (0.035, 0.048, 0.058, 0.085, 0.110, 0.125, 0.140, 0.150, 0.190, 0.130)
HARD: Final[dict[str, tuple[float, ...]]] = {
    "water": (0.028, 0.030, 0.017, 0.012, 0.008, 0.008, 0.007, 0.006, 0.004, 0.003),
    "turbid": (0.048, 0.068, 0.055, 0.050, 0.032, 0.030, 0.026, 0.022, 0.009, 0.006),
    "asphalt": (0.082, 0.092, 0.100, 0.108, 0.114, 0.118, 0.124, 0.130, 0.145, 0.130),
    "tile roof": (0.072, 0.092, 0.140, 0.155, 0.170, 0.180, 0.190, 0.205, 0.240, 0.220),
    "light roof": (0.230, 0.250, 0.265, 0.270, 0.280, 0.290, 0.300, 0.305, 0.290, 0.260),
}
# cover: (share of fields, leaf, green-up day, its width, senescence day, its width, winter green, peak green)
CALENDAR: Final[dict[str, tuple[float, str, float, float, float, float, float, float]]] = {
    "winter cereal": (0.27, "crop", 92, 14, 176, 6, 0.22, 0.92),
    "rapeseed": (0.08, "crop", 80, 12, 170, 7, 0.30, 0.90),
    "maize": (0.27, "maize", 168, 8, 262, 9, 0.03, 0.93),
    "beet": (0.12, "crop", 158, 9, 272, 12, 0.04, 0.88),
    "grassland": (0.22, "grass", 82, 14, 305, 16, 0.50, 0.90),
    "fallow": (0.04, "grass", 120, 25, 230, 25, 0.12, 0.45),
    "broadleaf forest": (0.0, "broadleaf", 112, 6, 292, 9, 0.12, 0.95),
    "conifer forest": (0.0, "conifer", 110, 20, 310, 20, 0.84, 0.92),
    "garden": (0.0, "grass", 90, 15, 300, 15, 0.35, 0.72),
}
HARVESTED: Final = ("winter cereal", "rapeseed")
COVERS: Final = (*CALENDAR, *HARD)
ROWS_PER: Final[dict[str, int]] = {
    "broadleaf forest": 192,
    "conifer forest": 96,
    "garden": 128,
} | dict.fromkeys(HARD, 48)
FIELD_ROWS: Final = 4096


def day_of_year(day: int) -> float:
    """Day of the year (1..366) of ``day`` (days since 1970-01-01)."""
    when = date.fromordinal(EPOCH_ORDINAL + day)
    return float(when.timetuple().tm_yday)


@dataclass(frozen=True)
class Parcels:
    """One row per kind of parcel: its cover, calendar, soil and texture.

    All arrays (P,) unless said otherwise.
    """

    cover: NDArray[np.int16]
    """Index into ``COVERS``."""
    sos: F32
    eos: F32
    peak: F32
    winter: F32
    width_up: F32
    width_down: F32
    cut_days: F32
    """(P, 3).

    Harvest and tillage day of arable crops, three mowing days of grass, 1e9 where there is none.
    """
    event: F32
    """Day of the year on which the parcel is laid bare, 1e9 where it is not."""
    leaf: F32
    soil: F32
    """(P, 10) spectra."""
    texture: F32
    start: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Range of rows per group: ``fields`` and every cover that is no field."""


def draw_parcels(params: SceneParams, rng: np.random.Generator) -> Parcels:
    """Draw the table of parcels.

    Shares of crops, shifts of their calendars, soils, mowing and abrupt events.
    """
    shares = np.array([CALENDAR[name][0] for name in CALENDAR])
    cover = rng.choice(len(CALENDAR), size=FIELD_ROWS, p=shares / shares.sum()).astype(np.int16)
    start = {"fields": (0, FIELD_ROWS)}
    for name, rows in ROWS_PER.items():
        start[name] = (cover.size, cover.size + rows)
        cover = np.concatenate([cover, np.full(rows, COVERS.index(name), np.int16)])
    n = cover.size
    calendar = np.array([row[2:] for row in CALENDAR.values()] + [(0.0, 1.0, 999.0, 1.0, 0.0, 0.0)] * len(HARD))
    sos, width_up, eos, width_down, winter, peak = calendar[cover].astype(np.float32).T
    shift = rng.normal(0, params.phenology_spread_days, n).astype(np.float32)
    cuts = np.full((n, 3), 1e9, np.float32)
    harvested = np.isin(cover, [COVERS.index(name) for name in HARVESTED])
    cuts[harvested, 0] = (eos + shift)[harvested] + rng.normal(19, 4, harvested.sum())
    cuts[harvested, 1] = cuts[harvested, 0] + rng.gamma(3.0, 8.0, harvested.sum())
    mown = cover == COVERS.index("grassland")
    cuts[mown] = np.array([146, 190, 238]) + rng.normal(0, 11, (mown.sum(), 3))
    events = np.where(rng.random(n) < 1 - np.exp(-params.event_rate_per_year), rng.uniform(40, 330, n), 1e9)
    hard = cover >= len(CALENDAR)
    wooded = np.isin(cover, [COVERS.index("broadleaf forest"), COVERS.index("conifer forest")])
    events[hard | wooded] = 1e9
    vigour = rng.normal(1.0, 0.06, n)
    leaf_names = [row[1] for row in CALENDAR.values()]
    leaves = np.array([LEAF[name] for name in leaf_names] + list(HARD.values()))
    soil_share = rng.beta(2, 2, (n, 1))
    soil = soil_share * np.array(SOIL_LIGHT) + (1 - soil_share) * np.array(SOIL_DARK)
    soil[wooded] = np.array(LITTER)
    soil[hard] = leaves[cover[hard]]
    tone = np.exp(rng.normal(0, 0.10, (n, 1))) * np.exp(rng.normal(0, 0.03, (n, len(SIM_BANDS))))
    water = np.isin(cover, [COVERS.index("water"), COVERS.index("turbid")])
    texture = np.select([water, wooded, hard], [0.15, 1.8, 2.2], 1.0)
    return Parcels(
        cover=cover,
        sos=sos + shift,
        eos=(eos + shift).astype(np.float32),
        peak=np.clip(peak * vigour, 0, 0.98).astype(np.float32),
        winter=winter,
        width_up=width_up,
        width_down=width_down,
        cut_days=cuts,
        event=events.astype(np.float32),
        leaf=(leaves[cover] * tone).astype(np.float32),
        soil=(soil * np.where(hard[:, None], tone**2.5, tone)).astype(np.float32),
        texture=texture.astype(np.float32),
        start=start,
    )


def greenness(parcels: Parcels, doy: float) -> tuple[F32, F32]:
    """Share of green leaf and of straw per parcel on a day of the year, each (P,) float32 in 0..1."""
    up = 1 / (1 + np.exp(np.clip(-(doy - parcels.sos) / parcels.width_up, -60, 60)))
    down = 1 / (1 + np.exp(np.clip(-(doy - parcels.eos) / parcels.width_down, -60, 60)))
    green = parcels.winter + (parcels.peak - parcels.winter) * np.clip(up - down, 0, 1)
    harvested = np.isin(parcels.cover, [COVERS.index(name) for name in HARVESTED])
    straw = np.where(harvested, 0.85 * up * down, 0.25 * down * (parcels.cover < len(CALENDAR)))
    cut, tilled = parcels.cut_days[:, 0], parcels.cut_days[:, 1]
    stubble = harvested & (doy >= cut)
    green = np.where(stubble, 0.06, green)
    straw = np.where(stubble, 0.55, straw)
    bare = harvested & (doy >= tilled)
    regrown = 0.45 / (1 + np.exp(np.clip(-(doy - tilled - 45) / 8, -60, 60)))
    green = np.where(bare, regrown, green)
    straw = np.where(bare, 0.08, straw)
    mown = parcels.cover == COVERS.index("grassland")
    since = doy - parcels.cut_days
    lost = np.where(since >= 0, 0.55 * np.exp(-np.clip(since, 0, 400) / 16), 0).max(axis=1)
    green = np.where(mown, green * (1 - lost), green)
    since_event = np.where(parcels.event < 1e8, (doy - parcels.event) % 365.25, 1e9)
    healed = 1 - np.exp(-((np.minimum(since_event, 600) / 70) ** 3))
    return (green * healed).astype(np.float32), (straw * healed).astype(np.float32)


@dataclass(frozen=True)
class Weather:
    """The rain of a region: ``rain_days`` (R,) float days since 1970-01-01, ascending."""

    rain_days: NDArray[np.float64]

    def wetness(self, day: float) -> float:
        """Wetness of the top soil, 0 (dry) to 1: it dries with a time of four days after each rain."""
        since = day - self.rain_days
        return float(min(1.0, np.exp(-since[(since >= 0) & (since < 60)] / 4).sum()))


def draw_weather(params: SceneParams, rng: np.random.Generator) -> Weather:
    """Rain days of 1970 to 2100, a Poisson process of ``rain_rate_per_day``."""
    gaps = rng.exponential(1 / max(params.rain_rate_per_day, 1e-6), int(47_500 * params.rain_rate_per_day * 1.2) + 8)
    return Weather(np.cumsum(gaps))


def spectra(parcels: Parcels, *, day: int, wetness: float, seasonal_gain: float) -> tuple[F32, F32, F32]:
    """Reflectance of every parcel on a day.

    Returns:
        ``base`` (P, 10) float32 reflectance, ``slope`` (P, 10): its change per unit of greenness, ``green``
        (P,).
    """
    doy = day_of_year(day)
    green, straw = greenness(parcels, doy)
    straw = np.minimum(straw, 1 - green)
    hard = parcels.cover >= len(CALENDAR)
    dry = np.where(hard, 1.0, 1 - 0.33 * wetness).astype(np.float32)[:, None]
    soil = parcels.soil * dry
    bare = (1 - green - straw)[:, None]
    base = soil * bare + parcels.leaf * green[:, None] + np.array(STRAW, np.float32) * dry * straw[:, None]
    base = np.where(hard[:, None], parcels.soil, base)
    slope = np.where(hard[:, None], 0, parcels.leaf - soil)
    # canopies look brighter towards midsummer, when the sun stands high and casts less shade inside them
    season = np.cos(2 * np.pi * (doy - 172) / 365.25)
    gain = (1 + seasonal_gain * season * np.where(hard, 0.5, 1.0)).astype(np.float32)[:, None]
    return (base * gain).astype(np.float32), (slope * gain).astype(np.float32), green
