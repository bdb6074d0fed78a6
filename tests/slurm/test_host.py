"""The SLURM that the other tests run on is a real one, and leaves nothing behind."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import started
from tests.slurm.conftest import unavailable
from tests.slurm.host import NODES, SlurmHost, SlurmUnavailableError, stop_orphans
from tests.slurm.runs import ROOT, wait_for


@pytest.mark.slurm
def test_jobs_run_on_both_nodes_and_see_the_gpus_that_they_were_given(slurm: SlurmHost, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun -l bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'\n")
    options = ("-p", "gpu", "-N", 2, "--ntasks-per-node=1", "--gres=gpu:1", "-o", tmp_path / "out", "-t", 5)
    number = slurm("sbatch", "--parsable", *options, script).strip()
    wait_for(lambda: number not in slurm("squeue", "-h", "-o", "%A").split(), "the end of the job")
    lines = sorted((tmp_path / "out").read_text().split())
    assert lines == sorted(["0:", "1:", *NODES, "0", "0"])


def with_a_job(host: SlurmHost) -> list[int]:
    """Have it run one that would go on; the ports that it listens on."""
    host("sbatch", "-o", "/dev/null", "--wrap", "sleep 3600 & sleep 3600")
    wait_for(lambda: any("sleep" in command for command in traces(host.root)), "the job")
    assert len(traces(host.root)) > 5  # munge, the controller, two nodes, the job
    return [int(port) for port in re.findall(r"Port=(\d+)", host.configuration.read_text())]


def traces(root: Path) -> list[str]:
    """Command lines of the processes that were started with something in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if f"{root}/".encode() in command + variables:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def assert_gone(root: Path, ports: list[int]) -> None:
    assert traces(root) == []
    assert not root.exists()
    for port in ports:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))


@pytest.mark.slurm
def test_a_second_one_beside_it_leaves_no_process_folder_or_port(running_slurm: SlurmHost) -> None:
    second = SlurmHost()
    second.start()
    try:
        ports = with_a_job(second)
    finally:
        second.stop()
    assert_gone(second.root, ports)
    assert set(running_slurm.node_states()) == set(NODES)  # the first is as it was


@pytest.mark.slurm
def test_what_a_killed_one_left_is_taken_down_by_the_next(running_slurm: SlurmHost) -> None:
    with started([sys.executable, "-m", "tests.slurm.host"], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        root = Path(line.partition("=")[2].strip()).parent
        assert root.name.startswith("di-slurm-")
        ports = with_a_job(SlurmHost(root))
        process.send_signal(signal.SIGKILL)
        process.wait()
    stop_orphans()
    assert_gone(root, ports)


def test_where_there_is_no_slurm_its_tests_are_skipped_but_not_if_they_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = SlurmUnavailableError("sbatch not found")
    monkeypatch.delenv("DISTINFLUENCE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="sbatch not found"):
        unavailable(missing)
    monkeypatch.setenv("DISTINFLUENCE_SLURM", "required")
    with pytest.raises(pytest.fail.Exception, match="sbatch not found"):
        unavailable(missing)
    makefile = (ROOT / "Makefile").read_text()
    assert 'DISTINFLUENCE_SLURM=required $(PYTEST) -m "slurm and not soak"' in makefile
