"""Samples in an order that stays: what every door reads."""

import itertools
import random
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from typing_extensions import override

from distinfluence.errors import EmptyDataError, ShapeError
from distinfluence.model.batch import Batch, alike, batch_length, joined, take

T = TypeVar("T")

PIECE = 256  # samples that are read at a time where nobody says better


class Samples(ABC):
    """Samples with numbers from 0, which stay the same however often they are read.

    Args:
        name: What to call them in errors.
        length: How many they are.
        sizes: The batches that they come in; None where they may be cut anywhere.
    """

    is_stream = False  # Whether they can be read from the first to the last only.

    def __init__(self, name: str, length: int, sizes: tuple[int, ...] | None) -> None:
        self.name, self._length, self._sizes = name, length, sizes
        self._starts: list[int] | None = None  # of the batches, once they are asked for
        if length == 0:
            raise EmptyDataError(f"`{name}` must hold at least one sample, got none. Pass a data set that isn't empty.")

    def __len__(self) -> int:
        return self._length

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The batches that they come in; None where they may be cut anywhere."""
        return self._sizes

    @abstractmethod
    def read(self, start: int, stop: int) -> Batch:
        """Return samples start to stop (exclusive)."""

    def edges(self) -> Iterator[tuple[int, int]]:
        """Yield where each batch starts and stops."""
        if self.sizes is None:
            return self.cut(PIECE)
        return itertools.pairwise(itertools.accumulate(self.sizes, initial=0))

    def cut(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield where batches of another size start and stop; the last may be smaller."""
        return itertools.pairwise([*range(0, len(self), size), len(self)])

    def batches(self) -> Iterator[Batch]:
        """Yield all samples, in order, in the batches that they come in."""
        return read(self.read(start, stop) for start, stop in self.edges())

    def of_batches(self, start: int, stop: int, batch: Callable[[int, int, int], Batch]) -> Batch:
        """Return samples start to stop of the batches that they come in, of which `batch(number, first, last)` is one.

        Raises:
            ShapeError: If they lie in batches that cannot be joined.
        """
        if self._starts is None:
            self._starts = list(itertools.accumulate(self.sizes or (len(self),), initial=0))
        found = []
        for number in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)):
            first, last = self._starts[number : number + 2]
            part, whole = batch(number, first, last), start <= first and last <= stop
            found.append(part if whole else take(part, max(start - first, 0), min(stop, last) - first))
        if not all(alike(found[0], part) for part in found):
            raise ShapeError(
                f"`{self.name}` must have batches of one form to be put together, with the same shapes of a sample, "
                "got others. Pad all samples to one length, or leave the batches as they are."
            )
        return joined(found)

    def fixed(self) -> "Samples":
        """Return the same samples where each can be read for itself; a stream is read into memory."""
        return self


class Pieces(Samples):
    """Batches in memory."""

    def __init__(self, parts: Sequence[Batch], name: str) -> None:
        self._parts = list(parts)
        sizes = tuple(batch_length(part, f"{name}[{i}]") for i, part in enumerate(self._parts))
        super().__init__(name, sum(sizes), sizes)

    @override
    def read(self, start: int, stop: int) -> Batch:
        return self.of_batches(start, stop, lambda number, first, last: self._parts[number])

    @override
    def batches(self) -> Iterator[Batch]:
        return iter(self._parts)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Restore the random state of torch, NumPy's global generator and Python's afterwards."""
    numpy: Any = sys.modules.get("numpy")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if numpy:
            numpy.random.set_state(before[2])


def read(loader: Iterable[T]) -> Iterator[T]:
    """Yield the loader's batches; what it draws from torch's CPU generator (seeds, shuffling) is drawn from a copy."""
    its_own = torch.get_rng_state()
    iterator: Iterator[T] | None = None
    while True:
        callers = torch.get_rng_state()
        torch.set_rng_state(its_own)
        try:
            iterator = iter(loader) if iterator is None else iterator
            data = next(iterator)
        except StopIteration:
            return
        finally:
            its_own = torch.get_rng_state()
            torch.set_rng_state(callers)
        yield data
