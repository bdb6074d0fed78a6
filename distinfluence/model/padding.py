"""Rows of embeddings that get no gradient by definition, held fixed in forward derivatives, too."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class HeldPadding(TorchFunctionMode):
    """Treats the row of `padding_idx` that an embedding looks up as a constant.

    PyTorch's reverse derivative leaves it out and its forward derivative does not: a matrix of second derivatives, or
    Jᵀ H J, would not be symmetric. What else uses the row, such as a tied head, is left as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let an embedding take a weight whose row has no derivative."""
        if func is not F.embedding:
            return func(*args, **(kwargs or {}))
        return _embedding(*args, **(kwargs or {}))


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **options: Any) -> Tensor:
    if padding_idx is None:
        return F.embedding(input, weight, None, *args, **options)
    held = torch.zeros(weight.shape[0], 1, dtype=torch.bool, device=weight.device)
    held[padding_idx] = True
    return F.embedding(input, torch.where(held, weight.detach(), weight), None, *args, **options)
