"""Influence by a Nyström sketch of the curvature: one or two passes for the fit, another for each call's residuals.

Memory: about 8·rank·p numbers while fitting, rank·p after it. Another damping costs nothing.
"""

from functools import partial

from torch import nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.nystroem import NystroemSketch


class NystroemSketchInfluence(InfluenceFunctionModel):
    """Influence by the exact inverse of Â + λI, with Â the randomised Nyström approximation of A (Frangella et al.).

    Without damping the sketch is inverted on its own range alone, and the report says so. A sketch holds no negative
    curvature: use "ggn" or "empirical_fisher". With the Hessian a second pass is made, the negative part is clipped,
    and `fit_report` says how large it was.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        rank: The rank of the sketch in each block; at most the block's size is used.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        seed: The seed of the sketch.
        residual_rows: For how many test points of each solve the residual is measured, in one pass; if None 8, or
            a tenth of the rank if that is less.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = NystroemSketchInfluence(model, torch.nn.MSELoss(), hessian_regularization=1.0).fit(data)
    >>> gradients = 2 * data[0] ** 2 * model.weight.detach()  # A = 10
    >>> torch.allclose(influence.influences(*data), gradients @ gradients.T / 11)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        rank: int = 10,
        hessian_regularization: Regularization = 0.0,
        *,
        seed: int = 0,
        residual_rows: int | None = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = partial(NystroemSketch, rank=rank, seed=seed, residual_rows=residual_rows)
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)
