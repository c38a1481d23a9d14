"""The simulated ground: in come ``SceneParams`` and a seed, out comes what lies where and how it reflects.

Voronoi districts, edged by roads, hold parcels in strips of their own direction; forests follow relief,
villages have streets and roofs, a river meanders through its valley, a lake lies dark. Arrays are (H, W) at
10 m, north up.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from pipeline.patterns import mix, power_noise, strips, unit, voronoi
from pipeline.phenology import (
    F32,
    FIELD_ROWS,
    PIXEL_M,
    SIM_BANDS,
    Parcels,
    SceneParams,
    Weather,
    day_of_year,
    draw_parcels,
    draw_weather,
    spectra,
)

PSF_SIGMA_PX: Final = 0.55
"""Gaussian stand-in for the optics, in native pixels: MTF about 0.22 at Nyquist, inside MSI's 0.15-0.3."""


def rows_of(parcels: Parcels, group: str, hashed: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Rows of the parcel table for the hashes of a group."""
    first, stop = parcels.start[group]
    return (np.uint32(first) + hashed % np.uint32(stop - first)).astype(np.uint16)


class Ground:
    """The ground of one region, fixed for all days. Deterministic in (params, seed).

    Attributes:
        params: what it was made from.
        parcels: the table of parcels; ``index`` (H, W) uint16 says which row a pixel shows.
        elevation_m: (H, W) float32 metres; ``above_river_m`` likewise, over the river's water.
        water: (H, W) bool, True = permanent water.
        weather: the rain.
    """

    def __init__(self, params: SceneParams, seed: int) -> None:
        self.params = params
        rng = np.random.default_rng([seed, 1])
        self.parcels = draw_parcels(params, rng)
        self.weather: Weather = draw_weather(params, rng)
        shape = (params.height_px, params.width_px)
        x = np.broadcast_to(np.arange(shape[1], dtype=np.float32)[None, :] * np.float32(PIXEL_M), shape)
        y = np.broadcast_to(np.arange(shape[0], dtype=np.float32)[:, None] * np.float32(PIXEL_M), shape)
        hills = power_noise(shape, beta=3.6, rng=rng, outer_px=500)
        bend = power_noise(shape, beta=3.4, rng=rng, outer_px=120)
        self.water, river_m = _waters(params, x, y, bend, rng)
        valley = 1 - np.exp(-river_m / np.float32(900))
        self.above_river_m = ((hills + 2.2).clip(0.05) * np.float32(params.relief_m / 3) * valley).astype(np.float32)
        self.elevation_m = (self.above_river_m + np.float32(140) - y * np.float32(4e-4)).astype(np.float32)
        self.index, self.road, self.road_cover = self._cover(x, y, hills, bend, river_m, seed, rng)
        crop = power_noise(shape, beta=2.4, rng=rng, outer_px=40)
        fine = power_noise(shape, beta=1.0, rng=rng, outer_px=6)
        self._green_texture = (crop * np.float32(params.greenness_texture_sigma)).astype(np.float32)
        relative = fine * self.parcels.texture[self.index] * np.float32(params.texture_sigma)
        self._texture = np.exp(np.clip(relative, -1.2, 1.2), dtype=np.float32)
        gy, gx = np.gradient(self.elevation_m, PIXEL_M)
        self._slope_south, self._slope_east = (gy.astype(np.float32), gx.astype(np.float32))

    def _cover(
        self, x: F32, y: F32, hills: F32, bend: F32, river_m: F32, seed: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint16], NDArray[np.intp], F32]:
        """Which parcel every pixel shows, and where roads run and how much of the pixel they cover."""
        params, parcels = self.params, self.parcels
        warp = np.float32(110)
        districts = voronoi(x + warp * bend, y - warp * bend, spacing_m=params.district_m, seed=seed)
        hashed, edge_m, _ = strips(x, y, districts.id, width_m=params.parcel_width_m, length_m=params.parcel_length_m)
        index = rows_of(parcels, "fields", hashed)
        # a grass strip or hedge lies along two of five field edges
        hedge = (edge_m < 5) & ((hashed % np.uint32(5)) < 2)
        index[hedge] = rows_of(parcels, "garden", hashed[hedge])
        wild = hills * np.float32(0.8) + bend * np.float32(0.75)
        if params.forest_fraction > 0:
            forest = wild > np.quantile(wild[::4, ::4], 1 - params.forest_fraction)
            forest |= (river_m < 150) & (bend > 0.7)
            stand = mix(np.floor(x / 420).astype(np.int32), np.floor(y / 420).astype(np.int32), districts.id)
            conifer = forest & (hills + 0.6 * unit(stand) > 1.25)
            index[forest] = rows_of(parcels, "broadleaf forest", stand[forest])
            index[conifer] = rows_of(parcels, "conifer forest", stand[conifer])
        _villages(params, parcels, index, x, y, bend, rng)
        index[self.water] = rows_of(parcels, "water", districts.id[self.water].astype(np.uint32) // np.uint32(7))
        cover = np.clip((9.0 / 2 - districts.border_m) / PIXEL_M + 0.5, 0, 0.8).astype(np.float32)
        motorway = np.abs(y - (0.35 * x + 0.16 * params.height_px * PIXEL_M + 260 * np.sin(x / 2600)))
        cover = np.maximum(cover, np.clip((28.0 / 2 - motorway) / PIXEL_M + 0.5, 0, 0.95))
        cover[self.water] *= 0.4  # bridges
        road = np.flatnonzero(cover > 0.02)
        return index, road, cover.ravel()[road]

    def _water_rows(self, x: F32) -> NDArray[np.uint16]:
        """One row of the table for the lake, another for the river: a water body has one colour."""
        first, _ = self.parcels.start["water"]
        return (first + (x[self.water] > 0.45 * self.params.width_px * PIXEL_M)).astype(np.uint16)

    def flooded(self, day: int) -> NDArray[np.bool_] | None:
        """(H, W) bool where flood water stands on ``day`` (days since 1970), None when there is none.

        The water comes in one night and falls with a time of nine days.
        """
        if self.params.flood_day is None or not 0 <= day - self.params.flood_day < 40:
            return None
        level = self.params.flood_depth_m * np.exp(-(day - self.params.flood_day) / 9.0)
        standing: NDArray[np.bool_] = (self.above_river_m < level) & ~self.water
        return standing if level > 0.3 else None

    def sun(self, day: int) -> tuple[float, float]:
        """Azimuth (clockwise from north) and elevation in degrees, about 70 minutes before solar noon."""
        south = self.params.epsg // 100 == 327
        latitude = np.radians((self.params.north_m - (1e7 if south else 0)) / 111_320)
        declination = np.radians(-23.44 * np.cos(2 * np.pi * (day_of_year(day) + 10) / 365.25))
        hour = np.radians(-17.0)
        up = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.cos(hour)
        east = -np.cos(declination) * np.sin(hour)
        north = np.cos(latitude) * np.sin(declination) - np.sin(latitude) * np.cos(declination) * np.cos(hour)
        return float(np.degrees(np.arctan2(east, north)) % 360), float(np.degrees(np.arcsin(up)))

    def shade(self, day: int) -> F32:
        """(H, W) float32 factor of direct light on the slopes, about 1 (L2A without terrain correction)."""
        azimuth, elevation = np.radians(self.sun(day))
        toward = np.sin(azimuth) * self._slope_east - np.cos(azimuth) * self._slope_south
        factor: F32 = np.clip(1 - 0.75 * toward / np.tan(elevation), 0.45, 1.6).astype(np.float32)
        return factor

    def spectra(self, day: int) -> tuple[F32, F32, F32]:
        """Spectra of the parcels on ``day``: base (P, 10), slope (P, 10), greenness (P,).

        See ``phenology``.
        """
        wetness = self.weather.wetness(day)
        return spectra(self.parcels, day=day, wetness=wetness, seasonal_gain=self.params.seasonal_gain)

    def paint(
        self,
        table: tuple[F32, F32],
        band: str,
        *,
        index: NDArray[np.uint16],
        shade: F32,
        shift_px: tuple[float, float] = (0.0, 0.0),
    ) -> F32:
        """One band of the ground at its native resolution, optics included.

        Args:
            table: base and slope (P, 10) of ``spectra``, perhaps with gains of the day.
            band: one of ``SIM_BANDS``.
            index: (H, W) rows shown (``self.index``, or with flood water).
            shade: (H, W) of ``shade``.
            shift_px: (rows, columns) by which the image lies off, in 10 m pixels.

        Returns:
            float32 reflectance, (H, W) for 10 m bands, (H/2, W/2) for 20 m bands.
        """
        column = SIM_BANDS.index(band)
        out = table[1][:, column][index]
        out *= self._green_texture
        out += table[0][:, column][index]
        out *= self._texture
        out *= shade
        first, stop = self.parcels.start["asphalt"]
        asphalt = np.float32(table[0][first:stop, column].mean())
        flat = out.reshape(-1)
        flat[self.road] += self.road_cover * (asphalt - flat[self.road])
        coarse = band not in ("blue", "green", "red", "nir")
        if coarse:
            out = half(out)
        scale = 0.5 if coarse else 1.0
        for axis in (0, 1):
            out = correlate1d(out, psf(shift_px[axis] * scale), axis=axis, mode="nearest")
        return out


def half(values: F32) -> F32:
    """Means of 2 x 2 pixels: (H, W) to (H/2, W/2) float32."""
    return ((values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]) * np.float32(0.25)).astype(
        np.float32
    )


def psf(shift_px: float) -> NDArray[np.float64]:
    """Seven weights of the optics' Gaussian, moved by ``shift_px`` (at most about one pixel)."""
    weights = np.exp(-0.5 * ((np.arange(-3, 4) + shift_px) / PSF_SIGMA_PX) ** 2)
    return np.asarray(weights / weights.sum())


def _waters(params: SceneParams, x: F32, y: F32, bend: F32, rng: np.random.Generator) -> tuple[NDArray[np.bool_], F32]:
    """Permanent water (river and lake), and the distance (m) to the river's bank."""
    height, width = params.height_px * PIXEL_M, params.width_px * PIXEL_M
    phase, middle = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.55, 0.75) * width
    middle_x = middle + 620 * np.sin(y / 1900 + phase[0]) + 260 * np.sin(y / 760 + phase[1])
    lean = 620 / 1900 * np.cos(y / 1900 + phase[0]) + 260 / 760 * np.cos(y / 760 + phase[1])
    bank = 32 + 9 * np.sin(y / 900 + phase[2])
    river_m = (np.abs(x - middle_x) / np.sqrt(1 + lean**2) - bank).astype(np.float32)
    if not params.water:
        return np.zeros(x.shape, bool), np.full(x.shape, 3000, np.float32)
    cy, cx = rng.uniform(0.3, 0.75) * height, rng.uniform(0.12, 0.32) * width
    ry, rx = 0.055 * min(height, 12_000.0), 0.035 * min(height, 12_000.0) + 80
    lake = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 + 0.28 * bend < 1
    return (river_m < 0) | lake, np.maximum(river_m, 0)


def _villages(
    params: SceneParams,
    parcels: Parcels,
    index: NDArray[np.uint16],
    x: F32,
    y: F32,
    bend: F32,
    rng: np.random.Generator,
) -> None:
    """Write villages into ``index``.

    Streets every 70 m, houses of one pixel or two in gardens, some halls.
    """
    height, width = params.height_px * PIXEL_M, params.width_px * PIXEL_M
    for _ in range(round(params.villages_per_km2 * height * width / 1e6)):
        cy, cx, turn = (rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0, np.pi))
        radius = rng.gamma(4.0, 85.0) + 120
        rows = slice(*np.clip([int((cy - 2 * radius) / 10), int((cy + 2 * radius) / 10)], 0, params.height_px))
        cols = slice(*np.clip([int((cx - 2 * radius) / 10), int((cx + 2 * radius) / 10)], 0, params.width_px))
        dy, dx = y[rows, cols] - cy, x[rows, cols] - cx
        if not dy.size:
            continue
        inside = np.hypot(dy, dx) * (1 + 0.28 * bend[rows, cols]) < radius
        u, v = (np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx)
        house = mix(np.floor(u / 16).astype(np.int32), np.floor(v / 14).astype(np.int32), int(cx))
        hall = mix(np.floor(u / 75).astype(np.int32), np.floor(v / 45).astype(np.int32), int(cy))
        street = (np.abs(u % 88 - 4) < 5) | (np.abs(v % 130 - 4) < 5)
        far = np.hypot(dy, dx) > 0.6 * radius
        groups = [
            ("garden", inside),
            ("broadleaf forest", inside & (house % np.uint32(100) < 9)),
            ("tile roof", inside & (house % np.uint32(100) > 66)),
            ("light roof", inside & far & (hall % np.uint32(100) > 93)),
            ("asphalt", inside & street),
        ]
        view = index[rows, cols]
        for group, where in groups:
            view[where] = rows_of(parcels, group, house[where] if group != "light roof" else hall[where])


def index_on(ground: Ground, day: int) -> NDArray[np.uint16]:
    """(H, W) uint16 rows of the parcel table shown on ``day``.

    The ground's own, with flood water where it stands.
    """
    wet = ground.flooded(day)
    if wet is None:
        return ground.index
    index = ground.index.copy()
    first = ground.parcels.start["turbid"][0]
    index[wet] = first + (index[wet] % np.uint16(FIELD_ROWS) % np.uint16(40))
    return index
