"""Items made by hand in the shape each catalog gives its own, with invented values."""

import copy
from typing import Any

TILE_BOUNDS = (14.9997, 45.9291, 16.4319, 46.9235)


def polygon(west: float, south: float, east: float, north: float) -> dict[str, Any]:
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


def _feature(name: str, collection: str, version: str, properties: dict[str, Any], assets: dict[str, Any]) -> dict:
    return {
        "type": "Feature",
        "stac_version": version,
        "stac_extensions": [],
        "id": name,
        "collection": collection,
        "bbox": list(TILE_BOUNDS),
        "geometry": polygon(*TILE_BOUNDS),
        "properties": properties,
        "links": [],
        "assets": assets,
    }


def changed(item: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A deep copy with changed members; other keywords go to the properties (``a__b`` is ``a:b``)."""
    out = copy.deepcopy(item)
    for key, value in changes.items():
        if key in ("id", "geometry", "bbox", "collection", "assets"):
            out[key] = value
        else:
            out["properties"][key.replace("__", ":")] = value
    return out


def moved(item: dict[str, Any], west: float, south: float, east: float, north: float) -> dict[str, Any]:
    return changed(item, geometry=polygon(west, south, east, north), bbox=[west, south, east, north])


def _grid(resolution: int, left: int = 499980, top: int = 5200020) -> dict[str, Any]:
    side = 109800 // resolution
    return {"proj:shape": [side, side], "proj:transform": [resolution, 0, left, 0, -resolution, top]}


def earth_search() -> dict[str, Any]:
    """Earth Search v1, STAC 1.0: the flag says "applied", ``raster:bands`` says -0.1 all the same."""
    root = (
        "https://sentinel-cogs.s3.us-west-2.amazonaws.com/sentinel-s2-l2a-cogs/33/T/WM/2023/8/S2A_33TWM_20230815_0_L2A"
    )
    jp2 = "s3://sentinel-s2-l2a/tiles/33/T/WM/2023/8/15/0"
    assets: dict[str, Any] = {}
    for name, esa, metres in (
        ("blue", "B02", 10),
        ("green", "B03", 10),
        ("red", "B04", 10),
        ("nir", "B08", 10),
        ("swir16", "B11", 20),
    ):
        described = {
            "eo:bands": [{"name": name, "common_name": name}],
            "gsd": metres,
            **_grid(metres),
            "raster:bands": [
                {
                    "nodata": 0,
                    "data_type": "uint16",
                    "bits_per_sample": 15,
                    "spatial_resolution": metres,
                    "scale": 0.0001,
                    "offset": -0.1,
                }
            ],
            "roles": ["data", "reflectance"],
        }
        cog = "image/tiff; application=geotiff; profile=cloud-optimized"
        assets[name] = {"href": f"{root}/{esa}.tif", "type": cog, **described}
        assets[f"{name}-jp2"] = {"href": f"{jp2}/{esa}.jp2", "type": "image/jp2", **described}
    assets["scl"] = {
        "href": f"{root}/SCL.tif",
        **_grid(20),
        "raster:bands": [{"nodata": 0, "data_type": "uint8", "spatial_resolution": 20}],
    }
    assets["thumbnail"] = {"href": f"{root}/thumbnail.jpg", "type": "image/jpeg"}
    properties = {
        "datetime": "2023-08-15T09:57:57.401000Z",
        "created": "2023-08-15T21:18:57.067Z",
        "updated": "2023-08-15T21:18:57.067Z",
        "platform": "sentinel-2a",
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "eo:cloud_cover": 12.5,
        "proj:epsg": 32633,
        "mgrs:utm_zone": 33,
        "mgrs:latitude_band": "T",
        "mgrs:grid_square": "WM",
        "grid:code": "MGRS-33TWM",
        "s2:processing_baseline": "05.09",
        "s2:product_uri": "S2A_MSIL2A_20230815T095031_N0509_R079_T33TWM_20230815T155057.SAFE",
        "s2:generation_time": "2023-08-15T15:50:57.000000Z",
        "s2:datatake_id": "GS2A_20230815T095031_042547_N05.09",
        "earthsearch:boa_offset_applied": True,
    }
    return _feature("S2A_33TWM_20230815_0_L2A", "sentinel-2-l2a", "1.0.0", properties, assets)


def planetary_computer() -> dict[str, Any]:
    """Planetary Computer, STAC 1.0: nothing about offsets but the baseline; hrefs signed here."""
    name = "S2A_MSIL2A_20230815T095031_R079_T33TWM_20230815T193058"
    root = f"https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/33/T/WM/2023/08/15/{name}.SAFE"
    signed = "?st=2023-08-15T00%3A00%3A00Z&se=2023-08-16T00%3A00%3A00Z&sp=rl&sig=c2VjcmV0c2VjcmV0%3D"
    assets: dict[str, Any] = {
        esa: {
            "href": f"{root}/T33TWM_20230815T095031_{esa}_{metres}m.tif{signed}",
            "proj:bbox": [499980.0, 5090220.0, 609780.0, 5200020.0],
            **_grid(metres),
            "gsd": metres,
            "roles": ["data"],
        }
        for esa, metres in (("B02", 10), ("B03", 10), ("B04", 10), ("B08", 10), ("B8A", 20), ("SCL", 20))
    }
    assets["product-metadata"] = {"href": f"{root}/MTD_MSIL2A.xml"}
    properties = {
        "datetime": "2023-08-15T09:50:31.024000Z",
        "platform": "Sentinel-2A",
        "proj:epsg": 32633,
        "instruments": ["msi"],
        "s2:mgrs_tile": "33TWM",
        "constellation": "Sentinel 2",
        "s2:granule_id": "S2A_OPER_MSI_L2A_TL_MSFT_20230815T193059_A042547_T33TWM_N05.09",
        "eo:cloud_cover": 12.5,
        "s2:datatake_id": "GS2A_20230815T095031_042547_N05.09",
        "s2:product_uri": f"{name[:26]}_N0509{name[26:]}.SAFE",
        "sat:relative_orbit": 79,
        "s2:generation_time": "2023-08-15T19:30:58.000Z",
        "s2:processing_baseline": "05.09",
    }
    return _feature(name, "sentinel-2-l2a", "1.0.0", properties, assets)


def cdse() -> dict[str, Any]:
    """CDSE, STAC 1.1: asset-level ``proj:code``, ``raster:scale``; S3 first, https alternates."""
    name = "S2B_MSIL2A_20240812T095029_N0511_R079_T33TWM_20240812T120612"
    root = f"s3://eodata/Sentinel-2/MSI/L2A/2024/08/12/{name}.SAFE/GRANULE/L2A_T33TWM_A038811_20240812T095540/IMG_DATA"

    def asset(key: str, **more: Any) -> dict[str, Any]:
        metres = int(key[-3:-1])
        return {
            "href": f"{root}/R{metres}m/T33TWM_20240812T095029_{key}.jp2",
            "type": "image/jp2",
            "gsd": metres,
            "proj:code": "EPSG:32633",
            **_grid(metres),
            "nodata": 0,
            "data_type": "uint16",
            "storage:refs": ["cdse-s3", "creodias-s3"],
            "auth:refs": ["s3"],
            "alternate": {
                "https": {
                    "href": f"https://download.dataspace.copernicus.eu/odata/v1/Products(1)/Nodes({key}.jp2)/$value",
                    "auth:refs": ["oidc"],
                    "storage:refs": [],
                }
            },
            **more,
        }

    bands = ("B02_10m", "B02_20m", "B03_10m", "B04_10m", "B08_10m", "B8A_20m", "B05_20m")
    assets = {
        key: asset(key, bands=[{"name": key[:3]}], **{"raster:scale": 0.0001, "raster:offset": -0.1}) for key in bands
    }
    assets["SCL_20m"] = asset("SCL_20m", data_type="uint8")
    properties = {
        "datetime": "2024-08-12T09:50:29.024000Z",
        "created": "2024-08-12T13:30:00.000000Z",
        "platform": "sentinel-2b",
        "grid:code": "MGRS-33TWM",
        "eo:cloud_cover": 3.1,
        "eopf:datatake_id": "GS2B_20240812T095029_038811_N05.11",
        "processing:version": "05.11",
        "sat:relative_orbit": 79,
        "sat:absolute_orbit": 38811,
        "storage:schemes": {
            "cdse-s3": {"platform": "https://eodata.dataspace.copernicus.eu", "requester_pays": False},
            "creodias-s3": {"platform": "https://eodata.cloudferro.com", "requester_pays": False},
        },
    }
    return _feature(name, "sentinel-2-l2a", "1.1.0", properties, assets)


def hls() -> dict[str, Any]:
    """HLS from CMR: no projection field at all, ``datetime`` null, the tile only in the id."""
    name = "HLS.S30.T33TWM.2023227T095031.v2.0"
    root = f"https://data.lpdaac.earthdatacloud.nasa.gov/lp-prod-protected/HLSS30.020/{name}"
    assets = {
        key: {"href": f"{root}/{name}.{key}.tif", "type": "image/tiff; application=geotiff"}
        for key in ("B02", "B03", "B04", "B08", "B8A", "Fmask")
    }
    properties = {
        "datetime": None,
        "start_datetime": "2023-08-15T09:57:57.401Z",
        "end_datetime": "2023-08-15T09:57:57.401Z",
        "eo:cloud_cover": 12,
    }
    return _feature(name, "HLSS30_2.0", "1.0.0", properties, assets)


def dea() -> dict[str, Any]:
    """Digital Earth Australia: item-level projection (20 m bands override it), 9 elements, s3 hrefs."""
    root = "s3://dea-public-data/baseline/ga_s2am_ard_3/56/JLQ/2023/08/15/20230815T011342"
    fine = [10.0, 0.0, 300000.0, 0.0, -10.0, 7000020.0, 0.0, 0.0, 1.0]
    coarse = [20.0, 0.0, 300000.0, 0.0, -20.0, 7000020.0, 0.0, 0.0, 1.0]
    at_20m = {"proj:shape": [5490, 5490], "proj:transform": coarse}
    assets: dict[str, Any] = {
        key: {"href": f"{root}/ga_s2am_{key}_3-2-1_56JLQ_2023-08-15_final.tif", "roles": ["data"]}
        for key in ("nbart_blue", "nbart_green", "nbart_red", "nbart_nir_1")
    }
    for key in ("nbart_nir_2", "oa_fmask"):
        assets[key] = {"href": f"{root}/ga_s2am_{key}.tif", **at_20m}
    properties = {
        "datetime": "2023-08-15T00:02:01.123456Z",
        "created": "2023-08-16T03:00:00Z",
        "platform": "sentinel-2a",
        "odc:region_code": "56JLQ",
        "eo:cloud_cover": 1.5,
        "proj:epsg": 32756,
        "proj:shape": [10980, 10980],
        "proj:transform": fine,
        "sentinel:datatake_start_datetime": "2023-08-15T01:13:42Z",
    }
    item = _feature("0a5d6a2e-1111-5222-8333-444455556666", "ga_s2am_ard_3", "1.0.0", properties, assets)
    return moved(item, 150.99, -28.02, 152.11, -27.02)


def deafrica() -> dict[str, Any]:
    """Digital Earth Africa: ESA's band names, projection at item level, s3 hrefs."""
    root = "s3://deafrica-sentinel-2/sentinel-s2-l2a-cogs/36/M/ZC/2023/8/S2A_36MZC_20230815_0_L2A"
    assets: dict[str, Any] = {
        key: {"href": f"{root}/{key}.tif", "roles": ["data"]} for key in ("B02", "B03", "B04", "B08")
    }
    assets["SCL"] = {
        "href": f"{root}/SCL.tif",
        "proj:shape": [5490, 5490],
        "proj:transform": [20.0, 0.0, 799980.0, 0.0, -20.0, 9900040.0],
    }
    properties = {
        "datetime": "2023-08-15T07:56:01Z",
        "platform": "sentinel-2a",
        "odc:region_code": "36MZC",
        "eo:cloud_cover": 60.0,
        "proj:epsg": 32736,
        "proj:shape": [10980, 10980],
        "proj:transform": [10.0, 0.0, 799980.0, 0.0, -10.0, 9900040.0, 0.0, 0.0, 1.0],
    }
    item = _feature("7b1c2d3e-aaaa-5bbb-8ccc-ddddeeeeffff", "s2_l2a", "1.0.0", properties, assets)
    return moved(item, 35.69, -1.9, 36.68, -0.9)
