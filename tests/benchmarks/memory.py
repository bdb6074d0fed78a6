"""What solvers hold at their peak, in blocks of rows [k, p]: the right-hand sides, the solution and all between them.

Run: python -m tests.benchmarks.memory

Every allocation of torch is counted while one solve of k rows runs on a diagonal matrix, whose products need no more
than their result: what a model needs for its batches comes on top, and plans count it apart. Beside it, what the
influence model's `demand` says, which plans reserve. Float32; a few blocks more where rows are few are k × k.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    ChebyshevInfluence,
    InfluenceFunctionModel,
    JacobiPreConditioner,
    KrylovInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from distinfluence.curvature.base import CurvatureOperator
from distinfluence.solvers import Solver

ROWS, SIZE = 32, 20_000
FEW = 6  # steps: the first ones hold as much as all others


class Spread(CurvatureOperator):
    """A diagonal matrix with eigenvalues from 1 to 100, as a mean over two mini-batches."""

    positive_semidefinite = True
    n_batches, batch_sizes, in_any_order = 2, (1, 1), True

    def __init__(self, size: int) -> None:
        super().__init__(size, torch.float32, torch.device("cpu"))
        self._values = torch.linspace(1, 100, size)

    def _product(self, rows: Tensor) -> Tensor:
        return rows * self._values

    def batch_matmat(self, index: int, rows: Tensor) -> Tensor:
        self.work.batches += 1
        return rows * (self._values * (0.9 if index else 1.1))


@dataclass(frozen=True)
class Peak:
    """Blocks [k, p]: measured, and reserved by plans."""

    measured: float
    reserved: float


Make = Callable[[nn.Module, nn.Module], InfluenceFunctionModel]
METHODS: Mapping[str, Make] = {
    "block conjugate gradients": lambda m, c: CgInfluence(m, c, 1.0, maxiter=FEW),
    "row by row": lambda m, c: CgInfluence(m, c, 1.0, maxiter=FEW, use_block_cg=False),
    "row by row, preconditioned": lambda m, c: CgInfluence(
        m, c, 1.0, maxiter=FEW, use_block_cg=False, pre_conditioner=JacobiPreConditioner(10)
    ),
    "Chebyshev": lambda m, c: ChebyshevInfluence(m, c, 1.0, maxiter=FEW),
    "LiSSA, full batches": lambda m, c: LissaInfluence(m, c, 1.0, scale=None, full_batch=True, maxiter=FEW),
    "LiSSA, mini-batches": lambda m, c: LissaInfluence(m, c, 1.0, scale=None, maxiter=FEW),
    "Krylov, 17 passes": lambda m, c: KrylovInfluence(m, c, 1.0, rtol=1e-2),
    "Nyström sketch": lambda m, c: NystroemSketchInfluence(m, c, 20, 1.0),
    "Arnoldi": lambda m, c: ArnoldiInfluence(m, c, 1.0, 20),
}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch had allocated on the CPU while the work ran, beyond what was allocated before.

    The garbage of earlier work is collected first: what an earlier profile saw allocated would count against this one
    if it were freed in it.
    """
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            kept = work()
    finally:
        gc.enable()
    del kept
    held = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def blocks(solver: Solver, rows: int, size: int) -> float:  # type: ignore[type-arg]
    """What a solve holds at its peak in blocks [rows, size], the right-hand sides counted."""
    state = solver.fit(Spread(size))
    rhs = torch.randn(rows, size, generator=torch.Generator().manual_seed(0))
    solver.solve(state, rhs[:1])  # what is made once is made
    return 1 + peak_bytes(lambda: solver.solve(state, rhs)) / (rhs.numel() * rhs.element_size())


def peak(name: str, rows: int = ROWS, size: int = SIZE) -> Peak:
    """Of one method."""
    made = METHODS[name](nn.Linear(1, 1), nn.MSELoss())
    return Peak(blocks(made.solver(1.0), rows, size), made.demand().row_vectors)


def main() -> None:
    """Print a row for each method."""
    torch.set_num_threads(1)
    print("blocks of rows [k, p] at the peak of a solve   measured   reserved")
    for name in METHODS:
        found = peak(name)
        print(f"{name:<44}{found.measured:>11.1f}{found.reserved:>11.1f}", flush=True)


if __name__ == "__main__":
    main()
