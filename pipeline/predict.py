"""In: the looks of a block and a learned model. Out: the target completed by it, patch by patch, without a seam.

Patches stand on one lattice fixed to the global pixel index; where they overlap, a linear ramp goes over from one to
the next, and nothing is taken from their outermost pixels. What a patch shows is a function of the looks around it
alone, never of how blocks were cut: it is padded by reflection where the *data* end, and on the CPU patches run one by
one on one thread. So shard size, task size and area do not change a byte there; on a GPU patches run in batches, and
values may differ by rounding.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.bands import CODE_SCALE, complete_looks, to_codes
from pipeline.errors import ConfigError, RunError
from pipeline.estimates import HALO_PX, Target
from pipeline.kept import Kept
from pipeline.models.batch import Batch, Completed
from pipeline.patchwork import PatchLattice, Source, patch_places, to_batch, window

IMPLAUSIBLE: Final = 0.5
"""Reflectance: a model's answer farther than this from the prior, or not finite, is not believed."""
CUDA_BATCH: Final = 16
"""Patches that a GPU works at a time, unless told otherwise."""

Precision = Literal["fp32", "bf16"]
Float32 = NDArray[np.float32]
Flags = NDArray[np.bool_]

_gpu = threading.Lock()
_halved: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass
class Completion:
    """The core of a block, completed.

    Attributes:
        codes: (B, H, W) uint16; the anchor's clear pixels bit-exact, 0 = no look shows this pixel.
        sigma: (B, H, W) float32, one sigma in codes where a model or the prior spoke, NaN elsewhere.
        source_date: (H, W) int32 days since 1970-01-01: the anchor's where observed, the look of the heaviest weight
            where the model gives weights, else the nearest clear look; 0 = none.
        doubtful: (H, W) bool, the model's answer was not believed and the prior stands there.
        notes: what a run should tell, such as a batch halved for memory.
    """

    codes: NDArray[np.uint16]
    sigma: Float32
    source_date: NDArray[np.int32]
    doubtful: Flags
    notes: list[str] = field(default_factory=list)


def lattice_of(model: nn.Module) -> PatchLattice:
    """The lattice that a model's configuration asks for (``patch_px``, ``stride_px``, ``border_px``)."""
    config, usual = getattr(model, "config", None), PatchLattice()
    return PatchLattice(
        *(getattr(config, name, getattr(usual, name)) for name in ("patch_px", "stride_px", "border_px"))
    )


def halo_px(model: nn.Module) -> int:
    """How far around a block a model looks: its patches' reach, and that of the estimates it starts from."""
    return lattice_of(model).reach_px + HALO_PX


def pick_device(name: str) -> str:
    """``cpu`` or ``cuda`` for auto, cpu or cuda; ``ConfigError`` where a GPU is asked for and there is none."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("method.device: cuda is asked for, and this machine shows no GPU; set method.device=auto")
    return "cuda" if there and name != "cpu" else "cpu"


def complete(
    target: Target,
    *,
    core: tuple[slice, slice] | None = None,
    bits: NDArray[np.uint8] | None = None,
    within: Flags | None = None,
    model: nn.Module,
    patch_batch: int | None = None,
    precision: Precision = "fp32",
    channels: Sequence[int] = (),
    lattice: PatchLattice | None = None,
    kept: Kept | None = None,
) -> Completion:
    """Complete one target with a learned model; patches without a gap are not run.

    Args:
        target: what is asked for, with the looks around it; an anchor's own day is the one shown.
        core: the part to answer for, all by default; the rest is halo, ``halo_px(model)`` of it where data go on.
        bits: (T, H, W) uint8, what hides a look: 1 cloud, 2 shadow; without it a look that has data and is not clear
            counts as under both.
        within: bool, of the core's shape: where an answer is wanted at all; elsewhere it may be no data.
        model: in evaluation mode, on its device.
        patch_batch: patches at a time on a GPU, 16 by default; on the CPU it is always one.
        precision: bf16 lets torch compute in bfloat16 where it deems that safe.
        channels: which band each channel of the model wants, see ``weights.check_bands``; empty: as they come.
        lattice: another than the model's, to look for seams.
        kept: the patches of earlier sub-blocks of a task; those that later ones need are added.

    Returns:
        ``Completion`` of the core, eager.

    Raises:
        RunError: if the GPU cannot hold a single patch.

    Source: science notes, sections 1.8 and 6.3.
    """
    codes, anchor = target.codes, target.anchor
    rows, cols = core or (slice(0, codes.shape[2]), slice(0, codes.shape[3]))
    clear = complete_looks(codes=codes, clear=target.clear)
    target = replace(target, clear=clear, day=target.day if anchor is None else int(target.days[anchor]))
    inner = clear[:, rows, cols]
    known = np.zeros(inner.shape[1:], bool) if anchor is None else inner[anchor]
    wanted = inner.any(axis=0) & ~known
    if within is not None:
        wanted &= within
    out = _observed(codes[:, :, rows, cols], anchor, known, target.day)
    lattice = lattice or lattice_of(model)
    first = target.row0 + rows.start, target.col0 + cols.start
    spots = patch_places(wanted, lattice, *first)
    if not spots:
        return out
    keys = {place: (anchor, target.day, lattice.used(place)) for place in spots}
    here = (first[0], first[0] + known.shape[0]), (first[1], first[1] + known.shape[1])
    kept = kept or Kept()
    kept.forget(*here)
    missing = [place for place, key in keys.items() if key not in kept.answers]
    source = Source.around(target, bits, missing, lattice.patch_px, (rows, cols))
    device, call = _device(model), _Call(model, precision, None if list(channels) == sorted(channels) else [*channels])
    canvas = _Canvas(out, wanted, source, lattice, first)
    with _gpu if device.type == "cuda" else one_thread():
        made = _run(missing, source, call, device, patch_batch, out.notes)
        for place, key in keys.items():  # always in this order: floats are summed
            answer = kept.answers.get(key) or next(made)
            canvas.add(place, answer)
            kept.keep(key, answer, *here)
    canvas.finish()
    return out


def _observed(codes: NDArray[np.uint16], anchor: int | None, known: Flags, day: int) -> Completion:
    """What the anchor shows, and nothing else."""
    out = Completion(
        np.zeros(codes.shape[1:], np.uint16),
        np.full(codes.shape[1:], np.nan, np.float32),
        np.zeros(known.shape, np.int32),
        np.zeros(known.shape, bool),
    )
    if anchor is not None:
        np.copyto(out.codes, codes[anchor], where=known)
        np.copyto(out.source_date, np.int32(day), where=known)
    return out


# -- the model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """What a model says of one patch: (C, P, P) reflectance, and the day of the heaviest look (P, P), 0 = none."""

    image: Float32
    sigma: Float32 | None
    heaviest: NDArray[np.int32] | None


def _run(
    spots: Sequence[tuple[int, int]],
    source: Source,
    call: "_Call",
    device: torch.device,
    patch_batch: int | None,
    notes: list[str],
) -> Iterator[_Answer]:
    """Run the patches in order. A GPU works on a batch while the next is cut, and takes less where it must."""
    queue = deque(spots)
    most = _most(call.model, device, patch_batch)
    flying: tuple[int, tuple[Tensor | None, ...]] | None = None
    while queue or flying:
        launched = None
        if queue:
            taken = [queue.popleft() for _ in range(min(most, len(queue)))]
            try:
                launched = len(taken), call(to_batch([source.cut(p) for p in taken], device), source.target.day)
            except torch.OutOfMemoryError as error:
                if len(taken) == 1:
                    raise RunError(
                        f"the GPU cannot hold one patch of {source.patch_px} px with its looks ({error}); set "
                        "method.device=cpu, or leave out looks with time.lookback_days"
                    ) from error
                most = _halved[call.model] = len(taken) // 2
                notes.append(f"out of GPU memory with {len(taken)} patches at a time, went on with {most}")
                queue.extendleft(reversed(taken))
                torch.cuda.empty_cache()
        if flying:
            arrays = [None if tensor is None else tensor.cpu().numpy() for tensor in flying[1]]
            for number in range(flying[0]):  # copies: a patch that is kept must not keep its batch
                yield _Answer(*(None if array is None else array[number].copy() for array in arrays))  # type: ignore[arg-type]
        flying = launched


def _most(model: nn.Module, device: torch.device, patch_batch: int | None) -> int:
    """Patches at a time; on the CPU one, so that bits do not depend on which patches meet in a batch."""
    if device.type == "cpu":
        return 1
    return min(patch_batch or CUDA_BATCH, _halved.get(model, CUDA_BATCH if patch_batch is None else patch_batch))


@dataclass(frozen=True)
class _Call:
    """A model as it is called: its precision, and the order in which it wants the bands (None: as they come)."""

    model: nn.Module
    precision: Precision
    channels: list[int] | None

    def __call__(self, batch: Batch, target: int) -> tuple[Tensor | None, ...]:
        """Image, sigma and day of the heaviest look, bands as they came, on the model's device."""
        kind = batch.looks.device.type
        low = torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        if self.channels:
            batch = _reordered(batch, self.channels)
        with torch.inference_mode(), low:
            done: Completed = self.model(batch)
            heaviest = None
            if done.heaviest is not None:
                days = batch.days.to(torch.int32) + target
                of_step = days.gather(1, done.heaviest.clamp_min(0).flatten(1)).view_as(done.heaviest)
                heaviest = torch.where(done.heaviest >= 0, of_step, 0)
            image, sigma = done.image.float(), None if done.sigma is None else done.sigma.float()
            if self.channels:
                back = np.argsort(self.channels).tolist()
                image, sigma = image[:, back], None if sigma is None else sigma[:, back]
        return image, sigma, heaviest


def _reordered(batch: Batch, channels: list[int]) -> Batch:
    return replace(
        batch,
        looks=batch.looks[:, :, channels],
        prior=batch.prior[:, channels],
        scale=batch.scale[:, channels],
        estimates=batch.estimates[:, :, channels],
        context=batch.context[:, :, channels],
    )


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch for this thread: tasks share the cores already, and bits must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the mosaic of patches --------------------------------------------------------------------------------------


class _Canvas:
    """Patches' answers, blended over the core."""

    def __init__(
        self, out: Completion, wanted: Flags, source: Source, lattice: PatchLattice, origin: tuple[int, int]
    ) -> None:
        self.out, self.wanted, self.source, self.lattice, self.origin = out, wanted, source, lattice, origin
        self.image = np.zeros(out.codes.shape, np.float32)
        self.sigma = np.zeros(out.codes.shape, np.float32)
        self.heaviest = np.zeros(wanted.shape, np.float32)
        self.has_sigma = True
        self.offset = origin[0] - source.origin[0], origin[1] - source.origin[1]

    def add(self, place: tuple[int, int], answer: _Answer) -> None:
        """Add a patch's answer, weighted; the prior stands in where it cannot be believed."""
        height, width = self.wanted.shape
        rows, cols = (
            slice(max(first - origin, 0), min(first + self.lattice.patch_px - origin, size))
            for first, origin, size in zip(place, self.origin, (height, width), strict=True)
        )
        inside = tuple(
            slice(part.start + origin - first, part.stop + origin - first)
            for part, origin, first in zip((rows, cols), self.origin, place, strict=True)
        )
        profile = self.lattice.profile
        weight = profile[inside[0], None] * profile[None, inside[1]]
        image, prior = answer.image[:, *inside], self._around(self.source.about.prior, rows, cols)
        believed = (np.abs(image - prior) <= IMPLAUSIBLE).all(axis=0)  # False where not finite
        self.image[:, rows, cols] += weight * np.where(believed, image, prior)
        scale = self._around(self.source.about.scale, rows, cols)
        if answer.sigma is None:
            self.has_sigma = False
        else:
            given = answer.sigma[:, *inside]
            scale = np.where(believed & np.isfinite(given), given, scale)
        self.sigma[:, rows, cols] += weight * scale
        self.out.doubtful[rows, cols] |= ~believed & (weight > 0)
        if answer.heaviest is not None:
            dates = answer.heaviest[inside]
            ahead = believed & (weight > self.heaviest[rows, cols])
            np.copyto(self.heaviest[rows, cols], weight, where=ahead)
            np.copyto(self.out.source_date[rows, cols], dates, where=ahead & self.wanted[rows, cols])

    def finish(self) -> None:
        """Blended answers to codes where they are wanted, with the model's sigma or, where it has one, the prior's."""
        out, whole = self.out, (slice(0, self.wanted.shape[0]), slice(0, self.wanted.shape[1]))
        wanted = self.wanted & (self._around(self.source.about.codes, *whole)[0] != 0)
        out.doubtful &= wanted
        np.copyto(out.codes, to_codes(self.image), where=wanted)
        told = wanted if self.has_sigma else wanted & np.isfinite(self._around(self.source.about.sigma, *whole))
        np.copyto(out.sigma, self.sigma / np.float32(CODE_SCALE), where=told)
        nearest = self._around(self.source.about.source_date, *whole)
        np.copyto(out.source_date, nearest, where=wanted & (out.source_date == 0))

    def _around(self, array: NDArray[Any], rows: slice, cols: slice) -> NDArray[Any]:
        """A part of the core of an array that lies as the estimates do."""
        first = self.offset[0] + rows.start, self.offset[1] + cols.start
        return window(array, first, (rows.stop - rows.start, cols.stop - cols.start))
