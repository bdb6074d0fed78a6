"""Scores layer by layer, as a GPU makes them, here on the CPU: the numbers of gradients that are made whole."""

from typing import Any

import pytest
import torch
from torch import nn

from distinfluence import EkfacInfluence, KrylovInfluence
from distinfluence.blocks import ParameterBlocks
from distinfluence.gradients import loss_gradients
from distinfluence.influence import scores
from distinfluence.influence.scores import tile_of
from distinfluence.layers import scores as layer_scores
from distinfluence.objective import as_objective
from distinfluence.sample_risk import SampleRisk
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, build


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "by_layers", lambda device: True)


def tile_and_expected(case: Case, q: int) -> tuple[Any, torch.Tensor, torch.Tensor, SampleRisk]:
    risk = SampleRisk(case.model, as_objective(case.loss), ParameterBlocks.of(case.model))
    factors = torch.randn(q, risk.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = Reference(case).gradients(case.train)
    return tile_of(risk, factors, risk.place(case.train)), factors @ gradients.T, gradients.norm(dim=1), risk


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_scores_and_norms_are_those_of_whole_gradients(name: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if few:  # one query, or one sample's matrix, at a time
        monkeypatch.setattr(layer_scores, "SCORE_BYTES", 1)
        monkeypatch.setattr(layer_scores, "samples_at_once", lambda row, gpu: 2)
    tile, expected, norms, risk = tile_and_expected(build(name), 7)
    torch.testing.assert_close(tile.values, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(tile.gradient_norms, norms, rtol=1e-9, atol=1e-9 * float(norms.max()))
    assert (risk.found["scores"] is not None) == (name != "branching")  # of the others at least the head is known


def test_gradients_of_known_layers_are_not_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(*arguments: Any) -> Any:
        raise AssertionError("gradients [n, p] are made")

    monkeypatch.setattr(scores, "loss_gradients", whole)
    tile, expected, _, _ = tile_and_expected(build("mlp classification"), 3)
    assert tile.values.shape == expected.shape


def test_factors_of_convolutions_of_groups_and_of_frozen_layers_have_their_columns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 3)
    )
    net[2].requires_grad_(False)
    data = torch.randn(9, 4, 4, 4).double(), torch.randint(0, 3, (9,))
    case = Case(net.double().eval(), nn.CrossEntropyLoss(), data, data)
    risk = SampleRisk(case.model, as_objective(case.loss), ParameterBlocks.of(case.model))
    factors = torch.randn(5, risk.size).double()
    whole = loss_gradients(risk, risk.place(data)).rows
    torch.testing.assert_close(tile_of(risk, factors, risk.place(data)).values, factors @ whole.T)


@pytest.mark.parametrize("name", ["mlp classification", "cnn", "embedding and layer norm", "tied weights", "attention"])
def test_layers_are_recognised_in_mixed_precision(name: str) -> None:
    case = build(name, dtype=torch.float32)
    ekfac = EkfacInfluence(case.model, True, 0.1, loss=case.loss)
    assert ekfac.in_mixed_precision().fit([case.train]).layout == ekfac.fit([case.train]).layout
    wide = KrylovInfluence(case.model, case.loss, 0.1).fit([case.train])
    narrow = wide.in_mixed_precision().fit([case.train])
    factors = torch.randn(4, wide.n_parameters, generator=torch.Generator().manual_seed(0))
    expected, found = (model.influences_from_factors(factors, *case.train) for model in (wide, narrow))
    assert narrow.risk.found["scores"] == wide.risk.found["scores"]
    # bfloat16 rounds each of a handful of passes' steps to 2⁻⁹
    assert 0 < float((found - expected).norm()) < 0.03 * float(expected.norm())


def test_a_model_that_uses_its_layers_in_another_way_later_gets_whole_gradients() -> None:
    class Moody(nn.Module):
        """Uses its second layer where the first input is large."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h: torch.Tensor = self.one(x)
            return self.two(h) if x.shape[0] > 4 else h

    torch.manual_seed(0)
    net = Moody().double()
    risk = SampleRisk(net, as_objective(nn.CrossEntropyLoss()), ParameterBlocks.of(net))
    batch = risk.place((torch.randn(9, 3).double(), torch.randint(0, 3, (9,))))
    tile = tile_of(risk, torch.ones(2, risk.size).double(), batch)
    assert tile.values.shape == (2, 9)
    assert risk.found["scores"] is None
