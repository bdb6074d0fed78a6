"""Scores layer by layer, as a GPU makes them, here on the CPU: the numbers of gradients that are made whole."""

from typing import Any

import pytest
import torch
from torch import nn

from distinfluence import EkfacInfluence, KrylovInfluence
from distinfluence.influence import scores
from distinfluence.influence.scores import tile_of
from distinfluence.layers import queries
from distinfluence.layers.layout import layout_of
from distinfluence.model.batch import batch_length
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.model.gradients import loss_gradients
from distinfluence.model.objective import as_objective
from distinfluence.model.sample_risk import SampleRisk
from tests.layers.networks import NETWORKS, network
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, build

UNKNOWN = {
    "branching",
    "lstm",
    "a bilinear layer and an LSTM",
}  # less than half of their parameters are in layers that are known


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "by_layers", lambda device: True)


def case_of(name: str) -> Case:
    return network(name) if name in NETWORKS else build(name)


def risk_of(case: Case) -> SampleRisk:
    return SampleRisk(case.model, as_objective(case.loss), ParameterBlocks.of(case.model))


def factors_for(risk: SampleRisk, q: int) -> torch.Tensor:
    return torch.randn(q, risk.size, dtype=risk.dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", [*NETWORKS, *BUILDERS])
def test_scores_and_norms_are_those_of_whole_gradients(name: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if few:  # one query, or two samples' matrices, at a time
        monkeypatch.setattr(queries, "SCORE_BYTES", 1)
        monkeypatch.setattr(queries, "samples_at_once", lambda row, on_cpu: 2)
    case = case_of(name)
    risk = risk_of(case)
    factors, gradients = factors_for(risk, 7), Reference(case).gradients(case.train)
    tile, expected, norms = tile_of(risk, factors, risk.place(case.train)), factors @ gradients.T, gradients.norm(dim=1)
    torch.testing.assert_close(tile.values, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(tile.gradient_norms, norms, rtol=1e-9, atol=1e-9 * float(norms.max()))
    assert (scores.LAYOUTS[risk] is None) == (name in UNKNOWN)


def test_gradients_of_known_layers_are_not_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(risk: SampleRisk, batch: Any) -> Any:
        made.append(batch_length(batch))
        return loss_gradients(risk, batch)

    monkeypatch.setattr(scores, "loss_gradients", counted)
    case = build("mlp classification")
    risk = risk_of(case)
    for _ in range(2):
        tile_of(risk, factors_for(risk, 3), risk.place(case.train))
    assert made == [4, 4]  # some of each batch, to be compared


@pytest.mark.parametrize("n", [1, 2])
def test_batches_of_few_samples(n: int) -> None:
    case = build("mlp classification")
    few = Case(case.model, case.loss, (case.train[0][:n], case.train[1][:n]), case.test)
    risk = risk_of(few)
    factors = factors_for(risk, 3)
    tile, gradients = tile_of(risk, factors, risk.place(few.train)), Reference(few).gradients(few.train)
    torch.testing.assert_close(tile.values, factors @ gradients.T)
    torch.testing.assert_close(tile.gradient_norms, gradients.norm(dim=1))


def test_no_factors_have_no_scores() -> None:
    case = build("embedding and layer norm")
    risk = risk_of(case)
    tile = tile_of(risk, factors_for(risk, 0), risk.place(case.train))
    assert (tile.values.shape, tile.values.dtype) == ((0, 23), torch.float64)
    reference = Reference(case)
    torch.testing.assert_close(tile.gradient_norms, reference.gradients(case.train).norm(dim=1))
    losses = [reference.loss(reference.theta, x[None], y[None]) for x, y in zip(*case.train, strict=True)]
    torch.testing.assert_close(tile.losses, torch.stack(losses).detach())


def test_groups_of_a_convolution_with_one_position_have_their_columns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double().eval()
    data = torch.randn(9, 4, 3, 3).double(), torch.randint(0, 3, (9,))
    case = Case(net, nn.CrossEntropyLoss(), data, data)
    risk = risk_of(case)
    factors = factors_for(risk, 5)
    tile = tile_of(risk, factors, risk.place(data))
    torch.testing.assert_close(tile.values, factors @ Reference(case).gradients(data).T)
    assert scores.LAYOUTS[risk] is not None


def test_targets_in_float64_beside_a_float32_model() -> None:
    case = build("mlp regression", dtype=torch.float32)
    train = case.train[0], case.train[1].double()
    risk = risk_of(case)
    factors = factors_for(risk, 5)
    tile = tile_of(risk, factors, risk.place(train))
    expected = factors @ loss_gradients(risk, risk.place(train)).rows.T
    torch.testing.assert_close(tile.values, expected, rtol=1e-4, atol=1e-4)
    assert tile.values.dtype == torch.float32
    assert {unit.treatment for unit in scores.LAYOUTS[risk].units} == {"kronecker"}


@pytest.mark.parametrize("name", ["mlp classification", "cnn", "embedding and layer norm", "tied weights", "attention"])
def test_layers_are_recognised_in_mixed_precision(name: str) -> None:
    case = build(name, dtype=torch.float32)
    ekfac = EkfacInfluence(case.model, True, 0.1, loss=case.loss)
    assert ekfac.in_mixed_precision().fit([case.train]).layout == ekfac.fit([case.train]).layout
    wide = KrylovInfluence(case.model, case.loss, 0.1).fit([case.train])
    narrow = wide.in_mixed_precision().fit([case.train])
    factors = torch.randn(4, wide.n_parameters, generator=torch.Generator().manual_seed(0))
    expected, found = (model.influences_from_factors(factors, *case.train) for model in (wide, narrow))
    assert scores.LAYOUTS[narrow.risk] == scores.LAYOUTS[wide.risk] is not None
    # bfloat16 rounds each of a handful of passes' steps to 2⁻⁹
    assert 0 < float((found - expected).norm()) < 0.03 * float(expected.norm())


class Moody(nn.Module):
    """Uses its second layer in batches of more than four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.one(x)
        return self.two(h) if x.shape[0] > 4 else h


class Dropping(nn.Module):
    """Sends samples through its layer that have something to send."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[:, 0] > 0
        hidden = torch.zeros_like(x)
        hidden[rows] = self.one(x[rows])
        out: torch.Tensor = self.two(torch.tanh(hidden))
        return out


class Sorting(nn.Module):
    """Sorts the samples around its layer, which is of use to a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = x[:, 0].argsort()
        hidden = self.one(x[order])[order.argsort()]
        out: torch.Tensor = self.two(torch.tanh(hidden))
        return out


@pytest.mark.parametrize("kind", [Moody, Dropping, Sorting])
def test_a_model_that_uses_its_layers_in_another_way_later_gets_whole_gradients(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().double()
    x = torch.randn(10, 3).double()
    x[:, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4, 2.0, -1.0, 1.0, -2.0, 0.5, -0.1])  # the first in order, and positive
    data = x, torch.randint(0, 3, (10,))
    case = Case(net, nn.CrossEntropyLoss(), data, data)
    risk = risk_of(case)
    batch, factors = risk.place(data), factors_for(risk, 2)
    known = risk.only(tuple(name for name in risk.blocks.shapes if kind is not Moody or "two" not in name))
    assert layout_of(known, batch).recorded  # so it seems, from the first samples
    tile = tile_of(risk, factors, batch)
    gradients = loss_gradients(risk, batch).rows
    torch.testing.assert_close(tile.values, factors @ gradients.T)
    torch.testing.assert_close(tile.gradient_norms, gradients.norm(dim=1))
    assert scores.LAYOUTS[risk] is None
