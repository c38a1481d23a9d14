"""How a network is examined: in come a lesson and an answer, out come the pixels that count and their errors."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import metrics
from pipeline.learnfile import Fit
from pipeline.models.batch import Batch
from pipeline.patches import Lesson


def lesson_weight(lesson: Lesson, fit: Fit, paper: bool) -> Tensor:
    """(B, 1, H, W) how much each pixel counts: the hole, and the target's clear pixels as identity."""
    if not paper:
        return lesson.hole + fit.identity * lesson.seen * (1 - lesson.hole)
    return lesson.hole * _own_clear(lesson.given) if fit.mask_target_clouds else lesson.hole


def exam_pixels(lesson: Lesson, paper: bool) -> Tensor:
    """(B, H, W) bool: where a sample is scored: its hole, in mode ``paper`` where the target itself is clear."""
    where = lesson.hole * _own_clear(lesson.given) if paper else lesson.hole
    return where[:, 0] > 0


def _own_clear(given: Batch) -> Tensor:
    return given.condition[:, :2].amin(dim=1, keepdim=True)


def undistorted(given: Batch) -> Batch:
    """The batch as at inference: the target is asked for clear and whole."""
    changed = {f.name: getattr(given, f.name) for f in fields(given)}
    return Batch(**(changed | {"condition": torch.ones_like(given.condition)}))


def scores(
    truth: NDArray[Any], image: NDArray[Any], prior: NDArray[Any], where: NDArray[np.bool_]
) -> tuple[float, ...]:
    """Sums for ``train``: squared error, values, PSNR, PSNR of the prior, 1 for the case; SSIM, 1 if it has one.

    All are 0 for nothing. ``truth``, ``image`` and ``prior`` are (C, H, W) reflectance, ``truth`` 0 in all bands where
    it is unknown; ``where`` (H, W) bool says what to score.
    """
    if not where.any():
        return (0.0,) * 7
    image = np.clip(image, 0, 1)
    error = (image - truth)[:, where]
    own = {"predicted": image, "truth": truth, "scored": where}
    fused = np.where(where, image, truth)
    known = np.where((truth == 0).all(axis=0), np.nan, truth)
    similar = metrics.ssim(predicted=fused, truth=known, scored=where)
    reference = metrics.psnr(predicted=prior, truth=truth, scored=where)
    psnr = min(metrics.psnr(**own), 99.0)
    errors = float((error**2).sum()), float(error.size), psnr, min(reference, 99.0), 1.0
    return (*errors, similar, 1.0) if np.isfinite(similar) else (*errors, 0.0, 0.0)


def timed(loader: Iterable[Lesson]) -> Iterator[tuple[float, Lesson]]:
    """Each batch with the seconds it was waited for."""
    batches = iter(loader)
    while True:
        began = time.perf_counter()
        lesson = next(batches, None)
        if lesson is None:
            return
        yield time.perf_counter() - began, lesson
