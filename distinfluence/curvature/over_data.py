"""Curvature operators over a data set: the mean over samples of a kernel's products, one pass for all rows."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.errors import NonFiniteError, ParameterBlockError, UnsupportedOperatorError
from distinfluence.model.alternatives import attempt
from distinfluence.model.batch import Batch, batch_length, map_batch, take
from distinfluence.model.gradients import differentiable, over_rows
from distinfluence.model.reducer import Kernel
from distinfluence.model.risk import EmpiricalRisk
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import double_differentiable, recordable

Product = Callable[[Tensor], Tensor]


class DataOperator(CurvatureOperator):
    """(1/N) Σ_j of a kernel over the risk's data, for all covered parameters or for one block of them.

    The operator is also a mean over the data's chunks, which are the mini-batches of stochastic solvers.

    Args:
        risk: The empirical risk.
        block: Name of a parameter block, whose diagonal block of the matrix is taken. None for the matrix over all
            covered parameters, which has entries across blocks, too.
        double: Whether rows and products are in float64, whatever the model is in.

    Raises:
        ParameterBlockError: If `block` is not a block of the risk.
    """

    kernel: ClassVar[Callable[[str | None], Kernel]]

    def __init__(self, risk: EmpiricalRisk, block: str | None = None, *, double: bool = False) -> None:
        if block is not None and block not in risk.blocks.names:
            raise ParameterBlockError(f"`block` must be one of {list(risk.blocks.names)}, got {block!r}.")
        self.risk = risk
        self.block = block
        sample = risk.sample.restrict(block)
        self._double = double
        super().__init__(sample.size, torch.float64 if double else sample.dtype, sample.device)

    @property
    @override
    def product_flops(self) -> float:
        # a forward derivative and a reverse one of each sample, about six times the flops of its outputs
        return 6.0 * max(2.0 * self.size, self.risk.reducer.sample_flops) * self.risk.n_samples

    @property
    def n_batches(self) -> int:
        """Number of chunks of the data."""
        return len(self.batch_sizes)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples of each chunk."""
        return self.risk.reducer.chunk_sizes

    @property
    def in_any_order(self) -> bool:
        """Whether chunks are available in any order at no extra cost."""
        return self.risk.reducer.random_access

    def batch_matmat(self, index: int, rows: Tensor) -> Tensor:
        """Multiply rows with the mean matrix of one chunk. The product counts in `work.batches`, not as a pass.

        Args:
            index: Index of the chunk, 0 to `n_batches` − 1.
            rows: Vectors, [k, p], in the operator's dtype.

        Returns:
            The products, [k, p].

        Raises:
            ShapeError: If `rows` is not [k, p].
            DtypeError: If the dtype of `rows` is not the operator's.
            NonFiniteError: If the products have NaN or infinity.
        """
        self._check(rows)
        self.work.batches += 1
        (total,) = self.risk.reducer.one(index, self._precise(type(self).kernel(self.block)), rows.detach())
        return self._finite(total).div_(self.batch_sizes[index])

    def in_double(self) -> "DataOperator":
        """Return the same matrix with rows and products in float64.

        Returns:
            The operator in float64.
        """
        return type(self)(self.risk, self.block, double=True)

    def _precise(self, kernel: Kernel) -> Kernel:
        """Return the kernel in the operator's dtype."""
        return InDouble(kernel) if self._double else kernel

    def _product(self, rows: Tensor) -> Tensor:
        (total,) = self.risk.reducer.sum(self._precise(type(self).kernel(self.block)), rows)
        return self._finite(total).div_(self.risk.n_samples)

    def _finite(self, total: Tensor) -> Tensor:
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"`{type(self).__name__}` met NaN or infinity in the second derivative of the loss. Look for square "
                "roots and logarithms at zero, or use another second-order mode."
            )
        return total


@dataclass(frozen=True)
class InDouble:
    """Kernel: another one with the model, the chunk and the broadcast rows in float64."""

    kernel: Kernel

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Call the other kernel in float64."""
        wide = risk.in_double()
        return self.kernel(wide, map_batch(wide.widened, batch), *broadcast)


WORKING_BYTES = 32 * 2**20  # of the activations of all rows at once, where there are convolutions, on a CPU
FEWEST = 16  # samples in a piece of a chunk
FEW_ROWS = 8  # fewer rows have a choice of their own; and as many are timed for that of more
AT_ONCE = 16  # rows through one vectorised derivative on a CPU: fewer cost overhead, more leave the cache

CONVOLVED_BYTES: WeakKeyDictionary[SampleRisk, int] = WeakKeyDictionary()  # of a sample's activations, see `pieces_of`
_FAILED: WeakKeyDictionary[SampleRisk, set[str]] = WeakKeyDictionary()  # products that failed for one row already
_ONCE_DIFFERENTIABLE: WeakKeyDictionary[SampleRisk, list[str]] = WeakKeyDictionary()  # names of operators


def vectorised(product: Product, risk: SampleRisk) -> Product:
    """Apply the product of one row [p] to rows [k, p], AT_ONCE at once or as many as memory allows."""

    return over_rows(risk, product, 0, AT_ONCE)


def pieces_of(risk: SampleRisk, batch: Batch, n_rows: int) -> Iterator[Batch]:
    """Yield a chunk as a product of that many rows takes it: in pieces where a CPU convolves, else whole.

    A convolution with the weights of each row is cheap in the cache alone, by a factor of two; the products of matrices
    of other models lose as much by pieces (tests/benchmarks/passes.py shows both).
    """
    n = batch_length(batch)
    if risk.device.type != "cpu" or n <= FEWEST:
        yield batch
        return
    if risk not in CONVOLVED_BYTES:
        CONVOLVED_BYTES[risk] = convolved_bytes(risk, batch)
    at_most = max(FEWEST, WORKING_BYTES // max(1, min(n_rows, AT_ONCE) * CONVOLVED_BYTES[risk]))
    n_pieces = -(-n // at_most)
    for k in range(n_pieces):  # of nearly equal size
        yield take(batch, k * n // n_pieces, (k + 1) * n // n_pieces)


def convolved_bytes(risk: SampleRisk, batch: Batch) -> int:
    """Bytes that one more sample adds to what the operators of a forward pass with convolutions return, without views.

    0 where there is no convolution, or the model cannot be watched.
    """
    found: list[int] = []
    for n in (1, 2):
        try:
            with _Returned() as returned, torch.no_grad():
                risk.outputs(risk.parameters, take(batch, 0, n))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model does that cannot be watched
            return 0
        found.append(returned.nbytes if returned.convolved else 0)
    return max(0, found[1] - found[0])


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """Sum at least one tensor of one shape into the first."""
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total


class _Returned(TorchDispatchMode):
    """Adds up the bytes of new tensors that operators return, and sees convolutions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes, self.convolved = 0, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.convolved |= func is torch.ops.aten.convolution.default
        given = {tensor.untyped_storage().data_ptr() for tensor in args if _is_strided(tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if _is_strided(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes += tensor.nbytes
        return result


def _is_strided(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


@dataclass(frozen=True)
class Mode:
    """A matrix of second derivatives, for `product_of_rows`.

    name: the second-order mode. what: its products in words. last: a way that is taken where all others fail. others:
    names and kernels of other modes, of which those that work are named in an error.
    """

    name: str
    what: str
    others: Mapping[str, Kernel]
    last: Product | None = None


def product_of_rows(risk: SampleRisk, mode: Mode, ways: Sequence[Product], batch: Batch, rows: Tensor) -> Tensor:
    """rows [k, p] through the fastest way that the model can take; the last is the loop of plain autograd.

    Raises UnsupportedOperatorError, with the operator's name, where torch cannot differentiate often enough.
    """

    def usual(rows: Tensor) -> Tensor:
        if once_differentiable(risk, batch):
            raise RuntimeError(ONCE)
        what = f"{mode.what}, {'many' if rows.shape[0] >= FEW_ROWS else 'few'} rows"
        try:
            way = risk.ways.fastest(what, ways, rows[:1], rows[:FEW_ROWS])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # for one row already: not tried again
            _FAILED.setdefault(risk, set()).add(mode.what)
            raise
        return way(rows)

    with double_differentiable(), risk.holding_padding():
        rows = recordable(rows)
        product, failure = (None, None) if mode.last and mode.what in _FAILED.get(risk, ()) else attempt(usual, rows)
        if product is not None and (mode.last is None or torch.isfinite(product).all()):
            return product
        instead, reason = (None, failure) if mode.last is None else attempt(mode.last, rows)
        if instead is not None and (product is None or torch.isfinite(instead).all()):
            return instead
        if product is not None:
            return product
        failure = failure or attempt(usual, rows[:1])[1] or reason
        assert failure is not None
        raise _refusal(risk, mode, batch, rows, failure, reason) from failure


def _refusal(
    risk: SampleRisk, mode: Mode, batch: Batch, rows: Tensor, failure: Exception, reason: Exception | None
) -> Exception:
    """Return the error to raise where the usual ways failed for `failure` and the last one for `reason`."""
    beside = f" {reason}" if isinstance(reason, UnsupportedOperatorError) else ""
    missing = (None if reason is None else missing_derivative(reason, risk, batch)) or missing_derivative(
        failure, risk, batch
    )
    if missing is None:
        return failure
    working = [repr(name) for name, kernel in mode.others.items() if _works(kernel, risk, take(batch, 0, 1), rows[:1])]
    advice = f"Take second_order_mode={' or '.join(working)} instead." if working else "No other mode works either."
    return UnsupportedOperatorError(
        f"`second_order_mode={mode.name!r}` needs derivatives that PyTorch does not have: {missing}.{beside} {advice}"
    )


def _works(kernel: Kernel, risk: SampleRisk, sample: Batch, row: Tensor) -> bool:
    return attempt(lambda rows: kernel(risk, sample, rows)[0], row)[1] is None


_MISSING = (
    re.compile(r"derivative for '?(?:aten::)?([\w.]+?)'? is not implemented"),
    re.compile(r"forward AD with '?(?:aten::)?([\w.]+?)'? that does not support it"),
    re.compile(r"[`']?(?:aten::)?([\w.]+)[`']? does not support (?:double|second|higher)"),
)


def missing_derivative(error: Exception, risk: SampleRisk, batch: Batch) -> str | None:
    """Which derivative torch misses, in words, by its error; None for an error that says something else."""
    text = str(error)
    if "@once_differentiable" in text:
        names = once_differentiable(risk, batch)
        of = " or ".join(f"`{name}`" for name in names) or "a custom operator"
        return f"the second derivative of {of}, whose backward is marked with @once_differentiable"
    for pattern in _MISSING:
        found = pattern.search(text)
        if found:
            name = found[1]
            if name.endswith("_backward"):
                return f"the second derivative of `{name.removesuffix('_backward').strip('_')}` (that of `{name}`)"
            return f"the derivative of `{name}`"
    return None


ONCE = "the graph has an operator whose backward is marked with @once_differentiable"


def once_differentiable(risk: SampleRisk, batch: Batch) -> list[str]:
    """Name custom operators between parameters and losses whose backward torch's `once_differentiable` wraps.

    Autograd seldom raises for them: it cuts the graph there, and second derivatives are wrong.
    """
    if risk not in _ONCE_DIFFERENTIABLE:
        with differentiable(risk) as parameters:
            _ONCE_DIFFERENTIABLE[risk] = once_differentiable_in(risk.losses(parameters, batch).sum())
    return _ONCE_DIFFERENTIABLE[risk]


def once_differentiable_in(value: Tensor) -> list[str]:
    """Names of such operators in the graph of a tensor."""
    names = set[str]()
    for node in nodes_of(value):
        operator = getattr(type(node), "_forward_cls", None)
        code = getattr(getattr(operator, "backward", None), "__code__", None)
        if operator is not None and code in _WRAPPERS:
            names.add(operator.__name__)
    return sorted(names)


def nodes_of(value: Tensor) -> Iterator[Any]:
    """Every node of the graph of a tensor, once."""
    front: list[Any] = [value.grad_fn]
    seen = set[Any]()
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        front += [following for following, _ in node.next_functions]


_WRAPPERS = (torch.autograd.function.once_differentiable(lambda ctx: None).__code__,)
