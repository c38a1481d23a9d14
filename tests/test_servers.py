"""One catalog, three ways: a plain file, ``rustac serve`` (no filters), stac-fastapi-pgstac (all of them).

All must give the same items, so what a server cannot filter we do filter, and the same way.
"""

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import pytest
from catalog_samples import changed, earth_search, moved, polygon

from pipeline.catalog import digest, search
from pipeline.errors import NoItemsError
from pipeline.serve import StacServer
from pipeline.stac import ItemApi, open_source

DSN = os.environ.get("CLOUDGATE_PGSTAC_DSN")
NEEDED = ("stac_fastapi", "pypgstac", "psycopg", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
WHY_NOT = (
    "CLOUDGATE_PGSTAC_DSN is not set: no PostgreSQL with PostGIS (.ci/postgres.sh starts one)"
    if not DSN
    else f"not installed: {', '.join(MISSING)} (dependency group `servers`)"
    if MISSING
    else ""
)


def scenes() -> list[dict]:
    """130 scenes (more than one page) of 2023 on both sides of 180 degrees and around Graz."""
    rng = random.Random(7)
    out = []
    for n in range(130):
        month, number = 4 + n // 28, 1 + n % 28
        item = changed(
            earth_search(),
            id=f"S2A_33TWM_2023{month:02d}{number:02d}_{n}_L2A",
            datetime=f"2023-{month:02d}-{number:02d}T{rng.randrange(24):02d}:{rng.randrange(60):02d}:07Z",
            eo__cloud_cover=round(rng.uniform(0, 100), 2),
            s2__processing_baseline=rng.choice(["04.00", "05.09", "05.10"]),
        )
        if n % 10 == 7:
            halves = [polygon(179.0, 46.0, 180.0, 47.0), polygon(-180.0, 46.0, -179.0, 47.0)]
            both = {"type": "MultiPolygon", "coordinates": [half["coordinates"] for half in halves]}
            item = changed(item, geometry=both, bbox=[179.0, 46.0, -179.0, 47.0])
        else:
            west = rng.choice([15.0, 15.5, 17.0])
            item = moved(item, west, 46.0, west + 1.0, 47.0)
        out.append(item)
    out.append(changed(out[0], id=f"{out[0]['id']}_again", s2__processing_baseline="05.11"))
    return out


GRAZ = (15.2, 46.2, 15.4, 46.4)
REQUESTS = [
    {"bbox": GRAZ, "start": date(2023, 4, 1), "end": date(2023, 8, 31)},
    {"bbox": GRAZ, "start": date(2023, 5, 10), "end": date(2023, 5, 20)},
    {"bbox": GRAZ, "start": date(2023, 4, 1), "end": date(2023, 8, 31), "max_cloud_cover": 40.0},
    {"bbox": (179.5, 46.2, -179.5, 46.4), "start": date(2023, 4, 1), "end": date(2023, 8, 31)},
    {"bbox": (15.0, 46.0, 18.0, 47.0), "start": date(2023, 4, 1), "end": date(2023, 8, 31)},
    {
        "bbox": (15.0, 46.0, 18.0, 47.0),
        "geometry": polygon(17.2, 46.2, 17.4, 46.4),
        "start": date(2023, 4, 1),
        "end": date(2023, 8, 31),
    },
]


@pytest.fixture(scope="module")
def items_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("servers") / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": scenes()}))
    return path


def compare(url: str, items_file: Path) -> None:
    sizes = []
    for request in REQUESTS:
        by_file = search(catalog=str(items_file), **request)
        by_server = search(catalog=url, **request)
        assert by_server.items == by_file.items
        assert digest(by_server.items) == digest(by_file.items)
        assert by_server.profile_ref == by_file.profile_ref == "earth-search"
        sizes.append(len(by_file.items))
    assert sizes[4] > 100  # more than one page
    assert sizes[2] < sizes[0]
    assert all(sizes)
    with pytest.raises(NoItemsError, match="swapped"):
        search(catalog=url, **{**REQUESTS[0], "bbox": (46.2, 15.2, 46.4, 15.4)})


def test_rustac_equals_the_file(items_file: Path):
    with StacServer(items_file) as server:
        source = open_source(server.url)
        assert isinstance(source, ItemApi)
        assert not source.filters_clouds
        compare(server.url, items_file)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_pgstac_equals_the_file(items_file: Path, tmp_path: Path):
    with pgstac(items_file, tmp_path) as url:
        source = open_source(url)
        assert isinstance(source, ItemApi)
        assert source.filters_clouds
        assert source.collections() == ["sentinel-2-l2a"]
        compare(url, items_file)
        # The server itself filters, by either extension: what it sends is what we keep.
        span = {"bbox": GRAZ, "span": None, "collections": ["sentinel-2-l2a"]}
        everything = source.search(**span)
        few = {raw.item["id"] for raw in everything if raw.item["properties"]["eo:cloud_cover"] <= 40}
        assert 0 < len(few) < len(everything)
        assert {raw.item["id"] for raw in source.search(**span, max_cloud_cover=40.0)} == few
        source._client.remove_conforms_to("QUERY")
        assert {raw.item["id"] for raw in source.search(**span, max_cloud_cover=40.0)} == few


@contextmanager
def pgstac(items_file: Path, folder: Path) -> Iterator[str]:
    """stac-fastapi-pgstac on a database of its own, filled with the items; dropped afterwards."""
    import psycopg

    parts = urlsplit(DSN or "")
    name = f"cloudgate_test_{os.getpid()}"
    env = {
        **os.environ,
        "PGHOST": parts.hostname or "",
        "PGPORT": str(parts.port),
        "PGUSER": parts.username or "",
        "PGPASSWORD": parts.password or "",
        "PGDATABASE": name,
    }
    with psycopg.connect(DSN or "", autocommit=True) as admin:
        admin.execute(f"create database {name}")
        server = None
        try:
            everywhere, always = [[-180.0, -90.0, 180.0, 90.0]], [["2015-01-01T00:00:00Z", None]]
            collection = {
                "type": "Collection",
                "id": "sentinel-2-l2a",
                "stac_version": "1.0.0",
                "description": "scenes made by hand",
                "license": "proprietary",
                "links": [],
                "extent": {"spatial": {"bbox": everywhere}, "temporal": {"interval": always}},
            }
            (folder / "collection.json").write_text(json.dumps(collection))
            features = json.loads(items_file.read_text())["features"]
            (folder / "items.ndjson").write_text("\n".join(json.dumps(item) for item in features))
            for arguments in (
                ["migrate"],
                ["load", "collections", str(folder / "collection.json"), "--method", "upsert"],
                ["load", "items", str(folder / "items.ndjson"), "--method", "upsert"],
            ):
                subprocess.run(
                    [sys.executable, "-m", "pypgstac.pypgstac", *arguments],
                    env=env, check=True, capture_output=True, timeout=120,
                )  # fmt: skip
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            app = ["--factory", "stac_fastapi.pgstac.app:create_app"]
            with (folder / "log").open("wb") as log:
                server = subprocess.Popen(
                    [sys.executable, "-m", "uvicorn", *app, "--host", "127.0.0.1", "--port", str(port)],
                    env=env, stdout=log, stderr=log,
                )  # fmt: skip
            url = f"http://127.0.0.1:{port}"
            _wait(url, server, folder / "log")
            yield url
        finally:
            if server:
                server.terminate()
                server.wait(20)
            admin.execute(f"drop database {name} with (force)")


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        try:
            with build_opener(ProxyHandler({})).open(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the pgstac API does not answer at {url}: {log.read_text()[-2000:]}")
