"""The loss gradients of samples, layer by layer, from one forward and one reverse pass for each micro-batch.

What has no layer that is known gets its gradients from autograd, in a second pass for all of these parameters together.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from distinfluence.layers.layout import LayerLayout, Record, unit_rows
from distinfluence.layers.units import Sides, Unit, outer_sides, position_scores
from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.gradients import loss_gradients
from distinfluence.model.sample_risk import SampleRisk


class LayerGradients:
    """The gradients of n samples' losses, unit by unit. losses: [n]."""

    def __init__(self, risk: SampleRisk, layout: LayerLayout, batch: Batch) -> None:
        self._risk, self._layout, self._batch = risk, layout, batch
        self._record = Record(risk, layout, batch)
        self._deltas = self._record.of_losses()
        self.n = self._record.n
        self.losses = self._record.losses.detach().to(risk.dtype)

    def sides(self, unit: Unit) -> Sides:
        """Return both sides of a "kronecker" unit."""
        return outer_sides(unit, self._record.uses, self._layout.infos, self._deltas, self.n)

    def matrices(self, unit: Unit) -> Tensor:
        """Return the gradients as matrices, [n, g, o, i]."""
        return unit_rows(self._record, unit, self._deltas)[0] if unit.uses else unit.matrix(self._by_autograd)

    def position_scores(self, unit: Unit, factors: Tensor) -> Tensor:
        """⟨M, gradient⟩ by position of a unit that is no outer product: M [q, 1, 1, d] → [q, n, T]."""
        return position_scores(unit, factors, self._record.uses, self._layout.infos, self._deltas, self.n)

    @cached_property
    def _by_autograd(self) -> dict[str, Tensor]:
        """Name → [n, *shape] of the parameters without a layer, held as long as the micro-batch is."""
        restricted = self._risk.only(
            tuple(name for unit in self._layout.units if not unit.uses for name in unit.parameters)
        )
        return restricted.blocks.unflatten(loss_gradients(restricted, self._batch).rows)


def layer_gradients(risk: SampleRisk, layout: LayerLayout, batch: Batch) -> Iterator[LayerGradients]:
    """Yield the gradients of the batch, some samples at a time."""
    n = batch_length(batch)
    by_autograd = sum(unit.size for unit in layout.units if not unit.uses) * risk.dtype.itemsize
    step = layout.samples_at_once(risk.device, 1, by_autograd)
    for start in range(0, n, step):
        yield LayerGradients(risk, layout, take(batch, start, min(start + step, n)))


def sample_gradients(risk: SampleRisk, layout: LayerLayout, batch: Batch) -> tuple[Tensor, Tensor]:
    """(gradients [n, p] of the samples' losses by all covered parameters, losses [n]), put together from the layers."""
    rows, losses = [], []
    for gradients in layer_gradients(risk, layout, batch):
        tensors: dict[str, Tensor] = {}
        for unit in layout.units:
            tensors |= unit.tensors(gradients.matrices(unit), risk.blocks.shapes)
        rows.append(risk.blocks.flatten(tensors, n_leading=1))
        losses.append(gradients.losses)
    return torch.cat(rows), torch.cat(losses)
