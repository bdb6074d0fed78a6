"""One small cluster for all tests that need one: two processes of one thread, on the loopback interface."""

from collections.abc import Iterator

import pytest
from distributed import Client

from distinfluence.scaling import ClusterSpec, connected
from tests.scaling.chaos import KILLS, SEED


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with connected(ClusterSpec(workers=2)) as client:
        yield client


@pytest.fixture(autouse=True)
def _say_what_was_killed(request: pytest.FixtureRequest) -> None:
    """Show with a failure what repeats it."""
    if request.node.get_closest_marker("chaos") is not None:
        request.node.add_report_section("call", "chaos", f"run again with DISTINFLUENCE_CHAOS={KILLS}:{SEED}")
