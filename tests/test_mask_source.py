"""``mask.source``: a cloud detector makes the mask from the bands. A stand-in takes the place of the real package."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_region import layers_equal, objects, recipe
from typer.testing import CliRunner

from pipeline.bands import to_reflectance
from pipeline.cli import app
from pipeline.errors import ConfigError, ItemError
from pipeline.grid import Grid
from pipeline.jobfile import job_from_dict
from pipeline.mask_models import CELL_PX, CONTEXT_PX, lattice_window, mask_model, state_on_lattice
from pipeline.profiles import load_profile
from pipeline.reader import dn_to_codes, read_window
from pipeline.request import resolve
from pipeline.store import open_mosaic
from pipeline.tasks import compose_window

# The real call's name, parameters and answer (OmniCloudMask 1.x). Like the real one its answer depends on the whole
# patch it is given, which is what makes it hard to cut a job in blocks.
PACKAGE = """
import numpy as np

def predict_from_array(input_array, patch_size=1000, patch_overlap=300, batch_size=1, inference_device=None,
                       mosaic_device=None, inference_dtype=None, export_confidence=False, softmax_output=True,
                       no_data_value=0, apply_no_data_mask=True, custom_models=None, pred_classes=4,
                       destination_model_dir=None, model_download_source="hugging_face", compile_models=False,
                       compile_mode="default", model_version=None):
    red, green, nir = input_array
    known = (input_array != no_data_value).all(axis=0)
    usual = float(red[known].mean()) if known.any() else 0.0
    classes = np.zeros(red.shape, np.uint8)
    classes[nir < 0.02] = 3
    classes[red > 0.05 + 0.5 * usual] = 2
    classes[red > 0.6] = 1
    return classes[None]
"""
MODEL = {"source": "omnicloudmask", "cloud_grow_m": 0, "shadow_grow_m": 0, "temporal_check": False}


@pytest.fixture
def package(tmp_path_factory, monkeypatch):
    """Puts the stand-in on the path of this process; gives its folder."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "omnicloudmask.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "omnicloudmask", raising=False)
    yield folder
    sys.modules.pop("omnicloudmask", None)


@pytest.fixture
def no_package(monkeypatch):
    """As on a machine without the extras."""
    for name in ("omnicloudmask", "s2cloudless"):
        monkeypatch.setitem(sys.modules, name, None)


def _without_scl(features):
    for feature in features:
        del feature["assets"]["scl"]
    return features


def _whole(job):
    _, _, asked = recipe(job)
    return asked, compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))


def _part(small):
    """Fields of a job on some dates and a part of the region, across the tiles' overlap and the swath's edge."""
    area = {"bbox": small.bbox((180, 440), (120, 390))}
    return {"area": area, "time": {"start": "2021-07-01", "end": "2021-07-20"}}


# -- the mask is the detector's ---------------------------------------------------------------------------------


def test_the_mask_is_what_the_detector_says(small, package):
    """One scene, nothing grown: clear exactly where the detector, run by hand on the lattice, says clear."""
    area = {"bbox": small.bbox((8, 200), (8, 500))}  # in the northern tile only
    asked, made = _whole(
        small.job(time={"start": "2021-06-16", "end": "2021-06-16"}, target="middle", mask=MODEL, area=area)
    )
    (scene,) = [item for acquisition in asked.acquisitions for item in acquisition.items if item.tile == "33TWM"]
    seen = lattice_window(asked.grid)
    codes = np.stack(
        [dn_to_codes(read_window(scene.assets[b], seen), scene.assets[b], scene.offset_dn) for b in asked.bands]
    )
    state = state_on_lattice(
        "omnicloudmask", reflectance=to_reflectance(codes), bands=asked.bands, seen=seen, cells=asked.grid
    )
    assert set(np.unique(state)) == {0, 1, 2, 3}  # its swath ends in the area
    assert 0.2 < (state == 2).mean() < 0.7
    np.testing.assert_array_equal(made.clear_count > 0, state == 1)
    at_once = mask_model("omnicloudmask")(to_reflectance(codes), asked.bands)
    top, left = asked.grid.row0 - seen.row0, asked.grid.col0 - seen.col0
    at_once = at_once[top : top + asked.grid.height, left : left + asked.grid.width]
    assert 0.0005 < (at_once != state).mean() < 0.2  # the stand-in does look around: the lattice matters


def test_the_class_raster_is_not_needed(small, package, tmp_path):
    """Items without it do, and give the same pixels; the default source refuses them."""
    bare = str(small.changed_items(tmp_path / "bare.json", _without_scl))
    some = {"method": {"name": "linear"}, **_part(small)}
    _, with_it = _whole(small.job(mask=MODEL, **some))
    _, without = _whole(small.job(mask=MODEL, catalog=bare, **some))
    layers_equal(with_it, without)
    assert with_it.clear_count.max() > 3
    with pytest.raises(ItemError, match="cloud mask 'scl'"):
        resolve(small.job(catalog=bare))


def test_growth_and_the_temporal_check_work_on_it(small, package):
    counts = []
    for mask in (MODEL, MODEL | {"cloud_grow_m": 100, "shadow_grow_m": 100}, MODEL | {"temporal_check": True}):
        _, made = _whole(small.job(mask=mask, **_part(small)))
        counts.append(made.clear_count.astype(int))
    assert (counts[1] <= counts[0]).all()
    assert counts[1].sum() < 0.97 * counts[0].sum()
    assert (counts[2] <= counts[0]).all()
    assert counts[2].sum() < counts[0].sum()


# -- however it is cut ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["median", "regression"])
def test_cuts_do_not_change_a_byte(small, package, method):
    """The detector's answer depends on the patch; patches lie on a lattice, so parts have the bytes of the whole."""
    fields = {"mask": MODEL | {"cloud_grow_m": 60}, "method": {"name": method}, "time": _part(small)["time"]}
    _, seen, asked = recipe(small.job(**fields))
    whole = compose_window(asked, (0, asked.grid.height), (0, asked.grid.width))
    layers_equal(whole, compose_window(asked, (137, 400), (90, 391)), slice(137, 400), slice(90, 391))
    _, _, part = recipe(small.job(**fields | {"area": {"bbox": small.bbox((170, 437), (101, 388))}}), seen)
    made = compose_window(part, (0, part.grid.height), (0, part.grid.width))
    top, left = part.grid.row0 - asked.grid.row0, part.grid.col0 - asked.grid.col0
    layers_equal(whole, made, slice(top, top + part.grid.height), slice(left, left + part.grid.width))


def test_the_lattice_covers_what_is_asked_for():
    for row0, col0, height, width in ((-510_240, 49_998, 700, 300), (0, 0, 256, 256), (255, -1, 2, 2)):
        cells = Grid("EPSG:32633", 10.0, (0.0, 0.0), row0, col0, height, width)
        seen = lattice_window(cells)
        assert (seen.row0 + CONTEXT_PX) % CELL_PX == (seen.col0 + CONTEXT_PX) % CELL_PX == 0
        assert (seen.height - 2 * CONTEXT_PX) % CELL_PX == (seen.width - 2 * CONTEXT_PX) % CELL_PX == 0
        assert CONTEXT_PX <= cells.row0 - seen.row0 < CONTEXT_PX + CELL_PX
        assert CONTEXT_PX <= seen.row0 + seen.height - row0 - height < CONTEXT_PX + CELL_PX


# -- through the command line -----------------------------------------------------------------------------------


def _job_file(small, folder, **changes):
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(small.fields(output={"store": "mosaic.zarr"}, **changes)))
    return path


def test_a_job_runs_with_it(small, package, tmp_path):
    """Worker processes find the package as this one does; the detector's name is part of what the store is."""
    some = {"area": {"bbox": small.bbox((200, 320), (100, 220))}, "time": _part(small)["time"], "mask": MODEL}
    job = _job_file(small, tmp_path, **some, cluster={"workers": 1})
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "mosaic", str(job)]
    paths = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["periods"][0]["published"]
    _, here = _whole(small.job(**some))
    there = open_mosaic(store=tmp_path / "mosaic.zarr").isel(time=0)
    np.testing.assert_array_equal(there.clear_count.values, here.clear_count)
    before = objects(tmp_path / "mosaic.zarr")
    refused = CliRunner().invoke(
        app, ["mosaic", str(job), "--out", str(tmp_path / "mosaic.zarr"), "--set", "mask.source=scl"]
    )
    assert refused.exit_code == 2
    assert "another request" in refused.output
    assert objects(tmp_path / "mosaic.zarr") == before


@pytest.mark.parametrize("command", ["mosaic", "plan", "search"])
@pytest.mark.parametrize("source", ["omnicloudmask", "s2cloudless"])
def test_without_the_package_nothing_begins(small, no_package, tmp_path, monkeypatch, source, command):
    monkeypatch.chdir(tmp_path)
    job = _job_file(small, tmp_path, mask={"source": source})
    answer = CliRunner().invoke(app, [command, str(job)])
    assert answer.exit_code == 2
    said = " ".join(answer.output.split())
    assert f"mask model '{source}' is not installed" in said
    assert f"pip install cloudgate[{source}]" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


def test_bands_it_needs(small, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = _job_file(small, tmp_path, mask=MODEL, bands=["blue", "red"])
    answer = CliRunner().invoke(app, ["mosaic", str(job)])
    assert answer.exit_code == 2
    assert "['green', 'nir'] are not among ['blue', 'red']" in " ".join(answer.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


# -- the field --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ({"source": "fmask"}, r"mask.source: unknown mask source 'fmask'; known are scl, omnicloudmask, s2cloudless"),
        ({"source": "omnicloudmask", "asset": "clm"}, "source 'omnicloudmask' and asset exclude each other"),
        ({"source": "scl", "threshold": 40}, "source 'scl' and threshold exclude each other"),
    ],
)
def test_faults_of_the_field(small, mask, said):
    with pytest.raises(ConfigError, match=said):
        small.job(mask=mask)


def test_scl_by_name(small):
    """``source: scl`` is the profile's own scene classification, or the usual one where it has none."""
    job = small.job(mask={"source": "scl"})
    known = load_profile("earth-search")
    assert job.mask.rule((known.mask, *known.mask_alternatives)) == known.mask
    assert job.mask.rule(()).cloud == (8, 9, 10)
    assert (job.mask.model, job.mask.opening_m("scl")) == (None, 40)
    model = job_from_dict(small.fields(mask={"source": "omnicloudmask"})).mask
    assert (model.model, model.opening_m("scl"), model.rule((known.mask,))) == ("omnicloudmask", 0, None)


def test_the_extras_are_declared():
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name in ("omnicloudmask", "s2cloudless"):
        assert extras[name][0].startswith(name)
