"""Models with a backward pass of their own: checkpointed parts, tensors saved elsewhere, hooks, custom operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from distinfluence import DirectInfluence, EkfacInfluence, EmpiricalRisk, HessianOperator
from distinfluence.layers.layout import layout_of
from distinfluence.model.checkpointing import without_checkpointing

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

LOSS = nn.CrossEntropyLoss()
X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 1, 0, 1, 0, 0])


class Plain(nn.Module):
    """Three layers; subclasses compute the same in another way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4).double()
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).double()
        self.place = nn.Embedding(1, 4).double()
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inside(torch.tanh(self.first(x))) + self.shared())
        return out

    def inside(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.middle(hidden)
        return out

    def shared(self) -> Tensor:
        out: Tensor = self.place(torch.zeros(1, dtype=torch.int64))
        return out


class Checkpointed(Plain):
    def inside(self, hidden: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.middle, hidden, use_reentrant=False)
        return out


class InSequence(Plain):
    def inside(self, hidden: Tensor) -> Tensor:
        out: Tensor = checkpoint_sequential(self.middle, 2, hidden, use_reentrant=False)
        return out


class Reentrant(Plain):
    def inside(self, hidden: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.middle, hidden, use_reentrant=True)
        return out


class SavedElsewhere(Plain):
    def inside(self, hidden: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            out: Tensor = self.middle(hidden)
        return out


class BackwardHooks(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.middle[0].register_full_backward_hook(lambda module, gradients, of_outputs: None)
        self.head.register_full_backward_pre_hook(lambda module, of_outputs: None)


def refuse_other_shapes(tensor: Tensor, shape: torch.Size) -> Tensor:

    def check(gradient: Tensor) -> None:
        if gradient.shape != shape:
            raise ValueError(f"a gradient of shape {tuple(gradient.shape)} was not expected")

    if tensor.requires_grad:
        tensor.register_hook(check)
    return tensor


class ShapeHook(Plain):
    def inside(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.middle(refuse_other_shapes(hidden, hidden.shape))
        return out


class HookOnWhatEachSampleShares(Plain):
    """The recorder gives such an output a dimension of samples, which the hook refuses."""

    def shared(self) -> Tensor:
        return refuse_other_shapes(super().shared(), torch.Size([1, 4]))


class WeightsToo(torch.autograd.Function):
    """A linear layer whose backward insists on a gradient of the weight, as hand-written ones do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        assert ctx.needs_input_grad[1], "the weight must be trained"
        return gradients[0] @ weight, gradients[0].T @ x, gradients[0].sum(dim=0)


class CustomBackward(Plain):
    def inside(self, hidden: Tensor) -> Tensor:
        first, *others = self.middle
        out: Tensor = nn.Sequential(*others)(custom(first, hidden))
        return out


CHECKPOINTED: dict[str, type[Plain]] = {
    "Checkpointed": Checkpointed,
    "InSequence": InSequence,
    "Reentrant": Reentrant,
}
OTHERS: dict[str, type[Plain]] = {
    "SavedElsewhere": SavedElsewhere,
    "BackwardHooks": BackwardHooks,
    "ShapeHook": ShapeHook,
    "HookOnWhatEachSampleShares": HookOnWhatEachSampleShares,
}
MODELS = {**CHECKPOINTED, **OTHERS}
UNRECORDED = {"HookOnWhatEachSampleShares": {"place.weight"}}  # names of parameters that cannot be recorded


def fitted(model: nn.Module, **settings: Any) -> EkfacInfluence:
    return EkfacInfluence(model, True, 0.1, loss=LOSS, **settings).fit((X, Y))


def theta_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def outputs(model: nn.Module, theta: Tensor) -> Tensor:
    named = dict(model.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    tensors = {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}
    out: Tensor = functional_call(model, tensors, (X,))
    return out


def hessian_of(model: nn.Module) -> Tensor:
    """Of the mean loss, by torch.func and without the package."""
    found: Tensor = torch.func.hessian(lambda theta: F.cross_entropy(outputs(model, theta), Y))(theta_of(model))
    return found


def gauss_newton_of(model: Plain, columns: Tensor) -> Tensor:
    """Of the mean cross-entropy by some parameters, from the Jacobian of the outputs and diag(p) − p pᵀ."""
    rows = torch.autograd.functional.jacobian(lambda theta: outputs(model, theta), theta_of(model))[..., columns]
    p = torch.softmax(model(X), dim=1).detach()
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nap,nab,nbq->pq", rows, curvature, rows) / len(X)


@pytest.mark.parametrize("name", MODELS)
def test_ekfac_gives_the_plain_models_factors(name: str) -> None:
    own, whole = fitted(MODELS[name]()), fitted(Plain())
    factors, expected = own.influence_factors(X, Y), whole.influence_factors(X, Y)
    lost = torch.cat(
        [torch.full((p.numel(),), n in UNRECORDED.get(name, ())) for n, p in Plain().named_parameters()]
    ).nonzero()[:, 0]
    if len(lost):  # by one dense block of their own
        matrix = gauss_newton_of(Plain(), lost) + 0.1 * torch.eye(len(lost), dtype=torch.float64)
        gradients = whole.loss_gradients(whole.place(X, Y)).rows[:, lost]
        expected[:, lost] = torch.linalg.solve(matrix, gradients.T).T
    torch.testing.assert_close(factors, expected, rtol=1e-8, atol=1e-10)
    train = whole.loss_gradients(whole.place(X, Y)).rows
    torch.testing.assert_close(own.influences(X, Y), expected @ train.T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_ekfac_without_layers_gives_the_plain_models_scores(name: str) -> None:
    own, plain = (fitted(model, recognise=False) for model in (MODELS[name](), Plain()))
    torch.testing.assert_close(own.influences(X, Y), plain.influences(X, Y), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_recorded_is(name: str) -> None:
    own = fitted(MODELS[name]()).layout
    recorded = {parameter for unit in own.units if unit.uses for parameter in unit.parameters}
    everything = {parameter for unit in fitted(Plain()).layout.units if unit.uses for parameter in unit.parameters}
    assert recorded == everything - UNRECORDED.get(name, set())


def test_layers_after_an_operator_that_refuses_are_recorded() -> None:
    risk = EmpiricalRisk(CustomBackward(), LOSS, (X, Y), block_structure="layer_wise").sample
    units = layout_of(risk, (X, Y)).units
    recorded = {parameter for unit in units if unit.uses for parameter in unit.parameters}
    assert recorded == {"middle.2.weight", "middle.2.bias", "place.weight", "head.weight", "head.bias"}
    assert sorted(name for unit in units for name in unit.parameters) == sorted(risk.blocks.shapes)


@pytest.mark.parametrize("model", [*MODELS.values(), CustomBackward])
def test_the_dense_hessian_is_torch_funcs_of_the_plain_model(model: type[Plain]) -> None:
    operator = HessianOperator(EmpiricalRisk(model(), LOSS, (X, Y)))
    torch.testing.assert_close(operator.dense(), hessian_of(Plain()), rtol=1e-8, atol=1e-10)


class Chain(nn.Module):
    """Linear layers alone, whose Hessian is made by their outputs; the middle one may be checkpointed."""

    def __init__(self, inside: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = (nn.Linear(n, m).double() for n, m in ((3, 4), (4, 4), (4, 2)))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inside(self.middle, torch.tanh(self.first(x)))))
        return out


def called(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(layer, x, use_reentrant=False)
    return out


def custom(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = WeightsToo.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out


def hooked(layer: nn.Module, x: Tensor) -> Tensor:
    out = called(layer, x)
    return refuse_other_shapes(out, out.shape)


@pytest.mark.parametrize("inside", [checkpointed, custom, hooked])
def test_the_dense_hessian_of_a_chain_of_layers(inside: Callable[[nn.Module, Tensor], Tensor]) -> None:
    operator = HessianOperator(EmpiricalRisk(Chain(inside), LOSS, (X, Y)))
    torch.testing.assert_close(operator.dense(), hessian_of(Chain(called)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model", [*MODELS.values(), CustomBackward])
def test_direct_influence_is_the_plain_models(model: type[Plain]) -> None:
    own, plain = (DirectInfluence(one(), LOSS, 0.5).fit((X, Y)) for one in (model, Plain))
    torch.testing.assert_close(own.influences(X, Y), plain.influences(X, Y), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_come_back(reentrant: bool) -> None:
    calls: list[Tensor] = []

    def called_again(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sin()

    def backward() -> int:
        calls.clear()
        x = torch.ones(2, requires_grad=True)
        checkpoint(called_again, x, use_reentrant=reentrant).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.ones(2).cos())
        return len(calls)

    before = dict(vars(checkpointing))
    assert backward() == 2
    with without_checkpointing():
        with pytest.raises(KeyError), without_checkpointing():
            raise KeyError
        assert backward() == 1
    assert backward() == 2
    assert dict(vars(checkpointing)) == before
