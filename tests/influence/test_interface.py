"""The interface around the numbers: dtypes, batches, states that travel, settings, wrong use."""

import json

import pytest
import torch
from torch import Tensor, nn

from distinfluence import DirectInfluence, InfluenceMode, Objective, SecondOrderMode
from distinfluence.errors import DtypeError, NotFittedError, ParameterBlockError, SettingError, ShapeError
from distinfluence.model.batch import Batch
from distinfluence.model.objective import Forward
from distinfluence.model.reducer import LocalReducer
from tests.influence.test_models import METHODS, allowed, cg, direct
from tests.reference import Reference
from tests.zoo import Case, build


def test_integer_inputs_give_floating_point_results() -> None:
    case = build("embedding and layer norm")
    found = direct(case, 0.1).fit(case.train).influences(*case.test, *case.train)
    torch.testing.assert_close(found, Reference(case).influences("ggn", 0.1))  # the dtype too


def test_float32_models_give_float32_results_close_to_the_truth() -> None:
    case, exact = build("cnn", dtype=torch.float32), build("cnn")
    expected = Reference(exact).influences("ggn", 0.1)
    for method in (direct, cg):
        ours = method(case, 0.1).fit(case.train).influences(*case.test, *case.train)
        assert ours.dtype is torch.float32
        # products are good to about 1e-6 of the matrix, and cond is below 100
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_batches_may_come_whole() -> None:
    case = build("mlp classification")
    model = direct(case, 0.1).fit([case.train])
    assert torch.equal(model.influence_factors(case.test), model.influence_factors(*case.test))
    assert torch.equal(model.influences(case.test, x=case.train), model.influences(*case.test, *case.train))


@pytest.mark.parametrize("method", METHODS)
def test_a_fitted_state_can_be_taken_elsewhere(method: str) -> None:
    case = build("mlp classification")
    model = METHODS[method](case, 0.05, block_structure="layer_wise").fit(case.train)
    there = model.unbound().bound_to(case.model)
    assert not there.is_fitted
    reducer = LocalReducer(there.risk, case.train)
    there.restore(reducer, model.state_arrays(), model.fit_report)
    torch.testing.assert_close(there.influence_factors(*case.test), model.influence_factors(*case.test))
    moved = model.to("cpu")
    assert moved is model
    torch.testing.assert_close(moved.influence_factors(*case.test), there.influence_factors(*case.test))
    with pytest.raises(NotFittedError, match=r"bound_to\(model\)"):
        model.unbound().n_parameters  # noqa: B018


def test_settings_are_json_and_name_the_method() -> None:
    case = build("mlp classification")
    settings = json.loads(json.dumps(cg(case, 0.1, block_structure="layer_wise").settings()))
    assert settings["method"] == "CgInfluence"
    assert settings["hessian_regularization"] == {"0": 0.1, "2": 0.1}
    assert settings["second_order_mode"] == "ggn"
    assert settings["rtol"] == 1e-10


def test_the_seed_interfaces_spelling_of_the_modes_works() -> None:
    assert InfluenceMode.Up is InfluenceMode.UP
    assert InfluenceMode.Perturbation is InfluenceMode.PERTURBATION
    case = build("mlp classification")
    model = DirectInfluence(case.model, case.loss, 0.1, second_order_mode=SecondOrderMode.GGN).fit(case.train)
    assert torch.equal(
        model.influences(*case.test, *case.train, mode=InfluenceMode.Up), model.influences(*case.test, *case.train)
    )


def test_wrong_use_says_what_to_do() -> None:
    case = build("mlp classification")
    with pytest.raises(NotFittedError, match=r"Call `fit\(data\)` first"):
        direct(case, 0.1).influences(*case.test)
    with pytest.raises(SettingError, match="`second_order_mode` must be one of"):
        direct(case, 0.1, "gauss_newton")
    with pytest.raises(SettingError, match="`rtol`"):
        cg(case, 0.1, rtol=2.0)
    with pytest.raises(SettingError, match="`hessian_regularization`"):
        direct(case, -1.0)
    model = direct(case, 0.1).fit(case.train)
    iterative = cg(case, 0.1).fit(case.train)
    passes = iterative.reducer.passes
    for call in (iterative.influences, iterative.influences_by_block):
        with pytest.raises(SettingError, match="`mode` must be one of"):
            call(*case.test, mode="sideways")
        with pytest.raises(SettingError, match="`x` must come with `y`, got `y` alone"):
            call(*case.test, y=case.train[1])
    assert iterative.reducer.passes == passes, "refused before anything is solved"
    with pytest.raises(SettingError, match=r"`hessian_regularization`.*unknown \['layer'\]"):
        direct(case, {"layer": 0.1})
    with pytest.raises(ParameterBlockError, match="no trainable parameter"):
        direct(case, 0.1, block_structure={"a": ["weight"]})
    with pytest.raises(ShapeError, match=r"`factors` must be \[n_test, 43\]"):
        model.influences_from_factors(torch.zeros(2, 5), *case.train)
    with pytest.raises(ShapeError, match="the blocks"):
        model.influences_from_factors_by_block({"other": torch.zeros(2, 43)}, *case.train)
    text = build("embedding and layer norm")
    with pytest.raises(DtypeError, match="floating-point input"):
        direct(text, 0.1).fit(text.train).influences(*text.test, mode="perturbation")


class Confidence(Objective):
    """Trains on cross-entropy; asks for the logit of the right class. Inputs by name."""

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        outputs: Tensor = model(batch["x"])
        return outputs

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["y"], Tensor)
        return nn.functional.cross_entropy(outputs, batch["y"], reduction="none")

    def measurements(self, model: Forward, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["y"], Tensor)
        return self.outputs(model, batch).gather(1, batch["y"][:, None])[:, 0]

    def inputs(self, batch: Batch) -> Tensor:
        assert isinstance(batch, dict) and isinstance(batch["x"], Tensor)
        return batch["x"]

    def replace_inputs(self, batch: Batch, inputs: Tensor) -> Batch:
        assert isinstance(batch, dict)
        return {**batch, "x": inputs}


def test_an_objective_asks_its_own_question_of_dict_batches_in_both_modes() -> None:
    case = build("mlp classification")
    measured = Case(case.model, lambda f, y: f.gather(1, y[:, None]).sum(), case.train, case.test)
    matrix = Reference(case).matrix("ggn") + 0.05 * torch.eye(43).double()
    factors = torch.linalg.solve(matrix, Reference(measured).gradients(case.test).T).T
    train, test = ({"x": x, "y": y} for x, y in (case.train, case.test))
    for name, method in METHODS.items():
        model = method(Case(case.model, Confidence(), case.train, case.test), 0.05).fit([train])
        expected = factors @ Reference(case).gradients(case.train).T
        torch.testing.assert_close(model.influences(test, x=train), expected, **allowed(name, expected))
    moved = model.influences(test, x=train, mode="perturbation")
    x, y = case.train
    for j in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, j=j: Reference(case)._input_gradient(v, y[j]), x[j : j + 1]
        )
        torch.testing.assert_close(moved[:, j], torch.tensordot(factors, jacobian, dims=1)[:, 0], rtol=1e-6, atol=1e-7)


def test_parameters_left_out_of_the_blocks_have_no_part_in_the_scores() -> None:
    case = build("mlp classification")
    model = direct(case, 0.05, block_structure={"head": ["2.weight", "2.bias"]}).fit(case.train)
    matrix, tests, trains = (
        Reference(case).matrix("ggn")[25:, 25:],
        Reference(case).gradients(case.test)[:, 25:],
        Reference(case).gradients(case.train)[:, 25:],
    )
    expected = torch.linalg.solve(matrix + 0.05 * torch.eye(18).double(), tests.T).T @ trains.T
    torch.testing.assert_close(model.influences(*case.test, *case.train), expected, rtol=1e-8, atol=1e-10)
    assert model.fit_report.uncovered == ("0.weight", "0.bias")
    assert model.n_parameters == 18


def test_fitting_again_forgets_the_data_of_before() -> None:
    case, other = build("mlp classification"), build("mlp classification", n_train=9, seed=1)
    model = direct(case, 0.05).fit(other.train).fit(case.train)
    assert model.fit_report.n_samples == 23
    expected = Reference(case).influences("ggn", 0.05)
    torch.testing.assert_close(model.influences(*case.test, *case.train), expected, rtol=1e-8, atol=1e-10)


def test_a_fit_that_fails_leaves_the_one_before() -> None:
    case = build("mlp classification")
    model = direct(case, 0.05).fit(case.train)
    before = model.influences(*case.test)
    with pytest.raises(ShapeError):
        model.fit((case.train[0], case.train[1][:-1]))
    assert torch.equal(model.influences(*case.test), before)


def test_a_model_that_is_trained_on_after_the_fit_must_be_fitted_again() -> None:
    case = build("mlp classification")
    model = METHODS["direct"](case, 0.05).fit(case.train)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    case.loss(case.model(case.train[0]), case.train[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(NotFittedError, match=r"got changes to \['0.weight'.*Call `fit` again"):
        model.influences(*case.test, *case.train)
    expected = Reference(case).influences("ggn", 0.05)
    again = model.fit(case.train).influences(*case.test, *case.train)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
