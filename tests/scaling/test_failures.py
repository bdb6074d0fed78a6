"""What happens when a worker, a chunk or the whole run fails: nothing is lost, nothing is made twice, all is said.

CHAOS_KILLS: how many workers are killed, 20 unless set; CHAOS_RUNS: how many whole runs, 4 unless set.
"""

import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from distributed import Client

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    ModelRecipe,
    Recipe,
    SequentialInfluenceCalculator,
    open_influences,
)
from distinfluence.errors import ChunkFailedError, DiskFullError, SettingError, StoreError
from distinfluence.scaling import ClusterSpec, connected, flight
from distinfluence.scaling.executor import InProcess, OnCluster
from distinfluence.store import InfluenceWriter
from tests.scaling import sources
from tests.test_job import content
from tests.zoo import Case, build

KILLS = int(os.environ.get("CHAOS_KILLS", "20"))
RUNS = int(os.environ.get("CHAOS_RUNS", "4"))
ROOT = Path(__file__).parents[2]
DEADLINE = 240.0


@pytest.fixture(scope="module")
def case() -> Case:
    return build("mlp classification")


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def direct(case: Case) -> DirectInfluence:
    return DirectInfluence(case.model, case.loss, 0.01, second_order_mode="ggn")


def marks(path: Path) -> dict[str, int]:
    """Strip → when its mark was written."""
    found = {}
    for file in (path / "strip_status" / "c").glob("*"):
        if file.suffix != ".partial":
            found[file.name] = file.stat().st_mtime_ns
    return found


# --- tasks ---------------------------------------------------------------------------------------------------------


def fails_at_first(folder: str, index: int) -> int:
    file = Path(folder) / f"{index}-{time.monotonic_ns()}"
    file.touch()
    if index == 3 and len(list(Path(folder).glob("3-*"))) <= flight.RETRIES:
        raise RuntimeError("not yet")
    return index


def fails_always(index: int) -> int:
    if index == 3:
        raise ValueError("sample 3 is bad")
    return index


def kills_its_worker(index: int) -> int:
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def stops_its_worker_once(folder: str, index: int) -> int:
    flag = Path(folder) / "stopped"
    if index == 4 and not flag.exists():
        flag.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return index


def test_a_task_that_fails_is_tried_again(client: Client, tmp_path: Path) -> None:
    on_cluster = OnCluster(client)
    found = dict(on_cluster.run(fails_at_first, (str(tmp_path),), [(i,) for i in range(6)]))
    assert found == {i: i for i in range(6)}
    assert on_cluster.events == {"submitted": 6 + flight.RETRIES, "retried": flight.RETRIES}


@pytest.mark.parametrize("where", ["in process", "on cluster"])
def test_a_task_that_always_fails_is_set_apart_and_the_others_go_on(where: str, request: pytest.FixtureRequest) -> None:
    run = InProcess() if where == "in process" else OnCluster(request.getfixturevalue("client"))
    failures: flight.Failures = {}
    found = dict(run.run(fails_always, (), [(i,) for i in range(6)], failures))
    assert found == {i: i for i in range(6) if i != 3}
    assert list(failures) == [3]
    assert str(failures[3]) == "sample 3 is bad"
    with pytest.raises(ValueError, match="sample 3 is bad"):
        list(run.run(fails_always, (), [(i,) for i in range(6)]))


@pytest.fixture
def own_cluster() -> Iterator[Client]:
    """Workers that a test may kill."""
    with connected(ClusterSpec(workers=2)) as client:
        yield client


def test_a_task_that_kills_every_worker_is_set_apart(own_cluster: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "RETRIES", 1)  # tasks that waited on the same worker are blamed too, the first time

    def unforgiving(dask_scheduler: Any) -> None:
        dask_scheduler.allowed_failures = 0

    own_cluster.run_on_scheduler(unforgiving)
    failures: flight.Failures = {}
    found = dict(OnCluster(own_cluster).run(kills_its_worker, (), [(i,) for i in range(4)], failures))
    assert found == {0: 0, 2: 2, 3: 3}
    assert "memory" in str(failures[1])


def test_a_worker_that_its_nanny_gave_up_comes_back(own_cluster: Client) -> None:
    before = own_cluster.run(os.getpid)
    for nanny in list(own_cluster.cluster.workers.values()):
        own_cluster.cluster.sync(nanny.close)
    assert own_cluster.submit(sum, (1, 2)).result(DEADLINE) == 3
    own_cluster.wait_for_workers(2, timeout=DEADLINE)
    assert not set(own_cluster.run(os.getpid).values()) & set(before.values())


def test_a_worker_that_stands_still_is_backed_up_and_may_come_back(own_cluster: Client, tmp_path: Path) -> None:
    on_cluster = OnCluster(own_cluster, slow_seconds=1.0)
    try:
        found = dict(on_cluster.run(stops_its_worker_once, (str(tmp_path),), [(i,) for i in range(12)]))
    finally:
        if (tmp_path / "stopped").exists():
            os.kill(int((tmp_path / "stopped").read_text()), signal.SIGCONT)
    assert found == {i: i for i in range(12)}
    assert on_cluster.events["backed up"] >= 1
    assert on_cluster.events["set apart"] == on_cluster.events["retried"] == 0


# --- runs ----------------------------------------------------------------------------------------------------------


def test_factors_beyond_the_budget_are_taken_in_panels_and_the_gradients_made_for_each(
    case: Case, tmp_path: Path
) -> None:
    class Counting(DirectInfluence):
        passes: list[int] = []  # noqa: RUF012

        def tile(self, factors: Any, batch: Any, mode: Any = "up") -> Any:
            self.passes.append(len(factors))
            return super().tile(factors, batch, mode)

    model = Counting(case.model, case.loss, 0.01, second_order_mode="ggn")
    calculator = SequentialInfluenceCalculator(model).fit(*case.train, chunk_size=12)
    whole = calculator.to_zarr(tmp_path / "whole.zarr", *case.test, progress=False)
    assert Counting.passes == [6, 6]  # two strips
    Counting.passes.clear()
    cut = calculator.to_zarr(tmp_path / "cut.zarr", *case.test, panel_size=4, progress=False)
    assert Counting.passes == [4, 2, 4, 2]
    np.testing.assert_allclose(cut[:], whole[:], rtol=1e-6, atol=1e-9)
    assert cut.provenance["chunks"]["panel"] == 4
    again = calculator.to_zarr(tmp_path / "cut.zarr", *case.test, resume=True, progress=False)
    assert again.complete  # goes on with the panels that it began with
    with pytest.raises(SettingError, match="`panel_size`"):
        calculator.to_zarr(tmp_path / "no.zarr", *case.test, panel_size=0, progress=False)


def test_a_strip_that_always_fails_is_named_when_all_others_are_written(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = InfluenceWriter.write_strip

    def broken(self: InfluenceWriter, i: int, *args: Any, **fields: Any) -> bool:
        if i == 1:
            raise RuntimeError("cannot be read")
        return write(self, i, *args, **fields)

    def run() -> Any:
        calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train, chunk_size=5)
        return calculator.to_zarr(tmp_path / "i.zarr", *case.test, resume=True, progress=False)

    monkeypatch.setattr(InfluenceWriter, "write_strip", broken)
    with pytest.raises(ChunkFailedError, match=r"chunk 1 \(samples 5 to 9\): RuntimeError: cannot be read"):
        run()
    half = open_influences(tmp_path / "i.zarr")
    assert half.n_missing == 1
    assert half.provenance["quarantined"] == {"1": "chunk 1 (samples 5 to 9): RuntimeError: cannot be read"}
    before = marks(half.path)
    monkeypatch.setattr(InfluenceWriter, "write_strip", write)
    result = run()
    assert result.complete
    assert result.provenance["quarantined"] == {}
    assert [name for name, at in marks(result.path).items() if before.get(name) != at] == ["1"]


def test_a_run_that_goes_on_takes_the_fit_that_it_left(case: Case, tmp_path: Path) -> None:
    def fitted(**settings: Any) -> Any:
        model = ArnoldiInfluence(case.model, case.loss, 0.1, rank_estimate=5, second_order_mode="ggn", **settings)
        calculator = SequentialInfluenceCalculator(model, scratch=tmp_path / "scratch")
        return calculator.fit(*case.train, chunk_size=12)

    first, again, other = fitted(), fitted(), fitted(tol=1e-3)
    assert first.model.plane.passes > 1
    assert again.model.plane.passes == 0
    assert other.model.plane.passes > 1  # another fit than the one that is there
    results = [
        calculator.to_zarr(tmp_path / f"{name}.zarr", *case.test, progress=False)[:]
        for name, calculator in (("first", first), ("again", again))
    ]
    np.testing.assert_array_equal(*results)


def test_what_a_power_cut_took_of_the_test_points_is_written_again_at_the_end(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: InfluenceWriter, summary: Any = None) -> None:
        for name in ("test_loss", "relative_residual"):
            for file in (self.path / name / "c").iterdir():
                file.unlink()
        raise KeyboardInterrupt

    def run() -> Any:
        calculator = SequentialInfluenceCalculator(direct(case), scratch=tmp_path / "scratch")
        calculator.fit(*case.train, chunk_size=12)
        return calculator.to_zarr(tmp_path / "i.zarr", *case.test, test_chunk_size=2, resume=True, progress=False)

    with monkeypatch.context() as patch:
        patch.setattr(InfluenceWriter, "finish", cut)
        with pytest.raises(KeyboardInterrupt):
            run()
    result = run()
    assert result.complete
    assert np.isfinite(np.asarray(result.test_loss)).all()
    assert np.isfinite(np.asarray(result.relative_residual)).all()


def test_a_full_disk_stops_the_run_and_it_goes_on_once_there_is_space(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distinfluence.scaling import tasks

    full = DiskFullError("`scratch`: No space left on device")
    save = tasks.save_factors
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
            tmp_path / "i.zarr", *case.test, test_chunk_size=2, solve="rows", resume=True, progress=False
        )

    monkeypatch.setattr(tasks, "save_factors", filling)
    with pytest.raises(DiskFullError, match="No space"):
        run()
    assert len(list((tmp_path / "scratch").rglob("fields-*.npy"))) == 1

    def counting(*args: Any) -> None:
        written.append(args)
        save(*args)

    monkeypatch.setattr(tasks, "save_factors", counting)
    assert run().complete
    assert len(written) == 3  # each test chunk once, over both runs


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Take all space but so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(b"x" * max(0, free - leave))


def test_a_disk_that_is_full_again_and_again_loses_nothing(case: Case, small_disk: Path, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(direct(case), scratch=tmp_path / "scratch")
    calculator.fit(*case.train, chunk_size=2)
    quiet = calculator.to_zarr(tmp_path / "quiet.zarr", *case.test, test_chunk_size=2, progress=False)
    output, seen, errors = small_disk / "i.zarr", dict[str, int](), list[str]()
    for leave in (150_000, 60_000, 60_000, 60_000):
        (small_disk / "filler").unlink(missing_ok=True)
        fill(small_disk, leave)
        try:
            calculator.to_zarr(output, *case.test, test_chunk_size=2, resume=True, progress=False)
        except StoreError as error:
            errors.append(str(error))
        now = marks(output)
        assert seen.items() <= now.items()  # what was whole was left as it was
        seen = now
    assert len(errors) >= 2
    assert all("space" in error for error in errors)
    assert 0 < len(seen) < 12
    (small_disk / "filler").unlink()
    result = calculator.to_zarr(output, *case.test, test_chunk_size=2, resume=True, progress=False)
    assert result.complete
    assert seen.items() <= marks(output).items()
    np.testing.assert_array_equal(result[:], quiet[:])


def test_a_worker_that_is_stopped_and_continued_costs_nothing(own_cluster: Client, case: Case, tmp_path: Path) -> None:
    recipe = ModelRecipe(Recipe("tests.scaling.sources:slow_model"))
    model = DirectInfluence(sources.slow_model(), case.loss, 0.01, second_order_mode="ggn")
    calculator = DaskInfluenceCalculator(model, own_cluster, recipe=recipe).fit(*case.train, chunk_size=1)
    quiet = calculator.to_zarr(tmp_path / "quiet.zarr", *case.test, progress=False)
    pid = sorted(own_cluster.run(os.getpid).values())[0]
    output, ended = tmp_path / "i.zarr", threading.Event()

    def stop_for_a_while() -> None:
        wait_for(lambda: len(marks(output)) >= 3)
        os.kill(pid, signal.SIGSTOP)
        ended.wait(4.0)
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_for_a_while)
    thread.start()
    try:
        result = calculator.to_zarr(output, *case.test, progress=False)
    finally:
        ended.set()
        thread.join(DEADLINE)
    assert result.complete
    np.testing.assert_array_equal(result[:], quiet[:])


class Killer:
    """Kills random workers, one after the other, while a run goes on. seed: of the choice and of the moments."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client, self.random, self.kills = client, random.Random(seed), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._strike, daemon=True)

    def _strike(self) -> None:
        while self.kills < KILLS and not self._stop.wait(self.random.uniform(0.2, 1.5)):
            try:
                pids = self.client.run(os.getpid, on_error="ignore")
                os.kill(self.random.choice(sorted(pids.values())), signal.SIGKILL)
            except (OSError, IndexError):
                continue  # just died
            self.kills += 1

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)


def test_workers_killed_at_random_cost_their_tasks_and_nothing_else(
    own_cluster: Client, case: Case, tmp_path: Path
) -> None:
    def patient(dask_scheduler: Any) -> None:
        dask_scheduler.allowed_failures = 100

    own_cluster.run_on_scheduler(patient)
    recipe = ModelRecipe(Recipe("tests.scaling.sources:slow_model"))
    model = DirectInfluence(sources.slow_model(), case.loss, 0.01, second_order_mode="ggn")

    def run(path: Path) -> Any:
        calculator = DaskInfluenceCalculator(model, own_cluster, recipe=recipe)
        calculator.fit(*case.train, chunk_size=1)
        return calculator.to_zarr(path, *case.test, test_chunk_size=1, progress=False)

    quiet = run(tmp_path / "quiet.zarr")
    with Killer(own_cluster, seed=0) as killer:
        result = run(tmp_path / "i.zarr")
    assert killer.kills >= 1
    assert result.complete
    np.testing.assert_array_equal(result[:], quiet[:])
    np.testing.assert_array_equal(result.top(0).indices, quiet.top(0).indices)


def written_or_ended(output: Path, enough: int, process: "subprocess.Popen[str]") -> bool:
    return len(marks(output)) >= enough or process.poll() is not None


def test_a_run_killed_whole_goes_on_from_its_strips_to_the_same_bits(tmp_path: Path) -> None:
    def job(name: str, model: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        described = content(
            model={"factory": f"tests.scaling.sources:{model}"},
            chunks={"train": 1, "test": 2},
            cluster={"kind": "local", "workers": 1},
            output=f"{name}.zarr",
        )
        path.write_text(yaml.safe_dump(described))
        return path

    def start(path: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "distinfluence", "run", str(path), "--resume", "--quiet"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    path, output = job("killed", "slow_model"), tmp_path / "killed.zarr"
    chance = random.Random(1)
    seen: dict[str, int] = {}
    for _ in range(RUNS):
        process, enough = start(path), min(len(seen) + chance.randint(1, 3), 22)
        wait_for(functools.partial(written_or_ended, output, enough, process))
        os.killpg(process.pid, signal.SIGKILL)  # client, scheduler, nanny and worker
        process.communicate(timeout=60)
        now = marks(output)
        assert seen.items() <= now.items()  # what was whole was left as it was
        seen = now
    process = start(path)
    said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said
    assert seen.items() <= marks(output).items()
    undisturbed = start(job("quiet", "slow_model"))
    said, _ = undisturbed.communicate(timeout=DEADLINE)
    assert undisturbed.returncode == 0, said
    result, quiet = open_influences(output), open_influences(tmp_path / "quiet.zarr")
    assert result.complete
    np.testing.assert_array_equal(result[:], quiet[:])
