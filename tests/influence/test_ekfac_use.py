"""EkfacInfluence as its users use it: dampings, refinement, certificates, states, chunks and workers, refusals."""

import copy
import math
import pickle
from contextlib import nullcontext
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import (
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    EkfacPreConditioner,
    RelativeDamping,
    SequentialInfluenceCalculator,
    open_influences,
)
from distinfluence.curvature import KroneckerOperator
from distinfluence.errors import DecompositionError, LayoutError, NonFiniteError, NotFittedError, SettingError
from distinfluence.evaluate import verify_entries
from distinfluence.layers.layout import LayerLayout, Record, layout_of
from distinfluence.layers.queries import LowRank, RankOne
from distinfluence.model.reducer import LocalReducer
from tests.layers.networks import network
from tests.reference import Reference
from tests.zoo import Case, build

DAMPING = 0.05


@pytest.fixture(scope="module")
def case() -> Case:
    return network("linear", n_train=24, n_test=5)


def fitted(case: Case, damping: Any = DAMPING, **settings: Any) -> EkfacInfluence:
    settings = {"update_diagonal": True, **settings}
    return EkfacInfluence(case.model, hessian_regularization=damping, loss=case.loss, **settings).fit(case.train)


# damping


def test_a_list_of_dampings_comes_from_one_fit(case: Case) -> None:
    influence = fitted(case)
    passes = influence.reducer.passes
    dampings = [1e-3, 1e-1, RelativeDamping(0.1)]
    together = influence.influences_at(dampings, *case.test, *case.train)
    assert influence.reducer.passes == passes
    for damping, found in zip(dampings, together, strict=True):
        torch.testing.assert_close(found, fitted(case, damping).influences(*case.test, *case.train))
        again = influence.with_damping(damping).influences(*case.test, *case.train)
        torch.testing.assert_close(found, again)


def test_relative_damping_is_a_share_of_each_layers_mean_eigenvalue(case: Case) -> None:
    influence = fitted(case, RelativeDamping(0.1))
    exact = Reference(case).ggn()
    for block, columns in influence.risk.blocks.columns.items():
        own = exact[columns, columns]  # EKFAC keeps the trace
        assert influence.damping[block] == pytest.approx(0.1 * float(own.trace()) / own.shape[0], rel=1e-9)


def test_dampings_by_layer(case: Case) -> None:
    damping = {"0": 0.01, "2": 1.0}
    influence = fitted(case, damping)
    parts = {
        block: fitted(case, value).influences_by_block(*case.test, *case.train)[block]
        for block, value in damping.items()
    }
    torch.testing.assert_close(influence.influences(*case.test, *case.train), parts["0"] + parts["2"])


def test_no_damping_takes_the_pseudo_inverse_and_says_so() -> None:
    case = network("linear", n_train=3)  # fewer samples than directions
    influence = fitted(case, 0.0, fisher="empirical")
    assert any("pseudo-inverse" in remark for state in influence._fitted().states.values() for remark in state.remarks)
    test, train = (Reference(case).gradients(data) for data in (case.test, case.train))
    expected = sum(
        test[:, own] @ torch.linalg.pinv(influence.operators[block].dense(), hermitian=True) @ train[:, own].T
        for block, own in influence.risk.blocks.columns.items()
    )
    torch.testing.assert_close(influence.influences(*case.test, *case.train), expected)


# how far it is from the Gauss–Newton matrix


def test_residuals_refer_to_the_gauss_newton_matrix_and_are_measured_where_asked(case: Case) -> None:
    influence = fitted(case, residual_rows=2)
    factors, report = influence.influence_factors(*case.test, return_report=True)
    matrix = Reference(case).ggn() + DAMPING * torch.eye(influence.n_parameters).double()
    gradients = Reference(case).gradients(case.test)
    expected = (gradients - factors @ matrix).norm(dim=1) / gradients.norm(dim=1)
    measured = [1, 3]
    torch.testing.assert_close(report.relative_residual[measured], expected[measured], rtol=1e-8, atol=0)
    assert report.relative_residual[[0, 2, 4]].isnan().all()
    assert str(report).startswith("0 of 2 measured rows (5 in all) converged")
    assert not report.converged.any()
    assert any("2 of 5 rows" in remark for remark in report.remarks)
    exact = Reference(case).influences("ggn", DAMPING)
    errors = (influence.influences(*case.test, *case.train) - exact).abs()
    assert report.error_bound is not None and report.rigorous
    allowed = report.error_bound[measured, None] * Reference(case).gradients(case.train).norm(dim=1)
    assert (errors[measured] <= allowed).all()


def test_nothing_is_claimed_of_rows_that_were_not_measured(case: Case) -> None:
    influence = fitted(case)
    passes = influence.reducer.passes
    _, report = influence.influence_factors(*case.test, return_report=True)
    assert influence.reducer.passes == passes
    assert report.relative_residual.isnan().all() and not report.converged.any()
    assert report.error_bound is None and influence.kind_of_bound == "none"


@pytest.mark.parametrize("damping", [DAMPING, {"0": 0.02, "2": 0.3}])
def test_conjugate_gradients_from_ekfac_come_to_the_exact_answer(case: Case, damping: Any) -> None:
    matrix = Reference(case).ggn()
    by_column = torch.full((matrix.shape[0],), DAMPING).double()
    if isinstance(damping, dict):
        by_column = torch.cat([torch.full((25,), damping["0"]), torch.full((18,), damping["2"])]).double()
    reference = Reference(case)
    exact = torch.linalg.solve(matrix + torch.diag(by_column), reference.gradients(case.test).T).T
    few = fitted(case, damping, cg_iterations=3)
    passes = few.reducer.passes
    factors, report = few.influence_factors(*case.test, return_report=True)
    assert few.reducer.passes == passes + 4  # one for each step and one for the residuals
    assert report.iterations.tolist() == [3] * 5
    assert (report.relative_residual > 1e-9).all()
    plain = fitted(case, damping).influence_factors(*case.test)
    error, before = (factors - exact).norm(), (plain - exact).norm()
    assert error < before / 2
    many = fitted(case, damping, cg_iterations=200)
    factors, report = many.influence_factors(*case.test, return_report=True)
    assert report.converged.all()
    torch.testing.assert_close(factors, exact, rtol=1e-5, atol=1e-6)
    assert report.error_bound is not None
    exact_scores = exact @ reference.gradients(case.train).T
    found = many.influences(*case.test, *case.train)
    assert (
        (found - exact_scores).abs() <= report.error_bound[:, None] * reference.gradients(case.train).norm(dim=1)
    ).all()


def test_as_a_preconditioner_it_is_nearer_after_a_few_iterations(case: Case) -> None:
    exact = Reference(case).factors("ggn", DAMPING)
    matrix = Reference(case).ggn() + DAMPING * torch.eye(exact.shape[1]).double()

    def error(preconditioner: EkfacPreConditioner | None) -> float:
        model = CgInfluence(
            case.model,
            case.loss,
            DAMPING,
            rtol=1e-12,
            maxiter=3,
            second_order_mode="ggn",
            pre_conditioner=preconditioner,
            use_block_cg=False,
        )
        difference = model.fit(case.train).influence_factors(*case.test) - exact
        return math.sqrt(((difference @ matrix) * difference).sum())  # what conjugate gradients minimise

    assert error(EkfacPreConditioner(fitted(case))) < error(None)


def test_a_preconditioner_keeps_neither_model_nor_data(case: Case) -> None:
    preconditioner = EkfacPreConditioner(fitted(case))
    copied = pickle.loads(pickle.dumps(preconditioner))
    rows = torch.randn(2, 43).double()
    assert torch.equal(copied.ekfac.inverse(rows, 0.1), preconditioner.ekfac.inverse(rows, 0.1))
    assert b"Sequential" not in pickle.dumps(preconditioner)
    with pytest.raises(NotFittedError):
        EkfacPreConditioner(EkfacInfluence(case.model))


def test_a_preconditioners_columns_are_in_the_order_of_the_model() -> None:
    case = network("one weight in two modules")
    influence = fitted(case)
    rows = torch.randn(3, influence.n_parameters).double()
    full = DirectInfluence(case.model, case.loss, 0.1).risk.blocks
    found = full.unflatten(influence.kronecker_inverse().inverse(rows, 0.1))
    own = influence.risk.blocks.flatten(full.unflatten(rows), n_leading=1)
    expected = influence.risk.blocks.unflatten(fitted(case, 0.1)._fitted().solve(influence._by_block(own))[0])
    for name in full.shapes:
        torch.testing.assert_close(found[name], expected[name])


def test_verify_compares_with_the_gauss_newton_matrix(case: Case) -> None:
    influence = fitted(case, cg_iterations=200)
    _, report = influence.influence_factors(*case.test, return_report=True)
    given = influence.influences(*case.test, *case.train).numpy()
    assert report.error_bound is not None
    rows, columns = np.arange(5), np.arange(24)
    checked = verify_entries(
        given, influence, rows, columns, case.test, case.train, report.error_bound.numpy(), "EkfacInfluence"
    )
    assert checked.converged and (np.abs(checked.given - checked.exact) <= checked.bound).all()


# self-influence, compression


def test_self_influence_is_the_diagonal(case: Case) -> None:
    influence = fitted(case)
    found = influence.self_influences(*case.train)
    torch.testing.assert_close(found.values, influence.influences(*case.train).diagonal())
    assert torch.equal(found.lower, found.upper)


@pytest.mark.parametrize("name", ["linear", "linear on a sequence", "conv2d, two groups"])
def test_compressed_queries_are_off_by_no_more_than_what_is_measured(name: str) -> None:
    case = network(name)
    whole, compressed = fitted(case), fitted(case, query_energy=0.9)
    factors = whole.influence_factors(*case.test)
    error = compressed.query_error(factors)
    assert (error < (1 - 0.9) ** 0.5 + 1e-12).all()
    difference = (
        compressed.influences_from_factors(factors, *case.train) - whole.influences_from_factors(factors, *case.train)
    ).abs()
    allowed = (error * factors.norm(dim=1))[:, None] * Reference(case).gradients(case.train).norm(dim=1)
    assert (difference <= allowed + 1e-12).all()
    assert float(whole.query_error(factors).max()) == 0


def test_low_rank_scores_are_those_of_the_truncated_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    x, y = torch.randn(30, 24).double(), torch.randint(3, (30,))
    case = Case(model, nn.CrossEntropyLoss(), (x, y), (x[:4], y[:4]))
    influence = fitted(case, query_energy=0.8)
    factors = influence.influence_factors(*case.test)
    assert float(influence.query_error(factors).max()) > 0.01  # or nothing would be compared
    found = influence.influences_from_factors(factors, x, y)
    prepared = influence._layers.queries(factors)
    parts = influence.risk.blocks.unflatten(factors)
    for unit, own in zip(influence.layout.units, prepared, strict=True):
        if isinstance(own, LowRank):
            parts |= unit.tensors(own.u @ own.v.transpose(2, 3), influence.risk.blocks.shapes)
    assert isinstance(prepared[0], LowRank)
    truncated = influence.risk.blocks.flatten(parts, n_leading=1)
    torch.testing.assert_close(found, truncated @ Reference(case).gradients((x, y)).T)


def test_scores_of_kfac_separate_into_few_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 160), nn.Tanh(), nn.Linear(160, 3)).double()
    x, y = torch.randn(40, 200).double(), torch.randint(3, (40,))
    influence = EkfacInfluence(model, False, RelativeDamping(0.1)).fit((x, y))
    fit = influence._fitted()
    query = fit.curvature.direct.queries(fit, influence.place(x[:4], y[:4]))[0]
    assert isinstance(query, RankOne) and query.separated is not None
    assert query.separated[0].shape[2] < 160 * 201 / (2 * (160 + 201))
    found = influence.influences(x[:4], y[:4], x, y)
    expected = influence.influences_from_factors(influence.influence_factors(x[:4], y[:4]), x, y)
    # weights are off by at most 1e-12 of the largest, 1/λ, and so are scores by that times both gradients' norms
    norms = influence.loss_gradients(influence.place(x, y)).norms
    allowed = 1e-12 / min(influence.damping.values()) * float(norms.max()) ** 2
    assert float((found - expected).abs().max()) <= 2 * allowed


# states, chunks, workers


@pytest.mark.parametrize(
    "name", ["linear", "conv2d, two groups", "a bilinear layer and an LSTM", "embedding with padding"]
)
def test_a_fitted_state_is_restored_without_a_pass(name: str) -> None:
    case = network(name)
    influence = fitted(case)
    arrays = {key: tensor.clone() for key, tensor in influence.state_arrays().items()}
    other = pickle.loads(cloudpickle.dumps(influence.unbound())).bound_to(case.model)
    reducer = LocalReducer(other.risk, case.train)
    other.restore(reducer, arrays, influence.fit_report)
    assert reducer.passes == 0
    assert torch.equal(other.influences(*case.test, *case.train), influence.influences(*case.test, *case.train))


def test_a_layout_travels_as_bytes(case: Case) -> None:
    layout = fitted(case).layout
    assert LayerLayout.from_tensor(layout.to_tensor()) == layout


@pytest.mark.parametrize("batch_size", [1, 5, 24])
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding with padding", "a bilinear layer and an LSTM"])
def test_how_the_data_are_cut_changes_nothing(name: str, batch_size: int) -> None:
    case = network(name)
    whole = fitted(case, fisher="sampled", n_draws=3).influences(*case.test, *case.train)
    loader = DataLoader(TensorDataset(*case.train), batch_size=batch_size)
    cut = EkfacInfluence(case.model, True, DAMPING, loss=case.loss, fisher="sampled", n_draws=3).fit(loader)
    torch.testing.assert_close(cut.influences(*case.test, *case.train), whole, rtol=1e-8, atol=1e-10)
    one_by_one = [cut.influences(*case.test, x[None], y[None]) for x, y in zip(*case.train, strict=True)]
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), whole, rtol=1e-8, atol=1e-10)


def test_in_chunks_in_this_process(case: Case, tmp_path: Any) -> None:
    calculator = SequentialInfluenceCalculator(EkfacInfluence(case.model, True, DAMPING, loss=case.loss))
    calculator.fit(*case.train, chunk_size=7)
    calculator.to_zarr(tmp_path / "out.zarr", *case.test)
    expected = fitted(case).influences(*case.test, *case.train).numpy()
    found = open_influences(tmp_path / "out.zarr").influences[:]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes(dtype: torch.dtype) -> None:
    wide = network("conv2d")
    model = copy.deepcopy(wide.model).to(dtype)
    narrow = Case(model, wide.loss, (wide.train[0].to(dtype), wide.train[1]), (wide.test[0].to(dtype), wide.test[1]))
    back = copy.deepcopy(model).double()
    same = Case(back, wide.loss, (narrow.train[0].double(), wide.train[1]), (narrow.test[0].double(), wide.test[1]))
    found = fitted(narrow).influences(*narrow.test, *narrow.train)
    expected = fitted(same).influences(*same.test, *same.train)
    assert found.dtype == torch.float32
    # rounding of float32 times the condition number of A + λI, at most 1e2 here
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_callers_mode_changes_nothing(case: Case, context: Any) -> None:
    with context():
        influence = fitted(case)
        found = influence.influences(*case.test, *case.train).clone()
    torch.testing.assert_close(found, fitted(case).influences(*case.test, *case.train))
    assert float(found.abs().max()) > 0


def test_the_users_model_is_as_it_was(case: Case) -> None:
    before = pickle.dumps(case.model.state_dict())
    state = torch.get_rng_state()
    fitted(case, fisher="sampled").influences(*case.test, *case.train)
    assert pickle.dumps(case.model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    assert all(not module._forward_hooks and not module._backward_hooks for module in case.model.modules())


def test_gradients_by_layer_are_autograds(case: Case) -> None:
    influence = fitted(case)
    found = influence.loss_gradients(influence.place(*case.train))
    torch.testing.assert_close(found.rows, Reference(case).gradients(case.train))
    tile = influence.tile(influence.influence_factors(*case.test), influence.place(*case.train))
    torch.testing.assert_close(tile.gradient_norms, found.norms)
    torch.testing.assert_close(tile.losses, found.values)


def test_gradient_norms_of_every_kind_of_layer() -> None:
    for name in ("linear on a sequence", "conv2d", "embedding with padding", "a residual network"):
        case = network(name)
        for energy in (None, 0.5):
            influence = fitted(case, query_energy=energy)
            tile = influence.tile(influence.influence_factors(*case.test), influence.place(*case.train))
            torch.testing.assert_close(tile.gradient_norms, Reference(case).gradients(case.train).norm(dim=1))


def test_other_measurements_than_the_loss_are_scored() -> None:
    from distinfluence import SupervisedObjective

    class Margin(SupervisedObjective):
        def measurements(self, model: Any, batch: Any) -> Tensor:
            x, y = batch
            margin: Tensor = model(x).gather(1, y[:, None])[:, 0]
            return margin

    case = network("linear")
    influence = EkfacInfluence(case.model, True, DAMPING, loss=Margin(nn.CrossEntropyLoss())).fit(case.train)
    x, y = case.test
    parameters = list(case.model.parameters())
    rows = []
    for a, b in zip(x, y, strict=True):
        parts = torch.autograd.grad(case.model(a[None])[0, b], parameters)
        rows.append(torch.cat([part.flatten() for part in parts]))
    expected = influence.kronecker_inverse().inverse(torch.stack(rows), DAMPING)
    torch.testing.assert_close(influence.influence_factors(x, y), expected)


def test_the_pass_over_a_chunk_is_one_forward_evaluation(case: Case) -> None:
    calls: list[int] = []

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(args[0].shape[0])

    handle = case.model.register_forward_pre_hook(count)
    try:
        influence = fitted(case, fisher="sampled")
        fit = list(calls)
        calls.clear()
        influence.tile(influence.influence_factors(*case.test), influence.place(*case.train))
    finally:
        handle.remove()
    assert fit.count(24) == 2  # the two sums; the rest are checks on a few samples
    assert calls == [5, 24]  # queries, then training samples


# refusals and failures


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fisher": "true"}, "fisher"),
        ({"weight_sharing": "sum"}, "weight_sharing"),
        ({"n_draws": 0}, "n_draws"),
        ({"cg_iterations": -1}, "cg_iterations"),
        ({"residual_rows": 1.5}, "residual_rows"),
        ({"query_energy": 0.0}, "query_energy"),
        ({"most_dense": -1}, "most_dense"),
    ],
)
def test_bad_settings_are_named(case: Case, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        EkfacInfluence(case.model, **settings)


def test_infinite_activations_are_named_by_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    data = torch.full((3, 2), 1e200, dtype=torch.float64), torch.tensor([0, 1, 0])
    with pytest.raises(NonFiniteError):
        EkfacInfluence(model, True, 0.1).fit(data)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decompositions that fail as often as the list says."""
    left = [0]
    decompose = torch.linalg.eigh

    def eigh(matrix: Tensor) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("did not converge")
        return decompose(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return left


def test_a_decomposition_that_fails_is_tried_again_with_jitter(case: Case, failing: list[int]) -> None:
    expected = fitted(case, fisher="empirical").influences(*case.test, *case.train)
    failing[0] = 1
    found = fitted(case, fisher="empirical").influences(*case.test, *case.train)
    assert failing[0] == 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_decomposition_that_keeps_failing_names_the_layer(case: Case, failing: list[int]) -> None:
    failing[0] = 100
    with pytest.raises(DecompositionError, match=r"0\.weight"):
        fitted(case, fisher="empirical")


def test_large_factors_keep_their_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    from distinfluence.curvature import fisher_sums

    monkeypatch.setattr(fisher_sums, "MOST_FACTOR", 3)
    case = network("linear")
    influence = fitted(case)
    exact = Reference(case).ggn()
    operator = influence.operators["0"]
    assert isinstance(operator, KroneckerOperator)
    (basis,) = operator.bases
    assert basis.left is None and basis.right is None  # 5 outputs, 4 inputs and a bias
    expected = torch.cat([exact.diagonal()[:20].view(5, 4), exact.diagonal()[20:25].view(5, 1)], dim=1)
    torch.testing.assert_close(basis.values[0], expected)


def test_blocks_without_structure_are_whole_then_by_moments_then_diagonal() -> None:
    case = build("lstm")
    influence = fitted(case, most_dense=10)
    treatments = influence.fit_report.treatments
    assert treatments["lstm.weight_ih_l0"] == "factors of its gradients' moments 12×2"
    assert treatments["lstm.bias_ih_l0"] == "diagonal block of 12"
    assert influence.fit_report.coverage == 1
    assert any("moments" in remark for remark in influence.fit_report.remarks)


def test_a_record_is_one_forward_pass_whatever_the_number_of_vectors(case: Case) -> None:
    risk = fitted(case).risk
    batch = risk.place(case.train)
    layout, passes = layout_of(risk, batch), list[int]()
    handle = case.model.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[0]))
    try:
        record = Record(risk, layout, batch)
        vectors = torch.randn(4, 24, 3).double()
        first, last = record.deltas(vectors)
    finally:
        handle.remove()
    assert passes == [24]
    hidden, head = case.model[0], case.model[2]  # tanh between them
    slope = 1 - torch.tanh(hidden(case.train[0]).detach()) ** 2
    torch.testing.assert_close(last, vectors)
    torch.testing.assert_close(first, vectors @ head.weight.detach() * slope)


class Routed(nn.Module):
    """Which layer is used depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.low(x)
        high = x[:, :1] > 10
        return torch.where(high, self.high(x), out) if bool(high.any()) else out


def test_layers_that_depend_on_the_data_are_refused_with_the_remedy_that_works() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    x[5, 0] = 11.0  # not among the first few
    model = Routed().double()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    with pytest.raises(LayoutError, match="recognise=False"):
        EkfacInfluence(model, True, 0.1).fit(batches)
    influence = EkfacInfluence(model, True, 0.1, recognise=False).fit(batches)
    exact = Reference(Case(model, nn.CrossEntropyLoss(), (x, y), (x, y))).ggn()
    own = influence.risk.blocks.columns["low"]
    torch.testing.assert_close(influence.operators["low"].dense(), exact[own, own])


def test_any_seed_is_taken(case: Case) -> None:
    def scores(seed: int) -> Tensor:
        return fitted(case, fisher="sampled", seed=seed).influences(*case.test, *case.train)

    exact = fitted(case).influences(*case.test, *case.train)
    found = {seed: scores(seed) for seed in (1, -1, 2**70)}
    for seed, values in found.items():
        assert torch.equal(scores(seed), values)
        assert not any(torch.equal(values, other) for another, other in found.items() if another != seed)
        # a draw for each of 24 samples in place of an expectation
        assert float(nn.functional.cosine_similarity(values.flatten(), exact.flatten(), dim=0)) > 0.9
