"""The damping axis: rules, other dampings from the same fit, whole lists of them."""

from typing import Any

import pytest
import torch

from distinfluence import CgInfluence, DirectInfluence, InfluenceFunctionModel, KrylovInfluence, RelativeDamping
from distinfluence.app import demo
from distinfluence.errors import NotFittedError, SettingError
from tests.reference import Reference
from tests.zoo import Case, build

DAMPINGS = [1e-1, 3e-2, 1e-2]


def make(method: str, case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> InfluenceFunctionModel:
    classes: dict[str, type[InfluenceFunctionModel]] = {
        "direct": DirectInfluence,
        "cg": CgInfluence,
        "krylov": KrylovInfluence,
    }
    tolerance = {} if method == "direct" else {"rtol": 1e-10}
    return classes[method](case.model, case.loss, damping, second_order_mode=mode, **tolerance, **settings)


@pytest.mark.parametrize("method", ["direct", "cg", "krylov"])
@pytest.mark.parametrize("mode", ["ggn", "empirical_fisher"])
def test_one_fit_scores_a_list_of_dampings(method: str, mode: str) -> None:
    case = build("mlp classification")
    model = make(method, case, 1.0, mode).fit(case.train)
    scores = model.influences_at(DAMPINGS, *case.test, *case.train)
    assert scores.shape == (3, 6, 23)
    for damping, ours in zip(DAMPINGS, scores, strict=True):
        expected = Reference(case).influences(mode, damping)
        # rtol 1e-10 times a condition of at most about 1e3
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["direct", "cg", "krylov"])
def test_another_damping_takes_the_same_fit(method: str) -> None:
    case = build("mlp classification")
    first = make(method, case, 1.0).fit(case.train)
    passes = first.reducer.passes
    second = first.with_damping(0.02)
    assert second.reducer.passes == passes
    assert (first.damping, second.damping) == ({"full": 1.0}, {"full": 0.02})
    assert second.settings()["hessian_regularization"] == {"full": 0.02}
    for model, damping in ((second, 0.02), (first, 1.0)):
        expected = Reference(case).influences("ggn", damping)
        ours = model.influences(*case.test, *case.train)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_list_of_dampings_costs_direct_no_pass_and_krylov_those_of_the_smallest() -> None:
    case = build("mlp classification")
    gradients = Reference(case).gradients(case.test)
    exact = make("direct", case, 0.1).fit(case.train)
    before = exact.reducer.passes
    exact.solve_at(gradients, [10.0**-i for i in range(40)])
    assert exact.reducer.passes == before
    krylov = make("krylov", case, 0.1).fit(case.train)
    krylov.solve_at(gradients, DAMPINGS)
    together = krylov.reducer.passes
    krylov.with_damping(DAMPINGS[-1]).solve(gradients)
    assert krylov.reducer.passes - together == together


@pytest.mark.parametrize("mode", ["hessian", "ggn", "empirical_fisher"])
def test_a_rule_takes_the_mean_or_the_largest_eigenvalue(mode: str) -> None:
    case = build("mlp regression")
    values = torch.linalg.eigvalsh(Reference(case).matrix(mode))
    largest = make("direct", case, RelativeDamping(0.5, "largest"), mode).fit(case.train)
    # Lanczos stops when the residual is a hundredth of the norm: the Ritz value is then closer than that
    assert largest.damping["full"] == pytest.approx(0.5 * float(values[-1]), rel=1e-2)
    if mode == "hessian":
        return
    mean = make("direct", case, RelativeDamping(0.1), mode).fit(case.train)
    if mode == "empirical_fisher":
        assert mean.damping["full"] == pytest.approx(0.1 * float(values.mean()), rel=1e-10)
    else:  # 32 Rademacher probes: standard deviation √(2/32)·‖A‖_F / trace; four of them
        deviation = 0.25 * float(values.norm() / values.sum())
        assert mean.damping["full"] == pytest.approx(0.1 * float(values.mean()), rel=4 * deviation)


def test_a_rule_is_worked_out_by_block_and_recorded() -> None:
    case = build("mlp classification")
    rules = {"0": RelativeDamping(0.2), "2": 0.05}
    model = make("direct", case, rules, "empirical_fisher", block_structure="layer_wise")
    with pytest.raises(NotFittedError, match=r"`damping` of \['0'\] is relative"):
        _ = model.damping
    assert model.settings()["hessian_regularization"] == {"0": "RelativeDamping(fraction=0.2, of='mean')"}
    model.fit(case.train)
    block = Reference(case).matrix("empirical_fisher")[:25, :25]
    assert model.damping == {"0": pytest.approx(0.2 * float(block.diagonal().mean()), rel=1e-10), "2": 0.05}
    assert model.fit_report.damping == model.damping
    assert model.settings()["damping_rule"] == {"0": "RelativeDamping(fraction=0.2, of='mean')"}
    assert model.settings()["hessian_regularization"] == model.damping
    same = make("direct", case, dict(model.damping), "empirical_fisher", block_structure="layer_wise").fit(case.train)
    assert torch.equal(same.influences(*case.test, *case.train), model.influences(*case.test, *case.train))


@pytest.mark.parametrize(
    ("damping", "message"),
    [
        (-0.1, "≥ 0 or a `RelativeDamping`, got -0.1"),
        (float("nan"), "finite number"),
        (float("inf"), "finite number"),
        ("0.1", "finite number"),
        (True, "finite number"),
        ({"0": 0.1, "2": -1}, "got -1 for block '2'"),
        ({"0": 0.1}, r"missing \['2'\]"),
    ],
)
def test_a_wrong_damping_is_refused(damping: Any, message: str) -> None:
    case = build("mlp classification")
    with pytest.raises(SettingError, match=f"`hessian_regularization`.*{message}"):
        make("direct", case, damping, block_structure="layer_wise")
    fitted = make("direct", case, 0.1, block_structure="layer_wise").fit(case.train)
    with pytest.raises(SettingError, match=f"`hessian_regularization`.*{message}"):
        fitted.with_damping(damping)


@pytest.mark.parametrize(("fraction", "of"), [(0, "mean"), (-1, "mean"), (float("nan"), "mean"), (0.1, "median")])
def test_a_wrong_rule_is_refused(fraction: float, of: Any) -> None:
    with pytest.raises(SettingError, match="`fraction` must be|`of` must be"):
        RelativeDamping(fraction, of)


def test_a_rule_needs_a_positive_eigenvalue() -> None:
    case = build("mlp classification")
    x, _ = case.train
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.zero_()
    blocks = {"early": ["0.weight"], "late": ["2.weight", "2.bias", "0.bias"]}
    model = make("direct", case, RelativeDamping(), block_structure=blocks)
    with pytest.raises(SettingError, match="needs a positive mean eigenvalue, got 0 for block 'early'"):
        model.fit((x, case.train[1]))  # nothing reaches the outputs through the first layer


def test_two_dampings_of_the_digits_network_take_ten_passes() -> None:
    """1e-1 and 1e-2 together, 64 test points, to a relative residual of 1e-5, the pass that measures it included."""
    model, (x, y) = demo.train_model().double(), demo.test_data()
    train_x, train_y = demo.train_data()
    influence = KrylovInfluence(model, torch.nn.CrossEntropyLoss(), 0.1, rtol=1e-5, second_order_mode="ggn")
    influence.fit((train_x.double(), train_y))
    gradients = influence.measurement_gradients(influence.place(x[:64].double(), y[:64])).rows
    before = influence.reducer.passes
    for _, report in influence.solve_at(gradients, [1e-1, 1e-2]):
        assert report.converged.all()
        assert float(report.relative_residual.max()) <= 1e-5
    assert influence.reducer.passes - before <= 10
