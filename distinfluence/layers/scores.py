"""Scores of training samples against the factors of queries, layer by layer, from inputs and output gradients.

Each unit's factors have one of a few forms (`layers.queries`), each with its scores; here they are summed over units,
micro-batch by micro-batch. The matrix of samples × parameters is never made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.errors import NonFiniteError, UnsupportedOperatorError
from distinfluence.layers.gradients import LayerGradients, layer_gradients
from distinfluence.layers.layout import LayerLayout
from distinfluence.layers.queries import UnitQueries, at_once
from distinfluence.layers.units import Unit
from distinfluence.model.batch import Batch
from distinfluence.model.sample_risk import SampleRisk


@dataclass(frozen=True)
class LayerScores:
    """Of one micro-batch. by_block: block → [q, n]; losses [n]; gradient_norms [n]."""

    by_block: dict[str, Tensor]
    losses: Tensor
    gradient_norms: Tensor


def layer_scores(
    risk: SampleRisk, layout: LayerLayout, queries: Sequence[UnitQueries], batch: Batch, *, apart: bool = False
) -> Iterator[LayerScores]:
    """Yield the scores of the batch's samples, micro-batch by micro-batch; one forward and one reverse pass.

    queries: of each unit of the layout. apart: whether blocks are kept apart; else all are in one, named "".
    """
    for gradients in layer_gradients(risk, layout, batch):
        totals: dict[str, Tensor] = {}
        squared = torch.zeros(gradients.n, dtype=risk.dtype, device=risk.device)
        for unit, factors in zip(layout.units, queries, strict=True):
            if isinstance(factors, Tensor):
                rows = gradients.matrices(unit).flatten(1)
                with risk.products():
                    scores, norms = factors @ rows.T, rows.square().sum(dim=1)
            else:
                sides = gradients.sides(unit)
                with risk.products():
                    scores, norms = factors.scores(sides)
            block = unit.block if apart else ""
            totals[block] = totals[block].add_(scores) if block in totals else scores
            squared += norms
        _check_finite(gradients.losses, squared)
        yield LayerScores(totals, gradients.losses, squared.sqrt())


def token_scores(risk: SampleRisk, layout: LayerLayout, factors: Tensor, batch: Batch) -> Tensor:
    """Scores by position, [q, n, T], from factors [q, p]; they sum to the samples'. One forward and one reverse pass.

    Raises UnsupportedOperatorError, naming the parameters, where a layer does not have the same positions as the others
    or a gradient comes from autograd as a whole.
    """
    whole = [name for unit in layout.units if not unit.uses for name in unit.parameters]
    if whole:
        raise UnsupportedOperatorError(
            f"`influences_by_token` cannot tell the positions in the gradients of {whole[:5]}. Freeze these parameters "
            "or use `influences`."
        )
    tensors = risk.blocks.unflatten(factors)
    matrices = [unit.matrix(tensors) for unit in layout.units]
    totals = []
    for gradients in layer_gradients(risk, layout, batch):
        by_unit = [_by_position(unit, m, gradients) for unit, m in zip(layout.units, matrices, strict=True)]
        if len({scores.shape[2] for scores in by_unit}) > 1:
            odd = {unit.parameters[0]: scores.shape[2] for unit, scores in zip(layout.units, by_unit, strict=True)}
            raise UnsupportedOperatorError(
                f"`influences_by_token` needs layers with the same positions, got {odd}. Freeze the parameters of the "
                "layers that work on pooled positions, or use `influences`."
            )
        totals.append(torch.stack(by_unit).sum(dim=0))
    return torch.cat(totals, dim=1)


def _by_position(unit: Unit, m: Tensor, gradients: LayerGradients) -> Tensor:
    """[q, n, T] of one unit, from factors m [q, g, o, i]."""
    if unit.treatment != "kronecker":
        return gradients.position_scores(unit, m)
    # positions of several uses of one layer are one after the other: they add up by their place in the sequence
    sides = gradients.sides(unit).with_ones()
    right = sides.right[0]
    if unit.one_hot:
        by_use = torch.stack([torch.einsum("nti,nti->nt", own[sides.left], right[:, :, 0]) for own in m[:, 0]])
    else:
        left = sides.left[0]
        step = at_once(left, left.numel())
        by_use = torch.cat([torch.einsum("qgoi,ntgi,ntgo->qnt", some, right, left) for some in m.split(step)])
    return by_use.reshape(*by_use.shape[:2], len(unit.uses), -1).sum(dim=2)


def _check_finite(losses: Tensor, squared: Tensor) -> None:
    finite = torch.isfinite(losses) & torch.isfinite(squared)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"`model` gives NaN or infinity in the loss gradients of samples {bad[:10]} of this batch ({len(bad)} of "
            f"{finite.numel()}). Look at these samples; a square root or logarithm at zero is a usual cause."
        )
