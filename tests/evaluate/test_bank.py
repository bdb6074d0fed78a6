"""A bank trains each model once, keeps what it made of the test points, and belongs to its data and its trainer."""

import itertools
import random
import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from numpy.typing import NDArray
from torch import nn

from distinfluence import SupervisedObjective
from distinfluence.errors import (
    ClusterError,
    FingerprintError,
    ForeignStoreError,
    NonFiniteError,
    RetrainingError,
    SettingError,
    ShapeError,
    StoreError,
)
from distinfluence.evaluate import Retrainer, Retraining, RetrainingBank
from distinfluence.evaluate.bank import rows
from distinfluence.evaluate.bank.tasks import Packed
from distinfluence.scaling import ClusterSpec, Recipe, connected
from distinfluence.scaling.data.sources import ArraySource
from tests.evaluate.bank_trainers import (
    N_TEST,
    N_TRAIN,
    TEST,
    TRAIN,
    X_TEST,
    Y_TEST,
    Callback,
    Counting,
    Indices,
    Killed,
    Together,
    X,
    Y,
    asked,
    convex,
    honest,
    reference,
    unseeded,
    weighted,
)


def bank(path: Path, train: Callback = honest, **settings: Any) -> RetrainingBank:
    return RetrainingBank(path / "bank.zarr", train, nn.MSELoss(), TRAIN, TEST, **settings)


def test_the_losses_are_those_of_training_and_evaluating_by_hand(tmp_path: Path) -> None:
    retrainings = asked(4, [0, 7])
    own: Retrainer = bank(tmp_path)
    losses = own.losses(retrainings)
    assert (losses.dtype, losses.shape) == (np.float64, (8, N_TEST))
    np.testing.assert_allclose(losses, reference(retrainings), rtol=1e-5)
    assert (own.n_train, own.n_test) == (N_TRAIN, N_TEST)
    assert isinstance(own, RetrainingBank)
    assert (own.trained, own.reused) == (8, 0)


def test_a_model_in_float64_is_evaluated_in_float64_and_may_be_frozen(tmp_path: Path) -> None:
    retrainings = asked(3, [0])
    np.testing.assert_allclose(bank(tmp_path, convex).losses(retrainings), reference(retrainings, convex), rtol=1e-12)


def test_what_is_there_is_not_trained_again(tmp_path: Path) -> None:
    train = Counting()
    first = bank(tmp_path, train).losses(asked(3, [0, 1]))
    n = len(train.calls)
    assert n == 6
    later = bank(tmp_path, train)
    again = later.losses([*reversed(asked(3, [0, 1])), *asked(3, [0, 1])])
    np.testing.assert_array_equal(again, np.concatenate([first[::-1], first]))
    assert (later.trained, later.reused, len(train.calls)) == (0, 6, n)
    later.losses(asked(5, [1]))  # the first three subsets are the same
    assert (later.trained, later.reused, len(train.calls)) == (2, 9, n + 2)


def test_a_run_that_was_interrupted_trains_only_what_is_missing_to_the_same_bits(tmp_path: Path) -> None:
    retrainings = asked(6, [0, 1])
    whole = bank(tmp_path / "whole").losses(retrainings)

    def stops(indices: Indices, seed: int) -> nn.Module:
        if len(train.calls) == 6:
            raise KeyboardInterrupt
        return honest(indices, seed)

    train = Counting(stops)
    with pytest.raises(KeyboardInterrupt):
        bank(tmp_path, train).losses(retrainings)
    resumed = bank(tmp_path, train)
    np.testing.assert_array_equal(resumed.losses(retrainings), whole)
    assert (resumed.trained, resumed.reused) == (7, 5)


def test_a_row_without_its_key_is_trained_again_and_so_are_damaged_ones(tmp_path: Path) -> None:
    retrainings = asked(6, [0])
    whole = bank(tmp_path).losses(retrainings)
    folder = tmp_path / "bank.zarr"
    (folder / "key" / "c" / "0" / "0").unlink()  # killed before the key was written
    (folder / "losses" / "c" / "1" / "0").write_bytes(b"torn")
    (folder / "member_losses" / "c" / "2" / "0").unlink()
    shutil.copy(folder / "weights" / "c" / "5" / "0", folder / "weights" / "c" / "3" / "0")  # whole, but of another row
    (folder / "key" / "c" / "4" / "0").write_bytes(b"")
    again = bank(tmp_path)
    np.testing.assert_array_equal(again.losses(retrainings), whole)
    assert (again.trained, again.reused) == (5, 1)
    assert bank(tmp_path).losses(retrainings).tobytes() == whole.tobytes()


@pytest.mark.parametrize("written", [0, 2, 4])
def test_a_kill_between_two_arrays_of_a_row_costs_that_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    def killed(*arguments: Any) -> None:
        if next(count) == 2 * 5 + written:
            raise KeyboardInterrupt
        put(*arguments)

    count, put = itertools.count(), rows._put
    monkeypatch.setattr(rows, "_put", killed)
    with pytest.raises(KeyboardInterrupt):
        bank(tmp_path).losses(asked(4, [0]))
    monkeypatch.setattr(rows, "_put", put)
    again = bank(tmp_path)
    np.testing.assert_allclose(again.losses(asked(4, [0])), reference(asked(4, [0])), rtol=1e-5)
    assert (again.trained, again.reused) == (2, 2)


def test_rows_grow_beyond_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distinfluence.evaluate.bank.rows.BLOCK", 4)
    retrainings = asked(11, [0])
    whole = bank(tmp_path).losses(retrainings)
    later = bank(tmp_path)
    np.testing.assert_array_equal(later.losses(retrainings), whole)
    assert later.trained == 0


def test_the_file_holds_plain_arrays(tmp_path: Path) -> None:
    retrainings = asked(2, [3])
    losses = bank(tmp_path).losses(retrainings)
    group = zarr.open_group(tmp_path / "bank.zarr", mode="r")
    arrays: dict[str, Any] = dict(group.arrays())
    np.testing.assert_array_equal(arrays["losses"][:2], losses)
    np.testing.assert_array_equal(arrays["weights"][:2], [one.weights for one in retrainings])
    assert arrays["seed"][:2].tolist() == [3, 3]
    assert [row.tobytes().hex() for row in arrays["key"][:2]] == [one.key for one in retrainings]


def test_groups_are_those_of_the_list_wherever_a_run_stopped(tmp_path: Path) -> None:
    retrainings = asked(1, [*range(11)])
    train = Together()
    whole = bank(tmp_path / "whole", train).losses(retrainings)
    assert train.groups == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10], [0]]  # and the first alone, to compare
    train = Together()
    bank(tmp_path, train).losses(retrainings)
    (tmp_path / "bank.zarr" / "key" / "c" / "4" / "0").unlink()
    train.groups.clear()
    resumed = bank(tmp_path, train)
    assert resumed.losses(retrainings).tobytes() == whole.tobytes()
    assert train.groups == [[3, 4, 5]]
    assert (resumed.trained, resumed.reused) == (3, 10)
    assert resumed.remarks == ()  # a difference in rounding is none


def test_a_group_that_fails_in_part_keeps_the_rest(tmp_path: Path) -> None:
    class InPart(Together):
        def train_many(self, retrainings: Sequence[Retraining]) -> list[nn.Module]:
            return [
                gives_nan(one.indices, one.seed) if one.seed == 1 else honest(one.indices, one.seed)
                for one in retrainings
            ]

    retrainings = asked(1, [0, 1, 2, 3])
    own = bank(tmp_path, InPart())
    for reused in (0, 3):
        with pytest.raises(RetrainingError, match=r"1 of 4 retrainings:\s+`retrainings\[1\]` .* seed 1"):
            own.losses(retrainings)
        assert own.reused == reused
    assert own.trained == 7
    np.testing.assert_allclose(
        own.losses([retrainings[0], *retrainings[2:]]), reference([retrainings[0], *retrainings[2:]]), rtol=1e-5
    )


def test_the_random_state_stays_and_a_trainer_that_forgets_to_seed_is_seeded(tmp_path: Path) -> None:
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.inference_mode():
        losses = bank(tmp_path, unseeded).losses(asked(2, [5]))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    np.testing.assert_allclose(losses, reference(asked(2, [5])), rtol=1e-5)


def test_weights_reach_a_trainer_that_takes_them(tmp_path: Path) -> None:
    weights = np.ones(N_TRAIN)
    weights[3], weights[4] = 2.5, 0.0
    one = Retraining(weights, 1)
    losses = bank(tmp_path, weighted).losses([one])
    model = weighted(np.flatnonzero(weights), 1, weights[weights != 0])
    np.testing.assert_allclose(losses[0], (model(X_TEST) - Y_TEST).squeeze(1).square().detach(), rtol=1e-5)


def test_what_is_asked_for_is_checked_before_anything_runs(tmp_path: Path) -> None:
    train = Counting()
    own = bank(tmp_path, train)
    good = asked(1, [0])
    for weights, error, match in [
        (np.full(N_TRAIN, 0.5), SettingError, r"`train` must take a keyword `weights` for `retrainings\[1\]`"),
        (np.zeros(N_TRAIN), SettingError, "got no point"),
        (np.full(N_TRAIN, np.nan), SettingError, "NaN or infinity"),
        (np.ones(3), ShapeError, "one weight for each of 40"),
    ]:
        with pytest.raises(error, match=match):
            own.losses([*good, Retraining(weights, 0)])
    assert train.calls == []
    assert own.losses([]).shape == (0, N_TEST)


def test_the_model_on_all_points_is_trained_once_for_each_seed(tmp_path: Path) -> None:
    own = bank(tmp_path)
    model = own.model(4)
    expected = honest(np.arange(N_TRAIN), 4)
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(parameter, expected.state_dict()[name])
    assert not model.training
    assert own.model(4) is model
    assert own.trained == 1
    everything = Retraining(np.ones(N_TRAIN), 4)
    np.testing.assert_allclose(own.losses([everything])[0], (model(X_TEST) - Y_TEST).square().detach()[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_data": (X.flip(0), Y.flip(0))}, "the training data are in another order"),
        ({"train_data": (X[1:], Y[1:])}, r"the training data differ \(40 samples, here 39\)"),
        ({"test_data": (X_TEST, Y_TEST + 1)}, "the test data differ"),
        ({"train": unseeded}, "`train` differs in code, function"),
        ({"train": Together()}, "`train` differs in"),
        ({"loss": nn.L1Loss()}, "the loss differs in loss"),
    ],
)
def test_a_bank_of_something_else_says_of_what(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"train": honest, "loss": nn.MSELoss(), "train_data": TRAIN, "test_data": TEST}
    RetrainingBank(tmp_path / "bank.zarr", **given)
    with pytest.raises(FingerprintError, match=match):
        RetrainingBank(tmp_path / "bank.zarr", **{**given, **change})
    in_batches = [(X[:25], Y[:25]), (X[25:], Y[25:])]
    RetrainingBank(tmp_path / "bank.zarr", **{**given, "train_data": in_batches})  # the same samples, cut otherwise


class Packaged:
    """A trainer as this package has them: its class says nothing of its settings."""

    def __init__(self, rate: float = 0.1, smoothing: float = 0.0, factory: str = "torch.nn:Linear") -> None:
        self.rate = rate
        self.objective = SupervisedObjective(nn.CrossEntropyLoss(label_smoothing=smoothing))
        self.factory = Recipe(factory, {"in_features": 4})
        self._cache = object()

    def __call__(self, indices: Indices, seed: int) -> nn.Module:
        return honest(indices, seed)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"rate": 0.2}, "rate"),
        ({"smoothing": 0.1}, "objective.settings.label_smoothing"),
        ({"factory": "torch.nn:Bilinear"}, "factory.code, factory.recipe"),
    ],
)
def test_settings_of_a_trainer_of_this_package_are_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], name: str
) -> None:
    monkeypatch.setattr(Packaged, "__module__", "distinfluence.somewhere")
    bank(tmp_path, Packaged())
    bank(tmp_path, Packaged())
    with pytest.raises(FingerprintError, match=f"`train` differs in {name}"):
        bank(tmp_path, Packaged(**other))


def test_a_path_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "bank.zarr").mkdir()
    (tmp_path / "bank.zarr" / "thesis.txt").write_text("mine")
    with pytest.raises(ForeignStoreError, match="thesis"):
        bank(tmp_path)
    assert [file.name for file in (tmp_path / "bank.zarr").iterdir()] == ["thesis.txt"]


def test_a_bank_of_another_format_or_with_a_link_out_of_it_is_not_read(tmp_path: Path) -> None:
    retrainings = asked(2, [0])
    bank(tmp_path).losses(retrainings)
    (tmp_path / "secret").write_bytes((tmp_path / "bank.zarr" / "losses" / "c" / "0" / "0").read_bytes())
    (tmp_path / "bank.zarr" / "losses" / "c" / "0" / "0").unlink()
    (tmp_path / "bank.zarr" / "losses" / "c" / "0" / "0").symlink_to(tmp_path / "secret")
    again = bank(tmp_path)
    again.losses(retrainings)
    assert (again.trained, again.reused) == (1, 1)
    zarr.open_group(tmp_path / "bank.zarr").attrs["format_version"] = 99
    with pytest.raises(StoreError, match="format version 99"):
        bank(tmp_path)


def test_data_are_loaded_once_and_not_with_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(source: ArraySource) -> Any:
        loads.append(source.key)
        return load(source)

    loads, load = list[str](), ArraySource.load
    monkeypatch.setattr(ArraySource, "load", counted)
    bank(tmp_path).losses(asked(9, [0]))
    assert len(loads) == 4  # both data sets to look at, the training data to draw from, and what was drawn
    assert len(cloudpickle.dumps(Packed.of(Retraining(np.arange(80_000) % 2.0, 0)))) < 11_000


@pytest.mark.parametrize("weights", [[1.0, 0.0, 1.0], [0.5, 0.0, 2.0]])
def test_a_retraining_arrives_as_it_was_sent(weights: list[float]) -> None:
    one = Retraining(np.array(weights), -3)
    assert Packed.of(one).unpacked().key == one.key


def test_progress_says_what_is_there_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank(tmp_path).losses(asked(2, [0]))
    bank(tmp_path, progress=True).losses(asked(5, [0]))
    assert "retrain: 3 of 3 models, 2 of 5 are in the bank" in capsys.readouterr().err


def not_two(retraining: int) -> Callback:
    def fails(indices: Indices, seed: int) -> nn.Module:
        if seed == retraining:
            raise ZeroDivisionError("no batch")
        return honest(indices, seed)

    return fails


def test_a_retraining_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    retrainings = asked(1, [0, 1, 2, 3])
    own = bank(tmp_path, Counting(not_two(2)))
    named = r"1 of 4 retrainings:\s+`retrainings\[2\]` \(20 of 40 points, seed 2\): ZeroDivisionError: no batch\s+3 are"
    with pytest.raises(RetrainingError, match=named) as caught:
        own.losses(retrainings)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert own.trained == 4
    mended = bank(tmp_path, Counting(not_two(9)))
    np.testing.assert_allclose(mended.losses(retrainings), reference(retrainings), rtol=1e-5)
    assert (mended.trained, mended.reused) == (1, 3)


def test_nothing_more_is_tried_when_the_first_all_fail(tmp_path: Path) -> None:
    def fails(indices: Indices, seed: int) -> nn.Module:
        raise KeyError("weights")

    train = Counting(fails)
    with pytest.raises(RetrainingError, match="the first 3 of 20 retrainings, the others were not tried"):
        bank(tmp_path, train).losses(asked(20, [0]))
    assert len(train.calls) == 3


def test_nothing_more_is_tried_when_the_first_tasks_are_all_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: object) -> None:
        calls.append(arguments)
        raise ClusterError("a task killed several workers in a row")

    calls = list[object]()
    monkeypatch.setattr("distinfluence.evaluate.bank.retraining_bank.retrain", lost)
    with pytest.raises(RetrainingError, match=r"the first 3 of 20 .*\n.*retrainings.0.. .*: ClusterError"):
        bank(tmp_path).losses(asked(20, [0]))
    assert len(calls) == 9  # each is tried again by the executor


def test_two_drivers_of_a_bank_train_each_model_once(tmp_path: Path) -> None:
    retrainings = asked(4, [0, 1])
    banks = [bank(tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda own: own.losses(retrainings), banks)
    np.testing.assert_array_equal(first, second)
    assert sorted(own.trained for own in banks) == [0, 8]
    assert len([*(tmp_path / "bank.zarr" / "key" / "c").iterdir()]) == 8


def test_targets_of_another_shape_than_the_outputs_are_refused(tmp_path: Path) -> None:
    own = RetrainingBank(tmp_path / "bank.zarr", honest, nn.MSELoss(), TRAIN, (X_TEST, Y_TEST.squeeze(1)))
    with pytest.raises(RetrainingError, match="ShapeError"):
        own.losses(asked(2, [0]))


def diverges(indices: Indices, seed: int) -> nn.Module:
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.fill_(1e30)
    return model


def gives_nan(indices: Indices, seed: int) -> nn.Module:
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    return model


class Few(Together):
    def train_many(self, retrainings: Sequence[Retraining]) -> list[nn.Module]:
        return []


class NoneAtOnce(Together):
    at_once = 0


@pytest.mark.parametrize(
    ("train", "cause", "match"),
    [
        (lambda indices, seed: None, RetrainingError, "must return the trained `torch.nn.Module`, got NoneType"),
        (diverges, NonFiniteError, "loss is inf at test point 0 .* diverged"),
        (gives_nan, NonFiniteError, "NaN"),
        (Few(), RetrainingError, "`train.train_many` must return one model for each of 1 retrainings, got 0"),
    ],
)
def test_a_trainer_that_returns_no_trained_model_is_told_so(
    tmp_path: Path, train: Callback, cause: type[Exception], match: str
) -> None:
    own = bank(tmp_path, train)
    with pytest.raises(RetrainingError, match=match) as caught:
        own.losses(asked(1, [0]))
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize(
    ("train", "match"),
    [
        (lambda indices: nn.Linear(4, 1), r"callable of \(indices, seed\), got .*<lambda>\(indices\)"),
        (lambda indices, seed, other: nn.Linear(4, 1), "missing a required argument: 'other'"),
        (nn.Linear(4, 1), "got a Linear"),
        (Counting, "got the class Counting"),
        (3, "got a int"),
        (NoneAtOnce(), "`train.at_once` must be at least 1, got 0"),
    ],
)
def test_a_trainer_that_cannot_be_called_is_refused_at_once(tmp_path: Path, train: Any, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        bank(tmp_path, train)
    assert [*tmp_path.iterdir()] == []


class HalfSquare(SupervisedObjective):
    """Asks the test points for something else than their loss."""

    def measurements(self, model: Any, batch: Any) -> torch.Tensor:
        return self.losses(self.outputs(model, batch), batch) / 2


def test_the_measurement_of_an_objective_is_kept(tmp_path: Path) -> None:
    own = RetrainingBank(tmp_path / "bank.zarr", honest, HalfSquare(nn.MSELoss()), TRAIN, TEST)
    retrainings = asked(2, [0])
    np.testing.assert_allclose(own.losses(retrainings), reference(retrainings) / 2, rtol=1e-5)


class Held(Counting):
    """Cannot travel."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def losses_on(client: Client, path: Path, train: Callback) -> NDArray[np.float64]:
    own = RetrainingBank(path / "bank.zarr", train, nn.MSELoss(), TRAIN, TEST, client=client)
    losses = own.losses(asked(6, [0, 3]))
    assert own.trained == 12
    return losses


def test_a_killed_worker_costs_only_its_tasks_and_errors_come_back(tmp_path: Path) -> None:
    with connected(ClusterSpec(workers=2)) as client:
        (tmp_path / "killed").mkdir()
        losses = losses_on(client, tmp_path, Killed(tmp_path / "killed"))
        assert (tmp_path / "killed" / "killed").exists()
        np.testing.assert_allclose(losses, reference(asked(6, [0, 3])), rtol=1e-5)
        failing = RetrainingBank(tmp_path / "other.zarr", not_two(1), nn.MSELoss(), TRAIN, TEST, client=client)
        with pytest.raises(RetrainingError, match=re.escape("`retrainings[1]`")) as caught:
            failing.losses(asked(1, [0, 1, 2]))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert "in fails" in "".join(caught.value.__cause__.__notes__)
        with pytest.raises(SettingError, match="`train` must be picklable to be sent to workers, got a Held"):
            RetrainingBank(tmp_path / "third.zarr", Held(), nn.MSELoss(), TRAIN, TEST, client=client)
    resumed = bank(tmp_path, Killed(tmp_path / "killed"))  # the same trainer, by its settings, in this process
    assert resumed.losses(asked(6, [0, 3])).tobytes() == losses.tobytes()
    assert resumed.trained == 0


def test_a_kill_while_the_arrays_grow_costs_nothing(tmp_path: Path) -> None:
    """The arrays are made longer one by one, the keys last."""
    retrainings = asked(3, [0])
    before = bank(tmp_path).losses(retrainings)
    group = zarr.open_group(str(tmp_path / "bank.zarr"), mode="r+")
    for name in ("weights", "seed"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        array.resize((2 * array.shape[0], *array.shape[1:]))
    again = bank(tmp_path)
    np.testing.assert_array_equal(again.losses(retrainings), before)
    assert again.trained == 0
