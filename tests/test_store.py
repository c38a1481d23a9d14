"""The store: whole shards only, hidden until published, readable by plain xarray with the exact numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import rioxarray  # noqa: F401  (the .rio accessor)
import xarray as xr
from zarr.storage import MemoryStore

from pipeline import store
from pipeline.bands import to_codes, to_reflectance
from pipeline.errors import StoreError, StoreMismatchError
from pipeline.grid import Grid
from pipeline.layers import layer_specs
from pipeline.metadata import Times, put_levels
from pipeline.periods import Period

GRID = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49998, 100, 70, 32)
BANDS = ("red", "blue")
PERIODS = (Period(0, 19000, 19009, 19000, 19005), Period(1, 19010, 19019, 19000, 19015))


def _layers(rng, shape, sigma: bool = True):
    layers = {band: rng.integers(0, 65535, shape).astype(np.uint16) for band in BANDS}
    layers |= {
        "clear_count": rng.integers(0, 9, shape).astype(np.uint16),
        "source_date": np.where(layers["red"] > 0, 19005, 0).astype(np.int32),
        "flags": np.full(shape, 4, np.uint16),
    }
    if sigma:
        layers |= {f"uncertainty_{band}": rng.integers(0, 65536, shape).astype(np.uint16) for band in BANDS}
    return layers


def _write(path: Path, slot: int = 0, seed: int = 0):
    whole = _layers(np.random.default_rng(seed), GRID.shape)
    for i, j in GRID.shards():
        rows, cols = (i * 32, min(i * 32 + 32, 100)), (j * 32, min(j * 32 + 32, 70))
        part = {name: values[slice(*rows), slice(*cols)] for name, values in whole.items()}
        store.write_region(path, GRID, slot, rows, cols, part)
    return whole


def _publish(path: Path, published, attrs=None):
    store.publish(
        path,
        GRID,
        BANDS,
        uncertainty=True,
        schedule=PERIODS[: len(published)],
        published=published,
        attrs=attrs or {"cloudgate": {"layout": 1}},
    )


def test_plain_xarray_reads_the_numbers_dates_and_place(tmp_path):
    path = tmp_path / "m.zarr"
    whole = _write(path)
    _publish(path, [True])
    plain = xr.open_zarr(str(path), group="0", decode_coords="all")
    expected = np.where(whole["red"] == 0, np.nan, whole["red"] * 1e-4 - 0.1)
    np.testing.assert_allclose(plain["red"].values[0], expected, atol=1e-12)
    assert plain["red"].dtype == np.float64
    assert str(plain["time"].values[0])[:10] == "2022-01-13"
    assert np.isnat(plain["source_date"].values[0][whole["red"] == 0]).all()
    np.testing.assert_array_equal(plain["flags"].values[0], whole["flags"])
    np.testing.assert_array_equal(np.isnan(plain["uncertainty_blue"].values[0]), whole["uncertainty_blue"] == 65535)
    assert plain.rio.crs.to_epsg() == 32633
    assert tuple(plain.rio.transform())[:6] == tuple(GRID.transform)[:6]
    assert plain.attrs["proj:code"] == "EPSG:32633"
    assert plain["time_bnds"].values.astype("datetime64[D]").astype(int).tolist() == [[19000, 19010]]


def test_open_mosaic_gives_float32_in_the_order_of_the_bands(tmp_path):
    path = tmp_path / "m.zarr"
    whole = _write(path)
    _publish(path, [True])
    mosaic = store.open_mosaic(store=path)
    assert list(mosaic.data_vars)[:2] == list(BANDS)
    assert mosaic["red"].dtype == np.float32
    np.testing.assert_array_equal(mosaic["red"].values[0], to_reflectance(whole["red"]))
    assert mosaic["source_date"].dtype.kind == "M"


def test_a_period_is_hidden_until_published_and_earlier_ones_keep_their_bytes(tmp_path):
    path = tmp_path / "m.zarr"
    _write(path, slot=0)
    with pytest.raises(StoreMismatchError, match="no finished mosaic"):
        store.open_mosaic(store=path)
    _publish(path, [True])
    before = {p: p.read_bytes() for p in path.rglob("c/0/*/*")}
    second = _write(path, slot=1, seed=1)
    assert store.open_mosaic(store=path).sizes["time"] == 1
    _publish(path, [True, True])
    assert store.open_mosaic(store=path).sizes["time"] == 2
    np.testing.assert_array_equal(store.open_mosaic(store=path)["blue"].values[1], to_reflectance(second["blue"]))
    assert before == {p: p.read_bytes() for p in path.rglob("c/0/*/*") if p in before}


def test_an_empty_slot_is_left_out(tmp_path):
    path = tmp_path / "m.zarr"
    _write(path, slot=1)
    _publish(path, [False, True])
    mosaic = store.open_mosaic(store=path)
    assert mosaic["time"].values.astype("datetime64[D]").astype(int).tolist() == [19015]


def test_a_region_that_cuts_a_shard_is_refused(tmp_path):
    for rows, cols in [((0, 16), (0, 32)), ((16, 32), (0, 32)), ((0, 32), (32, 69))]:
        with pytest.raises(ValueError, match="cuts a shard"):
            store.write_region(tmp_path / "m.zarr", GRID, 0, rows, cols, {"red": np.zeros((16, 32), np.uint16)})


def test_codes_round_clip_and_keep_negative_reflectance():
    values = np.array([-0.15, -0.1, -0.09995, 0.0, 0.12345, 7.0, np.nan])
    codes = to_codes(values)
    assert codes.tolist() == [1, 1, 1, 1000, 2234, 65534, 0]
    back = to_reflectance(codes)
    assert back[3] == 0
    assert np.isnan(back[-1])
    every = np.arange(1, 65535, dtype=np.uint16)
    np.testing.assert_array_equal(to_codes(to_reflectance(every)), every)


def test_another_program_s_data_are_not_touched(tmp_path):
    path = tmp_path / "m.zarr"
    xr.Dataset({"a": ("x", np.arange(3))}).to_zarr(path, group="0", zarr_format=3, consolidated=False)
    for work in (store.remove, store.read_attrs):
        with pytest.raises(StoreMismatchError, match="another program"):
            work(path)
    (tmp_path / "file.zarr").write_text("mine")
    with pytest.raises(StoreMismatchError, match="no cloudgate store"):
        store.remove(tmp_path / "file.zarr")
    assert (tmp_path / "file.zarr").read_text() == "mine"


def test_a_store_that_cannot_be_written_is_a_kind_error(tmp_path):
    (tmp_path / "m.zarr").mkdir()
    (tmp_path / "m.zarr" / "0").write_text("a file where a folder must be")
    with pytest.raises(StoreError, match="goes on after the last finished shard"):
        store.write_region(tmp_path / "m.zarr", GRID, 0, (0, 32), (0, 32), {"red": np.ones((32, 32), np.uint16)})


class _Watched(MemoryStore):
    """Remembers what was taken away, and which coordinates were written."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.written = [], []

    async def delete(self, key):
        self.taken.append(key)
        await super().delete(key)

    async def delete_dir(self, prefix):
        self.taken.append(prefix)
        await super().delete_dir(prefix)

    async def set(self, key, value, byte_range=None):
        self.written.append(key)
        await super().set(key, value)


def test_a_period_is_added_without_a_moment_in_which_a_coordinate_is_gone():
    """Who reads what was published before may look at any moment."""
    place, specs = _Watched(), layer_specs(BANDS, uncertainty=False)
    for count in (1, 2):
        place.taken.clear()
        place.written.clear()
        days = np.array([period.target for period in PERIODS[:count]], np.int64)
        bounds = np.array([[period.start, period.end + 1] for period in PERIODS[:count]], np.int64)
        times = Times(days, bounds, np.ones(count, np.uint8))
        put_levels(place, GRID.levels(1), specs, times, {"cloudgate": {"layout": 1}}, consolidated=True)
        seen = xr.open_zarr(MemoryStore(place._store_dict, read_only=True), group="1", decode_cf=False)
        assert seen["time"].values.tolist() == days.tolist()
        assert seen["time_bnds"].values.tolist() == bounds.tolist()
    assert place.taken == []
    assert not [key for key in place.written if "/x/" in key or "/y/" in key]


def test_metadata_hold_no_blanks(tmp_path):
    _write(tmp_path / "m.zarr")
    _publish(tmp_path / "m.zarr", [True])
    texts = [file.read_text() for file in (tmp_path / "m.zarr").rglob("zarr.json")]
    assert len(texts) > 10
    for text in texts:
        assert text == json.dumps(json.loads(text), separators=(",", ":"))
