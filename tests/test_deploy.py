"""What lies in ``deploy/`` is valid, names only what exists, and keeps the promises of its README."""

import ast
import copy
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml
from pydantic import BaseModel

import pipeline
from pipeline.cli import app
from pipeline.config import Job
from pipeline.jobfile import load_job
from pipeline.schedule import load_schedule

DEPLOY = Path(__file__).parent.parent / "deploy"
BUILT = ("overlays/operator", "overlays/indexed", "daskjob")


def _tool(name: str, *words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name(name)
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False, **more)


def _built(name: str) -> list[dict[str, Any]]:
    """The resources of an overlay, as ``kubectl apply -k`` would send them."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: Kustomize is part of it (Debian: kubernetes-client)")
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def _one(resources: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [r for r in resources if r["kind"] == kind]
    return found


# -- schemas -----------------------------------------------------------------------------------------------------


def _valid(resources: list[dict[str, Any]], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(resources))
    return _tool("kubernetes-validate", "--strict", path)


@pytest.mark.parametrize("name", BUILT)
def test_overlays_are_valid_kubernetes(name, tmp_path):
    resources = [r for r in _built(name) if not r["apiVersion"].startswith("kubernetes.dask.org")]
    done = _valid(resources, tmp_path)
    assert (done.returncode, "WARN" in done.stderr + done.stdout) == (0, False), done.stderr + done.stdout


def test_the_checker_refuses_a_planted_field(tmp_path):
    resource = yaml.safe_load((DEPLOY / "kubernetes/base/cronjob.yaml").read_text())
    assert _valid([resource], tmp_path).returncode == 0
    resource["spec"]["concurencyPolicy"] = "Forbid"
    assert _valid([resource], tmp_path).returncode != 0


def _closed(schema: Any) -> Any:
    """The schema with every object that lists its properties closed against others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _closed(value) for key, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not free:
        out["additionalProperties"] = False
    return out


def _crd(kind: str) -> dict[str, Any]:
    folder = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator/crds"
    text = (folder / f"{kind.lower()}.yaml").read_text()
    schema = _closed(yaml.load(text, yaml.CSafeLoader)["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
    return schema


def test_the_dask_job_follows_the_operators_schema_and_a_planted_field_does_not():
    resource = yaml.safe_load((DEPLOY / "kubernetes/daskjob/daskjob.yaml").read_text())
    schema = _crd("DaskJob")
    check = jsonschema.Draft202012Validator(schema).validate
    check(resource)
    for path in (("spec", "job", "spec"), ("spec", "cluster", "spec", "worker"), ("spec",)):
        broken = copy.deepcopy(resource)
        node = broken
        for key in path:
            node = node[key]
        node["replicsa"] = 3
        with pytest.raises(jsonschema.ValidationError, match="replicsa"):
            check(broken)


def test_compose_dockerfile_shell_and_units_pass_their_checkers(tmp_path):
    compose = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    assert _tool(*compose, DEPLOY / "compose.yaml").returncode == 0
    broken = tmp_path / "compose.yaml"
    broken.write_text((DEPLOY / "compose.yaml").read_text().replace("  scheduler:\n", "  scheduler:\n    comand: x\n"))
    assert _tool(*compose, broken).returncode != 0
    done = _tool("hadolint", DEPLOY / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /x && apt-get install foo\n")
    assert _tool("hadolint", tmp_path / "Dockerfile").returncode != 0
    for script in DEPLOY.rglob("*.sh"):
        done = _tool("shellcheck", script)
        assert done.returncode == 0, done.stdout
    if shutil.which("systemd-analyze"):
        timer = DEPLOY / "systemd" / "cloudgate-tick.timer"
        done = subprocess.run(["systemd-analyze", "verify", timer], capture_output=True, text=True, check=False)
        assert done.stderr == ""


# -- nothing that does not exist is named ------------------------------------------------------------------------


LINE = r"^(?:[$#>\s]|ExecStart=\S*/|exec |uv run )*(cloudgate +(?!:)[a-z-].*)$"


def _commands() -> Iterator[tuple[str, list[str]]]:
    """(file, words) of every command line of cloudgate or Dask in ``deploy/``."""
    for path in sorted(p for p in DEPLOY.rglob("*") if p.is_file()):
        text, name = path.read_text(), path.relative_to(DEPLOY).as_posix()
        if path.suffix in (".yaml", ".yml"):
            for document in yaml.safe_load_all(text):
                yield from ((name, words) for words in _lists(document))
        text = text.replace("\\\n", " ")
        for match in re.finditer(
            r"^(?:[$#>\s]|ExecStart=\S*/|exec |uv run )*(cloudgate +(?!:)[a-z-].*)$", text, re.MULTILINE
        ):
            yield name, shlex.split(match.group(1), comments=True)
        for match in re.finditer(r"`(cloudgate [a-z][^`]*|dask (?:scheduler|worker) [^`]*)`", text):
            yield name, shlex.split(match.group(1).replace("|", " "))


def _lists(node: Any) -> Iterator[list[str]]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _lists(value)
    elif isinstance(node, list):
        if node and node[0] in ("cloudgate", "dask"):
            yield [str(word) for word in node]
        for value in node:
            yield from _lists(value)


def _check(words: list[str]) -> None:
    """Follow the words down the command's tree; every option, number of arguments and job field must exist."""
    command: Any = typer.main.get_command(app)
    if words[0] == "dask":
        command = importlib.import_module(f"distributed.cli.dask_{words[1]}").main
        words = words[1:]
    words = words[1:]
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"no option {word} of {command.name}"
    for option, value in pairwise(words):
        if option == "--set":
            model: Any = Job
            for part in value.partition("=")[0].split("."):
                assert isinstance(model, type), value
                assert issubclass(model, BaseModel), value
                assert part in model.model_fields, f"no job field {value}"
                model = model.model_fields[part].annotation


def test_every_command_and_option_exists():
    found = list(_commands())
    assert {"compose.yaml", "slurm/tick.sh", "systemd/cloudgate-tick.service", "README.md"} <= {
        name for name, _ in found
    }
    assert len(found) > 15
    for name, words in found:
        try:
            _check(words)
        except AssertionError as error:
            raise AssertionError(f"deploy/{name}: {' '.join(words)}: {error}") from error


@pytest.mark.parametrize(
    "wrong", ["schedule tock x.yaml", "mosaic --ot x", "mosaic x --set cluster.kin=a", "frobnicate"]
)
def test_a_command_that_does_not_exist_is_noticed(wrong):
    with pytest.raises(AssertionError):
        _check(["cloudgate", *wrong.split()])


def test_the_jobs_and_schedules_load():
    loaded = load_schedule(DEPLOY / "kubernetes/base/schedule.yaml")
    assert [s.area for s in loaded.series] == ["33TVM", "33TVN", "33TWM", "33TWN"]
    assert load_job(DEPLOY / "kubernetes/daskjob/graz.yaml").name == "graz-august"


def test_the_flow_calls_public_names_only():
    for path in (DEPLOY / "flows").glob("*.py"):
        tree = ast.parse(path.read_text())
        used = {
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "pipeline"
        }
        assert used
        assert used <= set(pipeline.__all__)
        imported = [
            n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("pipeline")
        ]
        assert imported == []


# -- promises ----------------------------------------------------------------------------------------------------


def _pods(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from _pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from _pods(value)


@pytest.mark.parametrize("name", BUILT)
def test_containers_are_not_root_write_nowhere_and_name_no_secret(name):
    resources = _built(name)
    pods = list(_pods(resources))
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]
            assert re.search(r":\d+\.\d+\.\d+$", container["image"])
            assert not [e for e in container.get("env", []) if re.search("KEY|SECRET|TOKEN|PASS", e["name"])]
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert not [r for r in resources if r["kind"] == "Secret"]


def test_the_cron_job_never_overlaps_ends_and_tidies_up():
    for name in BUILT[:2]:
        spec = _one(_built(name), "CronJob")["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        assert spec["startingDeadlineSeconds"] > 0
        assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 6 * 3600
        assert spec["jobTemplate"]["spec"]["ttlSecondsAfterFinished"] > 0


def test_rights_reach_no_further_than_a_dask_cluster():
    resources = _built("overlays/operator")
    for rule in _one(resources, "Role")["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        if rule["apiGroups"] != ["kubernetes.dask.org"]:
            assert set(rule["verbs"]) <= {"get", "list", "watch"}
            assert "secrets" not in rule["resources"]
    (pod,) = _pods(_one(resources, "CronJob"))
    (tick,) = pod["containers"]
    assert {"name": "IMAGE", "value": tick["image"]} in tick["env"]  # the workers run the tick's own image
    assert {"Role", "RoleBinding"} & {r["kind"] for r in _built("overlays/indexed")} == set()


def test_the_image_is_not_root_and_its_bases_are_pinned():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert len(bases) == 2
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]


def test_it_works_with_a_read_only_root_file_system(tmp_path):
    script = """
        mount --make-rprivate / && mount -t tmpfs tmpfs /tmp && mount -o remount,bind,ro / || exit 77
        touch /opt/x 2>/dev/null && exit 78
        cd /tmp && exec env HOME=/tmp XDG_CACHE_HOME=/tmp/.cache DASK_TEMPORARY_DIRECTORY=/tmp "$@"
    """
    program = Path(sys.executable).with_name("cloudgate")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", program, "doctor", "--json"]
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    if program.is_relative_to("/tmp"):
        pytest.skip("the program lies in /tmp, which this test covers")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (77, 1) and not done.stdout:
        pytest.skip(f"name spaces are not allowed here: {done.stderr[:200]}")
    checks = {check["name"]: check["ok"] for check in json.loads(done.stdout)}
    assert checks["COG round trip"], done.stdout
    assert checks["Zarr round trip"], done.stdout
