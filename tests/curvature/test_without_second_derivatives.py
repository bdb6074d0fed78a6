"""Operators without second derivatives in PyTorch: the Gauss–Newton matrix from first ones, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from distinfluence import (
    AutoInfluence,
    CgInfluence,
    DirectInfluence,
    EmpiricalRisk,
    GGNOperator,
    HessianOperator,
)
from distinfluence.curvature import SecondOrderMode, ggn, operator_class
from distinfluence.errors import UnsupportedOperatorError
from distinfluence.model.batch import Batch
from distinfluence.model.objective import SupervisedObjective

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

N, CLASSES = 7, 3
Y = torch.tensor([0, 1, 2, 0, 1, 2, 2])
X = torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(6, (N, 3), generator=torch.Generator().manual_seed(2))
ROUNDING: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


class Bag(nn.Module):
    def __init__(self, mode: str, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(6, 4, mode=mode).double()
        self.head = nn.Linear(4, classes).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.bag(x)))
        return out


class Between(nn.Module):
    """Two layers with an operator between them."""

    def __init__(self, operator: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operator = operator
        self.first, self.head = nn.Linear(4, 8).double(), nn.Linear(width, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.operator(torch.tanh(self.first(x))).flatten(1))
        return out


class Cube(torch.autograd.Function):
    """x³, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result: Tensor = 3 * ctx.saved_tensors[0] ** 2 * gradients[0]
        return result


class TwiceCube(torch.autograd.Function):
    """x³, with a backward that can, and without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result: Tensor = 3 * ctx.saved_tensors[0] ** 2 * gradients[0]
        return result


def distances(h: Tensor) -> Tensor:
    points = h.view(-1, 4, 2)
    return torch.cdist(points, points.flip(1) + 1)


def pairs(h: Tensor) -> Tensor:
    return torch.stack([F.pdist(points.view(4, 2)) for points in h])


def segments(h: Tensor) -> Tensor:
    return torch.segment_reduce(h.flatten(), "sum", lengths=torch.full((2 * len(h),), 4)).view(-1, 2)


def cubes(h: Tensor) -> Tensor:
    out: Tensor = Cube.apply(h)  # type: ignore[no-untyped-call]
    return out


def twice_cubes(h: Tensor) -> Tensor:
    out: Tensor = TwiceCube.apply(h)  # type: ignore[no-untyped-call]
    return out


def sampled_grid(h: Tensor) -> Tensor:
    image = torch.arange(9.0, dtype=torch.float64).view(1, 1, 3, 3).sin().expand(len(h), -1, -1, -1)
    return F.grid_sample(image, h.view(-1, 2, 2, 2), align_corners=True)


def pooled(h: Tensor) -> Tensor:
    return F.adaptive_max_pool1d(h.unsqueeze(1), 3)


WITHOUT: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "a bag of means": (lambda: Bag("mean"), TOKENS, "embedding_bag"),
    "a bag of sums": (lambda: Bag("sum"), TOKENS, "embedding_bag"),
    "a bag of maxima": (lambda: Bag("max"), TOKENS, "embedding_bag"),
    "cdist": (lambda: Between(distances, 16), X, "cdist"),
    "pdist": (lambda: Between(pairs, 6), X, "pdist"),
    "segment_reduce": (lambda: Between(segments, 2), X, "segment_reduce"),
    "a custom operator": (lambda: Between(cubes, 8), X, "Cube"),
}
WITH: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "an operator without a forward derivative": (lambda: Between(twice_cubes, 8), X),
    "grid_sample": (lambda: Between(sampled_grid, 4), X),
    "adaptive_max_pool1d": (lambda: Between(pooled, 3), X),
}


def jacobian_of(model: nn.Module, x: Tensor) -> Tensor:
    """[n, m, p] of the outputs, from first derivatives of the whole batch."""
    named = dict(model.named_parameters())

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        tensors = {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}
        out: Tensor = functional_call(model, tensors, (x,))
        return out

    theta = torch.cat([p.detach().flatten() for p in named.values()])
    found: Tensor = torch.autograd.functional.jacobian(outputs, theta)
    return found


def gauss_newton_of(model: nn.Module, x: Tensor) -> Tensor:
    """Of the mean cross-entropy: H = diag(p) − p pᵀ in the outputs."""
    rows, p = jacobian_of(model, x), torch.softmax(model(x), dim=1).detach()
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nap,nab,nbq->pq", rows, curvature, rows) / len(x)


def in_batches(x: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[i : i + size], Y[i : i + size]) for i in range(0, N, size)]


@pytest.mark.parametrize("size", [1, 3, N])
@pytest.mark.parametrize("name", WITHOUT)
def test_the_gauss_newton_matrix_needs_first_derivatives_of_the_model_alone(name: str, size: int) -> None:
    make, x, _ = WITHOUT[name]
    operator = GGNOperator(EmpiricalRisk(make(), nn.CrossEntropyLoss(), in_batches(x, size)))
    expected = gauss_newton_of(make(), x)
    torch.testing.assert_close(operator.dense(), expected, **ROUNDING)
    rows = torch.randn(operator.size + 2, operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator.matmat(rows[:2]), rows[:2] @ expected, **ROUNDING)
    torch.testing.assert_close(operator.matmat(rows), rows @ expected, **ROUNDING)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum")])
def test_of_the_squared_error(loss: nn.MSELoss) -> None:
    targets = torch.randn(N, CLASSES, dtype=torch.float64)
    rows = jacobian_of(Bag("mean"), TOKENS)
    scale = 2 / CLASSES if loss.reduction == "mean" else 2.0
    operator = GGNOperator(EmpiricalRisk(Bag("mean"), loss, (TOKENS, targets)))
    torch.testing.assert_close(operator.dense(), scale * torch.einsum("nap,naq->pq", rows, rows) / N, **ROUNDING)


def test_each_block_alone() -> None:
    risk = EmpiricalRisk(Bag("max"), nn.CrossEntropyLoss(), (TOKENS, Y), block_structure="layer_wise")
    expected = gauss_newton_of(Bag("max"), TOKENS)
    for block, columns in risk.blocks.columns.items():
        torch.testing.assert_close(GGNOperator(risk, block).dense(), expected[columns, columns], **ROUNDING)


def test_in_float32() -> None:
    operator = GGNOperator(EmpiricalRisk(Bag("mean").float(), nn.CrossEntropyLoss(), (TOKENS, Y)))
    rows = torch.eye(operator.size)
    expected = gauss_newton_of(Bag("mean"), TOKENS).float()
    torch.testing.assert_close(operator.matmat(rows), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(operator.in_double().matmat(rows.double()).float(), expected, rtol=1e-4, atol=1e-6)


def test_a_jacobian_of_one_sample_at_a_time_and_none_for_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    whole = ggn._jacobian

    def counted(*arguments: Any) -> Tensor:
        found = whole(*arguments)
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(ggn, "_jacobian", counted)
    for make, x in WITH.values():
        GGNOperator(EmpiricalRisk(make(), nn.CrossEntropyLoss(), (x, Y))).dense()
    assert not shapes
    operator = GGNOperator(EmpiricalRisk(Bag("sum"), nn.CrossEntropyLoss(), (TOKENS, Y)))
    operator.matmat(torch.ones(5, operator.size, dtype=torch.float64))
    assert shapes == [(CLASSES, operator.size)] * N


@pytest.mark.parametrize("name", WITH)
def test_operators_that_have_them_are_as_before(name: str) -> None:
    make, x = WITH[name]
    risk = EmpiricalRisk(make(), nn.CrossEntropyLoss(), (x, Y))
    torch.testing.assert_close(GGNOperator(risk).dense(), gauss_newton_of(make(), x), **ROUNDING)
    row = torch.randn(1, GGNOperator(risk).size, dtype=torch.float64)
    assert HessianOperator(risk).matmat(row).isfinite().all()


def test_a_second_derivative_that_is_nan_in_torch() -> None:
    """That of `logcumsumexp` along a vector of zeros (torch 2.13)."""
    model = Between(lambda h: torch.logcumsumexp(h, 1), 8)
    operator = GGNOperator(EmpiricalRisk(model, nn.CrossEntropyLoss(), (X, Y)))
    torch.testing.assert_close(operator.dense(), gauss_newton_of(model, X), **ROUNDING)


@pytest.mark.parametrize("method", [DirectInfluence, CgInfluence, AutoInfluence])
def test_influence_is_that_of_the_dense_matrix(method: Any) -> None:
    influence = method(Bag("mean"), nn.CrossEntropyLoss(), 0.1, second_order_mode="ggn").fit((TOKENS, Y))
    model = Bag("mean")
    p = torch.softmax(model(TOKENS), dim=1).detach() - F.one_hot(Y, CLASSES)
    gradients = torch.einsum("nap,na->np", jacobian_of(model, TOKENS), p)
    matrix = gauss_newton_of(model, TOKENS) + 0.1 * torch.eye(gradients.shape[1], dtype=torch.float64)
    expected = gradients @ torch.linalg.solve(matrix, gradients.T)
    torch.testing.assert_close(influence.influences(TOKENS, Y), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [DirectInfluence, CgInfluence])
@pytest.mark.parametrize("name", WITHOUT)
def test_the_hessian_is_refused_with_the_operators_name(name: str, method: Any) -> None:
    make, x, operator = WITHOUT[name]
    influence = method(make(), nn.CrossEntropyLoss(), 0.1, second_order_mode="hessian")
    with pytest.raises(UnsupportedOperatorError) as refused:
        influence.fit((x, Y))
    message = str(refused.value)
    assert message.startswith("`second_order_mode='hessian'` needs derivatives that PyTorch does not have: ")
    assert f"the second derivative of `{operator}`" in message
    assert message.endswith("Take second_order_mode='ggn' or 'empirical_fisher' instead.")


def test_the_dense_hessian_is_refused() -> None:
    operator = HessianOperator(EmpiricalRisk(Bag("mean"), nn.CrossEntropyLoss(), (TOKENS, Y)))
    with pytest.raises(UnsupportedOperatorError, match="`embedding_bag`"):
        operator.dense()


def test_many_outputs_are_refused() -> None:
    operator = GGNOperator(EmpiricalRisk(Bag("mean", 65), nn.CrossEntropyLoss(), (TOKENS, Y)))
    with pytest.raises(
        UnsupportedOperatorError, match=r"`embedding_bag`.* up to 64 outputs .* 65\. .*='empirical_fisher' instead"
    ):
        operator.dense()


class Steps(nn.Module):
    """Log-probabilities of four symbols at five positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 20).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).view(-1, 5, 4).log_softmax(2)
        return out


def alignment(outputs: Tensor, targets: Tensor) -> Tensor:
    n = len(outputs)
    return F.ctc_loss(outputs.transpose(0, 1), targets, torch.full((n,), 5), torch.full((n,), 2))


def cubic(outputs: Tensor, targets: Tensor) -> Tensor:
    return cubes(outputs - targets).mean()


@pytest.mark.parametrize("mode", ["ggn", "hessian"])
@pytest.mark.parametrize(
    ("model", "loss", "targets", "operator"),
    [
        (Steps(), alignment, torch.tensor([[1, 2]] * N), "`ctc_loss`"),
        (nn.Linear(4, 2).double(), cubic, torch.zeros(N, 2, dtype=torch.float64), "`Cube`"),
    ],
)
def test_a_loss_without_a_second_derivative_leaves_the_empirical_fisher_matrix(
    model: nn.Module, loss: Any, targets: Tensor, operator: str, mode: str
) -> None:
    with pytest.raises(UnsupportedOperatorError) as refused:
        operator_class(SecondOrderMode(mode))(EmpiricalRisk(model, loss, (X, targets))).dense()
    message = str(refused.value)
    assert message.startswith(f"`second_order_mode={mode!r}` needs")
    assert f"the second derivative of {operator}" in message
    assert message.endswith("Take second_order_mode='empirical_fisher' instead.")
    DirectInfluence(model, loss, 0.1, second_order_mode="empirical_fisher").fit((X, targets))


def test_a_bag_before_a_loss_without_a_second_derivative_is_refused_for_the_loss() -> None:
    operator = GGNOperator(EmpiricalRisk(Bag("mean"), cubic, (TOKENS, torch.zeros(N, CLASSES).double())))
    with pytest.raises(UnsupportedOperatorError, match="`Cube`"):
        operator.dense()


class Cubic(SupervisedObjective):
    def output_curvature(self, outputs: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
        assert isinstance(batch, tuple)
        assert isinstance(batch[1], Tensor)
        scale = 6 * (outputs - batch[1]) / outputs[0].numel()
        return lambda u: scale * u


def test_a_closed_form_makes_up_for_it() -> None:
    targets = torch.zeros(N, CLASSES, dtype=torch.float64)
    operator = GGNOperator(EmpiricalRisk(Bag("mean"), Cubic(cubic), (TOKENS, targets)))
    rows, outputs = jacobian_of(Bag("mean"), TOKENS), Bag("mean")(TOKENS).detach()
    expected = torch.einsum("nap,na,naq->pq", rows, 6 * outputs / CLASSES, rows) / N
    torch.testing.assert_close(operator.dense(), expected, **ROUNDING)


def test_other_errors_stay_as_they_are() -> None:
    def failing(h: Tensor) -> Tensor:
        if calls:
            raise KeyError("the model's own")
        return h

    calls: list[None] = []
    for operator in (GGNOperator, HessianOperator):
        calls.clear()
        products = operator(EmpiricalRisk(Between(failing, 8), nn.CrossEntropyLoss(), (X, Y)))
        calls.append(None)
        with pytest.raises(KeyError, match="the model's own"):
            products.matmat(torch.ones(1, products.size, dtype=torch.float64))
