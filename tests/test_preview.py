"""The preview: what it shows is what the store holds, of the period that was asked for."""

import io

import numpy as np
import pytest
import zarr
from PIL import Image
from typer.testing import CliRunner

from pipeline import store
from pipeline.bands import to_codes
from pipeline.cli import app
from pipeline.errors import ConfigError, StoreError, StoreMismatchError
from pipeline.grid import Grid
from pipeline.periods import Period
from pipeline.preview import FLAG_COLOURS, NO_DATA, preview, ramp, series, stretch
from pipeline.records import RunFolder

GRID = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49998, 64, 96, 64)
PERIODS = (Period(0, 19000, 19009, 19000, 19005), Period(1, 19010, 19019, 19010, 19015))
BANDS = ("red", "green", "blue")


@pytest.fixture
def mosaic(tmp_path):
    """Two periods, left third no data, middle observed, right composed; the picture before is red, then blue."""
    path = tmp_path / "m.zarr"
    about = {}
    for period in PERIODS:
        flags = np.repeat(np.array([1, 2, 4], np.uint16), 32)[None].repeat(64, axis=0)
        ground = np.where(flags == 1, 0, np.random.default_rng(period.slot).integers(1500, 3000, GRID.shape))
        for col in (0, 64):
            part = (slice(None), slice(col, min(col + 64, 96)))
            layers = {band: ground[part].astype(np.uint16) for band in BANDS}
            layers |= {
                "clear_count": np.where(flags[part] == 1, 0, 3).astype(np.uint16),
                "source_date": np.where(flags[part] == 1, 0, period.target).astype(np.int32),
                "flags": flags[part],
            }
            store.write_region(path, GRID, period.slot, (0, 64), (col, min(col + 64, 96)), layers)
        about[str(period.slot)] = {"target": str(np.datetime64(period.target, "D")), "method": {"name": "median"}}
        colour = np.full((3, 64, 96), 0.02)
        colour[0 if period.slot == 0 else 2] = 0.5
        buffer = io.BytesIO()
        np.savez_compressed(buffer, codes=to_codes(colour), name=np.array("a day"))
        run = RunFolder(path)
        run.write_bytes(buffer.getvalue(), run.period(period.slot), "before.npz")
    attrs = {"title": "test", "cloudgate": {"layout": 1, "periods": about}}
    store.publish(path, GRID, BANDS, uncertainty=False, schedule=PERIODS, published=[True, True], attrs=attrs)
    return path


def _count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_the_panels_hold_the_store_s_numbers(mosaic, tmp_path):
    picture = np.asarray(Image.open(preview(store=mosaic, out=tmp_path / "p.png")))
    observed, composed = (_count(picture, FLAG_COLOURS[n]) for n in ("observed_at_anchor", "composed_in_time"))
    assert observed > 20_000  # a third of a panel of 460 px
    assert abs(observed - composed) < 0.02 * observed
    assert _count(picture, NO_DATA) > 3 * 0.9 * observed  # after, source date, flags


def test_the_picture_before_is_of_the_period_asked_for(mosaic, tmp_path):
    reds = []
    for period in (0, 1, -1):
        picture = np.asarray(Image.open(preview(store=mosaic, out=tmp_path / "p.png", period=period))).astype(int)
        reds.append(int(((picture[..., 0] - picture[..., 2]) > 150).sum()))
    assert reds[0] > 2 * reds[1]  # the noise of the ground holds reds of its own
    assert reds[2] == reds[1]


def test_a_period_or_store_that_is_not_there(mosaic, tmp_path):
    with pytest.raises(ConfigError, match="2 finished periods"):
        preview(store=mosaic, out=tmp_path / "p.png", period=2)
    with pytest.raises(StoreMismatchError, match="no finished mosaic"):
        preview(store=tmp_path / "none.zarr", out=tmp_path / "p.png")


def test_missing_values_are_grey_and_the_ramp_rises():
    assert tuple(ramp(np.array([[np.nan]]), 0, 1)[0, 0]) == NO_DATA
    steps = ramp(np.linspace(0, 1, 20)[None], 0, 1)[0].astype(int).sum(axis=1)
    assert (np.diff(steps) > 0).all()
    image = np.full((3, 2, 2), 0.2, np.float32)
    image[:, 0, 0] = np.nan
    assert tuple(stretch(image, image)[0, 0]) == NO_DATA


def test_a_day_names_a_period_and_overviews_are_read_where_they_are(mosaic, tmp_path):
    by_day, by_number = (preview(store=mosaic, out=tmp_path / f"{p}.png", period=p) for p in ("2022-01-13", 0))
    assert by_day.read_bytes() == by_number.read_bytes()
    with pytest.raises(ConfigError, match="2022-01-13, 2022-01-23"):
        preview(store=mosaic, out=tmp_path / "p.png", period="2020-01-01")


def test_all_periods_become_an_animation_or_a_sheet_stretched_alike(mosaic, tmp_path):
    with Image.open(series(store=mosaic, out=tmp_path / "a.png")) as moving:
        assert (moving.format, moving.n_frames) == ("PNG", 2)
        frames = []
        for number in range(2):
            moving.seek(number)
            frames.append(np.asarray(moving.convert("RGB")).copy())
    assert frames[0].shape == frames[1].shape
    assert (frames[0] != frames[1]).any()
    still = np.asarray(Image.open(series(store=mosaic, out=tmp_path / "s.png", sheet=True)))
    assert still.shape[1] > 1.8 * frames[0].shape[1]


def test_a_store_of_another_program_and_a_place_that_cannot_be_written(mosaic, tmp_path):
    zarr.create_group(tmp_path / "other.zarr", path="0", attributes={"mine": 1})
    with pytest.raises(StoreMismatchError, match="another program"):
        preview(store=tmp_path / "other.zarr", out=tmp_path / "p.png")
    (tmp_path / "half.zarr" / "0" / "red").mkdir(parents=True)
    with pytest.raises(StoreMismatchError, match="no finished mosaic"):
        series(store=tmp_path / "half.zarr", out=tmp_path / "p.png")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        preview(store=mosaic, out=tmp_path / "file" / "p.png")


def test_each_kind_of_picture_has_a_name_of_its_own(mosaic):
    for option, name in ((), "m.preview.png"), (("--sheet",), "m.sheet.png"), (("--animate",), "m.animation.png"):
        done = CliRunner().invoke(app, ["preview", str(mosaic), *option])
        assert (done.exit_code, done.output.strip()) == (0, str(mosaic.with_name(name)))
    assert sorted(p.name for p in mosaic.parent.glob("*.png")) == ["m.animation.png", "m.preview.png", "m.sheet.png"]
