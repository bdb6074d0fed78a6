"""Influence by a dense factorisation of the curvature: exact, for up to about 10⁴ parameters.

Memory: two p × p matrices in float64 (p = 10⁴: 1.6 GB). Work: p products for the matrix, p³/3 flops for its Cholesky
factor, once; 2·p² flops for each test point.
"""

from functools import partial

from torch import nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.direct import Direct


class DirectInfluence(InfluenceFunctionModel):
    """Exact influence: (A + λI) is made as a dense matrix for each block and factorised once.

    An indefinite A + λI is solved all the same; `fit_report.positive_definite` says so. Rows that a singular matrix
    cannot solve are reported as not converged.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = DirectInfluence(model, torch.nn.MSELoss(), hessian_regularization=0.0).fit(data)
    >>> gradients = 2 * data[0] ** 2 * model.weight.detach()  # A = 10
    >>> torch.allclose(influence.influences(*data), gradients @ gradients.T / 10)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization,
        *,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = partial(Direct)
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)
