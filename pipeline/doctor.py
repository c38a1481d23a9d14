"""Is this machine fit? In comes nothing but the environment, out come checks with what to do."""

import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import rasterio
import zarr
from rasterio.transform import from_origin

from pipeline.errors import CloudgateError
from pipeline.profiles import load_profile, profile_names
from pipeline.stac import ItemApi, open_source

LIBRARIES = (
    "xarray",
    "dask",
    "distributed",
    "zarr",
    "rasterio",
    "odc-stac",
    "stackstac",
    "pystac-client",
    "numpy",
    "rustac",
)


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, what was found, what to do."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def check(*, catalog: str | None = None) -> list[Check]:
    """Run all checks; ``catalog`` (profile name or URL) is asked over the network as well."""
    checks = [
        _libraries(),
        _gdal(),
        _profiles(),
        _machine(),
        _disk(),
        _round_trip("COG", _cog),
        _round_trip("Zarr", _zarr),
    ]
    checks.append(_credentials())
    if catalog:
        checks.append(_ask(catalog))
    return checks


def _libraries() -> Check:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return Check("libraries", ok=True, found=found)


def _gdal() -> Check:
    with rasterio.Env() as env:
        drivers = env.drivers()
    missing = [name for name in ("GTiff", "COG", "JP2OpenJPEG", "VRT") if name not in drivers]
    advice = f"GDAL lacks {', '.join(missing)}; install rasterio from its wheel" if missing else ""
    return Check("GDAL", not missing, rasterio.__gdal_version__, advice)


def _profiles() -> Check:
    names = profile_names()
    try:
        for name in names:
            load_profile(name)
    except CloudgateError as error:
        return Check("catalog profiles", ok=False, found=str(error), advice="mend or remove that file")
    return Check(
        "catalog profiles", ok=bool(names), found=", ".join(names), advice="" if names else "reinstall cloudgate"
    )


def _machine() -> Check:
    memory = psutil.virtual_memory()
    found = f"{os.cpu_count()} cores, {memory.total / 1e9:.0f} GB memory, {memory.available / 1e9:.0f} GB free"
    small = memory.available < 3e9
    advice = "set limits.memory_gb_per_worker and cluster.workers to fit" if small else ""
    return Check("machine", not small, found, advice)


def _disk() -> Check:
    free = psutil.disk_usage(".").free
    advice = "" if free > 5e9 else "free space, or write the store elsewhere with --out"
    return Check("disk here", free > 1e9, f"{free / 1e9:.0f} GB free", advice)


def _round_trip(name: str, work: Callable[[Path], None]) -> Check:
    try:
        with tempfile.TemporaryDirectory() as folder:
            work(Path(folder))
    except Exception as error:  # whatever breaks here is what the doctor is asked for
        return Check(
            f"{name} round trip",
            ok=False,
            found=f"{type(error).__name__}: {error}",
            advice="check permissions and space",
        )
    return Check(f"{name} round trip", ok=True, found="written and read back equal")


def _cog(folder: Path) -> None:
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    profile = {"driver": "COG", "dtype": "uint16", "count": 1, "height": 256, "width": 256, "crs": "EPSG:32633"}
    with rasterio.open(folder / "a.tif", "w", transform=from_origin(499980, 5100000, 10, 10), **profile) as out:
        out.write(values, 1)
    with rasterio.open(folder / "a.tif") as source:
        np.testing.assert_array_equal(source.read(1), values)


def _zarr(folder: Path) -> None:
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    array = zarr.create_array(folder / "a.zarr", shape=(64, 64), chunks=(16, 16), shards=(32, 32), dtype="uint16")
    array[:] = values
    np.testing.assert_array_equal(zarr.open_array(folder / "a.zarr", mode="r")[:], values)


def _credentials() -> Check:
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "PC_SDK_SUBSCRIPTION_KEY", "EARTHDATA_TOKEN")
    there = [name for name in names if os.environ.get(name)]
    if (Path.home() / ".netrc").exists():
        there.append("~/.netrc")
    found = f"set: {', '.join(there)}" if there else "none set (fine for Earth Search and Planetary Computer)"
    return Check("credentials", ok=True, found=found)


def _ask(catalog: str) -> Check:
    try:
        endpoint = catalog if "://" in catalog else load_profile(catalog).endpoint
        if endpoint is None:
            return Check(f"catalog {catalog}", ok=True, found="is read from files")
        source = open_source(endpoint, timeout_s=20)
    except CloudgateError as error:
        return Check(
            f"catalog {catalog}", ok=False, found=str(error), advice="check the network, a proxy, or the address"
        )
    kind = "API" if isinstance(source, ItemApi) else "files"
    return Check(f"catalog {catalog}", ok=True, found=f"{endpoint} answers ({kind})")
