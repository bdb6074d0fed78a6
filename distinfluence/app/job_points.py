"""The samples of a job's data for the page, each loaded when it is looked at; nothing is stored with the result."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distinfluence.app.config import Job
from distinfluence.app.job import data_of, require_result_of
from distinfluence.app.job_data import labels_of, sample_at
from distinfluence.app.sections import Reference
from distinfluence.browse.views.rendering import Drawable, Renderer
from distinfluence.errors import SettingError
from distinfluence.influence.arrays import Array, ArrayBatch, named_arrays
from distinfluence.scaling import ChunkedData
from distinfluence.scaling.data.sources import ArraySource, DatasetSource
from distinfluence.store import InfluenceResult, Sample, StoredPoints

Axis = Literal["test", "train"]


class JobPoints:
    """Samples and labels of one axis of a job's data: a `browse.PointSource`.

    Args:
        data: The samples of the axis.
        renderer: Makes of one input what is shown; None shows the input itself.
        stored: What `annotate` stored. Labels and names of classes are taken from it where it has them.
    """

    def __init__(self, data: ChunkedData, renderer: Renderer | None, stored: StoredPoints) -> None:
        self._data = data
        self._renderer = renderer
        self._stored = stored
        self._lock = threading.Lock()  # a data set need not bear two threads
        self.kind: str | None = "job"
        self.columns = stored.columns
        self.range = stored.range

    def labels(self) -> NDArray[np.generic] | None:
        """Return the stored labels [n], or the last array of the data if it has one number per sample; else None."""
        stored = self._stored.labels()
        return self._own_labels if stored is None else stored

    def self_influence(self) -> NDArray[np.float32] | None:
        """Return the stored self-influences [n]."""
        return self._stored.self_influence()

    def id_of(self, index: int) -> str | None:
        """As `annotate` was told."""
        return self._stored.id_of(index)

    def name_of(self, label: float) -> str:
        """As `annotate` was told."""
        return self._stored.name_of(label)

    def sample(self, index: int) -> Drawable | Sample | None:
        """Return what the renderer makes of an input; without one the stored sample, or the input's numbers."""
        if self._renderer is None:
            stored = self._stored.sample(index)
            if stored is not None:
                return stored
        with self._lock:
            batch = self._load(index, index + 1)
            first = batch[0] if isinstance(batch, tuple) else batch
            if self._renderer is not None:
                return self._renderer(sample_at(first, 0))
        own: NDArray[np.generic] = np.asarray(next(iter(named_arrays(batch).values()))[0])
        return own

    @cached_property
    def _own_labels(self) -> NDArray[np.generic] | None:
        found: list[Array] = []
        with self._lock:
            for source in self._data.sources:
                own = labels_of(source.load())
                if own is None:
                    return None
                found.append(own)
        return np.concatenate(found)

    def _load(self, start: int, stop: int) -> ArrayBatch:
        first = self._data.sources[0]
        if not isinstance(first, ArraySource | DatasetSource):
            raise SettingError(f"`--job` needs data that are loaded sample by sample, got {type(first).__name__}.")
        name = first.key.partition("/")[0]
        return replace(first, start=start, stop=stop, key=f"{name}/{start}-{stop}").load()


def points_of_job(path: Path, result: InfluenceResult, render: str | None, compared: bool) -> Mapping[Axis, JobPoints]:
    """Return the points of both axes, from the data that the job file at `path` names.

    Args:
        path: The job file.
        result: The result of the job.
        render: A `browse.Renderer` as "module:callable", or None.
        compared: Whether to read all data once and make sure that the result was made with them. Otherwise only their
            number is compared.

    Raises:
        FingerprintError: The result was made with other data.
        SettingError: A setting is not valid.
        ConfigError: The job file is not valid.
    """
    job = Job.read(path)
    cut = result.provenance.get("chunks")
    if not isinstance(cut, Mapping):
        raise SettingError(f"`--job` is for results that a run made; {result.path} does not say how it was cut.")
    data = data_of(job, cut)
    for axis, n in (("test", result.shape[0]), ("train", result.shape[1])):
        if data[f"{axis}_data"].n_samples != n:
            raise SettingError(
                f"the {axis} data of {path} are {data[f'{axis}_data'].n_samples} samples, {result.path} has {n}. Take "
                "the job that made it."
            )
    if compared:
        require_result_of(job, result, data)
    renderer = None if render is None else _renderer(job, render)
    return {
        "test": JobPoints(data["test_data"], renderer, result.points("test")),
        "train": JobPoints(data["train_data"], renderer, result.points("train")),
    }


def _renderer(job: Job, target: str) -> Renderer:
    found = job.recipe(Reference(target=target)).resolve()
    if not isinstance(found, Renderer):
        raise SettingError(f"`render` {target!r} must name a callable, got {type(found).__name__}.")
    return found
