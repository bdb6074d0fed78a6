"""Influence matrices over data sets that are cut into chunks, in this process or on a Dask cluster.

`gradients`, `influence_factors` and `influences` are lazy dask arrays for who wants to compose; `to_zarr` writes the
matrix strip by strip, which is what to use at scale. Both make one solve per test chunk and one gradient pass per
training chunk.
"""

import copy
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import dask
import numpy as np
from dask.delayed import Delayed

from distinfluence.curvature import SecondOrderMode
from distinfluence.errors import NotFittedError, SettingError, ShapeError, StoreError, StoreExistsError
from distinfluence.influence.arrays import to_numpy, to_numpy_batch
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.report import FitReport
from distinfluence.influence.scores import InfluenceMode, influence_mode
from distinfluence.model.batch import Batch
from distinfluence.model.identity.probe import Checked
from distinfluence.model.identity.structure import structure
from distinfluence.scaling.data.chunks import CHUNK_SIZE, ChunkedData, chunked, is_dask_array
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.scaling.data.sources import Home
from distinfluence.scaling.dispatch.dask_reducer import DaskReducer
from distinfluence.scaling.dispatch.executor import Executor
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.plan.disk import require_space
from distinfluence.scaling.plan.plan import Plan, make_plan
from distinfluence.scaling.plan.problem import FixedSizes, Machine, Problem
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.saved_fit import VERSION, load_fit, save_fit
from distinfluence.scaling.scratch import Scratch
from distinfluence.scaling.stages.contributions import SHOWN
from distinfluence.scaling.stages.inspect import drawn_samples, look
from distinfluence.scaling.stages.lazy import chunk_factors, chunk_gradients, influences_of_chunk
from distinfluence.scaling.stages.probe import Sample, check_drawn, check_model, measure_rates
from distinfluence.scaling.stages.request import FittedRun, Request
from distinfluence.scaling.stages.run import write_influences
from distinfluence.scaling.worker.context import Context
from distinfluence.scaling.worker.source_reducer import SourceReducer
from distinfluence.store import InfluenceResult
from distinfluence.store.format.fingerprint import combine, fingerprint_settings
from distinfluence.store.format.folder import place_of
from distinfluence.store.format.layout import FLOAT32_BITS
from distinfluence.store.format.remote import RemoteFolder
from distinfluence.store.write.resume import check_output, chunks_of

if TYPE_CHECKING:
    import dask.array as da

TEST_CHUNK_SIZE = 1024  # test points that are solved together, where nobody says better
STRATEGIES = ("auto", "rows", "data")
SIGN_AND_EXPONENT = 9  # bits of a float32 beside its mantissa


class InfluenceCalculator(ABC):
    """The stages of a run over chunked data; subclasses say where they run.

    model: an influence model; `fit` fits a copy of it, the calculator's `model`, and its own module is only read.
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

        x, y: see `distinfluence.scaling.chunked`. certify: find the ends of the spectrum too, for error bounds where
        the curvature is not positive semi-definite by what it is (see `InfluenceFunctionModel.spectrum`). Raises what
        the checks of data and model raise, before any solve.
        """
        bars = _progress(progress)
        data = self._everywhere(self._chunked(x, y, chunk_size))
        context, executor = self._unfitted_context(), self._executor()
        looked = look(executor, context, data, bars, "training data")
        data, sha256 = looked.data, looked.sha256
        sample = self._sample(context, data)
        drawn = drawn_samples(executor, self.model.risk, looked)
        checked = self._checked(context, drawn)
        reducer = self._reducer(context, data, checked.remarks)
        reducer.checked, reducer.digest = checked, looked.draw.digest
        with bars.stage("fit", None, "passes") as bar:
            reducer.on_pass = bar.advance
            self._fit_or_load(reducer, sha256, certify, bars)
            reducer.on_pass = None
        self._fitted = FittedRun(
            self.model, self._fitted_context(context, data), executor, data, sha256, sample, checked.probe
        )
        return self

    def _fit_or_load(self, reducer: DaskReducer | SourceReducer, sha256: str, certify: bool, bars: Progress) -> None:
        """Fit, and leave the fit in the scratch folder if that stays; or take the one that a run that died left."""
        asked: dict[str, object] = {"solver": self.model.settings(), "certify": certify, "format": VERSION}
        asked |= {"objective": self.model.objective_settings, "chunks": list(reducer.chunk_sizes)}
        asked |= {"structure": structure(self.model.risk.module)}
        parameters = fingerprint_module(self.model.risk.module)
        key = combine({"parameters": parameters, "data": sha256, "settings": fingerprint_settings(asked)})
        folder = self._fit_folder = self._scratch.kept / f"fit-{key[:16]}"
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
        mode: InfluenceMode | str = InfluenceMode.UP,
        *,
        chunk_size: int | None = None,
        test_chunk_size: int | None = None,
        panel_size: int | None = None,
        solve: str = "auto",
        top_k: int = 50,
        contributions: bool | int = False,
        self_influence: bool = False,
        machine: Machine | None = None,
        calibrate: bool = False,
    ) -> Plan:
        """What `fit(x, y)` and `to_zarr(…, x_test, y_test)` with these settings will do and need; computes nothing.

        machine: to plan for, the calculator's own unless given. calibrate: estimate times too, from a few samples: some
        seconds. Chunk sizes that are None are chosen, and found in the plan's `chunks`. Raises PlanError, saying what
        would fit, if the workers' memory is too small.
        """
        train, test = self._chunked(x, y, chunk_size), self._chunked(x_test, y_test, test_chunk_size, TEST_CHUNK_SIZE)
        fixed = isinstance(train.chunks[0], Delayed)  # dask arrays bring their chunks
        asked = _asked(train.sizes[0] if fixed else chunk_size, test_chunk_size, panel_size, solve)
        context = self._unfitted_context()
        sample = self._sample(context, train)
        shape = _input_shape(sample, influence_mode(mode))
        work = self._work(train, train, test, (sample, self._sample(context, test)), shape, top_k)
        shown = min(top_k, _n_shown(contributions, influence_mode(mode)))
        work = replace(work, contributions=shown, self_influence=self_influence)
        rates = None
        if calibrate:
            ((_, rates),) = self._executor().run(measure_rates, (context,), [(train.chunks[0],)])
        return make_plan(work, machine or self._machine(), asked, rates)

    def _work(
        self,
        fit: ChunkedData,
        columns: ChunkedData,
        test: ChunkedData,
        samples: tuple[Sample, Sample],
        input_shape: tuple[int, ...],
        top_k: int,
    ) -> Problem:
        module = self.model.risk.module
        return Problem(
            n_test=test.n_samples,
            n_train=columns.n_samples,
            n_fit=fit.n_samples,
            p=self.model.n_parameters,
            itemsize=self.model.risk.dtype.itemsize,
            train_bytes=samples[0].nbytes,
            model_bytes=sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
            demand=self.model.demand(),
            entry=math.prod(input_shape),
            top_k=top_k,
            over_data=self.model.solves_over_data,
            by_gradients=self.model.second_order_mode is SecondOrderMode.EMPIRICAL_FISHER,
            built_bytes=sum(sample.built for sample in samples),
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
        """Per-sample gradients of the training loss, [n, p], one block per chunk; lazy."""
        import dask.array as da

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

        With `return_report`, also a dict of lazy [n_test] arrays: relative_residual, iterations, converged and
        error_bound (NaN where there is none).
        """
        import dask.array as da

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
        kinds: dict[str, type[np.generic]] = {"relative_residual": np.float64, "iterations": np.int64}
        kinds |= {"converged": np.bool_, "error_bound": np.float64}
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
    ) -> "da.Array":
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
    ) -> "da.Array":
        """As `influences`, from factors [n_test, p] as a dask or NumPy array; lazy."""
        import dask.array as da

        mode = influence_mode(mode)
        p = self.model.n_parameters
        if factors.ndim != 2 or factors.shape[1] != p:
            raise ShapeError(
                f"`factors` must be [n_test, {p}], got {tuple(factors.shape)}. Pass what `influence_factors` returned."
            )
        data = self._stages().train if x is None else self._chunked(x, y, chunk_size)
        shape = _input_shape(self._stages().sample, mode)
        node, n_test = self._node(), factors.shape[0]
        whole = factors.rechunk(-1).to_delayed()[0, 0] if is_dask_array(factors) else dask.delayed(factors)
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
        panel_size: int | None = None,
        solve: str = "auto",
        top_k: int = 50,
        mantissa_bits: int = FLOAT32_BITS,
        contributions: bool | int = False,
        self_influence: bool = False,
        overwrite: bool = False,
        resume: bool = False,
        check: bool = False,
        progress: bool | Progress = True,
        attributes: Mapping[str, object] | None = None,
        partition: Partition | None = None,
    ) -> InfluenceResult:
        """Compute the influence matrix and write it to a zarr group, strip by strip; returns the result, opened.

        path: of the group, a folder, or a URL that fsspec can write to from wherever tasks run (s3://…).
        x, y: the training points; those of the fit if left out. chunk_size: training points in a
        strip; test_chunk_size: test points that are solved together. panel_size: test points whose factors a
        worker holds at a time, as many as take a quarter of its memory unless given; the training gradients are made
        once for each such panel. solve: "rows" (each test chunk on one worker),
        "data" (each sweep over all workers) or "auto". top_k: most helpful and most harmful training points that are
        stored for each test point. mantissa_bits: fewer than float32's 23 round the stored values, with a relative
        error of 2^-(bits + 1) that error bounds include, and compress them: 10 take about half the space.
        contributions: for so many pairs at each end of a ranking (10 if True), keep what each layer contributes, and
        each position of a sequence where the method knows it; gradients of ranked points are made once more.
        self_influence: keep what each training point does to its own loss, for as much work as solving for n_train
        test points: little where solves sweep over no data, more than all else where they do. overwrite: replace a
        result at `path`. resume: go on with it if it was begun with the same model, data and settings, begin if there
        is none; extras can be asked for then as well. check: of a result that is gone on with, read everything first,
        and make anew what is damaged. attributes: JSON values to keep in the result. partition: make a part of
        the strips
        only, beside other runs that make the others. Raises StoreError if `path` cannot be used, NotFittedError before
        `fit`, and what the checks of data raise; ChunkFailedError when all strips are written but some that failed
        every time they were tried.
        """
        check_output(path, overwrite=overwrite, resume=resume)
        if overwrite and resume:
            raise SettingError("`overwrite` and `resume` exclude each other, got both. Pass one of them.")
        fitted, mode = self._stages(), influence_mode(mode)
        n_shown = _n_shown(contributions, mode)
        if n_shown and isinstance(place_of(path), RemoteFolder):
            raise SettingError(f"`contributions` are written to folders alone, got `path` {path}. Leave them out.")
        recorded = chunks_of(path) if resume else None
        if recorded is not None:
            panel_size = recorded["panel"] if panel_size is None else panel_size
            solve = recorded.get("solve", solve) if solve == "auto" else solve
        asked = _asked(None, test_chunk_size, panel_size, solve)
        columns = fitted.train if x is None else self._everywhere(self._chunked(x, y, chunk_size))
        test = self._everywhere(self._chunked(x_test, y_test, test_chunk_size, TEST_CHUNK_SIZE))
        shape = _input_shape(fitted.sample, mode)
        samples = fitted.sample, self._sample(fitted.context, test)
        work = self._work(fitted.train, columns, test, samples, shape, top_k)
        work = replace(work, contributions=min(top_k, n_shown), self_influence=self_influence)
        asked = replace(asked, train=columns.sizes[0], test=test.sizes[0])
        plan = make_plan(work, self._machine(), asked)
        self.require_space(plan, path, mantissa_bits)
        request = Request(
            test=test,
            columns=columns,
            mode=mode,
            plan=plan,
            input_shape=shape,
            top_k=top_k,
            mantissa_bits=mantissa_bits,
            overwrite=overwrite,
            resume=resume,
            attributes=attributes or {},
            contributions=n_shown,
            self_influence=self_influence,
            check=check,
            partition=partition,
        )
        bars, output = _progress(progress), place_of(path)
        with bars.beside(output):
            return write_influences(output, fitted, request, self._scratch.kept, bars)

    def require_space(self, plan: Plan, path: str | Path, mantissa_bits: int = FLOAT32_BITS) -> None:
        """Pass if the disks of `path` and of the scratch folder have room for what the plan will write.

        Raises DiskFullError, saying how much to free.
        """
        stored = (mantissa_bits + SIGN_AND_EXPONENT) / (FLOAT32_BITS + SIGN_AND_EXPONENT)
        output = place_of(path)
        require_space(plan, None if isinstance(output, RemoteFolder) else output, self._scratch.kept, stored)

    @property
    def fit_report(self) -> FitReport:
        """What the fit covered. Raises NotFittedError before `fit`."""
        return self.model.fit_report

    @property
    def _dtype(self) -> np.dtype[Any]:
        return to_numpy(next(iter(self.model.risk.parameters.values())).new_zeros(0)).dtype

    def _stages(self) -> FittedRun:
        if self._fitted is None:
            raise NotFittedError(f"`{type(self).__name__}` has not been fitted. Call `fit(x, y)` first.")
        return self._fitted

    def _node(self) -> Delayed:
        context = self._stages().context
        node: Delayed = dask.delayed(context, name=f"context-{context.key}", pure=False, traverse=False)
        return node

    def chunked(self, x: object, y: object | None = None, *, chunk_size: int | None = None) -> ChunkedData:
        """Training or test data cut into chunks, to be passed as x to the methods here; see `chunked`.

        Finds the number of samples, and loads nothing else.
        """
        return self._chunked(x, y, chunk_size)

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
    def _reducer(self, context: Any, data: ChunkedData, remarks: tuple[str, ...]) -> DaskReducer | SourceReducer:
        """The reducer that the model is fitted over."""

    @abstractmethod
    def _machine(self) -> Machine:
        """How many tasks run at a time, and the memory that each process may take."""


def _asked(train: int | None, test: int | None, panel: int | None, solve: str) -> FixedSizes:
    if solve not in STRATEGIES:
        raise SettingError(f"`solve` must be one of {list(STRATEGIES)}, got {solve!r}. Choose one of these.")
    if panel is not None and (not isinstance(panel, int) or panel < 1):
        raise SettingError(f"`panel_size` must be a whole number of test points ≥ 1, got {panel!r}.")
    return FixedSizes(train, test, panel, solve)


def _n_shown(contributions: bool | int, mode: InfluenceMode) -> int:
    if not isinstance(contributions, int) or contributions < 0:
        raise SettingError(f"`contributions` must be True, False or how many, got {contributions!r}.")
    if contributions and mode is not InfluenceMode.UP:
        raise SettingError("`contributions` are of influences of mode 'up', got mode 'perturbation'. Leave them out.")
    return SHOWN if contributions is True else int(contributions)


def _input_shape(sample: Sample, mode: InfluenceMode) -> tuple[int, ...]:
    if mode is InfluenceMode.UP:
        return ()
    if sample.input_shape is None:
        raise ShapeError(
            "`mode='perturbation'` needs a floating-point input to differentiate by, and `x` has none. For token "
            "ids, let the objective's `inputs` return the embeddings."
        )
    return sample.input_shape


def _progress(progress: bool | Progress) -> Progress:
    return progress if isinstance(progress, Progress) else Progress(progress)


def _call(task: Any, *arguments: object) -> Any:
    """A lazy call. Not typed as the Delayed that it is: those can be indexed, which their types don't say."""
    return dask.delayed(task, pure=False, traverse=False)(*arguments)
