"""What rankings are made of: stored, read, and refused where it cannot be."""

import shutil
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from distinfluence.errors import CorruptStoreError, SettingError, ShapeError
from distinfluence.store import InfluenceWriter, Layout, open_influences, write_contributions

BLOCKS = ["conv1", "conv2", "<b>fc</b>"]


def parts_of(values: Any, n: int) -> Any:
    """[..., n] float32 that sum to these values."""
    shares = np.random.default_rng(0).random((*values.shape, n))
    return (values[..., None] * shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)


def contributed(path: Any, tokens: int | None = None, k: int = 3) -> None:
    result = open_influences(path)
    rows = range(result.shape[0])
    top = np.stack([result.top(i, k).values for i in rows])
    bottom = np.stack([result.bottom(i, k).values for i in rows])
    by_token = () if tokens is None else (parts_of(top, tokens), parts_of(bottom, tokens))
    write_contributions(path, BLOCKS, parts_of(top, 3), parts_of(bottom, 3), *by_token)


@pytest.mark.parametrize("tokens", [None, 7])
def test_contributions_are_read_beside_their_pairs_and_sum_to_them(make: Any, layout: Any, tokens: Any) -> None:
    writer, _ = make(layout)
    assert open_influences(writer.path).contributions(0) is None
    contributed(writer.path, tokens)
    result = open_influences(writer.path)
    assert result.contribution_blocks == BLOCKS
    for row in (0, 4, -1):
        found = result.contributions(row)
        assert found.blocks == BLOCKS
        for shares, ranking in ((found.helpful, result.top(row, 3)), (found.harmful, result.bottom(row, 3))):
            assert shares.ranking.indices.tolist() == ranking.indices.tolist()
            np.testing.assert_allclose(shares.by_block.sum(axis=1), ranking.values, rtol=1e-5)
            if tokens is None:
                assert shares.by_token is None
            else:
                np.testing.assert_allclose(shares.by_token.sum(axis=1), ranking.values, rtol=1e-5)


def test_plain_zarr_and_xarray_see_contributions(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    contributed(writer.path)
    group = zarr.open_group(str(writer.path), mode="r")["contributions"]
    assert group.attrs["blocks"] == BLOCKS and group["top"].shape == (5, 3, 3)
    dataset = xarray.open_zarr(str(writer.path), group="contributions")
    assert dataset["bottom"].dims == ("test", "pair", "block")


def test_a_result_with_contributions_can_be_overwritten_and_loses_them_with_a_strip(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    contributed(writer.path)
    writer.reopen([1])
    assert open_influences(writer.path).contribution_blocks == []
    contributed_again = InfluenceWriter.create(writer.path, layout, {}, overwrite=True)
    assert open_influences(contributed_again.path).contribution_blocks == []


def test_contributions_that_do_not_fit_are_refused(make: Any, layout: Any) -> None:
    writer, _ = make(layout)
    top = np.zeros((5, 3, 2), np.float32)
    for wrong in (top[:4], top[..., :1], np.zeros((5, 5, 2)), np.zeros((5, 2))):
        with pytest.raises(ShapeError, match="`(top|bottom)` must be"):
            write_contributions(writer.path, ["a", "b"], top if wrong.shape[0] == 4 else wrong, wrong)
    with pytest.raises(SettingError, match="go together"):
        write_contributions(writer.path, ["a", "b"], top, top, top)
    with pytest.raises(SettingError, match="`blocks` must be from 1"):
        write_contributions(writer.path, [], top, top)
    shutil.rmtree(writer.path)
    inputs, _ = make(Layout(5, 23, 8, input_shape=(2,), top_k=4))
    with pytest.raises(SettingError, match="of mode 'up'"):
        write_contributions(inputs.path, ["a", "b"], top, top)


@pytest.mark.parametrize("wrong", ["names", "shape", "dtype", "missing", "chunk", "k"])
def test_hostile_contributions_are_a_clear_error(make: Any, layout: Any, wrong: str) -> None:
    writer, _ = make(layout)
    contributed(writer.path)
    group = zarr.open_group(str(writer.path / "contributions"), mode="r+", use_consolidated=False)
    if wrong == "names":
        group.attrs["blocks"] = ["x" * 10**6, "y"]
        assert [len(name) for name in open_influences(writer.path).contribution_blocks] == [200, 1]
    elif wrong == "missing":
        shutil.rmtree(writer.path / "contributions/top/c")
    else:
        shape = {"shape": (5, 3, 4), "k": (5, 23, 3)}.get(wrong, (5, 3, 3))
        chunks = (2**20, 3, 2**10) if wrong == "chunk" else shape
        group.create_array(
            "top", shape=shape, chunks=chunks, dtype="int8" if wrong == "dtype" else "float32", overwrite=True
        )
    with pytest.raises(CorruptStoreError, match="contributions/top"):
        open_influences(writer.path).contributions(0)
