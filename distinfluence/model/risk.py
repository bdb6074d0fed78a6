"""The empirical risk: model, loss, parameters and data, all read-only.

    L(θ) = (1/N) Σ_j ℓ(z_j, θ)

The mean is over samples, whatever the batches. Curvature operators are built on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distinfluence.model.batch import Batch, take
from distinfluence.model.blocks import BlockMode, BlockStructure, ParameterBlocks
from distinfluence.model.gradients import SampleGradients, loss_gradients, micro_batches
from distinfluence.model.objective import Loss, Objective, as_objective
from distinfluence.model.reducer import ChunkReducer, LocalReducer
from distinfluence.model.sample_risk import SampleRisk


@dataclass(frozen=True)
class LossAndGradient:
    """Kernel: (Σ loss in float64, Σ gradient [p]) of a chunk."""

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Sum micro-batch by micro-batch."""
        loss = torch.zeros((), dtype=torch.float64, device=risk.device)
        gradient = torch.zeros(risk.size, dtype=risk.dtype, device=risk.device)
        for part in micro_batches(risk, batch):
            gradients = loss_gradients(risk, part)
            loss += gradients.values.double().sum()
            gradient += gradients.rows.sum(dim=0)
            del gradients  # or they are held while the next are made
        return loss, gradient


class EmpiricalRisk:
    """Mean training loss of a model over a data set, as a function of its covered parameters.

    Args:
        model: Any `nn.Module`, in eval mode if it has dropout or batch statistics.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        data: Arrays as one (x, y) pair or a dict, a data set, a DataLoader, or a list of samples or batches.
        block_structure: The parameter blocks (see `ParameterBlocks.of`); by default one block.

    >>> import torch
    >>> risk = EmpiricalRisk(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (torch.ones(3, 2), torch.zeros(3, 1)))
    >>> risk.n_samples, risk.n_parameters, risk.blocks.coverage
    (3, 3, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        data: object,
        *,
        block_structure: BlockStructure = BlockMode.FULL,
    ) -> None:
        blocks = ParameterBlocks.of(model, block_structure)
        self.reducer: ChunkReducer = LocalReducer(SampleRisk(model, as_objective(loss), blocks, timed=True), data)

    @classmethod
    def over(cls, reducer: ChunkReducer) -> "EmpiricalRisk":
        """Make the risk from an existing reducer.

        Args:
            reducer: Sums over the data, with the risk of single samples.

        Returns:
            The risk over the reducer's data.
        """
        risk = cls.__new__(cls)
        risk.reducer = reducer
        return risk

    @property
    def sample(self) -> SampleRisk:
        """The risk of single samples."""
        return self.reducer.risk

    @property
    def blocks(self) -> ParameterBlocks:
        """The covered parameters, block by block."""
        return self.sample.blocks

    @property
    def n_samples(self) -> int:
        """N, the number of training samples."""
        return self.reducer.n_samples

    @property
    def n_parameters(self) -> int:
        """p, the number of covered parameters."""
        return self.sample.size

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Compute the mean loss and its gradient; one pass.

        Returns:
            The mean loss, and its gradient, [p].
        """
        loss, gradient = self.reducer.sum(LossAndGradient())
        return float(loss) / self.n_samples, gradient / self.n_samples

    def sample_gradients(self) -> Iterator[SampleGradients]:
        """Yield per-sample gradients, chunk by chunk; a local reducer only.

        Yields:
            The losses and gradients of one chunk.

        Raises:
            TypeError: If the reducer is not local.
        """
        if not isinstance(self.reducer, LocalReducer):
            raise TypeError("`sample_gradients` needs a local reducer. Use the calculator's `gradients`.")
        for batch in self.reducer.batches():
            yield loss_gradients(self.sample, batch)


def forward_flops(risk: SampleRisk, batch: Batch) -> float:
    """Count the products of matrices and the convolutions of a forward pass of the batch's first sample.

    0 where the model cannot be watched.
    """
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            risk.outputs(risk.parameters, take(batch, 0, 1))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model does that cannot be watched
        return 0.0
    return float(counter.get_total_flops())
