"""What is found out about a model and an objective before a fit is trusted, at a few samples from all over the data.

Influence calls the model with its parameters passed in and differentiates that call, once or twice. Each step is
compared with something that does not take it: losses alone with losses in a batch, gradients of the call with the
module's own `backward`, second derivatives with differences of first ones, and forward derivatives with reverse ones.
What fails is refused, with the parameters or the operator that it is about.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distinfluence.curvature import SecondOrderMode, operator_class
from distinfluence.curvature.over_data import missing_derivative, nodes_of
from distinfluence.errors import DerivativeError, DistinfluenceError, UnsupportedOperatorError
from distinfluence.model.batch import Batch, batch_length, map_batch, take
from distinfluence.model.checkpointing import without_checkpointing
from distinfluence.model.gradients import differentiable, flat_grad, loss_gradients, mixed_gradients
from distinfluence.model.identity.probe import Checked, Probed, probed
from distinfluence.model.objective import Forward, Objective
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import double_differentiable, untouched_attributes, untouched_randomness

SECOND_ORDER_SAMPLES = 6  # of the drawn ones, for what costs several gradients
MOST_PARAMETERS = 2**20  # by which second derivatives are compared: the first ones, which see all that comes after
CHECK_VECTORS = 14  # over these, in float64, held at most
MOVED = 1e-2  # of each parameter's size: away from kinks on which a network may sit, such as a ReLU of zero
MIXED, MIXED_SAMPLES = "mixed derivatives were compared", 4
EXACT_STEP, EXACT = 1e-8, 1e-3  # of differences, relative to the parameters, and the relative error that is allowed
COARSE_STEP, COARSE = 1e-3, 1e-2  # for models with float32 inside
KNOWN = {"WeightNormInterfaceBackward0": "torch._weight_norm"}  # whose second derivative is wrong (torch 2.13)
UNCERTAIN = (
    "second derivatives are symmetric, and could not be compared with differences of gradients: float32 inside "
    "the model and kinks leave these uncertain"
)
ADJOINT = 1e-3  # relative error of two products that are equal but for rounding, float32's inside a model included


def check_derivatives(risk: SampleRisk, batches: Sequence[Batch], products: SecondOrderMode | None) -> Checked:
    """Check the derivatives of a model and an objective at drawn samples, which `SampleRisk.check` has passed.

    Both together cost at most 12 evaluations of the gradient of 16 samples.

    Args:
        risk: Of the model and the objective.
        batches: The samples as `draw.grouped` makes them, placed; the largest batch first.
        products: The matrix whose products the fit will use, None for one that needs no second derivatives.

    Raises:
        DerivativeError: If derivatives are not those of what the model computes.
        UnsupportedOperatorError: If torch has no such derivative.
    """
    remarks: dict[str, None] = {}
    with torch.inference_mode(False), torch.no_grad(), untouched_randomness(), risk.in_own_precision():
        found = _probed(risk, batches)
        for gradients, measured in ((found.gradients, False), (found.of_measurements, True)):
            if gradients is not None:
                remarks |= dict.fromkeys(_compared_with_backward(risk, batches, gradients, measured))
        if products in (SecondOrderMode.HESSIAN, SecondOrderMode.GGN):
            some = take(batches[0], 0, min(batch_length(batches[0]), SECOND_ORDER_SAMPLES))
            remarks |= dict.fromkeys(check_products(risk, some, products))
    if found.without_gradient:
        remarks[
            f"no gradient reaches {_listed(found.without_gradient)} at {len(found.probe.losses)} samples from all over "
            "the data: influence through them is zero"
        ] = None
    own = _parameters_of_objective(risk.objective, risk.module)
    if own:
        remarks[f"the loss has parameters of its own, which influence does not cover: {_listed(own)}"] = None
    return Checked(tuple(remarks), found.probe, products)


def _probed(risk: SampleRisk, batches: Sequence[Batch]) -> Probed:
    try:
        return probed(risk, batches)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, DistinfluenceError) or (missing := missing_derivative(error, risk, batches[0])) is None:
            raise
        raise UnsupportedOperatorError(
            f"`model` and `loss` must be differentiable by the parameters, and PyTorch does not have {missing}. "
            "Every method needs the gradient: replace the operator, or freeze the parameters before it."
        ) from error


def _compared_with_backward(
    risk: SampleRisk, batches: Sequence[Batch], gradients: Mapping[str, Tensor], measured: bool
) -> tuple[str, ...]:
    """Compare gradients of the functional call with those of the module's own. Returns remarks."""
    named = {name: p for name, p in risk.module.named_parameters() if name in risk.blocks.shapes}
    first = next(iter(named.values()))
    as_it_is = first.dtype == risk.dtype and first.device == risk.device
    try:
        own = _Own(risk, first, measured)
        expected = own.gradients(batches, lambda: (own.module, named))
        found = gradients if as_it_is else own.gradients(batches, own.functional)
    except torch.OutOfMemoryError:
        raise
    except DistinfluenceError:
        raise
    except Exception as error:  # a module that torch's autograd refuses, such as one made in `torch.inference_mode`
        return (f"gradients could not be compared with those of the module's own backward pass: {error}",)
    root = torch.finfo(risk.dtype).eps ** 0.5
    # as `agree` has it; and a parameter whose gradient cancels keeps the rounding of the others
    relative, beside = (10 * root, root / 100) if as_it_is else (1e-2, 1e-3)  # the same operators in the same dtype
    norm = float(torch.stack([g.double().norm().cpu() for g in expected.values()]).norm())
    wrong = {
        name: float((found[name].double().cpu() - g.double().cpu()).norm()) / max(float(g.double().norm()), 1e-300)
        for name, g in expected.items()
        if not float((found[name].double().cpu() - g.double().cpu()).norm())
        <= relative * float(g.double().norm()) + beside * norm
    }
    if wrong:
        worst, name = max(wrong, key=wrong.__getitem__), "objective.measurements" if measured else "model"
        raise DerivativeError(
            f"`{name}` has another gradient by {_listed(list(wrong))} when it is called with its parameters passed in "
            f"than by its own `backward` (relative difference {wrong[worst]:.2g} for {worst!r}). Influence passes them "
            "in by name: a parameter that is reached in another way (kept in a list or a closure, or by "
            "`model.parameters()` inside the loss) is missed. Register it under a name wherever it is used, and leave "
            "terms that are no sample's out of the loss. A hook that changes a parameter's gradient is not part of the "
            "influence either: remove it."
        )
    return ()


class _Own:
    """The module as the user calls it, on its own device and in its own dtype."""

    def __init__(self, risk: SampleRisk, first: Tensor, measured: bool) -> None:
        self._risk, self._first, self._measured = risk, first, measured
        module = getattr(risk.module, "_orig_mod", risk.module)  # what torch.compile would compile for these shapes
        self.module: nn.Module = copy.deepcopy(module) if risk.written else module

    def functional(self) -> tuple[Forward, dict[str, Tensor]]:
        """The call with parameters passed in."""
        module = self._risk.module
        leaves = {
            name: p.detach().requires_grad_()
            for name, p in module.named_parameters()
            if name in self._risk.blocks.shapes
        }
        return functools.partial(_called, module, leaves), leaves

    def gradients(
        self, batches: Sequence[Batch], made: Callable[[], tuple[Forward, Mapping[str, Tensor]]]
    ) -> dict[str, Tensor]:
        """Gradient of the sum of the samples' losses."""
        total: dict[str, Tensor] = {}
        objective = self._risk.objective
        for batch in batches:
            own = map_batch(self._as_given, batch)
            with _left_as_found(self.module), double_differentiable(), torch.enable_grad():
                model, leaves = made()
                if model is self.module and self._risk.written:
                    leaves = {n: p for n, p in self.module.named_parameters() if n in self._risk.blocks.shapes}
                value = (
                    objective.measurements(model, own)
                    if self._measured
                    else objective.losses(objective.outputs(model, own), own)
                ).sum()
                parts = (
                    torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
                    if value.requires_grad
                    else [torch.zeros_like(p) for p in leaves.values()]
                )
            for name, part in zip(leaves, parts, strict=True):
                total[name] = total[name] + part.detach() if name in total else part.detach()
        return total

    def _as_given(self, tensor: Tensor) -> Tensor:
        own = tensor.to(self._first.device, copy=True)
        return own.to(self._first.dtype) if own.dtype == self._risk.dtype else own


def _called(module: nn.Module, leaves: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, leaves, args, kwargs)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers; NaN is the same as NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


@contextlib.contextmanager
def _left_as_found(module: nn.Module) -> Iterator[None]:
    """Put back buffers that the forward writes to; a distributed module expects no gradients meanwhile."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    no_sync: Any = getattr(module, "no_sync", contextlib.nullcontext)
    try:
        with no_sync(), without_checkpointing(), untouched_attributes(module):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not _same(buffer, value):
                    buffer.data.copy_(value)


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
    names = _first_parameters(risk)
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


def _first_parameters(risk: SampleRisk) -> tuple[str, ...]:
    """Names of the parameters that come first, up to MOST_PARAMETERS numbers; without those that are larger alone."""
    sizes = {name: shape.numel() for name, shape in risk.blocks.shapes.items()}
    chosen, total = list[str](), 0
    for name, size in sizes.items():
        if total + size <= MOST_PARAMETERS:
            chosen.append(name)
            total += size
    return tuple(chosen) or (min(sizes, key=sizes.__getitem__),)


def check_mixed(risk: SampleRisk, batch: Batch) -> None:
    """Raise DerivativeError unless derivatives of gradients by the input are what differences of gradients say.

    Once for a model: at the first samples that their influence is asked for by perturbation, along a random row.
    """
    if MIXED in risk.found:
        return
    few = take(batch, 0, min(batch_length(batch), MIXED_SAMPLES))
    x = risk.objective.inputs(few)
    if not x.is_floating_point():
        return  # refused where they are made
    with torch.inference_mode(False), torch.no_grad(), untouched_randomness(), risk.in_own_precision():
        wide = risk.apart(_first_parameters(risk), torch.float64)
        samples = map_batch(wide.widened, few)
        try:
            wide.losses(wide.parameters, samples)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # as in `check_products`
            wide, samples = risk.apart(_first_parameters(risk)), few
        verdicts = [_mixed_agrees(wide, samples, seed) for seed in (0, 1)]
        if not any(agrees for agrees, _ in verdicts) and (any(c for _, c in verdicts) or _custom(wide, samples)):
            raise DerivativeError(
                "`mode='perturbation'` cannot be used with this `model` and `loss`: the derivative of gradients by the "
                f"input is not what differences of gradients say. {_suspects(wide, samples)}"
            )
    risk.found[MIXED] = True


def _mixed_agrees(risk: SampleRisk, batch: Batch, seed: int) -> tuple[bool, bool]:
    """Whether ∂/∂x ⟨∇ℓ, row⟩ along a direction is a difference of gradients; else whether that is certain."""
    generator, x = torch.Generator().manual_seed(seed), risk.objective.inputs(batch)
    row = _direction(risk, {name: _scale(p) for name, p in risk.parameters.items()}, generator)
    d = _scale(x) * _normal(x, generator)
    found = (mixed_gradients(risk, batch, row.unsqueeze(0))[0] * d).double().flatten(1).sum(dim=1)
    exact = risk.dtype == torch.float64
    step = EXACT_STEP if exact else COARSE_STEP

    def difference(by: float) -> tuple[Tensor, float]:
        sides = [
            (loss_gradients(risk, risk.objective.replace_inputs(batch, x + sign * by * d)).rows @ row).double()
            for sign in (1, -1)
        ]
        return (sides[0] - sides[1]) / (2 * by), float(sides[0].norm())

    expected, size = difference(step)
    noise = 100 * torch.finfo(risk.dtype).eps / step * size
    error = float((found - expected).norm())
    if error <= EXACT * float(expected.norm()) + noise:
        return True, True
    return False, exact and float((difference(step / 2)[0] - expected).norm()) <= 0.1 * error


def _check_hessian(risk: SampleRisk, batch: Batch) -> tuple[str, ...]:
    scales = {name: _scale(p) for name, p in risk.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    at = risk.at({name: _moved(p, scales[name], generator) for name, p in risk.parameters.items()})
    rows = at.without_padding(torch.stack([_direction(at, scales, generator) for _ in "uv"]))
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
        if not any(certain for _, certain, _ in verdicts) and not _custom(at, batch):
            return (UNCERTAIN,)
        how = f"they differ from differences of gradients by {min(error for _, _, error in verdicts):.2g} of their norm"
    else:
        how = f"⟨u, Hv⟩ is {sides[0]:.4g} and ⟨v, Hu⟩ is {sides[1]:.4g}"
    raise DerivativeError(
        f"`second_order_mode='hessian'` cannot be used with this `model` and `loss`: products with the Hessian "
        f"are wrong, {how}. {_suspects(at, batch)} Take second_order_mode='ggn', which needs first derivatives "
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
    u = _normal(outputs, generator) / max(1, outputs.numel()) ** 0.5
    v = risk.without_padding(
        _direction(risk, {name: _scale(p) for name, p in risk.parameters.items()}, generator).unsqueeze(0)
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
            f"{_suspects(risk, batch)} Take second_order_mode='empirical_fisher', which needs gradients alone."
        )
    _check_loss_curvature(risk, batch, outputs, u)


def _check_loss_curvature(risk: SampleRisk, batch: Batch, outputs: Tensor, u: Tensor) -> None:
    """The loss's Hessian by the outputs along u, as the Gauss–Newton matrix has it, against differences."""
    size = float(outputs.double().pow(2).mean()) ** 0.5 or 1.0
    generator = torch.Generator().manual_seed(1)
    at = _in_domain(risk, batch, outputs, _moved(outputs, size, generator))

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
        f"differences of the first by {min(errors):.2g} of its norm. {_suspects(risk, batch)} Let the objective's "
        "`output_curvature` return it, or take second_order_mode='empirical_fisher'."
    )


def _in_domain(risk: SampleRisk, batch: Batch, outputs: Tensor, moved: Tensor) -> Tensor:
    """The moved outputs where the loss takes them, else the outputs themselves."""
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


def _direction(risk: SampleRisk, scales: Mapping[str, float], generator: torch.Generator) -> Tensor:
    """A random row [p], each parameter's part of the parameter's own size."""
    return risk.blocks.flatten({name: scales[name] * _normal(p, generator) for name, p in risk.parameters.items()})


def _scale(parameter: Tensor) -> float:
    """The size of a parameter's numbers; where they are zero, that of a small weight."""
    return float(parameter.detach().double().pow(2).mean()) ** 0.5 or 1e-2


def _moved(tensor: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Every number by some hundredths of itself, so that it keeps its sign; zeros by some of the scale."""
    noise = MOVED * _normal(tensor, generator).clamp(-3, 3)
    return torch.where(tensor == 0, scale * noise, tensor * (1 + noise)).detach()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _suspects(risk: SampleRisk, batch: Batch) -> str:
    """Those of `_custom`, in a sentence."""
    names = _custom(risk, batch)
    if not names:
        return "No custom operator was found in it: look for tensors that are detached or computed without gradients."
    return f"Operators in it that may be at fault: {_listed(names)}. See whether one can differentiate them twice."


def _custom(risk: SampleRisk, batch: Batch) -> list[str]:
    """Custom operators, and PyTorch's with known faults, in the graph of the losses."""
    with double_differentiable(), differentiable(risk) as parameters:
        losses = risk.losses(parameters, batch)
    names = set[str]()
    for node in nodes_of(losses):
        forward = getattr(type(node), "_forward_cls", None)
        if forward is not None:
            names.add(forward.__name__)
        if node.name() in KNOWN:
            names.add(KNOWN[node.name()])
    return sorted(names)


def _parameters_of_objective(objective: Objective, module: nn.Module) -> list[str]:
    """Trained parameters that a loss or an objective holds and that are not the model's."""
    theirs = {id(p) for p in module.parameters()}
    found: dict[str, None] = {}

    def look(value: Any, name: str, depth: int) -> None:
        if isinstance(value, nn.Parameter):
            if value.requires_grad and id(value) not in theirs:
                found[name] = None
        elif isinstance(value, nn.Module):
            for own, p in value.named_parameters():
                look(p, f"{name}.{own}", depth)
        elif depth and isinstance(value, functools.partial):
            for own, item in (("", value.func), *value.keywords.items()):
                look(item, f"{name}.{own}".rstrip("."), depth - 1)
        elif depth and hasattr(value, "__closure__"):
            for own, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                look(getattr(cell, "cell_contents", None), own, depth - 1)
        elif depth and isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                look(item, f"{name}[{number}]", depth - 1)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, Tensor)):
            for own, item in vars(value).items():
                look(item, f"{name}.{own}", depth - 1)

    for name, value in vars(objective).items():
        look(value, name, 3)
    return list(found)


def _listed(names: Sequence[str]) -> str:
    some = ", ".join(repr(name) for name in names[:5])
    return some if len(names) <= 5 else f"{some} and {len(names) - 5} more"
