"""Refined: the contract on float64 operators, and float64 residuals on float32 ones."""

from dataclasses import replace

import pytest
import torch

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import DtypeError, SettingError, UnsupportedOperatorError
from distinfluence.solvers import CG, BlockCG, BlockKrylov, Outcome, Refined
from distinfluence.solvers.refined import Refinement
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import SYSTEM, P, damped, dense_solution, randn, relative_error, spd

INNER = BlockKrylov(damping=0.0, rtol=1e-3)


class NoDouble(CurvatureOperator):
    """Products in float32 alone."""

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


class TestRefined(SolverContract[Refinement]):
    """rtol is 1e-10: error ≤ rtol · cond · ‖x‖ ≤ 1e-6 · ‖x‖ at condition 1e4."""

    solver = Refined(INNER, rtol=1e-10)
    accuracy = 1e-6
    keeps_float32 = False  # x is float64: float32 could not hold it

    def with_damping(self, damping: float) -> Refined:
        return replace(self.solver, inner=replace(INNER, damping=damping))

    @pytest.mark.parametrize(
        "inner",
        [BlockKrylov(SYSTEM.damping, rtol=1e-4), BlockCG(SYSTEM.damping, rtol=1e-2), CG(SYSTEM.damping, rtol=1e-4)],
        ids=lambda s: type(s).__name__,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_float32_products_give_float64_residuals(self, inner: BlockKrylov, dtype: torch.dtype) -> None:
        matrix, rhs = SYSTEM.matrix.float(), SYSTEM.rhs().float()
        operator = MatrixOperator(matrix)
        solver = Refined(inner, rtol=1e-12)
        state = solver.fit(operator)
        solution = solver.solve(state, rhs.to(dtype))
        assert solution.x.dtype == torch.float64
        assert solution.converged.all()
        residual = rhs.double() - solution.x @ damped(matrix, SYSTEM.damping)
        assert (residual.norm(dim=1) <= 1.01e-12 * rhs.double().norm(dim=1)).all()
        # error ≤ rtol · cond
        assert relative_error(solution.x, dense_solution(matrix, SYSTEM.damping, rhs)) <= 1e-12 * 102
        assert state.wide.work.passes <= 8  # rounds: each gains the digits of the inner tolerance

    def test_rounds_that_gain_nothing_end_as_the_inner_solver_did(self) -> None:
        solver = Refined(BlockCG(0.0, rtol=1e-3, maxiter=1), rtol=1e-10)
        solution = solver.solve(solver.fit(MatrixOperator(spd())), randn(3, P))
        assert not solution.converged.any()
        assert set(solution.outcome) <= {Outcome.MAXITER}
        short = Refined(BlockCG(0.0, rtol=1e-3), rtol=1e-10, maxiter=1)
        assert short.solve(short.fit(MatrixOperator(spd())), randn(3, P)).outcome == (Outcome.MAXITER,) * 3

    def test_an_operator_without_float64_products_is_refused(self) -> None:
        operator = NoDouble(3, torch.float32, torch.device("cpu"))
        with pytest.raises(UnsupportedOperatorError, match="needs products in float64; NoDouble"):
            self.solver.fit(operator)

    def test_settings_are_checked(self) -> None:
        for name, value in (("rtol", 1.0), ("maxiter", 0)):
            with pytest.raises(SettingError, match=f"`{name}` must be"):
                replace(self.solver, **{name: value})
        solver = Refined(BlockKrylov(0.1))
        state = solver.fit(MatrixOperator(torch.eye(3)))
        with pytest.raises(DtypeError, match=r"`rhs` must be torch.float32 as the operator is.*float64 is taken, too"):
            solver.solve(state, torch.zeros(1, 3, dtype=torch.int64))
