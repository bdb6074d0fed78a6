"""Activation checkpoints of a model, taken away while it is differentiated with parameters that were passed in."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint as checkpointing

_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")  # what `checkpoint` calls
_PLAIN_LOCK = threading.Lock()
_PLAIN: dict[str, Any] = {"depth": 0, "own": {}}


class _PlainCall:
    """`CheckpointFunction` without the checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Call the function with its arguments."""
        return function(*args)


def _plain_generator(*args: Any, **kwargs: Any) -> Iterator[None]:
    """`checkpoint` advances it once before and once after the call of the function."""
    yield


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Run what a model gives to `torch.utils.checkpoint` as it is, and keep its activations.

    A checkpointed part runs a second time in the backward pass. It then takes the parameters that the module holds, not
    those that it was called with, and nothing is recorded. In a PyTorch that has other names inside, checkpoints stay.
    """
    plain = dict(zip(_CHECKPOINTS, (_plain_generator, _PlainCall), strict=True))
    with _PLAIN_LOCK:  # threads share the names: the first takes them away, the last puts them back
        if not _PLAIN["depth"]:
            _PLAIN["own"] = {name: getattr(checkpointing, name) for name in plain if hasattr(checkpointing, name)}
            for name in _PLAIN["own"]:
                setattr(checkpointing, name, plain[name])
        _PLAIN["depth"] += 1
    try:
        yield
    finally:
        with _PLAIN_LOCK:
            _PLAIN["depth"] -= 1
            if not _PLAIN["depth"]:
                for name, own in _PLAIN["own"].items():
                    setattr(checkpointing, name, own)
