"""The ranking of one test point: as it is stored, folded from the strips of a running result, or from the whole row."""

from __future__ import annotations

import numpy as np

from distinfluence.errors import CorruptStoreError, IncompleteResultError, SettingError
from distinfluence.store.format.layout import whole_number
from distinfluence.store.format.ranking import (
    End,
    Ranking,
    checked_index,
    is_ranking,
    most_harmful,
    most_helpful,
    require_ranked,
)
from distinfluence.store.read.arrays import ResultArrays


def rank_row(result: ResultArrays, end: End, test_index: int, k: int | None, partial: bool) -> Ranking:
    """Rank the training points that help (top) or harm (bottom) a test point most; see `InfluenceResult.top`."""
    require_ranked(result.layout, end)
    row = checked_index("test_index", test_index, result.layout.n_test)
    k = result.layout.k if k is None else whole_number("k", k)
    if k < 1:
        raise SettingError(f"`k` must be at least 1, got {k}. Leave it out for what is stored ({result.layout.k}).")
    if result.complete and k <= result.layout.k:
        return _stored_ranking(result, end, row, k)
    if not result.complete and not partial:
        raise IncompleteResultError(
            f"`{end}` needs a complete result, got {result.layout.n_strips - result.n_missing} of "
            f"{result.layout.n_strips} strips. Resume the run and finish it, or pass partial=True to rank the "
            "finished strips."
        )
    if k <= result.layout.strip_k or result.layout.strip_k == result.layout.strip:
        return _folded_ranking(result, end, row, k)
    return _ranked_values(result, end, row, k)


def _folded_ranking(result: ResultArrays, end: End, row: int, k: int) -> Ranking:
    """Rank from the rankings of the finished strips, a few hundredths of the row's bytes."""
    # the marks are read before the rankings, as in `_ranked_values`
    finished = np.flatnonzero(result.finished_strips())
    side = 0 if end == "top" else 1
    indices, values = (result.read(f"strips/{name}", (slice(None), side, row)) for name in ("index", "value"))
    for i in finished.tolist():
        columns = result.layout.strip_slice(i)
        width = min(result.layout.strip_k, columns.stop - columns.start)
        if not is_ranking(Ranking(indices[i, :width], values[i, :width]), columns):
            return _ranked_values(result, end, row, k)
    there = indices[finished] >= 0  # a last strip may be narrower
    rank = most_helpful if end == "top" else most_harmful
    ranking = rank(values[finished][there][np.newaxis], indices[finished][there], k)
    return Ranking(ranking.indices[0], ranking.values[0])


def _stored_ranking(result: ResultArrays, end: End, row: int, k: int) -> Ranking:
    ranking = Ranking(result.read(f"{end}_index", row)[:k], result.read(f"{end}_value", row)[:k])
    if not is_ranking(ranking, slice(0, result.layout.n_train)):
        raise CorruptStoreError(
            f"the ranking `{end}` of test point {row} in {result.path} is missing or damaged, expected training "
            f"points 0 to {result.layout.n_train - 1} with finite influences. `reopen` a strip and finish again."
        )
    return ranking


def _ranked_values(result: ResultArrays, end: End, row: int, k: int) -> Ranking:
    # The marks are read before the row: a strip that is marked then has its values in the row read afterwards.
    points = np.flatnonzero(np.repeat(result.finished_strips(), result.layout.strip)[: result.layout.n_train])
    values = result.read("influences", row)[points]
    if not np.isfinite(values).all():
        raise CorruptStoreError(
            f"test point {row} of {result.path} has missing values in finished strips. See "
            "`damaged_strips`, and `reopen` those."
        )
    rank = most_helpful if end == "top" else most_harmful
    ranking = rank(values[np.newaxis], points.astype(np.int32), k)
    return Ranking(ranking.indices[0], ranking.values[0])
