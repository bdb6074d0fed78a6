"""LiSSA: the Neumann series of the inverse, step by step, on mini-batches or on all data.

    h ← b + (1 − d)·h − (A_batch + λI) h / s,    x = h / s,    with the fixed point (A + (λ + s·d) I)⁻¹ b

A step costs one product with one mini-batch. It converges if 0 < (eig + λ)/s + d < 2 for all eigenvalues of the
batches' matrices, at the rate 1 − (λ_min + λ)/s − d: thousands of steps where λ is small, for which conjugate gradients
take dozens. On mini-batches the iterates keep fluctuating; their average over the last half or more is returned.

What an average x̄ over n steps leaves of b is known without a product: b − (A + λ + s·d) x̄ is (h_end − h_start)/n, up to
the noise of mini-batches. That tells rows that still move from rows that only fluctuate, at any scale; the size of
updates does not.

Reference: Agarwal, Bullins & Hazan (2017), "Second-order stochastic optimization for machine learning in linear time",
JMLR 18; the damping and the scale as in Koh & Liang (2017).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, PlannedWork, SupportsBatches
from distinfluence.errors import SettingError, ShapeError
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_count,
    check_damping,
    check_rhs,
    check_tolerance,
    damped,
    relative_residuals,
    row_norms,
)
from distinfluence.solvers.block_cg import orthonormal_rows
from distinfluence.solvers.demand import Demand, SolveWork, Systems, search_work
from distinfluence.solvers.spectrum import BLOCK, extreme_eigenvalues, random_rows

SAFETY = 1.1  # times the largest eigenvalue is the scale that is found where none is given
LANCZOS = 10  # passes to find that eigenvalue
PROBED_BATCHES = 8  # mini-batches whose own largest eigenvalue is looked at for it
MARGIN = 0.9  # of the tolerance is what updates are held to: the rounding of the last product must not undo it
GROWTH, GROWTH_IN_BATCHES = 2.0, 100.0  # of an iterate beyond ‖h0‖ + steps·‖b‖, which no step that contracts exceeds


@dataclass(frozen=True)
class LissaState(SolverState):
    """scale: s > 0. largest: the largest eigenvalue of A and of the batches that were looked at, NaN if none was.

    by_batches: whether steps take mini-batches; a fit to a single batch keeps to full steps over other chunks, too.
    """

    scale: float
    largest: float
    by_batches: bool

    @property
    def remarks(self) -> tuple[str, ...]:
        """The scale, where it was found."""
        return () if math.isnan(self.largest) else (f"LiSSA: scale {self.scale:.4g} found by a few Lanczos steps",)


@dataclass(frozen=True)
class LiSSA(Solver[LissaState]):
    """Linear-time stochastic second-order iteration.

    Args:
        damping: λ ≥ 0.
        maxiter: The largest number of steps.
        dampen: d in [0, 1). It acts as further damping of s·d, which the solution states.
        scale: s > 0, above half of the largest eigenvalue of A + λI and of its mini-batches; found in `fit` if None.
        h0: Where h starts, [p] or [k, p]; at the right-hand sides if None. Two solvers that differ in it alone count as
            equal.
        rtol: A row stops when its residual, of the damping that it effectively has, is below rtol·‖rhs‖, without the
            noise of mini-batches. Its true residual decides whether it has converged.
        full_batch: Whether every step takes all data.
        seed: The seed of the order of the mini-batches, the same in every solve.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> solver = LiSSA(damping=1.0, scale=None, rtol=1e-6)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
    >>> solver.solve(state, torch.tensor([[2.0, 4.0]], dtype=torch.float64)).x.round(decimals=5)
    tensor([[1., 1.]], dtype=torch.float64)
    """

    damping: float
    maxiter: int = 1000
    dampen: float = 0.0
    scale: float | None = 10.0
    h0: Tensor | None = field(default=None, compare=False)
    rtol: float = 1e-4
    full_batch: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_count("maxiter", self.maxiter)
        check_tolerance("rtol", self.rtol)
        if not _is_number(self.dampen) or not 0 <= self.dampen < 1:
            raise SettingError(f"`dampen` must be a number from 0 to below 1, got {self.dampen!r}.")
        if self.scale is not None and not (_is_number(self.scale) and self.scale > 0):
            raise SettingError(f"`scale` must be a finite number > 0, got {self.scale!r}. Pass None to have it found.")
        if self.h0 is not None and not isinstance(self.h0, Tensor):
            raise SettingError(f"`h0` must be a tensor [p] or [k, p], or None, got {type(self.h0).__name__}.")

    @override
    def demand(self, systems: Systems) -> Demand:
        # averages are held too on mini-batches; as many steps as are allowed, and a pass for the residuals
        sizes = systems.sizes if self.scale is None else ()
        fit = sum((search_work(size, BLOCK, LANCZOS) for size in sizes), PlannedWork())
        solve = SolveWork(self.maxiter) if self.full_batch else SolveWork(0, batches=self.maxiter)
        return Demand(row_vectors=8.0 if self.full_batch else 13.0, fit=fit, solve=solve)

    @override
    def fit(self, operator: CurvatureOperator) -> LissaState:
        # Nothing, or the scale: up to 10 passes of 4 rows, and 40 products with mini-batches.
        by_batches = not self.full_batch and isinstance(operator, SupportsBatches) and operator.n_batches > 1
        if self.scale is not None:
            return LissaState(operator, self.scale, math.nan, by_batches)
        ends = extreme_eigenvalues(operator, max_passes=LANCZOS, seed=self.seed)
        largest = self._largest(operator, ends.upper, by_batches)
        return LissaState(operator, self._scale_for(largest), largest, by_batches)

    @override
    def adapt(self, state: LissaState) -> LissaState:
        if self.scale is not None or math.isnan(state.largest):
            return state
        return replace(state, scale=self._scale_for(state.largest))

    def _scale_for(self, largest: float) -> float:
        return SAFETY * (largest + self.damping) or 1.0

    @override
    def state_arrays(self, state: LissaState) -> dict[str, Tensor]:
        numbers = [state.scale, state.largest, float(state.by_batches)]
        return {"scale": torch.tensor(numbers, dtype=torch.float64)}

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> LissaState:
        scale, largest, by_batches = arrays["scale"].tolist()
        return LissaState(operator, scale, largest, bool(by_batches))

    @override
    def solve(self, state: LissaState, rhs: Tensor) -> Solution:
        # Up to `maxiter` steps for the rows that are not done, and one pass for the true residuals.
        check_rhs(rhs, state.operator)
        operator = state.operator
        n_batches = cast(SupportsBatches, operator).n_batches if state.by_batches else 0
        run = _Run(self, state, rhs, self._start(operator, rhs), n_batches)
        for product in self._products(state):
            if not run.rows.numel() or run.step >= self.maxiter:
                break
            run.advance(product)
        return self._solution(state, rhs, run)

    def _start(self, operator: CurvatureOperator, rhs: Tensor) -> Tensor:
        if self.h0 is None:
            return rhs.clone()
        if self.h0.shape not in (rhs.shape, rhs.shape[1:]):
            raise ShapeError(f"`h0` must be {list(rhs.shape[1:])} or {list(rhs.shape)}, got {list(self.h0.shape)}.")
        start = self.h0.to(rhs).expand_as(rhs).clone()
        check_rhs(start, operator, "h0")
        return start

    def _products(self, state: LissaState) -> Iterator["_Product"]:
        """Full products for ever, or those of mini-batches in seeded order, every one once in an epoch."""
        operator = state.operator
        if not state.by_batches:
            while True:
                yield _Product(operator, None, 1.0)
        batches = cast(SupportsBatches, operator)
        generator = torch.Generator().manual_seed(self.seed)
        n, sizes = batches.n_batches, batches.batch_sizes
        while True:
            order = torch.randperm(n, generator=generator).tolist() if batches.in_any_order else list(range(n))
            for index in order:
                # a ragged batch weighs what it holds: the mean over an epoch is the mean over samples
                yield _Product(operator, index, sizes[index] * n / sum(sizes))

    def _largest(self, operator: CurvatureOperator, largest: float, by_batches: bool) -> float:
        """Of A, and of some mini-batches by power iteration: theirs are larger, and all of them have to contract."""
        if not by_batches:
            return max(largest, 0.0)
        batches = cast(SupportsBatches, operator)
        n, sizes = batches.n_batches, batches.batch_sizes
        # where batches come in order, the first ones: any other would be read up to
        some = range(0, n, math.ceil(n / PROBED_BATCHES)) if batches.in_any_order else range(min(n, PROBED_BATCHES))
        found = dict.fromkeys(some, random_rows(operator, 2, self.seed))
        for _ in range(5):
            found = {i: batches.batch_matmat(i, orthonormal_rows(rows)) for i, rows in found.items() if rows.any()}
        tops = [sizes[i] * n / sum(sizes) * float(row_norms(rows).max()) for i, rows in found.items() if rows.numel()]
        return max(largest, 0.0, *(1.5 * top for top in tops))  # half as much again: from below, and not all batches

    def _solution(self, state: LissaState, rhs: Tensor, run: "_Run") -> Solution:
        x = run.solution()
        product = damped(state.operator, x, self.damping)
        relative = relative_residuals(rhs, product)
        useless = (relative >= 1).to(rhs.device)  # no better than nothing: a part in a null space only grows
        for rows in (x, product):
            rows.masked_fill_(useless[:, None], 0)
        relative = relative.clamp_max(1.0)
        extra = state.scale * self.dampen
        effective = relative_residuals(rhs, torch.add(product, x, alpha=extra)) if extra else relative
        diverged = run.diverged.any()
        return Solution(
            x=x,
            relative_residual=relative,
            iterations=run.steps.cpu(),
            outcome=tuple(self._outcome(run, *row) for row in enumerate(zip(relative, effective, strict=True))),
            curvature=torch.full((rhs.shape[0],), math.nan, dtype=torch.float64),
            remarks=(
                *self._remarks(run, effective, extra),
                *(self._remedy(state) if diverged else ()),
            ),
        )

    def _outcome(self, run: "_Run", row: int, residuals: tuple[Tensor, Tensor]) -> Outcome:
        """residuals: the true one, and that of the damping that the row effectively had."""
        relative, effective = residuals
        if run.diverged[row]:
            return Outcome.DIVERGED
        if relative <= self.rtol:
            return Outcome.CONVERGED
        if effective <= self.rtol:
            return Outcome.APPROXIMATE
        # a row that stopped before met the noise of mini-batches, or rounding
        return Outcome.MAXITER if run.steps[row] >= self.maxiter else Outcome.STAGNATED

    def _remarks(self, run: "_Run", effective: Tensor, extra: float) -> tuple[str, ...]:
        """Say what dampen did, and what the noise of mini-batches left: effective: [k], relative residuals."""
        remarks = [f"LiSSA: dampen adds {extra:.3g} to the damping: {self.damping + extra:.4g} in all"] if extra else []
        ran = run.steps.cpu() > 0
        if run.n_batches and ran.any():
            left, motion = float(effective[ran].median()), float(run.motion.cpu()[ran].median())
            remarks.append(
                f"LiSSA: after {run.step} steps on mini-batches a relative residual of {left:.1e} is left (median of "
                f"rows); more steps would take away {motion:.1e}, the rest is noise, which a larger scale lowers"
            )
        return tuple(remarks)

    def _remedy(self, state: LissaState) -> tuple[str, ...]:
        """Why it diverged, and which scale would do; a few passes of Lanczos."""
        ends = extreme_eigenvalues(state.operator, max_passes=LANCZOS, seed=self.seed)
        if ends.smallest + self.damping + state.scale * self.dampen < 0:
            return (
                f"LiSSA diverges with any scale: A + λI is indefinite, its smallest eigenvalue is about "
                f"{ends.smallest + self.damping:.3g}. Use more damping, or second_order_mode='ggn'",
            )
        largest = self._largest(state.operator, ends.upper, state.by_batches)
        return (
            f"LiSSA diverged at scale {state.scale:.4g}: the largest eigenvalue of A + λI is about "
            f"{largest + self.damping:.3g}. A scale of {SAFETY * (largest + self.damping):.4g} would do; scale=None "
            "finds it",
        )


@dataclass(frozen=True)
class _Product:
    """One step's matrix: A of a mini-batch times its weight, or all of A."""

    operator: CurvatureOperator
    index: int | None
    weight: float

    def __call__(self, rows: Tensor) -> Tensor:
        if self.index is None:
            return self.operator.matmat(rows)
        return cast(SupportsBatches, self.operator).batch_matmat(self.index, rows).mul(self.weight)


class _Run:
    """The iterates, of the rows that are not done; rows: [n], their numbers. n_batches: 0 if all data are in a step."""

    def __init__(self, solver: LiSSA, state: LissaState, rhs: Tensor, start: Tensor, n_batches: int) -> None:
        self._solver, self._scale, self.n_batches = solver, state.scale, n_batches
        size = row_norms(rhs)
        self._done = torch.zeros_like(rhs)  # h of the rows that stopped
        self.diverged = torch.zeros_like(size, dtype=torch.bool)
        self.motion = torch.zeros_like(size)  # of the residual, relative: what more steps would take away
        self.steps = torch.zeros(rhs.shape[0], dtype=torch.int64, device=rhs.device)
        self.rows = (size > 0).nonzero().flatten()
        self._b, self._h, self._size = rhs[self.rows], start[self.rows], size[self.rows]
        self._bound = row_norms(self._h)
        self._moved = torch.full_like(self._bound, torch.inf)
        self.step = 0
        self._average = _Average(self._h, n_batches)

    def advance(self, product: _Product) -> None:
        """One step, and a look at who is done."""
        solver, h = self._solver, self._h
        change = torch.add(product(h), h, alpha=solver.damping).div_(-self._scale).add_(self._b)
        if solver.dampen:
            change.sub_(h, alpha=solver.dampen)
        after = h + change
        self.step += 1
        self.steps[self.rows] += 1
        self._bound += self._size
        norm = row_norms(after)
        growth = GROWTH_IN_BATCHES if self.n_batches else GROWTH
        lost = ~torch.isfinite(norm) | (norm > growth * self._bound)
        if self.n_batches:
            self._average.add(h, after)
            ends_epoch = self.step % self.n_batches == 0
            ready = self._average.motion(after) <= solver.rtol * self._size if ends_epoch else torch.zeros_like(lost)
        else:
            # the update is the residual of the iterate before it; where it grows it is rounding, or soon beyond bounds
            moved = row_norms(change)
            rounded = (moved >= self._moved) & (moved <= float(torch.finfo(h.dtype).eps) * row_norms(h))
            ready, self._moved = (moved <= MARGIN * solver.rtol * self._size) | rounded, moved
        self._stop(h, after, ready & ~lost, lost)

    def _stop(self, h: Tensor, after: Tensor, ready: Tensor, lost: Tensor) -> None:
        """Go on to `after` with the rows that are neither ready nor lost."""
        self._h = after
        kept = ~(ready | lost)
        if kept.all():
            return
        self._settle(h, ready)
        self.diverged[self.rows[lost]] = True
        self._keep(kept)

    def _keep(self, kept: Tensor) -> None:
        self.rows, self._b, self._h = self.rows[kept], self._b[kept], self._h[kept]
        self._size, self._bound, self._moved = self._size[kept], self._bound[kept], self._moved[kept]
        self._average.keep(kept)

    def _settle(self, h: Tensor, which: Tensor) -> None:
        if self.n_batches and self.step:
            self.motion[self.rows[which]] = (self._average.motion(self._h) / self._size)[which]
            h = self._average.mean(self._h)
        self._done[self.rows[which]] = h[which]

    def solution(self) -> Tensor:
        """x [k, p]: zero for rows that diverged, the average for those that ran out of steps on mini-batches."""
        rest = torch.ones_like(self.rows, dtype=torch.bool)
        self._settle(self._h, rest)
        self._keep(~rest)  # frees their memory
        return self._done.div_(self._scale)


class _Average:
    """The mean of iterates [n, p] over the last half of the steps or so, whenever it is asked for.

    A window that doubles, and the one before it. Once an epoch is over they begin with epochs, so that each mini-batch
    counts the same. start: [n, p], the first iterate.
    """

    def __init__(self, start: Tensor, n_batches: int) -> None:
        self._n_batches = n_batches
        self._step = 0
        self._begun = [0, 0]
        if n_batches:
            self._starts = [start, start]
            self._sums = [torch.zeros_like(start), torch.zeros_like(start)]

    def add(self, h: Tensor, after: Tensor) -> None:
        """Add the iterate of a step, and where the step led."""
        self._sums[1] = self._sums[1] + h
        self._step += 1
        aligned = self._step < self._n_batches or self._step % self._n_batches == 0
        if aligned and self._step >= 2 * self._begun[1]:
            self._begun = [self._begun[1], self._step]
            self._starts = [self._starts[1], after]
            self._sums = [self._sums[1], torch.zeros_like(h)]

    def mean(self, h: Tensor) -> Tensor:
        """[n, p]. h: where the rows are now. Of the last window alone for rows that move less there than in both."""
        both = (self._sums[0] + self._sums[1]) / self._steps(0)
        last = (self._motion(1, h) < self._motion(0, h))[:, None]
        return torch.where(last, self._sums[1] / max(self._steps(1), 1), both)

    def motion(self, h: Tensor) -> Tensor:
        """‖h − h_start‖ / steps [n] float64: the residual of the mean, but for noise."""
        return torch.minimum(self._motion(0, h), self._motion(1, h))

    def keep(self, kept: Tensor) -> None:
        """Keep these rows alone, [n] bool."""
        if self._n_batches:
            self._starts = [start[kept] for start in self._starts]
            self._sums = [total[kept] for total in self._sums]

    def _steps(self, window: int) -> int:
        return self._step - self._begun[window]

    def _motion(self, window: int, h: Tensor) -> Tensor:
        """Infinite for a last window that is shorter than a third of both, or than an epoch that has been."""
        steps = self._steps(window)
        if window and (3 * steps < self._steps(0) or steps < self._n_batches < self._step):
            return torch.full_like(row_norms(h), torch.inf)
        return row_norms(h - self._starts[window]) / steps


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
