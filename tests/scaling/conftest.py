"""One small cluster for all tests that need one: two processes of one thread, on the loopback interface."""

from collections.abc import Iterator

import pytest
from distributed import Client

from distinfluence.scaling import ClusterSpec, connected


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with connected(ClusterSpec(workers=2)) as client:
        yield client
