"""The local servers: ranges byte for byte, many clients at once, latency in parallel, and no orphans."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio

from pipeline.errors import RunError
from pipeline.serve import RangeServer, StacServer, byte_range


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    (root / "inner").mkdir()
    (root / "inner" / "a b.bin").write_bytes(rng.bytes(3_000_000))
    (root.parent / "secret.txt").write_text("outside")
    profile = {"driver": "COG", "width": 600, "height": 400, "count": 1, "dtype": "uint16", "blocksize": 256}
    placed = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 499980, 0, -10, 5100000)}
    with rasterio.open(root / "scene.tif", "w", compress="deflate", **profile, **placed) as sink:
        sink.write(rng.integers(1, 3000, (400, 600)).astype(np.uint16), 1)
    return root


@pytest.fixture(scope="module")
def server(folder: Path):
    with RangeServer(folder) as running:
        yield running


def ask(server: RangeServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    out = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return out


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-9", (0, 10)),
        ("bytes=990-", (990, 1000)),
        ("bytes=-5", (995, 1000)),
        ("bytes=-5000", (0, 1000)),
        ("bytes=10-5000", (10, 1000)),
        ("bytes=1000-", ()),
        ("bytes=-0", ()),
        ("bytes=9-3", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        ("", None),
    ],
)
def test_byte_range(header: str, span: tuple[int, ...] | None) -> None:
    assert byte_range(header, 1000) == span


def test_whole_file_and_head(server: RangeServer, folder: Path) -> None:
    content = (folder / "inner" / "a b.bin").read_bytes()
    status, headers, body = ask(server, "/inner/a%20b.bin")
    assert (status, body) == (200, content)
    assert headers["accept-ranges"] == "bytes"
    status, head, body = ask(server, "/inner/a%20b.bin", method="HEAD")
    assert (status, body) == (200, b"")
    assert head["content-length"] == str(len(content))
    assert head["etag"] == headers["etag"]


def test_ranges(server: RangeServer, folder: Path) -> None:
    content = (folder / "inner" / "a b.bin").read_bytes()
    status, headers, body = ask(server, "/inner/a%20b.bin", Range="bytes=1000000-2000000")
    assert status == 206
    assert body == content[1_000_000:2_000_001]
    assert headers["content-range"] == f"bytes 1000000-2000000/{len(content)}"
    status, headers, _ = ask(server, "/inner/a%20b.bin", Range="bytes=3000000-")
    assert status == 416
    assert headers["content-range"] == f"bytes */{len(content)}"
    status, _, body = ask(server, "/inner/a%20b.bin", Range="bytes=0-9", **{"If-Range": '"older"'})
    assert (status, len(body)) == (200, len(content))


def test_refusals(server: RangeServer) -> None:
    assert ask(server, "/../secret.txt")[0] == 404
    assert ask(server, "/%2e%2e/secret.txt")[0] == 404
    assert ask(server, "/inner")[0] == 404
    assert ask(server, "/absent.tif")[0] == 404
    assert ask(server, "/scene.tif", method="DELETE")[0] == 405


def test_keep_alive(server: RangeServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for start in range(50):
        connection.request("GET", "/inner/a%20b.bin", headers={"Range": f"bytes={start}-{start + 9}"})
        assert len(connection.getresponse().read()) == 10
    connection.close()


def test_gdal_reads_over_http(server: RangeServer, folder: Path) -> None:
    with rasterio.open(folder / "scene.tif") as near, rasterio.open(f"{server.url}/scene.tif") as far:
        window = rasterio.windows.Window(200, 100, 300, 250)
        np.testing.assert_array_equal(near.read(1, window=window), far.read(1, window=window))


def test_latency_does_not_queue(folder: Path) -> None:
    with RangeServer(folder, latency_s=0.2) as slow:
        begin = time.monotonic()
        threads = [
            threading.Thread(target=ask, args=(slow, "/scene.tif"), kwargs={"Range": "bytes=0-99"}) for _ in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - begin
    assert 0.2 <= took < 1.5  # one after the other would take 4.8 s


def test_throughput(folder: Path) -> None:
    """Two clients, 1 MB ranges: the server must not be what an HTTP benchmark measures."""
    with RangeServer(folder) as fast:

        def pull() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", fast.port, timeout=10)
            sink = bytearray(1 << 20)
            for k in range(100):
                connection.request("GET", "/inner/a%20b.bin", headers={"Range": f"bytes={k}-{k + (1 << 20) - 1}"})
                answer, filled = connection.getresponse(), 0
                while filled < len(sink):
                    filled += answer.readinto(memoryview(sink)[filled:])
                answer.read()
            connection.close()

        begin = time.monotonic()
        threads = [threading.Thread(target=pull) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = 200 / (time.monotonic() - begin)
    assert rate > 50, f"{rate:.0f} MB/s"


def test_end_of_context_ends_the_server(folder: Path) -> None:
    pids: list[int] = []

    def interrupted() -> None:
        with RangeServer(folder) as server:
            pids.append(server.pid or 0)
            assert alive(pids[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert wait_gone(pids[0])


def test_port_taken_and_no_folder(server: RangeServer, folder: Path) -> None:
    with pytest.raises(RunError, match=str(server.port)), RangeServer(folder, port=server.port):
        pass
    with pytest.raises(RunError, match="no folder"), RangeServer(folder / "absent"):
        pass


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ring = [[15.0, 46.0], [15.1, 46.0], [15.1, 46.1], [15.0, 46.1], [15.0, 46.0]]
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": "one", "collection": "things",
        "properties": {"datetime": "2021-07-11T10:00:00Z"}, "links": [], "assets": {},
        "bbox": [15.0, 46.0, 15.1, 46.1], "geometry": {"type": "Polygon", "coordinates": [ring]},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("stac") / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [item]}))
    return path


def test_stac_server_answers_and_ends(items: Path) -> None:
    with StacServer(items) as stac:
        connection = http.client.HTTPConnection("127.0.0.1", stac.port, timeout=10)
        body = json.dumps({"collections": ["things"], "bbox": [15.05, 46.05, 15.06, 46.06]})
        connection.request("POST", "/search", body, {"Content-Type": "application/json"})
        found = json.loads(connection.getresponse().read())
        connection.close()
        pid, port = stac.pid, stac.port
    assert [feature["id"] for feature in found["features"]] == ["one"]
    assert pid is not None
    assert wait_gone(pid)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def test_stac_server_says_why_it_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "items.json"
    broken.write_text("{not json")
    with pytest.raises(RunError, match=r"did not answer.*items\.json"), StacServer(broken):
        pass
    with pytest.raises(RunError, match="does not exist"), StacServer(tmp_path / "absent.json"):
        pass


PARENT = """
import sys, time
from pathlib import Path
from pipeline.serve import RangeServer, StacServer
with RangeServer(Path(sys.argv[1])) as files, StacServer(Path(sys.argv[2])) as stac:
    print(files.pid, stac.pid, stac.port, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphans(folder: Path, items: Path, blow: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(items)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout is not None
    files, stac, port = (int(word) for word in parent.stdout.readline().split())
    children = [int(pid) for pid in Path(f"/proc/{stac}/task/{stac}/children").read_text().split()]
    assert children, "the guard has no rustac"
    os.kill(parent.pid, blow)
    parent.wait(timeout=10)
    parent.stdout.close()
    assert all(wait_gone(pid) for pid in [files, stac, *children])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=2)
