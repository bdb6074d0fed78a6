"""Models and data that tests name as `tests.scaling.sources:…`, so that workers build them for themselves."""

import os
import time
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from distinfluence import Objective
from distinfluence.model.batch import Batch
from distinfluence.model.objective import Forward
from tests.zoo import build


def model() -> nn.Module:
    return build("mlp classification").model


def activated(name: str) -> nn.Module:
    """The model with another activation: the same tensors by the same names, and another function."""
    network = model()
    assert isinstance(network, nn.Sequential)
    network[1] = getattr(nn, name)()
    return network


class Slow(nn.Module):
    """The model, but each evaluation takes some time."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds = model, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        out: Tensor = self.model(x)
        return out


def slow_model(seconds: float = 0.1) -> nn.Module:
    return Slow(model(), seconds)


def logged_model(log: str) -> nn.Module:
    """The model; each process that builds it leaves its number in a file."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    return model()


def model_beside_gpus(log: str) -> nn.Module:
    """The slow model; each process that builds it leaves its node and the GPUs that it may use in a file."""
    with open(log, "a") as file:
        file.write(f"{os.environ.get('SLURMD_NODENAME')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    return slow_model()


def model_that_finds_a_gpu(log: str) -> nn.Module:
    """The model, in a process that then believes to have two GPUs: what it would compute on is left in a file."""
    from distinfluence import InfluenceFunctionModel
    from distinfluence.scaling.worker import device as choice

    bound_to = InfluenceFunctionModel.bound_to

    def noted(self: InfluenceFunctionModel, model: nn.Module, device: torch.device | None = None) -> object:
        with open(log, "a") as file:
            file.write(f"{device}\n")
        return bound_to(self, model, torch.device("cpu"))

    gpus = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    choice.__dict__["torch"] = SimpleNamespace(cuda=gpus, device=torch.device)
    InfluenceFunctionModel.bound_to = noted  # type: ignore[method-assign, assignment]
    return model()


def train() -> tuple[Tensor, Tensor]:
    return build("mlp classification").train


def test() -> tuple[Tensor, Tensor]:
    return build("mlp classification").test


def repeated_test(times: int) -> tuple[Tensor, Tensor]:
    """The test samples again and again."""
    x, y = test()
    return torch.cat([x] * times), torch.cat([y] * times)


class Labelled(Objective):
    """Cross-entropy on dict batches."""

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        outputs: Tensor = model(batch["features"])
        return outputs

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        assert isinstance(batch["labels"], Tensor)
        return nn.functional.cross_entropy(outputs, batch["labels"], reduction="none")


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """The training samples one by one."""

    def __len__(self) -> int:
        return len(train()[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = train()
        return x[index], y[index]


def arrays_of_this_process(forbidden_pid: int) -> tuple[Tensor, Tensor]:
    """The training samples, but never in the process with that number."""
    if os.getpid() == forbidden_pid:
        raise AssertionError("the driver loaded the data")
    return train()


def broken() -> tuple[Tensor, Tensor]:
    """NaN in sample 17."""
    x, y = train()
    x = x.clone()
    x[17, 2] = torch.nan
    return x, y


def ids() -> NDArray[np.int64]:
    return np.arange(5)
