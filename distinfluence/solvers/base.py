"""The solver interface: a solver is a value, its failure is data.

A solver is a frozen dataclass of hyperparameters. `fit(operator)` does the work that needs no right-hand side and
returns a state; `solve(state, rhs)` returns a `Solution` that says for each row how far it got, and why no further.
Solvers touch the curvature only through `curvature.base` and know neither models nor data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.errors import DtypeError, NonFiniteError, SettingError, ShapeError

StateT = TypeVar("StateT")


class Outcome(StrEnum):
    """Why a row stopped."""

    CONVERGED = "converged"
    MAXITER = "maxiter"
    NEGATIVE_CURVATURE = "negative curvature"
    STAGNATED = "stagnated"
    SINGULAR = "singular"


@dataclass(frozen=True)
class Solution:
    """Rows of x with (A + λI) x = rhs, and for each row how far the solve got.

    x: [k, p], in the dtype of rhs. relative_residual: [k] float64, ‖rhs − (A + λI) x‖ / ‖rhs‖ from a fresh product,
    0 for a zero row. iterations: [k] int64, steps of the method until the row stopped (0: nothing to do).
    outcome: one `Outcome` per row. curvature: [k] float64, the smallest Rayleigh quotient of A + λI met on the way,
    NaN where the method does not see one.
    """

    x: Tensor
    relative_residual: Tensor
    iterations: Tensor
    outcome: tuple[Outcome, ...]
    curvature: Tensor

    @property
    def converged(self) -> Tensor:
        """[k] bool: rows that reached the asked tolerance, measured by their true residual."""
        return torch.tensor([outcome is Outcome.CONVERGED for outcome in self.outcome], dtype=torch.bool)


class Solver(ABC, Generic[StateT]):
    """Solve (A + damping·I) x = rhs for each row; `StateT` is what `fit` returns."""

    damping: float

    @abstractmethod
    def fit(self, operator: CurvatureOperator) -> StateT:
        """All work that needs no right-hand side."""

    @abstractmethod
    def solve(self, state: StateT, rhs: Tensor) -> Solution:
        """Solve for rhs [k, p]. Raises ShapeError, DtypeError or NonFiniteError for a bad `rhs`."""

    def state_arrays(self, state: StateT) -> dict[str, Tensor]:
        """What of the state must be kept to restore it elsewhere, without the operator."""
        return {}

    @abstractmethod
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> StateT:
        """The state again from `state_arrays`, beside an equal operator, without the work of `fit`."""


def check_rhs(rhs: Tensor, operator: CurvatureOperator, name: str = "rhs") -> None:
    """Raise ShapeError, DtypeError or NonFiniteError unless rhs is finite, [k, p] and in the operator's dtype."""
    if rhs.ndim != 2 or rhs.shape[1] != operator.size:
        raise ShapeError(
            f"`{name}` must be [k, p] with p={operator.size}, got {tuple(rhs.shape)}. Pass one row per right-hand side."
        )
    if rhs.dtype != operator.dtype:
        raise DtypeError(f"`{name}` must be {operator.dtype} as the operator is, got {rhs.dtype}. Convert the rows.")
    finite = torch.isfinite(rhs).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        remedy = "Look at the gradients of these samples." if name == "rhs" else "Start these rows from zero."
        raise NonFiniteError(
            f"`{name}` must be finite, got NaN or infinity in rows {bad[:10]} ({len(bad)} of {rhs.shape[0]}). {remedy}"
        )


def check_damping(damping: float) -> None:
    """Raise SettingError unless `damping` is a finite number ≥ 0."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise SettingError(f"`damping` must be a finite number ≥ 0, got {damping!r}. Pass the λ of A + λI.")


def check_tolerance(name: str, value: float) -> None:
    """Raise SettingError unless the tolerance is a number ≥ 0 and, for `rtol`, < 1."""
    limit = 1.0 if name == "rtol" else math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < limit:
        raise SettingError(
            f"`{name}` must be a number from 0 to below {limit:g}, got {value!r}. Pass for instance 1e-6."
        )
