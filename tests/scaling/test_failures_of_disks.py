"""Disks that are full while a run writes: it says so, and goes on once there is space, with what was whole."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

from distinfluence import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    ModelRecipe,
    Recipe,
    SequentialInfluenceCalculator,
)
from distinfluence.errors import DiskFullError, StoreError
from distinfluence.scaling import LogToFolder
from tests.processes import finished
from tests.scaling.chaos import made, marks
from tests.zoo import Case, build


@pytest.fixture(scope="module")
def case() -> Case:
    return build("mlp classification")


def test_a_full_disk_stops_the_run_and_it_goes_on_once_there_is_space(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distinfluence.scaling.stages import factor_file, factors

    full = DiskFullError("`scratch`: No space left on device")
    save = factor_file.save_factors
    written: list[Any] = []

    def filling(*args: Any) -> None:
        if len(written) == 1:
            raise full
        written.append(args)
        save(*args)

    def run() -> Any:
        model = CgInfluence(case.model, case.loss, 0.01, rtol=1e-10, atol=0.0, second_order_mode="ggn")
        calculator = SequentialInfluenceCalculator(model, scratch=tmp_path / "scratch").fit(*case.train, chunk_size=12)
        return calculator.to_zarr(
            tmp_path / "i.zarr", *case.test, test_chunk_size=2, solve="rows", existing="resume", progress=False
        )

    monkeypatch.setattr(factors, "save_factors", filling)
    with pytest.raises(DiskFullError, match="No space"):
        run()
    assert len(list((tmp_path / "scratch").rglob("fields-*.npy"))) == 1

    def counting(*args: Any) -> None:
        written.append(args)
        save(*args)

    monkeypatch.setattr(factors, "save_factors", counting)
    assert run().complete
    assert len(written) == 3  # each test chunk once, over both runs


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = finished(["mount", "-t", "tmpfs", "-o", "size=2000k", "tmpfs", folder])
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        finished(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int) -> None:
    """Take all space but so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(b"x" * max(0, free - leave))


def test_a_disk_that_is_full_again_and_again_loses_nothing(case: Case, small_disk: Path, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(
        DirectInfluence(case.model, case.loss, 0.01, second_order_mode="ggn"), scratch=tmp_path / "scratch"
    )
    calculator.fit(*case.train, chunk_size=2)
    quiet = calculator.to_zarr(tmp_path / "quiet.zarr", *case.test, test_chunk_size=2, progress=False)
    output, seen, errors = small_disk / "i.zarr", dict[str, int](), list[str]()
    for leave in (150_000, 60_000, 60_000, 60_000):
        (small_disk / "filler").unlink(missing_ok=True)
        fill(small_disk, leave)
        try:
            calculator.to_zarr(output, *case.test, test_chunk_size=2, existing="resume", progress=False)
        except StoreError as error:
            errors.append(str(error))
        now = marks(output)
        assert seen.items() <= now.items()  # what was whole was left as it was
        seen = now
    assert len(errors) >= 2
    assert all("space" in error for error in errors)
    assert 0 < len(seen) < 12
    (small_disk / "filler").unlink()
    result = calculator.to_zarr(output, *case.test, test_chunk_size=2, existing="resume", progress=False)
    assert result.complete
    assert seen.items() <= marks(output).items()
    np.testing.assert_array_equal(result[:], quiet[:])


@pytest.mark.parametrize("what", ["scratch", "output"])
def test_a_full_disk_under_workers_costs_what_was_under_way(
    client: Client, case: Case, small_disk: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if somebody else filled it after the run looked
    monkeypatch.setattr(DaskInfluenceCalculator, "require_space", lambda *_, **__: None)
    client.register_plugin(LogToFolder(tmp_path / "logs"))
    recipe = ModelRecipe(Recipe("tests.scaling.sources:model"))
    train, test = Recipe("tests.scaling.sources:train"), Recipe("tests.scaling.sources:repeated_test", {"times": 200})
    model = CgInfluence(case.model, case.loss, 0.1, rtol=1e-3, atol=0.0, second_order_mode="ggn")

    def run(path: Path, scratch: Path) -> Any:
        calculator = DaskInfluenceCalculator(model, client, recipe=recipe, scratch=scratch)
        calculator.fit(train, chunk_size=2)
        return calculator.to_zarr(path, test, test_chunk_size=100, solve="rows", existing="resume", progress=False)

    quiet = run(tmp_path / "quiet.zarr", tmp_path / "scratch")
    for file in (tmp_path / "logs").iterdir():
        file.write_text("")
    places = {"output": tmp_path, "scratch": tmp_path / "own", what: small_disk}
    path, scratch = places["output"] / "i.zarr", places["scratch"] / "scratch"
    whole: list[int] = []
    for leave in SPACE[what]:
        (small_disk / "filler").unlink(missing_ok=True)
        fill(small_disk, leave)
        with pytest.raises(DiskFullError, match="space"):
            run(path, scratch)
        whole.append(len(made(tmp_path / "logs", *DOING[what])[0]))
    assert 0 < whole[0] < whole[2] < 12
    (small_disk / "filler").unlink()
    result = run(path, scratch)
    np.testing.assert_array_equal(result[:], quiet[:])
    for begun, done in DOING.values():
        everything, again = made(tmp_path / "logs", begun, done)
        assert len(everything) == 12
        assert not again


# for some of the factors or strips each time: a strip and what goes with it takes 65 kB, the rest of a result 180 kB
SPACE = {"scratch": (200_000, 150_000, 150_000), "output": (400_000, 200_000, 200_000)}
DOING = {"scratch": ("solve", "solve"), "output": ("strip", "write")}
