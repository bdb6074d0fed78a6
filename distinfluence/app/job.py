"""Running a job: from its description to the result on disk."""

import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, performance_report

from distinfluence.app.baseline_job import plan_baseline, refuse_baseline, require_same_data, run_baseline
from distinfluence.app.complete import complete_result, with_asked
from distinfluence.app.config import Job
from distinfluence.curvature import SecondOrderMode
from distinfluence.errors import (
    ConfigError,
    CorruptStoreError,
    FingerprintError,
    MissingDependencyError,
    SettingError,
    StoreError,
)
from distinfluence.evaluate import Verification, verify_entries
from distinfluence.evaluate.baselines.write import BaselinePlan
from distinfluence.evaluate.verify import sampled
from distinfluence.influence import EkfacInfluence, InfluenceFunctionModel, KrylovInfluence
from distinfluence.influence.arrays import to_tensor_batch
from distinfluence.memory import process_bytes
from distinfluence.model.identity.structure import structure
from distinfluence.scaling import (
    ChunkedData,
    DaskInfluenceCalculator,
    ExistingResult,
    InfluenceCalculator,
    LogToFolder,
    ModelRecipe,
    Plan,
    Progress,
    RunOptions,
    SequentialInfluenceCalculator,
    connected,
)
from distinfluence.scaling.clusters.connect import ANSWER_SECONDS, planned_memory, planned_workers
from distinfluence.scaling.clusters.slurm import batch_job
from distinfluence.scaling.data.chunks import chunked, recut, take_samples
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.scaling.data.sources import InThisProcess
from distinfluence.scaling.dispatch.executor import InProcess, worker_memory
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.plan.problem import Machine
from distinfluence.scaling.stages.inspect import Inspected, drawn_samples, look
from distinfluence.scaling.stages.probe import require_same_probe
from distinfluence.scaling.worker.context import LocalContext
from distinfluence.scaling.worker.device import smallest_device, task_device
from distinfluence.scaling.worker.source_reducer import SourceReducer
from distinfluence.store import InfluenceResult, find_damage, open_influences
from distinfluence.store.format.fingerprint import to_json
from distinfluence.store.write.resume import chunks_of


def run_job(
    job: Job,
    *,
    existing: ExistingResult | str = ExistingResult.REFUSE,
    progress: Progress | None = None,
    logs: Path | None = None,
    report: Path | None = None,
) -> InfluenceResult:
    """Start or join the cluster, fit, compute and write.

    Files of the run lie in `scratch` until the run is complete.

    Args:
        job: The job.
        existing: What to do with a result that is there.
        progress: What shows the progress; by default a new `Progress`.
        logs: A folder for a file of JSON lines by each worker; None writes no such files.
        report: An HTML file for Dask's performance report, which needs bokeh; None writes no report.

    Returns:
        The result.
    """
    progress = progress or Progress()
    if job.is_baseline:
        return run_baseline(job, existing, progress)
    options = job.options(existing)
    options.check_path(job.result)
    with progress.beside(job.result):
        model, recipe = job.influence_model()
        done = _already_complete(job, model, options, progress)
        return _run(job, (model, recipe), options, progress, logs, report) if done is None else done


def _already_complete(
    job: Job, model: InfluenceFunctionModel, options: RunOptions, progress: Progress
) -> InfluenceResult | None:
    """Return the result of a resumed run that has nothing to do."""
    result = complete_result(job, model, options) if options.resumes else None
    if result is not None:
        progress.say(f"{result.path} is complete: nothing to do")
        if job.scratch is None:  # of a run that was killed after its last strip
            shutil.rmtree(job.scratch_folder, ignore_errors=True)
    return result


def _run(
    job: Job,
    built: tuple[InfluenceFunctionModel, ModelRecipe],
    options: RunOptions,
    progress: Progress,
    logs: Path | None,
    report: Path | None,
) -> InfluenceResult:
    folder = job.logs_folder if logs is None else logs.resolve()
    with connected(job.cluster_spec(), folder=folder, announce=progress.say) as client, reported(report):
        if logs is not None:
            client.register_plugin(LogToFolder(folder))
        result, calculator = run_on(client, job, built, options, progress)
    _remove(job, job.scratch_folder, calculator)
    return result


def run_on(
    client: Client,
    job: Job,
    built: tuple[InfluenceFunctionModel, ModelRecipe],
    options: RunOptions,
    progress: Progress,
) -> tuple[InfluenceResult, InfluenceCalculator]:
    """Fit, compute and write on a cluster that is there. The scratch folder stays.

    Args:
        client: A client of the cluster.
        job: The job.
        built: Its influence model, and the recipe of the module.
        options: Its options.
        progress: What shows the progress.

    Returns:
        The result, and what made it.
    """
    model, recipe = built
    calculator = DaskInfluenceCalculator(
        model,
        client,
        recipe=recipe,
        scratch=job.scratch_folder,
        timeout=job.cluster.timeout or ANSWER_SECONDS,
        device=job.device,
        workers=planned_workers(job.cluster_spec()),
    )
    return _computed(job, calculator, options, progress, Partition.whole()), calculator


def begun_here(job: Job) -> bool:
    """Say whether an earlier start of the batch job that this process runs in began the result of a job."""
    try:
        recorded = open_influences(job.result).provenance.get("batch_job")
    except StoreError:  # there is none, or none of ours
        return False
    return recorded is not None and recorded == batch_job()


@contextmanager
def reported(file: Path | None) -> Iterator[None]:
    """Have Dask write its performance report to a file.

    Raises:
        MissingDependencyError: bokeh is not installed.
    """
    if file is None:
        yield
        return
    if importlib.util.find_spec("bokeh") is None:
        raise MissingDependencyError("a performance report needs bokeh, which is not here. Run `pip install bokeh`.")
    with performance_report(filename=str(file)):
        yield


def run_part(job: Job, part: str, *, progress: Progress | None = None) -> InfluenceResult:
    """Make a part of the job's strips in this process, without a cluster; other processes make the other strips.

    The processes share the fit and the factors through `scratch`, and the last one finishes the result. The call is
    safe to repeat: what is there is not made again.

    Args:
        job: The job.
        part: "K/N" for the K-th of N such processes, counted from 0.
        progress: What shows the progress; by default a new `Progress`.

    Returns:
        The result.

    Raises:
        SettingError: `part` is not of this form.
        ConfigError: `chunks` does not say all three sizes, which must be the same everywhere.
    """
    progress = progress or Progress()
    refuse_baseline(job, "one process makes alone", "Run the job without a part.")
    model, _ = job.influence_model()
    scratch = job.scratch_folder
    partition = Partition.parse(part, scratch)
    options = job.options(ExistingResult.RESUME)
    options.check_path(job.result)
    if chunks_of(job.result) is None and None in (job.chunks.train, job.chunks.test, job.chunks.panel):
        raise ConfigError(
            "`chunks` must say `train`, `test` and `panel` where several processes share a result, got "
            f"{job.chunks.model_dump(exclude_none=True)}. `distinfluence plan` proposes them."
        )
    with progress.beside(job.result, part):
        done = _already_complete(job, model, options, progress)
        if done is not None:
            return done
        calculator = SequentialInfluenceCalculator(model.to(task_device(job.device)), scratch=scratch)
        result = _computed(job, calculator, options, progress, partition)
    if result.complete:
        _remove(job, scratch, calculator)
    return result


def _computed(
    job: Job, calculator: InfluenceCalculator, options: RunOptions, progress: Progress, partition: Partition
) -> InfluenceResult:
    train, test = _data(job, calculator)
    options = _as_begun(options, chunks_of(job.result) if options.resumes else None)
    with progress.stage("plan", None, "samples"):
        # parts would all measure the same, at the same time
        plan = calculator.plan(train, None, test, options=options, calibrate=not partition.shared)
    progress.say(str(plan))
    calculator.require_space(plan, job.result, options.mantissa_bits)
    with partition.alone():  # one fits, the others find the fit
        calculator.fit(recut(train, plan.chunks.train), certify=job.certify, progress=progress)
    options = with_asked(options, job, calculator.model, plan)
    options = replace(options, chunk_size=None, test_chunk_size=None, panel_size=plan.chunks.panel)
    test = recut(test, plan.chunks.test)
    return calculator.to_zarr(job.result, test, options=options, progress=progress, partition=partition)


def _data(job: Job, calculator: InfluenceCalculator) -> tuple[ChunkedData, ChunkedData]:
    with job.mistakes_of("data", "train"):
        train = calculator.chunked(job.recipe(job.data.train), chunk_size=job.chunks.train)
    with job.mistakes_of("data", "test"):
        return train, calculator.chunked(job.recipe(job.data.test), chunk_size=job.chunks.test)


def data_of(job: Job, cut: Mapping[str, Any]) -> dict[str, ChunkedData]:
    """Return a job's data in this process, in the chunks that its result was made with.

    Args:
        job: The job.
        cut: The chunks, from the provenance of the result.

    Returns:
        "train_data" and "test_data" → the data.
    """
    home = InThisProcess()
    return {
        "train_data": chunked(job.recipe(job.data.train), None, home, cut["train"]),
        "test_data": chunked(job.recipe(job.data.test), None, home, cut["test"][0]),
    }


def plan_job(job: Job) -> Plan | BaselinePlan:
    """Plan what `run_job` will do and need, with times by a calibration in this process; no worker is started."""
    if job.is_baseline:
        return plan_baseline(job)
    model, _ = job.influence_model()
    spec = job.cluster_spec()
    calculator = SequentialInfluenceCalculator(model)
    memory = planned_memory(spec)
    if memory is not None:
        machine = Machine(spec.n_workers, memory, process_bytes())
    else:
        with connected(spec) as client:
            workers = max(planned_workers(spec) or 1, len(client.nthreads()))
            machine = Machine(workers, worker_memory(client), process_bytes(), smallest_device(client, job.device))
    train, test = _data(job, calculator)
    options = _as_begun(job.options(), chunks_of(job.result))
    return calculator.plan(train, None, test, options=options, machine=machine, calibrate=True)


def _as_begun(options: RunOptions, began: Mapping[str, Any] | None) -> RunOptions:
    """Return the options of a run that goes on, with the chunks that it began with."""
    if began is None:
        return options
    train, test = options.chunk_size or began["train"], options.test_chunk_size or began["test"][0]
    return replace(options.continuing(began), chunk_size=train, test_chunk_size=test)


def verify_job(job: Job, *, n_test: int, n_train: int, seed: int) -> Verification:
    """Compare a random sample of the job's result with exact influences, computed here by another method.

    The whole result is read first, and its checksums are compared. The training data are loaded and swept in this
    process.

    Args:
        job: The job.
        n_test: How many test points to draw.
        n_train: How many training points to draw.
        seed: Seed of the draw.

    Returns:
        How the entries compare.

    Raises:
        CorruptStoreError: The result is damaged; the message names what is.
        FingerprintError: The result was made with another model or other data.
        SettingError: The result has mode "perturbation", or the method is a baseline.
    """
    refuse_baseline(
        job, "has no exact scores to be compared with", "`distinfluence info --check` reads every byte of its result."
    )
    asked, _ = job.influence_model()
    result = open_influences(job.result)
    if len(result.shape) != 2:
        raise SettingError("`output` holds influences of mode 'perturbation', expected 'up'. Only those are verified.")
    damage = find_damage(job.result)
    if damage:
        raise CorruptStoreError(
            f"`output` {result.path} is damaged: {damage}. `run --resume --check` makes that again, and nothing else."
        )
    solver = result.provenance["solver"]
    # a Kronecker-factored fit is made again: its dampings by layer, and what its bounds refer to, belong to it;
    # and a fit without curvature is no work
    model: InfluenceFunctionModel = asked
    if not isinstance(asked, EkfacInfluence) and asked.second_order_mode is not SecondOrderMode.NONE:
        model = KrylovInfluence(
            asked.risk.module,
            asked.objective,
            solver["hessian_regularization"],
            block_structure=solver["block_structure"],
            second_order_mode=solver["second_order_mode"],
        )
    data = data_of(job, result.provenance["chunks"])
    looked = require_same_inputs(result, model, data)["train_data"]
    reducer = SourceReducer(model.risk, looked.data)
    reducer.drawn, reducer.digest = tuple(drawn_samples(InProcess(), model.risk, looked)), looked.draw.digest
    reducer.checked = model.check(reducer.drawn)
    require_same_probe(result.provenance, reducer.checked.probe, result.path)
    model.fit(reducer)
    rows, columns = sampled(result.shape, n_test, n_train, seed)
    given = np.asarray(result.influences.oindex[rows, columns], dtype=np.float64)
    tests, trains = (
        to_tensor_batch(take_samples(d, i)) for d, i in ((data["test_data"], rows), (data["train_data"], columns))
    )
    bounds = result.error_bound[rows].astype(np.float64)
    return verify_entries(given, model, rows, columns, tests, trains, bounds, solver["method"])


def require_result_of(job: Job, result: InfluenceResult, data: Mapping[str, ChunkedData]) -> None:
    """Check that the result was made with the job's model and data. Raises FingerprintError.

    Args:
        job: The job.
        result: The result.
        data: The job's data, as `data_of` returns them.
    """
    if job.is_baseline:
        require_same_data(job, result)
    else:
        require_same_inputs(result, job.influence_model()[0], data)


def require_same_inputs(
    result: InfluenceResult, model: InfluenceFunctionModel, data: Mapping[str, ChunkedData]
) -> dict[str, Inspected]:
    """Check that the result was made with this model, this objective and these data, which are looked at.

    Args:
        result: The result.
        model: The influence model.
        data: Name of the data in the result's provenance → the data.

    Returns:
        Name → the data that were looked at.

    Raises:
        FingerprintError: Something differs; the message names it.
    """
    context, quiet = LocalContext("verify", model), Progress(False)
    looked = {name: look(InProcess(), context, chunks, quiet, name) for name, chunks in data.items()}
    here: dict[str, object] = {name: own.sha256 for name, own in looked.items()}
    here |= {"parameters": fingerprint_module(model.risk.module), "forward": structure(model.risk.module)}
    here |= {"objective": to_json(model.objective_settings, "objective")}
    provenance = result.provenance
    recorded = {**provenance["fingerprints"], "forward": provenance.get("structure")}
    recorded |= {"objective": provenance["objective"]}
    other = [name.replace("_", " ") for name, own in here.items() if recorded[name] != own]
    if other:
        raise FingerprintError(
            f"`{result.path}` was made with other {' and '.join(other)} than this job names. Take the job that made it."
        )
    return looked


def _remove(job: Job, scratch: Path, calculator: InfluenceCalculator) -> None:
    """Remove the job's own scratch folder; of one that it names, and may share, what this run left there."""
    if job.scratch is None:
        shutil.rmtree(scratch, ignore_errors=True)  # another process may be faster
        return
    calculator.forget_fit()
    (scratch / "lock").unlink(missing_ok=True)
