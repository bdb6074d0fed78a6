"""The forms that queries' factors take in one unit, each with the scores of training samples against them.

A sample's entry of a unit is ⟨M, S⟩ with M [o, i] the factor and S = Σ_t left_t right_tᵀ the sample's gradient. S is
made, or M is contracted with one side and the result with the other, whichever is less to move.

    Whole     M as it is, by parameter          OneHot    rows of M picked by token
    LowRank   M ≈ u vᵀ, where it saves work     RankOne   one outer product in an eigenbasis: M is never made

Factors of a unit that is no outer product are plain rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distinfluence.layers.units import Sides, Unit
from distinfluence.model.gradients import samples_at_once

MOST_SEPARATED = 2048  # rows or columns of weights that are decomposed to see whether they are separable
SCORE_BYTES, SCORE_BYTES_ON_GPU = 32 * 2**20, 2**30  # of contracted factors that are held at once


class OuterQueries(Protocol):
    """Factors of q queries in a unit of outer products."""

    def scores(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """(scores [q, n] of n training samples, squared norms [n] of their gradients in this unit)."""


UnitQueries = OuterQueries | Tensor  # rows [q, size] of a unit that is no outer product


@dataclass(frozen=True)
class Whole:
    """Factors by parameter. weight: [q, g·o·i], or [q, g·i·o] if it is transposed; bias: [q, g·o] or None."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool

    def scores(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """One position is contracted where queries are few; else gradient matrices are made in micro-batches."""
        o, i = sides.left.shape[4], sides.right.shape[4] + sides.ones
        contract = sides.n_positions == 1 and len(self.weight) * min(o, i) < o * i
        turned = Sides(sides.right, sides.left) if self.transposed else Sides(sides.left, sides.right)
        scores, squared = (_by_contraction if contract else _by_matrices)(turned, self.weight)
        if self.bias is None:
            return scores, squared
        sums = sides.left[0].sum(dim=1).flatten(1)
        return scores.addmm_(self.bias, sums.T), squared.add_(sums.square().sum(dim=1))


@dataclass(frozen=True)
class OneHot:
    """Factors of a unit whose left side is a token: [q, tokens, i]."""

    matrices: Tensor

    def scores(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """Σ_t ⟨M[id_t], r_t⟩; for the norms, positions of one token add up first."""
        ids, right = sides.left, sides.right[0, :, :, 0]
        n_queries, (n, length, width) = self.matrices.shape[0], right.shape
        total = right.new_zeros(n_queries, n)
        step = at_once(right, n_queries * length * width)
        for start in range(0, n, step):
            samples = slice(start, start + step)
            taken = self.matrices[:, ids[samples].flatten()].view(n_queries, -1, length * width)
            total[:, samples] = torch.einsum("qnw,nw->qn", taken, right[samples].flatten(1))
        same = ids.unsqueeze(1) == ids.unsqueeze(2)
        grams = torch.einsum("nti,nsi->nts", right, right)
        return total, (grams * same).sum(dim=(1, 2)).clamp_min(0)


@dataclass(frozen=True)
class LowRank:
    """Compressed factors M ≈ u vᵀ. u: [q, g, o, r]; v: [q, g, i, r]; lost: [q], ‖M − u vᵀ‖²; whole: M as it was."""

    u: Tensor
    v: Tensor
    lost: Tensor
    whole: Whole

    def scores(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """Σ_t Σ_r ⟨l_t, u_r⟩⟨r_t, v_r⟩; by the whole factors where positions are so many that this is more work."""
        length, (n_queries, _, o, rank), i = sides.n_positions, self.u.shape, self.v.shape[2]
        if length * rank * (o + i) >= o * i:
            return self.whole.scores(sides)
        left, right = sides.left[0], sides.with_ones().right[0]
        n = left.shape[0]
        total = left.new_zeros(n_queries, n)
        step = at_once(left, 2 * length * n_queries * rank)
        for group in range(left.shape[2]):
            us = self.u[:, group].permute(1, 0, 2).reshape(o, -1)
            vs = self.v[:, group].permute(1, 0, 2).reshape(i, -1)
            for start in range(0, n, step):
                samples = slice(start, start + step)
                products = (left[samples, :, group] @ us).mul_(right[samples, :, group] @ vs)
                total[:, samples] += products.view(-1, length, n_queries, rank).sum(dim=(1, 3)).T
        return total, _outer_norms(left, right)


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

    def scores(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """Of samples with one outer product each, too."""
        sides = sides.with_ones()
        left, right = rotated(sides.left[0, :, 0], self.left_basis), rotated(sides.right[0, :, 0], self.right_basis)
        made = (
            self._by_factors(left, right) if self.separated is None else self._separated(left, right, *self.separated)
        )
        return made, _outer_norms(sides.left[0], sides.right[0])

    def _by_factors(self, left: Tensor, right: Tensor) -> Tensor:
        total = left.new_zeros(self.left.shape[0], left.shape[0])
        g, o, i = self.weights.shape
        step = at_once(left, min(o, i) * left.shape[0] + o * i)
        for start in range(0, len(self.left), step):
            some = slice(start, start + step)
            for group in range(g):
                m = self.left[some, group, :, None] * self.right[some, group, None, :] * self.weights[group]
                total[some] += _contracted_pairs(m, left[:, group], right[:, group])
        return total

    def _separated(self, left: Tensor, right: Tensor, u: Tensor, v: Tensor) -> Tensor:
        total = left.new_zeros(self.left.shape[0], left.shape[0])
        for group in range(u.shape[0]):
            for k in range(u.shape[2]):
                by_left = (self.left[:, group] * u[group, :, k]) @ left[:, group].T
                total += by_left.mul_((self.right[:, group] * v[group, :, k]) @ right[:, group].T)
        return total


def unit_queries(unit: Unit, tensors: Mapping[str, Tensor], energy: float | None = None) -> UnitQueries:
    """Return factors, name → [q, *shape], in the form for their unit, as views where the form allows it.

    energy: the share of each factor's squared norm to keep where low rank is less work; None keeps factors whole.
    """
    if unit.treatment != "kronecker":
        return unit.matrix(tensors).flatten(1)
    if unit.one_hot:
        return OneHot(unit.matrix(tensors)[:, 0])
    bias = tensors[unit.parameters[1]].flatten(1) if unit.has_bias else None
    whole = Whole(tensors[unit.parameters[0]].flatten(1), bias, unit.transposed)
    return whole if energy is None else _compressed(unit.matrix(tensors), energy, whole)


def _compressed(matrix: Tensor, energy: float, whole: Whole) -> Whole | LowRank:
    """Truncate singular vectors so that each query keeps the energy; as it was where that is no saving."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    squares = s.double().square()
    kept = squares.cumsum(dim=-1) / squares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # the rank at which the last query has what is asked for; rounding must not make it the full rank
    rank = int((kept < energy * (1 - 1e-12)).sum(dim=-1).max()) + 1
    o, i = matrix.shape[2:]
    if rank * (o + i) >= o * i:
        return whole
    u, v = u[..., :rank] * s[..., None, :rank], vh[..., :rank, :].transpose(2, 3).contiguous()
    lost = (matrix - u @ v.transpose(2, 3)).double().square().flatten(1).sum(dim=1)
    return LowRank(u, v, lost, whole)


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


def at_once(like: Tensor, numbers: int) -> int:
    """How many pieces of so many numbers each are held at once, on the device of a tensor and in its dtype."""
    most = SCORE_BYTES if like.device.type == "cpu" else SCORE_BYTES_ON_GPU
    return max(1, most // max(1, numbers * like.element_size()))


def _by_contraction(sides: Sides, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(lᵀ M r [q, n], ‖l‖²‖r‖² [n]) for one position, some queries at a time.

    weights: [q, g·o·i], copied some at a time where they are not contiguous. A bias's ones are left out.
    """
    left, right = sides.left[0], sides.right[0]
    (n, _, g, o), i = left.shape, right.shape[3]
    scores = left.new_empty(weights.shape[0], n)
    step = at_once(left, g * o * i + n * min(o, i))
    for start in range(0, weights.shape[0], step):
        some = slice(start, start + step)
        m = weights[some].reshape(-1, g, o, i)
        scores[some] = sum(_contracted_pairs(m[:, k], left[:, 0, k], right[:, 0, k]) for k in range(g))
    return scores, _outer_norms(left, right)


def _by_matrices(sides: Sides, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(scores [q, n], ‖S‖² [n]) from gradient matrices S of some samples at a time. weights: [q, g·o·i].

    A bias's ones are left out.
    """
    step = samples_at_once(weights.shape[1] * weights.element_size(), weights.device.type == "cpu")
    scores, norms = [], []
    for start in range(0, sides.right.shape[1], step):
        s = sides.matrices(0, slice(start, start + step)).flatten(1)
        scores.append(weights @ s.T)
        norms.append(torch.linalg.vector_norm(s, dim=1).square())
    return torch.cat(scores, dim=1), torch.cat(norms)


def _contracted_pairs(m: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """lᵀ M r of M [q, o, i], left [n, o], right [n, i]: [q, n]; the longer side first, as one product."""
    n_queries, o, i = m.shape
    if o <= i:
        inner = (m.reshape(-1, i) @ right.T).view(n_queries, o, -1)
        return inner.mul_(left.T).sum(dim=1)
    inner = (m.transpose(1, 2).reshape(-1, o) @ left.T).view(n_queries, i, -1)
    return inner.mul_(right.T).sum(dim=1)


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
