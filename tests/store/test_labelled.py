"""What xarray gets: the values that lie there, under the names that points, blocks and damping have."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from distinfluence.errors import CorruptStoreError
from distinfluence.store import InfluenceWriter, Layout, annotate, open_influences

from .conftest import write_all
from .test_contributions import BLOCKS, contributed


def test_attributes_that_ask_readers_to_scale_are_not_followed(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    group = zarr.open_group(str(writer.path), mode="r+", use_consolidated=False)
    group["influences"].attrs.update({"scale_factor": 100.0, "add_offset": 7.0})
    group["iterations"].attrs.update({"units": "days since 2000-01-01"})
    dataset = open_influences(writer.path).to_xarray()
    assert dataset["influences"].dtype == np.float32
    np.testing.assert_array_equal(dataset["influences"].values, values)
    assert dataset["iterations"].values.tolist() == [-1] * 5


@pytest.mark.parametrize("wrong", [{"shape": (9,)}, {"dtype": "int8"}, {"chunks": (2**30,)}])
def test_arrays_that_are_not_as_the_layout_says_do_not_reach_xarray(make: Any, layout: Any, wrong: Any) -> None:
    writer, _ = make(layout)
    group = zarr.open_group(str(writer.path), mode="r+", use_consolidated=False)
    settings = {"shape": (5,), "dtype": "float32", "chunks": (5,), **wrong}
    group.create_array("test_loss", overwrite=True, dimension_names=["test"], **settings)
    with pytest.raises(CorruptStoreError, match="`test_loss`"):
        open_influences(writer.path).to_xarray()


def test_an_array_without_named_dimensions_is_a_clear_error(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    zarr.open_group(str(writer.path), mode="r+", use_consolidated=False).create_array("x", shape=(2,), dtype="f4")
    with pytest.raises(CorruptStoreError, match="names of dimensions"):
        open_influences(writer.path).to_xarray()


def test_points_are_found_by_their_ids(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    annotate(writer.path, "train", ids=[f"photo {i}" for i in range(23)])
    annotate(writer.path, "test", ids=np.arange(5) * 10, labels=[0, 1, 0, 1, 1])
    dataset = open_influences(writer.path).to_xarray(chunks={})
    found = dataset["influences"].set_xindex("train_id").set_xindex("test_id").sel(train_id="photo 9", test_id=30)
    assert float(found) == values[3, 9]


@pytest.mark.parametrize(
    ("damping", "dims", "expected"),
    [
        ({"full": 0.1}, (), 0.1),
        ({"a": 0.1, "b": 0.1}, (), 0.1),
        ({"a": 0.1, "b": 0.2}, ("block",), [0.1, 0.2]),
        ({"a": "0.1 of the mean"}, None, None),
        (None, None, None),
    ],
)
def test_the_damping_is_a_coordinate(tmp_path: Path, layout: Layout, damping: Any, dims: Any, expected: Any) -> None:
    attributes = {"solver": {"method": "x", "hessian_regularization": damping}}
    writer = InfluenceWriter.create(tmp_path / "r", layout, attributes)
    dataset = open_influences(writer.path).to_xarray()
    if dims is None:
        assert "damping" not in dataset.coords
        return
    assert dataset["damping"].dims == dims and dataset["damping"].values.tolist() == expected
    if dims:
        assert dataset["block"].values.tolist() == ["a", "b"]


def test_a_tree_holds_samples_and_contributions(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    result = open_influences(writer.path)
    assert list(result.to_datatree().children) == []
    annotate(writer.path, "train", np.arange(46).reshape(23, 2), kind="table", labels=np.arange(23) % 3)
    annotate(writer.path, "test", list("abcde"), kind="text")
    contributed(writer.path, tokens=6)
    tree = open_influences(writer.path).to_datatree()
    np.testing.assert_array_equal(tree["influences"].values, values)
    assert tree["train_samples/values"].sel(train=4).values.tolist() == [8, 9]
    assert tree.coords["train_label"].values.tolist() == (np.arange(23) % 3).tolist()
    assert bytes(tree["test_samples/text"].values).decode() == "abcde"
    own = tree["contributions/top"].sel(test=2, block=BLOCKS[1])
    assert own.values.tolist() == open_influences(writer.path).contributions(2).helpful.by_block[:, 1].tolist()
    assert tree["contributions/bottom_tokens"].dims == ("test", "pair", "token")


def test_a_tree_of_a_running_result_and_of_hostile_samples(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    tree = open_influences(writer.path).to_datatree()
    assert int(np.isnan(tree["influences"].values).sum()) == 5 * 8
    annotate(writer.path, "test", np.ones((5, 2)), kind="table")
    write_all(writer, values)
    group = zarr.open_group(str(writer.path / "samples/test"), mode="r+", use_consolidated=False)
    group.create_array("values", shape=(5, 2), chunks=(2**20, 2**10), dtype="f4", overwrite=True)
    with pytest.raises(CorruptStoreError, match="samples/test/values"):
        open_influences(writer.path).to_datatree()
