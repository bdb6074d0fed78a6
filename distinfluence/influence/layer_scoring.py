"""The scorer for models whose layers a fit has recognised: scores without matrices of samples × parameters.

Gradients and scores are put together from the inputs and the output gradients of the layers. Influences by layer are
sums over parts of the parameters, whatever the blocks of the curvature.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.scores import InfluenceMode, Scorer, Tile, influence_mode, layer_tile
from distinfluence.layers.gradients import sample_gradients
from distinfluence.layers.layout import LayerLayout
from distinfluence.layers.queries import LowRank, UnitQueries, unit_queries
from distinfluence.layers.scores import layer_scores, token_scores
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import SampleGradients
from distinfluence.model.objective import Objective
from distinfluence.model.sample_risk import SampleRisk


class LayerScorer(Scorer):
    """Gradients and scores of samples, layer by layer.

    Args:
        risk: The risk of single samples.
        layout: The layers that the fit has recognised.
        energy: Share of each factor's squared norm that is kept where low rank saves work; None keeps factors whole.
    """

    def __init__(self, risk: SampleRisk, layout: LayerLayout, energy: float | None) -> None:
        super().__init__(risk)
        self.layout = layout
        self._energy = energy
        self._queries: tuple[Tensor, Sequence[UnitQueries]] | None = (
            None  # those of the last call, since strips share them
        )

    @property
    def measures_loss(self) -> bool:
        """Whether the measurement of a test point is its loss."""
        return type(self.risk.objective).measurements is Objective.measurements

    @override
    def loss_gradients(self, batch: Batch) -> SampleGradients:
        return SampleGradients(*sample_gradients(self.risk, self.layout, batch))

    @override
    def measurement_gradients(self, batch: Batch) -> SampleGradients:
        return self.loss_gradients(batch) if self.measures_loss else super().measurement_gradients(batch)

    @override
    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
        if influence_mode(mode) is not InfluenceMode.UP:
            return super().tile(factors, batch, mode)
        return layer_tile(self.risk, self.layout, self.queries(factors), batch)

    @override
    def by_block(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str) -> "OrderedDict[str, Tensor]":
        if influence_mode(mode) is not InfluenceMode.UP:
            return super().by_block(factors, batch, mode)
        # one pass for all blocks
        parts = list(layer_scores(self.risk, self.layout, self.queries(factors), batch, apart=True))
        blocks = self.risk.blocks.names
        return OrderedDict((block, torch.cat([part.by_block[block] for part in parts], dim=1)) for block in blocks)

    def by_token(self, factors: Tensor, batch: Batch) -> Tensor:
        """Return the influences by position of the batch's samples, [n_test, n, T], from factors [n_test, p].

        Raises:
            UnsupportedOperatorError: If the layers do not share the same positions.
        """
        return token_scores(self.risk, self.layout, factors.to(self.risk.dtype), batch)

    def queries(self, factors: Tensor) -> Sequence[UnitQueries]:
        """Return the factors [n_test, p] unit by unit, compressed if asked."""
        if self._queries is None or self._queries[0] is not factors:
            tensors = self.risk.blocks.unflatten(factors.to(self.risk.dtype))
            self._queries = factors, [unit_queries(unit, tensors, self._energy) for unit in self.layout.units]
        return self._queries[1]

    def error(self, factors: Tensor) -> Tensor:
        """Return ‖M − M̃‖ / ‖M‖ of each of the factors M [n_test, p], for what compression leaves of them: [n_test]."""
        whole = factors.double().square().sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        lost = [unit.lost for unit in self.queries(factors) if isinstance(unit, LowRank)]
        return (sum(lost, torch.zeros_like(whole)) / whole) ** 0.5


@runtime_checkable
class SupportsTokens(Protocol):
    """An influence model whose scores are known by position of the training samples."""

    def influences_from_factors_by_token(self, factors: Tensor, x: object, y: object | None = None) -> Tensor:
        """[n_test, n_train, T]; positions sum to the samples' influence."""


def layers_of(model: InfluenceFunctionModel) -> Mapping[str, tuple[str, ...]]:
    """Layer → its parameters: the model's blocks where there are several, else the layers of the only one."""
    names = model.risk.blocks.names
    if len(names) > 1:
        return names
    layers: dict[str, list[str]] = {}
    for name in model.risk.blocks.shapes:
        layers.setdefault(name.rpartition(".")[0] or type(model.risk.module).__name__, []).append(name)
    return {layer: tuple(own) for layer, own in layers.items()}


def influences_by_layer(model: InfluenceFunctionModel, factors: Tensor, batch: Batch) -> "OrderedDict[str, Tensor]":
    """Influences of training samples from factors [n_test, p], layer by layer (`layers_of`): layer → [n_test, n].

    They sum to `influences_from_factors`: an inner product over the parameters is a sum over any parts of them. batch:
    as `place` returns it. One gradient pass.
    """
    blocks = model.risk.blocks
    if len(blocks.names) > 1:
        own = {block: factors[:, columns] for block, columns in blocks.columns.items()}
        return model.influences_from_factors_by_block(own, batch)
    columns, start = {}, 0
    for name, shape in blocks.shapes.items():
        columns[name] = slice(start, start := start + shape.numel())
    by_parameter = model.influences_by_columns(factors, columns, batch)
    layers = layers_of(model).items()
    return OrderedDict((layer, sum((by_parameter[p] for p in own[1:]), by_parameter[own[0]])) for layer, own in layers)
