"""Influence by one Krylov basis for all test points and every damping: the fewest passes, for the memory of the basis.

Memory: rows × passes vectors [p]. Work: one pass over the training data for each block of the basis, and one for the
true residuals; a list of dampings costs the passes of the smallest.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.base import Solver
from distinfluence.solvers.krylov import BASIS_BYTES, BlockKrylov
from distinfluence.solvers.refined import Refined


class KrylovInfluence(InfluenceFunctionModel):
    """Influence by a multi-shift block Krylov solver.

    Give it many test points at once; `influences_at` scores a whole list of dampings. An indefinite A + λI is solved
    too, by least residual, and the report says so.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        rtol: A row has converged when ‖g − (A + λI) x‖ ≤ rtol·‖g‖. If None, 1e-7 in float64 and 1e-4 in float32.
        maxiter: The largest number of passes of a solve; 200 if None.
        basis_bytes: The memory for the basis. Beyond it, block conjugate gradients go on.
        refine: Whether residuals of a float32 model are brought to float64 quality (1e-10); factors are float64 then.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = KrylovInfluence(model, torch.nn.MSELoss(), 0.1).fit(data)
    >>> influence.influences_at([0.1, 1.0, 10.0], *data).shape
    torch.Size([3, 2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        rtol: float | None = None,
        maxiter: int | None = None,
        *,
        basis_bytes: int = BASIS_BYTES,
        refine: bool = False,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        solver = partial(BlockKrylov, rtol=rtol, maxiter=maxiter, basis_bytes=basis_bytes)
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)
        self._refine = refine

    @override
    def block_solver(self, block: str, damping: float) -> Solver[Any]:
        solver = self.solver(damping)
        return Refined(solver) if self._refine and self.risk.dtype != torch.float64 else solver

    @override
    def settings(self) -> dict[str, object]:
        settings = super().settings() | {"refine": self._refine}
        del settings["basis_bytes"]  # what the memory does to rounding is no setting of the numbers
        return settings
