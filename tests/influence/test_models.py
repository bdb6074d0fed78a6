"""Influence models against dense float64 references: factors, influences, blocks, modes, reports."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import (
    ArnoldiInfluence,
    BlockMode,
    CgInfluence,
    ChebyshevInfluence,
    DirectInfluence,
    InfluenceFunctionModel,
    InfluenceMode,
    KrylovInfluence,
    LissaInfluence,
    NystroemPreConditioner,
)
from distinfluence.model import gradients as gradients_module
from distinfluence.solvers import Outcome
from tests.reference import Reference
from tests.zoo import Case, build

MODES = ["hessian", "ggn", "empirical_fisher"]
MODELS = ["mlp classification", "mlp regression", "cnn", "embedding and layer norm", "tied weights", "attention"]
Make = Callable[..., InfluenceFunctionModel]


def direct(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> DirectInfluence:
    return DirectInfluence(case.model, case.loss, damping, second_order_mode=mode, **settings)


def cg(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> CgInfluence:
    settings = {"rtol": 1e-10, "atol": 0.0, **settings}
    return CgInfluence(case.model, case.loss, damping, second_order_mode=mode, **settings)


def row_cg(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> CgInfluence:
    return cg(case, damping, mode, use_block_cg=False, **settings)


def arnoldi(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> ArnoldiInfluence:
    settings = {"rank_estimate": 10_000, "complement": True, "residual_rows": 100, **settings}  # all eigenvectors
    return ArnoldiInfluence(case.model, case.loss, damping, second_order_mode=mode, **settings)


def krylov(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> KrylovInfluence:
    return KrylovInfluence(case.model, case.loss, damping, second_order_mode=mode, **{"rtol": 1e-10, **settings})


def chebyshev(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> ChebyshevInfluence:
    return ChebyshevInfluence(case.model, case.loss, damping, second_order_mode=mode, **{"rtol": 1e-10, **settings})


def lissa(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> LissaInfluence:
    settings = {"scale": None, "full_batch": True, "rtol": 1e-5, **settings}
    return LissaInfluence(case.model, case.loss, damping, second_order_mode=mode, **settings)


def preconditioned_cg(case: Case, damping: Any, mode: str = "ggn", **settings: Any) -> CgInfluence:
    return cg(case, damping, mode, pre_conditioner=NystroemPreConditioner(10), **settings)


METHODS: dict[str, Make] = {
    "direct": direct,
    "cg": cg,
    "row cg": row_cg,
    "preconditioned cg": preconditioned_cg,
    "krylov": krylov,
    "chebyshev": chebyshev,
    "lissa": lissa,
    "arnoldi": arnoldi,
}


def damping_for(case: Case, mode: str) -> float:
    """Small beside the matrix (a twentieth of its norm), but enough to make an indefinite Hessian definite."""
    values = torch.linalg.eigvalsh(Reference(case).matrix(mode))
    return 0.05 * float(values.abs().max()) + max(0.0, -1.1 * float(values[0]))


def in_ragged_batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    x, y = case.train
    return [(x[i : i + 7], y[i : i + 7]) for i in range(0, len(x), 7)]


def allowed(method: str, expected: Tensor) -> dict[str, Any]:
    """Factorisations: 1e-8. Iterations at rtol 1e-10: the error is at most the residual over λ_min, and cond is at most
    about 60 here, so 1e-6 of the largest entry has room; LiSSA, which stops at 1e-5, is held to 1e-3."""
    tolerance = {"direct": 1e-8, "arnoldi": 1e-8, "lissa": 1e-3}.get(method, 1e-6)
    return {"rtol": 0, "atol": tolerance * float(expected.abs().max())}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_factors_and_influences_are_the_reference(method: str, mode: str, name: str) -> None:
    case = build(name)
    damping = damping_for(case, mode)
    reference = Reference(case)
    model = METHODS[method](case, damping, mode).fit(in_ragged_batches(case))
    factors, report = model.influence_factors(*case.test, return_report=True)
    expected = reference.factors(mode, damping)
    torch.testing.assert_close(factors, expected, **allowed(method, expected))
    assert report.converged.all()
    expected = reference.influences(mode, damping)
    ours = model.influences_from_factors(factors, *case.train)
    torch.testing.assert_close(ours, expected, **allowed(method, expected))


@pytest.mark.parametrize("method", METHODS)
def test_more_test_rows_than_parameters_with_duplicates_and_zero_gradients(method: str) -> None:
    base = build("mlp regression", n_test=40)
    x, y = (tensor.clone() for tensor in base.test)
    x[3], y[3] = x[2], y[2]
    y[7] = base.model(x[7:8])[0].detach()  # fitted exactly: its gradient is zero
    case = Case(base.model, base.loss, base.train, (x, y))
    model = METHODS[method](case, 0.2).fit(case.train)
    assert len(x) > model.n_parameters
    factors, report = model.influence_factors(x, y, return_report=True)
    expected = Reference(case).factors("ggn", 0.2)
    torch.testing.assert_close(factors, expected, **allowed(method, expected))
    assert report.converged.all()
    assert not factors[7].any()
    torch.testing.assert_close(factors[2], factors[3], **allowed(method, expected))
    rows = Reference(case).gradients(case.test)
    rows[5] = 0
    factors, report = model.solve(rows)
    assert torch.equal(factors[5], torch.zeros_like(factors[5]))
    assert report.relative_residual[5] == 0
    assert report.iterations[5] == 0
    others = torch.arange(40) != 5
    torch.testing.assert_close(factors[others], expected[others], **allowed(method, expected))


@pytest.mark.parametrize("method", METHODS)
def test_a_test_points_factor_does_not_depend_on_which_others_share_the_call(method: str) -> None:
    case = build("mlp classification", n_test=4)
    model = METHODS[method](case, 0.1).fit(case.train)
    x, y = case.test
    together = model.influence_factors(x, y)
    for i in range(4):
        torch.testing.assert_close(
            model.influence_factors(x[i : i + 1], y[i : i + 1]), together[i : i + 1], atol=1e-7, rtol=0
        )


@pytest.mark.parametrize("method", METHODS)
def test_one_training_sample_is_enough(method: str) -> None:
    case = build("mlp regression", n_train=1)
    expected = Reference(case).influences("ggn", 0.1)
    ours = METHODS[method](case, 0.1).fit(case.train).influences(*case.test, *case.train)
    torch.testing.assert_close(ours, expected, **allowed(method, expected))


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("method", METHODS)
def test_influences_are_those_from_the_factors(method: str, mode: str) -> None:
    case = build("mlp classification")
    model = METHODS[method](case, 0.05).fit(case.train)
    whole = model.influences(*case.test, *case.train, mode=mode)
    split = model.influences_from_factors(model.influence_factors(*case.test), *case.train, mode=mode)
    assert torch.equal(whole, split)


def test_the_training_points_default_to_the_test_points_and_the_matrix_is_then_symmetric() -> None:
    case = build("cnn")
    model = direct(case, 0.02).fit(case.train)
    square = model.influences(*case.test)
    assert square.shape == (6, 6)
    assert torch.equal(square, model.influences(*case.test, *case.test))
    torch.testing.assert_close(square, square.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", [*BlockMode, {"late": ["2.weight", "2.bias"], "early": ["0.weight", "0.bias"]}])
def test_blocks_are_solved_apart_with_their_own_damping(method: str, structure: Any) -> None:
    case = build("mlp classification")
    names = METHODS[method](case, 0.1, block_structure=structure).risk.blocks
    damping = {block: 0.1 * (i + 1) for i, block in enumerate(names.names)}
    model = METHODS[method](case, damping, block_structure=structure).fit(case.train)
    reference = Reference(case)
    where = _positions(case, model)
    matrix, tests, trains = (
        reference.matrix("ggn")[where][:, where],
        reference.gradients(case.test)[:, where],
        reference.gradients(case.train)[:, where],
    )
    by_block = model.influences_by_block(*case.test, *case.train)
    assert list(by_block) == list(names.names)
    for block, columns in names.columns.items():
        inside = matrix[columns, columns]
        factors = torch.linalg.solve(inside + damping[block] * torch.eye(len(inside)).double(), tests[:, columns].T).T
        expected = factors @ trains[:, columns].T
        torch.testing.assert_close(by_block[block], expected, **allowed(method, expected))
        torch.testing.assert_close(
            model.influence_factors_by_block(*case.test)[block], factors, **allowed(method, factors)
        )
    total = model.influences(*case.test, *case.train)
    torch.testing.assert_close(torch.stack(list(by_block.values())).sum(dim=0), total, rtol=1e-10, atol=1e-10)
    parts = model.influence_factors_by_block(*case.test)
    again = model.influences_from_factors_by_block(parts, *case.train)
    assert all(torch.equal(again[block], by_block[block]) for block in by_block)


def _positions(case: Case, model: InfluenceFunctionModel) -> Tensor:
    """Columns of the reference in the model's order."""
    ranges, start = {}, 0
    for name, p in case.model.named_parameters():
        ranges[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    return torch.cat([ranges[name] for name in model.risk.blocks.shapes])


@pytest.mark.parametrize("n_test", [3, 30])
@pytest.mark.parametrize("name", ["mlp classification", "cnn", "tied weights", "lstm"])
def test_perturbation_is_the_derivative_by_the_training_input(name: str, n_test: int) -> None:
    case = build(name, n_train=7, n_test=n_test)
    model = direct(case, 0.05).fit(case.train)
    ours = model.influences(*case.test, *case.train, mode="perturbation")
    expected = Reference(case).perturbation("ggn", 0.05)
    assert ours.shape == (n_test, 7, *case.train[0].shape[1:])
    torch.testing.assert_close(ours, expected, **allowed("direct", expected))


def test_perturbation_by_block_sums_to_the_whole() -> None:
    case = build("mlp classification")
    model = direct(case, 0.05, block_structure="layer_wise").fit(case.train)
    by_block = model.influences_by_block(*case.test, *case.train, mode="perturbation")
    total = model.influences(*case.test, *case.train, mode=InfluenceMode.PERTURBATION)
    torch.testing.assert_close(torch.stack(list(by_block.values())).sum(dim=0), total, rtol=1e-9, atol=1e-10)
    x, y = case.train
    for block, columns in model.risk.blocks.columns.items():  # each is the derivative of that block's scores
        alone = torch.zeros(6, 43).double()
        alone[:, columns] = model.influence_factors_by_block(*case.test)[block]
        for j in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda v, j=j: Reference(case)._input_gradient(v, y[j]), x[j : j + 1]
            )
            slope = torch.tensordot(alone, jacobian, dims=1)
            torch.testing.assert_close(by_block[block][:, j], slope[:, 0], **allowed("direct", slope))


def test_one_block_over_everything_is_the_same_by_block_or_not() -> None:
    case = build("mlp classification")
    model = direct(case, 0.05).fit(case.train)
    for mode in InfluenceMode:
        by_block = model.influences_by_block(*case.test, *case.train, mode=mode)
        assert list(by_block) == ["full"]
        assert torch.equal(by_block["full"], model.influences(*case.test, *case.train, mode=mode))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_batches_change_nothing(method: str, mode: str) -> None:
    """Averages are over samples: a ragged last batch weighs what it holds."""
    case = build("mlp regression")
    damping = damping_for(case, mode)
    expected = Reference(case).influences(mode, damping)
    for size in (1, 5, 22):
        loader = DataLoader(TensorDataset(*case.train), batch_size=size)
        ours = METHODS[method](case, damping, mode).fit(loader).influences(*case.test, *case.train)
        torch.testing.assert_close(ours, expected, **allowed(method, expected))


def test_one_solve_serves_all_training_points() -> None:
    """Passes over the training data are made for the factors alone; direct has none left after `fit`."""
    case = build("mlp classification")
    for make in (direct, cg, row_cg):
        model = make(case, 0.05).fit(in_ragged_batches(case))
        before = model.reducer.passes
        factors, report = model.influence_factors(*case.test, return_report=True)
        solved = model.reducer.passes
        # one pass an iteration, and a fresh product for the residual; a restart measures it once more
        assert solved - before == 0 if make is direct else 0 < solved - before <= int(report.iterations.max()) + 3
        for part in range(0, 23, 5):
            model.influences_from_factors(factors, *(t[part : part + 5] for t in case.train))
        assert model.reducer.passes == solved


def test_many_training_points_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("mlp classification")
    model = direct(case, 0.05, block_structure="layer_wise").fit(case.train)
    whole, blocks = model.influences(*case.test, *case.train), model.influences_by_block(*case.test, *case.train)
    tile = model.tile(model.influence_factors(*case.test), model.place(*case.train))
    monkeypatch.setattr(gradients_module, "GRADIENT_BYTES", 4 * 43 * 8)  # four samples
    torch.testing.assert_close(model.influences(*case.test, *case.train), whole, rtol=1e-12, atol=1e-14)
    again = model.influences_by_block(*case.test, *case.train)
    assert all(torch.allclose(again[block], blocks[block], rtol=1e-12, atol=1e-14) for block in blocks)
    pieces = model.tile(model.influence_factors(*case.test), model.place(*case.train))
    for name in ("values", "losses", "gradient_norms"):
        torch.testing.assert_close(getattr(pieces, name), getattr(tile, name), rtol=1e-12, atol=1e-14)
    gradients = Reference(case).gradients(case.train)
    torch.testing.assert_close(tile.gradient_norms, gradients.norm(dim=1), rtol=1e-10, atol=0)
    expected = nn.functional.cross_entropy(case.model(case.train[0]), case.train[1], reduction="none").detach()
    torch.testing.assert_close(tile.losses, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_sums_is_the_mean_of_summed_losses(mode: str) -> None:
    """`reduction="sum"` changes the unit of a sample's loss, never the mean over samples."""
    case = build("mlp regression")
    summed = Case(case.model, nn.MSELoss(reduction="sum"), case.train, case.test)
    damping = damping_for(summed, mode)
    model = direct(summed, damping, mode).fit(in_ragged_batches(case))
    assert "sums over the batch" in str(model.fit_report)
    expected = Reference(summed).influences(mode, damping)
    torch.testing.assert_close(model.influences(*case.test, *case.train), expected, **allowed("direct", expected))


def test_perturbation_predicts_what_moving_an_input_does_to_its_influence() -> None:
    case = build("mlp classification")
    model = direct(case, 0.05).fit(case.train)
    factors, (x, y), step = model.influence_factors(*case.test), case.train, 1e-6
    moved = x.clone()
    moved[4, 2] += step
    change = model.influences_from_factors(factors, moved, y) - model.influences_from_factors(factors, x, y)
    slope = model.influences_from_factors(factors, x, y, mode="perturbation")[:, 4, 2]
    torch.testing.assert_close(change[:, 4] / step, slope, rtol=1e-4, atol=1e-6)


def test_a_solve_that_is_stopped_early_says_so() -> None:
    case = build("mlp classification")
    _, report = cg(case, 1e-3, maxiter=1).fit(case.train).influence_factors(*case.test, return_report=True)
    assert not report.converged.any()
    assert set(report.outcome) == {Outcome.MAXITER}
    assert "0 of 6 rows converged" in str(report)


def test_the_reported_residual_is_that_of_the_factors() -> None:
    case = build("mlp classification")
    model = cg(case, 0.01, rtol=1e-3, block_structure="layer_wise").fit(case.train)
    factors, report = model.influence_factors(*case.test, return_report=True)
    gradients = Reference(case).gradients(case.test)
    matrix = torch.block_diag(*[Reference(case).matrix("ggn")[c, c] for c in model.risk.blocks.columns.values()])
    residual = gradients - factors @ (matrix + 0.01 * torch.eye(43))
    expected = residual.norm(dim=1) / gradients.norm(dim=1)
    torch.testing.assert_close(report.relative_residual, expected, rtol=1e-6, atol=1e-12)


def test_an_indefinite_hessian_is_said_not_hidden() -> None:
    case = build("mlp classification")
    smallest = float(torch.linalg.eigvalsh(Reference(case).hessian())[0])
    assert smallest < -1e-3
    model = direct(case, 1e-4, "hessian").fit(case.train)
    assert model.fit_report.positive_definite == {"full": False}
    assert "not positive definite: full" in str(model.fit_report)
    expected = Reference(case).factors("hessian", 1e-4)
    torch.testing.assert_close(model.influence_factors(*case.test), expected, **allowed("direct", expected))
    for method in (cg, row_cg):
        _, report = method(case, 1e-4, "hessian").fit(case.train).influence_factors(*case.test, return_report=True)
        assert Outcome.NEGATIVE_CURVATURE in report.outcome
        assert smallest + 1e-4 <= float(report.by_block["full"].curvature.min()) < 0


def test_the_fit_report_says_what_is_covered() -> None:
    case = build("mlp classification")
    case.model.get_parameter("0.weight").requires_grad_(False)
    report = direct(case, 0.1, block_structure="layer_wise").fit(in_ragged_batches(case)).fit_report
    assert (report.n_samples, report.n_parameters, report.n_total) == (23, 23, 43)
    assert report.uncovered == ("0.weight",)
    assert report.blocks == {"0": 5, "2": 18}
    assert report.damping == {"0": 0.1, "2": 0.1}
    assert report.positive_definite == {"0": True, "2": True}
    assert report.passes == 2
    assert "covers 23 of 43 parameters (53.5%)" in str(report)


class Diagonal:
    """A preconditioner from the matrix's diagonal, made with p products."""

    def fit(self, operator: Any, damping: float) -> "Diagonal":
        self.inverse: Tensor = (1 / (operator.dense().diagonal() + damping)).to(operator.dtype)
        return self

    def apply(self, rows: Tensor) -> Tensor:
        return rows * self.inverse


def test_a_preconditioner_is_fitted_and_used() -> None:
    torch.manual_seed(0)
    scales = torch.logspace(0, 3, 12, dtype=torch.float64)
    x, y = torch.randn(60, 12).double() * scales, torch.randn(60, 1).double()
    model = nn.Linear(12, 1, bias=False).double()
    settings: dict[str, Any] = {"rtol": 1e-8, "atol": 0.0, "second_order_mode": "ggn"}
    plain = CgInfluence(model, nn.MSELoss(), 1e-6, **settings).fit((x, y))
    helped = CgInfluence(model, nn.MSELoss(), 1e-6, pre_conditioner=Diagonal(), **settings).fit((x, y))
    (factors, slow), (same, fast) = (m.influence_factors(x[:1], y[:1], return_report=True) for m in (plain, helped))
    assert fast.converged.all()
    assert int(fast.iterations) < int(slow.iterations)
    # two solutions to a residual of 1e-8 may differ by cond·1e-8, in the flat directions; their influences agree better
    torch.testing.assert_close(
        plain.influences_from_factors(factors, x, y), helped.influences_from_factors(same, x, y), rtol=1e-3, atol=1e-6
    )
