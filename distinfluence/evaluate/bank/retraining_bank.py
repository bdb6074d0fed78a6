"""Losses of retrained models, made once and kept for every check and method that asks for them."""

import os
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from distributed import Client
from numpy.typing import NDArray
from torch import nn

from distinfluence.errors import RetrainingError, SettingError, ShapeError
from distinfluence.evaluate.bank.checks import (
    MemberEffect,
    Watch,
    check_members,
    describe,
    member_effect,
    seeds_are_equal,
)
from distinfluence.evaluate.bank.identity import Belongs, DataIdentity, loss_identity, trainer_identity
from distinfluence.evaluate.bank.rows import BankRow, BankRows
from distinfluence.evaluate.bank.tasks import (
    Outcome,
    Packed,
    Work,
    keys_of_chunk,
    retrain,
    trained,
)
from distinfluence.evaluate.bank.trainer import at_once, check_travels, takes_weights
from distinfluence.evaluate.retraining import Retraining
from distinfluence.model.data.tree import map_leaves
from distinfluence.model.identity.draw import name_seed
from distinfluence.model.objective import Loss, Objective, as_objective
from distinfluence.scaling.dask_calculator import OnWorkers
from distinfluence.scaling.data.chunks import ChunkedData, chunked
from distinfluence.scaling.data.sources import ArraySource, Home, InThisProcess
from distinfluence.scaling.dispatch.agenda import Failures
from distinfluence.scaling.dispatch.executor import Executor, InProcess, OnCluster, check_client, check_workers
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.scratch import Scratch
from distinfluence.scaling.stages.inspect import read_again
from distinfluence.scaling.stages.materialise import stored
from distinfluence.scaling.worker.context import torch_alone
from distinfluence.store.format.fingerprint import fingerprint_settings
from distinfluence.store.format.folder import local_path
from distinfluence.store.format.layout import whole_number
from distinfluence.store.run_state import read_runs

N_PROBE = 256  # Drawn training points whose losses are kept.
REPEAT_FROM = 10  # Models to train at which one is trained a second time, to see whether that changes anything.
FIRST_FAILURES = 3  # Tasks that fail before any has succeeded, after which the others are not tried.
EARLY = 50  # Models after which members are looked at for the first time.
WORKER_SECONDS = 60.0  # To wait for the first worker.
ROUNDING = 1e-5  # Change of a loss, relative to the largest, that training alone instead of in a group may make.


class RetrainingBank:
    """Losses of retrained models, which are made once and kept in a zarr group of their own.

    A retraining is found by its weights and its seed, whoever asks for it. Each model is one task; the losses are
    written as soon as they are there, so a run that was interrupted trains only what is missing. The models themselves
    are not kept.

    `train(indices, seed)` returns the model trained on the training points of these indices, counted in the order of
    `train_data`. torch, NumPy and `random` are seeded before. If it takes a keyword `weights`, [len(indices)] float64,
    it can train weighted. If it has a method `train_many(retrainings)` and an attribute `at_once`, groups of that many
    models are one task. The bank knows a trainer by its code, its attributes and what it captured, or by what its
    method `settings()` returns if it has one.

    What a trainer does is checked: different subsets must not give the same losses, and models must fit the points that
    they were trained on better than others. The losses of drawn training points are kept for this.

    Args:
        path: Folder of the bank, which is made if there is none.
        train: Trains a model on a part of the training data.
        loss: A loss of (outputs, targets), or an `Objective`, whose measurement of the test points is kept.
        train_data: The training data, as for `InfluenceCalculator`; a pair (x, y), a data set, a loader, a recipe.
        test_data: The test data.
        client: A client of a Dask cluster to train on; in this process by default.
        scratch: A folder that every worker sees, for the data that are sent to workers; a temporary one by default.
        progress: Whether to show progress bars, or what shows them.

    Attributes:
        n_train: Number of training points.
        n_test: Number of test points.
        trained: Number of models trained by this object.
        reused: Number of retrainings that were asked for and found in the bank.
        fingerprint: The sha256 of data, trainer and loss: another one, other models.

    Raises:
        SettingError: If `train` cannot be called with (indices, seed), or sent to workers.
        FingerprintError: If the bank there belongs to other data, another trainer or another loss.
        ForeignStoreError: If something else lies at `path`.
        ClusterError: If the cluster has no workers, or they do not see `scratch`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        train: Callable[..., nn.Module],
        loss: Loss | Objective,
        train_data: object,
        test_data: object,
        *,
        client: Client | None = None,
        scratch: str | Path | None = None,
        progress: bool | Progress = False,
    ) -> None:
        self._path = local_path(path)
        weighted = takes_weights(train)
        self._at_once = at_once(train)
        objective = as_objective(loss)
        self._progress = progress if isinstance(progress, Progress) else Progress(progress)
        self._scratch = Scratch(scratch)
        self._executor: Executor = InProcess()
        home: Home = InThisProcess()
        n_threads: int | None = None
        if client is not None:
            check_client(client)
            check_travels(train)
            n_threads = check_workers(client, str(self._scratch.folder), WORKER_SECONDS).n_threads
            self._executor, home = OnCluster(client), OnWorkers(client, self._scratch.folder)
        training, train_keys = self._read(train_data, home, "training data")
        test, test_keys = self._read(test_data, home, "test data")
        self.n_train, self.n_test = training.n_samples, test.n_samples
        self.trained, self.reused = 0, 0
        # a seed of its own: the first subset of `random_subsets` would otherwise hold all of them
        generator = np.random.default_rng(name_seed("drawn training points"))
        self._probe = np.sort(generator.permutation(self.n_train)[:N_PROBE])
        belongs = Belongs(
            DataIdentity.of(train_keys), DataIdentity.of(test_keys), trainer_identity(train), loss_identity(objective)
        )
        self.fingerprint = fingerprint_settings(belongs.to_json())
        self._bank = BankRows(self._path, belongs, self._probe)
        probe = self._probed(training, home)
        self._work = Work(train, weighted, objective, test.sources, probe, n_threads, client is None, uuid.uuid4().hex)
        self._watch = Watch()
        self._seen: dict[str, BankRow] = {}
        self._models: dict[int, nn.Module] = {}
        self._member_warning = ""

    def _read(self, data: object, home: Home, what: str) -> tuple[ChunkedData, NDArray[np.int64]]:
        """Return the data in chunks, and a hash of each sample."""
        chunks = stored(chunked(data, None, home), self._scratch.folder, self._executor)
        items = [(chunk, i, chunks.starts[i], chunks.sizes[i]) for i, chunk in enumerate(chunks.chunks)]
        found: dict[int, NDArray[np.int64]] = {}
        with self._progress.stage(f"look at {what}", len(items), "chunks") as bar:
            for index, keys in self._executor.run(keys_of_chunk, (), items):
                found[index] = keys
                bar.advance()
        return chunks, np.concatenate([found[i] for i in range(len(items))])

    def _probed(self, training: ChunkedData, home: Home) -> ArraySource:
        """Put the drawn training points where every task can read them."""
        chunk_of = np.searchsorted(np.array(training.starts), self._probe, side="right") - 1
        drawn = np.unique(chunk_of).tolist()
        items = [(training.chunks[i], (self._probe[chunk_of == i] - training.starts[i]).tolist()) for i in drawn]
        parts = dict(self._executor.run(read_again, (), items))
        arrays = map_leaves(lambda *own: np.concatenate(own), *(parts[i] for i in range(len(drawn))))
        return ArraySource(map_leaves(home.keep, arrays), 0, len(self._probe), f"probe-{uuid.uuid4().hex}")

    def losses(self, retrainings: list[Retraining]) -> NDArray[np.float64]:
        """Return what each retrained model makes of the test points, training those that are not there yet.

        Args:
            retrainings: The training runs, r of them. The same one may be asked for several times.

        Returns:
            The measurements (the losses, unless the objective asks for something else), [r, n_test].

        Raises:
            ShapeError: If the weights of a retraining are not [n_train].
            SettingError: If weights are not finite or all 0, or `train` would have to take weights and does not.
            RetrainingError: If models could not be trained, or `train` does not depend on the points that it is given.
                What succeeded is kept.
        """
        keys = self._checked(retrainings)
        wanted = {
            key: Retraining(np.asarray(r.weights, float), int(r.seed)) for key, r in zip(keys, retrainings, strict=True)
        }
        rows = self._bank.read(wanted)
        if len(rows) < len(wanted):
            for state in read_runs(self._path):
                if state.condition() == "running":
                    self._progress.say(f"another process trains models for {self._path}; waiting for it ({state})")
            lock = self._path.with_name(f".{self._path.name}.lock")
            with Partition(0, 1, lock).alone(), self._progress.beside(self._path):
                self._bank.refresh()
                rows |= self._bank.read({key: one for key, one in wanted.items() if key not in rows})
                self.reused += len(rows)
                self._note(rows)
                self._train(keys, wanted, rows)
        else:
            self.reused += len(rows)
            self._note(rows)
        self._look_at_members()
        return np.stack([rows[key].losses for key in keys]) if keys else np.zeros((0, self.n_test))

    def _checked(self, retrainings: Sequence[Retraining]) -> list[str]:
        """Check the retrainings before anything runs, and return their keys."""
        for number, one in enumerate(retrainings):
            weights = np.asarray(one.weights)
            if weights.shape != (self.n_train,):
                raise ShapeError(
                    f"`retrainings[{number}]` must have one weight for each of {self.n_train} training points, got "
                    f"shape {weights.shape}. Draw subsets with `random_subsets(n_train, …)`."
                )
            if not np.isfinite(weights).all() or not weights.any():
                raise SettingError(
                    f"`retrainings[{number}]` must have finite weights and leave a training point in, got "
                    f"{'no point' if not weights.any() else 'NaN or infinity'}. Correct its weights."
                )
            if not -(2**63) <= whole_number("seed", one.seed) < 2**63:
                raise SettingError(f"`retrainings[{number}]` must have a seed of 64 bits, got {one.seed}.")
            if one.is_weighted and not self._work.takes_weights:
                raise SettingError(
                    f"`train` must take a keyword `weights` for `retrainings[{number}]`, whose weights are not only 0 "
                    "and 1. Write `def train(indices, seed, weights=None)`, and weight the loss of each point."
                )
        return [one.key for one in retrainings]

    def _note(self, rows: Mapping[str, BankRow]) -> None:
        """Compare new rows with those that were seen before."""
        for key, row in rows.items():
            if key not in self._seen:
                self._watch.add(row)
                self._seen[key] = row

    def _train(self, asked: Sequence[str], wanted: Mapping[str, Retraining], rows: dict[str, BankRow]) -> None:
        """Train what is missing, group by group, and add it to the rows. asked: keys in the caller's order."""
        keys, found = [*wanted], len(rows)
        # the groups are those of the whole list, so that a model's group does not depend on where a run stopped
        groups = [keys[start : start + self._at_once] for start in range(0, len(keys), self._at_once)]
        groups = [group for group in groups if not all(key in rows for key in group)]
        if not groups:
            return
        total = sum(map(len, groups))
        repeated = [groups[0][0]] if self._bank.repeat is None and total >= REPEAT_FROM else []
        items = [([Packed.of(wanted[key]) for key in group],) for group in [*groups, *([repeated] if repeated else [])]]
        errors: dict[str, Exception] = {}
        failures = _Failures(lambda: len(rows) == found)
        with self._progress.stage("retrain", total, "models") as bar:
            if found:
                bar.note(f"{found} of {len(wanted)} are in the bank")
            # closed at once when anything is raised: tasks under way are cancelled
            running = cast("Generator[tuple[int, Any]]", self._executor.run(retrain, (self._work,), items, failures))
            with suppress(_EnoughFailedError), closing(running):
                for index, outcomes in running:
                    if index == len(groups):
                        self._compare(repeated[0], outcomes[0], rows)
                        continue
                    new = self._kept(groups[index], outcomes, wanted, rows, errors)
                    bar.advance(len(groups[index]))
                    if not new:
                        failures[index] = next(each for each in outcomes if isinstance(each, Exception))
                    if len(self._seen) >= EARLY > len(self._seen) - len(new):
                        check_members([*self._seen.values()], self._probe)
        for index, error in failures.items():
            errors = dict.fromkeys(groups[index] if index < len(groups) else [], error) | errors
        missing = {key: errors[key] for key in keys if key in errors and key not in rows}
        if missing:
            named = {key: f"`retrainings[{asked.index(key)}]` ({describe(wanted[key])})" for key in missing}
            raise self._failed(missing, named, len(rows), len(wanted)) from next(iter(missing.values()))

    def _kept(
        self,
        group: Sequence[str],
        outcomes: Sequence[Outcome | Exception],
        wanted: Mapping[str, Retraining],
        rows: dict[str, BankRow],
        errors: dict[str, Exception],
    ) -> dict[str, BankRow]:
        """Write the outcomes of a group that are not there yet, and return them."""
        self.trained += len(group)
        new: dict[str, BankRow] = {}
        for key, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Exception):
                errors[key] = outcome
            elif key not in rows:
                new[key] = BankRow(wanted[key], outcome.losses, outcome.member_losses)
        self._bank.write(new)
        rows |= new
        self._note(new)
        return new

    def _compare(self, key: str, outcome: Outcome | Exception, rows: Mapping[str, BankRow]) -> None:
        """Note by how much a model that was trained a second time differs."""
        if isinstance(outcome, Outcome) and key in rows:
            self._bank.write_repeat(float(np.abs(outcome.losses - rows[key].losses).max()))

    def _failed(
        self, errors: Mapping[str, Exception], named: Mapping[str, str], there: int, asked: int
    ) -> RetrainingError:
        listed = [f"{named[key]}: {type(error).__name__}: {error}" for key, error in errors.items()]
        more = [f"… and {len(listed) - 5} more"] if len(listed) > 5 else []
        which = f"{len(errors)} of {asked} retrainings"
        if there + len(errors) < asked:
            which = f"the first {which}, the others were not tried"
        return RetrainingError(
            f"`train` failed for {which}:\n  "
            + "\n  ".join([*listed[:5], *more])
            + f"\n{there} are in the bank, {self._path}. Correct the cause and ask again: only what is "
            "missing is trained then. A `train` that is changed needs a bank of its own."
        )

    def _look_at_members(self) -> None:
        warning = check_members([*self._seen.values()], self._probe)
        if warning and not self._member_warning:
            self._progress.warn(f"`train`: {warning}")
        self._member_warning = warning

    def model(self, seed: int) -> nn.Module:
        """Return the model trained on all training points, in eval mode; it is kept for the next call.

        Args:
            seed: Seed of the training.

        Returns:
            The model.

        Raises:
            RetrainingError: If it could not be trained.
        """
        seed = whole_number("seed", seed)
        if seed not in self._models:
            everything = Retraining(np.ones(self.n_train), seed)
            try:
                with torch_alone(self._work.n_threads):
                    (model,) = trained(self._work, [everything])
            except Exception as error:
                raise RetrainingError(
                    f"`train` failed on all {self.n_train} points with seed {seed}: {type(error).__name__}: {error}"
                ) from error
            self.trained += 1
            self._models[seed] = model.eval()
        return self._models[seed]

    def member_effect(self) -> MemberEffect:
        """Return how much better models fit the training points that they were trained on.

        Returns:
            The effect, over all retrainings that this object was asked for.
        """
        return member_effect([*self._seen.values()], self._probe)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of figures must know of the retrainings that this object was asked for."""
        rows = [*self._seen.values()]
        found = [self._member_warning] if self._member_warning else []
        if seeds_are_equal(rows):
            found.append("all seeds give the same losses, so more seeds add nothing")
        change = self._bank.repeat or 0.0
        losses = np.stack([row.losses for row in rows]) if rows else np.zeros((1, 1))
        if change > (0.0 if self._at_once == 1 else ROUNDING * np.abs(losses).max()):
            spread = float(losses.std(axis=0).mean())
            times = f", {change / spread:.2g} times their spread over retrainings" if spread else ""
            found.append(
                f"training is not deterministic: once more on the same points with the same seed changed losses by up "
                f"to {change:.2g}{times}"
            )
        return tuple(found)


class _EnoughFailedError(Exception):
    """The first tasks have all failed."""


class _Failures(Failures):
    """Tasks that failed for good, by number.

    Args:
        none_succeeded: Says whether no task has succeeded yet.

    Raises:
        _EnoughFailedError: FIRST_FAILURES tasks have failed before any succeeded.
    """

    def __init__(self, none_succeeded: Callable[[], bool]) -> None:
        super().__init__()
        self._none_succeeded = none_succeeded

    def __setitem__(self, index: int, error: Exception) -> None:
        super().__setitem__(index, error)
        if len(self) >= FIRST_FAILURES and self._none_succeeded():
            raise _EnoughFailedError
