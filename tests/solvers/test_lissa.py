"""LiSSA: the contract in full batches, unbiased on mini-batches, and clear about scales."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import SettingError, ShapeError
from distinfluence.solvers import LiSSA, Outcome
from distinfluence.solvers.lissa import Scaled

from .contract import SolverContract
from .systems import SYSTEM, P, damped, dense_solution, indefinite, randn, relative_error, spd


class Batched(CurvatureOperator):
    """A mean over samples g gᵀ in mini-batches, the last one ragged."""

    in_any_order = True

    def __init__(self, gradients: Tensor, size: int) -> None:
        super().__init__(gradients.shape[1], gradients.dtype, gradients.device)
        self.parts = gradients.split(size)
        self.batch_sizes = tuple(len(part) for part in self.parts)
        self.n_batches = len(self.parts)
        self.matrix = gradients.T @ gradients / len(gradients)
        self.indices: list[int] = []

    def _product(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    def batch_matmat(self, index: int, rows: Tensor) -> Tensor:
        self.work.batches += 1
        self.indices.append(index)
        part = self.parts[index]
        product: Tensor = rows @ part.T @ part / len(part)
        return product


def samples(n: int = 50) -> Tensor:
    """Gradients of a well-behaved problem: eigenvalues of their second moment about 0.1 to 3."""
    return randn(n, 8, seed=3)


class TestLiSSA(SolverContract[Scaled]):
    """Steps are about cond·ln(1/rtol): a condition of 100 in 2000. Then error ≤ rtol · cond · ‖x‖ ≤ 1e-7 · ‖x‖."""

    solver = LiSSA(damping=0.0, scale=None, rtol=1e-9, maxiter=20_000)
    accuracy = 1e-6
    least_damping = 1e-2
    unsolvable = Outcome.MAXITER  # a part in the null space grows without end, a step at a time

    def test_dampen_acts_as_damping_of_scale_times_dampen(self) -> None:
        rhs = SYSTEM.rhs()
        solver = LiSSA(SYSTEM.damping, dampen=0.1, scale=2.0, rtol=1e-12, maxiter=1000)
        solution = solver.solve(solver.fit(MatrixOperator(SYSTEM.matrix)), rhs)
        assert relative_error(solution.x, dense_solution(SYSTEM.matrix, SYSTEM.damping + 0.2, rhs)) <= 1e-10
        assert "0.21 in all" in solution.remarks[0]
        assert solution.outcome == (Outcome.APPROXIMATE,) * 5  # of the system with λ alone
        own = rhs - solution.x @ damped(SYSTEM.matrix, SYSTEM.damping)
        assert torch.allclose(solution.relative_residual, own.norm(dim=1) / rhs.norm(dim=1), atol=1e-10)

    def test_too_small_a_scale_diverges_and_names_one_that_does(self) -> None:
        matrix, rhs = 100 * spd(), randn(3, P)
        small = LiSSA(1.0, scale=10.0, rtol=1e-6, maxiter=20_000)
        solution = small.solve(small.fit(MatrixOperator(matrix)), rhs)
        assert solution.outcome == (Outcome.DIVERGED,) * 3
        assert (solution.x == 0).all()
        assert int(solution.iterations.max()) < 100  # soon
        named = float(solution.remarks[0].partition("A scale of ")[2].split()[0])
        large = replace(small, scale=named)
        again = large.solve(large.fit(MatrixOperator(matrix)), rhs)
        assert again.converged.all()

    def test_an_indefinite_matrix_diverges_with_any_scale_and_says_why(self) -> None:
        solver = LiSSA(0.05, scale=None, maxiter=5000)
        solution = solver.solve(solver.fit(MatrixOperator(indefinite())), randn(3, P))
        assert solution.outcome == (Outcome.DIVERGED,) * 3
        assert "indefinite" in solution.remarks[0]

    def test_a_large_scale_is_not_mistaken_for_convergence(self) -> None:
        solver = LiSSA(SYSTEM.damping, scale=1e6, rtol=1e-4, maxiter=200)  # steps of a millionth
        solution = solver.solve(solver.fit(MatrixOperator(SYSTEM.matrix)), SYSTEM.rhs())
        assert solution.outcome == (Outcome.MAXITER,) * 5
        assert (solution.relative_residual > 0.9).all()

    @pytest.mark.parametrize("maxiter", [1, 7])
    def test_a_solve_that_is_stopped_early_says_so(self, maxiter: int) -> None:
        operator = MatrixOperator(spd())
        solver = LiSSA(0.0, scale=2.0, maxiter=maxiter)
        solution = solver.solve(solver.fit(operator), randn(3, P))
        assert solution.outcome == (Outcome.MAXITER,) * 3
        assert solution.iterations.tolist() == [maxiter] * 3
        assert operator.work.passes == maxiter + 1

    def test_entries_that_stay_zero_do_not_stop_the_stopping(self) -> None:
        matrix = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))  # a dead unit
        solver = LiSSA(0.0, scale=3.0, rtol=1e-6)
        solution = solver.solve(solver.fit(MatrixOperator(matrix)), torch.tensor([[0.0, 1.0, 1.0]]).double())
        assert solution.converged.all()
        assert solution.x.tolist()[0][0] == 0

    def test_it_starts_where_it_is_told(self) -> None:
        rhs, scale = SYSTEM.rhs(3), 2.0
        there = scale * dense_solution(SYSTEM.matrix, SYSTEM.damping, rhs)
        solver = LiSSA(SYSTEM.damping, scale=scale, h0=there, rtol=1e-8)
        assert solver.solve(solver.fit(MatrixOperator(SYSTEM.matrix)), rhs).iterations.max() <= 1
        with pytest.raises(ShapeError, match=r"`h0` must be \[40\] or \[3, 40\], got \[2, 40\]"):
            replace(solver, h0=there[:2]).solve(solver.fit(MatrixOperator(SYSTEM.matrix)), rhs)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("maxiter", 0), ("dampen", 1.0), ("dampen", -0.1), ("scale", 0.0), ("scale", math.inf), ("scale", "10")],
    )
    def test_settings_are_checked(self, name: str, value: float) -> None:
        with pytest.raises(SettingError, match=f"`{name}` must be"):
            replace(self.solver, **{name: value})


def test_every_batch_is_seen_once_in_an_epoch_in_an_order_that_the_seed_decides() -> None:
    orders = []
    for seed in (0, 0, 1):
        operator = Batched(samples(), size=7)
        solver = LiSSA(0.5, scale=20.0, maxiter=24, rtol=0.0, seed=seed)
        solution = solver.solve(solver.fit(operator), randn(2, 8))
        orders.append((operator.indices, solution.x))
        epochs = [sorted(operator.indices[i : i + 8]) for i in range(0, 24, 8)]
        assert epochs == [list(range(8))] * 3
        assert operator.work.batches == 24
        assert operator.work.passes == 1  # the true residual
    assert orders[0][0] == orders[1][0] != orders[2][0]
    assert torch.equal(orders[0][1], orders[1][1])


def test_ragged_mini_batches_weigh_what_they_hold() -> None:
    """The average over many steps is the solution for the mean over samples, not over batches."""
    gradients = samples()
    gradients[49] *= 5  # alone in the last of the batches of seven: the mean over batches would count it seven times
    operator = Batched(gradients, size=7)
    rhs = randn(3, 8)
    solver = LiSSA(0.5, scale=300.0, maxiter=20_000, rtol=0.0)
    solution = solver.solve(solver.fit(operator), rhs)
    right = dense_solution(operator.matrix, 0.5, rhs)
    of_batches = sum(part.T @ part / len(part) for part in operator.parts) / operator.n_batches
    assert isinstance(of_batches, Tensor)
    wrong = relative_error(dense_solution(of_batches, 0.5, rhs), right)
    # steps of 1/scale leave a bias of that order: a small part of the one that is looked for
    assert relative_error(solution.x, right) < wrong / 10
    assert "steps on mini-batches a relative residual of" in solution.remarks[0]


def test_smaller_steps_lower_the_noise_floor() -> None:
    """The mean of the iterates is off by the order of 1/scale: five times the scale, a fifth of the error."""
    operator, rhs = Batched(samples(), size=7), randn(3, 8)
    right = dense_solution(operator.matrix, 0.5, rhs)
    errors = []
    for scale in (20.0, 100.0):
        solver = LiSSA(0.5, scale=scale, maxiter=2000, rtol=0.0)
        errors.append(relative_error(solver.solve(solver.fit(operator), rhs).x, right))
    assert errors[1] < errors[0] / 3


def test_the_mean_of_the_last_half_or_more_is_returned() -> None:
    operator, rhs = Batched(samples(), size=7), randn(3, 8)
    solver = LiSSA(0.5, scale=20.0, maxiter=64, rtol=0.0)
    solution = solver.solve(solver.fit(operator), rhs)
    h, iterates = rhs.clone(), []
    for index in operator.indices[:64]:
        iterates.append(h / 20.0)
        weight = operator.batch_sizes[index] * 8 / 50
        h = h + rhs - (weight * operator.batch_matmat(index, h) + 0.5 * h) / 20.0
    means = [torch.stack(iterates[start:]).mean(dim=0) for start in range(33)]
    assert min(relative_error(solution.x, mean) for mean in means) <= 1e-12


def test_all_data_in_every_step_is_exact() -> None:
    operator, rhs = Batched(samples(), size=7), randn(3, 8)
    solver = LiSSA(0.1, scale=None, rtol=1e-6, full_batch=True)
    solution = solver.solve(solver.fit(operator), rhs)
    assert solution.converged.all()
    # error ≤ rtol · cond, and cond is at most 50
    assert relative_error(solution.x, dense_solution(operator.matrix, 0.1, rhs)) <= 1e-6 * 50
    assert operator.work.batches == 0


def test_it_takes_many_more_passes_than_chebyshev() -> None:
    from distinfluence.solvers import Chebyshev

    passes = []
    for solver in (LiSSA(1e-2, scale=None, rtol=1e-4, maxiter=5000), Chebyshev(1e-2, rtol=1e-4)):
        operator = MatrixOperator(spd(), positive_semidefinite=True)
        state = solver.fit(operator)
        before = operator.work.passes
        assert solver.solve(state, randn(3, P)).converged.all()
        passes.append(operator.work.passes - before)
    assert passes[0] > 5 * passes[1]
