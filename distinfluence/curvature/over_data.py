"""Curvature operators over a data set: the mean over samples of a kernel's products, one pass for all rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distinfluence.batch import Batch, batch_length, map_batch, take
from distinfluence.curvature.base import CurvatureOperator
from distinfluence.dataplane import Kernel
from distinfluence.errors import NonFiniteError, ParameterBlockError
from distinfluence.gradients import over_rows
from distinfluence.risk import EmpiricalRisk
from distinfluence.sample_risk import SampleRisk, double_differentiable, recordable

Product = Callable[[Tensor], Tensor]


class DataOperator(CurvatureOperator):
    """(1/N) Σ_j of a kernel over the risk's data, for all covered parameters or for one block of them.

    block: a block's name; its diagonal block of the matrix. Without it, the matrix over all covered parameters, also
    across blocks. double: rows and products in float64 whatever the model is in. It is a mean over the data's chunks
    too, the mini-batches of stochastic solvers.
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
    def n_batches(self) -> int:
        """Number of chunks of the data."""
        return len(self.batch_sizes)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples of each chunk."""
        return self.risk.plane.chunk_sizes

    @property
    def in_any_order(self) -> bool:
        """Whether chunks can be had in any order at no extra cost."""
        return self.risk.plane.random_access

    def batch_matmat(self, index: int, rows: Tensor) -> Tensor:
        """rows [k, p] times the mean matrix of one chunk: [k, p]."""
        self._check(rows)
        self.work.batches += 1
        (total,) = self.risk.plane.one(index, self._precise(type(self).kernel(self.block)), rows.detach())
        return self._finite(total).div_(self.batch_sizes[index])

    def in_double(self) -> "DataOperator":
        """The same matrix with rows and products in float64."""
        return type(self)(self.risk, self.block, double=True)

    def _precise(self, kernel: Kernel) -> Kernel:
        """The kernel in the operator's dtype."""
        return InDouble(kernel) if self._double else kernel

    def _product(self, rows: Tensor) -> Tensor:
        (total,) = self.risk.plane.sum(self._precise(type(self).kernel(self.block)), rows)
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
        """The other kernel on what has been widened."""
        wide = risk.in_double()
        return self.kernel(wide, map_batch(wide.widened, batch), *broadcast)


WORKING_BYTES = 32 * 2**20  # of the activations of all rows at once, where there are convolutions, on a CPU
FEWEST = 16  # samples in a piece of a chunk
FEW_ROWS = 8  # fewer rows have a choice of their own; and as many are timed for that of more
AT_ONCE = 16  # rows through one vectorised derivative on a CPU: fewer cost overhead, more leave the cache


def vectorised(product: Product, risk: SampleRisk) -> Product:
    """Apply the product of one row [p] to rows [k, p], AT_ONCE at once or as many as memory allows."""

    return over_rows(risk, product, 0, AT_ONCE)


def pieces_of(risk: SampleRisk, batch: Batch, n_rows: int) -> Iterator[Batch]:
    """A chunk as a product of that many rows takes it: in pieces where a CPU convolves, else whole.

    A convolution with the weights of each row is cheap in the cache alone, by a factor of two; the products of matrices
    of other models lose as much by pieces (tests/benchmarks/passes.py shows both).
    """
    n = batch_length(batch)
    if risk.device.type != "cpu" or n <= FEWEST:
        yield batch
        return
    if "convolved bytes" not in risk.found:
        risk.found["convolved bytes"] = convolved_bytes(risk, batch)
    at_most = max(FEWEST, WORKING_BYTES // max(1, min(n_rows, AT_ONCE) * risk.found["convolved bytes"]))
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
    """The sum of at least one tensor of one shape, into the first."""
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


def product_of_rows(risk: SampleRisk, what: str, ways: Sequence[Product], rows: Tensor) -> Tensor:
    """rows [k, p] through the fastest way that the model can take; the last is the loop of plain autograd."""
    with double_differentiable():
        rows = recordable(rows)
        many = rows.shape[0] >= FEW_ROWS
        return risk.fastest(f"{what}, {'many' if many else 'few'} rows", ways, rows[:1], rows[:FEW_ROWS])(rows)
