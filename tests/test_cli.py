"""The commands on a small store: what they print, ``--json``, exit codes, no tracebacks but with ``--debug``."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ConfigError
from pipeline.store import open_mosaic


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory, cluster_fields):
    """A folder with a job file and its finished store."""
    path = tmp_path_factory.mktemp("cli")
    fields = small.fields(
        name="small",
        area={"bbox": small.bbox((200, 400), (200, 400))},
        grid={"crs": "EPSG:32633", "shard_px": 128},
        method={"name": "linear"},
        cluster=cluster_fields,
        output={"store": str(path / "m.zarr")},
    )
    (path / "job.yaml").write_text(yaml.safe_dump(fields))
    done = CliRunner().invoke(app, ["mosaic", str(path / "job.yaml")])
    assert done.exit_code == 0, done.output
    (path / "said.txt").write_text(done.stdout)
    return path


def _run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_mosaic_says_what_it_made(folder):
    said = " ".join((folder / "said.txt").read_text().split())
    assert "2021-06-11 to 2021-08-08, shown 2021-07-11: 32 scenes" in said
    assert "% filled" in said
    assert "anchors 2021-07-11_sentinel-2b_R079" in said
    assert f"{folder / 'm.zarr'}: done in" in said
    again = _run("mosaic", folder / "job.yaml", "--json")
    assert again.exit_code == 0
    told = json.loads(again.stdout)
    assert told["periods"][0]["message"] == "finished before"
    assert told["store"] == str(folder / "m.zarr")


def test_set_and_out_override_the_file(folder, tmp_path):
    done = _run("mosaic", folder / "job.yaml", "--set", "method.name=median", "--out", tmp_path / "o.zarr", "--json")
    assert done.exit_code == 0, done.output
    facts = open_mosaic(store=tmp_path / "o.zarr").attrs["cloudgate"]["periods"]["0"]
    assert facts["method"]["name"] == "median"
    assert facts["anchors"] == []


def test_status_before_and_after(folder, tmp_path):
    told = json.loads(_run("status", folder / "m.zarr", "--json").stdout)
    assert told["periods"][0]["state"] == "finished"
    assert told["periods"][0]["shards_done"] == told["periods"][0]["shards"] == 4
    assert told["periods"][0]["filled_percent"] > 99
    assert "finished" in _run("status", folder / "m.zarr").stdout
    nothing = _run("status", tmp_path / "none.zarr")
    assert nothing.exit_code == 2
    assert "no run is recorded" in nothing.stderr


def test_search_lists_and_freezes_what_replays(folder, tmp_path):
    told = json.loads(_run("search", folder / "job.yaml", "--json").stdout)
    assert len(told["items"]) == 32
    assert [why for name, why in told["dropped"]] == ["duplicate of S2B_33TWM_20210711_1_L2A: baseline 03.01 < 05.00"]
    saved = _run("search", folder / "job.yaml", "--save", tmp_path / "items.json")
    assert saved.exit_code == 0
    replayed = _run("search", folder / "job.yaml", "--set", f"catalog={tmp_path / 'items.json'}", "--json")
    assert json.loads(replayed.stdout)["items"] == told["items"]


def test_plan_tells_offsets_anchors_and_tasks(folder):
    told = json.loads(_run("plan", folder / "job.yaml", "--json").stdout)
    period = told["periods"][0]
    assert period["acquisitions"] == 16
    assert period["shards"] == 4
    assert period["tasks"] >= 1
    assert {value["dn"] for value in period["offsets"].values()} == {0, -1000}
    assert period["anchors"][0] == "2021-07-11_sentinel-2b_R079"
    plain = _run("plan", folder / "job.yaml")
    assert plain.exit_code == 0
    assert "2021-07-09" in plain.stdout
    assert " ".join(plain.stdout.split()).endswith("about 0 s on 2 workers (all tasks are done)")
    assert "offsets" not in json.loads(_run("plan", folder / "job.yaml", "--no-scout", "--json").stdout)["periods"][0]


def test_a_run_tells_logs_and_metrics_where_it_is_asked_to(folder, tmp_path):
    log, metrics = tmp_path / "runs.jsonl", tmp_path / "cloudgate.prom"
    done = _run("mosaic", folder / "job.yaml", "--log", log, "--metrics", metrics)
    assert done.exit_code == 0, done.output
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["state"] for line in told if line["event"] == "run"] == ["begun", "ended"]
    assert 'cloudgate_periods_total{state="finished"} 1.0' in metrics.read_text()
    assert '"state": "ended"' in _run("mosaic", folder / "job.yaml", "--log", "-").stderr
    assert len(log.read_text().splitlines()) == len(told)  # asked for once
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for option, place in (("--metrics", taken.getsockname()[1]), ("--log", tmp_path / "none" / "x")):
            refused = _run("mosaic", folder / "job.yaml", option, place)
            assert refused.exit_code == 2
            assert "give a file in a folder that can be written" in " ".join(refused.output.split())


def test_preview_draws_the_mosaic(folder, tmp_path):
    done = _run("preview", folder / "m.zarr", "--out", tmp_path / "p.png")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
    wrong = _run("preview", folder / "m.zarr", "--period", "3")
    assert wrong.exit_code == 2
    assert "period: 3 is not there" in wrong.stderr


def test_tracebacks_only_with_debug(tmp_path):
    assert _run("mosaic", tmp_path / "none.yaml").exit_code == 2
    shown = _run("mosaic", tmp_path / "none.yaml", "--debug")
    assert isinstance(shown.exception, ConfigError)


@pytest.mark.parametrize("command", ["demo", "search", "plan", "mosaic", "status", "simulate", "preview", "doctor"])
def test_every_command_shows_an_example(command):
    done = _run(command, "--help")
    assert done.exit_code == 0
    assert f"cloudgate {command}" in done.stdout


def test_a_second_call_to_end_does_not_cut_the_first_short():
    script = """
import atexit, os, signal
from pipeline import cli

cli.app = lambda **_: os.kill(os.getpid(), signal.SIGTERM)
atexit.register(print, "released", flush=True)
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "released\n", "")
