"""The door: whatever users bring as data, read in one way by influence models, calculators and job files."""

from collections import UserList, deque
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, TensorDataset

from distinfluence.errors import DtypeError, SettingError
from distinfluence.model.batch import Batch
from distinfluence.model.data.arrays import arrays, holds_numbers, is_array, is_number
from distinfluence.model.data.datasets import Fetched
from distinfluence.model.data.lists import of_list
from distinfluence.model.data.loaders import of_loader
from distinfluence.model.data.refused import no_data, refused
from distinfluence.model.data.samples import Samples
from distinfluence.model.data.streams import Stream


def opened(x: Any, y: Any = None, *, name: str = "x") -> Samples:
    """Return data as samples, in an order that stays.

    A tuple is one batch, with the samples along the first dimension of its arrays. So are an array and a dict of
    arrays. A list is a sequence, of samples or of batches. A loader is what it visits.

    Args:
        x: Arrays, a data set, a DataLoader, a list, or anything that gives batches whenever it is iterated.
        y: The targets, arrays of as many samples; None where `x` has them.
        name: What to call `x` in errors.

    Returns:
        The samples.

    Raises:
        DtypeError: If it is not data, or holds anything but numbers.
        ShapeError: If arrays differ in length, or what a list means is not clear.
        ChunkError: If dask arrays do not line up.
        EmptyDataError: If there are no samples.
        SettingError: If `y` comes with data that have their targets, or a loader leaves samples out.
        NonDeterministicDataError: If a loader visits other samples each time.
    """
    if y is not None:
        return _of_pair(x, y)
    if isinstance(x, Samples):
        return x
    if isinstance(x, DataLoader):
        return of_loader(x, name)
    if type(x) is TensorDataset:
        x = x.tensors
    if is_array(x) or isinstance(x, (tuple, Mapping)):
        return arrays({name: x})
    if isinstance(x, (list, deque, UserList, range)):
        return of_list(x, name)
    if refused(x):
        raise no_data(x, name)
    if hasattr(x, "__getitem__"):
        if not hasattr(x, "__len__"):
            raise no_data(x, name)
        return Fetched(x, name)
    if hasattr(x, "__iter__"):
        return Stream(x, name)
    raise no_data(x, name)


def whole(x: Any, y: Any = None) -> Batch:
    """Return all samples as one batch. Arguments and errors: as for `opened`."""
    samples = opened(x, y).fixed()
    return samples.read(0, len(samples))


def _of_pair(x: Any, y: Any) -> Samples:
    for own, name in ((x, "x"), (y, "y")):
        if is_array(own) or isinstance(own, (tuple, Mapping)) or holds_numbers(own):
            continue
        if isinstance(own, list) and own and all(map(is_number, own)):
            raise DtypeError(
                f"`{name}` must be an array, got a list of {type(own[0]).__name__}. Pass `numpy.asarray({name})`."
            )
        if refused(own) or not (hasattr(own, "__iter__") or hasattr(own, "__getitem__")):
            raise no_data(own, name)
        raise SettingError(
            f"`x` and `y` must be arrays where both are given, got a {type(own).__name__} for `{name}`. A data set, a "
            "loader or a list has its targets: pass it alone, as `x`."
        )
    return arrays({"x": x, "y": y})
