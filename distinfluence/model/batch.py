"""Batches: what a data loader yields, in one form.

A batch is a tensor, a tuple of batches, or a dict of batches; every tensor in it has the samples along its first
dimension. Lists become tuples and other mappings (Hugging Face's `BatchEncoding`) become dicts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from distinfluence.errors import DtypeError, EmptyDataError, NonFiniteError, ShapeError
from distinfluence.model.checks.supported import check_tensor

Batch: TypeAlias = "Tensor | tuple[Batch, ...] | dict[str, Batch]"


def as_batch(data: object, name: str = "batch") -> Batch:
    """Return the same tensors as a `Batch`.

    Args:
        data: A tensor, or a tuple, list or dict of tensors.
        name: What to call the data in errors.

    Returns:
        The batch.

    Raises:
        DtypeError: If a leaf is not a dense tensor; names where it is.
    """
    if isinstance(data, Tensor):
        return check_tensor(data, name)
    if isinstance(data, Mapping):
        return {str(key): as_batch(value, f"{name}[{key!r}]") for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return tuple(as_batch(value, f"{name}[{index}]") for index, value in enumerate(data))
    raise DtypeError(
        f"`{name}` must be a tensor, or a tuple or dict of tensors, got {type(data).__name__}. "
        "Convert arrays with `torch.as_tensor`, and leave everything else out, for instance in a `collate_fn`."
    )


def leaves(batch: Batch, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the batch with the name by which a user would reach it."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, dict):
        for key, value in batch.items():
            yield from leaves(value, f"{name}[{key!r}]")
    else:
        for index, value in enumerate(batch):
            yield from leaves(value, f"{name}[{index}]")


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return a batch of the same form with `function` applied to every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_batch(function, value) for key, value in batch.items()}
    return tuple(map_batch(function, value) for value in batch)


def batch_length(batch: Batch) -> int:
    """Return the number of samples.

    Args:
        batch: Tensors with the samples along their first dimension.

    Returns:
        The number of samples.

    Raises:
        ShapeError: If the tensors disagree, or one is a scalar.
        EmptyDataError: If there are no tensors or no samples.
    """
    lengths: dict[str, int] = {}
    for name, tensor in leaves(batch):
        if tensor.ndim == 0:
            raise ShapeError(f"`{name}` must have the samples along its first dimension, got a scalar.")
        lengths[name] = tensor.shape[0]
    if not lengths:
        raise EmptyDataError("`batch` must hold at least one tensor, got none. Pass the samples.")
    if len(set(lengths.values())) > 1:
        raise ShapeError(
            f"`batch` must have as many samples in every tensor, got {lengths}. "
            "Pass inputs and targets of the same samples."
        )
    length = next(iter(lengths.values()))
    if length == 0:
        raise EmptyDataError("`batch` must hold at least one sample, got zero. Pass a data set that isn't empty.")
    return length


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples start to stop (exclusive), as views."""
    return map_batch(lambda tensor: tensor[start:stop], batch)


def nbytes(batch: Batch) -> int:
    """Bytes of all tensors of the batch."""
    return sum(tensor.nbytes for _, tensor in leaves(batch))


def describe(batch: Batch) -> str:
    """Shapes and dtypes for an error message: `batch[0]: float32 [8, 64], batch[1]: int64 [8]`."""
    return ", ".join(
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in leaves(batch)
    )


def check_batch(batch: Batch) -> int:
    """Return the number of samples of a well-formed, finite batch.

    Args:
        batch: Tensors with the samples along their first dimension.

    Returns:
        The number of samples.

    Raises:
        ShapeError: If the tensors disagree, or one is a scalar.
        EmptyDataError: If there are no tensors or no samples.
        NonFiniteError: If there is NaN or infinity; names the tensor and the samples.
    """
    length = batch_length(batch)
    for name, tensor in leaves(batch):
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor)
        if finite.all():
            continue
        bad = (~finite).reshape(length, -1).any(dim=1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"`{name}` must be finite, got NaN or infinity in samples {bad[:10]} of this batch "
            f"({len(bad)} of {length}). Clean or leave out these samples."
        )
    return length
