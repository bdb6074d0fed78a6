"""A pytest plugin: a test that runs out of time shows the stacks of every process below it, not only its own.

pytest-timeout raises in the test after `timeout` seconds. Where that cannot be, because the main thread is inside a
call that does not come back, pytest's `faulthandler_timeout` prints the stacks of the process and ends it.
"""

import os
import signal
from typing import Any

import pytest

from tests.processes import below, stacks


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item) -> Any:
    """Have the alarm that pytest-timeout has just set say first what the processes of the test are doing."""
    result = yield
    fail = signal.getsignal(signal.SIGALRM)

    def show_and_fail(signum: int, frame: Any) -> None:
        item.add_report_section("call", "stacks of the processes below", stacks(below(os.getpid())))
        assert callable(fail)
        fail(signum, frame)

    signal.signal(signal.SIGALRM, show_and_fail)
    return result
