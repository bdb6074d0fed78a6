"""From fitted model and data to the result on disk: one solve per test chunk, one gradient pass per train chunk.

1. *Look*: every chunk is loaded once, checked and fingerprinted.
2. *Factors*: those of each test chunk go to a file in the scratch folder, with how far their solve got.
3. *Strips*: one task per train chunk; it makes the chunk's gradients in micro-batches, multiplies them with the factors
   of all test points, and writes one shard, its ranking and its mark. Factors that exceed the resident budget are taken
   in panels, P = ⌈n_test / panel⌉, and the gradients made once for each.

A run that died goes on where it stopped: factors that are on disk are not solved again, marked strips not made again.
"""

import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from distinfluence.errors import ChunkFailedError, StoreNotFoundError
from distinfluence.influence.arrays import Array, to_numpy, to_tensor
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.scores import InfluenceMode
from distinfluence.scaling.chunks import ChunkedData
from distinfluence.scaling.executor import Executor
from distinfluence.scaling.flight import Failures
from distinfluence.scaling.plan import Plan
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.recipe import fingerprint_module
from distinfluence.scaling.share import Share
from distinfluence.scaling.tasks import (
    Inspection,
    Sample,
    chunk_right_hand_sides,
    factor_fields,
    fields_file,
    inspect_chunk,
    make_factor_file,
    save_factors,
    saved_fields,
    solve_chunk,
    stored_fields,
    write_strip,
)
from distinfluence.scaling.worker import Context
from distinfluence.store import InfluenceResult, InfluenceWriter, Layout, open_influences
from distinfluence.store.fingerprint import combine, fingerprint_settings


@dataclass(frozen=True)
class Fitted:
    """What a fit leaves for the stages after it.

    sha256: of the data that was fitted to; sample: what one of them is like.
    """

    model: InfluenceFunctionModel
    context: Context
    executor: Executor
    train: ChunkedData
    sha256: str
    sample: Sample


@dataclass(frozen=True)
class Request:
    """What is asked of a run, beyond the fitted model.

    plan: chunk sizes, panel, and where is solved: "rows" solves each test chunk on one worker, which sweeps the
    training set by itself; "data" solves here and spreads each sweep over the workers. input_shape: of one training
    input for mode "perturbation", else empty. share: the part of the strips to make, of runs that work on one result.
    """

    test: ChunkedData
    columns: ChunkedData
    mode: InfluenceMode
    plan: Plan
    input_shape: tuple[int, ...]
    top_k: int
    mantissa_bits: int
    overwrite: bool
    resume: bool
    attributes: Mapping[str, object]
    share: Share | None = None


def look(executor: Executor, context: Context, data: ChunkedData, progress: Progress, what: str) -> str:
    """Load and check every chunk where it will be used; the sha256 of the data set in these chunks."""
    items = [(chunk, i, data.starts[i], data.sizes[i]) for i, chunk in enumerate(data.chunks)]
    found: dict[str, str] = {}
    with progress.stage(f"look at {what}", len(items), "chunks") as bar:
        for index, inspection in executor.run(inspect_chunk, (context,), items):
            assert isinstance(inspection, Inspection)
            found[str(index)] = inspection.sha256
            bar.advance()
    return combine(found)


def write_influences(
    path: Path, fitted: Fitted, request: Request, scratch: Path, progress: Progress
) -> InfluenceResult:
    """Carry out a request; see the module. Raises FingerprintError if the result there is of another run."""
    columns, test = request.columns, request.test
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
        "test_data": look(fitted.executor, fitted.context, test, progress, "test data"),
        "train_data": fitted.sha256
        if columns is fitted.train
        else look(fitted.executor, fitted.context, columns, progress, "training data"),
    }
    settings: dict[str, object] = {
        "solver": fitted.model.settings(),
        "objective": fitted.model.objective.settings(),
        "mode": str(request.mode),
        "chunks": {"test": list(test.sizes), "train": layout.strip, "panel": panel},
    }
    share = request.share
    with share.alone() if share is not None else nullcontext():
        writer = _writer(path, layout, fingerprints, settings, fitted, request)
    folder = scratch / f"factors-{combine({**fingerprints, 'settings': fingerprint_settings(settings)})[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    pending = writer.pending() if share is None else share.of(writer.pending())
    if pending:
        file = _write_factors(writer, fitted, request, folder, progress)
        with progress.stage("strips", len(pending), "strips") as bar:
            failures: Failures = {}
            items = [(columns.chunks[i], i, columns.starts[i], columns.sizes[i]) for i in pending]
            shared = (fitted.context, writer, file, panel, str(request.mode))
            for _ in fitted.executor.run(write_strip, shared, items, failures):
                bar.advance()
        if failures:
            raise _quarantined(writer, {pending[position]: error for position, error in failures.items()})
    with share.alone() if share is not None else nullcontext():
        if share is not None and writer.pending():
            return open_influences(path)  # whoever makes the last strip finishes
        # also what an earlier run wrote: unlike strips, it may not have reached the disk when the power failed
        _write_all_fields(writer, test, folder)
        writer.finish({"seconds": {name: round(seconds, 3) for name, seconds in progress.seconds.items()}})
        shutil.rmtree(folder, ignore_errors=True)
    return open_influences(path)


def _writer(
    path: Path,
    layout: Layout,
    fingerprints: dict[str, str],
    settings: dict[str, object],
    fitted: Fitted,
    request: Request,
) -> InfluenceWriter:
    if request.resume:
        try:
            return InfluenceWriter.resume(path, layout, fingerprints, settings)
        except StoreNotFoundError:
            pass  # nothing to go on with: begin
    blocks = fitted.model.risk.blocks
    attributes = {
        **request.attributes,
        **settings,
        "fingerprints": fingerprints,
        "parameters": {
            "covered": blocks.size,
            "total": blocks.n_total,
            "coverage": blocks.coverage,
            "uncovered": list(blocks.uncovered),
        },
        "n_fit": fitted.train.n_samples,
        "remarks": list(fitted.model.fit_report.remarks),
        "error_bound": fitted.model.kind_of_bound,
        "versions": {name: version(name) for name in ("torch", "dask", "distributed", "zarr", "numpy")}
        | {"python": platform.python_version()},
    }
    return InfluenceWriter.create(path, layout, attributes, overwrite=request.overwrite)


def _quarantined(writer: InfluenceWriter, failures: Mapping[int, Exception]) -> ChunkFailedError:
    """What to raise when all other strips are written; the strips are marked, and tried again by a resumed run."""
    reasons = {strip: f"{type(error).__name__}: {error}" for strip, error in sorted(failures.items())}
    writer.quarantine(reasons)
    listed = "\n  ".join(f"strip {strip}: {reason}" for strip, reason in [*reasons.items()][:10])
    return ChunkFailedError(
        f"{len(reasons)} of {writer.layout.n_strips} strips failed every time they were tried and were set apart, all "
        f"others are written:\n  {listed}\nMend these samples or their loading, then go on with resume."
    )


def _write_all_fields(writer: InfluenceWriter, test: ChunkedData, folder: Path) -> None:
    """What is known of the test points, from the scratch folder."""
    for start, size in zip(test.starts, test.sizes, strict=True):
        if fields_file(str(folder / "factors.npy"), start).is_file():  # else the last one was here before
            fields = saved_fields(str(folder / "factors.npy"), start)
            writer.write_test(slice(start, start + size), **stored_fields(fields, writer.layout))


def _share_factors(fitted: Fitted, request: Request, share: Share, file: str, progress: Progress) -> None:
    """Factors that nobody has made yet, beginning elsewhere in each run, so that runs at the same time share them."""
    test = request.test
    with progress.stage("factors", test.n_samples, "test points") as bar:
        for i in share.turned(range(len(test.sizes))):
            if not fields_file(file, test.starts[i]).is_file():
                item = (test.chunks[i], file, i, test.starts[i], test.sizes[i])
                for _ in fitted.executor.run(solve_chunk, (fitted.context,), [item]):
                    pass
            bar.advance(test.sizes[i])


def _write_factors(writer: InfluenceWriter, fitted: Fitted, request: Request, folder: Path, progress: Progress) -> str:
    test, model = request.test, fitted.model
    file = folder / "factors.npy"
    dtype = to_numpy(torch.empty(0, dtype=model.risk.dtype)).dtype
    share = request.share
    with share.alone() if share is not None else nullcontext():
        make_factor_file(file, test.n_samples, model.n_parameters, dtype)
    if share is not None:
        _share_factors(fitted, request, share, str(file), progress)
        return str(file)
    made = [fields_file(str(file), start).is_file() for start in test.starts]
    waiting = [i for i, there in enumerate(made) if not there]
    with progress.stage("factors", test.n_samples, "test points") as bar:

        def done(index: int, fields: Mapping[str, Array]) -> None:
            rows = slice(test.starts[index], test.starts[index] + test.sizes[index])
            writer.write_test(rows, **stored_fields(fields, writer.layout))
            bar.advance(test.sizes[index])

        for index, there in enumerate(made):
            if there:
                done(index, saved_fields(str(file), test.starts[index]))
        if request.plan.solve == "rows":
            items = [(test.chunks[i], str(file), i, test.starts[i], test.sizes[i]) for i in waiting]
            for position, fields in fitted.executor.run(solve_chunk, (fitted.context,), items):
                done(waiting[position], fields)
        else:
            _solve_here(fitted, request, str(file), waiting, done, bar.note)
    return str(file)


def _solve_here(
    fitted: Fitted,
    request: Request,
    file: str,
    waiting: list[int],
    done: Callable[[int, Mapping[str, Array]], None],
    note: Callable[[str], None],
) -> None:
    """Gradients of the test chunks from the workers, one solve for each, its sweeps spread over the workers."""
    plane = fitted.model.plane
    before = plane.passes
    plane.on_pass = lambda: note(f"{plane.passes - before} passes")
    items = [(request.test.chunks[i], i, request.test.starts[i], request.test.sizes[i]) for i in waiting]
    try:
        for position, sides in fitted.executor.run(chunk_right_hand_sides, (fitted.context,), items):
            with torch.no_grad():
                factors, report = fitted.model.solve(to_tensor(sides["rows"]).to(fitted.model.risk.device))
            fields = factor_fields(factors, report, sides["loss"], sides["gradient_norm"])
            save_factors(file, request.test.starts[waiting[position]], np.asarray(to_numpy(factors)), fields)
            done(waiting[position], fields)
    finally:
        plane.on_pass = None
