"""The lazy way: nothing is computed, and what comes out in the end are the job's bytes."""

from dataclasses import replace
from datetime import UTC, date, datetime

import dask
import numpy as np
import pandas as pd
import pytest
from small_region import BANDS, recipe

from pipeline import cloud_mask, compose, open_cube
from pipeline.bands import to_reflectance
from pipeline.errors import ConfigError
from pipeline.grid import Grid
from pipeline.layers import FLAGS
from pipeline.lazy import _day
from pipeline.request import mask_params
from pipeline.tasks import compose_window

MARGIN_PX = 400
"""Around the part: more than the method's and the mask's reach together."""


def _cube(request, seen, grid: Grid):
    found = replace(request.found, items=seen.apply(request.found.items))
    return open_cube(found=found, grid=grid, bands=BANDS, chunk_px=512)


@pytest.mark.parametrize("method", ["median", "linear", "kalman", "regression"])
def test_lazy_and_job_agree_byte_for_byte(small, method):
    job = small.job(method={"name": method}, area={"bbox": small.bbox((170, 300), (120, 250))})
    request, seen, asked = recipe(job)
    block = compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    cube = _cube(request, seen, asked.grid.padded(MARGIN_PX))
    clouds = cloud_mask(cube=cube, params=mask_params(job, request.found.mask.kind), rejected=asked.rejected)
    made = compose(
        cube=cube, clouds=clouds, method=method, target=str(job.target), anchors=seen.anchors, trim_px=MARGIN_PX
    )
    assert (made.sizes["y"], made.sizes["x"]) == asked.grid.shape
    with dask.config.set(scheduler="threads", num_workers=2):
        made = made.compute()
    np.testing.assert_array_equal(made["x"], asked.grid.x)
    np.testing.assert_array_equal(made["y"], asked.grid.y)
    for number, band in enumerate(BANDS):
        np.testing.assert_array_equal(made[band].values, to_reflectance(block.codes[number]), err_msg=band)
    np.testing.assert_array_equal(made["clear_count"].values, block.clear_count)
    np.testing.assert_array_equal(made["flags"].values, block.flags)
    dates = made["source_date"].values.astype("datetime64[D]")
    np.testing.assert_array_equal(np.where(np.isnat(dates), 0, dates.astype(int)), block.source_date)
    if block.sigma is not None:
        for number, band in enumerate(BANDS):
            sigma = np.where(block.sigma[number] == 65535, np.nan, block.sigma[number] / np.float32(10_000))
            np.testing.assert_allclose(made[f"uncertainty_{band}"].values, sigma, rtol=1e-6)
    assert ((block.flags & FLAGS["no_data"]) == 0).mean() > 0.9


def test_a_cube_narrower_than_the_halo_is_composed(small):
    request, seen, asked = recipe(small.job(area={"bbox": small.bbox((200, 260), (100, 160))}))
    cube = _cube(request, seen, asked.grid)
    made = compose(cube=cube, clouds=cloud_mask(cube=cube), method="regression", anchors=None).compute()
    assert max(made.sizes["y"], made.sizes["x"]) < 100
    assert np.isfinite(made["red"].values).mean() > 0.9


def test_nothing_is_computed_and_nothing_is_read(small, monkeypatch):
    request, seen, asked = recipe(small.job(method={"name": "regression"}))

    def computes(*_args, **_more):
        pytest.fail("a lazy call computed something")

    monkeypatch.setattr("rasterio.open", computes)
    with dask.config.set(scheduler=computes):
        cube = _cube(request, seen, asked.grid)
        clouds = cloud_mask(cube=cube)
        for method in ("median", "linear", "kalman", "regression"):
            made = compose(
                cube=cube, clouds=clouds, method=method, anchors=seen.anchors if method != "median" else None
            )
            assert all(dask.is_dask_collection(layer) for layer in made.data_vars.values())
            assert {"clear_count", "source_date", "flags", *BANDS} <= set(made.data_vars)
            assert made["red"].dtype == np.float32
            assert made.sizes == {"y": asked.grid.height, "x": asked.grid.width}


def test_a_target_may_be_a_date_of_any_kind():
    days = np.array([19584], np.int32)
    stamps = (datetime(2023, 8, 15, 22, tzinfo=UTC), pd.Timestamp("2023-08-15T10:00"))
    for target in ("2023-08-15", date(2023, 8, 15), *stamps):
        assert _day(target, days) == 19584
    for wrong in ("15.8.2023", 19584):
        with pytest.raises(ConfigError, match="is no date"):
            _day(wrong, days)
