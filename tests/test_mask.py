"""Cloud masks: states, growth, the temporal check on real series, blocks and the lazy front."""

import datetime as dt
import os
import sys
import types
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from scipy import ndimage

from pipeline import mask
from pipeline.errors import ConfigError
from pipeline.mask import CLEAR, CLOUD, NODATA, SHADOW, MaskParams, MaskRule
from pipeline.temporal import bright_and_dark, time_windows

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from mask_scores import masked, read

DATA = os.environ.get("CLOUDGATE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="CLOUDGATE_DATA is not set: no real series here")
EPOCH = dt.date(1970, 1, 1)


def blobs(looks: int, height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """States with smooth cloud and shadow patches of several sizes, and some nodata."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(looks, height, width)), (0, 3, 3))
    fine = ndimage.gaussian_filter(rng.normal(size=(looks, height, width)), (0, 1, 1))
    state = np.full(noise.shape, CLEAR, np.uint8)
    state[noise > 1.2 * noise.std()] = CLOUD
    state[(noise < -1.4 * noise.std()) | (fine > 2.4 * fine.std())] = SHADOW
    state[:, :, :3][noise[:, :, :3] > 0] = NODATA
    return state


def ground(looks: int, height: int, width: int, *, seed: int = 0) -> NDArray[np.uint16]:
    """Codes of a dark band: ground with noise, some bright and some dark looks, some nodata."""
    rng = np.random.default_rng(seed)
    codes = 1400 + rng.integers(0, 300, (1, height, width)) + rng.integers(-40, 40, (looks, height, width))
    odd = rng.random(codes.shape)
    codes[odd < 0.05] += 1500
    codes[odd > 0.97] -= 350
    codes[(odd > 0.5) & (odd < 0.52)] = 0
    return codes.astype(np.uint16)


# --- states ---


def test_scl_states() -> None:
    classes = np.arange(13, dtype=np.uint8)
    expected = {0: NODATA, 1: NODATA, 3: SHADOW, 8: CLOUD, 9: CLOUD, 10: CLOUD}
    assert mask.state_from_scl(classes).tolist() == [expected.get(int(c), CLEAR) for c in classes]
    assert np.array_equal(mask.apply_rule(classes, MaskRule()), mask.state_from_scl(classes))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_class_map_states(dtype: type) -> None:
    rule = MaskRule(kind="classes", asset="clm", cloud=(1, 2), shadow=(3,), nodata=255)
    got = mask.apply_rule(np.array([[0, 1, 2], [3, 255, 7]], dtype), rule)
    assert got.tolist() == [[CLEAR, CLOUD, CLOUD], [SHADOW, NODATA, CLEAR]]
    assert got.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_fmask_bit_states(dtype: type) -> None:
    values = np.array([0, 0b10, 0b100, 0b1000, 0b1010, 0b0100_0000, 0b10_0000, 255], dtype)
    rule = MaskRule(kind="bits", asset="Fmask", cloud=(1, 2), shadow=(3,), nodata=255)
    assert mask.apply_rule(values, rule).tolist() == [CLEAR, CLOUD, CLOUD, SHADOW, CLOUD, CLEAR, CLEAR, NODATA]


def test_probability_states() -> None:
    percent = mask.state_from_probability(np.array([0, 39, 40, 100, 255], np.uint8), threshold=40, nodata=255)
    assert percent.tolist() == [CLEAR, CLEAR, CLOUD, CLOUD, NODATA]
    share = mask.state_from_probability(np.array([0.1, 0.4, np.nan], np.float32), threshold=0.4)
    assert share.tolist() == [CLEAR, CLOUD, NODATA]


def test_rules_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="threshold: 40"):
        mask.apply_rule(np.zeros(3, np.uint8), MaskRule(kind="probability", asset="prob"))
    with pytest.raises(ConfigError, match=r"cloud: \[1, 2\]"):
        mask.apply_rule(np.zeros(3, np.uint8), MaskRule(kind="bits", asset="Fmask"))


# --- growth ---


def test_growth_equals_euclidean_distance() -> None:
    state = blobs(3, 70, 90)
    cloud, shadow = mask.grow(state=state, resolution_m=20, open_m=0, cloud_grow_m=100, shadow_grow_m=50)
    for t in range(3):
        for got, value, reach_px in ((cloud, CLOUD, 5.0), (shadow, SHADOW, 2.5)):
            away = ndimage.distance_transform_edt(state[t] != value)
            assert np.array_equal(got[t], away <= reach_px + 1e-6)


def test_opening_drops_specks_and_keeps_clouds() -> None:
    state = np.full((1, 60, 60), CLEAR, np.uint8)
    state[0, 5:8, 5:8] = CLOUD  # 60 m, a disk of 40 m does not fit
    state[0, 10, :50] = CLOUD  # a line
    state[0, 30:45, 30:45] = CLOUD
    state[0, 30:33, 5:8] = SHADOW
    cloud, shadow = mask.grow(state=state, resolution_m=20, open_m=40, cloud_grow_m=0, shadow_grow_m=0)
    assert not shadow.any()
    assert not cloud[0, :28].any()
    assert cloud[0, 32:43, 32:43].all()
    assert not cloud[0][state[0] != CLOUD].any()


def test_growth_does_not_depend_on_the_cut() -> None:
    state = blobs(2, 120, 130, seed=3)
    sizes = {"resolution_m": 20.0, "open_m": 40.0, "cloud_grow_m": 100.0, "shadow_grow_m": 60.0}
    whole = mask.grow(state=state, **sizes)
    halo = int(mask.halo_m(40, 100, 60) / 20)
    assert halo == 9
    y, x = 40, 50
    part = mask.grow(state=state[:, y - halo : y + 30 + halo, x - halo : x + 25 + halo], **sizes)
    for got, expected in zip(part, whole, strict=True):
        assert np.array_equal(got[:, halo:-halo, halo:-halo], expected[:, y : y + 30, x : x + 25])


# --- temporal check ---


def test_white_and_shadowed_looks_are_found() -> None:
    codes, nir = np.full((8, 20, 30), 1500, np.uint16), np.full((8, 20, 30), 4000, np.uint16)
    codes[2] += 1500  # a scene all white
    nir[2] += 1500
    codes[5, 3:9, 3:9] -= 200  # a shadow
    nir[5, 3:9, 3:9] -= 2000
    nir[6, 10:15] -= 2000  # a harvest: infrared falls, blue rises a little
    codes[6, 10:15] += 150
    days = np.arange(17000, 17040, 5).astype(np.int32)
    marked = mask.temporal_check(codes=codes, clear=np.ones(codes.shape, bool), days=days, nir=nir)
    assert marked[2].all()
    expected = np.zeros((20, 30), bool)
    expected[3:9, 3:9] = True
    assert np.array_equal(marked[5], expected)
    assert not np.delete(marked, (2, 5), axis=0).any()


def test_few_looks_are_judged_with_care() -> None:
    days = np.arange(17000, 17040, 5).astype(np.int32)
    codes = np.full((8, 4, 4), 1500, np.uint16)
    codes[3] = 2200  # haze that three looks would show
    clear = np.zeros(codes.shape, bool)
    clear[3] = True
    assert not mask.temporal_check(codes=codes, clear=clear, days=days).any()
    clear[5] = True
    assert not mask.temporal_check(codes=codes, clear=clear, days=days).any()
    clear[6] = True
    assert mask.temporal_check(codes=codes, clear=clear, days=days)[3].all()
    codes[3] = 6000  # plain cloud: two looks are enough
    clear[6] = False
    marked = mask.temporal_check(codes=codes, clear=clear, days=days)
    assert marked[3].all()
    assert not np.delete(marked, 3, axis=0).any()


def test_a_pixel_keeps_its_least_odd_look() -> None:
    # The shadow of the first date draws the reference down, so that all three looks are odd.
    codes = np.array([1500, 4000, 5000], np.uint16).reshape(3, 1, 1)
    nir = np.array([1500, 5000, 6000], np.uint16).reshape(3, 1, 1)
    days = np.arange(17000, 17015, 5).astype(np.int32)
    looks = {"codes": codes, "nir": nir, "clear": np.ones((3, 1, 1), bool), "days": days}
    assert mask.temporal_check(**looks).ravel().tolist() == [True, False, True]
    for rejected, kept in ((0, 1), (1, 0), (2, 1)):
        barred = np.arange(3) == rejected
        marked = np.logical_or(*bright_and_dark(**looks, rejected=barred))
        assert np.flatnonzero(~marked.ravel() & ~barred).tolist() == [kept]
    marked = np.logical_or(*bright_and_dark(**looks, rejected=np.ones(3, bool)))
    assert marked.all()


@pytest.mark.parametrize("infrared", [True, False])
def test_no_pixel_loses_its_last_look(infrared: bool) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(1100, 9000, (5, 60, 70)).astype(np.uint16)
    nir = rng.integers(1100, 9000, codes.shape).astype(np.uint16) if infrared else None
    clear = rng.random(codes.shape) < 0.8
    days = np.arange(17000, 17025, 5).astype(np.int32)
    marked = mask.temporal_check(codes=codes, clear=clear, days=days, nir=nir)
    left = clear & ~marked
    assert marked.mean() > 0.1
    np.testing.assert_array_equal(left.any(axis=0), clear.any(axis=0))


def test_check_is_per_pixel_and_only_among_the_clear() -> None:
    codes, nir = ground(10, 40, 50), ground(10, 40, 50, seed=1)
    clear = np.random.default_rng(2).random(codes.shape) < 0.7
    days = np.sort(np.random.default_rng(3).integers(17000, 17080, 10)).astype(np.int32)
    whole = mask.temporal_check(codes=codes, clear=clear, days=days, nir=nir)
    assert whole.any()
    assert not whole[~clear].any()
    assert not whole[codes == 0].any()
    cut = (slice(None), slice(7, 8), slice(11, 43))
    part = mask.temporal_check(codes=codes[cut], clear=clear[cut], days=days, nir=nir[cut])
    assert np.array_equal(part, whole[cut])


def test_windows_hold_every_date_and_enough_looks() -> None:
    days = np.array([17000, 17001, 17055, 17056, 17300, 17301, 17302, 17303, 17304, 17305, 17306], np.int32)
    windows = time_windows(days)
    assert np.concatenate([days[members] for members, _, _ in windows]).tolist() == days.tolist()
    for members, start, stop in windows:
        assert start <= members.start
        assert members.stop <= stop
        assert stop - start >= 5
    assert time_windows(days[:2])[0][1:] == (0, 2)


def test_scene_fails() -> None:
    assert mask.scene_fails(0.95)
    assert not mask.scene_fails(0.3)
    assert not mask.scene_fails(0.0)


def real_series(name: str, start: dt.date, end: dt.date) -> dict[str, NDArray]:
    """Codes, SCL state and the derived mask of a real series between two days."""
    series = read(name)
    days = series["days"]
    inside = (days >= (start - EPOCH).days) & (days <= (end - EPOCH).days)
    return {key: values[inside] for key, values in series.items()}


@needs_data
def test_the_white_scene_of_flanders_is_marked_whole() -> None:
    target = dt.date(2018, 9, 23)
    series = real_series("flanders_31uds", target - dt.timedelta(60), target + dt.timedelta(60))
    at = int(np.flatnonzero(series["days"] == (target - EPOCH).days)[0])
    unchecked = masked(series, MaskParams(temporal_check=False))
    assert unchecked.clear[at].mean() > 0.95  # SCL passes it
    checked = masked(series, MaskParams())
    assert not checked.clear[at].any()
    assert mask.scene_fails(1 - checked.clear[at].sum() / unchecked.clear[at].sum())


@needs_data
@pytest.mark.parametrize(("name", "shadow_gain"), [("flanders_31uds", 0.15), ("flanders_31ues", 0.1)])
def test_check_finds_what_scl_misses_and_spares_clear_dates(name: str, shadow_gain: float) -> None:
    series = real_series(name, dt.date(2017, 1, 1), dt.date(2020, 1, 1))
    before, after = masked(series, MaskParams(temporal_check=False)), masked(series, MaskParams())
    affected = series["clm"] != 0

    def leak(layers: mask.MaskLayers) -> float:
        return float(affected[layers.clear].mean())

    assert leak(after) < 0.6 * leak(before)
    thick = series["clm"] == 1
    assert thick[after.clear].mean() < 0.002 < 0.03 < thick[before.clear].mean()
    shadow = series["clm"] == 3
    assert (~after.clear)[shadow].mean() > (~before.clear)[shadow].mean() + shadow_gain
    truly_clear = affected.mean(axis=(1, 2)) < 0.01
    assert truly_clear.sum() >= 16
    alarms = (before.clear & ~after.clear)[truly_clear].mean(axis=(1, 2))
    assert alarms.mean() < 0.06
    assert not any(mask.scene_fails(float(share)) for share in alarms)


# --- blocks ---


@pytest.mark.parametrize(("factor", "offset"), [(1, (0, 0)), (2, (0, 0)), (2, (1, 3)), (3, (2, 4))])
def test_block_equals_growth_brought_to_the_grid(factor: int, offset: tuple[int, int]) -> None:
    state = blobs(6, 40, 50, seed=4)
    height, width = 40 * factor - offset[0] - 5, 50 * factor - offset[1] - 3
    codes, days = ground(6, height, width), np.arange(17000, 17030, 5).astype(np.int32)
    params = MaskParams(temporal_check=False)
    layers = mask.mask_block(
        state=state, factor=factor, offset=offset, codes=codes, nir=None, days=days, resolution_m=10, params=params
    )
    cloud, shadow = mask.grow(state=state, resolution_m=10 * factor, open_m=40, cloud_grow_m=100, shadow_grow_m=100)
    rows, cols = (np.arange(height) + offset[0]) // factor, (np.arange(width) + offset[1]) // factor
    lift = np.ix_(range(6), rows, cols)
    assert np.array_equal(layers.cloud, cloud[lift])
    assert np.array_equal(layers.shadow, shadow[lift])
    valid = (codes != 0) & (state != NODATA)[lift]
    assert np.array_equal(layers.clear, valid & ~cloud[lift] & ~shadow[lift])
    checked = mask.mask_block(
        state=state, factor=factor, offset=offset, codes=codes, nir=None, days=days, resolution_m=10,
        params=MaskParams(),
    )  # fmt: skip
    marked = mask.temporal_check(codes=codes, clear=layers.clear, days=days)
    assert marked.any()
    assert np.array_equal(checked.clear, layers.clear & ~marked)
    assert np.array_equal(checked.cloud | checked.shadow, layers.cloud | layers.shadow | marked)


def test_block_without_codes_and_outside_the_state() -> None:
    state = blobs(2, 20, 20)
    days = np.array([17000, 17005], np.int32)
    common = {"state": state, "factor": 2, "codes": None, "nir": None, "days": days, "resolution_m": 10.0}
    layers = mask.mask_block(**common, offset=(3, 1), params=MaskParams())
    assert layers.clear.shape == (2, 37, 39)
    assert not layers.clear[:, :, 0][np.repeat(state, 2, axis=1)[:, 3:, 0] == NODATA].any()
    with pytest.raises(ValueError, match="whole footprint"):
        mask.mask_block(**common, offset=(3, 1), params=MaskParams(), shape=(38, 39))


# --- the lazy front ---


def make_cube(factor: int, offset: tuple[int, int], *, bands: tuple[str, ...] = ("red", "nir", "blue")) -> tuple:
    state = blobs(6, 40, 50, seed=6)
    height, width = 40 * factor - offset[0] - 1, 50 * factor - offset[1]
    codes = np.stack([ground(6, height, width, seed=s) for s in range(len(bands))], axis=1)
    codes[:, :, 5:7, 5:9] = 0
    present = codes != 0
    refl = np.where(present, (codes.astype(np.float32) - 1000) * np.float32(1e-4), np.float32(np.nan))
    rows, cols = (np.arange(height) + offset[0]) // factor, (np.arange(width) + offset[1]) // factor
    days = np.arange(17000, 17030, 5).astype(np.int32)
    blue = codes[:, bands.index("blue")] if "blue" in bands else codes[:, 0]
    cube = xr.Dataset(
        {
            "reflectance": (("time", "band", "y", "x"), refl),
            "valid": (("time", "y", "x"), blue != 0),
            "state": (("time", "y", "x"), state[np.ix_(range(6), rows, cols)]),
        },
        coords={"time": days.astype("datetime64[D]").astype("datetime64[ns]"), "band": list(bands)},
        attrs={"resolution_m": 10.0},
    )
    cube["state"].attrs = {"factor": factor, "offset": list(offset)}
    nir = codes[:, bands.index("nir")] if "nir" in bands else None
    return cube, {"state": state, "codes": blue, "nir": nir, "days": days}


@pytest.mark.parametrize(("factor", "offset"), [(1, (0, 0)), (2, (0, 0)), (2, (1, 1)), (3, (0, 2))])
@pytest.mark.parametrize("check", [True, False])
def test_lazy_eager_and_block_agree(factor: int, offset: tuple[int, int], check: bool) -> None:
    cube, arrays = make_cube(factor, offset)
    params = MaskParams(temporal_check=check)
    expected = mask.mask_block(**arrays, factor=factor, offset=offset, resolution_m=10, params=params)
    eager = mask.cloud_mask(cube=cube, params=params)
    with dask.config.set(scheduler=_refuse):
        lazy = mask.cloud_mask(cube=cube.chunk({"time": 1, "y": 31, "x": 37}), params=params)
    assert isinstance(lazy["clear"].data, da.Array)
    lazy = lazy.compute(scheduler="synchronous")
    for name in ("cloud", "shadow", "clear"):
        assert eager[name].dtype == bool
        assert eager[name].dims == ("time", "y", "x")
        assert np.array_equal(eager[name], getattr(expected, name)), name
        assert np.array_equal(lazy[name], getattr(expected, name)), name


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("cloud_mask computed something")


def test_rejected_acquisitions_are_cloud() -> None:
    cube, _ = make_cube(2, (0, 0))
    barred = [False, True, False, False, True, False]
    plain, without = mask.cloud_mask(cube=cube), mask.cloud_mask(cube=cube, rejected=barred)
    assert without["cloud"][barred].all()
    assert not without["clear"][barred].any()
    kept = ~np.array(barred)
    lost = ~plain["clear"].values[kept].any(axis=0)
    assert np.array_equal(without["clear"].values[kept][:, ~lost], plain["clear"].values[kept][:, ~lost])
    with pytest.raises(ConfigError, match="rejected says 2 times yes or no, and the cube has 6 times"):
        mask.cloud_mask(cube=cube, rejected=[True, False])


def test_cube_without_blue() -> None:
    cube, _ = make_cube(1, (0, 0), bands=("red", "nir"))
    with pytest.raises(ConfigError, match="darkest_band"):
        mask.cloud_mask(cube=cube, darkest_band="blue")
    # By default the shortest wavelength there is the one compared.
    xr.testing.assert_identical(mask.cloud_mask(cube=cube), mask.cloud_mask(cube=cube, darkest_band="red"))
    assert mask.cloud_mask(cube=cube, params=MaskParams(temporal_check=False))["clear"].any()
    with pytest.raises(ConfigError, match="keep_attrs"):
        mask.cloud_mask(cube=cube.assign(state=cube["state"].drop_attrs()), darkest_band="red")
    with pytest.raises(ConfigError, match="state"):
        mask.cloud_mask(cube=cube.drop_vars("state"))


def test_codes_survive_reflectance() -> None:
    codes = np.arange(1, 65535, dtype=np.uint16)
    reflectance = (codes.astype(np.float32) - np.float32(1000)) * np.float32(1e-4)
    assert np.array_equal(mask.reflectance_to_codes(reflectance), codes)
    odd = np.array([np.nan, -0.15, 7.0], np.float32)
    assert mask.reflectance_to_codes(odd).tolist() == [0, 1, 65534]


# --- plug-ins ---


def test_absent_packages_say_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("omnicloudmask", "s2cloudless"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"pip install cloudgate\[{name}\]"):
            mask.mask_model(name)
    with pytest.raises(ConfigError, match="omnicloudmask and s2cloudless"):
        mask.mask_model("fmask")


def test_omnicloudmask_through_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library stands aside; what is tested is band order, class meaning, nodata and the errors."""
    seen = {}

    def predict_from_array(array: NDArray, **options: object) -> NDArray:
        seen.update(options, array=array)
        return (np.arange(array[0].size).reshape(1, *array.shape[1:]) % 4).astype(np.uint8)

    package = types.SimpleNamespace(predict_from_array=predict_from_array)
    monkeypatch.setitem(sys.modules, "omnicloudmask", package)
    detect = mask.mask_model("omnicloudmask", device="cpu")
    refl = np.random.default_rng(0).random((4, 40, 40)).astype(np.float32)
    refl[2, 0, 1] = np.nan
    state = detect(refl, ("blue", "green", "red", "nir"))
    assert np.array_equal(seen["array"][0][1:], refl[2][1:])  # red first
    assert np.array_equal(seen["array"][2][1:], refl[3][1:])
    assert (seen["array"][:, 0, 1] == 0).all()
    assert seen["inference_device"] == "cpu"
    assert state[0, :4].tolist() == [CLEAR, NODATA, CLOUD, SHADOW]
    with pytest.raises(ConfigError, match=r"\['nir'\] are not among"):
        detect(refl, ("blue", "green", "red", "swir16"))
    with pytest.raises(ConfigError, match="at least 32 px"):
        detect(refl[:, :20], ("blue", "green", "red", "nir"))

    def offline(array: NDArray, **options: object) -> NDArray:
        raise ConnectionError("no route to host")

    package.predict_from_array = offline
    with pytest.raises(ConfigError, match=r"no route to host.*weights_dir"):
        detect(refl, ("blue", "green", "red", "nir"))


def test_s2cloudless_needs_level_1c(monkeypatch: pytest.MonkeyPatch) -> None:
    class Detector:
        def __init__(self, **options: object) -> None:
            assert options["all_bands"] is False

        def get_cloud_masks(self, data: NDArray) -> NDArray:
            assert data.shape == (1, 5, 6, 10)
            return (data[..., 7] > 0.5).astype(np.int8)

    monkeypatch.setitem(sys.modules, "s2cloudless", types.SimpleNamespace(S2PixelCloudDetector=Detector))
    detect = mask.mask_model("s2cloudless")
    bands = ("coastal", "blue", "red", "rededge1", "nir", "nir08", "nir09", "cirrus", "swir16", "swir22")
    refl = np.zeros((10, 5, 6), np.float32)
    refl[7, 2] = 0.9
    refl[0, 4, 4] = np.nan
    state = detect(refl, bands)
    assert (state[2] == CLOUD).all()
    assert state[4, 4] == NODATA
    assert (np.delete(state, (2, 4), axis=0) == CLEAR).all()
    with pytest.raises(ConfigError, match="Level-1C only"):
        detect(refl[:4], ("blue", "red", "nir", "swir16"))
