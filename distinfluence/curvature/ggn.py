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

from distinfluence.curvature.empirical_fisher import EmpiricalFisherProduct
from distinfluence.curvature.over_data import (
    ONCE,
    DataOperator,
    Mode,
    Product,
    once_differentiable_in,
    pieces_of,
    product_of_rows,
    sum_of,
    vectorised,
)
from distinfluence.errors import UnsupportedOperatorError
from distinfluence.model.alternatives import attempt
from distinfluence.model.batch import Batch, take
from distinfluence.model.gradients import differentiable
from distinfluence.model.objective import FEW_OUTPUTS
from distinfluence.model.sample_risk import Parameters, SampleRisk


@dataclass(frozen=True)
class GGNProduct:
    """Kernel: rows [k, p] → rows · Σ_j Jᵀ (∇²_f ℓ) J over the chunk's samples."""

    block: str | None = None

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Forward, loss Hessian, reverse; the forward derivative by two reverse ones where the model has none.

        Where the model has no second derivatives either, by the rows of each sample's Jacobian, one reverse each.
        """
        (rows,) = broadcast
        restricted = risk.restrict(self.block)

        def of_piece(piece: Batch) -> Tensor:
            ways = (_forward_then_reverse(restricted, piece), _all_reverse(restricted, piece))
            last = by_rows_of_jacobian(restricted, piece)
            mode = Mode("ggn", "GGN products", {"empirical_fisher": EmpiricalFisherProduct()}, last)
            return product_of_rows(restricted, mode, ways, piece, rows)

        return (sum_of(map(of_piece, pieces_of(restricted, batch, len(rows)))),)


class GGNOperator(DataOperator):
    """The generalised Gauss–Newton matrix of the empirical risk as a linear operator.

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
    return _pulled_back(risk, parameters, predictions, _curved(slope, detached, pushed))


def _curved(slope: Tensor, outputs: Tensor, along: Tensor) -> Tensor:
    """Multiply one vector with the loss's Hessian in the outputs. slope: the loss's gradient, in the graph."""
    if not slope.requires_grad:
        return torch.zeros_like(outputs)
    return torch.autograd.grad(slope, outputs, along, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def _pulled_back(risk: SampleRisk, parameters: Parameters, outputs: Tensor, vector: Tensor) -> Tensor:
    """Jᵀ·vector, [p]."""
    parts = torch.autograd.grad(
        outputs, list(parameters.values()), vector, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return risk.blocks.flatten(dict(zip(parameters, parts, strict=True))).detach()


def by_rows_of_jacobian(risk: SampleRisk, batch: Batch) -> Product:
    """Products of rows [k, p] from first derivatives of the model, for up to FEW_OUTPUTS outputs of a sample.

    Costs a reverse pass for each output of each sample, and one of the batch for each row. Holds the Jacobian [m, p] of
    one sample at a time.
    """

    def product(rows: Tensor) -> Tensor:
        with differentiable(risk) as parameters:
            predictions = risk.outputs(parameters, batch)
            n, m = predictions.shape[0], predictions[0].numel()
            if m > FEW_OUTPUTS:
                raise UnsupportedOperatorError(
                    f"First derivatives of the model alone are enough for up to {FEW_OUTPUTS} outputs of a sample, and "
                    f"this model has {m}."
                )
            if not predictions.requires_grad:
                return torch.zeros_like(rows)
            pushed = torch.stack([rows @ _jacobian(risk, take(batch, j, j + 1)).T for j in range(n)], dim=1)
            curved = _curvature(risk, predictions.detach(), batch)
            return torch.stack(
                [_pulled_back(risk, parameters, predictions, curved(u.view_as(predictions))) for u in pushed]
            )

    return product


def _jacobian(risk: SampleRisk, sample: Batch) -> Tensor:
    """Of one sample's outputs, [m, p]."""
    with differentiable(risk) as parameters:
        outputs = risk.outputs(parameters, sample)
        units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        return torch.stack([_pulled_back(risk, parameters, outputs, unit.view_as(outputs)) for unit in units])


def _curvature(risk: SampleRisk, outputs: Tensor, batch: Batch) -> Product:
    """u [n, ...] → the loss's Hessian in the outputs times u; in closed form only where the loss has no derivative."""
    leaf = outputs.requires_grad_()
    loss = risk.objective.losses(leaf, batch).sum()
    if not loss.requires_grad:
        return torch.zeros_like
    closed = risk.objective.output_curvature(outputs.detach(), batch)
    if once_differentiable_in(loss):
        if closed is None:
            raise RuntimeError(ONCE)
        return closed
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True, allow_unused=True, materialize_grads=True)
    if closed is None or attempt(lambda u: _curved(slope, leaf, u), outputs)[1] is None:
        return lambda u: _curved(slope, leaf, u)
    return closed
