"""The stages of a run on a Dask cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from distributed import Client

from distinfluence.errors import ClusterError, RecipeError
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.model.batch import Batch
from distinfluence.model.identity.probe import Checked, probed
from distinfluence.scaling.calculator import InfluenceCalculator
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.data.recipe import ModelRecipe, Recipe, fingerprint_module
from distinfluence.scaling.data.sources import InFiles, Size, recipe_size
from distinfluence.scaling.dispatch.dask_reducer import DaskReducer
from distinfluence.scaling.dispatch.executor import (
    Executor,
    OnCluster,
    check_client,
    check_resources,
    check_workers,
    worker_memory,
)
from distinfluence.scaling.plan.problem import Machine
from distinfluence.scaling.stages.materialise import stored
from distinfluence.scaling.worker.context import WorkerContext, fitted_travelling, travelling
from distinfluence.scaling.worker.device import check_device, smallest_device
from distinfluence.solvers.base import check_count


class DaskInfluenceCalculator(InfluenceCalculator):
    """The stages of a run on the workers of a Dask cluster.

    Args:
        model: An influence model, fitted or not, as for `InfluenceCalculator`.
        client: A client of a distributed cluster. One thread per worker is best, since one torch task runs at a time
            in a process.
        recipe: How workers build the model. Without it the model's tensors are written to `scratch`, and its structure
            travels with the tasks.
        scratch: A folder that every worker sees, for the spilled model, arrays of this process, broadcasts and factors;
            a temporary one of this host by default.
        timeout: Seconds to wait for the first worker.
        resources: Resources that a worker must have to be given tasks, for instance {"GPU": 1} where GPU and CPU
            workers mix.
        device: Where tasks compute: "cpu", "cuda", or "auto" for a GPU on workers that see one; the type of the model's
            own device by default.
        workers: Processes to plan for, where more will come than are there now.

    Raises:
        ClusterError: If the client is closed or asynchronous. Without workers, without the resources, or if workers do
            not see `scratch`.
        RecipeError: If `recipe` builds another model.
        SettingError: If `workers` is not a whole number above 0.
    """

    def __init__(
        self,
        model: InfluenceFunctionModel,
        client: Client,
        *,
        recipe: ModelRecipe | None = None,
        scratch: str | Path | None = None,
        timeout: float = 60.0,
        resources: Mapping[str, float] | None = None,
        device: str | None = None,
        workers: int | None = None,
    ) -> None:
        if not isinstance(client, Client):
            raise ClusterError(
                f"`client` must be a distributed.Client, got {type(client).__name__}. Make one with `Client(cluster)`."
            )
        check_client(client)
        super().__init__(model, scratch)
        self.client = client
        self._resources = dict(resources or {})
        self._device = None if device is None else check_device(device)
        if workers is not None:
            check_count("workers", workers)
        self._workers = int(workers or 1)
        check_resources(client, self._resources)
        self._there = OnWorkers(client, self._scratch.folder)
        self._seen = check_workers(client, str(self._scratch.folder), timeout)
        self._recipe = self._travelling(recipe)
        self._named = recipe is not None

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

    def _checked(self, context: WorkerContext, drawn: Sequence[Batch]) -> Checked:
        checked = super()._checked(context, drawn)
        if not self._named:  # the workers have this very module
            return checked
        differences = probed(self.model.risk, drawn).probe.differences(checked.probe)
        if differences:
            raise RecipeError(
                "`recipe` builds a model that has the tensors of the model at hand and computes something else: "
                f"{'; '.join(differences)}. Build the model with `recipe.build()`, from the same code as the workers."
            )
        return checked

    def _home(self) -> "OnWorkers":
        return self._there

    def _everywhere(self, data: ChunkedData) -> ChunkedData:
        return stored(data, self._scratch.folder, self._executor())

    def _executor(self) -> Executor:
        check_client(self.client)  # it may have been closed since
        return OnCluster(self.client, resources=self._resources)

    def _unfitted_context(self) -> WorkerContext:
        return travelling(self.model, self._recipe, self._scratch, self._seen.n_threads, self._device)

    def _fitted_context(self, context: WorkerContext, train: ChunkedData) -> WorkerContext:
        return fitted_travelling(context, self.model, self._scratch, train)

    def _reducer(self, context: WorkerContext, data: ChunkedData, remarks: tuple[str, ...]) -> DaskReducer:
        return DaskReducer(self.model.risk, self.client, context, data, remarks, self._scratch.folder, self._resources)

    def _machine(self) -> Machine:
        workers = max(self._workers, len(self.client.nthreads()))
        on_device = smallest_device(self.client, self._device or self.model.risk.device.type)
        return Machine(workers, worker_memory(self.client), self._seen.process, on_device)


class OnWorkers(InFiles):
    """Arrays of the caller are spilled; what a recipe builds is looked at by a worker."""

    def __init__(self, client: Client, folder: Path) -> None:
        super().__init__(folder)
        self._client = client

    def size(self, recipe: Recipe, key: str) -> Size:
        """Asked of a worker, which builds it."""
        size: Size = self._client.submit(recipe_size, recipe, key, pure=False).result()
        return size
