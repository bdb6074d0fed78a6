"""What a method will need before it starts: memory beyond the gradients, passes over the training data, and work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from distinfluence.curvature.base import CurvatureOperator, PlannedWork

USUAL_STEPS = 15  # of an iterative solve to 1e-7, where only the matrix knows
PRECONDITIONED_STEPS = 12  # with a preconditioner
USUAL_RTOL = 1e-7
USUAL_ROWS = 64  # up to which a block method takes the usual steps; more rows take fewer, by their square root
SEARCH_STEPS = 15  # of a search for eigenvalues, where only the matrix knows
USUAL_BASIS = 30  # steps that a Krylov basis is prepared for
DENSE_BYTES = 16  # for each entry of a matrix: itself and its factor in float64, whatever the model's dtype
EIGEN_BYTES = 24  # more for each, where it is decomposed by eigenvalues: a singular one, or for many dampings
DECOMPOSING = 32  # bytes for each entry of a factor in float64, its eigenvectors and work space
SKETCHING = 8  # times what a Nyström sketch leaves, while it is made
BESIDE_BASIS = 15.0  # blocks of rows in addition to a Krylov basis, or for conjugate gradients after it
EIGEN_FLOPS = 9.0  # for the cube of each size, of all eigenvalues and eigenvectors
USUAL_SAMPLES = 1_000  # of a data set, before anybody says how many there are
GROWING = 2  # times its limit is what a basis takes at most while it moves to a larger store


@dataclass(frozen=True)
class System:
    """One system (A + λI) x = g, as far as it is known before a fit.

    size: p. dense: the work of making A as a matrix. product_flops: of one product with A. positive_semidefinite:
    whether A is known to be.
    """

    size: int
    dense: PlannedWork
    product_flops: float
    positive_semidefinite: bool

    @classmethod
    def of(cls, operator: CurvatureOperator) -> "System":
        """Return what an operator says of itself; nothing is computed."""
        return cls(operator.size, operator.dense_work, operator.product_flops, operator.positive_semidefinite)


@dataclass(frozen=True)
class Systems:
    """The systems of an influence model, one for each block, with the dtype and the device of their vectors.

    shapes: of all parameters, where they are known.
    """

    blocks: tuple[System, ...]
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[torch.Size, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Parameters of each block."""
        return tuple(block.size for block in self.blocks)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector [p] over all blocks."""
        return sum(self.sizes) * self.itemsize


@dataclass(frozen=True)
class SolveWork:
    """The work of a solve for k rows, block by block.

    steps: passes over the training data that multiply all k rows. measured: rows of one more pass, for residuals; None
    for all of them, 0 for no such pass. by_default: that pass is for the first of several solves alone. batches:
    products with a single chunk. block: whether all rows share a search space, so that more rows need fewer steps, and
    none more than span the whole space. row_flops: beside the products, for each row; step_flops: for each pair of rows
    in each pass; basis_flops: for each pair of rows and pair of passes, where a basis is kept orthogonal. blocks: that
    are solved one after the other, of which the flops are the sum.
    """

    steps: int = USUAL_STEPS
    measured: int | None = None
    by_default: bool = False
    batches: int = 0
    block: bool = False
    row_flops: float = 0.0
    step_flops: float = 0.0
    basis_flops: float = 0.0
    blocks: int = 1

    def steps_for(self, rows: int, size: int) -> int:
        """Return the steps for so many rows; size: p of the largest block."""
        if not self.block:
            return self.steps
        fewer = round(self.steps * math.sqrt(USUAL_ROWS / max(rows, USUAL_ROWS)))
        return min(max(2, fewer), -(-size // max(1, rows)))

    def passes_for(self, rows: int, size: int) -> int:
        """Return the passes of a solve for so many rows."""
        return self.blocks * (self.steps_for(rows, size) + (self.measured != 0))

    def rows_for(self, rows: int, size: int) -> int:
        """Return the rows that all passes of a solve multiply together."""
        measured = rows if self.measured is None else min(rows, self.measured)
        return self.blocks * (self.steps_for(rows, size) * rows + measured)

    def flops_for(self, rows: int, size: int) -> float:
        """Return the flops beside the products."""
        steps = self.steps_for(rows, size)
        return self.row_flops * rows + (self.step_flops * steps + self.basis_flops * steps**2) * rows**2


@dataclass(frozen=True)
class Demand:
    """Needs of a fit and of a solve, in bytes and work.

    fit_bytes: held while fitting, where the fit runs. state_bytes: held by each process that solves. row_vectors:
    vectors [p] that a solve holds at its peak for each right-hand side, itself, the solution and the results of
    products counted (`python -m tests.benchmarks.memory` measures them). most_bytes: a limit that the solver keeps to
    by itself for what grows, 0 for none; beside_vectors: what it holds for each right-hand side in addition to that.
    fit, solve: their work. by_method: whether it is fixed by the method; else a usual number is given. fit_rows:
    vectors [p] that a pass of the fit multiplies at once. sum_bytes: of a matrix that a fit sums over the data.
    """

    fit_bytes: int = 0
    state_bytes: int = 0
    row_vectors: float = 12.0
    most_bytes: int = 0
    fit: PlannedWork = field(default_factory=PlannedWork)
    solve: SolveWork = field(default_factory=SolveWork)
    by_method: bool = False
    fit_rows: int = 1
    sum_bytes: int = 0
    beside_vectors: float = 0.0


def usual_steps(rtol: float | None, dtype: torch.dtype, steps: int = USUAL_STEPS) -> int:
    """Return about how many passes reach a tolerance, if USUAL_RTOL takes so many: digits cost the same each."""
    asked = rtol or (USUAL_RTOL if dtype == torch.float64 else 1e-4)
    return max(2, round(steps * math.log(2 / min(asked, 1.0)) / math.log(2 / USUAL_RTOL)))


def search_work(size: int, block: int, most: int = SEARCH_STEPS) -> PlannedWork:
    """Return the usual work of a Lanczos search with so many rows a pass, which ends when the whole space is seen."""
    block = min(block, size)
    passes = min(most, -(-size // block))
    return PlannedWork(passes, passes * block)


def each_block(systems: Systems, demands: Sequence[Demand]) -> Demand:
    """Return the needs of blocks that are fitted and solved one after the other; one demand for each."""
    largest = max(range(len(demands)), key=lambda i: systems.sizes[i])
    state = sum(demand.state_bytes for demand in demands)
    return replace(
        demands[largest],
        fit_bytes=state + max(demand.fit_bytes - demand.state_bytes for demand in demands),
        state_bytes=state,
        fit=sum((demand.fit for demand in demands), PlannedWork()),
        fit_rows=max(demand.fit_rows for demand in demands),
        sum_bytes=max(demand.sum_bytes for demand in demands),
        by_method=all(demand.by_method for demand in demands),
    )
