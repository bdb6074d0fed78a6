"""What a check with retraining looks at: some test points, some training points, their scores and retrained losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import IncompleteResultError, IndexRangeError, NonFiniteError, SettingError, ShapeError
from distinfluence.evaluate.retraining import Retrainer, Retraining
from distinfluence.evaluate.tiles import Scores
from distinfluence.store import InfluenceResult
from distinfluence.store.format.ranking import require_ranked

Chosen = int | Sequence[int] | None  # a number to draw, the indices themselves, or None for all


def check_chosen(name: str, chosen: object) -> None:
    """Check a choice of points as far as it can be checked without data.

    Args:
        name: The argument that the choice came from, for messages.
        chosen: How many points, which points, or None for all.

    Raises:
        SettingError: If `chosen` is neither a positive number nor distinct indices from 0.
    """
    if chosen is None:
        return
    try:
        values = np.asarray(chosen)
    except ValueError:  # rows of different lengths
        values = np.asarray("")
    if values.dtype.kind not in "iu" or values.ndim > 1 or not values.size:
        raise SettingError(f"`{name}` must be a number of points or a list of indices, got {chosen!r}.")
    if values.ndim == 0 and values < 1:
        raise SettingError(f"`{name}` must be at least 1 as a number of points, got {chosen}.")
    repeated, counts = np.unique(values, return_counts=True)
    if (counts > 1).any():
        raise SettingError(f"`{name}` must be distinct, got {int(repeated[counts > 1][0])} more than once.")


def check_seeds(seeds: Sequence[int]) -> None:
    """Check the seeds of retrainings.

    Args:
        seeds: The seeds.

    Raises:
        SettingError: If there is no seed, or one appears twice.
    """
    if not len(seeds) or len(set(seeds)) < len(seeds):
        raise SettingError(f"`seeds` must be at least one seed, each of them once, got {list(seeds)}.")


def chosen_indices(name: str, chosen: Chosen, n: int, seed: int) -> NDArray[np.int64]:
    """Return the points that a choice stands for, sorted.

    Args:
        name: The argument that the choice came from, for messages.
        chosen: How many points to draw, which points, or None for all. All if there are not more than were asked for.
        n: Number of points that there are.
        seed: Seed of the draw.

    Returns:
        Indices from 0 to n - 1.

    Raises:
        IndexRangeError: If an index lies outside.
    """
    if chosen is None:
        return np.arange(n)
    if np.ndim(chosen) == 0:
        return np.sort(np.random.default_rng(seed).permutation(n)[: int(np.asarray(chosen))])
    indices = np.sort(np.asarray(chosen, dtype=np.int64))
    if indices[0] < 0 or indices[-1] >= n:
        outside = int(indices[0] if indices[0] < 0 else indices[-1])
        raise IndexRangeError(f"`{name}` must be from 0 to {n - 1}, got {outside}.")
    return indices


def read_scores(
    influences: Scores,
    retrainer: Retrainer,
    queries: NDArray[np.int64],
    points: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Read the scores of some test points and some training points. Nothing else is read.

    Args:
        influences: Scores [n_test, n_train], or a result that holds them.
        retrainer: The retrainer whose data the scores are about.
        queries: Test points, sorted.
        points: Training points, sorted; None for all.

    Returns:
        The scores, [queries, points].

    Raises:
        ShapeError: If the scores are not about the data of the retrainer, or not one number for each pair of points.
        IncompleteResultError: If a strip that is needed is not written.
        NonFiniteError: If a score that is needed is not finite.
    """
    is_result = isinstance(influences, InfluenceResult)
    values: Any = influences if is_result or hasattr(influences, "shape") else np.asarray(influences)
    if is_result:
        require_ranked(values.layout, "influences")
    if tuple(values.shape) != (retrainer.n_test, retrainer.n_train):
        raise ShapeError(
            f"`influences` must be [{retrainer.n_test}, {retrainer.n_train}], test points × training points of the "
            f"retrainings, got {list(values.shape)}."
        )
    columns = np.arange(retrainer.n_train) if points is None else points
    tile = _from_result(values, queries, columns) if is_result else values[queries][:, columns]
    scores = np.asarray(tile, dtype=np.float64)
    if not np.isfinite(scores).all():
        row = int(queries[np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]])
        raise NonFiniteError(f"`influences` must be finite, got NaN or infinity for test point {row}.")
    return scores


def _from_result(result: InfluenceResult, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    tile = np.empty((rows.size, columns.size), dtype=np.float32)
    of_strip = columns // result.layout.strip
    finished = result.finished_strips()
    for i in np.unique(of_strip).tolist():
        if not finished[i]:
            raise IncompleteResultError(
                f"strip {i} of {result.path} is needed and not written yet. Resume the run and finish it."
            )
        own = of_strip == i
        first, last = int(columns[own][0]), int(columns[own][-1])
        tile[:, own] = result.rows(rows, slice(first, last + 1))[:, columns[own] - first]
    return tile


@dataclass(frozen=True)
class RetrainedLosses:
    """Losses of retrained models at some test points, by what they were trained on.

    Attributes:
        by_key: Key of each retraining → its losses, [q].
    """

    by_key: dict[str, NDArray[np.float64]]

    @classmethod
    def made(cls, retrainer: Retrainer, retrainings: list[Retraining], queries: NDArray[np.int64]) -> "RetrainedLosses":
        """Ask for the losses of all retrainings in one call, so that they can run in parallel.

        Args:
            retrainer: The retrainer.
            retrainings: The training runs.
            queries: The test points to keep.

        Returns:
            The losses.

        Raises:
            ShapeError: If the retrainer does not return one row for each retraining.
            NonFiniteError: If a loss is not finite, because a training run diverged.
        """
        losses = np.asarray(retrainer.losses(retrainings), dtype=np.float64)
        if losses.shape != (len(retrainings), retrainer.n_test):
            raise ShapeError(
                f"`losses` of the retrainer must be [{len(retrainings)}, {retrainer.n_test}], retrainings × test "
                f"points, got {list(losses.shape)}."
            )
        losses = losses[:, queries]
        finite = np.atleast_1d(np.isfinite(losses).all(axis=1))
        if not finite.all():
            first = retrainings[int(np.flatnonzero(~finite)[0])]
            raise NonFiniteError(
                f"`losses` of the retrainer must be finite, got NaN or infinity for {int((~finite).sum())} of "
                f"{len(finite)} retrained models, the first of them from seed {first.seed} on {first.indices.size} of "
                f"{first.weights.size} training points. If training diverges, take a smaller learning rate."
            )
        return cls({each.key: row for each, row in zip(retrainings, losses, strict=True)})

    def of(self, weights: NDArray[np.float64], seeds: Sequence[int]) -> NDArray[np.float64]:
        """Return the losses of one weighting from each seed.

        Args:
            weights: The weights of the training points, [n_train].
            seeds: The seeds, r of them.

        Returns:
            The losses, [q, r].
        """
        return np.stack([self.by_key[Retraining(weights, seed).key] for seed in seeds], axis=1)


def distinct_retrainings(weights: list[NDArray[np.float64]], seeds: Sequence[int]) -> list[Retraining]:
    """List the training runs of each weighting from each seed, equal ones once.

    Args:
        weights: Weightings of the training points, [n_train] each.
        seeds: The seeds.

    Returns:
        The runs, all seeds of the first weighting first.
    """
    runs = [Retraining(each, seed) for each in weights for seed in seeds]
    return list({run.key: run for run in runs}.values())
