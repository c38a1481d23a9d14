"""Stores out of reach, forbidden, absent, full: a clear word, and the same command goes on to the same bytes."""

import os
import select
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import loopback
import numpy as np
import pytest
import yaml
from small_region import InlineClient, SmallRegion, objects
from test_bad_input import _small_disk
from test_schedule import World
from typer.testing import CliRunner
from view_stores import get

from pipeline import doctor
from pipeline import ledger as ledgers
from pipeline import objects as places
from pipeline.cli import app
from pipeline.config import Job
from pipeline.errors import StoreError
from pipeline.lock import hold
from pipeline.mosaic import build
from pipeline.objects import objects_at, s3_store
from pipeline.records import RunFolder
from pipeline.status import status
from pipeline.store import open_mosaic, read_attrs
from pipeline.view_server import MapServer


class Relay(socketserver.ThreadingTCPServer):
    """A relay to the S3 server that can be cut, and come back on the same port."""

    allow_reuse_address = True

    def __init__(self, far: tuple[str, int], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Carry)
        self.far, self.open = far, list[socket.socket]()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def cut(self) -> None:
        self.shutdown()
        self.thread.join()
        self.socket.close()  # from now on connections are refused
        for one in self.open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Carry(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        with socket.create_connection(self.server.far) as far:
            near = self.request
            self.server.open += [near, far]
            with suppress(OSError):
                while True:
                    for one in select.select([near, far], [], [])[0]:
                        data = one.recv(65536)
                        if not data:
                            return
                        (far if one is near else near).sendall(data)


@pytest.fixture
def relay(bucket, monkeypatch) -> Iterator[list[Relay]]:
    """The relay in use (the last): whoever talks to the bucket goes through it."""
    at = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    relays = [Relay((at.hostname or "", at.port or 0))]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relays[0].server_address[1]}")
    s3_store.cache_clear()
    yield relays
    with suppress(OSError):
        relays[-1].cut()
    s3_store.cache_clear()


def _back(relays: list[Relay]) -> None:
    relays.append(Relay(relays[0].far, relays[0].server_address[1]))


def _job(small: SmallRegion, where: str) -> Job:
    """Four shards, each a task where tasks are small."""
    fields = {
        "area": {"bbox": small.bbox((40, 160), (120, 240))},
        "grid": {"crs": "EPSG:32633", "shard_px": 64},
        "bands": ["blue"],
        "time": {"start": "2021-06-11", "end": "2021-06-30"},
        "target": None,
        "offset_dn": 0,
        "output": {"store": where},
        "cluster": {"workers": 4},  # so that tasks are not made wider
    }
    return small.job(**fields)


@pytest.fixture
def small_tasks(monkeypatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("pipeline.planning.TASK_PX", 16)
    return monkeypatch


@pytest.fixture(scope="module")
def quiet(small, tmp_path_factory) -> Path:
    """The job's store in a folder, without a fault."""
    path = tmp_path_factory.mktemp("quiet") / "m.zarr"
    with pytest.MonkeyPatch.context() as patch:
        build(job=_job(small, str(path)), client=InlineClient(patch))
    return path


def _equal(where: str, quiet: Path) -> None:
    mine, theirs = open_mosaic(store=where), open_mosaic(store=quiet)
    assert list(mine.data_vars) == list(theirs.data_vars)
    for name in theirs.data_vars:
        np.testing.assert_array_equal(mine[name].values, theirs[name].values, err_msg=name)
    if not where.startswith("icechunk"):
        there = objects_at(where)
        assert {name: there.get(name)[0] for name in there.names()} == objects(quiet)


def _at_first_mark(patch: pytest.MonkeyPatch, event) -> None:
    mark, marks = RunFolder.mark, []

    def marking(self, *args, **more):
        if not marks:
            event()
        marks.append(1)
        mark(self, *args, **more)

    patch.setattr(RunFolder, "mark", marking)


@pytest.fixture
def place(bucket, tmp_path) -> str:
    return f"{bucket}/{tmp_path.name}/m.zarr"


@pytest.fixture(params=["", "icechunk:"], ids=["bucket", "icechunk-bucket"])
def where(request, place) -> str:
    return request.param + place


def test_a_run_waits_for_a_store_that_is_away_for_a_moment(where, relay, small, quiet, small_tasks):
    def away() -> None:
        relay[-1].cut()
        timer.start()

    timer = threading.Timer(1.0, _back, [relay])
    _at_first_mark(small_tasks, away)
    build(job=_job(small, where), client=InlineClient(small_tasks))
    timer.join()
    _equal(where, quiet)


def test_a_store_that_stays_away_ends_the_run_and_the_same_command_goes_on(place, relay, small, quiet, small_tasks):
    small_tasks.setattr(places, "RETRY_TIMEOUT", places.timedelta(seconds=1))
    small_tasks.setattr("pipeline.lock.LEASE_S", 1.0)
    s3_store.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        _at_first_mark(patch, lambda: relay[-1].cut())
        with pytest.raises(StoreError, match=r"cannot .*m.zarr.*can be reached.*run the same command again") as told:
            build(job=_job(small, place), client=InlineClient(small_tasks))
    assert told.value.exit_code == 1
    _back(relay)
    assert read_attrs(place) is None
    assert status(place)["periods"][0]["state"] == "unfinished"
    build(job=_job(small, place), client=InlineClient(small_tasks))
    _equal(place, quiet)


def test_a_page_says_that_its_store_is_away_and_shows_it_again(place, relay, small, small_tasks):
    build(job=_job(small, place), client=InlineClient(small_tasks))
    small_tasks.setattr(places, "RETRY_TIMEOUT", places.timedelta(seconds=1))
    s3_store.cache_clear()
    tile = "tile/0/0/0/0/0.png?layer=flags&range="
    with MapServer([place], 0) as server:
        relay[-1].cut()
        for address in (tile, "api/mosaics"):
            status, said = get(server.url + address)
            assert status == 502, said
            assert b"check that the store can be reached" in said
            assert b"of-the-tests" not in said
        _back(relay)
        for address in ("api/mosaics", tile):
            assert get(server.url + address)[0] == 200


@pytest.mark.parametrize("command", [["view", "--no-browser"], ["preview"], ["export", "--cog", "tif"]])
def test_a_bucket_or_mosaic_that_is_not_there_is_told_to_who_looks(where, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, code, words in (
        (where, 2, "there is n"),
        (where.replace("mosaics", "nowhere"), 1, "there is no such bucket"),
    ):
        done = CliRunner().invoke(app, [command[0], place, *command[1:]])
        assert done.exit_code == code, done.output
        assert words in " ".join(done.output.split())
        assert "of-the-tests" not in done.output
    assert list(tmp_path.iterdir()) == []


class ReadOnly(BaseHTTPRequestHandler):
    """An empty bucket that these credentials may only read."""

    def log_message(self, *_):
        pass

    def _say(self, status: int, body: str) -> None:
        data = f'<?xml version="1.0" encoding="UTF-8"?>{body}'.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        if "list-type" in self.path:
            return self._say(200, "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        return self._say(404, "<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._say(403, "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")


def _command(small: SmallRegion, where: str, folder: Path) -> tuple[int, str]:
    (folder / "job.yaml").write_text(yaml.safe_dump(small.fields()))
    done = CliRunner().invoke(app, ["mosaic", str(folder / "job.yaml"), "--out", where])
    return done.exit_code, done.stderr


def test_a_bucket_one_may_not_write_is_told(where, small, tmp_path, monkeypatch):
    with loopback.serve(ReadOnly) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3_store.cache_clear()
        code, said = _command(small, where, tmp_path)
        told = doctor._place(_job(small, where))
    s3_store.cache_clear()
    assert code == 1
    assert "the credentials do not allow it; check AWS_ACCESS_KEY_ID" in said
    assert "secret-of-the-tests" not in said
    assert len(said.strip().splitlines()) == 1
    assert not told.ok
    assert "the credentials do not allow it" in told.found


def test_a_bucket_that_is_not_there_is_told(where, small, tmp_path):
    code, said = _command(small, where.replace("mosaics", "nowhere"), tmp_path)
    assert code == 1
    assert "there is no such bucket; create it, or check the name" in said
    assert "secret-of-the-tests" not in said


def test_the_doctor_tries_the_bucket(where, small):
    told = doctor._place(_job(small, where))
    assert told.ok, told
    assert objects_at(f"{where.removeprefix('icechunk:')}.run").names() == []


@pytest.mark.parametrize("prefix", ["", "icechunk:"], ids=["folder", "icechunk"])
def test_a_disk_that_is_full_keeps_what_it_has_and_the_same_command_goes_on(
    prefix, small, quiet, tmp_path, small_tasks
):
    disk = tmp_path / "disk"
    with _small_disk(disk):
        job = _job(small, f"{prefix}{disk}/m.zarr")
        with pytest.MonkeyPatch.context() as patch:
            _at_first_mark(patch, lambda: _fill(disk))
            with pytest.raises(StoreError, match=r"(?i)no space left.*free space.*run the same command again"):
                build(job=job, client=InlineClient(small_tasks))
        assert read_attrs(f"{prefix}{disk}/m.zarr") is None
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        build(job=job, client=InlineClient(small_tasks))
        _equal(f"{prefix}{disk}/m.zarr", quiet)


def _fill(disk: Path) -> None:
    with suppress(OSError), (disk / "ballast").open("wb") as file:
        while True:
            file.write(bytes(1024))
            file.flush()


# -- schedules --------------------------------------------------------------------------------------------------


def test_a_tick_on_a_bucket_keeps_its_ledger_there(place, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = World(small, tmp_path, InlineClient(monkeypatch))
    fields = yaml.safe_load(world.write().read_text())
    store = place.replace("m.zarr", "{area}.zarr")
    fields["job"] |= {"output": {"store": store}, "catalog": str(tmp_path / "items.json")}
    built = world.tick("2021-06-24T00:00:00", job=fields["job"]).built
    assert [(one["slot"], one["state"]) for one in built] == [(0, "done")]
    assert world.tick("2021-06-24T00:00:00", job=fields["job"]).built == []
    assert [one["slot"] for one in world.tick("2021-07-04T00:00:00", job=fields["job"]).built] == [1]
    run = RunFolder(store.replace("{area}", "corner"))
    ledger = ledgers.load(run.objects)
    assert ledger is not None
    assert {slot: entry.state for slot, entry in ledger.periods.items()} == {0: "done", 1: "done"}
    assert open_mosaic(store=store.replace("{area}", "corner")).sizes["time"] == 2
    with hold(run):  # the lease is free again
        pass


def test_no_change_of_a_ledger_in_a_bucket_is_lost(bucket, tmp_path):
    objects = objects_at(f"{bucket}/{tmp_path.name}/x.run")

    def change(slot: int) -> None:
        entry = ledgers.Entry("done", "2021-07-01T00:00:00+00:00")
        ledgers.change(objects, "area", lambda ledger: ledger.periods.__setitem__(slot, entry))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(12)))
    ledger = ledgers.load(objects)
    assert ledger is not None
    assert sorted(ledger.periods) == list(range(12))
