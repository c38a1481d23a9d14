"""In: looks and estimates around a target. Out: patches of them on one lattice, as a model wants them.

The lattice is fixed to the global pixel index. What a patch holds is a function of the looks around it alone, never of
how blocks were cut: it is padded by reflection where the *data* end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.bands import CODE_OFFSET, CODE_SCALE
from pipeline.estimates import CONTEXT, FIT_REACH_PX, HALO_PX, Estimates, Target, estimate
from pipeline.models.batch import Batch

Float32 = NDArray[np.float32]
Flags = NDArray[np.bool_]

_FITTED: Final = CONTEXT.index("fitted")


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

    def used(self, place: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """[first, last) row and column of a patch that pixels are taken from, in the coordinates of its place."""
        (row, col), first, last = place, self.border_px, self.reach_px
        return (row + first, row + last), (col + first, col + last)

    def starts(self, start: int, stop: int) -> list[int]:
        """Where the patches begin whose used part meets [start, stop)."""
        first = (start - self.shift_px - self.reach_px) // self.stride_px + 1
        last = (stop - 1 - self.shift_px - self.border_px) // self.stride_px
        return [i * self.stride_px + self.shift_px for i in range(first, last + 1)]


def patch_places(wanted: Flags, lattice: PatchLattice, row0: int, col0: int) -> list[tuple[int, int]]:
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


def _span(starts: Sequence[int], length: int, core: slice, size: int) -> tuple[int, int]:
    """The part of an array's axis that the core and patches of so many pixels lie on."""
    return max(min([*starts, core.start]), 0), min(max([*starts, core.stop - length]) + length, size)


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
class Source:
    """What patches are cut from: a target with the looks around it, and the estimates ``about`` it."""

    target: Target
    bits: NDArray[np.uint8] | None
    about: Estimates
    patch_px: int

    @classmethod
    def around(
        cls,
        target: Target,
        bits: NDArray[np.uint8] | None,
        spots: Sequence[tuple[int, int]],
        patch_px: int,
        core: tuple[slice, slice],
    ) -> Self:
        """What the patches at ``spots``, the core and their estimates see of a block, with those estimates."""
        height, width = target.clear.shape[1:]
        top, bottom = _span([place[0] - target.row0 for place in spots], patch_px, core[0], height)
        left, right = _span([place[1] - target.col0 for place in spots], patch_px, core[1], width)
        rows, cols = slice(max(top - HALO_PX, 0), bottom + HALO_PX), slice(max(left - HALO_PX, 0), right + HALO_PX)
        near = replace(
            target,
            codes=target.codes[:, :, rows, cols],
            clear=target.clear[:, rows, cols],
            row0=target.row0 + rows.start,
            col0=target.col0 + cols.start,
        )
        # gaps just beyond decide too which clear pixels get a fit: what a patch learns from must not follow the cut
        part = (
            slice(max(top - rows.start - FIT_REACH_PX, 0), bottom - rows.start + FIT_REACH_PX),
            slice(max(left - cols.start - FIT_REACH_PX, 0), right - cols.start + FIT_REACH_PX),
        )
        return cls(near, None if bits is None else bits[:, rows, cols], estimate(near, core=part), patch_px)

    @property
    def origin(self) -> tuple[int, int]:
        """Global place of pixel [0, 0]."""
        return self.target.row0, self.target.col0

    def cut(self, place: tuple[int, int]) -> _Patch:
        """The patch at a global place, without the looks that show nothing of it."""
        top, left = place[0] - self.origin[0], place[1] - self.origin[1]

        anchor = self.target.anchor

        def at(array: NDArray[Any]) -> NDArray[Any]:
            return window(array, (top, left), (self.patch_px, self.patch_px))

        codes, clear = at(self.target.codes), at(self.target.clear)
        has_data = codes.min(axis=1) != 0
        serves = clear.any(axis=(1, 2))
        if anchor is not None:
            serves[anchor] |= has_data[anchor].any()
        known = clear[anchor] if anchor is not None else np.zeros(clear.shape[1:], bool)
        open_to = _visible(clear[serves], has_data[serves], None if self.bits is None else at(self.bits)[serves])
        arrays = [codes[serves], has_data[serves], open_to]
        arrays += [at(a) for a in (self.about.prior, self.about.scale, self.about.estimates, self.about.context)]
        arrays.append(known)
        inside = _mirror(has_data.any(axis=0))
        if inside is not None:
            arrays = [array[..., inside[0][:, None], inside[1]] for array in arrays]
        codes, present, clear, *facts, known = arrays
        prior, scale, estimates, context = facts
        if inside is not None:  # a reflection is for the eyes of convolutions: it is no second witness of the ground
            context[_FITTED] *= _first(inside[0])[:, None] & _first(inside[1])
        days = self.target.days[serves] - np.int32(self.target.day)
        return _Patch(codes, present, clear, days, prior, scale, estimates, context, known)


def _visible(clear: Flags, has_data: Flags, bits: NDArray[np.uint8] | None) -> Flags:
    """(t, 2, P, P) free of cloud, free of shadow; where nothing is there, nothing hides it."""
    hidden = has_data & ~clear
    if bits is None:
        return np.stack([~hidden, ~hidden], axis=1)
    shaded = (bits & 2) != 0
    clouded = ((bits & 1) != 0) | ~shaded  # whatever hides it without a name is taken for cloud
    return np.stack([~(hidden & clouded), ~(hidden & shaded)], axis=1)


def window(array: NDArray[Any], first: tuple[int, int], shape: tuple[int, int]) -> NDArray[Any]:
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


def _first(padded: NDArray[np.intp]) -> Flags:
    """(n,) True for the indices themselves, False for their reflections."""
    at = np.arange(len(padded))
    return np.asarray(padded == at)


def to_batch(patches: Sequence[_Patch], device: torch.device) -> Batch:
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
