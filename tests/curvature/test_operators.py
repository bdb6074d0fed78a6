"""Curvature operators against dense float64 references, one contract for all."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import EmpiricalFisherOperator, EmpiricalRisk, GGNOperator, HessianOperator
from distinfluence.curvature import (
    DataOperator,
    MatrixOperator,
    NoCurvature,
    SecondOrderMode,
    empirical_fisher,
    operator_class,
    over_data,
)
from distinfluence.errors import NonFiniteError, ParameterBlockError, ShapeError
from distinfluence.model import gradients, sample_risk
from distinfluence.model import reducer as reducer_module
from distinfluence.model.alternatives import Alternatives
from distinfluence.model.objective import SupervisedObjective
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.testing import OperatorContract
from distinfluence.testing.systems import randn
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, build

# sums of 23 samples in another order, entries up to about 1: a few hundred roundings of float64
ROUNDING: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def in_batches(case: Case, size: int) -> list[tuple[Tensor, Tensor]]:
    x, y = case.train
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


class HalfUsed(nn.Module):
    """Has a layer that no output depends on."""

    def __init__(self, used: nn.Module) -> None:
        super().__init__()
        self.used = used
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


class DataOperatorContract(OperatorContract):
    """What every operator over data must do."""

    operator: ClassVar[type[DataOperator]]
    mode: ClassVar[str]
    what: ClassVar[str]

    def of(self, case: Case, size: int = 5, block: str | None = None, **risk: Any) -> DataOperator:
        return self.operator(EmpiricalRisk(case.model, case.loss, in_batches(case, size), **risk), block)

    def make(self) -> DataOperator:
        return self.of(build("cnn"))

    def matrix(self) -> Tensor:
        return Reference(build("cnn")).matrix(self.mode)

    @pytest.mark.parametrize("name", BUILDERS)
    def test_the_dense_matrix_is_the_reference(self, name: str) -> None:
        case = build(name)
        torch.testing.assert_close(self.of(case).dense(), Reference(case).matrix(self.mode), **ROUNDING)

    @pytest.mark.parametrize("name", BUILDERS)
    def test_products_with_more_rows_than_parameters_are_the_reference(self, name: str) -> None:
        case = build(name)
        operator = self.of(case)
        rows = torch.randn(operator.size + 3, operator.size, dtype=torch.float64)
        rows[1], rows[2] = rows[0], 0
        expected = rows @ Reference(case).matrix(self.mode)
        torch.testing.assert_close(operator.matmat(rows), expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("size", [1, 7, 22, 23])
    def test_ragged_batches_weigh_what_they_hold(self, size: int) -> None:
        case = build("mlp classification")
        torch.testing.assert_close(self.of(case, size).dense(), Reference(case).matrix(self.mode), **ROUNDING)

    def test_one_sample_is_enough(self) -> None:
        case = build("mlp regression", n_train=1)
        torch.testing.assert_close(self.of(case).dense(), Reference(case).matrix(self.mode), **ROUNDING)

    @pytest.mark.parametrize("looped", [False, True])
    def test_parameters_without_any_effect_have_a_zero_row_and_column(self, looped: bool) -> None:
        base = build("mlp classification")
        case = Case(HalfUsed(base.model).double(), base.loss, base.train, base.test)
        operator = self.of(case)
        if looped:
            operator.risk.sample.ways.chosen = dict.fromkeys(("Hessian products", "GGN products", "loss gradients"), 1)
        dense = operator.dense()
        torch.testing.assert_close(dense[:43, :43], Reference(base).matrix(self.mode), **ROUNDING)
        assert not dense[43:].any() and not dense[:, 43:].any()

    def test_a_product_is_one_pass_however_many_rows(self) -> None:
        operator = self.of(build("mlp classification"))
        passes = operator.risk.reducer.passes
        operator.matmat(torch.randn(100, operator.size, dtype=torch.float64))
        assert (operator.work.passes, operator.work.rows) == (1, 100)
        assert operator.risk.reducer.passes == passes + 1

    def test_no_rows_cost_no_pass(self) -> None:
        operator = self.of(build("mlp classification"))
        assert operator.matmat(torch.zeros(0, operator.size, dtype=torch.float64)).shape == (0, operator.size)
        assert operator.work.passes == 0

    @pytest.mark.parametrize("name", ["mlp classification", "tied weights"])
    @pytest.mark.parametrize("structure", ["layer_wise", "parameter_wise"])
    def test_a_blocks_operator_is_a_diagonal_block_of_the_whole(self, structure: str, name: str) -> None:
        case = build(name)
        risk = EmpiricalRisk(case.model, case.loss, in_batches(case, 5), block_structure=structure)
        whole = Reference(case).matrix(self.mode)
        for block, columns in risk.blocks.columns.items():
            torch.testing.assert_close(self.operator(risk, block).dense(), whole[columns, columns], **ROUNDING)

    def test_float32_stays_float32_and_close(self) -> None:
        case32, case = build("mlp classification", dtype=torch.float32), build("mlp classification")
        operator = self.of(case32)
        rows = torch.randn(4, operator.size)
        product = operator.matmat(rows)
        assert product.dtype is torch.float32
        torch.testing.assert_close(
            product.double(), rows.double() @ Reference(case).matrix(self.mode), rtol=1e-4, atol=1e-5
        )

    def test_frozen_parameters_are_left_out(self) -> None:
        case = build("mlp classification")
        case.model.get_parameter("0.bias").requires_grad_(False)
        operator = self.of(case)
        assert operator.size == 38
        torch.testing.assert_close(operator.dense(), Reference(case).matrix(self.mode), **ROUNDING)

    def test_a_loader_that_does_not_fit_in_memory_is_read_again_for_each_pass(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reducer_module, "KEPT_BYTES", 100)
        case = build("mlp classification")
        loader = DataLoader(TensorDataset(*case.train), batch_size=5)
        operator = self.operator(EmpiricalRisk(case.model, case.loss, loader))
        torch.testing.assert_close(operator.dense(), Reference(case).matrix(self.mode), **ROUNDING)
        torch.testing.assert_close(operator.dense(), Reference(case).matrix(self.mode), **ROUNDING)

    def test_products_of_attention_are_linear_and_symmetric(self) -> None:
        operator = self.of(build("attention"))
        u, v = torch.randn(2, 3, operator.size, dtype=torch.float64)
        along_u, along_v = operator.matmat(u), operator.matmat(v)
        torch.testing.assert_close(operator.matmat(2.0 * u - 3.0 * v), 2.0 * along_u - 3.0 * along_v, **ROUNDING)
        torch.testing.assert_close(along_u @ v.T, u @ along_v.T, **ROUNDING)

    def test_a_block_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ParameterBlockError, match="one of"):
            self.operator(self.of(build("mlp classification")).risk, "nothing")


class TestMatrix(OperatorContract):
    def make(self) -> MatrixOperator:
        return MatrixOperator(self.matrix())

    def matrix(self) -> Tensor:
        return randn(7, 7, seed=1) + randn(7, 7, seed=1).T


class TestHessian(DataOperatorContract):
    operator, mode, what = HessianOperator, "hessian", "Hessian products"

    def test_an_infinite_second_derivative_is_found(self) -> None:
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        risk = EmpiricalRisk(model, lambda f, y: f.abs().pow(1.5).mean(), (torch.ones(2, 1).double(), torch.ones(2)))
        with pytest.raises(NonFiniteError, match="second derivative"):
            HessianOperator(risk).dense()


class TestGGN(DataOperatorContract):
    operator, mode, what = GGNOperator, "ggn", "GGN products"

    @pytest.mark.parametrize("name", ["mlp classification", "cnn", "attention", "tied weights"])
    def test_it_is_positive_semidefinite(self, name: str) -> None:
        values = torch.linalg.eigvalsh(self.of(build(name)).dense())
        assert float(values[0]) >= -1e-12 * float(values[-1])

    def test_it_is_the_hessian_of_a_model_that_is_linear_in_its_parameters(self) -> None:
        case = build("mlp classification")
        linear = Case(nn.Linear(4, 3).double(), case.loss, case.train, case.test)
        hessian = HessianOperator(EmpiricalRisk(linear.model, linear.loss, linear.train))
        torch.testing.assert_close(self.of(linear).dense(), hessian.dense(), **ROUNDING)


class TestEmpiricalFisher(DataOperatorContract):
    operator, mode, what = EmpiricalFisherOperator, "empirical_fisher", "loss gradients"

    def test_it_is_positive_semidefinite(self) -> None:
        values = torch.linalg.eigvalsh(self.of(build("cnn")).dense())
        assert float(values[0]) >= -1e-12 * float(values[-1])

    def test_its_rank_is_at_most_the_number_of_samples(self) -> None:
        case = build("mlp classification", n_train=9)
        assert int(torch.linalg.matrix_rank(self.of(case).dense())) == 9


class TestNoCurvature(OperatorContract):
    def make(self) -> NoCurvature:
        data = torch.ones(4, 3).double(), torch.ones(4, 2).double()
        return NoCurvature(EmpiricalRisk(nn.Linear(3, 2).double(), nn.MSELoss(), data))

    def matrix(self) -> Tensor:
        return torch.zeros(8, 8, dtype=torch.float64)

    def test_products_functions_and_chunks_read_no_data(self) -> None:
        operator, rows = self.make(), self.rows(3)
        assert not operator.in_double().matmat(rows).any()
        assert not operator.batch_matmat(0, rows).any()
        assert torch.equal(operator.in_eigenbasis(rows, lambda values: 1 / (values + 0.5)), 2 * rows)
        assert operator.eigenvalues().tolist() == [0.0] * 8
        assert operator.risk.reducer.passes == 0


def test_every_second_order_mode_inherits_the_contract() -> None:
    tested = {kind.operator for kind in DataOperatorContract.__subclasses__()} | {NoCurvature}
    assert tested == {operator_class(mode) for mode in SecondOrderMode}


@pytest.mark.parametrize("kind", [TestHessian, TestGGN, TestEmpiricalFisher])
def test_models_that_vmap_cannot_take_go_through_plain_autograd(kind: type[DataOperatorContract]) -> None:
    operator = kind().of(build("branching"))
    operator.matmat(torch.randn(2, operator.size, dtype=torch.float64))
    choices = operator.risk.sample.ways.chosen
    if kind is TestEmpiricalFisher:
        assert choices[kind.what] == 1
    else:  # the derivatives of a whole batch take any model; which way is faster may change
        assert set(choices) == {f"{kind.what}, few rows"}
    operator = kind().of(build("mlp classification"))
    operator.matmat(torch.randn(2, operator.size, dtype=torch.float64))
    if kind is TestEmpiricalFisher:
        assert operator.risk.sample.ways.chosen[kind.what] == 0


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("name", ["mlp classification", "mlp regression", "cnn", "attention", "lstm", "tied weights"])
@pytest.mark.parametrize("kind", [TestHessian, TestGGN])
def test_every_way_to_a_product_gives_the_same(
    kind: type[DataOperatorContract], name: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(name)
    seen: list[int] = []

    def all_of_them(_risk: object, _what: str, ways: Any, small: Tensor, real: Tensor) -> Any:
        def product(rows: Tensor) -> Tensor:
            results: list[Tensor] = [way(rows) for way in ways]
            seen.append(len(results))
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-11)
            return results[0]

        return product

    monkeypatch.setattr(Alternatives, "fastest", all_of_them)
    operator = kind().of(case)
    rows = torch.randn(k, operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    expected = rows @ Reference(case).matrix(kind.mode)
    torch.testing.assert_close(operator.matmat(rows), expected, rtol=1e-9, atol=1e-10)
    assert min(seen) >= 2


def test_the_way_is_measured_once_for_few_and_once_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = Alternatives._measured

    def counting(risk: Alternatives, ways: Any, small: Any, real: Any) -> int:
        measured.append(len(real))
        return measure(risk, ways, small, real)

    monkeypatch.setattr(Alternatives, "_measured", counting)
    operator = TestGGN().of(build("mlp classification"))
    for k in (1, 2, 7, 8, 100, 1):
        operator.matmat(torch.randn(k, operator.size, dtype=torch.float64))
    assert measured == [1, 8]


def test_a_wrong_curvature_of_the_outputs_is_not_used() -> None:
    class Wrong(SupervisedObjective):
        def output_curvature(self, outputs: Tensor, batch: Any) -> Any:
            return lambda u: 2 * u

    case = build("mlp classification")
    operator = GGNOperator(EmpiricalRisk(case.model, Wrong(case.loss), case.train))
    rows = torch.randn(9, operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator.matmat(rows), rows @ Reference(case).ggn(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=1, reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
    ],
    ids=repr,
)
def test_the_closed_form_of_cross_entropy_is_its_derivative(loss: nn.Module) -> None:
    objective, generator = SupervisedObjective(loss), torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    batch = (outputs, torch.tensor([0, 1, 2, 1, 0]))
    curve = objective.output_curvature(outputs, batch)
    assert curve is not None
    _closed_form_is_the_derivative(objective, outputs, batch, curve)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum")], ids=repr)
@pytest.mark.parametrize("shape", [(5, 3), (5,), (5, 2, 2)])
def test_the_closed_form_of_the_squared_error_is_its_derivative(loss: nn.Module, shape: tuple[int, ...]) -> None:
    objective, generator = SupervisedObjective(loss), torch.Generator().manual_seed(0)
    outputs, targets = (torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(2))
    curve = objective.output_curvature(outputs, (outputs, targets))
    assert curve is not None
    _closed_form_is_the_derivative(objective, outputs, (outputs, targets), curve)


def _closed_form_is_the_derivative(objective: SupervisedObjective, outputs: Tensor, batch: Any, curve: Any) -> None:
    direction = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    f = outputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective.losses(f, batch).sum(), f, create_graph=True)
    (expected,) = torch.autograd.grad(slope, f, direction)
    torch.testing.assert_close(curve(direction), expected, rtol=1e-10, atol=1e-12)


def test_other_losses_have_no_closed_form() -> None:
    outputs, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for loss in (nn.NLLLoss(), nn.CrossEntropyLoss(weight=torch.ones(3), reduction="sum")):
        assert SupervisedObjective(loss).output_curvature(outputs, (outputs, targets)) is None
    assert SupervisedObjective(nn.CrossEntropyLoss()).output_curvature(outputs, (outputs, outputs.softmax(1))) is None


def test_gradients_are_made_once_for_all_passes_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = gradients.loss_gradients

    def counting(risk: SampleRisk, batch: Any) -> Any:
        made.append(len(batch[0]))
        return original(risk, batch)

    monkeypatch.setattr(empirical_fisher, "loss_gradients", counting)
    case = build("mlp classification")
    operator = EmpiricalFisherOperator(EmpiricalRisk(case.model, case.loss, case.train))
    rows = torch.randn(3, operator.size, dtype=torch.float64)
    first = operator.matmat(rows)
    assert torch.equal(operator.matmat(rows), first)
    operator.mean_square_gradient()
    assert sum(made) == 23
    monkeypatch.setattr(sample_risk, "KEPT_ROW_BYTES", 0)
    operator = EmpiricalFisherOperator(EmpiricalRisk(case.model, case.loss, case.train))
    assert torch.equal(operator.matmat(rows), first)
    assert torch.equal(operator.matmat(rows), first)
    assert sum(made) == 23 + 2 * 23


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize(
    "name", ["mlp classification", "attention", "tied weights", "batch norm and dropout in eval mode"]
)
def test_both_ways_of_making_a_product_agree(operator: type[DataOperator], name: str) -> None:
    """The way by plain autograd is the one that models get which torch.func cannot take: it must be right for all."""
    case = build(name)
    risk = EmpiricalRisk(case.model, case.loss, case.train)
    for what in ("Hessian products", "GGN products", "loss gradients"):
        risk.sample.ways.chosen[what] = 1
    mode = {HessianOperator: "hessian", GGNOperator: "ggn", EmpiricalFisherOperator: "empirical_fisher"}[operator]
    torch.testing.assert_close(operator(risk).dense(), Reference(case).matrix(mode), **ROUNDING)


SECOND_OPINIONS: dict[type[DataOperator], Callable[..., Any]] = {
    HessianOperator: HessianLinearOperator,
    GGNOperator: GGNLinearOperator,
    EmpiricalFisherOperator: EFLinearOperator,
}


@pytest.mark.parametrize("operator", SECOND_OPINIONS)
@pytest.mark.parametrize("name", ["mlp classification", "cnn"])
def test_curvlinops_agrees(operator: type[DataOperator], name: str) -> None:
    case = build(name)
    assert isinstance(case.loss, nn.CrossEntropyLoss)
    parameters = list(case.model.parameters())
    theirs = SECOND_OPINIONS[operator](
        case.model, case.loss, parameters, in_batches(case, 23), check_deterministic=False
    )
    identity = torch.eye(case.n_parameters, dtype=torch.float64)
    ours = operator(EmpiricalRisk(case.model, case.loss, in_batches(case, 5))).dense()
    torch.testing.assert_close(ours, torch.as_tensor(theirs @ identity).detach(), rtol=1e-9, atol=1e-11)


def test_a_matrix_is_an_operator_too() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    operator = MatrixOperator(matrix)
    torch.testing.assert_close(operator.dense(), matrix.double())
    with pytest.raises(ShapeError, match="square"):
        MatrixOperator(torch.zeros(2, 3))


@pytest.mark.parametrize(("convolves", "expected"), [(True, 4 * (28 + 2 * 26 + 2 * 26 + 10)), (False, 0)])
def test_activations_of_models_with_convolutions_are_counted_without_views(convolves: bool, expected: int) -> None:
    first = nn.Conv1d(1, 2, 3) if convolves else nn.Linear(28, 26)
    net = nn.Sequential(nn.Unflatten(1, (1, 28)), first, nn.Tanh(), nn.Flatten(), nn.LazyLinear(10))
    data = torch.randn(5, 28), torch.zeros(5, dtype=torch.long)
    net(data[0])
    risk = EmpiricalRisk(net, nn.CrossEntropyLoss(), [data]).sample
    assert over_data.convolved_bytes(risk, risk.place(data)) == expected
    many, few = (len(list(over_data.pieces_of(risk, risk.place(data), k))) for k in (100, 1))
    assert many == few == 1  # of fewer samples than a piece has


def test_pieces_hold_what_the_rows_at_once_leave_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("cnn", n_train=90)
    risk = EmpiricalRisk(case.model, case.loss, [case.train]).sample
    batch = risk.place(case.train)
    monkeypatch.setattr(over_data, "WORKING_BYTES", 16 * 45 * over_data.convolved_bytes(risk, batch))
    assert [len(list(over_data.pieces_of(risk, batch, k))) for k in (1, 8, 16, 1000)] == [1, 1, 2, 2]


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_products_of_a_chunk_in_pieces_are_those_of_the_chunk(
    operator: type[DataOperator], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(name)
    rows = torch.randn(3, case.n_parameters, dtype=torch.float64)
    whole = operator(EmpiricalRisk(case.model, case.loss, [case.train])).matmat(rows)
    monkeypatch.setattr(over_data, "convolved_bytes", lambda risk, batch: 1)  # as if all of them convolved
    monkeypatch.setattr(over_data, "WORKING_BYTES", 1)
    monkeypatch.setattr(over_data, "FEWEST", 5)
    risk = EmpiricalRisk(case.model, case.loss, [case.train])
    torch.testing.assert_close(operator(risk).matmat(rows), whole, rtol=1e-10, atol=1e-12)
    sizes = [len(piece[1]) for piece in over_data.pieces_of(risk.sample, risk.sample.place(case.train), 3)]
    assert sum(sizes) == 23
    assert set(sizes) == {4, 5}
