"""Scores of training samples against factors, layer by layer, from inputs and output gradients.

A sample's entry is Σ_units ⟨M, Σ_t left_t right_tᵀ⟩ with M [o, i] the factor. With one position, M is contracted with
one side and the result with the other, or the sample's gradient matrix is made in micro-batches, whichever is less to
move; several positions are summed into that matrix first, which divides the work by their number. Never n × p.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distinfluence.errors import NonFiniteError, UnsupportedOperatorError
from distinfluence.layers.layout import LayerLayout, Record, unit_rows
from distinfluence.layers.units import Sides, Unit, outer_sides, position_scores
from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.gradients import loss_gradients, samples_at_once
from distinfluence.model.sample_risk import SampleRisk

MOST_SEPARATED = 2048  # rows or columns of weights that are decomposed to see whether they are separable
SCORE_BYTES, SCORE_BYTES_ON_GPU = 32 * 2**20, 2**30  # of contracted factors that are held at once


@dataclass(frozen=True)
class RankOne:
    """Queries whose gradient in a unit is one outer product, with the unit's eigenbasis: their factors are never made.

    left: [q, g, o], right: [q, g, i], in the eigenbasis. weights: [g, o, i], 1 / (Λ + λ). left_basis, right_basis:
    [g, d, d] or None for the identity. separated: (u [g, o, r], v [g, i, r]) with weights ≈ u vᵀ, where it saves work.
    """

    left: Tensor
    right: Tensor
    weights: Tensor
    left_basis: Tensor | None
    right_basis: Tensor | None
    separated: tuple[Tensor, Tensor] | None = None

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """[q, n] of training samples with one outer product each: left [n, g, o], right [n, g, i]."""
        left, right = rotated(left, self.left_basis), rotated(right, self.right_basis)
        if self.separated is not None:
            return self._separated(left, right, *self.separated)
        total = left.new_zeros(self.left.shape[0], left.shape[0])
        g, o, i = self.weights.shape
        step = _at_once(left, min(o, i) * left.shape[0] + o * i)
        for start in range(0, len(self.left), step):
            part = slice(start, start + step)
            for group in range(g):
                m = self.left[part, group, :, None] * self.right[part, group, None, :] * self.weights[group]
                total[part] += _contracted_pairs(m, left[:, group], right[:, group])
        return total

    def _separated(self, left: Tensor, right: Tensor, u: Tensor, v: Tensor) -> Tensor:
        total = left.new_zeros(self.left.shape[0], left.shape[0])
        for group in range(u.shape[0]):
            for k in range(u.shape[2]):
                by_left = (self.left[:, group] * u[group, :, k]) @ left[:, group].T
                total += by_left.mul_((self.right[:, group] * v[group, :, k]) @ right[:, group].T)
        return total


def rotated(side: Tensor, basis: Tensor | None) -> Tensor:
    """[..., g, d] · [g, d, d]; the side itself for the identity."""
    if basis is None:
        return side
    if basis.shape[0] == 1:
        return side @ basis[0]
    return torch.einsum("...gd,gde->...ge", side, basis)


def separable(weights: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """(u [g, o, r], v [g, i, r]) with |weights − u vᵀ| ≤ tolerance·max weights [g, o, i]; None where that is no saving.

    The weights 1 / (λ_o λ_i + λ) of KFAC are separable to any accuracy with a rank of about a dozen.
    """
    _, o, i = weights.shape
    most = o * i // (2 * (o + i))
    if min(o, i) > MOST_SEPARATED:
        return None
    u, s, vh = torch.linalg.svd(weights.double(), full_matrices=False)
    rank = int((s > tolerance * weights.max() * 0.1).sum(dim=1).max())
    if rank > most:
        return None
    left, right = u[..., :rank] * s[:, None, :rank], vh[:, :rank].transpose(1, 2)
    error = (left @ right.transpose(1, 2) - weights).abs().max()
    return (left, right) if float(error) <= tolerance * float(weights.max()) else None


@dataclass(frozen=True)
class QueryFactors:
    """Factors of queries, unit by unit. matrices: [q, g, o, i] of each unit, or the queries as `RankOne`.

    low_rank: of units whose factors were compressed, (u [q, g, o, r], v [q, g, i, r]) with M ≈ u vᵀ, None for others.
    relative_error: [q], ‖M − M̃‖ / ‖M‖ over all units; 0 without compression.
    """

    matrices: tuple[Tensor | RankOne, ...]
    low_rank: tuple[tuple[Tensor, Tensor] | None, ...]
    relative_error: Tensor
    _flat: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def flat(self, number: int, ones: bool) -> tuple[Tensor, Tensor]:
        """Return a unit's factors as rows [q, size without the bias's column], and that column, [q, g·o], if `ones`."""
        if number not in self._flat:
            m = self.matrices[number]
            assert isinstance(m, Tensor)
            weights = (m[..., :-1] if ones else m).reshape(m.shape[0], -1)
            self._flat[number] = weights, m[..., -1].reshape(m.shape[0], -1)
        return self._flat[number]

    @classmethod
    def of(cls, risk: SampleRisk, layout: LayerLayout, factors: Tensor, energy: float | None = None) -> "QueryFactors":
        """factors: [q, p]. energy: share of each factor's squared norm to keep in units where low rank is less work."""
        tensors = risk.blocks.unflatten(factors.to(risk.dtype))
        matrices = tuple(unit.matrix(tensors) for unit in layout.units)
        if energy is None:
            zeros = torch.zeros(factors.shape[0], dtype=torch.float64, device=factors.device)
            return cls(matrices, (None,) * len(matrices), zeros)
        parts = [
            _compressed(m, energy) if unit.treatment == "kronecker" and not unit.one_hot else None
            for unit, m in zip(layout.units, matrices, strict=True)
        ]
        lost = sum(
            (m - u @ v.transpose(2, 3)).double().square().flatten(1).sum(dim=1)
            for m, part in zip(matrices, parts, strict=True)
            if part is not None
            for u, v in (part,)
        )
        whole = factors.double().square().sum(dim=1)
        error = (lost / whole.clamp_min(torch.finfo(torch.float64).tiny)) ** 0.5 if torch.is_tensor(lost) else whole * 0
        return cls(matrices, tuple(parts), error)


def _compressed(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor] | None:
    """Return truncated singular vectors that keep the energy of each query; None where that is no saving."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    squares = s.double().square()
    kept = squares.cumsum(dim=-1) / squares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # the rank at which the last query has what is asked for; rounding must not make it the full rank
    rank = int((kept < energy * (1 - 1e-12)).sum(dim=-1).max()) + 1
    o, i = matrix.shape[2:]
    if rank * (o + i) >= o * i:
        return None
    return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :].transpose(2, 3).contiguous()


@dataclass(frozen=True)
class LayerScores:
    """Of one micro-batch: by_unit: [q, n] for each unit; losses [n]; gradient_norms [n]."""

    by_unit: list[Tensor]
    losses: Tensor
    gradient_norms: Tensor


def layer_scores(risk: SampleRisk, layout: LayerLayout, queries: QueryFactors, batch: Batch) -> Iterator[LayerScores]:
    """Scores of the batch's samples, micro-batch by micro-batch; one forward and one reverse pass."""
    for part, record in recorded(risk, layout, batch):
        deltas = record.of_losses()
        scores, squared = [], torch.zeros(record.n, dtype=risk.dtype, device=risk.device)
        for number, (unit, m) in enumerate(zip(layout.units, queries.matrices, strict=True)):
            if unit.uses and unit.treatment == "kronecker":
                sides = outer_sides(unit, record.uses, layout.infos, deltas, record.n)
                with risk.products():
                    own, norms = _outer_scores(sides, unit, queries, number)
            else:
                assert isinstance(m, Tensor)
                rows = _rows(risk, unit, record, deltas, part)
                with risk.products():
                    own, norms = m.flatten(1) @ rows.T, rows.square().sum(dim=1)
            scores.append(own)
            squared += norms
        losses = record.losses.detach().to(risk.dtype)
        _check_finite(losses, squared)
        yield LayerScores(scores, losses, squared.sqrt())


def scores_of_factors(risk: SampleRisk, layout: LayerLayout, factors: Tensor, batch: Batch) -> Iterator[LayerScores]:
    """As `layer_scores` with all units in one, from factors [q, p] as they are, of which nothing is kept.

    One forward and one reverse pass, and a second of each where parameters have no layer that is known.
    """
    tensors = risk.blocks.unflatten(factors)
    rest = tuple(name for unit in layout.units if not unit.uses for name in unit.parameters)
    for part, record in recorded(risk, layout, batch):
        deltas = record.of_losses()
        total = factors.new_zeros(factors.shape[0], record.n)
        squared = factors.new_zeros(record.n)
        for unit in layout.units:
            if unit.uses and unit.treatment == "kronecker":
                sides = outer_sides(unit, record.uses, layout.infos, deltas, record.n)
                with risk.products():
                    own, norms = _sides_scores(sides, unit, tensors)
                total += own
                squared += norms
            elif unit.uses:
                rows = unit_rows(record, unit, deltas)[0].flatten(1)
                _add_products(risk, total, squared, unit.matrix(tensors).flatten(1), rows)
        if rest:
            restricted = risk.only(rest)
            of_rest = restricted.blocks.unflatten(loss_gradients(restricted, part).rows)
            for name in rest:
                _add_products(risk, total, squared, tensors[name].flatten(1), of_rest[name].flatten(1))
        losses = record.losses.detach().to(risk.dtype)
        _check_finite(losses, squared)
        yield LayerScores([total], losses, squared.sqrt())


def _add_products(risk: SampleRisk, total: Tensor, squared: Tensor, factors: Tensor, rows: Tensor) -> None:
    with risk.products():
        total.addmm_(factors, rows.T)
    squared += rows.square().sum(dim=1)


def _sides_scores(sides: Sides, unit: Unit, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As `_outer_scores`, from factors by parameter, in the orientation of the weight."""
    if unit.one_hot:
        m, right = unit.matrix(tensors)[:, 0], sides.right[0][:, :, 0]
        return _one_hot_scores(sides.left, right, m), _one_hot_norms(sides.left, right, unit)
    turned = Sides(sides.right, sides.left) if unit.transposed else Sides(sides.left, sides.right)
    way = _by_contraction if sides.n_positions == 1 else _by_matrices
    scores, squared = way(turned, tensors[unit.parameters[0]].flatten(1))
    if not unit.has_bias:
        return scores, squared
    return _with_bias(scores, squared, sides, tensors[unit.parameters[1]].flatten(1))


def recorded(risk: SampleRisk, layout: LayerLayout, batch: Batch) -> Iterator[tuple[Batch, Record]]:
    """Yield the batch, some samples at a time, with their records."""
    n = batch_length(batch)
    by_autograd = sum(unit.size for unit in layout.units if not unit.uses) * risk.dtype.itemsize
    step = layout.samples_at_once(risk.device, 1, by_autograd)
    for start in range(0, n, step):
        part = take(batch, start, min(start + step, n))
        yield part, Record(risk, layout, part)


def _rows(risk: SampleRisk, unit: Unit, record: Record, deltas: Sequence[Tensor], batch: Batch) -> Tensor:
    """Gradients [n, size] of a unit that is no outer product."""
    if unit.uses:
        return unit_rows(record, unit, deltas)[0].flatten(1)
    restricted = risk.only(unit.parameters)
    return unit.matrix(restricted.blocks.unflatten(loss_gradients(restricted, batch).rows)).flatten(1)


def _outer_scores(sides: Sides, unit: Unit, queries: QueryFactors, number: int) -> tuple[Tensor, Tensor]:
    """(scores [q, n], squared gradient norms [n]) of the unit of this number."""
    m, low_rank = queries.matrices[number], queries.low_rank[number]
    if isinstance(m, RankOne):
        sides = sides.with_ones()
        left, right = sides.left[0], sides.right[0]
        return m.scores(left[:, 0], right[:, 0]), _outer_norms(left, right)
    right = sides.right[0]
    if unit.one_hot:
        return _one_hot_scores(sides.left, right[:, :, 0], m[:, 0]), _one_hot_norms(sides.left, right[:, :, 0], unit)
    left, (_, o, i), length = sides.left[0], unit.shape, sides.n_positions
    n_queries = m.shape[0]
    if low_rank is not None and length * low_rank[0].shape[3] * (o + i) < o * i:
        right = sides.with_ones().right[0]
        return _low_rank_scores(left, right, *low_rank), _outer_norms(left, right)
    if length == 1 and n_queries * min(o, i) < o * i:
        own, squared = _by_contraction(sides, m[..., :-1] if sides.ones else m)
        biases = m[..., -1].flatten(1)
    else:
        weights, biases = queries.flat(number, sides.ones)
        own, squared = _by_matrices(sides, weights)
    return _with_bias(own, squared, sides, biases) if sides.ones else (own, squared)


def _at_once(like: Tensor, numbers: int) -> int:
    """How many pieces of so many numbers each are held at once, on the device of a tensor and in its dtype."""
    most = SCORE_BYTES if like.device.type == "cpu" else SCORE_BYTES_ON_GPU
    return max(1, most // max(1, numbers * like.element_size()))


def _by_contraction(sides: Sides, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(lᵀ M r [q, n], ‖l‖²‖r‖² [n]) for one position, some queries at a time.

    weights: [q, …], the factors M [q, g, o, i] in some shape, copied part by part where they are not contiguous. A
    bias's ones are left out.
    """
    left, right = sides.left[0], sides.right[0]
    (n, _, g, o), i = left.shape, right.shape[3]
    scores = left.new_empty(weights.shape[0], n)
    step = _at_once(left, g * o * i + n * min(o, i))
    for start in range(0, weights.shape[0], step):
        part = slice(start, start + step)
        m = weights[part].reshape(-1, g, o, i)
        scores[part] = sum(_contracted_pairs(m[:, k], left[:, 0, k], right[:, 0, k]) for k in range(g))
    return scores, _outer_norms(left, right)


def _by_matrices(sides: Sides, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(scores [q, n], ‖S‖² [n]) from gradient matrices S of some samples at a time. weights: [q, g·o·i].

    A bias's ones are left out.
    """
    without = Sides(sides.left, sides.right)
    step = samples_at_once(weights.shape[1] * weights.element_size(), weights.device.type == "cpu")
    scores, norms = [], []
    for start in range(0, sides.right.shape[1], step):
        s = without.matrices(0, slice(start, start + step)).flatten(1)
        scores.append(weights @ s.T)
        norms.append(torch.linalg.vector_norm(s, dim=1).square())
    return torch.cat(scores, dim=1), torch.cat(norms)


def _with_bias(scores: Tensor, squared: Tensor, sides: Sides, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [q, n] and squared norms [n] with those of a bias, whose factors are [q, g·o]."""
    sums = sides.left[0].sum(dim=1).flatten(1)
    return scores.addmm_(biases, sums.T), squared.add_(sums.square().sum(dim=1))


def _contracted_pairs(m: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """lᵀ M r of M [q, o, i], left [n, o], right [n, i]: [q, n]; the longer side first, as one product."""
    n_queries, o, i = m.shape
    if o <= i:
        inner = (m.reshape(-1, i) @ right.T).view(n_queries, o, -1)
        return inner.mul_(left.T).sum(dim=1)
    inner = (m.transpose(1, 2).reshape(-1, o) @ left.T).view(n_queries, i, -1)
    return inner.mul_(right.T).sum(dim=1)


def _low_rank_scores(left: Tensor, right: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Σ_t Σ_r ⟨l_t, u_r⟩⟨r_t, v_r⟩ of sides [n, T, g, d]: [q, n]."""
    n, length, g, _ = left.shape
    n_queries, rank = u.shape[0], u.shape[3]
    total = left.new_zeros(n_queries, n)
    step = _at_once(left, 2 * length * n_queries * rank)
    for group in range(g):
        us = u[:, group].permute(1, 0, 2).reshape(u.shape[2], -1)
        vs = v[:, group].permute(1, 0, 2).reshape(v.shape[2], -1)
        for start in range(0, n, step):
            part = slice(start, start + step)
            products = (left[part, :, group] @ us).mul_(right[part, :, group] @ vs)
            total[:, part] += products.view(-1, length, n_queries, rank).sum(dim=(1, 3)).T
    return total


def _outer_norms(left: Tensor, right: Tensor) -> Tensor:
    """‖Σ_t l_t r_tᵀ‖² of sides [n, T, g, d]: [n], by the Gram matrices of both sides where that is less work."""
    length, o, i = left.shape[1], left.shape[3], right.shape[3]
    if length == 1:
        return (left.square().sum(dim=3) * right.square().sum(dim=3)).sum(dim=(1, 2))
    if length * (o + i) > o * i:
        return torch.cat(
            [
                (one.permute(0, 2, 3, 1) @ other.transpose(1, 2)).square().sum(dim=(1, 2, 3))
                for one, other in zip(left.split(16), right.split(16), strict=True)
            ]
        )
    grams = torch.einsum("ntgd,nsgd->ngts", left, left) * torch.einsum("ntgd,nsgd->ngts", right, right)
    return grams.sum(dim=(1, 2, 3)).clamp_min(0)


def _one_hot_scores(ids: Tensor, right: Tensor, m: Tensor) -> Tensor:
    """Σ_t ⟨M[id_t], r_t⟩ of ids [n, T], right [n, T, i], M [q, tokens, i]."""
    n_queries, (n, length, width) = m.shape[0], right.shape
    total = right.new_zeros(n_queries, n)
    step = _at_once(right, n_queries * length * width)
    for start in range(0, n, step):
        part = slice(start, start + step)
        taken = m[:, ids[part].flatten()].view(n_queries, -1, length * width)
        total[:, part] = torch.einsum("qnw,nw->qn", taken, right[part].flatten(1))
    return total


def _one_hot_norms(ids: Tensor, right: Tensor, unit: Unit) -> Tensor:
    """Squared norm of each sample's embedding gradient: positions of one token add up first."""
    same = ids.unsqueeze(1) == ids.unsqueeze(2)
    grams = torch.einsum("nti,nsi->nts", right, right)
    return (grams * same).sum(dim=(1, 2)).clamp_min(0)


def token_scores(risk: SampleRisk, layout: LayerLayout, queries: QueryFactors, batch: Batch) -> Tensor:
    """Scores by position, [q, n, T]; they sum to the samples'. One forward and one reverse pass.

    Raises UnsupportedOperatorError, naming the parameters, where a layer does not have the same positions as the others
    or a gradient comes from autograd as a whole.
    """
    whole = [name for unit in layout.units if not unit.uses for name in unit.parameters]
    if whole:
        raise UnsupportedOperatorError(
            f"`influences_by_token` cannot tell the positions in the gradients of {whole[:5]}. Freeze these parameters "
            "or use `influences`."
        )
    found = []
    for _, record in recorded(risk, layout, batch):
        deltas = record.of_losses()
        parts = [
            _by_position(unit, m, record, deltas)
            for unit, m in zip(layout.units, queries.matrices, strict=True)
            if isinstance(m, Tensor)
        ]
        lengths = {part.shape[2] for part in parts}
        if len(lengths) > 1:
            odd = {unit.parameters[0]: part.shape[2] for unit, part in zip(layout.units, parts, strict=True)}
            raise UnsupportedOperatorError(
                f"`influences_by_token` needs layers with the same positions, got {odd}. Freeze the parameters of the "
                "layers that work on pooled positions, or use `influences`."
            )
        found.append(torch.stack(parts).sum(dim=0))
    return torch.cat(found, dim=1)


def _by_position(unit: Unit, m: Tensor, record: Record, deltas: Sequence[Tensor]) -> Tensor:
    """[q, n, T] of one unit."""
    infos = record.layout.infos
    if unit.treatment != "kronecker":
        return position_scores(unit, m, record.uses, infos, deltas, record.n)
    # positions of several uses of one layer are one after the other: they add up by their place in the sequence
    sides = outer_sides(unit, record.uses, infos, deltas, record.n).with_ones()
    right = sides.right[0]
    if unit.one_hot:
        by_use = torch.stack([torch.einsum("nti,nti->nt", own[sides.left], right[:, :, 0]) for own in m[:, 0]])
    else:
        left = sides.left[0]
        step = _at_once(left, left.numel())
        by_use = torch.cat([torch.einsum("qgoi,ntgi,ntgo->qnt", part, right, left) for part in m.split(step)])
    return by_use.reshape(*by_use.shape[:2], len(unit.uses), -1).sum(dim=2)


def _check_finite(losses: Tensor, squared: Tensor) -> None:
    finite = torch.isfinite(losses) & torch.isfinite(squared)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"`model` gives NaN or infinity in the loss gradients of samples {bad[:10]} of this batch ({len(bad)} of "
            f"{finite.numel()}). Look at these samples; a square root or logarithm at zero is a usual cause."
        )


def layer_gradients(risk: SampleRisk, layout: LayerLayout, batch: Batch) -> tuple[Tensor, Tensor]:
    """(gradients [n, p] of the samples' losses by all covered parameters, losses [n]), put together from the layers."""
    rows, losses = [], []
    for part, record in recorded(risk, layout, batch):
        deltas = record.of_losses()
        found: dict[str, Tensor] = {}
        for unit in layout.units:
            if unit.uses:
                matrix = unit_rows(record, unit, deltas)[0]
            else:
                matrix = _rows(risk, unit, record, deltas, part).unflatten(1, unit.shape)
            found |= unit.tensors(matrix, risk.blocks.shapes)
        rows.append(risk.blocks.flatten(found, n_leading=1))
        losses.append(record.losses.detach().to(risk.dtype))
    return torch.cat(rows), torch.cat(losses)
