"""The models of the comparison; imported by every environment, so nothing but torch."""

import torch
from torch import nn


def build(name: str) -> nn.Module:
    """The digits MLP 64-64-32-10, or a small CNN on the same 8 × 8 digits."""
    torch.manual_seed(0)
    if name == "mlp":
        layers = (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        return nn.Sequential(*layers).eval()
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()
