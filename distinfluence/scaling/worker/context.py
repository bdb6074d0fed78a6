"""Where tasks run: the model that is built once per process, and the chunks that a process keeps.

Every task gets a `Context`, from which the fitted influence model is built on first use and kept. One torch task runs
at a time in a process (threads that share a module give wrong numbers, silently), with as many threads as its share of
the host. Arguments and results are NumPy arrays and small values.
"""

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import cloudpickle
import numpy as np
import torch
from torch import nn

from distinfluence.errors import ClusterError
from distinfluence.influence.arrays import (
    to_numpy,
    to_tensor,
)
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.report import FitReport
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.data.recipe import ModelRecipe
from distinfluence.scaling.scratch import Scratch, save_whole
from distinfluence.scaling.worker.device import task_device
from distinfluence.scaling.worker.source_reducer import SourceReducer

_one_at_a_time = threading.RLock()


class Context(Protocol):
    """Where a task gets its influence model from."""

    @property
    def key(self) -> str:
        """The same for the same fitted model."""

    def influence(self) -> InfluenceFunctionModel:
        """Return the influence model, built once in this process."""


@dataclass(frozen=True, eq=False)
class LocalContext:
    """The caller's own influence model, for tasks that run in the caller's process.

    Attributes:
        key: The same for the same fitted model.
        model: The influence model.
        travel: Makes the context that is sent instead where tasks leave this process after all: a client that is active
            in this process takes every `compute()` of a dask array to its cluster.
    """

    key: str
    model: InfluenceFunctionModel
    travel: "Callable[[], WorkerContext] | None" = None

    def influence(self) -> InfluenceFunctionModel:
        """Return the model itself."""
        return self.model

    def __reduce__(self) -> "tuple[Callable[[WorkerContext], WorkerContext], tuple[WorkerContext]]":
        if self.travel is None:
            raise ClusterError("this influence model works in this process only. Use a `DaskInfluenceCalculator`.")
        return _arrived, (self.travel(),)


def _arrived(context: "WorkerContext") -> "WorkerContext":
    return context


@dataclass(frozen=True)
class WorkerContext:
    """A model as a recipe, with the settings, the fitted state's files and the training set's chunks.

    Attributes:
        key: The same for the same fitted model.
        scratch: Where its files are; None once the context has travelled.
        unbound: The pickled influence model without its module.
        recipe: How to build the module.
        device: "auto", "cpu" or "cuda", see `task_device`. The GPU is chosen where the task runs.
        n_threads: Threads of torch in a task.
        state: Array name → .npy file.
        report: What the fit covered; None before the fit.
        train: The training set's chunks; None before the fit.
    """

    key: str
    scratch: Scratch | None
    unbound: bytes
    recipe: ModelRecipe
    device: str
    n_threads: int
    state: Mapping[str, str]
    report: FitReport | None
    train: ChunkedData | None

    def influence(self) -> InfluenceFunctionModel:
        """Build, restore, and keep for the next task; the oldest of several is dropped."""
        if self.key not in _models:
            module = _module(self.recipe)
            model = cloudpickle.loads(self.unbound).bound_to(module, task_device(self.device))
            if self.report is not None and self.train is not None:
                reducer = SourceReducer(model.risk, self.train)
                arrays = {name: to_tensor(np.load(path, mmap_mode="c")) for name, path in self.state.items()}
                model.restore(reducer, {n: a.to(model.risk.device) for n, a in arrays.items()}, self.report)
            _models[self.key] = model
            while len(_models) > 2:
                _models.popitem(last=False)
        return _models[self.key]


def travelling(
    model: InfluenceFunctionModel,
    recipe: ModelRecipe,
    scratch: Scratch,
    n_threads: int,
    device: str | None = None,
) -> WorkerContext:
    """Pack an influence model that is not fitted, for other processes. device: the caller's unless given."""
    return WorkerContext(
        key=uuid.uuid4().hex,
        scratch=scratch,
        unbound=bytes(cloudpickle.dumps(model.unbound())),
        recipe=recipe,
        device=device or model.risk.device.type,
        n_threads=n_threads,
        state={},
        report=None,
        train=None,
    )


def fitted_travelling(
    context: WorkerContext, model: InfluenceFunctionModel, scratch: Scratch, train: ChunkedData
) -> WorkerContext:
    """Add the fitted state, written to files in the scratch folder."""
    key = uuid.uuid4().hex
    files = {}
    for number, (name, tensor) in enumerate(model.state_arrays().items()):
        path = scratch.folder / f"state-{key[:8]}-{number}.npy"
        save_whole(path, to_numpy(tensor))
        files[name] = str(path)
    return replace(context, key=key, state=files, report=model.fit_report, train=train)


_models: OrderedDict[str, InfluenceFunctionModel] = OrderedDict()
_modules: OrderedDict[bytes, nn.Module] = OrderedDict()


def _module(recipe: ModelRecipe) -> nn.Module:
    """Build a recipe's module once; fitted and unfitted influence models share it, since they only read it.

    The key is the whole recipe: models with equal tensors may differ in what their forward does with them.
    """
    key: bytes = cloudpickle.dumps(recipe)
    if key not in _modules:
        _modules[key] = recipe.build()
        while len(_modules) > 2:
            _modules.popitem(last=False)
    return _modules[key]


@contextmanager
def torch_alone(n_threads: int | None) -> Iterator[None]:
    """Let no other task of this process use torch meanwhile. n_threads: of torch; None for those that it has."""
    with _one_at_a_time:
        before = torch.get_num_threads()
        if n_threads is not None and n_threads != before:
            torch.set_num_threads(n_threads)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


@contextmanager
def torch_task(context: Context) -> Iterator[InfluenceFunctionModel]:
    """Yield the influence model, for this task alone, with the threads that the context grants."""
    with torch_alone(getattr(context, "n_threads", None)):
        yield context.influence()
