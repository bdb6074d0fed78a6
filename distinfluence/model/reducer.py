"""The seam that makes everything distributed: sums over data chunks of a function of the chunk.

All that a fit needs of the data is `ChunkReducer.sum(kernel, *broadcast)`. A kernel is a small value that pickles and
knows neither where it runs nor how many chunks there are. `LocalReducer` loops over a loader in this process; the
scaling layer has one that runs the same kernels on Dask workers.
"""

import copy
import itertools
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from distinfluence.errors import EmptyDataError, NonDeterministicDataError, ShapeError
from distinfluence.model.batch import Batch, as_batch, batch_length, map_batch, nbytes, take
from distinfluence.model.counter_random import sample_keys
from distinfluence.model.identity.draw import Draw, Place, grouped, sample_of
from distinfluence.model.identity.probe import Checked
from distinfluence.model.sample_risk import CHECKED_SAMPLES, SampleRisk

READ_TWICE = 16  # samples of a data set, before it is used

KEPT_BYTES = 2 * 2**30  # of batches that stay on the device between passes
JOINED_SAMPLES, JOINED_BYTES = 2048, 4 * 2**20  # of small batches that are put together for sums


class Kernel(Protocol):
    """A function of one chunk: sums over its samples, never means, so that ragged chunks weigh what they hold."""

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """batch: one chunk, placed and checked; broadcast: tensors that every chunk gets."""


class ChunkReducer(ABC):
    """A data set in chunks, with the risk that is evaluated on it.

    risk: on this process's device. n_samples: of all chunks. chunk_sizes: samples of each chunk, in order.
    drawn: samples from all over the data, joined where their shapes allow, for checks; digest: of all samples' content,
    whatever their order; checked: what the checks of derivatives found, None before.
    random_access: whether `one` costs the same for any index; else 0, 1, 2, … again and again is cheap.
    remarks: how the loss was understood, for reports. passes: sweeps over the data so far; on_pass: called at the start
    of each, for progress bars.
    """

    risk: SampleRisk
    n_samples: int
    chunk_sizes: tuple[int, ...]
    drawn: tuple[Batch, ...] = ()
    digest: str = ""
    checked: Checked | None = None
    random_access: bool = True
    remarks: tuple[str, ...]
    passes: int = 0
    on_pass: Callable[[], None] | None = None

    def _begin_pass(self) -> None:
        self.passes += 1
        if self.on_pass is not None:
            self.on_pass()

    @abstractmethod
    def sum(self, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Σ over chunks of kernel(risk, chunk, *broadcast), in the order of the chunks, on the risk's device."""

    @abstractmethod
    def to(self, risk: SampleRisk) -> "ChunkReducer":
        """Return the same data with a risk on another device."""

    @abstractmethod
    def map(self, kernel: Kernel, *broadcast: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """kernel(risk, chunk, *broadcast) of each chunk, in the order of the chunks, on the risk's device."""

    @abstractmethod
    def one(self, index: int, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """kernel(risk, chunk, *broadcast) of one chunk, for stochastic methods; no pass."""


class LoopReducer(ChunkReducer):
    """Chunks one after the other in this process."""

    def __init__(self, risk: SampleRisk) -> None:
        self.risk = risk

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """All chunks, on the risk's device, checked."""

    def sum(self, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Σ over chunks, one after the other."""
        total: tuple[Tensor, ...] = ()
        for part in self.map(kernel, *broadcast):
            total = add(total, part)
        return total

    def map(self, kernel: Kernel, *broadcast: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """One chunk at a time."""
        self._begin_pass()
        for batch in self.batches():
            yield kernel(self.risk, batch, *broadcast)

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """One chunk, on the risk's device, checked."""

    def one(self, index: int, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """One chunk in this process."""
        return kernel(self.risk, self.batch(index), *broadcast)


class LocalReducer(LoopReducer):
    """Chunks from a loader: a DataLoader, an iterable of batches, or one (x, y) batch.

    Batches are collated and checked once and stay on the device between passes, up to KEPT_BYTES; beyond, the loader is
    run through again for each pass. Small ones are put together for sums, of which a fixed cost for each batch would be
    the larger part; `one` still takes the loader's own. Raises EmptyDataError for a loader without samples,
    NonDeterministicDataError for one that gives other values when it is read again, and whatever `SampleRisk.check`
    raises for samples from all over the data.
    """

    def __init__(self, risk: SampleRisk, data: object) -> None:
        super().__init__(risk)
        risk.ways.timed = True  # one process does all of every sum
        self._loader = as_loader(data)
        self._kept: list[Batch] | None = []
        self._together: list[Batch] = []  # the same samples in fewer, larger batches
        self._running: Iterator[Batch] | None = None
        self._next = 0
        check_repeatable(self._loader)
        self._read_twice = False
        self.chunk_sizes = self._first_pass()
        ragged = (self._first,) if len(self.drawn) > 1 else ()  # some may be alone with their shape
        self.remarks = tuple(dict.fromkeys(remark for batch in (*self.drawn, *ragged) for remark in risk.check(batch)))
        self.n_samples = sum(self.chunk_sizes)
        self.random_access = self._kept is not None

    @property
    def in_fixed_order(self) -> bool:
        """Whether the samples come in an order that the caller knows: not from a loader that shuffles."""
        return not isinstance(self._loader, DataLoader) or not shuffles(self._loader)

    def _first_pass(self) -> tuple[int, ...]:
        sizes: list[int] = []
        kept_bytes = 0
        draw, samples = Draw(), dict[Place, Batch]()
        for data in read(self._loader):
            batch = self.risk.place(data)
            if not sizes:
                self.risk.check_takes(batch)
                self._first = map_batch(torch.clone, take(batch, 0, CHECKED_SAMPLES))
            draw = draw + Draw.of(batch, len(sizes))
            samples = {p: samples[p] if p in samples else sample_of(batch, p[1]) for p in draw.candidates}
            sizes.append(batch_length(batch))
            kept_bytes += nbytes(batch)
            if self._kept is not None:
                self._kept.append(batch)
            if kept_bytes > KEPT_BYTES:
                self._kept = None
        if self._kept is not None:
            self._together, self._kept = together(self._kept)
        if not sizes:
            raise EmptyDataError("`data` must hold at least one sample, got none. Pass a data set that isn't empty.")
        self.digest, self.drawn = draw.digest, tuple(grouped([samples[place] for place in draw.places]))
        return tuple(sizes)

    def to(self, risk: SampleRisk) -> "LocalReducer":
        """Return the same loader; batches that were kept move along."""
        other = copy.copy(self)
        other.risk = risk
        if self._kept is not None:
            other._together, other._kept = together([risk.place(batch) for batch in self._kept])
        other.drawn = tuple(risk.place(batch) for batch in self.drawn)
        other._running = None
        return other

    def batch(self, index: int) -> Batch:
        """One batch; where they are not kept, the next one of a sweep is cheap and any other reads up to it."""
        if self._kept is not None:
            return self._kept[index]
        if self._running is None or index != self._next:
            self._running = itertools.islice(self.batches(), index, None)
        self._next = index + 1
        return next(self._running)

    def batches(self) -> Iterator[Batch]:
        """All samples, on the risk's device, checked; kept batches that are small are put together."""
        if self._kept is not None:
            yield from self._together
        else:
            n_samples, again = 0, Draw()
            for data in read(self._loader):
                batch = self.risk.place(data)
                n_samples += batch_length(batch)
                if not self._read_twice:
                    again = again + Draw.of(batch, 0)
                yield batch
            if n_samples != self.n_samples:
                raise ShapeError(
                    f"`data` must give the same samples each time it is read, got {self.n_samples} at first and now "
                    f"{n_samples}. Pass a DataLoader over a map-style data set."
                )
            if not self._read_twice and again.digest != self.digest:
                raise NonDeterministicDataError(OTHER_VALUES.format(what="`data`"))
            self._read_twice = True


OTHER_VALUES = (
    "{what} must give the same values for a sample each time it is read, got others the second time. Take random "
    "transforms out, and seed what is drawn when the data set is made: influence needs samples that stay the same."
)


def check_repeatable(loader: object) -> None:
    """Read some samples of a loader's map-style data set twice. Raises NonDeterministicDataError where they differ."""
    data: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(data, (IterableDataset, TensorDataset)):
        return
    if loader.num_workers or loader.batch_size is None or not hasattr(data, "__len__"):
        return  # a data set that is opened here first may not be opened again where it is read
    n = len(data)
    with untouched_generators():
        for index in sorted({i * n // READ_TWICE for i in range(READ_TWICE)}) if n else ():
            try:
                first, second = (as_batch(loader.collate_fn([data[index]])) for _ in range(2))
            except Exception:  # its samples have other names, or some cannot be read and its sampler leaves them out
                return
            if not torch.equal(sample_keys(first), sample_keys(second)):
                raise NonDeterministicDataError(OTHER_VALUES.format(what=f"`data` (sample {index})"))


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


def together(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Neighbouring batches joined where shapes and dtypes allow, and the batches again, as views of those.

    A joined batch has at most JOINED_SAMPLES samples and JOINED_BYTES bytes, or is one that came so.
    """
    groups: list[list[Batch]] = []
    for batch in batches:
        last = groups[-1] if groups else None
        if last is not None and _alike(last[0], batch):
            n = sum(map(batch_length, last)) + batch_length(batch)
            if n <= JOINED_SAMPLES and sum(map(nbytes, last)) + nbytes(batch) <= JOINED_BYTES:
                last.append(batch)
                continue
        groups.append([batch])
    joined = [group[0] if len(group) == 1 else _joined(group) for group in groups]
    views: list[Batch] = []
    for whole, group in zip(joined, groups, strict=True):
        starts = itertools.accumulate(map(batch_length, group), initial=0)
        views += [take(whole, start, start + batch_length(batch)) for start, batch in zip(starts, group, strict=False)]
    return joined, views


def _alike(a: Batch, b: Batch) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape[1:] == b.shape[1:]
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return False


def _joined(parts: list[Batch]) -> Batch:
    first = parts[0]
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts if isinstance(part, dict)]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([part[i] for part in parts if isinstance(part, tuple)]) for i in range(len(first)))
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def add(total: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Element-wise sum of two results; the first may be empty, and is used up."""
    return tuple(a.add_(b) for a, b in zip(total, part, strict=True)) if total else tuple(t.clone() for t in part)


def read(loader: Iterable[object]) -> Iterator[object]:
    """Yield the loader's batches; what it draws from torch's CPU generator (seeds, shuffling) is drawn from a copy."""
    its_own = torch.get_rng_state()
    iterator: Iterator[object] | None = None
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


def shuffles(loader: "DataLoader[Any]") -> bool:
    """Return whether a loader takes the samples of a map-style data set in another order than the data set's."""
    if isinstance(loader.dataset, IterableDataset):
        return False
    own = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    return not own or not isinstance(loader.sampler, SequentialSampler)


def as_loader(data: object) -> Iterable[object]:
    """Something that can be iterated again and again for batches.

    A tensor, an (x, y) pair of tensors or a dict of tensors is one batch. A shuffled DataLoader is read once in the
    order of its first pass where the batches are kept. Raises ShapeError for a one-shot iterator.
    """
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, (Mapping, torch.Tensor)) or (
        isinstance(data, (tuple, list)) and len(data) > 0 and all(isinstance(part, torch.Tensor) for part in data)
    ):
        return [data]
    if isinstance(data, Iterator) or not isinstance(data, (Sequence, Iterable)):
        raise ShapeError(
            f"`data` must be a DataLoader, an (x, y) pair of tensors, or a list of batches, got {type(data).__name__}. "
            "It is read several times: wrap a generator in a list."
        )
    return data
