"""Choosing a solver by its estimated time and memory, and saying which, why, and what was rejected.

The time of a candidate is counted, not measured: products with A and other flops at the usual rate of one CPU core. So
the choice depends on sizes and on `memory` alone, by default half of what is free. For k rows of p parameters:

| method | products | other flops | memory | candidate if |
|---|---|---|---|---|
| dense factorisation | p | p³/3 + 4·k·p² | 24·p² bytes | |
| multi-shift block Krylov | k·m + k | 4·k²·m²·p | 40·k vectors | |
| block conjugate gradients, Nyström preconditioner | 0.8·k·m + k + 60 | 16·k²·m·p | 12·k + 120 vectors | |
| Chebyshev semi-iteration | 4·k·m + k + 60 | | 10·k vectors | A is semi-definite |

with m passes for the tolerance: 15 for 1e-7, for the block methods times √(64/k) above 64 rows, and at most p / k. The
fastest candidate that fits into memory is chosen; where none fits, the one that needs least.
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
from distinfluence.solvers.demand import Demand, System, Systems, each_block
from distinfluence.solvers.direct import Direct
from distinfluence.solvers.krylov import BlockKrylov
from distinfluence.solvers.nystroem_preconditioner import NystroemPreConditioner

TOGETHER = 1024  # rows that are solved together at most
KRYLOV_STEPS = 40  # blocks that a basis is expected to need at most
CG_BLOCKS = 12  # blocks of rows that conjugate gradients hold
CHEBYSHEV_BLOCKS = 10  # and Chebyshev semi-iteration
DENSE_FIT_BYTES = 24  # for each entry of a matrix while it is factorised by Cholesky
SHARE = 0.5  # of the free memory that a solver may take
FLOPS = 4e10  # in a second: of products, and of other matrices, on one core of a CPU
FLOPS_ON_GPU = 5e12
PASS_SECONDS = 2e-3  # that a pass takes however little there is to do


@dataclass(frozen=True)
class Estimate:
    """What a candidate will take for the rows of all solves. kind: name of its class."""

    kind: str
    seconds: float
    nbytes: int

    def __str__(self) -> str:
        return f"{about(self.seconds)}, {size_of(self.nbytes)}"


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
        rows: About how many right-hand sides there will be in all.
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
        # of the solver that a fit will choose for each block
        each = [replace(systems, blocks=(block,)) for block in systems.blocks]
        return each_block(systems, [self.built(*self._best(own)).demand(own) for own in each])

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
            The solver, and a sentence that says which, why, and what was rejected.
        """
        systems = Systems((System.of(operator),), operator.dtype, operator.device)
        kind, memory = self._best(systems)
        estimates = self.estimates(systems)
        said = "; ".join(
            f"{other.kind}: {other}{'' if other.nbytes <= memory else ' (too much)'}"
            for name, other in estimates.items()
            if name != kind
        )
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''} of {operator.size} parameters"
        return self.built(kind, memory), f"chose {kind} for {rows} ({estimates[kind]}); rejected {said}"

    def estimates(self, systems: Systems) -> dict[str, Estimate]:
        """Estimate what each candidate takes for a system.

        Args:
            systems: One system.

        Returns:
            The candidate's name → time and memory.
        """
        (block,) = systems.blocks
        together = min(self.rows, TOGETHER)
        vector, n_solves = systems.vector_bytes, -(-self.rows // together)
        independent = min(together, block.size)
        needed = {
            "Direct": DENSE_FIT_BYTES * block.size**2,
            "BlockKrylov": min(independent * KRYLOV_STEPS, 2 * block.size + together * KRYLOV_STEPS // 2) * vector,
            "BlockCG": (independent * CG_BLOCKS + 2 * NystroemPreConditioner().rank) * vector,
        }
        if block.positive_semidefinite:
            needed["Chebyshev"] = CHEBYSHEV_BLOCKS * together * vector
        return {
            kind: Estimate(kind, _seconds(self.built(kind).demand(systems), systems, together, n_solves), nbytes)
            for kind, nbytes in needed.items()
        }

    def _best(self, systems: Systems) -> tuple[str, int]:
        """Return the name of the solver to take, and the bytes that it may take."""
        memory, estimates = self._memory(systems.device), self.estimates(systems).values()
        fitting = [one for one in estimates if one.nbytes <= memory]
        best = min(fitting, key=lambda one: one.seconds) if fitting else min(estimates, key=lambda one: one.nbytes)
        return best.kind, memory

    def built(self, kind: str, memory: int = 2**31) -> Solver[Any]:
        """Make a candidate.

        Args:
            kind: The name of its class.
            memory: The bytes that it may take.

        Returns:
            The solver.
        """
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
        solver = self.built(kind, int(arrays["auto_memory"]))
        return AutoState(operator, solver.restore(operator, arrays), solver, why)


def _seconds(demand: Demand, systems: Systems, rows: int, n_solves: int) -> float:
    """Return about how long a fit and the solves take, for one system."""
    (block,), flops = systems.blocks, FLOPS if systems.device.type == "cpu" else FLOPS_ON_GPU
    fit, solve = demand.fit, demand.solve
    products = fit.rows + n_solves * solve.rows_for(rows, block.size)
    passes = fit.passes + n_solves * solve.passes_for(rows, block.size)
    derivatives = block.product_flops * fit.derivatives / 2
    other = fit.flops + n_solves * solve.flops_for(rows, block.size)
    return (block.product_flops * products + derivatives + other) / flops + PASS_SECONDS * passes


def about(seconds: float) -> str:
    """Return an estimated time in words, to the digits that it is worth."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.0f} h"


def size_of(nbytes: int) -> str:
    """Return bytes in words."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{max(0.1, nbytes / 2**20):.1f} MiB"
