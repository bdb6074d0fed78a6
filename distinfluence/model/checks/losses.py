"""What a loss returns, and whether outputs and targets belong together."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distinfluence.errors import IndexRangeError, LossError, NonFiniteError, ShapeError
from distinfluence.model.checks.raised import squeeze

# Losses that broadcast outputs against targets: [n, 1] with [n] makes n × n differences.
ELEMENTWISE = (
    *(nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.SoftMarginLoss, nn.PoissonNLLLoss),
    nn.functional.mse_loss,
    nn.functional.l1_loss,
    nn.functional.huber_loss,
    nn.functional.smooth_l1_loss,
    nn.functional.soft_margin_loss,
    nn.functional.poisson_nll_loss,
)
# Losses of class labels. The last of each has no label that it ignores.
LABELLED = (nn.CrossEntropyLoss, nn.NLLLoss, nn.functional.cross_entropy, nn.functional.nll_loss)
LABELLED_WHOLLY = (nn.MultiMarginLoss, nn.functional.multi_margin_loss)


def innermost(loss: Any) -> Any:
    """Return the loss within `functools.partial`s."""
    return innermost(loss.func) if isinstance(loss, functools.partial) else loss


def setting(loss: Any, name: str, default: object = None) -> object:
    """Return an attribute of a loss, or the argument of a `functools.partial`."""
    if isinstance(loss, functools.partial):
        return loss.keywords[name] if name in loss.keywords else setting(loss.func, name, default)
    return getattr(loss, name, default)


def is_one_of(loss: Any, known: tuple[Callable[..., object], ...]) -> bool:
    """Whether a loss is one of these functions, or of exactly one of these classes."""
    inner = innermost(loss)
    return any(inner is each or type(inner) is each for each in known)


@dataclass(frozen=True)
class ClassLabels:
    """The class labels of a batch.

    Attributes:
        values: Whole numbers, [n, ...].
        name: What to call them in errors.
        ignored: The label that does not count; None if all do.
        axis: The axis of the outputs that the labels count along.
        averaged: Whether a sample's loss is a mean over its labels, which does not exist where none counts.
    """

    values: Tensor
    name: str
    ignored: int | None
    axis: int = 1
    averaged: bool = False

    @classmethod
    def of(cls, loss: Any, y: Tensor) -> "ClassLabels | None":
        """Return the labels of a loss that takes classes; None for any other loss or kind of targets."""
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            return None
        if is_one_of(loss, LABELLED_WHOLLY):
            return cls(y, "y", None)
        if not is_one_of(loss, LABELLED):
            return None
        averaged = setting(loss, "reduction", "mean") == "mean"
        ignored = setting(loss, "ignore_index", -100)
        return cls(y, "y", ignored if isinstance(ignored, int) else None, averaged=averaged)

    def are_below(self, n_classes: int) -> bool:
        """Return whether every label is one of so many classes, or ignored."""
        return not self._outside(n_classes)[2].any()

    def _outside(self, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the labels, [n, k], which of them count, and which of these are outside."""
        rows = self.values.reshape(self.values.shape[0], -1)
        counted = torch.ones_like(rows, dtype=torch.bool) if self.ignored is None else rows != self.ignored
        return rows, counted, counted & ((rows < 0) | (rows >= n_classes))

    def check(self, n_classes: int | None) -> None:
        """Pass if every label is a class or ignored.

        Args:
            n_classes: The size of the outputs along `axis`; None if it is not known, to check nothing.

        Raises:
            IndexRangeError: If a label is outside. The message names the labels and the samples.
            NonFiniteError: If a sample has no label that counts, and its loss is a mean over labels.
        """
        if n_classes is None:
            return
        rows, counted, outside = self._outside(n_classes)
        if outside.any():
            labels = sorted(set(rows[outside].tolist()))
            samples = outside.any(dim=1).nonzero().flatten().tolist()
            ignored = "" if self.ignored is None else f" or {self.ignored} (`ignore_index`)"
            marks = (
                f" If {labels[0]} marks what does not count, pass `ignore_index={labels[0]}` to the loss."
                if len(labels) == 1 and labels[0] < 0
                else ""
            )
            raise IndexRangeError(
                f"`{self.name}` must hold labels from 0 to {n_classes - 1}{ignored}, since the model has {n_classes} "
                f"outputs, got {labels[:5]} in samples {samples[:10]} of this batch ({len(samples)} of {len(rows)}). "
                f"Count the classes from 0, and give the model an output for each.{marks}"
            )
        if self.averaged and rows.shape[1] and not counted.any(dim=1).all():
            samples = (~counted.any(dim=1)).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"`{self.name}` must have a label that counts in every sample, got only {self.ignored} "
                f"(`ignore_index`) in samples {samples[:10]} of this batch ({len(samples)} of {len(rows)}): the mean "
                "over no label is NaN. Leave these samples out, or use reduction='sum'."
            )


def check_returned(value: object, name: str) -> Tensor:
    """Return what a loss returned. Raises LossError unless it is a tensor of real numbers."""
    if value is None:
        raise LossError(f"`{name}` must return a tensor, got None. End it with a `return`.")
    if not isinstance(value, Tensor):
        raise LossError(
            f"`{name}` must return a tensor, got {type(value).__name__}. Return the tensor itself, without `.item()`, "
            "`float()` or `.numpy()`: gradients flow through tensors alone."
        )
    if value.is_complex():
        raise LossError(f"`{name}` must return real numbers, got {value.dtype}. Take for instance `.abs()`.")
    return value


def parts(returned: object) -> str:
    """Say what a model returned that is not a tensor: its type, and the names of what is in it."""
    names = [str(key) for key in returned] if isinstance(returned, Mapping) else []
    if isinstance(returned, (tuple, list)):
        return f"{type(returned).__name__} of {len(returned)}"
    return type(returned).__name__ + (f" with {', '.join(map(repr, names[:5]))}" if names else "")


def check_aligned(loss: Any, outputs: Tensor, y: Tensor) -> None:
    """Raise ShapeError where a loss that works element by element would broadcast samples against each other."""
    if outputs.ndim == y.ndim or not is_one_of(loss, ELEMENTWISE):
        return
    named = innermost(loss)
    remedy = squeeze(outputs, y) or "Give outputs and targets the same shape."
    raise ShapeError(
        f"`loss` ({getattr(named, '__name__', type(named).__name__)}) must have targets of the outputs' shape, got "
        f"outputs {list(outputs.shape)} and targets `y` {list(y.shape)}, which broadcast: each sample would be "
        f"compared with the targets of others. {remedy}"
    )


def reduction_remarks(whole: float, one_by_one: Tensor, remedy: str) -> tuple[str, ...]:
    """Find out whether the loss of a batch is the mean or the sum of its samples' losses.

    Args:
        whole: The loss of the batch.
        one_by_one: The losses of its samples, [n] float64.
        remedy: What to do where it is neither, if the shapes of outputs and targets tell; else "".

    Returns:
        Remarks for the fit report.

    Raises:
        LossError: If it is neither.
    """
    if not math.isfinite(whole) or not torch.isfinite(one_by_one).all():
        return ()  # said by the check of the losses themselves, with the samples
    tolerance = 1e-4 * float(one_by_one.abs().mean()) + 1e-30  # float32 sums of a batch agree to about 1e-6
    if one_by_one.numel() == 1 or abs(whole - float(one_by_one.mean())) <= tolerance:
        return ()
    if abs(whole - float(one_by_one.sum())) <= tolerance * one_by_one.numel():
        return ("the loss sums over the batch: influences refer to the mean over samples of the summed loss of each",)
    raise LossError(
        f"`loss` of a batch is {whole:.6g}, neither the mean ({float(one_by_one.mean()):.6g}) nor the sum "
        f"({float(one_by_one.sum()):.6g}) of the losses of its samples. "
        + (remedy or "Subclass `Objective` and return one loss per sample.")
    )


def check_losses(losses: object, n: int, stride: int) -> Tensor:
    """Return the losses of a batch, checked.

    Args:
        losses: What the objective returned.
        n: The number of samples.
        stride: How far apart these samples are in the batch that they come from.

    Returns:
        The losses, [n].

    Raises:
        LossError: If they are not one real number for each sample.
        NonFiniteError: If they have NaN or infinity.
    """
    values = check_returned(losses, "objective.losses")
    if values.shape != (n,):
        mean = " It is one number for the whole batch: use reduction='none'." if values.ndim == 0 else ""
        raise LossError(
            f"`objective.losses` must return one loss per sample, [{n}], got {tuple(values.shape)}.{mean} Reduce all "
            "dimensions but the first."
        )
    if not torch.isfinite(values).all():
        bad = ((~torch.isfinite(values)).nonzero().flatten() * stride).tolist()
        raise NonFiniteError(
            f"`loss` must be finite, got NaN or infinity for samples {bad} of this batch. "
            "Look at these samples and at the model's outputs for them."
        )
    return values
