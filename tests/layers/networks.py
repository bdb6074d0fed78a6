"""Small networks, one for each kind of layer and each way of using one; float64, eval mode, with data."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import Case


class Pooled(nn.Module):
    """A layer, a nonlinearity, the mean over positions, and a head."""

    def __init__(self, layer: nn.Module, width: int, channels_first: bool = True) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, 3)
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        flat = hidden.flatten(2).mean(dim=2) if self.channels_first else hidden.flatten(1, -2).mean(dim=1)
        out: Tensor = self.head(flat)
        return out


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in Hugging Face's transformers: weight [in, out], by addmm on flattened positions."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out) / n_in**0.5)
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.n_out)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return out


class Shared(nn.Module):
    """Two modules with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


class Functional(nn.Module):
    """Parameters of its own, used by functions and operators: a product, a transposed one, a scale and a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 5))
        self.b = nn.Parameter(torch.randn(3, 5))
        self.scale = nn.Parameter(torch.randn(5))
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.scale * (x @ self.a) + self.shift)
        return hidden @ self.b.T


class OffTheRecord(nn.Module):
    """A weight that is used in a way that nobody records: its square, and beside that as a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x)) + F.linear(x, self.layer.weight**2)
        out: Tensor = self.head(hidden)
        return out


class RMSNorm(nn.Module):
    """As Llama has it: a scale of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6))


class LowRankAdapter(nn.Module):
    """A frozen layer with a LoRA adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
        return out


class InPlace(nn.Module):
    """Outputs of layers that are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class SequenceFirst(nn.Module):
    """Samples along the second dimension, as older transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.layer(x.transpose(0, 1))))
        out: Tensor = self.head(hidden.mean(dim=0))
        return out


class CrossAttention(nn.Module):
    """Attention with other keys than queries: packed projections that are used in parts; and with separate ones."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.other = nn.Linear(4, kdim or 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.tanh(self.other(x[:, :2]))
        mixed, _ = self.attention(x, keys, keys)
        out: Tensor = self.head(mixed.mean(dim=1))
        return out


class TiedText(nn.Module):
    """A language model whose head is its embedding, with positions that are added; causal attention in a block."""

    def __init__(self, n_tokens: int = 11, width: int = 8, length: int = 6, raw_positions: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, width)
        self.places = nn.Parameter(torch.randn(length, width)) if raw_positions else nn.Embedding(length, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = RMSNorm(width)
        self.mlp = nn.Sequential(Conv1D(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.final = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids)
        places = self.places
        x = x + (places(torch.arange(length)) if isinstance(places, nn.Embedding) else places)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        x = x + mixed
        x = x + self.mlp(self.norm(x))
        out: Tensor = self.head(self.final(x))
        return out


class Residual(nn.Module):
    """A ResNet's block with BatchNorm, a downsampling path and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 4, 1, stride=2)
        self.head = nn.Linear(4, 3)
        for norm in (self.norm, self.norm2):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        x = F.gelu(self.norm2(self.conv(x)) + self.down(x))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


def _images(n: int, channels: int = 4, size: int = 5) -> Tensor:
    return torch.randn(n, channels, size, size)


def _conv(layer: nn.Module, width: int) -> Callable[[int], tuple[nn.Module, Tensor]]:
    dims = {nn.Conv1d: (7,), nn.Conv2d: (5, 6), nn.Conv3d: (3, 4, 3)}[type(layer)]
    channels = layer.in_channels
    assert isinstance(channels, int)
    return lambda n: (Pooled(layer, width), torch.randn(n, channels, *dims))


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "linear": lambda n: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(n, 4)),
    "linear without bias": lambda n: (
        nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        torch.randn(n, 4),
    ),
    "linear on a sequence": lambda n: (Pooled(nn.Linear(4, 5), 5, False), torch.randn(n, 6, 4)),
    "linear on rank four": lambda n: (Pooled(nn.Linear(4, 5), 5, False), torch.randn(n, 2, 3, 4)),
    "conv1d": lambda n: _conv(nn.Conv1d(2, 3, 3, stride=2), 3)(n),
    "conv1d, dilated, reflected": lambda n: _conv(nn.Conv1d(2, 3, 2, dilation=3, padding=2, padding_mode="reflect"), 3)(
        n
    ),
    "conv2d": lambda n: _conv(nn.Conv2d(2, 3, 3), 3)(n),
    "conv2d, strided and padded unevenly": lambda n: _conv(
        nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), 3
    )(n),
    "conv2d, padding same": lambda n: _conv(nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), 3)(n),
    "conv2d, padding valid": lambda n: _conv(nn.Conv2d(2, 3, 2, padding="valid"), 3)(n),
    "conv2d, two groups": lambda n: _conv(nn.Conv2d(4, 6, 3, groups=2), 6)(n),
    "conv2d, depthwise": lambda n: _conv(nn.Conv2d(3, 3, 3, groups=3, padding=1), 3)(n),
    "conv2d, depthwise with a multiplier, no bias": lambda n: _conv(nn.Conv2d(3, 6, 2, groups=3, bias=False), 6)(n),
    "conv2d, circular padding": lambda n: _conv(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 3)(n),
    "conv2d, replicated padding": lambda n: _conv(nn.Conv2d(2, 3, 3, padding=2, padding_mode="replicate"), 3)(n),
    "conv3d": lambda n: _conv(nn.Conv3d(2, 3, 2, padding=1, stride=(1, 2, 1)), 3)(n),
    "Hugging Face's Conv1D": lambda n: (Pooled(Conv1D(4, 5), 5, False), torch.randn(n, 3, 4)),
    "embedding with padding": lambda n: (
        Pooled(nn.Embedding(7, 4, padding_idx=0), 4, False),
        torch.randint(7, (n, 5)),
    ),
    "layer norm": lambda n: (Pooled(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), 5, False), torch.randn(n, 3, 4)),
    "layer norm over two dimensions": lambda n: (Pooled(nn.LayerNorm((3, 4)), 4, False), torch.randn(n, 3, 4)),
    "group norm": lambda n: (Pooled(nn.Sequential(nn.Conv2d(4, 6, 2), nn.GroupNorm(2, 6)), 6), _images(n)),
    "torch's rms norm": lambda n: (
        Pooled(nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5)), 5, False),
        torch.randn(n, 3, 4),
    ),
    "a rms norm of its own": lambda n: (
        Pooled(nn.Sequential(nn.Linear(4, 5), RMSNorm(5)), 5, False),
        torch.randn(n, 3, 4),
    ),
    "a module called twice": lambda n: (Twice(), torch.randn(n, 4)),
    "one weight in two modules": lambda n: (Shared(), torch.randn(n, 4)),
    "parameters used by functions": lambda n: (Functional(), torch.randn(n, 4)),
    "a weight used off the record": lambda n: (OffTheRecord(), torch.randn(n, 4)),
    "a LoRA adapter": lambda n: (nn.Sequential(LowRankAdapter(), nn.Tanh(), nn.Linear(5, 3)), torch.randn(n, 4)),
    "changes in place": lambda n: (InPlace(), torch.randn(n, 4)),
    "sequence first": lambda n: (SequenceFirst(), torch.randn(n, 6, 4)),
    "cross-attention": lambda n: (CrossAttention(), torch.randn(n, 3, 4)),
    "attention with separate projections": lambda n: (CrossAttention(kdim=3), torch.randn(n, 3, 4)),
    "a transformer's layer": lambda n: (
        Pooled(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0), 4, False),
        torch.randn(n, 3, 4),
    ),
    "a residual network": lambda n: (Residual(), _images(n, 1)),
    "a bilinear layer and an LSTM": lambda n: (Unknown(), torch.randn(n, 3, 4)),
}


class Unknown(nn.Module):
    """Layers that have no structure known here."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.bilinear = nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        out: Tensor = self.bilinear(states[:, 0], states[:, -1])
        return out


def network(name: str, n_train: int = 9, n_test: int = 3, seed: int = 0) -> Case:
    """The same case for the same arguments: cross-entropy over three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = NETWORKS[name](n_train + n_test)
        y = torch.randint(3, (n_train + n_test,))
    x = x.double() if x.is_floating_point() else x
    return Case(model.double().eval(), nn.CrossEntropyLoss(), (x[:n_train], y[:n_train]), (x[n_train:], y[n_train:]))
