"""Why something is not data: what came, and what to do instead."""

import os
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distinfluence.errors import DtypeError

EXPECTED = "arrays (tensors, NumPy, pandas, dask or zarr), a data set, a DataLoader, or a list of samples or batches"


def is_of(value: object, module: str, *names: str) -> bool:
    """Return whether a value is of one of these classes of a module, which is never imported for that."""
    loaded: Any = sys.modules.get(module)
    return loaded is not None and any(isinstance(value, getattr(loaded, name, ())) for name in names)


def library(value: object) -> str:
    """Return the name of the library that a value's class is from."""
    return type(value).__module__.partition(".")[0]


def no_data(value: object, name: str) -> DtypeError:
    """Return the error for something that is not data."""
    return DtypeError(f"`{name}` must be {EXPECTED}, got {type(value).__name__}. {_remedy(value, name)}")


def refused(value: object) -> bool:
    """Return whether something is never data, although it may have a length and elements."""
    known = (str, bytes, os.PathLike, nn.Module, type, set, frozenset, IterableDataset, Iterator, int, float, complex)
    return (
        value is None
        or isinstance(value, known)
        or (callable(value) and not hasattr(value, "__getitem__"))
        or library(value) in ("pandas", "polars", "dask", "scipy", "pyarrow")
        or hasattr(value, "to_dask_array")
        or hasattr(value, "__array__")
    )


def _remedy(value: object, name: str) -> str:
    if isinstance(value, (str, bytes, os.PathLike)):
        nested = "[" in name
        return "Encode strings as numbers, or leave them out." if nested else "Load the file first."
    if isinstance(value, (nn.Module, type)) or (callable(value) and not hasattr(value, "__getitem__")):
        return "Call it, or pass what it returns: a model, a class or a function is not data."
    if isinstance(value, IterableDataset):
        return "Wrap it in a `DataLoader(…, batch_size=…)`, or pass a map-style data set."
    if isinstance(value, Iterator):
        return "It is read several times: wrap a generator in a list."
    if library(value) == "dask" or hasattr(value, "to_dask_array"):
        return "Call `to_dask_array(lengths=True)` on it."
    if library(value) == "scipy":
        return "Call `.toarray()` on it."
    if library(value) == "polars":
        return "Call `.to_numpy()` on it."
    if library(value) == "pandas":
        return "Pass a DataFrame or a Series."
    if hasattr(value, "__array__"):
        return "Convert it with `numpy.asarray`."
    if isinstance(value, (DataLoader, Dataset)) or (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return f"Pass one data set alone, not a collection of them: for instance `{name.partition('[')[0]}['train']`."
    if hasattr(value, "__getitem__"):
        return "Give the data set `__len__`, too."
    return "Convert it to one of these."
