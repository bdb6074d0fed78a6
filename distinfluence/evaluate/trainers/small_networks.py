"""Many small networks of one architecture, trained as one tensor program.

A network of some thousand parameters leaves a CPU idle: what a step costs is Python and the dispatch of its kernels.
`SmallNetworks` stacks the parameters of many networks, [g, p], and takes one step of all of them at once
(`torch.func.vmap`). Each network keeps its own initial values, its own order of the data and its own batches, so that
what it becomes does not depend on those next to it, up to rounding: kernels take a matrix in the middle of a batch at
another alignment than a single one. With widths that are multiples of 8 the results were the same bits with one thread.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from distinfluence.errors import ModelModeError, SettingError, UnsupportedModelError
from distinfluence.evaluate.retraining import Retraining
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
from distinfluence.model.batch import Batch, batch_length, map_batch
from distinfluence.model.objective import Loss, Objective, as_objective
from distinfluence.model.untouched import check_mode, untouched_attributes

SCHEDULES = ("one_cycle", "constant", "cosine")

Gradients = Callable[[Tensor, Batch, Tensor], Tensor]


class SmallNetworks:
    """Train small networks by stochastic gradient descent with momentum, many at once.

    The rule, for one network with a seed and n training points:

    - `factory` is called after torch's, NumPy's and Python's generators have been seeded with the seed.
    - An epoch visits the network's points in the order that `torch.randperm` of *all* training points has them in,
      drawn for each epoch from one generator with the seed. Networks of one seed thus see their common points in the
      same order, which makes the effect of those that they do not share easier to see.
    - A batch is the next `batch_size` points; the last batch of an epoch holds the rest. Its loss is Σ wℓ / Σ w.
    - A step is one of `torch.optim.SGD` with `momentum` and `weight_decay`, at the learning rate of the schedule.

    A network becomes the same, up to rounding, whether it is trained alone or with others: use float64 networks where
    1e-6 of a parameter matters. A network that diverges is returned as it is.

    Args:
        factory: Returns a new network when it is called; a `Recipe` or "module:callable" of one. The network may have
            any layers that `torch.func.vmap` can take, but none that are random in training or mix the samples of a
            batch (dropout, batch norm).
        data: All training data: anything that influence models take as data, such as a pair of tensors (x, y), or a
            `Recipe` or "module:callable" that returns it.
        loss: The training loss, as influence models take it.
        epochs: Times that each training point is visited.
        batch_size: Training points in a step.
        learning_rate: The learning rate; the highest one of the schedules "one_cycle" and "cosine".
        momentum: The momentum m. "one_cycle" moves it from 1 − (1 − m)/2 to 1 − 3(1 − m)/2 and back, which is 0.95 and
            0.85 for 0.9, unless it is 0.
        weight_decay: Times the parameters, added to the gradients.
        schedule: "one_cycle", "constant" or "cosine", as torch's `OneCycleLR` and `CosineAnnealingLR` over all steps.
        at_once: Networks that are trained as one program. More share the cost of Python, fewer fit into caches.

    Raises:
        SettingError: If an argument is out of its range.
    """

    UNCHANGING = ("at_once",)  # attributes that change no model beyond rounding, which no bank compares

    def __init__(
        self,
        factory: Factory,
        data: object,
        loss: Loss | Objective,
        *,
        epochs: int = 60,
        batch_size: int = 50,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: str = "one_cycle",
        at_once: int = 50,
    ) -> None:
        for name, count in (("epochs", epochs), ("batch_size", batch_size), ("at_once", at_once)):
            if count < 1:
                raise SettingError(f"`{name}` must be at least 1, got {count}.")
        if not (0 < learning_rate < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf):
            raise SettingError(
                "`learning_rate` must be positive, `momentum` from 0 to below 1 and `weight_decay` not negative, got "
                f"{learning_rate}, {momentum} and {weight_decay}."
            )
        if schedule not in SCHEDULES:
            raise SettingError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
        self.factory = checked_factory(factory)
        self.objective = as_objective(loss)
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.at_once = at_once
        self._data = TrainingData(data)

    def __call__(self, indices: ArrayLike, seed: int, *, weights: ArrayLike | None = None) -> nn.Module:
        """Train one network.

        Args:
            indices: Training points to train on, [n].
            seed: Seed of the initial parameters and of the order of the data.
            weights: Positive weight of each of them in the loss of its batch, [n]; 1 if None.

        Returns:
            The network on the CPU, in eval mode.
        """
        return self.train_many([self._data.retraining(indices, seed, weights)])[0]

    def train_many(self, retrainings: Sequence[Retraining]) -> list[nn.Module]:
        """Train many networks, `at_once` of them at a time.

        Networks whose epochs differ in the number of batches are not trained in one program.

        Args:
            retrainings: Training points, weights and seed of each.

        Returns:
            The networks on the CPU, in eval mode, in the same order.

        Raises:
            SettingError: If weights are not those of the training points, negative, or all zero.
            UnsupportedModelError: If such networks cannot be trained as one program.
        """
        n = batch_length(self._data.batch())
        alike: dict[int, list[int]] = defaultdict(list)
        for position, retraining in enumerate(retrainings):
            _check_weights(retraining, n)
            alike[math.ceil(len(retraining.indices) / self.batch_size)].append(position)
        trained: dict[int, nn.Module] = {}
        for steps, positions in alike.items():
            for start in range(0, len(positions), self.at_once):
                part = positions[start : start + self.at_once]
                trained |= zip(part, self._train([retrainings[i] for i in part], steps), strict=True)
        return [trained[i] for i in range(len(retrainings))]

    def _train(self, group: list[Retraining], steps: int) -> list[nn.Module]:
        """Train networks as one program. steps: batches of an epoch, the same number for all."""
        modules = [built(self.factory, retraining.seed).train() for retraining in group]
        flat, gradients = self._stacked(modules)
        data = self._data.placed(flat.dtype)
        buffer = torch.zeros_like(flat)
        pace = _pace(self.schedule, self.learning_rate, self.momentum, self.epochs * steps)
        batches = _batches(group, self.epochs, steps, self.batch_size)
        for (rate, momentum), (chosen, weights) in zip(pace, batches, strict=True):
            batch = map_batch(functools.partial(_gathered, chosen), data)
            slopes = gradients(flat, batch, weights.to(flat.dtype)).add_(flat, alpha=self.weight_decay)
            buffer.mul_(momentum).add_(slopes)
            flat.add_(buffer, alpha=-rate)
        return [filled(module, own) for module, own in zip(modules, flat, strict=True)]

    def _stacked(self, modules: list[nn.Module]) -> tuple[Tensor, Gradients]:
        """Return the parameters of the networks, [g, p], and what makes gradients of them: [g, p] again."""
        first = modules[0]
        try:
            check_mode(first)
        except ModelModeError as error:
            raise self._refusal(str(error).partition(". Call")[0]) from error
        like = trainable(first)
        try:
            rows = [torch.cat([p.flatten() for p in trainable(module).values()]) for module in modules]
            flat = torch.stack(rows)
            others = {name: torch.stack([fixed(module)[name] for module in modules]) for name in fixed(first)}
        except (RuntimeError, KeyError) as error:
            raise self._refusal(f"`factory` returned networks of different shapes: {error}") from error
        objective = self.objective

        def loss(parameters: dict[str, Tensor], frozen: dict[str, Tensor], batch: Batch, weights: Tensor) -> Tensor:
            forward = functools.partial(_called, first, {**parameters, **frozen})
            return (weights * objective.losses(objective.outputs(forward, batch), batch)).sum() / weights.sum()

        slopes = vmap(grad(loss))

        def gradients(flat: Tensor, batch: Batch, weights: Tensor) -> Tensor:
            try:
                with untouched_attributes(first):
                    found = slopes(views(flat, like), others, batch, weights)
            except RuntimeError as error:
                raise self._refusal(str(error)) from error
            return torch.cat([found[name].flatten(1) for name in like], dim=1)

        return flat, gradients

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"`SmallNetworks` cannot train these networks as one program: {why}. Pass a `train(indices, seed)` of your "
            "own, which trains them one by one, or a `ScriptTrainer`."
        )


def _called(module: nn.Module, tensors: dict[str, Tensor], *args: object, **kwargs: object) -> object:
    return functional_call(module, tensors, args, kwargs)


def _gathered(chosen: Tensor, tensor: Tensor) -> Tensor:
    """chosen [g, b], tensor [n, ...] → [g, b, ...]."""
    gathered: Tensor = tensor.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
    return gathered


def _check_weights(retraining: Retraining, n: int) -> None:
    weights = retraining.weights
    if weights.shape != (n,) or not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        raise SettingError(
            f"`weights` of a retraining must be one number for each of {n} training points, none negative and not all "
            f"zero, got {list(weights.shape)} from {weights.min(initial=0)} to {weights.max(initial=0)}."
        )


def _batches(group: list[Retraining], epochs: int, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what each network sees at each step: points [g, size] and their weights, 0 where its batch is not full."""
    own = torch.from_numpy(np.stack([retraining.weights for retraining in group]))
    generators = {r.seed: torch.Generator().manual_seed(r.seed) for r in group}
    chosen = torch.zeros(len(group), steps * size, dtype=torch.int64)
    weights = torch.zeros(len(group), steps * size, dtype=torch.float64)
    for _ in range(epochs):
        orders = {seed: torch.randperm(own.shape[1], generator=each) for seed, each in generators.items()}
        for row, retraining in enumerate(group):
            order = orders[retraining.seed]
            visited = order[own[row, order] != 0]
            chosen[row, : len(visited)] = visited
            chosen[row, len(visited) :] = visited[0]
            weights[row, : len(visited)] = own[row, visited]
        yield from zip(chosen.split(size, dim=1), weights.split(size, dim=1), strict=True)


@functools.lru_cache(maxsize=64)
def _pace(schedule: str, rate: float, momentum: float, steps: int) -> tuple[tuple[float, float], ...]:
    """Learning rate and momentum of each step, as torch's own schedules have them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate, momentum=momentum)
    scheduler: LRScheduler | None = None
    if schedule == "one_cycle":
        low, high = max(0.0, 1 - 1.5 * (1 - momentum)), 1 - 0.5 * (1 - momentum)
        scheduler = OneCycleLR(
            optimizer, rate, steps, cycle_momentum=momentum > 0, base_momentum=low, max_momentum=high
        )
    elif schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, steps)
    found = []
    for _ in range(steps):
        found.append((float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[0]["momentum"])))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return tuple(found)
