"""Influence by LiSSA: mini-batch products alone, and many of them.

Memory: about twelve blocks of rows [k, p], eight in full batches. Work: one product with a mini-batch for each step;
one pass for the true residuals.
"""

import hashlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distinfluence.curvature import SecondOrderMode
from distinfluence.errors import ShapeError
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.base import Solver
from distinfluence.solvers.lissa import LiSSA


class LissaInfluence(InfluenceFunctionModel):
    """Influence by LiSSA (Agarwal, Bullins & Hazan 2017).

    Slow where λ is small: prefer `CgInfluence`, or `ChebyshevInfluence` where inner products are what costs.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        maxiter: The number of steps, each a product with one mini-batch of the training data.
        dampen: Acts as further damping of scale·dampen, which the report states.
        scale: A number above half of the largest eigenvalue of A + λI, also on every mini-batch; found if None. Too
            small a scale diverges; the report then says which one would do.
        h0: Where the recursion starts, s times a guess of the solution over all blocks' parameters: [p], or [k, p] for
            as many test points.
        rtol: The relative residual at which a row stops, see `LiSSA`.
        full_batch: Whether each step takes all training data.
        seed: The seed of the order of the mini-batches.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.
        ShapeError: If `h0` has another shape.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = LissaInfluence(model, torch.nn.MSELoss(), 0.1, scale=None).fit(data)
    >>> _, report = influence.influence_factors(*data, return_report=True)
    >>> report.converged
    tensor([True, True])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float | None = 10.0,
        h0: Tensor | None = None,
        rtol: float = 1e-4,
        *,
        full_batch: bool = False,
        seed: int = 0,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = partial(
            LiSSA, maxiter=maxiter, dampen=dampen, scale=scale, rtol=rtol, full_batch=full_batch, seed=seed, h0=h0
        )
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)
        self._h0 = h0
        if h0 is not None and (h0.ndim not in (1, 2) or h0.shape[-1] != self.n_parameters):
            raise ShapeError(f"`h0` must be [p] or [k, p] with p={self.n_parameters}, got {list(h0.shape)}.")

    @override
    def block_solver(self, block: str, damping: float) -> Solver[Any]:
        columns = self.risk.blocks.columns[block]  # the recursion starts from the block's part of `h0`
        h0 = None if self._h0 is None else self._h0[..., columns]
        return replace(self._template, damping=damping, h0=h0)  # type: ignore[type-var]

    @override
    def settings(self) -> dict[str, object]:
        return super().settings() | {"h0": _digest(self._h0)}


def _digest(tensor: Tensor | None) -> str | None:
    """Return what stands for a tensor in settings: its numbers would be as many as the model has."""
    if tensor is None:
        return None
    values = tensor.detach().to("cpu", torch.float64).contiguous()
    return f"{list(values.shape)} sha256 {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"
