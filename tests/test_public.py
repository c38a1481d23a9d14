"""What users see first: public names, quick imports, and a help that can be followed."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
import typer

import pipeline
from pipeline.cli import app

PROMISED = {"build", "cloud_mask", "compose", "fill_series", "load_job", "open_cube", "open_mosaic", "search"}
PIXELS = {
    "cloud_mask": ["(time, y, x)", "(time, band, y, x)"],
    "compose": ["(time, y, x)", "(time, band, y, x)", "(y, x)"],
    "fill_series": ["(time, band, y, x)"],
    "open_cube": ["(time, y, x)", "(time, band, y, x)"],
    "open_mosaic": ["(time, y, x)"],
}
"""Functions that take or give pixels, and the dims their docstrings must name."""
HEAVY = ("rasterio", "dask", "distributed", "xarray", "zarr", "stackstac", "odc", "scipy", "cv2", "torch")
COMMANDS = typer.main.get_command(app).commands


def _loaded(code):
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_public_names_are_sorted_and_complete():
    assert list(pipeline.__all__) == sorted(pipeline.__all__)
    assert set(pipeline.__all__) >= PROMISED
    assert set(pipeline.__all__) <= set(dir(pipeline))
    for name in pipeline.__all__:
        assert getattr(pipeline, name) is getattr(import_module(getattr(pipeline, name).__module__), name)
    with pytest.raises(AttributeError, match="public names are backfill, build"):
        _ = pipeline.sarch


@pytest.mark.parametrize("name", pipeline.__all__)
def test_each_public_name_says_what_it_takes_gives_and_raises(name):
    function = getattr(pipeline, name)
    text = inspect.getdoc(function)
    taken = inspect.signature(function).parameters
    if name not in ("load_job", "load_model", "load_schedule"):
        assert [p.name for p in taken.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY] in ([], ["options"])
    for parameter in taken:
        assert re.search(rf"\b{parameter}\b.*:", text), f"{name} does not explain {parameter}"
    assert "Raises:\n" in text
    if name in PIXELS:
        assert "Returns:\n" in text
        for dims in PIXELS[name]:
            assert dims in text, f"{name} does not name the dims {dims}"
        assert "lazy" in text.lower() or "dask" in text.lower()


def test_importing_the_package_is_quick():
    assert not _loaded("import pipeline; dir(pipeline)") & {*HEAVY, "numpy", "pydantic"}
    assert {"numpy", "pydantic"} <= _loaded("import pipeline; pipeline.load_job")


def test_help_loads_nothing_heavy():
    calls = [["--help"], *([name, "--help"] for name in sorted(COMMANDS))]
    call = f"for call in {calls!r}:\n try: app(call)\n except SystemExit as ended: assert not ended.code, call"
    loaded = _loaded(f"from pipeline.cli import app\n{call}")
    assert "typer" in loaded
    assert not loaded & {*HEAVY, "numpy"}


def test_a_worker_starts_without_what_only_cubes_need():
    loaded = _loaded("import pipeline.mosaic, pipeline.tasks, pipeline.view")
    assert {"zarr", "distributed"} <= loaded
    assert not loaded & {"xarray", "pandas", "stackstac", "odc", "torch", "matplotlib"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_an_example_that_parses(name):
    command = COMMANDS[name]
    (example,) = re.findall(r"Example: \[bold\](.+?)\[/bold\]", command.help)
    program, called, *arguments = shlex.split(example)
    assert (program, called) == ("cloudgate", name)
    command.make_context(name, arguments)  # raises on an option that does not exist; runs nothing
    for parameter in command.params:
        assert parameter.name == "help" or parameter.help, f"{name}: {parameter.name} has no help"


def test_all_commands_of_the_main_job_are_there():
    assert set(COMMANDS) >= {"demo", "search", "plan", "mosaic", "status", "simulate", "preview", "doctor"}
