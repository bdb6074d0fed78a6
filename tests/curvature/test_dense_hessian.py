"""The whole Hessian by the outputs of layers, beside autograd's, and when it is not used."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import EmpiricalRisk, HessianOperator
from distinfluence.curvature import dense_hessian
from tests.layers.networks import NETWORKS, network
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, build

CHAINS = {
    "linear",
    "linear without bias",
    "a LoRA adapter",
    "mlp classification",
    "mlp regression",
}


def case_of(name: str) -> Case:
    return network(name) if name in NETWORKS else build(name, n_train=9)


def in_block_order(case: Case, matrix: torch.Tensor, risk: EmpiricalRisk) -> torch.Tensor:
    assert list(risk.blocks.shapes) == Reference(case).names  # one block: the model's own order
    return matrix


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [*NETWORKS, *BUILDERS])
def test_it_is_autograds_and_takes_two_products_where_the_model_is_a_chain_of_layers(name: str) -> None:
    case = case_of(name)
    operator = HessianOperator(EmpiricalRisk(case.model, case.loss, case.train))
    expected = in_block_order(case, Reference(case).hessian(), operator.risk)
    torch.testing.assert_close(operator.dense(), expected, rtol=1e-9, atol=1e-11)
    assert operator.work.rows == (2 if name in CHAINS else operator.size)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_chunks_add_up(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_hessian, "DIRECTION_BYTES", 1)  # one sample and one direction at a time
    case = case_of("linear")
    loader = DataLoader(TensorDataset(*case.train), batch_size=batch_size)
    operator = HessianOperator(EmpiricalRisk(case.model, case.loss, loader))
    torch.testing.assert_close(operator.dense(), Reference(case).hessian(), rtol=1e-9, atol=1e-11)
    assert operator.work.rows == 2


def test_each_block_alone() -> None:
    case = case_of("linear")
    risk = EmpiricalRisk(case.model, case.loss, case.train, block_structure="layer_wise")
    exact = Reference(case).hessian()
    for block, columns in risk.blocks.columns.items():
        operator = HessianOperator(risk, block)
        torch.testing.assert_close(operator.dense(), exact[columns, columns], rtol=1e-9, atol=1e-11)
        assert operator.work.rows == 2


def test_branches_that_share_an_input_and_layers_in_another_order_than_their_names() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.left, self.right = nn.Linear(5, 3), nn.Linear(4, 5), nn.Linear(4, 5, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(torch.tanh(self.left(x)) * torch.sigmoid(self.right(x)))
            return out

    torch.manual_seed(0)
    data = torch.randn(7, 4).double(), torch.randint(3, (7,))
    case = Case(Branches().double(), nn.CrossEntropyLoss(), data, data)
    operator = HessianOperator(EmpiricalRisk(case.model, case.loss, case.train))
    torch.testing.assert_close(operator.dense(), Reference(case).hessian(), rtol=1e-9, atol=1e-11)
    assert operator.work.rows == 2


def test_a_matrix_that_does_not_agree_with_a_product_is_made_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("linear")
    operator = HessianOperator(EmpiricalRisk(case.model, case.loss, case.train))
    in_columns = dense_hessian._in_columns
    monkeypatch.setattr(dense_hessian, "_in_columns", lambda *args: 1.01 * in_columns(*args))
    torch.testing.assert_close(operator.dense(), Reference(case).hessian(), rtol=1e-9, atol=1e-11)
    assert operator.work.rows == 2 + operator.size


def test_in_single_precision() -> None:
    case = case_of("linear")
    expected = Reference(case).hessian()
    narrow = case.model.float()
    operator = HessianOperator(EmpiricalRisk(narrow, case.loss, (case.train[0].float(), case.train[1])))
    assert operator.dense().dtype == torch.float64
    # sums of 9 samples in float32
    assert float((operator.dense() - expected).norm() / expected.norm()) < 1e-5
    wide = operator.in_double().dense()
    assert float((wide - expected).norm() / expected.norm()) < 1e-6  # rounding of the parameters to float32 is left
