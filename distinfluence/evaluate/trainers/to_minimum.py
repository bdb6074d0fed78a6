"""Training to the minimum of the loss, where what a training point does can be compared with influences digit by digit.

Newton's method in float64. Up to EXACT_SIZE parameters the Hessian is factorised, and the factor kept as long as it
makes gradients smaller fast; above, Newton's equations are solved by conjugate gradients. Retrainings begin at the
minimum of all the data, which is found once in each process: without one of n points, a few gradients are enough.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call

from distinfluence.errors import RetrainingError, SettingError
from distinfluence.evaluate.trainers.ingredients import (
    Factory,
    TrainingData,
    built,
    checked_factory,
    filled,
    fixed,
    trainable,
    views,
)
from distinfluence.model.batch import Batch, batch_length
from distinfluence.model.objective import Loss, Objective, as_objective

EXACT_SIZE = 2000  # Parameters up to which the Hessian is made and factorised.
ROWS = 64  # Rows of the Hessian that are made at once.
FAST = 0.2  # A factor is kept while each step makes the gradient this much smaller.
HALVINGS = 40  # Times that a step is halved before it is given up.
MOST_CG = 1000  # Products with the Hessian for one step of Newton's method by conjugate gradients.


@dataclass
class _Loss:
    """F(θ) = (1/N) Σ_j w_j ℓ_j(θ) + (l2/2)‖θ‖² of flat parameters, and its derivatives."""

    module: nn.Module
    objective: Objective
    batch: Batch
    weights: Tensor
    l2: float

    def value(self, flat: Tensor) -> Tensor:
        tensors = {**views(flat, trainable(self.module)), **fixed(self.module)}

        def forward(*args: object, **kwargs: object) -> object:
            return functional_call(self.module, tensors, args, kwargs)

        losses = self.objective.losses(self.objective.outputs(forward, self.batch), self.batch)
        value: Tensor = (self.weights * losses).sum() / len(self.weights) + self.l2 / 2 * flat.square().sum()
        return value

    def gradient(self, flat: Tensor) -> tuple[float, Tensor]:
        leaf = flat.detach().requires_grad_()
        value = self.value(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), slope

    def products(self, flat: Tensor) -> Callable[[Tensor], Tensor]:
        """Return rows [k, p] → rows · ∇²F(θ)."""
        leaf = flat.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.value(leaf), leaf, create_graph=True)

        def product(rows: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(slope, leaf, rows, retain_graph=True, is_grads_batched=True)
            return found

        return product

    def factor(self, flat: Tensor) -> Tensor:
        """Return a Cholesky factor of the Hessian, shifted until it is positive definite."""
        product = self.products(flat)
        hessian = torch.cat([product(rows) for rows in torch.eye(len(flat), dtype=flat.dtype).split(ROWS)])
        hessian = (hessian + hessian.T) / 2
        shift, scale = 0.0, float(hessian.diagonal().abs().max())
        while True:
            factor, failed = torch.linalg.cholesky_ex(hessian + shift * torch.eye(len(flat), dtype=flat.dtype))
            if not failed or not math.isfinite(scale):
                return torch.as_tensor(factor)
            shift = max(10 * shift, 1e-10 * scale, 1e-300)


@dataclass(frozen=True)
class _Minimum:
    """Parameters [p], the Cholesky factor that led there, and the size of gradients far from it."""

    flat: Tensor
    factor: Tensor | None
    scale: float


class ToMinimum:
    """Train to the minimum of (1/N) Σ_j w_j ℓ_j(θ) + (l2/2)‖θ‖², in float64.

    N is the number of all training points, also where a model is trained on some of them. With the damping λ = l2,
    the test loss without training point j is thus higher by I_j / N to first order, I_j being its influence. The
    minimum is unique if the model is convex and l2 > 0; otherwise training begins at a minimum of all the data that
    the seed led to.

    Args:
        factory: Returns a new network when it is called; a `Recipe` or "module:callable" of one.
        data: All training data: anything that influence models take as data, such as a pair of tensors (x, y), or a
            `Recipe` or "module:callable" that returns it.
        loss: The training loss, as influence models take it.
        l2: Strength of the penalty on all trainable parameters.
        tolerance: Norm of the gradient that counts as zero, relative to that at the first parameters. Steps are made
            beyond it as long as they halve the norm.
        maxiter: Most steps of Newton's method.

    Raises:
        SettingError: If an argument is out of its range.
    """

    UNCHANGING = ("maxiter",)  # attributes that change no model, which no bank compares

    def __init__(
        self,
        factory: Factory,
        data: object,
        loss: Loss | Objective,
        *,
        l2: float,
        tolerance: float = 1e-11,
        maxiter: int = 200,
    ) -> None:
        if not (0 <= l2 < math.inf and 0 < tolerance < 1 and maxiter >= 1):
            raise SettingError(
                "`l2` must not be negative, `tolerance` between 0 and 1 and `maxiter` at least 1, got "
                f"{l2}, {tolerance} and {maxiter}."
            )
        self.factory = checked_factory(factory)
        self.objective = as_objective(loss)
        self.l2 = l2
        self.tolerance = tolerance
        self.maxiter = maxiter
        self._data = TrainingData(data)
        self._starts: dict[int, _Minimum] = {}  # the minimum of all the data, for the last seed

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_starts": {}}

    def __call__(self, indices: ArrayLike, seed: int, *, weights: ArrayLike | None = None) -> nn.Module:
        """Train one model to the minimum.

        Args:
            indices: Training points to train on, [n].
            seed: Seed of the first parameters, which matter only where there are several minima.
            weights: Weight of each of them, [n]; 1 if None.

        Returns:
            The model in float64, on the CPU, in eval mode.

        Raises:
            RetrainingError: If the gradient does not become zero.
            SettingError: If `indices` or `weights` do not fit the data.
        """
        chosen = torch.from_numpy(self._data.retraining(indices, seed, weights).weights)
        module = built(self.factory, seed).double().eval()
        start = self._start(module, seed)
        if bool((chosen == 1).all()):
            return filled(module, start.flat)
        return filled(module, self._minimum(module, chosen, start).flat)

    def _start(self, module: nn.Module, seed: int) -> _Minimum:
        if seed not in self._starts:
            ones = torch.ones(batch_length(self._data.batch()), dtype=torch.float64)
            flat = torch.cat([p.flatten() for p in trainable(module).values()])
            self._starts = {seed: self._minimum(module, ones, _Minimum(flat, None, 0.0))}
        return self._starts[seed]

    @torch.enable_grad()
    def _minimum(self, module: nn.Module, weights: Tensor, start: _Minimum) -> _Minimum:
        loss = _Loss(module, self.objective, self._data.placed(torch.float64), weights, self.l2)
        flat, factor = start.flat, start.factor
        value, slope = loss.gradient(flat)
        norm = float(slope.norm())
        scale = start.scale or norm
        for _ in range(self.maxiter):
            fresh = factor is None
            if fresh and len(flat) <= EXACT_SIZE:
                factor = loss.factor(flat)
            towards = _solved(factor, slope) if factor is not None else _by_cg(loss.products(flat), slope, norm / scale)
            step = _searched(loss, (flat, value, slope), towards)
            if step is None and not fresh and norm > self.tolerance * scale:
                factor = None
                continue
            if step is None or (norm <= self.tolerance * scale and float(step[2].norm()) > norm / 2):
                break
            before, (flat, value, slope) = norm, step
            norm = float(slope.norm())
            factor = factor if norm <= max(FAST * before, self.tolerance * scale) else None
        if not norm <= self.tolerance * scale:
            raise RetrainingError(
                f"`ToMinimum` found no minimum: the gradient is {norm / scale if scale else norm:.1e} of that at the "
                f"first parameters, which must be at most {self.tolerance:g}. Raise `l2` (it is {self.l2:g}), or "
                "`maxiter`, or use a model and loss that are smooth."
            )
        return _Minimum(flat, factor, scale)


def _solved(factor: Tensor, slope: Tensor) -> Tensor:
    return -torch.cholesky_solve(slope.unsqueeze(1), factor).squeeze(1)


def _by_cg(product: Callable[[Tensor], Tensor], slope: Tensor, progress: float) -> Tensor:
    """Return an approximate Newton step, the more exact the smaller the gradient is already."""
    x, residual = torch.zeros_like(slope), -slope
    along, square = residual, float(residual.square().sum())
    enough = min(0.1, max(math.sqrt(progress), 1e-4)) ** 2 * square
    for _ in range(MOST_CG):
        bent = product(along.unsqueeze(0)).squeeze(0)
        curvature = float(along @ bent)
        if not curvature > 0:  # no minimum in this direction
            return x if bool(x.any()) else -slope
        x = x + square / curvature * along
        residual = residual - square / curvature * bent
        before, square = square, float(residual.square().sum())
        if square <= enough:
            break
        along = residual + square / before * along
    return x


def _searched(loss: _Loss, here: tuple[Tensor, float, Tensor], towards: Tensor) -> tuple[Tensor, float, Tensor] | None:
    """Return parameters, value and gradient after the step, halved until it leads down; None if it never does.

    Close to the minimum values differ by rounding only, and the norm of the gradient decides.
    """
    flat, value, slope = here
    norm, descent, size = slope.norm(), float(slope @ towards), 1.0
    for _ in range(HALVINGS):
        new = flat + size * towards
        new_value, new_slope = loss.gradient(new)
        falls = new_value <= value + 1e-4 * size * descent
        rounded = new_value <= value + 1e-13 * abs(value) and bool(new_slope.norm() < norm)
        if math.isfinite(new_value) and (falls or rounded) and not torch.equal(new, flat):
            return new, new_value, new_slope
        size /= 2
    return None
