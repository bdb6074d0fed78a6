"""A regression that is trained in closed form, as job files name it: scores of the exact method are nearly right."""

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

N_TRAIN, N_TEST, L2 = 40, 10, 0.1


def build() -> nn.Module:
    return nn.Linear(3, 1, bias=False).double()


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.2, 1.0, 3.0])
    return x, x.sin().sum(dim=1, keepdim=True) + torch.randn(n, 1, generator=generator, dtype=torch.float64)


def train_data(seed: int = 1) -> tuple[Tensor, Tensor]:
    return data(N_TRAIN, seed)


def test_data() -> tuple[Tensor, Tensor]:
    return data(N_TEST, 2)


test_data.__test__ = False  # type: ignore[attr-defined]


def train(indices: NDArray[np.int64], seed: int, log: str = "", bad: int = -1) -> nn.Module:
    """The minimum of the mean squared error, moved a little by the seed.

    log: a file that gets a line for each model; slow while a file of that name with `.slow` is there. bad: of which
    training point a subset fails.
    """
    if log:
        with Path(log).open("a") as file:
            file.write(f"{len(indices)} {seed}\n")
        if Path(log).with_suffix(".slow").exists():
            time.sleep(0.2)
    if bad in indices and bad + 1 in indices and bad + 2 in indices and bad + 3 not in indices:
        raise ValueError(f"cannot train with point {bad}")
    x, y = (part[torch.from_numpy(np.array(indices))] for part in train_data())
    solution = torch.linalg.solve(x.T @ x / len(x) + L2 * torch.eye(3), x.T @ y / len(x))
    model = build()
    generator = torch.Generator().manual_seed(seed)
    noise = 1e-3 * torch.randn(1, 3, generator=generator, dtype=torch.float64)
    model.load_state_dict({"weight": solution.T + noise})
    return model


def mislabelled() -> list[int]:
    return [1, 5, 7]


def planted() -> dict[int, list[int]]:
    return {0: [3], 2: [8, 9]}
