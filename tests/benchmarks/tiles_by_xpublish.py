"""Does xpublish-tiles open a store of ours without our code, and pick overviews by zoom? It is too heavy for the tests.

    uv run --with xpublish-tiles python tests/benchmarks/tiles_by_xpublish.py STORE.zarr [VARIABLE]

Prints, for each zoom, the bytes of a tile in the middle of the mosaic and the share of its pixels that are drawn.
"""

import io
import sys
import time

import numpy as np
import xarray as xr
import xpublish
from morecantile import tms
from PIL import Image
from pyproj import Transformer
from starlette.testclient import TestClient
from xpublish_tiles.xpublish.tiles import TilesPlugin


def main(path: str, variable: str = "red") -> None:
    tree = xr.open_datatree(path, engine="zarr", chunks={}, decode_coords="all")
    west, south, east, north = tree.attrs["spatial:bbox"]
    to_lonlat = Transformer.from_crs(tree.attrs["proj:code"], "EPSG:4326", always_xy=True)
    lon, lat = to_lonlat.transform((west + east) / 2, (south + north) / 2)
    day = str(tree["0"]["time"].values[-1])[:10]
    tree.attrs["_xpublish_id"] = path
    client = TestClient(xpublish.SingleDatasetRest(tree, plugins={"tiles": TilesPlugin()}).app)
    for zoom in range(9, 15):
        tile = tms.get("WebMercatorQuad").tile(lon, lat, zoom)
        asked = {"variables": variable, "style": "raster/viridis", "time": day, "colorscalerange": "0,0.4", "f": "png"}
        began = time.perf_counter()
        answer = client.get(
            f"/tiles/WebMercatorQuad/{zoom}/{tile.y}/{tile.x}", params={**asked, "width": 256, "height": 256}
        )
        seconds = time.perf_counter() - began
        answer.raise_for_status()
        drawn = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))[..., 3] > 0
        print(f"zoom {zoom}: {len(answer.content)} bytes, {100 * drawn.mean():.0f} % drawn, {seconds:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
