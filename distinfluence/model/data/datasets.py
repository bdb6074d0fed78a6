"""Map-style data sets: torch's, Hugging Face's, and whatever has a length and elements."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from distinfluence.errors import DtypeError, ShapeError
from distinfluence.model.batch import Batch, batch_length, map_batch
from distinfluence.model.data.collate import batch_of, collate
from distinfluence.model.data.refused import is_of
from distinfluence.model.data.samples import Samples, read

FORMATS = (None, "python", "numpy", "torch", "custom")  # of Hugging Face's data sets


class Fetched(Samples):
    """Samples of a map-style data set.

    Args:
        data: The data set.
        name: What to call it in errors.
        order: The samples that are meant, int64 [n]; all of them if None.
        sizes: The batches that they come in.
        loader: The loader that visits them: its collate function and its workers are used.

    Raises:
        DtypeError: If the data set gives samples in a form that cannot be read.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        order: Tensor | None = None,
        sizes: tuple[int, ...] | None = None,
        loader: "DataLoader[Any] | None" = None,
    ) -> None:
        self.data, self.order = data, order
        super().__init__(name, len(data) if order is None else len(order), sizes)
        self.collate = None if loader is None else own_collate(loader)
        self._loader = loader if loader is not None and loader.num_workers else None
        if is_of(data, "datasets", "Dataset") and data.format["type"] not in FORMATS:
            raise DtypeError(
                f"`{name}` must give tensors, arrays or numbers, got a data set in the format "
                f"{data.format['type']!r}. Call `with_format('torch')` on it."
            )

    @property
    def is_read_here(self) -> bool:
        """Whether this process reads the samples itself: one that opens files may not do so before its workers."""
        return self._loader is None

    def travelling(self) -> "Fetched":
        """Return the same samples without the loader's workers and without their order, which travels apart."""
        other = copy.copy(self)
        other._loader = other.order = other._starts = None
        if other.collate is None:
            other._sizes = None
        return other

    @override
    def read(self, start: int, stop: int) -> Batch:
        if self.collate is None:
            return self._read(start, stop)
        return self.of_batches(start, stop, lambda number, first, last: self._read(first, last))

    def uncollated(self, start: int, stop: int) -> Sequence[Any]:
        """Return samples start to stop as the data set gives them, with what no batch can hold."""
        return self._fetched(self._indices(start, stop))

    def _read(self, start: int, stop: int) -> Batch:
        return self._collated(self._fetched(self._indices(start, stop)))

    @override
    def batches(self) -> Iterator[Batch]:
        if self._loader is None:
            return super().batches()
        return self._visited(self._loader, self.edges())

    def beginning(self) -> Iterator[Batch]:
        """Yield the first two batches, read as all of them are: behind workers, by one of these."""
        few = list(itertools.islice(self.edges(), 2))
        if self._loader is None:
            return (self.read(start, stop) for start, stop in few)
        return self._visited(self._loader, few, num_workers=1)

    def _visited(self, loader: "DataLoader[Any]", edges: Iterable[tuple[int, int]], **workers: int) -> Iterator[Batch]:
        visits, own = [self._indices(start, stop) for start, stop in edges], self.travelling()._collated
        return read(again(loader, self.data, batch_sampler=visits, collate_fn=own, **workers))

    def _indices(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop)) if self.order is None else self.order[start:stop].tolist()

    def _fetched(self, indices: list[int]) -> Sequence[Any]:
        together: Callable[[list[int]], Sequence[Any]] | None = getattr(self.data, "__getitems__", None)
        return together(indices) if together is not None else [self.data[index] for index in indices]

    def _collated(self, samples: Sequence[Any]) -> Batch:
        if self.collate is None:
            return collate(samples, self.name)
        # a copy: the function may fill the same tensors for each batch
        batch = map_batch(torch.clone, batch_of(self.collate(list(samples)), self.name))
        if batch_length(batch, self.name) != len(samples):
            raise ShapeError(
                f"`{self.name}` must have a `collate_fn` that keeps every sample, got {batch_length(batch)} of "
                f"{len(samples)}. Leave samples out of the data set itself, for instance with a `Subset`."
            )
        return batch


def own_collate(loader: "DataLoader[Any]") -> Callable[[list[Any]], object] | None:
    """Return the function that a user gave to a loader; None where it is torch's."""
    given: Any = loader.collate_fn
    return None if getattr(given, "__module__", "") == "torch.utils.data._utils.collate" else given


def again(loader: "DataLoader[Any]", data: Any, **visits: Any) -> "DataLoader[Any]":
    """Return a loader over `data` with other visits, and the workers of another loader."""
    return DataLoader(
        data,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        **{"num_workers": loader.num_workers, **visits},
    )
