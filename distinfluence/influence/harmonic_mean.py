"""Influence by DataInf: one pass over the gradients, no fit, and no claim to be exact."""

from functools import partial

from torch import nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.harmonic_mean import InverseHarmonicMean


class InverseHarmonicMeanInfluence(InfluenceFunctionModel):
    """DataInf: the mean of the samples' damped inverses in place of the inverse of their mean (the empirical Fisher).

    Use a block structure: the method is meant for blocks of the size of a LoRA adapter, and is about as good as a dot
    product of gradients on whole networks. Residuals in the report refer to the empirical Fisher matrix: rows that do
    not solve it are "approximate", not converged.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: λ > 0. The authors' rule is `RelativeDamping(0.1)`, a tenth of the mean squared gradient
            norm over the number of parameters.
        residual_rows: For how many test points of each solve the residual is measured, in one pass; if None 8, or
            a tenth of them if that is less.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0]]), torch.zeros(1, 1)
    >>> influence = InverseHarmonicMeanInfluence(model, torch.nn.MSELoss(), 1.0).fit(data)
    >>> g = 2 * model.weight.detach()  # exact for one sample
    >>> torch.allclose(influence.influences(*data), g * g / (g * g + 1))
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization,
        *,
        residual_rows: int | None = None,
        block_structure: BlockStructure = BlockMode.FULL,
    ) -> None:
        solver = partial(InverseHarmonicMean, residual_rows=residual_rows)
        super().__init__(model, loss, hessian_regularization, solver, block_structure, SecondOrderMode.EMPIRICAL_FISHER)
        for value in self._asked.values():
            if isinstance(value, float):
                self.solver(value)  # refuses λ = 0 before anything is computed
