"""What a run leaves in the scratch folder for the next: taken if it is whole, made again if not, removed in time."""

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.utils.data import Dataset

from distinfluence import ArnoldiInfluence, CgInfluence, ModelRecipe, Recipe, SequentialInfluenceCalculator
from distinfluence.errors import ChunkFailedError, DiskFullError, FingerprintError, SampleError
from distinfluence.scaling.data.sources import spill
from distinfluence.scaling.stages import factor_file, factors
from distinfluence.store import InfluenceResult, InfluenceWriter
from tests.zoo import Case, build


@pytest.fixture(scope="module")
def case() -> Case:
    return build("mlp classification")


class Bad(Dataset[tuple[Tensor, Tensor]]):
    """Samples of which some cannot be read."""

    def __init__(self, part: str, bad: tuple[int, ...]) -> None:
        self.x, self.y = getattr(build("mlp classification"), part)
        self.bad = bad

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self.bad:
            raise OSError("cannot read file")
        return self.x[index], self.y[index]


def bad(part: str, *which: int) -> Recipe:
    return Recipe("tests.scaling.test_resume:Bad", {"part": part, "bad": which})


def calculator(case: Case, scratch: Path | None = None) -> SequentialInfluenceCalculator:
    model = CgInfluence(case.model, case.loss, 0.01, rtol=1e-2, atol=0.0, second_order_mode="ggn")
    return SequentialInfluenceCalculator(model, scratch=scratch).fit(*case.train, chunk_size=12)


def scores(made: SequentialInfluenceCalculator, path: Path, case: Case, **settings: Any) -> InfluenceResult:
    settings = {"test_chunk_size": 2, "solve": "rows", "existing": "resume", "progress": False} | settings
    return made.to_zarr(path, *case.test, **settings)


@pytest.fixture(scope="module")
def quiet(case: Case, tmp_path_factory: pytest.TempPathFactory) -> InfluenceResult:
    """What an undisturbed run makes."""
    return scores(calculator(case), tmp_path_factory.mktemp("quiet") / "i.zarr", case)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first test point of each chunk whose factors are made."""
    starts: list[int] = []
    save = factor_file.save_factors

    def counting(file: str, start: int, factors: Any, fields: Any) -> None:
        starts.append(start)
        save(file, start, factors, fields)

    monkeypatch.setattr(factors, "save_factors", counting)
    return starts


@pytest.fixture
def dies_at_the_strips(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A run's strips end it, until what is returned is called."""

    def die(*args: Any, **kwargs: Any) -> bool:
        raise KeyboardInterrupt

    write = InfluenceWriter.write_strip
    monkeypatch.setattr(InfluenceWriter, "write_strip", die)
    return lambda: monkeypatch.setattr(InfluenceWriter, "write_strip", write)


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte[0] ^ 1]))


DAMAGES: dict[str, tuple[Callable[[Path], None], list[int]]] = {
    "none": (lambda folder: None, []),
    "a flipped bit in a row": (lambda folder: flip(folder / "factors.npy", 128 + 3 * 43 * 8), [2]),
    "a flipped bit in fields": (lambda folder: flip(folder / "fields-000000004.npy", 128 + 1), [4]),
    "fields that are empty": (lambda folder: os.truncate(folder / "fields-000000000.npy", 0), [0]),
    "factors that are torn": (lambda folder: os.truncate(folder / "factors.npy", 500), [0, 2, 4]),
    "factors that are gone": (lambda folder: (folder / "factors.npy").unlink(), [0, 2, 4]),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_factors_that_are_not_as_written_are_solved_again_and_no_others(
    damage: str,
    case: Case,
    quiet: InfluenceResult,
    tmp_path: Path,
    solved: list[int],
    dies_at_the_strips: Callable[[], None],
) -> None:
    made = calculator(case, tmp_path / "scratch")
    assert made.model.n_parameters == 43  # which offsets count with
    with pytest.raises(KeyboardInterrupt):
        scores(made, tmp_path / "i.zarr", case)
    assert solved == [0, 2, 4]
    (folder,) = (tmp_path / "scratch").glob("factors-*")
    do, again = DAMAGES[damage]
    do(folder)
    dies_at_the_strips()
    solved.clear()
    if again:
        with pytest.warns(RuntimeWarning, match="the factors of test chunk .* are damaged: solved again"):
            result = scores(made, tmp_path / "i.zarr", case)
    else:
        result = scores(made, tmp_path / "i.zarr", case)
    assert solved == again
    np.testing.assert_array_equal(result[:], quiet[:])
    np.testing.assert_array_equal(result.relative_residual, quiet.relative_residual)


def test_a_fit_that_cannot_be_read_is_made_again(case: Case, tmp_path: Path) -> None:
    def fitted() -> SequentialInfluenceCalculator:
        model = ArnoldiInfluence(case.model, case.loss, 0.1, rank_estimate=5, second_order_mode="ggn")
        return SequentialInfluenceCalculator(model, scratch=tmp_path / "scratch").fit(*case.train, chunk_size=12)

    fitted()
    (folder,) = (tmp_path / "scratch").glob("fit-*")
    os.truncate(folder / "zarr.json", 0)
    with pytest.warns(RuntimeWarning, match="is made again"):
        assert fitted().model.reducer.passes > 1
    assert fitted().model.reducer.passes == 0


def test_what_is_known_of_test_points_outlives_a_power_failure_after_the_last_strip(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int]
) -> None:
    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    made = calculator(case, tmp_path / "scratch")
    finish = InfluenceWriter.finish
    monkeypatch.setattr(InfluenceWriter, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        scores(made, tmp_path / "i.zarr", case)
    os.truncate(tmp_path / "i.zarr" / "iterations" / "c" / "0", 3)
    monkeypatch.setattr(InfluenceWriter, "finish", finish)
    result = scores(made, tmp_path / "i.zarr", case)
    assert solved == [0, 2, 4]
    assert (result.iterations > 0).all()
    # without the scratch folder they are solved for again
    monkeypatch.setattr(InfluenceWriter, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        scores(made, tmp_path / "j.zarr", case)
    monkeypatch.setattr(InfluenceWriter, "finish", finish)
    shutil.rmtree(next((tmp_path / "scratch").glob("factors-*")))
    os.truncate(tmp_path / "j.zarr" / "test_loss" / "c" / "0", 3)
    again = scores(made, tmp_path / "j.zarr", case)
    np.testing.assert_array_equal(again.test_loss, result.test_loss)


# --- bad samples ---------------------------------------------------------------------------------------------------


def test_all_bad_samples_are_named_before_anything_is_computed(case: Case) -> None:
    model = CgInfluence(case.model, case.loss, 0.01, second_order_mode="ggn")
    with pytest.raises(SampleError) as caught:
        SequentialInfluenceCalculator(model).fit(bad("train", 3, 17), chunk_size=5)
    assert "2 of 5 chunks of training data" in str(caught.value)
    assert "chunk 0 (samples 0 to 4): OSError: cannot read file" in str(caught.value)
    assert "chunk 3 (samples 15 to 19): OSError: cannot read file" in str(caught.value)
    with pytest.raises(SampleError, match=r"^chunk 3 \(samples 15 to 19\): OSError"):
        SequentialInfluenceCalculator(model).fit(bad("train", 17), chunk_size=5)


@pytest.mark.parametrize("solve", ["rows", "data"])
def test_test_samples_that_fail_in_the_solve_are_named_when_all_other_factors_are_made(
    solve: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int]
) -> None:
    gradients = CgInfluence.measurement_gradients

    def failing(self: CgInfluence, batch: Any) -> Any:
        if bool((batch[0] == case.test[0][3]).all(dim=1).any()):
            raise ValueError("no such file")
        return gradients(self, batch)

    made = calculator(case, tmp_path / "scratch")
    monkeypatch.setattr(CgInfluence, "measurement_gradients", failing)
    with pytest.raises(ChunkFailedError, match=r"1 of 3 test chunks(.|\n)*chunk 1 \(samples 2 to 3\): ValueError"):
        scores(made, tmp_path / "i.zarr", case, solve=solve)
    assert sorted(solved) == [0, 4]
    monkeypatch.setattr(CgInfluence, "measurement_gradients", gradients)
    assert scores(made, tmp_path / "i.zarr", case, solve=solve).complete
    assert sorted(solved) == [0, 2, 4]


# --- a run that goes on elsewhere, and what it leaves --------------------------------------------------------------


def test_a_run_goes_on_solving_where_it_began_to(
    case: Case, tmp_path: Path, dies_at_the_strips: Callable[[], None]
) -> None:
    made = calculator(case, tmp_path / "scratch")
    with pytest.raises(KeyboardInterrupt):
        scores(made, tmp_path / "i.zarr", case, solve="data")
    dies_at_the_strips()
    with pytest.raises(FingerprintError, match=r"`chunks.solve` is 'data' there, 'rows' here"):
        scores(made, tmp_path / "i.zarr", case, solve="rows")
    result = scores(made, tmp_path / "i.zarr", case, solve="auto")  # one worker alone would take rows
    assert result.provenance["chunks"]["solve"] == "data"


def test_a_named_scratch_folder_keeps_what_a_later_run_may_take_and_nothing_else(case: Case, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    made = calculator(case, scratch)
    (own,) = scratch.glob("run-*")
    scores(made, tmp_path / "i.zarr", case)
    assert own.is_dir()
    made.forget_fit()
    del made
    assert list(scratch.iterdir()) == []


def test_what_killed_runs_left_goes_when_the_next_comes_and_what_others_use_stays(case: Case, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    for name, host in (("run-killed", socket.gethostname()), ("run-elsewhere", "another-host")):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "lock").write_text(host)
    (scratch / "run-killed" / "GGNProduct-0.npy").write_bytes(b"1")
    (scratch / "run-beginning").mkdir()  # has no lock yet
    first = calculator(case, scratch)
    second = calculator(case, scratch)
    assert not (scratch / "run-killed").exists()
    assert (scratch / "run-beginning").exists()
    assert (scratch / "run-elsewhere").exists()  # whether it lives cannot be seen from here
    assert len(list(scratch.glob("run-*/lock"))) == 3
    del first, second


# --- a disk that is too small --------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_said_before_anything_is_solved(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int]
) -> None:
    made = calculator(case, tmp_path / "scratch")

    class Small:
        free = 1_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Small)
    with pytest.raises(
        DiskFullError, match=r"the run needs .* for `output` and .* for `scratch` .* has .* free\. Free"
    ):
        scores(made, tmp_path / "i.zarr", case, top_k=50)
    assert solved == []
    assert not (tmp_path / "i.zarr").exists()


def test_what_lies_there_already_counts_as_room(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calculator(case, tmp_path / "scratch")
    plan = made.plan(*case.train, *case.test)

    class Small:
        free = plan.scratch_bytes

    monkeypatch.setattr("shutil.disk_usage", lambda path: Small)
    with pytest.raises(DiskFullError):
        made.require_space(plan, tmp_path / "i.zarr")
    (tmp_path / "i.zarr").mkdir()
    (tmp_path / "i.zarr" / "data").write_bytes(b"x" * (plan.disk_bytes + 4096))
    made.require_space(plan, tmp_path / "i.zarr")


WRITES: dict[str, Callable[[Path], object]] = {
    "factors": lambda folder: factor_file.make_factor_file(folder / "factors.npy", 3, 4, np.dtype("f4")),
    "model": lambda folder: ModelRecipe.spill(nn.Linear(2, 2), folder),
    "array": lambda folder: spill(np.zeros(3), folder),
}


@pytest.mark.parametrize("what", list(WRITES))
def test_a_full_disk_is_one_error_that_says_what_to_free(what: str, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("numpy.lib.format.open_memmap", "numpy.save", "torch.save"):
        monkeypatch.setattr(function, full)
    with pytest.raises(DiskFullError, match=r"`scratch` .*: cannot write .* \(No space left on device\)\. Free space"):
        WRITES[what](tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_url_of_a_file_is_a_folder(case: Case, tmp_path: Path) -> None:
    made = calculator(case)
    result = made.to_zarr(f"file://{tmp_path}/i.zarr", *case.test, progress=False)
    assert result.complete
    assert (tmp_path / "i.zarr" / "zarr.json").is_file()
