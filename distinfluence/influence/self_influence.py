"""Self-influence: what a training point does to its own loss, with certified bounds."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator
from distinfluence.errors import SettingError
from distinfluence.influence.bounds import LowerBound
from distinfluence.influence.report import SolveReport
from distinfluence.model.gradients import SampleGradients
from distinfluence.solvers.quadrature import quadratic_forms


@dataclass(frozen=True)
class SelfInfluences:
    """Self-influence of n samples.

    Args:
        values: The values, [n] float64, halfway between the bounds.
        lower: The lower bounds, [n] float64.
        upper: The upper bounds, [n] float64.
        iterations: The steps, [n] int64.
        rigorous: Whether the bounds are rigorous, or rest on an estimate of the smallest eigenvalue.
    """

    values: Tensor
    lower: Tensor
    upper: Tensor
    iterations: Tensor
    rigorous: bool


def self_influences_by_factors(gradients: SampleGradients, factors: Tensor, report: SolveReport) -> SelfInfluences:
    """⟨factor, gradient⟩ of each sample, for factors [n, p] that were solved for from the gradients [n, p]."""
    pairs = zip(factors, gradients.rows, strict=True)
    values = torch.stack([torch.dot(factor.double(), g.double()) for factor, g in pairs]).cpu()
    unknown = torch.full_like(values, torch.inf)
    bound = unknown if report.error_bound is None else report.error_bound.nan_to_num(nan=torch.inf)
    half = bound * gradients.norms.double().cpu()
    return SelfInfluences(values, values - half, values + half, report.iterations, report.rigorous)


def self_influences_in_eigenbases(
    rows: Mapping[str, Tensor], states: Mapping[str, Any], damping: Mapping[str, float]
) -> SelfInfluences:
    """Sum over blocks of bᵀ M⁻¹ b, for matrices M with known eigenvectors; rows: block → gradients [n, p_block].

    No pass. Both bounds are the value: they are of these matrices, not of the curvature that they approximate.
    """
    forms = (s.operator.quadratic_forms(rows[b], s.inverse_values(damping[b])) for b, s in states.items())
    total = functools.reduce(torch.add, forms).cpu()
    return SelfInfluences(total, total, total, torch.zeros(total.shape[0], dtype=torch.int64), False)


def self_influences_of(
    rows: Mapping[str, Tensor],
    operators: Mapping[str, CurvatureOperator],
    damping: Mapping[str, float],
    bounds: Mapping[str, LowerBound | None],
    *,
    rtol: float,
    maxiter: int,
) -> SelfInfluences:
    """Sum over blocks of bᵀ (A + λI)⁻¹ b; rows: block → gradients [n, p_block].

    Raises SettingError where a block has no positive lower bound of its spectrum.
    """
    brackets = []
    for block, own in rows.items():
        bound = bounds[block]
        if bound is None:
            raise SettingError(
                f"`self_influences` needs A + λI positive definite, and that is not known of block {block!r} at "
                f"λ = {damping[block]:g}. Call `spectrum()` first, use more damping, or second_order_mode='ggn'."
            )
        brackets.append(quadratic_forms(operators[block], damping[block], own, bound.value, rtol=rtol, maxiter=maxiter))
    lower = torch.stack([found.lower for found in brackets]).sum(dim=0).cpu()
    upper = torch.stack([found.upper for found in brackets]).sum(dim=0).cpu()
    steps = torch.stack([found.iterations for found in brackets]).amax(dim=0).cpu()
    rigorous = all(bound is not None and bound.rigorous for bound in bounds.values())
    return SelfInfluences((lower + upper) / 2, lower, upper, steps, rigorous)
