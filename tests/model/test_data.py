"""Data as users bring it: forms of batches, loaders, dtypes; and what reading it must leave alone."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import EmpiricalRisk, GGNOperator, Objective
from distinfluence.errors import DtypeError, EmptyDataError, NonFiniteError, ShapeError
from distinfluence.model import reducer as reducer_module
from distinfluence.model.batch import (
    Batch,
    batch_length,
    check_batch,
    describe,
    leaves,
    map_batch,
    nbytes,
    take,
)
from distinfluence.model.data.collate import batch_of
from distinfluence.model.data.door import opened
from distinfluence.model.data.samples import read
from distinfluence.model.objective import Forward
from distinfluence.model.reducer import LocalReducer, together
from tests.reference import Reference
from tests.zoo import Case, build

NESTED: dict[str, Any] = {"ids": torch.arange(6).reshape(3, 2), "extra": [torch.ones(3), {"mask": torch.zeros(3, 1)}]}


def test_lists_and_mappings_become_tuples_and_dicts_of_the_same_tensors() -> None:
    batch = batch_of(NESTED, "batch")
    assert isinstance(batch, dict) and isinstance(batch["extra"], tuple)
    assert batch["ids"] is NESTED["ids"]
    assert [name for name, _ in leaves(batch)] == ["batch['ids']", "batch['extra'][0]", "batch['extra'][1]['mask']"]
    assert batch_length(batch) == check_batch(batch) == 3
    assert nbytes(batch) == 6 * 8 + 3 * 4 + 3 * 4
    assert describe(batch).startswith("batch['ids']: int64 [3, 2], batch['extra'][0]: float32 [3]")


def test_taking_samples_gives_views_of_every_tensor() -> None:
    batch = batch_of(NESTED, "batch")
    part = take(batch, 1, 3)
    assert isinstance(part, dict) and isinstance(part["ids"], Tensor)
    assert batch_length(part) == 2
    assert part["ids"].data_ptr() == NESTED["ids"][1:].data_ptr()
    doubled = map_batch(lambda tensor: 2 * tensor, part)
    assert isinstance(doubled, dict) and torch.equal(doubled["ids"], 2 * NESTED["ids"][1:])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"x": torch.ones(3), "y": "abc"}, DtypeError, r"`batch\['y'\]`.*got str"),
        ((np.array(["a"]), torch.ones(1)), DtypeError, r"`batch\[0\]`.*got dtype <U1.*as numbers"),
        (torch.tensor(1.0), ShapeError, "`batch` must have the samples along its first dimension"),
        ((torch.ones(3), torch.ones(2)), ShapeError, r"got batch\[0\]: 3, batch\[1\]: 2"),
        ((), EmptyDataError, "at least one array"),
        (torch.ones(0, 2), EmptyDataError, "at least one sample"),
        ((torch.ones(3), torch.tensor([0.0, torch.inf, torch.nan])), NonFiniteError, r"`batch\[1\]`.*\[1, 2\].*2 of 3"),
    ],
)
def test_a_batch_that_cannot_be_used_names_the_tensor(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_batch(batch_of(data, "batch"))


class Squares(Objective):
    """No targets: the mean square of the outputs; batches are a tensor or have one under "x"."""

    def outputs(self, model: Forward, batch: Batch) -> Tensor:
        outputs: Tensor = model(batch["x"] if isinstance(batch, dict) else batch)
        return outputs

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs**2).mean(dim=1)


def test_a_tensor_and_a_batch_encoding_are_one_batch_not_many() -> None:
    from transformers import BatchEncoding

    x, model = torch.randn(5, 3), nn.Linear(3, 3)
    for data in (x, {"x": x}, BatchEncoding({"x": x}), [{"x": x[:2]}, {"x": x[2:]}]):
        risk = EmpiricalRisk(model, Squares(), data)
        assert risk.n_samples == 5
        assert risk.value_and_gradient()[0] == pytest.approx((model(x) ** 2).mean().item(), rel=1e-6)


def test_an_objective_without_inputs_says_how_to_perturb_them() -> None:
    with pytest.raises(ShapeError, match="Override `inputs` and `replace_inputs`"):
        Squares().inputs({"x": torch.ones(2)})


def test_data_that_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(DtypeError, match="got list_iterator.*wrap a generator in a list"):
        opened(iter([(torch.ones(2, 3), torch.ones(2))]))


def shuffled(case: Case) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*case.train), batch_size=5, shuffle=True)


@pytest.mark.parametrize("kept", [100, 2**30])
def test_reading_a_loader_leaves_the_random_state_of_the_caller(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DataLoader draws a seed for each pass, also without shuffling."""
    monkeypatch.setattr(reducer_module, "KEPT_BYTES", kept)
    case = build("mlp classification")
    before = torch.get_rng_state()
    reducer = EmpiricalRisk(case.model, case.loss, shuffled(case)).reducer
    assert isinstance(reducer, LocalReducer)
    for _ in reducer.batches():
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_loader_draws_goes_on_from_batch_to_batch() -> None:
    class Augmented:
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.randn(2)
            yield torch.randn(2)

    torch.manual_seed(3)
    first, second = read(Augmented())
    torch.manual_seed(3)
    assert torch.equal(torch.stack([first, second]), torch.stack([torch.randn(2), torch.randn(2)]))


def test_the_random_state_is_restored_when_a_loader_fails() -> None:
    def fail(sample: object) -> object:
        torch.randn(3)
        raise ArithmeticError("on purpose")

    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="on purpose"):
        list(read(DataLoader(TensorDataset(torch.ones(3)), collate_fn=fail)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shuffled_loader_that_is_streamed_gives_the_same_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducer_module, "KEPT_BYTES", 100)
    case = build("mlp classification")
    operator = GGNOperator(EmpiricalRisk(case.model, case.loss, shuffled(case)))
    for _ in range(2):  # another order each time, so equal to rounding only
        torch.testing.assert_close(operator.dense(), Reference(case).matrix("ggn"), rtol=1e-10, atol=1e-12)


class Shrinking:
    """Gives one batch fewer each time it is read; after some readings, nothing."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches, self.batches = self.batches, self.batches[1:]
        return iter(batches)


def test_data_that_change_between_passes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducer_module, "KEPT_BYTES", 100)
    case = build("mlp classification")
    x, y = case.train
    operator = GGNOperator(EmpiricalRisk(case.model, case.loss, Shrinking([(x[:9], y[:9]), (x[9:], y[9:])])))
    for now in (14, 0):
        with pytest.raises(ShapeError, match=f"got 23 at first and now {now}.*map-style"):
            operator.matmat(torch.ones(1, 43).double())


def test_batches_that_fit_are_read_once() -> None:
    reads = []

    class Counting:
        def __iter__(self) -> Iterator[Any]:
            reads.append(1)
            return iter([build("mlp classification").train])

    case = build("mlp classification")
    GGNOperator(EmpiricalRisk(case.model, case.loss, Counting())).dense()
    assert len(reads) == 1


def test_a_batch_that_is_bad_later_in_the_data_is_found_in_the_first_pass() -> None:
    case = build("mlp classification")
    x, y = case.train
    late = x.clone()
    late[20, 1] = torch.inf
    for second, error in (
        ((late[9:], y[9:]), NonFiniteError),
        ((x[9:], y[10:]), ShapeError),
        ((x[:0], y[:0]), EmptyDataError),
    ):
        with pytest.raises(error):
            EmpiricalRisk(case.model, case.loss, [(x[:9], y[:9]), second])


def squared(f: Tensor, y: Tensor) -> Tensor:
    return ((f - y) ** 2).mean()


def _batches(sizes: list[int], width: int = 3) -> list[Any]:
    return [(torch.randn(n, width), torch.randint(2, (n,))) for n in sizes]


@pytest.mark.parametrize(
    ("batches", "joined"),
    [
        (_batches([4, 4, 4, 1]), [13]),
        (_batches([1500, 400, 400]), [1900, 400]),  # at most 2048 samples together
        (_batches([4000, 5]), [4000, 5]),  # what came larger stays as it is
        ([*_batches([4]), *_batches([3], width=5), *_batches([2, 2], width=5)], [4, 7]),
        ([{"x": torch.ones(2, 3), "y": torch.ones(2)}, {"x": torch.ones(4, 3), "y": torch.ones(4)}], [6]),
        ([torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)], [2, 2]),
        ([torch.zeros(300, 2000), torch.zeros(300, 2000)], [300, 300]),  # more than 4 MiB together
    ],
)
def test_small_batches_are_put_together_and_stay_themselves(batches: list[Any], joined: list[int]) -> None:
    whole, views = together(batches)
    assert [batch_length(batch) for batch in whole] == joined
    for view, batch in zip(views, batches, strict=True):
        for (_, ours), (_, theirs) in zip(leaves(view), leaves(batch), strict=True):
            assert torch.equal(ours, theirs)
    stored = {tensor.untyped_storage().data_ptr() for batch in whole for _, tensor in leaves(batch)}
    assert {tensor.untyped_storage().data_ptr() for view in views for _, tensor in leaves(view)} == stored


def test_a_reducer_sums_over_joined_batches_and_gives_out_the_loaders_own() -> None:
    case = build("mlp classification")
    x, y = case.train
    batches = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 23, 7)]
    reducer = EmpiricalRisk(case.model, case.loss, batches).reducer
    assert isinstance(reducer, LocalReducer)
    assert reducer.chunk_sizes == (7, 7, 7, 2)
    assert [batch_length(batch) for batch in reducer.batches()] == [23]
    for index, (inputs, _) in enumerate(batches):
        (sums,) = reducer.one(index, InputSum())
        torch.testing.assert_close(sums, inputs.sum(dim=0))
    assert reducer.passes == 0
    (total,) = reducer.sum(InputSum())
    torch.testing.assert_close(total, x.sum(dim=0))
    assert reducer.passes == 1


def test_a_reducer_says_how_far_a_pass_is() -> None:
    case = build("mlp regression")
    x, y = (torch.cat([tensor] * 120) for tensor in case.train)  # more than are put together
    batches = [(x[i : i + 1000], y[i : i + 1000]) for i in range(0, 2_500, 1000)]
    reducer = EmpiricalRisk(case.model, case.loss, batches).reducer
    said: list[str] = []
    reducer.on_pass, reducer.on_samples = lambda: said.append("begun"), said.append
    reducer.sum(InputSum())
    assert said == ["begun", f"2000 of {reducer.n_samples} samples", ""]


class InputSum:
    def __call__(self, risk: Any, batch: Any, *broadcast: Tensor) -> tuple[Tensor, ...]:
        return (batch[0].sum(dim=0),)


@pytest.mark.parametrize("loss", [nn.MSELoss(), squared])
def test_float64_targets_leave_a_float32_model_in_float32(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """As NumPy gives them. Rows in float64 would be refused by the operator, far from the cause."""
    case = build("mlp regression", dtype=torch.float32)
    x, y = case.train
    exact = next(EmpiricalRisk(case.model, loss, (x, y)).sample_gradients())
    ours = next(EmpiricalRisk(case.model, loss, (x, y.double())).sample_gradients())
    assert ours.rows.dtype is torch.float32
    torch.testing.assert_close(ours.rows, exact.rows, rtol=1e-4, atol=1e-6)  # float32


def test_sparse_embedding_gradients_are_made_dense() -> None:
    """torch warns that it vectorises them slowly; the values must be right."""
    case = build("embedding and layer norm")
    expected = Reference(case).gradients(case.train)
    embedding = case.model.get_submodule("embed")
    assert isinstance(embedding, nn.Embedding)
    embedding.sparse = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        (gradients,) = EmpiricalRisk(case.model, case.loss, case.train).sample_gradients()
    torch.testing.assert_close(gradients.rows, expected, rtol=1e-10, atol=1e-12)
