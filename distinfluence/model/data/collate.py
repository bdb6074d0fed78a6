"""One batch of what a loader or a data set gives: samples put together, and items that are batches already."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distinfluence.errors import DtypeError, ShapeError
from distinfluence.model.batch import Batch, some
from distinfluence.model.checks.supported import check_tensor
from distinfluence.model.data.arrays import NUMBERS, formed, holds_numbers, tensor_of, tensor_of_list
from distinfluence.model.data.refused import is_of
from distinfluence.model.data.tree import map_leaves

PAD = "Pad them to one shape, for instance in a `DataLoader(…, collate_fn=…)`."
LEAVE_OUT = (
    "Encode it as numbers, or leave it out: `remove_columns` or `set_format(columns=…)` of Hugging Face's data sets, "
    "or a `DataLoader(…, collate_fn=…)`."
)


def batch_of(item: object, name: str) -> Batch:
    """Return what a loader or a collate function gives as a batch.

    Args:
        item: A tensor, an array or a list of numbers, or a tuple, list or mapping of these.
        name: What to call it in errors.

    Returns:
        The batch.

    Raises:
        DtypeError: If a leaf is not a dense array of numbers; names where it is.
        ShapeError: If a leaf has no dimension for the samples.
    """
    if isinstance(item, Tensor) and item.ndim:
        return check_tensor(item, name)
    batch: Batch = map_leaves(lambda leaf: tensor_of(leaf, name), formed(item, name))
    return batch


def collate(samples: Sequence[Any], name: str) -> Batch:
    """Put samples together along a new first dimension, as torch's `default_collate` does.

    A list of numbers within a sample is one tensor of it; torch would transpose it.

    Args:
        samples: Each a tensor, an array, a number, or a tuple, list or mapping of these.
        name: What to call a sample in errors.

    Returns:
        The batch.

    Raises:
        DtypeError: If something in a sample is not a number or an array of numbers; names it.
        ShapeError: If the samples differ in form or shape.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        for number, sample in enumerate(samples):
            if not isinstance(sample, Mapping) or set(sample) != set(first):
                got = some(sorted(map(str, sample))) if isinstance(sample, Mapping) else type(sample).__name__
                raise ShapeError(
                    f"`{name}` must have the fields {some(list(map(str, first)))} in every sample, got {got} in "
                    f"sample {number} of a batch. Give every sample the same fields."
                )
        return {str(key): collate([sample[key] for sample in samples], f"{name}[{key!r}]") for key in first}
    if isinstance(first, (tuple, list)) and not holds_numbers(first):
        for number, sample in enumerate(samples):
            if not isinstance(sample, (tuple, list)) or len(sample) != len(first):
                raise ShapeError(
                    f"`{name}` must have {len(first)} parts in every sample, sample {number} of a batch has not. "
                    "Give every sample the same parts."
                )
        return tuple(collate([sample[i] for sample in samples], f"{name}[{i}]") for i in range(len(first)))
    return _stacked(samples, name)


def _stacked(values: Sequence[Any], name: str) -> Tensor:
    if all(type(value) in (bool, int, float) for value in values):
        floats = float in map(type, values)
        return torch.tensor(values, dtype=torch.float64) if floats else tensor_of_list(list(values), name)
    tensors = [value if isinstance(value, Tensor) else _tensor(value, name) for value in values]
    odd = next((tensor for tensor in tensors if tensor.shape != tensors[0].shape), None)
    if odd is not None:
        raise ShapeError(
            f"`{name}` must have one shape in all samples of a batch, got {list(tensors[0].shape)} and "
            f"{list(odd.shape)}. {PAD}"
        )
    return torch.stack(tensors)


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, (bool, int, float, complex)):
        return torch.tensor(value, dtype=torch.float64) if type(value) is float else tensor_of_list(value, name)
    if holds_numbers(value):
        return tensor_of_list(value, name)
    if is_of(value, "numpy", "ndarray"):
        return tensor_of(value, name)
    if is_of(value, "numpy", "generic") and value.dtype.kind in NUMBERS:
        return torch.as_tensor(value)
    if isinstance(value, (list, tuple, Mapping)):
        raise ShapeError(f"`{name}` must have one form in all samples of a batch, got a {type(value).__name__}. {PAD}")
    raise DtypeError(f"`{name}` must hold numbers, got {type(value).__name__}. {LEAVE_OUT}")
