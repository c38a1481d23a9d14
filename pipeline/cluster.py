"""Where it computes: in comes ``job.cluster``, out comes a connected Dask client whose cluster is always released.

Every kind ends in the same checks: at least one worker within ``cluster.wait_s``, and the same versions on all of them.
"""

import os
import platform
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import dask
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster

from pipeline.cluster_specs import ALLOCATOR, dask_cluster, forwarded, slurm_arguments
from pipeline.config import Cluster
from pipeline.errors import ConfigError, RunError
from pipeline.redaction import without_secrets

_SETTINGS: Final = {
    # Tasks hold whole arrays that Dask cannot see; it must not pause or kill what the plan allowed for.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.98,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.worker.profile.enabled": False,  # a look at every thread each 10 ms
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ALLOCATOR.items()},
}
ANSWER_S: Final = 20.0
"""A running scheduler answers within this."""
CLOSE_S: Final = 20.0
PACKAGES: Final = ("cloudgate", "dask", "distributed", "numpy", "zarr", "rasterio", "scipy", "opencv-python-headless")
"""What must be the same in client and workers: they talk with it, or it makes the bytes."""


@contextmanager
def connect(spec: Cluster, *, memory_gb_per_worker: float) -> Iterator[Client]:
    """Bring a cluster up, or connect to a running one; it is released when the block ends, however it ends.

    Raises:
        ConfigError: if an extra is missing. RunError: if the cluster does not come up in ``cluster.wait_s``, has no
            worker, or workers of other versions.
    """
    opener = {
        "local": _local,
        "local-cuda": _local_cuda,
        "address": _address,
        "kubernetes": _kubernetes,
        "gateway": _gateway,
        "slurm": _slurm,
    }[spec.kind]
    with dask.config.set(_SETTINGS), opener(spec, memory_gb_per_worker) as client:
        _wait_for_a_worker(client, spec)
        _same_everywhere(client)
        yield client


def answers(client: Any) -> bool:
    """Whether a client's scheduler is still there."""
    try:
        return bool(client.status == "running" and client.scheduler_info())
    except Exception:  # whatever a connection that ended raises
        return False


def environment_of(spec: Cluster) -> dict[str, str]:
    """Settings that workers adopt; local processes inherit them anyway."""
    return {} if spec.kind.startswith("local") else forwarded()


# -- kinds ------------------------------------------------------------------------------------------------------


@contextmanager
def _closing(cluster: Any, client: Client | None = None) -> Iterator[Client]:
    """The client of a cluster of ours; both end with the block, the cluster even if the client does not."""
    try:
        client = client or Client(cluster, set_as_default=False)
        try:
            yield client
        finally:
            with suppress(Exception):
                client.close(timeout=CLOSE_S / 2)
    finally:
        with suppress(Exception):
            cluster.close(timeout=CLOSE_S)


@contextmanager
def _local(spec: Cluster, memory_gb: float) -> Iterator[Client]:
    cluster = LocalCluster(
        n_workers=spec.workers,
        threads_per_worker=1,
        processes=True,
        memory_limit=int(memory_gb * 1e9),
        dashboard_address="127.0.0.1:0",
        host="127.0.0.1",
        resources=spec.resources or None,
        silence_logs=40,
    )
    with _closing(cluster) as client:
        yield client


@contextmanager
def _local_cuda(spec: Cluster, memory_gb: float) -> Iterator[Client]:
    """One worker process per GPU, which sees that one only."""
    options = {
        "nthreads": 1,
        "memory_limit": int(memory_gb * 1e9),
        "host": "127.0.0.1",
        "resources": {**spec.resources, "GPU": 1},
        "silence_logs": 40,
    }
    workers = {
        f"gpu-{gpu}": {"cls": Nanny, "options": {**options, "env": {"CUDA_VISIBLE_DEVICES": gpu}}}
        for gpu in visible_gpus()
    }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    with _closing(SpecCluster(workers=workers, scheduler=scheduler, silence_logs=40)) as client:
        yield client


def visible_gpus() -> list[str]:
    """Indices (or UUIDs) of the GPUs that this process may use.

    Raises:
        RunError: if there is none.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        found = [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    elif program := shutil.which("nvidia-smi"):
        said = subprocess.run(
            [program, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
        found = said.stdout.split() if said.returncode == 0 else []
    else:
        found = []
    if not found:
        raise RunError(
            "cluster.kind: local-cuda finds no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES); check the driver, or use "
            "cluster.kind=local"
        )
    return found


@contextmanager
def _address(spec: Cluster, _memory_gb: float) -> Iterator[Client]:
    try:
        client = Client(spec.address, timeout=ANSWER_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise RunError(
            f"cluster.address: no Dask scheduler answers at {spec.address} ({error}); start one with "
            "`dask scheduler`, or use cluster.kind=local"
        ) from error
    try:
        yield client
    finally:
        with suppress(Exception):
            client.close(timeout=CLOSE_S / 2)


@contextmanager
def _kubernetes(spec: Cluster, memory_gb: float) -> Iterator[Client]:
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as error:
        raise _missing("kubernetes", error) from error
    name = f"cloudgate-{uuid.uuid4().hex[:10]}"
    manifest = dask_cluster(spec, name=name, memory_gb=memory_gb, environment=forwarded())

    def new() -> Any:
        return KubeCluster(
            custom_cluster_spec=manifest,
            namespace=spec.namespace,
            resource_timeout=round(spec.wait_s),
            shutdown_on_close=True,
            quiet=True,
        )

    try:
        cluster = _started(spec, new)
    except BaseException:
        for half in [made for made in KubeCluster._instances if made.name == name]:  # what its constructor began
            with suppress(Exception):
                within(CLOSE_S, half.close)
        raise
    with _closing(cluster) as client:
        cluster.adapt(minimum=1, maximum=spec.workers)
        yield client


@contextmanager
def _gateway(spec: Cluster, _memory_gb: float) -> Iterator[Client]:
    try:
        from dask_gateway import Gateway
    except ImportError as error:
        raise _missing("gateway", error) from error
    gateway = Gateway(spec.address)

    def new() -> Any:
        wanted = {**spec.options}
        known = gateway.cluster_options()
        if "environment" in known:
            wanted["environment"] = {**ALLOCATOR, **forwarded(), **dict(wanted.get("environment", {}))}
        if unknown := sorted(set(wanted) - set(known)):
            raise ConfigError(
                f"cluster.options: the gateway knows no {', '.join(unknown)}; it knows {', '.join(known) or 'none'}"
            )
        return gateway.new_cluster(shutdown_on_close=True, **wanted)

    with _ended(gateway.close, gateway):
        cluster = _started(spec, new)
        # `shutdown` waits for the gateway's word: merely closing leaves clusters behind
        with _ended(cluster.shutdown, cluster.gateway):
            cluster.scale(spec.workers)
            client = cluster.get_client(set_as_default=False)
            try:
                yield client
            finally:
                with suppress(Exception):
                    client.close(timeout=CLOSE_S / 2)


@contextmanager
def _ended(end: Callable[[], None], gateway: Any) -> Iterator[None]:
    """Calls ``end`` and sees that the gateway's client does not close itself once more.

    Its ``__del__`` closes whatever is not asynchronous, closed or not, and raises where its loop has ended already:
    noise on the standard error stream at any later moment.
    """
    try:
        yield
    finally:
        with suppress(Exception):
            end()
        gateway._asynchronous = True


@contextmanager
def _slurm(spec: Cluster, memory_gb: float) -> Iterator[Client]:
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise _missing("slurm", error) from error
    arguments = slurm_arguments(spec, memory_gb=memory_gb, environment=forwarded())
    cluster = _started(spec, lambda: SLURMCluster(**arguments))
    with _closing(cluster) as client:
        cluster.scale(spec.workers)
        yield client


def _missing(extra: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"cluster.kind: {extra} needs {error.name}; install it with: pip install 'cloudgate[{extra}]', or use "
        "cluster.kind=local"
    )


def _started(spec: Cluster, start: Callable[[], Any]) -> Any:
    """A new cluster, whatever its library raises told in one way."""
    try:
        return within(spec.wait_s + ANSWER_S, start)
    except (ConfigError, RunError):
        raise
    except Exception as error:
        raise RunError(_not_up(spec, f"{type(error).__name__}: {error}")) from error


def _not_up(spec: Cluster, why: str) -> str:
    look = {
        "address": f"start workers with `dask worker {spec.address}`",
        "kubernetes": "look at `kubectl get pods,daskclusters` and the operator's log; check cluster.image, namespace, "
        "quotas and that the Dask operator is installed",
        "gateway": f"look at the gateway's log; check cluster.address ({spec.address}) and cluster.options",
        "slurm": "look at `squeue --me` and the jobs' logs; check cluster.queue, account and walltime",
    }.get(spec.kind, "look at the workers' logs; check limits.memory_gb_per_worker and free memory")
    return (
        f"cluster.kind: {spec.kind} did not come up: {why[:600]}; {look}, or raise cluster.wait_s ({spec.wait_s:g} s)"
    )


# -- checks -----------------------------------------------------------------------------------------------------


def _wait_for_a_worker(client: Client, spec: Cluster) -> None:
    try:
        client.wait_for_workers(1, timeout=spec.wait_s)
    except (TimeoutError, OSError) as error:
        raise RunError(_not_up(spec, f"no worker within {spec.wait_s:g} s")) from error


@cache
def versions() -> dict[str, str]:
    """Versions of this process: Python and the packages that must agree; what is not installed is ``none``."""
    out = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "none"
    return out


def check_versions(wanted: Mapping[str, str]) -> None:
    """Compare this process with what a client has.

    Raises:
        RunError: naming the packages that differ.
    """
    _compare(wanted, versions(), f"the worker on {platform.node()}")


def _compare(wanted: Mapping[str, str], found: Mapping[str, str], who: str) -> None:
    other = [f"{name} {found.get(name)} (here {wanted[name]})" for name in wanted if found.get(name) != wanted[name]]
    if other:
        raise RunError(
            f"cluster: {who} has {', '.join(other)}; other versions may give other bytes: install the same on client "
            "and workers (the same image or lock), then run the same command again"
        )


def _same_everywhere(client: Client) -> None:
    try:
        answers = within(2 * ANSWER_S, lambda: client.run(versions, on_error="return"))
    except (OSError, TimeoutError) as error:
        raise RunError(f"cluster: its workers do not answer ({type(error).__name__}); see their logs") from error
    for worker, found in answers.items():
        if isinstance(found, OSError):
            continue  # it died meanwhile; what comes in its place is checked with its first task
        if isinstance(found, BaseException):
            raise RunError(
                f"cluster: the worker {worker} cannot run cloudgate ({type(found).__name__}: {found}); install "
                f"cloudgate {versions()['cloudgate']} there"
            )
        _compare(versions(), found, f"the worker {worker}")


def logs_of(client: Any) -> str:
    """What scheduler and workers logged lately, for the records of a run that failed; empty where nobody answers."""
    parts: list[str] = []
    for ask in ("get_scheduler_logs", "get_worker_logs"):
        with suppress(Exception):
            said = within(ANSWER_S, lambda ask=ask: getattr(client, ask)(n=300))  # type: ignore[misc]
            listed = said.items() if isinstance(said, dict) else [("scheduler", said)]
            parts += [f"== {who}\n" + "\n".join(line for _, line in reversed(lines)) for who, lines in listed]
    with suppress(Exception):
        cluster = getattr(client, "cluster", None)
        if cluster is not None:
            parts += [f"== {who}\n{said}" for who, said in within(ANSWER_S, cluster.get_logs).items()]
    return without_secrets("\n".join(parts))


def within[T](seconds: float, work: Callable[[], T], beats: Callable[[], float] | None = None) -> T:
    """The result of ``work``; what hangs is left behind in a daemon thread.

    Args:
        seconds: how long it may take, or may go without a sign of life.
        work: what to do.
        beats: when ``work`` gave its last sign of life (``time.monotonic``); None where only the end counts.

    Raises:
        TimeoutError: if it takes longer.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="within")
    began = time.monotonic()
    thread.start()
    while thread.is_alive() and (left := (beats() if beats else began) + seconds - time.monotonic()) > 0:
        thread.join(left)
    if failed:
        raise failed.pop()  # kept here it would hold its own traceback, and all that lies in those frames, in a circle
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]
