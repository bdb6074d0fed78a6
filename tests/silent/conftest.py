"""The small cluster of the scaling tests."""

from tests.scaling.conftest import client

__all__ = ["client"]
