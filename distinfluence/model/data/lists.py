"""Lists: of samples or of batches, told apart by their entries. A pair of inputs and targets is a tuple."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distinfluence.errors import DtypeError, EmptyDataError, ShapeError
from distinfluence.model.data.arrays import holds_numbers, is_array, is_number
from distinfluence.model.data.collate import batch_of
from distinfluence.model.data.datasets import Fetched
from distinfluence.model.data.refused import no_data
from distinfluence.model.data.samples import Pieces, Samples

BATCH, SAMPLE, EITHER, NUMBER = "a batch", "a sample", "a batch or a sample", "a number"
REMEDY = (
    "Pass one `(x, y)` tuple of arrays with the samples along their first dimension, or a `DataLoader` over a data set."
)


def of_list(data: Sequence[Any], name: str) -> Samples:
    """Return the samples of a list.

    Entries are batches where every array in one has the same first length, and one of them has a second dimension;
    they are samples where an entry holds numbers, or arrays of other lengths.

    Args:
        data: The list.
        name: What to call it in errors.

    Returns:
        The samples.

    Raises:
        DtypeError: If an entry is not one of arrays and numbers.
        EmptyDataError: If the list is empty.
        ShapeError: If the entries could be both, or some are batches and some are samples.
    """
    if not data:
        raise EmptyDataError(
            f"`{name}` must hold at least one sample, got an empty list. Pass a data set that isn't empty."
        )
    kinds = [_kind(entry, f"{name}[{number}]") for number, entry in enumerate(data)]
    if NUMBER in kinds or holds_numbers(list(data)):
        raise DtypeError(
            f"`{name}` must be samples or batches, got a list of numbers. Convert it with `torch.tensor`, and pass "
            "inputs and targets as one `(x, y)` tuple."
        )
    _check_no_pair(data, name)
    usual = Counter(kinds).most_common(1)[0][0]
    odd = next((number for number, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise ShapeError(
            f"`{name}` must be a list of samples or a list of batches, got {kinds[0]} in `{name}[0]` and {kinds[odd]} "
            f"in `{name}[{odd}]`. {REMEDY}"
        )
    if usual == EITHER:
        raise ShapeError(
            f"`{name}` must be a list of samples or a list of batches, got entries that could be either: all their "
            "arrays have one dimension and one length. Stack samples to one `(x, y)` tuple of arrays; join batches "
            "with `torch.cat`, or give their arrays a second dimension."
        )
    if usual == SAMPLE:
        return Fetched(data, name)
    return Pieces([batch_of(entry, f"{name}[{number}]") for number, entry in enumerate(data)], name)


def _kind(entry: Any, name: str) -> str:
    if is_number(entry):
        return NUMBER
    if not is_array(entry) and not isinstance(entry, (tuple, list, Mapping)):
        raise no_data(entry, name)
    arrays = [leaf for leaf in _leaves(entry) if is_array(leaf)]
    if not arrays or any(is_number(leaf) or holds_numbers(leaf) for leaf in _leaves(entry)):
        return SAMPLE
    if len({int(array.shape[0]) for array in arrays}) > 1:
        return SAMPLE
    return BATCH if any(len(array.shape) > 1 for array in arrays) else EITHER


def _leaves(entry: Any) -> list[Any]:
    """Return what an entry holds; a list of numbers is one leaf."""
    if isinstance(entry, Mapping):
        return [leaf for value in entry.values() for leaf in _leaves(value)]
    if isinstance(entry, (tuple, list)) and not holds_numbers(entry):
        return [leaf for value in entry for leaf in _leaves(value)]
    return [entry]


def _check_no_pair(data: Sequence[Any], name: str) -> None:
    """Raise ShapeError where bare arrays look like inputs and targets."""
    if not all(map(is_array, data)):
        return
    ranks, dtypes = {len(array.shape) for array in data}, {str(array.dtype) for array in data}
    lengths, widths = {int(array.shape[0]) for array in data}, {tuple(array.shape[1:]) for array in data}
    floats = "float" in str(data[0].dtype)
    if len(ranks) > 1 or len(dtypes) > 1 or (len(data) == 2 and len(lengths) == 1 and len(widths) > 1 and floats):
        raise ShapeError(
            f"`{name}` must be batches of one form, got a list of arrays that differ: "
            f"{', '.join(f'{a.dtype} {list(a.shape)}'.removeprefix('torch.') for a in data[:2])}. A pair of inputs and "
            "targets is a tuple, `(x, y)`."
        )
