"""The empirical Fisher matrix of the training loss, (1/N) Σ_j ∇ℓ(z_j) ∇ℓ(z_j)ᵀ.

The second moment of the per-sample gradients at the observed labels: positive semi-definite, of rank at most N, and
not the Fisher matrix (Kunstner, Hennig & Balles 2019). A product with k rows is one per-sample gradient pass and two
GEMMs of 2·n·k·p flops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import PlannedWork
from distinfluence.curvature.over_data import DataOperator
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import loss_gradients, micro_batches
from distinfluence.model.sample_risk import SampleRisk


@dataclass(frozen=True)
class EmpiricalFisherProduct:
    """Kernel: rows [k, p] → rows · Σ_j g_j g_jᵀ over the chunk's samples."""

    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Two GEMMs on the gradients of each micro-batch."""
        (rows,) = broadcast
        restricted = risk.restrict(self.block)
        total = torch.zeros_like(rows)
        for part in micro_batches(restricted, batch):
            gradients = _rows(restricted, part)
            total.addmm_(rows @ gradients.T, gradients)
            del gradients  # or they are held while the next are made
        return (total,)


@dataclass(frozen=True)
class HarmonicMeanProduct:
    """Kernel: rows [k, p] → rows · Σ_j (g_j g_jᵀ + λI)⁻¹ over the chunk's samples, by Sherman–Morrison."""

    damping: float
    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Two GEMMs on the gradients of each micro-batch: (b − g ⟨g, b⟩ / (λ + ‖g‖²)) / λ, summed."""
        (rows,) = broadcast
        restricted = risk.restrict(self.block)
        total = torch.zeros_like(rows)
        for part in micro_batches(restricted, batch):
            gradients = _rows(restricted, part)
            weights = 1.0 / (self.damping + torch.linalg.vector_norm(gradients, dim=1).square())
            total += rows * gradients.shape[0] - (rows @ gradients.T * weights) @ gradients
            del gradients
        return (total.div_(self.damping),)


@dataclass(frozen=True)
class SquaredGradientNorm:
    """Kernel: Σ_j ‖g_j‖² in float64 over the chunk's samples."""

    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Micro-batch by micro-batch."""
        restricted = risk.restrict(self.block)
        total = torch.zeros((), dtype=torch.float64, device=restricted.device)
        for part in micro_batches(restricted, batch):
            total += torch.linalg.vector_norm(_rows(restricted, part), dim=1, dtype=torch.float64).square().sum()
        return (total,)


@dataclass(frozen=True)
class GradientMoment:
    """Kernel: Σ_j g_j g_jᵀ [p, p] in float64 over the chunk's samples."""

    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """One GEMM for each micro-batch."""
        restricted = risk.restrict(self.block)
        total = torch.zeros(restricted.size, restricted.size, dtype=torch.float64, device=restricted.device)
        for part in micro_batches(restricted, batch):
            gradients = _rows(restricted, part).double()
            total.addmm_(gradients.T, gradients)
            del gradients
        return (total,)


def _rows(risk: SampleRisk, batch: Batch) -> Tensor:
    """Gradients [n, p]; kept for the next pass where the chunks stay in this process."""
    if not risk.ways.timed:
        return loss_gradients(risk, batch).rows
    return risk.kept_rows.get(batch, lambda: loss_gradients(risk, batch).rows)


class EmpiricalFisherOperator(DataOperator):
    """The second moment of the per-sample gradients as a linear operator.

    Args:
        risk: The empirical risk.
        block: Name of a parameter block, whose diagonal block of the matrix is taken. None for all covered parameters.
        double: Whether rows and products are in float64, whatever the model is in.

    Raises:
        ParameterBlockError: If `block` is not a block of the risk.

    >>> import torch
    >>> from distinfluence.model.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> risk = EmpiricalRisk(model, torch.nn.MSELoss(), (torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)))
    >>> EmpiricalFisherOperator(risk).dense()  # gradients 2x²w: 2 and 8
    tensor([[34.]], dtype=torch.float64)
    """

    kernel = EmpiricalFisherProduct
    positive_semidefinite = True

    @property
    @override
    def product_flops(self) -> float:
        return 4.0 * self.size * self.risk.n_samples  # two GEMMs on the gradients, which all rows share

    @property
    @override
    def dense_work(self) -> PlannedWork:
        return PlannedWork(1, 0, 1, 2.0 * self.risk.n_samples * self.size**2)

    def inverse_harmonic_mean(self, rows: Tensor, damping: float) -> Tensor:
        """Multiply rows with (1/N) Σ_j (g_j g_jᵀ + λI)⁻¹; one pass.

        Args:
            rows: Vectors, [k, p], in the operator's dtype.
            damping: λ > 0.

        Returns:
            The products, [k, p].

        Raises:
            ShapeError: If `rows` is not [k, p].
            DtypeError: If the dtype of `rows` is not the operator's.
        """
        self._check(rows)
        self.work.passes += 1
        self.work.rows += rows.shape[0]
        kernel = self._precise(HarmonicMeanProduct(damping, self.block))
        (total,) = self.risk.reducer.sum(kernel, rows.detach())
        return total.div_(self.risk.n_samples)

    def mean_square_gradient(self) -> float:
        """Compute the mean squared norm of the samples' gradients; one pass.

        Returns:
            (1/N) Σ_j ‖g_j‖², the trace of the matrix.
        """
        self.work.passes += 1
        (total,) = self.risk.reducer.sum(self._precise(SquaredGradientNorm(self.block)))
        return float(total) / self.risk.n_samples

    def dense(self) -> Tensor:
        """Compute the whole matrix in one pass over the gradients, instead of p products.

        Returns:
            The matrix, [p, p] in float64.
        """
        self.work.passes += 1
        (total,) = self.risk.reducer.sum(self._precise(GradientMoment(self.block)))
        return total.div_(self.risk.n_samples)
