"""Secrets planted in environment, addresses and hooks appear nowhere: not in what a run tells, records or sends."""

import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import cloudpickle
import pytest
import yaml
from loopback import RangeHandler, serve
from rich.console import Console
from small_region import InlineClient
from typer.testing import CliRunner

from pipeline.agenda import listing
from pipeline.cli import app
from pipeline.faults import Faults
from pipeline.jobfile import job_from_dict
from pipeline.mosaic import plan
from pipeline.periodic import tick
from pipeline.progress import Terminal
from pipeline.recipe import Recipe
from pipeline.schedule import load_schedule
from pipeline.serve import RangeServer
from pipeline.store import open_mosaic

ENVIRONMENT = {
    "PLANTED_TOKEN": 'planted-"token"-71',
    "AWS_ACCESS_KEY_ID": "planted-aws-id-72",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/73",
    "PC_SDK_SUBSCRIPTION_KEY": "planted-subscription-74",
}
SIGNATURE, USER, CATALOG, WEBHOOK = "planted-sig-81", "planted-user-82", "planted-catalog-83", "planted-webhook-84"
PLANTED = [*ENVIRONMENT.values(), 'planted-\\"token', SIGNATURE, USER, CATALOG, WEBHOOK]


class Listening(InlineClient):
    """Keeps what would go over the wire, pickled as Dask does; what a recipe packs itself also unpacked."""

    sent = b""

    def submit(self, function, *args, key="", **more):
        plain = [arg.__dict__ if isinstance(arg, Recipe) else arg for arg in args]
        self.sent += cloudpickle.dumps((function, [p for p in plain if not hasattr(p, "work")], key, more))
        return super().submit(function, *args, key=key, **more)


class Hooked(RangeHandler):
    """A webhook that always fails."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.refuse(400)


@pytest.fixture
def planted(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def _signed(small, url: str, path: Path) -> None:
    """The items of June with signed addresses."""
    found = [f for f in json.loads(small.items.read_text())["features"] if f["properties"]["datetime"] < "2021-07-01"]
    for feature in found:
        for asset in feature["assets"].values():
            if asset["href"].startswith("./"):
                asset["href"] = f"{url}/{asset['href'].removeprefix('./')}?se=2030&sig={SIGNATURE}"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": found}))


def test_a_planted_secret_appears_nowhere(small, tmp_path, monkeypatch, planted):
    (tmp_path / "catalog").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("CLOUDGATE_METRICS", str(tmp_path / "out" / "cloudgate.prom"))
    screen, client = io.StringIO(), Listening(monkeypatch)
    with (
        RangeServer(small.folder, faults=Faults(vanished=("*20210629*B04*",))) as pixels,
        RangeServer(tmp_path / "catalog") as catalog,
        serve(type("Hook", (Hooked,), {"requests": []})) as hook,
    ):
        _signed(small, pixels.url, tmp_path / "catalog" / "items.json")
        place = catalog.url.replace("http://", f"http://{USER}:word@") + f"/items.json?token={CATALOG}"
        told = "import os, sys; sys.exit('no: ' + os.environ['PLANTED_TOKEN'])"
        fields = small.fields(
            catalog=place,
            area={"bbox": small.bbox((200, 320), (200, 320))},
            grid={"crs": "EPSG:32633", "shard_px": 64},
            bands=["red"],
            time=None,
            target="middle",
            output={"store": str(tmp_path / "out" / "m.zarr")},
            limits={"max_failed_fraction": 0.001},
        )
        file = tmp_path / "schedule.yaml"
        hooks = [{"webhook": f"{hook}/{WEBHOOK}?key={WEBHOOK}"}, {"command": [sys.executable, "-c", told]}]
        spec = {"job": fields, "every": "month", "start": "2021-06-01", "end": "2021-06-30"}
        file.write_text(yaml.safe_dump(spec | {"on_failure": hooks, "on_success": hooks}))
        now, progress = datetime(2021, 7, 20, tzinfo=UTC), Terminal(Console(file=screen, width=200))
        failed = tick(schedule=load_schedule(file), now=now, client=client, progress=progress)
        assert "TooManyFailures" in failed.built[0]["message"]
        loose = load_schedule(file, overrides=["limits.max_failed_fraction=0.9"])
        later = datetime(2021, 7, 21, tzinfo=UTC)
        report = tick(schedule=loose, now=later, client=client, progress=progress)
        assert report.built[0]["state"] == "done"
        assert len(report.warnings) == 2  # both hooks failed, and said so
        planned = plan(job=job_from_dict(fields | {"time": {"start": "2021-06-01", "end": "2021-06-30"}}))
    assert open_mosaic(store=tmp_path / "out" / "m.zarr").sizes["time"] == 1
    status = CliRunner().invoke(app, ["status", str(tmp_path / "out" / "m.zarr"), "--json"])
    assert status.exit_code == 0
    heard = {
        "the screen": screen.getvalue(),
        "reports": json.dumps([failed.__dict__, report.__dict__], default=str),
        "standings": json.dumps(listing(schedule=loose, now=later)),
        "the plan": json.dumps(planned.__dict__, default=str),
        "status": status.stdout,
        "pickles": client.sent.decode("latin-1"),
    }
    heard |= {str(p): p.read_text(encoding="latin-1") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    names = ("log.jsonl", "ledger.json", "manifest.json", "items.json", "request.json", "cloudgate.prom", "zarr.json")
    for name in names:
        assert any(where.endswith(name) for where in heard), name
    assert "20210629" in "".join(heard[where] for where in heard if where.endswith("log.jsonl"))
    found = {(where, secret) for where, text in heard.items() for secret in PLANTED if secret in text}
    assert found == set()
    for line in next(text for where, text in heard.items() if where.endswith("log.jsonl")).splitlines():
        json.loads(line)
