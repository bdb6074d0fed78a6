"""Scores on disk give the same figures as arrays, each chunk is read once, and never much at a time."""

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from distinfluence.errors import IncompleteResultError, IndexRangeError, NonFiniteError
from distinfluence.evaluate import linear_datamodeling_score, planted_recall, rank_agreement, tiles
from distinfluence.evaluate.tiles import ScoreMatrix, checked_points, row_panels
from distinfluence.store import InfluenceResult, InfluenceWriter, Layout, open_influences

LAYOUT = Layout(n_test=5, n_train=23, strip=8, top_k=4)
VALUES = np.random.default_rng(0).standard_normal(LAYOUT.shape).astype(np.float32)
SUBSETS = np.random.default_rng(1).random((12, 23)) < 0.5


class Counted:
    """An array of chunks of 2 rows and 4 columns that notes what is read."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values, self.shape, self.chunks = values, values.shape, (2, 4)
        self.reads: list[tuple[slice, slice]] = []

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[Any]:
        self.reads.append(key)
        return self.values[key]


def result(path: Path, skip: tuple[int, ...] = ()) -> InfluenceResult:
    writer = InfluenceWriter.create(path, LAYOUT, {})
    for i in set(range(LAYOUT.n_strips)) - set(skip):
        columns = LAYOUT.strip_slice(i)
        points = np.ones(columns.stop - columns.start)
        writer.write_strip(i, VALUES[:, columns], loss=points, gradient_norm=points)
    if not skip:
        writer.finish()
    return open_influences(path)


def test_scores_may_be_wherever_they_are(tmp_path: Path) -> None:
    stored = result(tmp_path / "result.zarr")
    outcomes = SUBSETS @ VALUES.astype(np.float64).T + np.random.default_rng(2).normal(size=(12, 5))
    expected = linear_datamodeling_score(VALUES, SUBSETS, outcomes, n_draws=5)
    lazy = da.from_array(VALUES, chunks=((3, 2), (9, 9, 5)))
    for each in (stored, stored.influences, lazy, torch.from_numpy(VALUES), VALUES.tolist()):
        found = linear_datamodeling_score(each, SUBSETS, outcomes, n_draws=5)
        np.testing.assert_array_equal(found.correlations.draws, expected.correlations.draws)
    (agreement,) = rank_agreement({"stored": stored, "array": VALUES}, k=4, n_draws=5)
    np.testing.assert_allclose(agreement.correlation.values, 1)
    best = {query: [int(VALUES[query].argmax())] for query in range(5)}
    assert (planted_recall(stored, best, n_draws=5).recall.values == 1).all()


def test_columns_are_read_once_a_chunk_or_more_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 41)  # room for two chunks of 5 × 4
    counted = Counted(VALUES)
    totals = ScoreMatrix(counted, "influences").totals(SUBSETS)
    np.testing.assert_allclose(totals, VALUES.astype(np.float64) @ SUBSETS.T, rtol=1e-12)
    assert [columns for _, columns in counted.reads] == [slice(0, 8), slice(8, 16), slice(16, 23)]


def test_a_strip_of_a_result_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 1)
    stored, counted = result(tmp_path / "result.zarr"), Counted(VALUES)
    monkeypatch.setattr(InfluenceResult, "__getitem__", lambda _, key: counted[key])
    ScoreMatrix(stored, "influences").totals(SUBSETS)
    assert [columns for _, columns in counted.reads] == [slice(0, 8), slice(8, 16), slice(16, 23)]


def test_rows_are_read_a_chunk_at_a_time_and_handed_on_in_small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 46)  # room for one row of each of two matrices
    one, other = Counted(VALUES), Counted(-VALUES)
    panels = list(row_panels([ScoreMatrix(one, "one"), ScoreMatrix(other, "other")]))
    assert [rows for rows, _ in one.reads] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert one.reads == other.reads and [rows.start for rows, _ in panels] == list(range(5))
    np.testing.assert_array_equal(np.concatenate([values for _, (values, _) in panels]), VALUES)


def test_an_incomplete_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteResultError, match=r"`influences` must be a complete result, 1 of 3 strips"):
        linear_datamodeling_score(result(tmp_path / "result.zarr", skip=(1,)), SUBSETS, np.zeros((12, 5)))


def test_a_bad_number_anywhere_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 1)
    stored = zarr.create_array(str(tmp_path / "some.zarr"), shape=(5, 23), chunks=(5, 4), dtype="float32")
    bad = VALUES.copy()
    bad[4, 22] = np.nan
    stored[:] = bad
    with pytest.raises(NonFiniteError, match="`influences` must be finite"):
        linear_datamodeling_score(stored, SUBSETS, np.zeros((12, 5)))
    with pytest.raises(NonFiniteError, match=r"`influences\['bad'\]` must be finite"):
        rank_agreement({"good": VALUES, "bad": bad})


@pytest.mark.parametrize("points", [[-1], [0, 23], [0.5], [[1, 2]], ["one"]])
def test_indices_that_are_none_are_refused(points: Any) -> None:
    with pytest.raises(IndexRangeError, match="`planted` must be whole numbers from 0 to 22"):
        checked_points("planted", points, 23)
