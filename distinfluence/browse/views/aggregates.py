"""Influences on sets of test points: a range of them, or a class; and of classes on classes.

Only the rows of a set are read, a strip at a time. What would read more than 2 GiB is refused on the page, and a table
of classes on classes is estimated from strips that are spread over the matrix, unless all of them are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError, SettingError
from distinfluence.store import InfluenceResult
from distinfluence.store.read.analysis import strip_total

MAX_READ = 2**29  # entries of a set's rows, 2 GiB
SOON_READ = 2**26  # entries of the table of classes that are read unasked, 256 MiB
MAX_CLASSES = 256


@dataclass(frozen=True)
class Totals:
    """Holds the influence of each training point, added up over a set of test points.

    Attributes:
        values: [n_train], NaN where strips are missing.
        damaged: Strips whose bytes are not those that were written; their values are NaN, too.
    """

    values: NDArray[np.float64]
    damaged: list[int]


@dataclass(frozen=True)
class Classes:
    """Holds the classes of one axis.

    Attributes:
        labels: The labels, ascending.
        members: [n], the place of each point's class in `labels`.
    """

    labels: NDArray[Any]
    members: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Points of each class."""
        return np.bincount(self.members, minlength=self.labels.size)


@dataclass(frozen=True)
class ClassTable:
    """Holds the mean influence of a pair of points for each pair of classes.

    Attributes:
        values: [n_test_classes, n_train_classes], NaN where none was read.
        n_strips: How many strips were read, of all.
        damaged: Strips that could not be read.
    """

    values: NDArray[np.float64]
    n_strips: int
    damaged: list[int]


def classes_of(labels: NDArray[Any] | None) -> Classes | None:
    """Return the classes that labels name; None without labels, and for labels that are numbers rather than classes."""
    if labels is None or not np.isfinite(labels).all():
        return None
    found, members = np.unique(labels, return_inverse=True)
    return Classes(found, members.astype(np.int64)) if found.size <= MAX_CLASSES else None


def totals(result: InfluenceResult, tests: NDArray[np.int64]) -> Totals:
    """Add up each training point's influence on `tests` (ascending).

    Raises:
        SettingError: The sum reads too much.
    """
    if tests.size == result.layout.n_test:
        return Totals(result.train_total.astype(np.float64), [])
    chunk = result.layout.chunk_shape[0]
    n_read = np.unique(tests // chunk).size * chunk * result.layout.n_train
    if n_read > MAX_READ:
        raise SettingError(
            f"these {tests.size} test points need {n_read * 4 / 2**30:.1f} GiB to be read, more than the page does at "
            "once. Take fewer, or `top_of` in Python."
        )
    values, damaged = np.full(result.layout.n_train, np.nan), []
    for i in np.flatnonzero(result.finished_strips()).tolist():
        try:
            values[result.layout.strip_slice(i)] = strip_total(result, tests, i)
        except CorruptStoreError:
            damaged.append(i)
    return Totals(values, damaged)


def class_table(result: InfluenceResult, tests: Classes, trains: Classes, everything: bool) -> ClassTable:
    """Return the mean influence of each class of training points on each class of test points.

    Args:
        result: The result to read.
        tests: The classes of the test points.
        trains: The classes of the training points.
        everything: Read all strips; otherwise as many, spread over the matrix, as are read soon.
    """
    finished = np.flatnonzero(result.finished_strips())
    n_strips = max(1, SOON_READ // (result.layout.n_test * result.layout.strip))
    if not everything and finished.size > n_strips:
        finished = finished[np.unique(np.linspace(0, finished.size - 1, n_strips).round().astype(np.int64))]
    members = np.zeros((tests.labels.size, result.layout.n_test), np.float32)
    members[tests.members, np.arange(result.layout.n_test)] = 1.0
    total = np.zeros((tests.labels.size, trains.labels.size))
    counted, damaged = np.zeros(trains.labels.size), []
    for i in finished.tolist():
        columns = result.layout.strip_slice(i)
        try:
            sums = members @ result[:, columns]
        except CorruptStoreError:
            damaged.append(i)
            continue
        own = np.zeros((sums.shape[1], trains.labels.size))
        own[np.arange(sums.shape[1]), trains.members[columns]] = 1.0
        total += sums.astype(np.float64) @ own
        counted += own.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # a class without a strip that was read has no mean
        means = total / (tests.counts[:, np.newaxis] * counted)
    return ClassTable(means, finished.size - len(damaged), damaged)


def largest(values: NDArray[np.float64], among: NDArray[np.bool_], k: int) -> list[int]:
    """Return the places of the k largest finite values that are `among` these, the largest first; ties by place."""
    known = np.flatnonzero(among & np.isfinite(values))
    if known.size > k:
        known = known[np.argpartition(-values[known], k - 1)[:k]]
    chosen: list[int] = known[np.lexsort((known, -values[known]))].tolist()
    return chosen
