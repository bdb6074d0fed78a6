"""Second derivatives are compared with differences of first ones, forward derivatives with reverse ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distinfluence import CgInfluence, DirectInfluence, EkfacInfluence
from distinfluence.errors import DerivativeError, DistinfluenceError, UnsupportedOperatorError
from distinfluence.model.objective import SupervisedObjective
from tests.silent.dense import Dense

cross_entropy = nn.functional.cross_entropy
DATA = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(30) % 3


def saved(ctx: Any) -> Tensor:
    (x,) = ctx.saved_tensors
    assert isinstance(x, Tensor)
    return x


class Once(torch.autograd.Function):
    """x² whose backward is marked to be taken once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * saved(ctx) * grad


class Keeps(torch.autograd.Function):
    """tanh that keeps its result in ctx: the backward of the backward does not know that it depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.tanh(x)
        ctx.out = out
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out: Tensor = ctx.out.detach()
        return grad * (1 - out**2)


class Cuts(torch.autograd.Function):
    """sin whose backward leaves the graph by `.data`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * saved(ctx).data.cos()


class WithoutGradients(torch.autograd.Function):
    """x³ whose backward computes under `no_grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            return grad * 3 * saved(ctx) ** 2


class Forward(torch.autograd.Function):
    """x² with a forward derivative that is half of what it should be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * saved(ctx) * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return saved(ctx) * tangent


class Right(torch.autograd.Function):
    """x² as it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * saved(ctx) * grad


# their backward is linear in its gradient, which is all that J takes of it; or J is found without a wrong `jvp`; or by
# one reverse pass for each output, where the mark says that there is nothing else
RIGHT_ONCE = (Once, Keeps, Cuts, Forward)


class Net(nn.Module):
    def __init__(self, function: Any, detached: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.function, self.detached = nn.Linear(4, 4), nn.Linear(4, 3), function, detached

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.last(self.function.apply(h) if not self.detached else h * h.detach().exp())
        return out


def net(function: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(function).double()


@pytest.mark.parametrize("function", [Once, Keeps, Cuts, WithoutGradients])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_hessian_that_is_not_one_is_refused(function: Any, dtype: torch.dtype) -> None:
    x, y = DATA
    with pytest.raises(DistinfluenceError, match="second_order_mode") as caught:
        DirectInfluence(net(function).to(dtype), cross_entropy, 0.1).fit((x.to(dtype), y))
    assert function.__name__ in str(caught.value)
    assert "empirical_fisher" in str(caught.value)


@pytest.mark.parametrize("function", [Once, Keeps, Cuts, WithoutGradients, Forward, Right])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gauss_newton_matrix_is_right_or_refused(function: Any, dtype: torch.dtype) -> None:
    x, y = DATA
    model = net(function)
    influence = DirectInfluence(net(function).to(dtype), cross_entropy, 0.1, second_order_mode="ggn")
    if function not in (Right, *RIGHT_ONCE):
        with pytest.raises(DistinfluenceError, match="empirical_fisher"):
            influence.fit((x.to(dtype), y))
        return
    influence.fit((x.to(dtype), y))
    expected = Dense(model, cross_entropy, 0.1, "ggn").matrix(*DATA)
    found = influence.operators["full"].dense()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 if dtype == torch.float64 else 1e-3)


def test_a_detached_factor_is_an_own_gradient_but_no_second_derivative() -> None:
    """Straight-through estimates: the gradient that is trained with is none of the forward's."""
    torch.manual_seed(0)
    model = Net(None, detached=True).double()
    with pytest.raises(DerivativeError, match="products with the Hessian are wrong"):
        DirectInfluence(model, cross_entropy, 0.1).fit(DATA)
    DirectInfluence(model, cross_entropy, 0.1, second_order_mode="ggn").fit(DATA)


def focal(f: Tensor, y: Tensor) -> Tensor:
    """A loss whose weights are detached: no second derivative of it is right."""
    own = cross_entropy(f, y, reduction="none")
    return ((1 - (-own).exp()).detach() ** 2 * own).mean()


def test_a_loss_whose_second_derivative_is_cut_is_refused_in_both_modes() -> None:
    for mode, message in (("ggn", "second derivative by the outputs"), ("hessian", "products with the Hessian")):
        with pytest.raises(DerivativeError, match=message):
            DirectInfluence(net(Right), focal, 0.1, second_order_mode=mode).fit(DATA)
    DirectInfluence(net(Right), focal, 0.1, second_order_mode="empirical_fisher").fit(DATA)


@pytest.mark.parametrize("mode", ["ggn", "hessian"])
def test_a_right_operator_gives_right_influences(mode: str) -> None:
    expected = Dense(net(Right), cross_entropy, 0.3, mode).influences(DATA, DATA)
    found = DirectInfluence(net(Right), cross_entropy, 0.3, second_order_mode=mode).fit(DATA).influences(*DATA)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [Once, Keeps, Cuts, WithoutGradients])
def test_methods_that_differentiate_once_take_them_all(function: Any) -> None:
    reference = EkfacInfluence(net(function), True, 0.1, recognise=False).fit(DATA).influences(*DATA)
    assert torch.isfinite(reference).all()
    DirectInfluence(net(function), cross_entropy, 0.1, second_order_mode="empirical_fisher").fit(DATA)
    refined = EkfacInfluence(net(function), True, 0.1, cg_iterations=2)
    if function in RIGHT_ONCE:
        refined.fit(DATA)
        return
    with pytest.raises(DistinfluenceError, match="empirical_fisher"):
        refined.fit(DATA)


class Closed(SupervisedObjective):
    """The loss that is cut, with its second derivative in closed form."""

    def output_curvature(self, outputs: Tensor, batch: Any) -> Any:
        own = cross_entropy(outputs, batch[1], reduction="none")
        p = torch.softmax(outputs, dim=1)
        weights = (1 - (-own).exp()).square().unsqueeze(1)
        return lambda u: weights * p * (u - (p * u).sum(dim=1, keepdim=True))


def test_a_curvature_in_closed_form_is_compared_too() -> None:
    """Not even a closed form of a detached weight is the derivative of the loss that has it."""
    with pytest.raises(DerivativeError, match="second derivative by the outputs"):
        DirectInfluence(net(Right), Closed(focal), 0.1, second_order_mode="ggn").fit(DATA)
    right = Closed(cross_entropy)
    right.output_curvature = SupervisedObjective(nn.CrossEntropyLoss()).output_curvature  # type: ignore[method-assign]
    DirectInfluence(net(Right), right, 0.1, second_order_mode="ggn").fit(DATA)


def test_an_operator_without_any_derivative_is_named() -> None:
    class Zeta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).exp()
            out: Tensor = torch.special.zeta(h + 2, torch.ones_like(h))
            return out

    for influence in (DirectInfluence(Zeta().double(), cross_entropy, 0.1), EkfacInfluence(Zeta().double(), True, 0.1)):
        with pytest.raises(UnsupportedOperatorError, match="zeta"):
            influence.fit(DATA)


@pytest.mark.parametrize("function", [Once, Keeps, Cuts, WithoutGradients, Right])
@pytest.mark.parametrize("mode", ["ggn", "empirical_fisher"])
def test_perturbations_are_right_or_refused(function: Any, mode: str) -> None:
    x, y = DATA
    influence = DirectInfluence(net(function), cross_entropy, 0.3, second_order_mode=mode)
    if mode == "ggn" and function is WithoutGradients:
        with pytest.raises(DerivativeError, match="do not belong together"):
            influence.fit(DATA)
        return
    influence.fit(DATA)
    if function is not Right:
        for _ in range(2):  # what was refused once is refused again
            with pytest.raises(DistinfluenceError, match="mode='perturbation'"):
                influence.influences(x[:2], y[:2], x[:5], y[:5], mode="perturbation")
        return
    found = influence.influences(x[:2], y[:2], x[:5], y[:5], mode="perturbation")
    factors, dense = influence.influence_factors(x[:2], y[:2]), Dense(net(function), cross_entropy, 0.3, "ggn")
    for j in range(4):
        moved = x[:5].clone(), x[:5].clone()
        moved[0][:, j] += 1e-6
        moved[1][:, j] -= 1e-6
        expected = factors @ ((dense.rows(moved[0], y[:5]) - dense.rows(moved[1], y[:5])) / 2e-6).T
        torch.testing.assert_close(found[:, :, j], expected, rtol=1e-5, atol=1e-7)


class Bytes(nn.Module):
    """Images as bytes, which are float32 whatever the weights are; ReLU and pooling, which have kinks everywhere."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last, self.function = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 10), function

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.float() / 255)
        h = self.function.apply(h) if self.function else h
        out: Tensor = self.last(nn.functional.max_pool2d(h.relu(), 2).flatten(1))
        return out


def test_a_hessian_that_float32_and_kinks_leave_uncertain_is_taken_and_said_to_be() -> None:
    data = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8), torch.arange(20) % 10
    for function in (None, Keeps):
        influence = CgInfluence(Bytes(function), cross_entropy, 1.0, second_order_mode="hessian", maxiter=1)
        if function is None:
            remarks = influence.fit(data).fit_report.remarks
            assert any(remark.startswith("second derivatives are symmetric, and could not be") for remark in remarks)
        else:
            with pytest.raises(DerivativeError, match="'Keeps'"):
                influence.fit(data)
