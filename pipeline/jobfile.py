"""The job file: in comes YAML, out comes a checked, frozen ``Job``; faults come as one kind paragraph.

Inputs named in the file are relative to the file, outputs to the working directory; ``${VAR}`` expands.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from os import environ
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import LEARNED, Job
from pipeline.errors import CloudgateError, ConfigError
from pipeline.redaction import without_credentials


def _expand(value: Any) -> Any:
    if isinstance(value, str):

        def one(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in environ:
                raise ConfigError(f"job: ${{{name}}} is not set in the environment; export {name}=... first")
            return environ[name]

        return re.sub(r"\$\{(\w+)\}", one, value)
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    return [_expand(item) for item in value] if isinstance(value, list) else value


def set_field(data: dict[str, Any], assignment: str) -> None:
    """Set a field of a mapping from ``key=value`` with dotted keys and a YAML value.

    Raises:
        ConfigError: if it has no ``=``.
    """
    key, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--set: {assignment!r} is not key=value; write for example --set method.name=median")
    node = data
    *parents, last = key.split(".")
    for part in parents:
        child = node.get(part)
        node[part] = node = dict(child) if isinstance(child, Mapping) else {}
    node[last] = yaml.safe_load(text)


def _hint(loc: Sequence[str | int], model: Any) -> str:
    for part in loc[:-1]:
        model = getattr(model, "model_fields", {}).get(str(part))
        model = getattr(model, "annotation", None)
    known = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(loc[-1]), known, 1)
    return f"; did you mean {near[0]!r}?" if near else (f"; known are {', '.join(known)}" if known else "")


def explain(error: ValidationError, what: str, model: type[BaseModel] = Job) -> str:
    """A validation error of ``model`` as one paragraph: what, field, value, way out."""
    lines = []
    for fault in error.errors()[:3]:
        loc = [part for part in fault["loc"] if not str(part).startswith(("literal[", "function-"))]
        where = ".".join(str(part) for part in loc)
        kind, message = fault["type"], fault["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            lines.append(f"{where}: there is no such field{_hint(loc, model)}")
        elif kind == "missing":
            lines.append(f"{where}: this field is required")
        elif loc:
            given = fault.get("input")
            shown = f" (got {given!r})" if not isinstance(given, dict) and repr(given) not in message else ""
            lines.append(f"{where}: {message}{shown}")
        else:
            lines.append(message)
    return f"{what}: " + "; ".join(lines)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file of fields, ``${VAR}`` expanded; ``what`` (job, schedule) names it in messages.

    Raises:
        ConfigError: if it is missing or no such file.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{what}: there is no file {path}; give the path of its YAML file, or try `cloudgate demo` first"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{what} {path}: not readable as YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{what} {path}: a mapping of fields is needed, got {type(data).__name__}; see `cloudgate --help`"
        )
    out: dict[str, Any] = _expand(data)
    return out


def load_job(path: Path | str, *, overrides: Sequence[str] = (), store: str | None = None) -> Job:
    """Read a job file.

    Args:
        path: YAML file; relative inputs (catalog path, geojson, profile) are taken from its folder.
        overrides: ``key=value`` pairs with dotted keys, values in YAML (``method.name=median``).
        store: replaces ``output.store``.

    Raises:
        ConfigError: for a missing file, broken YAML, an unknown field, or a value out of range.
    """
    path = Path(path)
    data = read_yaml(path, "job")
    for assignment in overrides:
        set_field(data, assignment)
    if store:
        data["output"] = {**(data.get("output") or {}), "store": store}
    return job_from_dict(data, folder=path.parent, what=f"job {path}")


def job_from_dict(data: Mapping[str, Any], *, folder: Path | None = None, what: str = "job") -> Job:
    """Check a mapping as a job; relative inputs are taken from ``folder``.

    Raises:
        ConfigError: as ``load_job``.
    """
    try:
        job = Job(**data)
    except ValidationError as error:
        raise ConfigError(explain(error, what)) from error
    except CloudgateError as error:
        raise ConfigError(f"{what}: {error}") from error
    if folder is None:
        return job
    update: dict[str, Any] = {}
    if "://" not in job.catalog and (folder / job.catalog).exists():
        update["catalog"] = str(folder / job.catalog)
    if job.profile and (folder / job.profile).is_file():
        update["profile"] = str(folder / job.profile)
    if job.area.geojson and not job.area.geojson.is_absolute():
        update["area"] = job.area.model_copy(update={"geojson": folder / job.area.geojson})
    weights = job.method.options.get("weights")
    if job.method.name in LEARNED and isinstance(weights, str) and (folder / weights).is_file():
        update["method"] = job.method.model_copy(update={"weights": str(folder / weights)})
    return job.model_copy(update=update)


def job_json(job: Job) -> dict[str, Any]:
    """The job as plain JSON values, for records: addresses have lost what lets one in, a cluster its options."""
    out: dict[str, Any] = json.loads(job.model_dump_json())
    address = job.cluster.address and without_credentials(job.cluster.address)
    cluster = out["cluster"] | {"address": address, "options": {}}  # which may hold keys for its workers
    return {**out, "catalog": without_credentials(job.catalog), "cluster": cluster}
