"""Patterns to draw a ground with: in come coordinates and a seed, out come noise, districts, strips.

Hashes rather than tables say what lies in a parcel, so that a place needs no list of all parcels; arrays
are (H, W).
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def power_noise(shape: tuple[int, int], *, beta: float, rng: np.random.Generator, outer_px: float = 1e9) -> F32:
    """Periodic power-law noise, float32, zero mean, unit variance.

    Spectrum ``(k^2 + 1/outer_px^2)^(-beta/2)``.
    """
    white = rng.standard_normal(shape, dtype=np.float32)
    spectrum = scipy.fft.rfft2(white, overwrite_x=True)
    ky = scipy.fft.fftfreq(shape[0]).astype(np.float32)[:, None]
    kx = scipy.fft.rfftfreq(shape[1]).astype(np.float32)[None, :]
    power = kx * kx + ky * ky + np.float32(1.0 / outer_px**2)
    power[0, 0] = np.inf
    spectrum *= power ** np.float32(-beta / 4)
    out: F32 = scipy.fft.irfft2(spectrum, s=shape, overwrite_x=True)
    out -= out.mean(dtype=np.float64)
    out /= max(float(out.std(dtype=np.float64)), 1e-12)
    return out


def mix(*keys: NDArray[np.integer] | int) -> NDArray[np.uint32]:
    """A well-mixed uint32 of integers (murmur3 finaliser): the same place always gets the same parcel."""
    state = np.zeros((), np.uint32)
    with np.errstate(over="ignore"):
        for key in keys:
            part = np.asarray(key).astype(np.int64).astype(np.uint32)
            state = (state * np.uint32(31)) ^ (part * np.uint32(0x9E3779B1))
            state = state ^ (state >> np.uint32(16))
            state = state * np.uint32(0x85EBCA6B)
            state = state ^ (state >> np.uint32(13))
            state = state * np.uint32(0xC2B2AE35)
            state = state ^ (state >> np.uint32(16))
    return np.asarray(state, np.uint32)


def unit(hashed: NDArray[np.uint32]) -> F32:
    """Hashes to float32 in [0, 1)."""
    return (hashed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


@dataclass(frozen=True)
class Districts:
    """Jittered-grid Voronoi cells: per pixel the id of the cell and the distance (m) to its border."""

    id: NDArray[np.int32]
    border_m: F32


def voronoi(x: F32, y: F32, *, spacing_m: float, seed: int) -> Districts:
    """Voronoi cells of a jittered grid. ``x``, ``y`` (H, W) metres.

    Only the 3 x 3 nearest cells are looked at.
    """
    ci, cj = (np.floor(y / spacing_m).astype(np.int32), np.floor(x / spacing_m).astype(np.int32))
    near = np.full(x.shape, 1e12, np.float32)
    second = near.copy()
    ids = np.zeros(x.shape, np.int32)
    points = np.zeros((4, *x.shape), np.float32)  # nearest y, x; second y, x
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            i, j = ci + di, cj + dj
            # drawn once per cell, then looked up: hashing every pixel nine times would cost most of the
            # set-up
            lut_i, lut_j = (np.arange(i.min(), i.max() + 1), np.arange(j.min(), j.max() + 1))
            hashed = mix(lut_i[:, None], lut_j[None, :], seed)
            where = (i - lut_i[0]).astype(np.intp) * lut_j.size + (j - lut_j[0])
            py = ((lut_i[:, None] + 0.15 + 0.7 * unit(hashed)) * spacing_m).astype(np.float32).ravel()[where]
            px = ((lut_j[None, :] + 0.15 + 0.7 * unit(mix(hashed, 1))) * spacing_m).astype(np.float32).ravel()[where]
            name = (hashed & np.uint32(0x7FFFFFFF)).astype(np.int32).ravel()[where]
            distance = (x - px) ** 2 + (y - py) ** 2
            first = distance < near
            runner = ~first & (distance < second)
            second = np.where(first, near, np.where(runner, distance, second))
            for k, p in ((2, py), (3, px)):
                points[k] = np.where(first, points[k - 2], np.where(runner, p, points[k]))
            points[0], points[1] = (np.where(first, py, points[0]), np.where(first, px, points[1]))
            near = np.where(first, distance, near)
            ids = np.where(first, name, ids)
    gap = np.hypot(points[0] - points[2], points[1] - points[3])
    return Districts(ids, ((second - near) / np.maximum(2 * gap, 1)).astype(np.float32))


def strips(
    x: F32, y: F32, district: NDArray[np.int32], *, width_m: float, length_m: float
) -> tuple[NDArray[np.uint32], F32, F32]:
    """Rows of parcels inside each district, turned to its own direction.

    Returns:
        the parcel's hash, the distance (m) to its long edge, and the coordinate (m) across the rows.
    """
    names, inverse = np.unique(district[::8, ::8], return_inverse=True)
    order = np.searchsorted(names, district).clip(0, names.size - 1).astype(np.int32)
    del inverse
    turn = (unit(mix(names, 11)) * np.pi).astype(np.float32)
    wide = (width_m * np.exp(0.35 * (2 * unit(mix(names, 12)) - 1) * 1.7)).astype(np.float32)
    long = (length_m * np.exp(0.3 * (2 * unit(mix(names, 13)) - 1) * 1.7)).astype(np.float32)
    cos, sin = (np.cos(turn).astype(np.float32)[order], np.sin(turn).astype(np.float32)[order])
    across, along = cos * x + sin * y, cos * y - sin * x
    position = across / wide[order]
    # every third strip is merged with its neighbour: fields are not all of one width
    strip = np.floor(position).astype(np.int32)
    strip -= ((strip % 3) == 1).astype(np.int32)
    hashed = mix(names[order], strip)
    own_length = long[order] * (0.5 + unit(hashed)) + np.float32(20)
    plot = np.floor((along + own_length * unit(mix(hashed, 5))) / own_length).astype(np.int32)
    edge = np.abs(position - np.round(position)) * wide[order]
    return mix(hashed, plot), edge.astype(np.float32), across.astype(np.float32)
