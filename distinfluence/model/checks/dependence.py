"""Checks that losses depend on the parameters, by differentiable operations, and not on the rest of the batch."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distinfluence.errors import InPlaceError, LossError
from distinfluence.model.batch import Batch, batch_length, leaves, map_batch, take
from distinfluence.model.checks.raised import told
from distinfluence.model.objective import Forward, Objective
from distinfluence.model.untouched import recordable


def check_independence(objective: Objective, model: Forward, batch: Batch, losses: Tensor) -> None:
    """Raise LossError if a sample's loss depends on the rest of its batch. losses: [n] of the whole batch."""
    n = min(batch_length(batch), 3)
    if losses.shape[0] <= 1:
        return
    for index in range(n):
        sample = take(batch, index, index + 1)
        alone = float(objective.losses(objective.outputs(model, sample), sample)[0])
        together = float(losses[index])
        # another batch size takes other kernels: they agree to rounding, which a deep network grows to about √eps
        tolerance = 10 * float(torch.finfo(losses.dtype).eps) ** 0.5
        if not math.isclose(alone, together, rel_tol=tolerance, abs_tol=tolerance / 10):
            raise LossError(
                f"`model` gives a sample the loss {alone:.6g} alone and {together:.6g} within its batch. "
                "Influence needs losses that do not depend on the other samples: call `model.eval()`, and reduce the "
                "loss sample by sample."
            )


def check_unwritten(batch: Batch, before: Sequence[int]) -> None:
    """Raise InPlaceError if tensors of a batch were written to. before: their versions."""
    written = [name for (name, t), version in zip(leaves(batch), before, strict=True) if t._version != version]
    if written:
        raise InPlaceError(
            f"`objective` must leave its batch as it is, got writes to {written}: it is called with your data. "
            "Work on a copy of the tensor."
        )


def check_differentiable(
    evaluate: Callable[[Mapping[str, Tensor], Batch], Tensor],
    tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    batch: Batch,
    name: str,
) -> None:
    """Pass if gradients can flow from values of samples to the model's parameters. Autograd gives zeros otherwise.

    Args:
        evaluate: The values of samples as a function of parameters and batch.
        tensors: The covered parameters, and all other tensors of the model: where only these are connected, the
            covered ones are not used, and their influence is zero indeed.
        batch: Some samples. The first alone is evaluated if that will do, since a graph of a batch may be large.
        name: What makes the values, for errors.

    Raises:
        LossError: If no gradient can flow.
    """
    first = map_batch(lambda tensor: tensor[:1].clone(), batch)
    covered, others = tensors
    for traced, some in ((covered, first), ({**covered, **others}, batch)):
        floating = {key: recordable(t.detach()) for key, t in traced.items() if t.is_floating_point()}
        with torch.inference_mode(False), torch.enable_grad(), told(name, some):
            if evaluate({key: t.requires_grad_() for key, t in floating.items()}, some).requires_grad:
                return
    raise LossError(
        f"`{name}` must depend on the model's parameters by operations that have a gradient, got values without one. "
        "Take `.detach()`, `torch.no_grad()`, `argmax` and conversions to numbers or NumPy out of the model and the "
        "loss."
    )
