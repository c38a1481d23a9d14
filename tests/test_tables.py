"""What Job, Grid and Plan show in a notebook: their facts, escaped, without style sheets."""

import re

from pipeline.grid import Grid
from pipeline.jobfile import job_from_dict
from pipeline.mosaic import plan
from pipeline.tables import columns_html, table_html


def _cells(html: str) -> dict[str, str]:
    return dict(re.findall(r'<th scope="row"[^>]*>(.*?)</th><td[^>]*>(.*?)</td>', html))


def test_values_are_escaped_and_nested_ones_put_into_words():
    html = table_html("a <b>", {"x & y": [1, {"p": 2, "q": None}], "none": None})
    assert "a &lt;b&gt;" in html
    assert _cells(html) == {"x &amp; y": "1, p: 2, q: ", "none": ""}
    assert columns_html("t", ["a", "b"], [(1, "<i>")]).count("<td") == 2
    assert "&lt;i&gt;" in columns_html("t", ["a"], [("<i>",)])


def test_a_grid_shows_size_place_and_shards():
    cells = _cells(Grid("EPSG:32633", 10.0, (0.0, 0.0), -510000, 50000, 3000, 5000)._repr_html_())
    assert cells["CRS"] == "EPSG:32633"
    assert cells["covers"] == "50 x 30 km"
    assert cells["left, bottom, right, top"] == "500000, 5070000, 550000, 5100000"
    assert cells["shards"] == "6 of 2048 px"


def test_a_job_shows_what_is_asked_for_and_what_differs_from_the_defaults(small):
    fields = small.fields(name="one <two>", method={"name": "decay", "tau_days": 9}, max_cloud_cover=80)
    html = job_from_dict(fields)._repr_html_()
    cells = _cells(html)
    assert "Job one &lt;two&gt;" in html
    assert cells["method"] == "name: decay, tau_days: 9"
    assert cells["max_cloud_cover"] == "80.0"
    assert cells["area"].startswith("bbox: 15.")
    assert {"catalog", "bands", "time", "target"} <= set(cells)
    assert not {"limits", "cluster", "offset_dn"} & set(cells)


def test_a_plan_shows_a_line_for_each_period(small):
    time = {"start": "2021-06-11", "end": "2021-08-08", "every": "month"}
    html = plan(job=small.job(time=time, target="middle"), scouting=False)._repr_html_()
    assert "2021-06-11 to 2021-06-30" in html
    assert html.count("<tr><td") == 3
    assert "peak memory (GB)" in html
