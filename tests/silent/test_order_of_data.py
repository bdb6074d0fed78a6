"""Checks see samples from all over the data, whatever their order; and the same samples each time they are read."""

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from distinfluence import DaskInfluenceCalculator, DirectInfluence, Objective, Recipe, SequentialInfluenceCalculator
from distinfluence.errors import DistinfluenceError, LossError, NonDeterministicDataError
from distinfluence.model.counter_random import sample_keys
from distinfluence.model.identity.draw import Draw
from distinfluence.scaling.data import sources
from distinfluence.scaling.worker import cache

cross_entropy = nn.functional.cross_entropy
WEIGHTS = torch.tensor([1.0, 5.0, 0.2])


def data(n: int = 300, rare: int | None = None) -> tuple[Tensor, Tensor]:
    """Sorted by class. rare: so many samples of the last two classes each, the rest of the first."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    if rare is None:
        return x, torch.arange(n) * 3 // n
    y = torch.zeros(n, dtype=torch.int64)
    y[-2 * rare :], y[-rare:] = 1, 2
    return x, y


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


class Batchwise(nn.Module):
    """A layer that depends on the batch: standard scores over the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True) if x.shape[0] > 1 else x


def balanced(f: Tensor, y: Tensor) -> Tensor:
    """Weights by how often a class comes in the batch: all the same in a batch of one class."""
    counts = torch.stack([(y == label).sum() for label in range(3)]).clamp_min(1)
    own = cross_entropy(f, y, reduction="none") / counts[y]
    return own.sum() / (1 / counts[y]).sum() + 0 * f.sum()


LOSSES: dict[str, Any] = {
    "partial": lambda: functools.partial(cross_entropy, weight=WEIGHTS),
    "lambda": lambda: lambda f, y: cross_entropy(f, y, weight=WEIGHTS),
    "partial of nll": lambda: functools.partial(nn.functional.nll_loss, weight=WEIGHTS),
    "lambda over a module": lambda: lambda f, y: nn.CrossEntropyLoss(weight=WEIGHTS)(f, y),
    "focal, over the sum of weights": lambda: (
        lambda f, y: (cross_entropy(f, y, reduction="none") * WEIGHTS[y]).sum() / WEIGHTS[y].sum()
    ),
}


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("rare", [None, 1])
@pytest.mark.parametrize("way", ["loader", "pair", "chunks"])
def test_class_weights_that_divide_by_the_batch_are_refused_in_any_order(name: str, rare: int | None, way: str) -> None:
    """Also where a class has one sample in a hundred, so that sixteen random ones would miss it."""
    x, y = data(rare=rare)

    def fit() -> object:
        model = DirectInfluence(net(), LOSSES[name](), 0.1, second_order_mode="ggn")
        if way == "chunks":
            return SequentialInfluenceCalculator(model).fit(x, y, chunk_size=50)
        return model.fit(DataLoader(TensorDataset(x, y), batch_size=100) if way == "loader" else (x, y))

    with pytest.raises(LossError, match=r"weights of the batch|neither the mean"):
        fit()


def test_right_losses_pass_in_any_order() -> None:
    x, y = data()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    for loss in (nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), functools.partial(cross_entropy, label_smoothing=0.1)):
        reports = [
            DirectInfluence(net(), loss, 0.1, second_order_mode="ggn").fit(pair)
            for pair in ((x, y), (x[order], y[order]))
        ]
        assert reports[0].reducer.digest == reports[1].reducer.digest
        assert reports[0].fit_report.remarks == reports[1].fit_report.remarks


def test_the_same_samples_are_drawn_whatever_order_and_batches() -> None:
    x, y = data(rare=2)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    found = []
    for a, b, size in ((x, y, 300), (x, y, 7), (x[order], y[order], 41)):
        batches = list(zip(a.split(size), b.split(size), strict=True))
        draw = sum((Draw.of(batch, i) for i, batch in enumerate(batches)), Draw())
        keys = {int(sample_keys(batches[i])[j]) for i, j in draw.places}
        labels = {int(batches[i][1][j]) for i, j in draw.places}
        found.append((draw.digest, keys, labels))
    assert found[0] == found[1] == found[2]
    assert found[0][2] == {0, 1, 2}
    assert len(found[0][1]) == 16


@pytest.mark.parametrize("change", ["a value", "a sample twice", "targets swapped", "a sample less", "zeros swapped"])
def test_the_digest_sees_one_change_in_ten_thousand_samples(change: str) -> None:
    x = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(10_000) % 2
    other, labels = x.clone(), y.clone()
    if change == "a value":
        other[7_777, 1] = torch.nextafter(other[7_777, 1], torch.tensor(torch.inf))
    elif change == "a sample twice":
        other[5] = other[6]
        labels[5] = labels[6]
    elif change == "targets swapped":
        labels[2], labels[3] = y[3], y[2]
    elif change == "a sample less":
        other, labels = other[1:], labels[1:]
    else:  # powers of two, whose bits are few
        x, other = torch.zeros_like(x), torch.zeros_like(x)
        x[0, 0], x[1, 1] = 1.0, 2.0
        other[0, 1], other[1, 0] = 1.0, 2.0
    assert Draw.of((x, y), 0).digest != Draw.of((other, labels), 0).digest


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples with a random change, drawn where `source` says."""

    def __init__(self, source: str) -> None:
        self.x, self.y = data(40)
        self.source = source
        self.reads = 0

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        flip = {
            "torch": lambda: bool(torch.rand(()) < 0.5),
            "numpy": lambda: np.random.random() < 0.5,
            "random": lambda: random.random() < 0.5,
            "reads": lambda: self.reads % 3 == 0,
        }[self.source]()
        return (self.x[index].flip(0) if flip else self.x[index]), self.y[index]


SOURCES = ["torch", "numpy", "random", "reads"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", ["loader", "chunks", "workers"])
def test_a_data_set_with_random_transforms_is_refused(source: str, way: str, tmp_path: Path, client: Client) -> None:
    model = DirectInfluence(net(), cross_entropy, 0.1, second_order_mode="ggn")
    recipe = Recipe("tests.silent.test_order_of_data:Augmented", {"source": source})

    def fit() -> object:
        if way == "loader":
            return model.fit(DataLoader(Augmented(source), batch_size=10))
        if way == "chunks":
            return SequentialInfluenceCalculator(model).fit(recipe, chunk_size=10)
        return DaskInfluenceCalculator(model, client, scratch=tmp_path).fit(recipe, chunk_size=10)

    with pytest.raises(DistinfluenceError, match="same values for a sample each time"):
        fit()


def noisy() -> tuple[Tensor, Tensor]:
    """Noise that nobody seeded: another data set in each process."""
    x, y = data(40)
    generator = torch.Generator()
    generator.seed()
    return x + torch.randn(x.shape, generator=generator), y


def test_a_data_set_that_each_process_builds_anew_is_refused(tmp_path: Path, client: Client) -> None:
    model = DirectInfluence(net(), cross_entropy, 0.1, second_order_mode="ggn")
    calculator = DaskInfluenceCalculator(model, client, scratch=tmp_path)

    def run() -> object:
        fitted = calculator.fit(Recipe("tests.silent.test_order_of_data:noisy"), chunk_size=2)
        return fitted.to_zarr(tmp_path / "i.zarr", *data(6), progress=False)

    with pytest.raises(DistinfluenceError, match="same values for a sample each time"):
        run()


def test_a_loader_that_is_read_anew_for_each_pass_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distinfluence.model.reducer.KEPT_BYTES", 100)
    monkeypatch.setattr("distinfluence.model.reducer.READ_TWICE", 0)
    model = DirectInfluence(net(), cross_entropy, 0.1, second_order_mode="ggn")
    with pytest.raises(NonDeterministicDataError, match="others the second time"):
        model.fit(DataLoader(Augmented("numpy"), batch_size=10))


def test_reading_twice_leaves_the_callers_random_numbers() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for source in SOURCES[:3]:
        with pytest.raises(NonDeterministicDataError):
            DirectInfluence(net(), cross_entropy, 0.1).fit(DataLoader(Augmented(source), batch_size=10))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_model_that_depends_on_the_batch_is_refused_in_any_order() -> None:
    x, y = data()
    x = x + 3.0 * y.unsqueeze(1)
    with pytest.raises(LossError, match="alone and"):
        DirectInfluence(nn.Sequential(Batchwise(), net()), cross_entropy, 0.1).fit(DataLoader(TensorDataset(x, y), 1))


def kept_in_a_file(path: str) -> tuple[Tensor, Tensor]:
    x, y = data(40)
    return x + float(Path(path).read_text()), y


def test_a_data_set_that_changes_under_a_run_is_refused(tmp_path: Path) -> None:
    """What a process no longer has in memory is compared when it is loaded again."""
    (tmp_path / "shift").write_text("0.0")
    recipe = Recipe("tests.silent.test_order_of_data:kept_in_a_file", {"path": str(tmp_path / "shift")})
    model = DirectInfluence(net(), cross_entropy, 0.1, second_order_mode="ggn")
    fitted = SequentialInfluenceCalculator(model).fit(recipe, chunk_size=10)
    sources._data_sets.clear()
    cache._chunks.clear()
    (tmp_path / "shift").write_text("1e-3")
    with pytest.raises(DistinfluenceError, match="same values for a sample each time"):
        fitted.to_zarr(tmp_path / "i.zarr", *data(6), progress=False)


class Ragged(nn.Module):
    """A mean over the batch, of texts of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        z = self.embed(ids).mean(dim=1)
        out: Tensor = self.head(torch.tanh(z - z.mean(dim=0, keepdim=True)))
        return out


def test_a_model_that_depends_on_the_batch_is_refused_where_all_shapes_differ() -> None:
    batches = [(torch.randint(20, (4, n)), torch.arange(4) % 3) for n in range(3, 203)]
    with pytest.raises(LossError, match="alone and"):
        DirectInfluence(Ragged(), cross_entropy, 0.1).fit(batches)


class ByName(Objective):
    """Class weights over those of the batch, in dict batches."""

    def outputs(self, model: Any, batch: Any) -> Tensor:
        out: Tensor = model(batch["x"])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        labels = batch["label"]
        own = cross_entropy(outputs, labels, weight=WEIGHTS, reduction="none")
        return len(labels) * own / WEIGHTS[labels].sum()


@pytest.mark.parametrize("names", [("x", "label"), ("label", "x")])
def test_classes_are_drawn_by_the_name_of_the_target(names: tuple[str, str]) -> None:
    x, y = data(1000, rare=1)
    both = {"x": x, "label": y}
    with pytest.raises(LossError, match="alone and"):
        DirectInfluence(net(), ByName(), 0.1).fit({name: both[name] for name in names})


class Corrupt(Dataset[tuple[Tensor, Tensor]]):
    """One sample cannot be read; its sampler leaves it out."""

    def __init__(self) -> None:
        self.x, self.y = data(40)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 0:
            raise OSError("corrupt")
        return self.x[index], self.y[index]


def test_a_sampler_may_leave_out_what_cannot_be_read() -> None:
    loader = DataLoader(Corrupt(), batch_size=13, sampler=SubsetRandomSampler(range(1, 40)))
    assert DirectInfluence(net(), cross_entropy, 0.1).fit(loader).fit_report.n_samples == 39
