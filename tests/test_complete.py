"""A resumed job whose result is complete does nothing, and one that is another job's, or lacks something, goes on."""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from distinfluence import open_influences
from distinfluence.app import complete, job
from distinfluence.app.complete import complete_result
from distinfluence.app.config import Job
from distinfluence.app.job import run_job, run_part
from distinfluence.app.yaml_file import to_yaml
from distinfluence.cli import main
from distinfluence.errors import FingerprintError
from distinfluence.scaling import Progress
from distinfluence.store import InfluenceWriter

QUIET = Progress(False)
SEEN = {"moved": 0.0}  # What the data and the model read when they are called.


class Factor:
    """Holds a number where nobody sees it from outside."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = Factor(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.value


def net(act: str = "Tanh", factor: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), getattr(nn, act)(), Scaled(factor), nn.Linear(4, 2)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def samples(n: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[n // 2, 1] += SEEN["moved"]
    return x, torch.arange(n) % 2


HERE = "tests.test_complete"
JOB: dict[str, Any] = {
    "model": {"factory": {"target": f"{HERE}:net", "arguments": {}}, "checkpoint": "model.pt"},
    "loss": "torch.nn:CrossEntropyLoss",
    "data": {"train": f"{HERE}:samples", "test": {"target": f"{HERE}:samples", "arguments": {"n": 5, "seed": 2}}},
    "method": {"name": "direct", "hessian_regularization": {"fraction": 0.1, "of": "mean"}, "second_order_mode": "ggn"},
    "chunks": {"train": 4, "test": 3, "panel": 64},
    "output": "i.zarr",
    "contributions": 2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and its whole result, made in this process."""
    folder = tmp_path_factory.mktemp("made")
    torch.save(net().state_dict(), folder / "model.pt")
    (folder / "job.yaml").write_text(to_yaml(JOB))
    run_part(Job.read(folder / "job.yaml"), "0/1", progress=QUIET)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


class WorkersStartedError(Exception):
    """What a run raises here in place of starting workers."""


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """How often workers would have been started."""
    calls: list[object] = []

    def connected(spec: object, **_: object) -> NoReturn:
        calls.append(spec)
        raise WorkersStartedError

    monkeypatch.setattr(job, "connected", connected)
    return calls


def content(folder: Path) -> Mapping[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "--check"], ["--part", "0/1"]])
def test_a_complete_job_starts_no_worker_and_writes_nothing(
    words: list[str], folder: Path, started: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(folder)
    (folder / ".i.zarr.scratch").mkdir()  # of a run that was killed after its last strip
    monkeypatch.setattr(job, "SequentialInfluenceCalculator", None)
    outcome = CliRunner().invoke(main, ["run", str(folder / "job.yaml"), *words])
    assert outcome.exit_code == 0, outcome.output
    assert f"{folder / 'i.zarr'} is complete: nothing to do\n" in outcome.output
    assert started == []
    assert content(folder) == before
    assert not (folder / ".i.zarr.scratch").exists()


def changed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        described = copy.deepcopy(JOB)
        for key, value in changes.items():
            section, _, inner = key.partition("__")
            described.setdefault(section, {})
            if inner:
                described[section][inner] = value
            else:
                described[section] = value
        (folder / "job.yaml").write_text(to_yaml(described))

    return change


def other_checkpoint(folder: Path) -> None:
    state = net().state_dict()
    state["3.bias"][1] += 1e-9
    torch.save(state, folder / "model.pt")


def moved(_: Path) -> None:
    SEEN["moved"] = 1e-12


def unreadable(_: Path) -> None:
    SEEN["moved"] = "not a number"  # type: ignore[assignment]


def factory(**arguments: Any) -> dict[str, Any]:
    return {"target": f"{HERE}:net", "arguments": arguments}


OTHER: dict[str, Callable[[Path], None]] = {
    "a fraction of the damping": changed(method__hessian_regularization={"fraction": 0.2, "of": "mean"}),
    "another rule": changed(method__hessian_regularization={"fraction": 0.1, "of": "largest"}),
    "another curvature": changed(method__second_order_mode="hessian"),
    "another method": changed(method__name="krylov"),
    "another loss": changed(loss={"target": "torch.nn:CrossEntropyLoss", "arguments": {"label_smoothing": 0.1}}),
    "another checkpoint": other_checkpoint,
    "another activation": changed(model__factory=factory(act="ReLU")),
    "a number that cannot be seen": changed(model__factory=factory(factor=1.01)),
    "one number of one sample": moved,
    "other test data": changed(data__test={"target": f"{HERE}:samples", "arguments": {"n": 5, "seed": 3}}),
    "fewer training points": changed(data__train={"target": f"{HERE}:samples", "arguments": {"n": 11}}),
    "another mode": changed(mode="perturbation", contributions=False),
    "smaller strips": changed(chunks__train=3),
    "smaller solves": changed(chunks__test=2),
    "another panel": changed(chunks__panel=2),
    "solves elsewhere": changed(solve="data"),
    "fewer ranked": changed(top_k=3),
    "fewer bits": changed(mantissa_bits=10),
    "bounds that were not made": changed(certify=True),
    "data that cannot be read here": unreadable,
}


@pytest.mark.parametrize("name", list(OTHER))
def test_a_job_that_may_be_another_one_starts_workers_which_decide(
    name: str, folder: Path, started: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SEEN, "moved", 0.0)
    OTHER[name](folder)
    before = content(folder / "i.zarr")
    with pytest.raises(WorkersStartedError):
        run_job(Job.read(folder / "job.yaml"), existing="resume", progress=QUIET)
    assert len(started) == 1
    assert content(folder / "i.zarr") == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("another checkpoint", "parameters"), ("one number of one sample", "data"), ("another curvature", "solver")],
)
def test_a_run_refuses_the_complete_result_of_another_job(
    name: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SEEN, "moved", 0.0)
    OTHER[name](folder)
    with pytest.raises(FingerprintError, match=message):
        run_part(Job.read(folder / "job.yaml"), "0/1", progress=QUIET)


def lost_strip(folder: Path) -> None:
    next((folder / "i.zarr" / "influences").rglob("c/0/1")).unlink()


def torn_rows(folder: Path) -> None:
    next((folder / "i.zarr" / "iterations").rglob("c/0")).unlink()


def files_are_lost(folder: Path) -> None:
    lost_strip(folder)
    torn_rows(folder)


LACKING: dict[str, Callable[[Path], None]] = {
    "files": files_are_lost,
    "extras": changed(contributions=3, self_influence=True),
}


@pytest.mark.parametrize("name", list(LACKING))
def test_what_is_lacking_is_made_and_then_there_is_nothing_to_do(
    name: str, folder: Path, started: list[object]
) -> None:
    expected = open_influences(folder / "i.zarr")[:]
    LACKING[name](folder)
    described = Job.read(folder / "job.yaml")
    with pytest.raises(WorkersStartedError):
        run_job(described, existing="resume", progress=QUIET)
    run_part(described, "0/1", progress=QUIET)
    assert len(started) == 1
    result = run_job(described, existing="resume", progress=QUIET)
    assert len(started) == 1
    assert result.complete
    assert (result[:] == expected).all()


def test_a_result_that_is_not_complete_goes_on(folder: Path) -> None:
    InfluenceWriter.open(folder / "i.zarr").reopen([1])
    with pytest.raises(WorkersStartedError):
        run_job(Job.read(folder / "job.yaml"), existing="resume", progress=QUIET)


def test_damage_is_looked_for_only_if_asked_for(folder: Path) -> None:
    file = next((folder / "i.zarr" / "influences").rglob("c/0/1"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    described = Job.read(folder / "job.yaml")
    assert run_job(described, existing="resume", progress=QUIET).complete
    with pytest.raises(WorkersStartedError):
        run_job(described, existing="repair", progress=QUIET)


def test_data_and_models_that_are_large_are_left_to_the_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = Job.read(folder / "job.yaml")
    needed = open_influences(folder / "i.zarr").provenance["comparison_bytes"]
    assert needed["gradients"] == 4 * 8 * sum(p.numel() for p in net().parameters())
    assert needed["data"] >= 17 * 4 * 8
    model, _ = described.influence_model()
    options = described.options("resume")
    monkeypatch.setattr(complete, "MOST_BYTES", max(needed.values()))
    assert complete_result(described, model, options) is not None
    read: list[object] = []
    monkeypatch.setattr(complete, "chunked", lambda *given: read.append(given))
    monkeypatch.setattr(complete, "MOST_BYTES", max(needed.values()) - 1)
    assert complete_result(described, model, options) is None
    assert read == []


@pytest.mark.parametrize("lacking", ["a strip", "test points", "self-influences", "the result"])
def test_each_thing_that_a_result_may_lack_is_seen(lacking: str, folder: Path) -> None:
    described = Job.read(folder / "job.yaml")
    model, _ = described.influence_model()
    options = described.options("resume")
    if lacking == "a strip":
        lost_strip(folder)
    elif lacking == "test points":
        torn_rows(folder)
    elif lacking == "self-influences":
        options = replace(options, self_influence=True)
    else:
        (folder / "i.zarr").rename(folder / "elsewhere.zarr")
    assert complete_result(described, model, options) is None
