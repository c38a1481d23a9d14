"""The map page without a browser: tiles, legends and pixels say what the store holds; faults come as sentences."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_region import BANDS
from typer.testing import CliRunner
from view_stores import get

import pipeline
from pipeline import models, view_pixel, view_tiles
from pipeline.bands import to_reflectance
from pipeline.cli import app
from pipeline.config import Method
from pipeline.errors import ConfigError, RunError, StoreMismatchError, WeightsError
from pipeline.models import weights
from pipeline.mosaic import build
from pipeline.store import read_attrs
from pipeline.view_server import MapServer
from pipeline.view_store import ViewStore

RGB = "rgb:red,green,blue"


@pytest.fixture(scope="module")
def stores(view_pair):
    return view_pair


@pytest.fixture(scope="module")
def months(stores):
    return ViewStore(stores["months"])


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# -- tiles ---------------------------------------------------------------------------------------------------------


def test_a_tile_holds_the_store_s_numbers_and_nothing_beyond_the_edge(months):
    shown = view_tiles.parse(RGB, months)
    span = [0.0, 0.2, 0.0, 0.2, 0.0, 0.2]
    pixels = _pixels(view_tiles.tile(months, 1, (0, 1, 1), shown, span))
    height, width = months.shape(0)
    codes = months.window("red", 1, 0, 1, 1, 256)[: height - 256, : width - 256]
    wanted = np.clip(to_reflectance(codes) / 0.2, 0, 1) * 255
    seen = codes != 0
    assert seen.mean() > 0.9
    np.testing.assert_allclose(pixels[: height - 256, : width - 256, 0][seen], wanted[seen], atol=1)
    assert (pixels[: height - 256, : width - 256, 3] > 0).mean() > 0.9
    assert not pixels[height - 256 :].any()
    assert not pixels[:, width - 256 :].any()


def test_levels_that_are_not_stored_are_made_of_the_next_finer_one(months):
    bare = ViewStore(months.path)
    bare._levels = {0: bare._levels[0]}
    fine = np.asarray(bare._levels[0]["flags"][0])
    coarse = bare.chunk("flags", 0, 1, 0, 0)
    height, width = bare.shape(1)
    np.testing.assert_array_equal(coarse[:height, :width], fine[::2, ::2])
    assert not coarse[height:].any()


def test_what_was_read_is_kept_up_to_a_limit(months):
    store = ViewStore(months.path)
    store._kept.limit = 2 * 512 * 512 * 2
    for band in store.bands:
        store.chunk(band, 0, 0, 0, 0)
    assert len(store._kept.held) == 2
    assert store._kept.size == store._kept.limit


def test_an_index_is_the_normalised_difference_and_is_unknown_without_data():
    codes = [np.array([[4000, 1500, 0, 1003]], np.uint16), np.array([[2000, 2500, 2000, 1002]], np.uint16)]
    index = view_tiles.index_of(*codes)[0]
    np.testing.assert_allclose(index[:2], [(3000 - 1000) / 4000, (500 - 1500) / 2000])
    assert np.isnan(index[2:]).all()


@pytest.mark.parametrize("layer", [RGB, "index:ndvi", "source_date", "clear_count", "flags"])
def test_every_layer_paints_where_there_is_data_and_has_a_legend(months, layer):
    shown = view_tiles.parse(layer, months)
    told = view_tiles.describe(months, 1, shown, cut=1.0)
    pixels = _pixels(view_tiles.tile(months, 1, (0, 0, 0), shown, told["range"]))
    assert (pixels[..., 3] > 0).mean() > 0.9
    assert told["legend"]["kind"] in ("bands", "ramp", "classes")
    if layer == "flags":
        assert {e["label"]: e["percent"] for e in told["legend"]["entries"]}["composed in time"] > 80
    if layer == "clear_count":
        ticks = [view_tiles._ramp_legend(months, 1, shown, 0.0, top)["ticks"] for top in (3.0, 7.0)]
        assert ticks == [["0", "1", "2", "3"], ["0", "3.5", "7"]]  # as far apart as they stand under the ramp
    if layer == "source_date":
        days = [entry["label"] for entry in told["legend"]["entries"]]
        assert "2021-06-11" <= min(days) <= max(days) <= "2021-08-08"


def test_colours_stay_while_time_moves_and_a_cut_narrows_the_stretch(months):
    shown = view_tiles.parse(RGB, months)
    spans = [view_tiles.describe(months, slot, shown, cut=1.0)["range"] for slot in (0, 1, 2)]
    assert spans[0] == spans[1] == spans[2]
    low, high = view_tiles.describe(months, 0, shown, cut=5.0)["range"][:2]
    assert spans[0][0] < low < high < spans[0][1]


def test_a_layer_tile_or_stretch_that_is_not_there(months):
    for text in ("rgb:red,green", "index:nbr", "uncertainty:red", "nonsense"):
        with pytest.raises(ConfigError, match="layer"):
            view_tiles.parse(text, months)
    shown = view_tiles.parse(RGB, months)
    with pytest.raises(ConfigError, match="outside the mosaic"):
        view_tiles.tile(months, 0, (0, 9, 9), shown, [0.0] * 6)
    with pytest.raises(ConfigError, match="takes 6 numbers, got 2"):
        view_tiles.tile(months, 0, (0, 0, 0), shown, [0.0, 1.0])


def test_the_picture_before_lies_on_the_mosaic(months):
    told = view_tiles.before_of(months, 1)
    assert told["label"].startswith("2021-07")
    assert told["bands"] == ["red", "green", "blue"]
    left, bottom, right, top = told["bounds"]
    assert (left, bottom, right, top) == months.grid.bounds
    assert _pixels(view_tiles.before_png(months, 1, [0.0, 0.2] * 3, 1.0)).shape[:2] == months.grid.shape


# -- one pixel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["months", "linear"])
def test_looks_are_clear_exactly_where_the_job_counted_them(stores, name):
    store = ViewStore(stores[name])
    draw = np.random.default_rng(3)
    for period in store.periods:
        for _ in range(12):
            row, col = int(draw.integers(store.grid.height)), int(draw.integers(store.grid.width))
            looks = view_pixel.looks_at(store, period.slot, row, col)["looks"]
            made = next(c for c in view_pixel.composites(store, row, col) if c["slot"] == period.slot)
            assert sum(look["state"] == "clear" for look in looks) == made["clear_count"]
            assert {look["state"] for look in looks} <= {"clear", "cloud", "shadow", "changed", "rejected"}


@pytest.mark.parametrize(("name", "slot"), [("months", 1), ("linear", 0)])
def test_shares_are_the_weights_of_the_composite(stores, months, name, slot):
    store = ViewStore(stores[name])
    several = 0
    for row, col in ((20, 30), (100, 200), (250, 90), (150, 20), (60, 260)):
        looks = view_pixel.looks_at(store, slot, row, col)["looks"]
        made = next(c for c in view_pixel.composites(store, row, col) if c["slot"] == slot)
        clear = [look for look in looks if look["share"]]
        if not clear:
            continue
        several += len(clear) > 1
        assert sum(look["share"] for look in clear) == pytest.approx(1, abs=1e-3)
        mixed = sum(look["share"] * look["values"]["red"] for look in clear)
        assert mixed == pytest.approx(made["values"]["red"], abs=2e-4)
    assert several
    recipe, _ = view_pixel.recipe_at(months, 1)
    clear = np.ones(len(recipe.days), bool)
    for name in ("median", "medoid", "regression"):
        assert view_pixel.shares_of(recipe, Method(name=name), clear, (20, 30)) is None
    assert view_pixel.shares_of(recipe, Method(name="mean"), ~clear, (20, 30)) is None


def _mixed(looks, shares, band):
    return sum(share * look["values"][band] for look in looks for share in [shares.get(look["id"], 0)] if share)


def test_shares_of_a_gate_are_those_that_made_the_mosaic(small, tmp_path, cluster_fields):
    torch.manual_seed(0)
    config = {
        "name": "paper",
        "unet": False,
        "weights": "shared",
        "bands": BANDS,
        "patch_px": 64,
        "stride_px": 32,
    }
    weights.save(models.build(config).eval(), tmp_path / "gate.safetensors", card={})
    fields = {"area": {"bbox": small.bbox((150, 214), (150, 214))}, "grid": {"crs": "EPSG:32633", "shard_px": 64}}
    job = small.job(
        tmp_path / "gated.zarr",
        method={"name": "timegate", "weights": str(tmp_path / "gate.safetensors")},
        cluster=cluster_fields,
        **fields,
    )
    build(job=job)
    store = ViewStore(tmp_path / "gated.zarr")
    gaps = 0
    for row, col in ((5, 5), (40, 20), (20, 50), (60, 33)):
        told = view_pixel.looks_at(store, 0, row, col)
        assert told["gated"]
        shares = view_pixel.gated_shares(store, 0, row, col)["shares"]
        made = view_pixel.composites(store, row, col)[0]
        gaps += "composed in time" in made["flags"]
        assert sum(shares.values()) == pytest.approx(1, abs=2e-3)
        for band in BANDS:  # without U-Net and prior the mosaic is the sum of the looks' shares, and nothing else
            assert _mixed(told["looks"], shares, band) == pytest.approx(made["values"][band], abs=5e-4)
    assert gaps
    weights.save(models.build(config).eval(), tmp_path / "gate.safetensors", card={"other": True})
    said = view_pixel.gated_shares(store, 0, 5, 5)
    assert said["said"] == "The weights that made this mosaic have changed since."
    (tmp_path / "gate.safetensors").unlink()
    assert view_pixel.looks_at(store, 0, 5, 5)["looks"]  # looks need no model
    with pytest.raises(WeightsError, match="no such file"):
        view_pixel.gated_shares(store, 0, 5, 5)


def test_a_place_outside_is_refused_with_the_extent(months):
    left, bottom, _, _ = months.grid.bounds
    assert view_pixel.pixel_at(months, left + 5, bottom + 5) == (months.grid.height - 1, 0)
    with pytest.raises(ConfigError, match="outside the mosaic, which reaches from"):
        view_pixel.pixel_at(months, left - 5, bottom + 5)


@pytest.fixture
def apart(stores, small, tmp_path):
    """A copy of a store whose scenes are gone."""
    path = tmp_path / "apart.zarr"
    shutil.copytree(stores["linear"], path)
    shutil.copytree(f"{stores['linear']}.run", f"{path}.run")
    frozen = Path(f"{path}.run") / "items.json"
    frozen.write_text(frozen.read_text().replace(str(small.folder), str(tmp_path / "gone")))
    return path


def test_sources_out_of_reach_are_said_and_the_composites_stay(apart):
    store = ViewStore(apart)
    with pytest.raises(RunError, match=r"sources cannot be reached: cannot read .*gone"):
        view_pixel.looks_at(store, 0, 10, 10)
    assert view_pixel.composites(store, 10, 10)[0]["values"]["red"] is not None


def test_a_store_without_its_run_shows_its_composites(stores, tmp_path):
    shutil.copytree(stores["linear"], tmp_path / "m.zarr")
    store = ViewStore(tmp_path / "m.zarr")
    assert "m.zarr.run" in store.notes[-1]
    assert view_tiles.before_of(store, 0) is None
    with pytest.raises(ConfigError, match="only it knows the scenes"):
        view_pixel.looks_at(store, 0, 1, 1)


# -- stores that cannot be shown -----------------------------------------------------------------------------------


def test_stores_that_cannot_be_shown_say_what_is_there_instead(stores, small, tmp_path):
    half = tmp_path / "half.zarr"
    shutil.copytree(f"{stores['linear']}.run", f"{half}.run")
    cases = [
        (tmp_path / "none.zarr", "there is nothing at"),
        (half, "no period of .* is finished yet; see how far it is with `cloudgate status"),
        (small.folder, "was not written by cloudgate"),
    ]
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(stores["linear"], damaged)
    (damaged / "0" / "zarr.json").write_text("{")
    cases.append((damaged, "is damaged"))
    for path, said in cases:
        with pytest.raises(StoreMismatchError, match=said):
            ViewStore(path)
        done = CliRunner().invoke(app, ["view", str(path), "--no-browser"])
        assert done.exit_code == 2
        assert "Traceback" not in done.output
    with pytest.raises(StoreMismatchError, match="period: 7 is not finished"):
        ViewStore(stores["linear"]).period(7)


def test_stores_of_two_crs_are_not_mixed(stores, tmp_path):
    other = tmp_path / "other.zarr"
    shutil.copytree(stores["linear"], other)
    for place in (other / "zarr.json", other / "0" / "zarr.json"):
        place.write_text(place.read_text().replace("EPSG:32633", "EPSG:32634"))
    assert read_attrs(other)["cloudgate"]["grid"]["crs"] == "EPSG:32634"
    with pytest.raises(ConfigError, match="one map shows one CRS"):
        MapServer([stores["linear"], other], 0)


# -- the server ----------------------------------------------------------------------------------------------------


def test_the_server_answers_and_words_its_refusals(stores, apart):
    with MapServer([stores["months"], apart], 0) as server:
        facts = json.loads(get(f"{server.url}api/mosaics")[1])
        assert [len(store["periods"]) for store in facts["stores"]] == [3, 1]
        store = facts["stores"][0]
        assert store["combos"]["True colour"] == ["red", "green", "blue"]
        assert list(store["indices"]) == ["ndvi", "ndwi"]
        left, _, _, top = store["bounds"]
        status, page = get(server.url)
        assert status == 200
        assert b"http" not in page.replace(b"http-equiv", b"")  # nothing from elsewhere
        span = ",".join(map(str, json.loads(get(f"{server.url}api/layer/0/1?layer={RGB}")[1])["range"]))
        status, png = get(f"{server.url}tile/0/1/0/0/0.png?layer={RGB}&range={span}")
        assert (status, png[:4]) == (200, b"\x89PNG")
        kept = json.loads(get(f"{server.url}api/before/0/1")[1])["before"]
        assert kept == view_tiles.before_of(ViewStore(stores["months"]), 1)
        status, said = get(f"{server.url}api/pixel/0?x={left + 5}&y={top - 5}")
        assert json.loads(said)["composites"][0]["target"] == "2021-06-20"
        for address, code, words in (
            (f"tile/0/1/0/99/0.png?layer={RGB}&range={span}", 404, "outside the mosaic"),
            (f"tile/0/9/0/0/0.png?layer={RGB}&range={span}", 404, "finished are 0, 1, 2"),
            (f"tile/0/1/0/0/0.png?layer={RGB}&range=a", 404, "numbers with commas"),
            ("tile/7/1/0/0/0.png?layer=flags", 404, "no number 7"),
            ("api/pixel/0?x=0&y=0", 404, "outside the mosaic"),
            ("api/pixel/0?x=abc&y=0", 404, "a number is needed, got 'abc'"),
            ("api/place?lon=0&lat=0", 404, "outside the mosaic, which reaches from 15."),
            (f"api/looks/1/0?x={left + 5}&y={top - 5}", 502, "sources cannot be reached"),
            ("api/layer/0/1?layer=flags&cut=80", 404, "below 50"),
        ):
            status, said = get(server.url + address)
            assert status == code, address
            assert words in json.loads(said)["error"]
        assert get(f"{server.url}../view.py")[0] in (403, 404)


def test_a_reload_shows_what_was_written_since(stores, tmp_path):
    path = tmp_path / "grows.zarr"
    shutil.copytree(stores["months"], path)
    with MapServer([path], 0) as server:
        first = json.loads(get(f"{server.url}api/mosaics")[1])["stores"][0]
        for place in (path / "zarr.json", path / "0" / "zarr.json"):
            place.write_text(place.read_text().replace('"title":"months"', '"title":"other"'))
        os.utime(path / "zarr.json", ns=(1, 1))
        again = json.loads(get(f"{server.url}api/mosaics")[1])["stores"][0]
    assert (first["title"], again["title"]) == ("months", "other")
    assert first["token"] != again["token"]


def test_a_busy_port_is_named_and_the_usual_one_gives_way(stores):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["view", str(stores["linear"]), "--port", str(port), "--no-browser"])
        assert done.exit_code == 2
        assert f"port: {port} cannot be used on 127.0.0.1" in " ".join(done.output.split())
    with pytest.raises(ConfigError, match="99999 is none"):
        MapServer([stores["linear"]], 99999)
    with MapServer([stores["linear"]]) as one, MapServer([stores["linear"]]) as two:
        assert one.port != two.port


def test_the_command_serves_until_interrupted(stores):
    command = [sys.executable, "-m", "pipeline.cli", "view", str(stores["linear"]), "--port", "0", "--at"]
    bare = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    process = subprocess.Popen([*command, "15.03,46.05"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=bare)
    with process:
        said = process.stdout.readline().decode()
        assert "there is no browser here, so open that address in one" in said
        url = said.split("shown at ")[1].split(";")[0]
        assert "#c=" in url
        assert get(url.partition("#")[0])[0] == 200
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0
    assert complaints == b""
    away = CliRunner().invoke(app, ["view", str(stores["linear"]), "--at", "20,46", "--no-browser"])
    assert away.exit_code == 2
    assert "outside the mosaic" in away.output


# -- in a notebook -------------------------------------------------------------------------------------------------


def test_explore_shows_the_page_and_gives_its_values(stores, monkeypatch):
    shown = pipeline.explore(store=stores["months"])
    try:
        assert f'<iframe src="{shown.url}"' in shown._repr_html_()
        assert get(shown.url)[0] == 200
        picture = np.asarray(shown.picture("index:ndvi", period=1))
        assert picture.shape == (*ViewStore(stores["months"]).grid.shape, 4)
        table = shown.series(lon=15.03, lat=46.05, period=1)
        assert list(table.columns) == ["state", "blue", "green", "red", "nir", "share"]
        assert table.index.is_monotonic_increasing
        assert table["share"].sum() == pytest.approx(1, abs=1e-3)
        with pytest.raises(ConfigError, match="3 finished periods"):
            shown.picture(period=3)
        with pytest.raises(ConfigError, match="outside the mosaic"):
            shown.series(lon=0, lat=0)
    finally:
        shown.close()
    with pytest.raises(urllib.error.URLError):
        get(shown.url)
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    shown = pipeline.explore(store=stores["months"])
    assert shown.url.startswith("/user/me/proxy/")
    shown.close()
