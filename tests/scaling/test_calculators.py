"""The same matrix however it is cut and wherever it is computed, with one solve and one gradient pass per chunk."""

import gc
import inspect
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray
import zarr
from distributed import Client, LocalCluster

from distinfluence import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    InfluenceFunctionModel,
    ModelRecipe,
    Recipe,
    SequentialInfluenceCalculator,
    open_influences,
)
from distinfluence.errors import (
    ChunkError,
    ClusterError,
    FingerprintError,
    ForeignStoreError,
    NonFiniteError,
    NotFittedError,
    RecipeError,
    SettingError,
    ShapeError,
    StoreExistsError,
)
from distinfluence.influence import registry
from distinfluence.model.reducer import LocalReducer
from distinfluence.model.risk import LossAndGradient
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.calculator import InfluenceCalculator
from distinfluence.scaling.run_options import RunOptions, RunSettings
from distinfluence.scaling.worker.context import LocalContext, torch_task
from tests.reference import Reference
from tests.scaling import sources
from tests.zoo import Case, build

DAMPING = 0.01
# the matrix is stored in float32: rounding of the largest entry; solves are at rtol 1e-10
STORED: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-5}
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-7}


@pytest.fixture(scope="module")
def case() -> Case:
    return build("mlp classification")


@pytest.fixture(scope="module")
def expected(case: Case) -> Any:
    return Reference(case).influences("ggn", DAMPING).numpy()


def cg(case: Case, **changes: Any) -> CgInfluence:
    settings: dict[str, Any] = {"rtol": 1e-10, "atol": 0.0, "second_order_mode": "ggn", **changes}
    return CgInfluence(case.model, case.loss, DAMPING, **settings)


def direct(case: Case) -> DirectInfluence:
    return DirectInfluence(case.model, case.loss, DAMPING, second_order_mode="ggn")


METHODS: dict[str, Callable[[Case], InfluenceFunctionModel]] = {"cg": cg, "direct": direct}


@pytest.fixture(params=["sequential", "dask"])
def make(request: pytest.FixtureRequest) -> Callable[[InfluenceFunctionModel], InfluenceCalculator]:
    if request.param == "sequential":
        return SequentialInfluenceCalculator
    client = request.getfixturevalue("client")
    return lambda model: DaskInfluenceCalculator(model, client)


Make = Callable[[InfluenceFunctionModel], InfluenceCalculator]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("train_chunk", "test_chunk"), [(23, 1), (5, 4), (1, 6)])
def test_the_matrix_on_disk_does_not_depend_on_the_chunks(
    make: Make, case: Case, expected: Any, method: str, train_chunk: int, test_chunk: int, tmp_path: Path
) -> None:
    calculator = make(METHODS[method](case)).fit(*case.train, chunk_size=train_chunk)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, test_chunk_size=test_chunk, progress=False)
    assert result.complete
    assert result.converged.all()
    np.testing.assert_allclose(result[:], expected, **STORED)
    assert result.provenance["error_bound"] == "rigorous"
    bounds = result.error_bound[:, None].astype(float) * result.train_gradient_norm
    assert (np.abs(result[:] - expected) <= bounds * (1 + 1e-6)).all()  # the norms are rounded to float32 as well


@pytest.mark.parametrize("solve", ["rows", "data"])
def test_solving_by_rows_and_by_data_gives_the_same(
    make: Make, case: Case, expected: Any, solve: str, tmp_path: Path
) -> None:
    calculator = make(cg(case)).fit(*case.train, chunk_size=7)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, test_chunk_size=4, solve=solve, progress=False)
    np.testing.assert_allclose(result[:], expected, **STORED)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_lazy_arrays_compute_under_local_schedulers(case: Case, expected: Any, scheduler: str) -> None:
    calculator = SequentialInfluenceCalculator(cg(case)).fit(*case.train, chunk_size=5)
    lazy = calculator.influences(*case.test, test_chunk_size=2)
    assert lazy.shape == (6, 23)
    assert lazy.chunks == ((6,), (5, 5, 5, 5, 3))
    with dask.config.set(scheduler=scheduler):
        np.testing.assert_allclose(lazy.compute(), expected, **EXACT)


def test_lazy_arrays_compute_on_the_cluster_from_dask_arrays(case: Case, expected: Any, client: Client) -> None:
    calculator = DaskInfluenceCalculator(cg(case), client).fit(*case.train, chunk_size=5)
    x, y = (da.from_array(tensor.numpy(), chunks=3) for tensor in case.test)
    factors, report = calculator.influence_factors(x, y, return_report=True)
    assert factors.chunks == ((3, 3), (43,))
    np.testing.assert_allclose(calculator.influences_from_factors(factors).compute(), expected, **EXACT)
    assert report["converged"].compute().all()
    assert (report["relative_residual"].compute() <= 1e-10).all()
    bounds = report["error_bound"].compute()[:, None] * np.linalg.norm(
        calculator.gradients(*case.train).compute(), axis=1
    )
    assert (np.abs(calculator.influences_from_factors(factors).compute() - expected) <= bounds).all()


def test_a_hessian_is_certified_where_asked(make: Make, case: Case, tmp_path: Path) -> None:
    for certify, kind in ((False, "none"), (True, "heuristic")):
        model = CgInfluence(case.model, case.loss, 5.0, rtol=1e-6)  # far above the Hessian's most negative eigenvalue
        calculator = make(model).fit(*case.train, chunk_size=7, certify=certify)
        result = calculator.to_zarr(tmp_path / f"{kind}.zarr", *case.test, test_chunk_size=4, progress=False)
        assert result.provenance["error_bound"] == kind
        assert np.isfinite(result.error_bound).all() == certify


def test_gradients_are_a_lazy_array_of_the_chunks(make: Make, case: Case) -> None:
    calculator = make(direct(case)).fit(*case.train)
    gradients = calculator.gradients(*case.train, chunk_size=10)
    assert gradients.chunks == ((10, 10, 3), (43,))
    np.testing.assert_allclose(gradients.compute(), Reference(case).gradients(case.train).numpy(), **EXACT)


def test_other_training_points_than_those_of_the_fit_can_be_the_columns(make: Make, case: Case, tmp_path: Path) -> None:
    calculator = make(direct(case)).fit(*case.train)
    reference = Reference(case)
    symmetric = reference.factors("ggn", DAMPING) @ reference.gradients(case.test).T
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, *case.test, chunk_size=4, progress=False)
    np.testing.assert_allclose(result[:], symmetric.numpy(), **STORED)
    np.testing.assert_allclose(calculator.influences(*case.test, *case.test).compute(), symmetric.numpy(), **EXACT)


def test_perturbation_mode_is_written_with_the_input_dimensions(make: Make, case: Case, tmp_path: Path) -> None:
    calculator = make(direct(case)).fit(*case.train, chunk_size=10)
    expected = Reference(case).perturbation("ggn", DAMPING).numpy()
    result = calculator.to_zarr(tmp_path / "p.zarr", *case.test, mode="perturbation", progress=False)
    assert result.shape == (6, 23, 4)
    np.testing.assert_allclose(result[:], expected, **STORED)
    lazy = calculator.influences(*case.test, mode="perturbation")
    assert lazy.shape == (6, 23, 4)
    np.testing.assert_allclose(lazy.compute(), expected, **EXACT)


def test_lazy_arrays_of_this_process_travel_where_a_client_is_active(case: Case, client: Client) -> None:
    """Also from worker to worker: what one of them cannot pass on makes the other wait for ever."""
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train, chunk_size=4)
    lazy = calculator.influences(*case.test)
    context = pickle.loads(cloudpickle.dumps(calculator._stages().context))
    assert cloudpickle.dumps(context)  # and on from there, after use too
    with torch_task(context) as model:
        assert model.is_fitted
    assert cloudpickle.dumps(context)
    expected = Reference(case).influences("ggn", DAMPING).numpy()
    np.testing.assert_allclose(lazy.compute(), expected, **EXACT)
    np.testing.assert_allclose(lazy.compute(scheduler="synchronous"), expected, **EXACT)


def test_a_model_without_a_calculator_stays_in_its_process(case: Case) -> None:
    with pytest.raises(ClusterError, match="this process only"):
        cloudpickle.dumps(LocalContext("here", direct(case)))


@pytest.mark.parametrize("name", ["cnn", "embedding and layer norm", "tied weights", "lstm", "attention"])
def test_every_kind_of_model_travels(name: str, client: Client, tmp_path: Path) -> None:
    case = build(name)
    calculator = DaskInfluenceCalculator(direct(case), client).fit(*case.train, chunk_size=6)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, progress=False)
    np.testing.assert_allclose(result[:], Reference(case).influences("ggn", DAMPING).numpy(), rtol=1e-6, atol=1e-4)


class Counting(CgInfluence):
    """Counts the rows that are solved for, the solves, and the samples whose gradients are made."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.solves: list[int] = []
        self.training_gradients: list[int] = []

    def solve(self, gradients: torch.Tensor) -> Any:
        self.solves.append(gradients.shape[0])
        return super().solve(gradients)

    def tile(self, factors: torch.Tensor, batch: Any, mode: Any = "up") -> Any:
        self.training_gradients.append(len(batch[1]))
        return super().tile(factors, batch, mode)


@pytest.mark.parametrize("lazy", [True, False])
def test_there_is_one_solve_per_test_chunk_and_one_gradient_pass_over_the_training_set(
    case: Case, lazy: bool, tmp_path: Path
) -> None:
    model = Counting(case.model, case.loss, DAMPING, second_order_mode="ggn")
    calculator = SequentialInfluenceCalculator(model).fit(*case.train, chunk_size=5)
    if lazy:
        calculator.influences(*case.test, test_chunk_size=2).compute(scheduler="synchronous")
    else:
        calculator.to_zarr(tmp_path / "i.zarr", *case.test, test_chunk_size=2, progress=False)
    assert model.solves == [2, 2, 2]
    assert sorted(model.training_gradients) == [3, 5, 5, 5, 5]


def test_a_wide_solve_costs_as_many_passes_as_its_worst_row_needs_steps(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(cg(case)).fit(*case.train, chunk_size=5)
    before = calculator.model.reducer.passes
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, progress=False)
    assert calculator.model.reducer.passes - before == result.iterations.max() + 1  # and one for the true residual


def test_a_sum_on_the_cluster_is_the_local_one_and_repeats_to_the_bit(case: Case, client: Client) -> None:
    calculator = DaskInfluenceCalculator(cg(case), client).fit(*case.train, chunk_size=1)
    reducer = calculator.model.reducer
    local = LocalReducer(SampleRisk(case.model, reducer.risk.objective, reducer.risk.blocks), case.train)
    first, second = reducer.sum(LossAndGradient()), reducer.sum(LossAndGradient())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for there, here in zip(first, local.sum(LossAndGradient()), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)
    parts = [float(loss) for loss, _ in reducer.map(LossAndGradient())]
    assert len(parts) == 23
    assert sum(parts) == pytest.approx(float(first[0]), rel=1e-12)


def test_the_driver_never_loads_data_given_as_a_recipe(
    case: Case, expected: Any, client: Client, tmp_path: Path
) -> None:
    guarded = Recipe("tests.scaling.sources:arrays_of_this_process", {"forbidden_pid": os.getpid()})
    calculator = DaskInfluenceCalculator(direct(case), client).fit(guarded, chunk_size=10)
    result = calculator.to_zarr(tmp_path / "i.zarr", Recipe("tests.scaling.sources:test"), progress=False)
    np.testing.assert_allclose(result[:], expected, **STORED)


def test_a_model_can_travel_as_a_factory_and_a_checkpoint(case: Case, client: Client, tmp_path: Path) -> None:
    torch.save(case.model.state_dict(), tmp_path / "m.pt")
    recipe = ModelRecipe(Recipe("tests.scaling.sources:model"), str(tmp_path / "m.pt"))
    calculator = DaskInfluenceCalculator(direct(case), client, recipe=recipe).fit(*case.train)
    assert calculator.influences(*case.test).compute().shape == (6, 23)
    with pytest.raises(RecipeError, match="other tensors"):
        DaskInfluenceCalculator(direct(build("cnn")), client, recipe=ModelRecipe(recipe.factory, sha256="0" * 64))


def test_dict_batches_and_an_objective_go_all_the_way(make: Make, case: Case, expected: Any, tmp_path: Path) -> None:
    model = CgInfluence(case.model, sources.Labelled(), DAMPING, rtol=1e-10, atol=0.0, second_order_mode="ggn")
    train, test = ({"features": x.numpy(), "labels": y.numpy()} for x, y in (case.train, case.test))
    calculator = make(model).fit(train, chunk_size=10)
    result = calculator.to_zarr(tmp_path / "i.zarr", test, progress=False)
    np.testing.assert_allclose(result[:], expected, **STORED)
    assert result.provenance["objective"]["objective"] == "tests.scaling.sources.Labelled"


def test_a_model_is_built_once_per_process(case: Case, client: Client, tmp_path: Path) -> None:
    log = tmp_path / "built"
    recipe = ModelRecipe(Recipe("tests.scaling.sources:logged_model", {"log": str(log)}))
    recipe.build()
    calculator = DaskInfluenceCalculator(cg(case), client, recipe=recipe).fit(*case.train, chunk_size=3)
    for solve in ("rows", "data"):
        calculator.to_zarr(tmp_path / f"{solve}.zarr", *case.test, test_chunk_size=2, solve=solve, progress=False)
    calculator.influences(*case.test).compute()
    here, *workers = log.read_text().split()
    assert here == str(os.getpid())
    assert 1 <= len(workers) <= 2
    assert len(set(workers)) == len(workers)


@pytest.mark.parametrize("spilled", [True, False])
def test_workers_tell_models_apart_that_differ_in_their_forward_alone(
    case: Case, client: Client, tmp_path: Path, spilled: bool
) -> None:
    for name in ("Tanh", "Softplus"):
        other = replace(case, model=sources.activated(name))
        recipe = None if spilled else ModelRecipe(Recipe("tests.scaling.sources:activated", {"name": name}))
        calculator = DaskInfluenceCalculator(cg(other), client, recipe=recipe, scratch=tmp_path)
        found = calculator.fit(*case.train, chunk_size=9).influences(*case.test).compute()
        expected = Reference(other).influences("ggn", DAMPING).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_dask_arrays_are_computed_by_workers_once_and_give_the_same(
    make: Make, case: Case, expected: Any, tmp_path: Path
) -> None:
    log = tmp_path / "computed"

    def logged(block: Any) -> Any:
        with log.open("a") as file:
            file.write("x")
        return block

    x = da.from_array(case.train[0].numpy(), chunks=(6, 2)).map_blocks(logged, dtype="float64")
    y = da.from_array(case.train[1].numpy(), chunks=6)
    tests = [da.from_array(tensor.numpy(), chunks=3) for tensor in case.test]
    computed = len(log.read_text()) if log.exists() else 0  # dask tries the function on an empty block
    calculator = make(cg(case)).fit(x, y)
    result = calculator.to_zarr(tmp_path / "i.zarr", *tests, progress=False)
    assert len(log.read_text()) - computed == 2 * 4
    np.testing.assert_allclose(result[:], expected, **STORED)
    assert result.layout.strip == 6


def test_threads_that_share_a_process_give_the_right_numbers(case: Case, expected: Any) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        calculator = DaskInfluenceCalculator(direct(case), client).fit(*case.train, chunk_size=1)
        lazy = [calculator.influences(*case.test, test_chunk_size=1) for _ in range(3)]
        for matrix in client.gather(client.compute(lazy)):
            np.testing.assert_allclose(matrix, expected, **EXACT)


def test_zarr_and_xarray_open_the_result(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train, chunk_size=8)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, progress=False)
    group = zarr.open_group(str(tmp_path / "i.zarr"), mode="r")
    np.testing.assert_array_equal(np.asarray(group["influences"][:]), result[:])
    dataset = xarray.open_zarr(str(tmp_path / "i.zarr"))
    assert dataset["influences"].dims == ("test", "train")
    np.testing.assert_array_equal(dataset["influences"].values, result[:])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(case.model(case.train[0]), case.train[1], reduction="none")
    np.testing.assert_allclose(result.train_loss, losses.numpy(), rtol=1e-6)
    np.testing.assert_allclose(
        result.test_gradient_norm, Reference(case).gradients(case.test).norm(dim=1).numpy(), rtol=1e-6
    )


def test_the_result_says_what_it_is(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(cg(case)).fit(*case.train)
    calculator.to_zarr(tmp_path / "i.zarr", *case.test, progress=False, attributes={"job": {"name": "mine"}})
    provenance = open_influences(tmp_path / "i.zarr").provenance
    assert provenance["solver"]["method"] == "CgInfluence"
    assert provenance["solver"]["hessian_regularization"] == {"full": DAMPING}
    assert provenance["objective"]["loss"] == "torch.nn.modules.loss.CrossEntropyLoss"
    assert set(provenance["fingerprints"]) == {"parameters", "fit_data", "train_data", "test_data"}
    assert provenance["parameters"]["coverage"] == 1.0
    assert provenance["job"] == {"name": "mine"}
    assert set(provenance["summary"]["seconds"]) >= {"factors", "strips"}
    assert provenance["sign_convention"].startswith("positive: the training point helps")


def test_a_run_that_died_goes_on_where_it_stopped(
    case: Case, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distinfluence.store import InfluenceWriter

    written: list[int] = []
    write = InfluenceWriter.write_strip

    def dying(self: InfluenceWriter, i: int, *args: Any, **fields: Any) -> bool:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(i)
        return write(self, i, *args, **fields)

    def run() -> Any:
        model = Counting(case.model, case.loss, DAMPING, rtol=1e-10, atol=0.0, second_order_mode="ggn")
        calculator = SequentialInfluenceCalculator(model, scratch=tmp_path / "scratch").fit(*case.train, chunk_size=5)
        return model, calculator.to_zarr(
            tmp_path / "i.zarr", *case.test, test_chunk_size=3, existing="resume", progress=False
        )

    monkeypatch.setattr(InfluenceWriter, "write_strip", dying)
    with pytest.raises(KeyboardInterrupt):
        run()
    half = open_influences(tmp_path / "i.zarr")
    assert not half.complete
    assert half.n_missing == 3
    monkeypatch.setattr(InfluenceWriter, "write_strip", write)
    model, result = run()
    assert model.solves == []  # the factors were on disk
    assert sorted(model.training_gradients) == [3, 5, 5]
    np.testing.assert_allclose(result[:], expected, **STORED)
    assert [folder.name[:4] for folder in (tmp_path / "scratch").iterdir()] == ["fit-"]  # for the next run
    model, result = run()
    assert result.complete
    assert model.solves == model.training_gradients == []  # nothing was left to do


def test_resuming_refuses_another_model_data_set_or_solver(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "i.zarr"
    SequentialInfluenceCalculator(direct(case)).fit(*case.train).to_zarr(path, *case.test, progress=False)

    def resume(calculator: InfluenceCalculator, test: Any = case.test) -> None:
        calculator.to_zarr(path, *test, existing="resume", progress=False)

    other = build("mlp classification", seed=1)
    with pytest.raises(FingerprintError, match=r"fingerprints\.parameters"):
        resume(SequentialInfluenceCalculator(direct(other)).fit(*case.train))
    with pytest.raises(FingerprintError, match=r"fingerprints\.fit_data"):
        resume(SequentialInfluenceCalculator(direct(case)).fit(*other.train))
    with pytest.raises(FingerprintError, match=r"fingerprints\.test_data"):
        resume(SequentialInfluenceCalculator(direct(case)).fit(*case.train), other.test)
    stiff = DirectInfluence(case.model, case.loss, 0.5, second_order_mode="ggn")
    with pytest.raises(FingerprintError, match=r"hessian_regularization\.full` is 0\.01 there, 0\.5 here"):
        resume(SequentialInfluenceCalculator(stiff).fit(*case.train))
    smooth = DirectInfluence(
        case.model, torch.nn.CrossEntropyLoss(label_smoothing=0.1), DAMPING, second_order_mode="ggn"
    )
    with pytest.raises(FingerprintError, match="label_smoothing"):
        resume(SequentialInfluenceCalculator(smooth).fit(*case.train))
    resume(SequentialInfluenceCalculator(direct(case)).fit(*case.train))


def test_an_output_that_is_not_ours_stays_and_an_older_result_needs_a_word(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    for words in ({}, {"existing": "replace"}, {"existing": "resume"}):
        with pytest.raises(ForeignStoreError, match="nothing was touched|not a result"):
            calculator.to_zarr(foreign, *case.test, progress=False, **words)
    assert (foreign / "chapter.tex").read_text() == "years of work"
    path = tmp_path / "i.zarr"
    calculator.to_zarr(path, *case.test, progress=False)
    with pytest.raises(StoreExistsError, match="overwrite"):
        calculator.to_zarr(path, *case.test, progress=False)
    assert calculator.to_zarr(path, *case.test, progress=False, existing="replace").complete


def test_nan_in_a_chunk_is_found_before_any_solve_and_named(make: Make, case: Case) -> None:
    with pytest.raises(NonFiniteError, match=r"chunk 3 \(samples 15 to 19\).*samples \[2\] of this batch"):
        make(cg(case)).fit(Recipe("tests.scaling.sources:broken"), chunk_size=5)


def test_bad_requests_say_what_to_do(make: Make, case: Case, tmp_path: Path) -> None:
    calculator = make(direct(case))
    with pytest.raises(NotFittedError, match=r"`fit\(data\)` of the influence model .* `fit\(x, y\)` of the calc"):
        calculator.to_zarr(tmp_path / "i.zarr", *case.test)
    with pytest.raises(NotFittedError):
        calculator.gradients(*case.train)
    calculator.fit(*case.train)
    with pytest.raises(SettingError, match="rows.*data"):
        calculator.to_zarr(tmp_path / "i.zarr", *case.test, solve="columns")
    with pytest.raises(SettingError, match="refuse.*replace.*resume.*repair"):
        calculator.to_zarr(tmp_path / "i.zarr", *case.test, existing="overwrite")
    unknown: Any = {"topk": 5}
    with pytest.raises(TypeError, match="`topk` is not an option.*top_k"):
        calculator.to_zarr(tmp_path / "i.zarr", *case.test, **unknown)
    with pytest.raises(SettingError, match="up.*perturbation"):
        calculator.influences(*case.test, mode="down")
    with pytest.raises(ShapeError, match=r"n_test, 43"):
        calculator.influences_from_factors(np.zeros((3, 7)))
    uneven = [da.from_array(tensor.numpy(), chunks=((5, 18), *tensor.shape[1:])) for tensor in case.train]
    with pytest.raises(ChunkError, match="rechunk"):
        calculator.to_zarr(tmp_path / "i.zarr", *case.test, *uneven, progress=False)
    assert not (tmp_path / "i.zarr").exists()


def test_a_client_is_needed_and_its_workers_must_see_the_scratch_folder(
    case: Case, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match=r"distributed\.Client, got str"):
        DaskInfluenceCalculator(direct(case), "tcp://nowhere")
    from distinfluence.scaling.dispatch import executor

    with pytest.raises(ClusterError, match="shared file system"):
        executor.check_workers(client, str(tmp_path / "not there"), timeout=10)


def test_the_wait_for_the_first_worker_has_its_own_limit(case: Case) -> None:
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=":0") as empty,
        Client(empty) as client,
        pytest.raises(ClusterError, match=r"the cluster has no workers after 0\.2 s"),
    ):
        DaskInfluenceCalculator(direct(case), client, timeout=0.2)


def test_the_users_model_is_as_before_also_after_an_error(make: Make, case: Case) -> None:
    model = case.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    make(cg(case)).fit(*case.train).influences(*case.test).compute()
    with pytest.raises(NonFiniteError):
        make(cg(case)).fit(Recipe("tests.scaling.sources:broken"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks and not m.training for m in model.modules())


def test_scratch_files_go_when_neither_calculator_nor_lazy_arrays_need_them(case: Case, client: Client) -> None:
    calculator = DaskInfluenceCalculator(direct(case), client).fit(*case.train)
    folder = calculator._scratch.folder
    lazy = calculator.influences(*case.test)
    calculator.model._fit = None  # its reducer refers to the folder too
    del calculator
    gc.collect()
    assert lazy.compute().shape == (6, 23)
    del lazy
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("solve", ["rows", "data"])
@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_method_runs_on_workers_and_gives_what_it_gives_here(
    case: Case, client: Client, name: str, solve: str, tmp_path: Path
) -> None:
    known = inspect.signature(registry.METHODS[name]).parameters
    usual: dict[str, Any] = {"hessian_regularization": 0.1, "second_order_mode": "ggn"}
    settings = {key: value for key, value in usual.items() if key in known}
    if name == "ekfac":
        settings |= {"update_diagonal": True, "cg_iterations": 2}
    if name == "lissa":
        # chunks are its mini-batches; the larger damping, a tenth of the iterations
        settings |= {"scale": None, "full_batch": True, "rtol": 1e-6, "hessian_regularization": 1.0}
    method = registry.METHODS[name]
    here = method(case.model, loss=case.loss, **settings).fit(case.train).influences(*case.test, *case.train)
    calculator = DaskInfluenceCalculator(method(case.model, loss=case.loss, **settings), client)
    calculator.fit(*case.train, chunk_size=7)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, test_chunk_size=4, solve=solve, progress=False)
    # iterations stop at 1e-7 (LiSSA at 1e-6) of the right-hand sides, wherever they run
    np.testing.assert_allclose(result[:], here.numpy(), rtol=0, atol=1e-4 * float(here.abs().max()))


def test_options_are_a_value_or_keywords_which_override_it(case: Case, tmp_path: Path) -> None:
    assert set(RunSettings.__annotations__) == {option.name for option in fields(RunOptions)}
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train, chunk_size=5)
    options = RunOptions(top_k=3, contributions=True)
    assert options.contributions == 10
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, options=options, top_k=4, progress=False)
    assert result.layout.top_k == 4 and result.n_contributions == 4
