"""What a job may say: a frozen ``Job`` of checked fields, every one documented here (read by ``pipeline.jobfile``)."""

import difflib
import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cronsim import CronSim, CronSimError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from pipeline.bands import check_bands
from pipeline.errors import ConfigError
from pipeline.profiles import MaskRule, rule_of
from pipeline.tables import table_html

CALENDAR = ("month", "quarter", "year", "10 days", "week")
"""Lengths of periods by name; anything else is a cron expression."""
MASK_MODELS = ("omnicloudmask", "s2cloudless")
"""Cloud detectors that make the mask from the bands; each is an extra."""
SHOWS_DATE = ("nearest", "linear", "kalman", "regression", "timegate")
"""Methods that show a date (an anchor is completed); the others show the whole span."""
METHODS = ("median", "p25", "mean", "medoid", "geomedian", "decay", *SHOWS_DATE)
LEARNED = ("timegate",)
"""Methods that are learned models; they need the extra ``learn``."""


def _strict_date(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError("a date such as 2023-08-01 is needed")
    return value


Day = Annotated[date, BeforeValidator(_strict_date)]


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Area(_Base):
    """Where: exactly one of the three."""

    bbox: tuple[float, float, float, float] | None = Field(
        None, description="[west, south, east, north] in degrees; west > east crosses the antimeridian"
    )
    geojson: Path | None = Field(None, description="polygon file in degrees; outside it is no data, flagged")
    mgrs: str | None = Field(None, description="an MGRS tile such as 33TWM")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        given = [name for name in ("bbox", "geojson", "mgrs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of bbox, geojson, mgrs (got {', '.join(given) or 'none'})")
        return self

    @field_validator("bbox")
    @classmethod
    def _degrees(cls, value: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
        if value is None:
            return None
        west, south, east, north = value
        if abs(south) > 90 or abs(north) > 90:
            raise ValueError(
                f"latitudes {south} and {north} must lie within -90..90; is the order [west, south, east, north]?"
            )
        if abs(west) > 180 or abs(east) > 180:
            raise ValueError(f"longitudes {west} and {east} must lie within -180..180")
        if north <= south:
            raise ValueError(
                f"north ({north}) must be greater than south ({south}); the order is [west, south, east, north]"
            )
        if west == east:
            raise ValueError(f"the box is empty: west and east are both {west}")
        width = (east - west) % 360
        if width > 180:
            raise ValueError(f"the box is {width:.1f} degrees wide; split what is wider than 180 degrees")
        return value

    @field_validator("mgrs")
    @classmethod
    def _tile(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(T)?(0?[1-9]|[1-5]\d|60)[C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V]", value):
            raise ValueError(f"{value!r} is no MGRS tile; it looks like 33TWM")
        return value.removeprefix("T").zfill(5) if value else value


class GridSpec(_Base):
    """On which pixels."""

    crs: str = Field("utm", description="utm (zone of the centre) or a projected EPSG code such as EPSG:3035")
    resolution_m: float = Field(10, gt=0, description="pixel size in metres")
    shard_px: int = Field(2048, ge=16, description="side of a Zarr shard, the unit of writing, in pixels")
    sharded: bool = Field(
        True, description="false: every chunk is an object of its own, for readers without shards (GDAL before 3.13)"
    )

    @field_validator("shard_px")
    @classmethod
    def _multiple(cls, value: int) -> int:
        if value > 512 and value % 512:
            raise ValueError(f"{value} must be a multiple of 512 (the chunk) or at most 512")
        return value


class TimeSpec(_Base):
    """When: one span, or one mosaic per period."""

    start: Day = Field(description="first solar day, inclusive")
    end: Day = Field(description="last solar day, inclusive")
    every: str | None = Field(
        None,
        description="one mosaic per period: month, quarter, year, 10 days, week (ISO), or a cron expression on whose "
        "days periods begin, such as 0 0 1,16 * *",
    )
    lookback_days: int = Field(0, ge=0, description="also use looks from so many days before each period")

    @field_validator("every")
    @classmethod
    def check_every(cls, value: str | None) -> str | None:
        """Refuse what makes no periods of whole days."""
        if value is None or value in CALENDAR:
            return value
        known = f"known are {', '.join(CALENDAR)}, or a cron expression of five fields such as '0 0 1,16 * *'"
        if len(value.split()) != 5:
            near = difflib.get_close_matches(value, CALENDAR, 1)
            raise ValueError(
                f"{value!r} is no length of a period{f'; did you mean {near[0]!r}?' if near else ''}; {known}"
            )
        try:
            fires = CronSim(value, datetime(2000, 1, 1))  # noqa: DTZ001 (only its days count)
            next(fires)
        except (CronSimError, StopIteration) as error:
            raise ValueError(f"{value!r} is no cron expression that ever fires ({error}); {known}") from error
        if len(fires.hours) * len(fires.minutes) > 1:
            raise ValueError(
                f"{value!r} fires several times a day, and periods of less than a day would overlap; fix its minute "
                "and hour, such as '0 0 ...'"
            )
        return value

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) is before start ({self.start}); swap them")
        return self


class Method(_Base):
    """How looks become one pixel. Options beside the name belong to the method."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("regression", description=" | ".join(METHODS))
    anchor_min_clear: float = Field(
        0.2, ge=0, le=1, description="share of clear ground an anchor must show in its swath"
    )
    anchor_max_days: int = Field(16, ge=0, description="an anchor lies at most so many days from the target")
    blend_m: float = Field(2000, ge=0, description="width in metres of the strip between swaths of different anchors")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            near = difflib.get_close_matches(value, METHODS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown method {value!r}{hint}; known are {', '.join(METHODS)}")
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def shows_date(self) -> bool:
        """Whether the method completes an acquisition instead of summarising the span."""
        return self.name in SHOWS_DATE


class Mask(_Base):
    """Which looks are clouded. Growth is in metres on the ground."""

    source: str | None = Field(
        None,
        description="scl (the scene classification), or a detector that makes the mask from the bands: omnicloudmask, "
        "s2cloudless (extras); default: what the profile says",
    )
    asset: str | None = Field(None, description="mask raster in the items instead of the profile's, such as clm")
    cloud: tuple[int, ...] | None = Field(
        None, description="classes of that raster that are cloud; default the profile's"
    )
    shadow: tuple[int, ...] | None = Field(
        None, description="classes of that raster that are shadow; default the profile's"
    )
    bits: dict[str, tuple[int, ...]] | None = Field(None, description="bit numbers: {cloud: [1, 2], shadow: [3]}")
    threshold: float | None = Field(
        None, description="for a probability raster: cloud from this value on, its own unit"
    )
    nodata: int | None = Field(None, description="value of that raster that means no data; default the profile's")
    open_m: float | None = Field(
        None, ge=0, description="drop specks of cloud smaller than this; default 40 for scl, else 0"
    )
    cloud_grow_m: float = Field(100, ge=0, description="grow cloud by so many metres")
    shadow_grow_m: float = Field(100, ge=0, description="grow shadow by so many metres")
    temporal_check: bool = Field(True, description="mark looks brighter or darker than the other dates allow")

    @field_validator("source")
    @classmethod
    def _source(cls, value: str | None) -> str | None:
        known = ("scl", *MASK_MODELS)
        if value is not None and value not in known:
            raise ValueError(
                f"unknown mask source {value!r}; known are {', '.join(known)}; to read a raster of the items, name it "
                "as mask.asset instead"
            )
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        own = ("asset", "cloud", "shadow", "bits", "threshold", "nodata")
        named = [name for name in own if getattr(self, name) is not None]
        if self.source is not None and named:
            raise ValueError(f"source {self.source!r} and {', '.join(named)} exclude each other; leave one of them out")
        ways = [name for name in ("cloud", "bits", "threshold") if name in named]
        if len(ways) > 1 or ("shadow" in named and ways in (["bits"], ["threshold"])):
            raise ValueError(f"{', '.join(named)}: give classes (cloud, shadow), bits, or a threshold, not several")
        if unknown := sorted(set(self.bits or {}) - {"cloud", "shadow"}):
            raise ValueError(f"bits: unknown {', '.join(unknown)}; write bits: {{cloud: [1, 2], shadow: [3]}}")
        return self

    @property
    def model(self) -> str | None:
        """The detector that makes the mask from the bands; None where a raster of the items is read."""
        return self.source if self.source in MASK_MODELS else None

    def rule(self, known: Sequence[MaskRule]) -> MaskRule | None:
        """The rule of this job, None to leave the choice to the search.

        Args:
            known: the profile's rules, the default first (a raster named without classes is read by them).

        Raises:
            ConfigError: for a raster whose classes nobody knows.
        """
        if self.source == "scl":
            return next((rule for rule in known if rule.kind == "scl"), rule_of((), asset="scl"))
        given = self.model_dump(include={"asset", "cloud", "shadow", "bits", "threshold", "nodata"}, exclude_none=True)
        return rule_of(known, **given) if given else None

    def opening_m(self, kind: str) -> float:
        """The opening in metres: the given one, else 40 for SCL and 0 for all others."""
        usual = 40.0 if kind == "scl" and self.model is None else 0.0
        return usual if self.open_m is None else self.open_m


class Output(_Base):
    """Where the mosaic goes."""

    store: str | None = Field(None, description="Zarr store, relative to the working directory")
    overviews: bool = Field(
        True, description="write coarser levels too, down to 256 px; a store that has them keeps having them"
    )
    cog: bool = Field(False, description="write Cloud-Optimized GeoTIFFs of each period too, into NAME.cog/")


class Cluster(_Base):
    """What computes. Fields that a kind does not know are left alone."""

    kind: Literal["local", "local-cuda", "address", "kubernetes", "gateway", "slurm"] = Field(
        "local",
        description="local processes; local-cuda: one process per visible GPU; address: a running Dask scheduler; "
        "kubernetes: a DaskCluster of the Dask operator; gateway: a Dask Gateway; slurm: jobs of dask-jobqueue",
    )
    workers: int = Field(2, ge=1, description="worker processes; the most of them where the cluster grows on demand")
    reads_per_worker: int | None = Field(
        None, ge=1, description="reads in flight per worker; default 2 from files, 8 over a network"
    )
    wait_s: float = Field(
        120, gt=0, description="how long a cluster may take to come up, and a run waits while it has no worker at all"
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="what a task asks of its worker, such as {GPU: 1}; local-cuda sets it itself"
    )
    address: str | None = Field(None, description="tcp://host:port of the scheduler (address), URL of the gateway")
    image: str | None = Field(None, description="container image of scheduler and workers (kubernetes)")
    namespace: str | None = Field(
        None, description="namespace (kubernetes); default: the one of this pod or kubeconfig"
    )
    secret: str | None = Field(None, description="name of a Secret whose keys workers get as environment (kubernetes)")
    idle_timeout_s: int = Field(
        600,
        ge=60,
        description="a cluster that nobody uses ends after so long, even if its client was killed (kubernetes)",
    )
    queue: str | None = Field(None, description="partition (slurm)")
    account: str | None = Field(None, description="account (slurm)")
    walltime: str = Field("04:00:00", description="time limit of one worker's job, HH:MM:SS (slurm)")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="passed on as they are: cluster options (gateway), arguments of SLURMCluster (slurm)",
    )

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if self.kind == "address" and not self.address:
            raise ValueError("kind: address needs address: tcp://host:port")
        if self.kind == "kubernetes" and not self.image:
            raise ValueError("kind: kubernetes needs image: REGISTRY/NAME:TAG, an image that holds this cloudgate")
        return self


class Limits(_Base):
    """What must not be exceeded."""

    memory_gb_per_worker: float = Field(4, gt=0.5, description="memory of one worker process in GB (10^9 bytes)")
    max_failed_fraction: float = Field(0.05, ge=0, le=1, description="share of (item, band, task) reads that may fail")
    task_timeout_s: float = Field(
        1800, gt=0, description="a task that takes longer ends with its worker process and is tried once more"
    )
    verify_checksums: bool = Field(
        False,
        description="fetch each file that carries a file:checksum whole, and read it once it agrees; costs the bytes "
        "of whole files",
    )


class Job(_Base):
    """One request for mosaics."""

    name: str = Field("mosaic", description="shown in logs and in the store")
    catalog: str = Field(description="a profile, a STAC API URL, or a path to an ItemCollection or static catalog")
    profile: str | None = Field(None, description="profile for a path or URL; default: detected from the items")
    collection: str | None = Field(None, description="collection id; default: the profile's")
    area: Area
    grid: GridSpec = GridSpec()
    bands: tuple[str, ...] = Field(("blue", "green", "red", "nir"), description="band names, or B02, B8A ...")
    time: TimeSpec
    target: Literal["start", "middle", "end"] | Day = Field(
        "middle",
        description="date the mosaic shows: start, middle or end of each period, or a date when `every` is absent",
    )
    max_cloud_cover: float = Field(100, ge=0, le=100, description="leave out scenes cloudier than this, percent")
    method: Method = Method()
    mask: Mask = Mask()
    offset_dn: Literal[0, -1000] | None = Field(None, description="override: BOA offset in DN, of baselines from 04.00")
    output: Output = Output()
    cluster: Cluster = Cluster()
    limits: Limits = Limits()

    def _repr_html_(self) -> str:
        """For notebooks: what is asked for, and of the rest only what differs from the defaults."""
        always = ("catalog", "area", "bands", "time", "target", "method")
        shown = self.model_dump(mode="json", exclude_defaults=True, exclude={"name", "method"})
        rest = self.model_dump(mode="json", include=set(always), exclude_none=True)
        rest["method"] = {"name": self.method.name, **self.method.options}
        ordered = {name: shown.get(name, rest[name]) for name in always} | shown | {"area": rest["area"]}
        return table_html(f"Job {self.name}", ordered)

    @field_validator("bands", mode="after")
    @classmethod
    def _bands(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return check_bands(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("bands: ")) from error

    @model_validator(mode="after")
    def _target(self) -> Self:
        if isinstance(self.target, date):
            if self.time.every:
                raise ValueError(
                    f"target: the date {self.target} and time.every exclude each other; use start, middle or end"
                )
            first = self.time.start - timedelta(days=self.time.lookback_days)
            if not first <= self.target <= self.time.end:
                raise ValueError(
                    f"target: {self.target} lies outside the span {first} to {self.time.end}; move one of them"
                )
        return self
