"""A fit that an influence model brings along: its data in chunks that every task can load, and its state over them.

The chunks are the batches of the fit, so that sums are the same to rounding and stochastic steps take the same batches.
A single batch is cut into chunks, or one task would do all of the work.
"""

import uuid
from dataclasses import replace
from pathlib import Path

from distinfluence.errors import NonDeterministicDataError, NotFittedError, UnsupportedOperatorError
from distinfluence.influence.arrays import to_numpy
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.model.data.tree import map_leaves
from distinfluence.model.reducer import OTHER_VALUES, ChunkReducer, LoopReducer
from distinfluence.model.untouched import check_mode
from distinfluence.scaling.data.chunks import ChunkedData, chunked
from distinfluence.scaling.data.sources import ArraySource, Home, InFiles
from distinfluence.scaling.dispatch.dask_reducer import DaskReducer
from distinfluence.scaling.stages.request import FittedRun
from distinfluence.store.format.fingerprint import combine


class Handover:
    """A fitted influence model on its way to a calculator.

    Args:
        model: The fitted influence model.

    Raises:
        NotFittedError: If it is not fitted, or its module has been written to since the fit.
        ModelModeError: If its module is in train mode.
    """

    def __init__(self, model: InfluenceFunctionModel) -> None:
        if not model.is_fitted:
            raise NotFittedError(
                f"`{type(model).__name__}` has not been fitted. Call `fit(data)` of the influence model before it is "
                "handed to a calculator, or `fit(x, y)` of the calculator."
            )
        check_mode(model.risk.module)
        model.risk.check_unchanged()
        model.risk.check_buffers()
        self._model, self._own = model, model.reducer

    def data(self, home: Home, folder: Path) -> ChunkedData:
        """Return the data of the fit in chunks.

        Args:
            home: Where data of the caller go.
            folder: Where data go that are too large for memory.

        Returns:
            The data, in the order in which the fit read them.

        Raises:
            UnsupportedOperatorError: If the data can be read neither here nor on workers.
        """
        own = self._own
        if isinstance(own, DaskReducer):
            return own.data
        if not isinstance(own, LoopReducer):
            raise UnsupportedOperatorError(
                f"`model` was fitted over a {type(own).__name__}, whose data cannot be handed over. Call `fit(x, y)` "
                "of the calculator."
            )
        home = home if own.random_access else InFiles(folder)
        if len(own.chunk_sizes) == 1:
            return chunked(own.batch(0), None, home)
        key = uuid.uuid4().hex
        sources = [
            ArraySource(
                map_leaves(lambda tensor: home.keep(to_numpy(tensor)), own.batch(index)), 0, size, f"{key}/{index}"
            )
            for index, size in enumerate(own.chunk_sizes)
        ]
        return ChunkedData(own.chunk_sizes, tuple(sources))

    def take_over(self, reducer: ChunkReducer, sha256: str) -> None:
        """Restore the fit over other chunks of its data.

        Args:
            reducer: The chunks that were looked at.
            sha256: Their fingerprint.

        Raises:
            NonDeterministicDataError: If the data are no longer those of the fit.
            NotFittedError: If the model computes something else than it did in the fit.
        """
        if self._own.digest and self._own.digest != reducer.digest:
            raise NonDeterministicDataError(OTHER_VALUES.format(what="The data of the fit"))
        then, now = self._own.checked, reducer.checked
        differences = now.probe.differences(then.probe) if then is not None and now is not None else []
        if differences:
            raise NotFittedError(
                f"`model` must compute what it did in its fit, and does not: {'; '.join(differences)}. Fit it again."
            )
        self._model.restore(reducer, self._model.state_arrays(), self._model.fit_report)

    def finish(self, fitted: FittedRun) -> FittedRun:
        """Add what the chunks do not say of the fit: the batches that it was made with.

        Args:
            fitted: The fit that was taken over.

        Returns:
            The same fit, with a fingerprint of its own if it was made with other batches.
        """
        sizes = self._own.chunk_sizes
        if sizes != fitted.train.sizes:
            return replace(fitted, sha256=combine({"chunks": fitted.sha256, "batches": str(sizes)}))
        return fitted
