"""Retrainers in memory: softmax and linear regression solved to the minimum in float64, and small networks by SGD."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distinfluence import DirectInfluence
from distinfluence.evaluate import Retraining

Array = NDArray[np.float64]


class Trainable(Protocol):
    x: Any
    x_test: Any

    def losses(self, retrainings: list[Retraining]) -> Array: ...


@dataclass
class Bank:
    """Keeps the losses of what it trained. asked: the retrainings of each call; n_trained: how many were new."""

    of: Trainable
    kept: dict[str, Array] = field(default_factory=dict)
    asked: list[list[Retraining]] = field(default_factory=list)

    @property
    def n_train(self) -> int:
        return len(self.of.x)

    @property
    def n_test(self) -> int:
        return len(self.of.x_test)

    @property
    def n_trained(self) -> int:
        return len(self.kept)

    def losses(self, retrainings: list[Retraining]) -> Array:
        self.asked.append(retrainings)
        new = [each for each in retrainings if each.key not in self.kept]
        if new:
            self.kept |= dict(zip([each.key for each in new], self.of.losses(new), strict=True))
        return np.stack([self.kept[each.key] for each in retrainings])


@dataclass
class Convex:
    """Minimises (1/n)·Σ w ℓ + (λ/2)‖θ‖², n the number of points that take part, by Newton steps."""

    x: Array
    y: NDArray[Any]
    x_test: Array
    y_test: NDArray[Any]
    decay: float

    def losses(self, retrainings: list[Retraining]) -> Array:
        return np.stack([self.test_losses(self.fitted(each.weights)) for each in retrainings])

    def fitted(self, weights: Array) -> Array:
        """The parameters [outputs, inputs + 1] at the minimum, the biases last."""
        raise NotImplementedError

    def test_losses(self, theta: Array) -> Array:
        raise NotImplementedError

    def loss(self) -> nn.Module:
        raise NotImplementedError

    def influences(self) -> Array:
        """The exact influence of the model that is trained on everything, from the package, in float64."""
        theta = torch.from_numpy(self.fitted(np.ones(len(self.x))))
        model = nn.Linear(theta.shape[1] - 1, theta.shape[0]).double()
        model.load_state_dict({"weight": theta[:, :-1], "bias": theta[:, -1]})
        x, y, x_test, y_test = map(torch.from_numpy, (self.x, self.y, self.x_test, self.y_test))
        fitted = DirectInfluence(model, self.loss(), self.decay).fit((x, y))
        return fitted.influences(x_test, y_test, x, y).numpy()


class Ridge(Convex):
    def fitted(self, weights: Array) -> Array:
        x, n = with_ones(self.x), np.count_nonzero(weights)
        matrix = 2 * (x * weights[:, None]).T @ x / n + self.decay * np.eye(x.shape[1])
        theta: Array = np.linalg.solve(matrix, 2 * (x * weights[:, None]).T @ self.y / n).T
        return theta

    def test_losses(self, theta: Array) -> Array:
        errors: Array = (with_ones(self.x_test) @ theta.T - self.y_test)[:, 0] ** 2
        return errors

    def loss(self) -> nn.Module:
        return nn.MSELoss()


class Softmax(Convex):
    def fitted(self, weights: Array) -> Array:
        x, n = with_ones(self.x), np.count_nonzero(weights)
        n_classes = int(self.y.max()) + 1
        targets, theta = np.eye(n_classes)[self.y], np.zeros((n_classes, x.shape[1]))
        for _ in range(50):
            p = np.exp(log_softmax(x @ theta.T))
            gradient = ((p - targets) * weights[:, None]).T @ x / n + self.decay * theta
            if np.linalg.norm(gradient) < 1e-15:
                break
            spread = p[:, :, None] * np.eye(n_classes) - p[:, :, None] * p[:, None, :]
            hessian = np.einsum("n,nab,ni,nj->aibj", weights / n, spread, x, x, optimize=True)
            size = theta.size
            step = np.linalg.solve(hessian.reshape(size, size) + self.decay * np.eye(size), gradient.ravel())
            theta = theta - step.reshape(theta.shape)
        return theta

    def test_losses(self, theta: Array) -> Array:
        logs = log_softmax(with_ones(self.x_test) @ theta.T)
        losses: Array = -logs[np.arange(len(logs)), self.y_test]
        return losses

    def loss(self) -> nn.Module:
        return nn.CrossEntropyLoss()


def ridge(n_train: int = 40, n_test: int = 8) -> Ridge:
    generator = np.random.default_rng(0)
    x, truth = generator.normal(size=(n_train + n_test, 3)), generator.normal(size=(3, 1))
    y = x @ truth + 0.5 * generator.normal(size=(n_train + n_test, 1))
    return Ridge(x[:n_train], y[:n_train], x[n_train:], y[n_train:], decay=0.05)


def softmax(n_train: int = 60, n_test: int = 12) -> Softmax:
    generator = np.random.default_rng(1)
    y = generator.integers(0, 3, size=n_train + n_test)
    x = generator.normal(size=(n_train + n_test, 2)) + 1.2 * np.array([[1, 0], [-1, 0], [0, 1]])[y]
    return Softmax(x[:n_train], y[:n_train], x[n_train:], y[n_train:], decay=0.02)


@dataclass
class Networks:
    """Networks 2-8-2 by plain SGD, all retrainings of a call at once; order and initial parameters by the seed."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    epochs: int = 15

    def losses(self, retrainings: list[Retraining]) -> Array:
        layers = self.trained(retrainings)
        with torch.no_grad():
            logits = outputs(layers, self.x_test.expand(len(retrainings), -1, -1))
            losses = -logits.log_softmax(2).gather(2, self.y_test.expand(len(retrainings), -1)[..., None])
        return losses[..., 0].double().numpy()

    def trained(self, retrainings: list[Retraining]) -> list[Tensor]:
        weights = torch.tensor(np.stack([each.weights for each in retrainings]), dtype=torch.float32)
        generators = {each.seed: torch.Generator().manual_seed(each.seed) for each in retrainings}
        first = {seed: [torch.randn(s, generator=g) for s in SHAPES] for seed, g in generators.items()}
        layers = [torch.stack([first[each.seed][i] for each in retrainings]).requires_grad_() for i in range(4)]
        optimizer = torch.optim.SGD(layers, lr=0.3, weight_decay=1e-3)
        for _ in range(self.epochs):
            drawn = {seed: torch.randperm(len(self.x), generator=g) for seed, g in generators.items()}
            order = torch.stack([drawn[each.seed] for each in retrainings])
            for batch in order.split(16, dim=1):
                logs = outputs(layers, self.x[batch]).log_softmax(2)
                losses = -logs.gather(2, self.y[batch][..., None])[..., 0] * weights.gather(1, batch)
                optimizer.zero_grad()
                (losses.sum() / batch.shape[1]).backward()
                optimizer.step()
        return [each.detach() for each in layers]

    def model(self, seed: int) -> nn.Module:
        w1, b1, w2, b2 = (each[0] for each in self.trained([Retraining(np.ones(len(self.x)), seed)]))
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        model.load_state_dict({"0.weight": w1.T, "0.bias": b1[0], "2.weight": w2.T, "2.bias": b2[0]})
        return model.eval()

    def influences(self, damping: float = 0.02) -> Array:
        """GGN influences of the networks from two other seeds, averaged."""
        found = [
            DirectInfluence(self.model(seed), nn.CrossEntropyLoss(), damping, second_order_mode="ggn")
            .fit((self.x, self.y))
            .influences(self.x_test, self.y_test, self.x, self.y)
            for seed in (100, 101)
        ]
        return torch.stack(found).mean(dim=0).double().numpy()


SHAPES = ((2, 8), (1, 8), (8, 2), (1, 2))


def outputs(layers: list[Tensor], x: Tensor) -> Tensor:
    w1, b1, w2, b2 = layers
    return torch.baddbmm(b2, torch.tanh(torch.baddbmm(b1, x, w1)), w2)


def networks(n_train: int = 96, n_test: int = 24) -> Networks:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n_train + n_test, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] + 0.3 * torch.randn(len(x), generator=generator) > 0).long()
    return Networks(x[:n_train], y[:n_train], x[n_train:], y[n_train:])


def with_ones(x: Array) -> Array:
    return np.hstack([x, np.ones((len(x), 1))])


def log_softmax(values: Array) -> Array:
    shifted = values - values.max(axis=1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs
