"""The models of the dense tables, in both dtypes, and their dense references."""

import copy
from functools import cache

import torch
from torch import Tensor

from tests.layers.networks import network
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, build

N_TRAIN = 23  # batches of 7 do not divide it
NETWORKS = (
    "conv1d, dilated, reflected",
    "conv2d, two groups",
    "conv2d, circular padding",
    "conv3d",
    "torch's rms norm",
    "a module called twice",
    "a LoRA adapter",
)
NAMES = (*BUILDERS, *NETWORKS)


def case_of(name: str, dtype: str = "float64") -> Case:
    """The model with 23 training samples and 6 tests; values that float32 holds exactly, whatever the dtype."""
    case = network(name, N_TRAIN, 6) if name in NETWORKS else build(name, N_TRAIN, 6, torch.float32)
    return cast(case, getattr(torch, dtype))


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The case in another dtype."""

    def of(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = (part.to(dtype) if part.is_floating_point() else part for part in data)
        return x, y

    return Case(copy.deepcopy(case.model).to(dtype), case.loss, of(case.train), of(case.test))


def batches(case: Case, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    """The training samples, the last batch a short one."""
    x, y = case.train
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@cache
def reference(name: str) -> Reference:
    """Dense matrices and influences of a case in float64."""
    return Reference(case_of(name))


@cache
def damping(name: str, mode: str) -> float:
    """A twentieth of the matrix's norm, and enough to make an indefinite Hessian definite."""
    values = torch.linalg.eigvalsh(reference(name).matrix(mode))
    return 0.05 * float(values.abs().max()) + max(0.0, -1.1 * float(values[0]))
