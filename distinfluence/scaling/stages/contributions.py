"""A stage after the strips: what ranked influences are made of, by layer, and by position where the method knows it.

Only pairs that are ranked are looked at, at most 2·k' for each test point: their training points' gradients are made
once more, a few at a time, and multiplied with the factors of the test points that rank them. One task for each strip
that has such pairs; what a task made lies in a file in the scratch folder, so that a run that died goes on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import UnsupportedOperatorError
from distinfluence.influence.arrays import Array, to_numpy, to_tensor, to_tensor_batch
from distinfluence.influence.layer_scoring import SupportsTokens, influences_by_layer, layers_of
from distinfluence.scaling.data.chunks import taken
from distinfluence.scaling.plan.costs import FACTOR_BYTES
from distinfluence.scaling.scratch import save_whole
from distinfluence.scaling.stages.factor_file import fields_file
from distinfluence.scaling.stages.factors import write_factors
from distinfluence.scaling.stages.request import Run
from distinfluence.scaling.worker.cache import Chunk, load, named_samples
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store import InfluenceWriter, open_influences, write_contributions

MOST_TESTS, MOST_TOKEN_POINTS = 64, 4  # test points, training points of sequences, that are multiplied at once


@dataclass(frozen=True)
class RankedPairs:
    """Ranked pairs in the order of their training points.

    Attributes:
        tests: Test point of each pair, [n].
        trains: Training point of each pair, [n].
        places: Where each pair belongs in [2, n_test, k], flat, [n].
        k: Pairs at each end of a ranking.
    """

    tests: NDArray[np.int64]
    trains: NDArray[np.int64]
    places: NDArray[np.int64]
    k: int

    @classmethod
    def of(cls, writer: InfluenceWriter, k: int) -> "RankedPairs":
        """Return the pairs of a finished result."""
        k = min(k, writer.layout.k)
        trains = np.stack([ranking.indices for ranking in writer.rankings(k)]).astype(np.int64)
        tests = np.broadcast_to(np.arange(trains.shape[1])[:, np.newaxis], trains.shape).ravel()
        order = np.argsort(trains.ravel(), kind="stable")
        return cls(tests[order], trains.ravel()[order], order, k)

    def of_chunk(self, start: int, size: int) -> slice:
        """Return the pairs whose training points lie in a chunk."""
        first, last = np.searchsorted(self.trains, [start, start + size]).tolist()
        return slice(first, last)

    def part(self, own: slice) -> "RankedPairs":
        """Return some of the pairs."""
        return RankedPairs(self.tests[own], self.trains[own], self.places[own], self.k)


def write_pairs(run: Run) -> None:
    """Compute what the ranked pairs that are asked for are made of, and store it with the result."""
    k = min(run.request.options.contributions, run.writer.layout.k)
    if not k or open_influences(run.writer.path).n_contributions == k:
        return
    file, columns = run.factors, run.request.columns
    if not all(fields_file(file, start).is_file() for start in run.request.test.starts):
        write_factors(run)
    pairs = RankedPairs.of(run.writer, k)
    found = {i: pairs.of_chunk(columns.starts[i], columns.sizes[i]) for i in range(len(columns.sizes))}
    with_pairs = [i for i, own in found.items() if own.stop > own.start]
    items = [
        (columns.chunks[i], i, columns.starts[i], columns.sizes[i], pairs.part(found[i]))
        for i in with_pairs
        if not part_file(file, k, i).is_file()
    ]
    with run.progress.stage("contributions", len(items), "strips") as bar:
        for _ in run.fitted.executor.run(take_strip_apart, (run.fitted.context, file), items):
            bar.advance()
    _gather(run, pairs, {part_file(file, k, i): found[i] for i in with_pairs})
    run.writer.note(run.progress.seconds)


def _gather(run: Run, pairs: RankedPairs, parts: Mapping[Path, slice]) -> None:
    """Bring what the tasks made into the order of the rankings, in a file, and store it with the result."""
    layers = list(layers_of(run.fitted.model))
    widths = {np.load(part, mmap_mode="r").shape[1] - len(layers) for part in parts}
    n_tokens = max(widths) if min(widths) > 0 else 0
    shape = (2, run.writer.layout.n_test, pairs.k)
    beside, columns = run.folder / "contributions.npy", len(layers) + n_tokens
    whole = np.lib.format.open_memmap(beside, "w+", np.float32, (int(np.prod(shape)), columns))
    whole[:] = np.nan
    for part, own in parts.items():
        values = np.load(part, mmap_mode="r", allow_pickle=False)
        width = min(values.shape[1], whole.shape[1])
        whole[pairs.places[own], :width] = values[:, :width]
    by_layer = whole[:, : len(layers)].reshape(*shape, -1)
    tokens = whole[:, len(layers) :].reshape(*shape, -1) if n_tokens else (None, None)
    write_contributions(run.writer.path, layers, *by_layer, *tokens)


def part_file(file: str, k: int, index: int) -> Path:
    """Return the path of what a task made of strip `index`."""
    return Path(file).with_name(f"contributions-{k}-{index:06d}.npy")


def take_strip_apart(
    context: Context, file: str, chunk: Chunk, index: int, start: int, size: int, pairs: RankedPairs
) -> int:
    """Write contributions to a strip's pairs to a file, [n, n_layers], and [n, T] where positions are known."""
    tests, trains, k = pairs.tests, pairs.trains, pairs.k
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
