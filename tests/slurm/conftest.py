"""One SLURM for the whole session, and what every test of it leaves behind: an empty queue."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.slurm.host import SlurmHost, SlurmUnavailableError, install


@pytest.fixture(scope="session")
def running_slurm() -> Iterator[SlurmHost]:
    try:
        install()
    except SlurmUnavailableError as error:
        pytest.skip(str(error))
    host = SlurmHost()
    host.start()
    try:
        yield host
    finally:
        host.stop()


@pytest.fixture
def slurm(running_slurm: SlurmHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmHost]:
    """SLURM's commands find it in this process too; nothing is in the queue before and after."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(running_slurm.configuration))
    monkeypatch.setenv("PATH", running_slurm.environment["PATH"])
    yield running_slurm
    left = queue(running_slurm)
    if left:
        running_slurm("scancel", *(line.split()[0] for line in left), check=False)
    deadline = time.monotonic() + 60
    while queue(running_slurm) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == [], "the test left jobs in the queue"


def queue(slurm: SlurmHost) -> list[str]:
    """The jobs in the queue: number, name, state."""
    return slurm("squeue", "-h", "-o", "%A %j %T").splitlines()
