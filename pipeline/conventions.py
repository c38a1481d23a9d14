"""What makes a store readable by others: in comes a ``Grid``, out come CF and GeoZarr attributes, all named here once.

GeoZarr today is a set of Zarr conventions, matched by uuid when read (names differ between tools).
"""

from typing import Any, Final

from pyproj import CRS

from pipeline.grid import Grid

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


def attributes(grid: Grid) -> dict[str, Any]:
    """Group attributes of the ``proj:`` and ``spatial:`` conventions for a grid (plain JSON values)."""
    code = CRS.from_user_input(grid.crs).to_epsg()
    proj = {"proj:code": f"EPSG:{code}"} if code else {"proj:wkt2": CRS.from_user_input(grid.crs).to_wkt()}
    return {
        "zarr_conventions": [PROJ, SPATIAL],
        **proj,
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(grid.transform)[:6],
        "spatial:bbox": list(grid.bounds),
        "spatial:shape": list(grid.shape),
        "spatial:registration": "pixel",
    }


def spatial_ref(grid: Grid) -> dict[str, Any]:
    """Attributes of the CF ``grid_mapping`` variable, with GDAL's ``GeoTransform``."""
    crs = CRS.from_user_input(grid.crs)
    t = grid.transform
    transform = " ".join(repr(float(v)) for v in (t.c, t.a, t.b, t.f, t.d, t.e))
    return {**crs.to_cf(), "spatial_ref": crs.to_wkt(), "GeoTransform": transform}
