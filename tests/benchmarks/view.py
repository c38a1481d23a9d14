"""How quick the map page is on a large mosaic. Run: uv run python tests/benchmarks/view.py [--keep DIR]

In comes nothing, out come printed figures: the time to the first picture in headless Chromium (aim: under 2 s on a
10,000 x 10,000 px mosaic with overviews), and how long tiles take over HTTP, by level, from a server that has read
nothing yet and again from one that has (aim: 95 of 100 under 150 ms). Six tiles are asked for at a time, as a browser
does. ``--keep`` leaves the store (about 1.7 GB at 10,000 px) and uses it again.
"""

import argparse
import http.client
import json
import math
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).parents[1]))

import view_stores

from pipeline import store
from pipeline.grid import Grid
from pipeline.overviews import coarsen_shard, level_shards
from pipeline.periods import Period
from pipeline.view_server import MapServer

BANDS = ("blue", "green", "red", "nir")
AT_A_TIME = 6
LAYERS = ("rgb:red,green,blue", "index:ndvi", "source_date", "flags")


def write(path: Path, size: int) -> None:
    """A mosaic of smooth fields with noise, shard by shard, and its overviews."""
    grid = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 49998, size, size, 2048)
    draw = np.random.default_rng(0)
    side = grid.shard_px
    ground = gaussian_filter(draw.normal(size=(side, side)), 6, mode="wrap")
    ground = ground / ground.std() * 250 + 2200
    for i, j in grid.shards():
        rows, cols = ((n * side, min((n + 1) * side, size)) for n in (i, j))
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        base = np.roll(ground, (i * 311, j * 173), (0, 1))[: shape[0], : shape[1]]
        layers = {
            b: (base * f + draw.normal(0, 25, shape)).astype(np.uint16)
            for b, f in zip(BANDS, (0.7, 0.8, 0.9, 1.6), strict=True)
        }
        cells = (base // 180).astype(np.int32)
        layers |= {
            "clear_count": cells.astype(np.uint16),
            "source_date": 19000 + 3 * cells,
            "flags": np.where(cells % 2, 2, 4).astype(np.uint16),
        }
        store.write_region(path, grid, 0, rows, cols, layers)
    levels = 0
    for level, shards in level_shards(grid):
        levels = level
        for shard in shards:
            coarsen_shard(path, grid, BANDS, False, 0, level, shard)
    about = {"start": "2022-01-08", "end": "2022-01-17", "target": "2022-01-13", "method": {"name": "median"}}
    attrs = {"title": "benchmark", "cloudgate": {"layout": 1, "grid": grid.to_dict(), "periods": {"0": about}}}
    period = (Period(0, 19000, 19009, 19000, 19005),)
    store.publish(path, grid, BANDS, uncertainty=False, schedule=period, published=[True], attrs=attrs, levels=levels)


def first_picture(path: Path, times: int = 5) -> list[float]:
    """Seconds from the request for the page to the last tile of the first picture; each from a fresh server."""
    out = []
    with view_stores.browser() as chromium:
        for _ in range(times):
            with MapServer([path], 0) as server:
                page = chromium.new_page(viewport={"width": 1440, "height": 900})
                page.goto(server.url)
                page.wait_for_selector("html[data-map=ready]")
                marked = "() => performance.getEntriesByName('first-picture')[0].startTime"
                out.append(page.evaluate(marked) / 1000)
                page.close()
    return out


class Asker:
    """Asks one server over kept connections, as a browser does."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.open: dict[int, http.client.HTTPConnection] = {}

    def ask(self, address: str) -> tuple[float, bytes]:
        connection = self.open.setdefault(threading.get_ident(), http.client.HTTPConnection("127.0.0.1", self.port))
        began = time.perf_counter()
        connection.request("GET", address)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return time.perf_counter() - began, body


def tiles(path: Path, per_level: int = 60) -> None:
    """Print how long tiles take, a level at a time, where neighbours follow each other as on a screen."""
    draw = np.random.default_rng(1)
    with MapServer([path], 0) as server, ThreadPoolExecutor(AT_A_TIME) as pool:
        asker = Asker(server.port)
        facts = json.loads(asker.ask("/api/mosaics")[1])["stores"][0]
        addresses = []
        for layer in LAYERS:
            told = json.loads(asker.ask(f"/api/layer/0/0?layer={layer}")[1])
            query = f"layer={layer}&range={','.join(map(str, told['range']))}"
            for level in range(facts["levels"]):
                rows, cols = (math.ceil(math.ceil(n / 2**level) / 256) for n in facts["shape"])
                for _ in range(max(1, min(per_level // 20, rows * cols // 20))):  # some screens of 5 x 4 tiles
                    top, left = (int(draw.integers(max(1, n - k + 1))) for n, k in ((rows, 4), (cols, 5)))
                    places = [(r, c) for r in range(top, min(top + 4, rows)) for c in range(left, min(left + 5, cols))]
                    addresses += [(level, layer, f"/tile/0/0/{level}/{r}/{c}.png?{query}") for r, c in places]
        for state in ("first asked", "asked again"):
            took = [seconds for seconds, _ in pool.map(lambda one: asker.ask(one[2]), addresses)]
            print(f"{len(took)} tiles {state}: {spread(took)}")
            for layer in LAYERS:
                part = [t for t, (_, one, _) in zip(took, addresses, strict=True) if one == layer]
                print(f"   {layer:20s} {spread(part)}")


def spread(seconds: list[float]) -> str:
    """Median, 95th percentile and maximum in ms."""
    middle, high, most = (1000 * v for v in (*np.percentile(seconds, [50, 95]), max(seconds)))
    return f"median {middle:.0f} ms, p95 {high:.0f} ms, most {most:.0f} ms"


def main() -> None:
    """Write the store, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-px", type=int, default=10_000)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = (given.keep or Path(folder)) / f"large-{given.size_px}.zarr"
        if not (path / "zarr.json").exists():
            began = time.perf_counter()
            write(path, given.size_px)
            print(f"wrote {given.size_px} x {given.size_px} px in {time.perf_counter() - began:.0f} s")
        began = time.perf_counter()
        MapServer([path], 0).close()
        print(f"store opened in {time.perf_counter() - began:.2f} s")
        shown = first_picture(path)
        print(f"first picture in {np.median(shown):.2f} s (of {', '.join(f'{s:.2f}' for s in shown)})")
        tiles(path)


if __name__ == "__main__":
    main()
