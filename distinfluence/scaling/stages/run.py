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
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distinfluence.errors import (
    ChunkFailedError,
    DistinfluenceError,
    FingerprintError,
    NonDeterministicDataError,
    StoreNotFoundError,
)
from distinfluence.influence.arrays import Array, to_numpy, to_tensor, to_tensor_batch
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.scores import InfluenceMode
from distinfluence.model.batch import Batch
from distinfluence.model.counter_random import sample_keys
from distinfluence.model.identity.draw import Draw, Place, grouped, sample_of
from distinfluence.model.identity.probe import Probe
from distinfluence.model.identity.structure import structure
from distinfluence.model.reducer import OTHER_VALUES
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.scaling.dispatch.dispatcher import Failures
from distinfluence.scaling.dispatch.executor import Executor
from distinfluence.scaling.partition import Share
from distinfluence.scaling.plan.plan import Plan
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.scratch import appearing, scratch_errors
from distinfluence.scaling.stages.contributions import RankedPairs, take_apart
from distinfluence.scaling.stages.self_influence import write_self_influences
from distinfluence.scaling.stages.strips import (
    Inspection,
    Sample,
    chunk_right_hand_sides,
    factor_fields,
    fields_file,
    inspect_chunk,
    make_factor_file,
    read_again,
    save_factors,
    saved_fields,
    solve_chunk,
    stored_fields,
    write_strip,
)
from distinfluence.scaling.worker.context import Context, samples_of
from distinfluence.store import InfluenceResult, InfluenceWriter, Layout, mend, open_influences
from distinfluence.store.format.fingerprint import combine, fingerprint_settings
from distinfluence.store.format.remote import RemoteFolder

FACTORS_FORMAT = 2  # of their files in the scratch folder; those of another are not taken


@dataclass(frozen=True)
class Fitted:
    """What a fit leaves for the stages after it.

    sha256: of the data that was fitted to; sample: what one of them is like; probe: what the model makes of some.
    """

    model: InfluenceFunctionModel
    context: Context
    executor: Executor
    train: ChunkedData
    sha256: str
    sample: Sample
    probe: Probe


@dataclass(frozen=True)
class Request:
    """What is asked of a run, beyond the fitted model.

    plan: chunk sizes, panel, and where is solved: "rows" solves each test chunk on one worker, which sweeps the
    training set by itself; "data" solves here and spreads each sweep over the workers. input_shape: of one training
    input for mode "perturbation", else empty. check: read what is there of a run that goes on, and make anew what is
    damaged. share: the part of the strips to make, of runs that work on one result.
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
    contributions: int = 0
    self_influence: bool = False
    check: bool = False
    share: Share | None = None


@dataclass(frozen=True)
class Looked:
    """A data set that was looked at. data: with the fingerprint of each chunk; sha256: of it all, in these chunks."""

    data: ChunkedData
    sha256: str
    draw: Draw


def look(executor: Executor, context: Context, data: ChunkedData, progress: Progress, what: str) -> Looked:
    """Load and check every chunk where it will be used.

    All chunks are looked at before the bad ones are named: raises the error of the only one, the common kind of error
    of several, else ChunkFailedError.
    """
    items = [(chunk, i, data.starts[i], data.sizes[i]) for i, chunk in enumerate(data.chunks)]
    found: dict[int, Inspection] = {}
    with progress.stage(f"look at {what}", len(items), "chunks") as bar:
        failures: Failures = {}
        for index, inspection in executor.run(inspect_chunk, (context,), items, failures):
            assert isinstance(inspection, Inspection)
            found[index] = inspection
            bar.advance()
    if failures:
        kinds = {type(error) for error in failures.values()}
        kind = kinds.pop() if len(kinds) == 1 else ChunkFailedError
        kind = kind if issubclass(kind, DistinfluenceError) else ChunkFailedError
        first, *others = _reasons(data, failures).values()
        if not others:
            raise kind(first) from next(iter(failures.values()))
        raise kind(f"{len(failures)} of {len(items)} chunks of {what}:\n  " + _listed([first, *others]))
    whole = combine({str(index): inspection.sha256 for index, inspection in found.items()})
    ordered = [found[index] for index in range(len(items))]
    draw = sum((inspection.draw for inspection in ordered), Draw())
    return Looked(data.looked_at([inspection.sha256 for inspection in ordered]), whole, draw)


def drawn_samples(executor: Executor, risk: SampleRisk, looked: Looked) -> list[Batch]:
    """The drawn samples, read once more, joined where their shapes allow and placed.

    Raises NonDeterministicDataError where they are not what they were: the data set draws random numbers, or each
    process builds another one.
    """
    by_chunk: dict[int, list[int]] = {}
    for chunk, index in looked.draw.places:
        by_chunk.setdefault(chunk, []).append(index)
    chunks = list(by_chunk)
    samples: dict[Place, Batch] = {}
    for position, arrays in executor.run(read_again, (), [(looked.data.chunks[c], by_chunk[c]) for c in chunks]):
        batch = risk.place(to_tensor_batch(arrays))
        for number, index in enumerate(by_chunk[chunks[position]]):
            samples[chunks[position], index] = sample_of(batch, number)
    for (chunk, index), key in looked.draw.places.items():
        if int(sample_keys(samples[chunk, index])) != key:
            where = f"the data set (sample {looked.data.starts[chunk] + index})"
            raise NonDeterministicDataError(OTHER_VALUES.format(what=where))
    return grouped([samples[place] for place in looked.draw.places])


def _reasons(data: ChunkedData, failures: Failures) -> dict[int, str]:
    """Why each chunk failed, with its samples."""
    reasons = {}
    for i, error in sorted(failures.items()):
        named = samples_of(i, data.starts[i], data.sizes[i])
        text = str(error) if isinstance(error, DistinfluenceError) else f"{type(error).__name__}: {error}"
        reasons[i] = text if text.startswith(named) else f"{named}: {text}"
    return reasons


def _listed(reasons: Iterable[str]) -> str:
    some = [*reasons]
    return "\n  ".join([*some[:10], *(["…"] if len(some) > 10 else [])])


def write_influences(
    path: Path | RemoteFolder, fitted: Fitted, request: Request, scratch: Path, progress: Progress
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
    share = request.share
    with share.alone() if share is not None else nullcontext():
        writer = _writer(path, layout, fingerprints, settings, fitted, request)
        if request.check and (damage := mend(writer)):
            progress.warn(f"{damage} of {path} are damaged and made again.")
    belongs = {**fingerprints, "settings": fingerprint_settings({**settings, "format": FACTORS_FORMAT})}
    with scratch_errors(scratch, "factors"):
        folder = _own_folder(scratch / f"factors-{combine(belongs)[:16]}", fitted.probe)
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
            named = _reasons(columns, {pending[position]: error for position, error in failures.items()})
            raise _quarantined(writer, named)
    with share.alone() if share is not None else nullcontext():
        if share is not None and writer.pending():
            return open_influences(path)  # whoever makes the last strip finishes
        _write_all_fields(writer, fitted, replace(request, share=None), folder, progress)
        writer.finish({"seconds": {name: round(seconds, 3) for name, seconds in progress.seconds.items()}})
        _write_extras(writer, fitted, request, folder, progress)
        shutil.rmtree(folder, ignore_errors=True)
    return open_influences(path)


def require_same_probe(recorded: Mapping[str, Any], here: Probe, path: object) -> None:
    """Raise FingerprintError if a result was made with a model or an objective that computes something else."""
    differences = here.differences(Probe.from_json(recorded["probe"]))
    if differences:
        raise FingerprintError(
            f"`path` {path} was made with a model or an objective that computes something else: "
            f"{'; '.join(differences)}. Take the model and the objective that it was begun with, write to another "
            "path, or pass overwrite=True to start again."
        )


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


def _write_extras(writer: InfluenceWriter, fitted: Fitted, request: Request, folder: Path, progress: Progress) -> None:
    """What is asked for beyond the matrix, after it: a failure here leaves a complete result, and can be resumed."""
    if request.self_influence:
        group = min(request.plan.chunks.test, request.columns.strip)
        write_self_influences(fitted, writer, request.columns, group, progress)
    k = min(request.contributions, writer.layout.k)
    if k and open_influences(writer.path).n_contributions != k:
        file = folder / "factors.npy"
        if not all(fields_file(str(file), start).is_file() for start in request.test.starts):
            _write_factors(writer, fitted, replace(request, share=None), folder, progress)  # a lock is held already
        take_apart(fitted, writer, request.columns, RankedPairs.of(writer, k), str(file), progress)
        writer.note(progress.seconds)


def _writer(
    path: Path | RemoteFolder,
    layout: Layout,
    fingerprints: dict[str, str],
    settings: dict[str, object],
    fitted: Fitted,
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
        f"others are written:\n  {_listed(reasons.values())}\nMend these training samples or their loading, then go on "
        "with resume."
    )


def _unsolved(test: ChunkedData, failures: Failures) -> ChunkFailedError:
    """What to raise when the factors of all other test chunks are made: a strip needs them all."""
    return ChunkFailedError(
        f"{len(failures)} of {len(test.sizes)} test chunks failed every time they were tried, the factors of all "
        f"others are made:\n  {_listed(_reasons(test, failures).values())}\nMend these test samples or their "
        "loading, then go on with resume."
    )


def _write_all_fields(
    writer: InfluenceWriter, fitted: Fitted, request: Request, folder: Path, progress: Progress
) -> None:
    """What is known of the test points, once more and whole: a power failure may have torn what was written before."""
    fields = _all_fields(request.test, folder)
    if fields is None and not writer.knows_tests():
        _write_factors(writer, fitted, request, folder, progress)
        fields = _all_fields(request.test, folder)
    if fields is not None:
        writer.write_test(slice(0, writer.layout.n_test), **stored_fields(fields, writer.layout))


def _all_fields(test: ChunkedData, folder: Path) -> dict[str, Array] | None:
    """The fields of all test points, None if those of some are not there."""
    parts = [saved_fields(str(folder / "factors.npy"), start, check=False) for start in test.starts]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    return {name: np.concatenate([part[name] for part in whole]) for name in whole[0]}


def _made(
    fitted: Fitted, test: ChunkedData, file: str, chunks: Iterable[int], progress: Progress
) -> dict[int, Mapping[str, Array]]:
    """Of these test chunks those whose factors are there and as they were written, with their fields."""
    there = [i for i in chunks if fields_file(file, test.starts[i]).is_file()]
    found, items = dict[int, Mapping[str, Array]](), [(file, test.starts[i]) for i in there]
    for position, fields in fitted.executor.run(saved_fields, (), items):
        if fields is None:
            damaged = samples_of(there[position], test.starts[there[position]], test.sizes[there[position]])
            progress.warn(f"the factors of test {damaged} in {Path(file).parent} are damaged: solved again.")
        else:
            found[there[position]] = fields
    return found


def _share_factors(fitted: Fitted, request: Request, share: Share, file: str, progress: Progress) -> None:
    """Factors that nobody has made yet, beginning elsewhere in each run, so that runs at the same time share them."""
    test, failures = request.test, Failures()
    with progress.stage("factors", test.n_samples, "test points") as bar:
        for i in share.turned(range(len(test.sizes))):
            if not _made(fitted, test, file, [i], progress):
                item, failed = (test.chunks[i], file, i, test.starts[i], test.sizes[i]), Failures()
                for _ in fitted.executor.run(solve_chunk, (fitted.context,), [item], failed):
                    pass
                failures.update((i, error) for error in failed.values())
            bar.advance(test.sizes[i])
    if failures:
        raise _unsolved(test, failures)


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
    made = _made(fitted, test, str(file), range(len(test.sizes)), progress)
    waiting, failed = [i for i in range(len(test.sizes)) if i not in made], Failures()
    with progress.stage("factors", test.n_samples, "test points") as bar:

        def done(index: int, fields: Mapping[str, Array]) -> None:
            rows = slice(test.starts[index], test.starts[index] + test.sizes[index])
            writer.write_test(rows, **stored_fields(fields, writer.layout))
            bar.advance(test.sizes[index])

        for index, fields in made.items():
            done(index, fields)
        if request.plan.solve == "rows":
            items = [(test.chunks[i], str(file), i, test.starts[i], test.sizes[i]) for i in waiting]
            for position, fields in fitted.executor.run(solve_chunk, (fitted.context,), items, failed):
                done(waiting[position], fields)
        else:
            _solve_here(fitted, request, str(file), waiting, failed, done, bar.note)
    if failed:
        raise _unsolved(test, {waiting[position]: error for position, error in failed.items()})
    return str(file)


def _solve_here(
    fitted: Fitted,
    request: Request,
    file: str,
    waiting: list[int],
    failed: Failures,
    done: Callable[[int, Mapping[str, Array]], None],
    note: Callable[[str], None],
) -> None:
    """Gradients of the test chunks from the workers, one solve for each, its sweeps spread over the workers."""
    plane = fitted.model.plane
    before = plane.passes
    plane.on_pass = lambda: note(f"{plane.passes - before} passes")
    items = [(request.test.chunks[i], i, request.test.starts[i], request.test.sizes[i]) for i in waiting]
    try:
        for position, sides in fitted.executor.run(chunk_right_hand_sides, (fitted.context,), items, failed):
            with torch.no_grad():
                factors, report = fitted.model.solve(to_tensor(sides["rows"]).to(fitted.model.risk.device))
            fields = factor_fields(factors, report, sides["loss"], sides["gradient_norm"])
            save_factors(file, request.test.starts[waiting[position]], np.asarray(to_numpy(factors)), fields)
            done(waiting[position], fields)
    finally:
        plane.on_pass = None
