"""Each scene's BOA offset: in come coarse views of scenes, out come the additive offsets in DN, with reasons.

Metadata contradict each other, so the order is fixed: override of the job, policy of the profile, flag, explicit
offset, baseline with a look at the darkest clear ground. See ``pipeline.scout``, which decides once for the whole area.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ItemError
from pipeline.items import Item
from pipeline.profiles import Profile
from pipeline.states import CLEAR

MIN_PIXELS: Final = 40
"""Fewer clear, snow-free cells than this decide no offset."""
OFFSET_P1: Final = 900
"""With the +1000 inside, even dark ground has DN of about 1000: a first percentile from here on says it is inside."""
CLOUDED_SHARE: Final = 0.01
"""With less of its ground clear than this, a scene is not worth asking for its offset: all of it counts as cloud."""
SNOW_CLASS: Final = 11


@dataclass
class View:
    """One scene, coarse, on the cells it may reach.

    Attributes:
        item: the scene.
        classes: (h, w) raw values of the mask's raster.
        state: (h, w) uint8.
        dark: (h, w) DN of the darkest band.
        place: rows and columns of these arrays on the coarse grid.
    """

    item: Item
    classes: NDArray[Any]
    state: NDArray[np.uint8]
    dark: NDArray[Any]
    place: tuple[slice, slice]


def decide_offsets(
    views: Iterable[View], dark: str, profile: Profile, override_dn: int | None = None
) -> tuple[dict[str, tuple[int, str]], tuple[str, ...]]:
    """Decide each item's additive offset in DN: override, policy, flag, explicit offset, baseline with the pixel check.

    Returns:
        (item id -> offset and reason, ids of scenes that nothing decides and that show no ground worth asking for).

    Raises:
        ItemError: where nothing decides, not even the tile's other dates.
    """
    decided: dict[str, tuple[int, str]] = {}
    clouded: list[str] = []
    open_views: list[tuple[View, str]] = []
    by_pixels: dict[str | None, list[int]] = {}
    for view in views:
        answer = told(view.item, dark, profile, override_dn) or _by_pixels(view, dark)
        if isinstance(answer, str):
            open_views.append((view, answer))
            continue
        decided[view.item.id] = answer
        if "percentile" in answer[1]:
            by_pixels.setdefault(view.item.tile, []).append(answer[0])
    for view, why in open_views:
        votes = by_pixels.get(view.item.tile, [])
        if votes and len(set(votes)) == 1:
            decided[view.item.id] = (
                votes[0],
                f"as the {len(votes)} other dates of tile {view.item.tile}; {why}",
            )
        elif _clear_share(view, dark) < CLOUDED_SHARE:
            decided[view.item.id] = (0, why)
            clouded.append(view.item.id)
        else:
            raise ItemError(
                f"item {view.item.id}: whether its pixels hold the +1000 offset of baseline 04.00 cannot be decided "
                f"({why}, and the tile's other dates do not settle it); set offset_dn: 0 or offset_dn: -1000 in the job"
            )
    return decided, tuple(clouded)


def told(item: Item, dark: str, profile: Profile, override_dn: int | None) -> tuple[int, str] | None:
    """(offset, reason) where no pixel needs to be looked at, else None."""
    policy = profile.offset.policy
    baseline = float(item.baseline) if item.baseline else None
    before = f"baseline {item.baseline} is before 04.00"
    if override_dn is not None:
        if baseline is not None and baseline < 4:  # a span may reach beyond 2022-01-25, and no such scene has it
            return 0, before
        return override_dn, "override of the job"
    if policy == "none":
        return 0, f"{profile.name} carries no offset"
    if policy in ("flag", "metadata") and item.boa_offset_applied:
        return 0, f"flag {profile.offset.flag} is true"
    asset = item.assets[dark]
    if policy == "metadata" and asset.offset is not None:
        return round(asset.offset / asset.scale), "offset in the metadata"
    if baseline is not None and baseline < 4:
        return 0, before
    return None


def _clear_share(view: View, dark: str) -> float:
    """Of a scene's ground, 1 where there is none: the scout cannot tell what it may show."""
    ground = _ground(view, dark)
    return float(np.mean(view.state[ground] == CLEAR)) if ground.any() else 1.0


def _ground(view: View, dark: str) -> NDArray[np.bool_]:
    """Where a scene has data, snow included."""
    return np.asarray(view.dark != (view.item.assets[dark].nodata or 0))


def _by_pixels(view: View, dark: str) -> tuple[int, str] | str:
    """(offset, reason) from the darkest clear ground, or in words why it stays open."""
    item = view.item
    baseline = float(item.baseline) if item.baseline else None
    usable = (view.state == CLEAR) & _ground(view, dark) & (view.classes != SNOW_CLASS)
    if np.count_nonzero(usable) < MIN_PIXELS:
        return f"baseline {item.baseline or 'unknown'}, only {np.count_nonzero(usable)} clear snow-free cells"
    p1 = float(np.percentile(view.dark[usable], 1))
    if p1 < OFFSET_P1:
        return 0, f"first percentile of clear {dark} is {p1:.0f} DN, below {OFFSET_P1}"
    if baseline is None:
        return f"baseline unknown, first percentile of clear {dark} is {p1:.0f} DN"
    return -1000, f"baseline {item.baseline}, first percentile of clear {dark} is {p1:.0f} DN"
