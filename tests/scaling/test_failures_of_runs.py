"""Whole runs that die: the driver alone, driver and scheduler, everything at once; each goes on to the same bits."""

import asyncio
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from distributed import Client, Scheduler, Worker

from distinfluence import ArnoldiInfluence, DaskInfluenceCalculator, ModelRecipe, Recipe, open_influences
from distinfluence.app.yaml_file import to_yaml
from distinfluence.scaling import LogToFolder
from tests.forking import forking
from tests.processes import finished, started
from tests.scaling import sources
from tests.scaling.chaos import DEADLINE, KILLS, SEED, Staged, forked, made, marks, wait_for
from tests.test_job import content
from tests.zoo import build

ROOT = Path(__file__).parents[2]
STAGES = ("look at training data", "fit", "factors", "strips")


def serve(file: str) -> None:
    """A scheduler, until it is killed."""

    async def scheduler() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
            Path(f"{file}.partial").write_text(scheduler.address)
            Path(f"{file}.partial").rename(file)
            await scheduler.finished()

    asyncio.run(scheduler())


def work(address: str) -> None:
    """A worker, until its scheduler has gone."""

    async def worker() -> None:
        async with Worker(address, nthreads=1, dashboard=False) as worker:
            await worker.finished()

    asyncio.run(worker())


def drive(address: str, folder: str, name: str) -> None:
    """A run from its beginning, or from where it is."""
    case, path = build("mlp classification"), Path(folder, f"{name}.zarr")
    with Client(address) as client:
        client.register_plugin(LogToFolder(Path(folder, f"{name}.logs")))
        recipe = ModelRecipe(Recipe("tests.scaling.sources:slow_model", {"seconds": 0.03}))
        model = ArnoldiInfluence(
            sources.slow_model(0.0), case.loss, 0.1, rank_estimate=5, second_order_mode="ggn", residual_rows=64
        )
        calculator = DaskInfluenceCalculator(model, client, recipe=recipe, scratch=Path(folder, f"{name}.scratch"))
        progress = Staged(Path(folder, f"{name}.stage"))
        calculator.fit(*case.train, chunk_size=1, progress=progress)
        tests = (torch.cat([part] * 2) for part in case.test)
        calculator.to_zarr(path, *tests, test_chunk_size=1, solve="rows", existing="resume", progress=progress)


class Rig:
    """Driver, scheduler and two workers as processes of their own, which may be killed apart from each other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, forking()
        self.scheduler: Any = None

    def start(self, name: str) -> Any:
        """The driver; scheduler and workers first where there are none."""
        if self.scheduler is None:
            file = self.folder / f"scheduler-{time.monotonic_ns()}"
            self.scheduler = self._started(serve, str(file))
            wait_for(file.is_file)
            self.address = file.read_text()
            self.workers = [self._started(work, self.address) for _ in range(2)]
        return self._started(drive, self.address, str(self.folder), name)

    def _started(self, target: Any, *arguments: str) -> Any:
        process = self.processes.Process(target=target, args=arguments, daemon=True)  # none outlives a test that fails
        process.start()
        return process

    def kill_scheduler(self) -> None:
        """Workers live on, and end when they notice."""
        self.scheduler.kill()
        self.scheduler.join()
        self.scheduler = None


def reached_or_ended(stage: Path, wanted: tuple[str, ...], driver: Any) -> bool:
    return driver.exitcode is not None or (stage.is_file() and stage.read_text() in wanted)


@pytest.mark.chaos
def test_driver_and_scheduler_killed_at_random_moments_of_all_stages_cost_what_was_under_way(tmp_path: Path) -> None:
    before, rig, chance = {process.pid for process in forked()}, Rig(tmp_path), random.Random(SEED)
    hit: Counter[str] = Counter()
    stage = tmp_path / "killed.stage"
    for number in range(4 * KILLS):
        aims = [place for place, name in enumerate(STAGES) if hit[name] < max(1, KILLS // len(STAGES))]
        if not aims and hit.total() >= KILLS:
            break
        wanted = STAGES[aims[0] if aims else -1 :]
        stage.unlink(missing_ok=True)
        driver = rig.start("killed")
        wait_for(functools.partial(reached_or_ended, stage, wanted, driver))
        time.sleep(chance.uniform(0.0, 0.3))
        driver.kill()
        driver.join()
        if driver.exitcode == -signal.SIGKILL:
            hit[stage.read_text()] += 1
        if number % 2:
            rig.kill_scheduler()
    assert hit.total() >= KILLS - 2, hit
    assert all(hit[name] >= max(1, KILLS // len(STAGES)) for name in STAGES), hit
    for name in ("killed", "quiet"):
        driver = rig.start(name)
        driver.join(DEADLINE)
        assert driver.exitcode == 0
    rig.kill_scheduler()
    result, quiet = (open_influences(tmp_path / f"{name}.zarr") for name in ("killed", "quiet"))
    assert result.complete
    np.testing.assert_array_equal(result[:], quiet[:])
    for begun, done in (("strip", "write"), ("solve", "solve")):
        ended, again = made(tmp_path / "killed.logs", begun, done)
        assert ended
        assert not again
    wait_for(lambda: {process.pid for process in forked()} <= before)  # workers went when their scheduler did


def left_running(tag: str) -> list[int]:
    """Processes that were started with this in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("CHAOS_TAG") == tag:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def written_or_ended(output: Path, enough: int, process: "subprocess.Popen[str]") -> bool:
    return len(marks(output)) >= enough or process.poll() is not None


@pytest.mark.chaos
def test_a_run_killed_whole_goes_on_from_its_strips_to_the_same_bits(tmp_path: Path, python: Path) -> None:
    def job(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        described = content(
            model={"factory": {"target": "tests.scaling.sources:slow_model", "arguments": {"seconds": 0.03}}},
            chunks={"train": 1, "test": 2},
            cluster={"kind": "local", "workers": 1},
            output=f"{name}.zarr",
        )
        path.write_text(to_yaml(described))
        return path

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CHAOS_TAG": str(tmp_path)}

    def command(path: Path, program: object = sys.executable) -> list[object]:  # a group of real processes is killed
        return [program, "-m", "distinfluence", "run", path, "--resume", "--quiet"]

    path, output = job("killed"), tmp_path / "killed.zarr"
    chance = random.Random(SEED + 1)
    seen: dict[str, int] = {}
    for whole in (True, False):
        enough = min(len(seen) + chance.randint(1, 3), 22)
        with started(command(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
            wait_for(functools.partial(written_or_ended, output, enough, process))
            if whole:
                os.killpg(process.pid, signal.SIGKILL)  # client, scheduler, nanny and worker
            else:
                os.kill(process.pid, signal.SIGKILL)  # the worker ends by itself
            process.communicate(timeout=60)
            wait_for(lambda: not left_running(str(tmp_path)))
        now = marks(output)
        assert seen.items() <= now.items()  # what was whole was left as it was
        seen = now
    finished(command(path, python), limit=DEADLINE, env=environment, check=True)
    assert seen.items() <= marks(output).items()
    finished(command(job("quiet"), python), limit=DEADLINE, env=environment, check=True)
    wait_for(lambda: not left_running(str(tmp_path)))
    result, quiet = open_influences(output), open_influences(tmp_path / "quiet.zarr")
    assert result.complete
    np.testing.assert_array_equal(result[:], quiet[:])
