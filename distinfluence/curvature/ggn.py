"""The generalised Gauss–Newton matrix of the mean training loss, (1/N) Σ_j J_jᵀ (∇²_f ℓ_j) J_j.

J_j is the Jacobian of the outputs f(z_j, θ), ∇²_f ℓ_j the Hessian of the loss in them (Schraudolph 2002; Martens 2020,
section 8). Positive semi-definite where the loss is convex in the outputs (cross-entropy, squared error), and then
equal to the Fisher matrix of the model's predictive distribution. A product with k rows is, for each row, one forward
derivative, one small product in output space and one reverse derivative.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from distinfluence.batch import Batch
from distinfluence.curvature.over_data import DataOperator, Product, pieces_of, product_of_rows, sum_of, vectorised
from distinfluence.gradients import differentiable
from distinfluence.sample_risk import Parameters, SampleRisk


@dataclass(frozen=True)
class GGNProduct:
    """Kernel: rows [k, p] → rows · Σ_j Jᵀ (∇²_f ℓ) J over the chunk's samples."""

    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Forward, loss Hessian, reverse; the forward derivative by two reverse ones where the model has none."""
        (rows,) = broadcast
        restricted = risk.restrict(self.block)

        def of_piece(piece: Batch) -> Tensor:
            ways = (_forward_then_reverse(restricted, piece), _all_reverse(restricted, piece))
            return product_of_rows(restricted, "GGN products", ways, rows)

        return (sum_of(map(of_piece, pieces_of(restricted, batch, len(rows)))),)


class GGNOperator(DataOperator):
    """The generalised Gauss–Newton matrix of the empirical risk as a linear operator.

    >>> import torch
    >>> from distinfluence.risk import EmpiricalRisk
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> risk = EmpiricalRisk(model, torch.nn.MSELoss(), (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)))
    >>> GGNOperator(risk).dense()  # the Hessian of a model that is linear in its parameters
    tensor([[10.]], dtype=torch.float64)
    """

    kernel = GGNProduct

    @property
    def positive_semidefinite(self) -> bool:  # type: ignore[override]
        """Whether the loss is known to be convex in the outputs."""
        return self.risk.sample.objective.convex


def _forward_then_reverse(risk: SampleRisk, batch: Batch) -> Product:
    def rows_product(rows: Tensor) -> Tensor:
        def outputs(parameters: Parameters) -> Tensor:
            return risk.outputs(parameters, batch)

        primal = vjp(outputs, dict(risk.parameters))
        predictions, pull_back = primal[0], primal[1]
        curve = risk.objective.output_curvature(predictions, batch)
        loss_gradient = grad(lambda f: risk.objective.losses(f, batch).sum())

        def product(row: Tensor) -> Tensor:
            pushed = jvp(outputs, (dict(risk.parameters),), (risk.blocks.unflatten(row),))[1]
            curved = jvp(loss_gradient, (predictions,), (pushed,))[1] if curve is None else curve(pushed)
            return risk.blocks.flatten(pull_back(curved)[0])

        return vectorised(product, risk)(rows)

    return rows_product


def _all_reverse(risk: SampleRisk, batch: Batch) -> Product:
    def rows_product(rows: Tensor) -> Tensor:
        with differentiable(risk) as parameters:
            leaves = list(parameters.values())
            predictions = risk.outputs(parameters, batch)
            if not predictions.requires_grad:
                return torch.zeros_like(rows)
            detached = predictions.detach().requires_grad_()
            loss = risk.objective.losses(detached, batch).sum()
            (slope,) = torch.autograd.grad(loss, detached, create_graph=True)
            # Jv is the derivative by u of ⟨uᵀJ, v⟩, so two reverse passes make one forward derivative
            probe = torch.zeros_like(predictions, requires_grad=True)
            pulled = torch.autograd.grad(
                predictions, leaves, probe, create_graph=True, allow_unused=True, materialize_grads=True
            )
            flat = risk.blocks.flatten(dict(zip(parameters, pulled, strict=True)))
            return torch.stack([_row(risk, row, parameters, predictions, detached, slope, probe, flat) for row in rows])

    return rows_product


def _row(
    risk: SampleRisk,
    row: Tensor,
    parameters: Parameters,
    predictions: Tensor,
    detached: Tensor,
    slope: Tensor,
    probe: Tensor,
    flat: Tensor,
) -> Tensor:
    (pushed,) = torch.autograd.grad(flat @ row, probe, retain_graph=True)
    curved = torch.zeros_like(predictions)
    if slope.requires_grad:
        (curved,) = torch.autograd.grad(
            slope, detached, pushed, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    parts = torch.autograd.grad(
        predictions, list(parameters.values()), curved, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return risk.blocks.flatten(dict(zip(parameters, parts, strict=True))).detach()
