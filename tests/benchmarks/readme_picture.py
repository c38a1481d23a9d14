"""The README's picture, made of a demo: its preview, small enough to commit.

uv run cloudgate demo --out demo
uv run python tests/benchmarks/readme_picture.py demo notebooks/demo.png
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from pipeline.preview import preview


def main(demo: str, out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        picture = Image.open(preview(store=Path(demo) / "mosaic.zarr", out=Path(folder) / "preview.png")).convert("RGB")
    width = 1100
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    # maximum coverage keeps the colours of small areas, which legends need: the median cut made yellow orange
    colours = picture.quantize(192, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    colours.save(out, optimize=True)
    print(f"{out}: {Path(out).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
