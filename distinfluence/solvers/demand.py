"""What a method will need before it starts: memory beyond the gradients, and passes over the training data."""

from dataclasses import dataclass

import torch

USUAL_STEPS = 15  # of an iterative solve, where only the matrix knows
USUAL_BASIS = 30  # steps that a Krylov basis is prepared for
DENSE_BYTES = 16  # for each entry of a matrix: itself and its factor in float64, whatever the model's dtype
EIGEN_BYTES = 24  # more for each, where it is decomposed by eigenvalues: a singular one, or for many dampings
DECOMPOSING = 32  # bytes for each entry of a factor in float64, its eigenvectors and work space
SKETCHING = 8  # times what a Nyström sketch leaves, while it is made
BESIDE_BASIS = 15.0  # blocks of rows in addition to a Krylov basis, or for conjugate gradients after it
GROWING = 2  # times its limit is what a basis takes at most while it moves to a larger store


@dataclass(frozen=True)
class Systems:
    """The systems of an influence model, one for each block, as far as they are known before a fit.

    sizes: parameters of each block. itemsize: bytes of a number. looks: passes of a fit that makes a matrix of each
    block. device: where they are solved.
    """

    sizes: tuple[int, ...]
    itemsize: int
    looks: int
    device: torch.device

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector [p] over all blocks."""
        return sum(self.sizes) * self.itemsize


@dataclass(frozen=True)
class Demand:
    """Needs of a fit and of a solve, in bytes and passes over the training data.

    fit_bytes: held while fitting, where the fit runs. state_bytes: held by each process that solves. row_vectors:
    vectors [p] that a solve holds at its peak for each right-hand side, itself, the solution and the results of
    products counted (`python -m tests.benchmarks.memory` measures them). most_bytes: a limit that the solver keeps to
    by itself for what grows, 0 for none; beside_vectors: what it holds for each right-hand side in addition to that.
    fit_passes, solve_passes: sweeps over the training data, a solve's for each test chunk. by_method: whether the
    passes are fixed by the method; else a usual number is given. fit_rows: vectors [p] that a pass of the fit
    multiplies at once. sum_bytes: of a matrix that a fit sums over the data.
    """

    fit_bytes: int = 0
    state_bytes: int = 0
    row_vectors: float = 12.0
    most_bytes: int = 0
    fit_passes: int = 0
    solve_passes: int = USUAL_STEPS
    by_method: bool = False
    fit_rows: int = 1
    sum_bytes: int = 0
    beside_vectors: float = 0.0
