"""A stage after the strips: what each training point does to its own loss, one task for each strip.

By quadrature where solves sweep over the training data and A + λI is known to be positive definite: brackets of
`RTOL`, relative to the value, for about half the sweeps of a solve. Else by the model's own solver, as if each training
point were a test point, with the error bound that its solves have. Either way it costs as much as solving for n_train
test points: nothing to speak of where solves sweep over no data (direct, Arnoldi, Nyström, EKFAC), and n_train / group
times the sweeps of one solve where they do, each by one worker over the whole training set.
"""

import math

import torch

from distinfluence.influence.arrays import to_numpy, to_tensor_batch
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.self_influence import SelfInfluences
from distinfluence.model.batch import batch_length, take
from distinfluence.scaling.stages.request import Run
from distinfluence.scaling.worker.cache import Chunk, load, named_samples
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store import InfluenceWriter

RTOL = 1e-3  # of a bracket's width
QUADRATURE, SOLVE = "quadrature", "solve"


def self_influence_method(model: InfluenceFunctionModel) -> str:
    """ "quadrature" or "solve", see the module."""
    sweeps = model.solves_over_data and model.brackets_self_influence
    return QUADRATURE if sweeps and model.kind_of_bound != "none" else SOLVE


def write_self_influences(run: Run) -> None:
    """Compute those that are asked for and not there, and write them, strip by strip."""
    if not run.request.options.self_influence:
        return
    model, columns, writer = run.fitted.model, run.request.columns, run.writer
    group = min(run.request.plan.chunks.test, columns.strip)  # training points solved together
    method = self_influence_method(model)
    pending = writer.without_self_influence()
    if pending and model.solves_over_data:
        n = sum(math.ceil(columns.sizes[i] / group) for i in pending)
        run.progress.say(
            f"self-influence: by {method}, {n} groups of at most {group} training points, each sweeping the training "
            "data until it is done"
        )
    items = [(columns.chunks[i], i, columns.starts[i], columns.sizes[i]) for i in pending]
    shared = (run.fitted.context, writer, group, method)
    with run.progress.stage("self-influence", len(items), "strips") as bar:
        for _ in run.fitted.executor.run(self_influences_of_strip, shared, items):
            bar.advance()
    if pending:
        about = {"method": method, **({"rtol": RTOL} if method == QUADRATURE else {})}
        writer.note(run.progress.seconds, {"self_influence": about})


def self_influences_of_strip(
    context: Context, writer: InfluenceWriter, group: int, method: str, chunk: Chunk, index: int, start: int, size: int
) -> int:
    """Those of one strip's training points, to the result."""
    if index not in writer.without_self_influence():  # the worker that made it died before its answer was fetched
        return index
    with logged_task("self-influence", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        batch = model.place(to_tensor_batch(load(chunk)))
        parts: list[SelfInfluences] = []
        for first in range(0, batch_length(batch), group):
            part = take(batch, first, min(first + group, batch_length(batch)))
            by_quadrature = method == QUADRATURE
            parts.append(
                model.self_influences(part, rtol=RTOL) if by_quadrature else model.self_influences_by_solve(part)
            )
        values = torch.cat([part.values for part in parts])
        error = torch.cat([(part.upper - part.lower) / 2 for part in parts])
        # and what rounding to float32 adds
        error = torch.where(error.isfinite(), error + torch.finfo(torch.float32).eps * values.abs(), torch.nan)
        writer.write_self_influence(index, to_numpy(values), to_numpy(error))
    return index
