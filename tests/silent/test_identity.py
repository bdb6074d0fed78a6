"""A fit, a scratch folder and a result belong to a model, an objective, data and settings: all are compared."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from torch import Tensor, nn

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    EkfacInfluence,
    ModelRecipe,
    Objective,
    Recipe,
    RelativeDamping,
    SequentialInfluenceCalculator,
    load_fit,
    save_fit,
)
from distinfluence.app.yaml_file import to_yaml
from distinfluence.cli import main
from distinfluence.errors import FingerprintError, RecipeError
from distinfluence.influence.report import FitReport
from distinfluence.model.identity.probe import Probe
from distinfluence.model.identity.structure import identity, structure
from distinfluence.scaling.stages.run import _own_folder
from tests.silent.dense import Dense

cross_entropy = nn.functional.cross_entropy
GLOBAL = {"weight": 1.0}


def helper(x: Tensor) -> Tensor:
    return torch.tanh(x)


class Slots:
    """Holds a number where nobody sees it from outside."""

    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Net(nn.Module):
    """The same parameters, whatever the forward."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh, factor: float = 1.0, hidden: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.act, self.factor, self.hidden = act, factor, Slots(hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.act(self.first(x)) * self.factor * self.hidden.factor)
        return out


class Squared(Objective):
    """An objective with an argument."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def outputs(self, model: Any, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        found: Tensor = self.scale * (outputs - batch[1].unsqueeze(1)).square().sum(dim=1)
        return found


def weighted(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: cross_entropy(f, y, weight=weight, reduction="sum")


def of_a_global(f: Tensor, y: Tensor) -> Tensor:
    return GLOBAL["weight"] * cross_entropy(f, y)


def samples(n: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), torch.arange(n) % 3


def brier(f: Tensor, y: Tensor) -> Tensor:
    return (torch.softmax(f, dim=1) - nn.functional.one_hot(y, 3)).square().sum(dim=1).mean()


DIRECT = functools.partial(DirectInfluence, second_order_mode="ggn")


@dataclass(frozen=True)
class Given:
    """What a fit is made with."""

    model: nn.Module
    loss: Any
    damping: Any = 0.1
    data: tuple[Tensor, Tensor] = samples()
    method: Callable[..., Any] = DIRECT

    def influence(self) -> Any:
        return self.method(self.model, self.loss, self.damping)


def ekfac(model: nn.Module, loss: Any, damping: Any) -> EkfacInfluence:
    return EkfacInfluence(model, True, damping, loss=loss)


one_other = samples()[0].clone()
one_other[17, 2] += 1e-9
BASE = Given(Net(), nn.CrossEntropyLoss())
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
OTHER: dict[str, tuple[Given, Given, str]] = {
    "damping": (BASE, replace(BASE, damping=0.5), "settings"),
    "damping of ekfac": (replace(BASE, method=ekfac), replace(BASE, method=ekfac, damping=0.5), "settings"),
    "a rule": (replace(BASE, damping=RelativeDamping(0.1)), replace(BASE, damping=RelativeDamping(0.2)), "settings"),
    "a rule in place of a number": (BASE, replace(BASE, damping=RelativeDamping(0.1)), "settings"),
    "loss": (BASE, replace(BASE, loss=brier), "objective"),
    "label smoothing": (BASE, replace(BASE, loss=nn.CrossEntropyLoss(label_smoothing=0.1)), "objective"),
    "an ignored class": (BASE, replace(BASE, loss=nn.CrossEntropyLoss(ignore_index=7)), "objective"),
    "class weights": (
        replace(BASE, loss=nn.CrossEntropyLoss(WEIGHTS, reduction="sum")),
        replace(BASE, loss=nn.CrossEntropyLoss(WEIGHTS.flip(0), reduction="sum")),
        "objective",
    ),
    "a captured tensor": (
        replace(BASE, loss=weighted(WEIGHTS)),
        replace(BASE, loss=weighted(WEIGHTS + 1e-12)),
        "objective",
    ),
    "a constant of a lambda": (
        replace(BASE, loss=lambda f, y: 1.0 * cross_entropy(f, y)),
        replace(BASE, loss=lambda f, y: 2.0 * cross_entropy(f, y)),
        "objective",
    ),
    "a partial": (
        replace(BASE, loss=functools.partial(cross_entropy, label_smoothing=0.1)),
        replace(BASE, loss=functools.partial(cross_entropy, label_smoothing=0.2)),
        "objective",
    ),
    "an objective's argument": (replace(BASE, loss=Squared(1.0)), replace(BASE, loss=Squared(1.1)), "objective"),
    "activation": (BASE, replace(BASE, model=Net(torch.relu)), "forward"),
    "a function of one's own": (BASE, replace(BASE, model=Net(helper)), "forward"),
    "a float": (BASE, replace(BASE, model=Net(factor=1.0 + 1e-9)), "forward"),
    "a number that cannot be seen": (BASE, replace(BASE, model=Net(hidden=1.01)), "losses of the drawn samples differ"),
    "inputs": (BASE, replace(BASE, data=samples(seed=2)), "data"),
    "one input": (BASE, replace(BASE, data=(one_other, samples()[1])), "data"),
    "targets": (BASE, replace(BASE, data=(samples()[0], samples()[1].flip(0))), "data"),
    "fewer samples": (BASE, replace(BASE, data=samples(23)), "23 samples in place of 24"),
}


@pytest.mark.parametrize("name", list(OTHER))
def test_a_fit_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    saved, asked, message = OTHER[name]
    save_fit(saved.influence().fit(saved.data), tmp_path / "fit")
    with pytest.raises(FingerprintError, match=message):
        load_fit(asked.influence(), tmp_path / "fit", asked.data)
    load_fit(saved.influence(), tmp_path / "fit", saved.data)


def test_a_global_that_a_loss_reads_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(BASE, loss=of_a_global)
    save_fit(given.influence().fit(given.data), tmp_path / "fit")
    monkeypatch.setitem(GLOBAL, "weight", 1.5)
    with pytest.raises(FingerprintError, match="objective"):
        load_fit(given.influence(), tmp_path / "fit", given.data)


def test_nothing_is_restored_before_all_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_fit(BASE.influence().fit(BASE.data), tmp_path / "fit")
    monkeypatch.setattr(DirectInfluence, "restore", lambda *_: pytest.fail("restored"))
    monkeypatch.setattr(FitReport, "__init__", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(FingerprintError):
        load_fit(replace(BASE, damping=0.2).influence(), tmp_path / "fit", BASE.data)


@pytest.mark.parametrize("method", [BASE.method, ekfac, functools.partial(ArnoldiInfluence, second_order_mode="ggn")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_is_taken_in_another_order_with_other_threads(method: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, (x, y) = Net().to(dtype), samples(200)
    given = Given(model, nn.CrossEntropyLoss(), RelativeDamping(0.1), (x.to(dtype), y), method)
    save_fit(given.influence().fit(given.data), tmp_path / "fit")
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        load_fit(given.influence(), tmp_path / "fit", (given.data[0][order], y[order]))
    finally:
        torch.set_num_threads(threads)


RESUMED = [name for name in OTHER if "rule" not in name and "sample" not in name]


@pytest.mark.filterwarnings("ignore:the fit that an earlier run left", "ignore:factors in")
@pytest.mark.parametrize("name", RESUMED)
def test_a_result_of_something_else_is_not_gone_on_with(name: str, tmp_path: Path) -> None:
    """Nor is what it left in a scratch folder taken: another result there is that of the definition."""
    test = samples(5, seed=9)
    scratch = tmp_path / "scratch"

    def run(given: Given, path: Path, **settings: Any) -> Any:
        calculator = SequentialInfluenceCalculator(given.influence(), scratch=scratch)
        return calculator.fit(*given.data, chunk_size=8).to_zarr(path, *test, progress=False, **settings)

    began, asked, _ = OTHER[name]
    run(began, tmp_path / "i.zarr")
    before = {file: file.read_bytes() for file in (tmp_path / "i.zarr").rglob("*") if file.is_file()}
    with pytest.raises(FingerprintError, match="expected the same to resume|computes something else"):
        run(asked, tmp_path / "i.zarr", existing="resume")
    assert before == {file: file.read_bytes() for file in (tmp_path / "i.zarr").rglob("*") if file.is_file()}
    run(began, tmp_path / "i.zarr", existing="resume")
    if asked.method is ekfac or isinstance(asked.loss, Squared):
        return
    found = torch.as_tensor(run(asked, tmp_path / "other.zarr").influences[:])
    expected = Dense(asked.model, asked.loss, asked.damping, "ggn").influences(test, asked.data)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)  # stored in float32


@pytest.mark.filterwarnings("ignore:the fit that an earlier run left", "ignore:factors in")
def test_factors_of_another_model_in_a_scratch_folder_are_not_taken(tmp_path: Path) -> None:
    """Of two models that differ where nobody sees it, and whose run was killed before its strips."""
    test, runs = samples(5, seed=9), []
    for number, hidden in enumerate((1.0, 1.5)):
        given = replace(BASE, model=Net(hidden=hidden))
        influence = CgInfluence(given.model, given.loss, 0.1, second_order_mode="ggn")
        calculator = SequentialInfluenceCalculator(influence, scratch=tmp_path / "scratch")
        path = tmp_path / f"{number}.zarr"
        with pytest.MonkeyPatch.context() as patch:
            if number == 0:
                patch.setattr("distinfluence.scaling.stages.run.shutil.rmtree", lambda *_, **__: None)
            runs.append(calculator.fit(*given.data, chunk_size=8).to_zarr(path, *test, progress=False, solve="rows"))
        expected = Dense(given.model, given.loss, 0.1, "ggn").influences(test, given.data)
        torch.testing.assert_close(torch.as_tensor(runs[-1].influences[:]).double(), expected, rtol=1e-4, atol=1e-5)


def recipe(**arguments: Any) -> ModelRecipe:
    return ModelRecipe(Recipe("tests.silent.test_identity:Net", arguments))


def test_a_recipe_that_builds_another_forward_is_refused(client: Client, tmp_path: Path) -> None:
    influence = DirectInfluence(Net(), cross_entropy, 0.1, second_order_mode="ggn")
    for arguments in ({"factor": 1.5}, {"hidden": 1.5}, {"act": nn.SiLU()}):
        calculator = DaskInfluenceCalculator(influence, client, recipe=recipe(**arguments), scratch=tmp_path)
        with pytest.raises(RecipeError, match="computes something else: losses of the drawn samples differ"):
            calculator.fit(*samples(), chunk_size=8)
    DaskInfluenceCalculator(influence, client, recipe=recipe(), scratch=tmp_path).fit(*samples(), chunk_size=8)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "activation": lambda job: job["model"]["factory"].update(arguments={"name": "ReLU"}),
    "loss": lambda job: job.update(loss={"target": "torch.nn:CrossEntropyLoss", "arguments": {"label_smoothing": 0.2}}),
    "damping": lambda job: job["method"].update(hessian_regularization=0.5),
}


def command(*words: object) -> object:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_command_line_refuses_to_go_on_with_something_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {
        "model": {"factory": {"target": "tests.scaling.sources:activated", "arguments": {"name": "Tanh"}}},
        "loss": "torch.nn:CrossEntropyLoss",
        "data": {"train": "tests.scaling.sources:train", "test": "tests.scaling.sources:test"},
        "method": {"name": "direct", "hessian_regularization": 0.01, "second_order_mode": "ggn"},
        "output": "i.zarr",
        "cluster": {"workers": 1},
    }
    (tmp_path / "job.yaml").write_text(to_yaml(job))
    assert command("run", tmp_path / "job.yaml") == 0
    CHANGES[name](job)
    (tmp_path / "job.yaml").write_text(to_yaml(job))
    assert command("run", tmp_path / "job.yaml", "--resume") == 1
    said = capsys.readouterr().err
    assert "was begun with other inputs" in said
    assert {"activation": "structure", "loss": "objective", "damping": "solver"}[name] in said


def test_identity_is_the_same_for_the_same_and_another_for_another() -> None:
    assert structure(Net()) == structure(Net())
    assert structure(Net()) != structure(Net(torch.relu))
    assert set(structure(Net())) == {"", "first", "last"}
    same = [identity(weighted(WEIGHTS)), identity(weighted(WEIGHTS.clone()))]
    assert same[0] == same[1] != identity(weighted(WEIGHTS * 2))
    ring: dict[str, Any] = {"a": 1}
    ring["itself"] = ring
    assert identity(ring) == {"a": 1, "itself": "builtins.dict"}
    assert identity([float("nan"), {2, 1}, torch.float32]) == ["nan", [1, 2], "torch.float32"]


class Counting(Squared):
    """An objective that counts its calls, and keeps its last outputs."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.calls, self.last = 0, torch.zeros(())

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        self.calls += 1
        self.last = outputs.detach()
        return super().losses(outputs, batch)


class Stepping(Net):
    """A model that counts its calls, with caches."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self._cache = 0, torch.zeros(())
        self.last_attention: Tensor | None = None
        self.outputs: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self._cache = x.detach().clone()
        self.last_attention = x.detach() * 2
        self.outputs.append(float(self.steps))
        return super().forward(x)


def test_what_changes_as_it_is_used_is_the_same(tmp_path: Path) -> None:
    used = Given(Stepping(), Counting())
    for _ in range(3):
        used.model(used.data[0])
    save_fit(used.influence().fit(used.data), tmp_path / "fit")
    load_fit(Given(Stepping(), Counting()).influence(), tmp_path / "fit", used.data)
    for number in range(2):
        given = Given(Stepping(), Counting())
        calculator = SequentialInfluenceCalculator(given.influence(), scratch=tmp_path / "scratch")
        calculator.fit(*given.data).to_zarr(
            tmp_path / "i.zarr", *samples(3), progress=False, existing="resume" if number else "refuse"
        )


class Skips(nn.Module):
    """A token that counts as padding: a whole number that matters for few samples."""

    def __init__(self, skip: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.skip = nn.Embedding(50, 4), nn.Linear(4, 3), skip

    def forward(self, ids: Tensor) -> Tensor:
        kept = (ids != self.skip).float().unsqueeze(2)
        out: Tensor = self.head((self.embed(ids) * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1))
        return out


def test_a_whole_number_that_matters_for_few_samples_counts(tmp_path: Path) -> None:
    ids = torch.arange(6000).reshape(1000, 6) * 7 % 48
    ids[0, 1:] = 49
    given = Given(Skips(49), nn.CrossEntropyLoss(), data=(ids, torch.arange(1000) % 3))
    save_fit(given.influence().fit(given.data), tmp_path / "fit")
    with pytest.raises(FingerprintError, match="forward"):
        load_fit(replace(given, model=Skips(-1)).influence(), tmp_path / "fit", given.data)


def test_models_that_compute_something_else_have_folders_of_their_own(tmp_path: Path) -> None:
    probes = [Probe("float64", (x,), (x,), (x,), (x,)) for x in (1.0, 2.0, 1.0 + 1e-9)]
    folders = [_own_folder(tmp_path / "factors", probe) for probe in probes]
    assert folders == [tmp_path / "factors", tmp_path / "factors-2", tmp_path / "factors"]
