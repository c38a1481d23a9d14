"""The shipped catalog profiles load, name known bands, and a wrong one is refused with its field."""

from pathlib import Path

import pytest

from pipeline.bands import BANDS
from pipeline.errors import ConfigError
from pipeline.profiles import load_profile, profile_names

SHIPPED = {"cdse", "dea", "deafrica", "demo", "earth-search", "generic", "hls", "planetary-computer"}


def test_all_catalogs_are_shipped():
    assert set(profile_names()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_profile_is_whole(name):
    profile = load_profile(name)
    assert profile.name == name
    assert set(profile.bands) <= set(BANDS)
    assert {"blue", "green", "red", "nir"} <= set(profile.bands)
    default = profile.default_collection
    for collection in (default,) if isinstance(default, str) else default or ():
        assert collection in profile.collections
    for rule in (profile.mask, *profile.mask_alternatives):
        assert rule.cloud
        assert not set(rule.cloud) & set(rule.shadow)
    if profile.endpoint:
        assert profile.endpoint.startswith("https://")
        assert profile.detect.hosts


def test_facts_that_change_pixels():
    policy = {name: load_profile(name).offset.policy for name in SHIPPED}
    assert policy["hls"] == policy["dea"] == "none"
    assert policy["planetary-computer"] == policy["deafrica"] == "baseline"
    assert policy["cdse"] == policy["generic"] == "metadata"
    assert load_profile("earth-search").offset.flag == "earthsearch:boa_offset_applied"
    assert (load_profile("hls").nodata, load_profile("dea").nodata) == (-9999, -999)
    assert load_profile("demo").bands == load_profile("earth-search").bands
    assert load_profile("demo").offset == load_profile("earth-search").offset


def test_a_new_catalog_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_STAC", "https://stac.example.org")
    file = tmp_path / "mine.yaml"
    file.write_text("endpoint: ${MY_STAC}/v1\nbands: {red: [Rot, R]}\n")
    profile = load_profile(str(file))
    assert (profile.name, profile.endpoint) == ("mine", "https://stac.example.org/v1")
    assert profile.bands["red"] == ("Rot", "R")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bands: {red: [R]}\nbandz: 1\n", "bandz"),
        ("endpoint: https://x.org\n", "bands"),
        ("bands: {red: [R]}\npage_limit: 0\n", r"page_limit.*0"),
        ("bands: {red: [R]}\noffset: {policy: guess}\n", r"offset\.policy.*guess"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_field(tmp_path: Path, text, said):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"wrong\.yaml: {said}"):
        load_profile(str(file))


def test_an_unknown_profile_names_the_known():
    with pytest.raises(ConfigError, match=r"'earth-serch'.*earth-search"):
        load_profile("earth-serch")
