"""Influence by whatever method fits the size of the problem: what to take if you're not sure."""

from torch import nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.influence.demand import BESIDE_BASIS, GROWING, USUAL_BASIS, Demand, dense_demand
from distinfluence.memory import free_bytes
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.auto import DIRECT_SIZE, SHARE, Auto
from distinfluence.solvers.base import default_rtol


class AutoInfluence(InfluenceFunctionModel):
    """Influence on the Gauss–Newton matrix by the method that size, memory and accuracy ask for.

    A dense factorisation up to 10,000 parameters in a block; then a multi-shift Krylov basis while it fits into memory;
    then block conjugate gradients with a Nyström preconditioner; Chebyshev semi-iteration where not even those fit.
    `fit_report` says what was chosen and why. rtol: 1e-7 in float64 and 1e-4 in float32 if None. rows: test points that
    are solved for together, about. memory: bytes that the solver may take, half of what is free if None. Other
    parameters as `InfluenceFunctionModel`; mind the default of `second_order_mode`, which is "ggn" here.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = AutoInfluence(model, torch.nn.MSELoss(), 0.1).fit(data)
    >>> influence.fit_report.remarks
    ('chose Direct: 1 parameters are few enough for a dense factorisation',)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        rtol: float | None = None,
        *,
        rows: int = 1024,
        memory: int | None = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.GGN,
    ) -> None:
        self.rtol = rtol
        self.rows = rows
        self.memory = memory
        super().__init__(
            model,
            loss,
            hessian_regularization,
            block_structure=block_structure,
            second_order_mode=second_order_mode,
        )
        self.solver(0.0)  # its checks of the settings, before anything is computed

    def solver(self, damping: float) -> Auto:
        """The choice."""
        rtol = default_rtol(self.risk.dtype) if self.rtol is None else self.rtol
        return Auto(damping=damping, rtol=rtol, rows=self.rows, memory=self.memory)

    def demand(self) -> Demand:
        """Those of a dense factorisation for few parameters; else a Krylov basis as large as `memory` allows."""
        sizes = self.risk.blocks.sizes
        if max(sizes) <= DIRECT_SIZE:
            return dense_demand(sizes, self.risk.dtype.itemsize, self.looks)
        most = self.memory or int(SHARE * free_bytes(self.risk.device))
        most *= GROWING
        return Demand(row_vectors=2.0 * USUAL_BASIS, most_bytes=most, beside_vectors=BESIDE_BASIS)

    def settings(self) -> dict[str, object]:
        """The common settings and those of the choice."""
        return self._common_settings() | {"rtol": self.rtol, "rows": self.rows, "memory": self.memory}
