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
from itertools import product
from typing import Any, Final, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import composite
from pipeline.bands import CODE_OFFSET, CODE_SCALE, to_codes
from pipeline.errors import ConfigError, RunError
from pipeline.estimates import HALO_PX, Estimates, estimate
from pipeline.models.batch import Batch, Completed

IMPLAUSIBLE: Final = 0.5
"""Reflectance: a model's answer farther than this from the prior, or not finite, is not believed."""
CUDA_BATCH: Final = 16
"""Patches that a GPU works at a time, unless told otherwise."""

Precision = Literal["fp32", "bf16"]
Float32 = NDArray[np.float32]
Flags = NDArray[np.bool_]

_gpu = threading.Lock()
_halved: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class PatchLattice:
    """Where patches stand and how they are blended.

    Attributes:
        patch_px: side of a patch, as the model wants it.
        stride_px: from patch to patch.
        border_px: outermost pixels of a patch that are not used.
        shift_px: where the lattice begins on both axes; 0 in the product, anything else only to look for seams.
    """

    patch_px: int = 128
    stride_px: int = 96
    border_px: int = 8
    shift_px: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ramp_px <= self.stride_px:
            raise ConfigError(
                f"patches of {self.patch_px} px every {self.stride_px} px without {self.border_px} px of border do "
                "not overlap once everywhere; choose a stride between half the patch and the patch without borders"
            )

    @property
    def ramp_px(self) -> int:
        """Pixels over which one patch goes over into the next."""
        return self.patch_px - 2 * self.border_px - self.stride_px

    @property
    def reach_px(self) -> int:
        """No pixel depends on a patch that reaches farther from it than this."""
        return self.patch_px - self.border_px

    @property
    def profile(self) -> Float32:
        """(patch_px,) weight along one axis; those of the patches over a pixel sum to 1."""
        near = np.arange(self.patch_px) - self.border_px + 0.5
        ends = np.minimum(near, near[::-1]) / self.ramp_px
        return np.clip(ends, 0, 1).astype(np.float32)

    def starts(self, start: int, stop: int) -> list[int]:
        """Where the patches begin whose used part meets [start, stop)."""
        first = (start - self.shift_px - self.reach_px) // self.stride_px + 1
        last = (stop - 1 - self.shift_px - self.border_px) // self.stride_px
        return [i * self.stride_px + self.shift_px for i in range(first, last + 1)]


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
    *,
    codes: NDArray[np.uint16],
    clear: Flags,
    days: NDArray[np.int32],
    target: int,
    anchor: int | None,
    row0: int,
    col0: int,
    core: tuple[slice, slice] | None = None,
    bits: NDArray[np.uint8] | None = None,
    within: Flags | None = None,
    model: nn.Module,
    patch_batch: int | None = None,
    precision: Precision = "fp32",
    channels: Sequence[int] = (),
    lattice: PatchLattice | None = None,
) -> Completion:
    """Complete one target with a learned model; patches without a gap are not run.

    Args:
        codes: (T, B, H, W) uint16 codes in time order, 0 = no data.
        clear: (T, H, W) bool, True = usable look.
        days: (T,) int32 days since 1970-01-01, ascending.
        target: the day to show; the anchor's own where there is one.
        anchor: index of the acquisition to complete, None to predict a date that shows nothing.
        row0: global row of pixel [0, 0].
        col0: its column.
        core: the part to answer for, all by default; the rest is halo, ``halo_px(model)`` of it where data go on.
        bits: (T, H, W) uint8, what hides a look: 1 cloud, 2 shadow; without it a look that has data and is not clear
            counts as under both.
        within: bool, of the core's shape: where an answer is wanted at all; elsewhere it may be no data.
        model: in evaluation mode, on its device.
        patch_batch: patches at a time on a GPU, 16 by default; on the CPU it is always one.
        precision: bf16 lets torch compute in bfloat16 where it deems that safe.
        channels: which band each channel of the model wants, see ``weights.check_bands``; empty: as they come.
        lattice: another than the model's, to look for seams.

    Returns:
        ``Completion`` of the core, eager.

    Raises:
        RunError: if the GPU cannot hold a single patch.

    Source: science notes, sections 1.8 and 6.3.
    """
    rows, cols = core or (slice(0, codes.shape[2]), slice(0, codes.shape[3]))
    clear = composite.complete_looks(codes=codes, clear=clear)
    inner = clear[:, rows, cols]
    known = np.zeros(inner.shape[1:], bool) if anchor is None else inner[anchor]
    wanted = inner.any(axis=0) & ~known
    if within is not None:
        wanted &= within
    own = codes[:, :, rows, cols]
    out = Completion(
        np.zeros(own.shape[1:], np.uint16),
        np.full(own.shape[1:], np.nan, np.float32),
        np.zeros(known.shape, np.int32),
        np.zeros(known.shape, bool),
    )
    if anchor is not None:
        target = int(days[anchor])
        np.copyto(out.codes, own[anchor], where=known)
        np.copyto(out.source_date, np.int32(target), where=known)
    lattice = lattice or lattice_of(model)
    places = _places(wanted, lattice, row0 + rows.start, col0 + cols.start)
    if not places:
        return out
    # only what these patches and their estimates see
    top, bottom = _span([place[0] for place in places], lattice.patch_px, row0, codes.shape[2])
    left, right = _span([place[1] for place in places], lattice.patch_px, col0, codes.shape[3])
    near = slice(max(top - HALO_PX, 0), bottom + HALO_PX), slice(max(left - HALO_PX, 0), right + HALO_PX)
    part = slice(top - near[0].start, bottom - near[0].start), slice(left - near[1].start, right - near[1].start)
    seen, usable = codes[:, :, near[0], near[1]], clear[:, near[0], near[1]]
    origin = row0 + near[0].start, col0 + near[1].start
    known_as = estimate(
        codes=seen, clear=usable, days=days, target=target, anchor=anchor, row0=origin[0], col0=origin[1], core=part
    )
    hidden = None if bits is None else bits[:, near[0], near[1]]
    source = _Source(seen, usable, hidden, days, target, anchor, known_as, origin, lattice.patch_px)
    device, call = _device(model), _Call(model, precision, None if list(channels) == sorted(channels) else [*channels])
    canvas = _Canvas(out, wanted, source, lattice, (row0 + rows.start, col0 + cols.start))
    with _gpu if device.type == "cuda" else one_thread():
        for place, answer in _run(places, source, call, device, patch_batch, out.notes):
            canvas.add(place, answer)
    canvas.finish(has_scale=anchor is not None)
    return out


def _places(wanted: Flags, lattice: PatchLattice, row0: int, col0: int) -> list[tuple[int, int]]:
    """Global [row, col] of the patches that some wanted pixel depends on, row by row."""
    height, width = wanted.shape
    grid = product(lattice.starts(row0, row0 + height), lattice.starts(col0, col0 + width))
    used = slice(lattice.border_px, lattice.patch_px - lattice.border_px)
    return [
        (y, x)
        for y, x in grid
        if wanted[
            max(y + used.start - row0, 0) : max(y + used.stop - row0, 0),
            max(x + used.start - col0, 0) : max(x + used.stop - col0, 0),
        ].any()
    ]


def _span(starts: Sequence[int], length: int, origin: int, size: int) -> tuple[int, int]:
    """The part of an array's axis that patches lie on."""
    return max(min(starts) - origin, 0), min(max(starts) + length - origin, size)


# -- patches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patch:
    """One patch as numpy arrays, t looks of C bands and P x P pixels; see ``Batch`` for what they are."""

    codes: NDArray[np.uint16]
    present: Flags
    clear: Flags
    days: NDArray[np.int32]
    prior: Float32
    scale: Float32
    estimates: Float32
    context: Float32
    known: Flags


@dataclass(frozen=True)
class _Source:
    """Looks and estimates around the patches; ``origin`` is the global place of their pixel [0, 0]."""

    codes: NDArray[np.uint16]
    clear: Flags
    bits: NDArray[np.uint8] | None
    days: NDArray[np.int32]
    target: int
    anchor: int | None
    about: Estimates
    origin: tuple[int, int]
    patch_px: int

    def cut(self, place: tuple[int, int]) -> _Patch:
        """The patch at a global place, without the looks that show nothing of it."""
        top, left = place[0] - self.origin[0], place[1] - self.origin[1]

        def at(array: NDArray[Any]) -> NDArray[Any]:
            return _window(array, (top, left), (self.patch_px, self.patch_px))

        codes, clear = at(self.codes), at(self.clear)
        has_data = codes.min(axis=1) != 0
        serves = clear.any(axis=(1, 2))
        if self.anchor is not None:
            serves[self.anchor] |= has_data[self.anchor].any()
        known = clear[self.anchor] if self.anchor is not None else np.zeros(clear.shape[1:], bool)
        open_to = _visible(clear[serves], has_data[serves], None if self.bits is None else at(self.bits)[serves])
        arrays = [codes[serves], has_data[serves], open_to]
        arrays += [at(a) for a in (self.about.prior, self.about.scale, self.about.estimates, self.about.context)]
        arrays.append(known)
        if (inside := _mirror(has_data.any(axis=0))) is not None:
            arrays = [array[..., inside[0][:, None], inside[1]] for array in arrays]
        codes, present, clear, *facts, known = arrays
        prior, scale, estimates, context = facts
        days = self.days[serves] - np.int32(self.target)
        return _Patch(codes, present, clear, days, prior, scale, estimates, context, known)


def _visible(clear: Flags, has_data: Flags, bits: NDArray[np.uint8] | None) -> Flags:
    """(t, 2, P, P) free of cloud, free of shadow; where nothing is there, nothing hides it."""
    hidden = has_data & ~clear
    if bits is None:
        return np.stack([~hidden, ~hidden], axis=1)
    shaded = (bits & 2) != 0
    clouded = ((bits & 1) != 0) | ~shaded  # whatever hides it without a name is taken for cloud
    return np.stack([~(hidden & clouded), ~(hidden & shaded)], axis=1)


def _window(array: NDArray[Any], first: tuple[int, int], shape: tuple[int, int]) -> NDArray[Any]:
    """A rectangle of the last two axes, zero where it lies outside."""
    (top, left), (height, width) = first, shape
    there = array[..., max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if there.shape[-2:] == shape:
        return there
    out = np.zeros((*array.shape[:-2], *shape), array.dtype)
    y, x = max(-top, 0), max(-left, 0)
    out[..., y : y + there.shape[-2], x : x + there.shape[-1]] = there
    return out


def _mirror(seen: Flags) -> tuple[NDArray[np.intp], NDArray[np.intp]] | None:
    """Rows and columns that pad by reflection what lies outside the data; None where they fill the patch."""
    if seen[0].any() and seen[-1].any() and seen[:, 0].any() and seen[:, -1].any():
        return None
    axes = []
    for axis in (0, 1):
        there = np.flatnonzero(seen.any(axis=1 - axis))
        first, last = int(there[0]), int(there[-1])
        mode: Literal["reflect", "edge"] = "reflect" if last > first else "edge"
        axes.append(np.pad(np.arange(first, last + 1), (first, seen.shape[axis] - 1 - last), mode=mode))
    return axes[0], axes[1]


def _batch(patches: Sequence[_Patch], device: torch.device) -> Batch:
    """Patches as a model wants them; looks padded to the longest series."""
    steps = max(len(patch.days) for patch in patches)

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(patch, name) for patch in patches])).to(device)

    def series(name: str, dtype: Any) -> Tensor:
        padded = np.zeros((len(patches), steps, *getattr(patches[0], name).shape[1:]), dtype)
        for out, patch in zip(padded, patches, strict=True):
            out[: len(patch.days)] = getattr(patch, name)
        # codes travel as they are, in the guise of int16: torch does little with uint16
        return torch.from_numpy(padded.view(np.int16) if dtype is np.uint16 else padded).to(device)

    codes = series("codes", np.uint16).to(torch.int32).bitwise_and_(0xFFFF).to(torch.float32)
    present = series("present", np.uint8).to(torch.float32)[:, :, None]
    clear = series("clear", np.uint8).to(torch.float32)
    known = stack("known").to(torch.float32)[:, None]
    lengths = torch.tensor([len(patch.days) for patch in patches], device=device)
    return Batch(
        looks=codes.sub_(CODE_OFFSET).mul_(CODE_SCALE).mul_(present),
        present=present,
        clear=clear,
        days=series("days", np.float32),
        steps=torch.arange(steps, device=device)[None] < lengths[:, None],
        condition=known.new_ones((len(patches), 3, *known.shape[-2:])),
        prior=stack("prior"),
        scale=stack("scale"),
        estimates=stack("estimates"),
        context=stack("context"),
        known=known,
    )


# -- the model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """What a model says of one patch: (C, P, P) reflectance, and the day of the heaviest look (P, P), 0 = none."""

    image: Float32
    sigma: Float32 | None
    heaviest: NDArray[np.int32] | None


def _run(
    places: Sequence[tuple[int, int]],
    source: _Source,
    call: "_Call",
    device: torch.device,
    patch_batch: int | None,
    notes: list[str],
) -> Iterator[tuple[tuple[int, int], _Answer]]:
    """Run the patches in order. A GPU works on a batch while the next is cut, and takes less where it must."""
    queue = deque(places)
    most = _most(call.model, device, patch_batch)
    flying: tuple[list[tuple[int, int]], tuple[Tensor | None, ...]] | None = None
    while queue or flying:
        launched = None
        if queue:
            taken = [queue.popleft() for _ in range(min(most, len(queue)))]
            try:
                launched = taken, call(_batch([source.cut(p) for p in taken], device), source.target)
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
            for number, place in enumerate(flying[0]):
                yield place, _Answer(*(None if array is None else array[number] for array in arrays))  # type: ignore[arg-type]
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
            done: Completed = self.model(batch, with_weights=True)
            heaviest = None
            if done.weights is not None:
                share, step = done.weights.float().sum(dim=2).max(dim=1)
                days = (batch.days.to(torch.int32) + target)[:, :, None, None].expand(-1, -1, *step.shape[1:])
                heaviest = torch.where(share > 0, days.gather(1, step[:, None])[:, 0], 0)
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
        self, out: Completion, wanted: Flags, source: _Source, lattice: PatchLattice, origin: tuple[int, int]
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

    def finish(self, *, has_scale: bool) -> None:
        """Blended answers to codes where they are wanted; ``has_scale``: the prior's sigma is worth telling."""
        out, whole = self.out, (slice(0, self.wanted.shape[0]), slice(0, self.wanted.shape[1]))
        wanted = self.wanted & (self._around(self.source.about.codes, *whole)[0] != 0)
        out.doubtful &= wanted
        np.copyto(out.codes, to_codes(self.image), where=wanted)
        if self.has_sigma or has_scale:
            np.copyto(out.sigma, self.sigma / np.float32(CODE_SCALE), where=wanted)
        nearest = self._around(self.source.about.source_date, *whole)
        np.copyto(out.source_date, nearest, where=wanted & (out.source_date == 0))

    def _around(self, array: NDArray[Any], rows: slice, cols: slice) -> NDArray[Any]:
        """A part of the core of an array that lies as the estimates do."""
        first = self.offset[0] + rows.start, self.offset[1] + cols.start
        return _window(array, first, (rows.stop - rows.start, cols.stop - cols.start))
