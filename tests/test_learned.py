"""Learned methods in the engine: refused before any work, the same bytes whatever the cuts, read once per process."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import dask
import numpy as np
import pytest
import tiny_network
import torch
import yaml
import zarr
from small_region import BANDS, InlineClient, layers_equal, recipe, same_objects

from pipeline import cloud_mask, compose, learned, models, open_cube, planning, predict
from pipeline.anchors import INTERPOLATE, AnchorMap
from pipeline.bands import to_reflectance
from pipeline.block import BLENDED, COMPOSED, LOW, NO_DATA, NO_SIGMA, OBSERVED, compose_block, halo_px
from pipeline.config import Method
from pipeline.errors import ConfigError, RunError, StoreMismatchError, WeightsError
from pipeline.identity import wish_of
from pipeline.jobfile import load_job
from pipeline.looks import LookStream
from pipeline.models import weights as files
from pipeline.mosaic import build, plan
from pipeline.periods import Period
from pipeline.request import mask_params
from pipeline.store import open_mosaic, publish, read_attrs
from pipeline.tasks import Task, compose_window, run_task

PART = (200, 300), (170, 280)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    tiny_network.register(monkeypatch)
    learned._read_once.cache_clear()


@pytest.fixture
def weights(tmp_path):
    return tiny_network.save(tmp_path / "tiny.safetensors")


def _method(weights, **more):
    return {"name": "timegate", "weights": str(weights), **more}


def _part(small, weights, store=None, **changes):
    area = {"area": {"bbox": small.bbox(*PART)}, "grid": {"crs": "EPSG:32633", "shard_px": 64}}
    return small.job(store, **(area | {"method": _method(weights)} | changes))


# -- a block ----------------------------------------------------------------------------------------------------

DAYS = np.array([19000, 19005, 19010, 19015, 19140], np.int32)


def _looks(size=72):
    rng = np.random.default_rng(0)
    ground = rng.integers(1200, 4000, (3, size, size))
    codes = (ground + rng.integers(-60, 60, (len(DAYS), 3, 1, 1))).astype(np.uint16)
    clear = rng.random((len(DAYS), size, size)) < 0.7
    clear[:, :3, :3] = False
    return codes, clear


def _block(weights, anchors, **more):
    codes, clear = _looks()
    method = Method.model_validate(_method(weights, **more))
    return compose_block(
        codes=codes, clear=clear, days=DAYS, method=method, target=19006, anchors=anchors, row0=5, col0=9
    )


def test_layers_of_a_block(weights):
    codes, clear = _looks()
    made = _block(weights, AnchorMap(1024, -1, -1, (1,), np.ones((1, 3, 3), np.float32)))
    seen = clear.any(axis=0)
    np.testing.assert_array_equal(made.codes[:, clear[1]], codes[1][:, clear[1]])
    assert (made.flags[clear[1]] & OBSERVED).all()
    assert (made.flags[seen & ~clear[1]] & COMPOSED).all()
    assert (made.flags[~seen] == NO_DATA).all()
    assert (made.sigma[:, ~seen | clear[1]] == NO_SIGMA).all()
    assert (made.sigma[:, seen & ~clear[1]] < NO_SIGMA).all()
    assert ((made.source_date == 0) == ~seen).all()


def test_where_no_acquisition_is_near_the_date_is_predicted(weights):
    _, clear = _looks()
    made = _block(weights, AnchorMap(1024, -1, -1, (INTERPOLATE,), np.ones((1, 3, 3), np.float32)))
    seen = clear.any(axis=0)
    assert not (made.flags & OBSERVED).any()
    assert (made.codes[:, seen] != 0).all()
    same = _block(weights, None)
    layers_equal(made, same)


def test_a_model_gone_mad_is_low_confidence(weights, tmp_path):
    one = AnchorMap(1024, -1, -1, (1,), np.ones((1, 3, 3), np.float32))
    calm, mad = _block(weights, one), _block(tiny_network.save(tmp_path / "mad.safetensors", mad=True), one)
    gap = (calm.flags & COMPOSED) > 0
    assert (mad.flags[gap] & LOW).all()
    assert not (calm.flags[gap] & LOW).all()
    np.testing.assert_array_equal(mad.codes == 0, calm.codes == 0)
    np.testing.assert_array_equal(mad.flags[~gap], calm.flags[~gap])


def test_anchors_that_meet_are_blended_and_each_works_only_where_it_speaks(weights):
    columns = np.clip((np.arange(20) - 5) / 2, 0, 1).astype(np.float32)
    field = np.broadcast_to(columns, (20, 20))
    both = AnchorMap(8, 0, 0, (1, 2), np.stack([1 - field, field]))
    model = learned._read(str(weights), learned._ready(Method.model_validate(_method(weights))).weights_sha256)
    model.seen.clear()
    alone = [_block(weights, AnchorMap(1024, -1, -1, (n,), np.ones((1, 3, 3), np.float32))) for n in (1, 2)]
    patches = len(model.seen) / 2
    model.seen.clear()
    made = _block(weights, both)
    assert len(model.seen) < 2 * patches
    blended = (made.flags & BLENDED) > 0
    assert 0.05 < blended.mean() < 0.5
    cols = np.broadcast_to(np.arange(72), (72, 72))
    owner = np.where(cols < 42, 0, 1)
    for n in (0, 1):
        own = ~blended & (owner == n)
        assert own.any()
        np.testing.assert_array_equal(made.codes[:, own], alone[n].codes[:, own])


# -- refused before any work --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "damaged", "pickle", "foreign bands", "text"])
def test_weights_that_cannot_be_used_are_refused_before_any_work(small, tmp_path, weights, fault):
    if fault == "missing":
        weights.unlink()
    elif fault == "damaged":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif fault == "pickle":
        torch.save({"a": torch.zeros(3)}, weights)
    elif fault == "foreign bands":
        weights = tiny_network.save(tmp_path / "few.safetensors", bands=("red", "swir16"))
    else:
        weights.write_text("weights")
    store = tmp_path / "m.zarr"
    with pytest.raises(WeightsError) as caught:
        build(job=_part(small, weights, store), client=None)
    assert caught.value.exit_code == 2
    assert str(weights) in str(caught.value) or "swir16" in str(caught.value)
    assert not list(tmp_path.glob("m.zarr*"))


def test_without_torch_the_message_says_how_to_install(weights, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ConfigError, match=r"pip install 'cloudgate\[learn\]'"):
        learned.prepare(Method.model_validate(_method(weights)), BANDS)


def test_the_engine_itself_does_not_bring_torch():
    code = "import sys, pipeline, pipeline.mosaic, pipeline.lazy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(small, weights, tmp_path):
    job = _part(small, weights, tmp_path / "m.zarr", method=_method(weights, device="cuda"))
    with pytest.raises(ConfigError, match=r"method\.device"):
        build(job=job, client=InlineClient.__new__(InlineClient))
    assert not (tmp_path / "m.zarr.run").exists()


def test_a_path_is_taken_from_the_jobs_folder(small, tmp_path, weights):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(small.fields(method=_method(weights.name))))
    assert load_job(tmp_path / "job.yaml").method.options["weights"] == str(weights)


# -- the recipe that travels --------------------------------------------------------------------------------------


def test_the_recipe_carries_a_path_and_a_hash(small, tmp_path):
    large = tiny_network.save(tmp_path / "large.safetensors", width=4000)
    _, _, asked = recipe(_part(small, large))
    sent = pickle.dumps(asked)
    assert len(sent) < 2**20 < large.stat().st_size
    assert asked.method.options["weights"] == str(large)
    assert len(asked.method.options["weights_sha256"]) == 64
    assert pickle.loads(sent).halo == asked.halo == halo_px(asked.method)


def test_another_file_on_a_worker_is_refused(small, tmp_path, weights):
    _, _, asked = recipe(_part(small, weights))
    learned._read_once.cache_clear()
    tiny_network.save(weights, seed=1)
    with pytest.raises(RunError, match="other content"):
        compose_window(asked, (0, 64), (0, 64))


def test_weights_are_read_once_per_process(small, weights, monkeypatch):
    read, calls = files.load_model, []
    monkeypatch.setattr(files, "load_model", lambda place: (calls.append(place), read(place))[1])
    _, _, asked = recipe(_part(small, weights))
    for start in (0, 64):
        compose_window(asked, (start, start + 64), (0, 64))
    assert len(calls) == 1


def test_identity_knows_the_content_not_the_place(small, tmp_path, weights):
    here = wish_of(_part(small, weights))
    copied = tmp_path / "elsewhere.safetensors"
    copied.write_bytes(weights.read_bytes())
    assert wish_of(_part(small, copied)) == here
    assert wish_of(_part(small, weights, method=_method(weights, device="cpu", patch_batch=3))) == here
    assert wish_of(_part(small, weights, method=_method(weights, precision="bf16"))) != here
    tiny_network.save(weights, seed=1)
    assert wish_of(_part(small, weights)) != here


# -- jobs ---------------------------------------------------------------------------------------------------------


def test_a_job_its_layers_and_going_on_with_other_weights(small, tmp_path, weights, monkeypatch):
    chosen = planning.layout
    stores = []
    for workers, group in ((1, (1, 1)), (3, (2, 2))):
        monkeypatch.setattr(planning, "layout", lambda recipe, job, group=group: (group, chosen(recipe, job)[1]))
        stores.append(tmp_path / f"{workers}.zarr")
        client = InlineClient(monkeypatch, workers=workers, seed=workers)
        made = build(job=_part(small, weights, stores[-1]), client=client).periods[0]
        assert made["published"]
        assert made["notes"] == []
        assert made["shards"] == 4
    same_objects(*stores)
    data = open_mosaic(store=stores[0])
    assert {f"uncertainty_{band}" for band in BANDS} <= set(data)
    assert np.isfinite(data["red"].values).mean() > 0.9
    about = read_attrs(stores[0])["cloudgate"]["periods"]["0"]["method"]
    assert about["weights_sha256"] == wish_of(_part(small, weights))["method"]["weights_sha256"]
    assert str(tmp_path) not in json.dumps(read_attrs(stores[0]))
    tiny_network.save(weights, seed=1)
    with pytest.raises(StoreMismatchError, match="weights_sha256"):
        build(job=_part(small, weights, stores[0]), client=client)


def test_worker_processes_give_the_bytes_of_this_process(small, tmp_path, monkeypatch, client, cluster_fields):
    """The real network, in its small form, with weights of no sense."""
    torch.manual_seed(0)
    size = {"gate_widths": (4, 8), "widths": (8, 8, 8, 8, 8), "crossover": 8}
    network = models.build({"name": "small", "patch_px": 64, "stride_px": 40, "border_px": 4, **size})
    torch.nn.init.constant_(network.gamma, 0.02)
    path = files.save(network, tmp_path / "small.safetensors", card={"data": "none"})
    assert path.stat().st_size < 8e6
    less = {"area": {"bbox": small.bbox((200, 260), (170, 234))}, "bands": ["blue", "red", "nir"]}
    build(job=_part(small, path, tmp_path / "workers.zarr", **less, cluster=cluster_fields), client=client)
    build(job=_part(small, path, tmp_path / "here.zarr", **less), client=InlineClient(monkeypatch))
    same_objects(tmp_path / "here.zarr", tmp_path / "workers.zarr")


def test_notes_of_a_task_reach_the_manifest(small, tmp_path, weights, monkeypatch):
    def narrow(self, batch, *, with_weights=False):
        if len(batch.prior) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, with_weights=with_weights)

    forward = tiny_network.TinyNet.forward
    monkeypatch.setattr(tiny_network.TinyNet, "forward", narrow)
    monkeypatch.setattr(predict, "_most", lambda model, *_: predict._halved.get(model, 2))
    made = build(job=_part(small, weights, tmp_path / "m.zarr"), client=InlineClient(monkeypatch, workers=1))
    assert made.periods[0]["notes"] == ["out of GPU memory with 2 patches at a time, went on with 1"]
    (path,) = (tmp_path / "m.zarr.run").rglob("manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["notes"] == made.periods[0]["notes"]


def test_area_and_sub_blocks_do_not_change_a_byte(small, weights):
    """Another area with its own search and grid, and windows of the same grid, given the same anchors."""
    _, seen, asked = recipe(_part(small, weights))
    whole = compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    _, _, part = recipe(_part(small, weights, area={"bbox": small.bbox((217, 289), (186, 262))}), seen)
    top, left = part.grid.row0 - asked.grid.row0, part.grid.col0 - asked.grid.col0
    assert min(top, left) > 5
    there = slice(top, top + part.grid.height), slice(left, left + part.grid.width)
    layers_equal(whole, compose_window(part, (0, part.grid.height), (0, part.grid.width)), *there)
    corner = compose_window(asked, (asked.grid.height - 40, asked.grid.height), (3, 67))  # 40 x 64 px
    layers_equal(whole, corner, slice(-40, None), slice(3, 67))
    assert ((whole.flags & COMPOSED) > 0).sum() > 300


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_computes_each_patch_once_unless_a_read_failed(small, weights, monkeypatch, fails):
    """What a sub-block lost its neighbour may have: patches with another's holes are not taken."""
    _, _, asked = recipe(_part(small, weights))
    height, width = asked.grid.shape
    if fails:
        layer = asked.acquisitions[len(asked.acquisitions) // 2]
        item = layer.items[0]
        gone = replace(item, assets={**item.assets, "red": replace(item.assets["red"], href="/nowhere.tif")})
        changed = [replace(a, items=(gone, *a.items[1:])) if a is layer else a for a in asked.acquisitions]
        asked = replace(asked, acquisitions=tuple(changed))
    calls, forward = [], tiny_network.TinyNet.forward
    monkeypatch.setattr(
        tiny_network.TinyNet, "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1]
    )
    whole, parts = (replace(asked, cut_px=cut) for cut in (asked.grid.shape, (64, 128)))
    task = Task((0, height), (0, width), tuple(asked.grid.shards()))
    made, counts = {}, []
    for name, cut in (("whole", whole), ("parts", parts)):
        calls.clear()
        report = run_task(cut, task, str(weights.parent / name), 0)
        assert bool(report.failures) == fails
        counts.append(len(calls))
        days = [Period(0, 18789, 18847, 18789, asked.target)]
        publish(weights.parent / name, asked.grid, BANDS, uncertainty=True, schedule=days, published=[True], attrs={})
        made[name] = zarr.open_group(str(weights.parent / name), path="0", mode="r")
    assert counts[0] > 4
    assert (counts[1] > counts[0]) if fails else (counts[1] == counts[0])
    for layer in (*BANDS, "flags", "source_date"):
        np.testing.assert_array_equal(made["whole"][layer][0], made["parts"][layer][0])


def test_the_next_reads_are_in_flight_while_the_model_works(small, weights, monkeypatch):
    _, _, asked = recipe(_part(small, weights))
    asked = replace(asked, cut_px=(32, 32))
    ahead = []
    ask = LookStream._ask_block

    def counted(self, *args):
        ahead.append(args[:2])
        return ask(self, *args)

    at_work = []
    work = learned.complete
    monkeypatch.setattr(LookStream, "_ask_block", counted)
    monkeypatch.setattr(learned, "complete", lambda *a, **k: (at_work.append(len(ahead)), work(*a, **k))[1])
    run_task(asked, Task((0, 64), (0, 64), ((0, 0),)), str(weights.parent / "m.zarr"), 0)
    assert len(ahead) == 4
    assert at_work[0] == 2  # while the first is worked, the second is asked for
    assert max(at_work) == 4


def test_plan_reckons_with_the_model(small, weights):
    learnt = plan(job=_part(small, weights), scouting=False).periods[0]["peak_memory_gb"]
    plain = plan(job=_part(small, weights, method={"name": "regression"}), scouting=False).periods[0]["peak_memory_gb"]
    assert learnt > plain + 0.3


MARGIN_PX = 420


def test_lazy_and_job_agree_byte_for_byte(small, weights):
    job = _part(small, weights, area={"bbox": small.bbox((230, 290), (170, 230))})
    request, seen, asked = recipe(job)
    assert asked.halo + asked.mask_halo <= MARGIN_PX
    block = compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    found = replace(request.found, items=seen.apply(request.found.items))
    cube = open_cube(found=found, grid=asked.grid.padded(MARGIN_PX), bands=BANDS, chunk_px=512)
    clouds = cloud_mask(cube=cube, params=mask_params(job, request.found.mask.kind), rejected=asked.rejected)
    made = compose(
        cube=cube,
        clouds=clouds,
        method="timegate",
        weights=str(weights),
        target=str(job.target),
        anchors=seen.anchors,
        trim_px=MARGIN_PX,
    )
    with dask.config.set(scheduler="threads", num_workers=2):
        made = made.compute()
    for number, band in enumerate(BANDS):
        np.testing.assert_array_equal(made[band].values, to_reflectance(block.codes[number]), err_msg=band)
        sigma = np.where(block.sigma[number] == NO_SIGMA, np.nan, block.sigma[number] / np.float32(10_000))
        np.testing.assert_allclose(made[f"uncertainty_{band}"].values, sigma, rtol=1e-6)
    np.testing.assert_array_equal(made["flags"].values, block.flags)
    dates = made["source_date"].values.astype("datetime64[D]")
    np.testing.assert_array_equal(np.where(np.isnat(dates), 0, dates.astype(int)), block.source_date)
    assert ((block.flags & COMPOSED) > 0).any()
