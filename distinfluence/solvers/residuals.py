"""Residuals of a few rows, by which approximate methods say how far they are off."""

import math

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.solvers.base import Outcome, Solution, check_count, damped, relative_residuals, row_norms

MOST_MEASURED = 8  # Rows of a solve whose residuals an approximate method measures where nobody asks for a number.
SHARE_OF_WORK = 10  # Residuals cost at most one in so many of the rows that the method itself multiplies.


def rows_to_measure(residual_rows: int | None, own: int) -> int:
    """Return for how many rows of a solve an approximate method measures residuals.

    Args:
        residual_rows: The number that was asked for; if None 8, or a tenth of the method's own work if that is less.
        own: The method's own work: rows that the fit and the solve itself multiply with the matrix.

    Returns:
        The number of rows; a solve of fewer measures all of its rows.
    """
    return min(MOST_MEASURED, own // SHARE_OF_WORK) if residual_rows is None else residual_rows


def some_residuals(operator: CurvatureOperator, damping: float, rhs: Tensor, x: Tensor, n: int) -> Tensor:
    """Return relative residuals [k] of n rows, always the same ones from first to last; NaN for the others; one pass.

    A zero row with the solution zero has the residual 0 without being measured.
    """
    k = rhs.shape[0]
    relative = torch.where((row_norms(rhs) == 0) & (row_norms(x) == 0), 0.0, math.nan).double().cpu()
    if n := min(n, k):
        rows = (2 * torch.arange(n) + 1) * k // (2 * n)
        there = rows.to(rhs.device)
        relative[rows] = relative_residuals(rhs[there], damped(operator, x[there], damping))
    return relative


def measured_of(measured: int, k: int) -> str:
    """Say for how many rows residuals were measured."""
    return f"residuals measured for {measured} of {k} rows (`residual_rows`)."


def approximation(
    operator: CurvatureOperator,
    damping: float,
    rhs: Tensor,
    x: Tensor,
    rtol: float,
    *,
    curvature: float = math.nan,
    remarks: tuple[str, ...] = (),
    residual_rows: int | None = None,
) -> Solution:
    """Return the solution of a method without iterations: one pass says how far each row is from solving the system.

    Args:
        operator: The matrix A.
        damping: The damping λ.
        rhs: Right-hand sides, [k, p].
        x: What the method made of them, [k, p].
        rtol: Residual relative to ‖rhs‖ up to which a row has converged; other rows are "approximate".
        curvature: Smallest eigenvalue of A + λI that the method knows, for the report.
        remarks: What else the report should say, in sentences.
        residual_rows: Rows to measure, see `some_residuals`; all if None.

    Returns:
        The rows with their residuals and outcomes.
    """
    k = rhs.shape[0]
    measured = k if residual_rows is None else min(k, residual_rows)
    relative = some_residuals(operator, damping, rhs, x, measured)
    if measured < k:
        remarks += (measured_of(measured, k),)
    return Solution(
        x=x,
        relative_residual=relative,
        iterations=torch.zeros(k, dtype=torch.int64),
        outcome=tuple(Outcome.CONVERGED if r <= rtol else Outcome.APPROXIMATE for r in relative.tolist()),
        curvature=torch.full((k,), curvature, dtype=torch.float64),
        remarks=remarks,
    )


def check_residual_rows(value: object) -> None:
    """Raise SettingError unless `residual_rows` is None or a whole number of at least 0."""
    if value is not None:
        check_count("residual_rows", value, least=0)
