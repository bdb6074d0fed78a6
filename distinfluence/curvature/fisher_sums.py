"""What a Kronecker-factored fit sums over the data: second moments of the sides of each unit, then its eigenvalues.

Both sums are kernels: one forward pass of each chunk and one reverse pass for each vector in output space. Nothing of
the size of samples × parameters is held beyond WORK_BYTES.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distinfluence.errors import LossError
from distinfluence.layers.layout import MOST_DENSE, LayerLayout, Record, layout_of, unit_rows
from distinfluence.layers.queries import rotated
from distinfluence.layers.units import Sides, Unit, outer_sides
from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.counter_random import Uniform, sample_keys
from distinfluence.model.gradients import loss_gradients, output_gradients
from distinfluence.model.sample_risk import SampleRisk

WORK_BYTES = 32 * 2**20  # of gradient matrices that are held at once
MOST_FACTOR = 8192  # rows of a factor up to which it is decomposed; of larger ones the diagonal is kept
LONG = 16  # positions of a sample from which its second moment is worth a product of its own
MOST_EXACT = 16  # vectors in output space, up to which the expectation over labels is taken exactly by itself

FisherKind = Literal["exact", "sampled", "empirical"]


@dataclass(frozen=True)
class FisherVectors:
    """Which Fisher matrix. kind: "exact" over the predictive distribution, "sampled" from it, or "empirical".

    n_draws: labels drawn for each sample (at each position). seed: of the draws.
    """

    kind: FisherKind
    n_draws: int = 1
    seed: int = 0

    def __call__(self, record: Record, risk: SampleRisk, batch: Batch) -> Tensor | None:
        """[V, n, *outputs] with Σ_v v vᵀ = ∇²_f ℓ (or so in expectation); None for the loss's own gradients."""
        if self.kind == "empirical":
            return None
        predictive = risk.objective.predictive(record.outputs.detach(), batch)
        if predictive is None:
            raise LossError(
                f"`fisher={self.kind!r}` needs the predictive distribution behind the loss, and it is not known. "
                "Implement `predictive` of the objective, or pass fisher='empirical'."
            )
        if self.kind == "exact":
            return predictive.roots()
        keys = sample_keys(batch)
        draws = [predictive.draw(Uniform(keys, self.seed, number)) for number in range(self.n_draws)]
        return torch.stack(draws).div_(math.sqrt(self.n_draws))


@dataclass(frozen=True)
class LayoutOf:
    """Kernel: a chunk's (layout as bytes, number of vectors of its predictive distribution or −1)."""

    most_dense: int = MOST_DENSE
    recognise: bool = True

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """One pass over three samples, compared with their gradients."""
        layout = layout_of(risk, batch, self.most_dense, self.recognise)
        few = take(batch, 0, 1)
        outputs = risk.outputs(risk.parameters, few).detach()
        predictive = risk.objective.predictive(outputs, few)
        return layout.to_tensor(), torch.tensor(-1 if predictive is None else predictive.n_roots)


@dataclass(frozen=True)
class Pieces:
    """Everything of one micro-batch: its record, the gradients by each use's output, and the vectors they are of."""

    risk: SampleRisk
    batch: Batch
    record: Record
    vectors: Tensor | None
    deltas: list[Tensor]

    def sides(self, unit: Unit) -> Sides:
        """Of a unit of outer products."""
        return outer_sides(unit, self.record.uses, self.record.layout.infos, self.deltas, self.record.n)

    def rows(self, unit: Unit) -> Tensor:
        """Gradients of the samples for each vector: [V, n, g, o, i]."""
        if unit.uses:
            return unit_rows(self.record, unit, self.deltas)
        restricted = self.risk.only(unit.parameters)
        if self.vectors is None:
            found = [loss_gradients(restricted, self.batch).rows]
        else:
            found = [output_gradients(restricted, self.batch, vector).rows for vector in self.vectors]
        return torch.stack([unit.matrix(restricted.blocks.unflatten(rows)) for rows in found])


def pieces(risk: SampleRisk, layout: LayerLayout, batch: Batch, fisher: FisherVectors) -> Iterator[Pieces]:
    """Yield the chunk, some samples at a time."""
    n = batch_length(batch)
    n_vectors = {"exact": MOST_EXACT, "sampled": fisher.n_draws, "empirical": 1}[fisher.kind]
    own = sum(unit.size for unit in layout.units if not unit.uses) * risk.dtype.itemsize
    step = layout.samples_at_once(risk.device, n_vectors, 2 * own)
    for start in range(0, n, step):
        part = take(batch, start, min(start + step, n))
        record = Record(risk, layout, part)
        vectors = fisher(record, risk, part)
        deltas = record.of_losses() if vectors is None else record.deltas(vectors)
        yield Pieces(risk, part, record, vectors, deltas)


@dataclass(frozen=True)
class CovarianceSums:
    """Kernel: for each unit the sums that its eigenbasis is made of, in float64.

    "kronecker": Σ left leftᵀ [g, o, o], Σ right rightᵀ [g, i, i] (only the diagonal of a side that is one-hot or larger
    than MOST_FACTOR) and the number of positions. "moments": Σ S Sᵀ, Σ Sᵀ S, 0. "dense": Σ s sᵀ. "diagonal": Σ s².
    reduce: sides are summed (left) and averaged (right) over positions first (Eschenhagen et al. 2023).
    """

    layout: LayerLayout
    fisher: FisherVectors
    reduce: bool = False

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Micro-batch by micro-batch."""
        total: list[Tensor] = []
        for piece in pieces(risk, self.layout, batch, self.fisher):
            own = [t.double() for unit in self.layout.units for t in self._of_unit(piece, unit)]
            total = own if not total else [a.add_(b) for a, b in zip(total, own, strict=True)]
        return tuple(total)

    def _of_unit(self, piece: Pieces, unit: Unit) -> tuple[Tensor, ...]:
        if unit.treatment == "kronecker":
            return self._of_sides(piece.sides(unit), unit)
        rows = piece.rows(unit)
        if unit.treatment == "moments":
            s = rows[:, :, 0].flatten(0, 1)
            left = torch.einsum("nai,nbi->ab", s, s) if s.shape[1] <= MOST_FACTOR else s.square().sum(dim=(0, 2))
            right = torch.einsum("nia,nib->ab", s, s) if s.shape[2] <= MOST_FACTOR else s.square().sum(dim=(0, 1))
            return left.unsqueeze(0), right.unsqueeze(0), rows.new_zeros(())
        flat = rows.reshape(-1, unit.size)
        return (flat.T @ flat,) if unit.treatment == "dense" else (flat.square().sum(dim=0),)

    def _of_sides(self, sides: Sides, unit: Unit) -> tuple[Tensor, ...]:
        positions = torch.tensor(sides.right.shape[1] * sides.n_positions, device=sides.right.device)
        if unit.one_hot:
            counts = torch.bincount(sides.left.flatten(), minlength=unit.shape[1]).unsqueeze(0)
            return counts, _second_moment(sides.right), positions
        left, right = sides.left, sides.right
        if self.reduce:
            right = sides.with_ones().right
            left, right = left.sum(dim=2, keepdim=True), right.mean(dim=2, keepdim=True)
            positions = torch.tensor(right.shape[1], device=right.device)
        both_vary = left.shape[0] > 1 and right.shape[0] > 1  # V times the same inputs among them
        ones = sides.ones and not self.reduce
        moment = _with_border(_second_moment(right), right) if ones else _second_moment(right)
        return _second_moment(left) / (left.shape[0] if both_vary else 1), moment, positions


def _with_border(moment: Tensor, side: Tensor) -> Tensor:
    """Return the second moment [g, d, d] or [g, d] of a side with a one appended to each row."""
    count = torch.full_like(moment[:, :1, :1] if moment.ndim == 3 else moment[:, :1], math.prod(side.shape[:3]))
    if moment.ndim == 2:
        return torch.cat([moment, count], dim=1)
    sums = side.sum(dim=(0, 1, 2)).unsqueeze(2)
    below = torch.cat([sums.transpose(1, 2), count], dim=2)
    return torch.cat([torch.cat([moment, sums], dim=2), below], dim=1)


def _second_moment(side: Tensor) -> Tensor:
    """Σ x xᵀ of a side [V, n, T, g, d]: [g, d, d], or the diagonal [g, d] of what is too large to be decomposed."""
    if side.shape[4] > MOST_FACTOR:
        return side.square().sum(dim=(0, 1, 2))
    if side.shape[2] >= LONG and side.stride(2) == 1:  # positions last, as convolutions have them: no copy
        total = side.new_zeros(side.shape[3], side.shape[4], side.shape[4])
        for sample in side.flatten(0, 1):
            total.baddbmm_(sample.permute(1, 2, 0), sample.transpose(0, 1))
        return total
    rows = side.flatten(0, 2).transpose(0, 1)  # [g, V·n·T, d]
    return rows.transpose(1, 2) @ rows


@dataclass(frozen=True)
class EigenvalueSums:
    """Kernel: Σ over samples and vectors of the squared gradient in the eigenbasis, [g, o, i] float64 for each unit.

    broadcast: the left and the right basis of each "kronecker" and "moments" unit ([g, d, d]; empty for a side that
    has none). George et al. (2018), equation 7; a sample's positions are summed before squaring.
    """

    layout: LayerLayout
    fisher: FisherVectors

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Micro-batch by micro-batch."""
        units = [unit for unit in self.layout.units if unit.treatment in ("kronecker", "moments")]
        bases = list(zip(broadcast[::2], broadcast[1::2], strict=True))
        total = [torch.zeros(unit.shape, dtype=torch.float64, device=risk.device) for unit in units]
        for piece in pieces(risk, self.layout, batch, self.fisher):
            for unit, (left, right), own in zip(units, bases, total, strict=True):
                own += self._of_unit(piece, unit, _basis(left), _basis(right))
        return tuple(total)

    def _of_unit(self, piece: Pieces, unit: Unit, left: Tensor | None, right: Tensor | None) -> Tensor:
        if unit.treatment == "moments":
            return _squared(piece.rows(unit).flatten(0, 1), left, right)
        sides = piece.sides(unit)
        if unit.one_hot:
            return _one_hot_squared(sides, unit.shape[1], right)
        if sides.n_positions == 1:
            sides = sides.with_ones()
            a = rotated(sides.left[:, :, 0], left).square().sum(dim=0)
            b = rotated(sides.right[:, :, 0], right).square().sum(dim=0)
            return torch.einsum("ngo,ngi->goi", a, b)
        return _by_positions(sides, unit, left, right)


def _basis(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _squared(matrices: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Σ (leftᵀ S right)² over S [m, g, o, i]."""
    if left is not None:
        matrices = left.transpose(1, 2) @ matrices
    if right is not None:
        matrices = matrices @ right
    return matrices.square().sum(dim=0)


def _by_positions(sides: Sides, unit: Unit, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Σ_v Σ_n (Σ_t l r ᵀ)² in the eigenbasis; either side first, or the gradient matrix, whichever is less work."""
    g, o, i = unit.shape
    length = sides.n_positions
    sides_first = length * (o * o * (left is not None) + i * i * (right is not None))
    if sides_first < o * i * (o * (left is not None) + i * (right is not None)):
        sides = sides.with_ones()
        sides = Sides(rotated(sides.left, left), rotated(sides.right, right))
        left = right = None
    total = torch.zeros(unit.shape, dtype=torch.float64, device=sides.right.device)
    step = max(1, WORK_BYTES // (3 * g * o * i * sides.right.element_size()))
    for vector in range(sides.n_vectors):
        for start in range(0, sides.right.shape[1], step):
            total += _squared(sides.matrices(vector, slice(start, start + step)), left, right)
    return total


def _one_hot_squared(sides: Sides, n_tokens: int, right: Tensor | None) -> Tensor:
    """Do as `_by_positions` where the left side is a token: sum positions of one token in one sample first."""
    turned = rotated(sides.right, right).flatten(3)  # [V, n, T, i]
    n_vectors, n, length, width = turned.shape
    keys = (torch.arange(n, device=turned.device).unsqueeze(1) * n_tokens + sides.left).flatten()
    unique, index = torch.unique(keys, return_inverse=True)
    sums = turned.new_zeros(n_vectors, unique.shape[0], width)
    sums.index_add_(1, index, turned.reshape(n_vectors, n * length, width))
    total = turned.new_zeros(n_tokens, width, dtype=torch.float64)
    total.index_add_(0, unique % n_tokens, sums.square().sum(dim=0).double())
    return total.unsqueeze(0)
