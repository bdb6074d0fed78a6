"""Passes in bfloat16 under autocast, sums in float32."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from distinfluence import CgInfluence, DirectInfluence, EkfacInfluence, Objective, SelfInfluences
from distinfluence.errors import SettingError
from distinfluence.influence import InfluenceFunctionModel
from distinfluence.model.batch import Batch
from distinfluence.model.objective import Forward
from tests.reference import Reference
from tests.zoo import Case, build

# bfloat16 rounds to u = 2⁻⁹. Forward and back a layer rounds its weight, its input, its output and the gradients of
# these, six times in all, so that gradients of the zoo's models, of four layers at most, have relative errors up to
# about 24 u in the worst case, where all roundings add up.
U = 2.0**-9
GRADIENT = 24 * U
CURVATURE = 2 * GRADIENT  # products go through the model twice
FLOAT32 = 1e-5  # what float32 alone would not exceed: a larger error shows that autocast was at work


def single(name: str) -> tuple[Case, Case]:
    """A case in float32, and the same in float64."""
    narrow = build(name, dtype=torch.float32)
    wide = Case(
        copy.deepcopy(narrow.model).double(),
        narrow.loss,
        *((x.double() if x.is_floating_point() else x, y.double() if y.is_floating_point() else y)
          for x, y in (narrow.train, narrow.test)),
    )  # fmt: skip
    return narrow, wide


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["mlp classification", "cnn", "embedding and layer norm", "attention", "tied weights"])
def test_gradients_are_float32_with_the_digits_of_bfloat16(name: str) -> None:
    case, wide = single(name)
    influence = DirectInfluence(case.model, case.loss, 0.1).in_mixed_precision()
    gradients = influence.loss_gradients(influence.place(*case.train))
    assert gradients.rows.dtype == gradients.values.dtype == torch.float32
    assert FLOAT32 < distance(gradients.rows, Reference(wide).gradients(wide.train)) < GRADIENT


def test_the_vectorised_way_is_not_given_up_for_rounding() -> None:
    case, _ = single("mlp classification")
    influence = DirectInfluence(case.model, case.loss, 0.1).in_mixed_precision()
    influence.loss_gradients(influence.place(*case.train))
    assert influence.risk.ways.chosen["loss gradients"] == 0


@pytest.mark.parametrize("mode", ["hessian", "ggn"])
def test_products_are_float32_with_the_digits_of_bfloat16(mode: str) -> None:
    case, wide = single("mlp classification")
    influence = DirectInfluence(case.model, case.loss, 0.1, second_order_mode=mode).in_mixed_precision()
    (operator,) = influence.fit(case.train).operators.values()
    dense = operator.matmat(torch.eye(operator.size))
    assert dense.dtype == torch.float32
    assert FLOAT32 < distance(dense, getattr(Reference(wide), mode)()) < CURVATURE


def test_layers_are_recognised_and_factors_summed_in_float32() -> None:
    case, wide = single("mlp classification")
    damping = 1.0
    plain = EkfacInfluence(case.model, True, damping, loss=case.loss)
    mixed = plain.in_mixed_precision().fit(case.train)
    expected = plain.fit(case.train).influences(*case.test, *case.train)
    found = mixed.influences(*case.test, *case.train)
    assert found.dtype == torch.float32
    # to first order: both gradients, and A's error times |A| against the damping
    largest = float(torch.linalg.eigvalsh(Reference(wide).ggn())[-1])
    assert FLOAT32 < distance(found, expected.double()) < 2 * GRADIENT + CURVATURE * largest / damping
    kinds = {tensor.dtype for tensor in mixed.state_arrays().values()}
    assert torch.float32 in kinds
    assert torch.bfloat16 not in kinds


class Output(OrderedDict[str, Tensor]):
    """A dict with attributes, as transformers' models return them."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Returning(nn.Module):
    """Its outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Output:
        return Output(logits=self.layer(x))


class OfLogits(Objective):
    """Squared error of the logits, whose dtype it keeps."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, tuple)
        logits: Tensor = model(batch[0]).logits
        self.seen.add(logits.dtype)
        return logits

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, tuple)
        targets = batch[1]
        assert isinstance(targets, Tensor)
        return ((outputs - targets) ** 2).sum(dim=1)


def test_the_objective_sees_float32_also_in_dicts() -> None:
    objective = OfLogits()
    influence = DirectInfluence(Returning(), objective, 0.1).in_mixed_precision()
    influence.loss_gradients(influence.place(torch.randn(4, 3), torch.randn(4, 2)))
    assert objective.seen == {torch.float32}


def test_no_bound_is_given_for_what_was_rounded() -> None:
    case, _ = single("mlp classification")
    plain = CgInfluence(case.model, case.loss, 0.1, second_order_mode="ggn").fit(case.train)
    mixed = plain.in_mixed_precision().fit(case.train)
    assert (plain.kind_of_bound, mixed.kind_of_bound) == ("rigorous", "none")
    _, report = mixed.influence_factors(*case.test, return_report=True)
    assert report.error_bound is None
    assert any("bfloat16" in remark for remark in mixed.fit_report.remarks)
    assert isinstance(plain.self_influences(*case.test), SelfInfluences)
    with pytest.raises(SettingError, match="mixed precision"):
        mixed.self_influences(*case.test)


def test_it_is_a_part_of_the_settings_and_travels_with_them() -> None:
    case, _ = single("mlp classification")
    plain: InfluenceFunctionModel = CgInfluence(case.model, case.loss, 0.1)
    mixed = plain.in_mixed_precision(torch.float16)
    assert "mixed_precision" not in plain.settings()
    assert mixed.settings()["mixed_precision"] == "float16"
    arrived = pickle.loads(pickle.dumps(mixed.unbound())).bound_to(case.model)
    assert arrived.risk.autocast == torch.float16
    assert arrived.risk.in_double().autocast is None


def test_what_it_cannot_be_is_said() -> None:
    case, wide = single("mlp classification")
    with pytest.raises(SettingError, match=r"must be torch\.bfloat16 or torch\.float16, got torch\.float32"):
        DirectInfluence(case.model, case.loss, 0.1).in_mixed_precision(torch.float32)
    with pytest.raises(SettingError, match=r"evaluated in float32, got torch\.float64"):
        DirectInfluence(wide.model, wide.loss, 0.1).in_mixed_precision()
