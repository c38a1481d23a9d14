"""The scout: offsets against contradicting metadata, whole scenes that fail, anchors; frozen once."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from pyproj import Transformer
from shapely.geometry import Point
from small_region import InlineClient, recipe, same_objects, undecidable

from pipeline import codes
from pipeline.errors import ItemError
from pipeline.grid import Grid
from pipeline.items import Asset, Item
from pipeline.mosaic import build
from pipeline.offsets import View, decide_offsets
from pipeline.profiles import load_profile
from pipeline.reader import close_handles, read_window
from pipeline.records import RunFolder
from pipeline.runner import Silent
from pipeline.scout import Scouted, _look, coarse_grid
from pipeline.store import open_mosaic
from pipeline.tasks import compose_window


def _view(
    name="A", *, baseline=None, flag=None, offset=None, level=300.0, clear=True, snow=False, tile="33TWL", seed=0
) -> View:
    """A coarse scene whose darkest band is around ``level`` DN, with bright ground and dark corners."""
    rng = np.random.default_rng(seed)
    ground = rng.gamma(4.0, 120.0, (40, 40)) + level
    asset = Asset("blue.tif", "EPSG:32633", (40, 40), (10, 0, 0, 0, -10, 0), offset=offset)
    item = Item(
        name,
        "2023-08-15T10:00:00Z",
        "c",
        None,
        tile,
        None,
        None,
        baseline,
        flag,
        None,
        None,
        (0, 0, 1, 1),
        {},
        {"blue": asset},
    )
    classes = np.full((40, 40), 11 if snow else 4, np.uint8)
    state = np.full((40, 40), codes.CLEAR if clear else codes.CLOUD, np.uint8)
    return View(item, classes, state, np.rint(ground).astype(np.uint16), (slice(40), slice(40)))


def _decided(view, profile, **more):
    return decide_offsets([view], "blue", load_profile(profile), **more)[0][view.item.id]


@pytest.mark.parametrize(
    ("profile", "facts", "offset", "why"),
    [
        # Earth Search: the flag counts where it is true, else the pixels are looked at
        ("earth-search", {"baseline": "05.00", "flag": True, "offset": -0.1}, 0, "flag earthsearch:boa_offset_applied"),
        ("earth-search", {"baseline": "05.00", "flag": False, "level": 1100.0}, -1000, "first percentile"),
        ("earth-search", {"baseline": "05.00", "flag": False, "level": 100.0, "offset": -0.1}, 0, "below 900"),
        ("earth-search", {"baseline": "03.01", "flag": False, "level": 1100.0}, 0, "before 04.00"),
        ("earth-search", {"baseline": "05.00", "flag": None, "level": 1100.0}, -1000, "first percentile"),
        # Planetary Computer says nothing: baseline, then the pixels
        ("planetary-computer", {"baseline": "05.09", "level": 1100.0}, -1000, "baseline 05.09"),
        ("planetary-computer", {"baseline": "05.09", "level": 100.0}, 0, "below 900"),
        ("planetary-computer", {"baseline": "02.12", "level": 100.0}, 0, "baseline 02.12 is before 04.00"),
        # CDSE states an offset per asset
        ("cdse", {"baseline": "05.11", "offset": -0.1, "level": 100.0}, -1000, "offset in the metadata"),
        # a policy of none is never argued with
        ("hls", {"baseline": None, "level": 1100.0}, 0, "carries no offset"),
    ],
)  # fmt: skip
def test_the_order_of_what_decides(profile, facts, offset, why):
    decided = _decided(_view(**facts), profile)
    assert decided[0] == offset
    assert why in decided[1]


def test_only_clear_ground_without_snow_is_looked_at():
    """Cloud and snow have no dark pixels: they would feign an offset."""
    with pytest.raises(ItemError, match="only 0 clear snow-free cells"):
        _decided(_view(baseline="05.09", level=4000.0, snow=True), "planetary-computer")


def test_a_scene_all_cloud_that_nothing_decides_is_cloud_and_asks_nobody():
    view = _view("clouded", baseline="05.09", level=4000.0, clear=False)
    offsets, clouded = decide_offsets([view], "blue", load_profile("planetary-computer"))
    assert clouded == ("clouded",)
    assert "only 0 clear" in offsets["clouded"][1]
    view.state[:4, :3] = codes.CLEAR  # 12 of 1600 cells
    assert decide_offsets([view], "blue", load_profile("planetary-computer"))[1] == ("clouded",)
    view.state[:4, :8] = codes.CLEAR  # 2 %: worth asking
    with pytest.raises(ItemError, match="only 32 clear snow-free cells"):
        decide_offsets([view], "blue", load_profile("planetary-computer"))


def test_the_tile_s_other_dates_decide_where_one_cannot():
    clouded = _view("clouded", baseline="05.09", clear=False)
    clouded.state[0, :20] = codes.CLEAR  # too little to decide, enough to ask
    for level, offset in ((1100.0, -1000), (100.0, 0)):
        others = [_view(f"other{i}", baseline="05.09", level=level, seed=i) for i in range(3)]
        decided, _ = decide_offsets([clouded, *others], "blue", load_profile("planetary-computer"))
        assert decided["clouded"][0] == offset
        assert "as the 3 other dates of tile 33TWL" in decided["clouded"][1]
    elsewhere = [_view("far", baseline="05.09", level=1100.0, tile="33TWM")]
    disagree = [_view("one", baseline="05.09", level=1100.0), _view("two", baseline="05.09", level=100.0)]
    for others in (elsewhere, disagree):
        with pytest.raises(ItemError, match=r"item clouded: .* set offset_dn: 0 or offset_dn: -1000"):
            decide_offsets([clouded, *others], "blue", load_profile("planetary-computer"))


def test_the_job_s_override_beats_all():
    view = _view(baseline="05.00", flag=True, clear=False)
    assert _decided(view, "earth-search", override_dn=-1000) == (-1000, "override of the job")


def test_the_region_s_contradicting_flags(small):
    """False flag and +1000 inside; false flag and already shifted; old baselines; true flags."""
    _, seen, _ = recipe(small.job())
    told = {f["id"]: f["properties"] for f in json.loads(small.items.read_text())["features"]}
    assert len(seen.offsets) == 32
    for name, (offset, why) in seen.offsets.items():
        assert offset == (-1000 if "_20210629_1" in name else 0), (name, why)
    pair = [name for name in seen.offsets if "_20210629_1" in name or "_20210714_1" in name]
    assert len(pair) == 4
    assert {told[name]["earthsearch:boa_offset_applied"] for name in pair} == {False}
    assert all("percentile" in seen.offsets[name][1] for name in pair)


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:3035", "EPSG:32635"])
def test_of_a_wide_area_each_scene_is_held_where_it_lies(small, crs):
    """A country has thousands of scenes, each on a small part of it. The window holds all that the area would."""
    request, *_ = recipe(small.job())
    items, rule, profile = request.found.items, request.found.mask, request.found.profile
    to_crs = Transformer.from_crs(small.grid.crs, crs, always_xy=True)
    middle = Point(to_crs.transform(small.grid.left + 2700, small.grid.top - 2700))
    wide = Grid.around(middle.buffer(150_000), crs=crs, resolution_m=10)
    coarse, _ = coarse_grid(wide, 2000, most_px=1600)
    views, unread = _look(items, coarse, "blue", rule, profile, None)
    assert len(views) == len(items) > 30
    assert unread == {}
    of_the_area = len(items) * coarse.height * coarse.width * 4
    assert sum(v.classes.nbytes + v.state.nbytes + v.dark.nbytes for v in views.values()) < of_the_area / 500
    for item in items[::16]:
        view = views[item.id]
        for name, values, kind in (("blue", view.dark, "reflectance"), (rule.asset, view.classes, "classes")):
            whole = read_window(item.assets[name], coarse, kind=kind, profile=profile)
            assert np.count_nonzero(whole) > 0
            np.testing.assert_array_equal(whole[view.place], values)
            whole[view.place] = 0
            assert not whole.any()


def test_a_scene_beside_the_area_takes_one_cell(small):
    request, *_ = recipe(small.job())
    coarse, _ = coarse_grid(small.grid.window((-5000, -4000), (0, 1000)), 0)
    views, unread = _look(request.found.items[:2], coarse, "blue", request.found.mask, request.found.profile, None)
    assert unread == {}
    assert {view.state.shape for view in views.values()} == {(1, 1)}
    assert not any(view.state.any() or view.dark.any() for view in views.values())


def test_dark_water_stays_valid(small):
    """DN of a few tens are water, not missing data, on both sides of the offset."""
    _, _, asked = recipe(small.job(method={"name": "nearest"}))
    block = compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    nir = block.codes[3]
    dark = (nir != 0) & (nir < 1250)
    assert dark.sum() > 200
    assert (block.codes[:, dark] != 0).all()


def test_the_white_scene_fails_as_a_whole_and_is_no_anchor(small):
    _, seen, _ = recipe(small.job(method={"name": "linear"}, target="2021-07-09"))
    white = [layer for layer in seen.layers if layer.id.startswith("2021-07-09")]
    assert [layer.fails for layer in white] == [True]
    assert white[0].suspicious_share > 0.9
    assert seen.anchors is not None
    assert all(not seen.layers[i].fails for i in seen.anchors.layers if i >= 0)
    clear = {layer.id[:10]: layer.clear_share for layer in seen.layers}
    assert clear["2021-08-08"] > 0.7
    assert clear["2021-06-24"] < 0.2


def test_swaths_have_anchors_of_their_own(small):
    _, seen, _ = recipe(small.job(method={"name": "regression", "blend_m": 500}))
    assert seen.anchors is not None
    shown = [seen.layers[i].id for i in seen.anchors.layers if i >= 0]
    assert shown[0] == "2021-07-11_sentinel-2b_R079"
    assert any(name.endswith("_R122") for name in shown)
    np.testing.assert_allclose(seen.anchors.weights.sum(axis=0), 1, atol=1e-5)
    _, median, _ = recipe(small.job(method={"name": "median"}))
    assert median.anchors is None


def test_the_record_is_what_every_task_obeys(small, tmp_path, monkeypatch):
    """Frozen, read back, obeyed: an offset changed in the record changes the pixels."""
    part = {"area": {"bbox": small.bbox((200, 300), (200, 300))}, "grid": {"crs": "EPSG:32633", "shard_px": 128}}
    store = tmp_path / "store.zarr"
    build(job=small.job(store, **part), client=InlineClient(monkeypatch))
    first = open_mosaic(store=store)["red"].values
    run = RunFolder(store)
    record = run.read("period-0000", "scout.json")
    assert Scouted.from_dict(json.loads(json.dumps(record))).to_dict() == record
    again = tmp_path / "again.zarr"
    changed = replace(Scouted.from_dict(record), offsets=dict.fromkeys(record["offsets"], (0, "changed by hand")))
    shutil.copytree(run.path, RunFolder(again).path, ignore=shutil.ignore_patterns("done*", "lock*", "manifest.json"))
    RunFolder(again).write(changed.to_dict(), "period-0000", "scout.json")
    build(job=small.job(again, **part), client=InlineClient(monkeypatch))
    assert (open_mosaic(store=again)["red"].values != first).any()


class _Stops(Silent):
    """Ends a run like Ctrl-C when so many shards are written."""

    def __init__(self, shards: int) -> None:
        self.left = shards

    def begin(self, what, total):
        if what == "shards" and not self.left:
            raise KeyboardInterrupt

    def event(self, what, **_):
        self.left -= what == "task"
        if what == "task" and not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("shards", [0, 1])
def test_a_scene_that_could_not_be_read_is_tried_again_while_nothing_was_made(small, tmp_path, monkeypatch, shards):
    """After that the record binds: shards that know other scenes and anchors would not fit together."""
    part = {
        "area": {"bbox": small.bbox((200, 400), (200, 400))},
        "grid": {"crs": "EPSG:32633", "shard_px": 128},
        "limits": {"max_failed_fraction": 0.5},
    }
    monkeypatch.setattr("pipeline.planning.TASK_PX", 128)
    scene = tmp_path / "B02.tif"

    def moved(features):
        chosen = [f for f in features if f["id"] == "S2A_33TWL_20210619_0_L2A"]
        shutil.copy(chosen[0]["assets"]["blue"]["href"], scene)
        chosen[0]["assets"]["blue"]["href"] = str(scene)
        return features

    part["catalog"] = str(small.changed_items(tmp_path / "items.json", moved))
    job, quiet = (small.job(tmp_path / f"{name}.zarr", **part) for name in ("store", "quiet"))
    build(job=quiet, client=InlineClient(monkeypatch))
    scene.rename(tmp_path / "away.tif")
    close_handles()  # a file that is open stays readable
    with pytest.raises(KeyboardInterrupt):
        build(job=job, client=InlineClient(monkeypatch), progress=_Stops(shards))
    run = RunFolder(tmp_path / "store.zarr")
    before, fence = run.read("period-0000", "scout.json"), run.fence(0)
    assert list(before["unread"]) == ["S2A_33TWL_20210619_0_L2A"]
    assert bool(shards) == (0 < len(run.done(0)) < 4)
    (tmp_path / "away.tif").rename(scene)
    build(job=job, client=InlineClient(monkeypatch))
    if shards:
        assert run.read("period-0000", "scout.json") == before
        assert run.fence(0) == fence
    else:
        assert run.read("period-0000", "scout.json")["unread"] == {}
        assert run.fence(0) != fence  # a task that the first run sent out may no longer write
        same_objects(tmp_path / "store.zarr", tmp_path / "quiet.zarr")


def test_an_undecidable_offset_asks_and_then_obeys(small, tmp_path, monkeypatch):
    """The question writes nothing; the job with its answer goes through, in the same place."""
    part = {
        "area": {"bbox": small.bbox((200, 300), (200, 300))},
        "grid": {"crs": "EPSG:32633", "shard_px": 128},
        "time": {"start": "2021-06-29", "end": "2021-07-04"},
        "target": "2021-06-30",
    }

    def silent(features):
        chosen = [f for f in features if "20210629" in f["id"] or "20210704" in f["id"]]
        assert len(chosen) == 4
        for feature in chosen:
            undecidable(feature)
        return chosen

    items = small.changed_items(tmp_path / "items.json", silent)
    store = tmp_path / "store.zarr"
    fields = part | {"catalog": str(items)}
    with pytest.raises(ItemError, match=r"item S2A_33TW[LM]_20210629_1_L2A: .* set offset_dn: 0 or offset_dn: -1000"):
        build(job=small.job(store, **fields), client=InlineClient(monkeypatch))
    assert not store.exists()
    answered = fields | {"offset_dn": -1000}
    build(job=small.job(store, **answered), client=InlineClient(monkeypatch))
    record = RunFolder(store).read("period-0000", "scout.json")
    # one of them is of a baseline that never has the offset, whatever a span that reaches beyond it answers
    early = (0, "baseline 03.01 is before 04.00")
    assert {tuple(value) for value in record["offsets"].values()} == {(-1000, "override of the job"), early}
