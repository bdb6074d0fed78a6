"""The solver interface: a solver is a value, its failure is data.

A solver is a frozen dataclass of hyperparameters. `fit(operator)` does the work that needs no right-hand side and
returns a state; `solve(state, rhs)` returns a `Solution` that says for each row how far it got, and why no further.
Solvers touch the curvature only through `curvature.base` and know neither models nor data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.errors import DtypeError, NonFiniteError, SettingError, ShapeError
from distinfluence.solvers.demand import Demand, Systems

StateT = TypeVar("StateT", bound="SolverState")

WIDENED = 2**16  # numbers of a block that are held in float64 at once


class Outcome(StrEnum):
    """Why a row stopped."""

    CONVERGED = "converged"
    MAXITER = "maxiter"
    NEGATIVE_CURVATURE = "negative curvature"
    STAGNATED = "stagnated"
    SINGULAR = "singular"
    DIVERGED = "diverged"
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Solution:
    """Rows of x with (A + λI) x = rhs, and for each row how far the solve got.

    Args:
        x: The solutions, [k, p], in the dtype of the right-hand sides.
        relative_residual: ‖rhs − (A + λI) x‖ / ‖rhs‖ from a fresh product, [k] float64; 0 for a zero row.
        iterations: The steps of the method until the row stopped, [k] int64; 0 if there was nothing to do.
        outcome: One `Outcome` per row. "approximate" is a method that only approximates the inverse, has done all that
            it does, and leaves a residual above the tolerance.
        curvature: The smallest Rayleigh quotient of A + λI met on the way, [k] float64; NaN where the method sees none.
        largest: The largest one met, in absolute value: a lower bound of ‖A + λI‖. NaN likewise.
        remarks: What else a reader of the report should know, in sentences.
    """

    x: Tensor
    relative_residual: Tensor
    iterations: Tensor
    outcome: tuple[Outcome, ...]
    curvature: Tensor
    largest: float = math.nan
    remarks: tuple[str, ...] = ()

    @property
    def converged(self) -> Tensor:
        """[k] bool: rows that reached the asked tolerance, measured by their true residual."""
        return torch.tensor([outcome is Outcome.CONVERGED for outcome in self.outcome], dtype=torch.bool)


@dataclass(frozen=True)
class SolverState:
    """What a fit leaves, independent of any right-hand side.

    Args:
        operator: The curvature A.
    """

    operator: CurvatureOperator

    @property
    def positive_definite(self) -> bool | None:
        """Whether A + λI has only positive eigenvalues; None where the method does not find out."""
        return None

    @property
    def smallest_eigenvalue(self) -> float | None:
        """Of A, where the fit found it out."""
        return None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the fit report should say, in sentences."""
        return ()

    @property
    def details(self) -> Mapping[str, Tensor]:
        """Small tensors for the fit report, for instance eigenvalues and their residuals."""
        return {}


@dataclass(frozen=True)
class WrappedState(SolverState):
    """The state of a solver that works through another one. inner: that one's state, which has all there is to say."""

    inner: SolverState

    @property
    def positive_definite(self) -> bool | None:
        """As the inner solver found."""
        return self.inner.positive_definite

    @property
    def smallest_eigenvalue(self) -> float | None:
        """As the inner solver found."""
        return self.inner.smallest_eigenvalue

    @property
    def remarks(self) -> tuple[str, ...]:
        """Those of the inner state."""
        return self.inner.remarks

    @property
    def details(self) -> Mapping[str, Tensor]:
        """Those of the inner state."""
        return self.inner.details


class Solver(ABC, Generic[StateT]):
    """Solves (A + λI) x = rhs for each row. Subclasses are frozen dataclasses; `StateT` is what their `fit` returns."""

    damping: float
    makes_matrix = False  # whether a fit sums a matrix of its own over the data, in place of products with A

    def __post_init__(self) -> None:
        """Hold Python's numbers, whatever kind of numbers were given. Subclasses check them after that."""
        hold_plain(self)

    @property
    def solves_over_data(self) -> bool:
        """Whether a solve sweeps over the training data."""
        return True

    def demand(self, systems: Systems) -> Demand:
        """Return what a fit and a solve will need, before anything is computed; unless said, the needs of an iteration.

        Args:
            systems: What is known of the systems before a fit.

        Returns:
            Bytes and passes over the training data.
        """
        return Demand()

    def unmeasured(self) -> Self:
        """Return the same solver without the residuals that an approximate method measures by default.

        Returns:
            The solver; itself where residuals come with the solution, or a number of them was asked for.
        """
        if getattr(self, "residual_rows", 0) is not None:
            return self
        return replace(self, residual_rows=0)  # type: ignore[type-var]

    def at(self, damping: float) -> Self:
        """Return the same solver with another damping.

        Args:
            damping: λ ≥ 0.

        Returns:
            The solver.
        """
        return replace(self, damping=damping)  # type: ignore[type-var]

    def adapt(self, state: StateT) -> StateT:
        """Return the state for this solver's damping, without products where the mathematics allow it.

        Args:
            state: A state that was fitted with another damping.

        Returns:
            The state for this damping; the same one if it holds no damping.
        """
        return state

    def solve_at(self, state: StateT, rhs: Tensor, dampings: Sequence[float]) -> list[Solution]:
        """Solve for several dampings from one fit.

        Args:
            state: What `fit` returned.
            rhs: The right-hand sides, [k, p].
            dampings: The dampings λ ≥ 0.

        Returns:
            One solution for each damping.
        """
        solvers = [self.at(damping) for damping in dampings]
        return [solver.solve(solver.adapt(state), rhs) for solver in solvers]

    @abstractmethod
    def fit(self, operator: CurvatureOperator) -> StateT:
        """Do all work that needs no right-hand side.

        Args:
            operator: The curvature A.

        Returns:
            The state for `solve`.
        """

    @abstractmethod
    def solve(self, state: StateT, rhs: Tensor) -> Solution:
        """Solve (A + λI) x = rhs for each row.

        Args:
            state: What `fit` returned.
            rhs: The right-hand sides, [k, p].

        Returns:
            The solutions, and how far each row got.

        Raises:
            ShapeError: If `rhs` is not [k, p].
            DtypeError: If `rhs` has another dtype than the operator.
            NonFiniteError: If `rhs` has NaN or infinity.
        """

    def state_arrays(self, state: StateT) -> dict[str, Tensor]:
        """Return what of the state must be kept to restore it elsewhere, without the operator.

        Args:
            state: What `fit` returned.

        Returns:
            Name → tensor.
        """
        return {}

    @abstractmethod
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> StateT:
        """Return the state again without the work of `fit`.

        Args:
            operator: An operator equal to the fitted one.
            arrays: What `state_arrays` returned.

        Returns:
            The state.
        """


def damped(operator: CurvatureOperator, rows: Tensor, damping: float) -> Tensor:
    """rows [k, p] · (A + damping·I); one pass."""
    # not add_: the product may be a tensor that the operator keeps, or the rows themselves
    return torch.add(operator.matmat(rows), rows, alpha=damping)


def row_norms(rows: Tensor) -> Tensor:
    """‖row‖ of each row, [k] float64."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """⟨a_i, b_i⟩ of each row, [k], accumulated in float64."""
    dots = [torch.linalg.vecdot(x.double(), y.double()) for x, y in _few_rows(a, b)]
    return torch.cat(dots) if dots else a.new_zeros(0, dtype=torch.float64)


def _few_rows(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of both, as many at once as may be widened: whole blocks in float64 double a solve's memory."""
    step = max(1, WIDENED // max(1, a.shape[1]))
    return zip(a.split(step), b.split(step), strict=True)


def relative_residuals(rhs: Tensor, product: Tensor) -> Tensor:
    """‖rhs − product‖ / ‖rhs‖ of each row, [k] float64 on the CPU; the norm itself for a zero rhs.

    product: (A + λI) x for each row, fresh. The difference is taken in float64.
    """
    size = row_norms(rhs)
    residual = torch.cat([row_norms(b.double() - image.double()) for b, image in _few_rows(rhs, product)] or [size])
    return torch.where(size > 0, residual / torch.where(size > 0, size, 1.0), residual).cpu()


def rtol_for(rtol: float | None, dtype: torch.dtype) -> float:
    """Return the tolerance; if None 1e-7 in float64 and 1e-4 below, where rounding leaves about 1e-7·cond(A + λI)."""
    if rtol is not None:
        return rtol
    return 1e-7 if dtype == torch.float64 else 1e-4


def check_rhs(rhs: Tensor, operator: CurvatureOperator, name: str = "rhs") -> None:
    """Pass if right-hand sides are finite, [k, p] and in the operator's dtype.

    Args:
        rhs: The right-hand sides.
        operator: The matrix of the system.
        name: Name of the argument, for the message.

    Raises:
        ShapeError: If `rhs` is not [k, p].
        DtypeError: If `rhs` has another dtype.
        NonFiniteError: If `rhs` has NaN or infinity. The message names the rows.
    """
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


def plain(value: Any) -> Any:
    """Return a number of NumPy, or a tensor or array [] of one number, as Python's own; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)) else value


def hold_plain(settings: Any) -> None:
    """Put Python's own numbers into the fields of a frozen dataclass: they are written as JSON, and compared."""
    for own in fields(settings):
        value = getattr(settings, own.name)
        if (number := plain(value)) is not value:
            object.__setattr__(settings, own.name, number)


def check_damping(damping: float) -> None:
    """Pass if `damping` is a finite number ≥ 0.

    Args:
        damping: The damping λ.

    Raises:
        SettingError: If it is not.
    """
    damping = plain(damping)
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise SettingError(f"`damping` must be a finite number ≥ 0, got {damping!r}. Pass the λ of A + λI.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise SettingError unless the value is a whole number of at least `least`."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"`{name}` must be a whole number ≥ {least}, got {value!r}. Pass for instance {least}.")


def check_stopping(rtol: float | None, atol: float) -> None:
    """Raise SettingError unless both are tolerances, of which `rtol` may be None, and one is above 0."""
    if rtol is not None:
        check_tolerance("rtol", rtol)
    check_tolerance("atol", atol)
    if rtol == 0 and atol == 0:
        raise SettingError("`rtol` and `atol` must not both be 0: no residual is. Pass for instance rtol=1e-6.")


def check_tolerance(name: str, value: float) -> None:
    """Pass if a tolerance is a number ≥ 0 and, for `rtol`, < 1.

    Args:
        name: Name of the setting, for the message.
        value: The tolerance.

    Raises:
        SettingError: If it is not.
    """
    value = plain(value)
    limit = 1.0 if name == "rtol" else math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < limit:
        raise SettingError(
            f"`{name}` must be a number from 0 to below {limit:g}, got {value!r}. Pass for instance 1e-6."
        )
