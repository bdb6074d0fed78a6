"""Influence by one Krylov basis for all test points and every damping: the fewest passes, for the memory of the basis.

Memory: rows × passes vectors [p]. Work: one pass over the training data for each block of the basis, and one for the
true residuals; a list of dampings costs the passes of the smallest.
"""

from torch import nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.influence.demand import BESIDE_BASIS, GROWING, USUAL_BASIS, Demand
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.base import default_rtol
from distinfluence.solvers.krylov import BASIS_BYTES, BlockKrylov


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
        self.rtol = rtol
        self.maxiter = maxiter
        self.basis_bytes = basis_bytes
        self.refine = refine
        super().__init__(
            model,
            loss,
            hessian_regularization,
            block_structure=block_structure,
            second_order_mode=second_order_mode,
        )
        self.solver(0.0)  # its checks of the settings, before anything is computed

    def solver(self, damping: float) -> BlockKrylov:
        """The multi-shift solver."""
        rtol = default_rtol(self.risk.dtype) if self.rtol is None else self.rtol
        return BlockKrylov(damping=damping, rtol=rtol, maxiter=self.maxiter, basis_bytes=self.basis_bytes)

    def demand(self) -> Demand:
        """A block of the basis and one of its images for each step, up to `basis_bytes`."""
        most = GROWING * self.basis_bytes
        return Demand(row_vectors=2.0 * USUAL_BASIS, most_bytes=most, beside_vectors=BESIDE_BASIS)

    def settings(self) -> dict[str, object]:
        """The common settings and those of the iteration."""
        return self._common_settings() | {"rtol": self.rtol, "maxiter": self.maxiter, "refine": self.refine}
