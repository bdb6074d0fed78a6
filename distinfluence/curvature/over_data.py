"""Curvature operators over a data set: the mean over samples of a kernel's products, one pass for all rows."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.dataplane import Kernel
from distinfluence.errors import NonFiniteError, ParameterBlockError
from distinfluence.gradients import rows_at_once
from distinfluence.risk import EmpiricalRisk
from distinfluence.sample_risk import SampleRisk, double_differentiable, recordable

Product = Callable[[Tensor], Tensor]


class DataOperator(CurvatureOperator):
    """(1/N) Σ_j of a kernel over the risk's data, for all covered parameters or for one block of them.

    block: a block's name; its diagonal block of the matrix. Without it, the matrix over all covered parameters, also
    across blocks.
    """

    kernel: ClassVar[Callable[[str | None], Kernel]]

    def __init__(self, risk: EmpiricalRisk, block: str | None = None) -> None:
        if block is not None and block not in risk.blocks.names:
            raise ParameterBlockError(f"`block` must be one of {list(risk.blocks.names)}, got {block!r}.")
        self.risk = risk
        self.block = block
        sample = risk.sample.restrict(block)
        super().__init__(sample.size, sample.dtype, sample.device)

    def _product(self, rows: Tensor) -> Tensor:
        (total,) = self.risk.plane.sum(type(self).kernel(self.block), rows)
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"`{type(self).__name__}` met NaN or infinity in the second derivative of the loss. Look for square "
                "roots and logarithms at zero, or use another second-order mode."
            )
        return total.div_(self.risk.n_samples)


def vectorised(product: Product, risk: SampleRisk) -> Product:
    """Apply the product of one row [p] to rows [k, p] at once, as many as memory allows."""

    def rows_product(rows: Tensor) -> Tensor:
        result: Tensor = vmap(product, chunk_size=rows_at_once(risk))(rows)
        return result

    return rows_product


def product_of_rows(risk: SampleRisk, what: str, ways: tuple[Product, Product], rows: Tensor) -> Tensor:
    """rows [k, p] through the first way that the model can take; the last is the loop of plain autograd."""
    with double_differentiable():
        rows = recordable(rows)
        return risk.choose(what, ways, rows[:1])(rows)
