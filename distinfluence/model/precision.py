"""The dtypes that passes run in, and outputs widened from them."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16, torch.float32)


def as_array(tensor: Tensor) -> Tensor:
    """Return bfloat16 data as float32, which arrays in tasks hold instead: the same data fit the same models."""
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def widened_outputs(outputs: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors that a model returned: a tensor, or a tuple, list or dict of them.

    A dict keeps its type (transformers' outputs are dicts with attributes); it is the call's own, and changed in place.
    """
    if isinstance(outputs, Tensor):
        return outputs.to(dtype) if outputs.dtype in NARROW else outputs
    if isinstance(outputs, MutableMapping):
        for key, value in outputs.items():
            outputs[key] = widened_outputs(value, dtype)
        return outputs
    if type(outputs) in (tuple, list):
        return type(outputs)(widened_outputs(value, dtype) for value in outputs)
    return outputs
