"""Where it computes: in comes ``job.cluster``, out comes a connected Dask client that is always released."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import dask
from distributed import Client, LocalCluster

from pipeline.config import Cluster
from pipeline.errors import RunError

_SETTINGS = {
    # Tasks hold whole arrays that Dask cannot see; it must not pause or kill what the plan allowed for.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.98,
    "distributed.admin.system-monitor.gil.enabled": False,
}

ANSWER_S = 20.0
"""A running scheduler answers within this."""


@contextmanager
def connect(spec: Cluster, *, memory_gb_per_worker: float) -> Iterator[Client]:
    """Connect to the cluster of a job: local worker processes, or a running scheduler.

    Raises:
        RunError: if the scheduler at ``cluster.address`` does not answer within 20 s or has no worker.
    """
    if spec.kind == "address":
        try:
            client = Client(spec.address, timeout=ANSWER_S, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise RunError(
                f"cluster.address: no Dask scheduler answers at {spec.address} ({error}); start one with "
                "`dask scheduler`, or use cluster.kind=local"
            ) from error
        try:
            if not client.scheduler_info(n_workers=-1)["workers"]:
                raise RunError(
                    f"cluster.address: the scheduler at {spec.address} has no worker; start "
                    f"`dask worker {spec.address}`"
                )
            yield client
        finally:
            client.close()
        return
    with dask.config.set(_SETTINGS):
        local = LocalCluster(
            n_workers=spec.workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=int(memory_gb_per_worker * 1e9),
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            silence_logs=40,
        )
        client = Client(local, set_as_default=False)
        try:
            yield client
        finally:
            with suppress(Exception):
                client.close(timeout=10)
            local.close(timeout=20)
