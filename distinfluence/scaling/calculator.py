"""Influence matrices over data sets that are cut into chunks, in this process or on a Dask cluster.

`gradients`, `influence_factors` and `influences` are lazy dask arrays for who wants to compose; `to_zarr` writes the
matrix strip by strip, which is what to use at scale. Both make one solve per test chunk and one gradient pass per
training chunk.
"""

import copy
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from distinfluence.curvature import SecondOrderMode
from distinfluence.errors import StoreError, StoreExistsError
from distinfluence.influence.arrays import to_numpy_batch
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.report import FitReport
from distinfluence.influence.scores import InfluenceMode
from distinfluence.model.batch import Batch
from distinfluence.model.identity.probe import Checked
from distinfluence.scaling.data.chunks import CHUNK_SIZE, ChunkedData, chunked
from distinfluence.scaling.data.sources import Home
from distinfluence.scaling.dispatch.dask_reducer import DaskReducer
from distinfluence.scaling.dispatch.executor import Executor
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.plan.disk import require_space
from distinfluence.scaling.plan.plan import Plan, make_plan
from distinfluence.scaling.plan.problem import FixedSizes, Machine, Problem
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.run_options import RunOptions, RunSettings
from distinfluence.scaling.saved_fit import fit_name, load_fit, save_fit
from distinfluence.scaling.scratch import Scratch
from distinfluence.scaling.stages.handover import Handover
from distinfluence.scaling.stages.inspect import drawn_samples, look
from distinfluence.scaling.stages.probe import Sample, check_drawn, check_model, measure_rates
from distinfluence.scaling.stages.request import FittedRun, Request
from distinfluence.scaling.stages.run import write_influences
from distinfluence.scaling.worker.context import Context
from distinfluence.scaling.worker.source_reducer import SourceReducer
from distinfluence.store import InfluenceResult
from distinfluence.store.format.folder import place_of
from distinfluence.store.format.layout import FLOAT32_BITS
from distinfluence.store.format.remote import RemoteFolder
from distinfluence.store.write.resume import chunks_of

if TYPE_CHECKING:
    import dask.array as da

    from distinfluence.scaling.stages.lazy import LazyArrays

TEST_CHUNK_SIZE = 1024  # test points that are solved together, where nobody says better
SIGN_AND_EXPONENT = 9  # Bits of a float32 that are not its mantissa.


class InfluenceCalculator(ABC):
    """The stages of a run over chunked data; subclasses say where they run.

    Args:
        model: An influence model. The calculator works on a copy of it, its `model`, and the module is only read. A fit
            that it has is taken over, with the data of the fit; `fit` makes another one.
        scratch: A folder for files of the run; a temporary one by default.
    """

    def __init__(self, model: InfluenceFunctionModel, scratch: str | Path | None = None) -> None:
        self.model = copy.copy(model)  # two calculators of one model must not take each other's fit
        self._scratch = Scratch(scratch)
        self._fit_folder: Path | None = None
        self._fitted: FittedRun | None = None

    def fit(
        self,
        x: object,
        y: object | None = None,
        *,
        chunk_size: int | None = None,
        certify: bool = False,
        progress: bool | Progress = False,
    ) -> Self:
        """Fit to the training data: check and fingerprint every chunk, then do the work that needs no test point.

        Args:
            x: Training points: arrays, a data set, a DataLoader, a list of samples or batches, a `Recipe` of any of
                these, or a `ChunkedData`.
            y: Their targets, unless `x` has them.
            chunk_size: Samples in a chunk; 256 unless the data come in batches or chunks.
            certify: Whether to find the ends of the spectrum, too, for error bounds where the curvature is not positive
                semi-definite by construction (see `InfluenceFunctionModel.spectrum`).
            progress: Whether to show progress bars, or what shows them.

        Returns:
            This calculator.

        Raises:
            DistinfluenceError: What the checks of data and model raise, before any solve.
        """
        bars, data = _progress(progress), self._chunked(x, y, chunk_size)
        if self.model.is_fitted:
            self.model = self.model.bound_to(self.model.risk.module, self.model.risk.device)
        self._fitted = self._over(data, bars, lambda reducer, sha: self._fit_or_load(reducer, sha, certify, bars))
        return self

    def _over(
        self, data: ChunkedData, bars: Progress, begin: Callable[[DaskReducer | SourceReducer, str], None]
    ) -> FittedRun:
        """Look at the data and check the model. begin: gives the model its fit, over a reducer with a fingerprint."""
        data = self._everywhere(data)
        context, executor = self._unfitted_context(), self._executor()
        looked = look(executor, context, data, bars, "training data")
        data, sha256 = looked.data, looked.sha256
        sample = self._sample(context, data)
        drawn = drawn_samples(executor, self.model.risk, looked)
        checked = self._checked(context, drawn)
        reducer = self._reducer(context, data, checked.remarks)
        reducer.checked, reducer.digest, reducer.sample_flops = checked, looked.draw.digest, sample.flops
        with bars.stage("fit", None, "passes") as bar:
            reducer.on_pass = bar.advance
            reducer.on_samples = lambda done: bar.note(done and f"{done} of the last")
            begin(reducer, sha256)
            reducer.on_pass = reducer.on_samples = None
        own = self._fitted_context(context, data)
        return FittedRun(self.model, own, executor, data, sha256, sample, checked.probe)

    def _fit_or_load(self, reducer: DaskReducer | SourceReducer, sha256: str, certify: bool, bars: Progress) -> None:
        """Fit, and leave the fit in the scratch folder if that stays; or take the one that a run that died left."""
        folder = self._fit_folder = self._scratch.kept / fit_name(self.model, reducer, sha256, certify)
        if folder.exists():
            try:
                load_fit(self.model, folder, reducer)
                return
            except StoreError as error:
                bars.warn(f"the fit that an earlier run left cannot be taken, and is made again: {error}")
                shutil.rmtree(folder, ignore_errors=True)
        self.model.fit(reducer)
        if certify:
            self.model.spectrum()
        if not self._scratch.temporary:
            with suppress(StoreExistsError):  # another run was as fast
                save_fit(self.model, folder)

    def forget_fit(self) -> None:
        """Remove the fit that `fit` left in the scratch folder for runs that go on."""
        if self._fit_folder is not None:
            shutil.rmtree(self._fit_folder, ignore_errors=True)

    def plan(
        self,
        x: object,
        y: object | None,
        x_test: object,
        y_test: object | None = None,
        *,
        options: RunOptions | None = None,
        machine: Machine | None = None,
        calibrate: bool = False,
        **settings: Unpack[RunSettings],
    ) -> Plan:
        """Plan `fit(x, y)` and `to_zarr(…, x_test, y_test)` with these options. No influence is computed.

        Args:
            x: Training points, as for `fit`.
            y: Their targets, or None if `x` has them.
            x_test: Test points.
            y_test: Their targets, unless `x_test` has them.
            options: As for `to_zarr`. The plan chooses chunk sizes that are None; see its `chunks`.
            machine: The machine to plan for; the one of the calculator by default.
            calibrate: Whether to estimate times, too, by a few samples. It takes some seconds.
            **settings: Options as keywords, which override `options`.

        Returns:
            The plan.

        Raises:
            PlanError: If the workers' memory is too small. The message says what would fit.
            SettingError: If an option is not valid.
        """
        options = (options or RunOptions()).updated(**settings)
        train = self._chunked(x, y, options.chunk_size)
        test = self._chunked(x_test, y_test, options.test_chunk_size, TEST_CHUNK_SIZE)
        size, test_size = train.planned(options.chunk_size), test.planned(options.test_chunk_size)
        sizes = FixedSizes(size, test_size, options.panel_size, options.solve)
        context = self._unfitted_context()
        samples = self._sample(context, train), self._sample(context, test)
        problem = self._problem(train.n_samples, train, test, samples, options)
        rates = None
        if calibrate:
            sharing = 1 if machine is None else machine.workers  # of another machine, measured here
            ((_, rates),) = self._executor().run(measure_rates, (context,), [(train.chunks[0], sharing)])
        return make_plan(problem, machine or self._machine(), sizes, rates)

    def _problem(
        self,
        n_fit: int,
        columns: ChunkedData,
        test: ChunkedData,
        samples: tuple[Sample, Sample],
        options: RunOptions,
    ) -> Problem:
        """Put the sizes together. samples: a training and a test sample."""
        module = self.model.risk.module
        return Problem(
            n_test=test.n_samples,
            n_train=columns.n_samples,
            n_fit=n_fit,
            p=self.model.n_parameters,
            itemsize=self.model.risk.dtype.itemsize,
            train_bytes=samples[0].nbytes,
            model_bytes=sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
            demand=self.model.demand(n_fit, samples[0].flops),
            forward_flops=samples[0].flops,
            block_size=max(self.model.risk.blocks.sizes),
            entry=math.prod(samples[0].entry_shape(self.model.checked_mode(options.mode))),
            top_k=options.top_k,
            over_data=self.model.solves_over_data,
            by_gradients=self.model.second_order_mode is SecondOrderMode.EMPIRICAL_FISHER,
            built_bytes=sum(sample.built for sample in samples),
            contributions=min(options.top_k, options.contributions),
            self_influence=options.self_influence,
        )

    def _checked(self, context: Any, drawn: Sequence[Batch]) -> Checked:
        """Check the model's derivatives where it will compute, at samples from all over the training data."""
        ((_, checked),) = self._executor().run(check_drawn, (context,), [([to_numpy_batch(b) for b in drawn],)])
        assert isinstance(checked, Checked)
        return checked

    def _sample(self, context: Any, data: ChunkedData) -> Sample:
        ((_, sample),) = self._executor().run(check_model, (context,), [(data.chunks[0],)])
        assert isinstance(sample, Sample)
        return sample

    def gradients(self, x: object, y: object | None = None, *, chunk_size: int | None = None) -> "da.Array":
        """Make per-sample gradients of the training loss as a lazy dask array.

        Args:
            x: Samples, as for `fit`.
            y: Their targets, unless `x` has them.
            chunk_size: Samples in a chunk. Default: 256, or the chunks of dask arrays.

        Returns:
            The gradients, [n, p], with one block for each chunk.
        """
        return self._lazy().gradients(self._chunked(x, y, chunk_size))

    def influence_factors(
        self, x: object, y: object | None = None, *, chunk_size: int | None = None, return_report: bool = False
    ) -> Any:
        """Make the factors (A + λI)⁻¹ ∇θ m of test points as a lazy dask array.

        Args:
            x: Test points, as for `fit`.
            y: Their targets, unless `x` has them.
            chunk_size: Test points that are solved together. Default: 1024, or the chunks of dask arrays.
            return_report: Whether to return what the solves report, too.

        Returns:
            The factors, [n_test, p], with one block and one solve for each chunk. With `return_report`, also a dict of
            lazy [n_test] arrays: relative_residual, iterations, converged and error_bound (NaN where there is none).
        """
        factors, report = self._lazy().factors(self._chunked(x, y, chunk_size, TEST_CHUNK_SIZE))
        return (factors, report) if return_report else factors

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
    ) -> "da.Array":
        """Make the influence matrix as a lazy dask array.

        Args:
            x_test: Test points, as for `fit`.
            y_test: Their targets, unless `x_test` has them.
            x: Training points; those of the fit by default.
            y: Their targets, unless `x` has them.
            mode: "up" or "perturbation".
            chunk_size: Training points in a chunk. Default: 256, or the chunks of dask arrays.
            test_chunk_size: Test points that are solved together. Default: 1024, or the chunks of dask arrays.

        Returns:
            The matrix, [n_test, n_train] or [n_test, n_train, *input], with one block for each training chunk.
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
    ) -> "da.Array":
        """Make the influence matrix from factors as a lazy dask array.

        Args:
            factors: Factors as `influence_factors` returns them, [n_test, p], a dask or NumPy array.
            x: Training points; those of the fit by default.
            y: Their targets, unless `x` has them.
            mode: "up" or "perturbation".
            chunk_size: Training points in a chunk. Default: 256, or the chunks of dask arrays.

        Returns:
            The matrix, as from `influences`.
        """
        data = self._stages().train if x is None else self._chunked(x, y, chunk_size)
        return self._lazy().influences(factors, data, self.model.checked_mode(mode))

    def _lazy(self) -> "LazyArrays":
        from distinfluence.scaling.stages.lazy import LazyArrays  # dask.array takes a while to import

        return LazyArrays(self._stages())

    def to_zarr(
        self,
        path: str | Path,
        x_test: object,
        y_test: object | None = None,
        x: object | None = None,
        y: object | None = None,
        *,
        options: RunOptions | None = None,
        progress: bool | Progress = True,
        partition: Partition | None = None,
        **settings: Unpack[RunSettings],
    ) -> InfluenceResult:
        """Compute the influence matrix and write it to a zarr group, strip by strip.

        Args:
            path: A folder, or a URL that fsspec can write to from wherever tasks run (s3://…).
            x_test: Test points, as for `fit`.
            y_test: Their targets, unless `x_test` has them.
            x: Training points; those of the fit by default.
            y: Their targets, unless `x` has them.
            options: The options of the run; the defaults of `RunOptions` if None.
            progress: Whether to show progress bars, or what shows them.
            partition: The strips to write, where other runs write the others; all of them by default.
            **settings: Options as keywords, which override `options`: to_zarr(…, top_k=5).

        Returns:
            The result, opened.

        Raises:
            NotFittedError: If neither `fit` was called nor the model came with a fit.
            SettingError: If an option is not valid.
            StoreError: If `path` cannot be used.
            ChunkFailedError: When all strips are written but some that failed every time they were tried.
        """
        options = (options or RunOptions()).updated(**settings)
        options.check_path(path)
        bars, output = _progress(progress), place_of(path)
        fitted = self._stages(bars)
        options = options.continuing(chunks_of(path) if options.resumes else None)
        columns = fitted.train if x is None else self._everywhere(self._chunked(x, y, options.chunk_size))
        test = self._everywhere(self._chunked(x_test, y_test, options.test_chunk_size, TEST_CHUNK_SIZE))
        samples = fitted.sample, self._sample(fitted.context, test)
        problem = self._problem(fitted.train.n_samples, columns, test, samples, options)
        sizes = FixedSizes(columns.sizes[0], test.sizes[0], options.panel_size, options.solve)
        plan = make_plan(problem, self._machine(), sizes)
        self.require_space(plan, path, options.mantissa_bits)
        request = Request(test, columns, plan, options, partition or Partition.whole())
        with bars.beside(output):
            return write_influences(output, fitted, request, self._scratch.kept, bars)

    def require_space(self, plan: Plan, path: str | Path, mantissa_bits: int = FLOAT32_BITS) -> None:
        """Check that the disks of `path` and of the scratch folder have room for what the plan will write.

        Args:
            plan: The plan of the run.
            path: Where the result will be.
            mantissa_bits: Bits of the stored values, see `RunOptions`.

        Raises:
            DiskFullError: If there is too little room. The message says how much to free.
        """
        stored = (mantissa_bits + SIGN_AND_EXPONENT) / (FLOAT32_BITS + SIGN_AND_EXPONENT)
        output = place_of(path)
        require_space(plan, None if isinstance(output, RemoteFolder) else output, self._scratch.kept, stored)

    @property
    def fit_report(self) -> FitReport:
        """What the fit covered. Raises NotFittedError before there is one."""
        return self.model.fit_report

    def _stages(self, bars: Progress | None = None) -> FittedRun:
        """Return the fit; that of the model that was handed over is taken over on first use."""
        if self._fitted is None:
            given = Handover(self.model)
            data = given.data(self._home(), self._scratch.folder)
            self._fitted = given.finish(self._over(data, bars or Progress(False), given.take_over))
        return self._fitted

    def chunked(self, x: object, y: object | None = None, *, chunk_size: int | None = None) -> ChunkedData:
        """Cut data into chunks, to be passed as x to the other methods. Only the number of samples is looked up.

        Args:
            x: Samples, as for `fit`.
            y: Their targets, unless `x` has them.
            chunk_size: Samples in a chunk. Default: 256, or the chunks of dask arrays.

        Returns:
            The chunks.
        """
        return self._chunked(x, y, chunk_size)

    def _chunked(
        self, x: object, y: object | None, chunk_size: int | None, default_size: int = CHUNK_SIZE
    ) -> ChunkedData:
        return chunked(x, y, self._home(), chunk_size, default_size)

    @abstractmethod
    def _home(self) -> Home:
        """Return where data of the caller go."""

    @abstractmethod
    def _everywhere(self, data: ChunkedData) -> ChunkedData:
        """Return the same data in chunks that every task can load."""

    @abstractmethod
    def _executor(self) -> Executor:
        """Return what runs the tasks."""

    @abstractmethod
    def _unfitted_context(self) -> Context:
        """Return where tasks get the model from before it is fitted."""

    @abstractmethod
    def _fitted_context(self, context: Any, train: ChunkedData) -> Context:
        """Return where tasks get the fitted model from."""

    @abstractmethod
    def _reducer(self, context: Any, data: ChunkedData, remarks: tuple[str, ...]) -> DaskReducer | SourceReducer:
        """Return the reducer that the model is fitted over."""

    @abstractmethod
    def _machine(self) -> Machine:
        """Return how many tasks run at a time, and the memory that each process may take."""


def _progress(progress: bool | Progress) -> Progress:
    return progress if isinstance(progress, Progress) else Progress(progress)
