"""Gradients of the call with parameters passed in, compared with the module's own `backward`."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distinfluence.errors import DerivativeError, DistinfluenceError
from distinfluence.influence.checks.directions import listed
from distinfluence.model.batch import Batch, map_batch
from distinfluence.model.checkpointing import without_checkpointing
from distinfluence.model.objective import Forward
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import double_differentiable, untouched_attributes


def compared_with_backward(
    risk: SampleRisk, batches: Sequence[Batch], gradients: Mapping[str, Tensor], measured: bool
) -> tuple[str, ...]:
    """Compare gradients of the functional call with those of the module's own. Returns remarks."""
    named = {name: p for name, p in risk.module.named_parameters() if name in risk.blocks.shapes}
    first = next(iter(named.values()))
    as_it_is = first.dtype == risk.dtype and first.device == risk.device
    try:
        own = _Own(risk, first, measured)
        expected = own.gradients(batches, lambda: (own.module, named))
        found = gradients if as_it_is else own.gradients(batches, own.functional)
    except torch.OutOfMemoryError:
        raise
    except DistinfluenceError:
        raise
    except Exception as error:  # a module that torch's autograd refuses, such as one made in `torch.inference_mode`
        return (f"gradients could not be compared with those of the module's own backward pass: {error}",)
    root = torch.finfo(risk.dtype).eps ** 0.5
    # as `agree` has it; and a parameter whose gradient cancels keeps the rounding of the others
    relative, beside = (10 * root, root / 100) if as_it_is else (1e-2, 1e-3)  # the same operators in the same dtype
    norm = float(torch.stack([g.double().norm().cpu() for g in expected.values()]).norm())
    wrong = {
        name: float((found[name].double().cpu() - g.double().cpu()).norm()) / max(float(g.double().norm()), 1e-300)
        for name, g in expected.items()
        if not float((found[name].double().cpu() - g.double().cpu()).norm())
        <= relative * float(g.double().norm()) + beside * norm
    }
    if wrong:
        worst, name = max(wrong, key=wrong.__getitem__), "objective.measurements" if measured else "model"
        raise DerivativeError(
            f"`{name}` has another gradient by {listed(list(wrong))} when it is called with its parameters passed in "
            f"than by its own `backward` (relative difference {wrong[worst]:.2g} for {worst!r}). Influence passes them "
            "in by name: a parameter that is reached in another way (kept in a list or a closure, or by "
            "`model.parameters()` inside the loss) is missed. Register it under a name wherever it is used, and leave "
            "terms that are no sample's out of the loss. A hook that changes a parameter's gradient is not part of the "
            "influence either: remove it."
        )
    return ()


class _Own:
    """The module as the user calls it, on its own device and in its own dtype."""

    def __init__(self, risk: SampleRisk, first: Tensor, measured: bool) -> None:
        self._risk, self._first, self._measured = risk, first, measured
        module = getattr(risk.module, "_orig_mod", risk.module)  # what torch.compile would compile for these shapes
        self.module: nn.Module = copy.deepcopy(module) if risk.written else module

    def functional(self) -> tuple[Forward, dict[str, Tensor]]:
        """Return the call with parameters passed in."""
        module = self._risk.module
        leaves = {
            name: p.detach().requires_grad_()
            for name, p in module.named_parameters()
            if name in self._risk.blocks.shapes
        }
        return functools.partial(_called, module, leaves), leaves

    def gradients(
        self, batches: Sequence[Batch], made: Callable[[], tuple[Forward, Mapping[str, Tensor]]]
    ) -> dict[str, Tensor]:
        """Gradient of the sum of the samples' losses."""
        total: dict[str, Tensor] = {}
        objective = self._risk.objective
        for batch in batches:
            own = map_batch(self._as_given, batch)
            with _left_as_found(self.module), double_differentiable(), torch.enable_grad():
                model, leaves = made()
                if model is self.module and self._risk.written:
                    leaves = {n: p for n, p in self.module.named_parameters() if n in self._risk.blocks.shapes}
                value = (
                    objective.measurements(model, own)
                    if self._measured
                    else objective.losses(objective.outputs(model, own), own)
                ).sum()
                parts = (
                    torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
                    if value.requires_grad
                    else [torch.zeros_like(p) for p in leaves.values()]
                )
            for name, part in zip(leaves, parts, strict=True):
                total[name] = total[name] + part.detach() if name in total else part.detach()
        return total

    def _as_given(self, tensor: Tensor) -> Tensor:
        own = tensor.to(self._first.device, copy=True)
        return own.to(self._first.dtype) if own.dtype == self._risk.dtype else own


def _called(module: nn.Module, leaves: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, leaves, args, kwargs)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers; NaN is the same as NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


@contextlib.contextmanager
def _left_as_found(module: nn.Module) -> Iterator[None]:
    """Put back buffers that the forward writes to; a distributed module expects no gradients meanwhile."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    no_sync: Any = getattr(module, "no_sync", contextlib.nullcontext)
    try:
        with no_sync(), without_checkpointing(), untouched_attributes(module):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not _same(buffer, value):
                    buffer.data.copy_(value)
