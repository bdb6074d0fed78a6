"""What workers are asked for, what they write down, and how much work and traffic a run is."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster

from distinfluence import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    ModelRecipe,
    Recipe,
    SequentialInfluenceCalculator,
)
from distinfluence.app.yaml_file import to_yaml
from distinfluence.errors import ClusterError, SettingError
from distinfluence.scaling import ClusterSpec, LogToFolder
from distinfluence.scaling.clusters.connect import planned_workers
from distinfluence.scaling.dispatch.executor import OnCluster, check_workers
from distinfluence.scaling.scratch import Scratch
from distinfluence.scaling.worker.context import travelling
from distinfluence.scaling.worker.device import check_device, task_device
from tests.processes import finished
from tests.reference import Reference
from tests.test_job import content
from tests.zoo import Case, build


@pytest.fixture(scope="module")
def case() -> Case:
    return build("mlp classification")


def test_a_client_that_cannot_be_used_is_told_at_once(client: Client, case: Case) -> None:
    with Client(client.scheduler.address) as other:
        open_still = DaskInfluenceCalculator(direct(case), other)
    with pytest.raises(ClusterError, match=r"`client` must be open, got one that is closed.*`Client\(cluster\)`"):
        DaskInfluenceCalculator(direct(case), other)
    with pytest.raises(ClusterError, match="`client` must be open"):  # closed since
        open_still.fit(*case.train)

    async def pass_it() -> None:
        async with Client(client.scheduler.address, asynchronous=True) as of_a_loop:
            with pytest.raises(ClusterError, match=r"`client` must be synchronous.*`Client\(address\)`"):
                DaskInfluenceCalculator(direct(case), of_a_loop)

    asyncio.run(pass_it())
    for workers in (0, True, 1.5):
        with pytest.raises(SettingError, match="`workers` must be a whole number ≥ 1"):
            DaskInfluenceCalculator(direct(case), client, workers=workers)


def direct(case: Case) -> DirectInfluence:
    return DirectInfluence(case.model, case.loss, 0.01, second_order_mode="ggn")


@pytest.fixture(scope="module")
def mixed() -> Iterator[Client]:
    """One worker with a pretended GPU, one without."""
    options = {"nthreads": 1, "host": "127.0.0.1", "dashboard": False}
    workers = {
        "gpu": {"cls": Nanny, "options": {**options, "resources": {"GPU": 1}}},
        "cpu": {"cls": Nanny, "options": options},
    }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard": False, "port": 0}}
    with SpecCluster(workers=workers, scheduler=scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


def test_tasks_go_only_to_workers_with_the_resources(mixed: Client, case: Case, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    mixed.register_plugin(LogToFolder(logs), name="logs")
    calculator = DaskInfluenceCalculator(direct(case), mixed, resources={"GPU": 1})
    result = calculator.fit(*case.train, chunk_size=5).to_zarr(tmp_path / "i.zarr", *case.test, progress=False)
    assert result.complete
    lines = [json.loads(line) for file in logs.glob("*.jsonl") for line in file.read_text().splitlines()]
    doing = Counter(line["message"] for line in lines)
    assert doing["strip"] == doing["write"] == 5
    assert doing["look"] == 5 + 1
    assert doing["joined"] == 2
    busy = {line["pid"] for line in lines if line["message"] == "strip"}
    assert len(busy) == 1  # of two workers, the one with the resource
    strip = next(line for line in lines if line["message"] == "strip")
    assert strip["level"] == "INFO"
    assert strip["seconds"] > 0
    assert strip["memory"] > 2**20


def test_resources_that_no_worker_has_are_refused_at_once(mixed: Client, case: Case) -> None:
    with pytest.raises(ClusterError, match=r"`resources` .*--resources TPU=1"):
        DaskInfluenceCalculator(direct(case), mixed, resources={"TPU": 1})


def test_a_failing_task_is_in_the_log(mixed: Client, tmp_path: Path) -> None:
    mixed.register_plugin(LogToFolder(tmp_path), name="logs of failures")
    assert mixed.submit(fails_in_a_log, pure=False).exception() is not None
    lines = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [(line["message"], line["level"], line["error"]) for line in lines if "error" in line] == [
        ("strip", "ERROR", "broken")
    ]


def fails_in_a_log() -> None:
    from distinfluence.scaling.worker.logs import logged_task

    with logged_task("strip", chunk=3):
        raise ValueError("broken")


def transferred(client: Client) -> int:
    """Bytes that workers have sent to each other so far."""

    def sent(dask_worker: Any) -> int:
        return int(dask_worker.transfer_outgoing_bytes_total)

    return sum(client.run(sent).values())


def test_one_solve_a_test_chunk_one_pass_a_panel_and_little_traffic(
    client: Client, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: Counter[str] = Counter()
    run = OnCluster.run

    def counting(self: OnCluster, task: Any, shared: Any, items: Any, failures: Any = None) -> Any:
        submitted[task.__name__] += len(items)
        return run(self, task, shared, items, failures)

    monkeypatch.setattr(OnCluster, "run", counting)
    recipe = ModelRecipe(Recipe("tests.scaling.sources:model"))
    model = CgInfluence(case.model, case.loss, 0.01, rtol=1e-8, atol=0.0, second_order_mode="ggn")
    calculator = DaskInfluenceCalculator(model, client, recipe=recipe).fit(*case.train, chunk_size=5)
    before = transferred(client)
    result = calculator.to_zarr(
        tmp_path / "i.zarr", *case.test, test_chunk_size=2, panel_size=4, solve="rows", progress=False
    )
    assert submitted["solve_chunk"] == 3  # test chunks
    assert submitted["write_strip"] == 5  # strips; two panels of factors each, in the one task
    assert result.provenance["chunks"]["panel"] == 4
    # what tasks share (the context, with its list of chunks) goes to each worker once; no data, no factors, no tiles
    assert transferred(client) - before < 200_000
    np.testing.assert_allclose(result[:], Reference(case).influences("ggn", 0.01).numpy(), rtol=1e-5, atol=1e-4)


def test_error_bounds_hold_for_rounded_values(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train, chunk_size=5)
    fine, coarse = (
        calculator.to_zarr(tmp_path / f"{bits}.zarr", *case.test, mantissa_bits=bits, progress=False)
        for bits in (23, 6)
    )
    norms = np.asarray(fine.train_gradient_norm)
    difference = np.abs(coarse[:] - fine[:])
    assert (difference <= np.asarray(coarse.error_bound)[:, None] * norms).all()
    assert (difference > np.asarray(fine.error_bound)[:, None] * norms).any()


def test_a_job_computes_on_the_device_that_the_worker_has_not_the_driver(tmp_path: Path, python: Path) -> None:
    log = tmp_path / "devices"
    factory = {"target": "tests.scaling.sources:model_that_finds_a_gpu", "arguments": {"log": str(log)}}
    values = content(model={"factory": factory}, cluster={"kind": "local", "workers": 1})
    (tmp_path / "job.yaml").write_text(to_yaml(values))
    command = [python, "-m", "distinfluence", "run", tmp_path / "job.yaml", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    finished(command, limit=300, env=environment, check=True)
    assert set(log.read_text().split()) == {"cuda:0"}


def test_from_python_workers_compute_where_the_callers_model_is(case: Case, tmp_path: Path) -> None:
    recipe, scratch = ModelRecipe(Recipe("tests.scaling.sources:model")), Scratch(tmp_path)
    assert travelling(direct(case), recipe, scratch, 1).device == "cpu"
    assert travelling(direct(case).to("meta"), recipe, scratch, 1).device == "meta"


def test_processes_of_one_job_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    workers = [SimpleNamespace(name=f"SLURMCluster-3-{number}") for number in range(4)]
    monkeypatch.setattr("distinfluence.scaling.worker.device.get_worker", lambda: workers[0])

    def taken() -> list[str]:
        found = []
        for worker in workers:
            monkeypatch.setattr("distinfluence.scaling.worker.device.get_worker", lambda own=worker: own)
            found.append(str(task_device("auto")))
        return found

    assert taken() == ["cuda:0"] * 4  # jobs of their own: each sees the GPU that it was granted first
    monkeypatch.setenv("DISTINFLUENCE_PROCESSES", "4")
    assert taken() == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_a_gpu_that_is_not_there_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ClusterError, match=r"`device` .* sees no GPU .*gres=gpu:1"):
        task_device("cuda")
    with pytest.raises(SettingError, match="`device` must be one of"):
        check_device("gpu")


def test_a_run_plans_for_the_workers_that_will_come(case: Case, client: Client, tmp_path: Path) -> None:
    def strips(workers: int | None) -> int:
        calculator = DaskInfluenceCalculator(direct(case), client, workers=workers, scratch=tmp_path)
        return calculator._machine().workers

    assert strips(None) == strips(1) == 2  # those of the cluster
    assert strips(8) == 8
    jobs = ClusterSpec("slurm", workers=4, settings={"memory": "8GB", "processes": 2})
    assert planned_workers(jobs) == 8
    assert planned_workers(ClusterSpec("address", address="tcp://host:1")) is None


def test_a_worker_that_dies_as_it_is_looked_at_does_not_end_the_run() -> None:
    answer = ("host", 4, True, 2**28)
    answers = [{"a": OSError("gone")}, {}, {"a": OSError("gone"), "b": answer}]

    class Dying:
        def wait_for_workers(self, n_workers: int, timeout: float) -> None:
            assert n_workers == 1

        def run(self, *_: object, on_error: str) -> dict[str, object]:
            assert on_error == "return"
            return answers.pop(0)  # type: ignore[return-value]

    seen = check_workers(Dying(), "folder", 60.0)
    assert (seen.n_threads, seen.process) == (4, 2**28)
    answers += [{"a": OSError("cannot be reached")}]
    with pytest.raises(ClusterError, match="cannot be reached"):
        check_workers(Dying(), "folder", 0.0)


def test_several_threads_in_a_worker_take_turns(case: Case, tmp_path: Path) -> None:
    influence = DirectInfluence(case.model, case.loss, 0.01, second_order_mode="ggn")
    one = LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=":0")
    with one as cluster, Client(cluster) as client:
        calculator = DaskInfluenceCalculator(influence, client).fit(*case.train, chunk_size=2)
        result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, test_chunk_size=1, progress=False)
    here = SequentialInfluenceCalculator(influence).fit(*case.train, chunk_size=2)
    np.testing.assert_allclose(result[:], here.influences(*case.test).compute(), rtol=1e-6, atol=1e-9)
