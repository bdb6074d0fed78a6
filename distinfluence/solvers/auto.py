"""Choosing a solver by size, memory and what is known of the matrix, and saying which and why.

| where | method |
|---|---|
| p ≤ 10,000 and 24·p² bytes fit | dense factorisation |
| rows × 40 vectors fit | multi-shift block Krylov |
| rows × 8 vectors fit, or A may be indefinite | block conjugate gradients, with a Nyström preconditioner |
| else | Chebyshev semi-iteration |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.errors import SettingError
from distinfluence.memory import free_bytes
from distinfluence.solvers.base import Solution, Solver, WrappedState, check_count, check_damping, check_tolerance
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.chebyshev import Chebyshev
from distinfluence.solvers.demand import Demand, Systems
from distinfluence.solvers.direct import Direct
from distinfluence.solvers.krylov import BlockKrylov
from distinfluence.solvers.nystroem_preconditioner import NystroemPreConditioner

DIRECT_SIZE = 10_000  # parameters; the work of a dense factorisation grows with their cube
KRYLOV_STEPS = 40  # blocks that a basis is expected to need at most
CG_BLOCKS = 12  # blocks of rows that conjugate gradients hold
SHARE = 0.5  # of the free memory that a solver may take


@dataclass(frozen=True)
class AutoState(WrappedState):
    """The solver that was chosen, its state, and why it was."""

    solver: Solver[Any]
    why: str

    @property
    def remarks(self) -> tuple[str, ...]:
        """The choice, and what the chosen solver has to say."""
        return (self.why, *self.inner.remarks)


@dataclass(frozen=True)
class Auto(Solver[AutoState]):
    """The solver that suits the problem.

    Args:
        damping: λ ≥ 0.
        rtol: The relative tolerance, as the iterations mean it.
        rows: About how many right-hand sides are solved for together.
        memory: The bytes that the solver may take; half of what is free if None.

    Raises:
        SettingError: If a hyperparameter is out of range.
    """

    damping: float
    rtol: float | None = 1e-7
    rows: int = 1024
    memory: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        if self.rtol is not None:
            check_tolerance("rtol", self.rtol)
        if self.rtol == 0:
            raise SettingError("`rtol` must be > 0, got 0: no residual is. Pass for instance 1e-6.")
        check_count("rows", self.rows)
        if self.memory is not None:
            check_count("memory", self.memory)

    @override
    def demand(self, systems: Systems) -> Demand:
        # a dense factorisation for few parameters; else a Krylov basis as large as `memory` allows
        if max(systems.sizes) <= DIRECT_SIZE:
            return self._built("Direct").demand(systems)
        return self._built("BlockKrylov", self._memory(systems.device)).demand(systems)

    def _memory(self, device: torch.device) -> int:
        return self.memory or int(SHARE * free_bytes(device))

    @override
    def fit(self, operator: CurvatureOperator) -> AutoState:
        # Choose, then the chosen solver's fit.
        solver, why = self.choose(operator)
        return AutoState(operator, solver.fit(operator), solver, why)

    def choose(self, operator: CurvatureOperator) -> tuple[Solver[Any], str]:
        """Choose the solver for this operator; nothing is computed.

        Args:
            operator: The curvature A.

        Returns:
            The solver, and a sentence that says why.
        """
        p, vector = operator.size, operator.size * operator.dtype.itemsize
        memory = self._memory(operator.device)
        rows = min(self.rows, p)
        gib = memory / 2**30
        if p <= DIRECT_SIZE and 24 * p * p <= memory:
            return self._built("Direct"), f"chose Direct: {p} parameters are few enough for a dense factorisation"
        if rows * KRYLOV_STEPS * vector <= memory:
            return self._built("BlockKrylov", memory), (
                f"chose BlockKrylov: a basis of {rows} × {KRYLOV_STEPS} vectors of {p} fits into {gib:.1f} GiB"
            )
        if rows * CG_BLOCKS * vector <= memory or not operator.positive_semidefinite:
            return self._built("BlockCG"), (
                f"chose BlockCG with a Nyström preconditioner: a Krylov basis for {rows} rows of {p} does not fit into "
                f"{gib:.1f} GiB"
            )
        return self._built("Chebyshev"), (
            f"chose Chebyshev: {CG_BLOCKS} blocks of {rows} rows of {p} do not fit into {gib:.1f} GiB"
        )

    def _built(self, kind: str, memory: int = 2**31) -> Solver[Any]:
        if kind == "Direct":
            return Direct(self.damping)
        if kind == "BlockKrylov":
            return BlockKrylov(self.damping, rtol=self.rtol, basis_bytes=memory)
        if kind == "BlockCG":
            return BlockCG(self.damping, rtol=self.rtol, preconditioner=NystroemPreConditioner())
        return Chebyshev(self.damping, rtol=self.rtol)

    @override
    def adapt(self, state: AutoState) -> AutoState:
        solver = state.solver.at(self.damping)
        return replace(state, solver=solver, inner=solver.adapt(state.inner))

    @override
    def solve(self, state: AutoState, rhs: Tensor) -> Solution:
        return state.solver.solve(state.inner, rhs)

    @override
    def solve_at(self, state: AutoState, rhs: Tensor, dampings: Sequence[float]) -> list[Solution]:
        return state.solver.solve_at(state.inner, rhs, dampings)

    @override
    def state_arrays(self, state: AutoState) -> dict[str, Tensor]:
        kind = type(state.solver).__name__
        code = torch.tensor(list(kind.encode()), dtype=torch.uint8)
        memory = getattr(state.solver, "basis_bytes", 2**31)
        why = torch.tensor(list(state.why.encode()), dtype=torch.uint8)
        own = {"auto_kind": code, "auto_memory": torch.tensor(memory), "auto_why": why}
        return own | state.solver.state_arrays(state.inner)

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> AutoState:
        kind, why = (bytes(arrays[name].tolist()).decode() for name in ("auto_kind", "auto_why"))
        solver = self._built(kind, int(arrays["auto_memory"]))
        return AutoState(operator, solver.restore(operator, arrays), solver, why)
