"""What each look adds to one pixel of a gated model: in come the looks around it and the model, out come their shares.

The model runs exactly as in a job, on the patches that show the pixel; its weights are blended as its answers are.
"""

from itertools import product
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import to_reflectance
from pipeline.models.batch import Batch, Completed, Model
from pipeline.predict import complete, lattice_of


class _Listener(Model):
    """Passes a model on, and keeps what its weights say of one place in each patch."""

    def __init__(self, model: Model, places: list[tuple[int, int]]) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.places = places
        self.heard: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]] | None] = []

    def forward(self, batch: Batch, *, with_weights: bool = False) -> Completed:  # noqa: ARG002 - always asked for here
        done = cast(Completed, self.model(batch, with_weights=True))
        row, col = self.places[len(self.heard)]
        if done.weights is None:
            self.heard.append(None)
        else:
            kept = batch.days[0], batch.looks[0, :, :, row, col], done.weights[0, :, :, row, col].mean(dim=1)
            self.heard.append(tuple(part.float().cpu().numpy() for part in kept))  # type: ignore[arg-type]
        return done


def at_pixel(
    *,
    model: Model,
    codes: NDArray[np.uint16],
    clear: NDArray[np.bool_],
    days: NDArray[np.int32],
    target: int,
    anchor: int | None,
    row0: int,
    col0: int,
    pixel: tuple[int, int],
    channels: tuple[int, ...] = (),
    **more: Any,
) -> NDArray[np.float64] | None:
    """(T,) share of each look in the model's aggregate at one pixel, the mean over bands.

    Args:
        model: in evaluation mode, on the CPU.
        codes: as ``predict.complete`` takes it, with ``halo_px`` around the pixel; so are the others.
        clear: likewise.
        days: likewise.
        target: likewise.
        anchor: likewise.
        row0: likewise.
        col0: likewise.
        pixel: (row, col) in the arrays.
        channels: likewise.
        more: what else ``predict.complete`` takes (bits, precision).

    Returns:
        The shares; they add up to less than one where the model also listens to estimates. None where the model gives
        no weights; zeros where no look is clear.
    """
    lattice, (row, col) = lattice_of(model), (row0 + pixel[0], col0 + pixel[1])
    patches = [(row - y, col - x) for y, x in product(lattice.starts(row, row + 1), lattice.starts(col, col + 1))]
    listener = _Listener(model, patches).eval()
    core = (slice(pixel[0], pixel[0] + 1), slice(pixel[1], pixel[1] + 1))
    complete(
        codes=codes,
        clear=clear,
        days=days,
        target=target,
        anchor=anchor,
        row0=row0,
        col0=col0,
        core=core,
        model=listener,
        channels=channels,
        **more,
    )
    out = np.zeros(len(days))
    here = to_reflectance(codes[:, :, pixel[0], pixel[1]])[:, list(channels) or slice(None)]
    shown = target if anchor is None else int(days[anchor])
    for (inner_row, inner_col), heard in zip(patches, listener.heard, strict=False):  # none where nothing is wanted
        if heard is None:
            return None
        part = float(lattice.profile[inner_row] * lattice.profile[inner_col])
        for day, values, weight in zip(*heard, strict=True):
            of_day = np.flatnonzero(days - shown == int(day))
            # two acquisitions of one day are told apart by what they show
            unlike = np.abs(np.nan_to_num(here[of_day]) - values).sum(axis=1)
            out[of_day[unlike.argmin()]] += part * float(weight)
    return out
