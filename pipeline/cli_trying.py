"""The commands to try it out: thin. In comes a folder or a catalog, out come simulated scenes, a demo, a check-up."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import AsJson, Debug, day_of, kind, print_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("cloudgate-demo"),
    seed: Annotated[int, typer.Option(help="Another seed, another sky.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Simulate a region, serve it like a catalog, run the main job on it, and score every method. Needs no network.

    Example: [bold]cloudgate demo --out demo[/bold]
    """
    with kind(debug):
        from pipeline.demo import run_demo
        from pipeline.progress import period_line, show_demo, terminal

        with terminal(quiet=as_json) as progress:
            result = run_demo(out, seed=seed, progress=progress)
        if as_json:
            print_json(
                {"scores": [s.__dict__ for s in result.scores], "seconds": result.seconds, **result.summary.__dict__}
            )
            return
        for period in result.summary.periods:
            print(period_line(period))
        show_demo(result)


def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("cloudgate-scenes"),
    size_px: Annotated[int, typer.Option(help="Side in 10 m pixels, even.")] = 1024,
    dates: Annotated[int, typer.Option(help="Number of passes.")] = 12,
    start: Annotated[str, typer.Option(help="Day of the first pass.")] = "2021-06-11",
    days: Annotated[int, typer.Option(help="Days from the first pass to the last, both counted.")] = 60,
    bands: Annotated[str, typer.Option(help="Names with commas; SCL is always written.")] = "blue,green,red,nir",
    tile: Annotated[str, typer.Option(help="MGRS tile whose north-western corner is simulated.")] = "33TWL",
    cloudiness: Annotated[float, typer.Option(min=0, max=1, help="Mean share of cloud.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another ground and sky.")] = 0,
    block_px: Annotated[int, typer.Option(help="Block of the COGs at 10 m.")] = 1024,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Simulate scenes of one tile: COGs with STAC items, their truth, and a job that runs on them. Needs no network.

    Example: [bold]cloudgate simulate --out scenes --size-px 512 --dates 8[/bold]
    """
    with kind(debug):
        import yaml

        from pipeline.bands import check_bands
        from pipeline.scenes import job_fields, write_tile

        made = write_tile(
            out,
            size_px=size_px,
            dates=dates,
            start=day_of("start", start),
            days=days,
            bands=check_bands([name.strip() for name in bands.split(",") if name.strip()]),
            tile=tile,
            cloudiness=cloudiness,
            seed=seed,
            block_px=block_px,
        )
        job = out / "job.yaml"
        fields = job_fields(made, out) | {"name": f"simulated-{made.tiles[0]}"}
        job.write_text(yaml.safe_dump(fields, sort_keys=False))
        if as_json:
            print_json(made.__dict__ | {"job": job})
            return
        size = sum(path.stat().st_size for path in out.rglob("*.tif"))
        print(f"{made.items}: {made.n_items} scenes of {size_px} x {size_px} px, {made.start} to {made.end}")
        print(f"{made.truth}: the truth of {made.target}; {size / 1e6:.1f} MB in all")
        print(f"run the job on them with: cloudgate mosaic {job}")


def doctor(
    catalog: Annotated[str | None, typer.Option(help="Also ask this catalog (profile or URL).")] = None,
    job: Annotated[
        Path | None, typer.Option(help="Also check what this job or schedule needs: catalog, keys, store, cluster.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check this installation: libraries, GDAL, memory, cores, a test read and write; and say what to do.

    Example: [bold]cloudgate doctor --catalog earth-search --job job.yaml[/bold]
    """
    with kind(debug):
        from pipeline.doctor import check
        from pipeline.progress import show_checks

        checks = check(catalog=catalog, job=job)
        if as_json:
            print_json([c.__dict__ for c in checks])
        else:
            show_checks(checks)
        if not all(c.ok for c in checks):
            raise typer.Exit(1)
