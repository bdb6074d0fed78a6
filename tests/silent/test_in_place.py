"""What a model or a loss does in place is done to copies: parameters, buffers and data of the user stay as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distinfluence import CgInfluence, DirectInfluence, EkfacInfluence, Objective
from distinfluence.errors import InPlaceError
from tests.silent.dense import Dense

cross_entropy = nn.functional.cross_entropy


class First(nn.Module):
    """Something in place before the first layer."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.change, self.body = change, nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        out: Tensor = self.body(x)
        return out


class Bags(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.last = layer, nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.embedding(ids)
        out: Tensor = self.last(torch.tanh(found.mean(dim=1) if found.ndim == 3 else found))
        return out


class Counts(nn.Module):
    """A buffer that is added to in place, and one that is bound anew."""

    calls: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        out: Tensor = self.body(x)
        return out


def _row(x: Tensor) -> None:
    x[:, 0] = 0.5


FIRST: dict[str, Callable[[Tensor], object]] = {
    "relu_": nn.ReLU(inplace=True),
    "sub_": lambda x: x.sub_(0.3),
    "div_": lambda x: x.div_(2.0),
    "clamp_": lambda x: x.clamp_(-0.5, 0.5),
    "index": _row,
    "mul_ of a view": lambda x: x.view(-1).mul_(1.5),
}


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3


@pytest.mark.parametrize("name", list(FIRST))
@pytest.mark.parametrize("mode", ["ggn", "hessian"])
def test_inputs_stay_as_they_are(name: str, mode: str) -> None:
    torch.manual_seed(0)
    model = First(FIRST[name]).double()
    train, test = samples(20, 1), samples(4, 2)
    expected = Dense(model, cross_entropy, 0.1, mode).influences(test, train)
    before = [tensor.clone() for tensor in (*train, *test)]
    influence = DirectInfluence(model, cross_entropy, 0.1, second_order_mode=mode).fit(train)
    found = influence.influences(*test, *train)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # differences are right to about 1e-8
    assert all(torch.equal(a, b) for a, b in zip(before, (*train, *test), strict=True))


@pytest.mark.parametrize("kind", ["embedding", "embedding, norm 1", "frozen embedding", "bag"])
def test_embeddings_with_a_largest_norm_stay_as_they_are(kind: str) -> None:
    torch.manual_seed(0)
    norm_type = 1.0 if "norm 1" in kind else 2.0
    kind_of = nn.EmbeddingBag if kind == "bag" else nn.Embedding
    layer = kind_of(7, 3, max_norm=1.0, norm_type=norm_type)
    model = Bags(layer.requires_grad_(kind != "frozen embedding")).double()
    ids = torch.arange(60).reshape(20, 3) * 5 % 7
    train, test = (ids, torch.arange(20) % 3), (ids[:3], torch.tensor([0, 1, 1]))
    with torch.no_grad():
        settled = Bags(nn.Embedding(7, 3)).double()  # what torch differentiates: the weights as they are after a call
        settled.load_state_dict(model.state_dict())
        torch.embedding_renorm_(settled.embedding.weight, torch.arange(7), 1.0, norm_type)
    settled.embedding.requires_grad_(kind != "frozen embedding")
    expected = Dense(settled, cross_entropy, 0.1, "ggn").influences(test, train)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    influence = DirectInfluence(model, cross_entropy, 0.1, second_order_mode="ggn").fit(train)
    for _ in range(2):
        torch.testing.assert_close(influence.influences(*test, *train), expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    EkfacInfluence(model, True, 0.1).fit(train).influences(*test, *train)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_buffers_stay_as_they_are() -> None:
    model = Counts().double()
    train = samples(20, 1)
    DirectInfluence(model, cross_entropy, 0.1).fit(train).influences(*train)
    assert float(model.calls) == float(model.seen) == 0.0


def _shifted(f: Tensor, y: Tensor) -> Tensor:
    return f.sub(y.mul_(2.0)).square().mean()


def _absolute(f: Tensor, y: Tensor) -> Tensor:
    return (f - y.abs_()).square().mean()


def _filled(f: Tensor, y: Tensor) -> Tensor:
    y[y > 0.5] = 0.5
    return (f - y).square().mean()


@pytest.mark.parametrize("loss", [_shifted, _absolute, _filled])
def test_targets_stay_as_they_are(loss: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    x, _ = samples(20, 1)
    y = torch.randn(20, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = y.clone()
    expected = Dense(model, loss, 0.1, "hessian").influences((x, y), (x, y))
    found = DirectInfluence(model, loss, 0.1).fit((x, y)).influences(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(y, before)


class Padded(nn.Module):
    """Token ids with padding; the head is the embedding again, or has weights of its own."""

    def __init__(self, tied: str) -> None:
        super().__init__()
        self.embed, self.lin, self.tied = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 3), tied
        self.head = nn.Linear(3, 5, bias=False)
        nn.init.normal_(self.embed.weight)
        if tied == "one parameter":
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.lin(self.looked_up(ids).mean(dim=1)))
        out: Tensor = nn.functional.linear(h, self.embed.weight) if self.tied == "a function" else self.head(h)
        return out

    def looked_up(self, ids: Tensor) -> Tensor:
        found: Tensor = self.embed(ids)
        return found


class HeldByHand(Padded):
    """The row that is looked up for padding is a number, whatever becomes of the parameter."""

    def __init__(self, tied: str) -> None:
        super().__init__(tied)
        self.register_buffer("held", self.embed.weight.detach()[0].clone())

    def looked_up(self, ids: Tensor) -> Tensor:
        return torch.where((ids == 0).unsqueeze(2), self.held, nn.functional.embedding(ids, self.embed.weight))


@pytest.mark.parametrize("tied", ["no", "one parameter", "a function"])
@pytest.mark.parametrize("mode", ["hessian", "ggn"])
def test_rows_that_an_embedding_holds_fixed_do_not_couple_to_others(tied: str, mode: str) -> None:
    """The gradient by what `padding_idx` looks up is zero by definition, though the loss depends on it."""
    models = []
    for kind in (Padded, HeldByHand):
        torch.manual_seed(0)
        models.append(kind(tied).double())
    ids = torch.arange(60).reshape(20, 3) * 3 % 5
    train, test = (ids, torch.arange(20) % 5), (ids[:3], torch.tensor([0, 1, 1]))
    dense = Dense(models[1], cross_entropy, 0.1, mode)
    methods: tuple[tuple[Any, dict[str, Any]], ...] = ((DirectInfluence, {}), (CgInfluence, {"rtol": 1e-10}))
    for method, settings in methods:
        influence = method(models[0], cross_entropy, 0.1, second_order_mode=mode, **settings)
        influence.fit(train)
        torch.testing.assert_close(influence.operators["full"].dense(), dense.matrix(*train), rtol=1e-5, atol=1e-7)
        if mode == "ggn":
            found = influence.influences(*test, *train)
            torch.testing.assert_close(found, dense.influences(test, train), rtol=1e-5, atol=1e-6)


class Changes(nn.Module):
    """A layer that changes its weight, or a buffer, by `.data`."""

    mean: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = nn.Linear(4, 3), how
        self.register_buffer("mean", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight
        if self.how == "in place":
            weight.data.clamp_(min=0)
        elif self.how == "anew":
            weight.data = torch.renorm(weight.data, 2, 0, 0.3)
        else:
            self.mean.data.mul_(0.9)
        out: Tensor = self.body(x)
        return out


@pytest.mark.parametrize("how", ["in place", "anew", "buffer"])
def test_writes_through_data_are_noticed(how: str) -> None:
    model = Changes(how).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    influence = DirectInfluence(model, cross_entropy, 0.1)
    if how == "buffer":
        influence.fit(samples(20, 1)).influences(*samples(3, 2), *samples(20, 1))
    else:
        with pytest.raises(InPlaceError, match="body.weight"):
            influence.fit(samples(20, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Masks(Objective):
    """Leaves a class out by writing to the labels."""

    def outputs(self, model: Any, batch: Any) -> Tensor:
        out: Tensor = model(batch["x"])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        labels = batch["labels"]
        labels[labels == 2] = -100
        return cross_entropy(outputs, labels, reduction="none")


def test_an_objective_that_writes_to_its_batch_is_refused_and_the_data_stay() -> None:
    x, y = samples(20, 1)
    before = y.clone()
    with pytest.raises(InPlaceError, match="labels"):
        DirectInfluence(nn.Linear(4, 3).double(), Masks(), 0.1).fit({"x": x, "labels": y})
    assert torch.equal(y, before)
