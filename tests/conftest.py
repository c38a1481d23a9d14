"""What many tests share: the folder of real data, one small simulated region, one cluster of worker processes."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_region
import view_stores

from pipeline.cluster import connect
from pipeline.config import Cluster

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # tests begun in the background of a script: programs that a test starts and interrupts would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = ("notebooks", "demo", "chaos", "learned", "mosaic", "stores", "train", "faults", "store_faults")
"""Files that take long: begun last, they would leave one of two processes idle at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, the others as they were."""
    rank = {f"test_{name}.py": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real Sentinel-2 sets."""
    folder = os.environ.get("CLOUDGATE_DATA")
    if not folder:
        pytest.skip("CLOUDGATE_DATA is not set: it names the folder with the real Sentinel-2 sets")
    if not Path(folder).is_dir():
        pytest.skip(f"CLOUDGATE_DATA names {folder}, which is no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> small_region.SmallRegion:
    """Two overlapping tiles of simulated ground, written once."""
    return small_region.write(tmp_path_factory.mktemp("region"))


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A Dask client of a local cluster with two worker processes."""
    with connect(Cluster(workers=2), memory_gb_per_worker=4) as connected:
        yield connected


@pytest.fixture(scope="session")
def cluster_fields(client: Any) -> dict[str, Any]:
    """``cluster`` of a job that uses the shared workers."""
    return {"kind": "address", "address": client.scheduler.address}


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """``s3://...`` of a bucket on a real S3 server on loopback (moto), with credentials in the environment."""
    import boto3

    from pipeline.serve import _free_port

    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < end, "moto_server does not answer"
            time.sleep(0.05)
    given = {
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="mosaics")
        yield "s3://mosaics"
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def view_pair(
    small: small_region.SmallRegion, tmp_path_factory: pytest.TempPathFactory, cluster_fields: dict[str, Any]
) -> dict[str, Path]:
    """Two finished stores of one area for the map page; see ``view_stores.make``."""
    return view_stores.make(small, tmp_path_factory.mktemp("view"), cluster_fields)
