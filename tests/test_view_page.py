"""The map page in headless Chromium: it draws, answers keys, fingers and clicks, and says nothing to the console."""

import io
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import view_stores
from PIL import Image

from pipeline.view_server import MapServer

READY = "html[data-map=ready]"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def stores(view_pair):
    view_stores.chromium()
    return view_pair


@pytest.fixture(scope="module")
def site(stores):
    """A server of both stores and a browser."""
    with MapServer([stores["months"], stores["linear"]], 0) as server, view_stores.browser() as chromium:
        yield server.url, chromium


@contextmanager
def _page(site, *, size=DESKTOP, address="", expected=(), **more):
    """An open page; at its end the console must hold nothing but ``expected``, and no other host was asked."""
    url, chromium = site
    page = chromium.new_page(viewport=size, **more)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url + address)
    page.wait_for_selector(READY)
    yield page
    page.close()
    assert [text for text in said if not any(word in text for word in expected)] == []
    assert [address for address in asked if not address.startswith((url, "data:"))] == []


def _seen(page) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)


def _choose(page, layer: str) -> None:
    page.click(f".chips label:has(input[value='{layer}'])")
    page.wait_for_timeout(150)
    page.wait_for_selector(READY)


def _looks_read(page) -> None:
    page.wait_for_selector("#pixel-said:empty", state="attached")


def test_the_first_picture_shows_the_mosaic_and_layers_have_legends(site):
    with _page(site) as page:
        assert page.title() == "months: cloudgate"
        first = page.evaluate("() => performance.getEntriesByName('first-picture')[0].startTime")
        assert 0 < first < 20_000
        before = _seen(page)
        assert before[150:650, 450:1100].std(axis=(0, 1)).min() > 8  # a picture, not a plain ground
        for layer, legend in (
            ("index:ndvi", "NDVI"),
            ("source_date", "2021-0"),
            ("clear_count", "clear looks"),
            ("flags", "composed in time"),
        ):
            _choose(page, layer)
            assert legend in page.inner_text("#legend")
            after = _seen(page)
            assert np.abs(after - before)[150:650, 450:1100].mean() > 10
            before = after
        assert page.locator("input[name=layer]:checked").get_attribute("value") == "flags"


def test_time_moves_and_stays_in_the_address(site):
    with _page(site) as page:
        assert page.inner_text("#time-name") == "2021-08-04"
        page.keyboard.press("[")
        page.wait_for_selector("#time[aria-valuetext='2021-07-16']")
        _choose(page, "index:ndwi")
        page.wait_for_timeout(400)
        address = page.url.partition("#")[2]
        assert "p=1" in address
    with _page(site, address=f"#{address}") as page:
        assert page.inner_text("#time-name") == "2021-07-16"
        assert page.locator("input[value='index:ndwi']").is_checked()


def test_a_click_tells_the_pixel_through_time(site):
    with _page(site, address="#p=1") as page:
        page.mouse.click(700, 400)
        _looks_read(page)
        assert re.fullmatch(r"Row \d+, column \d+", page.inner_text("#pixel-title"))
        chart = page.locator("#chart > svg").get_attribute("aria-label")
        assert re.match(r"NDVI through time: \d+ looks, \d+ of them clear", chart)
        assert page.locator("#chart rect").count() >= 1  # the share each date has in the mean
        page.select_option("#quantity", "red")
        assert page.locator("#chart > svg").get_attribute("aria-label").startswith("red through time")
        page.click("#pixel summary")
        rows = page.locator("#numbers tbody tr").all_inner_texts()
        assert any("decay" in row for row in rows)
        assert any("linear" in row for row in rows)  # the other store's composite at the same place
        assert any("clear" in row for row in rows)
        page.click("#pixel-close")
        assert page.locator("#pixel").is_hidden()
        page.mouse.click(1200, 600)
        assert page.inner_text("#place-said") == "That place lies outside the mosaic."


def test_every_hand_on_the_page_works_from_the_keyboard(site):
    with _page(site) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.id") == "map"
        assert page.locator("#cross").is_visible()
        at = page.inner_text("#where")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#where") != at
        scale = page.inner_text("#scale-name"), page.locator("#scale-bar").bounding_box()["width"]
        page.keyboard.press("+")
        page.wait_for_timeout(600)
        assert (page.inner_text("#scale-name"), page.locator("#scale-bar").bounding_box()["width"]) != scale
        page.keyboard.press("Enter")
        _looks_read(page)
        page.keyboard.press("Escape")
        assert page.locator("#pixel").is_hidden()
        page.select_option("#compare", "before")
        page.wait_for_selector("#swipe:not([hidden])")
        page.focus("#swipe")
        place = int(page.get_attribute("#swipe", "aria-valuenow"))
        page.keyboard.press("ArrowRight")
        assert int(page.get_attribute("#swipe", "aria-valuenow")) > place
        reached = set()
        page.focus("#map")
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.name"))
        wanted = {"swipe", "store", "time", "play", "layer", "cut", "gamma", "compare", "place", "zoom-in", "zoom-out"}
        assert wanted <= reached


def test_swipe_shows_two_pictures_and_their_names(site):
    with _page(site, address="#p=1") as page:
        alone = _seen(page)
        page.select_option("#compare", "before")
        page.wait_for_selector("#left-name:has-text('before: 2021-07')")
        page.wait_for_timeout(300)
        page.wait_for_selector(READY)
        both = _seen(page)
        middle = round(page.locator("#swipe").bounding_box()["x"]) + 22
        change = np.abs(both - alone)[200:360]
        assert change[:, middle - 200 : middle - 40].mean() > 5
        assert change[:, middle + 40 : middle + 200].mean() < 1
        page.select_option("#compare", "store:1")
        page.wait_for_selector("#left-name:has-text('linear (linear.zarr)')")


def test_a_place_is_found_by_its_degrees_or_refused_in_words(site):
    with _page(site, expected=("404",)) as page:
        page.fill("#place", "15.03, 46.05")
        page.keyboard.press("Enter")
        _looks_read(page)
        assert page.inner_text("#pixel-place").startswith("15.030")
        page.fill("#place", "20, 10")
        page.keyboard.press("Enter")
        page.wait_for_selector("#place-said:has-text('outside the mosaic, which reaches from 15.')")
        page.fill("#place", "here")
        page.keyboard.press("Enter")
        page.wait_for_selector("#place-said:has-text('Write longitude and latitude')")


def test_a_phone_reads_and_taps_it(site):
    with _page(site, size=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.locator("#settings").is_hidden()
        page.tap("#fold")
        assert page.locator("#settings").is_visible()
        box = page.locator(".chips label").first.bounding_box()
        assert box["height"] >= 32
        page.tap("#fold")
        page.touchscreen.tap(195, 300)
        _looks_read(page)
        panel = page.locator("#pixel").bounding_box()
        assert panel["x"] == 0
        assert panel["width"] == PHONE["width"]
        assert page.locator("#panel").is_hidden()


def test_sources_out_of_reach_are_said_on_the_page(site, stores, small, tmp_path):
    path = tmp_path / "apart.zarr"
    shutil.copytree(stores["linear"], path)
    shutil.copytree(f"{stores['linear']}.run", f"{path}.run")
    frozen = tmp_path / "apart.zarr.run" / "items.json"
    frozen.write_text(frozen.read_text().replace(str(small.folder), str(tmp_path / "gone")))
    wanted = ("502", "ERR_CONNECTION")
    with MapServer([path], 0) as server, _page((server.url, site[1]), expected=wanted) as page:
        page.mouse.click(700, 400)
        page.wait_for_selector("#pixel-said:has-text('The sources cannot be reached')")
        assert "Only the composites are shown." in page.inner_text("#pixel-said")
        assert page.locator("#chart > svg path").count() > 1
        server.close()
        page.click(".chips label:has(input[value='flags'])")
        page.wait_for_selector("#message:has-text('does not answer any more')")
