"""The risk of samples as a pure function of the covered parameters and a batch.

`SampleRisk` binds a module, an objective and parameter blocks. It copies nothing of the user's model but buffers and
never writes to it: parameters are passed in functionally, gradients returned, `.grad`, hooks, mode and random state
stay as found. Everything that differentiates goes through `losses` and `measurements` here.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distinfluence.errors import (
    DistinfluenceError,
    InPlaceError,
    LossError,
    NonDeterministicModelError,
    NotFittedError,
    ShapeError,
)
from distinfluence.model.alternatives import Alternatives
from distinfluence.model.batch import Batch, batch_length, check_batch, leaves, map_batch
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.model.checkpointing import without_checkpointing
from distinfluence.model.checks.dependence import check_differentiable, check_independence, check_unwritten
from distinfluence.model.checks.losses import check_losses, check_returned, parts
from distinfluence.model.checks.raised import of_model, told
from distinfluence.model.data.collate import batch_of
from distinfluence.model.objective import Forward, Objective
from distinfluence.model.padding import HeldPadding
from distinfluence.model.precision import NARROW, as_array, widened_outputs
from distinfluence.model.untouched import (
    check_mode,
    double_differentiable,
    recordable,
    untouched_attributes,
    untouched_randomness,
    version_of,
)

CHECKED_SAMPLES = 16  # of a batch, for the checks that evaluate the model several times
KEPT_ROW_BYTES = 512 * 2**20  # of per-sample gradients that one process keeps between passes

Parameters = Mapping[str, Tensor]


class KeptRows:
    """Per-sample gradients that are needed again in the next pass over the same chunks, up to KEPT_ROW_BYTES."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Batch, Tensor]] = {}
        self._bytes = 0

    def get(self, batch: Batch, make: Callable[[], Tensor]) -> Tensor:
        """Return the rows of this batch, a chunk or a part of one that stays where it is between passes."""
        key = tuple((tensor.data_ptr(), tensor.shape) for _, tensor in leaves(batch))
        if key in self._kept:
            return self._kept[key][1]
        rows = make()
        if self._bytes + rows.nbytes <= KEPT_ROW_BYTES:
            self._bytes += rows.nbytes
            self._kept[key] = batch, rows  # with the batch: its memory must not become another one's
        return rows


class SampleRisk:
    """Losses and measurements of samples as functions of (parameters, batch).

    module: read only. objective: what is evaluated. blocks: the covered parameters. device: where to evaluate; the
    module's own unless given. dtype: float32 or float64 to evaluate in that whatever the module is in; by default in
    its own, and in float32 for bfloat16 and float16: derivatives and sums of theirs have two or three digits.
    Raises ModelModeError for a module in train mode with dropout or batch statistics.
    autocast: bfloat16 or float16 to run the model itself under torch's autocast; parameters, what the loss sees,
    gradients and every sum over samples stay in `dtype`. None: the model runs in `dtype` alone. timed: see
    `Alternatives`.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        blocks: ParameterBlocks,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        timed: bool = False,
    ) -> None:
        check_mode(module)
        self.module = module
        self.objective = objective
        self.blocks = blocks
        first = module.get_parameter(next(iter(blocks.shapes)))
        self.dtype = dtype or (torch.float64 if first.dtype == torch.float64 else torch.float32)
        self.device = device or first.device
        self._asked_dtype = dtype
        self.autocast = autocast
        with torch.inference_mode(False):
            self._take_tensors(module)
        self.ways = Alternatives(self.device, self.in_own_precision, timed)
        self.kept_rows = KeptRows()
        self._recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())
        self._n_classes: int | None = None  # the outputs that class labels count, once one is known
        self._restricted: dict[str, SampleRisk] = {}
        self._in_double: SampleRisk | None = None

    def _take_tensors(self, module: nn.Module) -> None:
        self.written = written_parameters(module)
        self._padding = padding_rows(module)
        self._versions = [(name, p, version_of(p)) for name, p in module.named_parameters()]
        tensors = {name: self.widened(p.detach().to(self.device)) for name, p in module.named_parameters()}
        self.parameters: Parameters = {name: tensors[name] for name in self.blocks.shapes}
        self._constants = {name: tensor for name, tensor in tensors.items() if name not in self.parameters}
        # clones: a module that updates a buffer in `forward` then updates ours
        self._constants |= {
            name: self.widened(b.detach().to(self.device, copy=True)) for name, b in module.named_buffers()
        }

    def widened(self, tensor: Tensor) -> Tensor:
        """Return the tensor in the dtype that the risk is evaluated in, where that has more digits.

        float32 next to a float64 module stays as it is unless float64 was asked for: mixing them is the caller's error.
        """
        narrow = (torch.bfloat16, torch.float16) if self._asked_dtype is None else NARROW
        return tensor.to(self.dtype) if tensor.dtype in narrow else tensor

    def in_double(self) -> "SampleRisk":
        """Return the same risk evaluated in float64; itself if it is."""
        if self.dtype == torch.float64:
            return self
        if self._in_double is None:
            self._in_double = SampleRisk(self.module, self.objective, self.blocks, self.device, torch.float64)
        return self._in_double

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a report should say of how the module is evaluated."""
        kinds = sorted({str(p.dtype).removeprefix("torch.") for n, p, _ in self._versions if n in self.blocks.shapes})
        own = str(self.dtype).removeprefix("torch.")
        if self.autocast is not None:
            passes = str(self.autocast).removeprefix("torch.")
            return (f"the model runs in {passes} under autocast, sums in {own}: scores have about its digits",)
        return () if kinds == [own] else (f"parameters in {' and '.join(kinds)} are evaluated in {own}",)

    @property
    def size(self) -> int:
        """p, the number of covered parameters."""
        return self.blocks.size

    def at(self, parameters: Parameters) -> "SampleRisk":
        """Return the same risk at other parameters, with nothing found out about the model yet."""
        other = copy.copy(self)
        other.parameters = dict(parameters)
        other.ways, other.kept_rows = Alternatives(other.device, other.in_own_precision), KeptRows()
        other._restricted, other._in_double = {}, None
        return other

    def with_objective(self, objective: Objective) -> "SampleRisk":
        """Return the same model with another objective."""
        other = self.at(self.parameters)
        other.objective = objective
        return other

    def restrict(self, block: str | None) -> "SampleRisk":
        """Return the same risk as a function of one block's parameters; itself for None."""
        if block is None:
            return self
        if block not in self._restricted:
            only = self.blocks.only(block)
            self._restricted[block] = SampleRisk(
                self.module, self.objective, only, self.device, self._asked_dtype, self.autocast, self.ways.timed
            )
        return self._restricted[block]

    def only(self, names: tuple[str, ...]) -> "SampleRisk":
        """Return the same risk as a function of some of the covered parameters."""
        key = "\n".join(names)
        if key not in self._restricted:
            self._restricted[key] = self.apart(names, timed=self.ways.timed)
        return self._restricted[key]

    def apart(self, names: tuple[str, ...], dtype: torch.dtype | None = None, timed: bool = False) -> "SampleRisk":
        """As `only`, evaluated in another dtype if given, and not kept."""
        shapes = {name: self.blocks.shapes[name] for name in names}
        left_out = tuple(name for name in self.blocks.shapes if name not in shapes)
        own = ParameterBlocks({"\n".join(names): names}, shapes, self.blocks.n_total, self.blocks.uncovered + left_out)
        asked, autocast = (self._asked_dtype, self.autocast) if dtype is None else (dtype, None)
        return SampleRisk(self.module, self.objective, own, self.device, asked, autocast, timed)

    def to(self, device: torch.device) -> "SampleRisk":
        """Return the same risk evaluated on another device; the user's module stays where it is."""
        if device == self.device:
            return self
        asked, timed = self._asked_dtype, self.ways.timed
        return SampleRisk(self.module, self.objective, self.blocks, device, asked, self.autocast, timed)

    def check_unchanged(self) -> None:
        """Raise NotFittedError if the module's parameters were written to since this risk was made.

        They are shared, not copied: a state that was fitted before an optimizer step does not belong to them any more.
        """
        changed = [name for name, p, version in self._versions if version_of(p) != version]
        if changed:
            raise NotFittedError(
                f"`model` must keep its parameters after `fit`, got changes to {changed[:5]} ({len(changed)} in all). "
                "Call `fit` again."
            )

    def check_buffers(self) -> None:
        """Raise NotFittedError if the module's buffers have other values than when this risk was made."""
        now = {name: self.widened(b.detach().to(self.device)) for name, b in self.module.named_buffers()}
        changed = [name for name, tensor in now.items() if not torch.equal(tensor, self._constants[name])]
        if changed:
            raise NotFittedError(f"`model` must keep its buffers after `fit`, got changes to {changed[:5]}. Fit again.")

    def without_padding(self, rows: Tensor) -> Tensor:
        """rows [k, p] with zeros where a parameter is held fixed by an embedding's `padding_idx`; see `padding`."""
        held = {name: row for name, row in self._padding.items() if name in self.blocks.shapes}
        if not held:
            return rows
        rows = rows.clone()
        views = self.blocks.unflatten(rows)
        for name, row in held.items():
            views[name][..., row, :] = 0
        return rows

    def forward(self, parameters: Parameters) -> Forward:
        """Return the module as a callable, with these parameters.

        It gets copies of its inputs, and of parameters that it is known to write to: a model may work in place, and
        what it is called with is the user's.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = {**self._constants, **parameters}
            tensors |= {name: tensors[name].clone() for name in self.written}
            args, kwargs = _copied(args), _copied(kwargs)
            alone = untouched_attributes(self.module), without_checkpointing()
            with alone[0], alone[1], self._mixed(), self._plain_recurrence():
                outputs = functional_call(self.module, tensors, args, kwargs)
            return outputs if self.autocast is None else widened_outputs(outputs, self.dtype)

        return call

    def _mixed(self) -> AbstractContextManager[None]:
        if self.autocast is None:
            return nullcontext()
        # without its cache of converted weights, which must not outlive a transform that they were made in
        return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)

    @contextmanager
    def _plain_recurrence(self) -> Iterator[None]:
        """Run recurrent layers without cuDNN, which differentiates these in train mode only, and once."""
        if not self._recurrent:
            yield
            return
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = before

    def holding_padding(self) -> AbstractContextManager[object]:
        """For products with second derivatives, and with J: rows that get no gradient are constants."""
        return HeldPadding() if self._padding else nullcontext()

    @contextmanager
    def products(self) -> Iterator[None]:
        """For products of gradients with factors: in mixed precision they take a GPU's matrix units.

        Those round the numbers to 11 bits (TF32) and add in float32; bfloat16, in which the passes run, has 8.
        """
        if self.autocast is None or self.device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        name, wanted = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
        before = getattr(matmul, name)
        setattr(matmul, name, wanted)
        try:
            yield
        finally:
            setattr(matmul, name, before)

    @contextmanager
    def in_own_precision(self) -> Iterator[None]:
        """Have the model run in `dtype` alone: for comparisons that are about more than rounding."""
        autocast, self.autocast = self.autocast, None
        try:
            yield
        finally:
            self.autocast = autocast

    def outputs(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Predictions [n, ...]."""
        return self.objective.outputs(self.forward(parameters), batch)

    def losses(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Training losses [n]."""
        return self.objective.losses(self.outputs(parameters, batch), batch)

    def measurements(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Query measurements [n]."""
        return self.objective.measurements(self.forward(parameters), batch)

    def place(self, batch: object) -> Batch:
        """Put the batch in one form, on the risk's device, checked: shapes, length, NaN and infinity."""
        formed = batch_of(batch, "batch")
        check_batch(formed)
        with torch.inference_mode(False):
            placed = map_batch(lambda tensor: recordable(self.widened(as_array(tensor.to(self.device)))), formed)
        labels = self.objective.class_labels(placed)
        if labels is not None:
            if self._n_classes is None or not labels.are_below(self._n_classes):  # outputs may follow the batch
                self._n_classes = self._counted(placed, labels.axis)
            labels.check(self._n_classes)
        return placed

    def _counted(self, batch: Batch, axis: int) -> int | None:
        """Return how many classes the outputs have; None for a batch that the model cannot take, which `check` says."""
        try:
            shape = self._outputs_of(_own_copy(batch, slice(CHECKED_SAMPLES))).shape
        except DistinfluenceError:
            return None
        return shape[axis] if axis < len(shape) else None

    def check_takes(self, batch: Batch) -> None:
        """Raise ShapeError, DtypeError or ModelError, at once, if the model cannot take a batch."""
        self._outputs_of(_own_copy(batch, slice(CHECKED_SAMPLES)))

    def _outputs_of(self, few: Batch) -> Tensor:
        with untouched_randomness(), double_differentiable(), self.in_own_precision():
            return self._first_outputs(few)

    def check(self, batch: Batch) -> tuple[str, ...]:
        """Evaluate the model on some samples and raise where influence would be meaningless.

        Raises InPlaceError, LossError, ModelError, NonFiniteError, NonDeterministicModelError or ShapeError. Returns
        remarks for the report.
        """
        stride = -(-batch_length(batch) // CHECKED_SAMPLES)  # from all over the batch: data may be sorted by class
        few = _own_copy(batch, slice(None, None, stride))  # the objective may write to it
        before = [tensor._version for _, tensor in leaves(few)]
        with untouched_randomness(), double_differentiable(), self.in_own_precision():
            outputs = self._first_outputs(few)
            forward = self.forward(self.parameters)
            remarks = self.objective.check(outputs, few)
            with told("objective.losses", few):
                losses = check_losses(self.objective.losses(outputs, few), batch_length(few), stride)
            again = self.losses(self.parameters, few)
            if not torch.allclose(losses, again, rtol=float(torch.finfo(losses.dtype).eps) ** 0.5):
                raise NonDeterministicModelError(
                    "`model` gives other losses when called again on the same batch. Call `model.eval()` and take "
                    "random numbers out of `forward`."
                )
            check_independence(self.objective, forward, few, losses)
            with told("objective.measurements", few):
                measured = check_returned(self.measurements(self.parameters, few), "objective.measurements")
            tensors = self.parameters, self._constants
            check_differentiable(self.losses, tensors, few, "loss")
            check_differentiable(self.measurements, tensors, few, "objective.measurements")
            if measured.shape != losses.shape:
                raise ShapeError(
                    f"`objective.measurements` must return one value per sample, [{losses.shape[0]}], got "
                    f"{tuple(measured.shape)}."
                )
        check_unwritten(few, before)
        return self.remarks + remarks

    def _first_outputs(self, batch: Batch) -> Tensor:
        """Compute outputs from copies of all parameters. Raises InPlaceError for writes to any but known ones."""
        copies = {name: tensor.clone() for name, tensor in self.parameters.items()}
        constants = self._constants
        frozen = [name for name, _, _ in self._versions if name in constants]
        self._constants = constants | {name: constants[name].clone() for name in frozen}
        watched = {**copies, **{name: self._constants[name] for name in frozen}}
        try:
            outputs = self._taken(self.forward(copies), batch)
        finally:
            self._constants = constants
        own = {**constants, **self.parameters}
        # by their numbers: writes through `.data` are not counted by torch
        changed = [n for n, t in watched.items() if n not in self.written and not torch.equal(t, own[n])]
        if changed:
            raise InPlaceError(
                f"`model` must leave its parameters as they are when it is called, got writes to {changed[:5]} "
                f"({len(changed)} in all). Work on a copy of them in `forward`."
            )
        return outputs

    def _taken(self, forward: Forward, batch: Batch) -> Tensor:
        try:
            outputs = self.objective.outputs(forward, batch)
        except (DistinfluenceError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise of_model(error, batch, self.dtype) from error
        if not isinstance(outputs, Tensor):
            raise LossError(
                f"`objective.outputs` must return one tensor, got {parts(outputs)}. Take the predictions out of it."
            )
        return outputs


def _own_copy(batch: Batch, some: slice) -> Batch:
    with torch.inference_mode(False):
        return map_batch(lambda tensor: tensor[some].clone(), batch)


def _copied(value: Any) -> Any:
    """Arguments with tensors of their own."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list, dict):
        return {k: _copied(v) for k, v in value.items()} if type(value) is dict else type(value)(map(_copied, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if isinstance(value, MutableMapping):  # transformers' BatchEncoding keeps its type
        other = copy.copy(value)
        for key in value:
            other[key] = _copied(value[key])
        return other
    return value


def written_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a module writes to whenever it is called: embeddings whose norms it keeps small."""
    return tuple(
        name
        for path, child in module.named_modules()
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.max_norm is not None
        for name in ([f"{path}.weight" if path else "weight"])
        if "weight" in child._parameters
    )


def padding_rows(module: nn.Module) -> dict[str, int]:
    """Name of an embedding's weight → the row that never receives a gradient."""
    return {
        f"{path}.weight" if path else "weight": child.padding_idx
        for path, child in module.named_modules()
        if isinstance(child, nn.Embedding) and child.padding_idx is not None
    }
