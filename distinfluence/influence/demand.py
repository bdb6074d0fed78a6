"""What a method will need before it starts: memory beyond the gradients, and passes over the training data."""

from dataclasses import dataclass

USUAL_STEPS = 15  # of an iterative solve, where only the matrix knows
USUAL_BASIS = 30  # steps that a Krylov basis is prepared for


@dataclass(frozen=True)
class Demand:
    """Needs of a fit and of a solve, in bytes and passes over the training data.

    fit_bytes: held while fitting, where the fit runs. state_bytes: held by each process that solves. row_vectors:
    vectors [p] that a solve holds for each right-hand side, itself and the solution counted. most_bytes: a limit that
    the solver keeps to by itself, 0 for none. fit_passes, solve_passes: sweeps over the training data, a solve's for
    each test chunk. by_method: whether the passes are fixed by the method; else a usual number is given. fit_rows:
    vectors [p] that a pass of the fit multiplies at once. sum_bytes: of a matrix that a fit sums over the data.
    """

    fit_bytes: int = 0
    state_bytes: int = 0
    row_vectors: float = 8.0
    most_bytes: int = 0
    fit_passes: int = 0
    solve_passes: int = USUAL_STEPS
    by_method: bool = False
    fit_rows: int = 1
    sum_bytes: int = 0
