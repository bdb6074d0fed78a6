"""Errors that a model or a loss raises on its first call, told by their cause: shapes, dtypes, ids, or its own code."""

import dis
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distinfluence.errors import DistinfluenceError, DtypeError, IndexRangeError, ModelError, ShapeError
from distinfluence.model.batch import Batch, describe, leaves

TORCH = os.path.dirname(torch.__file__) + os.sep
OURS = os.sep.join(os.path.abspath(__file__).split(os.sep)[:-3]) + os.sep
NOT_THE_USERS = (TORCH, OURS, "<frozen ")
RAISE = dis.opmap["RAISE_VARARGS"]

# Words of torch's own messages.
SHAPES = re.compile(r"shape|size|dimension|channels|\b\dD\b|broadcast", re.IGNORECASE)
DTYPES = re.compile(r"dtype|scalar type|[Ii]nput type|not implemented for|same type")
IDS = re.compile(r"index out of range|out of bounds")


@contextmanager
def told(name: str, batch: Batch) -> Iterator[None]:
    """Raise ModelError for an error of the user's own code. name: what is called."""
    try:
        yield
    except (DistinfluenceError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise of_objective(error, name, describe(batch)) from error


def of_model(error: Exception, batch: Batch, dtype: torch.dtype) -> DistinfluenceError:
    """Return what to raise for an error of the model's call.

    Args:
        error: What the call raised.
        batch: What the model was called with.
        dtype: The dtype that the model is evaluated in.

    Returns:
        The error to raise from this one.
    """
    where, said = line_of(error), sentence(error)
    refused = f"`model` ({dtype}) cannot take this batch ({describe(batch)}): {said}{where}."
    if is_torchs(error, IDS) and isinstance(error, IndexError):
        return IndexRangeError(f"{refused} The ids must be below `num_embeddings`; {_ranges(batch)}.")
    if is_torchs(error, SHAPES):
        return ShapeError(f"{refused} Pass batches of the shape that the model was trained with.")
    if is_torchs(error, DTYPES):
        return DtypeError(f"{refused} {_cast(batch, dtype, said)}")
    return ModelError(
        f"`model` raised {type(error).__name__}: {said}{where} when it was called with this batch "
        f"({describe(batch)}). Call it on such a batch to see why; subclass `Objective` if it must be called "
        "in another way."
    )


def of_loss(error: Exception, outputs: Tensor, y: Tensor) -> DistinfluenceError:
    """Return what to raise for an error of a loss of (outputs, targets).

    Args:
        error: What the call raised.
        outputs: The model's outputs, [n, ...].
        y: The targets, [n, ...].

    Returns:
        The error to raise from this one.
    """
    where, said = line_of(error), sentence(error)
    refused = (
        f"`loss` cannot take outputs {outputs.dtype} {list(outputs.shape)} with targets `y` {y.dtype} "
        f"{list(y.shape)}: {said}{where}."
    )
    if is_torchs(error, re.compile(r"Target .* out of bounds")):
        low, high = int(y.min()), int(y.max())
        return IndexRangeError(
            f"{refused} Labels count from 0 and stay below the number of outputs, got {low} to {high}."
        )
    if squeezed := squeeze(outputs, y):
        return ShapeError(f"{refused} {squeezed}")
    if is_torchs(error, DTYPES):
        return DtypeError(f"{refused} Convert the targets to the dtype that the loss expects.")
    if is_torchs(error, SHAPES) or is_torchs(error, IDS):
        return ShapeError(f"{refused} Convert the targets to the shape that the loss expects.")
    return of_objective(error, "loss", f"outputs {list(outputs.shape)} and targets {list(y.shape)}")


def of_objective(error: Exception, name: str, called_with: str) -> ModelError:
    """Return what to raise for an error of the user's own code.

    Args:
        error: What the call raised.
        name: What was called.
        called_with: Its arguments, for the message.

    Returns:
        The error to raise from this one.
    """
    return ModelError(
        f"`{name}` raised {type(error).__name__}: {sentence(error)}{line_of(error)} when it was called with "
        f"{called_with}. Call it on such a batch to see why."
    )


def squeeze(outputs: Tensor, y: Tensor) -> str:
    """Return what to do about a dimension of one that outputs or targets have and the other lacks; "" without one."""
    if outputs.shape == (*y.shape, 1):
        return "Drop the last dimension of the outputs (`.squeeze(-1)`), or give the targets one (`y.unsqueeze(-1)`)."
    if y.shape == (*outputs.shape, 1) or (y.ndim == 2 and y.shape[1] == 1 and not y.is_floating_point()):
        return "Drop the last dimension of the targets (`y.squeeze(-1)`)."
    return ""


def is_torchs(error: Exception, words: re.Pattern[str]) -> bool:
    """Whether torch raised the error, and its message has one of these words; a `raise` of the user's code does not."""
    if not isinstance(error, (RuntimeError, ValueError, IndexError)) or not words.search(str(error)):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True
    code = last.tb_frame.f_code
    return code.co_filename.startswith(TORCH) or code.co_code[last.tb_lasti] != RAISE


def line_of(error: Exception) -> str:
    """Return where in the user's code an error came from, in brackets; "" where only torch's code was running."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)]
    if not own:
        return ""
    last = own[-1]
    code = f": `{last.line}`" if last.line else ""
    return f" ({last.filename}, line {last.lineno}, in {last.name}{code})"


def sentence(error: Exception) -> str:
    """Return an error's own message without its full stop."""
    return str(error).strip().rstrip(".") or "no message"


def _inputs(batch: Batch) -> list[tuple[str, Tensor]]:
    """Return the tensors of a batch that the model sees: of a pair the first."""
    pair = isinstance(batch, tuple) and len(batch) == 2
    return [(name, tensor) for name, tensor in leaves(batch) if not (pair and name.startswith("batch[1]"))]


def _cast(batch: Batch, dtype: torch.dtype, said: str) -> str:
    own, cast = str(dtype).removeprefix("torch."), "double" if dtype == torch.float64 else "float"
    for name, tensor in _inputs(batch):
        theirs = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_complex():
            return f"Pass real and imaginary parts of `{name}` as real numbers: `torch.view_as_real`."
        if "Long, Int" in said and tensor.is_floating_point():
            return f"Convert `{name}` from {theirs} to whole numbers with `.long()`."
        if tensor.is_floating_point() and tensor.dtype != dtype:
            other = "double" if tensor.dtype == torch.float64 else "float"
            return f"Convert `{name}` from {theirs} to {own} with `.{cast}()`, or the model with `model.{other}()`."
        if not tensor.is_floating_point():
            return f"Convert `{name}` from {theirs} to {own} with `.{cast}()`."
    return "Pass batches of the dtype that the model was trained with."


def _ranges(batch: Batch) -> str:
    found = [
        f"`{name}` has {int(tensor.min())} to {int(tensor.max())}"
        for name, tensor in _inputs(batch)
        if not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel()
    ]
    return ", ".join(found) or "the batch has none, so the model makes them"
