"""Beyond its edge a mask says nothing: real rasters of two tiles of one pass, whatever 0 means in them."""

from dataclasses import replace

import catalog_samples
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from pipeline.block import compose_block
from pipeline.codes import fuse_states
from pipeline.config import Method
from pipeline.grid import Grid
from pipeline.items import Asset, Item, group_acquisitions
from pipeline.looks import LookStream
from pipeline.mask import CLEAR, CLOUD, NODATA, MaskParams
from pipeline.mask_reading import read_state
from pipeline.normalise import normalise
from pipeline.profiles import Auth, MaskRule, load_profile
from pipeline.read_pool import ReadPool
from pipeline.reader import mask_lattice
from pipeline.recipe import Recipe

HLS = load_profile("hls").model_copy(update={"auth": Auth(), "gdal": {}})
GRID = Grid("EPSG:32633", 30.0, (0.0, 0.0), -166667, 10000, 60, 110)
LEFT = {"west": 300000.0, "east": 301500.0}  # the tiles overlap by ten columns
CLOUDY = slice(20, 40)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Two tiles of one HLS pass; a cloud of 20 x 20 px in the eastern one, beyond the western one's edge."""
    folder, items = tmp_path_factory.mktemp("tiles"), []
    for name, left in LEFT.items():
        fmask = np.zeros((60, 60), np.uint8)  # 0 is clear there
        if name == "east":
            fmask[CLOUDY, CLOUDY] = 2
        blue = np.where(fmask == 2, 8000, 500).astype(np.int16)
        transform = from_origin(left, 5000010, 30, 30)
        for band, values, nodata in (("blue", blue, -9999), ("Fmask", fmask, 255)):
            with rasterio.open(
                folder / f"{name}_{band}.tif", "w", driver="GTiff", height=60, width=60, count=1, dtype=values.dtype,
                crs="EPSG:32633", nodata=nodata, transform=transform,
            ) as dataset:  # fmt: skip
                dataset.write(values, 1)
        raw = catalog_samples.hls()
        raw["id"] = raw["id"].replace("T33TWM", {"west": "T33TWM", "east": "T33TWN"}[name])
        item = normalise(raw, HLS, bands=["blue"])
        there = {"crs": "EPSG:32633", "shape": (60, 60), "transform": tuple(transform)[:6]}
        assets = {b: replace(a, href=str(folder / f"{name}_{b}.tif"), **there) for b, a in item.assets.items()}
        items.append(replace(item, assets=assets, offset_dn=0))
    return items


def _fmask(tiles: list[Item], name: str) -> Asset:
    return tiles[list(LEFT).index(name)].assets["Fmask"]


@pytest.mark.parametrize(
    "rule",
    [
        HLS.mask,  # says what means no data
        HLS.mask.model_copy(update={"nodata": None}),  # says nothing, nor do the items
        MaskRule(kind="classes", asset="Fmask", cloud=(2,)),
        MaskRule(kind="probability", asset="Fmask", threshold=1.5),
        MaskRule(kind="classes", asset="Fmask", cloud=(2,), nodata=-1),  # which uint8 cannot hold
    ],
)
def test_no_rule_finds_anything_beyond_the_edge(tiles: list[Item], rule: MaskRule) -> None:
    west, east = (read_state(_fmask(tiles, name), GRID, rule) for name in LEFT)
    assert (west[:, :60] == CLEAR).all()
    assert (west[:, 60:] == NODATA).all()
    assert (east[:, :50] == NODATA).all()
    assert (east[CLOUDY, 70:90] == CLOUD).all()
    fused = fuse_states([west, east])
    assert (fused[CLOUDY, 70:90] == CLOUD).all()
    assert (fused != NODATA).all()
    apart = GRID.window((0, 60), (80, 110))
    assert (read_state(_fmask(tiles, "west"), apart, rule) == NODATA).all()


def test_beyond_the_edge_in_another_crs(tiles: list[Item]) -> None:
    """On the neighbouring zone's lattice, too, where the tile lies askew."""
    rule = MaskRule(kind="classes", asset="Fmask", cloud=(2,))
    from pyproj import Transformer

    x, y = Transformer.from_crs("EPSG:32633", "EPSG:32632", always_xy=True).transform(302400, 4999100)
    grid = Grid("EPSG:32632", 30.0, (0.0, 0.0), -int(y // 30) - 60, int(x // 30) - 60, 120, 120)
    state = read_state(_fmask(tiles, "east"), grid, rule)
    assert 0.9 * 3600 < (state != NODATA).sum() < 1.1 * 3600  # the tile, and not all of the grid
    assert 0.8 * 400 < (state == CLOUD).sum() < 1.2 * 400
    assert (state[[0, -1]] == NODATA).all()


@pytest.mark.parametrize(("cols", "cut"), [((0, 110), 64), ((0, 110), 128), ((64, 110), 64), ((0, 110), 16)])
def test_a_cloud_beside_another_tile_stays_a_cloud_however_tasks_are_cut(
    tiles: list[Item], cols: tuple[int, int], cut: int
) -> None:
    passes = group_acquisitions(tiles, 15.0)
    assert [len(one.items) for one in passes] == [2]
    factor, phase = mask_lattice([item.assets["Fmask"] for item in tiles], GRID)
    recipe = Recipe(
        grid=GRID, bands=("blue",), acquisitions=tuple(passes), rule=HLS.mask,
        params=MaskParams(open_m=0, temporal_check=False), factor=factor, phase=phase, method=Method(name="median"),
        target=passes[0].day, rejected=(False,), anchors=None, profile=HLS, inside=None, cut_px=(60, cut),
        origin=(GRID.row0, GRID.col0), threads=1,
    )  # fmt: skip
    made = np.zeros((60, 110), np.uint16)
    with ReadPool(threads=1, profile=HLS) as pool:
        for look in LookStream(recipe, (0, 60), cols, pool):
            block = compose_block(
                codes=look.codes, clear=look.clear, days=recipe.days, method=recipe.method, target=recipe.target,
                anchors=None, row0=look.fine.row0, col0=look.fine.col0,
            )  # fmt: skip
            made[slice(*look.rows), slice(*look.cols)] = block.codes[0]
    assert set(np.unique(made[:, cols[0] : cols[1]])) == {0, 1500}  # ground, or nothing: never the cloud's 9000
    assert (made[CLOUDY, 70:90] == 0).all()
    assert (made[:, 64:67] == 1500).all()  # growth ends at 100 m
