"""Where a result may be put, and what is never touched."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from distinfluence.errors import (
    FingerprintError,
    ForeignStoreError,
    SettingError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from distinfluence.store import InfluenceWriter, Layout, open_influences
from distinfluence.store.write.resume import check_resumable

from .conftest import ATTRIBUTES, matrix, write_all


def a_file(path: Any) -> None:
    path.write_bytes(b"thesis")


def a_folder_with_content(path: Any) -> None:
    path.mkdir()
    (path / "thesis.tex").write_bytes(b"thesis")


def a_foreign_group(path: Any) -> None:
    zarr.open_group(str(path), mode="w", attributes={"format": "another"}).create_array("x", data=np.arange(3))


def a_foreign_array(path: Any) -> None:
    zarr.create_array(str(path), data=np.arange(3))


def a_zarr_v2_group(path: Any) -> None:
    zarr.open_group(str(path), mode="w", zarr_format=2)


def broken_metadata(path: Any) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("{")


def metadata_that_is_a_list(path: Any) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("[1]")


def an_array_that_claims_our_format(path: Any) -> None:
    zarr.create_array(str(path), data=np.arange(3), attributes={"format": "distinfluence"})


FOREIGN = [
    a_file,
    a_folder_with_content,
    a_foreign_group,
    a_foreign_array,
    a_zarr_v2_group,
    broken_metadata,
    metadata_that_is_a_list,
    an_array_that_claims_our_format,
]


def contents(path: Any) -> Any:
    files = [path, *sorted(path.rglob("*"))]
    return [(str(p), p.read_bytes() if p.is_file() else None, p.lstat().st_mtime_ns) for p in files]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_others_wrote_is_never_touched(tmp_path: Path, layout: Any, foreign: Any, overwrite: Any) -> None:
    path = tmp_path / "r"
    foreign(path)
    before = contents(tmp_path)
    with pytest.raises(ForeignStoreError, match="did not write.*nothing was touched"):
        InfluenceWriter.create(path, layout, {}, overwrite=overwrite)
    for opening in (open_influences, InfluenceWriter.open):
        with pytest.raises(ForeignStoreError, match="not a result of distinfluence"):
            opening(path)
    assert contents(tmp_path) == before


def test_a_link_to_a_foreign_folder_is_foreign(tmp_path: Path, layout: Any) -> None:
    a_folder_with_content(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(ForeignStoreError):
        InfluenceWriter.create(tmp_path / "link", layout, {}, overwrite=True)
    assert (tmp_path / "there" / "thesis.tex").read_bytes() == b"thesis"


def test_a_result_that_holds_a_stranger_is_not_deleted(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    (writer.path / "notes.txt").write_text("mine")
    before = contents(writer.path)
    with pytest.raises(ForeignStoreError, match="notes.txt.*Move that away"):
        InfluenceWriter.create(writer.path, layout, {}, overwrite=True)
    assert contents(writer.path) == before


def test_an_existing_result_is_kept_unless_overwriting_is_asked_for(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    with pytest.raises(StoreExistsError, match="holds a result already.*'resume'.*'replace'") as raised:
        InfluenceWriter.create(writer.path, layout, {})
    assert isinstance(raised.value, StoreError) and isinstance(raised.value, FileExistsError)
    np.testing.assert_array_equal(open_influences(writer.path)[:], values)


def test_overwriting_leaves_only_the_new_result(make: Any) -> None:
    writer, _ = make(Layout(5, 23, 8))
    neighbour = writer.path.parent / "neighbour"
    neighbour.write_text("x")
    new = InfluenceWriter.create(writer.path, Layout(2, 6, 3), {}, overwrite=True)
    assert new.pending() == [0, 1]
    assert open_influences(writer.path).shape == (2, 6)
    assert sorted(p.name for p in writer.path.parent.iterdir()) == ["neighbour", "result.zarr"]


def test_overwriting_that_fails_keeps_the_old_result(make: Any, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, values = make(layout)
    monkeypatch.setattr(
        zarr.Group, "create_array", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(StoreError, match="cannot create.*No space left"):
        InfluenceWriter.create(writer.path, layout, {}, overwrite=True)
    np.testing.assert_array_equal(open_influences(writer.path)[:], values)
    assert [p.name for p in writer.path.parent.iterdir()] == ["result.zarr"]


def test_an_empty_folder_and_missing_parents_will_do(tmp_path: Path, layout: Any) -> None:
    (tmp_path / "empty").mkdir()
    InfluenceWriter.create(tmp_path / "empty", layout, {})
    InfluenceWriter.create(str(tmp_path / "a" / "b" / "c"), layout, {})
    assert open_influences(str(tmp_path / "a" / "b" / "c")).n_missing == 3


def test_paths_without_a_result_are_named(tmp_path: Path) -> None:
    for opening in (open_influences, InfluenceWriter.open):
        with pytest.raises(StoreNotFoundError, match=f"{tmp_path / 'nothing'} does not exist") as raised:
            opening(tmp_path / "nothing")
        assert isinstance(raised.value, FileNotFoundError)
    for path, message in (("", "str or Path"), (3, "str or Path")):
        with pytest.raises(SettingError, match=f"`path` must be.*{message}"):
            open_influences(path)


def test_a_result_of_a_newer_format_is_refused(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    metadata = json.loads((writer.path / "zarr.json").read_text())
    metadata["attributes"]["format_version"] = 2
    (writer.path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="format version 2.*newer distinfluence"):
        open_influences(writer.path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(tmp_path: Path, layout: Any) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="locked.*Permission denied.*permissions"):
        InfluenceWriter.create(tmp_path / "locked" / "r", layout, {})


def test_a_parent_that_is_a_file_is_said(tmp_path: Path, layout: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file/r"):
        InfluenceWriter.create(tmp_path / "file" / "r", layout, {})
    assert (tmp_path / "file").read_text() == "x"


def test_a_run_goes_on_with_what_it_began_with(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    settings = {"solver": {"name": "cg", "damping": 0.1}}
    resumed = InfluenceWriter.resume(writer.path, layout, ATTRIBUTES["fingerprints"], settings)
    assert resumed.pending() == [1]
    write_all(resumed, values)
    resumed.finish()
    np.testing.assert_array_equal(open_influences(writer.path)[:], values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fingerprints": {"model parameters": "xx", "training data": "bb"}},
            r"`fingerprints.model parameters` is 'aa' there, 'xx' here",
        ),
        ({"fingerprints": {"model parameters": "aa", "training data": "yy"}}, "`fingerprints.training data`"),
        ({"fingerprints": {"model parameters": "aa"}}, "`fingerprints.training data` is 'bb' there, not recorded here"),
        (
            {"fingerprints": {"model parameters": "aa", "training data": "bb", "loss": "c"}},
            "`fingerprints.loss` is not recorded there",
        ),
        ({"settings": {"solver": {"name": "cg", "damping": 0.2}}}, "`solver.damping` is 0.1 there, 0.2 here"),
        ({"settings": {"mode": "up"}}, "`mode` is not recorded there, 'up' here"),
        ({"layout": Layout(5, 23, 4, top_k=4)}, "`layout.strip` is 8 there, 4 here"),
        ({"layout": Layout(5, 23, 8, input_shape=(2,), top_k=4)}, r"`layout.input_shape` is \[\] there, \[2\] here"),
    ],
)
def test_a_run_does_not_go_on_with_anything_else(make: Any, layout: Any, change: Any, message: Any) -> None:
    writer, _ = make(layout, finish=False, skip=(1,))
    arguments = {"layout": layout, "fingerprints": ATTRIBUTES["fingerprints"], "settings": None, **change}
    with pytest.raises(FingerprintError, match=message) as raised:
        check_resumable(writer.path, **arguments)
    assert raised.value.args[0].count(" there, ") == 1
    assert "existing='replace'" in str(raised.value)


def test_every_difference_is_named(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False)
    with pytest.raises(FingerprintError, match="`layout.n_test`.*`fingerprints.model parameters`.*`solver`"):
        check_resumable(
            writer.path,
            Layout(6, 23, 8, top_k=4),
            {"model parameters": "x", "training data": "bb"},
            {"solver": "lissa"},
        )


def test_numbers_that_are_equal_are_no_difference(tmp_path: Path, layout: Any) -> None:
    InfluenceWriter.create(tmp_path / "r", layout, {"solver": {"damping": 1}})
    check_resumable(tmp_path / "r", layout, {}, {"solver": {"damping": np.float64(1.0)}})


def test_nothing_else_lies_in_the_result(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    write_all(writer, matrix(layout))
    InfluenceWriter.create(writer.path, layout, {}, overwrite=True)  # refuses strangers, so it knows its own
