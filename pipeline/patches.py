"""Samples as tensors: in come a training store and numbers of samples, out come batches to learn from.

xbatcher's generator gives the patches' windows, each of them one Zarr chunk. No GDAL, no Dask. Order, augmentation and
dropped looks are functions of (seed, epoch, number of the sample), so that a resumed training sees what the interrupted
one would have seen.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from xbatcher import BatchGenerator

from pipeline import estimates
from pipeline.bands import CODE_NODATA, CODE_OFFSET, CODE_SCALE
from pipeline.cases import CLOUD, SHADOW, VOID
from pipeline.errors import StoreMismatchError
from pipeline.learnfile import Fit, Training
from pipeline.models.batch import Batch
from pipeline.samples import ARRAYS, LAYOUT, Sample, Store, open_store, patch_dims, sources_of

LEAST_LOOKS: Final = 3

Key = tuple[int, int]
"""(epoch, number of the sample)."""


def checked_store(training: Training) -> Store:
    """The store of a training.

    Raises:
        StoreMismatchError: it is not there, not finished, or holds samples of another request.
    """
    store = open_store(training.store)
    bands = tuple(store.about["bands"])
    if bands != training.bands:
        raise StoreMismatchError(
            f"store: {training.store} holds {', '.join(bands)}, and bands are {', '.join(training.bands)}; prepare "
            "another store, or make them the same"
        )
    if store.about["cases"] != json.loads(training.cases.model_dump_json()):
        raise StoreMismatchError(
            f"store: {training.store} was prepared with other cases; name another store, or start over with "
            "`cloudgate train --prepare --restart`"
        )
    prepared, asked = sources_of(store.about), sources_of(json.loads(training.model_dump_json()))
    for one in asked:
        del one["weight"]  # how often a sample serves is not what it is
    if prepared != asked:
        other = [one["name"] for one in asked if one not in prepared] or [one["name"] for one in prepared]
        raise StoreMismatchError(
            f"store: {training.store} was prepared with other sources ({', '.join(other)}); name another store, or "
            "start over with `cloudgate train --prepare --restart`"
        )
    if store.about.get("layout") != LAYOUT:
        raise StoreMismatchError(
            f"store: {training.store} was written by an earlier version (layout {store.about.get('layout')}, now "
            f"{LAYOUT}); prepare it again with `cloudgate train --prepare --restart`"
        )
    if store.about.get("version") != estimates.VERSION:
        raise StoreMismatchError(
            f"store: {training.store} holds estimates of version {store.about.get('version', 1)}, and this program "
            f"gives {estimates.VERSION}; prepare it again with `cloudgate train --prepare --restart`"
        )
    for name, now in (("estimates", estimates.ESTIMATES), ("context", estimates.CONTEXT)):
        if tuple(store.about[name]) != now:
            raise StoreMismatchError(
                f"store: {training.store} holds the {name} {', '.join(store.about[name])}, and this version gives "
                f"{', '.join(now)}; prepare it again with `cloudgate train --prepare --restart`"
            )
    return store


class Patches(Dataset[dict[str, Any]]):
    """Samples of a store by (epoch, number); each a dict of numpy arrays as they are stored, augmented.

    Args:
        store: from ``checked_store``.
        numbers: of the samples that serve.
        seed: of augmentation and dropped looks.
        fit: which of them; None leaves samples as they are (validation).
    """

    def __init__(self, store: Store, numbers: Sequence[int], *, seed: int, fit: Fit | None) -> None:
        self.store, self.seed, self.fit = store, seed, fit
        self.samples = [store.samples[i] for i in numbers]
        self.paper = store.about["cases"]["mode"] == "paper"
        self._generators: dict[str, BatchGenerator] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, number = key
        sample = self.samples[number]
        arrays = {str(name): np.asarray(v.values[0]) for name, v in self._window(sample).data_vars.items()}
        count = len(sample.days)
        arrays["looks"], arrays["bits"] = arrays["looks"][:count], arrays["bits"][:count]
        arrays["days"] = np.array(sample.days, np.float32) - np.float32(sample.day)
        arrays["observed"] = _observed(arrays["bits"], sample.target)
        if self.fit is not None:
            rng = np.random.default_rng([self.seed, 1, epoch, number])
            arrays = self._varied(arrays, self.fit, rng)
        return {**arrays, "id": sample.id, "case": sample.case}

    def _window(self, sample: Sample) -> xr.Dataset:
        """The sample's window: one chunk of each array."""
        if sample.group not in self._generators:
            group = xr.open_dataset(
                self.store.path / sample.group / ARRAYS, engine="zarr", chunks=None, consolidated=False
            )
            side = self.store.about["cases"]["patch_px"]
            self._generators[sample.group] = BatchGenerator(
                group, input_dims=patch_dims(group, side), batch_dims={"case": 1}, preload_batch=True
            )
        window: xr.Dataset = self._generators[sample.group][sample.number]
        return window

    def _varied(self, arrays: dict[str, Any], fit: Fit, rng: np.random.Generator) -> dict[str, Any]:
        if self.paper:
            keep = _kept(len(arrays["days"]), fit.drop_looks, rng)
            for name in ("looks", "bits", "days"):
                arrays[name] = arrays[name][keep]
            if rng.random() < fit.insert_target:
                arrays["looks"] = np.concatenate([arrays["looks"], arrays["truth"][None]])
                arrays["bits"] = np.concatenate([arrays["bits"], arrays["truth_bits"][None]])
                arrays["days"] = np.append(arrays["days"], np.float32(0))
        if fit.flips:
            turns, mirror = int(rng.integers(4)), bool(rng.random() < 0.5)
            arrays = {name: _turned(value, turns, mirror) for name, value in arrays.items()}
        return arrays


def _observed(bits: NDArray[np.uint8], target: int | None) -> NDArray[np.bool_]:
    return np.zeros(bits.shape[1:], bool) if target is None else np.asarray(bits[target] == 0)


def _kept(count: int, share: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """Looks that stay: all, or with the chance ``share`` a random part, three at least."""
    if count <= LEAST_LOOKS or rng.random() >= share:
        return np.arange(count)
    return np.sort(rng.permutation(count)[: rng.integers(LEAST_LOOKS, count + 1)])


def _turned(value: NDArray[Any], turns: int, mirror: bool) -> NDArray[Any]:
    if value.ndim < 2:
        return value
    turned = np.rot90(value, turns, axes=(-2, -1))
    return np.ascontiguousarray(turned[..., ::-1] if mirror else turned)


class Order(Sampler[list[Key]]):
    """The batches of one epoch, shuffled by (seed, epoch); begins at ``first`` so that a resumed epoch goes on.

    Args:
        count: of samples. batch: samples in one. seed: of the order; None keeps it. rank, world: this process takes
            every ``world``-th batch, from ``rank`` on; all take the same number. most: batches at the most.
    """

    def __init__(
        self, count: int, batch: int, *, seed: int | None, rank: int = 0, world: int = 1, most: int | None = None
    ) -> None:
        self.count, self.batch, self.seed, self.rank, self.world = count, min(batch, count), seed, rank, world
        self.most = most
        self.epoch = self.first = 0

    def __len__(self) -> int:
        if self.seed is None:
            return -(-self.count // (self.batch * self.world))
        own = max(1, self.count // self.batch // self.world)
        return own if self.most is None else min(own, self.most)

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.arange(self.count)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, 2, self.epoch]).permutation(self.count)
        for step in range(self.first, len(self)):
            start = (step * self.world + self.rank) * self.batch
            part = order[start : start + self.batch]
            if part.size:
                yield [(self.epoch, int(number)) for number in part]


def samples_each(batch: int, count: int, world: int) -> int:
    """Samples a step for each of ``world`` processes: no more than there are, so that none is left without a batch."""
    return max(1, min(batch, count) // world)


@dataclass(frozen=True)
class Lesson:
    """A batch with what should come out.

    Attributes:
        given: what a network takes.
        truth: (B, C, H, W) float32 reflectance, 0 where unknown.
        hole: (B, 1, H, W) float32, 1 = to be filled, truth known.
        seen: (B, 1, H, W) float32, 1 = the target's own clear pixel, truth known.
        ids: of the samples.
    """

    given: Batch
    truth: Tensor
    hole: Tensor
    seen: Tensor
    ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> Self:
        """The same lesson on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "ids"}
        return type(self)(**moved, ids=self.ids)


def collate(rows: Sequence[dict[str, Any]]) -> Lesson:
    """Samples of different length as one ``Lesson``; shorter series are padded with steps that count for nothing."""
    steps = max(len(row["days"]) for row in rows)

    def padded(name: str, fill: int = 0) -> NDArray[Any]:
        first = rows[0][name]
        out = np.full((len(rows), steps, *first.shape[1:]), fill, first.dtype)
        for number, row in enumerate(rows):
            out[number, : len(row["days"])] = row[name]
        return out

    def stacked(name: str) -> NDArray[Any]:
        return np.stack([row[name] for row in rows])

    real = np.arange(steps)[None] < np.array([len(row["days"]) for row in rows])[:, None]
    bits, truth_bits = padded("bits", VOID), stacked("truth_bits")
    truth, hole, observed = stacked("truth"), stacked("hole") != 0, stacked("observed")
    known, prior = (truth != CODE_NODATA).all(axis=1), stacked("prior")
    seen = observed & known & (prior == truth).all(axis=1)  # what a mask missed at a simulated date is no truth
    given = Batch(
        looks=_reflectance(padded("looks")),
        present=_float(((bits & VOID) == 0)[:, :, None]),
        clear=_float(np.stack([(bits & CLOUD) == 0, (bits & SHADOW) == 0], axis=2)),
        days=torch.from_numpy(padded("days")),
        steps=torch.from_numpy(real),
        condition=_float(np.stack([(truth_bits & bit) == 0 for bit in (CLOUD, SHADOW, VOID)], axis=1)),
        prior=_reflectance(prior),
        scale=_float(stacked("scale")),
        estimates=_reflectance(stacked("estimates")),
        context=_float(stacked("context")),
        known=_float(observed[:, None]),
    )
    ids = tuple(row["id"] for row in rows)
    return Lesson(given, _reflectance(truth), _float((hole & known)[:, None]), _float(seen[:, None]), ids)


def _reflectance(codes: NDArray[np.uint16]) -> Tensor:
    """Codes to float32 reflectance, 0 where there is no data."""
    values = (codes.astype(np.float32) - np.float32(CODE_OFFSET)) * np.float32(CODE_SCALE)
    return torch.from_numpy(np.where(codes != CODE_NODATA, values, np.float32(0)).astype(np.float32))


def _float(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
