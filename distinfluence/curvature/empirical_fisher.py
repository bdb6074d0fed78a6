"""The empirical Fisher matrix of the training loss, (1/N) Σ_j ∇ℓ(z_j) ∇ℓ(z_j)ᵀ.

The second moment of the per-sample gradients at the observed labels: positive semi-definite, of rank at most N, and
not the Fisher matrix (Kunstner, Hennig & Balles 2019). A product with k rows is one per-sample gradient pass and two
GEMMs of 2·n·k·p flops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.batch import Batch
from distinfluence.curvature.over_data import DataOperator
from distinfluence.gradients import loss_gradients, micro_batches
from distinfluence.sample_risk import SampleRisk


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
            gradients = loss_gradients(restricted, part).rows
            total.addmm_(rows @ gradients.T, gradients)
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
            gradients = loss_gradients(restricted, part).rows.double()
            total.addmm_(gradients.T, gradients)
        return (total,)


class EmpiricalFisherOperator(DataOperator):
    """The second moment of the per-sample gradients as a linear operator.

    >>> import torch
    >>> from distinfluence.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> risk = EmpiricalRisk(model, torch.nn.MSELoss(), (torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)))
    >>> EmpiricalFisherOperator(risk).dense()  # gradients 2x²w: 2 and 8
    tensor([[34.]], dtype=torch.float64)
    """

    kernel = EmpiricalFisherProduct

    def dense(self) -> Tensor:
        """The whole matrix [p, p] in float64, in one pass over the gradients instead of p products."""
        self.work.passes += 1
        (total,) = self.risk.plane.sum(GradientMoment(self.block))
        return total.div_(self.risk.n_samples)
