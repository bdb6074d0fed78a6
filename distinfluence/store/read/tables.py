"""Rankings and entries as tables: columns of equal length, with what is known of the points next to each line."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.store.format.ranking import End, require_ranked
from distinfluence.store.read.annotations import StoredPoints
from distinfluence.store.read.arrays import ResultArrays
from distinfluence.store.read.row_ranking import rank_row

Table = dict[str, NDArray[Any]]


class KnownPoints:
    """What is known of all points, read once, to stand next to the lines of tables."""

    def __init__(self, result: ResultArrays) -> None:
        self._bound = result.read("error_bound").astype(np.float64)
        self._norm = result.read("train_gradient_norm").astype(np.float64)
        self._columns: dict[str, tuple[str, NDArray[Any]]] = {}
        for axis in ("test", "train"):
            points = result.points(axis)
            labels, ids = points.labels(), points.ids()
            if ids is not None:
                self._columns[f"{axis}_id"] = axis, ids
            if labels is not None:
                self._columns[f"{axis}_label"] = axis, _names(points, labels)

    def beside(self, table: Table) -> Table:
        """Return the table with its `bound` (NaN where there is none), and ids and names of labels where known.

        Args:
            table: Columns test, train and influence; the added bound says by how much the influence may be wrong.
        """
        bound = (self._bound[table["test"]] * self._norm[table["train"]]).astype(np.float32)
        known = {name: values[table[axis]] for name, (axis, values) in self._columns.items()}
        return {**table, "bound": bound, **known}


def ranking_table(
    result: ResultArrays,
    rows: NDArray[np.int64] | None,
    k: int | None,
    partial: bool,
    known: KnownPoints | None = None,
) -> Table:
    """Return the most helpful and most harmful training points of test points as columns of equal length.

    Columns: test, rank (from 1), end ("helpful" or "harmful"), train, influence, and what `KnownPoints.beside` adds.

    Args:
        result: The result to read.
        rows: Test points, all if None.
        k: How many training points at each end; the result's own k if None.
        partial: Whether a result that is not complete is ranked, too.
        known: The known points, if they are made already.
    """
    require_ranked(result.layout, "to_dataframe")
    rows = np.arange(result.layout.n_test) if rows is None else rows
    parts: list[tuple[Any, ...]] = []
    ends: dict[End, str] = {"top": "helpful", "bottom": "harmful"}
    for end, name in ends.items():
        for row in rows.tolist():
            ranking = rank_row(result, end, row, k, partial)
            n = ranking.indices.size
            parts.append((np.full(n, row), np.arange(1, n + 1), np.full(n, name), ranking.indices, ranking.values))
    names = ("test", "rank", "end", "train", "influence")
    table = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
    order = np.lexsort((table["rank"], table["end"] != "helpful", table["test"]))
    return (known or KnownPoints(result)).beside({name: values[order] for name, values in table.items()})


def _names(points: StoredPoints, labels: NDArray[Any]) -> NDArray[Any]:
    values, places = np.unique(labels, return_inverse=True)
    return np.array([points.name_of(float(value)) for value in values], dtype=object)[places]
