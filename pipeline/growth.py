"""Growth of masks in metres: in come states on a raster's lattice, out come cloud and shadow, opened and grown.

Exactly local: with ``halo_m`` of margin the result does not depend on how blocks are cut.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.states import CLOUD, SHADOW, State

type Flags = NDArray[np.bool_]


def halo_m(open_m: float, cloud_grow_m: float, shadow_grow_m: float) -> float:
    """Metres beyond a pixel that its mask depends on: opening reaches twice its radius, growth once."""
    return 2 * open_m + max(cloud_grow_m, shadow_grow_m)


def grow(
    *, state: State, resolution_m: float, open_m: float, cloud_grow_m: float, shadow_grow_m: float
) -> tuple[Flags, Flags]:
    """Cloud and shadow, each opened and then grown by a disk, on the raster's own lattice.

    Opening keeps of a cloud whatever a disk of ``open_m`` fits into: objects narrower than that in any
    direction vanish, corners are rounded, and growth afterwards is from what is left. Cloud and shadow
    are opened apart, so a thin shadow beside a large cloud goes too unless growth of the cloud covers it.
    Beyond the array, and on no data, there is no cloud; give :func:`halo_m` of margin.

    Args:
        state: uint8 (T, h, w).
        resolution_m: Pixel size of ``state``. Radii are Euclidean, whole pixels within ``radius / resolution``.
        open_m: Radius of the opening; 0 for none.
        cloud_grow_m: Radius by which cloud grows; 0 for none.
        shadow_grow_m: Radius by which shadow grows; 0 for none.

    Returns:
        cloud and shadow, bool (T, h, w), True = affected; they may overlap.
    """
    cloud, shadow = np.empty(state.shape, np.uint8), np.empty(state.shape, np.uint8)
    for out, value, reach in ((cloud, CLOUD, cloud_grow_m), (shadow, SHADOW, shadow_grow_m)):
        np.equal(state, value, out=out.view(np.bool_))
        for layer in out:
            if layer.size and cv2.countNonZero(layer):
                layer[:] = _dilated(_opened(layer, open_m / resolution_m), reach / resolution_m)
    return cloud.view(np.bool_), shadow.view(np.bool_)


@lru_cache(maxsize=32)
def disk(radius_px: float) -> State:
    """Euclidean disk as a structuring element: 1 where the centre is at most ``radius_px`` away."""
    # 1e-9: 100 m at 20 m must be 5 px whatever the division's last bit says.
    reach = int(radius_px + 1e-9)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return (x * x + y * y <= (radius_px + 1e-9) ** 2).astype(np.uint8)


def _opened(layer: State, radius_px: float) -> State:
    element = disk(radius_px)
    if element.size == 1:
        return layer
    kept = cv2.erode(layer, element, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(cv2.dilate(kept, element, borderType=cv2.BORDER_CONSTANT, borderValue=0))


def _dilated(layer: State, radius_px: float) -> State:
    element = disk(radius_px)
    if element.size == 1:
        return layer
    return np.asarray(cv2.dilate(layer, element, borderType=cv2.BORDER_CONSTANT, borderValue=0))
