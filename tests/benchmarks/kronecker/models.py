"""Models and data of the comparison; imported by every environment, so nothing but torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"mlp": (4096, 256), "cnn": (1024, 64), "transformer": (512, 32)}  # training samples, queries
BATCH = 256


class Attention(nn.Module):
    """Causal self-attention with four linear layers, so that every library sees its projections."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(n, length, self.n_heads, -1).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), is_causal=True
        )
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return out


class Block(nn.Module):
    """Attention and a two-layer network, each with a norm before it."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A language model; embeddings and norms are frozen, because not every library covers them."""

    def __init__(self, n_tokens: int = 96, width: int = 96, n_blocks: int = 3, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(n_tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(n_blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_tokens)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.LayerNorm)):
                module.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


def build(name: str) -> nn.Module:
    """One of the three, the same for everybody."""
    torch.manual_seed(0)
    if name == "mlp":
        layers = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
        return nn.Sequential(*layers).eval()
    if name == "transformer":
        return Transformer().eval()
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    ).eval()


def data(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training, queries), each (x, y), of random numbers: what is timed does not depend on them."""
    torch.manual_seed(1)
    n = sum(SIZES[name])
    if name == "transformer":
        x = torch.randint(96, (n, 64))
        y = x.clone()
    else:
        x = torch.randn(n, 784) if name == "mlp" else torch.randn(n, 3, 32, 32)
        y = torch.randint(10, (n,))
    split = SIZES[name][0]
    return (x[:split], y[:split]), (x[split:], y[split:])


def losses(name: str, outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample [n]; of a text, the sum over the tokens that are predicted."""
    if name == "transformer":
        flat = F.cross_entropy(outputs[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="none")
        return flat.view(len(y), -1).sum(dim=1)
    return F.cross_entropy(outputs, y, reduction="none")


def reset_peak() -> int:
    """Let the peak of the resident memory start from now; what is resident, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("VmRSS")


def resident(field: str = "VmHWM") -> int:
    """Bytes that are (VmRSS), or were at most (VmHWM), resident."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
