"""The doctor: what a job or schedule needs is tried for real, and what is wrong comes with what to do."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import doctor
from pipeline.cli import app
from pipeline.doctor import check


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.cluster.ANSWER_S", 1.0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "EARTHDATA_TOKEN", "PC_SDK_SUBSCRIPTION_KEY"):
        monkeypatch.delenv(name, raising=False)


def _write(small, path="job.yaml", **changes) -> Path:
    Path(path).write_text(yaml.safe_dump(json.loads(json.dumps(small.fields(**changes)))))
    return Path(path)


def _found(job: Path) -> dict[str, doctor.Check]:
    return {c.name: c for c in check(job=job)[8:]}


def test_a_job_that_can_run_is_told_so_and_nothing_is_left(small, tmp_path, cluster_fields):
    job = _write(small, output={"store": "m.zarr"}, cluster=cluster_fields)
    told = _found(job)
    assert {name: c.ok for name, c in told.items()} == dict.fromkeys(told, True)
    assert "2 workers" in told["cluster (address)"].found
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]


def test_what_is_missing_is_told_with_what_to_do(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    job = _write(
        small,
        catalog="cdse",
        output={"store": "file/m.zarr"},
        cluster={"kind": "address", "address": "tcp://127.0.0.1:9"},
    )
    monkeypatch.setattr(doctor, "_ask", lambda catalog: doctor.Check(f"catalog {catalog}", ok=True, found=""))
    told = _found(job)
    assert not told["store"].ok
    assert "file/m.zarr" in told["store"].found
    assert not told["cluster (address)"].ok
    assert "dask scheduler" in told["cluster (address)"].found
    keys = told["catalog's credentials"]
    assert (keys.ok, "AWS_SECRET_ACCESS_KEY" in keys.advice) == (False, True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted-secret")
    keys = _found(job)["catalog's credentials"]
    assert keys.ok
    assert "planted-secret" not in keys.found + keys.advice


def test_a_schedule_is_checked_as_a_whole_and_a_broken_file_is_told(small, tmp_path, cluster_fields):
    fields = small.fields(output={"store": "{area}.zarr"}, cluster=cluster_fields)
    fields.pop("time")
    schedule = {"job": fields | {"target": "middle"}, "every": "month", "start": "2021-06-01"}
    Path("schedule.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(schedule))))
    told = _found(Path("schedule.yaml"))
    assert told["schedule schedule.yaml"].found == "1 areas, every month since 2021-06-01"
    assert all(c.ok for c in told.values())
    Path("broken.yaml").write_text("catalog: [")
    done = CliRunner().invoke(app, ["doctor", "--job", "broken.yaml", "--json"])
    assert done.exit_code == 1
    assert "not readable as YAML" in json.loads(done.stdout)[-1]["found"]
