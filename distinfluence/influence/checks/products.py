"""Products with second derivatives, compared with differences of gradients and with reverse derivatives."""

import torch
from torch import Tensor

from distinfluence.curvature import SecondOrderMode, operator_class
from distinfluence.errors import DerivativeError
from distinfluence.influence.checks.directions import (
    COARSE,
    COARSE_STEP,
    EXACT,
    EXACT_STEP,
    MOST_PARAMETERS,
    custom_operators,
    first_parameters,
    normal_like,
    random_direction,
    scale_of,
    slightly_moved,
    suspects,
)
from distinfluence.model.batch import Batch, map_batch
from distinfluence.model.gradients import differentiable, flat_grad
from distinfluence.model.objective import Forward, Objective
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import double_differentiable

CHECK_VECTORS = 14  # over these, in float64, held at most
UNCERTAIN = (
    "second derivatives are symmetric, and could not be compared with differences of gradients: float32 inside "
    "the model and kinks leave these uncertain"
)
ADJOINT = 1e-3  # relative error of two products that are equal but for rounding, float32's inside a model included


def check_bytes(p: int, itemsize: int) -> int:
    """Bytes that the checks of a model with p parameters hold at most, for plans.

    The whole model in float64, and vectors over the first parameters; or some whole gradients in the model's own dtype.
    """
    return max(8 * p + CHECK_VECTORS * 8 * min(p, MOST_PARAMETERS), 5 * itemsize * p)


def check_products(risk: SampleRisk, batch: Batch, mode: SecondOrderMode) -> tuple[str, ...]:
    """Return remarks. Raise DerivativeError unless a matrix's products are what first derivatives say that they are.

    The Hessian is compared with differences of gradients, and must be symmetric. The Gauss–Newton matrix needs the
    Jacobian J both ways: ⟨u, Jv⟩ from its product must be ⟨Jᵀu, v⟩ from a reverse pass; and the Hessian of the loss by
    the outputs, compared with differences. In float64: in float32 a difference of gradients of a network with kinks is
    not that of its smooth pieces.
    """
    names = first_parameters(risk)
    wide = risk.apart(names, torch.float64)
    samples = map_batch(wide.widened, batch)
    try:
        with double_differentiable():
            wide.losses(wide.parameters, samples)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model with something in it that is float32 for good
        wide, samples = risk.apart(names), batch
    if mode is SecondOrderMode.HESSIAN:
        return _check_hessian(wide, samples)
    _check_gauss_newton(wide, samples)
    return ()


def _check_hessian(risk: SampleRisk, batch: Batch) -> tuple[str, ...]:
    scales = {name: scale_of(p) for name, p in risk.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    at = risk.at({name: slightly_moved(p, scales[name], generator) for name, p in risk.parameters.items()})
    rows = at.without_padding(torch.stack([random_direction(at, scales, generator) for _ in "uv"]))
    (products,) = operator_class(SecondOrderMode.HESSIAN).kernel(None)(at, batch, rows)
    (u, v), (hu, hv) = rows.double(), products.double()
    sides = float(u @ hv), float(v @ hu)
    norm = float(hv.norm() * u.norm())
    if abs(sides[0] - sides[1]) <= COARSE * norm:  # rounding in float32, and kinks, are far below
        # a second direction: a kink that lies in the way of one does not lie in that of another
        tried = ((v, hv, EXACT_STEP, EXACT), (u, hu, EXACT_STEP, EXACT), (v, hv, COARSE_STEP, COARSE))
        verdicts = [_agrees(at, batch, *one) for one in tried if one[2] > torch.finfo(risk.dtype).eps]
        if any(agrees for agrees, _, _ in verdicts):
            return ()
        if not any(certain for _, certain, _ in verdicts) and not custom_operators(at, batch):
            return (UNCERTAIN,)
        how = f"they differ from differences of gradients by {min(error for _, _, error in verdicts):.2g} of their norm"
    else:
        how = f"⟨u, Hv⟩ is {sides[0]:.4g} and ⟨v, Hu⟩ is {sides[1]:.4g}"
    raise DerivativeError(
        f"`second_order_mode='hessian'` cannot be used with this `model` and `loss`: products with the Hessian "
        f"are wrong, {how}. {suspects(at, batch)} Take second_order_mode='ggn', which needs first derivatives "
        "of the model alone, or 'empirical_fisher', which needs none but gradients."
    )


def _agrees(
    risk: SampleRisk, batch: Batch, row: Tensor, product: Tensor, step: float, allowed: float
) -> tuple[bool, bool, float]:
    """Whether a product is a difference of gradients; else whether that is certain, and by how much it is not.

    It is certain where half the step gives the same difference: neither rounding nor a kink has made it. In float32 it
    never is.
    """
    expected, size = _difference(risk, batch, row, step)
    noise = 100 * torch.finfo(risk.dtype).eps / step * size
    error, norm = float((product - expected).norm()), max(float(expected.norm()), 1e-300)
    if error <= allowed * norm + noise:
        return True, True, 0.0
    half, _ = _difference(risk, batch, row, step / 2)
    certain = risk.dtype == torch.float64 and float((half - expected).norm()) <= 0.1 * error
    return False, certain, error / norm


def _difference(risk: SampleRisk, batch: Batch, direction: Tensor, step: float) -> tuple[Tensor, float]:
    """(∇L(θ + εv) − ∇L(θ − εv)) / 2ε, and the norm of a gradient."""
    along = risk.blocks.unflatten(direction)
    sides = []
    for sign in (1, -1):
        there = risk.at({n: p + sign * step * along[n].to(p.dtype) for n, p in risk.parameters.items()})
        with double_differentiable(), differentiable(there) as parameters:
            sides.append(flat_grad(there, there.losses(parameters, batch).sum(), parameters).double())
    return (sides[0] - sides[1]) / (2 * step), float(sides[0].norm())


def _check_gauss_newton(risk: SampleRisk, batch: Batch) -> None:
    generator = torch.Generator().manual_seed(0)
    with double_differentiable():
        outputs = risk.outputs(risk.parameters, batch).detach()
    u = normal_like(outputs, generator) / max(1, outputs.numel()) ** 0.5
    v = risk.without_padding(
        random_direction(risk, {name: scale_of(p) for name, p in risk.parameters.items()}, generator).unsqueeze(0)
    )[0]
    with double_differentiable(), differentiable(risk) as parameters:
        pulled = flat_grad(risk, (risk.outputs(parameters, batch) * u).sum(), parameters)
    probing = risk.with_objective(_AlongOutputs(risk.objective, u))
    (product,) = operator_class(SecondOrderMode.GGN).kernel(None)(probing, batch, v.unsqueeze(0))
    expected = pulled.double() * float(pulled.double() @ v.double())
    # ⟨Jᵀu, v⟩ may be small by chance: rounding is that of its terms
    room = ADJOINT * float(expected.norm()) + 1e3 * torch.finfo(risk.dtype).eps * float(
        pulled.double().norm() ** 2 * v.double().norm()
    )
    error = float((product[0].double() - expected).norm())
    if not error <= room:
        raise DerivativeError(
            "`second_order_mode='ggn'` cannot be used with this `model`: its forward and its reverse derivative do not "
            f"belong together, ⟨u, Jv⟩ and ⟨Jᵀu, v⟩ differ by {error / max(float(expected.norm()), 1e-300):.2g}. "
            f"{suspects(risk, batch)} Take second_order_mode='empirical_fisher', which needs gradients alone."
        )
    _check_loss_curvature(risk, batch, outputs, u)


def _check_loss_curvature(risk: SampleRisk, batch: Batch, outputs: Tensor, u: Tensor) -> None:
    """Compare the loss's Hessian by the outputs, along u, with differences."""
    size = float(outputs.double().pow(2).mean()) ** 0.5 or 1.0
    generator = torch.Generator().manual_seed(1)
    at = _in_domain(risk, batch, outputs, slightly_moved(outputs, size, generator))

    def slope(f: Tensor) -> Tensor:
        leaf = f.detach().requires_grad_()
        value = risk.objective.losses(leaf, batch).sum()
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        (found,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True, materialize_grads=True)
        return found.detach()

    with double_differentiable(), torch.enable_grad():
        leaf = at.detach().requires_grad_()
        value = risk.objective.losses(leaf, batch).sum()
        curve = risk.objective.output_curvature(leaf.detach(), batch)
        curved = torch.zeros_like(at) if curve is None else curve(u)
        if value.requires_grad and curve is None:
            try:
                (found,) = torch.autograd.grad(value, leaf, create_graph=True, materialize_grads=True)
                if found.requires_grad:
                    (curved,) = torch.autograd.grad(found, leaf, u, materialize_grads=True)
            except RuntimeError:
                return  # no second derivative: said by the product itself, with the operator's name
        errors = []
        for step, allowed in ((EXACT_STEP, EXACT), (COARSE_STEP, COARSE)):
            if step < torch.finfo(at.dtype).eps:
                continue
            move = step * size * u / max(float(u.norm()), 1e-300) * u.numel() ** 0.5
            sides = [slope(at + sign * move).double() for sign in (1, -1)]
            expected = (sides[0] - sides[1]) / 2 * (float(u.norm()) / max(float(move.norm()), 1e-300))
            noise = 100 * torch.finfo(at.dtype).eps / step * float(sides[0].norm())
            error = float((curved.double() - expected).norm())
            if error <= allowed * float(expected.norm()) + noise:
                return
            errors.append(error / max(float(expected.norm()), 1e-300))
    raise DerivativeError(
        "`second_order_mode='ggn'` cannot be used with this `loss`: its second derivative by the outputs differs from "
        f"differences of the first by {min(errors):.2g} of its norm. {suspects(risk, batch)} Let the objective's "
        "`output_curvature` return it, or take second_order_mode='empirical_fisher'."
    )


def _in_domain(risk: SampleRisk, batch: Batch, outputs: Tensor, moved: Tensor) -> Tensor:
    """Return the moved outputs where the loss takes them, else the outputs themselves."""
    try:
        taken = torch.isfinite(risk.objective.losses(moved, batch)).all()
    except (RuntimeError, ValueError):
        return outputs
    return moved if taken else outputs


class _AlongOutputs(Objective):
    """½⟨u, f⟩² in place of a loss: its Gauss–Newton matrix is (Jᵀu)(Jᵀu)ᵀ."""

    def __init__(self, objective: Objective, u: Tensor) -> None:
        self._objective, self._u = objective, u

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        """Those of the objective."""
        return self._objective.outputs(model, batch)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Of the whole batch, as if each sample had a share."""
        n = outputs.shape[0]
        total: Tensor = (outputs * self._u).sum()
        return (total**2 / (2 * n)).expand(n)
