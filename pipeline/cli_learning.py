"""The commands of learned methods: thin. In come TRAIN.yaml and EVAL.yaml, out come weights, tables and pictures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.console import AsJson, Debug, Overrides, kind, print_json


def train(
    file: Annotated[Path, typer.Argument(help="TRAIN.yaml, see tests/jobs/train.yaml.", show_default=False)],
    prepare: Annotated[bool, typer.Option("--prepare", help="Only write the training samples.")] = False,
    overrides: Overrides = None,
    restart: Annotated[bool, typer.Option(help="Forget what is there and start over.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a network on one's own region or on simulated scenes. Run it again to go on where it stopped.

    The samples are written first (needs GDAL); a machine that finds them written needs neither GDAL nor Dask.

    Example: [bold]cloudgate train train.yaml --set fit.epochs=50[/bold]
    """
    with kind(debug):
        from pipeline.learnfile import load_training
        from pipeline.progress import terminal
        from pipeline.samples import is_complete

        training = load_training(file, overrides=overrides or ())
        answer: dict[str, Any] = {}
        with terminal(quiet=as_json) as progress:
            if prepare or not is_complete(training.store):
                from pipeline.prepare import prepare as write

                written = write(training, restart=restart and prepare, progress=progress)
                answer["prepared"] = written.__dict__
                progress.say(f"{written.store}: {written.samples} samples of {len(written.places)} sources")
            if not prepare:
                from pipeline.train import train as learn

                trained = learn(training, restart=restart, progress=progress)
                answer["trained"] = trained.__dict__
                if trained.rank:  # one of several processes tells
                    return
        if as_json:
            print_json(answer)
        elif not prepare:
            best = trained.best
            print(
                f"{trained.weights}: {trained.stopped}; best epoch {int(best['epoch']) + 1}, validation PSNR "
                f"{best['psnr']:.2f} dB (prior {best['prior_psnr']:.2f}); {trained.seconds:.0f} s, of which "
                f"{100 * trained.wait_share:.0f} % waiting for samples"
                if best
                else f"{training.out}: {trained.stopped}; no epoch finished yet, the same command goes on"
            )


def evaluate(
    file: Annotated[Path, typer.Argument(help="EVAL.yaml, see tests/jobs/evaluate.yaml.", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare methods and weights on series with known truth; writes tables, plots and pictures.

    Example: [bold]cloudgate evaluate evaluate.yaml --set max_cases=10[/bold]
    """
    with kind(debug):
        from pipeline.evaluate import evaluate as score
        from pipeline.learnfile import load_evaluation
        from pipeline.progress import show_report, terminal

        asked = load_evaluation(file, overrides=overrides or ())
        with terminal(quiet=as_json) as progress:
            report = score(asked, progress=progress)
        if as_json:
            print_json({"summary": report.summary, "files": report.files})
        else:
            show_report(asked.name, asked.reference, report)
