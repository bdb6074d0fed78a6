"""Directions and steps for comparing derivatives with differences, and the operators to suspect where they differ."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distinfluence.curvature.over_data import nodes_of
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import differentiable
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import double_differentiable

MOST_PARAMETERS = 2**20  # by which second derivatives are compared: the first ones, which see all that comes after
MOVED = 1e-2  # of each parameter's size: away from kinks on which a network may sit, such as a ReLU of zero
EXACT_STEP, EXACT = 1e-8, 1e-3  # of differences, relative to the parameters, and the relative error that is allowed
COARSE_STEP, COARSE = 1e-3, 1e-2  # for models with float32 inside
KNOWN = {"WeightNormInterfaceBackward0": "torch._weight_norm"}  # whose second derivative is wrong (torch 2.13)


def first_parameters(risk: SampleRisk) -> tuple[str, ...]:
    """Names of the parameters that come first, up to MOST_PARAMETERS numbers; without those that are larger alone."""
    sizes = {name: shape.numel() for name, shape in risk.blocks.shapes.items()}
    chosen, total = list[str](), 0
    for name, size in sizes.items():
        if total + size <= MOST_PARAMETERS:
            chosen.append(name)
            total += size
    return tuple(chosen) or (min(sizes, key=sizes.__getitem__),)


def random_direction(risk: SampleRisk, scales: Mapping[str, float], generator: torch.Generator) -> Tensor:
    """Return a random row [p], each parameter's part of the parameter's own size."""
    return risk.blocks.flatten({name: scales[name] * normal_like(p, generator) for name, p in risk.parameters.items()})


def scale_of(parameter: Tensor) -> float:
    """Return the size of a parameter's numbers; where they are zero, that of a small weight."""
    return float(parameter.detach().double().pow(2).mean()) ** 0.5 or 1e-2


def slightly_moved(tensor: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Every number by some hundredths of itself, so that it keeps its sign; zeros by some of the scale."""
    noise = MOVED * normal_like(tensor, generator).clamp(-3, 3)
    return torch.where(tensor == 0, scale * noise, tensor * (1 + noise)).detach()


def normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return normal numbers of the same shape, drawn in float64."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def suspects(risk: SampleRisk, batch: Batch) -> str:
    """Name the `custom_operators` in a sentence."""
    names = custom_operators(risk, batch)
    if not names:
        return "No custom operator was found in it: look for tensors that are detached or computed without gradients."
    return f"Operators in it that may be at fault: {listed(names)}. See whether one can differentiate them twice."


def custom_operators(risk: SampleRisk, batch: Batch) -> list[str]:
    """Return custom operators, and PyTorch's with known faults, in the graph of the losses."""
    with double_differentiable(), differentiable(risk) as parameters:
        losses = risk.losses(parameters, batch)
    names = set[str]()
    for node in nodes_of(losses):
        forward = getattr(type(node), "_forward_cls", None)
        if forward is not None:
            names.add(forward.__name__)
        if node.name() in KNOWN:
            names.add(KNOWN[node.name()])
    return sorted(names)


def listed(names: Sequence[str]) -> str:
    """Return the first five names in quotes, and how many more there are."""
    some = ", ".join(repr(name) for name in names[:5])
    return some if len(names) <= 5 else f"{some} and {len(names) - 5} more"
