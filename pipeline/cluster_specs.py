"""What would be submitted: in comes ``job.cluster``, out come the manifests and arguments that clusters are made of.

Pure functions, so that they can be checked without a cluster. Secrets never appear here: settings are forwarded by name
from a list, and Kubernetes gets credentials by reference to a Secret.
"""

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any, Final

from pipeline.config import Cluster
from pipeline.redaction import tells_secret

_FORWARDED: Final = re.compile(
    r"^(GDAL|CPL|VSI|PROJ|OGR|CLOUDGATE)_\w+$|^AWS_(ENDPOINT_URL|ENDPOINT_URL_S3|REGION|DEFAULT_REGION|PROFILE|"
    r"NO_SIGN_REQUEST|S3_ENDPOINT|VIRTUAL_HOSTING|HTTPS|REQUEST_PAYER)$|^(TORCH_HOME|HF_HOME|HF_HUB_OFFLINE)$"
)
ALLOCATOR: Final = {"MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""Bytes, of the C library in workers: with Dask's 64 KB it hands every array back to the system, and its pages are
faulted in anew. 32 MB is the most that glibc takes."""
_URL_WITH_PASSWORD: Final = re.compile(r"://[^/@\s]+@|[?&]\w*(?:sig|token|key)\w*=", re.IGNORECASE)


def forwarded(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Settings of this process that workers should share: GDAL, endpoints, caches of models; never a secret."""
    return {
        name: value
        for name, value in sorted((os.environ if environment is None else environment).items())
        if _FORWARDED.match(name) and not tells_secret(name) and not _URL_WITH_PASSWORD.search(value)
    }


def worker_arguments(spec: Cluster) -> list[str]:
    """Arguments of ``dask worker`` beside the address: one thread, the resources that tasks ask for."""
    out = ["--nthreads", "1"]
    if spec.resources:
        out += ["--resources", " ".join(f"{name}={value:g}" for name, value in spec.resources.items())]
    return out


def dask_cluster(spec: Cluster, *, name: str, memory_gb: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """The ``DaskCluster`` resource of the Dask operator.

    Args:
        spec: with ``image``.
        name: of the resource.
        memory_gb: limit of one worker in GB (10^9 bytes); the container gets a tenth more for the nanny.
        environment: plain settings beside ``ALLOCATOR``; credentials come from ``spec.secret``.
    """
    env = [{"name": key, "value": value} for key, value in {**ALLOCATOR, **environment}.items()]
    secrets = [{"secretRef": {"name": spec.secret}}] if spec.secret else []
    gpus = {"nvidia.com/gpu": f"{spec.resources['GPU']:g}"} if spec.resources.get("GPU") else {}
    memory = f"{round(memory_gb * 1100)}M"
    limits = {"memory": memory, **gpus}
    security = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }
    scratch = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - inside the container
    shared = {
        "image": spec.image,
        "env": env,
        "envFrom": secrets,
        "securityContext": security,
        "volumeMounts": scratch,
    }
    pod = {"volumes": [{"name": "tmp", "emptyDir": {}}], "automountServiceAccountToken": False}
    worker = {
        "name": "worker",
        "args": [
            "dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--dashboard", "--dashboard-address", "8788",
            "--memory-limit", str(round(memory_gb * 1e9)), "--death-timeout", "120", "--local-directory", "/tmp",  # noqa: S108
            *worker_arguments(spec),
        ],
        "resources": {"requests": {"cpu": "1", "memory": memory}, "limits": limits},
        "ports": [{"name": "http-dashboard", "containerPort": 8788, "protocol": "TCP"}],
        **shared,
    }  # fmt: skip
    health = {"port": "http-dashboard", "path": "/health"}
    scheduler = {
        "name": "scheduler",
        "args": ["dask", "scheduler", "--host", "0.0.0.0"],  # noqa: S104 - inside the cluster's network
        "resources": {"requests": {"cpu": "500m", "memory": "1G"}, "limits": {"memory": "2G"}},
        "ports": [
            {"name": "tcp-comm", "containerPort": 8786, "protocol": "TCP"},
            {"name": "http-dashboard", "containerPort": 8787, "protocol": "TCP"},
        ],
        "readinessProbe": {"httpGet": health, "initialDelaySeconds": 5, "periodSeconds": 10},
        "livenessProbe": {"httpGet": health, "initialDelaySeconds": 15, "periodSeconds": 20},
        **shared,
    }
    selector = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "cloudgate"}},
        "spec": {
            "idleTimeout": spec.idle_timeout_s,
            "worker": {"replicas": 1, "spec": {**pod, "containers": [worker]}},
            "scheduler": {
                "spec": {**pod, "containers": [scheduler]},
                "service": {
                    "type": "ClusterIP",
                    "selector": selector,
                    "ports": [
                        {"name": "tcp-comm", "protocol": "TCP", "port": 8786, "targetPort": "tcp-comm"},
                        {"name": "http-dashboard", "protocol": "TCP", "port": 8787, "targetPort": "http-dashboard"},
                    ],
                },
            },
        },
    }


def slurm_arguments(spec: Cluster, *, memory_gb: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of ``dask_jobqueue.SLURMCluster``: one worker process a job; ``environment`` beside ``ALLOCATOR``."""
    gpus = [f"--gpus-per-task={spec.resources['GPU']:g}"] if spec.resources.get("GPU") else []
    exports = [f"export {name}={shlex.quote(value)}" for name, value in {**ALLOCATOR, **environment}.items()]
    return {
        "queue": spec.queue,
        "account": spec.account,
        "walltime": spec.walltime,
        "cores": 1,
        "processes": 1,
        "memory": f"{round(memory_gb * 1e9)}B",
        "worker_extra_args": worker_arguments(spec)[2:],
        "job_extra_directives": gpus,
        "job_script_prologue": exports,
        "death_timeout": 120,
        **spec.options,
    }
