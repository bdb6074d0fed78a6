"""One task of a bank: some models are trained again and evaluated, where the task runs.

An error of the user's code is a result like any other. It is not tried again: the same subset and seed would fail in
the same way.
"""

import random
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distinfluence.errors import DiskFullError, NonFiniteError, RetrainingError, ShapeError
from distinfluence.evaluate.bank.trainer import Trainer, TrainsMany
from distinfluence.evaluate.retraining import Retraining
from distinfluence.influence.arrays import to_numpy, to_tensor_batch
from distinfluence.model.batch import batch_length, check_batch, take
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.model.counter_random import sample_keys
from distinfluence.model.objective import Objective
from distinfluence.model.sample_risk import CHECKED_SAMPLES, SampleRisk
from distinfluence.scaling.data.sources import ChunkSource
from distinfluence.scaling.worker.cache import Chunk, load, named_samples
from distinfluence.scaling.worker.context import torch_alone
from distinfluence.scaling.worker.logs import logged_task


@dataclass(frozen=True)
class Work:
    """What all tasks of a bank share; it is sent to each worker once.

    Attributes:
        train: Trains a model again.
        takes_weights: Whether `train` takes `weights`.
        objective: The loss, and the measurement of a test point.
        test: The test data.
        probe: The drawn training points.
        n_threads: Threads of torch in a task; None for those that the process has.
        here: Whether tasks run in the caller's process.
        key: The same for the same bank.
    """

    train: Trainer
    takes_weights: bool
    objective: Objective
    test: tuple[ChunkSource, ...]
    probe: ChunkSource
    n_threads: int | None
    here: bool
    key: str


@dataclass(frozen=True)
class Packed:
    """A retraining on its way to a worker: a bit for each training point, and weights only where they say more."""

    n_train: int
    members: bytes
    weights: NDArray[np.float64] | None
    seed: int

    @classmethod
    def of(cls, retraining: Retraining) -> "Packed":
        """Pack a retraining."""
        members = np.packbits(retraining.weights != 0).tobytes()
        weights = retraining.weights if retraining.is_weighted else None
        return cls(len(retraining.weights), members, weights, retraining.seed)

    def unpacked(self) -> Retraining:
        """Return the retraining."""
        if self.weights is not None:
            return Retraining(self.weights, self.seed)
        bits = np.unpackbits(np.frombuffer(self.members, np.uint8), count=self.n_train)
        return Retraining(bits.astype(np.float64), self.seed)


@dataclass(frozen=True)
class Outcome:
    """losses: at the test points, [n_test] float64. member_losses: at the drawn training points, [n_probe] float64."""

    losses: NDArray[np.float64]
    member_losses: NDArray[np.float64]


def retrain(work: Work, group: Sequence[Packed]) -> "list[Outcome | Exception]":
    """Train and evaluate a group of models; an error of one of them, or of all, in place of its outcome."""
    retrainings = [packed.unpacked() for packed in group]
    with logged_task("retrain", seeds=[one.seed for one in retrainings]), torch_alone(work.n_threads):
        try:
            models = trained(work, retrainings)
        except DiskFullError:
            raise
        except Exception as error:
            return [portable(error, work.here)] * len(group)
        return [_evaluated(work, model) for model in models]


def trained(work: Work, retrainings: Sequence[Retraining]) -> list[nn.Module]:
    """Return the models. The random state of the process is as it was afterwards.

    Raises:
        RetrainingError: If `train` returns anything but modules.
        Exception: Whatever `train` raises.
    """
    train, models = work.train, list[object]()
    with seeded(retrainings[0].seed), torch.inference_mode(False), torch.enable_grad():
        if isinstance(train, TrainsMany):
            models = list(train.train_many(retrainings))
        else:
            for one in retrainings:
                weights = {"weights": one.weights[one.indices]} if work.takes_weights else {}
                models.append(train(one.indices, one.seed, **weights))
    if len(models) != len(retrainings):
        raise RetrainingError(
            f"`train.train_many` must return one model for each of {len(retrainings)} retrainings, got {len(models)}."
        )
    for model in models:
        if not isinstance(model, nn.Module):
            raise RetrainingError(
                f"`train` must return the trained `torch.nn.Module`, got {type(model).__name__}. Return the model."
            )
    return [model for model in models if isinstance(model, nn.Module)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and Python, so that training is a function of the seed; afterwards all is as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _evaluated(work: Work, model: nn.Module) -> Outcome | Exception:
    try:
        with torch.inference_mode(False), torch.no_grad(), seeded(0):
            risk = _risk(model.eval(), work.objective)
            _check_objective(work, risk)
            parts = [_values(risk, chunk, of_test=True) for chunk in work.test]
            losses = np.concatenate(parts)
            member_losses = _values(risk, work.probe, of_test=False)
    except DiskFullError:
        raise
    except Exception as error:
        return portable(error, work.here)
    for values, where in ((losses, "test point"), (member_losses, "drawn training point")):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            return NonFiniteError(
                f"`train` returned a model whose loss is {values[bad[0]]} at {where} {bad[0]} ({len(bad)} of "
                f"{len(values)} are not finite): the training diverged. Lower its learning rate, or clip gradients."
            )
    return Outcome(losses, member_losses)


def _risk(model: nn.Module, objective: Objective) -> SampleRisk:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        for parameter in model.parameters():  # frozen after training; here nothing is differentiated
            parameter.requires_grad_(parameter.is_floating_point())
    blocks = ParameterBlocks.of(model)
    # a model that was trained in float64 is evaluated in it, also on data in float32
    dtype = torch.float64 if model.get_parameter(next(iter(blocks.shapes))).dtype == torch.float64 else None
    return SampleRisk(model, objective, blocks, dtype=dtype)


_checked: set[str] = set()  # keys of the banks whose objective this process has checked


def _check_objective(work: Work, risk: SampleRisk) -> None:
    """Have the objective check itself on a few test points, once in a process: that outputs and targets line up."""
    if work.key not in _checked:
        batch = take(risk.place(to_tensor_batch(load(work.test[0]))), 0, min(CHECKED_SAMPLES, work.test[0].stop))
        work.objective.check(risk.outputs(risk.parameters, batch), batch)
        _checked.add(work.key)


def _values(risk: SampleRisk, chunk: ChunkSource, *, of_test: bool) -> NDArray[np.float64]:
    """Return the measurements of test points, or the losses of training points, of one chunk."""
    batch = risk.place(to_tensor_batch(load(chunk)))
    evaluate = risk.measurements if of_test else risk.losses
    values = evaluate(risk.parameters, batch)
    if tuple(values.shape) != (batch_length(batch),):
        raise ShapeError(
            f"the objective must return one value per sample, [{batch_length(batch)}], got {tuple(values.shape)}. "
            "Reduce all dimensions but the samples."
        )
    return to_numpy(values).astype(np.float64)


def portable(error: Exception, here: bool) -> Exception:
    """Return an error that may leave this process, and holds on to no tensors of the frames that it passed.

    Its traceback, which does not travel, becomes a note.
    """
    text = "" if here else "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)
    if here:
        return error
    try:
        error.add_note(f"On the worker:\n{text}")
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RetrainingError(f"{type(error).__name__}: {error}\nOn the worker:\n{text}")
    return error


def keys_of_chunk(chunk: Chunk, index: int, start: int, size: int) -> NDArray[np.int64]:
    """Return a hash of the content of each sample of a chunk, [n]."""
    with named_samples(index, start, size):
        batch = to_tensor_batch(load(chunk))
        check_batch(batch)
        keys: NDArray[np.int64] = sample_keys(batch).numpy()
        return keys
