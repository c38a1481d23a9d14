"""The map page in headless Chromium: it draws, answers keys, fingers and clicks, and says nothing to the console."""

import io
import json
import re
import shutil
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import view_stores
import zarr
from PIL import Image
from playwright.sync_api import expect

from pipeline import store
from pipeline.grid import Grid
from pipeline.items import day_text
from pipeline.periods import Period
from pipeline.records import RunFolder
from pipeline.view_server import MapServer

READY = "html[data-map=ready]"
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)
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
    page.set_default_timeout(PATIENCE_MS)
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
    page.wait_for_selector(READY)  # the click itself takes the mark away, until the picture it asks for is there


def _looks_read(page) -> None:
    """Waits until a pixel was asked for and all its looks are there."""
    expect(page.locator("#pixel")).to_have_attribute("data-looks", "read")


def test_the_first_picture_shows_the_mosaic_and_layers_have_legends(site):
    with _page(site) as page:
        assert page.title() == "months: cloudgate"
        assert page.evaluate("() => performance.getEntriesByName('first-picture').length") == 1
        before = _seen(page)
        assert before[150:650, 450:1100].std(axis=(0, 1)).min() > 8  # a picture, not a plain ground
        for layer, legend in (
            ("index:ndvi", "NDVI"),
            ("source_date", "2021-0"),
            ("clear_count", "clear looks"),
            ("flags", "composed in time"),
        ):
            _choose(page, layer)
            expect(page.locator("#legend")).to_contain_text(legend)
            after = _seen(page)
            assert np.abs(after - before)[150:650, 450:1100].mean() > 10
            before = after
        expect(page.locator("input[name=layer]:checked")).to_have_value("flags")


def test_time_moves_and_stays_in_the_address(site):
    with _page(site) as page:
        expect(page.locator("#time-name")).to_have_text("2021-08-04")
        page.keyboard.press("[")
        expect(page.locator("#time")).to_have_attribute("aria-valuetext", "2021-07-16")
        _choose(page, "index:ndwi")
        page.wait_for_function("() => /p=1&l=index%3Andwi/.test(location.hash)")
        address = page.evaluate("() => location.hash")
    with _page(site, address=address) as page:
        expect(page.locator("#time-name")).to_have_text("2021-07-16")
        expect(page.locator("input[value='index:ndwi']")).to_be_checked()


def test_a_click_tells_the_pixel_through_time(site):
    with _page(site, address="#p=1") as page:
        page.mouse.click(700, 400)
        _looks_read(page)
        expect(page.locator("#pixel-title")).to_have_text(re.compile(r"^Row \d+, column \d+$"))
        chart = page.locator("#chart > svg")
        expect(chart).to_have_attribute("aria-label", re.compile(r"^NDVI through time: \d+ looks, \d+ of them clear"))
        assert page.locator("#chart rect").count() >= 1  # the share each date has in the mean
        page.select_option("#quantity", "red")
        expect(chart).to_have_attribute("aria-label", re.compile("^red through time"))
        page.click("#pixel summary")
        expect(page.locator("#numbers")).to_be_visible()
        rows = page.locator("#numbers tbody tr").all_inner_texts()
        assert any("decay" in row for row in rows)
        assert any("linear" in row for row in rows)  # the other store's composite at the same place
        assert any("clear" in row for row in rows)
        page.click("#pixel-close")
        expect(page.locator("#pixel")).to_be_hidden()
        page.mouse.click(1200, 600)
        expect(page.locator("#place-said")).to_have_text("That place lies outside the mosaic.")


def test_every_hand_on_the_page_works_from_the_keyboard(site):
    with _page(site) as page:
        page.keyboard.press("Tab")
        expect(page.locator("#map")).to_be_focused()
        expect(page.locator("#cross")).to_be_visible()
        at = page.inner_text("#where")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#where")).not_to_have_text(at)
        scale = "document.getElementById('scale').innerHTML"  # its length and its name
        before = page.evaluate(f"() => {scale}")
        page.keyboard.press("+")
        page.wait_for_function(f"was => {scale} !== was", arg=before)
        page.keyboard.press("Enter")
        _looks_read(page)
        page.keyboard.press("Escape")
        expect(page.locator("#pixel")).to_be_hidden()
        page.select_option("#compare", "before")
        expect(page.locator("#swipe")).to_be_visible()
        page.focus("#swipe")
        place = int(page.get_attribute("#swipe", "aria-valuenow"))
        page.keyboard.press("ArrowRight")
        page.wait_for_function("was => +document.getElementById('swipe').ariaValueNow > was", arg=place)
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
        expect(page.locator("#left-name")).to_contain_text("before: 2021-07")
        page.wait_for_selector(READY)
        both = _seen(page)
        middle = round(page.locator("#swipe").bounding_box()["x"]) + 22
        change = np.abs(both - alone)[200:360]
        assert change[:, middle - 200 : middle - 40].mean() > 5
        assert change[:, middle + 40 : middle + 200].mean() < 1
        page.select_option("#compare", "store:1")
        expect(page.locator("#left-name")).to_contain_text("linear (linear.zarr)")


def _stretch(url: str, store: int, slot: int, layer: str) -> list[float]:
    """The stretch that a layer has by itself."""
    return json.loads(view_stores.get(f"{url}api/layer/{store}/{slot}?layer={layer}&cut=1")[1])["range"]


def _stretches(addresses: list[str]) -> set[tuple[float, ...]]:
    """The stretches that pictures were asked for with."""
    return {tuple(map(float, parse_qs(urlsplit(one).query)["range"][0].split(","))) for one in addresses}


@pytest.fixture
def earlier(stores, tmp_path):
    """The store ``linear``, but all its looks are forty days older."""
    path = tmp_path / "linear.zarr"
    shutil.copytree(stores["linear"], path)
    root = zarr.open_group(path)
    for level in root.group_keys():
        days = root[f"{level}/source_date"]
        days[:] = np.where(days[:] == 0, 0, days[:] - 40)
    return path


def _addresses(page, side, *, of):
    """Compare with another side; the addresses with ``of`` in them that the page asks for until its map is whole."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with page.expect_request(lambda request: of in request.url):  # the map is whole before it has begun, too
        page.select_option("#compare", side)
    page.wait_for_selector(READY)
    return [address for address in asked if of in address]


@pytest.mark.parametrize("layer", ["rgb:red,green,blue", "index:ndvi", "source_date"])
def test_both_sides_of_a_comparison_have_the_stretch_that_the_legend_tells(site, stores, earlier, layer):
    with (
        MapServer([stores["months"], earlier], 0) as server,
        _page((server.url, site[1]), address=f"#l={layer}") as page,
    ):
        mine, theirs = _stretch(server.url, 0, 1, layer), _stretch(server.url, 1, 0, layer)
        assert mine != theirs
        left = _addresses(page, "store:1", of="/tile/1/0/")
        expect(page.locator("#left-name")).to_contain_text("linear (linear.zarr)")
        assert len(left) >= 1
        assert _stretches(left) == {tuple(mine)}
        if layer == "source_date":
            ticks = page.locator("#legend .ticks span").all_inner_texts()
            assert ticks == [day_text(int(day)) for day in mine]


def _infrared(path):
    """A store without blue, whose run kept a picture before in the bands nearest to true colour: swir22, nir, green."""
    grid = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49998, 64, 64, 64)
    draw, bands = np.random.default_rng(0), ("green", "red", "nir", "swir22")
    layers = {band: draw.integers(1500 + 700 * i, 2200 + 900 * i, (64, 64)) for i, band in enumerate(bands)}
    layers |= {"clear_count": np.full((64, 64), 3), "flags": np.full((64, 64), 4)}
    layers = {name: values.astype(np.uint16) for name, values in layers.items()}
    layers["source_date"] = np.full((64, 64), 19005, np.int32)
    store.write_region(path, grid, 0, (0, 64), (0, 64), layers)
    about = {"target": "2022-01-13", "method": {"name": "median"}}
    attrs = {"title": "infrared", "cloudgate": {"layout": 1, "grid": grid.to_dict(), "periods": {"0": about}}}
    period = (Period(0, 19000, 19009, 19000, 19005),)
    store.publish(path, grid, bands, uncertainty=False, schedule=period, published=[True], attrs=attrs)
    run, kept = RunFolder(path), io.BytesIO()
    np.savez_compressed(kept, codes=np.stack([layers[b] for b in ("swir22", "nir", "green")]), name=np.array("a day"))
    run.write_bytes(kept.getvalue(), run.period(0), "before.npz")
    run.write({}, "request.json")


def test_before_is_shown_and_named_in_the_bands_it_was_kept_in(site, tmp_path):
    _infrared(tmp_path / "infrared.zarr")
    with MapServer([tmp_path / "infrared.zarr"], 0) as server, _page((server.url, site[1])) as page:
        expect(page.locator("input[name=layer]:checked")).to_have_value("rgb:nir,red,green")
        kept = _addresses(page, "before", of="/before/0/0.png")
        expect(page.locator("#left-name")).to_have_text("before: a day (swir22, nir, green)")
        assert _stretches(kept) == {tuple(_stretch(server.url, 0, 0, "rgb:swir22,nir,green"))}


def test_what_cannot_be_read_is_told_asked_for_again_and_no_other_date_stands_in(site):
    broken = "**/tile/0/0/**"
    part = slice(400, 640), slice(500, 1000)  # below the message
    with _page(site, address="#p=1", expected=("502",)) as page:
        assert _seen(page)[part].std(axis=(0, 1)).min() > 8
        page.route(broken, lambda route: route.fulfill(status=502, body="{}"))
        page.keyboard.press("[")
        expect(page.locator("#message")).to_have_text(re.compile("^Some of the picture cannot be read"))
        page.wait_for_selector(READY)
        assert _seen(page)[part].std(axis=(0, 1)).max() < 4
        page.unroute(broken)
        page.keyboard.press("]")
        expect(page.locator("#message")).to_be_hidden()
        page.keyboard.press("[")
        expect(page.locator("#time-name")).to_have_text("2021-06-20")
        page.wait_for_selector(READY)
        expect(page.locator("#message")).to_be_hidden()
        assert _seen(page)[part].std(axis=(0, 1)).min() > 8


def test_a_place_is_found_by_its_degrees_or_refused_in_words(site):
    with _page(site, expected=("404",)) as page:
        for asked, answer, said in (
            ("15.03, 46.05", "#pixel-place", re.compile(r"^15\.030")),
            ("20, 10", "#place-said", re.compile(r"outside the mosaic, which reaches from 15\.")),
            ("here", "#place-said", re.compile("Write longitude and latitude")),
        ):
            page.fill("#place", asked)
            page.keyboard.press("Enter")
            expect(page.locator(answer)).to_have_text(said)
        _looks_read(page)


def test_a_phone_reads_and_taps_it(site):
    with _page(site, size=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
        expect(page.locator("#settings")).to_be_hidden()
        page.tap("#fold")
        expect(page.locator("#settings")).to_be_visible()
        box = page.locator(".chips label").first.bounding_box()
        assert box["height"] >= 32
        page.tap("#fold")
        expect(page.locator("#settings")).to_be_hidden()
        page.touchscreen.tap(195, 300)
        _looks_read(page)
        panel = page.locator("#pixel").bounding_box()
        assert panel["x"] == 0
        assert panel["width"] == PHONE["width"]
        expect(page.locator("#panel")).to_be_hidden()


def test_sources_out_of_reach_are_said_on_the_page(site, stores, small, tmp_path):
    path = tmp_path / "apart.zarr"
    shutil.copytree(stores["linear"], path)
    shutil.copytree(f"{stores['linear']}.run", f"{path}.run")
    frozen = tmp_path / "apart.zarr.run" / "items.json"
    frozen.write_text(frozen.read_text().replace(str(small.folder), str(tmp_path / "gone")))
    wanted = ("502", "ERR_CONNECTION")
    with MapServer([path], 0) as server, _page((server.url, site[1]), expected=wanted) as page:
        page.mouse.click(700, 400)
        said = re.compile(r"^The sources cannot be reached.*Only the composites are shown\.$")
        expect(page.locator("#pixel-said")).to_have_text(said)
        assert page.locator("#chart > svg path").count() > 1
        server.close()
        page.click(".chips label:has(input[value='flags'])")
        expect(page.locator("#message")).to_contain_text("does not answer any more")
