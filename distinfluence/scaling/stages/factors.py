"""The factors of all test points: solved by chunks of test points or over the data, once."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from distinfluence.errors import (
    ChunkFailedError,
)
from distinfluence.influence.arrays import Array, to_numpy, to_tensor, to_tensor_batch
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.dispatch.agenda import Failures
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.stages.factor_file import (
    factor_fields,
    fields_file,
    make_factor_file,
    save_factors,
    saved_fields,
    stored_fields,
)
from distinfluence.scaling.stages.inspect import listed, reasons_of
from distinfluence.scaling.stages.request import FittedRun, Request
from distinfluence.scaling.worker.cache import Chunk, load, named_samples, samples_of
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store import InfluenceWriter


def _unsolved(test: ChunkedData, failures: Failures) -> ChunkFailedError:
    """What to raise when the factors of all other test chunks are made: a strip needs them all."""
    return ChunkFailedError(
        f"{len(failures)} of {len(test.sizes)} test chunks failed every time they were tried, the factors of all "
        f"others are made:\n  {listed(reasons_of(test, failures).values())}\nMend these test samples or their "
        "loading, then go on with resume."
    )


def write_all_fields(
    writer: InfluenceWriter, fitted: FittedRun, request: Request, folder: Path, progress: Progress
) -> None:
    """What is known of the test points, once more and whole: a power failure may have torn what was written before."""
    fields = _all_fields(request.test, folder)
    if fields is None and not writer.knows_tests():
        write_factors(writer, fitted, request, folder, progress)
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
    fitted: FittedRun, test: ChunkedData, file: str, chunks: Iterable[int], progress: Progress
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


def _share_factors(fitted: FittedRun, request: Request, partition: Partition, file: str, progress: Progress) -> None:
    """Factors that nobody has made yet, beginning elsewhere in each run, so that runs at the same time share them."""
    test, failures = request.test, Failures()
    with progress.stage("factors", test.n_samples, "test points") as bar:
        for i in partition.turned(range(len(test.sizes))):
            if not _made(fitted, test, file, [i], progress):
                item, failed = (test.chunks[i], file, i, test.starts[i], test.sizes[i]), Failures()
                for _ in fitted.executor.run(solve_chunk, (fitted.context,), [item], failed):
                    pass
                failures.update((i, error) for error in failed.values())
            bar.advance(test.sizes[i])
    if failures:
        raise _unsolved(test, failures)


def write_factors(
    writer: InfluenceWriter, fitted: FittedRun, request: Request, folder: Path, progress: Progress
) -> str:
    """Solve for every test point whose factors are not there yet; returns the name of the factors' file."""
    test, model = request.test, fitted.model
    file = folder / "factors.npy"
    dtype = to_numpy(torch.empty(0, dtype=model.risk.dtype)).dtype
    partition = request.partition
    with partition.alone() if partition is not None else nullcontext():
        make_factor_file(file, test.n_samples, model.n_parameters, dtype)
    if partition is not None:
        _share_factors(fitted, request, partition, str(file), progress)
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
    fitted: FittedRun,
    request: Request,
    file: str,
    waiting: list[int],
    failed: Failures,
    done: Callable[[int, Mapping[str, Array]], None],
    note: Callable[[str], None],
) -> None:
    """Gradients of the test chunks from the workers, one solve for each, its sweeps spread over the workers."""
    reducer = fitted.model.reducer
    before = reducer.passes
    reducer.on_pass = lambda: note(f"{reducer.passes - before} passes")
    items = [(request.test.chunks[i], i, request.test.starts[i], request.test.sizes[i]) for i in waiting]
    try:
        for position, sides in fitted.executor.run(chunk_right_hand_sides, (fitted.context,), items, failed):
            with torch.no_grad():
                factors, report = fitted.model.solve(to_tensor(sides["rows"]).to(fitted.model.risk.device))
            fields = factor_fields(factors, report, sides["loss"], sides["gradient_norm"])
            save_factors(file, request.test.starts[waiting[position]], np.asarray(to_numpy(factors)), fields)
            done(waiting[position], fields)
    finally:
        reducer.on_pass = None


def solve_chunk(context: Context, chunk: Chunk, file: str, index: int, start: int, size: int) -> dict[str, Array]:
    """Factors of a test chunk, solved in this process and written to their rows of a file; what the result keeps."""
    made = saved_fields(file, start)
    if made is not None:  # the worker that made them died before its answer was fetched
        return made
    with logged_task("solve", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        factors, report = model.solve(gradients.rows)
        fields = factor_fields(factors, report, to_numpy(gradients.values), to_numpy(gradients.norms))
        save_factors(file, start, to_numpy(factors), fields)
        return fields


def chunk_right_hand_sides(context: Context, chunk: Chunk, index: int, start: int, size: int) -> dict[str, Array]:
    """Measurement gradients [n, p] of a test chunk with the measurements, for a solve elsewhere."""
    with logged_task("right-hand sides", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        return {
            "rows": to_numpy(gradients.rows),
            "loss": to_numpy(gradients.values),
            "gradient_norm": to_numpy(gradients.norms),
        }
