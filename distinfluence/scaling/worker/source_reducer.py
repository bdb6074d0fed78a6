"""Sums over chunks that a process loads for itself."""

import copy
from collections.abc import Iterator

from distinfluence.influence.arrays import (
    to_tensor_batch,
)
from distinfluence.model.batch import Batch
from distinfluence.model.reducer import LoopReducer
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.worker.cache import load, named_samples


class SourceReducer(LoopReducer):
    """Chunks that this process loads for itself, one after the other, keeping what fits."""

    def __init__(self, risk: SampleRisk, data: ChunkedData, remarks: tuple[str, ...] = ()) -> None:
        super().__init__(risk)
        self._data = data
        self.n_samples = data.n_samples
        self.chunk_sizes = tuple(data.sizes)
        self.remarks = remarks
        self._checked = False

    def batches(self) -> Iterator[Batch]:
        """All chunks, placed on the risk's device; the model is checked on the first."""
        for index in range(len(self._data.sizes)):
            yield self.batch(index)

    def batch(self, index: int) -> Batch:
        """One chunk, placed on the risk's device."""
        with named_samples(index, self._data.starts[index], self._data.sizes[index]):
            batch = self.risk.place(to_tensor_batch(load(self._data.sources[index])))
            if not self._checked:
                self.remarks = self.risk.check(batch)
                self._checked = True
        return batch

    def to(self, risk: SampleRisk) -> "SourceReducer":
        """Return the same chunks for a risk on another device."""
        other = copy.copy(self)
        other.risk = risk
        return other
