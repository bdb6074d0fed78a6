"""The scorer of an influence model: from factors to influences, and the gradients that both are made of.

A `Scorer` works with the gradients of samples as autograd gives them. `LayerScorer` in `influence.layer_scoring` puts
everything together from the layers of a model.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from distinfluence.errors import SettingError, ShapeError
from distinfluence.influence.scores import InfluenceMode, Tile, influence_mode, scores_by_block, tile_of
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import SampleGradients, loss_gradients, measurement_gradients
from distinfluence.model.sample_risk import SampleRisk


class Scorer:
    """Gradients and scores of samples, for one risk. Batches are placed, as `InfluenceFunctionModel.place` does it."""

    def __init__(self, risk: SampleRisk) -> None:
        self.risk = risk

    def loss_gradients(self, batch: Batch) -> SampleGradients:
        """Return the gradient of each sample's training loss, [n, p], and the losses."""
        return loss_gradients(self.risk, batch)

    def measurement_gradients(self, batch: Batch) -> SampleGradients:
        """Return the gradient of each sample's measurement, [n, p], and the measurements."""
        return measurement_gradients(self.risk, batch)

    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
        """Return the influences of the batch's samples, from factors [n_test, p], with losses and gradient norms."""
        return tile_of(self.risk, factors, batch, mode)

    def scores(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str) -> Tensor:
        """Return the influences alone, [n_test, n, ...], from factors [n_test, p]."""
        if influence_mode(mode) is InfluenceMode.UP:
            return self.tile(factors, batch).values
        return scores_by_block(self.risk, factors, {"": slice(0, self.risk.size)}, batch, mode)[""]

    def by_block(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str) -> "OrderedDict[str, Tensor]":
        """Return the influences from the columns of each block alone: block → [n_test, n, ...]."""
        return scores_by_block(self.risk, factors, self.risk.blocks.columns, batch, mode)

    def checked(self, factors: Tensor, size: int | None = None) -> Tensor:
        """Return the factors on the risk's device and in its dtype.

        Args:
            factors: The factors, [n_test, size].
            size: The number of columns that they must have; p if None.

        Raises:
            ShapeError: If they have another shape.
        """
        size = self.risk.size if size is None else size
        if factors.ndim != 2 or factors.shape[1] != size:
            raise ShapeError(
                f"`factors` must be [n_test, {size}], got {tuple(factors.shape)}. "
                "Pass what `influence_factors` returned."
            )
        return factors.to(self.risk.device, self.risk.dtype)

    def joined(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Return the factors of all blocks, block → [n_test, p_block], side by side: [n_test, p].

        Raises:
            ShapeError: If the blocks or the shapes are others.
        """
        blocks = self.risk.blocks
        if list(factors) != list(blocks.names):
            raise ShapeError(
                f"`factors` must have the blocks {list(blocks.names)}, got {list(factors)}. "
                "Pass what `influence_factors_by_block` returned."
            )
        return torch.cat([self.checked(factors[b], c.stop - c.start) for b, c in blocks.columns.items()], dim=1)


def trains_or_tests(
    x_test: object, y_test: Tensor | None, x: object | None, y: Tensor | None
) -> tuple[object, Tensor | None]:
    """Return the training samples, the test samples if left out. Raises SettingError for targets without inputs."""
    if x is not None:
        return x, y
    if y is not None:
        raise SettingError("`x` must come with `y`, got `y` alone. Pass both, or neither for the test samples.")
    return x_test, y_test
