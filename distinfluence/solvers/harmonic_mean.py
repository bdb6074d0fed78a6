"""DataInf: the mean of inverses in place of the inverse of the mean.

    R = (1/N) Σ_j (g_j g_jᵀ + λI)⁻¹ = (1/N) Σ_j (I − g_j g_jᵀ / (λ + ‖g_j‖²)) / λ

A rough method: R is the inverse of the harmonic mean of the samples' matrices, not that of their arithmetic mean, the
empirical Fisher matrix A. The two agree for one sample, or where λ is far above all ‖g_j‖². It costs one pass over the
gradients and no fit. Reference: Kwon, Wu, Wu & Zou (2024), "DataInf", ICLR, equation 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, SupportsSampleGradients
from distinfluence.errors import SettingError, UnsupportedOperatorError
from distinfluence.solvers.base import (
    Solution,
    Solver,
    SolverState,
    check_damping,
    check_rhs,
    check_tolerance,
)
from distinfluence.solvers.demand import USUAL_ROWS, Demand, SolveWork, Systems
from distinfluence.solvers.residuals import (
    approximation,
    check_residual_rows,
    rows_to_measure,
)

ROUGH = (
    "DataInf averages the inverses of the samples' matrices, which is not the inverse of their average: residuals "
    "refer to the empirical Fisher matrix."
)


@dataclass(frozen=True)
class InverseHarmonicMean(Solver[SolverState]):
    """DataInf; exact to its own formula.

    Args:
        damping: λ > 0.
        rtol: The relative residual up to which a row counts as solved.
        residual_rows: For how many right-hand sides of each solve the residual is measured, in one pass; if None 8,
            or a tenth of them if that is less.

    Raises:
        SettingError: If a hyperparameter is out of range.
    """

    damping: float
    rtol: float = 1e-6
    residual_rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_tolerance("rtol", self.rtol)
        check_residual_rows(self.residual_rows)
        if not self.damping > 0:
            raise SettingError(
                f"`damping` must be > 0 for DataInf, which divides by it, got {self.damping!r}. A tenth of the mean "
                "squared gradient norm over the number of parameters is usual."
            )

    @override
    def demand(self, systems: Systems) -> Demand:
        # no fit; a pass for the factors and one for the residual
        measured = rows_to_measure(self.residual_rows, USUAL_ROWS)
        vectors = 5.0 if self.residual_rows is None else 7.0  # residuals of all rows take two more
        return Demand(row_vectors=vectors, solve=SolveWork(1, measured, self.residual_rows is None), by_method=True)

    @override
    def fit(self, operator: CurvatureOperator) -> SolverState:
        # Nothing. Raises UnsupportedOperatorError for an operator that is not one over samples.
        if not isinstance(operator, SupportsSampleGradients):
            raise UnsupportedOperatorError(
                f"`InverseHarmonicMean` needs the gradients of single samples; {type(operator).__name__} has none. Use "
                "the empirical Fisher matrix."
            )
        return SolverState(operator)

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> SolverState:
        return self.fit(operator)

    @override
    def solve(self, state: SolverState, rhs: Tensor) -> Solution:
        # R times each row, one pass, and another one for the residual.
        check_rhs(rhs, state.operator)
        assert isinstance(state.operator, SupportsSampleGradients)
        x = state.operator.inverse_harmonic_mean(rhs, self.damping) if rhs.shape[0] else rhs.clone()
        measured = rows_to_measure(self.residual_rows, rhs.shape[0])
        return approximation(state.operator, self.damping, rhs, x, self.rtol, remarks=(ROUGH,), residual_rows=measured)
