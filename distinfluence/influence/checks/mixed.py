"""Derivatives of gradients by the input, compared with differences of gradients."""

from weakref import WeakSet

import torch
from torch import Tensor

from distinfluence.errors import DerivativeError
from distinfluence.influence.checks.directions import (
    COARSE_STEP,
    EXACT,
    EXACT_STEP,
    custom_operators,
    first_parameters,
    normal_like,
    random_direction,
    scale_of,
    suspects,
)
from distinfluence.model.batch import Batch, batch_length, map_batch, take
from distinfluence.model.gradients import loss_gradients, mixed_gradients
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import untouched_randomness

MIXED_SAMPLES = 4
_COMPARED: WeakSet[SampleRisk] = WeakSet()  # risks whose mixed derivatives have been


def check_mixed(risk: SampleRisk, batch: Batch) -> None:
    """Raise DerivativeError unless derivatives of gradients by the input are what differences of gradients say.

    Once for a model: at the first samples that their influence is asked for by perturbation, along a random row.
    """
    if risk in _COMPARED:
        return
    few = take(batch, 0, min(batch_length(batch), MIXED_SAMPLES))
    x = risk.objective.inputs(few)
    if not x.is_floating_point():
        return  # refused where they are made
    with torch.inference_mode(False), torch.no_grad(), untouched_randomness(), risk.in_own_precision():
        wide = risk.apart(first_parameters(risk), torch.float64)
        samples = map_batch(wide.widened, few)
        try:
            wide.losses(wide.parameters, samples)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # as in `check_products`
            wide, samples = risk.apart(first_parameters(risk)), few
        verdicts = [_mixed_agrees(wide, samples, seed) for seed in (0, 1)]
        if not any(agrees for agrees, _ in verdicts) and (
            any(c for _, c in verdicts) or custom_operators(wide, samples)
        ):
            raise DerivativeError(
                "`mode='perturbation'` cannot be used with this `model` and `loss`: the derivative of gradients by the "
                f"input is not what differences of gradients say. {suspects(wide, samples)}"
            )
    _COMPARED.add(risk)


def _mixed_agrees(risk: SampleRisk, batch: Batch, seed: int) -> tuple[bool, bool]:
    """Whether ∂/∂x ⟨∇ℓ, row⟩ along a direction is a difference of gradients; else whether that is certain."""
    generator, x = torch.Generator().manual_seed(seed), risk.objective.inputs(batch)
    row = random_direction(risk, {name: scale_of(p) for name, p in risk.parameters.items()}, generator)
    d = scale_of(x) * normal_like(x, generator)
    found = (mixed_gradients(risk, batch, row.unsqueeze(0))[0] * d).double().flatten(1).sum(dim=1)
    exact = risk.dtype == torch.float64
    step = EXACT_STEP if exact else COARSE_STEP

    def difference(by: float) -> tuple[Tensor, float]:
        sides = [
            (loss_gradients(risk, risk.objective.replace_inputs(batch, x + sign * by * d)).rows @ row).double()
            for sign in (1, -1)
        ]
        return (sides[0] - sides[1]) / (2 * by), float(sides[0].norm())

    expected, size = difference(step)
    noise = 100 * torch.finfo(risk.dtype).eps / step * size
    error = float((found - expected).norm())
    if error <= EXACT * float(expected.norm()) + noise:
        return True, True
    return False, exact and float((difference(step / 2)[0] - expected).norm()) <= 0.1 * error
