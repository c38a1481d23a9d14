"""TRAIN.yaml and EVAL.yaml: in comes YAML, out come checked, frozen requests; every field is documented here.

Inputs named in a file are relative to the file, outputs to the working directory; ``${VAR}`` expands.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.bands import check_bands
from pipeline.config import Day, Job, Mask, Method
from pipeline.errors import ConfigError
from pipeline.jobfile import explain, job_from_dict, read_yaml, set_field
from pipeline.phenology import SIM_BANDS, SceneParams

_FIXED = {"epsg", "width_px", "height_px", "n_dates"}
_VARIED = {f.name for f in fields(SceneParams) if f.type in (float, int)} - _FIXED | {"flood_day"}
_OWN = ("bands", "method", "output", "target")


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Simulated(_Base):
    """Simulated ground and sky, one place a seed; its truth is known under every cloud."""

    seeds: int = Field(20, ge=1, description="number of places")
    first_seed: int = Field(1000, ge=0, description="seed of the first place; score on seeds that training never saw")
    size_px: int = Field(192, ge=64, multiple_of=2, description="side of a place in 10 m pixels")
    dates: tuple[int, int] = Field((8, 20), description="[least, most] passes of a place")
    vary: dict[str, tuple[float, float]] = Field(
        {}, description="parameter of pipeline.phenology.SceneParams: [low, high], drawn evenly for each place"
    )
    scl_share: float = Field(
        0.5, ge=0, le=1, description="share of places whose masks are the imperfect SCL, read as ``mask`` says"
    )
    mask: Mask = Field(Mask(), description="growth and check of that SCL; default as in a job")
    pastes: int | None = Field(
        None, ge=0, description="holes pasted on a clear pass, beside the clouds of all; default cases.pastes"
    )
    max_cases: int | None = Field(None, ge=1, description="at most so many cases of a place; default cases.max_cases")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 3 <= self.dates[0] <= self.dates[1]:
            raise ValueError(f"dates: {list(self.dates)} must be [least, most], at least 3 passes")
        for name, (low, high) in self.vary.items():
            if name not in _VARIED:
                raise ValueError(
                    f"vary: {name!r} is no parameter that can vary; known are {', '.join(sorted(_VARIED))}"
                )
            if high < low:
                raise ValueError(f"vary.{name}: [{low}, {high}] must be [low, high]")
        return self


class Source(_Base):
    """Where cubes come from: a region of one's own (``job``) or the simulator; exactly one of the two."""

    name: str = Field(
        min_length=1, pattern=r"^[\w.-]+$", description="of the place; simulated ones get their seed added"
    )
    job: dict[str, Any] | str | None = Field(
        None,
        description="a job (catalog, area, time, grid, mask ...) or the path of a job file; its bands are not used",
    )
    simulate: Simulated | None = Field(None, description="the simulator")
    weight: float = Field(
        1.0,
        gt=0,
        description="how often its samples serve in an epoch: 0.25 takes a quarter of them, 5 each five times",
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.job is None) == (self.simulate is None):
            raise ValueError(f"{self.name}: give exactly one of job and simulate")
        if isinstance(self.job, dict):
            for name in _OWN:
                if name in self.job:
                    raise ValueError(f"{self.name}: job.{name} has no meaning here; leave it out")
        return self


class Cases(_Base):
    """How samples are cut from a series and what is hidden in them."""

    mode: Literal["complete", "paper"] = Field(
        "complete",
        description="complete: the target is among the looks with a real mask and real cloud pasted on it; paper: a "
        "target with clouds of its own, not among the looks (Oehmcke et al. 2020)",
    )
    patch_px: int = Field(96, ge=32, multiple_of=32, description="side of a patch in pixels")
    block_px: int = Field(
        768, ge=32, description="side of the blocks in which a large area is read, without its margin"
    )
    max_blocks: int | None = Field(None, ge=1, description="use at most so many blocks of an area, drawn by the seed")
    window_days: int = Field(60, ge=5, description="looks within so many days of the target are used")
    max_looks: int = Field(24, ge=3, description="at most so many looks, the nearest ones")
    pastes: int = Field(2, ge=1, description="samples of each target, each with another hole")
    max_cases: int | None = Field(None, ge=1, description="at most so many cases of a place, drawn by the seed")
    target_max_bad: float = Field(0.05, ge=0, le=1, description="a target is clear but for this share (complete)")
    whole_share: float = Field(
        0.25, ge=0, le=1, description="share of samples whose target is dropped whole (complete)"
    )
    thin_share: float = Field(
        0.25, ge=0, le=1, description="share of samples that keep only some of the other looks (complete)"
    )
    omit_share: float = Field(
        0.0, ge=0, le=1, description="share of samples whose masks are made worse: they miss a part of the clouds"
    )
    omit: tuple[float, float] = Field((0.02, 0.3), description="[least, most] share of the clouds that is missed")
    omit_edge_px: int = Field(2, ge=0, description="and their edges up to so many pixels")
    min_valid: float = Field(0.5, ge=0, le=1, description="a patch needs known truth on this share of its pixels")
    min_hole: float = Field(0.02, ge=0, le=1, description="and a hole on this share of its pixels")


class Span(_Base):
    """A time block, both days inclusive."""

    start: Day
    end: Day

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) is before start ({self.start}); swap them")
        return self


class Split(_Base):
    """Which samples train, validate and test: by exact names of places, or by time block of the targets.

    Without any of them a fifth of the places validates, or, with fewer than five, the last fifth of the time.
    """

    validation: tuple[str, ...] = Field((), description="places that validate; simulated ones as name-seed")
    test: tuple[str, ...] = Field((), description="places kept out of training altogether")
    validation_time: Span | None = Field(None, description="targets of this time block validate, at every place")
    test_time: Span | None = Field(None, description="targets of this time block are kept out of training")
    gap_days: int = Field(30, ge=0, description="targets nearer than this to another part's time block are not used")
    share: float = Field(0.2, gt=0, lt=1, description="of places or time that validates where nothing is named")

    @model_validator(mode="after")
    def _apart(self) -> Self:
        one, other = self.validation_time, self.test_time
        if one and other and one.start <= other.end and other.start <= one.end:
            raise ValueError(
                f"validation_time ({one.start} to {one.end}) and test_time ({other.start} to {other.end}) overlap; the "
                "best network would be chosen on dates that test it"
            )
        return self


class Fit(_Base):
    """How the weights are found; the defaults are the paper's schedule (Oehmcke et al. 2020, section 4.1.2)."""

    epochs: int = Field(200, ge=1, description="passes over the training samples")
    epoch_steps: int | None = Field(None, ge=1, description="an epoch ends after so many steps; default: all samples")
    batch: int = Field(32, ge=1, description="samples a step, over all devices")
    rate: float = Field(1e-3, gt=0, description="learning rate of Adam")
    weight_decay: float = Field(5e-4, ge=0)
    constant_share: float = Field(0.5, ge=0, le=1, description="the rate is constant so long, then falls linearly to 0")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    patience: int | None = Field(30, ge=1, description="stop after so many epochs without a better validation error")
    max_minutes: float | None = Field(None, gt=0, description="stop, save and be ready to go on after so long")
    checkpoint_steps: int = Field(100, ge=1, description="save the state every so many steps, and after each epoch")
    identity: float = Field(0.1, ge=0, description="weight of the target's clear pixels beside the hole's (complete)")
    flips: bool = Field(True, description="flip and rotate samples at random")
    drop_looks: float = Field(0.5, ge=0, le=1, description="share of samples that lose looks, down to three (paper)")
    insert_target: float = Field(0.05, ge=0, le=1, description="share of samples with the target as a look (paper)")
    mask_target_clouds: bool = Field(False, description="leave the target's clouds out of the loss (paper)")
    frozen: tuple[str, ...] = Field((), description="parts of the network that keep what they start with, as kriging")
    adversary: float = Field(
        0.0, ge=0, description="weight of the Pix2Pix scheme's adversary beside the loss; 0 = none, usual is 0.01"
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "auto", description="auto: bf16-mixed on a GPU that has it, else 32-true"
    )
    accelerator: str = Field("auto", description="auto, cpu or cuda")
    devices: int = Field(1, ge=1, description="GPUs or processes, a part of the batch each")
    strategy: str = Field("auto", description="of Lightning, such as ddp")
    loaders: int | None = Field(
        None,
        ge=0,
        description="processes that read samples ahead, 0 reads in the training process; default up to 4 a GPU, 0 on a "
        "CPU; with any, a script of yours needs `if __name__ == '__main__':`",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default all")


class Training(_Base):
    """TRAIN.yaml."""

    name: str = Field("model", description="shown in the card of the weights")
    store: Path = Field(description="folder of the written training samples; `train --prepare` makes it")
    out: Path = Field(description="folder of checkpoints, log, curves and weights")
    seed: int = Field(0, ge=0, description="of everything random")
    bands: tuple[str, ...] = Field(("blue", "green", "red", "nir"), description="band names, or B02, B8A ...")
    sources: tuple[Source, ...] = Field(min_length=1, description="where the samples come from")
    cases: Cases = Cases()
    split: Split = Split()
    model: dict[str, Any] = Field({"name": "small"}, description="name of a network and its options")
    start: str | None = Field(
        None,
        description="weights to begin with, a file or the name of weights that ship: what has the same name and shape "
        "in this network is taken, the rest begins fresh",
    )
    after: dict[str, Any] = Field(
        {}, description="options of the network that change in the weights that are saved, as {yields: true}"
    )
    loss: dict[str, Any] = Field({}, description="what training minimises, see pipeline.models.losses")
    fit: Fit = Fit()

    @field_validator("bands", mode="after")
    @classmethod
    def _bands(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_bands(value)

    @model_validator(mode="after")
    def _sources(self) -> Self:
        _check_sources(self.sources, self.bands)
        _check_seeds(self.sources)
        if self.start is not None and Path(self.start).parent.resolve() == self.out.resolve():
            raise ValueError(f"start: {self.start} lies in out, where this training writes its own; name another out")
        return self


class Scored(Source):
    """One series to score on."""

    tasks: tuple[Literal["complete", "predict"], ...] = Field(
        ("complete", "predict"),
        min_length=1,
        description="complete: fill the pasted hole of a date (task A); predict: a date that shows nothing (task B)",
    )
    variants: tuple[Literal["base", "inputs", "growth", "growth of looks", "scl", "scl+check"], ...] = Field(
        ("base",), min_length=1, description="of task A on real series: which looks are spoiled, and how"
    )
    other_mask: Mask = Field(
        Mask(source="scl", open_m=0, cloud_grow_m=0, shadow_grow_m=0, temporal_check=False),
        description="the masks of the variants scl and scl+check",
    )


class Evaluation(_Base):
    """EVAL.yaml."""

    name: str = Field("evaluation", description="title of the report")
    out: Path = Field(description="folder of tables, plots and pictures")
    seed: int = Field(0, ge=0, description="of donors, turns and halves")
    bands: tuple[str, ...] = Field(("blue", "green", "red", "nir"), description="band names, or B02, B8A ...")
    methods: tuple[Method, ...] = Field(min_length=1, description="names, or {name: ..., options} as in a job")
    reference: str = Field("regression", description="label of the method that differences are taken to")
    sets: tuple[Scored, ...] = Field(min_length=1, description="the series")
    pastes: int = Field(2, ge=1, description="holes a target")
    window_days: int = Field(60, ge=5, description="looks within so many days of the target are used")
    target_max_bad: float = Field(
        0.01, gt=0, le=1, description="a real target is clear but for this share; grown masks of large areas need more"
    )
    max_cases: int | None = Field(None, ge=1, description="at most so many cases of each set and task, spread in time")
    pictures: int = Field(3, ge=0, description="best, median and worst cases to draw (0: none)")

    @field_validator("bands", mode="after")
    @classmethod
    def _bands(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_bands(value)

    @field_validator("methods", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_sources(self.sets, self.bands)
        labels = [label(method) for method in self.methods]
        twice = {name for name in labels if labels.count(name) > 1}
        if twice:
            raise ValueError(
                f"methods: {', '.join(sorted(twice))} twice; give options that tell them apart (weights "
                "are known by their file's name, those called weights by their folder's too: name them otherwise)"
            )
        if self.reference not in labels:
            raise ValueError(f"reference: {self.reference!r} is not among the methods {', '.join(labels)}; add it")
        return self


def label(method: Method) -> str:
    """What a method is called in tables: its name, with its options where it has some."""
    options = ", ".join(_told(Path(v)) if k == "weights" else f"{k}={v}" for k, v in method.options.items())
    return f"{method.name} ({options})" if options else method.name


def _told(weights: Path) -> str:
    """The file's name; training calls all of them ``weights``, so its folder goes with that."""
    return f"{weights.parent.name}/{weights.stem}" if weights.stem == "weights" else weights.stem


def _checked_bands(value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return check_bands(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("bands: ")) from error


def _check_sources(sources: Sequence[Source], bands: Sequence[str]) -> None:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"sources: {name!r} is named twice; names of places are their identity")
    unknown = [band for band in bands if band not in SIM_BANDS]
    if unknown and any(source.simulate for source in sources):
        raise ValueError(f"bands: {', '.join(unknown)} cannot be simulated; choose from {', '.join(SIM_BANDS)}")


def _check_seeds(sources: Sequence[Source]) -> None:
    """The ground of a simulated place is its seed's, whatever the source is called: no two sources draw the same."""
    drawn = [(s.name, s.simulate.first_seed, s.simulate.first_seed + s.simulate.seeds) for s in sources if s.simulate]
    for i, (one, first, stop) in enumerate(drawn):
        for other, start, end in drawn[:i]:
            if first < end and start < stop:
                raise ValueError(
                    f"sources: {other} (seeds {start} to {end - 1}) and {one} ({first} to {stop - 1}) draw the same "
                    "places, so that one could learn what the other validates; "
                    f"give {one} a first_seed of {end} or more"
                )


def load_training(path: Path | str, *, overrides: Sequence[str] = ()) -> Training:
    """Read TRAIN.yaml.

    Raises:
        ConfigError: for a missing file, broken YAML, an unknown field, or a value out of range.
    """
    return _load(Training, path, overrides, "train")


def load_evaluation(path: Path | str, *, overrides: Sequence[str] = ()) -> Evaluation:
    """Read EVAL.yaml; faults as ``load_training``."""
    return _load(Evaluation, path, overrides, "evaluate")


def _load[Asked: BaseModel](kind: type[Asked], path: Path | str, overrides: Sequence[str], command: str) -> Asked:
    path = Path(path)
    data = read_yaml(path, command)
    for assignment in overrides:
        set_field(data, assignment)
    for source in (*_list(data.get("sources")), *_list(data.get("sets"))):
        if isinstance(source, dict) and isinstance(source.get("job"), str):
            source["job"] = str(path.parent / source["job"])
        elif isinstance(source, dict) and isinstance(source.get("job"), dict):
            _from_folder(source["job"], path.parent)
    for holder, field in (*((method, "weights") for method in _list(data.get("methods"))), (data, "start")):
        weights = holder.get(field) if isinstance(holder, dict) else None
        if isinstance(weights, str) and (path.parent / weights).is_file():
            holder[field] = str(path.parent / weights)
    try:
        return kind(**data)
    except ValidationError as error:
        raise ConfigError(explain(error, f"{command} {path}", kind)) from error


def _from_folder(job: dict[str, Any], folder: Path) -> None:
    """Take a job's input files from the folder of the file it stands in; in place."""
    area = job.get("area")
    for holder, field in ((job, "catalog"), (job, "profile"), (area if isinstance(area, dict) else {}, "geojson")):
        value = holder.get(field)
        if isinstance(value, str) and "://" not in value and (folder / value).exists():
            holder[field] = str(folder / value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def job_of(source: Source, bands: Sequence[str]) -> Job:
    """The job that reads a source's cube: its own with the bands asked for.

    Raises:
        ConfigError: where the job's fields cannot be used.
    """
    what, folder = f"source {source.name}", None
    if isinstance(source.job, str):
        given, folder = read_yaml(Path(source.job), "job"), Path(source.job).parent
    else:
        given = dict(source.job or {})
    given = {name: value for name, value in given.items() if name not in _OWN}
    return job_from_dict({**given, "bands": list(bands)}, folder=folder, what=what)
