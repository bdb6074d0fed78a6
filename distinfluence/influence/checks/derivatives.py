"""What is found out about a model and an objective before a fit is trusted, at a few samples from all over the data.

Influence calls the model with its parameters passed in and differentiates that call, once or twice. Each step is
compared with something that does not take it: losses alone with losses in a batch, gradients of the call with the
module's own `backward`, second derivatives with differences of first ones, and forward derivatives with reverse ones.
What fails is refused, with the parameters or the operator that it is about.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distinfluence.curvature import SecondOrderMode
from distinfluence.curvature.over_data import missing_derivative
from distinfluence.errors import DistinfluenceError, UnsupportedOperatorError
from distinfluence.influence.checks.backward import compared_with_backward
from distinfluence.influence.checks.directions import listed
from distinfluence.influence.checks.products import check_products
from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.identity.probe import Checked, Probed, probed
from distinfluence.model.objective import Objective
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import untouched_randomness

SECOND_ORDER_SAMPLES = 6  # of the drawn ones, for what costs several gradients


def check_derivatives(risk: SampleRisk, batches: Sequence[Batch], products: SecondOrderMode | None) -> Checked:
    """Check the derivatives of a model and an objective at drawn samples, which `SampleRisk.check` has passed.

    Both together cost at most 12 evaluations of the gradient of 16 samples.

    Args:
        risk: Of the model and the objective.
        batches: The samples as `draw.grouped` makes them, placed; the largest batch first.
        products: The matrix whose products the fit will use, None for one that needs no second derivatives.

    Raises:
        DerivativeError: If derivatives are not those of what the model computes.
        UnsupportedOperatorError: If torch has no such derivative.
    """
    remarks: dict[str, None] = {}
    with torch.inference_mode(False), torch.no_grad(), untouched_randomness(), risk.in_own_precision():
        found = _probed(risk, batches)
        for gradients, measured in ((found.gradients, False), (found.of_measurements, True)):
            if gradients is not None:
                remarks |= dict.fromkeys(compared_with_backward(risk, batches, gradients, measured))
        if products in (SecondOrderMode.HESSIAN, SecondOrderMode.GGN):
            some = take(batches[0], 0, min(batch_length(batches[0]), SECOND_ORDER_SAMPLES))
            remarks |= dict.fromkeys(check_products(risk, some, products))
    if found.without_gradient:
        remarks[
            f"no gradient reaches {listed(found.without_gradient)} at {len(found.probe.losses)} samples from all over "
            "the data: influence through them is zero"
        ] = None
    own = _parameters_of_objective(risk.objective, risk.module)
    if own:
        remarks[f"the loss has parameters of its own, which influence does not cover: {listed(own)}"] = None
    return Checked(tuple(remarks), found.probe, products)


def _probed(risk: SampleRisk, batches: Sequence[Batch]) -> Probed:
    try:
        return probed(risk, batches)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, DistinfluenceError) or (missing := missing_derivative(error, risk, batches[0])) is None:
            raise
        raise UnsupportedOperatorError(
            f"`model` and `loss` must be differentiable by the parameters, and PyTorch does not have {missing}. "
            "Every method needs the gradient: replace the operator, or freeze the parameters before it."
        ) from error


def _parameters_of_objective(objective: Objective, module: nn.Module) -> list[str]:
    """Trained parameters that a loss or an objective holds and that are not the model's."""
    theirs = {id(p) for p in module.parameters()}
    found: dict[str, None] = {}

    def look(value: Any, name: str, depth: int) -> None:
        if isinstance(value, nn.Parameter):
            if value.requires_grad and id(value) not in theirs:
                found[name] = None
        elif isinstance(value, nn.Module):
            for own, p in value.named_parameters():
                look(p, f"{name}.{own}", depth)
        elif depth and isinstance(value, functools.partial):
            for own, item in (("", value.func), *value.keywords.items()):
                look(item, f"{name}.{own}".rstrip("."), depth - 1)
        elif depth and hasattr(value, "__closure__"):
            for own, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                look(getattr(cell, "cell_contents", None), own, depth - 1)
        elif depth and isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                look(item, f"{name}[{number}]", depth - 1)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, Tensor)):
            for own, item in vars(value).items():
                look(item, f"{name}.{own}", depth - 1)

    for name, value in vars(objective).items():
        look(value, name, 3)
    return list(found)
