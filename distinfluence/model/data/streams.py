"""Batches that are read one after the other: loaders over iterable data sets, and whatever can be iterated again."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from distinfluence.model.batch import Batch, batch_length, map_batch
from distinfluence.model.data.collate import batch_of
from distinfluence.model.data.datasets import own_collate
from distinfluence.model.data.samples import Pieces, Samples, read


class Stream(Samples):
    """Batches that can only be read from the first to the last, again and again. Their length takes a reading.

    Args:
        items: Gives the batches whenever it is iterated.
        name: What to call them in errors.
    """

    is_stream = True

    def __init__(self, items: Iterable[object], name: str) -> None:
        self.name, self._items = name, items
        self._sizes = None

    @property
    @override
    def sizes(self) -> tuple[int, ...]:
        if self._sizes is None:
            self._sizes = tuple(batch_length(batch) for batch in self.batches())
        return self._sizes

    @override
    def __len__(self) -> int:
        return sum(self.sizes)

    @override
    def read(self, start: int, stop: int) -> Batch:
        return self.fixed().read(start, stop)

    @override
    def batches(self) -> Iterator[Batch]:
        fresh = _is_fresh(self._items)
        for number, item in enumerate(read(self._items)):
            batch = batch_of(item, f"{self.name}[{number}]")
            batch_length(batch, f"{self.name}[{number}]")
            yield batch if fresh else map_batch(torch.clone, batch)

    @override
    def fixed(self) -> Samples:
        return Pieces(list(self.batches()), self.name)


def _is_fresh(items: object) -> bool:
    """Return whether each batch has memory of its own: torch stacks its samples, or it came from another process."""
    if type(items) is not DataLoader:
        return False
    return items.num_workers > 0 or (items.batch_sampler is not None and own_collate(items) is None)
