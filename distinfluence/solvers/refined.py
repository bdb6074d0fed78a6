"""Iterative refinement: a float32 solver inside, float64 residuals outside.

Each round solves for the residual of what is there in the operator's own dtype and adds the correction in float64; the
residual is a float64 product. Converges while the inner solver gets a digit or so right each time; to 1e-10 it takes
two or three times the passes of one float32 solve. Reference: Higham (2002), Accuracy and Stability of Numerical
Algorithms, chapter 12.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, SupportsDouble
from distinfluence.errors import DtypeError, UnsupportedOperatorError
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    WrappedState,
    check_count,
    check_rhs,
    check_tolerance,
    damped,
    row_norms,
)


@dataclass(frozen=True)
class Refinement(WrappedState):
    """The inner solver's state, and A with products in float64."""

    wide: CurvatureOperator


@dataclass(frozen=True)
class Refined(Solver[Refinement]):
    """A solver with float64-quality residuals on a float32 operator.

    Right-hand sides may be float32 or float64; x is float64. `iterations` counts the inner solver's.

    Args:
        inner: Any solver; its tolerance may be as loose as 1e-2.
        rtol: The residual norm in float64, relative to ‖rhs‖, at which a row has converged.
        maxiter: The largest number of rounds.

    Raises:
        SettingError: If a hyperparameter is out of range.
    """

    inner: Solver[Any]
    rtol: float = 1e-10
    maxiter: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tolerance("rtol", self.rtol)
        check_count("maxiter", self.maxiter)

    @property
    def damping(self) -> float:  # type: ignore[override]
        """λ of the inner solver."""
        return self.inner.damping

    @override
    def at(self, damping: float) -> Self:
        return replace(self, inner=self.inner.at(damping))

    @override
    def fit(self, operator: CurvatureOperator) -> Refinement:
        return Refinement(operator, self.inner.fit(operator), _wide(operator))

    @override
    def adapt(self, state: Refinement) -> Refinement:
        return replace(state, inner=self.inner.adapt(state.inner))

    @override
    def solve(self, state: Refinement, rhs: Tensor) -> Solution:
        # Rounds of inner solves, each with one float64 pass, until every row is there or no longer gains.
        if rhs.dtype not in (state.operator.dtype, torch.float64):
            raise DtypeError(
                f"`rhs` must be {state.operator.dtype} as the operator is, got {rhs.dtype}. Convert the rows; float64 "
                "is taken, too."
            )
        rhs = rhs.double()
        check_rhs(rhs, state.wide)
        x, residual, size = torch.zeros_like(rhs), rhs.clone(), row_norms(rhs)
        norm, steps = size.clone(), torch.zeros(rhs.shape[0], dtype=torch.int64)
        curvature = torch.full((rhs.shape[0],), math.inf, dtype=torch.float64)
        todo = (size > 0).nonzero().flatten()
        outcome = [Outcome.CONVERGED] * rhs.shape[0]
        largest, remarks = math.nan, dict[str, None]()
        for round_ in range(self.maxiter):
            if not todo.numel():
                break
            # scaled to norm 1: float32 has the range for a late residual, not always for its squares
            unit = (residual[todo] / norm[todo, None]).to(state.operator.dtype)
            found = self.inner.solve(state.inner, unit)
            largest, remarks = found.largest, remarks | dict.fromkeys(found.remarks)
            candidate = x[todo] + found.x.double() * norm[todo, None]
            after = rhs[todo] - damped(state.wide, candidate, self.damping)
            size_after, here = row_norms(after), todo.cpu()
            steps[here] += found.iterations
            curvature[here] = torch.fmin(curvature[here], found.curvature)
            better, halved = size_after < norm[todo], size_after <= norm[todo] / 2
            into = todo[better]
            x[into], residual[into], norm[into] = candidate[better], after[better], size_after[better]
            done = norm[todo] <= self.rtol * size[todo]
            last = round_ + 1 == self.maxiter
            for row, ok, gains, why in zip(todo.tolist(), done.tolist(), halved.tolist(), found.outcome, strict=True):
                stuck = why if why is not Outcome.CONVERGED else Outcome.STAGNATED
                outcome[row] = Outcome.CONVERGED if ok else (Outcome.MAXITER if last and gains else stuck)
            todo = todo[~done & halved]
        return Solution(
            x=x,
            relative_residual=torch.where(size > 0, norm / torch.where(size > 0, size, 1.0), norm).cpu(),
            iterations=steps,
            outcome=tuple(outcome),
            curvature=torch.where(curvature.isinf(), math.nan, curvature),
            largest=largest,
            remarks=tuple(remarks),
        )

    @override
    def state_arrays(self, state: Refinement) -> dict[str, Tensor]:
        return self.inner.state_arrays(state.inner)

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> Refinement:
        return Refinement(operator, self.inner.restore(operator, arrays), _wide(operator))


def _wide(operator: CurvatureOperator) -> CurvatureOperator:
    if operator.dtype == torch.float64:
        return operator
    if not isinstance(operator, SupportsDouble):
        raise UnsupportedOperatorError(
            f"`Refined` needs products in float64; {type(operator).__name__} ({operator.dtype}) has none. Use the "
            "inner solver alone."
        )
    return operator.in_double()
