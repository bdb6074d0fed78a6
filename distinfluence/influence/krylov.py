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

    rtol: a row has converged when ‖g − (A + λI) x‖ ≤ rtol·‖g‖; 1e-7 in float64 and 1e-4 in float32 if None. maxiter:
    bound on the passes of a solve, 200 if None. basis_bytes: memory for the basis; beyond it, block conjugate gradients
    go on. refine: bring residuals to float64 quality (1e-10), for a float32 model; factors are float64 then. Other
    parameters as `InfluenceFunctionModel`. Give it many test points at once; `influences_at` scores a whole list of
    dampings. An indefinite A + λI is solved too, by least residual, and said in the report.

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
        super().__init__(
            model,
            loss,
            hessian_regularization,
            partial(BlockKrylov, rtol=rtol, maxiter=maxiter, basis_bytes=basis_bytes),
            block_structure=block_structure,
            second_order_mode=second_order_mode,
        )
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
