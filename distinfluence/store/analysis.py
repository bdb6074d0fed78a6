"""What is asked of a result beyond its rows: columns, groups, tables. Whole matrices are read a strip at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import CorruptStoreError, IncompleteResultError, IndexRangeError, SettingError, ShapeError
from distinfluence.store.layout import whole_number
from distinfluence.store.ranking import Ranking, most_harmful, most_helpful

if TYPE_CHECKING:
    from distinfluence.store.result import InfluenceResult


class Grouped(NamedTuple):
    """Influences of groups on groups. values: [n_test_groups, n_train_groups] float64; the groups are sorted."""

    test_groups: NDArray[Any]
    train_groups: NDArray[Any]
    values: NDArray[np.float64]


def rank_column(result: InfluenceResult, end: Literal["top", "bottom"], train_index: int, k: int | None) -> Ranking:
    """The test points that a training point helps (top) or harms (bottom) most; k: 10 if None. Reads one column."""
    require_ranked(result, f"{end}_for_train")
    j = checked_index("train_index", train_index, result.layout.n_train)
    k = 10 if k is None else whole_number("k", k)
    if k < 1:
        raise SettingError(f"`k` must be at least 1, got {k}. Leave it out for 10.")
    strip = j // result.layout.strip
    if not result.finished_strips()[strip]:
        raise IncompleteResultError(
            f"training point {j} lies in strip {strip}, which is not written yet. Resume the run and finish it."
        )
    values = result[:, j]
    if not np.isfinite(values).all():
        raise CorruptStoreError(f"training point {j} of {result.path} has missing values. See `damaged_strips`.")
    rank = most_helpful if end == "top" else most_harmful
    found = rank(values[np.newaxis], np.arange(result.layout.n_test, dtype=np.int32), k)
    return Ranking(found.indices[0], found.values[0])


def group(
    result: InfluenceResult,
    test: ArrayLike | None,
    train: ArrayLike | None,
    how: Literal["mean", "sum"],
    partial: bool,
) -> Grouped:
    """Influences added up, or averaged, over groups; see `InfluenceResult.group`."""
    require_ranked(result, "group")
    if how not in ("mean", "sum"):
        raise SettingError(f"`how` must be 'mean' or 'sum', got {how!r}.")
    if result.n_missing and not partial:
        raise IncompleteResultError(
            f"`group` needs all strips, {result.n_missing} of {result.layout.n_strips} are missing. Finish the run, or "
            "pass partial=True for those that are there."
        )
    test_groups, of_test = _groups("test", test, result.layout.n_test)
    train_groups, of_train = _groups("train", train, result.layout.n_train)
    members = np.zeros((test_groups.size, result.layout.n_test))
    members[of_test, np.arange(result.layout.n_test)] = 1.0
    total = np.zeros((test_groups.size, train_groups.size))
    counted = np.zeros(train_groups.size)
    for columns, values in strips(result):
        np.add.at(total.T, of_train[columns], (members @ values.astype(np.float64)).T)
        np.add.at(counted, of_train[columns], 1.0)
    if how == "mean":
        with np.errstate(invalid="ignore", divide="ignore"):  # a group without a finished strip has no mean
            total /= members.sum(axis=1)[:, np.newaxis] * counted
    return Grouped(test_groups, train_groups, total)


def strips(result: InfluenceResult) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The finished strips, one by one: their columns, and their values [n_test, n]."""
    for i in np.flatnonzero(result.finished_strips()).tolist():
        columns = result.layout.strip_slice(i)
        yield columns, result[:, columns]


def ranking_table(
    result: InfluenceResult, rows: NDArray[np.int64] | None, k: int | None, partial: bool
) -> dict[str, NDArray[Any]]:
    """The most helpful and most harmful training points of test points as columns of equal length.

    rows: test points, all if None. Columns: test, rank (from 1), end ("helpful" or "harmful"), train, influence.
    """
    require_ranked(result, "to_dataframe")
    rows = np.arange(result.layout.n_test) if rows is None else rows
    parts: list[tuple[Any, ...]] = []
    for end, name in (("top", "helpful"), ("bottom", "harmful")):
        for row in rows.tolist():
            ranking = result.top(row, k, partial=partial) if end == "top" else result.bottom(row, k, partial=partial)
            n = ranking.indices.size
            parts.append((np.full(n, row), np.arange(1, n + 1), np.full(n, name), ranking.indices, ranking.values))
    names = ("test", "rank", "end", "train", "influence")
    table = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
    order = np.lexsort((table["rank"], table["end"] != "helpful", table["test"]))
    return {name: values[order] for name, values in table.items()}


def require_ranked(result: InfluenceResult, what: str) -> None:
    """Pass for one number per pair of points. Raises ShapeError for influences of inputs."""
    if not result.layout.ranked:
        raise ShapeError(
            f"`{what}` wants one number per pair of points, got perturbation influences of inputs "
            f"{result.layout.input_shape}. Reduce them first, for example by their norm over the input."
        )


def checked_index(name: str, index: int, n: int) -> int:
    """`index` from 0 to n - 1, negative ones counted from the end. Raises IndexRangeError."""
    index = whole_number(name, index)
    if not -n <= index < n:
        axis = name.partition("_")[0]
        raise IndexRangeError(f"`{name}` must be from {-n} to {n - 1}, got {index}. There are {n} {axis} points.")
    return index % n


def is_ranking(ranking: Ranking, columns: slice) -> bool:
    """Whether it names training points of `columns` only, with finite influences: what a missing chunk does not."""
    inside = (ranking.indices >= columns.start) & (ranking.indices < columns.stop)
    return bool(inside.all() and np.isfinite(ranking.values).all())


def _groups(axis: str, labels: ArrayLike | None, n: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    if labels is None:
        return np.arange(n), np.arange(n)
    array = np.asarray(labels)
    if array.shape != (n,):
        raise ShapeError(f"`{axis}` must be ({n},), the group of every {axis} point, got {array.shape}.")
    found, members = np.unique(array, return_inverse=True)
    return found, members.astype(np.int64)
