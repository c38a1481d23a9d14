"""The wheel: built, put alone into an empty environment, it has all it needs and works from any folder.

Dependencies are lent by the environment of the tests (their folder is put on the path), so no network is needed.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from pipeline.profiles import profile_names

ROOT = Path(__file__).resolve().parent.parent
UV = os.environ.get("UV") or shutil.which("uv")
pytestmark = pytest.mark.skipif(UV is None, reason="uv is not here: it builds and installs the wheel")


def _uv(*arguments, **more):
    return subprocess.run([str(UV), *map(str, arguments)], capture_output=True, text=True, check=False, **more)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this source tree."""
    out = tmp_path_factory.mktemp("dist")
    done = _uv("build", "--wheel", "--offline", "-o", out, cwd=ROOT)
    if done.returncode:  # the build's own tool was never fetched on this machine
        done = _uv("build", "--wheel", "-o", out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program of an environment that holds the wheel, in a folder far from the source; gives what it printed."""
    here = tmp_path_factory.mktemp("elsewhere")
    assert _uv("venv", "--offline", here / "env", "--python", sys.executable).returncode == 0
    programs = here / "env" / ("Scripts" if os.name == "nt" else "bin")
    done = _uv("pip", "install", "--offline", "--no-deps", "--python", programs / "python", wheel)
    assert done.returncode == 0, done.stderr
    (site,) = (here / "env").glob("[Ll]ib/**/site-packages")
    # a folder on the path lends its packages, but not what its own .pth files lead to: this source tree
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(program, *arguments):
        done = subprocess.run(
            [programs / program, *arguments], cwd=here, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_carries_the_catalogs_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {path.name for path in (ROOT / "catalogs").glob("*.yaml")}
    assert len(shipped) >= 7
    assert {name.removeprefix("pipeline/catalogs/") for name in names if name.endswith(".yaml")} == shipped | {
        "pipeline/weights/compact.yaml",
        "pipeline/weights/robust.yaml",
    }
    learned = {f"pipeline/weights/{name}.safetensors" for name in ("compact", "robust")}
    assert {name for name in names if name.endswith(".safetensors")} == learned
    assert all(zipfile.ZipFile(wheel).getinfo(name).file_size > 400_000 for name in learned)
    modules = {
        f"pipeline/{path.relative_to(ROOT / 'pipeline').as_posix()}" for path in (ROOT / "pipeline").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert not [name for name in names if not name.startswith(("pipeline/", "cloudgate-"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_profiles_are_found_in_the_package(installed):
    where, *names = json.loads(
        installed(
            "python", "-c",
            "import json, pipeline, pipeline.profiles as p;"
            "print(json.dumps([pipeline.__file__, *(p.load_profile(n).name for n in p.profile_names())]))",
        )
    )  # fmt: skip
    assert Path(where).parent.parent.name == "site-packages"
    assert not Path(where).is_relative_to(ROOT)
    assert names == profile_names()


def test_the_command_is_there(installed):
    assert "cloudgate demo" in installed("cloudgate", "--help")
    assert installed("cloudgate", "--version").startswith("cloudgate 0.")


def test_a_job_is_planned_there(installed):
    installed("cloudgate", "simulate", "--out", "scenes", "--size-px", "128", "--dates", "3", "--days", "11")
    answer = json.loads(installed("cloudgate", "plan", "scenes/job.yaml", "--json"))
    assert answer["profile"].startswith(("demo:", "earth-search:"))
    assert answer["periods"][0]["scenes"] == 3
    assert len(answer["periods"][0]["offsets"]) == 3
