"""All checks of a fit together cost at most twelve gradients of sixteen samples, and are on by default."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distinfluence import DirectInfluence, EkfacInfluence
from distinfluence.model.gradients import loss_gradients
from distinfluence.model.reducer import LocalReducer


def cnn() -> nn.Module:
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10)), (30,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        (1, 10, 10),
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(80, 10)
        ).eval(),
        (5, 16),
    ),
}


def flops(call: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("mode", ["hessian", "ggn", "empirical_fisher", "ekfac"])
def test_all_checks_cost_at_most_twelve_gradients(name: str, mode: str) -> None:
    make, shape = MODELS[name]
    model = make()
    data = torch.randn(64, *shape), torch.arange(64) % 10
    influence = (
        EkfacInfluence(model, True, 0.1)
        if mode == "ekfac"
        else DirectInfluence(model, nn.CrossEntropyLoss(), 0.1, second_order_mode=mode)
    )
    few = influence.risk.place((data[0][:16], data[1][:16]))
    loss_gradients(influence.risk, few)  # what is chosen once is not counted
    one = flops(lambda: loss_gradients(influence.risk, few))
    reducer: list[LocalReducer] = []
    first = flops(lambda: reducer.append(LocalReducer(influence.risk, data)))
    found = first + flops(lambda: influence.check(reducer[0].drawn))
    assert one <= found <= 12 * one


def test_checks_are_made_by_a_fit() -> None:
    make, shape = MODELS["mlp"]
    influence = DirectInfluence(make(), nn.CrossEntropyLoss(), 0.1).fit(
        (torch.randn(64, *shape), torch.arange(64) % 10)
    )
    assert influence.reducer.checked is not None


def test_a_reducer_that_another_fit_has_checked_is_checked_for_this_one() -> None:
    make, shape = MODELS["mlp"]
    model = make()
    first = DirectInfluence(model, nn.CrossEntropyLoss(), 0.1, second_order_mode="empirical_fisher")
    reducer = LocalReducer(first.risk, (torch.randn(64, *shape), torch.arange(64) % 10))
    for mode in ("empirical_fisher", "ggn", "hessian"):
        DirectInfluence(model, nn.CrossEntropyLoss(), 0.1, second_order_mode=mode).fit(reducer)
        assert reducer.checked is not None
        assert reducer.checked.products == mode
