"""Batches: samples in one form.

A batch is a tensor, a tuple of batches, or a dict of batches; every tensor in it has the samples along its first
dimension. `model.data` makes them of what users bring.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from distinfluence.errors import EmptyDataError, NonFiniteError, ShapeError
from distinfluence.model.data.tree import map_leaves, named_leaves, same_form

Batch: TypeAlias = "Tensor | tuple[Batch, ...] | dict[str, Batch]"

NAMED = 5  # items of a collection that a message names


def leaves(batch: Batch, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the batch with the name by which a user would reach it."""
    return named_leaves(batch, name)


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return a batch of the same form with `function` applied to every tensor."""
    mapped: Batch = map_leaves(function, batch)
    return mapped


def some(items: Mapping[str, object] | Sequence[object]) -> str:
    """Return the first items for an error message, and how many more there are."""
    parts = [f"{key}: {value}" for key, value in items.items()] if isinstance(items, Mapping) else list(map(str, items))
    more = f", … and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return ", ".join(parts[:NAMED]) + more


def common_length(lengths: Mapping[str, int]) -> int:
    """Return the number of samples. lengths: name → length of each array.

    Raises:
        ShapeError: The lengths differ.
        EmptyDataError: There are no arrays.
    """
    if not lengths:
        raise EmptyDataError("`x` must hold at least one array, got none. Pass the samples.")
    first, length = next(iter(lengths.items()))
    other = next((name for name, own in lengths.items() if own != length), None)
    if other is not None:
        raise ShapeError(
            f"`{first}` and `{other}` must have as many samples, got {some(lengths)}. Pass inputs and targets of the "
            "same samples."
        )
    return length


def batch_length(batch: Batch, name: str = "batch") -> int:
    """Return the number of samples.

    Args:
        batch: Tensors with the samples along their first dimension.
        name: What to call the batch in errors.

    Returns:
        The number of samples.

    Raises:
        ShapeError: If the tensors disagree, or one is a scalar.
        EmptyDataError: If there are no tensors or no samples.
    """
    lengths: dict[str, int] = {}
    for own, tensor in leaves(batch, name):
        if tensor.ndim == 0:
            raise ShapeError(
                f"`{own}` must have the samples along its first dimension, got a scalar. Pass batches of samples."
            )
        lengths[own] = tensor.shape[0]
    length = common_length(lengths)
    if length == 0:
        raise EmptyDataError(f"`{name}` must hold at least one sample, got zero. Pass a data set that isn't empty.")
    return length


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples start to stop (exclusive), as views."""
    return map_batch(lambda tensor: tensor[start:stop], batch)


def alike(a: Batch, b: Batch) -> bool:
    """Return whether two batches can be joined: the same form, dtypes, and shapes of a sample."""
    if not same_form(a, b):
        return False
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(own.dtype == other.dtype and own.shape[1:] == other.shape[1:] for (_, own), (_, other) in pairs)


def joined(parts: Sequence[Batch]) -> Batch:
    """Return the samples of batches that are alike as one batch."""
    whole: Batch = parts[0] if len(parts) == 1 else map_leaves(lambda *tensors: torch.cat(tensors), *parts)
    return whole


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
