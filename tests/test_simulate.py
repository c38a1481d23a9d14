"""The simulator: deterministic, physically plausible, and wrong in its mask exactly as much as asked."""

import time
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from pipeline.errors import ConfigError
from pipeline.phenology import COVERS, SIM_BANDS, SceneParams
from pipeline.simulate import Region
from pipeline.skies import Acquisition

SMALL = SceneParams(width_px=320, height_px=256)
JUNE = (date(2021, 6, 11) - date(1970, 1, 1)).days


def looks(*fractions: float, **changes: object) -> tuple[Acquisition, ...]:
    return tuple(
        Acquisition(day=JUNE + 5 * k, cloud_fraction=fraction, haze=0.0, **changes)
        for k, fraction in enumerate(fractions)
    )


@pytest.fixture(scope="module")
def region() -> Region:
    return Region(SMALL, 3, acquisitions=looks(0.0, 0.4, 0.7))


@pytest.fixture(scope="module")
def wide() -> Region:
    """Large enough for statistics of clouds and mask."""
    return Region(replace(SMALL, width_px=768, height_px=768), 5, acquisitions=looks(0.0, 0.4, 0.2))


def test_same_seed_same_bytes_in_any_order(region: Region) -> None:
    again = Region(SMALL, 3, acquisitions=region.acquisitions)
    late = again.observe(2, ("nir", "blue"))
    first = region.observe(1, ("blue",))
    np.testing.assert_array_equal(late.reflectance["nir"], region.observe(2, ("nir",)).reflectance["nir"])
    np.testing.assert_array_equal(first.reflectance["blue"], again.observe(1, ("blue",)).reflectance["blue"])
    np.testing.assert_array_equal(late.scl, region.observe(2, ()).scl)
    other = Region(SMALL, 4, acquisitions=region.acquisitions)
    assert not np.array_equal(other.truth(JUNE, "red"), region.truth(JUNE, "red"))


@pytest.mark.parametrize("band", SIM_BANDS)
def test_truth_is_reflectance_at_native_resolution(region: Region, band: str) -> None:
    truth = region.truth(JUNE, band)
    coarse = band not in ("blue", "green", "red", "nir")
    assert truth.shape == ((128, 160) if coarse else (256, 320))
    assert truth.dtype == np.float32
    assert 0 < truth.min() < truth.max() < 0.9


def test_ground_looks_like_ground(wide: Region) -> None:
    cover = wide.ground.parcels.cover[wide.ground.index]
    red, nir = wide.truth(JUNE, "red"), wide.truth(JUNE, "nir")
    ndvi = (nir - red) / (nir + red)
    shares = {name: float((cover == k).mean()) for k, name in enumerate(COVERS)}
    wooded = np.isin(cover, [COVERS.index("broadleaf forest"), COVERS.index("conifer forest")])
    assert abs(wooded.mean() - wide.params.forest_fraction) < 0.1
    assert 0.003 < shares["water"] < 0.08
    assert np.median(ndvi[wooded]) > 0.75
    assert np.median(nir[wide.ground.water]) < 0.03
    assert np.median(ndvi[cover == COVERS.index("light roof")]) < 0.3


def test_phenology_harvest_and_flood() -> None:
    flood = JUNE + 30
    region = Region(replace(SMALL, flood_day=flood, flood_depth_m=12.0, event_rate_per_year=0.0), 1)
    cover = region.ground.parcels.cover[region.ground.index]
    cereal, maize = cover == COVERS.index("winter cereal"), cover == COVERS.index("maize")

    def green(day: int) -> np.ndarray:
        return region.ground.spectra(day)[2][region.ground.index]

    assert green(JUNE - 40)[cereal].mean() > 0.8 > 0.3 > green(JUNE + 45)[cereal].mean()
    assert green(JUNE - 40)[maize].mean() < 0.1 < 0.8 < green(JUNE + 60)[maize].mean()
    under = region.ground.flooded(flood)
    assert under is not None
    assert under.any()
    assert region.ground.flooded(flood - 1) is None
    inside = under & ~binary_dilation(~under, iterations=3)
    before, after = region.truth(flood - 1, "nir"), region.truth(flood, "nir")
    assert np.median(after[inside]) < 0.05 < np.median(before[inside])


def test_rain_darkens_soil_and_brightens_vv() -> None:
    region = Region(replace(SMALL, event_rate_per_year=0.0), 2)
    april = range(JUNE - 65, JUNE - 45)
    wet = max(april, key=region.ground.weather.wetness)
    dry = min(april, key=region.ground.weather.wetness)
    assert region.ground.weather.wetness(wet) - region.ground.weather.wetness(dry) > 0.3
    bare = region.ground.parcels.cover[region.ground.index] == COVERS.index("maize")
    red = {day: float(np.median(region.truth(day, "red")[bare])) for day in (wet, dry)}
    vv = {day: float(np.median(region.radar(day)["vv"][bare])) for day in (wet, dry)}
    assert red[wet] < 0.95 * red[dry]
    assert vv[wet] > vv[dry] + 0.5


def test_cloud_fraction_and_optics(wide: Region) -> None:
    clear, half, few = (wide.observe(k) for k in range(3))
    assert clear.cloud.mean() < 0.1  # cirrus may come unasked
    assert abs(half.cloud.mean() - 0.4) < 0.12
    assert few.cloud.mean() < half.cloud.mean()
    thick = half.optical_depth > 3
    assert np.median(half.reflectance["blue"][thick]) > 0.5
    without = wide.observe(1, cloudy=False)
    np.testing.assert_array_equal(without.cloud, half.cloud)
    ground = ~half.cloud & ~half.shadow
    difference = np.abs(half.reflectance["red"] - without.reflectance["red"])[ground]
    assert difference.max() < 0.05  # below the opacity that counts as cloud
    lost = (half.reflectance["nir"] / without.reflectance["nir"])[half.shadow & (without.reflectance["nir"] > 0.1)]
    assert 0.3 < np.percentile(lost, 5) < 0.6 < np.percentile(lost, 95) < 1.05


def test_shadow_lies_away_from_the_sun(wide: Region) -> None:
    seen = wide.observe(1, ())
    moved = {}
    for rows in range(-120, 121, 8):
        for cols in range(-120, 121, 8):
            rolled = np.roll(seen.cloud, (rows, cols), axis=(0, 1)) & ~seen.cloud
            moved[rows, cols] = (rolled & seen.shadow).sum() / max((rolled | seen.shadow).sum(), 1)
    rows, cols = max(moved, key=lambda key: moved[key])
    assert moved[rows, cols] > 0.6
    away = np.degrees(np.arctan2(cols, -rows)) % 360
    assert abs((away - seen.sun_azimuth_deg) % 360 - 180) < 12


def test_haze_is_blue_and_added() -> None:
    hazy = Acquisition(day=JUNE, cloud_fraction=0.0, haze=0.05)
    still = replace(SMALL, gain_drift_sigma=0.0, cover_drift_sigma=0.0, misregistration_px=0.0, cirrus_rate=0.0)
    region = Region(still, 0, acquisitions=[hazy])
    seen = region.observe(0, ("blue", "red", "nir", "swir16"))
    added = {band: float(np.median(seen.reflectance[band] - region.truth(JUNE, band))) for band in seen.reflectance}
    assert added["blue"] > 0.03
    assert added["blue"] > 1.5 * added["red"] > 0
    assert abs(added["swir16"]) < 0.006


def test_gain_drift_noise_and_shift_are_as_large_as_said() -> None:
    quiet = replace(
        SMALL, gain_drift_sigma=0.0, cover_drift_sigma=0.0, misregistration_px=0.0, cirrus_rate=0.0,
        noise_sigma=0.002, noise_relative_sigma=0.0,
    )  # fmt: skip
    region = Region(quiet, 0, acquisitions=looks(0.0))
    residual = region.observe(0).reflectance["nir"] - region.truth(JUNE, "nir")
    assert residual.std() == pytest.approx(0.002, rel=0.02)
    drifting = Region(replace(quiet, gain_drift_sigma=0.05), 0, acquisitions=looks(*[0.0] * 40))
    levels = []
    for k in range(40):
        seen = drifting.observe(k, ("nir",)).reflectance["nir"]
        levels.append(float(np.median(seen / drifting.truth(JUNE + 5 * k, "nir"))))
    assert 0.03 < np.std(np.log(levels)) < 0.075
    shifted = Region(replace(quiet, misregistration_px=0.3, noise_sigma=0.0), 0, acquisitions=looks(0.0))
    moved = shifted.observe(0).reflectance["nir"] - region.truth(JUNE, "nir")
    assert 0.002 < moved.std() < 0.05
    assert abs(float(moved.mean())) < 1e-3


def test_mask_is_as_wrong_as_asked() -> None:
    def error(**changes: float) -> tuple[float, float]:
        params = replace(SMALL, width_px=512, height_px=512, scl_underdilation_px=0, cirrus_rate=0.0, **changes)
        seen = Region(params, 5, acquisitions=looks(0.4)).observe(0, ())
        cloud = seen.cloud.reshape(256, 2, 256, 2).any(axis=(1, 3))
        shadow = seen.shadow.reshape(256, 2, 256, 2).any(axis=(1, 3))
        called = np.isin(seen.scl, [8, 9, 10])
        return float((cloud & ~called).sum() / cloud.sum()), float(called[~cloud & ~shadow].mean())

    assert error(scl_omission_fraction=0.0, scl_commission_fraction=0.0) == (0.0, 0.0)
    missed, false = error(scl_omission_fraction=0.15, scl_commission_fraction=0.02)
    assert missed == pytest.approx(0.15, abs=0.01)
    assert false == pytest.approx(0.02, abs=0.005)
    eroded = replace(SMALL, scl_omission_fraction=0.0, scl_commission_fraction=0.0, scl_underdilation_px=2)
    seen = Region(eroded, 3, acquisitions=looks(0.5)).observe(0, ())
    called = np.isin(seen.scl, [8, 9, 10]).repeat(2, axis=0).repeat(2, axis=1)
    assert not (called & ~seen.cloud.reshape(128, 2, 160, 2).any(axis=(1, 3)).repeat(2, 0).repeat(2, 1)).any()
    assert called.sum() < 0.95 * seen.cloud.sum()


def test_blind_scl_and_swath() -> None:
    white = Acquisition(day=JUNE, cloud_fraction=1.0, haze=0.01, swath_west_m=SMALL.west_m + 1000, scl_blind=True)
    seen = Region(SMALL, 0, acquisitions=[white]).observe(0)
    inside = seen.scl > 0
    assert seen.cloud[seen.valid].all()
    assert np.isin(seen.scl[inside], [8, 9, 10]).mean() < 0.02
    np.testing.assert_array_equal(inside.repeat(2, axis=0).repeat(2, axis=1), seen.valid)
    np.testing.assert_array_equal(np.isnan(seen.reflectance["green"]), ~seen.valid)
    edge = seen.valid.argmax(axis=1)
    assert 98 <= edge[0] <= 102
    assert edge[0] - edge[-1] == pytest.approx(0.2547 * 255, abs=3)
    assert np.nanmedian(seen.reflectance["red"]) > 0.5


def test_radar_and_elevation(region: Region) -> None:
    radar = region.radar(JUNE)
    cover = region.ground.parcels.cover[region.ground.index]
    forest = np.isin(cover, [COVERS.index("broadleaf forest"), COVERS.index("conifer forest")])
    assert radar["vh"].dtype == np.float32
    assert np.median(radar["vv"][region.ground.water]) < -17 < -10 < np.median(radar["vv"][forest])
    assert (np.median(radar["vv"]) - np.median(radar["vh"])) > 3
    np.testing.assert_array_equal(radar["vv"], region.radar(JUNE)["vv"])
    assert region.elevation()[region.ground.water].mean() < region.elevation()[forest].mean()


def test_drawn_acquisitions_follow_the_mean() -> None:
    fractions = []
    for seed in range(40):
        params = replace(SMALL, width_px=64, height_px=64, cloud_fraction_mean=0.6, n_dates=20)
        fractions += [a.cloud_fraction or 0 for a in Region(params, seed).acquisitions]
    assert np.mean(fractions) == pytest.approx(0.6, abs=0.05)
    assert np.mean(np.array(fractions) > 0.95) > 0.15  # the U shape of real series


def test_faults_are_named() -> None:
    with pytest.raises(ConfigError, match="even numbers"):
        SceneParams(width_px=63)
    with pytest.raises(ConfigError, match="ultraviolet"):
        Region(replace(SMALL, width_px=64, height_px=64), 0).truth(JUNE, "ultraviolet")


def test_speed() -> None:
    """The aim is 1024 x 1024 with 12 dates, four bands and SCL in 15 s on one core; here a sixteenth."""
    begin = time.process_time()
    region = Region(replace(SMALL, width_px=256, height_px=256), 0)
    for index in range(12):
        region.observe(index)
    assert time.process_time() - begin < 3
