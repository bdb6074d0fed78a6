"""Equivalent ways of computing the same, and which of them a model can take."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Way = Callable[[Any], Tensor]


class Alternatives:
    """The choice among equivalent ways, made once for each quantity of a model.

    Attributes:
        timed: Whether `fastest` times the ways on the first chunk: for one process that does all of every sum. Where
            several work on one sum, it must not depend on which of them took which part.
        chosen: Quantity → number of the way that was chosen for it.
    """

    def __init__(
        self, device: torch.device, precise: Callable[[], AbstractContextManager[None]], timed: bool = False
    ) -> None:
        self._device, self._precise = device, precise
        self.timed = timed
        self.chosen: dict[str, int] = {}

    def choose(self, what: str, ways: Sequence[Way], small: Any) -> Way:
        """Return the first of equivalent ways that the model can take and that agrees with the last on `small`.

        The last way is plain autograd in a loop: what torch.func's transforms cannot take (some recurrent modules,
        data-dependent control flow, operators without a forward derivative) still gets the right answer. The choice
        is made once for each `what`; a batch that fails that way all the same takes the last.
        """
        if what not in self.chosen:
            self.chosen[what] = self._first_valid(ways, small)
        chosen = ways[self.chosen[what]]

        def careful(argument: Any) -> Tensor:
            # a single sample in the last batch: the squared error then has no forward derivative (torch 2.13)
            value, _ = attempt(chosen, argument)
            return ways[-1](argument) if value is None else value

        return ways[-1] if chosen is ways[-1] else careful

    def fastest(self, what: str, ways: Sequence[Way], small: Any, real: Any) -> Way:
        """As `choose`, but of the ways that agree with the last on `small` the one that takes least time on `real`.

        Measured once for each `what`, if they are timed; `real` should be a part of the work that takes some
        milliseconds. Earlier ways are preferred where times are within a tenth.
        """
        if what not in self.chosen and self.timed:
            self.chosen[what] = self._measured(ways, small, real)
        return self.choose(what, ways, small)

    def _measured(self, ways: Sequence[Way], small: Any, real: Any) -> int:
        with self._precise():
            expected, failure = attempt(ways[-1], small)
        best, least = len(ways) - 1, math.inf
        for index, way in enumerate(ways):
            with self._precise():
                value, _ = attempt(way, small)  # which also warms it up
            if value is None or (expected is not None and not agree(value, expected)):
                continue
            wait_for(self._device)
            start = time.perf_counter()
            done, _ = attempt(way, real)
            wait_for(self._device)
            seconds = time.perf_counter() - start
            if done is not None and seconds < 0.9 * least:
                best, least = index, seconds
        if failure is not None and not math.isfinite(least):
            raise failure
        return best

    def _first_valid(self, ways: Sequence[Way], small: Any) -> int:
        with self._precise():
            expected, failure = attempt(ways[-1], small)
            for index, way in enumerate(ways[:-1]):
                value, _ = attempt(way, small)
                if value is not None and (expected is None or agree(value, expected)):
                    return index
        if failure is not None:
            raise failure
        return len(ways) - 1


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given: it computes while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attempt(way: Way, argument: Any) -> tuple[Tensor | None, Exception | None]:
    """Return the result or the reason why there is none; running out of memory is no reason to try another way."""
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
