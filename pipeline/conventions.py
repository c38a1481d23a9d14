"""What makes a store readable by others: in come grids, out come CF and GeoZarr attributes, all named here once.

GeoZarr today is three Zarr conventions declared on a group: ``multiscales`` (which groups are levels of one picture),
``proj:`` (the CRS) and ``spatial:`` (where the pixels lie). Readers match them by uuid or by name, and names differ
between tools; these are the names of version 1, which rioxarray matches literally. ``faults`` holds what the three
require, as our own assertions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pyproj import CRS

from pipeline.grid import Grid

MULTISCALES: Final = {
    "uuid": "d35379db-88df-4056-af3a-620245f8e347",
    "name": "multiscales",
    "description": "Levels of one picture at several resolutions",
}
PROJ: Final = {
    "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
    "name": "proj:",
    "description": "Coordinate reference system of the data",
}
SPATIAL: Final = {
    "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
    "name": "spatial:",
    "description": "Placement of the pixels in that system",
}
RESAMPLING: Final = "average"
"""Of reflectance and its uncertainty; layers that name another say so themselves (``resampling_method``)."""


def _shared(grid: Grid) -> dict[str, Any]:
    code = CRS.from_user_input(grid.crs).to_epsg()
    proj = {"proj:code": f"EPSG:{code}"} if code else {"proj:wkt2": CRS.from_user_input(grid.crs).to_wkt()}
    return {
        **proj,
        "spatial:dimensions": ["y", "x"],
        "spatial:bbox": list(grid.bounds),
        "spatial:registration": "pixel",
    }


def _place(grid: Grid) -> dict[str, Any]:
    return {"spatial:transform": list(grid.transform)[:6], "spatial:shape": list(grid.shape)}


def level_attributes(grid: Grid) -> dict[str, Any]:
    """Attributes of one level's group: ``proj:`` and ``spatial:`` for its grid (plain JSON values)."""
    return {"zarr_conventions": [PROJ, SPATIAL], **_shared(grid), **_place(grid)}


def root_attributes(levels: Sequence[Grid]) -> dict[str, Any]:
    """Attributes of the root: ``multiscales`` over the levels' groups ``0``, ``1``, ... (plain JSON values).

    Place and shape stand on each entry of the layout and, as ``spatial:`` demands beside ``multiscales``, not on the
    root itself.
    """
    layout: list[dict[str, Any]] = []
    for number, grid in enumerate(levels):
        step = 2.0 if number else 1.0
        relation = {"derived_from": str(number - 1), "resampling_method": RESAMPLING} if number else {}
        # Relative to the level above, in index coordinates of pixel corners: index 1 here is index 2 there.
        transform = {"scale": [step, step], "translation": [0.0, 0.0]}
        layout.append({"asset": str(number), **relation, "transform": transform, **_place(grid)})
    return {
        "zarr_conventions": [MULTISCALES, PROJ, SPATIAL],
        "multiscales": {"layout": layout, "resampling_method": RESAMPLING},
        **_shared(levels[0]),
    }


def spatial_ref(grid: Grid) -> dict[str, Any]:
    """Attributes of the CF ``grid_mapping`` variable, with GDAL's ``GeoTransform``."""
    crs = CRS.from_user_input(grid.crs)
    t = grid.transform
    transform = " ".join(repr(float(v)) for v in (t.c, t.a, t.b, t.f, t.d, t.e))
    return {**crs.to_cf(), "spatial_ref": crs.to_wkt(), "GeoTransform": transform}


def faults(attrs: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a store's attributes lack of the three conventions; empty where all is well.

    Args:
        attrs: attributes of the root.
        groups: attributes of its child groups by name.
    """
    out = [f"root: {fault}" for fault in _faults(attrs, (MULTISCALES, PROJ, SPATIAL))]
    beside = sorted({"spatial:transform", "spatial:shape"} & set(attrs))
    out += [f"root: {name} must not stand beside multiscales" for name in beside]
    layout = attrs.get("multiscales", {}).get("layout", [])
    if not layout:
        out.append("root: multiscales.layout is empty")
    names = [entry.get("asset") for entry in layout]
    for entry in layout:
        name = entry.get("asset")
        if name not in groups:
            out.append(f"layout: asset {name!r} is no group")
            continue
        if "derived_from" in entry and (entry["derived_from"] not in names or "transform" not in entry):
            out.append(f"layout {name}: derived_from needs a level of the layout and a transform")
        out += [f"group {name}: {fault}" for fault in _faults(groups[name], (PROJ, SPATIAL))]
        for field in ("spatial:transform", "spatial:shape"):
            if entry.get(field) is None or entry[field] != groups[name].get(field):
                out.append(f"layout {name}: {field} is absent or differs from the group's")
    return out


def _faults(attrs: Mapping[str, Any], needed: Sequence[Mapping[str, str]]) -> list[str]:
    """Faults of the conventions on one node."""
    out = []
    declared = {entry.get("uuid") for entry in attrs.get("zarr_conventions", [])}
    out += [f"{one['name']} is not declared" for one in needed if one["uuid"] not in declared]
    if sum(name in attrs for name in ("proj:code", "proj:wkt2", "proj:projjson")) != 1:
        out.append("exactly one of proj:code, proj:wkt2, proj:projjson is needed")
    if len(attrs.get("spatial:dimensions", ())) != 2:
        out.append("spatial:dimensions must name y and x")
    west, south, east, north = attrs.get("spatial:bbox", (0, 0, 0, 0))
    if not (west < east and south < north):
        out.append("spatial:bbox is empty")
    return out
