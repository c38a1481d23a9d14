"""Is this machine fit? In come the environment and perhaps a job, out come checks with what to do."""

import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import psutil
import rasterio
import zarr
from rasterio.transform import from_origin

from pipeline.block import check_method
from pipeline.cluster import connect
from pipeline.config import Job
from pipeline.errors import CloudgateError
from pipeline.jobfile import load_job, read_yaml
from pipeline.objects import FileObjects
from pipeline.profiles import load_profile, profile_names
from pipeline.records import RunFolder
from pipeline.schedule import load_schedule
from pipeline.stac import ItemApi, open_source

KEYS = {
    "s3-keys": (
        ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"),
        "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    "earthdata": (("EARTHDATA_TOKEN",), "export EARTHDATA_TOKEN, or write ~/.netrc for urs.earthdata.nasa.gov"),
    "planetary-computer": (("PC_SDK_SUBSCRIPTION_KEY",), "a key is not needed, but raises the limits"),
}
"""Per kind of access: variables of which one must be set, and what to do."""
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


def check(*, catalog: str | None = None, job: Path | None = None) -> list[Check]:
    """Run all checks.

    Args:
        catalog: profile name or URL to ask as well.
        job: a job or schedule file; what it needs is checked as well: its catalog and credentials, a write into the
            place of its store, its cluster with a task on a worker.
    """
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
    return checks + (_needs(job) if job else [])


def _needs(path: Path) -> list[Check]:
    """What a job or schedule needs."""
    try:
        if "every" in read_yaml(path, "job"):
            loaded = load_schedule(path)
            name, one = f"schedule {path}", loaded.series[0].job
            found = f"{len(loaded.series)} areas, every {loaded.spec.every} since {loaded.spec.start}"
        else:
            name, one, found = f"job {path}", load_job(path), "is a valid job"
        check_method(one.method, one.bands)
    except CloudgateError as error:
        return [Check(f"file {path}", ok=False, found=str(error), advice="mend the file")]
    out = [Check(name, ok=True, found=found), _keys(one), _ask(one.catalog), _place(one), _cluster(one)]
    return [check for check in out if check is not None]


def _keys(job: Job) -> Check | None:
    """The credentials that the catalog's profile asks for; their names only."""
    names = profile_names()
    profile = load_profile(job.profile or job.catalog) if job.profile or job.catalog in names else None
    if profile is None or profile.auth.kind not in KEYS:
        return None
    wanted, advice = KEYS[profile.auth.kind]
    netrc = profile.auth.kind == "earthdata" and (Path.home() / ".netrc").exists()
    there = [name for name in wanted if os.environ.get(name)] + (["~/.netrc"] if netrc else [])
    needed = profile.auth.kind != "planetary-computer"  # its key only raises limits
    found = f"{profile.name}: " + (", ".join(there) if there else f"none of {', '.join(wanted)} is set")
    return Check("catalog's credentials", ok=bool(there) or not needed, found=found, advice="" if there else advice)


def _place(job: Job) -> Check:
    """Write, read and remove a small object beside the store; on buckets also that conditions are enforced."""
    if not job.output.store:
        return Check("store", ok=False, found="output.store is not set", advice="set it, or give --out")
    objects = RunFolder(job.output.store).objects
    name, text = "doctor", uuid4().hex.encode()
    try:
        first = objects.swap(name, text, None)
        again = objects.swap(name, text, None)
        there = objects.get(name)
        objects.remove(name)
        if isinstance(objects, FileObjects) and not objects.names():
            objects.clear("")
            objects.path.rmdir()
    except (CloudgateError, OSError) as error:
        return Check("store", ok=False, found=str(error), advice="check the path, the bucket and the credentials")
    if first is None or again is not None or there is None or there[0] != text:
        advice = "use a store that enforces If-None-Match (Amazon S3, MinIO, R2, Ceph); else two runs could meet in it"
        return Check("store", ok=False, found=f"{objects.where} ignores conditional writes", advice=advice)
    return Check("store", ok=True, found=f"{job.output.store}: written, read and removed")


def _cluster(job: Job) -> Check:
    """Bring the job's cluster up, run a task on it, and let it go."""
    name, began = f"cluster ({job.cluster.kind})", time.monotonic()
    try:
        with connect(job.cluster, memory_gb_per_worker=job.limits.memory_gb_per_worker) as client:
            client.submit(os.getpid, pure=False).result(timeout=120)
            workers = len(client.scheduler_info(n_workers=-1)["workers"])
    except Exception as error:  # whatever breaks here is what the doctor is asked for
        told = str(error) if isinstance(error, CloudgateError) else f"{type(error).__name__}: {error}"
        return Check(name, ok=False, found=told, advice="see above; cluster.kind=local needs nothing else")
    seconds = time.monotonic() - began
    return Check(name, ok=True, found=f"{workers} workers, the first task came back after {seconds:.0f} s")


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
        endpoint = catalog if "://" in catalog or Path(catalog).exists() else load_profile(catalog).endpoint
        if endpoint is None:
            return Check(f"catalog {catalog}", ok=True, found="is read from files")
        source = open_source(endpoint, timeout_s=20)
    except CloudgateError as error:
        return Check(
            f"catalog {catalog}", ok=False, found=str(error), advice="check the network, a proxy, or the address"
        )
    kind = "API" if isinstance(source, ItemApi) else "files"
    return Check(f"catalog {catalog}", ok=True, found=f"{endpoint} answers ({kind})")
