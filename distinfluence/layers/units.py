"""Units: parameters that are treated together, as one matrix [groups, out, in] of each sample's gradient.

A sample's gradient of a layer's weight is a sum of outer products over the positions t at which the layer is applied,

    S = Σ_t left_t right_tᵀ,    left: gradients by the layer's outputs, right: its inputs, with 1 appended for the bias

(for an embedding, left is the one-hot token and right the output's gradient). Shapes here are [V, n, T, g, d] with V
vectors in output space, n samples, T positions and g groups; V is 1 for what does not depend on the vector.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distinfluence.layers.recorder import Use

Treatment = Literal["kronecker", "moments", "dense", "diagonal"]


@dataclass(frozen=True)
class SampleAxis:
    """Where the samples are in a tensor. axis: the dimension, None for none; merged: with what follows."""

    axis: int | None
    merged: bool = False

    def front(self, tensor: Tensor, n: int, leading: int = 0) -> Tensor:
        """[*leading, ...] → [*leading, n, ...]."""
        if self.axis is None:
            tensor = tensor.unsqueeze(leading)
            return tensor.expand(*tensor.shape[:leading], n, *tensor.shape[leading + 1 :])
        if self.merged:
            return tensor.reshape(*tensor.shape[:leading], n, -1, *tensor.shape[leading + 1 :])
        return tensor.movedim(leading + self.axis, leading)

    def spans(self, spans: Sequence[int]) -> tuple[int, ...]:
        """Return the parameter's shape among the dimensions after the samples'."""
        if self.axis is None:
            return tuple(spans)
        if self.merged:
            return (1, *spans[1:])
        return (*spans[: self.axis], *spans[self.axis + 1 :])


@dataclass(frozen=True)
class UseInfo:
    """What is the same of a use in every batch: where the samples are in its input and output."""

    rule: str
    weight: str | None
    bias: str | None
    input: SampleAxis
    output: SampleAxis


@dataclass(frozen=True)
class Unit:
    """Parameters that are treated together.

    block: to which they belong. parameters: for an outer product the weight and, if `has_bias`, the bias. treatment:
    "kronecker" (two factors from inputs and output gradients), "moments" (two factors from the second moments of the
    gradient matrix, for a weight whose layer is not known), "dense" (the whole block), "diagonal". uses: numbers of the
    uses, none where the gradient comes from autograd. shape: (g, o, i). one_hot: left sides are token ids.
    """

    block: str
    parameters: tuple[str, ...]
    treatment: Treatment
    uses: tuple[int, ...]
    shape: tuple[int, int, int]
    has_bias: bool = False
    one_hot: bool = False
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of parameters."""
        g, o, i = self.shape
        return g * o * i

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """name → [k, *shape] → [k, g, o, i]."""
        g, o, _ = self.shape
        if self.treatment in ("dense", "diagonal"):
            rows = [tensors[name].flatten(1) for name in self.parameters]
            row = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)  # not copied where it is one
            return row.reshape(-1, 1, 1, row.shape[1])
        weight = tensors[self.parameters[0]]
        k = weight.shape[0]
        weight = weight.transpose(1, 2) if self.transposed else weight
        matrix = weight.reshape(k, g, o, -1)
        if self.has_bias:
            matrix = torch.cat([matrix, tensors[self.parameters[1]].reshape(k, g, o, 1)], dim=3)
        return matrix

    def tensors(self, matrix: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """[k, g, o, i] → name → [k, *shape]."""
        k = matrix.shape[0]
        if self.treatment in ("dense", "diagonal"):
            parts = matrix.reshape(k, -1).split([shapes[name].numel() for name in self.parameters], dim=1)
            return {name: part.reshape(k, *shapes[name]) for name, part in zip(self.parameters, parts, strict=True)}
        name, weight = self.parameters[0], matrix[..., :-1] if self.has_bias else matrix
        if self.transposed:
            tensors = {name: weight.reshape(k, *shapes[name][::-1]).transpose(1, 2)}
        else:
            tensors = {name: weight.reshape(k, *shapes[name])}
        if self.has_bias:
            tensors[self.parameters[1]] = matrix[..., -1].reshape(k, *shapes[self.parameters[1]])
        return tensors


@dataclass(frozen=True)
class Sides:
    """Both sides of the outer products of a unit.

    left: [Vl, n, T, g, o], or token ids [n, T] of a one-hot side; right: [Vr, n, T, g, i]; Vl, Vr: V, or 1 for a side
    that is the same for all vectors. ones: whether the bias's ones are implied, not a part of right: appending them
    would copy it.
    """

    left: Tensor
    right: Tensor
    ones: bool = False

    def with_ones(self) -> "Sides":
        """Return the same sides with the ones in right."""
        if not self.ones:
            return self
        return Sides(self.left, torch.cat([self.right, torch.ones_like(self.right[..., :1])], dim=-1))

    def matrices(self, vector: int, samples: slice) -> Tensor:
        """Σ_t left_t right_tᵀ of some samples for one vector: [m, g, o, i]."""
        left = self.left[min(vector, self.left.shape[0] - 1), samples].permute(0, 2, 3, 1)
        right = self.right[min(vector, self.right.shape[0] - 1), samples].transpose(1, 2)
        product = left @ right
        return torch.cat([product, left.sum(dim=3, keepdim=True)], dim=3) if self.ones else product

    @property
    def n_positions(self) -> int:
        """T."""
        return self.right.shape[2]

    @property
    def n_vectors(self) -> int:
        """V."""
        return self.right.shape[0] if self.left.ndim == 2 else max(self.left.shape[0], self.right.shape[0])


def outer_sides(unit: Unit, uses: Sequence[Use], infos: Sequence[UseInfo], deltas: Sequence[Tensor], n: int) -> Sides:
    """Return the sides of a "kronecker" unit; deltas: for each use, gradients by its output, [V, *output]."""
    lefts, rights = [], []
    for number in unit.uses:
        use, info = uses[number], infos[number]
        static, moving = _static(unit, use, info, n), _moving(unit, use, info, deltas[number], n)
        if unit.one_hot:  # the rows of padding tokens get no gradient
            moving = moving * (static != (use.options or {})["padding"])[None, :, :, None, None]
        lefts.append(static if use.rule == "embedding" else moving)
        rights.append(moving if use.rule == "embedding" else static)
    if len(lefts) == 1:
        return Sides(lefts[0], rights[0], unit.has_bias)
    if unit.one_hot:
        return Sides(torch.cat(lefts, dim=1), torch.cat(rights, dim=2))
    return Sides(_together(lefts), _together(rights), unit.has_bias)


def _together(sides: Sequence[Tensor]) -> Tensor:
    """Join the positions of several uses one after the other; with a vector each where any of them has."""
    n_vectors = max(side.shape[0] for side in sides)
    return torch.cat([side.expand(n_vectors, *side.shape[1:]) for side in sides], dim=2)


def _static(unit: Unit, use: Use, info: UseInfo, n: int) -> Tensor:
    """Return the side that is made of the layer's input: [1, n, T, g, d], or ids [n, T]."""
    assert use.input is not None
    if use.rule == "embedding":
        ids = info.input.front(use.input, n).reshape(n, -1)
        if unit.one_hot:
            return ids
        padding = (use.options or {})["padding"]
        hot: Tensor = F.one_hot(ids, unit.shape[1]).to(use.output.dtype) * (ids != padding).unsqueeze(2)
        return hot[None, :, :, None, :]
    if use.rule == "conv":
        return patches(use.input, use.options or {}, n).unsqueeze(0)
    rows = info.input.front(use.input, n)
    return rows.reshape(1, n, -1, 1, rows.shape[-1])


def _moving(unit: Unit, use: Use, info: UseInfo, delta: Tensor, n: int) -> Tensor:
    """Return the side that is made of the gradients by the layer's output: [V, n, T, g, d]."""
    n_vectors = delta.shape[0]
    if use.rule == "conv":  # [V, n·m, O, *positions]
        groups = unit.shape[0]
        side = delta.reshape(n_vectors, n, -1, groups, delta.shape[2] // groups, delta[0, 0, 0].numel())
        return side.permute(0, 1, 2, 5, 3, 4).flatten(2, 3)
    rows = info.output.front(delta, n, leading=1)
    side = rows.reshape(n_vectors, n, -1, 1, rows.shape[-1])
    if use.rows is not None:
        start, stop = use.rows
        side = F.pad(side, (start, unit.shape[1] - stop))
    return side


def patches(x: Tensor, options: Mapping[str, Any], n: int) -> Tensor:
    """Return what a kernel is multiplied with: x [n·m, C, *size] → [n, m·positions, groups, C/groups·kernel].

    A view of a tensor with the positions last, as a convolution has them. Padding modes other than zeros are applied by
    torch's modules before the convolution, and so are in x.
    """
    kernel = options["kernel"]
    n_dims, groups = len(kernel), options.get("groups", 1)
    stride, dilation = _tuple(options.get("stride", 1), n_dims), _tuple(options.get("dilation", 1), n_dims)
    x = F.pad(x, _padding(options.get("padding", 0), kernel, dilation))
    if n_dims == 1:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    if n_dims <= 2:
        columns = F.unfold(x, kernel, dilation, 0, stride)  # [n·m, C·kernel, positions]
    else:
        for d in range(n_dims):
            x = x.unfold(2 + d, (kernel[d] - 1) * dilation[d] + 1, stride[d])[..., :: dilation[d]]
        taps, spatial = range(2 + n_dims, 2 + 2 * n_dims), range(2, 2 + n_dims)
        columns = x.permute(0, 1, *taps, *spatial).flatten(2 + n_dims).flatten(1, 1 + n_dims)
    columns = columns.unflatten(1, (groups, -1))
    side: Tensor = columns.permute(0, 3, 1, 2)
    return side if side.shape[0] == n else side.reshape(n, -1, *side.shape[2:])


def _tuple(value: Any, n_dims: int) -> tuple[int, ...]:
    return (value,) * n_dims if isinstance(value, int) else tuple(value) * (n_dims if len(value) == 1 else 1)


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """For `F.pad`: the last dimension first, before and behind."""
    if padding == "valid":
        padding = 0
    if padding == "same":  # one more behind where it does not come out even, as torch has it
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        both = [(total // 2, total - total // 2) for total in totals]
    else:
        both = [(p, p) for p in _tuple(padding, len(kernel))]
    return [side for pair in reversed(both) for side in pair]


def pointwise_rows(
    unit: Unit, uses: Sequence[Use], infos: Sequence[UseInfo], deltas: Sequence[Tensor], n: int
) -> Tensor:
    """Gradients [V, n, d] of parameters that are multiplied with or added to activations; deltas as `outer_sides`."""
    rows: dict[str, Tensor] = {}
    for name, number in _terms(unit, uses):
        use, z = uses[number], _gradient_by(name, uses[number], deltas[number])
        row = _reduced(z, _spans(use), infos[number].output, n)
        if name == use.bias and use.bias_rows is not None:  # a part of a packed bias, alone in its unit
            row = F.pad(row, (use.bias_rows[0], unit.shape[2] - use.bias_rows[1]))
        rows[name] = rows[name] + row if name in rows else row
    return torch.cat([rows[name] for name in unit.parameters], dim=2)


def _terms(unit: Unit, uses: Sequence[Use]) -> Iterator[tuple[str, int]]:
    """Yield (name, number of the use) for each use of a parameter of the unit."""
    for number in unit.uses:
        for name in (uses[number].weight, uses[number].bias):
            if name is not None and name in unit.parameters:
                yield name, number


def _gradient_by(name: str, use: Use, delta: Tensor) -> Tensor:
    """Gradients by what the use makes of the parameter, before they are summed: [..., *output]."""
    return delta if name != use.weight or use.input is None else delta * use.input


def _spans(use: Use) -> tuple[int, ...]:
    if use.rule == "pointwise":
        return use.spans
    if use.rule == "conv":
        return (1, use.output.shape[1]) + (1,) * (use.output.ndim - 2)
    return (1,) * (use.output.ndim - 1) + (use.output.shape[-1],)


def _reduced(z: Tensor, spans: Sequence[int], axis: SampleAxis, n: int) -> Tensor:
    """Sum z [V, *output] over what the parameter does not span: [V, n, d]."""
    spans = (1,) * (z.ndim - 1 - len(spans)) + tuple(spans)
    rows, own = axis.front(z, n, leading=1), axis.spans(spans)
    over = [2 + d for d, span in enumerate(own) if span == 1 and rows.shape[2 + d] > 1]
    return (rows.sum(dim=over) if over else rows).reshape(z.shape[0], n, -1)


def position_scores(
    unit: Unit, m: Tensor, uses: Sequence[Use], infos: Sequence[UseInfo], deltas: Sequence[Tensor], n: int
) -> Tensor:
    """⟨M, gradient⟩ of a unit of `pointwise_rows`, by position: M [q, 1, 1, d] → [q, n, T], T 1 without any."""
    sizes = {
        name: math.prod(_spans(uses[number])) if uses[number].bias_rows is None else unit.shape[2]
        for name, number in _terms(unit, uses)
    }
    split = m.flatten(1).split([sizes[name] for name in unit.parameters], dim=1)
    factors = dict(zip(unit.parameters, split, strict=True))
    total: Tensor | None = None
    for name, number in _terms(unit, uses):
        use, axis, z = uses[number], infos[number].output, _gradient_by(name, uses[number], deltas[number][0])
        factor = factors[name] if use.bias_rows is None else factors[name][:, slice(*use.bias_rows)]
        scores = _contracted_by_position(axis.front(z, n), _spans(use), axis, z.ndim, factor)
        total = scores if total is None else total + scores
    assert total is not None
    return total


def _contracted_by_position(z: Tensor, spans: tuple[int, ...], axis: SampleAxis, ndim: int, factor: Tensor) -> Tensor:
    spans = axis.spans((1,) * (ndim - len(spans)) + spans)
    whole = len(spans) < 2 or (spans[0] > 1 and math.prod(spans[1:]) == 1)  # no positions, or channels before them
    if whole:
        z, spans = z.unsqueeze(1), (1, *spans)
    rows = [(one.view(spans) * z).flatten(2).sum(dim=2) for one in factor]
    return torch.stack(rows)
