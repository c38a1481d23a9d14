"""Reading windows: native, warped, failing, and how scenes become layers. Rasters are made here, small and real."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from loopback import RangeHandler, serve
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.warp import reproject, transform_bounds
from shapely.geometry import box

from pipeline import handles, read_pool, reader, warp
from pipeline.errors import ItemError, ReadError
from pipeline.grid import Grid
from pipeline.items import Asset
from pipeline.profiles import Profile
from pipeline.read_pool import ReadPool
from pipeline.reader import CLEAR, NODATA, dn_to_codes, fuse_scenes, read_coarse, read_window

UTM = "EPSG:32633"
PROFILE = Profile(name="test", bands={}, retry={"tries": 4, "backoff_s": 0.01})


def write_cog(
    path: Path,
    data: NDArray,
    *,
    size: float = 10.0,
    left: float = 500000.0,
    top: float = 5_100_000.0,
    crs: str = UTM,
    nodata: float | None = 0,
    overviews: str = "NONE",
) -> Asset:
    transform = rasterio.Affine(size, 0, left, 0, -size, top)
    options = {
        "blocksize": 128,
        "compress": "deflate",
        "overviews": overviews,
        "overview_resampling": "average",
    }
    with rasterio.open(
        path, "w", driver="COG", width=data.shape[1], height=data.shape[0], count=1, dtype=data.dtype, crs=crs,
        transform=transform, nodata=nodata, **options,
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)
    return Asset(str(path), crs, data.shape, tuple(transform)[:6], nodata)


def scene(height: int = 300, width: int = 340, seed: int = 1, *, holes: bool = True) -> NDArray[np.uint16]:
    """Smooth ground with noise, a swath edge and scattered missing pixels."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    ground = 3000 + 1500 * np.sin(rows / 23) * np.cos(cols / 31) + rng.normal(0, 200, (height, width))
    data = np.clip(ground, 1, None).astype(np.uint16)
    if holes:
        data[rows + 2 * cols < 200] = 0
        data[rng.random((height, width)) < 0.02] = 0
    return data


def grid_at(row0: int, col0: int, height: int, width: int, size: float = 10.0, phase=(0.0, 0.0)) -> Grid:
    """A grid whose (0, 0) is the corner (500000, 5100000) of the rasters here."""
    base_row, base_col = round(-5_100_000 / size), round(500000 / size)
    return Grid(UTM, size, phase, base_row + row0, base_col + col0, height, width)


def gdal_warp(asset: Asset, grid: Grid, resampling: Resampling) -> NDArray:
    """What GDAL's exact warper gives on the same pixels."""
    out = np.zeros(grid.shape, np.uint16)
    with rasterio.open(asset.href) as source:
        reproject(
            rasterio.band(source, 1), out, src_nodata=asset.nodata, dst_nodata=asset.nodata, src_crs=asset.crs,
            dst_crs=grid.crs, dst_transform=grid.transform, resampling=resampling, tolerance=0,
        )  # fmt: skip
    return out


@pytest.fixture(autouse=True)
def closed_handles():
    yield
    reader.close_handles()


def test_native_window_is_the_file_padded_with_nodata(tmp_path):
    data = scene()
    asset = write_cog(tmp_path / "a.tif", data)
    got = read_window(asset, grid_at(-7, -11, 320, 400))
    want = np.zeros((320, 400), np.uint16)
    want[7:307, 11:351] = data
    assert got.dtype == np.uint16
    assert np.array_equal(got, want)
    inner = read_window(asset, grid_at(33, 57, 100, 90))
    assert np.array_equal(inner, data[33:133, 57:147])


def test_outside_the_raster_there_is_its_nodata(tmp_path):
    asset = write_cog(tmp_path / "a.tif", scene().astype(np.int16), nodata=-9999)
    assert (read_window(asset, grid_at(1000, 0, 5, 5)) == -9999).all()
    assert (read_window(asset, grid_at(-3, 0, 5, 5))[:3] == -9999).all()


@pytest.mark.parametrize("kind", ["reflectance", "classes"])
@pytest.mark.parametrize(
    "source",
    [
        {"size": 20.0},
        {"size": 60.0, "left": 499980.0},
        {"left": 500005.0, "top": 5_100_003.0},
        {"size": 4.0},
        {"crs": "EPSG:32632", "left": 964000.0, "top": 5_117_000.0},
        {"crs": "EPSG:3035", "left": 4_660_000.0, "top": 2_560_000.0},
    ],
    ids=["20m", "60m", "shifted", "finer", "next-zone", "laea"],
)
def test_a_pixel_never_depends_on_the_window(tmp_path, source, kind):
    asset = write_cog(tmp_path / "a.tif", scene(), **source)
    whole = whole_grid(asset)
    big = read_window(asset, whole, kind=kind)
    assert (big != 0).mean() > 0.2
    rng = np.random.default_rng(5)
    for _ in range(12):
        r, c = rng.integers(0, whole.height - 2), rng.integers(0, whole.width - 2)
        h, w = rng.integers(1, min(150, whole.height - r) + 1), rng.integers(1, min(150, whole.width - c) + 1)
        part = read_window(asset, whole.window((r, r + h), (c, c + w)), kind=kind)
        assert np.array_equal(part, big[r : r + h, c : c + w])


def whole_grid(asset: Asset, size: float = 10.0) -> Grid:
    a, _, left, _, e, top = asset.transform
    bounds = (left, top + e * asset.shape[0], left + a * asset.shape[1], top)
    return Grid.around(box(*transform_bounds(asset.crs, UTM, *bounds)), crs=UTM, resolution_m=size)


@pytest.mark.parametrize(
    "source",
    [
        {"size": 20.0},
        {"size": 60.0, "left": 499980.0},
        {"left": 500005.0, "top": 5_100_003.0},
        {"crs": "EPSG:32632", "left": 964000.0, "top": 5_117_000.0},
        {"crs": "EPSG:3035", "left": 4_660_000.0, "top": 2_560_000.0},
    ],
    ids=["20m", "60m", "shifted", "next-zone", "laea"],
)
def test_resampling_agrees_with_gdal(tmp_path, source):
    """Bilinear within 1 DN and nearest equal; pixels whose centre lies on a source pixel's edge may fall either way."""
    asset = write_cog(tmp_path / "a.tif", scene(), **source)
    grid = whole_grid(asset)
    ours = read_window(asset, grid).astype(int)
    gdal = gdal_warp(asset, grid, Resampling.bilinear).astype(int)
    same_validity = (ours == 0) == (gdal == 0)
    assert same_validity.mean() > 0.999
    both = (ours > 0) & (gdal > 0)
    assert both.mean() > 0.2
    assert np.abs(ours - gdal)[both].max() <= 1
    classes = read_window(asset, grid, kind="classes")
    assert (classes == gdal_warp(asset, grid, Resampling.nearest)).mean() > 0.999


def test_a_coarser_grid_takes_means_of_valid_pixels(tmp_path):
    data = scene(240, 360)
    asset = write_cog(tmp_path / "a.tif", data)
    got = read_window(asset, grid_at(0, 0, 40, 60, size=60.0, phase=(20.0, 0.0)))
    # The corner (500000, 5100000) lies 20 m right of a multiple of 60 m.
    valid = np.where(data > 0, data.astype(float), np.nan).reshape(40, 6, 60, 6)
    count = np.isfinite(valid).sum(axis=(1, 3))
    want = np.nansum(valid, axis=(1, 3)) / np.maximum(count, 1)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 0.5 + 1e-9


def test_coarse_read_uses_overviews(tmp_path):
    data = scene(512, 512, holes=False)
    asset = write_cog(tmp_path / "a.tif", data, overviews="AUTO")
    array, grid = read_coarse(asset, grid_at(0, 0, 512, 512), out_px=65)
    assert grid.resolution_m == 80.0
    assert array.shape == grid.shape
    assert max(grid.shape) <= 66
    mean = data.reshape(64, 8, 64, 8).mean(axis=(1, 3))
    off = (grid_at(0, 0, 1, 1).top - grid.top) / 80, (grid_at(0, 0, 1, 1).left - grid.left) / 80
    if off == (0, 0):
        assert np.abs(array[:64, :64] - mean).max() < 60
    assert abs(array[array > 0].mean() - data.mean()) < 20


def test_mask_lattice_and_covering_grid(tmp_path):
    scl = Asset("scl.tif", UTM, (170, 170), (20.0, 0.0, 500000.0, 0.0, -20.0, 5_100_000.0))
    grid = grid_at(3, 7, 101, 50)
    factor, phase = reader.mask_lattice([scl, scl], grid)
    coarse, offset = reader.coarse_grid(grid, factor, phase)
    assert factor == 2
    assert offset == (1, 1)
    assert coarse.resolution_m == 20
    assert coarse.top == grid.top + 10
    assert coarse.left == grid.left - 10
    assert coarse.shape == (51, 26)
    moved = Asset("b.tif", UTM, (170, 170), (20.0, 0.0, 500010.0, 0.0, -20.0, 5_100_000.0))
    assert reader.mask_lattice([scl, moved], grid) == (1, (0, 0))
    assert reader.mask_lattice([moved], grid)[0] == 2
    native = Asset("c.tif", UTM, (9, 9), (10.0, 0.0, 500000.0, 0.0, -10.0, 5_100_000.0))
    assert reader.mask_lattice([native], grid) == (1, (0, 0))
    other = Asset("d.tif", "EPSG:32632", (9, 9), (20.0, 0.0, 500000.0, 0.0, -20.0, 5_100_000.0))
    assert reader.mask_lattice([scl, other], grid) == (1, (0, 0))


@pytest.mark.parametrize("phase", [(0.0, 0.0), (10.0, 0.0), (20.0, 40.0)])
def test_cells_spread_are_the_nearest_read(tmp_path, phase):
    """Reading the mask on its own lattice and repeating it gives what nearest neighbour gives on the grid."""
    classes = np.random.default_rng(3).integers(0, 12, (60, 70), np.uint8)
    asset = write_cog(tmp_path / "scl.tif", classes, size=60.0, left=500000.0 + phase[0], top=5_100_000.0 + phase[1])
    grid = grid_at(-5, -3, 111, 97)
    factor, cell_phase = reader.mask_lattice([asset], grid)
    assert factor == 6
    coarse, offset = reader.coarse_grid(grid, factor, cell_phase)
    cells = read_window(asset, coarse, kind="classes")
    spread = reader.spread_cells(cells, factor, offset, grid.shape)
    assert np.array_equal(spread, read_window(asset, grid, kind="classes"))


def test_codes_of_dn():
    asset = Asset("a.tif", UTM, (1, 1), (1, 0, 0, 0, -1, 0))
    dn = np.array([0, 1, 900, 1000, 5000, 64534, 65535], np.uint16)
    assert dn_to_codes(dn, asset, 0).tolist() == [0, 1001, 1900, 2000, 6000, 65534, 65534]
    assert dn_to_codes(dn, asset, -1000).tolist() == [0, 1, 900, 1000, 5000, 64534, 65534]
    signed = Asset("a.tif", UTM, (1, 1), (1, 0, 0, 0, -1, 0), nodata=-999)
    dn16 = np.array([-999, -2000, -500, 0, 1234], np.int16)
    assert dn_to_codes(dn16, signed, 0).tolist() == [0, 1, 500, 1000, 2234]
    scaled = Asset("a.tif", UTM, (1, 1), (1, 0, 0, 0, -1, 0), nodata=None, scale=1.0)
    assert dn_to_codes(np.array([0, 0.25, np.nan], np.float32), scaled, 0).tolist() == [0, 3500, 0]
    with pytest.raises(ItemError, match=r"a\.tif.*offset"):
        dn_to_codes(dn, asset, None)


def test_fused_scenes_take_the_first_clear_then_the_first_valid():
    rng = np.random.default_rng(7)
    codes = [rng.integers(0, 4, (2, 9, 11)).astype(np.uint16) * 1000 for _ in range(3)]
    states = [rng.integers(0, 4, (9, 11)).astype(np.uint8) for _ in range(3)]
    fused, state = fuse_scenes(codes, states)
    for r in range(9):
        for c in range(11):
            known = [i for i in range(3) if states[i][r, c] != NODATA]
            best = ([i for i in known if states[i][r, c] == CLEAR] or known or [None])[0]
            assert state[r, c] == (NODATA if best is None else states[best][r, c])
            valid = [i for i in known if codes[i][:, r, c].all()]
            clear = [i for i in valid if states[i][r, c] == CLEAR]
            chosen = (clear or ([] if state[r, c] == CLEAR else valid) or [None])[0]
            assert fused[:, r, c].tolist() == ([0, 0] if chosen is None else codes[chosen][:, r, c].tolist())
    outside = np.zeros_like(states[0])
    again = fuse_scenes([codes[0], codes[0], *codes[1:]], [states[0], outside, *states[1:]])
    assert np.array_equal(again[0], fused)
    assert np.array_equal(again[1], state)


def test_fusing_on_cells_with_a_margin_equals_fusing_on_pixels():
    rng = np.random.default_rng(9)
    offset, factor, shape = (5, 2), 2, (13, 18)
    cells = [rng.integers(0, 4, (11, 12)).astype(np.uint8) for _ in range(2)]
    codes = [(rng.integers(0, 3, (1, *shape)) > 0).astype(np.uint16) * 2000 for _ in range(2)]
    fused, coarse = fuse_scenes(codes, cells, factor=factor, offset=offset)
    fused_fine, fine = fuse_scenes(codes, [reader.spread_cells(c, factor, offset, shape) for c in cells])
    assert np.array_equal(fused, fused_fine)
    assert np.array_equal(reader.spread_cells(coarse, factor, offset, shape), fine)


class FaultyHandler(RangeHandler):
    """Answers with the status codes in ``faults`` first, then properly."""

    faults: list[int] = []  # noqa: RUF012 - set per test

    def do_GET(self):
        if self.faults:
            status = self.faults.pop(0)
            if status == 206:
                self.cut_short = True
            else:
                return self.refuse(status)
        return super().do_GET()


@pytest.fixture
def server(tmp_path):
    handler = type("Handler", (FaultyHandler,), {"root": tmp_path, "faults": [], "requests": []})
    with serve(handler) as url:
        yield url, handler


@pytest.mark.parametrize("faults", [[503], [429, 500], [503, 503, 503], [206], [403]], ids=str)
def test_passing_faults_are_retried(tmp_path, server, faults):
    url, handler = server
    asset = write_cog(tmp_path / "a.tif", scene())
    remote = Asset(f"{url}/a.tif", asset.crs, asset.shape, asset.transform)
    handler.faults[:] = faults
    assert np.array_equal(read_window(remote, grid_at(0, 0, 300, 340), profile=PROFILE), scene())
    assert not handler.faults


def test_fault_on_an_open_dataset_is_retried(tmp_path, server):
    url, handler = server
    big = np.random.default_rng(2).integers(1, 60000, (700, 700)).astype(np.uint16)
    asset = write_cog(tmp_path / "a.tif", big)
    remote = Asset(f"{url}/a.tif", asset.crs, asset.shape, asset.transform)
    assert np.array_equal(read_window(remote, grid_at(0, 0, 50, 50), profile=PROFILE), big[:50, :50])
    handler.faults[:] = [206, 503]
    assert np.array_equal(read_window(remote, grid_at(400, 400, 300, 300), profile=PROFILE), big[400:, 400:])
    assert not handler.faults


def test_lasting_faults_are_told_at_once(tmp_path, server):
    url, handler = server
    asset = write_cog(tmp_path / "a.tif", scene())
    gone = Asset(f"{url}/b.tif?sig=secret", asset.crs, asset.shape, asset.transform)
    with pytest.raises(ReadError, match="404") as caught:
        read_window(gone, grid_at(0, 0, 9, 9), profile=PROFILE)
    assert not caught.value.transient
    assert "secret" not in str(caught.value)
    handler.faults[:] = [503] * 99
    remote = Asset(f"{url}/a.tif", asset.crs, asset.shape, asset.transform)
    with pytest.raises(ReadError, match=r"503.*one request was tried for up to 8 times") as caught:
        read_window(remote, grid_at(0, 0, 9, 9), profile=PROFILE)
    assert caught.value.transient
    assert len(handler.faults) == 99 - 1 - 8  # once directly, then through the relay


def test_a_truncated_or_missing_file_is_a_lasting_fault(tmp_path):
    asset = write_cog(tmp_path / "a.tif", np.random.default_rng(0).integers(1, 60000, (400, 400)).astype(np.uint16))
    path = Path(asset.href)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ReadError, match=r"(?s)a\.tif.*Read error") as caught:
        read_window(asset, grid_at(0, 0, 400, 400), profile=PROFILE)
    assert not caught.value.transient
    path.unlink()
    reader.close_handles()
    with pytest.raises(ReadError, match="No such file"):
        read_window(asset, grid_at(0, 0, 400, 400))


def test_datasets_stay_open_and_the_oldest_close(tmp_path, server):
    url, handler = server
    asset = write_cog(tmp_path / "a.tif", scene())
    remote = Asset(f"{url}/a.tif", asset.crs, asset.shape, asset.transform)
    read_window(remote, grid_at(0, 0, 300, 340))
    seen = len(handler.requests)
    read_window(remote, grid_at(0, 0, 300, 340))
    assert len(handler.requests) == seen
    few = handles.Handles(limit=2)
    opened = [rasterio.open(asset.href, sharing=False) for _ in range(3)]
    for number, dataset in enumerate(opened):
        few.give(f"{number}", None, "", dataset)
    assert [dataset.closed for dataset in opened] == [True, False, False]
    assert few.take("0", None) is None
    assert few.take("2", None)[1] is opened[2]
    few.close()
    opened[2].close()
    assert opened[1].closed


def test_keys_of_aws_cost_a_read_nothing(tmp_path, server, monkeypatch):
    """Rasterio would make a session of boto3 for every read where it finds keys: 20 times as slow."""
    url, _ = server
    asset = write_cog(tmp_path / "a.tif", scene())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("boto3.Session", lambda *_args, **_more: pytest.fail("a session of boto3 for a read"))
    with pytest.raises(pytest.fail.Exception, match="session"):
        rasterio.Env()  # which is why
    monkeypatch.setenv("AWS_S3_ENDPOINT", url.removeprefix("http://"))
    monkeypatch.setenv("AWS_HTTPS", "NO")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTING", "FALSE")
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes())
    here = read_window(asset, grid_at(0, 0, 300, 340))
    for href in (f"{url}/a.tif", "s3://bucket/a.tif"):
        np.testing.assert_array_equal(read_window(replace(asset, href=href), grid_at(0, 0, 300, 340)), here)


def test_pool_reads_in_parallel_counts_and_reports_failures(tmp_path, server):
    url, _ = server
    data = scene()
    asset = write_cog(tmp_path / "a.tif", data)
    good = Asset(f"{url}/a.tif", asset.crs, asset.shape, asset.transform)
    bad = Asset(f"{url}/none.tif", asset.crs, asset.shape, asset.transform)
    with ReadPool(threads=4, ahead=3, profile=PROFILE) as pool:
        futures = [pool.submit(good, grid_at(r, 0, 50, 340)) for r in range(0, 300, 50)]
        lost = pool.submit(bad, grid_at(0, 0, 9, 9), "classes")
        got = np.concatenate([future.result() for future in futures])
        with pytest.raises(ReadError):
            lost.result()
    assert np.array_equal(got, data)
    assert (pool.stats.reads, pool.stats.failed) == (7, 1)
    assert pool.stats.bytes == data.nbytes
    assert pool.stats.failures[0][0] == bad.href
    with pytest.raises(RuntimeError):
        pool.submit(good, grid_at(0, 0, 9, 9))


def test_pool_bounds_what_is_in_flight(tmp_path, monkeypatch):
    running, peak, gate = 0, 0, threading.Event()
    lock = threading.Lock()

    def slow(asset, grid, **_):
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        gate.wait(5)
        with lock:
            running -= 1
        return np.zeros(grid.shape, np.uint16)

    monkeypatch.setattr(read_pool, "read_window", slow)
    asset = Asset("a.tif", UTM, (9, 9), (10.0, 0.0, 0.0, 0.0, -10.0, 0.0))
    with ReadPool(threads=2, ahead=3) as pool:
        sent = []
        feeder = threading.Thread(target=lambda: sent.extend(pool.submit(asset, grid_at(0, 0, 2, 2)) for _ in range(8)))
        feeder.start()
        feeder.join(0.3)
        assert feeder.is_alive()
        assert len(pool._threads._threads) == 2
        gate.set()
        feeder.join(5)
        assert [future.result().shape for future in sent] == [(2, 2)] * 8
    assert peak == 2


@pytest.mark.parametrize("size", [10.0, 60.0, 120.0])
@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:3035", "EPSG:4326", "EPSG:32634"])
def test_projection_between_nodes_is_exact_enough(crs, size):
    """Coordinates linear between lattice nodes stay within 0.005 px of the exact transformation."""
    grid = grid_at(500, 300, 70, 90, size=size)
    to_raster = Transformer.from_crs(UTM, crs, always_xy=True)
    x, y = np.meshgrid(grid.x, grid.y)
    exact_x, exact_y = to_raster.transform(x, y)
    step = size if crs != "EPSG:4326" else size / 111_000
    frame = warp.Frame(crs, (step, 0, exact_x.min(), 0, -step, exact_y.max()), (400, 400))
    rows, cols = warp._nodes(frame, grid).strip(0, 70)
    assert np.abs(rows - (exact_y.max() - exact_y) / step).max() < 0.005
    assert np.abs(cols - (exact_x - exact_x.min()) / step).max() < 0.005


def test_a_raster_outside_the_projection_has_no_data(tmp_path):
    """A grid far outside the raster's own projection reads as nodata instead of failing."""
    asset = write_cog(tmp_path / "a.tif", scene(40, 40), crs="EPSG:3035", left=4_660_000.0, top=2_560_000.0)
    far = Grid("EPSG:3857", 100.0, (0.0, 0.0), 0, 200_000, 40, 40)  # near 180 degrees east
    assert not read_window(asset, far).any()
    assert not read_window(asset, far, kind="classes").any()


def test_the_file_knows_better_than_its_item(tmp_path):
    """Some catalogs round or shift ``proj:transform``; pixels lie where the file says."""
    data = scene()
    asset = write_cog(tmp_path / "a.tif", data)
    told = replace(asset, transform=(10.0, 0.0, 500010.0, 0.0, -10.0, 5_100_000.0), shape=(299, 340))
    assert np.array_equal(read_window(told, grid_at(0, 0, 300, 340)), data)
