"""What is asked of a result beyond its rows: columns, groups, tables. Whole matrices are read a strip at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import CorruptStoreError, IncompleteResultError, IndexRangeError, SettingError, ShapeError
from distinfluence.store.format.html import table_as_html
from distinfluence.store.format.layout import whole_number
from distinfluence.store.format.ranking import (
    End,
    Ranking,
    checked_index,
    empty_ranking,
    merge_harmful,
    merge_helpful,
    most_harmful,
    most_helpful,
    require_ranked,
)
from distinfluence.store.read.arrays import ResultArrays


class Grouped(NamedTuple):
    """Influences of groups of training points on groups of test points.

    Attributes:
        test_groups: The groups of test points, sorted.
        train_groups: The groups of training points, sorted.
        values: Mean or summed influences, [n_test_groups, n_train_groups] float64.
    """

    test_groups: NDArray[Any]
    train_groups: NDArray[Any]
    values: NDArray[np.float64]

    def _repr_html_(self) -> str:
        """Return the first groups of both axes as a table, for notebooks."""
        rows, columns = self.test_groups[:20].tolist(), self.train_groups[:20].tolist()
        cells = {str(group): self.values[:20, j].tolist() for j, group in enumerate(columns)}
        of = f"{self.test_groups.size} groups of test points, {self.train_groups.size} of training points"
        return table_as_html(of, {"test \\ train": rows, **cells})


def rank_column(result: ResultArrays, end: End, train_index: int, k: int | None) -> Ranking:
    """Rank the test points that a training point helps (top) or harms (bottom) most; k: 10 if None.

    Only one column is read.
    """
    require_ranked(result.layout, f"{end}_for_train")
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
    result: ResultArrays,
    test: ArrayLike | None,
    train: ArrayLike | None,
    how: Literal["mean", "sum"],
    partial: bool,
) -> Grouped:
    """Add up or average influences over groups; see `InfluenceResult.group`."""
    require_ranked(result.layout, "group")
    _check_how(how)
    _require_strips(result, "group", partial)
    test_groups, of_test = _groups("test", test, result.layout.n_test)
    train_groups, of_train = _groups("train", train, result.layout.n_train)
    total = np.zeros((test_groups.size, train_groups.size))
    counted = np.zeros(train_groups.size)
    for columns, values in strips(result):
        # points alone are their own groups: only axes that were asked for are summed
        by_test = values.astype(np.float64) if test is None else _summed(values, of_test)[1]
        present, sums = (np.arange(train_groups.size)[columns], by_test.T)
        if train is not None:
            present, sums = _summed(by_test.T, of_train[columns])
        total[:, present] += sums.T
        counted += np.bincount(of_train[columns], minlength=train_groups.size)
    if how == "mean":
        sizes = np.bincount(of_test, minlength=test_groups.size)
        with np.errstate(invalid="ignore", divide="ignore"):  # a group without a finished strip has no mean
            total /= sizes[:, np.newaxis] * counted
    return Grouped(test_groups, train_groups, total)


def _summed(values: NDArray[Any], groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the groups that have rows, sorted, and the sums of their rows.

    Args:
        values: [n, m].
        groups: The group of each row, [n].
    """
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    return present, np.add.reduceat(values[order], starts, axis=0, dtype=np.float64)


def _check_how(how: str) -> None:
    if how not in ("mean", "sum"):
        raise SettingError(f"`how` must be 'mean' or 'sum', got {how!r}.")


def _require_strips(result: ResultArrays, what: str, partial: bool) -> None:
    if result.n_missing and not partial:
        raise IncompleteResultError(
            f"`{what}` needs all strips, {result.n_missing} of {result.layout.n_strips} are missing. Finish the run, "
            "or pass partial=True for those that are there."
        )


def strips(result: ResultArrays) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield the finished strips, one by one: their columns, and their values [n_test, n]."""
    for i in np.flatnonzero(result.finished_strips()).tolist():
        columns = result.layout.strip_slice(i)
        yield columns, result[:, columns]


def rank_set(
    result: ResultArrays,
    end: End,
    tests: ArrayLike | slice,
    k: int | None,
    how: Literal["mean", "sum"],
    partial: bool,
) -> Ranking:
    """Rank the training points that help (top) or harm (bottom) test points most; see `InfluenceResult.top_of`."""
    require_ranked(result.layout, f"{end}_of")
    _check_how(how)
    rows = checked_rows(tests, result.layout.n_test)
    k = result.layout.k if k is None else whole_number("k", k)
    if k < 1:
        raise SettingError(f"`k` must be at least 1, got {k}. Leave it out for {result.layout.k}.")
    _require_strips(result, f"{end}_of", partial)
    rank, merge = (most_helpful, merge_helpful) if end == "top" else (most_harmful, merge_harmful)
    found = empty_ranking(1)
    for i in np.flatnonzero(result.finished_strips()).tolist():
        columns = result.layout.strip_slice(i)
        total = strip_total(result, rows, i) / (rows.size if how == "mean" else 1)
        points = np.arange(columns.start, columns.stop, dtype=np.int32)
        found = merge(found, rank(total.astype(np.float32)[np.newaxis], points, k), k)
    return Ranking(found.indices[0], found.values[0])


def strip_total(result: ResultArrays, rows: NDArray[np.int64], i: int) -> NDArray[np.float64]:
    """Return the influences of strip i's training points, added up over test points, [n].

    Raises:
        CorruptStoreError: The strip is damaged.
    """
    values = result.rows(rows, result.layout.strip_slice(i))
    if not np.isfinite(values).all():
        raise CorruptStoreError(f"strip {i} of {result.path} has missing values. See `damaged_strips`.")
    total: NDArray[np.float64] = values.sum(axis=0, dtype=np.float64)
    return total


def checked_rows(tests: ArrayLike | slice, n_test: int) -> NDArray[np.int64]:
    """Return the selected test points, sorted.

    Args:
        tests: A slice, indices, or a mask [n_test].
        n_test: How many test points there are.

    Raises:
        IndexRangeError: An index lies outside the axis, or no test point is selected.
        ShapeError: A mask has another length than the axis.
        SettingError: `tests` is not a slice, whole numbers or a mask.
    """
    if isinstance(tests, slice):
        rows = np.arange(n_test)[tests]
    else:
        array = np.atleast_1d(np.asarray(tests))
        if array.dtype == np.bool_:
            if array.shape != (n_test,):
                raise ShapeError(f"`tests` must be ({n_test},) as a mask, got {array.shape}. Pass one for each point.")
            rows = np.flatnonzero(array)
        elif array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
            raise SettingError(f"`tests` must be a slice, whole numbers or a mask, got {array.dtype} {array.shape}.")
        else:
            rows = np.unique([checked_index("tests", int(i), n_test) for i in array.tolist()]).astype(np.int64)
    if not rows.size:
        raise IndexRangeError("`tests` must name at least one test point, got none.")
    return rows


def _groups(axis: str, labels: ArrayLike | None, n: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    if labels is None:
        return np.arange(n), np.arange(n)
    array = np.asarray(labels)
    if array.shape != (n,):
        raise ShapeError(f"`{axis}` must be ({n},), the group of every {axis} point, got {array.shape}.")
    found, members = np.unique(array, return_inverse=True)
    return found, members.astype(np.int64)
