"""A made-up field through a season, with its truth."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Field:
    truth: np.ndarray  # (T, B, H, W) codes without clouds
    codes: np.ndarray  # with clouds
    clear: np.ndarray
    days: np.ndarray


def field(size: int, *, times: int = 8, bands: int = 3, seed: int = 0, cover: float = 0.35) -> Field:
    """Parcels that ripen at their own pace and are harvested on their own day, dates with their own gain."""
    rng = np.random.default_rng(seed)
    parcels = ndimage.zoom(rng.integers(0, 40, (size // 12 + 1, size // 12 + 1)), 12, order=0)[:size, :size]
    pace, base = rng.random(40)[parcels], rng.random((bands, 40))[:, parcels]
    harvest = rng.random(40)[parcels]
    texture = rng.normal(0, 40, (bands, size, size))
    days = (18_000 + np.sort(rng.choice(90, times, replace=False))).astype(np.int32)
    truth = np.empty((times, bands, size, size))
    for t, day in enumerate(days):
        phase = (day - 18_000) / 90
        ripe = np.abs(np.sin(np.pi * (phase + pace))) * np.where(harvest < phase, 0.2, 1.0)
        for b in range(bands):
            ground = 1300 + 1200 * base[b] + (500 + 250 * b) * ripe + texture[b]
            truth[t, b] = 1000 + (ground - 1000) * rng.normal(1, 0.05) + rng.normal(0, 25, (size, size))
    noise = ndimage.gaussian_filter(rng.normal(size=(times, size, size)), (0, 12, 12))
    clear = noise > np.quantile(noise, cover, axis=(1, 2), keepdims=True)
    codes = np.where(clear[:, None], truth, 9000.0)
    return Field(np.rint(truth).astype(np.uint16), np.rint(codes).astype(np.uint16), clear, days)
