"""Models travel as recipes: the same tensors arrive, tied ones tied, and nothing is unpickled from a checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import nn

from distinfluence.errors import RecipeError
from distinfluence.scaling import ModelRecipe, Recipe
from distinfluence.scaling.data.recipe import assign, fingerprint_module, read_checkpoint, tensors_of
from tests.zoo import BUILDERS, Tied, build


@pytest.mark.parametrize("name", BUILDERS)
def test_a_spilled_model_computes_the_same_and_keeps_its_parameters(name: str, tmp_path: Path) -> None:
    case = build(name)
    there = ModelRecipe.spill(case.model, tmp_path).build()
    assert [n for n, _ in there.named_parameters()] == [n for n, _ in case.model.named_parameters()]
    assert torch.equal(there(case.test[0]), case.model(case.test[0]))
    assert not there.training
    assert fingerprint_module(there) == fingerprint_module(case.model)


def test_what_travels_with_the_tasks_does_not_grow_with_the_parameters(tmp_path: Path) -> None:
    small, large = (ModelRecipe.spill(nn.Linear(n, n), tmp_path) for n in (2, 1000))
    assert isinstance(small.factory, bytes) and isinstance(large.factory, bytes)
    assert abs(len(large.factory) - len(small.factory)) < 100


def test_tied_weights_arrive_tied(tmp_path: Path) -> None:
    there = ModelRecipe.spill(Tied(), tmp_path).build()
    assert isinstance(there, Tied)
    assert there.first.weight is there.second.weight


def test_frozen_parameters_and_hidden_buffers_arrive_as_they_are(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    model.register_buffer("hidden", torch.arange(3.0), persistent=False)
    there = ModelRecipe.spill(model, tmp_path).build()
    assert not dict(there.named_parameters())["bias"].requires_grad
    assert torch.equal(dict(there.named_buffers())["hidden"], torch.arange(3.0))


def test_a_factory_with_a_checkpoint_builds_the_trained_model(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    recipe = ModelRecipe(Recipe("torch.nn:Linear", {"in_features": 3, "out_features": 2}), str(tmp_path / "m.pt"))
    assert fingerprint_module(recipe.build()) == fingerprint_module(model)


def test_a_tied_checkpoint_may_name_the_weight_once() -> None:
    model, trained = Tied(), Tied()
    tensors = {name: tensor for name, tensor in tensors_of(trained).items() if name != "second.weight"}
    assign(model, tensors, "test")
    assert model.first.weight is model.second.weight
    assert torch.equal(model.second.weight, trained.first.weight)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, r"missing \['bias'\]"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "extra": torch.zeros(1)}, r"unknown \['extra'\]"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight: \(2, 4\) instead of \(2, 3\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_how(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        assign(nn.Linear(3, 2), tensors, "m.pt")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "ran")}, tmp_path / "m.pt")
    with pytest.raises(RecipeError, match="more than tensors"):
        read_checkpoint(str(tmp_path / "m.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_and_one_with_other_things_say_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_checkpoint(str(tmp_path / "none.pt"))
    torch.save({"epoch": 3}, tmp_path / "m.pt")
    with pytest.raises(RecipeError, match="name → tensor"):
        read_checkpoint(str(tmp_path / "m.pt"))


def test_a_changed_checkpoint_is_found(tmp_path: Path) -> None:
    recipe = ModelRecipe.spill(nn.Linear(3, 2), tmp_path)
    assert recipe.checkpoint is not None
    torch.save(tensors_of(nn.Linear(3, 2)), recipe.checkpoint)
    with pytest.raises(RecipeError, match="other tensors than the run began with"):
        recipe.build()


def test_a_model_that_carries_data_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.training_set = torch.zeros(5 * 2**20)
    with pytest.raises(RecipeError, match="20 MiB besides its parameters"):
        ModelRecipe.spill(model, tmp_path)


def test_a_factory_must_return_a_module() -> None:
    with pytest.raises(RecipeError, match="returns a Module, got int"):
        ModelRecipe(Recipe("os:getpid")).build()
