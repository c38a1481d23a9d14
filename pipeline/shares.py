"""What each look adds to one pixel of a gated model: in come the looks around it and the model, out come their shares.

The model runs exactly as in a job, on the patches that show the pixel; its weights are blended as its answers are.
"""

from itertools import product
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import to_reflectance
from pipeline.estimates import Target
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
    target: Target, *, model: Model, pixel: tuple[int, int], channels: tuple[int, ...] = (), **more: Any
) -> NDArray[np.float64] | None:
    """(T,) share of each look in the model's aggregate at one pixel, the mean over bands.

    Args:
        target: what is asked for, with ``halo_px`` of its looks around the pixel.
        model: in evaluation mode, on the CPU.
        pixel: (row, col) in the arrays.
        channels: as ``predict.complete`` takes them.
        more: what else it takes (bits, precision).

    Returns:
        The shares; they add up to less than one where the model also listens to estimates. None where the model gives
        no weights; zeros where no look is clear.
    """
    days, codes = target.days, target.codes
    lattice, (row, col) = lattice_of(model), (target.row0 + pixel[0], target.col0 + pixel[1])
    patches = [(row - y, col - x) for y, x in product(lattice.starts(row, row + 1), lattice.starts(col, col + 1))]
    listener = _Listener(model, patches).eval()
    core = (slice(pixel[0], pixel[0] + 1), slice(pixel[1], pixel[1] + 1))
    complete(target, core=core, model=listener, channels=channels, **more)
    out = np.zeros(len(days))
    here = to_reflectance(codes[:, :, pixel[0], pixel[1]])[:, list(channels) or slice(None)]
    shown = target.day if target.anchor is None else int(days[target.anchor])
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
