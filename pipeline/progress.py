"""What a person sees while it runs: in come steps and answers, out come a live bar on a terminal or plain lines."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from pipeline.items import day_text, solar_day

if TYPE_CHECKING:  # heavy, and only named here
    from pipeline.frozen import SearchResult
    from pipeline.planning import Plan


class Terminal:
    """Draws a bar with units, MB/s and the time left; where the output is no terminal, a line every ten percent."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=console, transient=False) if console.is_terminal else None
        self.task: TaskID | None = None
        self.what, self.total, self.done, self.megabytes, self.began, self.told = "", 0, 0, 0.0, 0.0, 0

    def say(self, text: str) -> None:
        """One line of news."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def begin(self, what: str, total: int) -> None:
        """A step of ``total`` units begins."""
        self.what, self.total, self.done, self.megabytes, self.told = what, total, 0, 0.0, 0
        self.began = time.perf_counter()
        if self.bar:
            self.task = self.bar.add_task(what, total=total, rate="")

    def step(self, units: int, *, megabytes: float = 0.0) -> None:
        """So many units are done, so many megabytes were read for them."""
        self.done += units
        self.megabytes += megabytes
        seconds = max(time.perf_counter() - self.began, 1e-3)
        rate = f"{self.megabytes / seconds:.0f} MB/s" if self.megabytes else ""
        if self.bar and self.task is not None:
            self.bar.update(self.task, advance=units, rate=rate)
        elif 10 * self.done // max(self.total, 1) > self.told:
            self.told = 10 * self.done // max(self.total, 1)
            left = seconds / self.done * (self.total - self.done)
            self.say(f"{self.what} {self.done}/{self.total} {rate} {left:.0f} s left".replace("  ", " "))

    def event(self, what: str, **facts: Any) -> None:
        """Shown by ``say`` and ``step`` already."""


@contextmanager
def terminal(*, quiet: bool = False) -> Iterator[Terminal]:
    """A progress display on standard error; ``quiet`` shows nothing."""
    # A notebook's cell says it is a terminal, and keeps every state of a bar as a line of its own.
    in_notebook = False if "JPY_PARENT_PID" in os.environ else None
    shown = Terminal(Console(file=sys.stderr, quiet=quiet, force_terminal=in_notebook))
    if shown.bar and not quiet:
        with shown.bar:
            yield shown
    else:
        yield shown


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def period_line(period: dict[str, Any]) -> str:
    """What a run says of one period when it is over, in one line."""
    if not period["published"]:
        return f"{period['start']} to {period['end']}: not published: {period['message']}"
    total = max(period["filled"] + period["unfilled"], 1)
    anchors = f", anchors {', '.join(period['anchors'])}" if period.get("anchors") else ""
    failed = f", {period['failed']} of {period['reads']} reads failed" if period["failed"] else ""
    return (
        f"{period['start']} to {period['end']}, shown {period['target']}: {period['scenes']} scenes, "
        f"{100 * period['filled'] / total:.2f} % filled ({period['unfilled']} px without a clear look), "
        f"{period['bytes_read'] / 1e6:.0f} MB read in {period['seconds']:.1f} s{failed}{anchors}"
    )


def show_items(found: "SearchResult") -> None:
    """Print the scenes of a search."""
    console = Console()
    table = _table(
        f"{len(found.items)} scenes from {found.source}", "solar day", "id", "tile", "orbit", "baseline", "cloud %"
    )
    for item in found.items:
        cloud = "" if item.cloud_cover is None else f"{item.cloud_cover:.0f}"
        day = day_text(solar_day(item.when, found.longitude))
        table.add_row(day, item.id, item.tile or "", str(item.orbit or ""), item.baseline or "", cloud)
    console.print(table)
    console.print(f"profile {found.profile.name}: {found.profile_why}; mask: {found.mask.asset} ({found.mask.kind})")
    for name, why in found.dropped:
        console.print(f"left out {name}: {why}", highlight=False)
    for note in found.notes:
        console.print(note, highlight=False)


def show_plan(plan: "Plan") -> None:
    """Print a plan."""
    console = Console()
    grid = plan.grid
    console.print(f"{plan.source} ({plan.profile})", highlight=False, soft_wrap=True)
    console.print(
        f"grid {grid.width} x {grid.height} px at {grid.resolution_m:g} m, {grid.crs[:40]}, "
        f"shards of {grid.shard_px} px"
    )
    for period in plan.periods:
        table = _table(f"{period['start']} to {period['end']}, shows {period['target']}", "what", "value")
        labels = {
            "acquisitions": "acquisitions",
            "scenes": "scenes",
            "shards": "shards",
            "tasks": "tasks",
            "sub_block_px": "sub-block (px)",
            "decoded_gb": "decoded (GB)",
            "peak_memory_gb": "peak memory per worker (GB)",
        }
        for key, label in labels.items():
            if key in period:
                table.add_row(label, str(period[key]))
        if plan.estimate and period["slot"] in plan.estimate["periods"]:
            table.add_row("its tasks take", _duration(plan.estimate["periods"][period["slot"]]))
        if "anchors" in period:
            table.add_row("anchors", ", ".join(period["anchors"]))
        console.print(table)
        if "layers" in period:
            layers = _table(
                "acquisitions as the scout saw them", "acquisition", "covers %", "clear %", "suspicious %", ""
            )
            for layer in period["layers"]:
                numbers = (f"{100 * layer[name]:.0f}" for name in ("valid_share", "clear_share", "suspicious_share"))
                layers.add_row(layer["id"], *numbers, "rejected as a whole" if layer["fails"] else "")
            console.print(layers)
            reasons: dict[str, int] = {}
            for offset in period["offsets"].values():
                reasons[f"{offset['dn']} DN: {offset['why']}"] = (
                    reasons.get(f"{offset['dn']} DN: {offset['why']}", 0) + 1
                )
            for reason, count in reasons.items():
                console.print(f"offset {reason} ({count} scenes)", highlight=False)
    for name, why in plan.dropped:
        console.print(f"left out {name}: {why}", highlight=False)
    console.print(_in_all(plan), highlight=False, soft_wrap=True)


def _in_all(plan: "Plan") -> str:
    """A plan in one line: periods x tasks x scenes, bytes, memory, time."""
    tasks, scenes, read = (sum(p.get(key, 0) for p in plan.periods) for key in ("tasks", "scenes", "decoded_gb"))
    peak = max((p.get("peak_memory_gb", 0) for p in plan.periods), default=0)
    said = f"in all: {len(plan.periods)} periods, {tasks} tasks, {scenes} scenes, {read:.2f} GB to decode"
    said += f", at most {peak:.2f} GB per worker"
    if plan.estimate is None:
        return said
    basis, seconds, workers = (plan.estimate[name] for name in ("basis", "seconds", "workers"))
    took = f"time {basis}" if seconds is None else f"{_duration(seconds)} on {workers} workers ({basis})"
    return f"{said}; {took}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def show_status(status: dict[str, Any]) -> None:
    """Print how far a store is."""
    console = Console()
    table = _table(status["store"], "period", "state", "shards", "filled %", "failed reads")
    for period in status["periods"]:
        filled = f"{period['filled_percent']:.2f}" if period.get("filled_percent") is not None else ""
        table.add_row(
            f"{period['start']} to {period['end']}",
            period["state"],
            f"{period['shards_done']}/{period['shards']}",
            filled,
            str(period["failed_reads"]),
        )
    console.print(table)


def show_standings(standings: Mapping[str, Sequence[Mapping[str, Any]]], *, everything: bool) -> None:
    """Print where periods of a schedule stand; without ``everything`` only those that need something."""
    console = Console()
    table = _table("", "area", "period", "state", "why")
    counts: dict[str, int] = {}
    for area, some in standings.items():
        for one in some:
            counts[one["state"]] = counts.get(one["state"], 0) + 1
            if everything or one["state"] not in ("done", "waiting"):
                at = f"; next at {one['at'][:16]}" if one["at"] else ""
                table.add_row(area, f"{one['start']} to {one['end']}", one["state"], f"{one['why']}{at}".lstrip("; "))
    if table.row_count:
        console.print(table)
    console.print(", ".join(f"{number} {state}" for state, number in sorted(counts.items())) or "no period yet")


def show_checks(checks: Sequence[Any]) -> None:
    """Print what the doctor found."""
    console = Console()
    for check in checks:
        mark = "[green]ok[/green]  " if check.ok else "[red]bad[/red] "
        console.print(
            f"{mark} {check.name}: {check.found}" + (f"  -> {check.advice}" if check.advice else ""), highlight=False
        )


def show_demo(result: Any) -> None:
    """Print what the demo made and the error of each method."""
    console = Console()
    table = _table(
        "error against the simulated truth of the target date (reflectance)",
        "method",
        "MAE in the gaps",
        "PSNR in the gaps (dB)",
        "MAE everywhere",
        "unfilled px",
    )
    for score in result.scores:
        table.add_row(
            score.method, f"{score.gap_mae:.4f}", f"{score.gap_psnr:.1f}", f"{score.all_mae:.4f}", str(score.unfilled)
        )
    console.print(table)
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    console.print(f"took: {times}")
    for name, what in (
        ("mosaic.zarr", "the mosaic: xarray.open_zarr(..., group='0')"),
        ("preview.png", "one picture that explains it"),
        ("job.yaml", "the job; works without the servers"),
        ("scenes", "COGs, STAC items, truth"),
    ):
        console.print(f"{result.folder / name}  {what}", highlight=False)


def show_report(name: str, reference: str, report: Any) -> None:
    """Print an evaluation: a table for each set, task and variant."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in report.summary:
        groups.setdefault((row["set"], row["task"], row["variant"]), []).append(row)
    for (place, task, variant), rows in groups.items():
        what = "completing a date (task A)" if task == "complete" else "predicting a date (task B)"
        shared = f"{rows[0]['cases']} cases on {rows[0]['dates']} dates"
        table = _table(
            f"{name}: {place}, {what}, {variant}; {shared}",
            *("method", "PSNR (dB)", "median", "MAE", "SAM", "SSIM", "skill", f"vs {reference} (dB)", "in 90 %"),
            "changed",
        )
        for row in rows:
            gain = f"{row['gain']:+.2f} [{row['gain_low']:+.2f}, {row['gain_high']:+.2f}]"
            gain = "0" if row["method"] == reference else gain if row["dates"] > 1 else f"{row['gain']:+.2f} (one date)"
            numbers = (("psnr", ".2f"), ("psnr_median", ".2f"), ("mae", ".4f"), ("sam", ".2f"), ("ssim", ".4f"))
            cells = [_cell(row[key], form) for key, form in (*numbers, ("skill", ".2f"))]
            covered = "" if row["covered"] != row["covered"] else f"{100 * row['covered']:.1f} %"
            table.add_row(row["method"], *cells, gain, covered, _cell(row["changed_psnr"], ".2f"))
        console.print(table)
    console.print(
        "vs: mean of paired differences with its 95 % interval (bootstrap over dates); in 90 %: share of truth inside "
        "the method's interval; changed: PSNR where the simulated ground changed in the gap",
        highlight=False,
    )
    console.print(f"{report.files[-1].parent}: {len(report.files)} files (cases.csv, summary.csv, plots, pictures)")


def _cell(value: float, form: str) -> str:
    return "" if value != value else format(value, form)  # NaN is no number to show
