"""The job file: every fault gets a message with the field, the value and the way out."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from pipeline.config import Job
from pipeline.errors import ConfigError
from pipeline.jobfile import job_from_dict, job_json, load_job
from pipeline.periods import periods
from pipeline.profiles import MaskRule

GOOD = {
    "catalog": "earth-search",
    "area": {"bbox": [15.0, 46.0, 15.2, 46.1]},
    "time": {"start": "2023-08-01", "end": "2023-08-31"},
    "output": {"store": "out/a.zarr"},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"banana": 1}, ["banana", "no such field", "known are"]),
        ({"bnds": ["red"]}, ["bnds", "did you mean 'bands'"]),
        ({"mask": {"cloud_grow": 3}}, ["mask.cloud_grow", "did you mean 'cloud_grow_m'"]),
        ({"bands": ["purple"]}, ["bands", "'purple'", "known are coastal"]),
        ({"bands": ["red", "B04"]}, ["bands", "'B04'", "twice"]),
        ({"bands": []}, ["bands", "at least one"]),
        ({"area": {"bbox": [46.0, 100.0, 47.0, 101.0]}}, ["area.bbox", "100.0", "[west, south, east, north]"]),
        ({"area": {"bbox": [15.0, 46.1, 15.2, 46.0]}}, ["area.bbox", "north (46.0)", "greater than south"]),
        ({"area": {"bbox": [15.0, 46.0, 15.0, 46.1]}}, ["area.bbox", "empty"]),
        ({"area": {"bbox": [-100.0, 46.0, 100.0, 46.1]}}, ["area.bbox", "200.0 degrees wide"]),
        ({"area": {}}, ["area", "exactly one of bbox, geojson, mgrs"]),
        ({"area": {"mgrs": "99XXX"}}, ["area.mgrs", "99XXX", "33TWM"]),
        ({"time": {"start": "2023-08-31", "end": "2023-08-01"}}, ["time", "before start", "swap"]),
        ({"time": {"start": 20230801, "end": "2023-08-31"}}, ["time.start", "2023-08-01"]),
        ({"target": "2024-01-01"}, ["target", "2024-01-01", "outside the span"]),
        (
            {"target": "2023-08-15", "time": {**GOOD["time"], "every": "month"}},
            ["target", "2023-08-15", "every"],
        ),
        ({"method": {"name": "medain"}}, ["method.name", "did you mean 'median'"]),
        ({"grid": {"shard_px": 1000}}, ["grid.shard_px", "1000", "512"]),
        ({"grid": {"resolution_m": 0}}, ["grid.resolution_m", "greater than 0"]),
        ({"cluster": {"kind": "address"}}, ["cluster", "address"]),
        ({"limits": {"max_failed_fraction": 2}}, ["limits.max_failed_fraction", "2"]),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_way_out(change, said):
    with pytest.raises(ConfigError) as caught:
        job_from_dict({**GOOD, **change})
    for words in said:
        assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_required_fields():
    with pytest.raises(ConfigError, match=r"catalog: this field is required.*area: .*required.*time: .*required"):
        job_from_dict({})


def test_a_file_with_overrides_variables_and_relative_inputs(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DATA_FOLDER", str(tmp_path))
    (tmp_path / "items.json").write_text("{}")
    (tmp_path / "aoi.geojson").write_text("{}")
    text = {**GOOD, "catalog": "items.json", "area": {"geojson": "aoi.geojson"}, "name": "${DATA_FOLDER}/x"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(text))
    job = load_job(tmp_path / "job.yaml", overrides=["method.name=median", "bands=[B04, nir]"], store="b.zarr")
    assert job.catalog == str(tmp_path / "items.json")
    assert job.area.geojson == tmp_path / "aoi.geojson"
    assert job.name == f"{tmp_path}/x"
    assert (job.method.name, job.bands, job.output.store) == ("median", ("red", "nir"), "b.zarr")


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (None, (), "no file"),
        ("a: [", (), "YAML"),
        ("- 1", (), "mapping"),
        ("name: ${NOT_SET_ANYWHERE}", (), "NOT_SET_ANYWHERE"),
        ("{}", ("method.name",), "key=value"),
    ],
)
def test_an_unusable_file(tmp_path: Path, text, overrides, said):
    if text is not None:
        (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_job(tmp_path / "job.yaml", overrides=overrides)


def _periods(every, start, end, **more) -> list[tuple[str, str]]:
    job = job_from_dict({**GOOD, "time": {"start": start, "end": end, "every": every, **more}})
    epoch = date(1970, 1, 1).toordinal()
    return [(str(date.fromordinal(epoch + p.start)), str(date.fromordinal(epoch + p.end))) for p in periods(job)]


def test_periods_lie_on_the_calendar_and_the_last_is_cut():
    assert _periods("month", "2024-01-15", "2024-03-10") == [
        ("2024-01-15", "2024-01-31"),
        ("2024-02-01", "2024-02-29"),
        ("2024-03-01", "2024-03-10"),
    ]
    assert _periods("10 days", "2024-02-01", "2024-03-05")[2:] == [
        ("2024-02-21", "2024-02-29"),
        ("2024-03-01", "2024-03-05"),
    ]
    assert _periods("week", "2024-01-03", "2024-01-16") == [
        ("2024-01-03", "2024-01-07"),
        ("2024-01-08", "2024-01-14"),
        ("2024-01-15", "2024-01-16"),
    ]
    assert _periods("quarter", "2023-11-01", "2024-04-01")[1] == ("2024-01-01", "2024-03-31")
    assert _periods("year", "2023-06-01", "2024-02-01") == [("2023-06-01", "2023-12-31"), ("2024-01-01", "2024-02-01")]


def test_look_back_and_target_of_a_period():
    job = job_from_dict(
        {**GOOD, "time": {"start": "2024-01-01", "end": "2024-02-29", "every": "month", "lookback_days": 20}}
    )
    january, february = periods(job)
    assert (january.slot, february.slot) == (0, 1)
    assert february.look_start == february.start - 20
    assert january.target == january.start + 15


def test_the_mask_rule_of_a_job():
    known = (MaskRule(kind="scl", asset="scl"), MaskRule(kind="classes", asset="clm", cloud=(1, 2), shadow=(3,)))

    def rule(**mask) -> MaskRule | None:
        return job_from_dict({**GOOD, "mask": mask}).mask.rule(known)

    assert rule() is None
    assert rule(asset="clm") == known[1]
    assert rule(asset="x", cloud=[7], shadow=[8]) == MaskRule(kind="classes", asset="x", cloud=(7,), shadow=(8,))
    assert rule(asset="Fmask", bits={"cloud": [1], "shadow": [3]}).kind == "bits"
    assert rule(asset="clp", threshold=0.4).threshold == 0.4
    with pytest.raises(ConfigError, match=r"mask.asset: 'odd' needs to know its classes"):
        rule(asset="odd")
    # what is left out is as the profile knows that raster
    known = (
        MaskRule(kind="scl", asset="scl", cloud=(8, 9, 10), shadow=(3,), nodata=0),
        MaskRule(kind="classes", asset="clm", cloud=(1, 2), shadow=(3,), nodata=255),
        MaskRule(kind="bits", asset="Fmask", cloud=(1, 2), shadow=(3,), nodata=255),
    )
    assert rule(asset="scl", shadow=[2, 3]) == rule(shadow=[2, 3]) == known[0].model_copy(update={"shadow": (2, 3)})
    assert rule(cloud=[8, 9, 10], shadow=[3]) == known[0]
    assert rule(asset="clm", cloud=[1, 2], shadow=[3]) == known[1]
    assert rule(asset="clm", cloud=[1]) == known[1].model_copy(update={"cloud": (1,)})
    assert rule(nodata=7).nodata == 7
    assert rule(asset="Fmask", bits={"cloud": [1]}) == known[2].model_copy(update={"cloud": (1,), "shadow": ()})
    with pytest.raises(ConfigError, match=r"mask.shadow: 'Fmask' holds no classes but bits"):
        rule(asset="Fmask", shadow=[3])
    for mask, said in (
        ({"bits": {"cloud": [1], "shdow": [3]}}, "bits: unknown shdow"),
        ({"bits": {"cloud": [1]}, "shadow": [3]}, "give classes"),
        ({"cloud": [1], "threshold": 0.4}, "not several"),
        ({"source": "scl", "nodata": 0}, "exclude each other"),
    ):
        with pytest.raises(ConfigError, match=said):
            rule(**mask)


def test_records_of_a_job_hold_no_key_of_its_cluster():
    cluster = {"kind": "gateway", "address": "https://user:word@gateway/x", "options": {"environment": {"KEY": "k"}}}
    kept = job_json(job_from_dict({**GOOD, "cluster": cluster}))["cluster"]
    assert (kept["address"], kept["options"], kept["kind"]) == ("https://gateway/x", {}, "gateway")


def test_every_field_is_documented():
    for model in (Job, *(f.annotation for f in Job.model_fields.values() if hasattr(f.annotation, "model_fields"))):
        for name, info in model.model_fields.items():
            assert info.description or hasattr(info.annotation, "model_fields"), f"{model.__name__}.{name}"
