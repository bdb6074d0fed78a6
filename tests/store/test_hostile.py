"""Results that somebody sent: what they lack, link to or blow up is a clear error, and nothing of theirs is run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinfluence.errors import CorruptStoreError, ForeignStoreError
from distinfluence.store import annotate, open_influences

from .test_contributions import contributed


def test_without_its_marks_a_result_is_damaged_and_without_their_values_nothing_is_finished(
    make: Any, layout: Any
) -> None:
    writer, _ = make(layout)
    shutil.rmtree(writer.path / "strip_status/c")
    assert open_influences(writer.path).n_missing == 3
    assert open_influences(writer.path).top(0, 9, partial=True).indices.size == 0
    shutil.rmtree(writer.path / "strip_status")
    result = open_influences(writer.path)
    for ask in (result.finished_strips, result.damaged_strips, lambda: result.n_missing, result.group):
        with pytest.raises(CorruptStoreError, match="`strip_status` of .* is missing"):
            ask()


def test_attributes_of_any_size_are_not_read(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    with (writer.path / "zarr.json").open("r+b") as file:
        file.truncate(2**40)  # all holes: it takes no disk
    with pytest.raises(CorruptStoreError, match=r"`zarr.json` of .* has 1099511627776 bytes"):
        open_influences(writer.path)


def test_attributes_nested_without_end_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"attributes": ' + "[" * 200_000)
    with pytest.raises(ForeignStoreError):
        open_influences(tmp_path)


@pytest.mark.parametrize(
    "name", ["zarr.json", "influences/zarr.json", "samples/test/zarr.json", "contributions/zarr.json"]
)
def test_metadata_that_are_a_link_out_of_the_result_are_not_followed(
    make: Any, layout: Any, tmp_path: Path, name: str
) -> None:
    writer, _ = make(layout)
    annotate(writer.path, "test", ids=list("abcde"))
    contributed(writer.path)
    outside = tmp_path / "elsewhere.json"
    shutil.move(writer.path / name, outside)
    os.symlink(outside, writer.path / name)

    def look() -> None:
        result = open_influences(writer.path)
        result.contributions(0)
        result.points("test").ids()
        np.asarray(result[0])

    with pytest.raises(CorruptStoreError, match="leads out of the result"):
        look()


@pytest.mark.parametrize(
    "codec", [{"name": "python", "configuration": {}}, {"name": "pickle"}, {"name": "numcodecs.pickle"}]
)
def test_codecs_that_would_run_something_are_refused(make: Any, layout: Any, codec: Any) -> None:
    writer, _ = make(layout)
    file = writer.path / "test_loss/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"] = [codec]
    file.write_text(json.dumps(metadata))
    with pytest.raises(CorruptStoreError, match="`test_loss`"):
        open_influences(writer.path).test_loss  # noqa: B018


def test_attributes_of_the_wrong_kind_do_not_stop_what_does_not_need_them(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    for name, content in {"solver": [1], "summary": "x", "quarantined": 3, "model": [], "job": {"model": 1}}.items():
        writer._group.attrs[name] = content
    result = open_influences(writer.path)
    np.testing.assert_array_equal(result[:], values)
    assert "5 × 23" in result._repr_html_() and result.quarantined == {}
    assert "damping" not in result.to_xarray().coords
