"""Questions beyond the row: columns, groups, tables, overviews, and what is known of the points."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from distinfluence.errors import CorruptStoreError, IncompleteResultError, IndexRangeError, SettingError, ShapeError
from distinfluence.store import InfluenceWriter, Layout, annotate, open_influences
from distinfluence.store.format.overview import Level, levels, strip_cells

from .conftest import matrix, write_all
from .test_contributions import contributed


def test_a_column_is_ranked_like_a_row(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    result = open_influences(writer.path)
    for j in (0, 7, 8, 22, -1):
        order = np.argsort(-values[:, j], kind="stable")
        assert result.top_for_train(j, 3).indices.tolist() == order[:3].tolist()
        assert result.bottom_for_train(j).indices.tolist() == order[::-1].tolist()
        np.testing.assert_array_equal(result.top_for_train(j, 3).values, values[order[:3], j])
    with pytest.raises(IndexRangeError, match="`train_index` must be from -23 to 22, got 23"):
        result.top_for_train(23)
    with pytest.raises(SettingError, match="`k` must be at least 1"):
        result.top_for_train(0, 0)


def test_a_column_of_a_missing_strip_says_so(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False, skip=(1,))
    result = open_influences(writer.path)
    assert result.top_for_train(0).indices.size == 5
    with pytest.raises(IncompleteResultError, match="training point 8 lies in strip 1"):
        result.top_for_train(8)


def test_a_column_reads_only_its_chunks(tmp_path: Path) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", Layout(64, 4096, 2048), {})
    write_all(writer, matrix(writer.layout))
    result = open_influences(tmp_path / "r")
    before = result.bytes_read
    result[:, 5]
    assert 0 < result.bytes_read - before < 0.6 * 64 * 4096 * 4


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_groups_equal_a_loop_over_them(make: Any, layout: Any, how: Any) -> None:
    writer, values = make(layout)
    test, train = np.array(["b", "a", "b", "a", "b"]), np.arange(23) % 4
    found = open_influences(writer.path).group(test, train, how)
    assert (found.test_groups.tolist(), found.train_groups.tolist()) == (["a", "b"], [0, 1, 2, 3])
    for i, a in enumerate("ab"):
        for j in range(4):
            block = values[test == a][:, train == j].astype(np.float64)
            assert found.values[i, j] == pytest.approx(getattr(block, how)())
    alone = open_influences(writer.path).group(test=[0] * 5, how=how).values
    np.testing.assert_allclose(alone[0], getattr(values.astype(np.float64), how)(axis=0))


def test_groups_of_an_incomplete_result_count_what_is_there(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    result = open_influences(writer.path)
    with pytest.raises(IncompleteResultError, match="1 of 3 are missing"):
        result.group()
    there = [*range(8), *range(16, 23)]
    found = result.group(train=[0] * 23, partial=True).values[:, 0]
    np.testing.assert_allclose(found, values[:, there].astype(np.float64).mean(axis=1))
    with pytest.raises(ShapeError, match=r"`train` must be \(23,\)"):
        result.group(train=[1, 2], partial=True)
    with pytest.raises(SettingError, match="`how`"):
        result.group(how="median", partial=True)


def test_a_table_holds_both_ends_of_each_row(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    result = open_influences(writer.path)
    table = result.to_dataframe([3, 1], k=2)
    assert list(table.columns) == ["test", "rank", "end", "train", "influence", "bound"]
    assert table["bound"].isna().all()
    assert table["test"].tolist() == [1] * 4 + [3] * 4
    three = table[table["test"] == 3]
    assert three["train"].tolist() == [*result.top(3, 2).indices, *result.bottom(3, 2).indices]
    assert three["end"].tolist() == ["helpful"] * 2 + ["harmful"] * 2
    assert len(result.to_dataframe()) == 5 * 2 * 4


def test_a_table_says_by_how_much_it_may_be_wrong_and_how_points_are_called(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    writer.write_test(slice(0, 5), error_bound=np.arange(5) + 1.0)
    annotate(writer.path, "train", ids=[f"p{i}" for i in range(23)], labels=np.arange(23) % 2, classes=["no", "yes"])
    table = open_influences(writer.path).to_dataframe([2], k=2)
    np.testing.assert_allclose(table["bound"], 3.0 * (table["train"] + 0.5))
    assert table["train_id"].tolist() == [f"p{j}" for j in table["train"]]
    assert table["train_label"].tolist() == [("no", "yes")[j % 2] for j in table["train"]]


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("tests", [slice(1, 4), [0, 3], [True, False, False, True, True], 2, [-1]])
def test_a_set_of_test_points_is_ranked_as_their_sum(make: Any, layout: Any, how: Any, tests: Any) -> None:
    writer, values = make(layout)
    result = open_influences(writer.path)
    rows = np.atleast_2d(values[tests]).astype(np.float64)
    expected = getattr(rows, how)(axis=0).astype(np.float32)
    order = np.argsort(-expected, kind="stable")
    assert result.top_of(tests, 7, how).indices.tolist() == order[:7].tolist()
    assert result.bottom_of(tests, 7, how).indices.tolist() == order[::-1][:7].tolist()
    np.testing.assert_array_equal(result.top_of(tests, None, how).values, expected[order[:4]])


def test_a_set_that_is_none_is_refused_and_a_running_result_counts_if_told(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    result = open_influences(writer.path)
    for tests, error in (([], IndexRangeError), ([5], IndexRangeError), ([0.5], SettingError), ([True], ShapeError)):
        with pytest.raises(error, match="`tests`"):
            result.top_of(tests, partial=True)
    with pytest.raises(IncompleteResultError, match="1 of 3 are missing"):
        result.top_of([0, 1])
    there = np.array([*range(8), *range(16, 23)])
    mean = values[:2, there].astype(np.float64).mean(axis=0)
    assert result.top_of([0, 1], 3, partial=True).indices.tolist() == there[np.argsort(-mean)[:3]].tolist()


def test_groups_of_training_points_alone_take_no_matrix_of_tests_by_tests(tmp_path: Path) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", Layout(20_000, 8, 8), {})
    values = matrix(writer.layout)
    write_all(writer, values)
    result = open_influences(tmp_path / "r")
    tracemalloc.start()
    found = result.group(train=np.arange(8) % 2, partial=True).values
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found[:, 1], values[:, 1::2].astype(np.float64).mean(axis=1))
    assert peak < 50 * 20_000 * 8


def test_totals_are_written_with_the_strips_and_computed_where_they_are_not(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(2,))
    expected = np.where(np.arange(23) < 16, values.sum(axis=0), np.nan)
    np.testing.assert_allclose(open_influences(writer.path).train_total, expected, rtol=1e-5)
    del zarr.open_group(str(writer.path), mode="r+")["train_total"]
    np.testing.assert_allclose(open_influences(writer.path).train_total, expected, rtol=1e-5)
    write_all(InfluenceWriter.open(writer.path), values)
    assert open_influences(writer.path).n_missing == 0


def test_an_overview_keeps_the_entry_of_largest_magnitude_with_its_sign() -> None:
    values = matrix(Layout(7, 10, 10))
    level = Level("fine", 3, 4, 10, 7, 10)
    cells = strip_cells(level, values)
    assert cells.shape == level.shape == (3, 3)
    for r in range(3):
        for c in range(3):
            block = values[3 * r : 3 * r + 3, 4 * c : 4 * c + 4].ravel()
            assert cells[r, c] == block[np.argmax(np.abs(block))]


def test_large_results_are_stored_with_an_overview_and_small_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distinfluence.store.format.overview.COARSE_ROWS", 8)
    monkeypatch.setattr("distinfluence.store.format.overview.COARSE_COLUMNS", 64)
    assert levels(100, 1000, 100) == []
    layout = Layout(n_test=130, n_train=33_000, strip=3300)
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    values = matrix(layout)
    write_all(writer, values, skip=(9,))
    result = open_influences(tmp_path / "r")
    assert [level.name for level in layout.levels] == ["coarse", "fine"]
    for level in layout.levels:
        cells = result.overview(level.name, slice(0, level.shape[1]))
        assert cells.shape == level.shape
        columns = level.column_cells(np.arange(33_000))
        assert columns[-1] < level.shape[1]
        for r, c in ((0, 0), (1, int(columns[3299])), (2, int(columns[3300]))):
            rows, own = slice(r * level.rows, (r + 1) * level.rows), np.flatnonzero(columns == c)
            block = values[rows, own].ravel()
            assert cells[r, c] == block[np.argmax(np.abs(block))]
        assert np.isnan(cells[:, 9 * level.cells_per_strip :]).all()
    fine = next(level for level in layout.levels if level.name == "fine")
    assert fine.shape[0] * fine.shape[1] <= 130 * 33_000 / 50


def test_what_is_known_of_points_is_stored_and_read(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    texts = [f"naïve text {i}" for i in range(22)] + [""]
    annotate(writer.path, "train", texts, kind="text", labels=np.arange(23) % 2, classes=["no", "yes"])
    images = np.random.default_rng(0).random((5, 4, 6, 3))
    annotate(writer.path, "test", images, kind="image", labels=np.linspace(0, 1, 5))
    train, test = open_influences(writer.path).points("train"), open_influences(writer.path).points("test")
    assert [train.sample(i).values for i in (0, 21, 22)] == ["naïve text 0", "naïve text 21", ""]
    assert [train.name_of(label) for label in train.labels()[:2]] == ["no", "yes"]
    np.testing.assert_array_equal(test.sample(3).values, images[3].astype(np.float32))
    assert test.name_of(test.labels()[1]) == "0.25"
    dataset = open_influences(writer.path).to_xarray(chunks={})
    assert dataset["train_label"].values.tolist() == train.labels().tolist()
    assert float(dataset["influences"].sel(test=1, train=5)) == open_influences(writer.path)[1, 5]
    assert dataset["influences"].chunks is not None
    annotate(writer.path, "train", self_influence=np.arange(23.0))
    again = open_influences(writer.path)
    assert again.points("train").sample(0).values == "naïve text 0"
    assert again.self_influence.tolist() == list(range(23))


def test_what_is_not_passed_stays_and_samples_of_another_kind_replace_the_old(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    annotate(writer.path, "train", labels=np.arange(23) % 2, classes=["no", "yes"])
    annotate(writer.path, "train", ["a"] * 23, kind="text")
    annotate(writer.path, "train", ids=[f"photo {i}.png" for i in range(23)])
    points = open_influences(writer.path).points("train")
    assert points.labels().tolist() == (np.arange(23) % 2).tolist() and points.name_of(1) == "yes"
    assert points.sample(4).values == "a" and points.id_of(4) == "photo 4.png"
    annotate(writer.path, "train", np.ones((23, 2)), kind="table", columns=["x", "y"], ids=np.arange(23) + 100)
    annotate(writer.path, "train", columns=["age", "weight"])
    points = open_influences(writer.path).points("train")
    assert points.kind == "table" and points.columns == ["age", "weight"] and points.classes == ["no", "yes"]
    assert points.id_of(4) == "104" and points.ids().tolist() == list(range(100, 123))
    assert set(zarr.open_group(str(writer.path), mode="r")["samples/train"].keys()) == {"values", "label", "id"}
    annotate(writer.path, "train", labels=np.zeros(23), replace=True)
    points = open_influences(writer.path).points("train")
    assert (points.kind, points.ids(), points.classes, points.id_of(0)) == (None, None, [], None)


def test_ids_are_strings_or_whole_numbers_and_all_different(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    names = [f"ünit {i}" for i in range(4)] + [""]
    annotate(writer.path, "test", ids=names)
    points = open_influences(writer.path).points("test")
    assert points.ids().tolist() == names and [points.id_of(i) for i in range(5)] == names
    for ids, error, said in (
        (["a"] * 5, SettingError, "all be different"),
        ([1, 2], ShapeError, r"`ids` must be \(5,\)"),
        (["x" * 2000, *"abcd"], SettingError, "at most 1000 bytes"),
    ):
        with pytest.raises(error, match=said):
            annotate(writer.path, "test", ids=ids)
    group = zarr.open_group(str(writer.path), mode="r+", use_consolidated=False)
    group["samples/test/id_offsets"][2] = 10**9
    with pytest.raises(CorruptStoreError, match="ascending offsets"):
        open_influences(writer.path).points("test").ids()
    with pytest.raises(CorruptStoreError, match="ascending offsets"):
        open_influences(writer.path).points("test").id_of(2)


def test_names_of_any_length_are_cut_when_they_are_read(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    annotate(writer.path, "train", labels=np.zeros(23, int), classes=["x" * 10**6])
    assert len(open_influences(writer.path).points("train").name_of(0)) == 200


@pytest.mark.parametrize("finish_first", [True, False])
def test_plain_zarr_and_xarray_see_what_was_stored_of_points(make: Any, layout: Any, finish_first: bool) -> None:
    writer, _ = make(layout, finish=finish_first)
    annotate(writer.path, "train", np.zeros((23, 2)), kind="table", labels=np.arange(23))
    if not finish_first:
        writer.finish()
    group = zarr.open_group(str(writer.path), mode="r")
    assert group["samples/train"]["label"][:].tolist() == list(range(23))
    labels = xarray.open_zarr(str(writer.path), group="samples/train")["label"]
    assert labels.dims == ("train",) and labels.values.tolist() == list(range(23))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"samples": np.zeros((4, 2)), "kind": "table"}, ShapeError, "23 arrays of 1 dimensions"),
        ({"samples": ["a"], "kind": "text"}, ShapeError, "23 texts, got 1"),
        ({"samples": np.zeros((23, 2))}, SettingError, "`kind` must be one of"),
        ({"labels": np.zeros(4)}, ShapeError, "`labels` must be"),
        ({"samples": np.zeros((23, 2)), "kind": "table", "columns": ["a"]}, ShapeError, "`columns` must be 2"),
    ],
)
def test_points_that_do_not_fit_are_refused(make: Any, layout: Any, given: Any, error: Any, said: str) -> None:
    writer, _ = make(layout)
    with pytest.raises(error, match=said):
        annotate(writer.path, "train", **given)


def test_a_link_out_of_the_result_is_not_followed(make: Any, layout: Any, tmp_path: Path) -> None:
    writer, _ = make(layout)
    annotate(writer.path, "test", ["a secret is not here"] * 5, kind="text")
    (tmp_path / "secret").write_bytes(b"the secret")
    chunk = writer.path / "samples/test/text/c/0"
    chunk.unlink()
    os.symlink(tmp_path / "secret", chunk)
    with pytest.raises(CorruptStoreError, match="leads out of the result"):
        open_influences(writer.path).points("test").sample(0)


def test_a_notebook_shows_what_it_is_with_everything_escaped(tmp_path: Path) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", Layout(2, 4, 4), {"solver": {"method": "<script>x</script>"}})
    writer.write_strip(0, np.ones((2, 4)))
    writer.finish({"seconds": {"factors": 1.25}})
    html = open_influences(tmp_path / "r")._repr_html_()
    assert "2 × 4 (test × train)" in html and "factors 1.2 s" in html and "complete" in html
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_a_notebook_shows_rankings_groups_points_and_contributions_escaped(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    evil = "<script>alert(1)</script>"
    annotate(writer.path, "train", [evil] * 23, kind="text", labels=np.arange(23) % 2, classes=[evil, "b"])
    contributed(writer.path)
    result = open_influences(writer.path)
    points = result.points("train")
    assert repr(points) == "<StoredPoints 23, samples of kind text, label>"
    shown = (
        result.top(0),
        result.group(train=[evil, "b"] * 11 + ["b"]),
        points,
        result.points("test"),
        result.contributions(0),
    )
    pages = [each._repr_html_() for each in shown]
    assert all(page.startswith("<table>") and "<script" not in page and "<b>" not in page for page in pages)
    assert f"<td>{result.top(0).indices[0]}</td>" in pages[0]
    assert "&lt;script&gt;" in pages[1] and "&lt;script&gt;" in pages[2] and "&lt;b&gt;fc" in pages[4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layout": {"n_test": 5}}, "`layout` in the attributes"),
        ({"layout": []}, "`layout` in the attributes"),
        ({"state": "<b>done</b>"}, "`state` in the attributes"),
    ],
)
def test_hostile_attributes_are_a_clear_error(make: Any, layout: Any, change: Any, said: str) -> None:
    writer, _ = make(layout)
    zarr.open_group(str(writer.path), mode="r+").attrs.update(change)
    with pytest.raises(CorruptStoreError, match=said):
        open_influences(writer.path)


@pytest.mark.parametrize("wrong", [{"shape": (9,)}, {"dtype": "int8"}, {"dtype": "float64"}])
def test_arrays_of_another_shape_or_type_are_a_clear_error(make: Any, layout: Any, wrong: Any) -> None:
    writer, _ = make(layout)
    group = zarr.open_group(str(writer.path), mode="r+")
    del group["test_loss"]
    group.create_array("test_loss", **{"shape": (5,), "dtype": "float32", **wrong})
    with pytest.raises(CorruptStoreError, match=r"`test_loss` of .* must be \[5\] float32, got"):
        open_influences(writer.path).test_loss  # noqa: B018


def test_a_missing_array_and_an_enormous_chunk_are_a_clear_error(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    group = zarr.open_group(str(writer.path), mode="r+")
    del group["test_loss"]
    with pytest.raises(CorruptStoreError, match="`test_loss` of .* is missing"):
        open_influences(writer.path).test_loss  # noqa: B018
    group.create_array("test_loss", shape=(5,), chunks=(2**30,), dtype="float32")
    with pytest.raises(CorruptStoreError, match="chunks of at most"):
        open_influences(writer.path).test_loss  # noqa: B018
