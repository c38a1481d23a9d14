"""In: a folder of STAC items with one COG a band. Out: the series as arrays, read at once (a test reads it often; a job
reads the same pixels through its cube, ``pipeline.places``). The cases made from it are those of ``pipeline.cases``.
"""

import json
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from pipeline.cases import CLOUD, SHADOW, VOID, Series

OFFSET_CODE = 1000  # the inner coding: code = reflectance * 10000 + 1000
SCL_SHADOW, SCL_CLOUD = (3,), (8, 9, 10)  # cloud medium, cloud high, thin cirrus


def read_series(folder: Path, bands: tuple[str, ...] = ("blue", "green", "red", "nir")) -> Series:
    """Read a set such as ``flanders_31uds``: bands, ``clm`` and ``scl`` of all its Sentinel-2 items, by date."""
    items = sorted((folder / "s2").glob("*/*.json"), key=_datetime)
    if not items:
        raise FileNotFoundError(f"no items under {folder / 's2'}: point CLOUDGATE_DATA at the folder of the sets")
    with rasterio.open(items[0].parent / f"{bands[0]}.tif") as first:
        shape, resolution_m, left, top = first.shape, first.res[0], first.transform.c, first.transform.f
    codes, clm, scl, days = [], [], [], []
    for item in items:
        dn = np.stack([_read(item.parent / f"{band}.tif", shape) for band in bands]).astype(np.int32)
        codes.append(np.where((dn > 0).all(axis=0), np.clip(dn + OFFSET_CODE, 1, 65534), 0).astype(np.uint16))
        clm.append(_read(item.parent / "clm.tif", shape))
        scl.append(_read(item.parent / "scl.tif", shape))
        days.append(np.datetime64(_datetime(item)[:10], "D").astype(np.int32))
    looks = np.stack(codes)
    void = np.where((looks == 0).any(axis=1), VOID, 0)
    plain = _bits(np.stack(scl), SCL_CLOUD, SCL_SHADOW) | void
    return Series(
        name=folder.name,
        codes=looks,
        bits=(_bits(np.stack(clm), (1, 2), (3,)) | void).astype(np.uint8),
        days=np.array(days, np.int32),
        bands=bands,
        resolution_m=resolution_m,
        row0=-round(top / resolution_m),
        col0=round(left / resolution_m),
        core=(slice(0, shape[0]), slice(0, shape[1])),
        truth=None,
        other={"scl": plain.astype(np.uint8)},
    )


def _bits(classes: NDArray, cloud: tuple[int, ...], shadow: tuple[int, ...]) -> NDArray:
    return np.isin(classes, cloud) * CLOUD | np.isin(classes, shadow) * SHADOW


def _datetime(item: Path) -> str:
    return str(json.loads(item.read_text())["properties"]["datetime"])


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.generic]:
    """One asset on the 10 m grid; coarser ones by nearest neighbour, since classes cannot be averaged."""
    with rasterio.open(path) as asset:
        return asset.read(1, out_shape=shape, resampling=rasterio.enums.Resampling.nearest)
