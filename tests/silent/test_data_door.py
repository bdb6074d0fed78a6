"""One door for data: the same samples for influence models, calculators and job files, or the same refusal."""

import functools
import os
import pickle
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import zarr
from distributed import Client
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distinfluence import (
    DaskInfluenceCalculator,
    DirectInfluence,
    LanguageModelObjective,
    Objective,
    Recipe,
    SequentialInfluenceCalculator,
    SupervisedObjective,
)
from distinfluence.errors import (
    ChunkError,
    DistinfluenceError,
    DtypeError,
    EmptyDataError,
    IndexRangeError,
    NonDeterministicDataError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from distinfluence.model.batch import Batch, joined
from distinfluence.model.data.datasets import again
from distinfluence.model.data.door import opened
from distinfluence.model.data.loaders import MORE
from distinfluence.model.identity.probe import Checked
from distinfluence.model.objective import Forward
from distinfluence.model.reducer import READ_TWICE
from distinfluence.scaling.data import chunks
from distinfluence.scaling.data.chunks import recut
from distinfluence.scaling.data.sources import DatasetSource

N = 60
ALL = list(range(N))
SOME = ALL[7:27] + ALL[40:]  # 40 of 60
DAMPING = 0.1
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) * 7 % 3 % 2
X_TEST, Y_TEST = X[:2] + 0.5, torch.tensor([1, 0])


class Cross(Objective):
    """Cross-entropy, of (x, y) or of a dict of both."""

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        outputs: Tensor = model(batch["x"] if isinstance(batch, dict) else batch[0])
        return outputs

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        targets = batch["y"] if isinstance(batch, dict) else batch[1]
        assert isinstance(targets, Tensor)
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, 2)


class Quick(DirectInfluence):
    """Derivatives are checked once: they are not what is tested here."""

    def check(self, drawn: Sequence[Batch]) -> Checked:
        return checked()


@functools.cache
def checked() -> Checked:
    return DirectInfluence(network(), Cross(), DAMPING).check([(X[:16], Y[:16])])


def influence() -> DirectInfluence:
    return Quick(network(), Cross(), DAMPING)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense(indices: Sequence[int]) -> Tensor:
    """Influences [2, n] in float64, by plain autograd: the Hessian of the mean loss of these samples, and gradients."""
    flat = nn.utils.parameters_to_vector(network().parameters()).detach().double()
    x, y = X[indices].double(), Y[list(indices)]

    def losses(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ theta[:6].view(2, 3).T + theta[6:], y, reduction="none")

    functional = torch.autograd.functional
    hessian: Any = functional.hessian(lambda t: losses(t, x, y).mean(), flat)
    rows: list[Any] = [
        functional.jacobian(lambda t, a=a, b=b: losses(t, a.double(), b), flat) for a, b in ((X_TEST, Y_TEST), (x, y))
    ]
    found: Tensor = rows[0] @ torch.linalg.solve(hessian + DAMPING * torch.eye(8).double(), rows[1].T)
    return found


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A torch data set, sample by sample."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Duck:
    """What has a length and elements, and is no torch data set."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, object]:
        if not 0 <= index < N:
            raise IndexError(index)
        return {"x": X[index].numpy(), "y": int(Y[index])}


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)


class InBatches(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X.split(25), Y.split(25), strict=True)


class Again:
    """Gives batches whenever it is iterated; neither a list nor a loader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(InBatches())


class Half(DataLoader[Any]):
    """A loader that does not do what its sampler says."""

    def __iter__(self) -> Any:
        return iter([(X[:30], Y[:30])])


class Taken(Dataset[Any]):
    """A data set that is asked for whole batches."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: Any) -> Any:
        return X[index], Y[index]


def stack(samples: list[Any]) -> tuple[Tensor, Tensor]:
    x, y = zip(*samples, strict=True)
    return torch.stack(x), torch.stack(y)


def without_the_first(samples: list[Any]) -> tuple[Tensor, Tensor]:
    return stack(samples[1:])


def rows() -> list[dict[str, Any]]:
    return [{"x": x, "y": y} for x, y in zip(X.tolist(), Y.tolist(), strict=True)]


def hugging_face(**more: list[Any]) -> Any:
    return datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist(), **more})


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(X.numpy(), columns=["a", "b", "c"]).assign(**columns)


def on_disk(folder: Path) -> Any:
    arrays = []
    for name, tensor in (("x", X), ("y", Y)):
        array = zarr.create_array(str(folder / name), shape=tensor.shape, dtype=tensor.numpy().dtype, overwrite=True)
        array[:] = tensor.numpy()
        arrays.append(array)
    return tuple(arrays)


def memory_mapped(folder: Path) -> Any:
    for name, tensor in (("x", X), ("y", Y)):
        np.save(folder / f"{name}.npy", tensor.numpy())
    return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y"))


def loader(data: Any = None, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Pairs() if data is None else data, **{"batch_size": 25, **settings})


def over(data: Any, indices: list[int]) -> DataLoader[Any]:
    return DataLoader(data, batch_sampler=BatchSampler(SubsetRandomSampler(indices), 32, False))


DIST = {"num_replicas": 1, "rank": 0}

TAKEN: dict[str, tuple[list[int], Callable[[Path], Any]]] = {
    "tensors": (ALL, lambda _: (X, Y)),
    "a list of labels": (ALL, lambda _: (X, Y.tolist())),
    "NumPy": (ALL, lambda _: (X.numpy(), Y.numpy())),
    "NumPy, backwards": (ALL[::-1], lambda _: (X.numpy()[::-1], Y.numpy()[::-1])),
    "NumPy, big-endian": (ALL, lambda _: (X.numpy().astype(">f4"), Y.numpy().astype(">i8"))),
    "NumPy, memory-mapped": (ALL, memory_mapped),
    "pandas": (ALL, lambda _: (frame(), pd.Series(Y.numpy()))),
    "pandas, nullable": (ALL, lambda _: (frame().astype("Float32"), pd.Series(Y.numpy()).astype("Int64"))),
    "dask": (ALL, lambda _: (da.from_array(X.numpy(), chunks=(25, 2)), da.from_array(Y.numpy(), chunks=25))),
    "zarr": (ALL, on_disk),
    "a dict of tensors": (ALL, lambda _: {"x": X, "y": Y}),
    "a dict of a frame and a series": (ALL, lambda _: {"x": frame(), "y": pd.Series(Y.numpy())}),
    "samples": (ALL, lambda _: [Pairs()[i] for i in ALL]),
    "samples of Python numbers": (ALL, lambda _: rows()),
    "samples in lists": (ALL, lambda _: [[x, y] for x, y in zip(X.tolist(), Y.tolist(), strict=True)]),
    "batches": (ALL, lambda _: list(loader())),
    "batches of other sizes": (ALL, lambda _: [(X[:9], Y[:9]), (X[9:40], Y[9:40]), (X[40:], Y[40:])]),
    "dicts of batches": (ALL, lambda _: [{"x": X[:25], "y": Y[:25]}, {"x": X[25:].numpy(), "y": Y[25:].numpy()}]),
    "one batch in a list": (ALL, lambda _: [(X, Y)]),
    "a tensor data set": (ALL, lambda _: TensorDataset(X, Y)),
    "a torch data set": (ALL, lambda _: Pairs()),
    "a subset": (SOME, lambda _: Subset(Pairs(), SOME)),
    "a concatenation": (SOME * 2, lambda _: ConcatDataset([Subset(Pairs(), SOME)] * 2)),
    "Hugging Face": (ALL, lambda _: hugging_face()),
    "Hugging Face, torch": (ALL, lambda _: hugging_face().with_format("torch")),
    "Hugging Face, columns": (
        ALL,
        lambda _: hugging_face(text=["a"] * N).with_format("torch", columns=["x", "y"]),
    ),
    "a duck": (ALL, lambda _: Duck()),
    "a loader": (ALL, lambda _: loader()),
    "a loader over tensors": (ALL, lambda _: loader(TensorDataset(X, Y))),
    "a loader over Hugging Face": (ALL, lambda _: loader(hugging_face())),
    "a loader that shuffles": (ALL, lambda _: loader(shuffle=True)),
    "a loader with a generator": (
        ALL,
        lambda _: loader(TensorDataset(X, Y), shuffle=True, generator=torch.Generator().manual_seed(3)),
    ),
    "a subset sampler": (SOME, lambda _: loader(sampler=SubsetRandomSampler(SOME[::-1]))),
    "a batch sampler over a subset": (SOME, lambda _: over(Pairs(), SOME)),
    "a batch sampler over a subset of tensors": (SOME, lambda _: over(TensorDataset(X, Y), SOME)),
    "a sampler with repetitions": ([5, 3, 3, *ALL], lambda _: loader(sampler=[5, 3, 3, *ALL])),
    "three samples that shuffle": ([2, 4, 9], lambda _: loader(sampler=SubsetRandomSampler([9, 2, 4]))),
    "drop_last that drops nothing": (ALL, lambda _: loader(batch_size=20, drop_last=True)),
    "all of a distributed sampler": (ALL, lambda _: loader(sampler=DistributedSampler(Pairs(), **DIST, shuffle=False))),
    "a loader over a stream": (ALL, lambda _: loader(Streamed())),
    "a loader over a stream of batches": (ALL, lambda _: loader(InBatches(), batch_size=None)),
    "a loader that asks for batches": (
        SOME,
        lambda _: loader(Taken(), batch_size=None, sampler=BatchSampler(SubsetRandomSampler(SOME), 20, False)),
    ),
    "a loader with its own collate": (ALL, lambda _: loader(collate_fn=stack)),
    "a loader with a worker": (SOME, lambda _: loader(sampler=SOME, num_workers=1)),
    "a loader of another class": (ALL[:30], lambda _: Half(Pairs())),
    "anything that gives batches": (ALL, lambda _: Again()),
}


class Words(Pairs):
    def __getitem__(self, index: int) -> Any:
        return {"x": X[index], "y": Y[index], "text": "a"}


class Ragged(Pairs):
    def __getitem__(self, index: int) -> Any:
        return X[index, : 2 + index % 2], Y[index]


class Holes(Pairs):
    def __getitem__(self, index: int) -> Any:
        return X[index], None if index == 4 else Y[index]


class Sized:
    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


WEIGHTED = WeightedRandomSampler([1.0] * N, N)
PART: Any = DistributedSampler(Pairs(), num_replicas=2, rank=0)
MANY = [(torch.ones(1 + i % 2), torch.ones(1 + i % 2)) for i in range(340)]

REFUSED: dict[str, tuple[type[DistinfluenceError], str, Callable[[Path], Any]]] = {
    "weighted": (
        NonDeterministicDataError,
        "WeightedRandomSampler draws others.*Subset",
        lambda _: loader(sampler=WEIGHTED),
    ),
    "replacement": (
        NonDeterministicDataError,
        "RandomSampler draws others",
        lambda _: loader(sampler=RandomSampler(Pairs(), replacement=True)),
    ),
    "drop_last": (SettingError, "leaves out 10 at each pass.*drop_last=False", lambda _: loader(drop_last=True)),
    "shuffled drop_last": (SettingError, "leaves out 10", lambda _: loader(drop_last=True, shuffle=True)),
    "distributed": (SettingError, "DistributedSampler: it visits one part of 2", lambda _: loader(sampler=PART)),
    "endless": (ShapeError, "a DataLoader that ends", lambda _: loader(sampler=iter(int, 1))),
    "collate that drops": (
        ShapeError,
        "keeps every sample, got 59 of 60",
        lambda _: loader(batch_size=N, collate_fn=without_the_first),
    ),
    "a bare stream": (DtypeError, r"got Streamed.*DataLoader\(…, batch_size", lambda _: Streamed()),
    "a stream of samples": (ShapeError, "got a scalar", lambda _: loader(Streamed(), batch_size=None)),
    "a generator": (DtypeError, "got generator.*wrap a generator in a list", lambda _: (pair for pair in Streamed())),
    "strings": (DtypeError, r"\['text'\]` must hold numbers, got str.*remove_columns", lambda _: Words()),
    "strings of Hugging Face": (
        DtypeError,
        r"\['text'\]` must hold numbers, got str.*set_format",
        lambda _: hugging_face(text=["a"] * N),
    ),
    "None": (DtypeError, r"\[1\]` must hold numbers, got NoneType", lambda _: Holes()),
    "ragged": (ShapeError, r"\[0\]` must have one shape.*\[2\] and \[3\].*collate_fn", lambda _: Ragged()),
    "arrow": (DtypeError, "format 'arrow'.*with_format", lambda _: hugging_face().with_format("arrow")),
    "splits": (DtypeError, r"collection.*\['train'\]", lambda _: datasets.DatasetDict({"train": hugging_face()})),
    "streaming": (DtypeError, "got IterableDataset.*DataLoader", lambda _: hugging_face().to_iterable_dataset()),
    "no length": (DtypeError, "got Sized.*__len__", lambda _: Sized()),
    "a list of inputs and targets": (ShapeError, r"tuple, `\(x, y\)`", lambda _: [X, Y]),
    "a list of two matrices": (ShapeError, r"tuple, `\(x, y\)`", lambda _: [X, X[:, :2]]),
    "either": (ShapeError, "could be either", lambda _: [{"x": X[i], "y": X[i]} for i in range(4)]),
    "vectors": (ShapeError, "could be either", lambda _: [X[0], X[1]]),
    "mixed": (ShapeError, r"a batch in `x\[0\]` and a sample in `x\[1\]`", lambda _: [(X, Y), (X[0], Y[0])]),
    "numbers": (DtypeError, "a list of numbers", lambda _: [1.0, 2.0]),
    "lists of numbers": (DtypeError, "a list of numbers", lambda _: X.tolist()),
    "names": (DtypeError, r"`x\[0\]` must be arrays.*got str", lambda _: ["a", "b"]),
    "nothing": (EmptyDataError, "at least one sample", lambda _: []),
    "no rows": (EmptyDataError, "at least one sample", lambda _: (X[:0], Y[:0])),
    "lengths": (
        ShapeError,
        r"`x\[0\]` and `x\[1\]`.*as many samples, got x\[0\]: 60, x\[1\]: 59",
        lambda _: (X, Y[1:]),
    ),
    "680 lengths": (ShapeError, r"as many samples.*… and 675 more", lambda _: tuple(MANY)),
    "a scalar": (ShapeError, "got a scalar", lambda _: (X, torch.tensor(1))),
    "strings in NumPy": (DtypeError, "got dtype <U1", lambda _: (X.numpy(), np.array(["a"] * N))),
    "objects in NumPy": (DtypeError, "got dtype object", lambda _: (np.array([None] * N), Y.numpy())),
    "masked": (DtypeError, "must not be masked", lambda _: (np.ma.masked_less(X.numpy(), 0), Y.numpy())),
    "sparse": (DtypeError, r"got csr_matrix.*toarray", lambda _: (scipy.sparse.csr_matrix(X.numpy()), Y)),
    "a sparse tensor": (DtypeError, r"to_dense", lambda _: (X.to_sparse(), Y)),
    "words in pandas": (
        DtypeError,
        r"'d' \((object|str).*'e' \(category.*drop them",
        lambda _: (frame(d=["a"] * N, e=pd.Categorical(["a"] * N)), Y),
    ),
    "dates in pandas": (DtypeError, r"'d' \(datetime64", lambda _: (frame(d=pd.Timestamp("2020-01-01")), Y)),
    "gaps in pandas": (
        NonFiniteError,
        r"samples \[0\]",
        lambda _: (frame().astype("Float32").replace(X[0, 0].item(), pd.NA), Y),
    ),
    "another index": (ShapeError, "same index.*reset_index", lambda _: (frame(), pd.Series(Y.numpy())[::-1])),
    "groups": (DtypeError, "got DataFrameGroupBy.*DataFrame", lambda _: frame().groupby("a")),
    "dask and NumPy": (ChunkError, "from_array", lambda _: (da.from_array(X.numpy()), Y.numpy())),
    "dask chunks": (
        ChunkError,
        "same chunks.*rechunk",
        lambda _: (da.from_array(X.numpy(), 5), da.from_array(Y.numpy(), 6)),
    ),
    "a path": (DtypeError, "Load the file", lambda folder: folder),
    "a model": (DtypeError, "got Linear.*not data", lambda _: network()),
    "a function": (DtypeError, "got function.*Call it", lambda _: network),
    "a loader in a tuple": (DtypeError, "got DataLoader.*alone", lambda _: (loader(), Y)),
}


def built(kind: str, folder: str) -> Any:
    """What a job's callable returns."""
    return (TAKEN[kind][1] if kind in TAKEN else REFUSED[kind][2])(Path(folder))


def in_memory(data: Any, **_: Any) -> Tensor:
    model = influence().fit(data)
    return model.influences(X_TEST, Y_TEST, *(data if isinstance(data, tuple) else (data,)))


def by_calculator(data: Any, **_: Any) -> Tensor:
    calculator = SequentialInfluenceCalculator(influence())
    calculator.fit(*(data if isinstance(data, tuple) else (data,)))
    return torch.as_tensor(calculator.influences(X_TEST, Y_TEST).compute(scheduler="synchronous"))


def by_job(data: Any, *, kind: str, folder: Path, size: int = 40) -> Tensor:
    """As `run_job` does, without its cluster and its plan."""
    calculator = SequentialInfluenceCalculator(influence())
    train = calculator.chunked(Recipe(f"{__name__}:built", {"kind": kind, "folder": str(folder)}))
    calculator.fit(recut(train, size))
    return torch.as_tensor(calculator.influences(X_TEST, Y_TEST).compute(scheduler="synchronous"))


DOORS = (in_memory, by_calculator, by_job)


@pytest.mark.parametrize("kind", TAKEN)
def test_every_kind_of_data_gives_the_same_scores_at_every_door(kind: str, tmp_path: Path) -> None:
    indices, make = TAKEN[kind]
    expected = dense(indices)
    for door in DOORS:
        found = door(make(tmp_path), kind=kind, folder=tmp_path)
        assert found.shape == expected.shape, door
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5, msg=door.__name__)  # float32


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_alike_at_every_door(kind: str, tmp_path: Path) -> None:
    error, pattern, make = REFUSED[kind]
    said = set()
    for door in (in_memory_whole, by_calculator_whole, by_job):
        with pytest.raises(error) as caught:
            door(make(tmp_path), kind=kind, folder=tmp_path, size=N)
        message = re.sub(r"^chunk 0 \(samples 0 to \d+\): ", "", str(caught.value))
        said.add(re.sub(rf"\b(data|{re.escape(__name__)}:built)(?=[`\[])", "x", message))
    (message,) = said
    assert re.search(pattern, message), message
    assert len(message) < 500


def in_memory_whole(data: Any, **_: Any) -> None:
    influence().fit(data)


def by_calculator_whole(data: Any, **_: Any) -> None:
    SequentialInfluenceCalculator(influence()).fit(data)


def test_opening_a_loader_draws_nothing_from_the_callers_generators() -> None:
    own, numpy = torch.Generator().manual_seed(3), np.random.default_rng(3)

    class Numpys(Sampler[int]):
        def __init__(self) -> None:
            self.generator = numpy

        def __iter__(self) -> Iterator[int]:
            return iter([*self.generator.permutation(N).tolist(), np.random.randint(1), random.randrange(1)])

        def __len__(self) -> int:
            return N + 2

    def states() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            own.get_state().tolist(),
            numpy.bit_generator.state,
            np.random.get_state()[1].tolist(),
            random.getstate(),
        ]

    before = states()
    for data in (
        loader(shuffle=True),
        loader(sampler=SubsetRandomSampler(SOME, generator=own)),
        loader(sampler=RandomSampler(Pairs(), num_samples=N, generator=own), generator=own),
        loader(sampler=Numpys()),
    ):
        for batch in opened(data).batches():
            assert isinstance(batch, tuple)
        assert states() == before


def test_tensors_are_passed_on_and_not_copied() -> None:
    samples = opened(X, Y)
    batch = samples.read(0, N)
    assert isinstance(batch, tuple)
    assert batch[0] is X
    assert batch[1] is Y
    assert [len(part[0]) for part in samples.batches()] == [N]


def test_two_batches_of_tokens_in_a_list_are_batches() -> None:
    """Not token ids and labels: the second batch counted as the labels of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    ids = torch.randint(5, (6, 4))
    apart = DirectInfluence(model, LanguageModelObjective(), DAMPING, second_order_mode="ggn").fit([ids[:3], ids[3:]])
    whole = DirectInfluence(model, LanguageModelObjective(), DAMPING, second_order_mode="ggn").fit(ids)
    assert apart.reducer.chunk_sizes == (3, 3)
    assert apart.reducer.n_samples == 6
    torch.testing.assert_close(apart.influences(ids), whole.influences(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Pairs, loader, lambda: [(X, Y)], Again, lambda: Recipe(f"{__name__}:built")])
def test_targets_next_to_data_that_have_them_are_refused(make: Callable[[], Any]) -> None:
    calculator = SequentialInfluenceCalculator(influence()).fit(X, Y)
    with pytest.raises(SettingError, match="`y`"):
        calculator.chunked(make(), Y)
    if not isinstance(make(), Recipe):
        with pytest.raises(SettingError, match="pass it alone"):
            influence().fit((X, Y)).influences(make(), Y)


class Elsewhere(Pairs):
    """Counts the samples that are read in the process that made it."""

    reads = 0

    def __init__(self) -> None:
        self.process = os.getpid()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        Elsewhere.reads += os.getpid() == self.process
        return super().__getitem__(index)


def test_samples_behind_workers_are_read_by_them_alone() -> None:
    assert influence().fit(loader(Elsewhere(), num_workers=1, sampler=SOME)).reducer.n_samples == len(SOME)
    assert Elsewhere.reads == 0
    influence().fit(loader(Elsewhere(), sampler=SOME))
    assert Elsewhere.reads == len(SOME) + 2 * READ_TWICE


class Counted(InBatches):
    reads = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        Counted.reads += 1
        return super().__iter__()


def test_a_stream_is_read_once_by_a_calculator_and_once_for_a_recipe() -> None:
    by_calculator(loader(Counted(), batch_size=None))
    assert Counted.reads == 1
    calculator = SequentialInfluenceCalculator(influence())
    calculator.fit(recut(calculator.chunked(Recipe(f"{__name__}:counted")), 16))
    assert Counted.reads == 2


def counted() -> Any:
    return loader(Counted(), batch_size=None)


def test_chunks_of_a_subset_carry_its_order_once() -> None:
    """A chunk is a start and a stop; the indices lie with the data set, and all chunks share its bytes."""
    data = SequentialInfluenceCalculator(influence()).chunked(over(Pairs(), SOME), chunk_size=1)
    assert len(data.sources) == len(SOME)
    pickles = {id(source.recipe) for source in data.sources if isinstance(source, DatasetSource)}
    assert len(pickles) == 1


@pytest.mark.parametrize("kind", ["batches", "a batch sampler over a subset", "Hugging Face", "a loader over a stream"])
def test_workers_of_a_cluster_read_the_same_samples(kind: str, client: Client, tmp_path: Path) -> None:
    indices, make = TAKEN[kind]
    calculator = DaskInfluenceCalculator(influence(), client, scratch=tmp_path)
    found = calculator.fit(make(tmp_path)).influences(X_TEST, Y_TEST).compute()
    torch.testing.assert_close(torch.as_tensor(found).double(), dense(indices), rtol=1e-4, atol=1e-5)  # float32


class OwnWay(DataLoader[Any]):
    """Gives what its sampler says, by a way of its own."""

    def __iter__(self) -> Any:
        return ((X[indices], Y[indices]) for indices in self.batch_sampler or ())


class Drawing:
    """A sampler of no class of torch's, which draws from generators of its own and of everybody."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        torch.rand(1)
        return iter(self.own.permutation(N).tolist())

    def __len__(self) -> int:
        return N


def test_what_a_sampler_gives_is_read_whatever_it_is_packed_in() -> None:
    visits: list[Any] = [
        torch.arange(40).split(8),
        np.arange(40).reshape(5, 8),
        [range(8 * i, 8 * i + 8) for i in range(5)],
    ]
    for visit in visits:
        samples = opened(loader(batch_size=1, batch_sampler=visit))
        assert samples.sizes == (8,) * 5
        assert torch.equal(first_of(samples.read(0, 40)), X[:40])
    for visit in visits[:2]:
        asked = opened(loader(Taken(), batch_size=None, sampler=visit))
        assert asked.sizes == (8,) * 5
        assert torch.equal(first_of(asked.read(0, 40)), X[:40])


def first_of(batch: Batch) -> Tensor:
    first = batch[0] if isinstance(batch, tuple) else batch
    assert isinstance(first, Tensor)
    return first


@pytest.mark.parametrize("settings", [{}, {"batch_size": None}])
def test_samplers_of_any_class_draw_nothing_from_the_callers(settings: dict[str, Any]) -> None:
    sampler = Drawing()
    before = torch.get_rng_state(), sampler.own.bit_generator.state
    opened(loader(sampler=sampler, **settings))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert sampler.own.bit_generator.state == before[1]


def test_a_loader_with_its_own_way_must_keep_its_order() -> None:
    assert torch.equal(first_of(opened(OwnWay(Pairs(), batch_size=25)).read(0, N)), X)
    for settings, error, message in (
        ({"shuffle": True}, NonDeterministicDataError, "OwnWay.*without shuffle=True"),
        ({"drop_last": True}, SettingError, "leaves out 10"),
        ({"sampler": PART}, SettingError, "one part of 2"),
    ):
        with pytest.raises(error, match=message):
            opened(OwnWay(Pairs(), batch_size=25, **settings))


class Refilled(IterableDataset[Any]):
    """Gives the same tensors and arrays again, with other values."""

    def __iter__(self) -> Iterator[Any]:
        x, y = torch.empty(20, 3), np.empty(20, int)
        for start in range(0, N, 20):
            x.copy_(X[start : start + 20])
            y[:] = Y[start : start + 20]
            yield x, y


def test_batches_that_share_a_buffer_are_kept_apart() -> None:
    x = torch.empty(20, 3)

    def filled(samples: list[Any]) -> Tensor:
        return x.copy_(torch.stack([own for own, _ in samples]))

    for data in (loader(Refilled(), batch_size=None), loader(batch_size=20, collate_fn=filled)):
        assert torch.equal(torch.cat([first_of(batch) for batch in list(opened(data).batches())]), X)


class Lengths:
    """Pads to the longest of a batch, and keeps which samples it was called with."""

    def __init__(self) -> None:
        self.groups: set[tuple[int, ...]] = set()

    def __call__(self, samples: list[Any]) -> Tensor:
        self.groups.add(tuple(samples))
        return nn.functional.pad(torch.tensor(samples)[:, None], (0, max(samples) // 20))


@pytest.mark.parametrize("data", [list(range(N)), np.arange(N).astype(int)])
def test_a_function_that_collates_sees_the_batches_of_its_loader_alone(data: Any) -> None:
    """Whoever reads: one sample, all of them, chunks that the data bring."""
    collate = Lengths()
    own = DataLoader[Any]([*map(int, data)] if isinstance(data, list) else Numbers(), batch_size=10, collate_fn=collate)
    samples = opened(own)
    assert torch.equal(
        first_of(samples.read(23, 27)), torch.arange(23, 27)[:, None].expand(4, 1) * torch.tensor([1, 0])
    )
    with pytest.raises(ShapeError, match="Pad all samples to one length"):
        samples.read(0, N)
    cut = SequentialInfluenceCalculator(influence()).chunked(own)
    assert cut.sizes == (10,) * 6
    assert [np.asarray(source.load()).shape[1] for source in cut.sources] == [1, 1, 2, 2, 3, 3]
    assert collate.groups <= {tuple(range(start, start + 10)) for start in range(0, N, 10)}


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


def padded() -> DataLoader[Any]:
    return DataLoader(Numbers(), batch_size=10, collate_fn=Lengths())


def test_a_plan_leaves_the_batches_of_a_function_that_collates() -> None:
    calculator = SequentialInfluenceCalculator(influence())
    recipe = calculator.chunked(Recipe(f"{__name__}:padded"))
    assert recipe.sizes == (10,) * 6
    assert [own.planned(None) for own in (recipe, recut(recipe, 5))] == [10, 5]
    assert recipe.planned(30) == 30
    train, test = (calculator.chunked(loader(collate_fn=stack, batch_size=size)) for size in (20, 12))
    plan = calculator.plan(train, None, test)
    assert (plan.chunks.train, plan.chunks.test) == (20, 12)
    assert calculator.plan(train, None, test, chunk_size=20, test_chunk_size=30).chunks.test == 30
    assert calculator.chunked(loader()).planned(None) is None


def test_an_order_lies_in_a_file_and_not_in_the_tasks(client: Client, tmp_path: Path) -> None:
    """Nor does it count to what a data set may weigh; a task is as small as for the data set itself."""
    many = np.resize(np.arange(N), 2_000_000)
    calculator = DaskInfluenceCalculator(influence(), client, scratch=tmp_path)
    source = (
        calculator.chunked(Subset(Pairs(), [1])).sources[0],
        calculator.chunked(loader(sampler=many, batch_size=50_000)).sources[-1],
    )
    assert [len(pickle.dumps(one)) for one in source][1] < len(pickle.dumps(source[0])) + 10_000
    x, y = replace(source[1], start=1_999_990).load()  # type: ignore[type-var]
    assert np.array_equal(x, X.numpy()[many[-10:]])
    assert np.array_equal(y, Y.numpy()[many[-10:]])


class Noisy(Pairs):
    """A random transform."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + torch.rand(3), Y[index]


class NoisyInNumpy(Pairs):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + float(np.random.rand()), Y[index]


@pytest.mark.parametrize("settings", [{"num_workers": 2}, {"collate_fn": stack}])
@pytest.mark.parametrize("data", [Noisy, NoisyInNumpy])
def test_random_transforms_are_noticed_behind_workers_and_collate_functions(data: Any, settings: Any) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with pytest.raises(NonDeterministicDataError, match="random transforms"):
        influence().fit(loader(data(), **settings))
    assert (before[0].equal(torch.get_rng_state()), before[1]) == (True, np.random.get_state()[1].tolist())


def test_a_loader_whose_workers_persist_can_be_read_again_by_workers_that_are_spawned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own workers run and cannot be pickled; the function that collates goes to the new ones."""
    collates = []

    def seen(loader: DataLoader[Any], data: Any, **visits: Any) -> DataLoader[Any]:
        collates.append(pickle.loads(pickle.dumps(visits["collate_fn"])))
        return again(loader, data, **visits)

    monkeypatch.setattr("distinfluence.model.data.datasets.again", seen)
    own = loader(num_workers=1, persistent_workers=True)
    next(iter(own))
    assert torch.equal(torch.cat([first_of(batch) for batch in opened(own).batches()]), X)
    assert torch.equal(collates[0]([(X[0], Y[0])])[0], X[:1])


def test_a_stream_is_regrouped_in_as_many_joins_as_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    joins = list[int]()

    def counted_join(parts: Sequence[Batch]) -> Batch:
        joins.append(len(parts))
        return joined(parts)

    monkeypatch.setattr(chunks, "joined", counted_join)
    cut = SequentialInfluenceCalculator(influence()).chunked(
        [(x[None], y[None]) for x, y in zip(X, Y, strict=True)], chunk_size=20
    )
    assert cut.sizes == (20, 20, 20)
    assert joins == [20, 20, 20]


def test_bfloat16_is_float32_in_memory_and_in_tasks() -> None:
    """NumPy lacks it: a float64 model took it in memory and refused it in tasks."""
    x = X.bfloat16()
    said = []
    for fit in (influence_in(torch.float64).fit, SequentialInfluenceCalculator(influence_in(torch.float64)).fit):
        with pytest.raises(DtypeError, match=r"float32 \[") as caught:
            fit((x, Y))
        said.append(str(caught.value).partition("): ")[2])
    assert said[0] in said[1]
    alike = [fit.reducer.digest for fit in (influence().fit((x, Y)), influence().fit((x.float(), Y)))]
    assert alike[0] == alike[1]


def influence_in(dtype: torch.dtype) -> DirectInfluence:
    return DirectInfluence(network().to(dtype), Cross(), DAMPING)


class Positions(nn.Module):
    """A score for each position of a sequence, of which there are as many as in the longest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer(x)[..., 0]
        return scores


def test_labels_may_follow_outputs_that_follow_the_batch() -> None:
    objective = SupervisedObjective(nn.CrossEntropyLoss(reduction="none"))
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    short, long = (x[:, :3], torch.tensor([0, 1, 2, 2])), (x, torch.tensor([0, 4, 3, 4]))
    for batches in ([short, long], [long, short]):
        assert DirectInfluence(Positions(), objective, DAMPING).fit(batches).reducer.n_samples == 8
    with pytest.raises(IndexRangeError, match=r"from 0 to 4.*got \[5\] in samples \[3\]"):
        DirectInfluence(Positions(), objective, DAMPING).fit([short, (x, torch.tensor([0, 4, 3, 5]))])


def test_a_long_order_of_data_without_a_length_is_no_endless_one() -> None:
    many = [i % N for i in range(MORE + 10)]
    assert len(opened(loader(Sized(), sampler=many, batch_size=100))) == len(many)


def test_odd_arrays_and_numbers_are_read_or_named() -> None:
    fields = np.zeros(4, dtype=[("x", "f4"), ("k", "i1")])
    fields["x"] = [1, 2, 3, 4]
    assert first_of(opened(fields["x"]).read(0, 4)).tolist() == [1, 2, 3, 4]
    with pytest.raises(DtypeError, match=r"`y`.*list of int64.*numpy\.asarray\(y\)"):
        opened(X, list(Y.numpy()))
    for large in ([(X[0], 2**63), (X[1], 1)], [(X[0], [2**63, 1]), (X[1], [1, 1])]):
        with pytest.raises(DtypeError, match=r"`x\[1\]`.*below 2⁶³"):
            opened(large).read(0, 2)
