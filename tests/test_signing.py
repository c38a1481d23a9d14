"""Read-time signing against a real token server and a real range server that refuses stale tokens."""

import json
import pickle
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import rasterio
import rasterio.cache
from loopback import RangeHandler, serve

from pipeline import reader, signing
from pipeline.errors import ReadError
from pipeline.grid import Grid
from pipeline.items import Asset
from pipeline.profiles import Auth, Profile
from pipeline.redaction import redact

GRID = Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 50000, 64, 64)


class TokenHandler(BaseHTTPRequestHandler):
    """Issues token-1, token-2, ... per container, each good for ``life_s`` seconds."""

    life_s = 3600.0
    issued: list[str] = []  # noqa: RUF012 - set per test
    keys: list[str] = []  # noqa: RUF012 - set per test
    failing = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        cls = type(self)
        if cls.failing:
            cls.failing -= 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        token = f"sig=token-{len(self.issued) + 1}"
        self.issued.append(self.path)
        self.keys.append(self.headers.get("Ocp-Apim-Subscription-Key"))
        ends = (datetime.now(UTC) + timedelta(seconds=self.life_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = json.dumps({"msft:expiry": ends, "token": token}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class BlobHandler(RangeHandler):
    """Lets reads in only with the newest token."""

    good: list[str] = []  # noqa: RUF012 - set per test

    def do_GET(self):
        token = parse_qs(urlsplit(self.path).query).get("sig", [""])[0]
        if token not in self.good:
            self.requests.append("403")
            return self.refuse(403)
        return super().do_GET()


@pytest.fixture
def tokens():
    handler = type("Tokens", (TokenHandler,), {"issued": [], "keys": []})
    signing.forget_tokens()
    with serve(handler) as url:
        yield handler, Auth(kind="planetary-computer", token_url=url + "/token/{account}/{container}")
    signing.forget_tokens()
    reader.close_handles()


@pytest.fixture
def blobs(tmp_path, monkeypatch):
    """A storage account on loopback: its host is recognised the way ``*.blob.core.windows.net`` is."""
    data = np.random.default_rng(1).integers(1, 9000, (64, 64)).astype(np.uint16)
    (tmp_path / "box").mkdir()
    with rasterio.open(
        tmp_path / "box" / "a.tif", "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16",
        crs=GRID.crs, transform=GRID.transform, nodata=0,
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)
    handler = type("Blobs", (BlobHandler,), {"root": tmp_path, "good": [], "requests": []})
    monkeypatch.setattr(signing, "_BLOB_HOST", re.compile(r"^(127)\.0\.0\.1$"))
    with serve(handler) as url:
        yield handler, Asset(f"{url}/box/a.tif", GRID.crs, (64, 64), tuple(GRID.transform)[:6]), data


def test_blobs_are_signed_once_per_container(tokens, monkeypatch):
    handler, auth = tokens
    monkeypatch.setenv("PC_SDK_SUBSCRIPTION_KEY", "my-key")
    blob = "https://acc.blob.core.windows.net/box/x/a.tif"
    assert signing.sign(blob, auth) == blob + "?sig=token-1"
    assert signing.sign("https://acc.blob.core.windows.net/box/b.tif", auth).endswith("?sig=token-1")
    assert signing.sign("https://acc.blob.core.windows.net/other/b.tif", auth).endswith("?sig=token-2")
    assert handler.issued == ["/token/acc/box", "/token/acc/other"]
    assert handler.keys == ["my-key", "my-key"]
    for plain in ("https://example.com/a.tif", "/data/a.tif", "s3://bucket/a.tif", blob + "?se=1&sig=mine"):
        assert signing.sign(plain, auth) == plain
    assert signing.sign(blob, Auth()) == blob


def test_a_token_that_ends_soon_is_renewed(tokens):
    handler, auth = tokens
    handler.life_s = 50.0
    blob = "https://acc.blob.core.windows.net/box/a.tif"
    assert [signing.sign(blob, auth)[-1] for _ in range(3)] == ["1", "2", "3"]
    handler.life_s = 3600.0
    assert [signing.sign(blob, auth)[-1] for _ in range(3)] == ["4", "4", "4"]


def test_many_threads_fetch_one_token(tokens):
    handler, auth = tokens
    blob = "https://acc.blob.core.windows.net/box/a.tif"
    first = signing.sign(blob, auth)
    got = []
    threads = [threading.Thread(target=lambda: got.append(signing.sign(blob, auth, refused=first))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(got) == {blob + "?sig=token-2"}
    assert len(handler.issued) == 2


def test_a_failing_token_service_is_retried_then_told(tokens, monkeypatch):
    handler, auth = tokens
    monkeypatch.setattr(signing.time, "sleep", lambda _: None)
    handler.failing = 2
    assert signing.sign("https://acc.blob.core.windows.net/box/a.tif", auth).endswith("token-1")
    handler.failing = 99
    with pytest.raises(ReadError, match="HTTP 503") as caught:
        signing.sign("https://acc.blob.core.windows.net/new/a.tif", auth)
    assert caught.value.transient


def test_a_stale_token_is_refreshed_once_and_the_read_succeeds(tokens, blobs):
    _, auth = tokens
    server, asset, data = blobs
    profile = Profile(name="pc", bands={}, auth=auth, retry={"tries": 2, "backoff_s": 0.01})
    server.good[:] = ["token-1"]
    assert np.array_equal(reader.read_window(asset, GRID, profile=profile), data)
    assert "403" not in server.requests
    server.good[:] = ["token-2"]  # the token ran out, and nothing is cached
    reader.close_handles()
    rasterio.cache.invalidate_all()
    assert np.array_equal(reader.read_window(asset, GRID, profile=profile), data)
    assert server.requests.count("403") == 1
    server.good[:] = ["never"]
    reader.close_handles()
    rasterio.cache.invalidate_all()
    with pytest.raises(ReadError, match="403") as caught:
        reader.read_window(asset, GRID, profile=profile)
    assert not caught.value.transient
    assert "token-" not in str(caught.value)


def test_an_open_dataset_with_a_stale_token_is_reopened(tokens, blobs):
    _, auth = tokens
    server, asset, _ = blobs
    profile = Profile(name="pc", bands={}, auth=auth, retry={"tries": 2, "backoff_s": 0.01})
    server.good[:] = ["token-1"]
    reader.read_window(asset, GRID, profile=profile)
    big = np.random.default_rng(3).integers(1, 60000, (900, 900)).astype(np.uint16)
    with rasterio.open(
        server.root / "box" / "big.tif", "w", driver="COG", width=900, height=900, count=1, dtype="uint16",
        crs=GRID.crs, transform=GRID.transform, nodata=0, blocksize=128,
    ) as dataset:  # fmt: skip
        dataset.write(big, 1)
    remote = Asset(asset.href.replace("a.tif", "big.tif"), asset.crs, big.shape, asset.transform)
    assert np.array_equal(reader.read_window(remote, GRID, profile=profile), big[:64, :64])
    server.good[:] = ["token-2"]
    part = reader.read_window(remote, GRID.window((500, 900), (500, 900)), profile=profile)
    assert np.array_equal(part, big[500:, 500:])
    assert server.requests.count("403") >= 1


def test_no_token_in_pickles(tokens, blobs):
    _, auth = tokens
    server, asset, _ = blobs
    profile = Profile(name="pc", bands={}, auth=auth)
    server.good[:] = ["token-1"]
    reader.read_window(asset, GRID, profile=profile)
    assert b"token-1" not in pickle.dumps((asset, profile, GRID))


def test_settings_of_each_kind(monkeypatch):
    monkeypatch.delenv("EARTHDATA_TOKEN", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    assert signing.auth_settings(Auth()) == {}
    assert signing.auth_settings(Auth(kind="s3-keys")) == {}
    assert signing.auth_settings(Auth(kind="unsigned-s3")) == {"AWS_NO_SIGN_REQUEST": "YES"}
    assert signing.auth_settings(Auth(kind="earthdata"))["GDAL_HTTP_NETRC"] == "YES"
    monkeypatch.setenv("EARTHDATA_TOKEN", "abc")
    assert signing.auth_settings(Auth(kind="earthdata")) == {"GDAL_HTTP_HEADERS": "Authorization: Bearer abc"}


def test_a_bearer_token_reaches_the_server(tmp_path, monkeypatch):
    data = np.arange(1, 4097, dtype=np.uint16).reshape(64, 64)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16", crs=GRID.crs,
        transform=GRID.transform,
    ) as dataset:  # fmt: skip
        dataset.write(data, 1)

    class Guarded(RangeHandler):
        root = tmp_path
        requests: list[str] = []  # noqa: RUF012 - this test's own

        def do_GET(self):
            if self.headers.get("Authorization") != "Bearer right":
                return self.refuse(401)
            return super().do_GET()

    profile = Profile(name="hls", bands={}, auth=Auth(kind="earthdata"))
    with serve(Guarded) as url:
        asset = Asset(f"{url}/a.tif", GRID.crs, (64, 64), tuple(GRID.transform)[:6])
        monkeypatch.setenv("EARTHDATA_TOKEN", "wrong")
        with pytest.raises(ReadError, match="401"):
            reader.read_window(asset, GRID, profile=profile)
        monkeypatch.setenv("EARTHDATA_TOKEN", "right")
        assert np.array_equal(reader.read_window(asset, GRID, profile=profile), data)
    reader.close_handles()


def test_redacted_text_keeps_the_address():
    text = "cannot read https://a.blob.core.windows.net/b/c.tif?se=1&sig=SECRET: HTTP response code: 403"
    assert redact(text) == "cannot read https://a.blob.core.windows.net/b/c.tif HTTP response code: 403"
