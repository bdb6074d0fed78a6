"""The command line as its user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import distinfluence
from distinfluence import open_influences
from distinfluence.app.yaml_file import to_yaml
from distinfluence.cli import STOPPING, _clean_errors, main
from distinfluence.scaling import ClusterSpec, Progress, connected
from distinfluence.store import InfluenceWriter, Layout
from distinfluence.store.run_state import RunState, manifest_file, write_state
from tests.processes import finished, started
from tests.reference import Reference
from tests.test_job import content
from tests.zoo import build

ROOT = Path(__file__).parents[1]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def job_file(folder: Path, **changes: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(to_yaml(content(cluster={"kind": "local", "workers": 1}, **changes)))
    return path


def a_result(path: Path) -> None:
    writer = InfluenceWriter.create(
        path,
        Layout(n_test=2, n_train=6, strip=6),
        {
            "solver": {"method": "CgInfluence", "second_order_mode": "ggn", "hessian_regularization": {"full": 0.1}},
            "parameters": {"covered": 3, "total": 4, "coverage": 0.75},
            "fingerprints": {"parameters": "ab" * 32},
            "model": {"class": "torch.nn.modules.container.Sequential"},
            "job": {"model": {"factory": {"target": "my_model:build", "arguments": {}}}},
        },
    )
    writer.write_test(
        slice(0, 2),
        loss=np.array([1.0, 2.0]),
        relative_residual=np.array([1e-6, 2e-5]),
        iterations=np.array([3, 4]),
        converged=np.array([True, False]),
    )
    writer.write_strip(0, np.array([[5.0, -2, 3, 0, 1, -7], [0.0, 1, 2, 3, 4, 5]]))
    writer.finish({"seconds": {"factors": 1.5}})


def test_a_run_whose_residuals_are_not_measured_says_so(tmp_path: Path) -> None:
    method = {"name": "ekfac", "hessian_regularization": {"fraction": 0.1, "of": "mean"}}
    done = command("run", job_file(tmp_path, method=method, chunks={"train": 7, "test": 4}), "--quiet")
    assert done.exit_code == 0, done.output
    assert "residuals not measured" in done.output
    assert "residuals not measured" in command("info", tmp_path / "influences.zarr").output


def test_our_errors_and_the_command_lines_own_begin_alike(tmp_path: Path) -> None:
    for outcome in (command("run", tmp_path / "nothing.yaml"), command("info", tmp_path / "nothing.zarr")):
        assert [line for line in outcome.output.splitlines() if line.startswith("Error: ")]


def test_help_says_what_each_command_is_for() -> None:
    text = command("--help").output
    assert "Which training examples made the model do that?" in text
    for name in ("demo", "run", "info", "top"):
        assert name in text
        assert len(command(name, "--help").output) > 200
    assert distinfluence.__version__ in command("--version").output


def test_run_writes_the_influences_that_the_job_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = command("run", job_file(tmp_path), "--quiet")
    assert outcome.exit_code == 0, outcome.output
    assert "6 of 6 rows converged" in outcome.output
    assert "next: " in outcome.output
    result = open_influences(tmp_path / "influences.zarr")
    expected = Reference(build("mlp classification")).influences("hessian", 0.01).numpy()
    np.testing.assert_allclose(result[:], expected, rtol=1e-6, atol=1e-4)  # stored in float32
    assert result.provenance["job"]["method"] == {"name": "direct", "hessian_regularization": 0.01}
    assert not (tmp_path / ".influences.zarr.scratch").exists()
    monkeypatch.setattr("distinfluence.app.job.connected", None)  # what workers made is known without them
    again = command("run", tmp_path / "job.yaml", "--resume")
    assert again.exit_code == 0, again.output
    assert f"{tmp_path / 'influences.zarr'} is complete: nothing to do\n" in again.output


def test_a_job_joins_a_cluster_that_is_running_and_leaves_it_running(tmp_path: Path) -> None:
    with connected(ClusterSpec(workers=1)) as client:
        assert client.scheduler is not None
        address = client.scheduler.address
        path = tmp_path / "job.yaml"
        path.write_text(to_yaml(content(cluster={"kind": "address", "address": address})))
        assert command("run", path, "--quiet").exit_code == 0
        again = command("run", path, "--quiet")
        assert again.exit_code == 1
        assert "--overwrite" in again.output
        assert command("run", path, "--quiet", "--resume").exit_code == 0
        assert client.submit(sum, [1, 2]).result() == 3


def test_an_output_that_cannot_be_used_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "influences.zarr").mkdir()
    (tmp_path / "influences.zarr" / "mine.txt").write_text("mine")
    data = {"train": "tests.scaling.sources:never_built", "test": "tests.scaling.sources:never_built"}
    outcome = command("run", job_file(tmp_path, data=data), "--quiet", "--overwrite")
    assert outcome.exit_code == 1
    assert "nothing was touched" in outcome.output
    assert (tmp_path / "influences.zarr" / "mine.txt").read_text() == "mine"


def test_a_result_cannot_be_resumed_and_replaced_in_one_run(tmp_path: Path) -> None:
    outcome = command("run", job_file(tmp_path), "--quiet", "--resume", "--overwrite")
    assert outcome.exit_code == 2
    assert "--resume" in outcome.output and "--overwrite" in outcome.output
    assert not (tmp_path / "influences.zarr").exists()


def test_errors_are_one_message_and_exit_status_1(tmp_path: Path) -> None:
    outcome = command("run", job_file(tmp_path, chunsk={}))
    assert outcome.exit_code == 1
    assert "Did you mean `chunks`?" in outcome.output
    assert "Traceback" not in outcome.output
    assert command("info", tmp_path / "nothing.zarr").exit_code == 1
    assert command("run", tmp_path / "nothing.yaml").exit_code == 2


def test_what_fails_on_a_worker_is_said_once_and_without_a_trace(tmp_path: Path) -> None:
    job = job_file(tmp_path, data={"train": "ragged:samples", "test": "ragged:samples"})
    source = "import torch\n\n\ndef samples():\n    return torch.zeros(5, 4), torch.zeros(6).long()\n"
    (tmp_path / "ragged.py").write_text(source)
    line = [sys.executable, "-m", "distinfluence", "run", str(job)]
    outcome = finished(line, cwd=ROOT)
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.count("must have as many samples") == 1


def test_info_says_what_a_result_holds_and_how_far_it_converged(tmp_path: Path) -> None:
    a_result(tmp_path / "i.zarr")
    text = command("info", tmp_path / "i.zarr").output
    assert "2 × 6 influences" in text
    assert "CgInfluence on the ggn, damping 0.1, 3 of 4 parameters covered (75.0%)" in text
    assert "1 of 2 rows converged, worst relative residual 2.0e-05, at most 4 iterations" in text
    assert "factors 1.5 s" in text
    assert "state: complete" in text
    assert "model: torch.nn.modules.container.Sequential from my_model:build" in text
    parsed = json.loads(command("info", tmp_path / "i.zarr", "--json").output)
    assert parsed["solver"]["method"] == "CgInfluence"
    assert parsed["progress"] == 1.0


def test_info_says_of_a_run_whether_it_lives_died_or_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "i.zarr"
    assert command("info", path).exit_code == 1
    with Progress(show=False).beside(path):
        begun = command("info", path)
        assert begun.exit_code == 0
        assert "run running (beginning" in begun.output
        assert json.loads(command("info", path, "--json").output)["runs"][0]["condition"] == "running"
    writer = InfluenceWriter.create(path, Layout(n_test=2, n_train=6, strip=3), {})
    writer.write_strip(0, np.zeros((2, 3)))
    assert "no run is at work on it" in command("info", path).output
    with started([sys.executable, "-c", ""]) as child:
        child.wait()
    write_state(manifest_file(path), replace(RunState.here(), pid=child.pid, stage="strips", done=1, total=2))
    assert "run dead (strips: 1 of 2" in command("info", path).output
    writer.write_strip(1, np.zeros((2, 3)))
    writer.finish()
    assert "dead" not in command("info", path).output


def test_top_lists_the_most_helpful_and_the_most_harmful(tmp_path: Path) -> None:
    a_result(tmp_path / "i.zarr")
    lines = command("top", tmp_path / "i.zarr", 0, "-k", 2).output.splitlines()
    assert lines[0].startswith("test sample 0: loss 1")
    assert lines[-2].split() == ["0", "5", "5", "-7"]
    assert lines[-1].split() == ["2", "3", "1", "-2"]
    ranked = json.loads(command("top", tmp_path / "i.zarr", 0, "-k", 1, "--json").output)
    assert ranked == {"helpful": [{"train": 0, "influence": 5.0}], "harmful": [{"train": 5, "influence": -7.0}]}
    outcome = command("top", tmp_path / "i.zarr", 9)
    assert outcome.exit_code == 1
    assert "`test_index`" in outcome.output


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_or_termination_stops_cleanly_and_the_run_can_be_resumed(
    sent: signal.Signals, tmp_path: Path, python: Path
) -> None:
    path = job_file(
        tmp_path,
        model={"factory": {"target": "tests.scaling.sources:slow_model", "arguments": {"seconds": 0.03}}},
        chunks={"train": 1},
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a terminal's signal goes to a group of processes, which those of `python` are not
    program = sys.executable if sent is signal.SIGINT else python
    line = [program, "-m", "distinfluence", "run", path]
    with started(line, stderr=subprocess.PIPE, env=environment) as process:
        status = tmp_path / "influences.zarr" / "strip_status" / "c"
        deadline = time.monotonic() + 120
        while not (status.is_dir() and any(status.iterdir())) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        if sent is signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does: to every process of the run
        else:
            process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"distinfluence run {path} --resume" in errors
    assert "Traceback" not in errors
    half = open_influences(tmp_path / "influences.zarr")
    assert 0 < half.n_missing < 23
    if sent is signal.SIGTERM:
        return
    outcome = command("run", path, "--quiet", "--resume")
    assert outcome.exit_code == 0, outcome.output
    expected = Reference(build("mlp classification")).influences("hessian", 0.01).numpy()
    np.testing.assert_allclose(open_influences(tmp_path / "influences.zarr")[:], expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("sent", STOPPING)
def test_who_sends_a_second_signal_is_told_to_wait_and_what_is_put_in_order_goes_on(
    sent: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {each: signal.getsignal(each) for each in STOPPING}
    in_order = []

    def stopped() -> None:
        try:
            os.kill(os.getpid(), sent)
            time.sleep(5)
        finally:
            for again in STOPPING:
                os.kill(os.getpid(), again)
            in_order.append(True)

    with pytest.raises(SystemExit) as caught, _clean_errors("run job.yaml --resume"):
        stopped()
    assert in_order
    assert caught.value.code == 130
    errors = capfd.readouterr().err
    assert errors.count("still stopping: workers are being ended and jobs cancelled") == 3
    assert "job.yaml --resume" in errors
    assert {each: signal.getsignal(each) for each in STOPPING} == before


def test_a_signal_that_is_ignored_on_purpose_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with _clean_errors():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_that_is_started_again_goes_on_with_its_own_result_and_overwrites_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(*_: object, existing: str, **__: object) -> None:
        asked.append(existing)
        raise KeyboardInterrupt

    monkeypatch.setattr("distinfluence.app.job.run_job", run)
    path = job_file(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    command("run", path, "--overwrite")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    command("run", path, "--overwrite")  # nothing there yet
    a_result(tmp_path / "influences.zarr")
    command("run", path, "--overwrite")  # the old one: it was not reached before the job was put back
    assert asked == ["replace"] * 3
    asked.clear()
    command("run", path)
    layout = Layout(n_test=2, n_train=6, strip=6)
    InfluenceWriter.create(tmp_path / "influences.zarr", layout, {"batch_job": "7"}, overwrite=True)
    command("run", path, "--overwrite")
    assert asked == ["resume"] * 2
