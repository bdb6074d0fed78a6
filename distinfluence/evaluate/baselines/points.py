"""The points that a baseline scores: their number, their fingerprint, their arrays, and their texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from distinfluence.errors import EmptyDataError, SettingError, ShapeError
from distinfluence.influence.arrays import ArrayBatch, named_arrays, to_numpy_batch
from distinfluence.model.data.datasets import Fetched
from distinfluence.model.data.door import opened
from distinfluence.model.data.samples import PIECE
from distinfluence.model.data.tree import map_leaves
from distinfluence.scaling.data.chunks import ChunkedData, chunked
from distinfluence.scaling.data.recipe import Recipe
from distinfluence.scaling.data.sources import InThisProcess
from distinfluence.scaling.dispatch.executor import InProcess
from distinfluence.scaling.worker.cache import load, named_samples
from distinfluence.store.format.fingerprint import combine, fingerprint_array, fingerprint_arrays

Texts: TypeAlias = "str | Callable[[Any], str] | tuple[Sequence[str], Sequence[str]] | None"


@dataclass(frozen=True, eq=False)
class Points:
    """The test points or the training points.

    Attributes:
        axis: "test" or "train".
        given: The data as the user gave them.
        sizes: Number of points in each chunk.
        chunks: The data in these chunks; None where the points are texts alone.
    """

    axis: str
    given: object
    sizes: tuple[int, ...]
    chunks: ChunkedData | None

    @classmethod
    def of(cls, axis: str, data: object, chunk_size: int | None, default_size: int) -> "Points":
        """Count the points and cut them into chunks; nothing is read but what a stream needs.

        Args:
            axis: "test" or "train".
            data: A list of texts, or whatever influence models take as data.
            chunk_size: Points in a chunk; None takes `default_size`, or the chunks that the data come in.
            default_size: Points in a chunk where nobody says.

        Raises:
            EmptyDataError: If there are no points.
        """
        if _are_texts(data):
            assert isinstance(data, Sequence)
            n, size = len(data), chunk_size or default_size
            return cls(axis, data, tuple(min(size, n - start) for start in range(0, n, size)), None)
        if isinstance(data, list) and not data:
            raise EmptyDataError(f"`{axis}` must hold at least one point, got an empty list.")
        chunks = chunked(data, None, InThisProcess(), chunk_size, default_size)
        return cls(axis, data, chunks.sizes, chunks)

    @property
    def n(self) -> int:
        """Number of points."""
        return sum(self.sizes)

    def looked_at(self) -> "tuple[Points, str]":
        """Read all chunks once; return points that are compared with these ever after, and their fingerprint.

        The fingerprint is that of any other run over the same chunks.
        """
        if self.chunks is None:
            assert isinstance(self.given, Sequence)
            return self, fingerprint_texts(self.given)
        found = [fingerprint_arrays(named_arrays(self.load(index))) for index in range(len(self.sizes))]
        whole = combine({str(index): sha256 for index, sha256 in enumerate(found)})
        return replace(self, chunks=self.chunks.looked_at(found)), whole

    def load(self, index: int) -> ArrayBatch:
        """Return the arrays of a chunk."""
        assert self.chunks is not None
        with named_samples(index, self.chunks.starts[index], self.sizes[index]):
            ((_, arrays),) = InProcess().run(load, (), [(self.chunks.chunks[index],)])
        loaded: ArrayBatch = arrays
        return loaded

    def texts(self, given: Texts) -> list[str]:
        """Return the text of each point.

        Args:
            given: The texts of both axes as a pair (test, train), the field of each sample, or a callable of a sample;
                None where the points are texts.

        Raises:
            SettingError: If there is not a text for each point.
            ShapeError: If there are more or fewer texts than points.
        """
        found: list[Any]
        if given is None:
            if self.chunks is not None:
                raise SettingError(
                    f"`texts` must say what the texts of the {self.axis} points are, whose data are not a list of "
                    "texts. Pass a pair of lists (test, train), the name of a field, or a callable of a sample."
                )
            assert isinstance(self.given, Sequence)
            found = list(self.given)
        elif isinstance(given, tuple):
            if len(given) != 2:
                raise SettingError(f"`texts` must be a pair of lists (test, train), got a tuple of {len(given)}.")
            found = list(given[0 if self.axis == "test" else 1])
        elif isinstance(given, str):
            found = [_field(sample, given) for sample in self._samples()]
        else:
            found = [given(sample) for sample in self._samples()]
        for number, text in enumerate(found):
            if not isinstance(text, str):
                raise SettingError(
                    f"`texts` must give a text for each point, got {type(text).__name__} for {self.axis} point "
                    f"{number}. Return '' for a point without a text."
                )
        if len(found) != self.n:
            raise ShapeError(f"`texts` must be {self.n} texts of the {self.axis} points, got {len(found)}.")
        return [str(text) for text in found]

    def _samples(self) -> Iterator[Any]:
        """Yield samples as the data set gives them; of arrays, the part of each array that belongs to the sample."""
        if self.chunks is None:
            assert isinstance(self.given, Sequence)
            yield from self.given
            return
        if isinstance(self.given, ChunkedData):
            batches = (source.load() for source in self.given.sources)
        else:
            built = self.given.build() if isinstance(self.given, Recipe) else self.given
            samples = opened(built).fixed()
            if isinstance(samples, Fetched):
                for start, stop in samples.cut(PIECE):
                    yield from samples.uncollated(start, stop)
                return
            batches = (to_numpy_batch(samples.read(start, stop)) for start, stop in samples.cut(PIECE))
        for batch in batches:
            for index in range(len(next(iter(named_arrays(batch).values())))):
                yield map_leaves(lambda array, i=index: np.asarray(array)[i], batch)


def fingerprint_texts(texts: Sequence[str]) -> str:
    """Return the sha256 (hex) of texts."""
    joined = "".join(texts).encode("utf-8", "surrogatepass")
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return combine(
        {"texts": fingerprint_array(np.frombuffer(joined, dtype=np.uint8)), "lengths": fingerprint_array(lengths)}
    )


def _are_texts(data: object) -> bool:
    return isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(text, str) for text in data)


def _field(sample: Any, name: str) -> Any:
    if not isinstance(sample, Mapping) or name not in sample:
        keys = f" with {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else ""
        raise SettingError(
            f"`texts` {name!r} must be a field of every sample, got a {type(sample).__name__}{keys}. Name another one, "
            "or pass a callable of a sample."
        )
    return sample[name]
