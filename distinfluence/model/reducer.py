"""The seam that makes everything distributed: sums over data chunks of a function of the chunk.

All that a fit needs of the data is `ChunkReducer.sum(kernel, *broadcast)`. A kernel is a small value that pickles and
knows neither where it runs nor how many chunks there are. `LocalReducer` loops over a loader in this process; the
scaling layer has one that runs the same kernels on Dask workers.
"""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from distinfluence.errors import EmptyDataError, NonDeterministicDataError, ShapeError
from distinfluence.model.batch import Batch, alike, batch_length, joined, map_batch, nbytes, take
from distinfluence.model.counter_random import sample_keys
from distinfluence.model.data.datasets import Fetched
from distinfluence.model.data.door import opened
from distinfluence.model.data.samples import Samples, untouched_generators
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
    sample_flops: of the outputs of one sample, 0 where they were not counted. remarks: how the loss was understood, for
    reports. passes: sweeps over the data so far. For progress bars, on_pass is called at the start of each pass, and
    on_samples with what is done of it in words, empty at its end.
    """

    risk: SampleRisk
    n_samples: int
    chunk_sizes: tuple[int, ...]
    drawn: tuple[Batch, ...] = ()
    digest: str = ""
    checked: Checked | None = None
    random_access: bool = True
    remarks: tuple[str, ...]
    sample_flops: float = 0.0
    passes: int = 0
    on_pass: Callable[[], None] | None = None
    on_samples: Callable[[str], None] | None = None

    def _begin_pass(self) -> None:
        self.passes += 1
        if self.on_pass is not None:
            self.on_pass()

    def _did(self, n: int) -> None:
        """Say that n samples of this pass are done."""
        if self.on_samples is not None:
            self.on_samples(f"{n} of {self.n_samples} samples" if n < self.n_samples else "")

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


class Unread(ChunkReducer):
    """As many samples in one chunk, of which nothing is read: for operators that are asked for their cost alone."""

    def __init__(self, risk: SampleRisk, n_samples: int, sample_flops: float) -> None:
        self.risk, self.n_samples, self.sample_flops = risk, n_samples, sample_flops
        self.chunk_sizes, self.remarks = (n_samples,), ()

    def sum(self, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Refuse: there are no data."""
        raise NotImplementedError

    def to(self, risk: SampleRisk) -> "Unread":
        """Return as many samples for a risk on another device."""
        return Unread(risk, self.n_samples, self.sample_flops)

    def map(self, kernel: Kernel, *broadcast: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Refuse: there are no data."""
        raise NotImplementedError

    def one(self, index: int, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Refuse: there are no data."""
        raise NotImplementedError


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
        done = 0
        for batch in self.batches():
            yield kernel(self.risk, batch, *broadcast)
            done += batch_length(batch)
            self._did(done)

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """One chunk, on the risk's device, checked."""

    def one(self, index: int, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """One chunk in this process."""
        return kernel(self.risk, self.batch(index), *broadcast)


class LocalReducer(LoopReducer):
    """Chunks of what `model.data` opens: arrays, a data set, a loader, or batches.

    Batches are collated and checked once and stay on the device between passes, up to KEPT_BYTES; beyond, the data are
    read again for each pass. Small ones are put together for sums, of which a fixed cost for each batch would be
    the larger part; `one` still takes the batches as they come. Raises EmptyDataError for data without samples,
    NonDeterministicDataError for data that give other values when it is read again, and whatever `SampleRisk.check`
    raises for samples from all over the data.
    """

    def __init__(self, risk: SampleRisk, data: object) -> None:
        super().__init__(risk)
        self._samples = opened(data, name="data")
        self._kept: list[Batch] | None = []
        self._together: list[Batch] = []  # the same samples in fewer, larger batches
        self._running: Iterator[Batch] | None = None
        self._next = 0
        check_repeatable(self._samples)
        self._read_twice = False
        self.chunk_sizes = self._first_pass()
        ragged = (self._first,) if len(self.drawn) > 1 else ()  # some may be alone with their shape
        self.remarks = tuple(dict.fromkeys(remark for batch in (*self.drawn, *ragged) for remark in risk.check(batch)))
        self.n_samples = sum(self.chunk_sizes)
        self.random_access = self._kept is not None

    def _first_pass(self) -> tuple[int, ...]:
        sizes: list[int] = []
        kept_bytes = 0
        draw, samples = Draw(), dict[Place, Batch]()
        for data in self._samples.batches():
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
        """Return the same data; batches that were kept move along."""
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
            for data in self._samples.batches():
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


def check_repeatable(samples: Samples) -> None:
    """Read some samples of a map-style data set twice. Raises NonDeterministicDataError where they differ.

    Samples behind workers are read by one of these, and what a loader's own function collates, in the loader's batches:
    of both, the first two batches.
    """
    if not isinstance(samples, Fetched):
        return
    with untouched_generators():
        if samples.collate is not None or not samples.is_read_here:
            _check_beginning(samples)
            return
        n = len(samples)
        for index in sorted({i * n // READ_TWICE for i in range(READ_TWICE)}):
            try:
                first, second = (samples.read(index, index + 1) for _ in range(2))
            except Exception:  # what is wrong is said in the pass
                return
            if not torch.equal(sample_keys(first), sample_keys(second)):
                raise NonDeterministicDataError(OTHER_VALUES.format(what=f"`data` (sample {index})"))


def _check_beginning(samples: Fetched) -> None:
    found = []
    for seed in range(2):  # workers take theirs from torch's
        torch.manual_seed(seed)
        try:
            found.append(torch.cat([sample_keys(batch) for batch in samples.beginning()]))
        except Exception:  # what is wrong is said in the pass
            return
    if not torch.equal(*found):
        raise NonDeterministicDataError(OTHER_VALUES.format(what="`data`"))


def together(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Neighbouring batches joined where shapes and dtypes allow, and the batches again, as views of those.

    A joined batch has at most JOINED_SAMPLES samples and JOINED_BYTES bytes, or is one that came so.
    """
    groups: list[list[Batch]] = []
    for batch in batches:
        last = groups[-1] if groups else None
        if last is not None and alike(last[0], batch):
            n = sum(map(batch_length, last)) + batch_length(batch)
            if n <= JOINED_SAMPLES and sum(map(nbytes, last)) + nbytes(batch) <= JOINED_BYTES:
                last.append(batch)
                continue
        groups.append([batch])
    wholes = [joined(group) for group in groups]
    views: list[Batch] = []
    for whole, group in zip(wholes, groups, strict=True):
        starts = itertools.accumulate(map(batch_length, group), initial=0)
        views += [take(whole, start, start + batch_length(batch)) for start, batch in zip(starts, group, strict=False)]
    return wholes, views


def add(total: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Element-wise sum of two results; the first may be empty, and is used up."""
    return tuple(a.add_(b) for a, b in zip(total, part, strict=True)) if total else tuple(t.clone() for t in part)
