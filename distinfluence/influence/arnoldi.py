"""Influence from the leading eigenvectors of the curvature, in the space that they span.

Memory: the basis of the fit (see `Arnoldi`), then rank·p numbers; `influences` holds n × rank numbers of the gradients
of n samples. Another damping costs nothing.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.influence.fitted import Curvature, Fitted
from distinfluence.influence.scores import InfluenceMode, influence_mode
from distinfluence.model.batch import Batch
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.gradients import SampleGradients, micro_batches
from distinfluence.model.objective import Loss, Objective
from distinfluence.model.reducer import ChunkReducer
from distinfluence.solvers.arnoldi import Arnoldi

ByBlock = OrderedDict[str, Tensor]


class ArnoldiInfluence(InfluenceFunctionModel):
    """Influence by (A + λI)⁻¹ on the span of A's leading eigenvectors (Schioppa et al. 2022).

    Without the complement, `influences` and `influences_by_block` project each gradient as soon as it is made, and take
    no pass over the training data; `influence_factors` makes factors [n_test, p] and their residuals.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        rank_estimate: The number of eigenvectors in each block; at most the block's size.
        tol: The residual of an eigenvector, relative to ‖A‖, at which it counts as converged.
        complement: Whether what is orthogonal to the eigenvectors is kept, divided by λ > 0. Without it, that part is
            lost: with few eigenvectors it is most of a gradient, as the report says.
        indefinite: "keep" or "drop" directions of negative curvature.
        block_size: The rows of a pass while fitting, see `Arnoldi`.
        max_basis: The rows of the basis that is held while fitting, see `Arnoldi`.
        seed: The seed of the start vectors.
        residual_rows: For how many test points of each solve the residual is measured, in one pass; if None 8, or
            a tenth of what the fit multiplies if that is less.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = ArnoldiInfluence(model, torch.nn.MSELoss(), hessian_regularization=1.0).fit(data)
    >>> gradients = 2 * data[0] ** 2 * model.weight.detach()  # A = 10
    >>> torch.allclose(influence.influences(*data), gradients @ gradients.T / 11)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        rank_estimate: int = 10,
        tol: float = 1e-6,
        *,
        complement: bool = False,
        indefinite: Literal["keep", "drop"] = "keep",
        block_size: int | None = None,
        max_basis: int | None = None,
        seed: int = 0,
        residual_rows: int | None = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = partial(
            Arnoldi,
            rank_estimate=rank_estimate,
            tol=tol,
            complement=complement,
            indefinite=indefinite,
            block_size=block_size,
            max_basis=max_basis,
            seed=seed,
            residual_rows=residual_rows,
        )
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)
        self._complement = complement

    @override
    def _curvature(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor] | None = None) -> Curvature:
        # without the complement, all happens in the projected space
        return replace(super()._curvature(reducer, arrays), direct=None if self._complement else _between)

    @override
    def influences_by_block(
        self,
        x_test: object,
        y_test: object | None = None,
        x: object | None = None,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> ByBlock:
        refused = x is None and y is not None  # by the general way, with its error
        if influence_mode(mode) is not InfluenceMode.UP or self._complement or refused:
            return super().influences_by_block(x_test, y_test, x, y, mode)
        tests = self.place(x_test, y_test)
        return _projected(self._fitted(), tests, tests if x is None else self.place(x, y))


def _between(fitted: Fitted, tests: Batch, trains: Batch) -> Tensor:
    by_block = list(_projected(fitted, tests, trains).values())
    return torch.stack(by_block).sum(dim=0) if len(by_block) > 1 else by_block[0]


def _projected(fitted: Fitted, tests: Batch, trains: Batch) -> ByBlock:
    """(g_test Vᵀ)(D + λ)⁻¹(g_train Vᵀ)ᵀ, block by block: [n_test, n_train] each."""
    left = _coordinates(fitted, tests, fitted.scorer.measurement_gradients)
    right = _coordinates(fitted, trains, fitted.scorer.loss_gradients)
    return OrderedDict(
        (block, left[block] * solver.inverse_values(fitted.states[block]).to(fitted.scorer.risk.dtype) @ right[block].T)
        for block, solver in fitted.solvers.items()
        if isinstance(solver, Arnoldi)
    )


def _coordinates(fitted: Fitted, batch: Batch, gradients_of: Callable[[Batch], SampleGradients]) -> dict[str, Tensor]:
    """Gradients of samples in the space of each block's eigenvectors: block → [n, rank]."""
    columns, states = fitted.scorer.risk.blocks.columns, fitted.states
    parts: list[dict[str, Tensor]] = []
    for part in micro_batches(fitted.scorer.risk, batch):
        rows = gradients_of(part).rows
        parts.append({block: rows[:, c] @ states[block].vectors.T for block, c in columns.items()})
        del rows  # or they are held while the next are made
    return {block: torch.cat([each[block] for each in parts]) for block in columns}
