"""The Hessian of the mean training loss, (1/N) Σ_j ∇²θ ℓ(z_j, θ).

A product with k rows is k forward derivatives of the gradient (Pearlmutter 1994, "Fast exact multiplication by the
Hessian"), vectorised over the rows: about 1.5 gradients' work a row, one pass over the data. Symmetric, indefinite in
general; kinks (ReLU) count as flat.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, jvp
from typing_extensions import override

from distinfluence.curvature.base import PlannedWork
from distinfluence.curvature.dense_hessian import DenseHessian, linear_outputs
from distinfluence.curvature.empirical_fisher import EmpiricalFisherProduct
from distinfluence.curvature.ggn import GGNOperator, GGNProduct
from distinfluence.curvature.over_data import (
    DataOperator,
    Mode,
    Product,
    pieces_of,
    product_of_rows,
    sum_of,
    vectorised,
)
from distinfluence.model.alternatives import agree
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import differentiable, flat_grad
from distinfluence.model.sample_risk import Parameters, SampleRisk


@dataclass(frozen=True)
class HessianProduct:
    """Kernel: rows [k, p] → rows · Σ_j ∇²ℓ(z_j) over the chunk's samples."""

    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Forward over reverse, or reverse over reverse, for several rows at once or in a loop; what is fastest."""
        (rows,) = broadcast
        restricted = risk.restrict(self.block)
        mode = Mode("hessian", "Hessian products", {"ggn": GGNProduct(), "empirical_fisher": EmpiricalFisherProduct()})

        def of_piece(piece: Batch) -> Tensor:
            ways = (
                vectorised(forward_over_reverse(restricted, piece), restricted),
                reverse_twice_together(restricted, piece),
                reverse_twice(restricted, piece),
            )
            return product_of_rows(restricted, mode, ways, piece, rows)

        return (sum_of(map(of_piece, pieces_of(restricted, batch, len(rows)))),)


class HessianOperator(DataOperator):
    """The Hessian of the empirical risk as a linear operator.

    Args:
        risk: The empirical risk.
        block: Name of a parameter block, whose diagonal block of the matrix is taken. None for all covered parameters.
        double: Whether rows and products are in float64, whatever the model is in.

    Raises:
        ParameterBlockError: If `block` is not a block of the risk.

    >>> import torch
    >>> from distinfluence.model.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> risk = EmpiricalRisk(model, torch.nn.MSELoss(), (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)))
    >>> HessianOperator(risk).dense()  # mean of 2x²
    tensor([[10.]], dtype=torch.float64)
    """

    kernel = HessianProduct

    @property
    @override
    def dense_work(self) -> PlannedWork:
        # as far as the model's modules say whether it is a chain of linear layers
        sample = self.risk.sample.restrict(self.block)
        outputs = linear_outputs(sample)
        if outputs:
            return PlannedWork(2, 2, outputs, float(self.risk.n_samples) * self.size**2)
        return replace(super().dense_work, passes=1 + super().dense_work.passes)

    def dense(self) -> Tensor:
        """Compute the whole matrix: for linear layers from derivatives by their outputs, otherwise column by column.

        The matrix from derivatives by outputs is compared with a product of two rows, which costs one pass. Where
        they differ, the matrix is computed by p products.

        Returns:
            The Hessian, [p, p] in float64, symmetrised.
        """
        self.work.passes += 1
        (total,) = self.risk.reducer.sum(self._precise(DenseHessian(HessianProduct(self.block), self.block)))
        if total.shape[0] != self.size:
            return super().dense()
        matrix = self._finite(total).double().div_(self.risk.n_samples)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2, self.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        if agree((rows.double() @ matrix).to(self.dtype), self.matmat(rows)):
            return matrix
        return super().dense()

    def gauss_newton(self) -> GGNOperator:
        """Return the Gauss–Newton matrix of the same loss and data.

        Returns:
            The operator of that matrix, for the same block and in the same dtype.
        """
        return GGNOperator(self.risk, self.block, double=self._double)


def forward_over_reverse(risk: SampleRisk, batch: Batch) -> Product:
    """Return the product of one row [p] with the chunk's summed Hessian."""

    def gradient(parameters: Parameters) -> Parameters:
        result: Parameters = grad(lambda p: risk.losses(p, batch).sum())(parameters)
        return result

    def product(row: Tensor) -> Tensor:
        tangent = jvp(gradient, (dict(risk.parameters),), (risk.blocks.unflatten(row),))[1]
        return risk.blocks.flatten(tangent)

    return product


def reverse_twice_together(risk: SampleRisk, batch: Batch) -> Product:
    """Products of rows [k, p] with the chunk's summed Hessian, eight rows through one reverse derivative."""

    def product(rows: Tensor) -> Tensor:
        with differentiable(risk) as parameters:
            gradient = flat_grad(risk, risk.losses(parameters, batch).sum(), parameters, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros_like(rows)
            leaves = list(parameters.values())
            parts = [
                torch.autograd.grad(
                    gradient,
                    leaves,
                    some,
                    retain_graph=True,
                    is_grads_batched=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for some in rows.split(8)
            ]
            flat = [risk.blocks.flatten(dict(zip(parameters, part, strict=True)), n_leading=1) for part in parts]
        return torch.cat(flat).detach()

    return product


def reverse_twice(risk: SampleRisk, batch: Batch) -> Product:
    """Products of rows [k, p] with the chunk's summed Hessian, one row after the other."""

    def product(rows: Tensor) -> Tensor:
        with differentiable(risk) as parameters:
            gradient = flat_grad(risk, risk.losses(parameters, batch).sum(), parameters, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros_like(rows)
            return torch.stack([_row(risk, gradient @ row, parameters) for row in rows])

    return product


def _row(risk: SampleRisk, slope: Tensor, parameters: Parameters) -> Tensor:
    parts = torch.autograd.grad(
        slope, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return risk.blocks.flatten(dict(zip(parameters, parts, strict=True))).detach()
