"""Influences as sums over layers, whatever the curvature's blocks; which models know the positions of a sequence."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.scores import InfluenceMode, scores_by_block
from distinfluence.model.batch import Batch


@runtime_checkable
class SupportsTokens(Protocol):
    """An influence model whose scores are known by position of the training samples."""

    def influences_from_factors_by_token(self, factors: Tensor, x: object, y: Tensor | None = None) -> Tensor:
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
    by_parameter = scores_by_block(model.risk, factors, columns, batch, InfluenceMode.UP)
    layers = layers_of(model).items()
    return OrderedDict((layer, sum((by_parameter[p] for p in own[1:]), by_parameter[own[0]])) for layer, own in layers)
