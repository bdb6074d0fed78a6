"""Influence by conjugate gradients on curvature products: nothing of size p × p is made.

Memory: 12 blocks of rows [k, p], 11 row by row. Work: one pass over the training data for each iteration, for all k
test points together, so give it many at once.
"""

from torch import nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.influence.demand import SKETCHING, Demand
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.base import default_rtol
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.cg import CG
from distinfluence.solvers.preconditioner import Preconditioner


class CgInfluence(InfluenceFunctionModel):
    """Influence by conjugate gradients.

    rtol, atol: a row has converged when ‖g − (A + λI) x‖ ≤ max(rtol·‖g‖, atol), as SciPy means it; an rtol of None is
    1e-7 in float64 and 1e-4 in float32, whose rounding often leaves no less. maxiter: bound on the iterations, about
    10·p if None. use_block_cg: one breakdown-free block iteration for all rows (Ji & Li 2017), else each row for
    itself. pre_conditioner: see `Preconditioner`. Other parameters as `InfluenceFunctionModel`. Conjugate gradients
    need A + λI positive definite: with the Hessian, negative curvature stops the rows that meet it and is reported.
    Rows that rounding keeps from their tolerance are reported as stagnated.

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
        self.rtol = rtol
        self.atol = atol
        self.maxiter = maxiter
        self.use_block_cg = use_block_cg
        self.pre_conditioner = pre_conditioner
        super().__init__(
            model,
            loss,
            hessian_regularization,
            block_structure=block_structure,
            second_order_mode=second_order_mode,
        )
        self.solver(0.0)  # its checks of the settings, before anything is computed

    def solver(self, damping: float) -> CG | BlockCG:
        """Block or row-wise conjugate gradients."""
        method = BlockCG if self.use_block_cg else CG
        return method(
            damping=damping,
            rtol=default_rtol(self.risk.dtype) if self.rtol is None else self.rtol,
            atol=self.atol,
            maxiter=self.maxiter,
            preconditioner=self.pre_conditioner,
        )

    def demand(self) -> Demand:
        """Solutions, residuals, directions and their images, and copies of them while blocks are made orthonormal."""
        helped = self.pre_conditioner is not None
        state = (getattr(self.pre_conditioner, "rank", 0) or 0) * self.risk.size * self.risk.dtype.itemsize
        rows = 12.0 if self.use_block_cg else 11.0 + helped
        return Demand(SKETCHING * state, state, rows, fit_passes=int(helped))

    def settings(self) -> dict[str, object]:
        """The common settings and those of the iteration."""
        return self._common_settings() | {
            "rtol": self.rtol,
            "atol": self.atol,
            "maxiter": self.maxiter,
            "use_block_cg": self.use_block_cg,
            "pre_conditioner": None if self.pre_conditioner is None else repr(self.pre_conditioner),
        }
