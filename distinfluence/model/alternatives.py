"""Equivalent ways of computing the same, and which of them a model can take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Way = Callable[[Any], Tensor]


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given: it computes while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attempt(way: Way, argument: Any) -> tuple[Tensor | None, Exception | None]:
    """The result or the reason why there is none; running out of memory is no reason to try another way."""
    try:
        return way(argument), None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises under a transform; the last way's error is raised again
        return None, error


def agree(value: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of two orders of evaluation: 10·√eps of the norm, and absolutely to eps."""
    eps = torch.finfo(expected.dtype).eps
    allowed = 10 * eps**0.5 * float(expected.norm()) + eps * expected.numel() ** 0.5
    return bool((value - expected).norm() <= allowed)
