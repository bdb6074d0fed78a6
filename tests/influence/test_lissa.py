"""LiSSA behind the influence interface: starts, ragged mini-batches, settings."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import LissaInfluence
from distinfluence.errors import SettingError, ShapeError
from tests.reference import Reference
from tests.zoo import build


@pytest.mark.parametrize("structure", ["full", "layer_wise"])
@pytest.mark.parametrize("rows", [True, False])
def test_a_start_over_all_parameters_is_cut_by_block(structure: str, rows: bool) -> None:
    case = build("mlp classification", n_test=6 if rows else 1)
    settings = {
        "rtol": 1e-8,
        "scale": 4.0,
        "full_batch": True,
        "second_order_mode": "ggn",
        "block_structure": structure,
    }
    cold = LissaInfluence(case.model, case.loss, 1.0, **settings).fit(case.train)
    factors, slow = cold.influence_factors(*case.test, return_report=True)
    start = 4.0 * (factors if rows else factors[0])
    warm = LissaInfluence(case.model, case.loss, 1.0, h0=start, **settings).fit(case.train)
    again, fast = warm.influence_factors(*case.test, return_report=True)
    assert slow.converged.all()
    assert fast.converged.all()
    assert int(fast.iterations.max()) <= 2 < int(slow.iterations.min())
    # ‖x − x*‖ ≤ ‖r‖/λ for both, and ‖x*‖ ≥ ‖g‖/(‖A‖ + λ)
    norm = float(torch.linalg.matrix_norm(Reference(case).matrix("ggn"), 2))
    assert float((again - factors).norm()) <= 2e-8 * (norm + 1) * float(factors.norm())


def test_a_start_of_another_size_is_refused_before_anything_is_computed() -> None:
    case = build("mlp classification")
    with pytest.raises(ShapeError, match=r"`h0` must be \[p\] or \[k, p\] with p=43, got \[42\]"):
        LissaInfluence(case.model, case.loss, 0.05, h0=torch.zeros(42))
    with pytest.raises(SettingError, match="`h0` must be a tensor"):
        LissaInfluence(case.model, case.loss, 0.05, h0=0.0)


def test_settings_tell_starts_apart_without_their_numbers() -> None:
    case = build("mlp classification")
    starts = [None, torch.zeros(43), torch.ones(43), torch.zeros(1, 43)]
    found = [LissaInfluence(case.model, case.loss, 0.05, h0=start).settings()["h0"] for start in starts]
    assert found[0] is None
    assert len(set(found)) == 4
    assert all(len(str(value)) < 100 for value in found)


def test_mini_batches_of_a_loader_lead_near_the_reference_and_say_how_near() -> None:
    case = build("mlp classification")
    loader = DataLoader(TensorDataset(*case.train), batch_size=5)  # 23 samples: three in the last
    model = LissaInfluence(case.model, case.loss, 0.5, maxiter=250, scale=10.0, second_order_mode="ggn").fit(loader)
    factors, report = model.influence_factors(*case.test, return_report=True)
    expected = Reference(case).factors("ggn", 0.5)
    error = (factors - expected).norm(dim=1) / expected.norm(dim=1)
    # ‖x − x*‖ ≤ ‖r‖/λ, and ‖x*‖ ≥ ‖g‖/(‖A‖ + λ)
    norm = float(torch.linalg.matrix_norm(Reference(case).matrix("ggn"), 2))
    assert (error <= report.relative_residual * (norm + 0.5) / 0.5).all()
    assert (report.relative_residual < 0.1).all()
    assert "the rest is noise" in report.remarks[0]
    assert torch.equal(model.influence_factors(*case.test), factors)
