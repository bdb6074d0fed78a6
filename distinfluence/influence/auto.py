"""Influence by whatever method fits the size of the problem: what to take if you're not sure."""

from dataclasses import replace
from functools import partial

from torch import nn
from typing_extensions import override

from distinfluence.curvature import SecondOrderMode
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.model.blocks import BlockMode, BlockStructure
from distinfluence.model.objective import Loss, Objective
from distinfluence.solvers.auto import Auto
from distinfluence.solvers.demand import Demand, Systems, each_block


class AutoInfluence(InfluenceFunctionModel):
    """Influence on the Gauss–Newton matrix by the method that suits size, memory and accuracy.

    A dense factorisation, a multi-shift Krylov basis, block conjugate gradients with a Nyström preconditioner, or
    Chebyshev semi-iteration: whichever should be the fastest for the number of rows, parameters and samples, of those
    that fit into memory. `fit_report` says what was chosen, what was rejected, and the estimates.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ: a number, a `RelativeDamping` rule, or a mapping block → number or rule.
        rtol: The relative tolerance of each row. If None, 1e-7 in float64 and 1e-4 in float32.
        rows: About how many test points there will be in all.
        memory: The bytes that the solver may take; half of what is free if None.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names.
        second_order_mode: "ggn" by default here, "hessian" or "empirical_fisher".

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    >>> influence = AutoInfluence(model, torch.nn.MSELoss(), 0.1).fit(data)
    >>> influence.fit_report.remarks[0].partition(";")[0]
    'chose Direct for 1024 rows of 1 parameters (under 1 s, 0.1 MiB)'
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
        solver = partial(Auto, rtol=rtol, rows=rows, memory=memory)
        super().__init__(model, loss, hessian_regularization, solver, block_structure, second_order_mode)

    @override
    def settings(self) -> dict[str, object]:
        # With what a fit has chosen: free memory may suggest another method to the fit of a resumed run.
        if self._fit is None:
            return super().settings()
        chosen = {block: type(state.solver).__name__ for block, state in self._fit.states.items()}
        return super().settings() | {"chosen": chosen}

    @override
    def _demand(self, systems: Systems) -> Demand:
        if self._fit is None:
            return super()._demand(systems)
        solvers = [state.solver for state in self._fit.states.values()]
        each = zip(solvers, systems.blocks, strict=True)
        return each_block(systems, [solver.demand(replace(systems, blocks=(block,))) for solver, block in each])
