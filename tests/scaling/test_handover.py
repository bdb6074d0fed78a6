"""A fitted influence model handed to a calculator is fitted: the same answers, and nothing that does not belong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    KrylovInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    RelativeDamping,
    SequentialInfluenceCalculator,
)
from distinfluence.errors import FingerprintError, ModelModeError, NonDeterministicDataError, NotFittedError
from distinfluence.model import reducer as model_reducer
from distinfluence.scaling.calculator import InfluenceCalculator
from tests.reference import Reference
from tests.zoo import Case, build

DAMPING = 0.1
GGN: dict[str, Any] = {"second_order_mode": "ggn"}
METHODS: dict[str, Callable[[Case], InfluenceFunctionModel]] = {
    "direct": lambda case: DirectInfluence(case.model, case.loss, DAMPING, **GGN),
    "arnoldi": lambda case: ArnoldiInfluence(case.model, case.loss, DAMPING, 43, complement=True, **GGN),
    "nystroem": lambda case: NystroemSketchInfluence(case.model, case.loss, 43, DAMPING, **GGN),
    "ekfac": lambda case: EkfacInfluence(case.model, True, DAMPING, loss=case.loss, seed=3),
    "cg": lambda case: CgInfluence(case.model, case.loss, DAMPING, rtol=1e-12, atol=0.0, **GGN),
    "krylov": lambda case: KrylovInfluence(case.model, case.loss, DAMPING, rtol=1e-12, **GGN),
    "datainf": lambda case: InverseHarmonicMeanInfluence(case.model, case.loss, DAMPING),
    "lissa": lambda case: LissaInfluence(case.model, case.loss, DAMPING, maxiter=60, scale=None, seed=1, **GGN),
    "ekfac with cg": lambda case: EkfacInfluence(
        case.model, True, DAMPING, loss=case.loss, cg_iterations=60, residual_rows=1
    ),
}
EXACT = ("direct", "arnoldi", "nystroem", "cg", "krylov", "ekfac with cg")
WITHOUT_DATA = ("direct", "arnoldi", "nystroem", "ekfac")
# Sums over the fit's batches are added one by one, where the model in memory joins small batches.
ROUNDING: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
TO_ITS_TOLERANCE: dict[str, Any] = {"rtol": 1e-6, "atol": 3e-6}  # steps stop at 1e-7, in another block of rows sooner


@pytest.fixture
def case() -> Case:
    return build("mlp classification")


def batches(case: Case, size: int = 5, **settings: Any) -> "DataLoader[Any]":
    return DataLoader(TensorDataset(*case.train), batch_size=size, **settings)


def sequential(model: InfluenceFunctionModel) -> InfluenceCalculator:
    return SequentialInfluenceCalculator(model)


@pytest.mark.parametrize("method", METHODS)
def test_the_answers_are_those_of_the_model_in_memory(method: str, case: Case) -> None:
    model = METHODS[method](case).fit(batches(case))
    reducer = model.reducer
    calculator = sequential(model)
    found = calculator.influences(*case.test, *case.train, chunk_size=8).compute(scheduler="synchronous")
    expected = model.influences(*case.test, *case.train).numpy()
    close = TO_ITS_TOLERANCE if method == "ekfac with cg" else ROUNDING
    np.testing.assert_allclose(found, expected, **close)
    if method in EXACT:
        dense = Reference(case).influences("ggn", DAMPING).numpy()
        np.testing.assert_allclose(
            found, dense, **(close if close is TO_ITS_TOLERANCE else {"rtol": 1e-6, "atol": 1e-8})
        )
    factors = calculator.influence_factors(*case.test).compute(scheduler="synchronous")
    here = model.influence_factors(*case.test).numpy()
    np.testing.assert_allclose(factors, here, **close)
    if method in WITHOUT_DATA:
        assert (factors == here).all()  # the state alone, and the test points in one chunk
    assert model.reducer is reducer  # the user's own model keeps its fit
    assert calculator.model.reducer.chunk_sizes == (5, 5, 5, 5, 3)


def test_workers_of_a_cluster_take_it_over(client: Client, case: Case, tmp_path: Path) -> None:
    for method in ("ekfac", "nystroem", "cg", "lissa"):
        model = METHODS[method](case).fit(batches(case))
        calculator = DaskInfluenceCalculator(model, client)
        expected = model.influences(*case.test, *case.train).numpy()
        factors = calculator.influence_factors(*case.test, chunk_size=4)
        np.testing.assert_allclose(
            calculator.influences_from_factors(factors, *case.train).compute(), expected, rtol=1e-8, atol=1e-9
        )
        if method != "cg":
            continue
        for solve in ("rows", "data"):  # its own sweeps, and sums that are spread over the workers
            result = calculator.to_zarr(tmp_path / solve, *case.test, solve=solve, progress=False)
            np.testing.assert_allclose(result[:], expected, rtol=1e-6, atol=1e-6)
        again = SequentialInfluenceCalculator(calculator.model)  # fitted over the chunks of a cluster
        np.testing.assert_allclose(again.influences(*case.test).compute(scheduler="synchronous"), expected, **ROUNDING)


@pytest.mark.parametrize("first", ["gradients", "influence_factors", "influences", "from factors", "to_zarr"])
def test_any_method_takes_the_fit_over(first: str, case: Case, tmp_path: Path) -> None:
    model = METHODS["direct"](case).fit(case.train)
    calculator, dense = sequential(model), Reference(case)
    if first == "gradients":
        found: Any = calculator.gradients(*case.test).compute(scheduler="synchronous")
        expected = dense.gradients(case.test)
    elif first == "influence_factors":
        found = calculator.influence_factors(*case.test).compute(scheduler="synchronous")
        expected = dense.factors("ggn", DAMPING)
    elif first == "from factors":
        rows = dense.factors("ggn", DAMPING).numpy()
        found = calculator.influences_from_factors(rows).compute(scheduler="synchronous")
        expected = dense.influences("ggn", DAMPING)
    elif first == "influences":
        found = calculator.influences(*case.test).compute(scheduler="synchronous")
        expected = dense.influences("ggn", DAMPING)
    else:
        result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, progress=False)
        assert result.provenance["n_fit"] == 23
        found, expected = result[:], dense.influences("ggn", DAMPING)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5 if first == "to_zarr" else 1e-9)


def test_a_single_batch_is_cut_and_stochastic_steps_stay_full(case: Case) -> None:
    wide = build("mlp classification", n_train=300)
    model = METHODS["lissa"](wide).fit(wide.train)
    calculator = sequential(model)
    found = calculator.influence_factors(*wide.test).compute(scheduler="synchronous")
    assert calculator.model.reducer.chunk_sizes == (256, 44)
    np.testing.assert_allclose(found, model.influence_factors(*wide.test).numpy(), **ROUNDING)


@pytest.mark.parametrize("kind", ["relative", "another damping", "moved", "float32 in bfloat16"])
def test_whatever_was_done_to_the_fit_comes_along(kind: str, case: Case) -> None:
    damping: Any = RelativeDamping(0.1) if kind == "relative" else 0.5
    if kind == "float32 in bfloat16":
        case = build("mlp classification", dtype=torch.float32)
    model: InfluenceFunctionModel = CgInfluence(case.model, case.loss, damping, rtol=1e-12, atol=0.0, **GGN)
    model = (model.in_mixed_precision() if kind == "float32 in bfloat16" else model).fit(batches(case))
    if kind == "another damping":
        model = model.with_damping(DAMPING)
    if kind == "moved":
        model.to("cpu")
    calculator = sequential(model)
    found = calculator.influences(*case.test).compute(scheduler="synchronous")
    assert calculator.model.damping == model.damping
    expected = model.influences(*case.test, *case.train)
    if kind == "float32 in bfloat16":  # batches that are joined are rounded otherwise
        assert np.abs(found - expected.numpy()).max() <= 0.05 * float(expected.abs().max())
        return
    np.testing.assert_allclose(found, expected.numpy(), **TO_ITS_TOLERANCE)
    dense = Reference(case).influences("ggn", next(iter(model.damping.values())))
    np.testing.assert_allclose(found, dense.numpy(), rtol=1e-6, atol=1e-8)


def test_a_fit_by_the_calculator_overrides_it(case: Case) -> None:
    given = METHODS["direct"](case).fit(build("mlp classification", seed=2).train)
    model = CgInfluence(case.model, case.loss, RelativeDamping(0.1), rtol=1e-12, atol=0.0, **GGN).fit(given.reducer)
    before = model.damping
    calculator = sequential(model).fit(*case.train)
    damping = calculator.model.damping["full"]
    assert model.damping == before != calculator.model.damping
    found = calculator.influences(*case.test).compute(scheduler="synchronous")
    np.testing.assert_allclose(found, Reference(case).influences("ggn", damping).numpy(), rtol=1e-6, atol=1e-8)


def test_a_model_that_is_not_fitted_says_where_to_fit(case: Case) -> None:
    with pytest.raises(NotFittedError, match=r"`fit\(data\)` of the influence model .* `fit\(x, y\)` of the calc"):
        sequential(METHODS["direct"](case)).influences(*case.test)


class Shifted(nn.Module):
    """A buffer is added to the outputs."""

    shift: torch.Tensor

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("shift", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) + self.shift
        return out


@pytest.mark.parametrize("what", ["step", "data of a parameter", "buffer", "mode", "loss", "samples"])
def test_what_was_changed_after_the_fit_is_refused(what: str) -> None:
    plain, loss = build("mlp classification"), nn.CrossEntropyLoss(weight=torch.ones(3).double(), reduction="sum")
    network = Shifted(plain.model)
    case = replace(plain, model=network, loss=loss)
    model = METHODS["datainf"](case).fit(case.train)
    weight = next(network.parameters())
    error: type[Exception] = NotFittedError
    with torch.no_grad():
        if what == "step":
            weight.mul_(1.5)
        elif what == "data of a parameter":
            weight.data.mul_(1.5)
        elif what == "buffer":
            network.shift.add_(torch.tensor([1.0, 0.0, 2.0]))
        elif what == "mode":
            network.inner.append(nn.Dropout(0.5))
            error = ModelModeError
        elif what == "loss":
            loss.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        else:
            case.train[0][3] += 1.0
            error = NonDeterministicDataError
    calculator = sequential(model)
    for _ in range(2):  # also the second time
        with pytest.raises(error):
            calculator.influences(*case.test)


def test_batches_beyond_memory_are_read_again_and_compared(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_reducer, "KEPT_BYTES", 0)
    model = METHODS["cg"](case).fit(batches(case))
    assert not model.reducer.random_access
    calculator = SequentialInfluenceCalculator(model, scratch=tmp_path)
    found = calculator.influences(*case.test).compute(scheduler="synchronous")
    np.testing.assert_allclose(found, Reference(case).influences("ggn", DAMPING).numpy(), rtol=1e-6, atol=1e-8)
    assert len(list(tmp_path.rglob("array-*.npy"))) == 10  # inputs and targets of five batches
    case.train[0][0] += 1.0
    with pytest.raises(NonDeterministicDataError, match="data of the fit"):
        sequential(model).influences(*case.test)


def test_samples_of_a_shuffling_loader_are_columns_in_the_order_of_the_data_set(case: Case) -> None:
    own = METHODS["direct"](case)
    expected = Reference(case).influences("ggn", DAMPING).numpy()
    found = sequential(own.fit(batches(case, shuffle=True))).influences(*case.test).compute(scheduler="synchronous")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    fixed: Any = [[3, 1, 2, 0], list(range(22, 3, -1))]  # an order that stays is kept
    loader = DataLoader(TensorDataset(*case.train), batch_sampler=fixed)
    found = sequential(own.fit(loader)).influences(*case.test).compute(scheduler="synchronous")
    np.testing.assert_allclose(found, expected[:, [i for batch in fixed for i in batch]], rtol=1e-6, atol=1e-8)


def test_a_result_goes_on_with_the_same_fit_and_no_other(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "i.zarr"

    def make(case: Case = case, damping: float = DAMPING, rank: int = 43, seed: int = 0) -> InfluenceFunctionModel:
        return NystroemSketchInfluence(case.model, case.loss, rank, damping, seed=seed, **GGN)

    def resume(model: InfluenceFunctionModel, test: Any = case.test) -> Any:
        return sequential(model).to_zarr(path, *test, existing="resume", progress=False)

    first = resume(make().fit(batches(case)))
    assert set(first.provenance["fingerprints"]) == {"parameters", "fit_data", "train_data", "test_data"}
    before = first[:]
    again = resume(make(damping=0.7).fit(batches(case)).with_damping(DAMPING))  # the same fit in all that counts
    assert (again[:] == before).all()
    other = build("mlp classification", seed=1)
    refused: dict[str, Callable[[], InfluenceFunctionModel]] = {
        r"fingerprints\.parameters": lambda: make(other).fit(batches(case)),
        r"fingerprints\.fit_data": lambda: make().fit(batches(other)),
        r"hessian_regularization": lambda: make(damping=0.5).fit(batches(case)),
        r"hessian_regularization.*0\.1 there, 0\.5": lambda: make().fit(batches(case)).with_damping(0.5),
        r"solver\.rank": lambda: make(rank=5).fit(batches(case)),
        r"solver\.seed": lambda: make(seed=1).fit(batches(case)),
        r"fit_data.*": lambda: make().fit(batches(case, 4)),  # other batches: other sums, other stochastic steps
        r"fingerprints\.fit_data.*": lambda: make().fit(case.train),
    }
    for words, fit in refused.items():
        with pytest.raises(FingerprintError, match=words):
            resume(fit())
    with pytest.raises(FingerprintError, match=r"fingerprints\.test_data"):
        resume(make().fit(batches(case)), other.test)
    assert (resume(make().fit(batches(case)))[:] == before).all()


def test_a_fit_to_one_batch_is_not_one_to_its_chunks(tmp_path: Path) -> None:
    case = build("mlp classification", n_train=300)
    path, own = tmp_path / "i.zarr", METHODS["lissa"]
    sequential(own(case).fit(case.train)).to_zarr(path, *case.test, progress=False)
    with pytest.raises(FingerprintError, match="fit_data"):  # mini-batches of the same chunks
        sequential(own(case)).fit(*case.train).to_zarr(path, *case.test, existing="resume", progress=False)


@pytest.mark.parametrize("solve", ["data", "rows"])
def test_a_run_of_several_solves_measures_residuals_of_the_first_and_plans_that(
    case: Case, tmp_path: Path, solve: str
) -> None:
    def run(name: str, **settings: Any) -> tuple[Any, int]:
        model = NystroemSketchInfluence(case.model, case.loss, 30, DAMPING, **GGN, **settings)
        calculator = SequentialInfluenceCalculator(model).fit(*case.train)
        options: Any = {"test_chunk_size": 5, "solve": solve}
        stage = calculator.plan(*case.train, *case.test, **options).stages[1]
        before = calculator.model.reducer.passes
        result = calculator.to_zarr(tmp_path / name, *case.test, progress=False, **options)
        if solve == "data":  # sweeps of tasks are not the driver's
            assert calculator.model.reducer.passes - before == stage.passes
        return result.relative_residual, stage.passes

    n = len(case.test[0])
    residual, passes = run("few.zarr")
    assert n > 5
    assert np.isfinite(residual).nonzero()[0].tolist() == [0, 2, 4]  # a tenth of the rank, in the first chunk
    assert passes == 1
    residual, passes = run("asked.zarr", residual_rows=5)
    assert np.isfinite(residual).all()
    assert passes == -(-n // 5)
