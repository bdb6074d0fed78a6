"""Verification: a sample of influences computed again, by another method and in float64.

The factors of a few test points are solved for to a relative residual of 1e-10 on the same curvature, with products in
float64 (a float32 model is widened), by a method that the influence model did not use; the gradients of a few training
points are made in float64 too. What is compared is then the exact influence of the model as it is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distinfluence.curvature import SupportsDouble
from distinfluence.errors import ShapeError
from distinfluence.influence import DirectInfluence, InfluenceFunctionModel, KrylovInfluence
from distinfluence.influence.bounds import LowerBound, error_bounds, lower_bound
from distinfluence.influence.gradient_products import cosines
from distinfluence.model.batch import Batch, batch_length, map_batch
from distinfluence.model.gradients import loss_gradients, measurement_gradients
from distinfluence.solvers import BlockCG, BlockKrylov, Direct, Solution, Solver

DIRECT_SIZE = 2_000  # parameters of a block up to which the other method is a dense factorisation
RTOL = 1e-10


@dataclass(frozen=True)
class Verification:
    """Influences next to exact ones.

    Attributes:
        test: Indices of the sampled test points, [a].
        train: Indices of the sampled training points, [b].
        given: The influences to be verified, [a, b].
        exact: The exact influences, [a, b].
        bound: Largest error that the bounds of both allow, [a, b]; NaN where there are no bounds.
        converged: Whether every exact factor reached its tolerance.
        method: Names of the solvers that made the exact factors.
    """

    test: NDArray[np.int64]
    train: NDArray[np.int64]
    given: NDArray[np.float64]
    exact: NDArray[np.float64]
    bound: NDArray[np.float64]
    converged: bool
    method: str

    @property
    def relative_error(self) -> float:
        """‖given − exact‖ / ‖exact‖, Frobenius norms."""
        size = float(np.linalg.norm(self.exact))
        return float(np.linalg.norm(self.given - self.exact)) / (size or 1.0)

    @property
    def within_bounds(self) -> bool | None:
        """Whether every error is below its bound; None where there are no bounds."""
        if not np.isfinite(self.bound).all():
            return None
        return bool((np.abs(self.given - self.exact) <= self.bound).all())

    def __str__(self) -> str:
        bounds = {True: "all within their bounds", False: "NOT within their bounds", None: "no bounds to compare with"}
        reached = "" if self.converged else "; the exact ones did not converge, so this is no verdict"
        return (
            f"{len(self.test)} × {len(self.train)} influences against {self.method} in float64: relative error "
            f"{self.relative_error:.1e}, largest error {np.abs(self.given - self.exact).max():.1e}, "
            f"{bounds[self.within_bounds]}{reached}"
        )


def verify(
    influences: ArrayLike,
    model: InfluenceFunctionModel,
    test: object,
    train: object,
    *,
    n_test: int = 4,
    n_train: int = 64,
    seed: int = 0,
    error_bound: ArrayLike | None = None,
) -> Verification:
    """Compare influences with exact ones on a random sample of test and training points.

    Args:
        influences: Scores of `model` in mode "up", [n_test, n_train].
        model: The fitted influence model that made them.
        test: All test points that were scored: (x, y), or a batch as the objective takes it.
        train: All training points that were scored, in the same form.
        n_test: Test points to sample.
        n_train: Training points to sample.
        seed: Seed of the sample.
        error_bound: Error bounds c_i of the solve report or of the result, [n_test]; None for no comparison with them.

    Returns:
        The sampled influences next to exact ones.

    Raises:
        ShapeError: If `influences` does not fit the data.
    """
    batches = [model.place(test), model.place(train)]
    shape = (batch_length(batches[0]), batch_length(batches[1]))
    values = np.asarray(influences, dtype=np.float64)
    if values.shape != shape:
        raise ShapeError(f"`influences` must be {list(shape)} as the data are, got {list(values.shape)}.")
    rows, columns = sampled(shape, n_test, n_train, seed)
    bounds = None if error_bound is None else np.asarray(error_bound, dtype=np.float64)[rows]
    tests, trains = (_select(batch, i) for batch, i in zip(batches, (rows, columns), strict=True))
    used = type(model).__name__
    return verify_entries(values[np.ix_(rows, columns)], model, rows, columns, tests, trains, bounds, used)


def verify_entries(
    given: NDArray[np.float64],
    model: InfluenceFunctionModel,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    tests: object,
    trains: object,
    error_bound: NDArray[np.float64] | None,
    used: str,
) -> Verification:
    """Compare influences with exact ones, for a sample that has been drawn already.

    Args:
        given: The influences to be verified, [a, b].
        model: A fitted influence model, whose curvature and damping are taken.
        rows: Indices of the test points, [a].
        columns: Indices of the training points, [b].
        tests: A batch of the a test points.
        trains: A batch of the b training points.
        error_bound: Error bounds of the test points, [a], or None.
        used: Name of the influence model that made `given`; the exact factors are solved for by another method.

    Returns:
        The influences next to exact ones.
    """
    risk = model.risk.in_double()
    right = measurement_gradients(risk, risk.place(tests)).rows
    left = loss_gradients(risk, risk.place(trains))
    exact = torch.zeros(right.shape[0], left.rows.shape[0], dtype=torch.float64)
    solutions, rhs, bounds = dict[str, Solution](), dict[str, Tensor](), dict[str, LowerBound | None]()
    methods = dict[str, None]()
    for block, (operator, damping, own) in model.exact_systems().items():
        solver = _another(used, operator.size, damping)
        assert isinstance(operator, SupportsDouble)
        wide, rhs[block] = operator.in_double(), right[:, own].contiguous()
        state = solver.fit(wide)
        solutions[block] = solver.solve(state, rhs[block])
        spectrum = model.fit_report.spectrum.get(block)
        bounds[block] = lower_bound(operator, state, damping, spectrum)
        exact += (solutions[block].x @ left.rows[:, own].T).cpu()
        methods[type(solver).__name__] = None
    if model.normalised:
        norms = torch.stack([solution.x.norm(dim=1).square() for solution in solutions.values()]).sum(dim=0).sqrt()
        exact = cosines(exact, norms.cpu(), left.norms.cpu())
    bound = np.full(given.shape, np.nan)
    if error_bound is not None:
        own_error = error_bounds(solutions, rhs, bounds)  # the exact ones are only that exact
        both = error_bound + (0.0 if own_error is None else own_error.numpy())
        bound = both[:, None] * left.norms.cpu().numpy()
    converged = all(bool(solution.converged.all()) for solution in solutions.values())
    return Verification(rows, columns, given, exact.numpy(), bound, converged, " and ".join(methods))


def sampled(
    shape: tuple[int, ...], n_test: int, n_train: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted indices of at most n_test rows and n_train columns, drawn without replacement."""
    generator = np.random.default_rng(seed)
    rows, columns = (
        np.sort(generator.permutation(total)[:count]) for total, count in zip(shape, (n_test, n_train), strict=False)
    )
    return rows, columns


def _another(used: str, size: int, damping: float) -> Solver[Any]:
    """Return another solver than the influence model of this name has, for a block of this size."""
    if size <= DIRECT_SIZE and used != DirectInfluence.__name__:
        return Direct(damping)
    if used == KrylovInfluence.__name__:
        return BlockCG(damping, rtol=RTOL)
    return BlockKrylov(damping, rtol=RTOL)


def _select(batch: Batch, index: NDArray[np.int64]) -> Batch:
    chosen = torch.from_numpy(index)
    return map_batch(lambda tensor: tensor[chosen.to(tensor.device)], batch)
