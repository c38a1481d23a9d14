"""What a training store holds and who learns from it: in comes its folder, out come samples, and their split.

One folder a place, with ``arrays.zarr`` (one chunk a patch) and a line for each case that is written whole. Plain
Python: no pixel is read here.
"""

import copy
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.errors import ConfigError, StoreMismatchError
from pipeline.items import EPOCH
from pipeline.learnfile import Span, Split

LAYOUT: Final = 2
ABOUT: Final = "store.json"
COMPLETE: Final = "complete.json"
DONE: Final = "done.jsonl"
ARRAYS: Final = "arrays.zarr"


@dataclass(frozen=True)
class Sample:
    """One patch of one case.

    Attributes:
        id: unique in the store.
        case: id of the case it is cut from.
        group: folder of its place in the store; equals the place unless the area came in blocks.
        place: what splits go by.
        number: of the patch among all windows of the group.
        day: of the target, days since 1970-01-01.
        days: of the looks, in the order they are stored.
        target: position of the target among them, None where it was taken out.
        valid: share of known truth. hole: share to fill.
    """

    id: str
    case: str
    group: str
    place: str
    number: int
    day: int
    days: tuple[int, ...]
    target: int | None
    valid: float
    hole: float


@dataclass(frozen=True)
class Store:
    """A written training store: ``about`` is what it was made from."""

    path: Path
    about: dict[str, Any]
    samples: tuple[Sample, ...]


def is_complete(path: Path) -> bool:
    """Whether a store is written to its end."""
    return (path / ABOUT).is_file() and (path / COMPLETE).is_file()


def open_store(path: Path) -> Store:
    """Read what a store holds; no pixel is read.

    Raises:
        StoreMismatchError: where there is none, or its preparation was interrupted.
    """
    about, complete = path / ABOUT, path / COMPLETE
    if not about.is_file():
        raise StoreMismatchError(f"store: {path} holds no training samples; make them with `cloudgate train --prepare`")
    if not complete.is_file():
        raise StoreMismatchError(
            f"store: the preparation of {path} was interrupted; run `cloudgate train --prepare` again, it goes on"
        )
    groups = json.loads(complete.read_text())["groups"]
    samples = [sample for group, place in groups.items() for sample in group_samples(path, group, place)]
    return Store(path, json.loads(about.read_text()), tuple(samples))


def group_samples(path: Path, group: str, place: str) -> list[Sample]:
    """The samples of one place that are written so far."""
    samples = []
    for line in done_cases(path / group):
        for number, valid, hole in line["patches"]:
            name = f"{line['id']}#{number}"
            days, target = tuple(line["days"]), line["target"]
            samples.append(Sample(name, line["id"], group, place, number, line["day"], days, target, valid, hole))
    return samples


def done_cases(folder: Path) -> list[dict[str, Any]]:
    """The cases of a place that are written whole; a line cut off by a kill is none."""
    path = folder / DONE
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def sources_of(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of a request by what they are; where this machine keeps their files is nobody's business."""
    out: list[dict[str, Any]] = copy.deepcopy(asked["sources"])
    for source in out:
        job = source["job"]
        if isinstance(job, str):
            source["job"] = Path(job).name
        elif job and isinstance(job.get("catalog"), str) and "://" not in job["catalog"]:
            job["catalog"] = "/".join(Path(job["catalog"]).parts[-2:])
    return out


def split_samples(samples: Sequence[Sample], split: Split, *, seed: int) -> dict[str, list[int]]:
    """Numbers of the samples that train, validate and test; no place or time block serves two ends.

    Places are compared as whole names. A target in or within ``gap_days`` of another part's time block is not used.

    Raises:
        ConfigError: for a place that is not there, or a part that is left empty.
    """
    places = sorted({sample.place for sample in samples})
    for part in ("validation", "test"):
        for name in getattr(split, part):
            if name not in places:
                raise ConfigError(f"split.{part}: there is no place {name!r}; there are {_some(places)}")
    both = set(split.validation) & set(split.test)
    if both:
        raise ConfigError(f"split: {', '.join(sorted(both))} cannot both validate and test")
    validation, spans = set(split.validation), _spans(split)
    if not (split.validation or split.validation_time):
        rest = [place for place in places if place not in split.test]
        if len(rest) >= 5:
            count = max(1, round(split.share * len(rest)))
            validation = {rest[i] for i in np.random.default_rng([seed, 5]).permutation(len(rest))[:count]}
        else:
            tested = spans.get("test", (0, -1))
            last = sorted(s.day for s in samples if s.place not in split.test and not tested[0] <= s.day <= tested[1])
            spans["validation"] = (last[int(len(last) * (1 - split.share))], last[-1]) if last else (0, 0)
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, sample in enumerate(samples):
        serves = _part(sample, validation, set(split.test), spans, split.gap_days)
        if serves:
            parts[serves].append(number)
    for part in ("train", "validation"):
        if not parts[part]:
            raise ConfigError(
                f"split: no sample is left to {part.replace('train', 'train on').replace('validation', 'validate on')} "
                f"of {len(samples)} at {_some(places)}; name other places or time blocks, or a smaller gap_days"
            )
    return parts


def _spans(split: Split) -> dict[str, tuple[int, int]]:
    given: dict[str, Span | None] = {"validation": split.validation_time, "test": split.test_time}
    return {name: (_day(span.start), _day(span.end)) for name, span in given.items() if span}


def _day(when: date) -> int:
    return (when - EPOCH).days


def _part(
    sample: Sample, validation: set[str], test: set[str], spans: Mapping[str, tuple[int, int]], gap: int
) -> str | None:
    by_place = "test" if sample.place in test else "validation" if sample.place in validation else "train"
    inside = [name for name, (first, last) in spans.items() if first <= sample.day <= last]
    near = [name for name, (first, last) in spans.items() if first - gap <= sample.day <= last + gap]
    if by_place == "train":
        return inside[0] if len(inside) == 1 and near == inside else None if near else "train"
    return by_place if not near or near == [by_place] else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def patch_dims(arrays: Any, side_px: int) -> dict[Hashable, int]:
    """Sizes of xbatcher's windows: patches in space; all dims but ``case`` are named, or it would stack them."""
    sizes: dict[Hashable, int] = {"y": side_px, "x": side_px}
    return sizes | {name: size for name, size in arrays.sizes.items() if name not in ("y", "x", "case")}
