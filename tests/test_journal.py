"""What machines read of a run: JSON lines with run, period and task; Prometheus metrics; never a secret."""

import json
import socket
import urllib.request

import pytest
from small_region import InlineClient

from pipeline import journal
from pipeline.errors import StoreError
from pipeline.journal import Journal, Metrics
from pipeline.mosaic import build
from pipeline.objects import objects_at
from pipeline.records import RunFolder
from pipeline.runner import Silent


def _lines(store) -> list[dict]:
    return [json.loads(line) for line in (RunFolder(store).objects.path / "log.jsonl").read_text().splitlines()]


def test_a_run_writes_lines_and_metrics(small, tmp_path, monkeypatch):
    place = tmp_path / "cloudgate.prom"
    monkeypatch.setenv("CLOUDGATE_METRICS", str(place))
    area = {"bbox": small.bbox((40, 160), (120, 240))}
    job = small.job(
        tmp_path / "m.zarr", area=area, bands=["blue"], grid={"crs": "EPSG:32633", "shard_px": 64}, offset_dn=0
    )
    build(job=job, client=InlineClient(monkeypatch))
    lines = _lines(tmp_path / "m.zarr")
    assert len({line["run"] for line in lines}) == 1
    assert [line["state"] for line in lines if line["event"] == "run"] == ["begun", "ended"]
    tasks = [line for line in lines if line["event"] == "task"]
    assert tasks[0]["task"] == "0-0-0"
    assert tasks[0]["period"] == 0
    assert 1e8 < tasks[0]["memory_bytes"] < 2e10
    manifest = RunFolder(tmp_path / "m.zarr").read("period-0000", "manifest.json")
    assert manifest["task_memory_bytes"]["most"] == max(t["memory_bytes"] for t in tasks)
    assert manifest["task_seconds"]["median"] > 0
    text = place.read_text()
    assert f"cloudgate_tasks_total {len(tasks)}.0" in text
    assert 'cloudgate_periods_total{state="finished"} 1.0' in text
    assert f"cloudgate_bytes_read_total {sum(t['bytes_read'] for t in tasks):.0f}" in text.replace(".0\n", "\n")


def test_a_failure_is_told_and_a_secret_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "very-secret-token")
    objects = objects_at(str(tmp_path / "m.zarr.run"))

    def fails():
        with journal.recording(Silent(), objects, "m.zarr") as told:
            told.say("read https://host/a.tif?sig=abc with very-secret-token")
            raise StoreError("no space at s3://bucket/x?key=abc")

    with pytest.raises(StoreError):
        fails()
    text = (tmp_path / "m.zarr.run" / "log.jsonl").read_text()
    assert "no space" in text
    assert '"state": "failed"' in text
    assert "abc" not in text
    assert "very-secret" not in text


def test_a_bucket_gets_its_lines_in_one_object(tmp_path):
    class Bucket:
        def __init__(self):
            self.kept = {}

        def put(self, name, data):
            self.kept[name] = data

    bucket = Bucket()
    told = Journal(Silent(), bucket, "s3://b/m.zarr")
    told.event("task", period=0, task="0-0-0")
    assert bucket.kept == {}
    told.close()
    ((name, data),) = bucket.kept.items()
    assert name == f"log-{told.common['run']}.jsonl"
    assert json.loads(data)["task"] == "0-0-0"


def test_the_last_success_outlives_the_process_that_had_it(tmp_path):
    place = tmp_path / "cloudgate.prom"
    first = Metrics(str(place))
    first.take("period", {"state": "finished"})
    line = next(line for line in place.read_text().splitlines() if line.startswith("cloudgate_last_success"))
    assert float(line.split()[1]) > 1e9
    Metrics(str(place)).write()  # as the next tick's process does before it has anything to do
    assert line in place.read_text().splitlines()


def test_metrics_are_served_on_loopback():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        unused_port = probe.getsockname()[1]
    made = Metrics(str(unused_port))
    made.take("task", {"bytes_read": 5, "seconds": 2.0})
    with urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/metrics") as answer:
        assert b"cloudgate_bytes_read_total 5.0" in answer.read()
    made.close()


def test_a_log_that_grew_is_put_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MOST_BYTES", 100)
    for number in range(30):
        journal.append(tmp_path / "log.jsonl", f"line {number}")
    assert (tmp_path / "log.1.jsonl").exists()
    assert (tmp_path / "log.jsonl").stat().st_size <= 110
