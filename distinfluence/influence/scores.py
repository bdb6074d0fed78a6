"""From factors to influences: the gradients of training samples, made in micro-batches, against every factor.

A `Scorer` does this for one risk; `LayerScorer` in `influence.layer_scoring` puts everything together from the layers
of a model instead.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from distinfluence.errors import NonFiniteError, SettingError, ShapeError
from distinfluence.influence.checks.mixed import check_mixed
from distinfluence.layers.layout import LayerLayout, layout_of
from distinfluence.layers.queries import UnitQueries, unit_queries
from distinfluence.layers.scores import layer_scores
from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.gradients import (
    SampleGradients,
    loss_gradients,
    measurement_gradients,
    micro_batches,
    mixed_gradients,
)
from distinfluence.model.sample_risk import SampleRisk

LAYOUTS: WeakKeyDictionary[SampleRisk, LayerLayout | None] = WeakKeyDictionary()  # None: gradients are made whole
CONFIRMED = 4  # samples of a batch whose scores are compared with those of their gradients


class InfluenceMode(StrEnum):
    """What is done to the training point: weighted up, or its input moved."""

    UP = "up"
    PERTURBATION = "perturbation"

    Up = "up"  # the seed interface's spelling
    Perturbation = "perturbation"


def influence_mode(mode: InfluenceMode | str) -> InfluenceMode:
    """Return the mode of that name.

    Raises:
        SettingError: If there is no such mode.
    """
    try:
        return InfluenceMode(mode)
    except ValueError:
        raise SettingError(
            f"`mode` must be one of {[m.value for m in InfluenceMode]}, got {mode!r}. Choose one of these."
        ) from None


@dataclass(frozen=True)
class Tile:
    """Influences on n training samples.

    Args:
        values: The influences, [n_test, n, ...].
        losses: The losses of the training samples, [n].
        gradient_norms: The norms of their gradients, [n].
    """

    values: Tensor
    losses: Tensor
    gradient_norms: Tensor


def tile_of(risk: SampleRisk, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
    """Influences of a batch of training samples, with their losses and gradient norms; one gradient pass.

    factors: [n_test, p]; batch: placed.
    """
    factors = factors.to(risk.dtype)
    if influence_mode(mode) is InfluenceMode.UP and by_layers(risk.device) and len(factors):
        tile = _by_layers(risk, factors, batch)
        if tile is not None:
            return tile
    if influence_mode(mode) is InfluenceMode.PERTURBATION:
        check_mixed(risk, batch)
    values, losses, norms = [], [], []
    for part in micro_batches(risk, batch):
        gradients = loss_gradients(risk, part)
        losses.append(gradients.values)
        norms.append(gradients.norms)
        if influence_mode(mode) is InfluenceMode.UP:
            with risk.products():
                values.append(factors @ gradients.rows.T)
        else:
            values.append(mixed_gradients(risk, part, factors))
        del gradients  # or they are held while the next are made
    return Tile(torch.cat(values, dim=1), torch.cat(losses), torch.cat(norms))


def layer_tile(risk: SampleRisk, layout: LayerLayout, queries: Sequence[UnitQueries], batch: Batch) -> Tile:
    """Return the scores of a batch's samples on queries, from the layers, with all blocks in one."""
    done = list(layer_scores(risk, layout, queries, batch))
    return Tile(
        torch.cat([part.by_block[""] for part in done], dim=1),
        torch.cat([part.losses for part in done]),
        torch.cat([part.gradient_norms for part in done]),
    )


def by_layers(device: torch.device) -> bool:
    """Whether known layers' scores are made layer by layer: on a GPU; a gain on a CPU has not been measured."""
    return device.type != "cpu"


def _by_layers(risk: SampleRisk, factors: Tensor, batch: Batch) -> Tile | None:
    """From inputs and output gradients of the layers, whose gradients [n, p] are never made.

    On a GPU: a micro-batch of gradients is many small kernels there, and few samples of a large model. None, from then
    on, where layers that are known have less than half of the parameters, or the model uses them in another way in
    this batch than in the first: some samples of every batch are compared with their gradients.
    """
    if risk not in LAYOUTS:
        first = layout_of(risk, batch)
        in_layers = sum(unit.size for unit in first.units if unit.uses)
        LAYOUTS[risk] = first if 2 * in_layers >= risk.size else None
    layout = LAYOUTS[risk]
    if layout is None:
        return None
    try:
        tensors = risk.blocks.unflatten(factors)
        queries = [unit_queries(unit, tensors) for unit in layout.units]
        tile = layer_tile(risk, layout, queries, batch)
    except (torch.OutOfMemoryError, NonFiniteError):
        raise
    except (RuntimeError, ValueError, IndexError):  # a layout that is not this batch's, shapes that do not go together
        LAYOUTS[risk] = None
        return None
    if not _confirmed(risk, factors, batch, tile):
        LAYOUTS[risk] = None
        return None
    return tile


def _confirmed(risk: SampleRisk, factors: Tensor, batch: Batch, tile: Tile) -> bool:
    """Whether scores and norms of the last samples are those of their gradients, up to rounding.

    As `agree` has it, and what rounding does to inner products of p numbers. In mixed precision a tenth: fifty
    roundings of a pass to bfloat16's 2⁻⁹, while the gradient of another sample differs by its own size.
    """
    n = batch_length(batch)
    gradients = loss_gradients(risk, take(batch, max(0, n - CONFIRMED), n))
    some = slice(-len(gradients.values), None)
    narrow = risk.autocast if risk.autocast is not None else risk.dtype
    share = 0.1 if risk.autocast is not None else 10 * torch.finfo(risk.dtype).eps ** 0.5
    expected = factors @ gradients.rows.T
    rounding = torch.finfo(narrow).eps * risk.size**0.5 * factors.norm() * gradients.norms.norm()
    scores = (tile.values[:, some] - expected).norm() <= share * expected.norm() + rounding
    norms = (tile.gradient_norms[some] - gradients.norms).norm() <= share * gradients.norms.norm()
    return bool(scores & norms)


def scores_by_block(
    risk: SampleRisk, factors: Tensor, columns: Mapping[str, slice], batch: Batch, mode: InfluenceMode | str
) -> "OrderedDict[str, Tensor]":
    """Influences of a batch of training samples, from the columns of each block alone: block → [n_test, n, ...]."""
    if influence_mode(mode) is InfluenceMode.UP:
        parts = [_up(risk, factors, columns, part) for part in micro_batches(risk, batch)]
        return OrderedDict((block, torch.cat([part[block] for part in parts], dim=1)) for block in columns)
    check_mixed(risk, batch)
    whole = len(columns) == 1
    return OrderedDict(
        (block, mixed_gradients(risk, batch, factors if whole else _only(factors, c))) for block, c in columns.items()
    )


def _up(risk: SampleRisk, factors: Tensor, columns: Mapping[str, slice], batch: Batch) -> dict[str, Tensor]:
    rows = loss_gradients(risk, batch).rows
    with risk.products():
        return {block: factors[:, c] @ rows[:, c].T for block, c in columns.items()}


def _only(factors: Tensor, columns: slice) -> Tensor:
    alone = torch.zeros_like(factors)
    alone[:, columns] = factors[:, columns]
    return alone


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
        return self.by_columns(factors, self.risk.blocks.columns, batch, mode)

    def by_columns(
        self, factors: Tensor, columns: Mapping[str, slice], batch: Batch, mode: InfluenceMode | str
    ) -> "OrderedDict[str, Tensor]":
        """Return the influences from some columns alone: name → [n_test, n, ...]."""
        return scores_by_block(self.risk, factors, columns, batch, mode)

    def checked_mode(self, mode: InfluenceMode | str) -> InfluenceMode:
        """Return the mode of that name, if these scores have it.

        Raises:
            SettingError: If there is no such mode, or the method has no scores of it.
        """
        return influence_mode(mode)

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
    x_test: object, y_test: object | None, x: object | None, y: object | None
) -> tuple[object, object | None]:
    """Return the training samples, the test samples if left out. Raises SettingError for targets without inputs."""
    if x is not None:
        return x, y
    if y is not None:
        raise SettingError("`x` must come with `y`, got `y` alone. Pass both, or neither for the test samples.")
    return x_test, y_test
