"""The models and data of the comparison on a cluster; imported by every environment, so nothing but torch."""

import torch
from torch import Tensor, nn

N_TEST, N_TRAIN = 256, 4096


def build(name: str) -> nn.Module:
    """An MLP 784-64-10, or a small CNN on 28 × 28 images."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10)).eval()
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(784, 10),
    ).eval()


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten noisy patterns of 784 pixels."""
    patterns = torch.randn(10, 784, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    return 0.3 * patterns[labels] + torch.randn(n, 784, generator=generator), labels


def train_samples(n: int = N_TRAIN) -> tuple[Tensor, Tensor]:
    """Training samples."""
    return samples(n, 1)


def query_samples(n: int = N_TEST) -> tuple[Tensor, Tensor]:
    """Test samples."""
    return samples(n, 2)


def trained(name: str) -> nn.Module:
    """The model after ten passes over the training samples."""
    model, (x, y) = build(name), train_samples()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):
        for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(3)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


def warm() -> None:
    """What PyTorch imports at the first derivative of a derivative, a second or two in every process."""

    def gradient(logits: Tensor) -> Tensor:
        slope: Tensor = torch.func.grad(lambda z: nn.functional.cross_entropy(z, torch.tensor([0])))(logits)
        return slope

    logits = torch.zeros(1, 2)
    torch.func.jvp(gradient, (logits,), (logits,))
