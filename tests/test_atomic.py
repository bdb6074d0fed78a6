"""Files and folders that are there whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from distinfluence.atomic import appearing


def test_a_file_appears_at_the_end_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with appearing(path, sync=True) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_with_its_files_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("distinfluence.atomic.sync_to_disk", synced.extend)
    with appearing(tmp_path / "folder", sync=True) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "file").write_text("whole")
    assert synced == [partial / "inner" / "file", tmp_path / "folder"]
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "whole"


def fail_in_a_file(partial: Path) -> None:
    partial.write_text("half")
    raise KeyboardInterrupt


def fail_in_a_folder(partial: Path) -> None:
    (partial / "inner").mkdir(parents=True)
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [fail_in_a_file, fail_in_a_folder])
def test_what_failed_leaves_nothing_behind(tmp_path: Path, fail: Callable[[Path], None]) -> None:
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "path") as partial:
        fail(partial)
    assert list(tmp_path.iterdir()) == []
