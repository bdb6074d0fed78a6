"""No curvature, A = 0: with the damping λ = 1 influences are dot products of gradients. Products need no data."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import PlannedWork
from distinfluence.curvature.over_data import DataOperator


class NoCurvature(DataOperator):
    """The matrix of zeros in the form of a curvature, for methods that compare gradients as they are.

    Args:
        risk: The empirical risk, of which only the parameters count.
        block: Name of a parameter block; None for all covered parameters.
        double: Whether rows and products are in float64, whatever the model is in.

    Raises:
        ParameterBlockError: If `block` is not a block of the risk.

    >>> import torch
    >>> from distinfluence import EmpiricalRisk
    >>> risk = EmpiricalRisk(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
    >>> NoCurvature(risk).matmat(torch.ones(1, 2))
    tensor([[0., 0.]])
    """

    positive_semidefinite = True

    @property
    @override
    def product_flops(self) -> float:
        return 0.0

    @property
    @override
    def dense_work(self) -> PlannedWork:
        return PlannedWork()

    @override
    def batch_matmat(self, index: int, rows: Tensor) -> Tensor:
        self._check(rows)
        self.work.batches += 1
        return torch.zeros_like(rows)

    def in_eigenbasis(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Multiply rows with f(A), which is f(0)·I.

        Args:
            rows: Vectors, [k, p].
            function: f, which is applied to each eigenvalue.

        Returns:
            rows · f(0), [k, p].
        """
        self._check(rows)
        return rows * function(self.eigenvalues()[:1]).to(rows.dtype)

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues.

        Returns:
            Zeros, [p] in float64.
        """
        return torch.zeros(1, dtype=torch.float64, device=self.device).expand(self.size)

    @override
    def _product(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)
