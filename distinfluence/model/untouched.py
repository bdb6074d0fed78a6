"""The user's model, random state and backends as they were found, also after an exception."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distinfluence.errors import (
    ModelModeError,
)

RANDOM_IN_TRAINING = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.batchnorm._NormBase,
    nn.RReLU,
)


def check_mode(module: nn.Module) -> None:
    """Raise ModelModeError if a submodule draws random numbers or uses batch statistics as its mode is now."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is None:
            raise ModelModeError(
                f"`model` has {type(child).__name__} at {name or 'the top'!r} without running statistics, which "
                "depends on the batch also in eval mode. Give it `track_running_stats=True`."
            )
        random = isinstance(child, RANDOM_IN_TRAINING) and not (
            isinstance(child, nn.modules.dropout._DropoutNd) and child.p == 0
        )
        random = random or (isinstance(child, (nn.MultiheadAttention, nn.RNNBase)) and child.dropout > 0)
        if child.training and random:
            raise ModelModeError(
                f"`model` is in train mode with {type(child).__name__} at {name or 'the top'!r}, whose output is "
                "random or depends on the batch. Call `model.eval()` first."
            )


def version_of(tensor: Tensor) -> int:
    """How often the tensor has been written to in place; torch does not count for inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Restore the random state of torch's CPU and current CUDA generator afterwards."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


@contextmanager
def untouched_attributes(module: nn.Module) -> Iterator[None]:
    """Put back the attributes that a forward rebinds: caches and activations would else be torch.func's wrappers.

    Parameters and buffers, too: torch's functional call leaves a plain tensor where a module has two names.
    """
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, held.copy())
        for child in module.modules()
        for held in (child.__dict__, child._parameters, child._buffers)
    ]
    try:
        yield
    finally:
        for held, content in before:
            held.clear()
            held.update(content)


@contextmanager
def double_differentiable() -> Iterator[None]:
    """Attention by the plain kernels: the fused ones have no double backward and no forward derivative.

    Also out of the caller's `torch.inference_mode`, in which autograd gives zeros without a word.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def recordable(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or a copy of one that was made in `torch.inference_mode`, which autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor
