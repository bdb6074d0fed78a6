"""Which parameters of a model have Kronecker structure, found out by looking at a forward pass, and checked.

The uses of parameters are recorded for two and for three samples: the dimension that grows is the samples'. Gradients
of single samples that are put together from the recorded inputs and output gradients are then compared with autograd's;
parameters for which they differ (a weight that is also used in a way that is not recorded, a layer whose samples
cannot be told apart) get a treatment that needs no structure. So nothing is dropped, and nothing is assumed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distinfluence.errors import LayoutError
from distinfluence.layers.recorder import Recorder, Use
from distinfluence.layers.rules import RULES
from distinfluence.layers.units import SampleAxis, Treatment, Unit, UseInfo, outer_sides, pointwise_rows
from distinfluence.model.alternatives import agree
from distinfluence.model.batch import Batch, batch_length, map_batch
from distinfluence.model.gradients import loss_gradients
from distinfluence.model.sample_risk import SampleRisk

MOST_DENSE = 1024  # parameters without Kronecker structure up to which a block is kept whole
CPU_BYTES, GPU_BYTES = 32 * 2**20, 2**30  # of activations that are held at once
MOST_ONE_HOT = 4096  # tokens of an embedding that is tied to another layer, whose factor is then kept whole


@dataclass(frozen=True)
class LayerLayout:
    """The units of a model. infos: of every use of a parameter, in the order of the forward pass. expanded, cloned: see
    `Recorder`. sample_bytes: of inputs and outputs of one sample."""

    units: tuple[Unit, ...]
    infos: tuple[UseInfo, ...]
    recorded: tuple[str, ...]
    expanded: tuple[int, ...] = ()
    cloned: bool = False
    sample_bytes: int = 0

    def samples_at_once(self, device: torch.device, copies: int = 1, beside: int = 0) -> int:
        """How many samples to take at once: so many that their activations stay near the cache.

        copies: of what a sample's activations take. beside: further bytes of a sample. Larger pieces are slower on a
        CPU: each tensor is then new memory, whose pages cost more than the arithmetic on them.
        """
        most = CPU_BYTES if device.type == "cpu" else GPU_BYTES
        return max(1, most // max(1, copies * self.sample_bytes + beside))

    def to_tensor(self) -> Tensor:
        """As JSON bytes, to travel among tensors."""
        return torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8).clone()

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "LayerLayout":
        """Return the layout again."""
        raw: dict[str, Any] = json.loads(bytes(tensor.cpu().tolist()).decode())
        units = tuple(Unit(**_with_tuples(unit)) for unit in raw["units"])
        infos = tuple(
            UseInfo(**{**info, "input": SampleAxis(**info["input"]), "output": SampleAxis(**info["output"])})
            for info in raw["infos"]
        )
        rest = {key: value for key, value in raw.items() if key not in ("units", "infos")}
        return cls(units, infos, **_with_tuples(rest))

    def by_block(self) -> dict[str, list[Unit]]:
        """Block → its units."""
        found: dict[str, list[Unit]] = {}
        for unit in self.units:
            found.setdefault(unit.block, []).append(unit)
        return found


def _widened(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return an activation in the risk's dtype, as gradients are; token ids as they are."""
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


class Record:
    """One forward pass with the uses of parameters. outputs, losses [n]: in the graph. values: see `deltas`."""

    def __init__(self, risk: SampleRisk, layout: LayerLayout, batch: Batch) -> None:
        self.n = batch_length(batch)
        self.layout, self._dtype = layout, risk.dtype
        uses, self.outputs, self.losses, _ = _forward(risk, batch, layout.recorded, layout.expanded, layout.cloned)
        self.uses = [replace(use, input=_widened(use.input, risk.dtype)) for use in uses]
        met = [(use.rule, use.weight, use.bias) for use in self.uses]
        if met != [(info.rule, info.weight, info.bias) for info in layout.infos]:
            raise LayoutError(
                "`model` does not use its layers in the same way for every batch: what it does seems to depend on the "
                "data. Pass recognise=False, which treats every parameter by the second moments of its gradients."
            )

    def of_losses(self, *, keep: bool = False) -> list[Tensor]:
        """Gradient of each sample's loss by the output of each use: [1, *output]."""
        with torch.inference_mode(False), torch.enable_grad():  # the sum is a part of the graph
            return self._gradients(self.losses.sum(), None, keep)

    def deltas(self, vectors: Tensor) -> list[Tensor]:
        """vectors [V, n, *outputs] → their products with the Jacobian by the output of each use: [V, *output]."""
        found = [self._gradients(self.outputs, v, keep=True) for v in vectors]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def reached(self) -> tuple[str, ...]:
        """Find recorded parameters for which the backward pass from the losses to all outputs of their uses works."""
        lost: set[str] = set()
        with torch.inference_mode(False), torch.enable_grad():
            total = self.losses.sum()
            for use in self.uses:
                try:
                    torch.autograd.grad(total, use.output, retain_graph=True, allow_unused=True)
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # whatever a model raises in its backward pass
                    lost.update(_names(use))
        return tuple(name for name in self.layout.recorded if name not in lost)

    def _gradients(self, value: Tensor, vector: Tensor | None, keep: bool) -> list[Tensor]:
        outputs = [use.output for use in self.uses]
        if not outputs or not value.requires_grad:
            return [torch.zeros_like(output, dtype=self._dtype).detach().unsqueeze(0) for output in outputs]
        parts = torch.autograd.grad(
            value, outputs, vector, retain_graph=keep, allow_unused=True, materialize_grads=True
        )
        # autocast makes them narrower, a loss against float64 targets wider
        return [part.detach().unsqueeze(0).to(self._dtype) for part in parts]


def _forward(
    risk: SampleRisk, batch: Batch, names: Iterable[str], expanded: Sequence[int], cloned: bool
) -> tuple[list[Use], Tensor, Tensor, bool]:
    watched = {name: risk.parameters[name] for name in names}
    recorder = Recorder(RULES, watched, batch_length(batch), expanded, cloned)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with recorder:
                outputs = risk.outputs(risk.parameters, batch)
            losses = risk.objective.losses(outputs, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return recorder.uses, outputs, losses, recorder.changed_in_place


def layout_of(risk: SampleRisk, batch: Batch, most_dense: int = MOST_DENSE, recognise: bool = True) -> LayerLayout:
    """Find the layout of a model from a batch of at least one sample. recognise: False to look for no layers.

    In mixed precision, too, layers are recognised by gradients in the risk's own, which rounding does not tell apart.
    """
    with risk.in_own_precision():
        return _layout_of(risk, batch, most_dense, recognise)


def _layout_of(risk: SampleRisk, batch: Batch, most_dense: int, recognise: bool) -> LayerLayout:
    if not recognise:
        return LayerLayout(_in_order(risk, _rest(risk, set(), most_dense)), (), ())
    few = {n: _samples(batch, n) for n in (2, 3)}
    layout = _recorded_layout(risk, few, tuple(risk.parameters), most_dense)
    covered = {name for unit in layout.units for name in unit.parameters}
    used = sorted({number for unit in layout.units for number in unit.uses})
    if not used:
        layout = replace(layout, recorded=(), infos=(), expanded=(), cloned=False)
    return replace(layout, units=_in_order(risk, [*layout.units, *_rest(risk, covered, most_dense)]))


def _recorded_layout(
    risk: SampleRisk, few: Mapping[int, Batch], names: tuple[str, ...], most_dense: int, again: bool = True
) -> LayerLayout:
    """Return the layout of what can be recorded of these parameters, with confirmed units only.

    Where the backward pass to some outputs fails, the others are recorded alone: a custom operator may refuse it, or a
    hook of the model. again: whether this may still be tried.
    """
    watched, expanded, cloned, infos, sample_bytes = _resolved(risk, few, names)
    if not infos:
        return LayerLayout((), (), ())
    layout = LayerLayout((), infos, watched, expanded, cloned, sample_bytes)
    units = [
        replace(unit, treatment="dense" if unit.size <= most_dense else "diagonal")
        if unit.treatment in ("dense", "diagonal")
        else unit
        for unit in _recorded_units(risk, infos, _forward(risk, few[3], watched, expanded, cloned)[0])
    ]
    if not units:
        return layout
    layout = replace(layout, units=tuple(units))
    record = Record(risk, layout, few[3])
    try:
        deltas = record.of_losses()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises in its backward pass
        reached = Record(risk, layout, few[3]).reached() if again else ()
        return _recorded_layout(risk, few, reached, most_dense, again=False) if reached else LayerLayout((), (), ())
    return replace(layout, units=tuple(_confirmed(risk, record, deltas, few[3])))


def _samples(batch: Batch, n: int) -> Batch:
    """n samples of the batch, again from the start where it has fewer."""
    length = batch_length(batch)
    return map_batch(lambda tensor: tensor[torch.arange(n, device=tensor.device) % length], batch)


def _resolved(
    risk: SampleRisk, few: Mapping[int, Batch], names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[int, ...], bool, tuple[UseInfo, ...], int]:
    """Return what can be recorded of these parameters, with the samples' place in each input and output."""
    watched, cloned = names, False
    expanded: tuple[int, ...] = ()
    for _ in range(len(watched) + 4):
        try:
            first, second = (_forward(risk, few[n], watched, expanded, cloned) for n in (2, 3))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model raises: changes in place of what we made a leaf, shapes that we expanded
            if not cloned:
                cloned = True
                continue
            if expanded:
                watched, expanded = (), ()
                continue
            return (), (), False, (), 0
        if (first[3] or second[3]) and not cloned:
            cloned = True
            continue
        infos = _infos(first[0], second[0])
        if infos is None:
            return (), (), False, (), 0
        lost = {name for use, info in zip(second[0], infos, strict=True) if info is None for name in _names(use)}
        if lost:
            watched, expanded = tuple(name for name in watched if name not in lost), ()
            continue
        found = [info for info in infos if info is not None]
        without = tuple(i for i, info in enumerate(found) if info.output.axis is None)
        if without:
            if expanded:
                return (), (), False, (), 0
            expanded = without
            continue
        sample_bytes = sum(map(_bytes, second[0]))
        return watched, expanded, cloned, tuple(found), sample_bytes // 3
    return (), (), False, (), 0


def _bytes(use: Use) -> int:
    """Of an input, an output and its gradient; of a convolution's patches, too."""
    own = (use.input.nbytes if use.input is not None else 0) + 2 * use.output.nbytes
    if use.rule == "conv" and use.input is not None and use.options is not None:
        channels = use.input.shape[1] * math.prod(use.options["kernel"])
        own += 2 * use.output.nbytes // use.output.shape[1] * channels
    return own


def _names(use: Use) -> tuple[str, ...]:
    return tuple(name for name in (use.weight, use.bias) if name is not None)


def _infos(first: Sequence[Use], second: Sequence[Use]) -> list[UseInfo | None] | None:
    """For each use where its samples are, None where they cannot be told; None if the two passes differ."""
    if [(use.rule, use.weight, use.bias) for use in first] != [(use.rule, use.weight, use.bias) for use in second]:
        return None
    found: list[UseInfo | None] = []
    for a, b in zip(first, second, strict=True):
        output = _axis(a.output.shape, b.output.shape)
        static = SampleAxis(None)
        if a.input is not None and b.input is not None:
            own = _axis(a.input.shape, b.input.shape)
            output, static = (None, static) if own is None else (output, own)
        merged_conv = a.rule == "conv" and output is not None and output.axis != 0
        found.append(None if output is None or merged_conv else UseInfo(a.rule, a.weight, a.bias, static, output))
    return found


def _axis(two: torch.Size, three: torch.Size) -> SampleAxis | None:
    """Where a tensor of two samples and one of three differ; None if not in the way of samples."""
    if len(two) != len(three):
        return None
    grown = [d for d in range(len(two)) if two[d] != three[d]]
    if not grown:
        return SampleAxis(None)
    d = grown[0]
    if len(grown) > 1 or two[d] * 3 != three[d] * 2:
        return None
    if two[d] == 2:
        return SampleAxis(d)
    return SampleAxis(0, merged=True) if d == 0 else None


def _recorded_units(risk: SampleRisk, infos: Sequence[UseInfo], uses: Sequence[Use]) -> list[Unit]:
    """Units of all parameters that were met, before they are confirmed."""
    by_name: dict[str, list[int]] = {}
    for number, use in enumerate(uses):
        for name in _names(use):
            by_name.setdefault(name, []).append(number)
    block_of = {name: block for block, names in risk.blocks.names.items() for name in names}
    units: list[Unit] = []
    taken: set[str] = set()
    for name, numbers in by_name.items():
        own = [uses[i] for i in numbers]
        if any(use.weight != name or use.rule == "pointwise" for use in own):
            continue
        unit = _outer_unit(risk, block_of, by_name, name, numbers, own)
        if unit is not None:
            units.append(unit)
            taken.update(unit.parameters)
    by_block: dict[str, list[str]] = {}
    for name in by_name:
        outer = any(use.weight == name and use.rule != "pointwise" for use in (uses[i] for i in by_name[name]))
        if name not in taken and not outer:
            by_block.setdefault(block_of[name], []).append(name)
    for block, names in by_block.items():
        numbers = sorted({i for name in names for i in by_name[name]})
        size = sum(risk.blocks.shapes[name].numel() for name in names)
        units.append(Unit(block, tuple(names), "dense", tuple(numbers), (1, 1, size)))
    return units


def _outer_unit(
    risk: SampleRisk,
    block_of: Mapping[str, str],
    by_name: Mapping[str, list[int]],
    name: str,
    numbers: list[int],
    own: Sequence[Use],
) -> Unit | None:
    shape, rules = risk.blocks.shapes[name], {use.rule for use in own}
    if len({use.transposed for use in own}) > 1 or ("conv" in rules and len(rules) > 1):
        return None
    one_hot = rules == {"embedding"}
    if "embedding" in rules and not one_hot and (shape[0] > MOST_ONE_HOT or own[0].transposed):
        return None
    biases = {use.bias for use in own}
    bias = next(iter(biases)) if len(biases) == 1 else None
    has_bias = bias is not None and by_name[bias] == numbers and block_of[bias] == block_of[name]
    groups = int((own[0].options or {}).get("groups", 1)) if rules == {"conv"} else 1
    rows, columns = shape[0], shape[1:].numel()
    if own[0].transposed:
        rows, columns = columns, rows
    return Unit(
        block_of[name],
        (name, bias) if has_bias and bias is not None else (name,),
        "kronecker",
        tuple(numbers),
        (groups, rows // groups, columns + int(has_bias)),
        has_bias=has_bias,
        one_hot=one_hot,
        transposed=own[0].transposed,
    )


def unit_rows(record: Record, unit: Unit, deltas: Sequence[Tensor]) -> Tensor:
    """Gradients of single samples by a recorded unit's parameters, [V, n, g, o, i]."""
    infos = record.layout.infos
    if unit.treatment != "kronecker":
        rows = pointwise_rows(unit, record.uses, infos, deltas, record.n)
        return rows.reshape(*rows.shape[:2], 1, 1, -1)
    sides = outer_sides(unit, record.uses, infos, deltas, record.n)
    if not unit.one_hot:
        return torch.stack([sides.matrices(v, slice(None)) for v in range(sides.n_vectors)])
    n_vectors, n, length, _, width = sides.right.shape
    rows = sides.right.new_zeros(n_vectors, n * unit.shape[1], width)
    index = (torch.arange(n, device=sides.left.device).unsqueeze(1) * unit.shape[1] + sides.left).flatten()
    rows.index_add_(1, index, sides.right.reshape(n_vectors, n * length, width))
    return rows.reshape(n_vectors, n, 1, unit.shape[1], width)


def _confirmed(risk: SampleRisk, record: Record, deltas: Sequence[Tensor], few: Batch) -> list[Unit]:
    """Return the units whose gradients are autograd's. deltas: the losses' gradients by the outputs."""
    expected = risk.blocks.unflatten(loss_gradients(risk, few).rows)

    def right(unit: Unit) -> bool:
        try:
            found = unit.tensors(unit_rows(record, unit, deltas)[0], risk.blocks.shapes)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError):  # shapes that do not go together
            return False
        return all(found[name].shape == expected[name].shape and agree(found[name], expected[name]) for name in found)

    kept: list[Unit] = []
    for unit in record.layout.units:
        if right(unit):
            kept.append(unit)
        elif unit.has_bias:  # the bias may be what it seems to be all the same
            bias = unit.parameters[1]
            alone = Unit(unit.block, (bias,), "dense", unit.uses, (1, 1, risk.blocks.shapes[bias].numel()))
            kept += [alone] if right(alone) else []
    return kept


def _rest(risk: SampleRisk, covered: set[str], most_dense: int) -> list[Unit]:
    """Units for what has not been recorded."""
    units: list[Unit] = []
    for block, names in risk.blocks.names.items():
        left = [name for name in names if name not in covered]
        sizes = [risk.blocks.shapes[name].numel() for name in left]
        if not left:
            continue
        if sum(sizes) <= most_dense:
            units.append(Unit(block, tuple(left), "dense", (), (1, 1, sum(sizes))))
            continue
        for name, size in zip(left, sizes, strict=True):
            units.append(_alone(block, name, risk.blocks.shapes[name], size, most_dense))
    return units


def _alone(block: str, name: str, shape: torch.Size, size: int, most_dense: int) -> Unit:
    treatment: Treatment = "dense" if size <= most_dense else "diagonal"
    if treatment == "diagonal" and len(shape) > 1 and max(shape[0], shape[1:].numel()) < size:
        return Unit(block, (name,), "moments", (), (1, shape[0], shape[1:].numel()))
    return Unit(block, (name,), treatment, (), (1, 1, size))


def _in_order(risk: SampleRisk, units: Sequence[Unit]) -> tuple[Unit, ...]:
    place = {name: i for i, name in enumerate(risk.blocks.shapes)}
    return tuple(sorted(units, key=lambda unit: min(place[name] for name in unit.parameters)))
