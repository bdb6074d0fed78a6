"""Small models whose influences are well defined: whatever looks for wrong ones must let every one of them pass.

float32 and bfloat16, eval mode, with data: what people have, by layer, by way of wrapping it and by loss.
"""

import functools
import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, rnn, spectral_norm

from distinfluence.model.batch import Batch
from distinfluence.model.language import LanguageModelObjective
from distinfluence.model.objective import Forward, Loss, Objective
from tests.layers.networks import NETWORKS, network
from tests.zoo import BUILDERS, Case, build

N = 24  # samples of each
Data = tuple[Tensor, ...] | dict[str, Tensor]
Parts = tuple[nn.Module, Loss | Objective, Data]


@dataclass(frozen=True)
class RightModel:
    """A model in eval mode, a loss, and the samples."""

    model: nn.Module
    loss: Loss | Objective
    data: Data


Builder = Callable[[torch.dtype], RightModel]


# ---- layers and how they are put together


class Block(nn.Module):
    """x + f(x), then ReLU."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


class Mean(nn.Module):
    """The mean over the positions of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Last(nn.Module):
    """The last state of a recurrent layer, and a head."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x)[0][:, -1])
        return out


class PackedText(nn.Module):
    """Token ids, padded with zeros, through a recurrent layer that stops where the padding begins."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.layer = kind(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(dim=1).cpu()
        packed = rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.layer(packed)
        out: Tensor = self.head((state[0] if isinstance(state, tuple) else state)[-1])
        return out


class PackedSeries(nn.Module):
    """Series of several lengths, which are passed along."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(2, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=x.shape[1])
        out: Tensor = self.head(states.sum(dim=1) / lengths.unsqueeze(1)).squeeze(1)
        return out


class Encoder(nn.Module):
    """Token ids through a transformer's encoder that looks away from the padding; the mean over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(2).to(hidden.dtype)
        out: Tensor = self.head((hidden * kept).sum(dim=1) / kept.sum(dim=1))
        return out


class DotProductAttention(nn.Module):
    """Two heads of causal attention by torch's function."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (part.view(n, length, 2, width // 2).transpose(1, 2) for part in self.project(x).split(width, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, length, width)
        out: Tensor = self.head((x + self.out(mixed)).mean(dim=1))
        return out


class Tagger(nn.Module):
    """Classes [n, C, T] at each position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.layer = nn.Conv1d(5, 6, 3, padding=1)
        self.head = nn.Conv1d(6, 3, 1)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.layer(self.embed(ids).transpose(1, 2))))
        return out


class UNet(nn.Module):
    """Down, up and across: classes [n, C, H, W] of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.inner(x))
        deep = F.relu(self.down(F.max_pool2d(wide, 2)))
        out: Tensor = self.head(torch.cat([wide, self.up(deep)], dim=1))
        return out


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter as it is at the start of training: one factor is zero."""

    def __init__(self, n_in: int, n_out: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(n_in, n_out).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, n_in) / math.sqrt(n_in))
        self.b = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 2 * F.linear(F.linear(x, self.a), self.b)
        return out


class WithUnused(nn.Module):
    """A layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.unused = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


class Autoencoder(nn.Module):
    """One parameter in two modules, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.between, self.decode = nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decode(self.between(self.encode(x)))
        return out


class Listed(nn.Module):
    """Parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 6) / 2, torch.randn(6, 3) / 2])
        self.biases = nn.ParameterDict({"hidden": torch.zeros(6), "out": torch.zeros(3)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(x @ self.weights[0] + self.biases["hidden"])
        out: Tensor = hidden @ self.weights[1] + self.biases["out"]
        return out


class Experts(nn.Module):
    """Experts that are mixed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.gate(x), dim=1)
        opinions = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (weights.unsqueeze(2) * opinions).sum(dim=1)


# ---- losses


class Gaussian(Objective):
    """Negative log-likelihood of a normal distribution whose mean and log-variance the model predicts."""

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, tuple)
        out: Tensor = model(batch[0])
        return out

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, tuple) and isinstance(batch[1], Tensor)
        mean, log_variance = outputs.unbind(dim=1)
        return (log_variance + (batch[1] - mean) ** 2 * torch.exp(-log_variance)) / 2


class OfSeries(Objective):
    """Squared error for `PackedSeries`."""

    convex = True

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        out: Tensor = model(batch["x"], batch["lengths"])
        return out

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["y"], Tensor)
        return (outputs - batch["y"]) ** 2


class OfLogits(Objective):
    """Cross-entropy for classifiers that return an object with `logits`, as Hugging Face's do."""

    convex = True

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["labels"], Tensor)
        return F.cross_entropy(outputs, batch["labels"], reduction="none")


# ---- data


def _classes(*shape: int, of: int = 3) -> Tensor:
    return torch.randint(of, (N, *shape))


def _images(channels: int = 1, size: int = 6) -> Tensor:
    return torch.randn(N, channels, size, size)


def _bordered(size: int = 8) -> Tensor:
    """Images as MNIST has them: a border of zeros, and few values."""
    x = torch.zeros(N, 1, size, size)
    x[:, :, 2:-2, 2:-2] = torch.randint(5, (N, 1, size - 4, size - 4)) / 4
    return x


def _padded(length: int = 6, n_tokens: int = 9) -> Tensor:
    """Token ids from 1 on, with zeros where a text has ended."""
    ids = torch.randint(1, n_tokens, (N, length))
    return ids * (torch.arange(length) < torch.randint(2, length + 1, (N, 1)))


# ---- models by layer


def _mlp(activation: Callable[[], nn.Module], n_out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, n_out))


def _with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics as training leaves them, and scales that are not all one."""
    for child in model.modules():
        if isinstance(child, nn.modules.batchnorm._NormBase):
            assert child.running_mean is not None and child.running_var is not None
            child.running_mean.normal_(std=0.5)
            child.running_var.uniform_(0.5, 2)
            nn.init.uniform_(child.weight, 0.5, 1.5)
    return model


def _without_biases(model: nn.Module) -> nn.Module:
    """Biases that are zero, as many people start them."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    return model


def _small_cnn(size: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * (size // 2) ** 2, 3),
    )


def _deep_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def _normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def _residual() -> nn.Module:
    inner = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
    )
    stem = nn.Conv2d(1, 4, 3, padding=1)
    return _with_statistics(
        nn.Sequential(stem, Block(inner), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )


def _convolutions() -> nn.Module:
    """Dilated, grouped and transposed."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, dilation=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1),
        nn.LeakyReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


def _channels_last() -> Parts:
    model = _small_cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, nn.CrossEntropyLoss(), (_images().contiguous(memory_format=torch.channels_last), _classes())


def _dead_unit() -> nn.Module:
    model = _mlp(nn.ReLU)
    with torch.no_grad():
        model.get_parameter("0.bias")[0] = -100.0
    return model


def _frozen_backbone() -> nn.Module:
    backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    return nn.Sequential(_with_statistics(backbone).requires_grad_(False), nn.Linear(6, 3))


def _pruned() -> nn.Module:
    model = _mlp(nn.ReLU)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[2], "weight", amount=0.3, n=2, dim=0)
    return model


def _old_spectral_norm() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.ReLU(), spectral_norm(nn.Linear(6, 3)))


def _new_spectral_norm() -> nn.Module:
    normed = parametrizations.spectral_norm
    return nn.Sequential(normed(nn.Linear(4, 6)), nn.ReLU(), normed(nn.Linear(6, 3)))


def _weight_norm() -> nn.Module:
    normed = parametrizations.weight_norm
    return nn.Sequential(normed(nn.Linear(4, 6)), nn.ReLU(), normed(nn.Linear(6, 3)))


def _orthogonal() -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 3))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "ELU": nn.ELU,
    "Hardswish": nn.Hardswish,
    "Softplus": nn.Softplus,
    "PReLU": nn.PReLU,
    "ReLU6": nn.ReLU6,
    "Tanhshrink": nn.Tanhshrink,
}


def _of_activation(activation: Callable[[], nn.Module]) -> Parts:
    return _mlp(activation), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())


OWN: dict[str, Callable[[], Parts]] = {
    **{f"mlp, {name}": functools.partial(_of_activation, kind) for name, kind in ACTIVATIONS.items()},
    # convolutions and pooling
    "cnn, ReLU and max pooling": lambda: (
        _deep_cnn(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        (_images(1, 8), _classes()),
    ),
    "cnn, zero borders and zero biases": lambda: (
        _without_biases(_deep_cnn()),
        nn.CrossEntropyLoss(),
        (_bordered(), _classes()),
    ),
    "cnn, zero borders and zero biases, one layer": lambda: (
        _without_biases(_small_cnn(8)),
        nn.CrossEntropyLoss(reduction="sum"),
        (_bordered(), _classes()),
    ),
    "cnn, average pooling": lambda: (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        nn.CrossEntropyLoss(reduction="none"),
        (_images(), _classes()),
    ),
    "cnn, adaptive average pooling": lambda: (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 1)),
        nn.HuberLoss(delta=0.5),
        (_images(), torch.randn(N, 1)),
    ),
    "cnn, dilated, grouped and transposed": lambda: (_convolutions(), nn.CrossEntropyLoss(), (_images(2), _classes())),
    "cnn, channels last": _channels_last,
    "conv1d and max pooling": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)),
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        (torch.randn(N, 2, 8), _classes()),
    ),
    "segmentation": lambda: (UNet(), nn.CrossEntropyLoss(), (_images(), _classes(6, 6, of=2))),
    # norms and residuals
    "batch norm": lambda: (
        _with_statistics(_normed(nn.BatchNorm2d(4))),
        nn.CrossEntropyLoss(),
        (_images(2), _classes()),
    ),
    "group norm": lambda: (_normed(nn.GroupNorm(2, 4)), nn.CrossEntropyLoss(), (_images(2), _classes())),
    "instance norm": lambda: (
        _with_statistics(_normed(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))),
        nn.CrossEntropyLoss(),
        (_images(2), _classes()),
    ),
    "layer norm": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)),
        lambda f, y: ((f - y) ** 2).mean(),
        (torch.randn(N, 4), torch.randn(N, 2)),
    ),
    "rms norm": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.SiLU(), nn.Linear(6, 2)),
        nn.MSELoss(reduction="sum"),
        (torch.randn(N, 4), torch.randn(N, 2)),
    ),
    "residual block": lambda: (_residual(), nn.CrossEntropyLoss(), (_images(), _classes())),
    # sequences
    "packed GRU over text": lambda: (PackedText(nn.GRU), nn.CrossEntropyLoss(), (_padded(), _classes())),
    "packed LSTM over text": lambda: (PackedText(nn.LSTM), nn.CrossEntropyLoss(), (_padded(), _classes())),
    "packed GRU over series": lambda: (
        PackedSeries(),
        OfSeries(),
        {"x": torch.randn(N, 5, 2), "lengths": torch.randint(1, 6, (N,)), "y": torch.randn(N)},
    ),
    "vanilla RNN": lambda: (
        Last(nn.RNN(2, 4, batch_first=True, nonlinearity="relu")),
        nn.CrossEntropyLoss(),
        (torch.randn(N, 5, 2), _classes()),
    ),
    "two layers of LSTM, both ways": lambda: (
        Last(nn.LSTM(2, 3, num_layers=2, bidirectional=True, batch_first=True)),
        nn.CrossEntropyLoss(),
        (torch.randn(N, 4, 2), _classes()),
    ),
    "transformer encoder": lambda: (Encoder(), nn.CrossEntropyLoss(), (_padded(), _classes())),
    "transformer encoder layer, norm first": lambda: (
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", norm_first=True, batch_first=True),
            Mean(),
            nn.Linear(4, 3),
        ),
        nn.CrossEntropyLoss(),
        (torch.randn(N, 5, 4), _classes()),
    ),
    "scaled dot-product attention": lambda: (
        DotProductAttention(),
        nn.CrossEntropyLoss(),
        (torch.randn(N, 5, 6), _classes()),
    ),
    "mean of embeddings": lambda: (
        nn.Sequential(nn.Embedding(9, 5), Mean(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss(),
        (torch.randint(9, (N, 6)), _classes()),
    ),
    "tags of a sequence": lambda: (Tagger(), nn.CrossEntropyLoss(), (torch.randint(9, (N, 6)), _classes(6))),
    # losses
    "logistic regression": lambda: (
        nn.Linear(4, 1),
        nn.BCEWithLogitsLoss(),
        (torch.randn(N, 4), _classes(1, of=2).float()),
    ),
    "several labels, weighted": lambda: (
        _mlp(nn.ReLU),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5])),
        (torch.randn(N, 4), _classes(3, of=2).float()),
    ),
    "counts": lambda: (_mlp(nn.ReLU, 1), nn.PoissonNLLLoss(), (torch.randn(N, 4), _classes(1, of=5).float())),
    "mean and variance": lambda: (_mlp(nn.ReLU, 2), Gaussian(), (torch.randn(N, 4), torch.randn(N))),
    "log-softmax": lambda: (
        nn.Sequential(_mlp(nn.ReLU), nn.LogSoftmax(dim=1)),
        nn.NLLLoss(),
        (torch.randn(N, 4), _classes()),
    ),
    "probabilities as targets": lambda: (
        _mlp(nn.ReLU),
        nn.CrossEntropyLoss(),
        (torch.randn(N, 4), torch.softmax(torch.randn(N, 3), dim=1)),
    ),
    "linear regression": lambda: (nn.Linear(4, 1), nn.MSELoss(), (torch.randn(N, 4), torch.randn(N, 1))),
    # parameters that are used in other ways than once, and not at all
    "dead ReLU": lambda: (_dead_unit(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "unused layer": lambda: (WithUnused(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "tied autoencoder": lambda: (Autoencoder(), nn.MSELoss(), (x := torch.randn(N, 5), x.clone())),
    "lists and dicts of parameters": lambda: (Listed(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "mixture of experts": lambda: (Experts(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "frozen backbone": lambda: (_frozen_backbone(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "adapters at their start": lambda: (
        nn.Sequential(Adapted(4, 6), nn.ReLU(), Adapted(6, 3)),
        nn.CrossEntropyLoss(),
        (torch.randn(N, 4), _classes()),
    ),
    "zero weights": lambda: (
        _without_biases(nn.Sequential(nn.Linear(4, 3))).apply(
            lambda child: nn.init.zeros_(child.weight) if isinstance(child, nn.Linear) else None
        ),
        nn.CrossEntropyLoss(),
        (torch.randn(N, 4), _classes()),
    ),
    # weights that are computed from parameters
    "spectral norm by a hook": lambda: (_old_spectral_norm(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "spectral norm": lambda: (_new_spectral_norm(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "weight norm": lambda: (_weight_norm(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "orthogonal weight": lambda: (_orthogonal(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
    "pruned": lambda: (_pruned(), nn.CrossEntropyLoss(), (torch.randn(N, 4), _classes())),
}


# ---- models that are wrapped or translated


def _compiled_eagerly(model: nn.Module, x: Tensor) -> nn.Module:
    return cast(nn.Module, torch.compile(model, backend="eager"))


def _traced(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.fx.symbolic_trace(model).eval()


def _exported(model: nn.Module, x: Tensor) -> nn.Module:
    # has no `eval` of its own, and stays in the mode in which it was exported
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()


def _distributed(model: nn.Module, x: Tensor) -> nn.Module:
    """In a process group of this process alone, which is gone again afterwards."""
    if torch.distributed.is_initialized():
        return nn.parallel.DistributedDataParallel(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            return nn.parallel.DistributedDataParallel(model).eval()
        finally:
            torch.distributed.destroy_process_group()


WRAPPED: dict[str, tuple[str, Callable[[nn.Module, Tensor], nn.Module]]] = {
    "compiled mlp, eager backend": ("mlp, ReLU", _compiled_eagerly),
    "traced by torch.fx": ("residual block", _traced),
    "exported": ("mlp, ReLU", _exported),
    "exported cnn": ("cnn, ReLU and max pooling", _exported),
    "distributed data parallel": ("mlp, ReLU", _distributed),
    "distributed data parallel, with buffers": ("residual block", _distributed),
}


# ---- Hugging Face's


def _gpt2() -> Parts:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=31, n_positions=8, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(31, (N, 8))
    mask = (torch.arange(8) < torch.randint(3, 9, (N, 1))).long()
    labels = ids.masked_fill(mask == 0, -100)
    return (
        GPT2LMHeadModel(config),
        LanguageModelObjective(),
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
    )


class LowRank(nn.Module):
    """A frozen projection of GPT-2's with a low-rank adapter beside it."""

    def __init__(self, frozen: nn.Module, n_in: int, n_out: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.down, self.up = nn.Linear(n_in, 2, bias=False), nn.Linear(2, n_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x) + 2.0 * self.up(self.down(x))
        return out


def _adapted_gpt2() -> Parts:
    model, loss, data = _gpt2()
    model.requires_grad_(False)
    block = model.get_submodule("transformer.h.0")
    block.attn.c_attn = LowRank(block.attn.c_attn, 16, 48)
    block.mlp.c_fc = LowRank(block.mlp.c_fc, 16, 64)
    return model, loss, data


def _llama() -> Parts:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(31, (N, 8))
    return LlamaForCausalLM(config), LanguageModelObjective(reduction="sum"), (ids, ids.clone())


def _bert() -> Parts:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    config.num_labels = 3
    data = {"input_ids": torch.randint(31, (N, 8)), "attention_mask": torch.ones(N, 8).long(), "labels": _classes()}
    return BertForSequenceClassification(config), OfLogits(), data


HUGGING_FACE: dict[str, Callable[[], Parts]] = {
    "tiny GPT-2": _gpt2,
    "tiny GPT-2 with adapters": _adapted_gpt2,
    "tiny Llama": _llama,
    "tiny BERT": _bert,
}


# ---- all of them


def _cast(data: Data, dtype: torch.dtype) -> Data:
    if isinstance(data, dict):
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in data)


def _of_parts(make: Callable[[], Parts], dtype: torch.dtype) -> RightModel:
    """The same model for the same arguments; the caller's random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, loss, data = make()
    return RightModel(model.to(dtype).eval(), loss, _cast(data, dtype))


def _of_wrapped(inner: str, wrap: Callable[[nn.Module, Tensor], nn.Module], dtype: torch.dtype) -> RightModel:
    right = _of_parts(OWN[inner], dtype)
    assert isinstance(right.data, tuple)
    with torch.random.fork_rng():
        model = wrap(right.model, right.data[0])
    return RightModel(model, right.loss, right.data)


def _of_case(make: Callable[[], Case], dtype: torch.dtype) -> RightModel:
    case = make()
    return RightModel(case.model.to(dtype).eval(), case.loss, _cast(case.train, dtype))


MODELS: dict[str, Builder] = {
    **{f"zoo, {name}": functools.partial(_of_case, functools.partial(build, name)) for name in BUILDERS},
    **{f"network, {name}": functools.partial(_of_case, functools.partial(network, name, N)) for name in NETWORKS},
    **{name: functools.partial(_of_parts, make) for name, make in OWN.items()},
    **{name: functools.partial(_of_wrapped, *how) for name, how in WRAPPED.items()},
}
if importlib.util.find_spec("transformers") is not None:
    MODELS |= {name: functools.partial(_of_parts, make) for name, make in HUGGING_FACE.items()}

# torch has no LU factorisation in bfloat16 on a CPU, which the orthogonal weight is made with
FLOAT32_ONLY: frozenset[str] = frozenset({"orthogonal weight"})
