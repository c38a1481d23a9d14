"""Schedules: what is due is a pure function; ticks search once, build once, retry, revisit; nothing is lost."""

import json
import multiprocessing
import sys
import threading
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from small_region import InlineClient, objects, same_objects
from typer.testing import CliRunner

from pipeline import ledger as ledgers
from pipeline import periodic as ticks
from pipeline.agenda import listing
from pipeline.cli import app
from pipeline.due import begun, due
from pipeline.errors import CatalogError, ConfigError, RunError, StoreMismatchError, TooManyFailuresError
from pipeline.events import read_item
from pipeline.ledger import DamagedLedger, Entry, Ledger
from pipeline.lock import hold
from pipeline.mosaic import build
from pipeline.objects import objects_at
from pipeline.periodic import backfill, tick
from pipeline.records import RunFolder
from pipeline.schedule import load_schedule
from pipeline.store import open_mosaic

AFAR = {"bbox": [20.0, 40.0, 20.1, 40.1]}


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.fixture
def http_sink():
    """A loopback server that keeps what is posted: 200, or 403 under /refused."""
    got: list[bytes] = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(403 if self.path.startswith("/refused") else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keep)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def world(small, tmp_path, monkeypatch):
    """A schedule of ten-day periods since 2021-06-11 on a corner of the region, with its catalog's file."""
    monkeypatch.chdir(tmp_path)
    return World(small, tmp_path, InlineClient(monkeypatch))


class World:
    def __init__(self, small, folder: Path, client) -> None:
        self.small, self.folder, self.client, self.ran = small, folder, client, []
        self.appear(lambda fs: fs)

    def appear(self, change) -> None:
        """The catalog now holds these scenes."""
        self.small.changed_items(self.folder / "items.json", change)

    def write(self, **changes) -> Path:
        fields = {
            "job": {
                "catalog": "items.json",
                "grid": {"crs": "EPSG:32633", "shard_px": 128},
                "bands": ["blue"],
                "method": {"name": "median"},
                "offset_dn": 0,
                "output": {"store": "{area}.zarr"},
            },
            "areas": {"corner": {"bbox": self.small.bbox((40, 160), (120, 240))}},
            "every": "10 days",
            "start": "2021-06-11",
            "delay_days": 2,
        } | changes
        path = self.folder / "schedule.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
        return path

    def load(self, **changes):
        return load_schedule(self.write(**changes))

    def tick(self, now: str, **changes):
        return tick(schedule=self.load(**changes), now=at(now), client=self.client)

    def ledger(self, area: str = "corner") -> Ledger:
        found = ledgers.load(RunFolder(f"{area}.zarr").objects)
        assert found
        return found

    def states(self) -> dict[int, str]:
        return {slot: entry.state for slot, entry in self.ledger().periods.items()}


# -- due(): a pure function --------------------------------------------------------------------------------------


def _stand(world, now: str, entries: dict[int, Entry], items=None, **changes) -> list[tuple[int, str, bool]]:
    loaded = world.load(**changes)
    periods = begun(loaded.series[0], loaded.spec, at(now))
    standings = due(periods, items, Ledger("corner", periods=entries), at(now), loaded.spec)
    return [(s.period.slot, s.state, s.run) for s in standings]


def _done(when: str, *items: str, **more) -> Entry:
    return Entry("done", at(when).isoformat(), items=sorted(items), **more)


def test_a_period_is_due_when_it_is_over_and_its_delay_is(world):
    assert _stand(world, "2021-06-22T23:59:59", {}) == [(0, "waiting", False), (1, "waiting", False)]
    assert _stand(world, "2021-06-23T00:00:00", {})[0] == (0, "due", True)
    assert [s for _, s, _ in _stand(world, "2021-07-13T00:00:00", {}, end="2021-06-30")] == ["due", "due"]
    assert _stand(world, "2021-06-01T00:00:00", {}) == []


def test_new_scenes_make_a_revisited_period_stale_and_gone_ones_do_not(world):
    entries = {slot: _done("2021-08-01", "a", "b") for slot in range(4)}
    found = {0: {"a", "b", "c"}, 1: {"a", "b", "c"}, 2: {"a"}, 3: {"a", "b"}}
    now = "2021-07-23T12:00:00"  # four periods are ripe
    entries = {slot: _done("2021-07-23T11:00:00", "a", "b") for slot in range(4)}
    stood = _stand(world, now, entries, found, revisit=3)
    assert stood[:4] == [(0, "stale", False), (1, "stale", True), (2, "done", False), (3, "done", False)]
    assert _stand(world, now, entries, None, revisit=3)[1] == (1, "done", False)  # nobody searched


def test_a_failed_period_waits_longer_each_time_and_is_given_up_in_the_end(world):
    loaded = world.load(retries={"most": 3, "wait_hours": 2, "factor": 3, "longest_hours": 10})
    waits = [loaded.spec.retries.wait(n) / timedelta(hours=1) for n in (1, 2, 3, 4)]
    assert waits == [2, 6, 10, 10]
    now = "2021-06-25T12:00:00"
    failed = {"state": "failed", "at": at("2021-06-25T11:00:00").isoformat(), "items": ["a"]}
    later, sooner = at("2021-06-25T12:01:00").isoformat(), at("2021-06-25T11:59:00").isoformat()
    assert _stand(world, now, {0: Entry(**failed, attempts=1, retry_at=later)})[0] == (0, "failed", False)
    assert _stand(world, now, {0: Entry(**failed, attempts=1, retry_at=sooner)})[0] == (0, "failed", True)
    assert _stand(world, now, {0: Entry(**failed, attempts=6, retry_at=sooner)})[0] == (0, "failed", False)
    given_up = {0: Entry(**failed, attempts=6, retry_at=sooner)}
    assert _stand(world, now, given_up, {0: {"a", "late"}})[0] == (0, "failed", True)  # but not when scenes appear


def test_what_was_built_before_its_end_is_checked_once_it_is_over(world):
    early = {0: _done("2021-06-15", "a")}
    assert _stand(world, "2021-06-16", early)[0] == (0, "done", False)
    assert _stand(world, "2021-06-23", early, revisit=0)[0] == (0, "due", True)
    assert _stand(world, "2021-06-23", early, {0: {"a"}}, revisit=0)[0] == (0, "done", False)


def test_a_ledger_of_the_future_holds_nothing_back(world):
    entries = {0: _done("2099-01-01", "a"), 1: Entry("empty", at("2099-01-01").isoformat(), items=[])}
    entries[2] = Entry("failed", at("2099-01-01").isoformat(), attempts=2, retry_at=at("2099-01-02").isoformat())
    stood = _stand(world, "2021-07-03", entries)
    assert stood == [(0, "due", True), (1, "due", True), (2, "failed", True)]
    assert _stand(world, "2021-06-22", entries)[1] == (1, "empty", False)  # not over yet


# -- ticks -------------------------------------------------------------------------------------------------------


def test_ticks_follow_the_clock_and_search_once_per_span(world, monkeypatch):
    searched = []
    resolve = ticks.resolve
    monkeypatch.setattr(
        ticks, "resolve", lambda job, *, slots: searched.append(list(slots)) or resolve(job, slots=slots)
    )
    assert world.tick("2021-06-20").built == []
    assert searched == []
    first = world.tick("2021-07-03T01:00:00")  # two periods are over, nobody called before
    assert [(b["slot"], b["state"]) for b in first.built] == [(0, "done"), (1, "done")]
    again = world.tick("2021-07-03T02:00:00")
    assert (again.built, again.failed) == ([], [])
    assert searched == [[0, 1], [0, 1]]
    assert [b["slot"] for b in world.tick("2021-07-14").built] == [2]
    assert searched[2] == [1, 2]  # one search for the new period and the one that is revisited
    plain = world.load().series[0].job
    build(job=plain.model_copy(update={"output": plain.output.model_copy(update={"store": "plain.zarr"})}),
          slots=[0, 1, 2], client=world.client)  # fmt: skip
    same_objects(world.folder / "corner.zarr", world.folder / "plain.zarr")


def test_a_late_scene_makes_its_period_stale_and_a_tick_rewrites_only_that(world):
    late = "2021-06-24"
    world.appear(lambda fs: [f for f in fs if not f["properties"]["datetime"].startswith(late)])
    world.tick("2021-07-14")
    before = objects(world.folder / "corner.zarr")
    key = world.ledger().periods[1].key
    world.appear(lambda fs: fs)
    loaded = world.load(revisit=2)
    shown, _ = listing(schedule=loaded, now=at("2021-07-14T06:00:00"))
    assert [s["state"] for s in shown["corner"][:3]] == ["done"] * 3  # nobody has searched yet
    shown, _ = listing(schedule=loaded, now=at("2021-07-14T06:00:00"), check=True)
    assert [s["state"] for s in shown["corner"][:3]] == ["done", "stale", "done"]
    shown, _ = listing(schedule=loaded, now=at("2021-07-14T07:00:00"))
    assert shown["corner"][1]["state"] == "stale"  # remembered
    assert objects(world.folder / "corner.zarr") == before
    report = world.tick("2021-07-14T08:00:00")
    assert [(b["slot"], b["state"]) for b in report.built] == [(1, "done")]
    after = objects(world.folder / "corner.zarr")
    changed = {name for name in after if after[name] != before.get(name)}
    assert any("/c/1/" in name for name in changed)
    assert not [name for name in changed if "/c/0/" in name or "/c/2/" in name]
    assert world.ledger().periods[1].key != key
    assert world.tick("2021-07-14T09:00:00").built == []


def test_failures_are_retried_with_back_off_reported_and_never_stop_the_others(world, monkeypatch):
    real = ticks.build

    def broken(**arguments):
        if arguments["slots"] == [0] and world.ran is not None:
            raise TooManyFailuresError("9 of 10 reads failed")
        return real(**arguments)

    monkeypatch.setattr(ticks, "build", broken)
    first = world.tick("2021-07-03T00:00:00")
    assert [(b["slot"], b["state"]) for b in first.built] == [(0, "failed"), (1, "done")]
    assert first.failed[0]["at"].startswith("2021-07-03T01:00")
    assert world.tick("2021-07-03T00:30:00").built == []
    assert world.tick("2021-07-03T00:30:00").failed[0]["slot"] == 0  # still told
    second = world.tick("2021-07-03T01:00:00")
    assert (second.built[0]["attempts"], second.built[0]["retry_at"][:16]) == (2, "2021-07-03T03:00")
    asked = {}
    monkeypatch.setattr(ticks, "build", lambda **a: asked.update(a) or real(**a))
    assert [(b["slot"], b["state"]) for b in world.tick("2021-07-03T03:00:00").built] == [(0, "done")]
    assert asked["anew"]  # the shards whose reads failed are read again
    assert open_mosaic(store="corner.zarr").sizes["time"] == 2


def test_a_catalog_that_does_not_answer_is_a_failure_and_one_without_scenes_an_empty_slot(world, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ticks, "resolve", lambda job, slots: (_ for _ in ()).throw(CatalogError("catalog: no answer")))
        assert [b["state"] for b in world.tick("2021-06-23").built] == ["failed"]
    world.appear(lambda fs: [f for f in fs if f["properties"]["datetime"] > "2021-07"])
    report = world.tick("2021-07-03")
    assert [(b["slot"], b["state"]) for b in report.built] == [(0, "empty"), (1, "empty")]
    assert report.failed == []
    assert {s["state"] for s in report.standings["corner"]} == {"empty"}  # reported, not skipped in silence
    world.appear(lambda fs: fs)
    assert {b["state"] for b in world.tick("2021-07-03T06:00:00").built} == {"done"}


def test_a_catalog_that_does_not_answer_leaves_finished_periods_as_they_are(world, monkeypatch):
    world.tick("2021-06-23")
    whole = world.ledger().periods[0]
    with monkeypatch.context() as patch:
        patch.setattr(ticks, "resolve", lambda job, slots: (_ for _ in ()).throw(CatalogError("catalog: no answer")))
        report = world.tick("2021-07-03")
    assert [(b["slot"], b["state"]) for b in report.built] == [(1, "failed")]
    assert world.ledger().periods[0] == whole
    assert report.warnings == ["corner 2021-06-11: not searched: catalog: no answer"]


def test_a_cluster_that_dies_in_a_tick_is_brought_up_again_for_the_next_period(world, monkeypatch, cluster_fields):
    real, clients = ticks.build, []

    def dies_once(**arguments):
        clients.append(arguments["client"])
        if len(clients) == 1:
            clients[0].close()  # as when its scheduler is gone
            raise RunError("the scheduler is gone")
        assert arguments["client"].submit(int, "3").result() == 3
        return real(**arguments | {"client": world.client})

    monkeypatch.setattr(ticks, "build", dies_once)
    job = yaml.safe_load(world.write().read_text())["job"] | {"cluster": cluster_fields}
    report = tick(schedule=world.load(job=job), now=at("2021-07-14"))
    assert [(b["slot"], b["state"]) for b in report.built] == [(0, "failed"), (1, "done"), (2, "done")]
    assert clients[1] is clients[2]  # one that answers is kept
    assert {client.status for client in clients} == {"closed"}  # all are released


def test_a_period_that_kills_its_run_waits_longer_each_time_and_is_given_up(world, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(**arguments):
        raise Killed

    monkeypatch.setattr(ticks, "build", kill)
    retries, now, ran = {"most": 2, "wait_hours": 1, "factor": 2}, at("2021-06-23"), []
    for hour in range(12):
        try:
            report = world.tick(f"{now + timedelta(hours=hour):%Y-%m-%dT%H:%M}", retries=retries)
        except Killed:
            ran.append(hour)
    assert ran == [0, 1, 2, 4]  # at once after the first, then with back-off
    assert "gave up after 3 runs" in report.failed[0]["why"]
    with pytest.raises(Killed):  # a person may insist
        backfill(schedule=world.load(retries=retries), first=date(2021, 6, 11), last=date(2021, 6, 20),
                 now=at("2021-06-24"), client=world.client)  # fmt: skip


def test_a_scene_announced_for_a_period_that_was_given_up_tries_it_again(world):
    world.load()
    entry = Entry("failed", at("2021-06-23").isoformat(), attempts=9, message="gave up")
    ledgers.change(RunFolder("corner.zarr").objects, "corner", lambda ledger: ledger.periods.update({0: entry}))
    assert world.tick("2021-07-23", end="2021-06-20", revisit=0).built == []
    items = json.loads((world.folder / "items.json").read_text())["features"]
    item = next(f for f in items if "2021-06-11" <= f["properties"]["datetime"][:10] <= "2021-06-16")
    loaded = world.load(end="2021-06-20", revisit=0)
    report = tick(schedule=loaded, now=at("2021-07-23"), item=item, client=world.client)
    assert [b["state"] for b in report.built] == ["done"]


def test_a_batch_of_announced_scenes_warns_only_of_those_that_are_missed(world):
    """They belong to two periods with one between, so to two searches."""
    items = json.loads((world.folder / "items.json").read_text())["features"]
    day = {n: next(f for f in items if f["properties"]["datetime"].startswith(n)) for n in ("2021-06-1", "2021-07-0")}
    batch = {"type": "FeatureCollection", "features": list(day.values())}
    loaded = world.load(areas={"corner": {"bbox": world.small.bbox((40, 160), (120, 240))}, "afar": AFAR})
    report = tick(schedule=loaded, now=at("2021-07-14"), item=batch, client=world.client)
    assert [(b["area"], b["slot"], b["state"]) for b in report.built] == [("corner", 0, "done"), ("corner", 2, "done")]
    assert report.warnings == []


def test_a_new_scene_is_used_at_once_in_its_areas_and_periods(world):
    areas = {"corner": {"bbox": world.small.bbox((40, 160), (120, 240))}, "afar": AFAR}
    features = json.loads((world.folder / "items.json").read_text())["features"]
    seen = [f for f in features if f["properties"]["datetime"][:10] <= "2021-06-16"]
    world.appear(lambda fs: [f for f in fs if f["id"] in {s["id"] for s in seen}])
    item = next(f for f in seen if f["properties"]["datetime"][:10] <= "2021-06-16")
    loaded = world.load(areas=areas)
    report = tick(schedule=loaded, now=at("2021-06-17"), item=item, client=world.client)
    assert [(b["area"], b["slot"], b["state"]) for b in report.built] == [("corner", 0, "done")]
    assert tick(schedule=loaded, now=at("2021-06-17T01:00:00"), item=item, client=world.client).built == []
    world.appear(lambda fs: fs)
    over = tick(schedule=world.load(), now=at("2021-06-23"), client=world.client)
    assert [(b["slot"], b["state"]) for b in over.built] == [(0, "done")]  # with the scenes of the rest of the period
    unknown = item | {"id": "S2Z_33TWM_20210613_0_L2A"}
    told = tick(schedule=world.load(), now=at("2021-06-23T01:00:00"), item=unknown, client=world.client)
    assert "S2Z_33TWM_20210613_0_L2A" in told.warnings[0]
    assert read_item(json.dumps({"Type": "Notification", "Message": json.dumps(item)})) == item
    with pytest.raises(ConfigError, match="a STAC Item"):
        read_item('{"type": "Collection"}')


def test_backfill_builds_what_is_missing_or_of_another_recipe(world):
    loaded = world.load()

    def fill(first, last, **more):
        days = {"first": date.fromisoformat(first), "last": date.fromisoformat(last)}
        done = backfill(schedule=loaded, now=at("2021-08-10"), client=world.client, **days, **more)
        return [b["slot"] for b in done.built]

    assert fill("2021-06-25", "2021-07-02") == [1, 2]
    assert fill("2021-06-11", "2021-07-02") == [0]
    assert fill("2021-06-11", "2021-07-02") == []
    assert fill("2021-06-11", "2021-06-12", again=True) == [0]
    job = yaml.safe_load((world.folder / "schedule.yaml").read_text())["job"] | {"method": {"name": "p25"}}
    loaded = world.load(job=job)
    before = objects(world.folder / "corner.zarr")
    assert fill("2021-06-21", "2021-06-30") == [1]
    assert fill("2021-06-21", "2021-06-30") == []
    plain = loaded.series[0].job
    build(job=plain.model_copy(update={"output": plain.output.model_copy(update={"store": "plain.zarr"})}),
          slots=[1], client=world.client)  # fmt: skip
    after, fresh = objects(world.folder / "corner.zarr"), objects(world.folder / "plain.zarr")
    shards = [name for name in after if "/c/1/" in name]
    assert [after[name] for name in shards] == [fresh[name] for name in shards]  # its own, as if made anew
    changed = {name for name in after if after[name] != before.get(name)}
    assert any("blue/c/1/" in name for name in changed)
    assert not [name for name in changed if "/c/0/" in name or "/c/2/" in name]
    with pytest.raises(ConfigError, match=r"--from: 2021-05-01 is earlier than the schedule's start"):
        fill("2021-05-01", "2021-07-10")
    with pytest.raises(ConfigError, match="swap them"):
        fill("2021-07-01", "2021-06-20")


def test_hooks_get_a_report_without_a_shell_and_harm_nothing(world):
    keep = [sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"]
    on_success = [{"command": [*keep, "$(touch owned); told.json"]}, {"command": ["no-such-program"]}]
    report = world.tick("2021-06-23", on_success=on_success)
    told = json.loads((world.folder / "$(touch owned); told.json").read_text())
    assert (told["area"], told["slot"], told["state"], told["store"]) == ("corner", 0, "done", "corner.zarr")
    assert told["outcome"]["filled"] > 0
    assert not (world.folder / "owned").exists()
    assert [b["state"] for b in report.built] == ["done"]
    assert "no-such-program: cannot be started" in report.warnings[0]


def test_a_webhook_is_posted_to_and_its_secret_is_never_told(world, http_sink):
    address, got = http_sink
    world.appear(lambda fs: [f for f in fs if f["properties"]["datetime"] > "2021-07"])
    hooks = {"on_failure": {"webhook": f"{address}/ok?token=planted"}}
    report = world.tick("2021-06-23", **hooks)
    assert (report.warnings, json.loads(got[0])["state"]) == ([], "empty")
    refused = world.tick("2021-07-03", on_failure={"webhook": f"{address}/refused?token=planted"})
    assert refused.warnings == ["hook to 127.0.0.1: status 403"]
    away = world.tick("2021-07-13", on_failure={"webhook": "http://127.0.0.1:9/x?token=planted", "timeout_s": 2})
    assert "planted" not in json.dumps([report.__dict__, refused.__dict__, away.__dict__], default=str)
    assert b"planted" not in b"".join(objects(world.folder / "corner.zarr.run").values())


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"every": "* * * * *"}, "fires several times a day, and periods of less than a day would overlap"),
        ({"every": "fortnight"}, "known are month"),
        ({"end": "2020-01-01"}, "is before start"),
        ({"strat": 1}, "there is no such field"),
        ({"areas": {"a b": {"mgrs": "33TWM"}}}, "cannot be part of a path"),
        ({"areas": ["33TWM", "33TWM"]}, "would overlap itself"),
        ({"areas": []}, "there is none"),
        ({"areas": "none.txt"}, "none.txt"),
        ({"on_success": {"command": "rm -rf /"}}, "on_success"),
        ({"on_success": {"webhook": "file:///etc/passwd"}}, "http"),
        ({"on_failure": {}}, "exactly one of command and webhook"),
        ({"job": "no.yaml"}, "there is no file"),
        ({"job": {"catalog": "items.json"}}, "output.store: this field is required"),
        ({"job": {"catalog": "items.json", "target": "2021-06-15", "output": {"store": "{area}.zarr"}}}, "exclude"),
    ],
)
def test_a_wrong_schedule_is_told_before_any_work(world, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_schedule(world.write(**changes))
    assert not list(world.folder.glob("*.run"))


def test_a_scheduled_job_looks_as_far_back_as_it_did_alone(world):
    job = yaml.safe_load(world.write().read_text())["job"]
    job["time"] = {"start": "2021-06-11", "end": "2021-06-20", "lookback_days": 45}
    assert world.load(job=job).series[0].job.time.lookback_days == 45
    assert world.load(job=job, lookback_days=10).series[0].job.time.lookback_days == 10
    with pytest.raises(ConfigError, match=r"job.time.lookback_days: 'far' is no number of days"):
        world.load(job=job | {"time": {"lookback_days": "far"}})


@pytest.mark.parametrize(("field", "said"), [("time.lookback_days=60", "lookback_days"), ("area.mgrs=32TPT", "areas")])
def test_what_a_schedule_says_itself_is_not_overridden_in_silence(world, field, said):
    with pytest.raises(
        ConfigError, match=rf"--set {field.partition('=')[0]}: a schedule says that itself; change {said}"
    ):
        load_schedule(world.write(), overrides=[field])


def test_two_areas_must_not_share_a_store(world):
    job = yaml.safe_load(world.write().read_text())["job"] | {"output": {"store": "one.zarr"}}
    with pytest.raises(ConfigError, match=r"the areas a and b would both write one.zarr.*put \{area\}"):
        world.load(job=job, areas={"a": {"mgrs": "33TWM"}, "b": {"mgrs": "33TWL"}})


def test_a_tick_leaves_an_area_to_the_run_that_works_on_it(world):
    world.load()
    ready, finish = multiprocessing.Event(), multiprocessing.Event()
    other = multiprocessing.get_context("fork").Process(target=_holds, args=("corner.zarr", ready, finish))
    other.start()
    assert ready.wait(20)
    try:
        report = world.tick("2021-06-23")
        assert report.built == []
        assert "corner: left out of this tick: another run works on corner.zarr" in report.warnings[0]
    finally:
        finish.set()
        other.join()
    assert [b["state"] for b in world.tick("2021-06-23").built] == ["done"]


def _holds(store, ready, finish) -> None:
    with hold(RunFolder(store)):
        ready.set()
        finish.wait(60)


def test_a_clock_that_goes_backwards_is_told_and_loses_nothing(world):
    world.tick("2021-07-14")
    before = objects(world.folder / "corner.zarr")
    report = world.tick("2021-06-24")
    assert "the clock went backwards: it is 2021-06-24" in report.warnings[0]
    assert report.failed == []
    assert open_mosaic(store="corner.zarr").sizes["time"] == 3
    forward = world.tick("2021-07-14T01:00:00")
    assert (forward.built, objects(world.folder / "corner.zarr")) == ([], before)
    _, warnings = listing(schedule=world.load(), now=at("2021-06-01"))
    assert "mend the clock" in warnings[0]


@pytest.mark.parametrize(
    "damage", [b"", b'{"format": "cloudgate-ledger", "vers', b"[]", b'{"format": "x"}', b"\xff\xfe"]
)
def test_a_damaged_ledger_is_made_again_from_the_run_records(world, damage):
    world.tick("2021-07-03")
    whole = world.ledger()
    (world.folder / "corner.zarr.run" / "ledger.json").write_bytes(damage)
    before = objects(world.folder / "corner.zarr")
    report = world.tick("2021-07-03T01:00:00")
    assert "was damaged" in report.warnings[0]
    assert "2 finished periods" in report.warnings[0]
    assert report.built == []  # its scenes are known from the records
    assert objects(world.folder / "corner.zarr") == before
    assert {s: e.items for s, e in world.ledger().periods.items()} == {s: e.items for s, e in whole.periods.items()}
    assert next((world.folder / "corner.zarr.run").glob("ledger.damaged-*.json")).read_bytes() == damage


def test_a_ledger_that_is_gone_is_made_again_too(world):
    world.tick("2021-07-03")
    (world.folder / "corner.zarr.run" / "ledger.json").unlink()
    assert world.tick("2021-07-03T01:00:00").built == []
    assert world.states() == {0: "done", 1: "done"}


def test_a_ledger_of_a_newer_version_is_left_alone(world):
    world.tick("2021-06-23")
    path = world.folder / "corner.zarr.run" / "ledger.json"
    newer = path.read_text().replace('"version": 1', '"version": 2')
    path.write_text(newer)
    areas = {name: {"bbox": world.small.bbox((40, 160), (120, 240))} for name in ("corner", "other")}
    report = world.tick("2021-06-24", areas=areas)
    assert path.read_text() == newer
    assert "update cloudgate" in report.broken["corner"]
    assert "corner: cannot be worked on" in report.warnings[0]
    assert [(b["area"], b["state"]) for b in report.built] == [("other", "done")]  # the areas after it are served
    told = _run("tick", world.write(areas=areas, end="2021-06-20"), "--area", "corner", "--json")
    assert (told.exit_code, "update cloudgate" in json.loads(told.stdout)["broken"]["corner"]) == (1, True)


def test_a_schedule_with_another_start_is_refused_and_nothing_is_lost(world):
    world.tick("2021-06-23")
    before = objects(world.folder / "corner.zarr")
    report = world.tick("2021-07-03", start="2021-06-01")
    assert any("start: 2021-06-01 is earlier than 2021-06-11" in b["message"] for b in report.built)
    assert objects(world.folder / "corner.zarr") == before
    with pytest.raises(StoreMismatchError):
        build(job=world.load(start="2021-06-01").series[0].job, slots=[0], client=world.client)


# -- the ledger --------------------------------------------------------------------------------------------------


def test_many_writers_lose_no_change(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_marks, [(str(tmp_path / "m.zarr.run"), n) for n in range(40)])
    ledger = ledgers.load(objects_at(str(tmp_path / "m.zarr.run")))
    assert ledger
    assert sorted(ledger.periods) == list(range(40))


def _marks(work: tuple[str, int]) -> None:
    def edit(ledger: Ledger) -> None:
        ledger.periods[work[1]] = Entry("done", at("2021-06-23").isoformat(), items=["a"])

    ledgers.change(objects_at(work[0]), "m", edit)


def test_a_ledger_reads_back_what_it_wrote_and_nothing_else():
    entry = Entry("failed", at("2021-06-23").isoformat(), "k", ["a"], 2, at("2021-06-24").isoformat(), "why", 1, "r")
    ledger = Ledger("m", at("2021-06-23").isoformat(), {3: entry, 11: _done("2021-06-23", "b")})
    assert Ledger.from_bytes(ledger.to_bytes()) == ledger
    for wrong in (b"{}", ledger.to_bytes().replace(b'"failed"', b'"fine"'), ledger.to_bytes()[:-20]):
        with pytest.raises(DamagedLedger):
            Ledger.from_bytes(wrong)


# -- the command line --------------------------------------------------------------------------------------------


def _run(*words):
    return CliRunner().invoke(app, ["schedule", *map(str, words)])


def test_the_commands_on_a_real_cluster(world, cluster_fields):
    sets = [w for k, v in cluster_fields.items() for w in ("--set", f"cluster.{k}={v}")]
    path = world.write(end="2021-06-21", every="month")
    listed = json.loads(_run("list", path, "--json").stdout)
    assert [s["state"] for s in listed["areas"]["corner"]] == ["due"]
    done = _run("tick", path, *sets)
    assert done.exit_code == 0, done.output
    assert "1 done" in done.stdout
    assert "nothing was due" in _run("tick", path, *sets).stdout
    assert "1 done" in _run("list", path, "--check").stdout
    filled = _run("backfill", path, "--from", "2021-06-11", "--to", "2021-06-30", "--json", *sets)
    assert json.loads(filled.stdout)["built"] == []
    for words, said in (
        (("tick", path, "--area", "nowhere"), "--area"),
        (("tick", path, "--part", "3/2"), "--part"),
        (("tick", path, "--part", "x"), "--part"),
        (("backfill", path, "--from", "soon", "--to", "2021-06-30"), "--from"),
        (("tick", path, "--item", "no.json"), "--item"),
    ):
        wrong = _run(*words)
        assert (wrong.exit_code, said in wrong.output) == (2, True), wrong.output


def test_a_tick_with_a_failed_period_exits_1(world):
    broken = yaml.safe_load(world.write().read_text())["job"] | {"catalog": "absent.json"}
    done = _run("tick", world.write(job=broken, end="2021-06-20"), "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["failed"][0]["state"] == "failed"
    assert "absent.json" in told["built"][0]["message"]


def test_part_shares_areas_out(world):
    loaded = world.load(areas=["33TWM", "33TWL", "33TVM", "33TVL", "33UXP"])
    shares = [[s.area for s in ticks.choose(loaded, (), (i, 2))] for i in range(2)]
    assert shares == [["33TWM", "33TVM", "33UXP"], ["33TWL", "33TVL"]]
