"""One SLURM for each process of the session, and what every test of it leaves behind: an empty queue."""

import os
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

from tests.slurm.host import SlurmHost, SlurmUnavailableError, install

# Those that take longest start first, as several processes share the tests.
LONGEST = ("shorter_than_the_run", "by_each_way", "in_a_job_that_is_requeued", "at_its_limit_and_when_it_is_requeued")
# xdist hands each process two tests at once, and the second waits for the first: it is one that takes little time.
SHORTEST = ("a_second_one_beside_it", "what_a_killed_one_left", "run_on_both_nodes", "jobs_that_cannot_start")
ATTEMPTS = 3  # Another process may take a port between its choice and its use.


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = [name for pair in zip(LONGEST, SHORTEST, strict=True) for name in pair]

    def place(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(first) if name in item.name), len(first))

    items.sort(key=place)


@pytest.fixture(scope="session")
def running_slurm() -> Iterator[SlurmHost]:
    try:
        install()
        host = _started()
    except SlurmUnavailableError as error:
        unavailable(error)
    try:
        yield host
    finally:
        host.stop()


def _started() -> SlurmHost:
    for left in reversed(range(ATTEMPTS)):
        host = SlurmHost()
        try:
            host.start()
        except SlurmUnavailableError:
            if not left:
                raise
        else:
            return host
    raise AssertionError


def unavailable(error: SlurmUnavailableError) -> NoReturn:
    """No SLURM, no tests: skipped where nobody insists, a failure for `make slurm-test`, which was to run them."""
    if os.environ.get("DISTINFLUENCE_SLURM") == "required":
        pytest.fail(f"the tests of SLURM were to run, and there is none: {error}", pytrace=False)
    pytest.skip(str(error))


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
