"""Evaluation: in comes EVAL.yaml, out come tables, plots and pictures of methods on the same cases with known truth.

Each method answers through ``compose_block``, the function that jobs end in. Completing an acquisition (task A) and
predicting a date (task B) are never mixed in one row. Differences are paired case by case, with a bootstrap over dates.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from pipeline import cases, composite, figures, learned, metrics
from pipeline.anchors import AnchorMap
from pipeline.block import NO_SIGMA, Layers, check_method, compose_block
from pipeline.cases import Case, Series, Variant
from pipeline.config import Method
from pipeline.errors import NothingClearError
from pipeline.learnfile import Evaluation, Scored, label
from pipeline.places import places
from pipeline.report import Progress, Silent

BLOCK_PX: Final = 1024
RING_M: Final = 100.0
CHANGED: Final = 500
"""Codes (0.05 reflectance): where the ground of a simulated target lies further from the line between its neighbours in
time, something happened in the gap."""
GAP_DAYS: Final = (5, 15, 30)
LOOKS: Final = (1, 3, 6, 10)
NINETY: Final = 1.645
CASES: Final = "cases.csv"
SUMMARY: Final = "summary.csv"

Flags = NDArray[np.bool_]
Row = dict[str, Any]


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        rows: one for each case and method, as in ``cases.csv``.
        summary: one for each set, task, variant and method, as in ``summary.csv``.
        files: what was written.
    """

    rows: list[Row] = field(default_factory=list)
    summary: list[Row] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """One method's answer to a case, with errors by bin."""

    codes: NDArray[np.uint16]
    row: Row
    by_gap: NDArray[np.float64]
    by_looks: NDArray[np.float64]
    offsets: NDArray[np.int64]


def evaluate(asked: Evaluation, *, progress: Progress | None = None) -> Report:
    """Score methods and write the report into ``asked.out``.

    Args:
        asked: EVAL.yaml.
        progress: hears of each case.

    Raises:
        ConfigError, WeightsError: a method or source that cannot be used. NothingClearError: a set without a case.
        CatalogError, ReadError: as a job.
    """
    progress, report = progress or Silent(), Report()
    for method in asked.methods:
        check_method(method, asked.bands)
    asked.out.mkdir(parents=True, exist_ok=True)
    for one in asked.sets:
        for series_cases in _groups(asked, one):
            _score_group(asked, *series_cases, report, progress)
            # after each group: a later one without a case, or a kill, takes nothing away
            _write(asked.out / CASES, report.rows)
            _write(asked.out / SUMMARY, report.summary)
    report.files += [asked.out / CASES, asked.out / SUMMARY]
    return report


def _groups(asked: Evaluation, one: Scored) -> Iterator[tuple[str, str, str, list[tuple[Series, Case]]]]:
    """(set, task, variant, its cases over all places) of one set."""
    scl = any(variant.startswith("scl") for variant in one.variants)
    found = places(one, asked.bands, block_px=BLOCK_PX, seed=asked.seed, other_mask=one.other_mask if scl else None)
    series = [place.read() for place in found]
    if "complete" in one.tasks:
        for variant in ("simulated",) if one.simulate else one.variants:
            given = [(s, c) for s in series for c in _completions(asked, s, variant)]
            yield one.name, "complete", variant, _spread(given, asked.max_cases, one.name)
    if "predict" in one.tasks:
        most = 1.01 if one.simulate else asked.target_max_bad  # of simulated dates the truth is always known
        made = ((s, cases.predictions(s, window_days=asked.window_days, max_bad=most)) for s in series)
        given = [
            (s, cases.checked_in_time(c, s.bands) if s.judged is not None else c) for s, found in made for c in found
        ]
        yield one.name, "predict", "simulated" if one.simulate else "base", _spread(given, asked.max_cases, one.name)


def _completions(asked: Evaluation, series: Series, variant: str) -> Iterator[Case]:
    if variant == "simulated":
        yield from cases.simulated(series, window_days=asked.window_days)
        return
    kind = cast(Variant, variant.removesuffix("+check"))
    given = cases.completions(
        series,
        kind,
        pastes=asked.pastes,
        seed=asked.seed,
        window_days=asked.window_days,
        max_bad=asked.target_max_bad,
    )
    check = variant.endswith("+check") or (series.judged is not None and kind != "scl")
    for case in given:
        yield cases.checked_in_time(case, series.bands) if check else case


def _spread(given: list[tuple[Series, Case]], most: int | None, name: str) -> list[tuple[Series, Case]]:
    if not given:
        raise NothingClearError(
            f"set {name}: there is no case to score: no date is clear with two more looks near, or none has clouds to "
            "paste; widen its time span, raise target_max_bad, or look at its masks"
        )
    if most is None or len(given) <= most:
        return given
    return [given[i] for i in np.linspace(0, len(given) - 1, most).round().astype(int)]


# -- one group of cases ---------------------------------------------------------------------------------------------


def _score_group(
    asked: Evaluation,
    name: str,
    task: str,
    variant: str,
    given: list[tuple[Series, Case]],
    report: Report,
    progress: Progress,
) -> None:
    shown = f"{name} {task}" + ("" if variant == "base" else f" {variant}")
    ready = {label(method): learned.prepare(method, asked.bands) for method in asked.methods}
    progress.begin(shown, len(given))
    answers: list[dict[str, Answer]] = []
    for series, case in given:
        answers.append(_answers(ready, series, case))
        for method, answer in answers[-1].items():
            place = {"set": name, "task": task, "variant": variant, "case": case.id, "day": case.day, "method": method}
            report.rows.append({**place, **answer.row})
        progress.step(1)
    # a date is one draw, however many blocks of the area show it; simulated places have nothing but days in common
    dates = np.array([f"{series.name if series.truth is not None else name}/{case.day}" for series, case in given])
    for method in ready:
        facts = _summary([a[method].row for a in answers], [a[asked.reference].row for a in answers], dates)
        linear = _mean(np.array([a["linear"].row["rmse"] for a in answers])) if "linear" in ready else np.nan
        skill = 1 - facts["rmse"] / linear if linear else np.nan
        place = {"set": name, "task": task, "variant": variant, "method": method}
        report.summary.append({**place, **facts, "skill": skill})
    _draw(asked, shown, given, answers, report)


def _draw(
    asked: Evaluation,
    shown: str,
    given: list[tuple[Series, Case]],
    answers: list[dict[str, Answer]],
    report: Report,
) -> None:
    """The group's plots and pictures."""
    stem = shown.replace(" ", "_").replace("+", "_")
    totals = {
        method: (
            np.sum([a[method].by_gap for a in answers], axis=0),
            np.sum([a[method].by_looks for a in answers], axis=0),
        )
        for method in answers[0]
    }
    offsets = {m: np.concatenate([a[m].offsets for a in answers]) for m in answers[0]}
    report.files += [
        figures.by_gap(totals, GAP_DAYS, LOOKS, asked.out / f"{stem}_gaps.png", title=shown),
        figures.by_date(offsets, asked.window_days, asked.out / f"{stem}_dates.png", title=shown),
    ]
    method = _champion(asked, answers)
    gains = np.array([a[method].row["psnr"] - a[asked.reference].row["psnr"] for a in answers])
    order = np.argsort(np.where(np.isfinite(gains), gains, -np.inf))[::-1]
    picks = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    for kind in list(picks)[: asked.pictures]:
        (series, case), made = given[picks[kind]], answers[picks[kind]]
        panels = {m: (made[m].codes, made[m].row["psnr"]) for m in dict.fromkeys((asked.reference, method))}
        path = asked.out / f"{stem}_{kind}.png"
        title = f"{shown}: {kind} case of {method} against {asked.reference}"
        report.files.append(figures.picture(case, panels, series.bands, path, title=title))


def _champion(asked: Evaluation, answers: list[dict[str, Answer]]) -> str:
    """The method whose cases are pictured: the best but the reference."""
    others = [m for m in answers[0] if m != asked.reference] or [asked.reference]
    return max(others, key=lambda m: float(np.nanmean([a[m].row["psnr"] for a in answers])))


def _summary(own: list[Row], reference: list[Row], dates: NDArray[Any]) -> Row:
    def column(rows: list[Row], name: str) -> NDArray[np.float64]:
        return np.array([row[name] for row in rows], np.float64)

    def gains(name: str) -> tuple[NDArray[np.bool_], Row]:
        difference = column(own, name) - column(reference, name)
        known = np.isfinite(difference)
        ends = metrics.paired_block_bootstrap(differences=difference[known], blocks=dates[known])
        return known, {"gain": ends.mean, "gain_low": ends.low, "gain_high": ends.high}

    known, gain = gains("psnr")
    out: Row = {"cases": int(known.sum()), "dates": len(set(dates[known].tolist()))}
    out |= {"psnr": _mean(column(own, "psnr")), "psnr_median": _mean(column(own, "psnr"), np.median)}
    for name in ("mae", "rmse", "sam", "ssim", "bias", "covered", "changed_psnr", "observed_mae", "ring_mae"):
        out[name] = _mean(column(own, name))
    out["unfillable"] = _mean(column(own, "unfillable"))
    changed = {f"changed_{name}": value for name, value in gains("changed_psnr")[1].items()}
    return out | gain | changed


def _mean(values: NDArray[np.float64], of: Any = np.mean) -> float:
    known = values[np.isfinite(values)]
    return float(of(known)) if known.size else float("nan")


# -- one case -------------------------------------------------------------------------------------------------------


def _answers(methods: Mapping[str, Method], series: Series, case: Case) -> dict[str, Answer]:
    """Every method's answer, scored on the pixels that all can fill."""
    made = {name: compose_case(method, case) for name, method in methods.items()}
    others = case.clear.copy()
    if case.target is not None:
        others[case.target] = False
    filled = np.logical_and.reduce([(layers.codes != 0).all(axis=0) for layers in made.values()])
    scored = case.hole & others.any(axis=0) & filled
    seen = case.observed & (case.truth != 0).all(axis=0) & _core(series)
    ring = seen & cases.grow(case.hole[None], RING_M / series.resolution_m)[0]
    gap = _nearest(others, case)
    happened = scored & _changed(series, case, others)
    where = {"scored": scored, "observed": seen, "ring": ring, "changed": happened}
    unfillable = int((case.hole & ~others.any(axis=0)).sum()) / max(int(case.hole.sum()), 1)
    count = others.sum(axis=0)
    out = {}
    for name, layers in made.items():
        row = _score(layers, case, where) | {"unfillable": unfillable}
        squared = ((_clipped(layers.codes) - metrics.reflectance(case.truth)) ** 2).mean(axis=0)
        offsets = layers.source_date[scored & (layers.source_date != 0)].astype(np.int64) - case.day
        by_gap, by_looks = _binned(squared, scored, gap, GAP_DAYS), _binned(squared, scored, count, LOOKS)
        out[name] = Answer(layers.codes, row, by_gap, by_looks, offsets)
    return out


def compose_case(method: Method, case: Case) -> Layers:
    """The product's answer, as a job with this acquisition as its anchor gives it."""
    everywhere = None
    if case.target is not None:
        everywhere = AnchorMap(1 << 20, 0, 0, (case.target,), np.ones((1, 2, 2), np.float32))
    return compose_block(
        codes=case.codes,
        clear=case.clear,
        bits=case.bits,
        days=case.days,
        method=method,
        target=case.day,
        anchors=everywhere,
        row0=case.row0,
        col0=case.col0,
    )


def _score(layers: Layers, case: Case, where: dict[str, Flags]) -> Row:
    truth, made = metrics.reflectance(case.truth), _clipped(layers.codes)
    scored = where["scored"]
    row: Row = {"pixels": int(scored.sum())}
    own: dict[str, Any] = {"predicted": made, "truth": truth, "scored": scored}
    row |= {"psnr": metrics.psnr(**own), "mae": metrics.mae(**own), "rmse": metrics.rmse(**own)}
    row |= {"sam": metrics.sam_degrees(**own), "bias": float(metrics.bias(**own).mean())}
    fused = np.where(scored, made, truth)
    row["ssim"] = metrics.ssim(predicted=fused, truth=truth, scored=scored) if scored.any() else np.nan
    row["covered"] = _covered(layers, case, scored)
    row["changed_psnr"] = metrics.psnr(predicted=made, truth=truth, scored=where["changed"])
    for name in ("observed", "ring"):
        row[f"{name}_mae"] = metrics.mae(predicted=made, truth=truth, scored=where[name])
    return row


def _covered(layers: Layers, case: Case, scored: Flags) -> float:
    """Share of true values inside the 90 % interval; NaN for methods without one."""
    if layers.sigma is None:
        return float("nan")
    there = scored[None] & (layers.sigma != NO_SIGMA)
    off = np.abs(layers.codes.astype(np.float64) - case.truth)
    return float((off <= NINETY * layers.sigma)[there].mean()) if there.any() else float("nan")


def _changed(series: Series, case: Case, others: Flags) -> Flags:
    """Where the ground of a simulated target lies off the line between the clear looks around it."""
    if series.surface is None:
        return np.zeros(case.hole.shape, bool)
    used = np.searchsorted(series.days, case.days)
    line = composite.linear(codes=series.surface[used], clear=others, days=case.days, target=case.day).codes
    ground = series.surface[int(np.searchsorted(series.days, case.day))]
    return np.asarray((np.abs(line.astype(int) - ground.astype(int)) > CHANGED).any(axis=0))


def _nearest(others: Flags, case: Case) -> NDArray[np.float64]:
    """(H, W) days to the nearest clear look."""
    far = np.abs(case.days.astype(np.float64) - case.day)[:, None, None]
    return np.where(others, far, np.inf).min(axis=0, initial=np.inf)


def _binned(
    squared: NDArray[np.float64], scored: Flags, facts: NDArray[Any], edges: Sequence[int]
) -> NDArray[np.float64]:
    """(bins, 2): summed squared error and pixels; a bin reaches up to its edge, inclusive, the last one to infinity."""
    number = np.searchsorted(np.array(edges), facts[scored], side="left")
    size = len(edges) + 1
    return np.stack([np.bincount(number, squared[scored], size), np.bincount(number, minlength=size)], axis=1)


def _clipped(codes: NDArray[np.uint16]) -> NDArray[np.float64]:
    return np.clip(np.nan_to_num(metrics.reflectance(codes)), 0, 1)


def _core(series: Series) -> Flags:
    inside = np.zeros(series.bits.shape[1:], bool)
    inside[series.core] = True
    return inside


def _write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
