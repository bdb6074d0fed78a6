"""A stage after the strips: what ranked influences are made of, by layer, and by position where the method knows it.

Only pairs that are ranked are looked at, at most 2·k' for each test point: their training points' gradients are made
once more, a few at a time, and multiplied with the factors of the test points that rank them. One task for each strip
that has such pairs; what a task made lies in a file in the scratch folder, so that a run that died goes on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import UnsupportedOperatorError
from distinfluence.influence.arrays import Array, to_numpy, to_tensor, to_tensor_batch
from distinfluence.influence.layer_scoring import SupportsTokens, influences_by_layer, layers_of
from distinfluence.scaling.data.chunks import ChunkedData, taken
from distinfluence.scaling.plan.costs import FACTOR_BYTES
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.scratch import save_whole
from distinfluence.scaling.worker.cache import Chunk, load, named_samples
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store import InfluenceWriter, write_contributions

if TYPE_CHECKING:
    from distinfluence.scaling.stages.request import FittedRun

SHOWN = 10  # pairs at each end of a ranking that are taken apart, where nobody says better
MOST_TESTS, MOST_TOKEN_POINTS = 64, 4  # test points, training points of sequences, that are multiplied at once


@dataclass(frozen=True)
class RankedPairs:
    """Ranked pairs in the order of their training points. k: at each end of a ranking.

    tests, trains: [n], their points. places: [n], where each belongs in [2, n_test, k], flat.
    """

    tests: NDArray[np.int64]
    trains: NDArray[np.int64]
    places: NDArray[np.int64]
    k: int

    @classmethod
    def of(cls, writer: InfluenceWriter, k: int) -> "RankedPairs":
        """Those of a finished result."""
        k = min(k, writer.layout.k)
        trains = np.stack([ranking.indices for ranking in writer.rankings(k)]).astype(np.int64)
        tests = np.broadcast_to(np.arange(trains.shape[1])[:, np.newaxis], trains.shape).ravel()
        order = np.argsort(trains.ravel(), kind="stable")
        return cls(tests[order], trains.ravel()[order], order, k)

    def of_chunk(self, start: int, size: int) -> slice:
        """The pairs whose training points lie in a chunk."""
        first, last = np.searchsorted(self.trains, [start, start + size]).tolist()
        return slice(first, last)


def take_apart(
    fitted: "FittedRun",
    writer: InfluenceWriter,
    columns: ChunkedData,
    pairs: RankedPairs,
    file: str,
    progress: Progress,
) -> None:
    """Compute what the pairs are made of and store it with the result. file: of the factors of all test points."""
    found = {i: pairs.of_chunk(columns.starts[i], columns.sizes[i]) for i in range(len(columns.sizes))}
    with_pairs = [i for i, own in found.items() if own.stop > own.start]
    items = [
        (columns.chunks[i], i, columns.starts[i], columns.sizes[i], pairs.tests[found[i]], pairs.trains[found[i]])
        for i in with_pairs
        if not part_file(file, pairs.k, i).is_file()
    ]
    with progress.stage("contributions", len(items), "strips") as bar:
        for _ in fitted.executor.run(take_strip_apart, (fitted.context, file, pairs.k), items):
            bar.advance()
    parts = {part_file(file, pairs.k, i): found[i] for i in with_pairs}
    _gather(writer, list(layers_of(fitted.model)), pairs, parts, Path(file).with_name("contributions.npy"))


def _gather(
    writer: InfluenceWriter, layers: list[str], pairs: RankedPairs, parts: Mapping[Path, slice], beside: Path
) -> None:
    """Bring what the tasks made into the order of the rankings, in a file, and store it with the result."""
    widths = {np.load(part, mmap_mode="r").shape[1] - len(layers) for part in parts}
    n_tokens = max(widths) if min(widths) > 0 else 0
    shape = (2, writer.layout.n_test, pairs.k)
    whole = np.lib.format.open_memmap(beside, "w+", np.float32, (int(np.prod(shape)), len(layers) + n_tokens))
    whole[:] = np.nan
    for part, own in parts.items():
        values = np.load(part, mmap_mode="r", allow_pickle=False)
        width = min(values.shape[1], whole.shape[1])
        whole[pairs.places[own], :width] = values[:, :width]
    by_layer = whole[:, : len(layers)].reshape(*shape, -1)
    tokens = whole[:, len(layers) :].reshape(*shape, -1) if n_tokens else (None, None)
    write_contributions(writer.path, layers, *by_layer, *tokens)


def part_file(file: str, k: int, index: int) -> Path:
    """Where what a task made of strip `index` lies."""
    return Path(file).with_name(f"contributions-{k}-{index:06d}.npy")


def take_strip_apart(
    context: Context,
    file: str,
    k: int,
    chunk: Chunk,
    index: int,
    start: int,
    size: int,
    tests: NDArray[np.int64],
    trains: NDArray[np.int64],
) -> int:
    """What pairs are made of, [n, n_layers], with [n, T] beside it where positions are known, to a file.

    tests, trains: [n], the pairs, sorted by training point; trains count from the first sample of the data set.
    """
    if part_file(file, k, index).is_file():  # the worker that made it died before its answer was fetched
        return index
    with logged_task("contributions", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        factors = np.load(file, mmap_mode="r", allow_pickle=False)
        most = max(1, min(MOST_TESTS, FACTOR_BYTES // factors[0].nbytes))
        tokens = isinstance(model, SupportsTokens)
        by_layer = np.empty((tests.size, len(layers_of(model))), np.float32)
        by_token: list[tuple[NDArray[np.int64], Array]] = []
        arrays = load(chunk)
        for own, points in _groups(trains, min(max(1, most // 2), MOST_TOKEN_POINTS if tokens else MOST_TESTS)):
            batch = model.place(to_tensor_batch(taken(arrays, points - start)))
            columns = np.searchsorted(points, trains[own])
            of_tests = np.unique(tests[own])
            for first in range(0, of_tests.size, most):
                rows = of_tests[first : first + most]
                chosen = np.flatnonzero(np.isin(tests[own], rows))
                place, at = own.start + chosen, (np.searchsorted(rows, tests[own][chosen]), columns[chosen])
                tensor = to_tensor(np.ascontiguousarray(factors[rows])).to(model.risk.device)
                scores = influences_by_layer(model, tensor, batch)
                by_layer[place] = np.stack([to_numpy(values)[at] for values in scores.values()], axis=1)
                if isinstance(model, SupportsTokens) and tokens:
                    try:
                        by_token.append((place, to_numpy(model.influences_from_factors_by_token(tensor, batch))[at]))
                    except UnsupportedOperatorError:  # layers that do not share the same positions
                        tokens = False
        save_whole(part_file(file, k, index), _side_by_side(by_layer, by_token if tokens else []))
    return index


def _groups(trains: NDArray[np.int64], most: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Sorted training points, a few different ones at a time: which pairs are theirs, and the points."""
    points, starts = np.unique(trains, return_index=True)
    ends = np.append(starts, trains.size)
    for first in range(0, points.size, most):
        last = min(first + most, points.size)
        yield slice(int(ends[first]), int(ends[last])), points[first:last]


def _side_by_side(by_layer: NDArray[np.float32], by_token: list[tuple[NDArray[np.int64], Array]]) -> Array:
    """[n, n_layers + T]; T is 0 where positions are not known, or where there is only one."""
    width = max((values.shape[1] for _, values in by_token), default=0)
    if width < 2:
        return by_layer
    tokens = np.full((by_layer.shape[0], width), np.nan, np.float32)
    for place, values in by_token:
        tokens[place, : values.shape[1]] = values
    return np.hstack([by_layer, tokens])
