"""The whole Hessian of a network of linear layers, from derivatives by their outputs instead of its p columns.

With z_l = W_l a_l + b_l, the gradient by W_l is Σ_n δ_l a_lᵀ, and for a layer m that comes no earlier than l

    ∂²L / ∂(W_l)_{oi} ∂θ_m = Σ_n (a_l)_{ni} · ∂(δ_m a_mᵀ)_n / ∂(z_l)_{no}

since a_l does not depend on θ_m. So one forward derivative of all layers' inputs and output gradients for each *output*
of each layer, Σ_l o_l of them instead of p = Σ_l o_l (i_l + 1), and then products of matrices: N·p² flops, a tenth of
what p products with the Hessian cost. Where a model is anything else, its columns are made one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from distinfluence.layers.layout import LayerLayout, Record, layout_of
from distinfluence.layers.recorder import Shifted
from distinfluence.layers.rules import RULES
from distinfluence.layers.units import Unit
from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.reducer import Kernel
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import double_differentiable

DIRECTION_BYTES = 64 * 2**20  # of forward derivatives that are held at once
_CHAINS: WeakKeyDictionary[SampleRisk, tuple[LayerLayout, Sequence[Unit] | None]] = WeakKeyDictionary()
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class DenseHessian:
    """Kernel: Σ_j ∇²ℓ(z_j) of the chunk, [p, p]; [0, 0] where the model is no network of linear layers, used once.

    columns: the Hessian's products, for a chunk whose forward derivatives torch cannot take (a single sample).
    """

    columns: Kernel
    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Sum over some samples at a time."""
        restricted = risk.restrict(self.block)
        if restricted not in _CHAINS:
            layout = layout_of(restricted, batch)
            _CHAINS[restricted] = layout, _chain(restricted, layout, batch)
        layout, units = _CHAINS[restricted]
        if units is None:
            return (torch.zeros(0, 0, dtype=restricted.dtype, device=restricted.device),)
        try:
            return (_in_columns(restricted, units, self._by_outputs(restricted, layout, units, batch)),)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model raises under a transform
            return (self._by_columns(risk, restricted, batch),)

    def _by_outputs(self, restricted: SampleRisk, layout: LayerLayout, units: Sequence[Unit], batch: Batch) -> Tensor:
        total: Tensor | None = None
        n, step = batch_length(batch), max(1, DIRECTION_BYTES // (8 * max(1, layout.sample_bytes)))
        with double_differentiable():
            for start in range(0, n, step):
                total = _of_samples(restricted, layout, units, take(batch, start, min(start + step, n)), total)
        assert total is not None
        return total

    def _by_columns(self, risk: SampleRisk, restricted: SampleRisk, batch: Batch) -> Tensor:
        eye = torch.eye(restricted.size, dtype=restricted.dtype, device=restricted.device)
        return torch.cat([self.columns(risk, batch, rows)[0] for rows in eye.split(256)])


def _chain(risk: SampleRisk, layout: LayerLayout, batch: Batch) -> list[Unit] | None:
    """Return the units in the order of their use, if all are linear layers that are used once, on one position."""
    units = list(layout.units)
    if any(unit.treatment != "kronecker" or len(unit.uses) != 1 or unit.shape[0] != 1 for unit in units):
        return None
    by_use = sorted(units, key=lambda unit: unit.uses[0])
    if [unit.uses[0] for unit in by_use] != list(range(len(layout.infos))):
        return None
    plain = all(info.rule == "linear" and info.output.axis == 0 and not info.output.merged for info in layout.infos)
    if not plain or layout.expanded or layout.cloned:
        return None
    uses = Record(risk, layout, take(batch, 0, 1)).uses
    return by_use if all(use.input is not None and use.input.ndim == 2 for use in uses) else None


def linear_outputs(risk: SampleRisk) -> int:
    """Sum of the widths of the linear layers that the covered parameters belong to; 0 where some belong to others.

    Guesses from the modules alone what `_chain` finds in a forward pass.
    """
    parameters = dict(risk.module.named_parameters())
    covered = [id(parameters[name]) for name in risk.blocks.shapes]
    layers = [module for module in risk.module.modules() if type(module) is torch.nn.Linear]
    owned = [id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)]
    if any(owned.count(parameter) != 1 for parameter in covered):
        return 0
    return sum(layer.out_features for layer in layers if id(layer.weight) in covered)


def _of_samples(
    risk: SampleRisk, layout: LayerLayout, units: Sequence[Unit], batch: Batch, total: Tensor | None
) -> Tensor:
    """Add the samples' sum to the total: units one after the other, with rows [o, i] in each; upper blocks only."""
    n = batch_length(batch)
    watched = {name: risk.parameters[name] for name in layout.recorded}
    shifts = tuple(torch.zeros(n, unit.shape[1], dtype=risk.dtype, device=risk.device) for unit in units)

    def loss(at: Tensors) -> tuple[Tensor, Tensors]:
        recorder = Shifted(RULES, watched, n, at)
        with recorder:
            outputs = risk.outputs(risk.parameters, batch)
        inputs = tuple(use.input for use in recorder.uses if use.input is not None)
        return risk.objective.losses(outputs, batch).sum(), inputs

    def pieces(at: Tensors) -> tuple[Tensors, Tensors]:
        deltas, inputs = grad(loss, has_aux=True)(at)
        return inputs, deltas

    inputs, deltas = pieces(shifts)
    sizes = [unit.size for unit in units]
    starts = [sum(sizes[:number]) for number in range(len(units) + 1)]
    matrix = torch.zeros(starts[-1], starts[-1], dtype=risk.dtype, device=risk.device) if total is None else total
    at_once = max(1, DIRECTION_BYTES // (4 * n * sum(map(_width, units)) * risk.dtype.itemsize))
    for number, unit in enumerate(units):
        side = _with_ones(inputs[number], unit)
        for start in range(0, unit.shape[1], at_once):
            stop = min(start + at_once, unit.shape[1])
            moved = vmap(lambda t: jvp(pieces, (shifts,), (t,))[1])(_directions(shifts, number, start, stop))
            for row in range(start, stop):
                own = [
                    _gradient_tangent(later, inputs[m], deltas[m], moved[0][m][row - start], moved[1][m][row - start])
                    for m, later in enumerate(units[number:], start=number)
                ]
                first = starts[number] + row * unit.shape[2]
                matrix[first : first + unit.shape[2], starts[number] :].addmm_(side.T, torch.cat(own, dim=1))
    return matrix


def _width(unit: Unit) -> int:
    return unit.shape[1] + unit.shape[2]


def _with_ones(side: Tensor, unit: Unit) -> Tensor:
    return torch.cat([side, torch.ones_like(side[:, :1])], dim=1) if unit.has_bias else side


def _directions(shifts: Tensors, number: int, start: int, stop: int) -> Tensors:
    """Return unit vectors along outputs start to stop of one layer, for all samples: [stop − start, n, o] each."""
    found = [shift.new_zeros(stop - start, *shift.shape) for shift in shifts]
    for place, output in enumerate(range(start, stop)):
        found[number][place, :, output] = 1.0
    return tuple(found)


def _gradient_tangent(unit: Unit, a: Tensor, delta: Tensor, a_moved: Tensor, delta_moved: Tensor) -> Tensor:
    """Return the derivative of δ aᵀ of each sample, [n, o·i]."""
    side = _with_ones(a, unit)
    changed = torch.cat([a_moved, torch.zeros_like(a_moved[:, :1])], dim=1) if unit.has_bias else a_moved
    product = delta_moved.unsqueeze(2) * side.unsqueeze(1)
    # not addcmul_: what does not depend on the direction has a tangent that must not be written to
    return torch.addcmul(product, delta.unsqueeze(2), changed.unsqueeze(1)).flatten(1)


def _in_columns(risk: SampleRisk, units: Sequence[Unit], matrix: Tensor) -> Tensor:
    """Both halves, with rows and columns in the order of the risk's parameters."""
    upper = matrix.triu()
    start = 0
    for unit in units:  # the blocks on the diagonal are whole, and symmetric up to rounding
        own = slice(start, start + unit.size)
        upper[own, own] = (matrix[own, own] + matrix[own, own].T) / 2
        upper[own, own].triu_()
        start += unit.size
    whole = upper + upper.triu(1).T
    places = risk.blocks.unflatten(torch.arange(risk.size, device=risk.device).unsqueeze(0))
    order = torch.cat([unit.matrix(places).flatten() for unit in units])
    back = torch.empty_like(order)
    back[order] = torch.arange(risk.size, device=risk.device)
    return whole[back][:, back]
