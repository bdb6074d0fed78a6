"""LiSSA: the Neumann series of the inverse, step by step, on mini-batches or on all data.

    h ← b + (1 − d)·h − (A_batch + λI) h / s,    x = h / s,    with the fixed point (A + (λ + s·d) I)⁻¹ b

A step costs one product with one mini-batch. It converges if 0 < (eig + λ)/s + d < 2 for all eigenvalues of the
batches' matrices, at the rate 1 − (λ_min + λ)/s − d: thousands of steps where λ is small, for which conjugate gradients
take dozens. On mini-batches the iterates keep fluctuating; their average over the second half is returned.

Reference: Agarwal, Bullins & Hazan (2017), "Second-order stochastic optimization for machine learning in linear time",
JMLR 18; the damping and the scale as in Koh & Liang (2017).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator, SupportsBatches
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
from distinfluence.solvers.spectrum import extreme_eigenvalues, random_rows

SAFETY = 1.1  # times the largest eigenvalue is the scale that is found where none is given
PROBED_BATCHES = 8  # mini-batches whose own largest eigenvalue is looked at for it
MARGIN = 0.9  # of the tolerance is what updates are held to: the rounding of the last product must not undo it
GROWTH = 1e8  # of an iterate beyond the right-hand side: it diverges


@dataclass(frozen=True)
class Scaled(SolverState):
    """scale: s > 0. largest: the largest eigenvalue of A and of the batches that were looked at, NaN if none was."""

    scale: float
    largest: float

    @property
    def remarks(self) -> tuple[str, ...]:
        """The scale, where it was found."""
        return () if math.isnan(self.largest) else (f"LiSSA: scale {self.scale:.4g} found by a few Lanczos steps",)


@dataclass(frozen=True)
class LiSSA(Solver[Scaled]):
    """Linear-time stochastic second-order iteration.

    damping: λ ≥ 0. maxiter: steps. dampen: d in [0, 1); acts as further damping of s·d, which the solution says.
    scale: s > 0, above half of the largest eigenvalue of A + λI and of its mini-batches; found in `fit` if None. h0:
    where h starts, [p] or [k, p]; at the right-hand sides if None. rtol: in full batches a row stops when its residual,
    of the damping that it effectively has, is below rtol·‖rhs‖; on mini-batches when its mean over an epoch changes by
    less than rtol. full_batch: take all data in every step. seed: of the order of the mini-batches.

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
        check_damping(self.damping)
        check_count("maxiter", self.maxiter)
        check_tolerance("rtol", self.rtol)
        if not _is_number(self.dampen) or not 0 <= self.dampen < 1:
            raise SettingError(f"`dampen` must be a number from 0 to below 1, got {self.dampen!r}.")
        if self.scale is not None and not (_is_number(self.scale) and self.scale > 0):
            raise SettingError(f"`scale` must be a finite number > 0, got {self.scale!r}. Pass None to have it found.")

    def fit(self, operator: CurvatureOperator) -> Scaled:
        """Nothing, or the scale: 5 to 40 passes of 4 rows, and a few products with mini-batches."""
        if self.scale is not None:
            return Scaled(operator, self.scale, math.nan)
        largest = self._largest(operator)
        return Scaled(operator, self._scale_for(largest), largest)

    def adapt(self, state: Scaled) -> Scaled:
        """The same eigenvalue, another scale."""
        if self.scale is not None or math.isnan(state.largest):
            return state
        return Scaled(state.operator, self._scale_for(state.largest), state.largest)

    def _scale_for(self, largest: float) -> float:
        return SAFETY * (largest + self.damping) or 1.0

    def state_arrays(self, state: Scaled) -> dict[str, Tensor]:
        """The scale."""
        return {"scale": torch.tensor([state.scale, state.largest], dtype=torch.float64)}

    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> Scaled:
        """Without products."""
        scale, largest = arrays["scale"].tolist()
        return Scaled(operator, scale, largest)

    def solve(self, state: Scaled, rhs: Tensor) -> Solution:
        """Up to `maxiter` steps for the rows that are not done, and one pass for the true residuals."""
        check_rhs(rhs, state.operator)
        run = _Run(self, state, rhs, self._start(rhs), self._by_batches(state.operator))
        for product in self._products(state.operator):
            if not run.rows.numel() or run.step >= self.maxiter:
                break
            run.advance(product)
        return self._solution(state, rhs, run)

    def _by_batches(self, operator: CurvatureOperator) -> bool:
        return not self.full_batch and isinstance(operator, SupportsBatches) and operator.n_batches > 1

    def _start(self, rhs: Tensor) -> Tensor:
        if self.h0 is None:
            return rhs.clone()
        if self.h0.shape not in (rhs.shape, rhs.shape[1:]):
            raise ShapeError(f"`h0` must be {list(rhs.shape[1:])} or {list(rhs.shape)}, got {list(self.h0.shape)}.")
        return self.h0.to(rhs).expand_as(rhs).clone()

    def _products(self, operator: CurvatureOperator) -> Iterator["_Product"]:
        """Full products for ever, or those of mini-batches in seeded order, every one once in an epoch."""
        if not self._by_batches(operator):
            while True:
                yield _Product(operator, None, 1.0, True)
        batches = cast(SupportsBatches, operator)
        generator = torch.Generator().manual_seed(self.seed)
        n, sizes = batches.n_batches, batches.batch_sizes
        while True:
            order = torch.randperm(n, generator=generator).tolist() if batches.in_any_order else list(range(n))
            for position, index in enumerate(order):
                # a ragged batch weighs what it holds: the mean over an epoch is the mean over samples
                yield _Product(operator, index, sizes[index] * n / sum(sizes), position == n - 1)

    def _largest(self, operator: CurvatureOperator) -> float:
        """Of A, and of some mini-batches by power iteration: theirs are larger, and all of them have to contract."""
        largest = extreme_eigenvalues(operator, seed=self.seed).upper
        if not self._by_batches(operator):
            return max(largest, 0.0)
        batches = cast(SupportsBatches, operator)
        stride = max(1, batches.n_batches // PROBED_BATCHES)
        for index in range(0, batches.n_batches, stride):
            weight = batches.batch_sizes[index] * batches.n_batches / sum(batches.batch_sizes)
            rows = random_rows(operator, 2, self.seed)
            for _ in range(5):
                rows = batches.batch_matmat(index, orthonormal_rows(rows))
            if rows.numel():
                largest = max(largest, 1.5 * weight * float(row_norms(rows).max()))  # from below, and not all batches
        return max(largest, 0.0)

    def _solution(self, state: Scaled, rhs: Tensor, run: "_Run") -> Solution:
        x = run.solution()
        product = damped(state.operator, x, self.damping)
        relative = relative_residuals(rhs, product)
        useless = (relative >= 1).to(rhs.device)  # no better than nothing: a part in a null space only grows
        x, product = (rows.masked_fill(useless[:, None], 0) for rows in (x, product))
        relative = relative.clamp_max(1.0)
        extra = state.scale * self.dampen
        effective = relative_residuals(rhs, torch.add(product, x, alpha=extra)) if extra else relative
        diverged = run.diverged.tolist()
        outcome = []
        for row, (true, own) in enumerate(zip(relative.tolist(), effective.tolist(), strict=True)):
            solved = Outcome.CONVERGED if true <= self.rtol else Outcome.APPROXIMATE
            outcome.append(Outcome.DIVERGED if diverged[row] else solved if own <= self.rtol else Outcome.MAXITER)
        remarks = [f"LiSSA: dampen adds {extra:.3g} to the damping: {self.damping + extra:.4g} in all"] if extra else []
        if run.by_batches and rhs.shape[0]:
            remarks.append(
                f"LiSSA: mini-batch noise leaves a relative residual of {float(effective.median()):.1e} after "
                f"{run.step} steps"
            )
        return Solution(
            x=x,
            relative_residual=relative,
            iterations=run.steps.cpu(),
            outcome=tuple(outcome),
            curvature=torch.full((rhs.shape[0],), math.nan, dtype=torch.float64),
            remarks=(*remarks, *(self._remedy(state) if any(diverged) else ())),
        )

    def _remedy(self, state: Scaled) -> tuple[str, ...]:
        """Why it diverged, and which scale would do; a few passes of Lanczos."""
        ends = extreme_eigenvalues(state.operator, seed=self.seed)
        if ends.smallest + self.damping + state.scale * self.dampen < 0:
            return (
                f"LiSSA diverged with any scale: A + λI is indefinite, its smallest eigenvalue is about "
                f"{ends.smallest + self.damping:.3g}. Use more damping, or second_order_mode='ggn'.",
            )
        largest = self._largest(state.operator)
        return (
            f"LiSSA diverged at scale {state.scale:.4g}: the largest eigenvalue of A + λI is about "
            f"{largest + self.damping:.3g}. A scale of {SAFETY * (largest + self.damping):.4g} would do; scale=None "
            "finds it.",
        )


@dataclass(frozen=True)
class _Product:
    """One step's matrix: A of a mini-batch times its weight, or all of A. ends_epoch: whether every sample was seen."""

    operator: CurvatureOperator
    index: int | None
    weight: float
    ends_epoch: bool

    def __call__(self, rows: Tensor) -> Tensor:
        if self.index is None:
            return self.operator.matmat(rows)
        return cast(SupportsBatches, self.operator).batch_matmat(self.index, rows).mul(self.weight)


class _Run:
    """The iterates, of the rows that are not done; rows: [n], their numbers."""

    def __init__(self, solver: LiSSA, state: Scaled, rhs: Tensor, start: Tensor, by_batches: bool) -> None:
        self._solver, self._scale, self.by_batches = solver, state.scale, by_batches
        size = row_norms(rhs)
        self._done = torch.zeros_like(rhs)  # h of the rows that stopped
        self.diverged = torch.zeros_like(size, dtype=torch.bool)
        self.steps = torch.zeros(rhs.shape[0], dtype=torch.int64, device=rhs.device)
        self.rows = (size > 0).nonzero().flatten()
        self._b, self._h, self._size = rhs[self.rows], start[self.rows], size[self.rows]
        self.step = 0
        self._epoch, self._in_epoch = torch.zeros_like(self._h), 0  # sums of the iterates of this epoch
        self._before: Tensor | None = None  # the mean of the last one
        self._tail, self._in_tail = torch.zeros_like(self._h), 0

    def advance(self, product: _Product) -> None:
        """One step, and a look at who is done."""
        solver = self._solver
        curved = product(self._h)
        change = self._b - solver.dampen * self._h - (curved + solver.damping * self._h) / self._scale
        self.step += 1
        self.steps[self.rows] += 1
        size = row_norms(self._h + change)
        moved = row_norms(change)
        limit = GROWTH if self.by_batches else 2.0  # in full batches updates never grow, if the scale is right
        lost = ~torch.isfinite(size) | (size > GROWTH * self._size)
        lost |= moved > limit * torch.maximum(self._size, row_norms(self._h))
        if not self.by_batches:
            # the update is the residual of the iterate before it
            ready = moved <= MARGIN * solver.rtol * self._size
            self._stop(self._h, ready & ~lost, lost)
            self._h = self._h + change[self._kept]
            return
        self._h = self._h + change
        self._epoch += self._h
        self._in_epoch += 1
        if self.step > solver.maxiter // 2:
            self._tail += self._h
            self._in_tail += 1
        ready = torch.zeros_like(lost)
        mean = self._epoch / self._in_epoch
        if product.ends_epoch:
            if self._before is not None:
                ready = row_norms(mean - self._before) <= solver.rtol * row_norms(mean)
            self._before, self._epoch, self._in_epoch = mean, torch.zeros_like(mean), 0
        self._stop(mean, ready & ~lost, lost)

    def _stop(self, found: Tensor, ready: Tensor, lost: Tensor) -> None:
        self._done[self.rows[ready]] = found[ready]
        self.diverged[self.rows[lost]] = True
        kept = self._kept = ~(ready | lost)
        if kept.all():
            return
        self.rows, self._b, self._h, self._size = self.rows[kept], self._b[kept], self._h[kept], self._size[kept]
        self._epoch, self._tail = self._epoch[kept], self._tail[kept]
        self._before = None if self._before is None else self._before[kept]

    def solution(self) -> Tensor:
        """x [k, p]: zero for rows that diverged, the tail's mean for those that ran out of steps on mini-batches."""
        last = self._tail / self._in_tail if self._in_tail else self._h
        self._done[self.rows] = last
        return self._done / self._scale


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
