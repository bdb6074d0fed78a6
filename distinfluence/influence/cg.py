"""Influence by conjugate gradients on curvature products: nothing of size p × p is made.

Memory: 12 blocks of rows [k, p], 11 row by row. Work: one pass over the training data for each iteration, for all k
test points together, so give it many at once.
"""

from functools import partial

from torch import nn
from typing_extensions import override

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.cg import CG
from distinfluence.solvers.preconditioner import Preconditioner


class CgInfluence(InfluenceFunctionModel):
    """Influence by conjugate gradients.

    Conjugate gradients need A + λI positive definite: with the Hessian, negative curvature stops the rows that meet it
    and is reported. Rows that rounding keeps from their tolerance are reported as stagnated.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        rtol: Relative tolerance. A row has converged when ‖g − (A + λI) x‖ ≤ max(rtol·‖g‖, atol), as in SciPy. If None,
            1e-7 in float64 and 1e-4 in float32, whose rounding often allows no less.
        atol: Absolute tolerance.
        maxiter: The largest number of iterations; about 10·p if None.
        use_block_cg: Whether all rows share one breakdown-free block iteration (Ji & Li 2017), or each row has its own.
        pre_conditioner: See `Preconditioner`; none if None.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = CgInfluence(model, torch.nn.MSELoss(), second_order_mode="ggn").fit(data)
    >>> _, report = influence.influence_factors(*data, return_report=True)
    >>> report.converged
    tensor([True, True])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        rtol: float | None = None,
        atol: float = 1e-7,
        maxiter: int | None = None,
        use_block_cg: bool = True,
        pre_conditioner: Preconditioner | None = None,
        *,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = partial(
            BlockCG if use_block_cg else CG, rtol=rtol, atol=atol, maxiter=maxiter, preconditioner=pre_conditioner
        )
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)

    @override
    def settings(self) -> dict[str, object]:
        settings = super().settings()
        helper = settings.pop("preconditioner")
        block = isinstance(self._template, BlockCG)
        return settings | {"use_block_cg": block, "pre_conditioner": None if helper is None else repr(helper)}
