"""A small regression problem, and callables that train on it as they should, or not."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distinfluence.evaluate import Retraining, random_subsets, retrainings_of

N_TRAIN, N_TEST, WIDTH = 40, 5, 4
_GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N_TRAIN, WIDTH, generator=_GENERATOR)
Y = torch.randn(N_TRAIN, 1, generator=_GENERATOR)
X_TEST = torch.randn(N_TEST, WIDTH, generator=_GENERATOR)
Y_TEST = torch.randn(N_TEST, 1, generator=_GENERATOR)
TRAIN, TEST = (X, Y), (X_TEST, Y_TEST)

Indices = NDArray[np.int64]
Callback = Callable[..., nn.Module]


def descended(x: Tensor, y: Tensor, weights: Tensor | None = None, steps: int = 8) -> nn.Linear:
    """A linear model after some steps from random parameters, in plain torch."""
    model = nn.Linear(WIDTH, 1)
    for _ in range(steps):
        losses = (model(x) - y).square().squeeze(1)
        loss = losses.mean() if weights is None else (weights * losses).sum() / weights.sum()
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(0.2 * gradient)
    return model


def honest(indices: Indices, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return descended(X[indices], Y[indices])


def unseeded(indices: Indices, seed: int) -> nn.Module:
    return descended(X[indices], Y[indices])


def weighted(indices: Indices, seed: int, weights: NDArray[np.float64] | None = None) -> nn.Module:
    torch.manual_seed(seed)
    own = None if weights is None else torch.from_numpy(weights).float()
    return descended(X[indices], Y[indices], own)


def convex(indices: Indices, seed: int) -> nn.Module:
    model = nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64)
    x, y = X[indices].double(), Y[indices].double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(WIDTH), x.T @ y).T)
    return model.requires_grad_(False)


def ignores_subset(indices: Indices, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return descended(X, Y)


def first_points(indices: Indices, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return descended(X[: len(indices)], Y[: len(indices)])


def other_order(indices: Indices, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    order = np.random.default_rng(5).permutation(N_TRAIN)[indices]
    return descended(X[order], Y[order], steps=30)


def complement(indices: Indices, seed: int) -> nn.Module:
    return honest(np.setdiff1d(np.arange(N_TRAIN), indices), seed)


def untrained(indices: Indices, seed: int) -> nn.Module:
    torch.manual_seed(int(indices.sum()) + seed)
    return nn.Linear(WIDTH, 1)


class Noisy:
    """Draws other random numbers each time, whatever the seed. With steps = 0 it is random and nothing else."""

    def __init__(self, steps: int) -> None:
        self.steps, self.calls = steps, itertools.count(1000)

    def settings(self) -> dict[str, int]:
        return {"steps": self.steps}

    def __call__(self, indices: Indices, seed: int) -> nn.Module:
        torch.manual_seed(next(self.calls))
        return descended(X[indices], Y[indices], steps=self.steps)


class Counting:
    """An honest trainer that counts; the count is no part of what it is."""

    def __init__(self, train: Callback = honest) -> None:
        self.train, self.calls = train, list[tuple[Indices, int]]()

    def settings(self) -> dict[str, str]:
        return {"train": self.train.__name__}

    def __call__(self, indices: Indices, seed: int) -> nn.Module:
        self.calls.append((indices, seed))
        return self.train(indices, seed)


class Together(Counting):
    """Trains three at once, and notes which; a model's bits depend on its place in the group."""

    at_once = 3

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[int]] = []

    def train_many(self, retrainings: Sequence[Retraining]) -> list[nn.Module]:
        self.groups.append([one.seed for one in retrainings])
        models = [honest(one.indices, one.seed) for one in retrainings]
        for place, model in enumerate(models):
            with torch.no_grad():
                next(model.parameters()).mul_(1 + 1e-7 * place)
        return models


class Killed:
    """Kills the first worker that trains from seed 3, once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def settings(self) -> dict[str, Any]:
        return {"train": "honest"}

    def __call__(self, indices: Indices, seed: int) -> nn.Module:
        if seed == 3:
            try:
                (self.folder / "killed").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return honest(indices, seed)


def asked(n_subsets: int, seeds: list[int], seed: int = 0) -> list[Retraining]:
    return retrainings_of(random_subsets(N_TRAIN, n_subsets, seed=seed), seeds)


def reference(retrainings: Sequence[Retraining], train: Callback = honest) -> NDArray[np.float64]:
    """Squared errors at the test points, one model and one point after the other."""
    rows = []
    for one in retrainings:
        model = train(np.array([i for i in range(N_TRAIN) if one.weights[i]]), one.seed)
        dtype = next(model.parameters()).dtype
        outputs = [model(x.to(dtype)).item() for x in X_TEST]
        rows.append([(f - y) ** 2 for f, y in zip(outputs, Y_TEST.squeeze(1).tolist(), strict=True)])
    return np.array(rows)
