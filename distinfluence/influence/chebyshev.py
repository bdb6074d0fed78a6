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
    """Influence by Chebyshev semi-iteration. It needs A + λI positive definite, and says so where it is not.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        rtol: A row has converged when ‖g − (A + λI) x‖ ≤ rtol·‖g‖. If None, 1e-7 in float64 and 1e-4 in float32.
        maxiter: The largest number of steps; 5000 if None.
        seed: The seed of the start vectors for the ends of the spectrum.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.

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
        solver = partial(Chebyshev, rtol=rtol, maxiter=maxiter, seed=seed)
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)
