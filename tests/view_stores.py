"""Small stores for the tests of the map page, answers of its server, and a headless browser."""

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_region import SmallRegion

from pipeline.mosaic import build

ROWS, COLS = (150, 450), (150, 430)


def make(small: SmallRegion, folder: Path, cluster: dict[str, Any]) -> dict[str, Path]:
    """Two stores of one area: ``months`` (decay, three periods) and ``linear`` (one period)."""
    area = {"bbox": small.bbox(ROWS, COLS)}
    grid = {"crs": "EPSG:32633", "shard_px": 256}
    months, linear = folder / "months.zarr", folder / "linear.zarr"
    time = {"start": "2021-06-11", "end": "2021-08-08", "every": "month"}
    common = {"area": area, "grid": grid, "cluster": cluster}
    build(job=small.job(months, name="months", method={"name": "decay"}, time=time, target="middle", **common))
    build(job=small.job(linear, name="linear", method={"name": "linear"}, **common))
    return {"months": months, "linear": linear}


def get(url: str) -> tuple[int, bytes]:
    """Status and body of an address, without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def chromium() -> str:
    """The browser's program, or a skip that says what is missing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CLOUDGATE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("there is no Chromium: .ci/chromium.sh installs it on Debian, or CLOUDGATE_CHROMIUM names one")
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()
