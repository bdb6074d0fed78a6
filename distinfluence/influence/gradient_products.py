"""Products of gradients, the baselines that any curvature should beat: influences with A = 0 and λ = 1.

    dot:     I[i, j] = ⟨g_i, g_j⟩                       cosine:  I[i, j] = ⟨g_i, g_j⟩ / (‖g_i‖·‖g_j‖)

with g_i the gradient of test point i's measurement and g_j of training point j's loss. The identity is a matrix here,
not a method: its systems are solved exactly, without a pass over the training data. Factors are the gradients g_i; the
cosine is made of the dot products where they are scored.
"""

from abc import ABC
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from distinfluence.curvature import SecondOrderMode
from distinfluence.errors import SettingError
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.influence.fitted import Curvature
from distinfluence.influence.report import SolveReport
from distinfluence.influence.scores import InfluenceMode, Scorer, Tile, influence_mode
from distinfluence.influence.self_influence import SelfInfluences
from distinfluence.model.batch import Batch
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.gradients import loss_gradients, micro_batches
from distinfluence.model.objective import Loss, Objective
from distinfluence.model.reducer import ChunkReducer
from distinfluence.solvers.demand import Demand, SolveWork, Systems
from distinfluence.solvers.ekfac import Ekfac

IDENTITY = 1.0  # The damping λ with which A = 0 is the identity.


class GradientProducts(InfluenceFunctionModel, ABC):
    """An influence model without curvature; arguments as for `GradientDotInfluence`."""

    brackets_self_influence = False

    def __init__(
        self, model: nn.Module, loss: Loss | Objective, *, block_structure: BlockStructure = BlockMode.FULL
    ) -> None:
        # any operator whose eigenvectors are known is solved for by this solver; those of A = 0 are
        super().__init__(model, loss, IDENTITY, partial(Ekfac), block_structure, SecondOrderMode.NONE)

    @property
    @override
    def solves_over_data(self) -> bool:
        return False

    @property
    @override
    def _products(self) -> None:  # gradients alone are checked
        return None

    @override
    def _demand(self, systems: Systems) -> Demand:
        return Demand(row_vectors=5.0, solve=SolveWork(0, 0), by_method=True)

    @property
    @override
    def kind_of_bound(self) -> str:
        return "none"

    @override
    def solve(self, gradients: Tensor) -> tuple[Tensor, SolveReport]:
        # Bounds cover the error of solves, and there is none; they do not cover the rounding of the gradients.
        factors, report = super().solve(gradients)
        return factors, _unbounded(report)

    @override
    def solve_at(self, gradients: Tensor, dampings: Sequence[Regularization]) -> list[tuple[Tensor, SolveReport]]:
        return [(factors, _unbounded(report)) for factors, report in super().solve_at(gradients, dampings)]


class GradientDotInfluence(GradientProducts):
    """Dot products of gradients: influence with the identity in place of the curvature.

    What is left of an influence when the damping outweighs the curvature, up to the factor λ. A method that does not
    rank training points better than this has made nothing of its curvature. A fit checks the derivatives and makes no
    pass over the training data. Scores are exact to the rounding of the gradients, and carry no error bounds.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names, for influences by
            block; the sum over blocks is the same.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> g = 2 * model.weight.detach() * torch.tensor([1.0, 4.0])  # the gradients of both samples
    >>> torch.allclose(GradientDotInfluence(model, torch.nn.MSELoss()).fit(data).influences(*data), g.T @ g)
    True
    """


class GradientCosineInfluence(GradientProducts):
    """Cosines of the angles between gradients, from -1 to 1; 0 where a gradient is zero.

    The dot product favours training points with large gradients, such as outliers; the cosine does not. Mode
    "perturbation" is refused: the norm of a training gradient changes with its input, too.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names, for what each
            block contributes to the cosine of the whole gradients.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> GradientCosineInfluence(model, torch.nn.MSELoss()).fit(data).influences(*data).round(decimals=3)
    tensor([[1., 1.],
            [1., 1.]])
    """

    normalised = True

    @property
    @override
    def _scorer(self) -> Scorer:
        return CosineScorer(self.risk)

    @override
    def _curvature(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor] | None = None) -> Curvature:
        return Curvature(self._operators(reducer), self._scorer)

    @override
    def self_influences(
        self, x: object, y: object | None = None, *, rtol: float = 1e-3, maxiter: int = 500
    ) -> SelfInfluences:
        return self.self_influences_by_solve(x, y)

    @override
    def self_influences_by_solve(self, x: object, y: object | None = None) -> SelfInfluences:
        # of a gradient with itself
        values = (self.loss_gradients(self.place(x, y)).norms > 0).double().cpu()
        return SelfInfluences(values, values, values, torch.zeros(len(values), dtype=torch.int64), rigorous=True)


class CosineScorer(Scorer):
    """Scores that are divided by the norms of both gradients."""

    @override
    def checked_mode(self, mode: InfluenceMode | str) -> InfluenceMode:
        if influence_mode(mode) is not InfluenceMode.UP:
            raise SettingError(
                f"`mode` must be 'up' for `GradientCosineInfluence`, got {str(mode)!r}: the norm of a training "
                "gradient changes with its input, too. Take `GradientDotInfluence`, which has this mode."
            )
        return InfluenceMode.UP

    @override
    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
        tile = super().tile(factors, batch, self.checked_mode(mode))
        return replace(tile, values=cosines(tile.values, _norms(factors), tile.gradient_norms))

    @override
    def scores(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str) -> Tensor:
        return self.tile(factors, batch, mode).values

    @override
    def by_columns(
        self, factors: Tensor, columns: Mapping[str, slice], batch: Batch, mode: InfluenceMode | str
    ) -> "OrderedDict[str, Tensor]":
        scored = super().by_columns(factors, columns, batch, self.checked_mode(mode))
        norms = torch.cat([loss_gradients(self.risk, part).norms for part in micro_batches(self.risk, batch)])
        return OrderedDict((name, cosines(values, _norms(factors), norms)) for name, values in scored.items())


def cosines(products: Tensor, norms: Tensor, gradient_norms: Tensor) -> Tensor:
    """Divide dot products [k, n] by the norms [k] and [n] of both sides; 0 where a norm is."""
    for sizes in (norms[:, None], gradient_norms):  # one after the other: the product of small norms may be 0
        sizes = sizes.to(products.dtype)
        products = torch.where(sizes > 0, products / torch.where(sizes > 0, sizes, 1.0), 0.0)
    return products


def _norms(factors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(factors, dim=1)
    return norms


def _unbounded(report: SolveReport) -> SolveReport:
    return replace(report, error_bound=None, rigorous=False)
