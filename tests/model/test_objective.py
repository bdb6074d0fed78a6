"""Losses as torch has them, taken apart into one value per sample."""

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distinfluence import DirectInfluence, EmpiricalRisk, HessianOperator, Objective
from distinfluence.curvature.hessian import HessianProduct
from distinfluence.errors import DtypeError, LossError, ModelModeError, ShapeError
from distinfluence.model.objective import Forward, SupervisedObjective, as_objective
from tests.reference import Reference
from tests.zoo import Case, build

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
Loss = Callable[[Tensor, Tensor], Tensor]


def case_for(loss: Loss) -> Case:
    """A model with three outputs and the targets that the loss takes."""
    base = build("mlp classification")
    x, y = base.train
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)):
        return Case(base.model, loss, (x, y), base.test)
    binary = isinstance(loss, (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss))
    targets = F.one_hot(y, 3).to(x.dtype) if binary else x[:, :3].tanh()
    return Case(base.model, loss, (x, targets), base.test)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
        nn.MSELoss(),
        nn.MSELoss(reduction="sum"),
        nn.L1Loss(),
        nn.HuberLoss(delta=0.3),
        nn.SmoothL1Loss(reduction="sum"),
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(weight=WEIGHTS),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        nn.MultiMarginLoss(weight=WEIGHTS),
        nn.MultiLabelSoftMarginLoss(weight=WEIGHTS),
        nn.GaussianNLLLoss,
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch vectorises one of them by a loop
def test_per_sample_losses_are_those_of_batches_of_one_and_agree_with_the_training_loss(loss: Any) -> None:
    if isinstance(loss, type):  # a loss of more arguments, wrapped as users do

        def loss(f: Tensor, y: Tensor) -> Tensor:
            return F.gaussian_nll_loss(f, y, torch.full_like(f, 0.5))

    case = case_for(loss)
    x, y = case.train
    risk = EmpiricalRisk(case.model, case.loss, [(x[:9], y[:9]), (x[9:], y[9:])])
    total = float(case.loss(case.model(x), y).detach())
    mean = total / len(x) if getattr(loss, "reduction", "mean") == "sum" else total
    assert risk.value_and_gradient()[0] == pytest.approx(mean, rel=1e-12)
    rows = torch.cat([g.rows for g in risk.sample_gradients()])
    torch.testing.assert_close(rows, Reference(case).gradients(case.train), **EXACT)
    assert bool(risk.reducer.remarks) == (getattr(loss, "reduction", "mean") == "sum")


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_that_divide_by_those_of_the_batch_are_refused(kind: Any) -> None:
    case = build("mlp classification")
    with pytest.raises(LossError, match=f"{kind.__name__} with class weights and reduction 'mean'.*'none' or 'sum'"):
        EmpiricalRisk(case.model, kind(weight=WEIGHTS), case.train)


def test_class_weights_hidden_in_a_function_are_found_in_data_sorted_by_class() -> None:
    """In a batch of one class they cancel, so the samples that are looked at come from all over the batch."""
    case = build("mlp classification")
    y, order = case.train[1].sort()
    assert len(set(y[:8].tolist())) == 1
    with pytest.raises(LossError, match="neither the mean .* nor the sum"):
        EmpiricalRisk(case.model, lambda f, t: F.cross_entropy(f, t, weight=WEIGHTS), (case.train[0][order], y))


def test_padding_that_is_ignored_by_the_mean_over_the_batch_is_found() -> None:
    """A mean over the tokens of all sequences is no mean of per-sequence means, where lengths differ."""

    class PerToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x)
            return out.transpose(1, 2)

    torch.manual_seed(0)
    x, y = torch.randn(5, 6, 4).double(), torch.randint(3, (5, 6))
    EmpiricalRisk(PerToken(), nn.CrossEntropyLoss(), (x, y))
    y[1, 2:] = -100
    with pytest.raises(LossError, match="neither the mean .* nor the sum"):
        EmpiricalRisk(PerToken(), nn.CrossEntropyLoss(), (x, y))


def test_targets_that_broadcast_against_the_outputs_are_refused() -> None:
    """The classic: outputs [n, 1] with targets [n] make an n × n matrix of differences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, often overlooked
        with pytest.raises(ShapeError, match=r"MSELoss.*which broadcast.*\.squeeze\(-1\)"):
            EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), (torch.randn(9, 3), torch.randn(9)))


def branching(f: Tensor, y: Tensor) -> Tensor:
    """Asks for a value on the way, which vmap cannot take."""
    loss = F.cross_entropy(f, y)
    return loss if loss.item() < 100 else loss * 2


def test_a_loss_that_vmap_cannot_take_gives_the_same() -> None:
    case = build("mlp classification")
    ours = HessianOperator(EmpiricalRisk(case.model, branching, case.train)).dense()
    torch.testing.assert_close(ours, Reference(case).matrix("hessian"), **EXACT)


def test_a_loss_that_vmap_cannot_take_works_in_a_process_that_never_checked_it() -> None:
    """A worker gets the objective as it was before the first batch was looked at."""
    case = build("mlp classification")
    risk = DirectInfluence(case.model, branching, 0.1).risk
    (product,) = HessianProduct()(risk, case.train, torch.eye(43).double())
    torch.testing.assert_close(product / 23, Reference(case).matrix("hessian"), **EXACT)


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Pooled(nn.Module):
    """One output for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(
    ("change", "loss", "error", "message"),
    [
        (Tuple, nn.CrossEntropyLoss(), LossError, "one tensor for a loss of .*got tuple.*Subclass `Objective`"),
        (Pooled, nn.CrossEntropyLoss(), ShapeError, r"one row for each target, got outputs \(1, 3\).*\(8,\)"),
        (nn.Identity, lambda f, y: f, LossError, r"one number for a batch, its mean or its sum, got shape \(8, 3\)"),
        (nn.Identity, lambda f, y: f[7, 3], ShapeError, "`loss` cannot take outputs.*index 3 is out of bounds"),
        (nn.Identity, lambda f, y: (f - f.mean(dim=0)).pow(2).mean(), LossError, "neither the mean"),
        (
            lambda: nn.BatchNorm1d(3, track_running_stats=False).double(),
            nn.CrossEntropyLoss(),
            ModelModeError,
            "BatchNorm1d at '1' without running statistics.*track_running_stats=True",
        ),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(
    change: Callable[[], nn.Module], loss: Any, error: type[Exception], message: str
) -> None:
    case = build("mlp classification", n_train=8)
    with pytest.raises(error, match=message):
        EmpiricalRisk(nn.Sequential(case.model, change()).eval(), loss, case.train)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(DtypeError, match=r"`model` must be a `torch\.nn\.Module`, got function"):
        EmpiricalRisk(lambda x: x, nn.MSELoss(), (torch.ones(2, 1), torch.ones(2, 1)))


class Wrong(Objective):
    """Loss and measurement of a shape that is not [n]."""

    def __init__(self, losses: Callable[[Tensor], Tensor], measured: Callable[[Tensor], Tensor]) -> None:
        self._losses, self._measured = losses, measured

    def outputs(self, model: Forward, batch: Any) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return self._losses(outputs)

    def measurements(self, model: Forward, batch: Any) -> Tensor:
        return self._measured(self.outputs(model, batch))


def test_an_objective_must_give_one_value_per_sample() -> None:
    case = build("mlp classification")

    def right(f: Tensor) -> Tensor:
        return f.sum(dim=1)

    for objective, error, message in (
        (Wrong(torch.sum, right), LossError, r"`objective\.losses` must return one loss per sample, \[16\], got \(\)"),
        (Wrong(torch.tanh, right), LossError, "one loss per sample"),
        (Wrong(right, torch.sum), ShapeError, r"`objective\.measurements` must return one value per sample"),
        (Wrong(lambda f: f.sum(dim=1) - f.mean(), right), LossError, "a sample the loss .* alone and"),
    ):
        with pytest.raises(error, match=message):
            EmpiricalRisk(case.model, objective, case.train)
    assert as_objective(objective) is objective


def test_settings_tell_losses_apart_that_give_other_numbers() -> None:
    """They go into the fingerprint by which a run refuses to go on with another loss."""
    losses: list[Loss] = [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="none", weight=WEIGHTS),
        nn.CrossEntropyLoss(reduction="none", weight=2 * WEIGHTS),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        F.cross_entropy,
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        functools.partial(F.cross_entropy, label_smoothing=0.2),
        functools.partial(F.cross_entropy, reduction="sum", weight=WEIGHTS),
    ]
    settings = [json.dumps(SupervisedObjective(loss).settings(), sort_keys=True) for loss in losses]
    assert len(set(settings)) == len(losses)
    assert settings == [json.dumps(SupervisedObjective(loss).settings(), sort_keys=True) for loss in losses]
