"""Workers of local clusters are forked from a process that has what `tests.imported` names: they start at once.

A worker that is spawned, as users have it, takes three seconds of CPU before its first derivative. Tests that call the
command line in a process of its own have such workers.
"""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
import distributed.utils


def forking() -> Any:
    """Return the context of `multiprocessing` whose processes are forked so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported"])
    return context


@contextmanager
def forked_workers() -> Iterator[None]:
    """Have Dask fork the workers of local clusters while the block lasts."""
    forking()
    distributed.utils._forkserver_preload_set = True  # or Dask says what is imported
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield
