"""Small models with data, in float64 unless asked otherwise: what every numerical test runs over."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model in eval mode, a loss, and (x, y) for training and for queries."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


class TinyText(nn.Module):
    """Token ids → embedding → LayerNorm → mean over positions → classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        pooled: Tensor = self.norm(self.embed(ids)).mean(dim=1)
        out: Tensor = self.head(pooled)
        return out


class Tied(nn.Module):
    """One weight used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class Attention(nn.Module):
    """Self-attention, whose fused kernels have no double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        out: Tensor = self.head(mixed.mean(dim=1))
        return out


class Recurrent(nn.Module):
    """An LSTM over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        out: Tensor = self.head(states[:, -1])
        return out


class Branching(nn.Module):
    """Control flow that depends on the data, which vmap cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(3, 2)
        self.high = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = [torch.tanh(self.high(row)) if row.sum().item() > 0 else self.low(row) ** 2 for row in x]
        return torch.stack(rows)


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


def normalised() -> nn.Module:
    """BatchNorm in eval mode, with statistics that are not the defaults."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return model


def _classes(n: int, n_classes: int) -> Tensor:
    return torch.randint(n_classes, (n,))


BUILDERS: dict[str, Callable[[int], tuple[nn.Module, nn.Module, Tensor, Tensor]]] = {
    "mlp classification": lambda n: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss(),
        torch.randn(n, 4),
        _classes(n, 3),
    ),
    "mlp regression": lambda n: (
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.Softplus(), nn.Linear(4, 2)),
        nn.MSELoss(),
        torch.randn(n, 3),
        torch.randn(n, 2),
    ),
    "cnn": lambda n: (cnn(), nn.CrossEntropyLoss(), torch.randn(n, 1, 4, 4), _classes(n, 3)),
    "embedding and layer norm": lambda n: (
        TinyText(),
        nn.CrossEntropyLoss(),
        torch.randint(7, (n, 5)),
        _classes(n, 3),
    ),
    "tied weights": lambda n: (Tied(), nn.MSELoss(), torch.randn(n, 3), torch.randn(n, 3)),
    "attention": lambda n: (Attention(), nn.CrossEntropyLoss(), torch.randn(n, 3, 4), _classes(n, 2)),
    "lstm": lambda n: (Recurrent(), nn.CrossEntropyLoss(), torch.randn(n, 3, 2), _classes(n, 2)),
    "branching": lambda n: (Branching(), nn.MSELoss(), torch.randn(n, 3), torch.randn(n, 2)),
    "batch norm and dropout in eval mode": lambda n: (
        normalised(),
        nn.SmoothL1Loss(),
        torch.randn(n, 3),
        torch.randn(n, 2),
    ),
}


def build(name: str, n_train: int = 23, n_test: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """The same case for the same arguments; the caller's random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, loss, x, y = BUILDERS[name](n_train + n_test)
    model = model.to(dtype).eval()
    x = x.to(dtype) if x.is_floating_point() else x
    y = y.to(dtype) if y.is_floating_point() else y
    return Case(model, loss, (x[:n_train], y[:n_train]), (x[n_train:], y[n_train:]))
