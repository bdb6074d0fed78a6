"""The command line: `distinfluence demo`, `plan`, `run`, `verify`, `evaluate`, `info`, `top`."""

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import click

import distinfluence
from distinfluence.browse.commands import condition, register
from distinfluence.errors import DistinfluenceError, SettingError, StoreNotFoundError

if TYPE_CHECKING:
    from distinfluence.app.config import Job
    from distinfluence.app.job_points import Axis, JobPoints
    from distinfluence.store import InfluenceResult
    from distinfluence.store.run_state import RunState

Kind = Literal["image", "text", "table"]
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # the shell's exit status for a command that Ctrl-C ended


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(distinfluence.__version__)
def main() -> None:
    """Which training examples made the model do that?

    Computes the matrix of influences of training on test samples for any PyTorch model, on the workers of a Dask
    cluster, and writes it to a zarr group that any zarr reader opens. A positive influence means that the training
    sample helps the test sample, a negative one that it harms.

    \b
    Start here:
      distinfluence demo                    a real example, under two minutes
      distinfluence plan job.yaml           what a run of your own model and data will need
      distinfluence run job.yaml            the run
      distinfluence info influences.zarr    what a result holds and how far it converged
      distinfluence browse influences.zarr  look at it on a page, in the browser
      distinfluence top influences.zarr 0   the training samples that matter most for test sample 0
    """
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")  # of torch.func's first use


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("distinfluence-demo"),
    show_default=True,
    help="Folder for the model, the job file, the result and a picture.",
)
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Worker processes.")
def demo(output: Path, workers: int) -> None:
    """Find mislabelled digits: train, compute 297 × 1500 influences on a local Dask cluster, look at them.

    Trains a small network on scikit-learn's digits with 5 % of the training labels flipped on purpose, writes a job
    file and runs it, then says how many of the flipped labels stand among the most harmful training samples.
    """
    from distinfluence.app.demo import run_demo

    with _clean_errors(resume=f"run {output / 'job.yaml'} --resume"):
        click.echo(run_demo(output, workers))


_cluster_option = click.option(
    "--cluster",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A file with what would be the job's `cluster:`, in its place.",
)


def _job(path: Path, cluster: Path | None) -> "Job":
    from distinfluence.app.config import Job
    from distinfluence.app.sections import ClusterSection

    job = Job.read(path)
    return job if cluster is None else job.on(ClusterSection.read(cluster))


@main.command()
@click.argument("job", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--resume", is_flag=True, help="Go on with a result that was begun with the same model, data and method.")
@click.option("--check", is_flag=True, help="With --resume: read what is there first, and make anew what is damaged.")
@click.option("--overwrite", is_flag=True, help="Replace a result that distinfluence wrote.")
@_cluster_option
@click.option(
    "--part",
    metavar="K/N",
    help="Make every N-th strip in this process, without a cluster, beside N - 1 others that make the others.",
)
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--logs", type=click.Path(path_type=Path, file_okay=False), help="Folder for a log of each worker.")
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="HTML file for Dask's performance report."
)
def run(
    job: Path,
    resume: bool,
    check: bool,
    overwrite: bool,
    cluster: Path | None,
    part: str | None,
    quiet: bool,
    logs: Path | None,
    report: Path | None,
) -> None:
    """Compute the influences that the file JOB describes.

    \b
    A job file:
      model: {factory: "my_model:build", checkpoint: model.pt}
      loss: "torch.nn:CrossEntropyLoss"
      data: {train: "my_data:train", test: "my_data:test"}
      method: {name: cg, second_order_mode: ggn, hessian_regularization: 0.01, rtol: 1.0e-5}
      chunks: {train: 256, test: 1024}
      cluster: {kind: local, workers: 2}
      output: influences.zarr

    In a batch job that the queue starts again, the run goes on with what its last start left.
    """
    from distinfluence.app.job import begun_here, run_job, run_part
    from distinfluence.app.summary import program, summary
    from distinfluence.scaling import Progress, was_requeued

    with _clean_errors(resume=f"run {job}{'' if cluster is None else f' --cluster {cluster}'} --resume"):
        described = _job(job, cluster)
        if was_requeued() and not (overwrite and not begun_here(described)):
            resume, overwrite = True, False  # what this job's last start left
        if resume and overwrite:
            raise click.UsageError("--resume and --overwrite exclude each other: drop one of them.")
        if check and not resume:
            raise click.UsageError("--check is for a result that is there: add --resume.")
        if part is not None:
            if overwrite or check or cluster is not None:
                raise click.UsageError("--part goes on with what is there, without a cluster: drop the other option.")
            click.echo(summary(run_part(described, part, progress=Progress(not quiet))))
            return
        existing = "repair" if check else "resume" if resume else "replace" if overwrite else "refuse"
        result = run_job(described, existing=existing, progress=Progress(not quiet), logs=logs, report=report)
        click.echo(summary(result))
        click.echo(f"next: {program()} top {result.path} 0")


@main.command()
@click.argument("job", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@_cluster_option
def plan(job: Path, cluster: Path | None) -> None:
    """Show what running JOB will need: chunks, memory by stage, passes, bytes on disk, and about how long it takes.

    Loads the model and a few samples, measures some seconds, and computes nothing. Ends with status 1, and the change
    that would help, if the workers have too little memory.
    """
    from distinfluence.app.job import plan_job

    with _clean_errors():
        click.echo(str(plan_job(_job(job, cluster))))


@main.command()
@click.argument("job", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--tests", default=4, show_default=True, type=click.IntRange(min=1), help="Test samples to look at.")
@click.option("--trains", default=64, show_default=True, type=click.IntRange(min=1), help="Training samples.")
@click.option("--seed", default=0, show_default=True, help="Of the random sample.")
def verify(job: Path, tests: int, trains: int, seed: int) -> None:
    """Read the whole result of JOB, and compute a random sample of it again, by another method and in float64.

    Ends with status 1 if a byte is not as it was written, or an error is larger than its bound.
    """
    from distinfluence.app.config import Job
    from distinfluence.app.job import verify_job

    with _clean_errors():
        found = verify_job(Job.read(job), n_test=tests, n_train=trains, seed=seed)
        click.echo(f"every byte as it was written; {found}")
        if found.within_bounds is False:
            sys.exit(1)


@main.command()
@click.argument("job", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@_cluster_option
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
def evaluate(job: Path, cluster: Path | None, quiet: bool, as_json: bool) -> None:
    """Check what scores are worth on the model of JOB, by training it again on parts of the data.

    The key `evaluate` of the job file says how models are trained and which checks are made. Each method stands next to
    baselines, with intervals. Models that were trained are kept: a call that is repeated trains only what is missing.

    \b
      evaluate:
        train: "my_model:train"        # train(indices, seed) returns the module
        output: evaluation             # the folder of the bank, the scores and the table
        methods:
          GGN: {name: direct, second_order_mode: ggn, hessian_regularization: 0.01}
          EKFAC: {name: ekfac, update_diagonal: true, hessian_regularization: {fraction: 0.1, of: mean}}
        subsets: 100
        seeds: 5
    """
    from distinfluence.app.evaluation import evaluate_job
    from distinfluence.scaling import Progress

    with _clean_errors(resume=f"evaluate {job}{'' if cluster is None else f' --cluster {cluster}'}"):
        found = evaluate_job(_job(job, cluster), progress=Progress(not quiet))
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))


@main.command()
@click.argument("job", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--kind", type=click.Choice(["image", "text", "table"]), help="What the inputs are; labels only without.")
@click.option("--shape", help="Shape of one input, as 3x32x32, where the data have it flat.")
@click.option("--render", help="module:callable that makes of one input what is shown, an image or a text.")
@click.option("--classes", help="Names of the labels, by commas.")
def annotate(job: Path, kind: Kind | None, shape: str | None, render: str | None, classes: str | None) -> None:
    """Store the samples and labels of JOB with its result, so that `browse` and `export` show them.

    \b
      distinfluence annotate job.yaml --kind image --shape 8x8 --classes zero,one,two
      distinfluence annotate job.yaml --kind text --render my_data:decode
    """
    from distinfluence.app.config import Job
    from distinfluence.app.job_data import annotate_job

    with _clean_errors():
        names = None if classes is None else classes.split(",")
        sizes = None if shape is None else _sizes(shape)
        click.echo("\n".join(annotate_job(Job.read(job), kind, shape=sizes, render=render, classes=names)))


def _sizes(shape: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", shape, re.ASCII):
        raise SettingError(f"`--shape` must be sizes as 3x32x32, got {shape!r}.")
    return tuple(int(size) for size in shape.split("x"))


@main.command()
@click.argument("path")
@click.option("--check", is_flag=True, help="Read everything and compare the checksums.")
@click.option("--json", "as_json", is_flag=True, help="Everything that is recorded, as JSON.")
def info(path: str, check: bool, as_json: bool) -> None:
    """Show what the result at PATH holds, what made it, and how far it converged.

    Of a result that is not complete also the run: at which stage it is, how fast, and whether it lives or died; from
    the run's first moment, when there is no result yet. Asks no scheduler.
    """
    from distinfluence.app.summary import summary
    from distinfluence.store import open_influences
    from distinfluence.store.read.facts import facts, model_of
    from distinfluence.store.run_state import read_runs

    with _clean_errors():
        runs = [] if "://" in path else read_runs(Path(path).expanduser().absolute())
        known_runs = [{**asdict(run), "condition": run.condition()} for run in runs]
        try:
            result = open_influences(path)
        except StoreNotFoundError:
            if not runs:
                raise
            click.echo(json.dumps({"runs": known_runs}, indent=2) if as_json else _runs(runs))
            return
        if as_json:
            bad = result.damaged_strips() if check else result.lost_strips()
            found = {"progress": result.progress, "damaged_strips": bad, "runs": known_runs}
            click.echo(json.dumps({**result.provenance, **found}, indent=2))
            return
        provenance = result.provenance
        known = {"solver", "parameters"} <= set(provenance) or bool(provenance.get("baseline"))
        click.echo(summary(result) if known else "\n".join(f"{k}: {v}" for k, v in facts(result).items()))
        if known and model_of(provenance):
            click.echo(f"model: {model_of(provenance)}")
        click.echo(
            f"state: {condition(result, check=check)}, created {provenance.get('created')}, "
            f"sign: {provenance.get('sign_convention')}"
        )
        if not result.complete:
            click.echo(_runs(runs))
        for name, value in provenance.get("fingerprints", {}).items():
            click.echo(f"sha256 of {name.replace('_', ' ')}: {value[:16]}…")
        click.echo("versions: " + ", ".join(f"{k} {v}" for k, v in provenance.get("versions", {}).items()))


def _runs(runs: "Sequence[RunState]") -> str:
    return "\n".join(map(str, runs)) or "no run is at work on it: go on with `distinfluence run JOB --resume`"


@main.command()
@click.argument("path")
@click.argument("test_index", type=int, required=False)
@click.option("--tests", help="A set of test samples instead, by the mean of their influences: 0:100, or 3,7,12.")
@click.option("--label", help="The test samples of a class instead, by its name or number.")
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many of each.")
@click.option("--partial", is_flag=True, help="Rank what is there of a result that is still running.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def top(
    path: str, test_index: int | None, tests: str | None, label: str | None, k: int, partial: bool, as_json: bool
) -> None:
    """Show the training samples that help and harm test sample TEST_INDEX most, or a set of test samples.

    \b
      distinfluence top influences.zarr 0
      distinfluence top influences.zarr --tests 0:100
      distinfluence top influences.zarr --label cat
    """
    from distinfluence.browse.export.terminal import asked_tests, ranked, ranking_json, ranking_table
    from distinfluence.store import open_influences

    with _clean_errors():
        result = open_influences(path)
        found = ranked(result, asked_tests(result, test_index, tests, label), k, partial)
        click.echo(ranking_json(found) if as_json else ranking_table(result, found))


def _sources_of_job(
    job: Path, result: "InfluenceResult", render: str | None, compared: bool
) -> "Mapping[Axis, JobPoints]":
    from distinfluence.app.job_points import points_of_job

    return points_of_job(job, result, render, compared)


register(main, _sources_of_job)


@contextmanager
def _clean_errors(resume: str = "") -> Iterator[None]:
    """Our errors as one message, Ctrl-C and its like as a clean stop; anything else is a defect and keeps its trace."""
    before = {each: signal.getsignal(each) for each in STOPPING}
    for each, found in before.items():
        if found is not signal.SIG_IGN:  # nohup, or a job in the background of a shell: meant to be left alone
            signal.signal(each, _interrupt)
    try:
        yield
    except DistinfluenceError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        from distinfluence.app.summary import program

        hint = f" Go on with: {program()} {resume}" if resume else ""
        with suppress(OSError):  # the terminal may be what has gone
            click.echo(f"stopped; what was written stays.{hint}", err=True)
        sys.exit(INTERRUPTED)
    finally:
        for each, found in before.items():
            signal.signal(each, found)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    # who ends a job says so more than once; what is being put in order meanwhile must not be interrupted
    for each in STOPPING:
        if signal.getsignal(each) is _interrupt:
            signal.signal(each, _say_still_stopping)
    raise KeyboardInterrupt


def _say_still_stopping(_signal: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # not by the stream, in whose midst the signal may have come
        os.write(2, b"still stopping: workers are being ended and jobs cancelled\n")
