"""Queries in the eigenbasis of a Kronecker-factored matrix, for scores that need no factors."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from distinfluence.curvature.kronecker import Eigenbasis
from distinfluence.layers.layout import Record, unit_rows
from distinfluence.layers.scores import RankOne, rotated, separable
from distinfluence.layers.units import Unit, outer_sides
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import loss_gradients
from distinfluence.model.sample_risk import SampleRisk


def query_of(
    risk: SampleRisk,
    unit: Unit,
    basis: Eigenbasis,
    function: Callable[[Tensor], Tensor],
    record: Record,
    deltas: Sequence[Tensor],
    batch: Batch,
) -> Tensor | RankOne:
    """f(A) times the loss gradients of a micro-batch in one unit: [q, g, o, i], or the outer products themselves."""
    if unit.uses and unit.treatment == "kronecker" and not unit.one_hot:
        sides = outer_sides(unit, record.uses, record.layout.infos, deltas, record.n)
        if sides.n_positions == 1:
            sides = sides.with_ones()
            left, right = rotated(sides.left[0, :, 0], basis.left), rotated(sides.right[0, :, 0], basis.right)
            return RankOne(left, right, function(basis.values).to(left.dtype), basis.left, basis.right)
    if unit.uses:
        matrix = unit_rows(record, unit, deltas)[0]
    else:
        restricted = risk.only(unit.parameters)
        matrix = unit.matrix(restricted.blocks.unflatten(loss_gradients(restricted, batch).rows))
    return basis.scaled(matrix, function)


def joined_queries(parts: Sequence[Tensor | RankOne], dtype: torch.dtype, *, separate: bool) -> Tensor | RankOne:
    """Join the queries of all micro-batches. separate: look whether weights separate, to ten times the rounding."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([cast(Tensor, part) for part in parts])
    outer = [cast(RankOne, part) for part in parts]
    tolerance = max(10 * float(torch.finfo(dtype).eps), 1e-12)  # singular values themselves are no better in float64
    apart = separable(first.weights, tolerance) if separate else None
    return RankOne(
        torch.cat([part.left for part in outer]),
        torch.cat([part.right for part in outer]),
        first.weights,
        first.left_basis,
        first.right_basis,
        None if apart is None else (apart[0].to(dtype), apart[1].to(dtype)),
    )
