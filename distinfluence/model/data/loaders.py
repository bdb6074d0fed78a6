"""DataLoaders: which samples they visit, in an order that stays."""

import functools
import itertools
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from distinfluence.errors import NonDeterministicDataError, SettingError, ShapeError
from distinfluence.model.data.arrays import arrays
from distinfluence.model.data.datasets import Fetched, again, own_collate
from distinfluence.model.data.refused import is_of
from distinfluence.model.data.samples import Samples, untouched_generators
from distinfluence.model.data.streams import Stream

FEW, MANY = 12, 24  # Few samples can come in the same order by chance, so they are drawn more often.
ROUNDS, MORE = 100, 10_000  # A sampler that visits more than ROUNDS times the samples, and MORE, does not end.


def of_loader(loader: "DataLoader[Any]", name: str) -> Samples:
    """Return what a loader visits. A random order becomes the order of the data set.

    Args:
        loader: The loader.
        name: What to call it in errors.

    Returns:
        The samples.

    Raises:
        NonDeterministicDataError: If it visits other samples each time, or, where its class has a way of its own to
            give them, in another order.
        SettingError: If it leaves samples out at each pass.
        ShapeError: If its sampler does not end.
    """
    data: Any = loader.dataset
    if isinstance(data, IterableDataset):
        return Stream(loader, name)
    own_way = type(loader).__iter__ is not DataLoader.__iter__
    batched: Any = loader.batch_sampler
    sampler: Any = loader.sampler if batched is None else getattr(batched, "sampler", None)
    _check_whole(sampler, name)
    length = len(data) if hasattr(data, "__len__") else 0
    if not own_way and type(batched) is BatchSampler and not batched.drop_last and _visits_all(sampler, length):
        sizes = tuple(min(batched.batch_size, length - start) for start in range(0, length, batched.batch_size))
        return _of_map(loader, name, None, sizes)
    with _untouched(loader):
        dropped = _dropped(batched, sampler)
        visited: Iterable[Any] = loader.sampler if batched is None else batched
        first, together = _drawn(visited, name, length, batched is not None)
        times = MANY if sum(map(len, first)) <= FEW else 2
        draws = [first, *(_drawn(visited, name, length, batched is not None)[0] for _ in range(times - 1))]
    if dropped:
        raise SettingError(
            f"`{name}` must be a DataLoader over all samples, got drop_last=True, which leaves out {dropped} at each "
            "pass. Pass drop_last=False."
        )
    groups = _settled(draws, name, visited if sampler is None else sampler)
    if own_way:
        if any(draw != first for draw in draws):
            raise NonDeterministicDataError(
                f"`{name}` must visit the samples in one order, got a {type(loader).__name__} that has its own "
                "`__iter__` and shuffles. Make it without shuffle=True, or pass a plain DataLoader."
            )
        return Stream(loader, name)
    if batched is None:
        keys = groups if together else [key for group in groups for key in group]
        return Stream(again(loader, data, sampler=keys, batch_size=None, collate_fn=loader.collate_fn), name)
    if not all(isinstance(key, int) for group in groups for key in group):
        return Stream(again(loader, data, batch_sampler=groups, collate_fn=loader.collate_fn), name)
    order = [key for group in groups for key in group]
    return _of_map(loader, name, None if order == list(range(length)) else order, tuple(map(len, groups)))


def _of_map(loader: "DataLoader[Any]", name: str, order: list[int] | None, sizes: tuple[int, ...]) -> Samples:
    data, index = loader.dataset, None if order is None else torch.tensor(order, dtype=torch.int64)
    if type(data) is TensorDataset and own_collate(loader) is None:
        return arrays({name: data.tensors}, index, sizes)
    return Fetched(data, name, index, sizes, loader)


def _visits_all(sampler: Any, length: int) -> bool:
    """Return whether a sampler visits every sample once, as far as its class says so."""
    whole = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == length
    )
    return whole and len(sampler.data_source) == length


def _check_whole(sampler: Any, name: str) -> None:
    replicas = getattr(sampler, "num_replicas", 1)
    if isinstance(replicas, int) and replicas > 1:
        raise SettingError(
            f"`{name}` must be a DataLoader over all samples, got one with {type(sampler).__name__}: it visits one "
            f"part of {replicas}, and repeats samples to make the parts equal. Pass the data set itself."
        )


def _dropped(batched: Any, sampler: Any) -> int:
    """Return how many samples a batch sampler leaves out at the end."""
    if not getattr(batched, "drop_last", False) or sampler is None:
        return 0
    return sum(1 for _ in sampler) - sum(len(batch) for batch in batched)


def _drawn(visited: Iterable[Any], name: str, length: int, in_batches: bool) -> tuple[list[list[Any]], bool]:
    """Return one pass of a sampler, in groups, and whether it gives groups: what is visited alone is a group of one.

    in_batches: whether it is a batch sampler, each of whose entries is a group, be it a list, a tensor or an array.
    """
    groups, together, n = list[list[Any]](), in_batches, 0
    says = _said_length(visited)
    for keys in visited:
        if in_batches or isinstance(keys, (list, tuple)) or getattr(keys, "ndim", 0) > 0:
            together = True
            groups.append([_key(key, length) for key in keys])
        else:
            groups.append([_key(keys, length)])
        n += len(groups[-1])
        if n > ROUNDS * length + MORE and len(groups) > says:
            raise ShapeError(
                f"`{name}` must be a DataLoader that ends, got one that has visited {n} samples of {length}. Pass the "
                "data set itself."
            )
    return groups, together


def _said_length(visited: Any) -> int:
    """Return how many entries a sampler says that it has; 0 if it does not say."""
    try:
        return len(visited)
    except (TypeError, NotImplementedError):
        return 0


def _key(key: Any, length: int) -> Any:
    try:
        number = operator.index(key)
    except TypeError:
        return key
    return number + length if number < 0 else number


def _settled(draws: list[list[list[Any]]], name: str, sampler: object) -> list[list[Any]]:
    """Return the order of the draws where all are equal, or their samples sorted where only the order differs."""
    first = draws[0]
    if all(draw == first for draw in draws[1:]):
        return first
    flat, *others = (sorted(itertools.chain.from_iterable(draw)) for draw in draws)
    if any(other != flat for other in others):
        raise NonDeterministicDataError(
            f"`{name}` must visit the same samples at each pass, got a DataLoader whose {type(sampler).__name__} draws "
            "others each time. Pass the data set itself, or a `torch.utils.data.Subset` of it."
        )
    size = max(map(len, first))
    return [flat[start : start + size] for start in range(0, len(flat), size)]


@contextmanager
def _untouched(loader: "DataLoader[Any]") -> Iterator[None]:
    """Restore what a loader's samplers draw from, their own generators and the global ones."""
    restore = list(_restorers(loader))
    with untouched_generators():
        try:
            yield
        finally:
            for one in restore:
                one()


def _restorers(owner: object) -> Iterator[Callable[[], object]]:
    """Yield functions that put the generators of a loader, and of the samplers in it, back to their present states."""
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if isinstance(value, torch.Generator):
            yield functools.partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield functools.partial(value.setstate, value.getstate())
        elif is_of(value, "numpy.random", "RandomState"):
            yield functools.partial(value.set_state, value.get_state())
        elif is_of(value, "numpy.random", "Generator"):
            bits = value.bit_generator
            yield functools.partial(setattr, bits, "state", bits.state)
        elif isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
            yield from _restorers(value)
