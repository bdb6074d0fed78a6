"""Models and data of the comparisons with peers; imported by every peer's environment, so torch only."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return out


class Tokens(nn.Module):
    """Token ids → embedding → layer norm → mean over positions → classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.embed(ids)).mean(dim=1))
        return out


def dead() -> nn.Module:
    """An MLP with a ReLU unit that no input reaches: gradients of exactly zero."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    with torch.no_grad():
        first.weight[0], first.bias[0] = 0.0, -1.0
    return model


def convolution(groups: int = 1, padding_mode: str = "zeros") -> nn.Module:
    """A convolution and a head."""
    layer = nn.Conv2d(4, 8, 3, padding=1, groups=groups, padding_mode=padding_mode)
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(128, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "mlp without biases": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        (4,),
    ),
    "dead unit": (dead, (4,)),
    "tokens": (Tokens, (5,)),
    "twice": (Twice, (4,)),
    "one group": (convolution, (4, 4, 4)),
    "two groups": (lambda: convolution(groups=2), (4, 4, 4)),
    "four groups": (lambda: convolution(groups=4), (4, 4, 4)),
    "circular padding": (lambda: convolution(padding_mode="circular"), (4, 4, 4)),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in eval mode, 101 inputs (float32, or token ids) and labels 0, 1, 2: the same whoever calls."""
    make, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = make().eval()
        x, y = torch.randn(101, *shape), torch.randint(3, (101,))
        if name == "tokens":
            x = torch.randint(7, (101, *shape))
    return model, x, y
