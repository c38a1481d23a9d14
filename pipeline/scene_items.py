"""STAC items in the exact shape of Earth Search v1: in come the facts of a scene, out comes the item.

The shape (property names, asset keys and their ``-jp2`` twins, contradictory ``raster:bands`` offsets) was
taken from real ``sentinel-2-l2a`` items of 2023. Assets that a simulated scene does not have keep their
entry, as in real items, with an href on the reserved top level domain ``.invalid``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import Transformer
from shapely.geometry import Polygon, box, mapping

NOWHERE: Final = "cloudgate-simulated.invalid"

EXTENSIONS: Final = tuple(
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in (
        "raster/v1.1.0", "mgrs/v1.0.0", "grid/v1.0.0", "projection/v1.1.0", "eo/v1.1.0", "view/v1.0.0",
        "processing/v1.1.0",
    )
)  # fmt: skip

# asset: (file, title, resolution in m, common name, description, wavelength and width in um)
_BANDS: Final[dict[str, tuple[str, str, int, str, str, float, float]]] = {
    "blue": ("B02", "Blue (band 2) - 10m", 10, "blue", "Blue (band 2)", 0.49, 0.098),
    "coastal": (
        "B01",
        "Coastal aerosol (band 1) - 60m",
        60,
        "coastal",
        "Coastal aerosol (band 1)",
        0.443,
        0.027,
    ),
    "green": ("B03", "Green (band 3) - 10m", 10, "green", "Green (band 3)", 0.56, 0.045),
    "nir": ("B08", "NIR 1 (band 8) - 10m", 10, "nir", "NIR 1 (band 8)", 0.842, 0.145),
    "nir08": ("B8A", "NIR 2 (band 8A) - 20m", 20, "nir08", "NIR 2 (band 8A)", 0.865, 0.033),
    "nir09": ("B09", "NIR 3 (band 9) - 60m", 60, "nir09", "NIR 3 (band 9)", 0.945, 0.026),
    "red": ("B04", "Red (band 4) - 10m", 10, "red", "Red (band 4)", 0.665, 0.038),
    "rededge1": ("B05", "Red edge 1 (band 5) - 20m", 20, "rededge", "Red edge 1 (band 5)", 0.704, 0.019),
    "rededge2": ("B06", "Red edge 2 (band 6) - 20m", 20, "rededge", "Red edge 2 (band 6)", 0.74, 0.018),
    "rededge3": ("B07", "Red edge 3 (band 7) - 20m", 20, "rededge", "Red edge 3 (band 7)", 0.783, 0.028),
    "swir16": ("B11", "SWIR 1 (band 11) - 20m", 20, "swir16", "SWIR 1 (band 11)", 1.61, 0.143),
    "swir22": ("B12", "SWIR 2 (band 12) - 20m", 20, "swir22", "SWIR 2 (band 12)", 2.19, 0.242),
}
FILES: Final[dict[str, str]] = {name: f"{row[0]}.tif" for name, row in _BANDS.items()} | {"scl": "SCL.tif"}
"""File name of every raster asset a simulated scene may have."""

_ORDER: Final = (
    "aot", "blue", "coastal", "granule_metadata", "green", "nir", "nir08", "nir09", "red", "rededge1",
    "rededge2", "rededge3", "scl", "swir16", "swir22", "thumbnail", "tileinfo_metadata", "visual", "wvp",
)  # fmt: skip

SCL_SHARES: Final[dict[str, int]] = {
    "s2:saturated_defective_pixel_percentage": 1,
    "s2:dark_features_percentage": 2,
    "s2:cloud_shadow_percentage": 3,
    "s2:vegetation_percentage": 4,
    "s2:not_vegetated_percentage": 5,
    "s2:water_percentage": 6,
    "s2:unclassified_percentage": 7,
    "s2:medium_proba_clouds_percentage": 8,
    "s2:high_proba_clouds_percentage": 9,
    "s2:thin_cirrus_percentage": 10,
    "s2:snow_ice_percentage": 11,
}


@dataclass(frozen=True)
class SceneFacts:
    """One product: a tile of one pass in one processing.

    Attributes:
        tile: MGRS tile such as ``33TWL``.
        epsg: UTM zone as an EPSG code.
        west_m, north_m: the raster's upper left corner.
        shape: (height, width) at 10 m.
        sensed: time over the tile; ``datatake``: start of the datatake, both UTC.
        platform: ``S2A`` or ``S2B``.
        relative_orbit, absolute_orbit: numbers of the pass.
        baseline: processing baseline such as ``03.01``.
        sequence: number of the processing in the id: 0, 1 for a reprocessed product, ...
        processed: when it was processed, UTC.
        boa_offset_applied: what the item claims about its pixels.
        offset: ``raster:bands.offset`` of its bands, reflectance.
        sun_azimuth_deg, sun_elevation_deg: direction of the sun.
        footprint: polygon of the valid data, UTM.
    """

    tile: str
    epsg: int
    west_m: float
    north_m: float
    shape: tuple[int, int]
    sensed: datetime
    datatake: datetime
    platform: str
    relative_orbit: int
    absolute_orbit: int
    baseline: str
    sequence: int
    processed: datetime
    boa_offset_applied: bool
    offset: float
    sun_azimuth_deg: float
    sun_elevation_deg: float
    footprint: Polygon

    @property
    def id(self) -> str:
        """Earth Search's id, such as ``S2A_33TWL_20210716_0_L2A``."""
        return f"{self.platform}_{self.tile}_{self.sensed:%Y%m%d}_{self.sequence}_L2A"

    @property
    def prefix(self) -> str:
        """Earth Search's folder of the scene, without a trailing slash."""
        zone, band, square = self.tile[:2], self.tile[2], self.tile[3:]
        return f"sentinel-s2-l2a-cogs/{int(zone)}/{band}/{square}/{self.sensed:%Y}/{self.sensed.month}/{self.id}"


def footprint(
    *, west_m: float, north_m: float, shape: tuple[int, int], edge_west_m: float | None, lean: float
) -> Polygon:
    """Ground of a tile inside the swath, UTM metres; ``edge_west_m`` is the swath's edge at ``north_m``."""
    height, width = shape
    full = box(west_m, north_m - 10 * height, west_m + 10 * width, north_m)
    if edge_west_m is None:
        return full
    far, south = west_m + 10 * width + 1e5, north_m - 10 * height
    bottom = edge_west_m - lean * (north_m - south)
    inside = full.intersection(Polygon([(edge_west_m, north_m), (far, north_m), (far, south), (bottom, south)]))
    return inside if isinstance(inside, Polygon) else full


def item(facts: SceneFacts, *, scl: NDArray[np.uint8], hrefs: Mapping[str, str]) -> dict[str, Any]:
    """The STAC item.

    Args:
        facts: the product.
        scl: its scene classification, from which cloud cover and the other shares are counted.
        hrefs: of the raster assets that exist, by asset name (``blue``, ``scl``, ...).
    """
    to_degrees = Transformer.from_crs(facts.epsg, 4326, always_xy=True).transform
    ring = shapely.transform(facts.footprint.segmentize(2000.0), to_degrees, interleaved=False)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": facts.id,
        "properties": _properties(facts, scl),
        "geometry": mapping(ring),
        "links": _links(facts),
        "assets": _assets(facts, hrefs),
        "bbox": list(ring.bounds),
        "stac_extensions": list(EXTENSIONS),
        "collection": "sentinel-2-l2a",
    }


def _stamp(when: datetime, millis: bool = False) -> str:
    text = when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    return (text[:-3] if millis else text) + "Z"


def _properties(facts: SceneFacts, scl: NDArray[np.uint8]) -> dict[str, Any]:
    counts = np.bincount(scl.ravel(), minlength=12)
    valid = max(int(counts[1:].sum()), 1)
    shares = {name: round(100 * int(counts[k]) / valid, 6) for name, k in SCL_SHARES.items()}
    long_name = "sentinel-2a" if facts.platform == "S2A" else "sentinel-2b"
    ground = "2APS" if facts.platform == "S2A" else "2BPS"
    take, made, number = f"{facts.datatake:%Y%m%dT%H%M%S}", f"{facts.processed:%Y%m%dT%H%M%S}", facts.baseline
    strip = f"{facts.datatake + timedelta(seconds=359):%Y%m%dT%H%M%S}"
    orbit = f"{facts.absolute_orbit:06d}"
    distance = 1 - 0.01672 * math.cos(math.radians(0.9856 * (facts.sensed.timetuple().tm_yday - 4)))
    published = _stamp(facts.processed + timedelta(hours=5, minutes=28), millis=True)
    return {
        "created": published,
        "platform": long_name,
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "eo:cloud_cover": round(100 * int(counts[8:11].sum()) / valid, 6),
        "proj:epsg": facts.epsg,
        "mgrs:utm_zone": int(facts.tile[:2]),
        "mgrs:latitude_band": facts.tile[2],
        "mgrs:grid_square": facts.tile[3:],
        "grid:code": f"MGRS-{facts.tile}",
        "view:sun_azimuth": facts.sun_azimuth_deg,
        "view:sun_elevation": facts.sun_elevation_deg,
        "s2:degraded_msi_data_percentage": 0.0,
        "s2:nodata_pixel_percentage": round(100 * int(counts[0]) / scl.size, 6),
        **shares,
        "s2:product_type": "S2MSI2A",
        "s2:processing_baseline": number,
        "s2:product_uri": (
            f"{facts.platform}_MSIL2A_{take}_N{number.replace('.', '')}_R{facts.relative_orbit:03d}"
            f"_T{facts.tile}_{made}.SAFE"
        ),
        "s2:generation_time": _stamp(facts.processed),
        "s2:datatake_id": f"G{facts.platform}_{take}_{orbit}_N{number}",
        "s2:datatake_type": "INS-NOBS",
        "s2:datastrip_id": f"{facts.platform}_OPER_MSI_L2A_DS_{ground}_{made}_S{strip}_N{number}",
        "s2:granule_id": (f"{facts.platform}_OPER_MSI_L2A_TL_{ground}_{made}_A{orbit}_T{facts.tile}_N{number}"),
        "s2:reflectance_conversion_factor": 1 / distance**2,
        "datetime": _stamp(facts.sensed),
        "s2:sequence": str(facts.sequence),
        "earthsearch:s3_path": f"s3://{NOWHERE}/{facts.prefix}",
        "earthsearch:payload_id": f"cloudgate-simulate/workflow-sentinel2-to-stac/{facts.id}",
        "earthsearch:boa_offset_applied": facts.boa_offset_applied,
        "processing:software": {"sentinel2-to-stac": "0.1.1"},
        "updated": published,
    }


def _links(facts: SceneFacts) -> list[dict[str, str]]:
    home = f"https://{NOWHERE}"
    return [
        {
            "rel": "canonical",
            "href": f"s3://{NOWHERE}/{facts.prefix}/{facts.id}.json",
            "type": "application/json",
        },
        {
            "rel": "license",
            "href": "https://sentinel.esa.int/documents/247904/690755/Sentinel_Data_Legal_Notice",
        },
        {
            "rel": "derived_from",
            "href": f"{home}/collections/sentinel-2-l1c/items/{facts.id.replace('L2A', 'L1C')}",
            "type": "application/geo+json",
        },
        {"rel": "thumbnail", "href": f"{home}/collections/sentinel-2-l2a/items/{facts.id}/thumbnail"},
    ]


def _assets(facts: SceneFacts, hrefs: Mapping[str, str]) -> dict[str, Any]:
    made = {name: _asset(facts, name) for name in _ORDER}
    assets: dict[str, Any] = {}
    for name, (file, body) in made.items():
        assets[name] = {"href": hrefs.get(name, f"https://{NOWHERE}/{facts.prefix}/{file}"), **body}
    when = f"{facts.sensed:%Y}/{facts.sensed.month}/{facts.sensed.day}/{facts.sequence}"
    place = f"{int(facts.tile[:2])}/{facts.tile[2]}/{facts.tile[3:]}"
    for name, (file, body) in made.items():
        if file.endswith(".tif"):
            href = f"s3://{NOWHERE}/tiles/{place}/{when}/{file.replace('.tif', '.jp2')}"
            assets[f"{name}-jp2"] = {"href": href, **body, "type": "image/jp2"}
    return assets


def _asset(facts: SceneFacts, name: str) -> tuple[str, dict[str, Any]]:
    """File name and body (without href) of one asset."""
    cog = {"type": "image/tiff; application=geotiff; profile=cloud-optimized"}
    data = {"roles": ["data", "reflectance"]}
    if name in _BANDS:
        file, title, metres = _BANDS[name][:3]
        pixels = {
            "nodata": 0, "data_type": "uint16", "bits_per_sample": 15, "spatial_resolution": metres,
            "scale": 0.0001, "offset": facts.offset,
        }  # fmt: skip
        body = {**cog, "title": title, "eo:bands": [_eo(name)], "gsd": metres, **_place(facts, metres)}
        return f"{file}.tif", {**body, "raster:bands": [pixels], **data}
    if name == "scl":
        pixels = {"nodata": 0, "data_type": "uint8", "spatial_resolution": 20}
        body = {
            **cog,
            "title": "Scene classification map (SCL)",
            **_place(facts, 20),
            "raster:bands": [pixels],
        }
        return "SCL.tif", {**body, **data}
    if name in ("aot", "wvp"):
        pixels = {"nodata": 0, "data_type": "uint16", "bits_per_sample": 15, "spatial_resolution": 20}
        pixels |= {"unit": "cm"} if name == "wvp" else {}
        pixels |= {"scale": 0.001, "offset": 0}
        title = "Aerosol optical thickness (AOT)" if name == "aot" else "Water vapour (WVP)"
        return f"{name.upper()}.tif", {
            **cog,
            "title": title,
            **_place(facts, 20),
            "raster:bands": [pixels],
            **data,
        }
    if name == "visual":
        colours = [_eo(colour) for colour in ("red", "green", "blue")]
        body = {
            **cog,
            "title": "True color image",
            "eo:bands": colours,
            **_place(facts, 10),
            "roles": ["visual"],
        }
        return "TCI.tif", body
    if name == "thumbnail":
        return "thumbnail.jpg", {"type": "image/jpeg", "title": "Thumbnail image", "roles": ["thumbnail"]}
    kind = "xml" if name == "granule_metadata" else "json"
    return f"{name}.{kind}", {"type": f"application/{kind}", "roles": ["metadata"]}


def _eo(name: str) -> dict[str, Any]:
    _, _, _, common, description, wavelength, width = _BANDS[name]
    return {
        "name": name, "common_name": common, "description": description, "center_wavelength": wavelength,
        "full_width_half_max": width,
    }  # fmt: skip


def _place(facts: SceneFacts, metres: int) -> dict[str, Any]:
    height, width = (-(-side * 10 // metres) for side in facts.shape)
    corner = [metres, 0, _short(facts.west_m), 0, -metres, _short(facts.north_m)]
    return {"proj:shape": [height, width], "proj:transform": corner}


def _short(metres: float) -> float | int:
    return int(metres) if float(metres).is_integer() else metres
