import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from distinfluence.browse.views.convergence import worst_rows
from distinfluence.errors import (
    CorruptStoreError,
    IncompleteResultError,
    IndexRangeError,
    MissingDependencyError,
    SettingError,
    ShapeError,
)
from distinfluence.store import InfluenceWriter, Layout, open_influences
from distinfluence.store.read.facts import how_solved

from .conftest import matrix, write_all


def reference(row: Any, end: Any, k: Any, points: Any = None) -> Any:
    """[(index, value)] by a plain Python sort; ties by index."""
    points = range(len(row)) if points is None else points
    sign = -1 if end == "top" else 1
    order = sorted(points, key=lambda j: (sign * float(row[j]), j))[:k]
    return order, [float(row[j]) for j in order]


def assert_ranked(ranking: Any, expected: Any) -> None:
    assert ranking.indices.tolist() == expected[0]
    assert ranking.values.tolist() == expected[1]
    assert (ranking.indices.dtype, ranking.values.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("k", [None, 1, 3, 4, 5, 8, 9, 23, 100])
def test_rankings_equal_a_sort(make: Any, layout: Any, end: Any, k: Any) -> None:
    writer, values = make(layout)
    result = open_influences(writer.path)
    for i in range(5):
        assert_ranked(getattr(result, end)(i, k), reference(values[i], end, 4 if k is None else k))


@pytest.mark.parametrize("top_k", [1, 3, 8, 9, 23, 1000])
@pytest.mark.parametrize("strip", [1, 5, 8, 23])
def test_rankings_do_not_depend_on_the_cut_even_among_ties(tmp_path: Path, top_k: Any, strip: Any) -> None:
    layout = Layout(n_test=4, n_train=23, strip=strip, top_k=top_k)
    values = np.random.default_rng(1).integers(-2, 3, layout.shape).astype(np.float32)
    values[0] = 0
    values[1, ::2] = -0.0
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, values)
    writer.finish()
    result = open_influences(tmp_path / "r")
    for i in range(4):
        assert_ranked(result.top(i), reference(values[i], "top", top_k))
        assert_ranked(result.bottom(i), reference(values[i], "bottom", top_k))
        assert_ranked(result.top(i, 23), reference(values[i], "top", 23))


def test_extreme_floats_rank_in_order(tmp_path: Path) -> None:
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    row = np.float32([0, tiny, -tiny, huge, -huge, 1, -1, -0.0])
    writer = InfluenceWriter.create(tmp_path / "r", Layout(1, 8, 4), {})
    write_all(writer, row[np.newaxis])
    writer.finish()
    assert_ranked(open_influences(tmp_path / "r").top(0), reference(row, "top", 8))
    assert_ranked(open_influences(tmp_path / "r").bottom(0), reference(row, "bottom", 8))


def test_large_strips_are_ranked_in_blocks(tmp_path: Path) -> None:
    layout = Layout(n_test=1500, n_train=2000, strip=2000, top_k=5)
    values = matrix(layout)
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, values)
    writer.finish()
    np.testing.assert_array_equal(writer._array("top_index")[:], np.argsort(-values, axis=1, kind="stable")[:, :5])


def test_an_incomplete_result_ranks_only_if_told_to(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    result = open_influences(writer.path)
    with pytest.raises(IncompleteResultError, match="got 2 of 3 strips.*partial=True"):
        result.top(0)
    finished = [*range(8), *range(16, 23)]
    for k in (2, 10, 23):
        assert_ranked(result.top(1, k, partial=True), reference(values[1], "top", k, finished))
        assert_ranked(result.bottom(1, k, partial=True), reference(values[1], "bottom", k, finished))
    assert (result.complete, result.n_missing, result.progress) == (False, 1, pytest.approx(2 / 3))


def test_a_shard_without_its_mark_does_not_count(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False)
    zarr.open_group(str(writer.path), mode="r+")["strip_status"][0] = 0
    ranking = open_influences(writer.path).top(0, 23, partial=True)
    assert_ranked(ranking, reference(values[0], "top", 23, range(8, 23)))


def test_a_result_without_strips_has_an_empty_ranking(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False, skip=(0, 1, 2))
    assert open_influences(writer.path).top(0, partial=True).indices.shape == (0,)


def test_progress_is_read_anew(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    result = open_influences(writer.path)
    assert result.n_missing == 1
    write_all(writer, values)
    assert (result.n_missing, result.progress) == (0, 1.0)


def test_a_lost_shard_is_not_ranked_over(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    (writer.path / "influences/c/0/1").unlink()
    result = open_influences(writer.path)
    with pytest.raises(CorruptStoreError, match="missing values in finished strips"):
        result.top(0, 20)
    assert result.damaged_strips() == [1]


def test_indices_count_as_in_numpy(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    result = open_influences(writer.path)
    assert_ranked(result.top(-1), reference(values[4], "top", 4))
    assert_ranked(result.top(np.int64(2)), reference(values[2], "top", 4))
    for index in (5, -6):
        with pytest.raises(IndexRangeError, match=f"`test_index` must be from -5 to 4, got {index}") as raised:
            result.top(index)
        assert isinstance(raised.value, IndexError)
    for wrong in (1.0, "1", True):
        with pytest.raises(SettingError, match="`test_index` must be an integer"):
            result.top(wrong)
    for k in (0, -1):
        with pytest.raises(SettingError, match="`k` must be at least 1"):
            result.bottom(0, k)


def test_tiles_are_read_like_an_array(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    result = open_influences(writer.path)
    assert result.shape == result.influences.shape == (5, 23)
    np.testing.assert_array_equal(result[2, 3:17], values[2, 3:17])
    np.testing.assert_array_equal(result[1:4, -3:], values[1:4, -3:])
    np.testing.assert_array_equal(result[-1], values[-1])
    with pytest.raises(IndexError):
        result[5]


def test_a_result_cannot_be_changed(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    result = open_influences(writer.path)
    with pytest.raises(ValueError, match="read-only"):
        result.influences[0, 0] = 1
    with pytest.raises(TypeError):
        result.provenance["state"] = "running"
    assert result.provenance["solver"]["name"] == "cg"


def test_perturbation_influences_have_no_ranking(make: Any) -> None:
    writer, _ = make(Layout(n_test=2, n_train=4, strip=2, input_shape=(3,)))
    result = open_influences(writer.path)
    with pytest.raises(ShapeError, match=r"`top` wants one number.*inputs \(3,\).*norm"):
        result.top(0)
    assert "2 test x 4 train x input (3,)" in repr(result)


def test_the_repr_tells_what_matters(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False, skip=(1,))
    assert "running, 2 of 3 strips" in repr(open_influences(writer.path))
    assert "approximate, residuals not measured for 5 rows" in repr(open_influences(writer.path))
    writer.write_test(
        slice(0, 5), converged=np.array([True] * 4 + [False]), relative_residual=np.array([1e-8, 0.25, np.nan, 0, 0])
    )
    text = repr(open_influences(writer.path))
    for part in ("5 test x 23 train", "cg", "4 of 5 rows converged", "worst relative residual 2.5e-01", "result.zarr"):
        assert part in text


def test_xarray_gets_it_lazily(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    dataset = open_influences(writer.path).to_xarray()
    assert dict(dataset.sizes) == {"test": 5, "train": 23, "rank": 4, "strip": 3}
    assert not dataset["influences"].variable._in_memory
    np.testing.assert_array_equal(dataset["influences"][2].values, values[2])


def test_without_xarray_one_is_told_what_to_install(make: Any, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, _ = make(layout)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(MissingDependencyError, match="pip install xarray"):
        open_influences(writer.path).to_xarray()


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("what", ["missing", -5, 23, 10**6, np.nan, np.inf])
def test_a_stored_ranking_that_cannot_be_one_is_damage_and_no_answer(
    make: Any, layout: Any, end: str, what: Any
) -> None:
    writer, _ = make(layout)
    group = zarr.open_group(str(writer.path), mode="r+", use_consolidated=False)
    if what == "missing":
        shutil.rmtree(writer.path / f"{end}_index/c")
    else:
        group[f"{end}_{'index' if isinstance(what, int) else 'value'}"][2, 1] = what
    result = open_influences(writer.path)
    with pytest.raises(CorruptStoreError, match=f"ranking `{end}` of test point 2 .* missing or damaged"):
        getattr(result, end)(2)
    with pytest.raises(CorruptStoreError, match="missing or damaged"):
        result.to_dataframe()
    assert getattr(result, end)(1).indices.min() >= 0 if what != "missing" else True


@pytest.mark.parametrize("top_k", [3, 8, 50])
@pytest.mark.parametrize("k", [1, 3, 8, 23])
def test_a_running_result_folds_the_rankings_of_its_strips(tmp_path: Path, top_k: int, k: int) -> None:
    layout = Layout(n_test=40, n_train=23, strip=8, top_k=top_k)
    values = np.random.default_rng(1).integers(-2, 3, layout.shape).astype(np.float32)
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, values, skip=(1,))
    result = open_influences(tmp_path / "r")
    finished = [*range(8), *range(16, 23)]
    for i in (0, 35):
        assert_ranked(result.top(i, k, partial=True), reference(values[i], "top", k, finished))
        assert_ranked(result.bottom(i, k, partial=True), reference(values[i], "bottom", k, finished))


def test_a_ranking_reads_little_also_while_the_run_goes_on(tmp_path: Path) -> None:
    layout = Layout(n_test=512, n_train=16_384, strip=4096, top_k=10)
    values = matrix(layout)
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, values, skip=(2,))

    def cost(ask: Any) -> int:
        result = open_influences(tmp_path / "r")
        before = result.bytes_read
        ask(result)
        return result.bytes_read - before

    row = cost(lambda result: result[300])
    assert cost(lambda result: result.top(300, partial=True)) < row / 20
    write_all(writer, values)
    writer.finish()
    assert cost(lambda result: result.top(300)) < row / 100
    assert_ranked(open_influences(tmp_path / "r").top(300), reference(values[300], "top", 10))
    assert [len(list((tmp_path / "r" / name / "c").rglob("0"))) for name in ("top_index", "top_value")] == [2, 2]


def test_a_strip_whose_ranking_is_gone_is_ranked_from_its_values(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    shutil.rmtree(writer.path / "strips/index/c/0")
    finished = [*range(8), *range(16, 23)]
    result = open_influences(writer.path)
    assert_ranked(result.top(2, 3, partial=True), reference(values[2], "top", 3, finished))


def test_rows_that_were_not_measured_count_neither_as_success_nor_as_failure() -> None:
    nan, yes, no = np.nan, True, False
    said = {
        "2 of 3 rows converged, worst relative residual 2.0e-01": ([yes, yes, no], [0, 0.1, 0.2]),
        "1 of 2 measured rows (4 rows in all) converged, worst relative residual 5.0e-01": (
            [no, yes, no, no],
            [nan, 0.1, 0.5, nan],
        ),
        "approximate, residuals not measured for 2 rows": ([no, no], [nan, nan]),
        "2 of 2 rows converged, residuals not recorded": ([yes, yes], [nan, nan]),
    }
    for words, (converged, residual) in said.items():
        assert how_solved(np.array(converged), np.array(residual, dtype=np.float32)) == words
    values = np.full(300, np.nan, dtype=np.float32)
    values[[7, 90, 200]] = [1e-9, 0.3, 0.5]
    assert worst_rows({"relative_residual": values, "converged": values < 1e-6}) == [200, 90, 7]
