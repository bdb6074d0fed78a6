"""Gradients of the call with parameters passed in are compared with the module's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distinfluence import DirectInfluence, EkfacInfluence, InfluenceFunctionModel, Objective
from distinfluence.errors import DerivativeError, InPlaceError

cross_entropy = nn.functional.cross_entropy
DATA = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


class InAList(nn.Module):
    """A weight that is registered once and reached a second time through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.held = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(torch.tanh(self.first(x)) @ self.held[0]))
        return out


class InAClosure(nn.Module):
    """As `InAList`, through a function that has captured it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        weight = self.first.weight
        self.again: Callable[[Tensor], Tensor] = lambda h: torch.tanh(h @ weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.again(torch.tanh(self.first(x))))
        return out


class InAnObject(nn.Module):
    """A whole layer that another object holds, and that is registered, too."""

    class Holder:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.holder = self.Holder(_copy_with_the_weight_of(self.first))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.holder.layer(torch.tanh(self.first(x)))))
        return out


def _copy_with_the_weight_of(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(5, 5)
    other.weight = layer.weight
    return other


class ReadsItself(nn.Module):
    """A norm of the weights that forward takes of another module's list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
        self.all = list(self.body.parameters())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * sum(p.square().sum() for p in self.all)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("make", [InAList, InAClosure, InAnObject, ReadsItself])
@pytest.mark.parametrize("method", ["direct", "ekfac"])
def test_a_parameter_that_is_reached_in_another_way_is_refused(make: type[nn.Module], method: str) -> None:
    model = seeded(make)
    influence: InfluenceFunctionModel = (
        DirectInfluence(model, cross_entropy, 0.1, second_order_mode="ggn")
        if method == "direct"
        else EkfacInfluence(model, True, 0.1)
    )
    with pytest.raises(DerivativeError, match=r"another gradient by '.*weight.*than by its own `backward`"):
        influence.fit(DATA)


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


@pytest.mark.parametrize("through", ["parameters", "a list", "a module"])
def test_a_penalty_inside_the_loss_is_refused(through: str) -> None:
    model = net()
    weights = list(model.parameters())
    penalty: dict[str, Callable[[], Tensor]] = {
        "parameters": lambda: sum((p.square().sum() for p in model.parameters()), torch.zeros(())),
        "a list": lambda: torch.cat([w.flatten() for w in weights]).square().sum(),
        "a module": lambda: model.get_parameter("0.weight").abs().sum(),
    }
    with pytest.raises(DerivativeError, match="inside the loss"):
        DirectInfluence(model, lambda f, y: cross_entropy(f, y) + 0.05 * penalty[through](), 0.1).fit(DATA)


class Scaled(nn.Module):
    """A loss with a trained parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(f, y) * self.log_scale.exp()


def test_parameters_of_the_loss_are_named() -> None:
    remarks = " ".join(DirectInfluence(net(), Scaled(), 0.1).fit(DATA).fit_report.remarks)
    assert "the loss has parameters of its own, which influence does not cover: 'loss.log_scale'" in remarks
    head = nn.Linear(3, 3)
    remarks = " ".join(DirectInfluence(net(), lambda f, y: cross_entropy(head(f), y), 0.1).fit(DATA).fit_report.remarks)
    assert "'head.weight', 'head.bias'" in remarks
    assert "of its own" not in " ".join(DirectInfluence(net(), cross_entropy, 0.1).fit(DATA).fit_report.remarks)


class Unused(nn.Module):
    """A layer that takes no part, one whose output is detached, and units that are dead for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out, self.cut, self.dead = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.last = nn.Linear(5, 3)
        nn.init.constant_(self.dead.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x + self.cut(x).detach() + torch.relu(self.dead(x)).sum(dim=1, keepdim=True))
        return out


def test_parameters_that_no_gradient_reaches_are_named() -> None:
    report = DirectInfluence(seeded(Unused), cross_entropy, 0.1, second_order_mode="ggn").fit(DATA).fit_report
    (remark,) = [r for r in report.remarks if r.startswith("no gradient reaches")]
    for name in ("left_out.weight", "cut.weight", "dead.weight"):
        assert f"'{name}'" in remark or "more" in remark
    assert "last" not in remark
    assert "samples from all over the data" in remark


class Writes(nn.Module):
    """A forward that changes a parameter in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.body.weight.clamp_(-0.1, 0.1)
        out: Tensor = self.body(x)
        return out


def test_a_model_that_writes_to_its_parameters_is_refused_and_stays_as_it_is() -> None:
    model = seeded(Writes)
    weight = model.get_parameter("body.weight")
    before = weight.detach().clone()
    with pytest.raises(InPlaceError, match=r"writes to \['body.weight'\]"):
        DirectInfluence(model, cross_entropy, 0.1).fit(DATA)
    assert torch.equal(weight, before)


def test_one_module_under_two_names_keeps_its_parameters() -> None:
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(5, 3))
    for _ in range(2):
        DirectInfluence(model, cross_entropy, 0.1).fit(DATA)
        assert isinstance(shared.weight, nn.Parameter)


class Measured(Objective):
    """A measurement of the model that the objective has captured, not of the one that it is given."""

    def __init__(self, model: nn.Module) -> None:
        self.captured = [model]

    def outputs(self, model: Any, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch[1], reduction="none")

    def measurements(self, model: Any, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])[:, 0] - self.captured[0](batch[0])[:, 1]
        return out


def test_measurements_are_compared_too() -> None:
    model = net()
    with pytest.raises(DerivativeError, match=r"`objective.measurements` has another gradient"):
        DirectInfluence(model, Measured(model), 0.1, second_order_mode="ggn").fit(DATA)
