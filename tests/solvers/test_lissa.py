"""LiSSA: the contract in full batches, unbiased on mini-batches, and clear about scales."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import NonFiniteError, SettingError, ShapeError
from distinfluence.solvers import LiSSA, Outcome
from distinfluence.solvers.lissa import LissaState
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import SYSTEM, P, damped, dense_solution, indefinite, randn, relative_error, spd


class Batched(CurvatureOperator):
    """A mean over samples g gᵀ in mini-batches, the last one ragged."""

    def __init__(self, gradients: Tensor, size: int, in_any_order: bool = True) -> None:
        super().__init__(gradients.shape[1], gradients.dtype, gradients.device)
        self.parts = gradients.split(size)
        self.batch_sizes = tuple(len(part) for part in self.parts)
        self.n_batches = len(self.parts)
        self.matrix = gradients.T @ gradients / len(gradients)
        self.in_any_order = in_any_order
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


class TestLiSSA(SolverContract[LissaState]):
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
        with pytest.raises(NonFiniteError, match="`h0` must be finite, got NaN or infinity in rows \\[1\\]"):
            replace(solver, h0=there.clone().fill_diagonal_(0.0).index_fill_(0, torch.tensor([1]), math.nan)).solve(
                solver.fit(MatrixOperator(SYSTEM.matrix)), rhs
            )

    def test_a_start_that_is_far_away_is_no_divergence(self) -> None:
        matrix = torch.diag(torch.tensor([0.1, 1.9], dtype=torch.float64))  # a scale of 1 is barely enough: 1.9 < 2
        solver = LiSSA(0.0, scale=1.0, h0=torch.tensor([0.0, -1e9], dtype=torch.float64), rtol=1e-6)
        solution = solver.solve(solver.fit(MatrixOperator(matrix)), torch.ones(1, 2, dtype=torch.float64))
        assert solution.converged.all()

    def test_rows_at_the_rounding_of_their_dtype_stop(self) -> None:
        """Condition 102 in steps at a rate of 1/112: what is left after 1600 of them is 1e-6, twice the rounding."""
        matrix, rhs = SYSTEM.matrix.float(), SYSTEM.rhs().float()
        solver = LiSSA(SYSTEM.damping, scale=None, rtol=1e-9, maxiter=20_000)
        solution = solver.solve(solver.fit(MatrixOperator(matrix)), rhs)
        assert solution.outcome == (Outcome.STAGNATED,) * 5
        assert int(solution.iterations.max()) < 1600
        # eps · cond: what rounding of h, which is cond times b, leaves
        assert (solution.relative_residual < 102 * torch.finfo(torch.float32).eps).all()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("maxiter", 0),
            ("dampen", 1.0),
            ("dampen", -0.1),
            ("scale", 0.0),
            ("scale", math.inf),
            ("scale", "10"),
            ("h0", 0.0),
        ],
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


def test_batches_that_are_dear_to_jump_between_are_taken_in_order() -> None:
    operator = Batched(samples(), size=3, in_any_order=False)
    solver = LiSSA(0.5, scale=None, maxiter=20, rtol=0.0)
    state = solver.fit(operator)
    assert operator.indices == [*range(8)] * 5  # sweeps of the power iteration over the first of seventeen
    operator.indices.clear()
    solver.solve(state, randn(2, 8))
    assert operator.indices == [*range(17), 0, 1, 2]


def stationary_mean(operator: Batched, damping: float, scale: float, rhs: Tensor) -> Tensor:
    """What iterates x = h/s [k, p] average to in the long run: exact, over all orders that an epoch may have.

    An epoch maps h to P h + q and the sum of its iterates to S h + t, each depending on its order alone.
    """
    n, eye = operator.n_batches, torch.eye(operator.size, dtype=torch.float64)
    weights = [len(part) * n / sum(operator.batch_sizes) for part in operator.parts]
    steps = [
        eye - (w * part.T @ part / len(part) + damping * eye) / scale
        for w, part in zip(weights, operator.parts, strict=True)
    ]
    mean_p, mean_s = torch.zeros_like(eye), torch.zeros_like(eye)
    mean_q, mean_t = torch.zeros_like(rhs), torch.zeros_like(rhs)
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        p, q = eye, torch.zeros_like(rhs)
        for index in order:
            mean_s, mean_t = mean_s + p / len(orders), mean_t + q / len(orders)
            p, q = p @ steps[index], q @ steps[index] + rhs
        mean_p, mean_q = mean_p + p / len(orders), mean_q + q / len(orders)
    h = torch.linalg.solve((eye - mean_p).T, mean_q.T).T
    mean: Tensor = (h @ mean_s + mean_t) / (n * scale)
    return mean


def test_ragged_mini_batches_weigh_what_they_hold() -> None:
    """pyDVL averages batches; the mean over samples counts a lone sample in the last batch once, not three times."""
    gradients = samples(10)[:, :4]
    gradients[9] *= 2  # alone in the last of the batches of three
    operator, rhs = Batched(gradients, size=3), randn(2, 4)
    solver = LiSSA(0.5, scale=40.0, maxiter=1600, rtol=0.0)
    found = torch.stack([replace(solver, seed=seed).solve(solver.fit(operator), rhs).x for seed in range(8)])
    expected = stationary_mean(operator, 0.5, 40.0, rhs)
    # independent seeds: five standard errors of their mean. The start fades by (1 − 0.5/40) a step, from 1600/4 on
    error = 5 * found.std(dim=0) / 8**0.5 + expected.norm() * (1 - 0.5 / 40) ** 400
    assert ((found.mean(dim=0) - expected).abs() <= error).all()
    # and that mean goes to the solution for the mean over samples as 1/scale does to 0, not to that for batches
    right = dense_solution(operator.matrix, 0.5, rhs)
    of_batches = torch.stack([part.T @ part / len(part) for part in operator.parts]).mean(dim=0)
    wrong = relative_error(dense_solution(of_batches, 0.5, rhs), right)
    bias = [relative_error(stationary_mean(operator, 0.5, scale, rhs), right) for scale in (40.0, 400.0, 4000.0)]
    assert bias[1] == pytest.approx(bias[0] / 10, rel=0.2)
    assert bias[2] == pytest.approx(bias[1] / 10, rel=0.02)
    assert bias[0] < wrong / 2


def test_mini_batches_that_are_all_alike_converge_and_stop() -> None:
    operator = Batched(samples(7).repeat(6, 1), size=7)
    solver = LiSSA(0.5, scale=None, rtol=1e-6, maxiter=50_000)
    solution = solver.solve(solver.fit(operator), randn(3, 8))
    assert solution.converged.all()
    assert int(solution.iterations.max()) < 1000
    assert (solution.iterations % 6 == 0).all()  # looked at after an epoch


def test_rows_that_only_fluctuate_stop_and_are_not_called_converged() -> None:
    operator = Batched(samples(), size=7)
    solver = LiSSA(0.5, scale=20.0, rtol=1e-2, maxiter=50_000)
    solution = solver.solve(solver.fit(operator), randn(3, 8))
    assert solution.outcome == (Outcome.STAGNATED,) * 3
    assert int(solution.iterations.max()) < 5000
    assert (solution.relative_residual > 1e-2).all()
    left, motion = (float(solution.remarks[0].partition(word)[2].split()[0].strip(",")) for word in ("of", "away"))
    assert left == pytest.approx(float(solution.relative_residual.median()), rel=0.05)
    assert motion <= 1e-2


def test_a_large_scale_on_mini_batches_is_motion_not_noise_and_does_not_stop() -> None:
    operator = Batched(samples(), size=7)
    solver = LiSSA(0.5, scale=1e6, rtol=1e-4, maxiter=200)
    solution = solver.solve(solver.fit(operator), randn(2, 8))
    assert solution.outcome == (Outcome.MAXITER,) * 2
    assert (solution.relative_residual > 0.99).all()
    assert "more steps would take away 1.0e+00" in solution.remarks[0]


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_a_scale_that_is_found_does_for_every_mini_batch(size: int) -> None:
    operator = Batched(samples(), size=size)
    solver = LiSSA(0.1, scale=None, maxiter=2000)
    state = solver.fit(operator)
    weights = [n * operator.n_batches / 50 for n in operator.batch_sizes]
    tops = [
        w * float(torch.linalg.matrix_norm(part, 2)) ** 2 / len(part)
        for w, part in zip(weights, operator.parts, strict=True)
    ]
    assert 2 * state.scale > max(tops) + 0.1
    assert Outcome.DIVERGED not in solver.solve(state, randn(2, 8)).outcome


def test_smaller_steps_lower_the_noise_floor() -> None:
    """The mean of the iterates is off by the order of 1/scale: five times the scale, a fifth of the error."""
    operator, rhs = Batched(samples(), size=7), randn(3, 8)
    right = dense_solution(operator.matrix, 0.5, rhs)
    errors = []
    for scale in (20.0, 100.0):
        solver = LiSSA(0.5, scale=scale, maxiter=2000, rtol=0.0)
        errors.append(relative_error(solver.solve(solver.fit(operator), rhs).x, right))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize(("maxiter", "first"), [(5, 2), (64, 32), (80, 32), (63, 16)])
def test_a_mean_of_the_later_iterates_is_returned(maxiter: int, first: int) -> None:
    """Windows double, and begin with epochs of eight after the first: the last two, or the last alone if it is long."""
    operator, rhs = Batched(samples(), size=7), randn(3, 8)
    solver = LiSSA(0.5, scale=20.0, maxiter=maxiter, rtol=0.0)
    solution = solver.solve(solver.fit(operator), rhs)
    h, iterates = rhs.clone(), []
    for index in operator.indices[:maxiter]:
        iterates.append(h / 20.0)
        weight = operator.batch_sizes[index] * 8 / 50
        h = h + rhs - (weight * operator.batch_matmat(index, h) + 0.5 * h) / 20.0
    allowed = [torch.stack(iterates[start:]).mean(dim=0) for start in (first, 2 * first) if start < maxiter]
    for row, x in enumerate(solution.x):
        assert any(torch.allclose(x, mean[row], rtol=1e-12, atol=0) for mean in allowed)


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
    # cond is 100: ½·√cond·ln(2/rtol) = 50 against 1.1·cond·ln(1/rtol) = 1013, all of it for the flattest direction
    assert passes[1] <= 50 + 2
    assert 8 * passes[1] < passes[0] <= 1013 + 2
