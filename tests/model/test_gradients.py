"""Gradients of single samples against plain autograd, and a model that stays as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distinfluence import DirectInfluence, EmpiricalRisk, Objective
from distinfluence.errors import (
    DtypeError,
    EmptyDataError,
    LossError,
    ModelModeError,
    NonDeterministicModelError,
    NonFiniteError,
    ShapeError,
)
from distinfluence.model import gradients as gradients_module
from distinfluence.model.batch import Batch
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.model.gradients import loss_gradients, measurement_gradients, mixed_gradients
from distinfluence.model.objective import Forward, as_objective
from distinfluence.model.sample_risk import SampleRisk
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, build

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # the same sums in another order, in float64


def sample_risk(case: Case, structure: Any = "full") -> SampleRisk:
    return SampleRisk(case.model, as_objective(case.loss), ParameterBlocks.of(case.model, structure))


@pytest.mark.parametrize("name", BUILDERS)
def test_per_sample_gradients_are_those_of_autograd(name: str) -> None:
    case = build(name)
    gradients = loss_gradients(sample_risk(case), case.train)
    torch.testing.assert_close(gradients.rows, Reference(case).gradients(case.train), **EXACT)
    torch.testing.assert_close(gradients.norms, gradients.rows.norm(dim=1), **EXACT)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "embedding and layer norm"])
def test_mixed_gradients_are_those_of_autograd(name: str) -> None:
    case = build(name, n_train=5)
    rows = torch.randn(3, case.n_parameters, dtype=torch.float64)
    ours = mixed_gradients(sample_risk(case), case.train, rows)
    reference = Reference(case)
    for j, (x, y) in enumerate(zip(*case.train, strict=True)):
        jacobian = torch.autograd.functional.jacobian(lambda v, y=y: reference._input_gradient(v, y), x[None])
        torch.testing.assert_close(ours[:, j], torch.tensordot(rows, jacobian[:, 0], dims=1), **EXACT)


@pytest.mark.parametrize("name", ["mlp classification", "attention", "tied weights"])
def test_the_loop_for_models_that_vmap_cannot_take_gives_the_same(name: str) -> None:
    case = build(name)
    risk, looped = sample_risk(case), sample_risk(case)
    rows = torch.randn(2, case.n_parameters, dtype=torch.float64)
    looped.ways.chosen = {"loss gradients": 1, "mixed gradients": 1}
    torch.testing.assert_close(loss_gradients(risk, case.train).rows, loss_gradients(looped, case.train).rows, **EXACT)
    torch.testing.assert_close(
        mixed_gradients(risk, case.train, rows), mixed_gradients(looped, case.train, rows), **EXACT
    )


def test_the_loop_is_chosen_only_where_it_must_be() -> None:
    for name, choice in (("mlp classification", 0), ("branching", 1), ("lstm", 1)):
        case = build(name)
        risk = sample_risk(case)
        loss_gradients(risk, case.train)
        assert risk.ways.chosen == {"loss gradients": choice}


class Late(nn.Module):
    """Takes another way for one sample, and asks for its value only then: the first samples do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        if x.shape[0] == 4:
            return torch.stack([row * 2 if row.sum().item() > 0 else row for row in out])
        return out


def test_a_batch_that_fails_the_chosen_way_takes_the_other() -> None:
    """Whether a model can be vectorised is found out on the first batch; a later one may be of another kind."""
    x = torch.randn(4, 3).double()
    risk = SampleRisk(Late().eval(), as_objective(nn.MSELoss()), ParameterBlocks.of(Late()))
    rows = torch.ones(2, 8).double()
    mixed_gradients(risk, (x[:2], torch.zeros(2, 2).double()), rows)
    assert risk.ways.chosen == {"mixed gradients": 0}
    ours = mixed_gradients(risk, (x, torch.zeros(4, 2).double()), rows)
    risk.ways.chosen["mixed gradients"] = 1
    torch.testing.assert_close(ours, mixed_gradients(risk, (x, torch.zeros(4, 2).double()), rows), **EXACT)


def test_a_custom_order_of_parameters_is_the_order_of_the_columns() -> None:
    case = build("mlp classification")
    risk = sample_risk(case, {"late": ["2.bias", "0.bias"]})
    names = [name for name, _ in case.model.named_parameters()]
    sizes = [p.numel() for _, p in case.model.named_parameters()]
    parts = dict(zip(names, Reference(case).gradients(case.train).split(sizes, dim=1), strict=True))
    torch.testing.assert_close(
        loss_gradients(risk, case.train).rows, torch.cat([parts["2.bias"], parts["0.bias"]], dim=1), **EXACT
    )


def test_the_mean_loss_and_its_gradient_are_over_samples_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_module, "GRADIENT_BYTES", 3 * 43 * 8)  # micro-batches of three samples
    case = build("mlp classification")
    x, y = case.train
    risk = EmpiricalRisk(case.model, case.loss, [(x[:20], y[:20]), (x[20:], y[20:])])
    value, gradient = risk.value_and_gradient()
    assert value == pytest.approx(case.loss(case.model(x), y).item(), rel=1e-12)
    torch.testing.assert_close(gradient, Reference(case).gradients(case.train).mean(dim=0), **EXACT)


@pytest.mark.parametrize(
    ("row", "on_cpu", "expected"),
    [
        (4, True, 2**23),  # 32 MiB of small gradients
        (2**18, True, 128),  # the largest of which 32 MiB hold enough
        (2**18 + 4, True, 256),  # or as many as products need
        (2**21, True, 128),  # or as many as there may be
        (200_000, True, 160),  # a multiple of 16
        (2**27, True, 2),
        (2**40, True, 1),
        (2**20, False, 1024),  # a gibibyte on a GPU
        (200_000, False, 5360),
        (2**40, False, 1),
    ],
)
def test_samples_at_once_fill_what_is_reused_or_what_there_is(row: int, on_cpu: bool, expected: int) -> None:
    assert gradients_module.samples_at_once(row, on_cpu) == expected


@pytest.mark.parametrize("fits", [3, 1, 0])
def test_where_a_gpu_has_no_room_for_so_many_rows_half_as_many_are_taken(
    fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def vmap_with_little_memory(of_one: Any, in_dims: Any, chunk_size: int) -> Any:
        tried.append(chunk_size)
        if chunk_size > fits:
            raise torch.OutOfMemoryError("no room")
        return torch.func.vmap(of_one, in_dims=in_dims, chunk_size=chunk_size)

    risk = sample_risk(build("mlp classification"))
    monkeypatch.setattr(gradients_module, "vmap", vmap_with_little_memory)
    monkeypatch.setattr(risk, "device", torch.device("meta"))  # a GPU, as far as its size is asked for
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    twice = gradients_module.over_rows(risk, lambda row: 2 * row, 0)
    rows = torch.randn(14, 5)
    if not fits:
        with pytest.raises(torch.OutOfMemoryError):
            twice(rows)
        assert tried[1:] == [7, 3, 1]
        return
    torch.testing.assert_close(twice(rows), 2 * rows)
    torch.testing.assert_close(twice(rows), 2 * rows)
    assert tried[1:] == [7, 3, *([1] if fits == 1 else []), fits]  # found once


class Margin(Objective):
    """Batches as dicts; trains on cross-entropy, asks for the margin of the right class."""

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        outputs: Tensor = model(batch["x"])
        return outputs

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["label"], Tensor)
        return nn.functional.cross_entropy(outputs, batch["label"], reduction="none")

    def measurements(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["label"], Tensor)
        outputs = self.outputs(model, batch)
        right = outputs.gather(1, batch["label"][:, None])[:, 0]
        return right - outputs.mean(dim=1)


def test_an_objective_takes_dict_batches_and_asks_another_question_of_the_query() -> None:
    case = build("mlp classification")
    risk = SampleRisk(case.model, Margin(), ParameterBlocks.of(case.model))
    batch = risk.place({"x": case.train[0], "label": case.train[1]})
    torch.testing.assert_close(loss_gradients(risk, batch).rows, Reference(case).gradients(case.train), **EXACT)
    margin = Case(case.model, lambda f, y: (f[:, y[0]] - f.mean(dim=1)).sum(), case.train, case.test)
    measured = measurement_gradients(risk, batch)
    torch.testing.assert_close(measured.rows, Reference(margin).gradients(case.train), **EXACT)


class CausalLanguageModelling(Objective):
    """Next-token loss of each sequence, for Hugging Face batches; padding has the label -100."""

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, :-1]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["labels"], Tensor)
        targets = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(dim=1)


def test_a_hugging_face_model_takes_its_own_batches() -> None:
    from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6)).double().eval()
    ids, mask = torch.randint(11, (5, 6)), torch.ones(5, 6, dtype=torch.int64)
    mask[1, 4:], mask[4, 3:] = 0, 0  # two sequences are shorter
    labels = torch.where(mask == 1, ids, -100)
    whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batches = [
        BatchEncoding({name: tensor[part] for name, tensor in whole.items()}) for part in (slice(3), slice(3, 5))
    ]
    parameters = dict(model.named_parameters())
    names = ["transformer.ln_f.weight", "transformer.ln_f.bias", "transformer.h.0.ln_1.weight"]
    rows = []
    for i, length in enumerate((6, 4, 6, 6, 3)):  # each sequence alone, cut where its padding begins
        logits = model(ids[i : i + 1, :length]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[i, 1:length], reduction="sum")
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))]))
    risk = EmpiricalRisk(model, CausalLanguageModelling(), batches)
    assert risk.blocks.coverage == 1.0  # the head is the embedding's weight, counted once
    torch.testing.assert_close(torch.cat([g.rows for g in risk.sample_gradients()]), torch.stack(rows), **EXACT)

    settings: dict[str, Any] = {"block_structure": {"norms": names}, "second_order_mode": "empirical_fisher"}
    influence = DirectInfluence(model, CausalLanguageModelling(), 0.1, **settings).fit(batches)
    sizes = [p.numel() for p in parameters.values()]
    by_name = dict(zip(parameters, torch.stack(rows).split(sizes, dim=1), strict=True))
    norms = torch.cat([by_name[name] for name in names], dim=1)
    matrix = norms.T @ norms / 5 + 0.1 * torch.eye(norms.shape[1]).double()
    expected = norms @ torch.linalg.solve(matrix, norms.T)
    torch.testing.assert_close(influence.influences(whole), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "scale"),
    [(nn.MSELoss(reduction="sum"), 2.0), (nn.MSELoss(), 1.0), (lambda f, y: ((f - y) ** 2).mean(), 1.0)],
)
def test_a_loss_that_sums_over_the_batch_is_detected_and_said(loss: Any, scale: float) -> None:
    case = build("mlp regression")
    risk = EmpiricalRisk(case.model, loss, case.train)
    assert bool(risk.reducer.remarks) == (scale == 2.0)
    expected = scale * Reference(case).gradients(case.train)  # two outputs: the sum of a sample is twice its mean
    torch.testing.assert_close(next(risk.sample_gradients()).rows, expected, **EXACT)


def test_a_loss_without_reduction_gives_one_value_per_sample() -> None:
    case = build("mlp classification")
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double(), reduction="none")
    risk = EmpiricalRisk(case.model, weighted, case.train)
    scale = torch.tensor([1.0, 2.0, 3.0]).double()[case.train[1]][:, None]
    torch.testing.assert_close(
        next(risk.sample_gradients()).rows, scale * Reference(case).gradients(case.train), **EXACT
    )
    regression = build("mlp regression")
    with pytest.raises(LossError, match="reduction='none'.*one value per sample"):
        EmpiricalRisk(regression.model, nn.MSELoss(reduction="none"), regression.train)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + torch.randn(3, dtype=torch.float64)
        return out


class Mixing(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x - x.mean(dim=0))
        return out


def _bad(change: Callable[[Case], tuple[Any, ...]]) -> None:
    case = build("mlp classification")
    model, loss, data = change(case)
    EmpiricalRisk(model, loss, data)


def _with_nan(case: Case) -> Tensor:
    x = case.train[0].clone()
    x[4, 1] = torch.nan
    return x


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: (c.model, c.loss, (c.train[0], c.train[1][:-1])), ShapeError, "must have as many samples"),
        (lambda c: (c.model, c.loss, (c.train[0], c.train[1].double())), DtypeError, "targets `y` torch.float64"),
        (lambda c: (c.model, c.loss, (c.train[0].float(), c.train[1])), DtypeError, "cannot take this batch"),
        (lambda c: (c.model, c.loss, (c.train[0][:, :2], c.train[1])), ShapeError, r"float64 \[16, 2\]"),
        (lambda c: (c.model, c.loss, (_with_nan(c), c.train[1])), NonFiniteError, r"`batch\[0\]`.*samples \[4\]"),
        (lambda c: (c.model, c.loss, (c.train[0][:0], c.train[1][:0])), EmptyDataError, "at least one sample"),
        (lambda c: (c.model, c.loss, []), EmptyDataError, "at least one sample"),
        (lambda c: (c.model, c.loss, iter([c.train])), DtypeError, "generator in a list"),
        (
            lambda c: (c.model, c.loss, [(c.train[0], ["a"] * 23)]),
            DtypeError,
            r"`data\[0\]\[1\]\[0\]`.*got str.*as numbers",
        ),
        (lambda c: (c.model, c.loss, [c.train[0]]), ShapeError, r"pair \(x, y\)"),
        (
            lambda c: (nn.Sequential(c.model, nn.Dropout()).train(), c.loss, c.train),
            ModelModeError,
            r"Dropout.*eval\(\)",
        ),
        (
            lambda c: (nn.Sequential(c.model, nn.BatchNorm1d(3).double()).train(), c.loss, c.train),
            ModelModeError,
            "BatchNorm1d at '1'",
        ),
        (lambda c: (Noisy().eval(), c.loss, c.train), NonDeterministicModelError, "random numbers out of `forward`"),
        (lambda c: (Mixing().eval(), c.loss, c.train), LossError, "alone and .* within its batch"),
        (lambda c: (c.model, nn.CrossEntropyLoss, c.train), LossError, r"Pass `CrossEntropyLoss\(\)`"),
        (lambda c: (c.model, "mse", c.train), LossError, "callable"),
        (
            lambda c: (c.model, nn.CrossEntropyLoss(weight=torch.ones(3).double()), c.train),
            LossError,
            "class weights and reduction 'mean'",
        ),
        (
            lambda c: (c.model, lambda f, y: nn.functional.cross_entropy(f, y) ** 2, c.train),
            LossError,
            "neither the mean .* nor the sum",
        ),
        (lambda c: (c.model, lambda f, y: (f.sum() - 1e3).sqrt(), c.train), NonFiniteError, "`loss` must be finite"),
    ],
)
def test_bad_input_is_refused_at_once_with_a_remedy(change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _bad(change)


def test_a_gradient_that_is_not_finite_names_its_sample() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [0.0], [2.0]]).double()
    risk = EmpiricalRisk(model, lambda f, y: (f**2).sqrt().sum(), (x, torch.zeros(3, 1)))  # √(f²): 0/0 at zero
    with pytest.raises(NonFiniteError, match=r"loss gradients of samples \[1\]"):
        list(risk.sample_gradients())


def test_token_ids_have_no_derivative() -> None:
    case = build("embedding and layer norm")
    with pytest.raises(DtypeError, match="floating-point input.*embeddings"):
        mixed_gradients(sample_risk(case), case.train, torch.ones(1, case.n_parameters).double())


def test_dropout_that_is_switched_off_may_be_in_train_mode() -> None:
    case = build("mlp classification")
    EmpiricalRisk(nn.Sequential(case.model, nn.Dropout(0.0)).train(), case.loss, case.train)
