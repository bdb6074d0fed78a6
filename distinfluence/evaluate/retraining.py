"""What is trained again: on which training points, with which weights, from which seed."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import SettingError


@dataclass(frozen=True, eq=False)
class Retraining:
    """One training run.

    Attributes:
        weights: Weight of each training point in the training loss, [n_train] float64; 0 leaves it out, 1 is as given.
        seed: Seed of the initial parameters and of the order of the data.
    """

    weights: NDArray[np.float64]
    seed: int

    @property
    def indices(self) -> NDArray[np.int64]:
        """The training points that take part, ascending, [n]."""
        return np.flatnonzero(self.weights).astype(np.int64)

    @property
    def is_weighted(self) -> bool:
        """Whether a weight is neither 0 nor 1, which a trainer has to know about."""
        return bool(((self.weights != 0) & (self.weights != 1)).any())

    @property
    def key(self) -> str:
        """The sha256 of weights and seed: equal for equal retrainings, wherever they were asked for."""
        content = np.ascontiguousarray(self.weights, dtype="<f8").tobytes() + str(int(self.seed)).encode()
        return hashlib.sha256(content).hexdigest()


class Retrainer(Protocol):
    """What checks need of a `RetrainingBank`: losses of retrained models, made once and kept.

    Attributes:
        n_train: Number of training points.
        n_test: Number of test points.
    """

    n_train: int
    n_test: int

    def losses(self, retrainings: "list[Retraining]") -> NDArray[np.float64]:
        """Return what each retrained model makes of the test points, training those that are not there yet.

        Args:
            retrainings: The training runs, r of them.

        Returns:
            The losses, [r, n_test].
        """


def random_subsets(n_train: int, n_subsets: int, *, fraction: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Draw subsets of the training set, each of the same size.

    Args:
        n_train: Number of training points.
        n_subsets: Number of subsets.
        fraction: Part of the training set that a subset holds, 0 < fraction < 1.
        seed: Seed of the draw.

    Returns:
        Which points each subset holds, [n_subsets, n_train] bool.

    Raises:
        SettingError: If there are no subsets, or a subset would hold no point or all of them.
    """
    size = round(n_train * fraction)
    if n_subsets < 1 or not 0 < size < n_train:
        raise SettingError(
            f"`fraction` must leave points in and out of each of at least 1 subset, got fraction={fraction} of "
            f"{n_train} points and n_subsets={n_subsets}. Take a fraction such as 0.5."
        )
    generator = np.random.default_rng(seed)
    members = np.zeros((n_subsets, n_train), dtype=bool)
    for row in members:
        row[generator.permutation(n_train)[:size]] = True
    return members


def retrainings_of(subsets: ArrayLike, seeds: "list[int]") -> list[Retraining]:
    """List the training runs of each subset from each seed.

    Args:
        subsets: Which points each subset holds, [s, n_train] bool.
        seeds: The seeds, r of them.

    Returns:
        The s·r runs, all seeds of the first subset first.
    """
    rows = (row.astype(np.float64) for row in np.asarray(subsets, dtype=bool))
    return [Retraining(row, seed) for row in rows for seed in seeds]  # seeds share the weights of their subset
