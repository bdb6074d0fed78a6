"""Multi-shift block Krylov: one basis for all rows and for every damping.

K(A, B) does not depend on the damping, so one orthonormal basis V of it, T = V A Vᵀ, serves all of them: x = (B Vᵀ)(T +
λI)⁻¹ V, with residuals that need no pass. A basis vector is never thrown away, so no method without a preconditioner
needs fewer passes; the price is memory, m·p numbers for m = rows × passes. When that is spent, block conjugate
gradients go on from there, one damping after the other. Where A + λI is not positive definite, the residual is
minimised instead (as in MINRES).

References: Saad (2003), Iterative Methods for Sparse Linear Systems, sections 6.4 and 6.7; Frommer & Glässner (1998),
"Restarted GMRES for shifted linear systems", SIAM J. Sci. Comput. 19.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_count,
    check_damping,
    check_rhs,
    check_stopping,
    row_norms,
    rtol_for,
)
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.demand import BESIDE_BASIS, GROWING, USUAL_BASIS, Demand, SolveWork, Systems, usual_steps
from distinfluence.solvers.lanczos import BlockLanczos

BASIS_BYTES = 2 * 2**30  # of the basis, before block conjugate gradients go on without one
MOST_PASSES = 200  # where `maxiter` is None
GROWTH = 1.25  # of the basis between two looks at the least residual, which costs the cube of its size
MARGIN = 0.9  # of the tolerance is what residuals read off T are held to: rounding must not cost a second cycle


@dataclass(frozen=True)
class BlockKrylov(Solver[SolverState]):
    """Multi-shift block Krylov solver; `solve_at` serves a whole list of dampings with the passes of the smallest.

    Args:
        damping: λ ≥ 0.
        rtol: Relative tolerance. A row has converged when ‖rhs − (A + λI) x‖ ≤ max(rtol·‖rhs‖, atol), as in SciPy, for
            the true residual. None is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance.
        maxiter: The largest number of passes; 200 if None.
        basis_bytes: The memory for the basis, which holds at least two blocks of the rows in any case. Beyond it
            `BlockCG` goes on, which needs A + λI positive definite.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> solver = BlockKrylov(damping=1.0)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
    >>> one, ten = solver.solve_at(state, torch.tensor([[2.0, 4.0]], dtype=torch.float64), [1.0, 9.0])
    >>> [solution.x.round(decimals=6).tolist() for solution in (one, ten)]
    [[[1.0, 1.0]], [[0.2, 0.333333]]]
    """

    damping: float
    rtol: float | None = 1e-7
    atol: float = 0.0
    maxiter: int | None = None
    basis_bytes: int = BASIS_BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_stopping(self.rtol, self.atol)
        if self.maxiter is not None:
            check_count("maxiter", self.maxiter)
        check_count("basis_bytes", self.basis_bytes)

    @override
    def demand(self, systems: Systems) -> Demand:
        # a block of the basis and one of its images for each step, up to `basis_bytes`
        most, steps = GROWING * self.basis_bytes, usual_steps(self.rtol, systems.dtype)
        work = SolveWork(steps, block=True, basis_flops=4.0 * sum(systems.sizes))
        return Demand(row_vectors=2.0 * USUAL_BASIS, most_bytes=most, solve=work, beside_vectors=BESIDE_BASIS)

    @override
    def fit(self, operator: CurvatureOperator) -> SolverState:
        # Nothing: the basis starts from the right-hand sides.
        return SolverState(operator)

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> SolverState:
        return SolverState(operator)

    @override
    def solve(self, state: SolverState, rhs: Tensor) -> Solution:
        # Solve for rhs [k, p]: a pass for each block of the basis, and one for the true residual.
        return self.solve_at(state, rhs, [self.damping])[0]

    @override
    def solve_at(self, state: SolverState, rhs: Tensor, dampings: Sequence[float]) -> list[Solution]:
        for damping in dampings:
            check_damping(damping)
        check_rhs(rhs, state.operator)
        run = _Run(self, state.operator, rhs, list(dampings))
        while run.unfinished().numel():
            if run.full:
                run.go_on_without_a_basis()
            else:
                run.cycle()
        return run.solutions()


class _Run:
    """One solve: rows × dampings are its systems, [n] of them, damping by damping."""

    def __init__(self, solver: BlockKrylov, operator: CurvatureOperator, rhs: Tensor, dampings: list[float]) -> None:
        self._solver = solver
        self._operator = operator
        self._rhs = rhs
        self._dampings = dampings
        self.full = False  # whether the memory for the basis is spent
        self._maxiter = solver.maxiter or MOST_PASSES
        self._most = solver.basis_bytes // (operator.size * operator.dtype.itemsize)
        times, k = len(dampings), rhs.shape[0]
        size = row_norms(rhs)
        self._size = size.repeat(times)
        self._threshold = (rtol_for(solver.rtol, rhs.dtype) * size).clamp_min(solver.atol).repeat(times)
        self._row = torch.arange(k, device=rhs.device).repeat(times)
        self._shift = torch.arange(times, device=rhs.device).repeat_interleave(k)
        self._x = rhs.new_zeros(times * k, rhs.shape[1])
        self._residual: Tensor | None = None  # until a cycle has ended: the rows themselves, for every damping
        self._norm = self._size.clone()
        self._steps = torch.zeros(times * k, dtype=torch.int64, device=rhs.device)
        self._outcome: list[Outcome | None] = [
            Outcome.CONVERGED if done else None for done in (self._norm <= self._threshold).tolist()
        ]
        self._passes = 0
        self._largest = 0.0
        self._smallest = [math.inf] * times  # Rayleigh quotients of A + λI

    def unfinished(self) -> Tensor:
        """Numbers of the systems that have no outcome yet."""
        return torch.tensor([i for i, o in enumerate(self._outcome) if o is None], device=self._x.device).long()

    def cycle(self) -> None:
        """Grow a basis from what is left until it holds all solutions, memory or passes are spent; then measure."""
        todo = self.unfinished()
        if self._residual is None:
            rows, which = torch.unique(self._row[todo], return_inverse=True)
            start = self._rhs[rows]
        else:
            start, which = self._residual[todo], torch.arange(len(todo), device=self._x.device)
        lanczos = BlockLanczos(self._operator, start, max(self._most, 3 * start.shape[0]))
        coordinates = (start @ lanczos.next.T).double()
        corrections, steps = self._x.new_zeros(len(todo), self._x.shape[1]), self._steps[todo]
        systems = {
            shift: (mine, _Projected(self._dampings[shift], coordinates[which[mine]], self._threshold[todo[mine]]))
            for shift in torch.unique(self._shift[todo]).tolist()
            for mine in [self._shift[todo] == shift]
        }
        self._grow(lanczos, [system for _, system in systems.values()])
        for shift, (mine, system) in systems.items():
            corrections[mine] = system.solution(lanczos).to(corrections.dtype) @ lanczos.basis
            steps[mine] += system.steps
            self._smallest[shift] = min(self._smallest[shift], system.smallest)
        self._steps[todo] = steps
        self._largest = max(self._largest, lanczos.largest)
        self._measure(todo, self._x[todo] + corrections)

    def _grow(self, lanczos: BlockLanczos, systems: "list[_Projected]") -> None:
        while self._passes < self._maxiter and not lanczos.exhausted:
            lanczos.step()
            if not lanczos.projected.isfinite().all():
                self._passes = self._maxiter  # LAPACK would raise; rows that do not end well are no error
                return
            self._passes += 1
            for system in systems:
                system.extend(lanczos)
            # two blocks at least: a cycle of one would be steepest descent
            self.full = lanczos.size + lanczos.next.shape[0] > self._most and lanczos.size > lanczos.next.shape[0]
            if self.full or all(bool(system.done.all()) for system in systems):
                return

    def _measure(self, todo: Tensor, x: Tensor) -> None:
        """One pass over the systems of a cycle: their true residuals; what became worse is not taken."""
        dampings = torch.tensor(self._dampings, dtype=x.dtype, device=x.device)[self._shift[todo]]
        residual = self._rhs[self._row[todo]] - self._operator.matmat(x) - dampings[:, None] * x
        norm, before = row_norms(residual), self._norm[todo]
        # residuals may rise while the energy of the error falls: what is gone on with is taken all the same
        better = (norm < before) | (torch.isfinite(norm) & (self.full or self._passes >= self._maxiter))
        if self._residual is None:
            self._residual = self._rhs[self._row]
        into = todo[better]
        self._x[into], self._residual[into], self._norm[into] = x[better], residual[better], norm[better]
        for system, was in zip(todo.tolist(), before.tolist(), strict=True):
            self._outcome[system] = self._settle(system, was)

    def _settle(self, system: int, before: float) -> Outcome | None:
        now, smallest = float(self._norm[system]), self._smallest[int(self._shift[system])]
        if now <= float(self._threshold[system]):
            return Outcome.CONVERGED
        if self._passes >= self._maxiter:
            return Outcome.MAXITER
        if now <= before / 2 or self.full:
            return None
        # what a new cycle cannot halve is the rounding of the products, or lies along flat directions
        return Outcome.SINGULAR if abs(smallest) <= self._noise else Outcome.STAGNATED

    def go_on_without_a_basis(self) -> None:
        """Block conjugate gradients from where the rows are, for one damping after the other."""
        k, todo = self._rhs.shape[0], self.unfinished()
        for shift in torch.unique(self._shift[todo]).tolist():
            mine = todo[self._shift[todo] == shift]
            solver = BlockCG(
                self._dampings[shift], self._solver.rtol, self._solver.atol, max(1, self._maxiter - self._passes)
            )
            found = solver.solve(solver.fit(self._operator), self._rhs[mine % k], self._x[mine])
            self._x[mine], self._norm[mine] = found.x, found.relative_residual.to(self._x.device) * self._size[mine]
            self._steps[mine] += found.iterations.to(self._x.device)
            self._smallest[shift] = min([self._smallest[shift], *found.curvature[found.curvature.isfinite()].tolist()])
            for system, outcome in zip(mine.tolist(), found.outcome, strict=True):
                self._outcome[system] = outcome

    @property
    def _noise(self) -> float:
        return 10 * float(torch.finfo(self._x.dtype).eps) * math.sqrt(self._rhs.shape[1]) * self._largest

    def solutions(self) -> list[Solution]:
        relative = torch.where(self._size > 0, self._norm / torch.where(self._size > 0, self._size, 1.0), self._norm)
        k = self._rhs.shape[0]
        found = []
        for shift, damping in enumerate(self._dampings):
            mine = slice(shift * k, (shift + 1) * k)
            smallest = self._smallest[shift]
            met = self._steps[mine] > 0
            found.append(
                Solution(
                    x=self._x[mine],
                    relative_residual=relative[mine].cpu(),
                    iterations=self._steps[mine].cpu(),
                    outcome=tuple(outcome for outcome in self._outcome[mine] if outcome is not None),
                    curvature=torch.where(met, smallest, torch.nan).double().cpu(),
                    largest=self._largest + damping if self._largest else math.nan,
                    remarks=self._remarks(damping, smallest),
                )
            )
        return found

    def _remarks(self, damping: float, smallest: float) -> tuple[str, ...]:
        if smallest >= -self._noise:
            return ()
        return (
            f"A + λI is indefinite at λ = {damping:g}: a Rayleigh quotient of {smallest:.3g} was met. The system is "
            f"solved all the same, by its least residual; a damping above {damping - smallest:.3g} would be needed.",
        )


class _Projected:
    """The systems of one damping in coordinates of the basis: (T + λI) y = right, for rows right [s, r] of the start.

    Solved by a Cholesky factor that grows with the basis, so that a step costs m²·r flops; where T + λI is not positive
    definite, by least residual, from scratch. threshold: [s]. done: [s] bool, steps: [s] when they were.
    """

    def __init__(self, shift: float, right: Tensor, threshold: Tensor) -> None:
        self._shift = shift
        self._right = right
        self._threshold = MARGIN * threshold
        self._factor: Tensor | None = right.new_zeros(0, 0)
        self._half = right.new_zeros(0, right.shape[0])  # L⁻¹ right
        self._looked_at = 0
        self.done = torch.zeros(right.shape[0], dtype=torch.bool, device=right.device)
        self.steps = torch.zeros(right.shape[0], dtype=torch.int64, device=right.device)
        self.smallest = math.inf

    def extend(self, lanczos: BlockLanczos) -> None:
        """Take the basis's last block in, and see which rows are done."""
        self.steps[~self.done] += 1
        if self._factor is not None:
            self.done |= self._by_cholesky(lanczos, self._factor) <= self._threshold
        if self._factor is None and (lanczos.size >= GROWTH * self._looked_at or lanczos.exhausted):
            self._looked_at = lanczos.size
            self.done |= self._by_least_residual(lanczos)[1] <= self._threshold

    def _by_cholesky(self, lanczos: BlockLanczos, factor: Tensor) -> Tensor:
        old, size = factor.shape[0], lanczos.size
        new = lanczos.projected[old:]
        below = torch.linalg.solve_triangular(factor, new[:, :old].T, upper=False).T
        corner = new[:, old:] - below @ below.T
        corner.diagonal().add_(self._shift)
        self.smallest = min(self.smallest, float(new.diagonal(old).min()) + self._shift)
        last, failed = torch.linalg.cholesky_ex(corner)
        noise = self._noise(lanczos)
        if int(failed) or float(last.diagonal().min()) ** 2 <= noise:
            self._factor = None
            return self.done.new_full(self.done.shape, torch.inf, dtype=torch.float64)
        grown = factor.new_zeros(size, size)
        grown[:old, :old], grown[old:, :old], grown[old:, old:] = factor, below, last
        self._factor = grown
        right = self._padded(size)[:, old:].T - below @ self._half
        self._half = torch.cat([self._half, torch.linalg.solve_triangular(last, right, upper=False)])
        end = torch.linalg.solve_triangular(last.T, self._half[old:], upper=True)
        residual: Tensor = torch.linalg.vector_norm(lanczos.coupling[old:].T @ end, dim=0)
        return residual

    def _by_least_residual(self, lanczos: BlockLanczos) -> tuple[Tensor, Tensor]:
        """y [s, m] that makes ‖right − y [T + λI, coupling]‖ least, of least norm; and those norms [s]."""
        matrix = lanczos.projected.clone()
        self.smallest = min(self.smallest, float(torch.linalg.eigvalsh(matrix)[0]) + self._shift)
        matrix.diagonal().add_(self._shift)
        wide = torch.cat([matrix, lanczos.coupling], dim=1)
        right = self._padded(wide.shape[1])
        # on the CPU: CUDA has no rank-revealing driver
        rcond = self._noise(lanczos) / max(float(torch.linalg.matrix_norm(wide, torch.inf)), 1e-300)
        y = torch.linalg.lstsq(wide.T.cpu(), right.T.cpu(), rcond=rcond, driver="gelsy").solution.T.to(right.device)
        return y, torch.linalg.vector_norm(right - y @ wide, dim=1)

    def _padded(self, size: int) -> Tensor:
        return torch.nn.functional.pad(self._right, (0, size - self._right.shape[1]))

    def _noise(self, lanczos: BlockLanczos) -> float:
        """Eigenvalues of T + λI within ± this are zero to the rounding of the products."""
        eps = float(torch.finfo(lanczos.basis.dtype).eps)
        return 10 * eps * math.sqrt(lanczos.basis.shape[1]) * lanczos.largest

    def solution(self, lanczos: BlockLanczos) -> Tensor:
        """y [s, m], float64; zeros if there was no step, or none that was finite."""
        if not lanczos.size or not lanczos.projected.isfinite().all():
            return self._right.new_zeros(self._right.shape[0], lanczos.size)
        if self._factor is None:
            return self._by_least_residual(lanczos)[0]
        y: Tensor = torch.linalg.solve_triangular(self._factor.T, self._half, upper=True)
        return y.T
