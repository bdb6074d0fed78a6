"""Which parameters are covered, in which order, and which belong together."""

from typing import Any

import pytest
import torch
from torch import nn

from distinfluence.errors import (
    DtypeError,
    EmptyDataError,
    NonFiniteError,
    ParameterBlockError,
    SettingError,
    UnsupportedModelError,
)
from distinfluence.model.blocks import ParameterBlocks
from tests.zoo import Tied, build


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


@pytest.mark.parametrize(
    ("structure", "names"),
    [
        ("full", {"full": ("0.weight", "0.bias", "2.weight", "2.bias")}),
        ("layer_wise", {"0": ("0.weight", "0.bias"), "2": ("2.weight", "2.bias")}),
        ("parameter_wise", {n: (n,) for n in ("0.weight", "0.bias", "2.weight", "2.bias")}),
        (
            {"biases": ["2.bias", "0.bias"], "first": ["0.weight"]},
            {"biases": ("2.bias", "0.bias"), "first": ("0.weight",)},
        ),
    ],
)
def test_each_structure_groups_the_parameters(structure: Any, names: dict[str, tuple[str, ...]]) -> None:
    assert ParameterBlocks.of(model(), structure).names == names


def test_columns_are_contiguous_and_in_the_order_of_the_blocks() -> None:
    blocks = ParameterBlocks.of(model(), {"biases": ["2.bias", "0.bias"], "first": ["0.weight"]})
    assert blocks.columns == {"biases": slice(0, 4), "first": slice(4, 10)}
    assert blocks.size == 10
    assert blocks.uncovered == ("2.weight",)
    assert blocks.coverage == 10 / 13


def test_flattening_and_unflattening_are_inverse_also_for_many_rows() -> None:
    blocks = ParameterBlocks.of(model(), {"biases": ["2.bias", "0.bias"], "first": ["0.weight"]})
    rows = torch.arange(20.0).reshape(2, 10)
    tensors = blocks.unflatten(rows)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "2.bias": (2, 1),
        "0.bias": (2, 3),
        "0.weight": (2, 3, 2),
    }
    assert torch.equal(blocks.flatten(tensors, n_leading=1), rows)


def test_frozen_parameters_are_not_covered_and_the_share_is_said() -> None:
    net = model()
    net[0].requires_grad_(False)
    blocks = ParameterBlocks.of(net)
    assert blocks.names == {"full": ("2.weight", "2.bias")}
    assert blocks.uncovered == ("0.weight", "0.bias")
    assert blocks.coverage == pytest.approx(4 / 13)


def test_a_tied_weight_counts_once() -> None:
    blocks = ParameterBlocks.of(Tied())
    assert blocks.size == 9 + 3 + 3
    assert blocks.coverage == 1.0


def test_a_block_alone_leaves_the_others_uncovered() -> None:
    alone = ParameterBlocks.of(model(), "layer_wise").only("2")
    assert alone.names == {"2": ("2.weight", "2.bias")}
    assert set(alone.uncovered) == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        ("layerwise", SettingError, r"one of \['full', 'layer_wise', 'parameter_wise'\].*got 'layerwise'"),
        ({}, ParameterBlockError, "at least one block"),
        ({"a": []}, ParameterBlockError, "list of parameter names"),
        ({"a": "0.weight"}, ParameterBlockError, "list of parameter names"),
        ({"a": ["0.wieght"]}, ParameterBlockError, "no trainable parameter.*Choose among"),
        ({"a": ["0.bias"], "b": ["0.bias"]}, ParameterBlockError, "in block 'a' and in 'b'"),
    ],
)
def test_a_wrong_structure_says_what_is_wrong(structure: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ParameterBlocks.of(model(), structure)


def test_models_that_cannot_be_used_say_why() -> None:
    frozen = model().requires_grad_(False)
    with pytest.raises(EmptyDataError, match="at least one trainable parameter"):
        ParameterBlocks.of(frozen)
    with pytest.raises(EmptyDataError, match="at least one trainable parameter"):
        ParameterBlocks.of(nn.Tanh())
    with pytest.raises(UnsupportedModelError, match=r"complex64.*view_as_real"):
        ParameterBlocks.of(nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.complex64))]))
    mixed = model()
    mixed[2].double()
    with pytest.raises(DtypeError, match="float16, or all in float64"):
        ParameterBlocks.of(mixed)
    broken = build("cnn").model
    with torch.no_grad():
        next(iter(broken.parameters()))[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in \['0.weight'\]"):
        ParameterBlocks.of(broken)


def test_a_setting_is_one_value_or_one_for_each_block() -> None:
    blocks = ParameterBlocks.of(model(), "layer_wise")
    assert blocks.spread(1, "rank") == {"0": 1, "2": 1}
    assert blocks.spread({"2": 0.5, "0": 0}, "rank") == {"0": 0, "2": 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [({"0": 0.1}, r"missing \['2'\]"), ({"0": 0.1, "2": 0.1, "3": 0.1}, r"unknown \['3'\]")],
)
def test_a_setting_for_other_blocks_is_refused(values: Any, message: str) -> None:
    with pytest.raises(SettingError, match=f"`rank`.*{message}"):
        ParameterBlocks.of(model(), "layer_wise").spread(values, "rank")
