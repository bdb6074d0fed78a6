"""Every kind of data set, cut into chunks, gives the same samples; what cannot be cut says so."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distinfluence.errors import ChunkError, DtypeError, EmptyDataError, RecipeError, SettingError, ShapeError
from distinfluence.influence.arrays import ArrayBatch
from distinfluence.scaling import Recipe
from distinfluence.scaling.data.chunks import ChunkedData, chunked, recut
from distinfluence.scaling.data.sources import ChunkSource, InThisProcess
from tests.scaling import sources

X, Y = (tensor.numpy() for tensor in sources.train())


def cut(x: object, y: object | None = None, chunk_size: int | None = None) -> ChunkedData:
    return chunked(x, y, InThisProcess(), chunk_size)


def loaded(data: ChunkedData) -> list[Any]:
    return [chunk.load() if isinstance(chunk, ChunkSource) else chunk.compute() for chunk in data.chunks]


def zarr_pair(folder: Path) -> tuple[Any, Any]:
    x, y = (
        zarr.create_array(str(folder / n), shape=a.shape, dtype=a.dtype, chunks=a.shape)
        for n, a in (("x", X), ("y", Y))
    )
    x[:], y[:] = X, Y
    return x, y


KINDS: dict[str, Callable[[Path], tuple[object, object | None]]] = {
    "tensors": lambda _: sources.train(),
    "numpy arrays": lambda _: (X, Y),
    "a tuple of arrays": lambda _: ((X, Y), None),
    "zarr arrays": zarr_pair,
    "zarr arrays in memory": lambda _: (zarr.array(X), zarr.array(Y)),
    "dask arrays": lambda _: (da.from_array(X, chunks=(5, 2)), da.from_array(Y, chunks=5)),
    "a map-style data set": lambda _: (sources.Samples(), None),
    "a tensor data set": lambda _: (TensorDataset(*sources.train()), None),
    "a loader": lambda _: (DataLoader(TensorDataset(*sources.train()), batch_size=5), None),
    "a loader that shuffles": lambda _: (DataLoader(sources.Samples(), batch_size=5, shuffle=True), None),
    "a loader with its own collate": lambda _: (
        DataLoader(sources.Samples(), batch_size=5, collate_fn=stack),
        None,
    ),
    "a recipe of arrays": lambda _: (Recipe("tests.scaling.sources:train"), None),
    "a recipe of a data set": lambda _: (Recipe("tests.scaling.sources:Samples"), None),
}


def stack(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*samples, strict=True)
    return torch.stack(x), torch.stack(y)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_chunks(kind: str, tmp_path: Path) -> None:
    data = cut(*KINDS[kind](tmp_path), chunk_size=5)
    assert data.sizes == (5, 5, 5, 5, 3)
    assert data.starts == (0, 5, 10, 15, 20)
    for start, (x, y) in zip(data.starts, loaded(data), strict=True):
        np.testing.assert_array_equal(x, X[start : start + 5])
        np.testing.assert_array_equal(y, Y[start : start + 5])


def test_dicts_stay_dicts_and_dask_arrays_in_them_too() -> None:
    for batch in (
        {"ids": X, "labels": Y},
        {"ids": da.from_array(X, chunks=(5, 4)), "labels": da.from_array(Y, chunks=5)},
    ):
        chunks: list[ArrayBatch] = loaded(cut(batch, chunk_size=5))
        assert isinstance(chunks[1], dict)
        np.testing.assert_array_equal(chunks[1]["labels"], Y[5:10])


def test_a_chunk_size_larger_than_the_data_gives_one_chunk() -> None:
    assert cut(X, Y, chunk_size=1000).sizes == (23,)


def test_dask_arrays_are_cut_again_when_a_chunk_size_is_asked_for() -> None:
    data = cut(da.from_array(X, chunks=(7, 4)), da.from_array(Y, chunks=7), chunk_size=10)
    assert data.sizes == (10, 10, 3)
    np.testing.assert_array_equal(loaded(data)[1][0], X[10:20])


def test_chunks_know_whether_they_can_be_strips() -> None:
    assert cut(X, Y, chunk_size=8).strip == 8
    uneven = cut(da.from_array(X, chunks=((5, 8, 10), 4)), da.from_array(Y, chunks=((5, 8, 10),)))
    with pytest.raises(ChunkError, match=r"chunks of one size.*rechunk"):
        uneven.strip  # noqa: B018


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, Y[:-1], ShapeError, "as many samples"),
        (da.from_array(X), da.from_array(Y[:-1]), ShapeError, "as many samples"),
        (da.from_array(X, chunks=(5, 4)), da.from_array(Y, chunks=6), ChunkError, r"same chunks.*rechunk"),
        (da.from_array(X, chunks=(5, 4)), Y, ChunkError, "from_array"),
        (da.from_array(X)[da.from_array(X)[:, 0] > 0], da.from_array(Y), ChunkError, "compute_chunk_sizes"),
        (X[:0], Y[:0], EmptyDataError, "at least one sample"),
        (np.zeros(()), None, ShapeError, "scalar"),
        ("digits", None, DtypeError, "got str. Load the file"),
        (Stream(), None, DtypeError, "map-style"),
        (DataLoader(sources.Samples(), batch_size=5, drop_last=True), None, SettingError, "leaves out 3 at each pass"),
        (Recipe("tests.scaling.sources:nothing"), None, RecipeError, "has no 'nothing'"),
        (Recipe("no_such_module:x"), None, RecipeError, "cannot import"),
        (Recipe("tests.scaling.sources"), None, RecipeError, "module:name"),
        (Recipe("tests.scaling.sources:train", {"n": 3}), None, RecipeError, "cannot be called"),
        (Recipe("os:getpid"), None, DtypeError, "`os:getpid` must be arrays.*got int"),
    ],
)
def test_what_cannot_be_cut_says_why(x: object, y: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cut(x, y)


@pytest.mark.parametrize("chunk_size", [0, True, 2.0, "5"])
def test_a_chunk_size_must_be_a_positive_number(chunk_size: Any) -> None:
    with pytest.raises(ChunkError, match=r"chunk_size.*≥ 1"):
        cut(X, Y, chunk_size=chunk_size)
    assert cut(X, Y, chunk_size=np.int64(5)).sizes == (5, 5, 5, 5, 3)


def test_batches_are_kept_in_chunks_of_one_size() -> None:
    """One after the other, cut and joined as they come; those of other shapes stay themselves."""

    def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
        x, y = sources.train()
        return [(x[a:b], y[a:b]) for a, b in ((0, 4), (4, 15), (15, 16), (16, 23))]

    assert cut(batches()).sizes == (4, 4, 4, 4, 4, 3)
    data = cut(batches(), chunk_size=10)
    assert data.sizes == (10, 10, 3)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in loaded(data)]), X)
    np.testing.assert_array_equal(np.concatenate([y for _, y in loaded(data)]), Y)
    assert not data.can_be_recut
    assert cut(X, Y, chunk_size=5).can_be_recut
    assert not cut(da.from_array(X, chunks=(5, 4)), da.from_array(Y, chunks=5)).can_be_recut
    with pytest.raises(ChunkError, match="files of one chunk each"):
        recut(data, 7)
    ragged = [(torch.ones(4, width), torch.ones(4)) for width in (2, 3, 3)]
    assert cut(ragged).sizes == (4, 4, 4)
    with pytest.raises(ChunkError, match="several shapes.*Omit `chunk_size`"):
        cut(ragged, chunk_size=5)


def test_a_data_set_that_carries_its_samples_is_refused_with_the_remedy() -> None:
    heavy = sources.Samples()
    heavy.samples = np.zeros(2**21)  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"16 MiB.*Recipe"):
        cut(heavy)
