"""The lazy cube: both loaders against direct reads, on scenes made here and on real ones where they are at hand."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - registers .rio
from numpy.typing import NDArray
from pyproj import Transformer
from shapely.geometry import box

from pipeline import reader, signing
from pipeline.bands import to_reflectance
from pipeline.codes import CLEAR, CLOUD, NODATA, SHADOW, dn_to_codes, fuse_scenes
from pipeline.cube import open_cube
from pipeline.errors import ConfigError, ItemError, NoItemsError, ReadError
from pipeline.grid import Grid
from pipeline.items import Asset, Item, group_acquisitions
from pipeline.profiles import Auth, MaskRule, Profile

UTM = "EPSG:32633"
SCL = MaskRule(kind="scl", asset="scl", cloud=(8, 9, 10), shadow=(3,), nodata=0)
LAEA = "+proj=laea +lat_0=46 +lon_0=15 +x_0=0 +y_0=0 +datum=WGS84 +units=m"
LEFT, TOP = 500000.0, 5_100_000.0
GRID = Grid(UTM, 10.0, (0.0, 0.0), -510000 - 9, 50000 - 5, 201, 187)


def classify(values: NDArray, rule: MaskRule) -> NDArray[np.uint8]:
    """The rule, spelled out a second time so that these tests need no other step."""
    state = np.full(values.shape, CLEAR, np.uint8)
    state[np.isin(values, rule.cloud)] = CLOUD
    state[np.isin(values, rule.shadow)] = SHADOW
    state[(values == rule.nodata) | (values == 1)] = NODATA  # defective pixels are none, either
    return state


def write(path: Path, data: NDArray, *, size: float, left: float, top: float, crs: str = UTM) -> Asset:
    transform = rasterio.Affine(size, 0, left, 0, -size, top)
    with rasterio.open(
        path, "w", driver="COG", width=data.shape[1], height=data.shape[0], count=1, dtype=data.dtype, crs=crs,
        transform=transform, nodata=0, blocksize=128, compress="deflate",
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)
    return Asset(str(path), crs, data.shape, tuple(transform)[:6])


def scene(
    folder: Path, name: str, when: str, *, left: float = LEFT, top: float = TOP, crs: str = UTM, seed: int = 0,
    offset_dn: int = 0, px: int = 160,
) -> Item:  # fmt: skip
    """One scene: two bands of 10 m, one of 20 m and SCL of 20 m, with missing pixels and clouds."""
    rng = np.random.default_rng(seed)
    assets = {}
    for band, size in (("blue", 10), ("nir", 10), ("swir16", 20), ("scl", 20)):
        n = px * 10 // size
        rows, cols = np.mgrid[:n, :n]
        if band == "scl":
            data = rng.choice(np.array([3, 4, 5, 8, 9], np.uint8), (n // 4 + 1, n // 4 + 1)).repeat(4, 0).repeat(4, 1)
            data = data[:n, :n].copy()
            data[rows + cols < n // 6] = 0
        else:
            ground = 1500 + 40 * size * np.sin(rows / 9) * np.cos(cols / 7) + rng.normal(0, 60, (n, n))
            data = np.clip(ground, 1, None).astype(np.uint16)
            data[rows + cols < n // 5] = 0
            data[rng.random((n, n)) < 0.01] = 0
        assets[band] = write(folder / f"{name}_{band}.tif", data, size=size, left=left, top=top, crs=crs)
    return Item(
        id=name, datetime=when, collection="s2", platform="sentinel-2a", tile=None, orbit=79, datatake=None,
        baseline="05.09", boa_offset_applied=None, cloud_cover=None, created=None, bbox=(15, 45, 16, 46),
        geometry={}, assets=assets, offset_dn=offset_dn,
    )  # fmt: skip


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> list[Item]:
    """Two passes: one of two overlapping scenes, one of a single scene with the offset in its DN; and one far away."""
    folder = tmp_path_factory.mktemp("scenes")
    return [
        scene(folder, "b", "2023-08-15T10:00:09Z", left=LEFT + 600, top=TOP - 400, seed=2, px=120),
        scene(folder, "a", "2023-08-15T10:00:01Z", seed=1),
        scene(folder, "c", "2023-08-18T10:00:00Z", seed=3, offset_dn=-1000),
        scene(folder, "d", "2023-08-20T10:00:00Z", left=LEFT + 50_000, seed=4, px=40),
    ]


def direct(items: list[Item], grid: Grid, bands: list[str]) -> tuple[NDArray, NDArray]:
    """What plain reads and the shared fusion give: codes (T, B, h, w) and states (T, h, w)."""
    codes, states = [], []
    for one in group_acquisitions(items, 15.0):
        fused, state = fuse_scenes(
            [
                np.stack([
                    dn_to_codes(reader.read_window(item.assets[b], grid), item.assets[b], item.offset_dn)
                    for b in bands
                ])
                for item in one.items
            ],
            [classify(reader.read_window(item.assets["scl"], grid, kind="classes"), SCL) for item in one.items],
        )  # fmt: skip
        codes.append(fused)
        states.append(state)
    return np.stack(codes), np.stack(states)


@pytest.mark.parametrize("loader", ["stackstac", "odc"])
@pytest.mark.parametrize("chunk_px", [64, 1024])
def test_cube_equals_direct_reads(items, loader, chunk_px):
    bands = ["blue", "swir16", "nir"]
    cube = open_cube(items=items, grid=GRID, bands=bands, mask=SCL, loader=loader, chunk_px=chunk_px)
    codes, states = direct(items, GRID, bands)
    got = cube.compute(scheduler="threads", num_workers=2)
    assert got["reflectance"].dims == ("time", "band", "y", "x")
    assert got["reflectance"].dtype == np.float32
    assert got["reflectance"].shape == (3, 3, *GRID.shape)
    assert np.array_equal(got["reflectance"], to_reflectance(codes), equal_nan=True)
    assert np.array_equal(got["valid"], (codes > 0).all(axis=1))
    assert got["valid"].values[:2].mean() > 0.2
    assert not got["valid"].values[2].any()  # the far scene keeps its layer
    assert got["state"].dtype == np.uint8
    assert np.array_equal(got["state"], states)


def test_cube_says_where_it_lies(items):
    cube = open_cube(items=items, grid=GRID, bands=["B02"], mask=SCL)
    assert cube["acquisition"].values.tolist()[:2] == ["2023-08-15_sentinel-2a_R079", "2023-08-18_sentinel-2a_R079"]
    assert cube["time"].values[0] == np.datetime64("2023-08-15T10:00:01", "ns")
    assert cube["solar_day"].values.astype("datetime64[D]").astype(str).tolist()[1] == "2023-08-18"
    assert cube["orbit"].values.tolist() == [79, 79, 79]
    assert cube["band"].values.tolist() == ["blue"]
    assert cube["x"].values[0] == GRID.left + 5
    assert cube["y"].values[0] == GRID.top - 5
    assert (cube.attrs["row0"], cube.attrs["col0"]) == (GRID.row0, GRID.col0)
    assert cube.attrs["transform"] == list(GRID.transform)[:6]
    # 20 m mask pixels on a 10 m grid whose corner lies in the middle of one, in both directions
    assert cube["state"].attrs["factor"] == 2
    assert cube["state"].attrs["offset"] == [1, 1]
    assert cube.rio.crs.to_epsg() == 32633


def test_state_cells_are_whole(items):
    """As the attributes say, all pixels of a mask cell have one state."""
    cube = open_cube(items=items[2:3], grid=GRID, bands=["blue"], mask=SCL)
    state = cube["state"].values[0]
    factor, (row, col) = cube["state"].attrs["factor"], cube["state"].attrs["offset"]
    inner = state[factor - row : 190, factor - col : 180][:180, :176]
    blocks = inner.reshape(90, 2, 88, 2)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert (np.diff(inner[:, ::2]) != 0).any()


def test_days_are_reckoned_by_the_longitude_that_is_given(items):
    """As a search reckons them, whose longitude goes beyond 180 where its area crosses the antimeridian."""
    usual, east = (
        open_cube(items=items[2:3], grid=GRID, bands=["blue"], mask=SCL, longitude=longitude)["solar_day"].values[0]
        for longitude in (None, 240.0)
    )
    assert east - usual == np.timedelta64(1, "D")


def test_opening_computes_nothing_and_pickles_small(items):
    def fail(*_, **__):
        raise AssertionError("computed at open")

    gone = [
        replace(item, assets={k: replace(a, href="/nowhere/" + k) for k, a in item.assets.items()}) for item in items
    ]
    with dask.config.set(scheduler=fail):
        for loader in ("stackstac", "odc"):
            cube = open_cube(items=gone, grid=GRID, bands=["blue"], mask=SCL, loader=loader)
            assert all(variable.chunks for variable in cube.data_vars.values())
    with pytest.raises(ReadError, match="/nowhere"):
        cube["valid"].compute(scheduler="synchronous")


@pytest.mark.parametrize("loader", ["stackstac", "odc"])
def test_no_token_and_no_secret_in_the_graph(items, loader, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-key")
    monkeypatch.setenv("EARTHDATA_TOKEN", "very-secret-bearer")
    auth = Auth(kind="planetary-computer", token_url="http://127.0.0.1:9/{account}/{container}")
    monkeypatch.setattr(signing, "_fetch", lambda _: signing._Token("sig=very-secret-sas", 1e12))
    remote = [
        replace(
            item,
            assets={k: replace(a, href=f"https://acc.blob.core.windows.net/c/{k}.tif") for k, a in item.assets.items()},
        )
        for item in items
    ]
    assert "very-secret-sas" in signing.sign(remote[0].assets["blue"].href, auth)
    cube = open_cube(
        items=remote, grid=GRID, bands=["blue", "nir"], mask=SCL, loader=loader,
        profile=Profile(name="pc", bands={}, auth=auth),
    )  # fmt: skip
    graph = pickle.dumps(dict(cube["reflectance"].data.__dask_graph__()))
    assert b"blob.core.windows.net" in graph
    assert b"very-secret" not in graph
    signing.forget_tokens()


@pytest.mark.parametrize("loader", ["stackstac", "odc"])
def test_mixed_crs_with_and_without_a_code(tmp_path, loader):
    """A CRS that only has WKT, one of the next zone: the same pixels by every way."""
    x, y = Transformer.from_crs(UTM, LAEA, always_xy=True).transform(LEFT, TOP)
    wkt = rasterio.crs.CRS.from_string(LAEA).to_wkt()
    zone = Transformer.from_crs(UTM, "EPSG:32632", always_xy=True).transform(LEFT, TOP)
    mixed = [
        scene(tmp_path, "laea", "2023-08-01T10:00:00Z", crs=wkt, left=round(x), top=round(y), seed=5),
        scene(
            tmp_path, "zone", "2023-08-05T10:00:00Z", crs="EPSG:32632", left=round(zone[0]), top=round(zone[1]), seed=6
        ),
        scene(tmp_path, "home", "2023-08-08T10:00:00Z", seed=7),
    ]  # fmt: skip
    cube = open_cube(items=mixed, grid=GRID, bands=["blue", "nir"], mask=SCL, loader=loader, chunk_px=80).compute(
        scheduler="synchronous"
    )
    codes, states = direct(mixed, GRID, ["blue", "nir"])
    assert np.array_equal(cube["reflectance"], to_reflectance(codes), equal_nan=True)
    assert np.array_equal(cube["state"], states)
    assert (cube["valid"].mean(("y", "x")) > 0.4).all()
    assert cube["state"].attrs["factor"] == 1


def test_a_grid_without_a_code_goes_through_odc_only(items):
    wkt = rasterio.crs.CRS.from_string(LAEA).to_wkt()
    x, y = Transformer.from_crs(UTM, wkt, always_xy=True).transform(LEFT + 800, TOP - 800)
    grid = Grid.around(box(x - 500, y - 500, x + 500, y + 500), crs=wkt, resolution_m=10.0)
    with pytest.raises(ConfigError, match="loader: odc"):
        open_cube(items=items, grid=grid, bands=["blue"], mask=SCL)
    cube = open_cube(items=items[:2], grid=grid, bands=["blue"], mask=SCL, loader="odc")
    codes, _ = direct(items[:2], grid, ["blue"])
    assert np.array_equal(cube["reflectance"].compute(), to_reflectance(codes), equal_nan=True)


def test_what_cannot_be_opened_is_told(items):
    with pytest.raises(NoItemsError):
        open_cube(items=[], grid=GRID, bands=["blue"], mask=SCL)
    with pytest.raises(ItemError, match="offset"):
        open_cube(items=[replace(items[0], offset_dn=None)], grid=GRID, bands=["blue"], mask=SCL)
    with pytest.raises(ItemError, match=r"'red'.*blue"):
        open_cube(items=items, grid=GRID, bands=["red"], mask=SCL)
    with pytest.raises(ItemError, match="'clm'"):
        open_cube(items=items, grid=GRID, bands=["blue"], mask=SCL.model_copy(update={"asset": "clm"}))
    with pytest.raises(ConfigError, match="loader"):
        open_cube(items=items, grid=GRID, bands=["blue"], mask=SCL, loader="gdal")


DATA = os.environ.get("CLOUDGATE_DATA")
real = pytest.mark.skipif(not DATA, reason="CLOUDGATE_DATA is not set: the real scenes are not at hand")


def real_items(name: str) -> list[Item]:
    """The scenes of a real set, through the project's own catalog files."""
    import pystac

    out = []
    for found in pystac.Catalog.from_file(str(Path(DATA) / name / "catalog.json")).get_items(recursive=True):
        props, assets = found.properties, {}
        for key, asset in found.assets.items():
            extra = {**props, **asset.extra_fields}
            if "proj:transform" not in extra or key not in ("blue", "green", "red", "nir", "scl"):
                continue
            code = extra.get("proj:code") or (f"EPSG:{extra['proj:epsg']}" if extra.get("proj:epsg") else None)
            assets[key] = Asset(
                asset.get_absolute_href(), code or extra["proj:wkt2"], tuple(extra["proj:shape"]),
                tuple(extra["proj:transform"][:6]),
            )  # fmt: skip
        out.append(
            Item(
                id=found.id,
                datetime=found.datetime.strftime("%Y-%m-%dT%H:%M:%SZ"),
                collection=name,
                platform=None,
                tile=None,
                orbit=None,
                datatake=None,
                baseline=None,
                boa_offset_applied=True,
                cloud_cover=None,
                created=None,
                bbox=tuple(found.bbox),
                geometry=found.geometry,
                assets=assets,
                offset_dn=0,
            )
        )  # fmt: skip
    return out


@real
@pytest.mark.parametrize("loader", ["stackstac", "odc"])
def test_real_two_tiles_half_a_pixel_apart(loader):
    items = real_items("zagreb_graz_2tiles_120m")
    a, _, left, _, _, top = min(items, key=lambda i: i.id).assets["blue"].transform
    grid = Grid(UTM, a, (left % a, top % a), -int(top // a) - 60, int(left // a) - 3, 300, 300)
    bands = ["blue", "nir"]
    cube = open_cube(items=items, grid=grid, bands=bands, mask=SCL, loader=loader, chunk_px=128).compute(
        scheduler="synchronous"
    )
    codes, states = direct(items, grid, bands)
    assert len(cube["time"]) == 5
    assert np.array_equal(cube["reflectance"], to_reflectance(codes), equal_nan=True)
    assert np.array_equal(cube["state"], states)
    assert cube["valid"].values.any(axis=0).mean() > 0.6


@real
@pytest.mark.parametrize("loader", ["stackstac", "odc"])
def test_real_three_crs_in_one_collection(loader):
    items = real_items("exeter_20m_mixedcrs")
    grid = Grid("EPSG:32630", 20.0, (0.0, 0.0), -281100, 23150, 330, 340)
    cube = open_cube(items=items, grid=grid, bands=["red"], mask=SCL, loader=loader, chunk_px=150).compute(
        scheduler="synchronous"
    )
    codes, states = direct(items, grid, ["red"])
    assert np.array_equal(cube["reflectance"], to_reflectance(codes), equal_nan=True)
    assert np.array_equal(cube["state"], states)
    share = cube["valid"].mean(("y", "x")).values
    assert (share > 0.5).all()
    red = np.where(cube["state"] == CLEAR, cube["reflectance"].values[:, 0], np.nan)
    for other in range(1, 5):  # the same ground, whatever CRS it came in
        seen = np.isfinite(red[0]) & np.isfinite(red[other])
        assert seen.mean() > 0.2
        assert np.corrcoef(red[0, seen], red[other, seen])[0, 1] > 0.7
