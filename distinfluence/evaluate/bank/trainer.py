"""What trains a model again: what a bank calls, and what is checked of it before anything runs."""

import inspect
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import cloudpickle
import numpy as np
from torch import nn

from distinfluence.errors import SettingError
from distinfluence.evaluate.retraining import Retraining
from distinfluence.store.format.layout import whole_number

Trainer = Callable[..., nn.Module]  # Of (indices, seed), and of a keyword `weights` if it can train weighted.


@runtime_checkable
class TrainsMany(Protocol):
    """A trainer that trains up to `at_once` models together."""

    at_once: int

    def train_many(self, retrainings: Sequence[Retraining]) -> Sequence[nn.Module]:
        """Return the trained models."""


def takes_weights(train: object) -> bool:
    """Say whether a trainer takes weights. Raises SettingError if it cannot be called as trainers are."""
    if isinstance(train, (type, nn.Module)) or not callable(train):
        what = f"the class {train.__name__}" if isinstance(train, type) else f"a {type(train).__name__}"
        raise SettingError(
            f"`train` must be a callable of (indices, seed) that returns a trained model, got {what}. Write "
            "`def train(indices, seed): …`."
        )
    try:
        signature = inspect.signature(train)
    except (TypeError, ValueError):  # of a callable that is not Python's
        return False
    weighted = "weights" in signature.parameters
    try:
        signature.bind(np.zeros(1, dtype=np.int64), 0, **({"weights": np.ones(1)} if weighted else {}))
    except TypeError as error:
        name = getattr(train, "__qualname__", type(train).__qualname__)
        raise SettingError(
            f"`train` must be a callable of (indices, seed), got {name}{signature}: {error}. Write "
            "`def train(indices, seed): …`."
        ) from None
    return weighted


def check_travels(train: object) -> None:
    """Raise SettingError if a trainer cannot be sent to workers."""
    try:
        cloudpickle.dumps(train)
    except Exception as error:
        raise SettingError(
            f"`train` must be picklable to be sent to workers, got a {type(train).__name__}: {error}. Open files, "
            "locks and connections inside the call."
        ) from error


def at_once(train: object) -> int:
    """Return how many models one task trains."""
    if not isinstance(train, TrainsMany):
        return 1
    n = whole_number("train.at_once", train.at_once)
    if n < 1:
        raise SettingError(f"`train.at_once` must be at least 1, got {n}. Set it to the models that fit in memory.")
    return n
