"""Kinds of modules and tensors that cannot be differentiated sample by sample, found before anything is computed.

Nothing is unwrapped silently: the wrapped module may be on another device, in another mode, or incomplete. A module
from `torch.compile` is taken as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distinfluence.errors import DtypeError, UnsupportedModelError

WHOLE = (
    "Gather the full state dict (`torch.distributed.checkpoint.state_dict.get_model_state_dict` with "
    "`full_state_dict=True`) and load it into the plain module."
)
FLOAT_MODEL = "Pass the float model that was quantised, or `dequantize` the weights."


def check_model(module: object) -> None:
    """Pass if the module can be called with other parameters and differentiated.

    Args:
        module: What the user passed as `model`.

    Raises:
        DtypeError: If it is not a module.
        UnsupportedModelError: If it, or a part of it, is of a kind that cannot be differentiated. The message says
            what to pass instead.
    """
    if not isinstance(module, nn.Module):
        raise DtypeError(f"`model` must be a `torch.nn.Module`, got {type(module).__name__}. Pass the module.")
    for path, child in module.named_modules():
        found = _of_module(child)
        if found is not None:
            what, remedy = found
            raise UnsupportedModelError(
                f"`model` {f'has at {path!r}' if path else 'is'} a {type(child).__name__}, {what}. {remedy}"
            )
    for name, parameter in module.named_parameters():
        found = _of_parameter(parameter)
        if found is not None:
            what, remedy = found
            raise UnsupportedModelError(f"`model` has the parameter {name!r}, {what}. {remedy}")


def _of_module(child: nn.Module) -> tuple[str, str] | None:
    """Return what a module is, and what to pass instead; None for one that can be used."""
    kinds = set(_distributed_kinds(type(child)))
    if isinstance(child, nn.DataParallel):
        return "which spreads each batch over several GPUs", "Pass `model.module`."
    if "DistributedDataParallel" in kinds and _processes(child) > 1:  # a single one computes what the module does
        return "whose call waits for the other processes", "Pass `model.module`."
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return "of which this process holds a part of the parameters alone", WHOLE
    if isinstance(child, torch.jit.ScriptModule):
        return (
            "made by `torch.jit`, which cannot be called with other parameters",
            "Pass the eager module, with `eager.load_state_dict(scripted.state_dict())` if the tensors are in this one "
            "alone.",
        )
    if type(child).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return "whose weights are quantised: they have no gradients", FLOAT_MODEL
    return None


def _processes(wrapped: Any) -> int:
    return int(wrapped.process_group.size())


def _of_parameter(parameter: Tensor) -> tuple[str, str] | None:
    """Return what a parameter is, and the remedy; None for one that can be used."""
    if nn.parameter.is_lazy(parameter):
        return (
            "which is not initialised yet: its module is lazy",
            "Call the model on one batch first, and load the trained weights.",
        )
    if "DTensor" in _distributed_kinds(type(parameter)):
        return "a DTensor, of which this process may hold a part alone", WHOLE
    if parameter.is_meta:
        return (
            "which is on the meta device and has no values",
            "Make the model on a real device and load its weights, for instance with `model.to_empty(device='cpu')` "
            "and `load_state_dict`.",
        )
    if parameter.layout != torch.strided:
        return f"whose layout is {parameter.layout}", "Make it dense with `to_dense()`."
    if parameter.is_quantized:
        return "which is quantised and has no gradient", FLOAT_MODEL
    if parameter.is_complex() and parameter.requires_grad:
        return (
            f"which is {_short(parameter.dtype)}: influence is defined for real parameters",
            "Hold real and imaginary parts as real parameters (`torch.view_as_real`), and join them in `forward` "
            "(`torch.view_as_complex`).",
        )
    return None


def _distributed_kinds(kind: type) -> Iterator[str]:
    """Yield the names of the classes of torch.distributed that a class comes from, without importing these."""
    return (base.__name__ for base in kind.__mro__ if base.__module__.startswith(("torch.distributed", "torch.nn.")))


def check_tensor(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor of a batch.

    Args:
        tensor: The tensor.
        name: What to call it in errors.

    Returns:
        The same tensor.

    Raises:
        DtypeError: If its values cannot be read as a dense array: a sparse, nested, quantised or meta tensor.
    """
    if tensor.is_nested:
        raise DtypeError(
            f"`{name}` must be a tensor whose samples have one shape, got a nested tensor. Pad the samples "
            "(`torch.nested.to_padded_tensor`) and let the objective leave the padding out, or pass batches of samples "
            "that are alike."
        )
    if tensor.layout != torch.strided:
        raise DtypeError(f"`{name}` must be dense, got the layout {tensor.layout}. Make it dense with `to_dense()`.")
    if tensor.is_quantized:
        raise DtypeError(f"`{name}` must hold numbers, got {tensor.dtype}. Convert it with `dequantize()`.")
    if tensor.is_meta:
        raise DtypeError(f"`{name}` must have values, got a tensor on the meta device. Pass the data themselves.")
    return tensor


def untrained(module: nn.Module) -> str:
    """Say why a module has no trainable parameter, and what to do about it."""
    parameters = list(module.parameters())
    whole = sorted({_short(p.dtype) for p in parameters if not (p.is_floating_point() or p.is_complex())})
    if whole:
        return f"{len(parameters)} parameters, of which some are quantised to {', '.join(whole)}. {FLOAT_MODEL}"
    if not parameters:
        return "a module without parameters. Pass the model that was trained."
    return (
        f"{len(parameters)} parameters, none with `requires_grad`. Call `requires_grad_(True)` on the parameters that "
        "the influence should cover."
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
