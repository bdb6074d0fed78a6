"""Queries in the eigenbasis of a Kronecker-factored matrix, for scores that need no factors."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from distinfluence.curvature.kronecker import Eigenbasis
from distinfluence.layers.gradients import LayerGradients
from distinfluence.layers.queries import RankOne, UnitQueries, rotated, separable, unit_queries


def query_of(basis: Eigenbasis, function: Callable[[Tensor], Tensor], gradients: LayerGradients) -> Tensor | RankOne:
    """f(A) times the loss gradients of a micro-batch in one unit: [q, g, o, i], or the outer products themselves."""
    unit = basis.unit
    if unit.treatment == "kronecker" and not unit.one_hot:
        sides = gradients.sides(unit)
        if sides.n_positions == 1:
            sides = sides.with_ones()
            left, right = rotated(sides.left[0, :, 0], basis.left), rotated(sides.right[0, :, 0], basis.right)
            return RankOne(left, right, function(basis.values).to(left.dtype), basis.left, basis.right)
    return basis.scaled(gradients.matrices(unit), function)


def joined_queries(
    basis: Eigenbasis, parts: Sequence[Tensor | RankOne], shapes: Mapping[str, torch.Size], *, separate: bool
) -> UnitQueries:
    """Join the queries of all micro-batches. separate: look whether weights separate, to ten times the rounding."""
    first = parts[0]
    if isinstance(first, Tensor):
        return unit_queries(basis.unit, basis.unit.tensors(torch.cat([cast(Tensor, part) for part in parts]), shapes))
    outer, dtype = [cast(RankOne, part) for part in parts], first.left.dtype
    tolerance = max(10 * float(torch.finfo(dtype).eps), 1e-12)  # singular values themselves are no better in float64
    factored = separable(first.weights, tolerance) if separate else None
    return RankOne(
        torch.cat([part.left for part in outer]),
        torch.cat([part.right for part in outer]),
        first.weights,
        first.left_basis,
        first.right_basis,
        None if factored is None else (factored[0].to(dtype), factored[1].to(dtype)),
    )
