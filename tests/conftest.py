"""Set-up for all tests."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.forking import forked_workers
from tests.preloaded import Preloaded

# A torchvision that another package brings may be built for another torch than the one installed here; transformers
# imports it wherever it finds it. No test needs it.
sys.modules.setdefault("torchvision", None)

# Clusters do little while they wait: an idle one of two workers takes 8 % of a core otherwise, by profiles of idle
# workers and looks at the time, and each process of the tests has one.
os.environ.update(
    DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED="False",
    DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL="500ms",
)
dask.config.refresh()

# Who starts the tests in the background of a shell, or with nohup, has them ignore these signals, and with them every
# command that they start and then interrupt.
for _each, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_each) is signal.SIG_IGN:
        signal.signal(_each, _usual)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # threads of several test processes would wait for each other, spinning


# Files whose tests kill, stop and time workers: one process runs all of them, so that they never run side by side.
CLUSTERS = ("scaling/test_failures_of_workers.py", "scaling/test_failures_of_runs.py", "scaling/test_failures.py")
# Other files that take long and therefore start first.
LONG = (
    "browse/test_page.py",
    "test_examples.py",
    "scaling/test_calculators.py",
    "test_cli.py",
    "scaling/test_memory.py",
)


def place(item: pytest.Item) -> int:
    """The place of a test's file among those that start first."""
    order = [*CLUSTERS, *LONG]
    return next((i for i, file in enumerate(order) if item.path.as_posix().endswith(f"tests/{file}")), len(order))


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Keep the tests of a file together, which share what is expensive to make, and the tests of all CLUSTERS files.

    xdist's own groups are lost with pytest 9.2: xdist renames tests, and pytest does not read the new name.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if file.removeprefix("tests/") in CLUSTERS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "ByFile | None":
    """Share the tests of `--dist loadfile` between processes."""
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Make thousands of tests without the garbage collector, which would go through them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _workers_start_at_once() -> Iterator[None]:
    with forked_workers():
        yield


@pytest.fixture(scope="session")
def python() -> Iterator[Path]:
    """The program that commands are called with where a fresh interpreter would add nothing; see `tests.preloaded`."""
    server = Preloaded(os.environ)
    yield server.python
    server.stop()
