"""A model for jobs that take their time, and data, as `tests.slurm.sources:…`: workers build them for themselves."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from distinfluence.app import demo
from tests.zoo import build


class SlowGradients(nn.Module):
    """The model, but where gradients by sample are made of it, as for each strip, it takes some seconds.

    It is slow only once the folder has a result, so that what comes before the strips takes no time, and only until
    the folder has a file `hurry`.
    """

    def __init__(self, model: nn.Module, seconds: float, folder: Path) -> None:
        super().__init__()
        self.model = model
        self.seconds = seconds
        self.folder = folder

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(x) and (self.folder / "influences.zarr").exists():
            end = time.monotonic() + self.seconds
            while time.monotonic() < end and not (self.folder / "hurry").exists():
                time.sleep(0.05)
        out: Tensor = self.model(x)
        return out


def slow_model(seconds: float, folder: str, log: str = "") -> nn.Module:
    """log: a file in which each process that builds it leaves its node and the GPUs that it may use."""
    if log:
        with Path(log).open("a") as file:
            file.write(f"{os.environ.get('SLURMD_NODENAME')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    return SlowGradients(build("mlp classification").model, seconds, Path(folder))


def some_digits() -> tuple[Tensor, Tensor]:
    """A fifth of the test digits."""
    x, y = demo.test_data()
    return x[:60], y[:60]
