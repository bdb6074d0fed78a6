"""Only the scores that a check looks at are read, also of a result on disk that is not finished."""

from pathlib import Path

import numpy as np
import pytest

from distinfluence.errors import IncompleteResultError, NonFiniteError, ShapeError
from distinfluence.evaluate import LeaveOneOut, QueryLossDifference, Retraining
from distinfluence.evaluate.checks.score_tiles import read_scores
from distinfluence.store import InfluenceResult, InfluenceWriter, Layout, open_influences
from tests.store.conftest import ATTRIBUTES, matrix, write_all

LAYOUT = Layout(n_test=5, n_train=23, strip=8, top_k=4)
VALUES = matrix(LAYOUT)


class Linear:
    """A retrainer whose losses are what the scores in VALUES say: minus the summed scores of the points that it has."""

    n_train, n_test = 23, 5

    def losses(self, retrainings: list[Retraining]) -> np.ndarray:
        return -np.stack([each.weights for each in retrainings]) @ VALUES.T.astype(np.float64)


def written(path: Path, skip: tuple[int, ...] = (), layout: Layout = LAYOUT) -> InfluenceResult:
    writer = InfluenceWriter.create(path / "result.zarr", layout, ATTRIBUTES)
    write_all(writer, VALUES if layout is LAYOUT else matrix(layout), skip)
    if not skip:
        writer.finish()
    return open_influences(path / "result.zarr")


@pytest.mark.parametrize("rows", [[0, 3], [2, 3], [4]])
@pytest.mark.parametrize("columns", [None, [1, 7, 8, 22], [10]])
def test_a_result_has_the_scores_of_its_matrix(tmp_path: Path, rows: list[int], columns: list[int] | None) -> None:
    result = written(tmp_path)
    points = None if columns is None else np.array(columns)
    expected = VALUES[rows] if columns is None else VALUES[np.ix_(rows, columns)]
    for scores in (result, VALUES, VALUES.tolist()):
        np.testing.assert_array_equal(read_scores(scores, Linear(), np.array(rows), points), expected)


def test_strips_that_are_not_needed_are_not_read_and_need_not_be_there(tmp_path: Path) -> None:
    result = written(tmp_path, skip=(1,))
    before = result.bytes_read
    read_scores(result, Linear(), np.array([0]), np.array([2, 20]))
    few = result.bytes_read - before
    (tmp_path / "whole").mkdir()
    whole = written(tmp_path / "whole")
    before = whole.bytes_read
    read_scores(whole, Linear(), np.array([0]))
    assert few < whole.bytes_read - before
    with pytest.raises(IncompleteResultError, match="strip 1 of .* is needed and not written yet"):
        read_scores(result, Linear(), np.array([0]), np.array([2, 8]))


def test_checks_take_a_result_in_place_of_an_array(tmp_path: Path) -> None:
    result = written(tmp_path)
    removal = QueryLossDifference(fractions=(0.2,), queries=None, seeds=(0,))
    (from_result,), (from_array,) = (removal.measure("", each, Linear()) for each in (result, VALUES))
    assert from_result.figure == from_array.figure
    assert from_result.figure.value > 0
    effects = LeaveOneOut(points=6, queries=None, seeds=(0,)).measure("", result, Linear())
    np.testing.assert_allclose(effects.measured[..., 0], 23 * effects.predicted, atol=1e-12)
    assert effects.figures[0].value == pytest.approx(1)
    assert effects.figures[1].value == pytest.approx(23)


def test_results_of_inputs_or_of_other_data_are_named(tmp_path: Path) -> None:
    inputs = written(tmp_path, layout=Layout(n_test=5, n_train=23, strip=8, top_k=4, input_shape=(2,)))
    with pytest.raises(ShapeError, match="one number per pair of points"):
        read_scores(inputs, Linear(), np.array([0]))
    (tmp_path / "other").mkdir()
    other = Layout(n_test=4, n_train=23, strip=8, top_k=4)
    with pytest.raises(ShapeError, match=r"`influences` must be \[5, 23\].* got \[4, 23\]"):
        read_scores(written(tmp_path / "other", layout=other), Linear(), np.array([0]))
    with pytest.raises(NonFiniteError, match="for test point 3"):
        read_scores(np.where(np.arange(5)[:, None] == 3, np.nan, VALUES), Linear(), np.array([2, 3]))
