"""Influence by Chebyshev semi-iteration: products and updates of rows, and nothing that waits for anything else.

Memory: 10 blocks of rows [k, p]. Work: one pass over the training data for each step, about ½·√cond·ln(2/rtol)
of them, and 5 to 40 passes of 4 rows to find the ends of the spectrum.
"""

from functools import partial

from torch import nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.chebyshev import Chebyshev


class ChebyshevInfluence(InfluenceFunctionModel):
    """Influence by Chebyshev semi-iteration.

    rtol: a row has converged when ‖g − (A + λI) x‖ ≤ rtol·‖g‖; 1e-7 in float64 and 1e-4 in float32 if None. maxiter:
    bound on the steps, 5000 if None. seed: of the start vectors that the ends of the spectrum are found from. Needs
    A + λI positive definite, and says so where it is not. Other parameters as `InfluenceFunctionModel`.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = ChebyshevInfluence(model, torch.nn.MSELoss(), 0.1, second_order_mode="ggn").fit(data)
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
        maxiter: int | None = None,
        *,
        seed: int = 0,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        super().__init__(
            model,
            loss,
            hessian_regularization,
            partial(Chebyshev, rtol=rtol, maxiter=maxiter, seed=seed),
            block_structure=block_structure,
            second_order_mode=second_order_mode,
        )
