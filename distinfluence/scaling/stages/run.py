"""From fitted model and data to the result on disk: one solve per test chunk, one gradient pass per train chunk.

1. *Look*: every chunk is loaded once, checked and fingerprinted.
2. *Factors*: those of each test chunk go to a file in the scratch folder, with how far their solve got.
3. *Strips*: one task per train chunk; it makes the chunk's gradients in micro-batches, multiplies them with the factors
   of all test points, and writes one shard, its ranking and its mark. Factors that exceed the resident budget are taken
   in panels, P = ⌈n_test / panel⌉, and the gradients made once for each.
4. *Extras*, if asked for: self-influences, and what ranked influences are made of (`contributions`).

A run that died goes on where it stopped: factors that are on disk are not solved again, marked strips not made again.
Factors have checksums; those that are not as they were written are solved again.
"""

import json
import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from distinfluence.atomic import appearing
from distinfluence.errors import StoreNotFoundError
from distinfluence.model.identity.probe import Probe
from distinfluence.model.identity.structure import structure
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.run_options import ExistingResult, RunOptions
from distinfluence.scaling.scratch import scratch_errors
from distinfluence.scaling.stages.contributions import write_pairs
from distinfluence.scaling.stages.factors import write_all_fields, write_factors
from distinfluence.scaling.stages.inspect import look
from distinfluence.scaling.stages.probe import require_same_probe
from distinfluence.scaling.stages.request import FittedRun, Request, Run
from distinfluence.scaling.stages.self_influence import write_self_influences
from distinfluence.scaling.stages.strips import write_strips
from distinfluence.store import InfluenceResult, InfluenceWriter, Layout, mend, open_influences
from distinfluence.store.format.fingerprint import combine, fingerprint_settings
from distinfluence.store.format.remote import RemoteFolder

FACTORS_FORMAT = 2  # of their files in the scratch folder; those of another are not taken


def write_influences(
    path: Path | RemoteFolder, fitted: FittedRun, request: Request, scratch: Path, progress: Progress
) -> InfluenceResult:
    """Carry out a request; see the module. Raises FingerprintError if the result there is of another run."""
    run = _begin(path, fitted, request, scratch, progress)
    if run.pending:
        write_factors(run)
        write_strips(run)
    with run.partition.alone():
        _finish(run)
    return open_influences(path)


def _begin(path: Path | RemoteFolder, fitted: FittedRun, request: Request, scratch: Path, progress: Progress) -> Run:
    """Look at the data, begin the result or open it, and find the folder of its factors."""
    seen = look(fitted.executor, fitted.context, request.test, progress, "test data")
    columns, train_sha256 = fitted.train, fitted.sha256
    if request.columns is not fitted.train:
        also = look(fitted.executor, fitted.context, request.columns, progress, "training data")
        columns, train_sha256 = also.data, also.sha256
    request = replace(request, test=seen.data, columns=columns)
    options, plan, module = request.options, request.plan, fitted.model.risk.module
    layout = Layout(
        n_test=seen.data.n_samples,
        n_train=columns.n_samples,
        strip=min(columns.strip, columns.n_samples),
        input_shape=fitted.sample.entry_shape(options.mode),
        top_k=options.top_k,
        mantissa_bits=options.mantissa_bits,
    )
    fingerprints = {
        "parameters": fingerprint_module(module),
        "fit_data": fitted.sha256,
        "test_data": seen.sha256,
        "train_data": train_sha256,
    }
    chunks = {"test": list(seen.data.sizes), "train": layout.strip, "panel": plan.chunks.panel, "solve": plan.solve}
    settings: dict[str, object] = {
        "solver": fitted.model.settings(),
        "objective": fitted.model.objective_settings,
        "structure": structure(module),
        "mode": str(options.mode),
        # where is solved is an arithmetic of its own, and "auto" decides it by the workers that there are
        "chunks": chunks,
    }
    with request.partition.alone():
        writer = _writer(path, layout, fingerprints, settings, fitted, options)
        if options.existing is ExistingResult.REPAIR and (damage := mend(writer)):
            progress.warn(f"{damage} of {path} are damaged and made again.")
    belongs = {**fingerprints, "settings": fingerprint_settings({**settings, "format": FACTORS_FORMAT})}
    with scratch_errors(scratch, "factors"):
        folder = _own_folder(scratch / f"factors-{combine(belongs)[:16]}", fitted.probe)
    return Run(fitted, request, writer, folder, request.partition, progress)


def _finish(run: Run) -> None:
    """Complete the result, then add the extras: a failure there leaves a complete result, and can be resumed."""
    if run.writer.pending():
        return  # whoever makes the last strip finishes
    run = replace(run, partition=Partition.whole())  # the lock is held already
    write_all_fields(run)
    run.writer.finish({"seconds": {name: round(seconds, 3) for name, seconds in run.progress.seconds.items()}})
    write_self_influences(run)
    write_pairs(run)
    shutil.rmtree(run.folder, ignore_errors=True)


def _own_folder(named: Path, probe: Probe) -> Path:
    """Return the folder for the factors of a model; another one where that belongs to a different model.

    Each folder names its model before it has factors. Folders of other models are left alone: their runs may
    be at work.
    """
    number = 0
    while True:
        number += 1
        folder = named if number == 1 else named.with_name(f"{named.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "probe.json"
        if not file.is_file():
            with appearing(file) as partial:
                partial.write_text(json.dumps(probe.to_json()))
        if not probe.differences(Probe.from_json(json.loads(file.read_text()))):
            return folder


def _writer(
    path: Path | RemoteFolder,
    layout: Layout,
    fingerprints: dict[str, str],
    settings: dict[str, object],
    fitted: FittedRun,
    options: RunOptions,
) -> InfluenceWriter:
    if options.resumes:
        try:
            writer = InfluenceWriter.resume(path, layout, fingerprints, settings)
            require_same_probe(open_influences(path).provenance, fitted.probe, path)
            return writer
        except StoreNotFoundError:
            pass  # nothing to go on with: begin
    blocks = fitted.model.risk.blocks
    attributes = {
        **options.attributes,
        **settings,
        "fingerprints": fingerprints,
        "probe": fitted.probe.to_json(),
        "parameters": {
            "covered": blocks.size,
            "total": blocks.n_total,
            "coverage": blocks.coverage,
            "uncovered": list(blocks.uncovered),
        },
        "model": {"class": f"{(kind := type(fitted.model.risk.module)).__module__}.{kind.__qualname__}"},
        "n_fit": fitted.train.n_samples,
        "remarks": list(fitted.model.fit_report.remarks),
        "error_bound": fitted.model.kind_of_bound,
        "versions": {name: version(name) for name in ("torch", "dask", "distributed", "zarr", "numpy")}
        | {"python": platform.python_version()},
    }
    return InfluenceWriter.create(path, layout, attributes, overwrite=options.replaces)
