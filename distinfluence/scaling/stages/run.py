"""From fitted model and data to the result on disk: one solve per test chunk, one gradient pass per train chunk.

1. *Look*: every chunk is loaded once, checked and fingerprinted.
2. *Factors*: those of each test chunk go to a file in the scratch folder, with how far their solve got.
3. *Strips*: one task per train chunk; it makes the chunk's gradients in micro-batches, multiplies them with the factors
   of all test points, and writes one shard, its ranking and its mark. Factors that exceed the resident budget are taken
   in panels, P = ⌈n_test / panel⌉, and the gradients made once for each.

4. *Extras*, if asked for: self-influences, and what ranked influences are made of (`own_influence`, `taking_apart`).

A run that died goes on where it stopped: factors that are on disk are not solved again, marked strips not made again.
Factors have checksums; those that are not as they were written are solved again.
"""

import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from distinfluence.atomic import appearing
from distinfluence.errors import (
    ChunkFailedError,
    StoreNotFoundError,
)
from distinfluence.model.identity.probe import Probe
from distinfluence.model.identity.structure import structure
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.scaling.dispatch.agenda import Failures
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.scratch import scratch_errors
from distinfluence.scaling.stages.contributions import RankedPairs, take_apart
from distinfluence.scaling.stages.factor_file import (
    fields_file,
)
from distinfluence.scaling.stages.factors import write_all_fields, write_factors
from distinfluence.scaling.stages.inspect import listed, look, reasons_of
from distinfluence.scaling.stages.probe import require_same_probe
from distinfluence.scaling.stages.request import FittedRun, Request
from distinfluence.scaling.stages.self_influence import write_self_influences
from distinfluence.scaling.stages.strips import write_strip
from distinfluence.store import InfluenceResult, InfluenceWriter, Layout, mend, open_influences
from distinfluence.store.format.fingerprint import combine, fingerprint_settings
from distinfluence.store.format.remote import RemoteFolder

FACTORS_FORMAT = 2  # of their files in the scratch folder; those of another are not taken


def write_influences(
    path: Path | RemoteFolder, fitted: FittedRun, request: Request, scratch: Path, progress: Progress
) -> InfluenceResult:
    """Carry out a request; see the module. Raises FingerprintError if the result there is of another run."""
    executor, context = fitted.executor, fitted.context
    seen = look(executor, context, request.test, progress, "test data")
    columns, train_sha256 = fitted.train, fitted.sha256
    if request.columns is not fitted.train:
        also = look(executor, context, request.columns, progress, "training data")
        columns, train_sha256 = also.data, also.sha256
    request = replace(request, test=seen.data, columns=columns)
    test = request.test
    layout = Layout(
        n_test=test.n_samples,
        n_train=columns.n_samples,
        strip=min(columns.strip, columns.n_samples),
        input_shape=request.input_shape,
        top_k=request.top_k,
        mantissa_bits=request.mantissa_bits,
    )
    panel = request.plan.chunks.panel
    fingerprints = {
        "parameters": fingerprint_module(fitted.model.risk.module),
        "fit_data": fitted.sha256,
        "test_data": seen.sha256,
        "train_data": train_sha256,
    }
    settings: dict[str, object] = {
        "solver": fitted.model.settings(),
        "objective": fitted.model.objective_settings,
        "structure": structure(fitted.model.risk.module),
        "mode": str(request.mode),
        # where is solved is an arithmetic of its own, and "auto" decides it by the workers that there are
        "chunks": {"test": list(test.sizes), "train": layout.strip, "panel": panel, "solve": request.plan.solve},
    }
    partition = request.partition
    with partition.alone() if partition is not None else nullcontext():
        writer = _writer(path, layout, fingerprints, settings, fitted, request)
        if request.check and (damage := mend(writer)):
            progress.warn(f"{damage} of {path} are damaged and made again.")
    belongs = {**fingerprints, "settings": fingerprint_settings({**settings, "format": FACTORS_FORMAT})}
    with scratch_errors(scratch, "factors"):
        folder = _own_folder(scratch / f"factors-{combine(belongs)[:16]}", fitted.probe)
    pending = writer.pending() if partition is None else partition.of(writer.pending())
    if pending:
        file = write_factors(writer, fitted, request, folder, progress)
        with progress.stage("strips", len(pending), "strips") as bar:
            failures: Failures = {}
            items = [(columns.chunks[i], i, columns.starts[i], columns.sizes[i]) for i in pending]
            shared = (fitted.context, writer, file, panel, str(request.mode))
            for _ in fitted.executor.run(write_strip, shared, items, failures):
                bar.advance()
        if failures:
            named = reasons_of(columns, {pending[position]: error for position, error in failures.items()})
            raise _quarantined(writer, named)
    with partition.alone() if partition is not None else nullcontext():
        if partition is not None and writer.pending():
            return open_influences(path)  # whoever makes the last strip finishes
        write_all_fields(writer, fitted, replace(request, partition=None), folder, progress)
        writer.finish({"seconds": {name: round(seconds, 3) for name, seconds in progress.seconds.items()}})
        _write_extras(writer, fitted, request, folder, progress)
        shutil.rmtree(folder, ignore_errors=True)
    return open_influences(path)


def _own_folder(named: Path, probe: Probe) -> Path:
    """The folder for the factors of a model; another one beside it where that is of one that computes something else.

    Each names its model before it has factors, and is left alone by others: they may be at work.
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


def _write_extras(
    writer: InfluenceWriter, fitted: FittedRun, request: Request, folder: Path, progress: Progress
) -> None:
    """What is asked for beyond the matrix, after it: a failure here leaves a complete result, and can be resumed."""
    if request.self_influence:
        group = min(request.plan.chunks.test, request.columns.strip)
        write_self_influences(fitted, writer, request.columns, group, progress)
    k = min(request.contributions, writer.layout.k)
    if k and open_influences(writer.path).n_contributions != k:
        file = folder / "factors.npy"
        if not all(fields_file(str(file), start).is_file() for start in request.test.starts):
            write_factors(writer, fitted, replace(request, partition=None), folder, progress)  # a lock is held already
        take_apart(fitted, writer, request.columns, RankedPairs.of(writer, k), str(file), progress)
        writer.note(progress.seconds)


def _writer(
    path: Path | RemoteFolder,
    layout: Layout,
    fingerprints: dict[str, str],
    settings: dict[str, object],
    fitted: FittedRun,
    request: Request,
) -> InfluenceWriter:
    if request.resume:
        try:
            writer = InfluenceWriter.resume(path, layout, fingerprints, settings)
            require_same_probe(open_influences(path).provenance, fitted.probe, path)
            return writer
        except StoreNotFoundError:
            pass  # nothing to go on with: begin
    blocks = fitted.model.risk.blocks
    attributes = {
        **request.attributes,
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
    return InfluenceWriter.create(path, layout, attributes, overwrite=request.overwrite)


def _quarantined(writer: InfluenceWriter, reasons: Mapping[int, str]) -> ChunkFailedError:
    """What to raise when all other strips are written; the strips are marked, and tried again by a resumed run."""
    writer.quarantine(reasons)
    return ChunkFailedError(
        f"{len(reasons)} of {writer.layout.n_strips} strips failed every time they were tried and were set apart, all "
        f"others are written:\n  {listed(reasons.values())}\nMend these training samples or their loading, then go on "
        "with resume."
    )
