"""The factors of all test points: solved by chunks of test points or over the data, once."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from distinfluence.errors import (
    ChunkFailedError,
)
from distinfluence.influence.arrays import Array, to_numpy, to_tensor, to_tensor_batch
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.dispatch.agenda import Failures
from distinfluence.scaling.stages.factor_file import (
    factor_fields,
    fields_file,
    make_factor_file,
    save_factors,
    saved_fields,
    stored_fields,
)
from distinfluence.scaling.stages.inspect import listed, reasons_of
from distinfluence.scaling.stages.request import Run
from distinfluence.scaling.worker.cache import Chunk, load, named_samples, samples_of
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task


def _unsolved(test: ChunkedData, failures: Failures) -> ChunkFailedError:
    """Return what to raise when the factors of all other test chunks are made: a strip needs them all."""
    return ChunkFailedError(
        f"{len(failures)} of {len(test.sizes)} test chunks failed every time they were tried, the factors of all "
        f"others are made:\n  {listed(reasons_of(test, failures).values())}\nMend these test samples or their "
        "loading, then go on with resume."
    )


def write_all_fields(run: Run) -> None:
    """Write all fields of the test points again: a power failure may have torn what was written before."""
    fields = _all_fields(run)
    if fields is None and not run.writer.knows_tests():
        write_factors(run)
        fields = _all_fields(run)
    if fields is not None:
        run.writer.write_test(slice(0, run.writer.layout.n_test), **stored_fields(fields, run.writer.layout))


def _all_fields(run: Run) -> dict[str, Array] | None:
    """Return the fields of all test points, None if those of some are not there."""
    parts = [saved_fields(run.factors, start, check=False) for start in run.request.test.starts]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    return {name: np.concatenate([part[name] for part in whole]) for name in whole[0]}


def _made(run: Run, chunks: Iterable[int]) -> dict[int, Mapping[str, Array]]:
    """Of these test chunks those whose factors are there and as they were written, with their fields."""
    test = run.request.test
    there = [i for i in chunks if fields_file(run.factors, test.starts[i]).is_file()]
    found, items = dict[int, Mapping[str, Array]](), [(run.factors, test.starts[i]) for i in there]
    for position, fields in run.fitted.executor.run(saved_fields, (), items):
        if fields is None:
            damaged = samples_of(there[position], test.starts[there[position]], test.sizes[there[position]])
            run.progress.warn(f"the factors of test {damaged} in {run.folder} are damaged: solved again.")
        else:
            found[there[position]] = fields
    return found


def _share_factors(run: Run) -> None:
    """Factors that nobody has made yet, beginning elsewhere in each run, so that runs at the same time share them."""
    test, failures = run.request.test, Failures()
    with run.progress.stage("factors", test.n_samples, "test points") as bar:
        for i in run.partition.turned(range(len(test.sizes))):
            if not _made(run, [i]):
                failed = Failures()
                for _ in _solve_there(run, [i], failed):
                    pass
                failures.update((i, error) for error in failed.values())
            bar.advance(test.sizes[i])
    if failures:
        raise _unsolved(test, failures)


def write_factors(run: Run) -> None:
    """Solve for every test point whose factors are not there yet."""
    test, model = run.request.test, run.fitted.model
    dtype = to_numpy(torch.empty(0, dtype=model.risk.dtype)).dtype
    with run.partition.alone():
        make_factor_file(Path(run.factors), test.n_samples, model.n_parameters, dtype)
    if run.partition.shared:
        _share_factors(run)
        return
    made = _made(run, range(len(test.sizes)))
    waiting, failed = [i for i in range(len(test.sizes)) if i not in made], Failures()
    with run.progress.stage("factors", test.n_samples, "test points") as bar:
        for index, fields in itertools.chain(made.items(), _solved(run, waiting, failed, bar.note)):
            rows = slice(test.starts[index], test.starts[index] + test.sizes[index])
            run.writer.write_test(rows, **stored_fields(fields, run.writer.layout))
            bar.advance(test.sizes[index])
    if failed:
        raise _unsolved(test, {waiting[position]: error for position, error in failed.items()})


Solved = Iterator[tuple[int, Mapping[str, Array]]]  # Numbers of test chunks, with their fields.


def _solved(run: Run, waiting: Sequence[int], failed: Failures, note: Callable[[str], None]) -> Solved:
    """Solve these test chunks as the plan says. failed: gets those that fail, by their position."""
    by_rows = run.request.plan.solve == "rows"
    return _solve_there(run, waiting, failed) if by_rows else _solve_here(run, waiting, failed, note)


def _solve_there(run: Run, waiting: Sequence[int], failed: Failures) -> Solved:
    """Each test chunk solved by a task, which sweeps the training data by itself."""
    test = run.request.test
    items = [(test.chunks[i], run.factors, i, test.starts[i], test.sizes[i]) for i in waiting]
    for position, fields in run.fitted.executor.run(solve_chunk, (run.fitted.context,), items, failed):
        yield waiting[position], fields


def _solve_here(run: Run, waiting: Sequence[int], failed: Failures, note: Callable[[str], None]) -> Solved:
    """Gradients of the test chunks from the workers, one solve for each, its sweeps spread over the workers."""
    test, model = run.request.test, run.fitted.model
    reducer = model.reducer
    before = reducer.passes
    reducer.on_pass = lambda: note(f"{reducer.passes - before} passes")
    reducer.on_samples = lambda done: note(f"{reducer.passes - before} passes{done and f', {done} of the last'}")
    items = [(test.chunks[i], i, test.starts[i], test.sizes[i]) for i in waiting]
    try:
        for position, sides in run.fitted.executor.run(chunk_right_hand_sides, (run.fitted.context,), items, failed):
            with torch.no_grad():
                measuring = model if waiting[position] == 0 else model.unmeasured()
                factors, report = measuring.solve(to_tensor(sides["rows"]).to(model.risk.device))
            fields = factor_fields(factors, report, sides["loss"], sides["gradient_norm"])
            save_factors(run.factors, test.starts[waiting[position]], np.asarray(to_numpy(factors)), fields)
            yield waiting[position], fields
    finally:
        reducer.on_pass = reducer.on_samples = None


def solve_chunk(context: Context, chunk: Chunk, file: str, index: int, start: int, size: int) -> dict[str, Array]:
    """Factors of a test chunk, solved in this process and written to their rows of a file; what the result keeps."""
    made = saved_fields(file, start)
    if made is not None:  # the worker that made them died before its answer was fetched
        return made
    with logged_task("solve", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        factors, report = (model if index == 0 else model.unmeasured()).solve(gradients.rows)
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
