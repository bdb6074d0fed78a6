"""The samples of a job's data, stored with its result, so that they are shown as what they are wherever it goes."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distinfluence.app.config import Job
from distinfluence.app.job import data_of, require_result_of
from distinfluence.app.sections import Reference
from distinfluence.errors import SettingError
from distinfluence.influence.arrays import Array, ArrayBatch, named_arrays
from distinfluence.model.data.tree import map_leaves
from distinfluence.scaling import ChunkedData
from distinfluence.store import annotate, open_influences

Kind = Literal["image", "text", "table"]
Renderer = Callable[[Any], Any]


def annotate_job(
    job: Job,
    kind: Kind | None,
    *,
    shape: tuple[int, ...] | None = None,
    render: str | None = None,
    classes: list[str] | None = None,
) -> list[str]:
    """Store inputs and labels of the job's data with its result.

    The inputs are the first array of each sample, the labels the last array if it has one number per sample. Errors of
    `annotate` are raised, too.

    Args:
        job: The job.
        kind: What the inputs are; None stores labels only.
        shape: Shape of one input, where it is stored flat.
        render: "module:callable" that makes of one input what is shown, a text or an array.
        classes: Names of the labels.

    Returns:
        What was stored, one line for each axis.

    Raises:
        FingerprintError: The result was made with other data.
    """
    result = open_influences(job.result)
    data = data_of(job, result.provenance["chunks"])
    require_result_of(job, result, data)
    renderer = None if render is None else _renderer(job, render)
    said = []
    for axis in ("train", "test"):
        inputs, labels = _inputs_and_labels(data[f"{axis}_data"], kind is not None, renderer, shape)
        if inputs is None and labels is None:
            raise SettingError(f"`kind` is not given and the {axis} data have no labels: there is nothing to store.")
        annotate(result.path, axis, inputs, kind=kind, labels=labels, classes=None if labels is None else classes)
        parts = [*([f"inputs as {kind}"] if inputs is not None else []), *(["labels"] if labels is not None else [])]
        said.append(f"{axis}: {' and '.join(parts)} of {result.shape[0 if axis == 'test' else 1]} samples")
    return said


def _renderer(job: Job, target: str) -> Renderer:
    found = job.recipe(Reference(target=target)).resolve()
    if not callable(found):
        raise SettingError(f"`render` {target!r} must name a callable, got {type(found).__name__}.")
    return found


def _inputs_and_labels(
    data: ChunkedData, wanted: bool, renderer: Renderer | None, shape: tuple[int, ...] | None
) -> tuple[Any, NDArray[Any] | None]:
    inputs: list[Any] = []
    labels: list[Array] = []
    for source in data.sources:
        batch = source.load()
        if wanted:
            leaf = next(iter(named_arrays(batch).values()))
            inputs.extend(_shown(batch[0] if isinstance(batch, tuple) else batch, leaf, renderer, shape))
        own = labels_of(batch)
        if own is not None:
            labels.append(own)
    return (inputs or None), (np.concatenate(labels) if labels else None)


def _shown(first: ArrayBatch, leaf: Array, renderer: Renderer | None, shape: tuple[int, ...] | None) -> list[Any]:
    if renderer is None:
        return [np.asarray(sample) if shape is None else np.asarray(sample).reshape(shape) for sample in leaf]
    return [renderer(sample_at(first, i)) for i in range(len(leaf))]


def sample_at(batch: ArrayBatch, index: int) -> Any:
    """Return one sample of a batch, as the data set has it."""
    return map_leaves(lambda array: np.asarray(array)[index], batch)


def labels_of(batch: ArrayBatch) -> Array | None:
    """Return the last array of a batch if it has one number per sample and is not the only one."""
    *others, last = map(np.asarray, named_arrays(batch).values())
    return last if others and last.ndim == 1 and last.dtype.kind in "fiub" else None
