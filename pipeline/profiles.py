"""Catalog profiles: in come ``catalogs/NAME.yaml``, out come ``Profile`` values that say how each speaks.

A new catalog is a YAML file, never code.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MaskRule(_Base):
    """How a raster is read as cloud, shadow, clear or no data."""

    kind: Literal["scl", "classes", "bits", "probability"] = Field("scl", description="what the raster's values are")
    asset: str = Field("scl", description="asset name of the raster in the item")
    cloud: tuple[int, ...] = Field((), description="classes (or bits) that are cloud")
    shadow: tuple[int, ...] = Field((), description="classes (or bits) that are shadow")
    nodata: int | None = Field(None, description="value that means no data")
    threshold: float | None = Field(
        None, description="probability from which a pixel is cloud, in the raster's own unit"
    )


_SCL: Final = {"kind": "scl", "cloud": (8, 9, 10), "shadow": (3,), "nodata": 0}


def rule_of(
    known: Sequence[MaskRule],
    *,
    asset: str | None = None,
    cloud: tuple[int, ...] | None = None,
    shadow: tuple[int, ...] | None = None,
    bits: Mapping[str, tuple[int, ...]] | None = None,
    threshold: float | None = None,
    nodata: int | None = None,
) -> MaskRule:
    """The rule of a raster with what a job says of it; what it leaves out is as the profile knows that raster.

    Args:
        known: the profile's rules, the default first.
        asset: the raster, default the profile's.
        cloud: classes that are cloud.
        shadow: classes that are shadow.
        bits: numbers of bits, ``cloud`` and ``shadow``.
        threshold: cloud from this probability on.
        nodata: value that means no data.

    Raises:
        ConfigError: for a raster whose classes nobody knows.
    """
    asset = asset or (known[0].asset if known else "scl")
    usual = MaskRule(asset=asset, **_SCL) if asset.lower().startswith("scl") else None
    base = next((rule for rule in known if rule.asset == asset), usual)
    nodata = base.nodata if nodata is None and base else nodata
    if bits is not None:
        own = {"cloud": bits.get("cloud", ()), "shadow": bits.get("shadow", ())}
        return MaskRule(kind="bits", asset=asset, nodata=nodata, **own)
    if threshold is not None:
        return MaskRule(kind="probability", asset=asset, threshold=threshold, nodata=nodata)
    if base and (cloud is None or base.kind in ("scl", "classes")):
        if shadow is not None and base.kind not in ("scl", "classes"):
            raise ConfigError(
                f"mask.shadow: {asset!r} holds no classes but {base.kind}; give bits or threshold instead"
            )
        changed = {"cloud": cloud, "shadow": shadow, "nodata": nodata}
        return base.model_copy(update={name: value for name, value in changed.items() if value is not None})
    if cloud is None:
        raise ConfigError(
            f"mask.asset: {asset!r} needs to know its classes; add cloud: [..] and shadow: [..], bits, or threshold"
        )
    return MaskRule(kind="classes", asset=asset, cloud=cloud, shadow=shadow or (), nodata=nodata)


class OffsetPolicy(_Base):
    """What to believe about the BOA offset (-1000 DN since processing baseline 04.00)."""

    policy: Literal["none", "flag", "metadata", "baseline"] = Field(
        "baseline",
        description="none: pixels carry no offset; flag: the item's flag where true, else baseline with the "
        "pixel check; metadata: the asset's explicit offset; baseline: baseline with the pixel check",
    )
    flag: str | None = Field(None, description="item property that says the offset is already applied")


class Auth(_Base):
    """How reads are allowed in."""

    kind: Literal["none", "planetary-computer", "s3-keys", "earthdata", "unsigned-s3"] = "none"
    token_url: str | None = Field(
        None, description="where to fetch read tokens: {account} and {container} are filled in"
    )


class Retry(_Base):
    """Retries of one read."""

    tries: int = Field(4, ge=1, description="attempts in all")
    backoff_s: float = Field(0.5, ge=0, description="seconds before the second attempt, doubled each time")
    request_tries: int = Field(8, ge=1, description="attempts of one HTTP request once a read met a fault")
    request_budget_s: float = Field(180, gt=0, description="seconds that all attempts of one HTTP request may take")


class Detect(_Base):
    """How items of a catalog are told from others when only a path or URL is given; one sign is enough."""

    hosts: tuple[str, ...] = Field((), description="host names (or buckets) in the items' links or hrefs")
    properties: tuple[str, ...] = Field((), description="beginnings of item properties")
    assets: tuple[str, ...] = Field((), description="asset keys that no other catalog has")


class Profile(_Base):
    """One catalog."""

    name: str
    title: str = ""
    endpoint: str | None = Field(None, description="STAC API URL; none for files")
    collections: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="collection id -> other spellings of it"
    )
    default_collection: str | tuple[str, ...] | None = Field(
        None, description="collection (or collections) searched where the job names none"
    )
    bands: dict[str, tuple[str, ...]] = Field(description="band name -> asset keys, best first")
    mask: MaskRule = MaskRule()
    mask_alternatives: tuple[MaskRule, ...] = Field(
        (), description="rules tried in this order where items lack the raster of `mask`"
    )
    detect: Detect = Detect()
    tile_resolution_m: float | None = Field(
        None, description="pixel size of whole MGRS tiles, where items are silent about their projection"
    )
    offset: OffsetPolicy = OffsetPolicy()
    scale: float = Field(1e-4, description="reflectance per DN where items are silent")
    nodata: float | None = Field(0, description="DN of no data where items are silent")
    prefer: tuple[Literal["https", "s3"], ...] = ("https", "s3")
    bbox_only: bool = Field(False, description="the server takes no polygons")
    page_limit: int = Field(100, ge=1)
    auth: Auth = Auth()
    gdal: dict[str, str] = Field(default_factory=dict, description="GDAL settings for reads, as environment variables")
    retry: Retry = Retry()
    verify_checksums: bool = Field(
        False, description="read files that carry a file:checksum only once they agree with it"
    )
    notes: str = ""


def _folders() -> list[Path]:
    here = Path(__file__).resolve().parent
    return [here / "catalogs", here.parent / "catalogs"]


def profile_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted({path.stem for folder in _folders() if folder.is_dir() for path in folder.glob("*.yaml")})


@cache
def load_profile(name: str) -> Profile:
    """Read a shipped profile by name, or one from a path that ends in ``.yaml``.

    Raises:
        ConfigError: if there is none of that name, or it has a wrong field.
    """
    paths = [Path(name)] if name.endswith((".yaml", ".yml")) else [folder / f"{name}.yaml" for folder in _folders()]
    for path in paths:
        if path.is_file():
            data: dict[str, Any] = yaml.safe_load(os.path.expandvars(path.read_text()))
            try:
                return Profile(**{"name": path.stem, **data})
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ConfigError(f"profile {path}: {where}: {first['msg']} (got {first.get('input')!r})") from error
    raise ConfigError(
        f"profile: there is none named {name!r}; known are {', '.join(profile_names())}, or give a .yaml path"
    )
