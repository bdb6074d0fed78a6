"""Influence matrices over data sets that are cut into chunks, in this process or on a Dask cluster.

`gradients`, `influence_factors` and `influences` are lazy dask arrays for who wants to compose; `to_zarr` writes the
matrix strip by strip, which is what to use at scale. Both make one solve per test chunk and one gradient pass per
training chunk.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import cloudpickle
import dask
import dask.array as da
import numpy as np
from dask.delayed import Delayed
from distributed import Client

from distinfluence.errors import ClusterError, NotFittedError, RecipeError, ShapeError
from distinfluence.influence.arrays import Array, ArrayBatch, to_numpy
from distinfluence.influence.base import InfluenceFunctionModel, InfluenceMode, influence_mode
from distinfluence.influence.report import FitReport
from distinfluence.scaling.chunks import (
    CHUNK_SIZE,
    ArraySource,
    ChunkedData,
    Home,
    InThisProcess,
    LeafTree,
    NpyLeaf,
    chunked,
    recipe_length,
    spill,
)
from distinfluence.scaling.executor import Executor, InProcess, OnCluster, check_workers
from distinfluence.scaling.plane import DaskPlane
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.recipe import ModelRecipe, Recipe, fingerprint_module
from distinfluence.scaling.strips import Fitted, Request, look, write_influences
from distinfluence.scaling.worker import (
    Context,
    LocalContext,
    Scratch,
    SourcePlane,
    WorkerContext,
    check_model,
    chunk_factors,
    chunk_gradients,
    influences_of_chunk,
    save_whole,
    store_chunk,
)
from distinfluence.store import InfluenceResult

TEST_CHUNK_SIZE = 1024  # test points that are solved together, where nobody says better


class InfluenceCalculator(ABC):
    """The stages of a run over chunked data; subclasses say where they run.

    model: an influence model; it is fitted by `fit`, and its own module is only read.
    """

    def __init__(self, model: InfluenceFunctionModel, scratch: str | Path | None = None) -> None:
        self.model = model
        self._scratch = Scratch(scratch)
        self._fitted: Fitted | None = None

    def fit(
        self, x: object, y: object | None = None, *, chunk_size: int | None = None, progress: bool | Progress = False
    ) -> Self:
        """Fit to the training data: check and fingerprint every chunk, then do the work that needs no test point.

        x, y: see `distinfluence.scaling.chunked`. Raises what the checks of data and model raise, before any solve.
        """
        bars = _progress(progress)
        data = self._everywhere(self._chunked(x, y, chunk_size))
        context, executor = self._unfitted_context(), self._executor()
        sha256 = look(executor, context, data, bars, "training data")
        ((_, (remarks, _)),) = executor.run(check_model, (context,), [(data.chunks[0],)])
        plane = self._plane(context, data, remarks)
        with bars.stage("fit", None, "passes") as bar:
            plane.on_pass = bar.advance
            self.model.fit(plane)
            plane.on_pass = None
        self._fitted = Fitted(
            self.model, self._fitted_context(context, data), executor, self._n_workers(), data, sha256
        )
        return self

    def gradients(self, x: object, y: object | None = None, *, chunk_size: int | None = None) -> da.Array:
        """Per-sample gradients of the training loss, [n, p], one block per chunk; lazy."""
        data = self._chunked(x, y, chunk_size)
        node, p = self._node(), self.model.n_parameters
        blocks = [
            da.from_delayed(_call(chunk_gradients, node, chunk, False), (size, p), dtype=self._dtype)
            for chunk, size in zip(data.chunks, data.sizes, strict=True)
        ]
        gradients: da.Array = da.concatenate(blocks, axis=0)
        return gradients

    def influence_factors(
        self, x: object, y: object | None = None, *, chunk_size: int | None = None, return_report: bool = False
    ) -> Any:
        """(A + λI)⁻¹ ∇θ m of each test point, [n_test, p], one solve and one block per chunk; lazy.

        With `return_report`, also a dict of lazy [n_test] arrays: relative_residual, iterations, converged.
        """
        data = self._chunked(x, y, chunk_size, TEST_CHUNK_SIZE)
        node, p = self._node(), self.model.n_parameters
        solved = [
            (_call(chunk_factors, node, chunk), size) for chunk, size in zip(data.chunks, data.sizes, strict=True)
        ]
        factors = da.concatenate(
            [da.from_delayed(fields["factors"], (size, p), dtype=self._dtype) for fields, size in solved], axis=0
        )
        if not return_report:
            return factors
        kinds = {"relative_residual": np.float64, "iterations": np.int64, "converged": np.bool_}
        report = {
            name: da.concatenate([da.from_delayed(fields[name], (size,), dtype=kind) for fields, size in solved])
            for name, kind in kinds.items()
        }
        return factors, report

    def influences(
        self,
        x_test: object,
        y_test: object | None = None,
        x: object | None = None,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
        *,
        chunk_size: int | None = None,
        test_chunk_size: int | None = None,
    ) -> da.Array:
        """The influence matrix [n_test, n_train] (or [n_test, n_train, *input]), one block per training chunk; lazy.

        x, y: the training points; those of the fit if left out.
        """
        factors = self.influence_factors(x_test, y_test, chunk_size=test_chunk_size)
        return self.influences_from_factors(factors, x, y, mode, chunk_size=chunk_size)

    def influences_from_factors(
        self,
        factors: Any,
        x: object | None = None,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
        *,
        chunk_size: int | None = None,
    ) -> da.Array:
        """As `influences`, from factors [n_test, p] as a dask or NumPy array; lazy."""
        mode = influence_mode(mode)
        p = self.model.n_parameters
        if factors.ndim != 2 or factors.shape[1] != p:
            raise ShapeError(
                f"`factors` must be [n_test, {p}], got {tuple(factors.shape)}. Pass what `influence_factors` returned."
            )
        data = self._stages().train if x is None else self._chunked(x, y, chunk_size)
        shape = () if mode is InfluenceMode.UP else self._input_shape(data)
        node, n_test = self._node(), factors.shape[0]
        whole = factors.rechunk(-1).to_delayed()[0, 0] if isinstance(factors, da.Array) else dask.delayed(factors)
        blocks = [
            da.from_delayed(
                _call(influences_of_chunk, node, whole, chunk, str(mode)), (n_test, size, *shape), dtype=self._dtype
            )
            for chunk, size in zip(data.chunks, data.sizes, strict=True)
        ]
        influences: da.Array = da.concatenate(blocks, axis=1)
        return influences

    def to_zarr(
        self,
        path: str | Path,
        x_test: object,
        y_test: object | None = None,
        x: object | None = None,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
        *,
        chunk_size: int | None = None,
        test_chunk_size: int | None = None,
        solve: str = "auto",
        top_k: int = 50,
        overwrite: bool = False,
        resume: bool = False,
        progress: bool | Progress = True,
        attributes: Mapping[str, object] | None = None,
    ) -> InfluenceResult:
        """Compute the influence matrix and write it to a zarr group, strip by strip; returns the result, opened.

        path: of the group. x, y: the training points; those of the fit if left out. chunk_size: training points in a
        strip; test_chunk_size: test points that are solved together. solve: "rows" (each test chunk on one worker),
        "data" (each sweep over all workers) or "auto". top_k: most helpful and most harmful training points that are
        stored for each test point. overwrite: replace a result at `path`. resume: go on with it if it was begun with
        the same model, data and settings, begin if there is none. attributes: JSON values to keep in the result.
        Raises StoreError if `path` cannot be used, NotFittedError before `fit`, and what the checks of data raise.
        """
        fitted = self._stages()
        columns = fitted.train if x is None else self._everywhere(self._chunked(x, y, chunk_size))
        request = Request(
            test=self._everywhere(self._chunked(x_test, y_test, test_chunk_size, TEST_CHUNK_SIZE)),
            columns=columns,
            mode=influence_mode(mode),
            solve=solve,
            top_k=top_k,
            overwrite=overwrite,
            resume=resume,
            attributes=attributes or {},
        )
        return write_influences(Path(path), fitted, request, self._scratch.folder, _progress(progress))

    @property
    def fit_report(self) -> FitReport:
        """What the fit covered. Raises NotFittedError before `fit`."""
        return self.model.fit_report

    @property
    def _dtype(self) -> np.dtype[Any]:
        return to_numpy(next(iter(self.model.risk.parameters.values())).new_zeros(0)).dtype

    def _stages(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError(f"`{type(self).__name__}` has not been fitted. Call `fit(x, y)` first.")
        return self._fitted

    def _node(self) -> Delayed:
        context = self._stages().context
        node: Delayed = dask.delayed(context, name=f"context-{context.key}", pure=False, traverse=False)
        return node

    def _input_shape(self, data: ChunkedData) -> tuple[int, ...]:
        remarks_and_shape = _call(check_model, self._node(), data.chunks[0]).compute()
        shape: tuple[int, ...] | None = remarks_and_shape[1]
        if shape is None:
            raise ShapeError(
                "`mode='perturbation'` needs a floating-point input to differentiate by, and `x` has none. For token "
                "ids, let the objective's `inputs` return the embeddings."
            )
        return shape

    def _chunked(
        self, x: object, y: object | None, chunk_size: int | None, default_size: int = CHUNK_SIZE
    ) -> ChunkedData:
        return chunked(x, y, self._home(), chunk_size, default_size)

    @abstractmethod
    def _home(self) -> Home:
        """Where data of the caller go."""

    @abstractmethod
    def _everywhere(self, data: ChunkedData) -> ChunkedData:
        """The same data in chunks that every task can load."""

    @abstractmethod
    def _executor(self) -> Executor:
        """What runs the tasks."""

    @abstractmethod
    def _unfitted_context(self) -> Context:
        """Where tasks get the model from before it is fitted."""

    @abstractmethod
    def _fitted_context(self, context: Any, train: ChunkedData) -> Context:
        """Where tasks get the fitted model from."""

    @abstractmethod
    def _plane(self, context: Any, data: ChunkedData, remarks: tuple[str, ...]) -> DaskPlane | SourcePlane:
        """The data plane that the model is fitted over."""

    @abstractmethod
    def _n_workers(self) -> int:
        """How many tasks run at a time."""


class SequentialInfluenceCalculator(InfluenceCalculator):
    """The stages of a run one after the other in this process: the same numbers without a cluster.

    model: an influence model. scratch: a folder for factors while `to_zarr` runs; a temporary one unless given, and
    then a run that died cannot use its factors again. Its lazy arrays are for dask's local schedulers.
    """

    def __init__(self, model: InfluenceFunctionModel, *, scratch: str | Path | None = None) -> None:
        super().__init__(model, scratch)

    def _home(self) -> InThisProcess:
        return InThisProcess()

    def _everywhere(self, data: ChunkedData) -> ChunkedData:
        return _stored(data, self._scratch.folder, InProcess())

    def _executor(self) -> Executor:
        return InProcess()

    def _unfitted_context(self) -> LocalContext:
        return LocalContext(uuid.uuid4().hex, self.model)

    def _fitted_context(self, context: LocalContext, train: ChunkedData) -> LocalContext:
        return context

    def _plane(self, context: LocalContext, data: ChunkedData, remarks: tuple[str, ...]) -> SourcePlane:
        return SourcePlane(self.model.risk, data, remarks)

    def _n_workers(self) -> int:
        return 1


class DaskInfluenceCalculator(InfluenceCalculator):
    """The stages of a run on the workers of a Dask cluster.

    model: an influence model. client: of a distributed cluster; one thread per worker is best, since one torch task
    runs at a time in a process. recipe: how workers build the model; without it the model's tensors are written to
    `scratch` and its structure goes with the tasks. scratch: a folder that every worker sees, for the spilled model,
    arrays of this process, broadcasts and factors; a temporary one of this host unless given. Raises ClusterError
    without workers or where they do not see `scratch`, RecipeError if `recipe` builds another model.
    """

    def __init__(
        self,
        model: InfluenceFunctionModel,
        client: Client,
        *,
        recipe: ModelRecipe | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        if not isinstance(client, Client):
            raise ClusterError(
                f"`client` must be a distributed.Client, got {type(client).__name__}. Make one with `Client(cluster)`."
            )
        super().__init__(model, scratch)
        self.client = client
        self._n_threads = check_workers(client, str(self._scratch.folder))
        self._recipe = self._travelling(recipe)

    def _travelling(self, recipe: ModelRecipe | None) -> ModelRecipe:
        module = self.model.risk.module
        if recipe is None:
            return ModelRecipe.spill(module, self._scratch.folder)
        sha256 = fingerprint_module(module)
        if recipe.sha256 not in ("", sha256):
            raise RecipeError(
                "`recipe` promises other tensors than the model has. Build the model with `recipe.build()`."
            )
        return replace(recipe, sha256=sha256)

    def _home(self) -> "OnWorkers":
        return OnWorkers(self.client, self._scratch.folder)

    def _everywhere(self, data: ChunkedData) -> ChunkedData:
        return _stored(data, self._scratch.folder, OnCluster(self.client))

    def _executor(self) -> Executor:
        return OnCluster(self.client)

    def _unfitted_context(self) -> WorkerContext:
        return WorkerContext(
            key=uuid.uuid4().hex,
            scratch=self._scratch,
            unbound=bytes(cloudpickle.dumps(self.model.unbound())),
            recipe=self._recipe,
            device=self.model.risk.device.type,
            n_threads=self._n_threads,
            state={},
            report=None,
            train=None,
        )

    def _fitted_context(self, context: WorkerContext, train: ChunkedData) -> WorkerContext:
        key = uuid.uuid4().hex
        files = {}
        for number, (name, tensor) in enumerate(self.model.state_arrays().items()):
            path = self._scratch.folder / f"state-{key[:8]}-{number}.npy"
            save_whole(path, to_numpy(tensor))
            files[name] = str(path)
        return replace(context, key=key, state=files, report=self.model.fit_report, train=train)

    def _plane(self, context: WorkerContext, data: ChunkedData, remarks: tuple[str, ...]) -> DaskPlane:
        return DaskPlane(self.model.risk, self.client, context, data, remarks, self._scratch.folder)

    def _n_workers(self) -> int:
        return len(self.client.nthreads())


class OnWorkers:
    """Arrays of the caller are spilled; what a recipe builds is looked at by a worker."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client = client
        self._folder = folder

    def keep(self, array: Array) -> NpyLeaf:
        """A file in the scratch folder."""
        return spill(array, self._folder)

    def length(self, recipe: Recipe, key: str) -> int:
        """Asked of a worker, which builds it."""
        return int(self._client.submit(recipe_length, recipe, key, pure=False).result())


def _progress(progress: bool | Progress) -> Progress:
    return progress if isinstance(progress, Progress) else Progress(progress)


def _call(task: Any, *arguments: object) -> Any:
    """A lazy call. Not typed as the Delayed that it is: those can be indexed, which their types don't say."""
    return dask.delayed(task, pure=False, traverse=False)(*arguments)


def _stored(data: ChunkedData, folder: Path, executor: Executor) -> ChunkedData:
    """dask arrays computed and written by the workers, chunk by chunk; other data as they are."""
    if not any(isinstance(chunk, Delayed) for chunk in data.chunks):
        return data
    key = uuid.uuid4().hex
    items = [(chunk, str(folder), f"{key}-{i:06d}") for i, chunk in enumerate(data.chunks)]
    files = dict(executor.run(store_chunk, (), items))
    sources = [ArraySource(_npy_leaves(files[i]), 0, size, f"{key}/{i}") for i, size in enumerate(data.sizes)]
    return ChunkedData(data.sizes, tuple(sources))


def _npy_leaves(files: ArrayBatch) -> LeafTree:
    if isinstance(files, dict):
        return {name: _npy_leaves(value) for name, value in files.items()}
    if isinstance(files, tuple):
        return tuple(_npy_leaves(value) for value in files)
    path, *shape = (str(part) for part in files)
    return NpyLeaf(path, tuple(int(length) for length in shape))
