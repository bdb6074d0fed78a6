"""The stages of a run in this process."""

import functools
import uuid
from pathlib import Path

import torch

from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.memory import free_bytes, process_bytes
from distinfluence.scaling.calculator import InfluenceCalculator
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.data.recipe import ModelRecipe
from distinfluence.scaling.data.sources import InThisProcess
from distinfluence.scaling.dispatch.executor import Executor, InProcess
from distinfluence.scaling.plan.problem import Machine
from distinfluence.scaling.stages.materialise import stored
from distinfluence.scaling.worker.context import LocalContext, WorkerContext, fitted_travelling, travelling
from distinfluence.scaling.worker.device import device_memory
from distinfluence.scaling.worker.source_reducer import SourceReducer


class SequentialInfluenceCalculator(InfluenceCalculator):
    """The stages of a run one after the other in this process: the same numbers without a cluster.

    Its lazy arrays are computed by dask's local schedulers, or by the workers of a client that is active in this
    process, if they see `scratch`.

    Args:
        model: An influence model, fitted or not, as for `InfluenceCalculator`.
        scratch: A folder for factors while `to_zarr` runs. By default it is temporary, and then a run that died cannot
            use its factors again.
    """

    def __init__(self, model: InfluenceFunctionModel, *, scratch: str | Path | None = None) -> None:
        super().__init__(model, scratch)
        self._here = InThisProcess()

    def _home(self) -> InThisProcess:
        return self._here

    def _everywhere(self, data: ChunkedData) -> ChunkedData:
        return stored(data, self._scratch.folder, InProcess())

    def _executor(self) -> Executor:
        return InProcess()

    def _unfitted_context(self) -> LocalContext:
        return LocalContext(uuid.uuid4().hex, self.model)

    def _fitted_context(self, context: LocalContext, train: ChunkedData) -> LocalContext:
        model, scratch = self.model, self._scratch

        @functools.cache
        def travel() -> WorkerContext:
            recipe = ModelRecipe.spill(model.risk.module, scratch.folder)
            unfitted = travelling(model, recipe, scratch, torch.get_num_threads())
            return fitted_travelling(unfitted, model, scratch, train)

        return LocalContext(context.key, model, travel)

    def _reducer(self, context: LocalContext, data: ChunkedData, remarks: tuple[str, ...]) -> SourceReducer:
        return SourceReducer(self.model.risk, data, remarks)

    def _machine(self) -> Machine:
        process = process_bytes()
        on_device = device_memory(self.model.risk.device)
        return Machine(1, process + free_bytes(torch.device("cpu")), process, on_device, alone=True)
