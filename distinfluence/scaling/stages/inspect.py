"""The first stage: every chunk is read once, fingerprinted, checked and drawn from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distinfluence.errors import (
    ChunkFailedError,
    DistinfluenceError,
    NonDeterministicDataError,
)
from distinfluence.influence.arrays import (
    ArrayBatch,
    named_arrays,
    to_tensor_batch,
)
from distinfluence.model.batch import Batch
from distinfluence.model.counter_random import sample_keys
from distinfluence.model.identity.draw import Draw, Place, grouped, sample_of
from distinfluence.model.reducer import OTHER_VALUES
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.data.chunks import ChunkedData, taken
from distinfluence.scaling.data.sources import ChunkSource
from distinfluence.scaling.dispatch.agenda import Failures
from distinfluence.scaling.dispatch.executor import Executor
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.worker.cache import Chunk, load, named_samples, samples_of
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store.format.fingerprint import combine, fingerprint_arrays


@dataclass(frozen=True)
class Inspected:
    """A data set that was looked at.

    Attributes:
        data: The data, with the fingerprint of each chunk.
        sha256: Fingerprint of the whole data set, in these chunks.
        draw: Which samples were drawn.
    """

    data: ChunkedData
    sha256: str
    draw: Draw


def look(executor: Executor, context: Context, data: ChunkedData, progress: Progress, what: str) -> Inspected:
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
        first, *others = reasons_of(data, failures).values()
        if not others:
            raise kind(first) from next(iter(failures.values()))
        raise kind(f"{len(failures)} of {len(items)} chunks of {what}:\n  " + listed([first, *others]))
    whole = combine({str(index): inspection.sha256 for index, inspection in found.items()})
    ordered = [found[index] for index in range(len(items))]
    draw = sum((inspection.draw for inspection in ordered), Draw())
    return Inspected(data.looked_at([inspection.sha256 for inspection in ordered]), whole, draw)


def drawn_samples(executor: Executor, risk: SampleRisk, looked: Inspected) -> list[Batch]:
    """Return the drawn samples, read once more, joined where their shapes allow and placed.

    Raises:
        NonDeterministicDataError: The samples have changed: the data set draws random numbers, or each process builds
            another one.
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


def reasons_of(data: ChunkedData, failures: Failures) -> dict[int, str]:
    """Return why each chunk failed, with its samples."""
    reasons = {}
    for i, error in sorted(failures.items()):
        named = samples_of(i, data.starts[i], data.sizes[i])
        text = str(error) if isinstance(error, DistinfluenceError) else f"{type(error).__name__}: {error}"
        reasons[i] = text if text.startswith(named) else f"{named}: {text}"
    return reasons


def listed(reasons: Iterable[str]) -> str:
    """Return the first ten reasons, one a line."""
    some = [*reasons]
    return "\n  ".join([*some[:10], *(["…"] if len(some) > 10 else [])])


@dataclass(frozen=True)
class Inspection:
    """Holds what is known of a chunk before any computation.

    Attributes:
        sha256: Fingerprint of the chunk's arrays.
        draw: Which samples may be drawn.
    """

    sha256: str
    draw: Draw


def inspect_chunk(context: Context, chunk: Chunk, index: int, start: int, size: int) -> Inspection:
    """Load a chunk and check it: lengths, NaN and infinity."""
    with logged_task("look", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        arrays = load(chunk)
        batch = model.risk.place(to_tensor_batch(arrays))
        return Inspection(fingerprint_arrays(named_arrays(arrays)), Draw.of(batch, index))


def read_again(chunk: Chunk, index: Sequence[int]) -> ArrayBatch:
    """Return some samples of a chunk, read again: not those that this process may have kept."""
    return taken(chunk.load() if isinstance(chunk, ChunkSource) else chunk, np.asarray(index))
