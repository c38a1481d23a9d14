"""What many tests share: the folder of real data, one small simulated region, one cluster of worker processes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_region

from pipeline.cluster import connect
from pipeline.config import Cluster


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
