"""Clusters of every kind that runs here, for real, and what would be submitted to the others."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from pipeline import cluster
from pipeline.cluster import connect
from pipeline.cluster_specs import ALLOCATOR, dask_cluster, forwarded, slurm_arguments
from pipeline.config import Cluster
from pipeline.errors import ConfigError, RunError
from pipeline.redaction import without_secrets

untidy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
"""These libraries leave sockets and pipes to the garbage collector."""


@contextmanager
def dask(what: str, *arguments: str, env: dict[str, str] | None = None, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real ``dask scheduler`` or ``dask worker``."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", what, *arguments],
            stdout=out,
            stderr=out,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    arguments = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
    with dask("scheduler", *arguments, "--scheduler-file", str(file), log=folder / "log"):
        end = time.monotonic() + 60
        while not file.exists() or not file.read_text():
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"]


def _seen_gpu(dask_worker: Any) -> tuple[str, float]:
    return os.environ["CUDA_VISIBLE_DEVICES"], dask_worker.state.total_resources["GPU"]


def allocators(client: Any) -> list[dict[str, str]]:
    """What workers have, those that agree once."""
    found = {name: client.run(os.environ.get, name) for name in ALLOCATOR}
    each = [{name: of[worker] for name, of in found.items()} for worker in next(iter(found.values()))]
    return [one for i, one in enumerate(each) if one not in each[:i]]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_local_cuda_gives_each_worker_one_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 3")
    with connect(Cluster(kind="local-cuda"), memory_gb_per_worker=1) as client:
        client.wait_for_workers(2, timeout=60)
        assert sorted(client.run(_seen_gpu).values()) == [("0", 1), ("3", 1)]
        assert allocators(client) == [ALLOCATOR]
        pids = list(client.run(os.getpid).values())
    assert not any(alive(pid) for pid in pids)


def test_local_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with (
        pytest.raises(RunError, match=r"finds no GPU.*kind=local"),
        connect(Cluster(kind="local-cuda"), memory_gb_per_worker=1),
    ):
        pass


def test_a_scheduler_without_workers(scheduler):
    began = time.monotonic()
    spec = Cluster(kind="address", address=scheduler, wait_s=0.5)
    with pytest.raises(RunError, match=r"no worker within 0.5 s; start workers with `dask worker tcp.*cluster.wait_s"):
        with connect(spec, memory_gb_per_worker=1):
            pass
    assert time.monotonic() - began < 15


def test_a_worker_with_another_version_is_named(scheduler, tmp_path):
    info = tmp_path / "zarr-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 0.1\n")
    spec = Cluster(kind="address", address=scheduler, wait_s=60)
    with dask("worker", scheduler, "--nthreads", "1", env={"PYTHONPATH": str(tmp_path)}, log=tmp_path / "log"):
        with pytest.raises(RunError, match=r"worker tcp://.* has zarr 0.1 \(here .*\).*install the same"):
            with connect(spec, memory_gb_per_worker=1):
                pass
    with pytest.raises(RunError, match=r"has numpy .*\(here 9\)"):
        cluster.check_versions({**cluster.versions(), "numpy": "9"})


def test_a_gateway_that_is_not_there():
    """Its client is closed once and for all: a second close when it is collected would be an unraisable exception."""
    from pipeline.serve import _free_port

    spec = Cluster(kind="gateway", address=f"http://127.0.0.1:{_free_port()}", wait_s=30)
    with pytest.raises(RunError, match=r"gateway did not come up.*look at the gateway's log"):
        with connect(spec, memory_gb_per_worker=1):
            pass
    gc.collect()


@untidy
def test_a_gateway_on_its_local_backend(tmp_path, monkeypatch):
    from pipeline.serve import _free_port

    port, inner = _free_port(), _free_port()
    (tmp_path / "config.py").write_text(
        f"""
import dask_gateway_server.backends.local as local
c.DaskGateway.backend_class = local.UnsafeLocalBackend
c.DaskGateway.address = "127.0.0.1:{inner}"
c.Proxy.address = "127.0.0.1:{port}"
c.ClusterConfig.scheduler_cmd = ["{sys.executable}", "-m", "dask", "scheduler"]
c.ClusterConfig.worker_cmd = ["{sys.executable}", "-m", "dask", "worker"]
c.ClusterConfig.worker_cores = 1
c.UnsafeLocalBackend.clusters_directory = "{tmp_path / "clusters"}"
"""
    )
    monkeypatch.setenv("DASK_GATEWAY__AUTH__TYPE", "basic")
    log = (tmp_path / "gateway.log").open("wb")
    program = Path(sys.executable).with_name("dask-gateway-server")
    server = subprocess.Popen([program, "-f", str(tmp_path / "config.py")], stdout=log, stderr=log, cwd=tmp_path)
    try:
        spec = Cluster(kind="gateway", address=f"http://127.0.0.1:{port}", workers=1, wait_s=60)
        end = time.monotonic() + 60
        while True:
            try:
                with connect(spec, memory_gb_per_worker=1) as client:
                    pids = list(client.run(os.getpid).values())
                break
            except RunError:
                assert time.monotonic() < end, (tmp_path / "gateway.log").read_text()
                time.sleep(0.5)
        end = time.monotonic() + 20
        while any(alive(pid) for pid in pids):
            assert time.monotonic() < end
            time.sleep(0.1)
        with pytest.raises(ConfigError, match=r"cluster.options: the gateway knows no banana"):
            with connect(spec.model_copy(update={"options": {"banana": 1}}), memory_gb_per_worker=1):
                pass
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        log.close()


@untidy
def test_jobqueue_on_its_local_cluster(monkeypatch, tmp_path):
    import dask_jobqueue.slurm
    from dask_jobqueue.local import LocalCluster

    monkeypatch.chdir(tmp_path)
    made: list[dict[str, Any]] = []

    def stands_in(**arguments: Any) -> LocalCluster:
        made.append(arguments)
        keep = {k: v for k, v in arguments.items() if k in ("cores", "processes", "memory", "death_timeout")}
        return LocalCluster(**keep, worker_extra_args=arguments["worker_extra_args"])

    monkeypatch.setattr(dask_jobqueue.slurm, "SLURMCluster", stands_in)
    spec = Cluster(kind="slurm", workers=1, resources={"GPU": 1})
    with connect(spec, memory_gb_per_worker=1) as client:
        (worker,) = client.scheduler_info()["workers"].values()
        assert worker["nthreads"] == 1
        assert worker["resources"] == {"GPU": 1}
        assert worker["memory_limit"] == pytest.approx(10**9, rel=0.01)
    assert made[0]["job_extra_directives"] == ["--gpus-per-task=1"]


@untidy
def test_the_slurm_script():
    from dask_jobqueue.slurm import SLURMCluster

    spec = Cluster(
        kind="slurm", queue="gpu", account="eo", walltime="02:00:00", resources={"GPU": 1}, options={"cores": 2}
    )
    arguments = slurm_arguments(spec, memory_gb=8, environment={"GDAL_HTTP_PROXY": "http://proxy:1 2"})
    with SLURMCluster(**arguments, scheduler_options={"dashboard_address": "127.0.0.1:0"}) as made:
        script = made.job_script()
    for line in (
        "#SBATCH -p gpu", "#SBATCH -A eo", "#SBATCH --cpus-per-task=2", "#SBATCH --mem=8G", "#SBATCH -t 02:00:00",
        "#SBATCH --gpus-per-task=1", "export GDAL_HTTP_PROXY='http://proxy:1 2'",
        *(f"export {name}={value}" for name, value in ALLOCATOR.items()),
    ):  # fmt: skip
        assert line in script.splitlines(), script
    assert "--resources GPU=1" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


# -- Kubernetes -------------------------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """The schema with no fields but those it names."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    if isinstance(out.get("properties"), dict) and not out.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


def crd(name: str) -> Draft7Validator:
    path = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator/crds" / f"{name}.yaml"
    (version,) = yaml.safe_load(path.read_text())["spec"]["versions"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
    return Draft7Validator(schema)


def test_the_dask_cluster_resource_is_what_the_operator_knows():
    spec = Cluster(kind="kubernetes", image="registry/cloudgate:1", secret="keys", resources={"GPU": 1}, workers=9)
    made = dask_cluster(spec, name="cloudgate-x", memory_gb=4, environment={"GDAL_CACHEMAX": "64"})
    check = crd("daskcluster")
    assert [e.message for e in check.iter_errors(made)] == []
    (container,) = made["spec"]["worker"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert container["resources"]["limits"] == {"memory": "4400M", "nvidia.com/gpu": "1"}
    assert {one["name"]: one["value"] for one in container["env"]} == {**ALLOCATOR, "GDAL_CACHEMAX": "64"}
    assert made["spec"]["idleTimeout"] == 600
    container["imagee"] = "typo"
    assert any("imagee" in e.message for e in check.iter_errors(made))


def test_the_workers_command_line_is_one_dask_knows(scheduler, tmp_path):
    """The arguments and environment of the container start a real worker."""
    spec = Cluster(kind="kubernetes", image="x", resources={"GPU": 1})
    made = dask_cluster(spec, name="n", memory_gb=1, environment={})
    (container,) = made["spec"]["worker"]["spec"]["containers"]
    arguments = container["args"]
    arguments = [a.replace("$(DASK_WORKER_NAME)", "w1").replace("8788", "127.0.0.1:0") for a in arguments]
    arguments[arguments.index("/tmp")] = str(tmp_path)
    environment = {one["name"]: one["value"] for one in container["env"]}
    with dask(*arguments[1:], scheduler, env=environment, log=tmp_path / "log"):
        with connect(Cluster(kind="address", address=scheduler, wait_s=60), memory_gb_per_worker=1) as client:
            (worker,) = client.scheduler_info()["workers"].values()
            assert (worker["name"], worker["nthreads"], worker["resources"]) == ("w1", 1, {"GPU": 1})
            assert allocators(client) == [ALLOCATOR]  # before Dask's own


@untidy
def test_kubernetes_that_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "config").write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
        "clusters: [{name: k, cluster: {server: 'http://127.0.0.1:9'}}]\nusers: [{name: u, user: {}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    spec = Cluster(kind="kubernetes", image="x", namespace="default", wait_s=1)
    with pytest.raises(RunError, match=r"cluster.kind: kubernetes did not come up.*kubectl get pods"):
        with connect(spec, memory_gb_per_worker=1):
            pass


def test_settings_travel_and_secrets_do_not():
    environment = {
        "GDAL_HTTP_TIMEOUT": "9",
        "GDAL_HTTP_USERPWD": "u:p",
        "GDAL_HTTP_HEADERS": "Authorization: x",
        "AWS_REGION": "eu",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_SESSION_TOKEN": "t",
        "AWS_ENDPOINT_URL": "https://user:word@host",
        "CLOUDGATE_DATA": "/data",
        "HF_TOKEN": "h",
        "PATH": "/bin",
    }
    assert forwarded(environment) == {"AWS_REGION": "eu", "CLOUDGATE_DATA": "/data", "GDAL_HTTP_TIMEOUT": "9"}


def test_what_is_logged_holds_no_secret(monkeypatch):
    monkeypatch.setenv("PC_SDK_SUBSCRIPTION_KEY", "abcdef-planted")
    text = without_secrets("GET https://a/b.tif?sig=xyz failed with abcdef-planted at https://u:p@h/x")
    assert text == "GET https://a/b.tif failed with *** at https://@h/x"
