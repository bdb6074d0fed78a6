"""Evaluating a job's methods: models trained again, scores of each method, the table.

Everything lies in one folder: `bank.zarr` (losses of retrained models), `models/` (trained on all points), `scores/` (a
result for each method), and the table as `evaluation.txt` and `evaluation.json`. What is there is used again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from distributed import Client
from torch import nn

from distinfluence.app.baseline_job import run_baseline
from distinfluence.app.complete import complete_result
from distinfluence.app.config import Job
from distinfluence.app.evaluate_section import EvaluateSection, TrainSection
from distinfluence.app.job import run_on
from distinfluence.app.sections import Reference
from distinfluence.atomic import appearing
from distinfluence.errors import ConfigError, FingerprintError, RecipeError, SettingError
from distinfluence.evaluate import (
    Check,
    Evaluation,
    LeaveOneOut,
    LinearDatamodeling,
    QueryLossDifference,
    RetrainingBank,
    ScriptTrainer,
    SmallNetworks,
    ToMinimum,
    WeightSteps,
    evaluate,
)
from distinfluence.evaluate.bank.identity import trainer_identity
from distinfluence.evaluate.bank.trainer import takes_weights
from distinfluence.model.objective import Loss, Objective
from distinfluence.scaling import ExistingResult, Progress, Recipe, connected
from distinfluence.store import InfluenceResult
from distinfluence.store.format.fingerprint import fingerprint_settings

MODEL_SEED = 0  # Of the model whose scores are evaluated, where the job has no checkpoint; subsets start at 1.
BASELINES: Mapping[str, dict[str, Any]] = {
    "gradient dot product": {"name": "gradient_dot"},
    "gradient cosine": {"name": "gradient_cosine"},
    "plain loss": {"name": "loss"},
    "random": {"name": "random"},
}

Trainer = Callable[..., nn.Module]


def evaluate_job(job: Job, *, progress: Progress | None = None) -> Evaluation:
    """Train models again as `evaluate` says, score with each method, and compare.

    A call that was interrupted goes on when it is repeated: models that are in the bank are not trained again, and
    scores that are written are not computed again.

    Args:
        job: A job with the key `evaluate`.
        progress: What shows the progress; by default a new `Progress`.

    Returns:
        The table, which is also in the folder `evaluate.output`.

    Raises:
        ConfigError: If the job has no key `evaluate`, or what it names does not fit.
        FingerprintError: If the bank there was made with other data or another trainer.
        RetrainingError: If models could not be trained again; those that could are kept.
    """
    section = job.evaluate
    if section is None:
        raise ConfigError("`evaluate` must say how models are trained again, got a job file without it. Add the key.")
    run = _Run(job, section, progress or Progress())
    run.folder.mkdir(parents=True, exist_ok=True)
    with connected(job.cluster_spec(), folder=run.folder / "logs", announce=run.progress.say) as client:
        evaluation = run.evaluation(client)
    shutil.rmtree(run.scratch, ignore_errors=True)
    for name, content in (
        ("evaluation.txt", f"{evaluation}\n"),
        ("evaluation.json", json.dumps(evaluation.to_json(), indent=2, allow_nan=False)),
    ):
        with appearing(run.folder / name) as new:
            new.write_text(content)
    return evaluation


class _Run:
    """One evaluation."""

    def __init__(self, job: Job, section: EvaluateSection, progress: Progress) -> None:
        self.job, self.section, self.progress = job, section, progress
        self.folder = job.path(section.output)
        hidden = f".{self.folder.name}.scratch"
        self.scratch = self.folder / ".scratch" if job.scratch is None else job.path(job.scratch) / hidden
        self.methods = dict(section.methods) or {str(job.method["name"]): job.method}
        self.baselines = {**BASELINES, **section.baselines}
        if both := sorted(set(self.methods) & set(self.baselines)):
            raise ConfigError(f"`evaluate.baselines` must have other names than `methods`, got {both} in both.")
        self.seeds = [1 + i for i in range(section.seeds)]
        with job.mistakes_of("loss"):
            self.loss = job.loss_or_objective()
        with job.mistakes_of("evaluate", "train"):
            self.trainer = _trainer(job, section.train, self.loss)
        with job.mistakes_of("evaluate"):  # settings are refused before anything is trained
            self._checks({})
            if section.weight_steps is not None and not takes_weights(self.trainer):
                raise SettingError(
                    "`weight_steps` needs a `train` that takes a keyword `weights`. Add it, or omit this."
                )
        self.mislabelled, self.planted = self._mislabelled(), self._planted()

    def evaluation(self, client: Client) -> Evaluation:
        """Do it on a cluster."""
        job, section = self.job, self.section
        bank = RetrainingBank(
            self.folder / "bank.zarr",
            self.trainer,
            self.loss,
            job.recipe(job.data.train),
            job.recipe(job.data.test),
            client=client,
            scratch=self.scratch,
            progress=self.progress,
        )
        model = None if job.model.checkpoint is not None else self._trained(bank, MODEL_SEED)
        everyone = {**self.methods, **self.baselines}
        scores = {name: self._scores(client, name, method, model) for name, method in everyone.items()}
        matched: dict[str, dict[int, InfluenceResult]] = {name: {} for name in everyone if section.seed_matched}
        for seed in self.seeds[: section.seed_matched]:
            own = self._trained(bank, seed)
            for name, method in everyone.items():
                matched[name][seed] = self._scores(client, f"{name}, seed {seed}", method, own)
        evaluation = evaluate(
            scores,
            baselines=list(self.baselines),
            retrainer=bank,
            checks=self._checks(matched),
            mislabelled=self.mislabelled,
            losses=None if section.mislabelled is None else _train_losses(scores),
            planted=self.planted,
        )
        counts = f"{bank.trained} models were trained, {bank.reused} were in the bank"
        self.progress.say(counts)
        return replace(evaluation, remarks=(*self._about(bank.n_train, model), *bank.remarks))

    def _checks(self, matched: Mapping[str, Mapping[int, InfluenceResult]]) -> list[Check]:
        section, seed = self.section, self.section.seed
        checks: list[Check] = []
        if section.subsets:
            checks.append(LinearDatamodeling(section.subsets, section.fraction, self.seeds, matched or None, seed))
        if section.removal is not None:
            own = section.removal
            checks.append(
                QueryLossDifference(
                    own.fractions, self._first(own.seeds), own.queries, n_controls=own.controls, draw_seed=seed
                )
            )
        if section.leave_one_out is not None:
            one = section.leave_one_out
            checks.append(LeaveOneOut(one.points, None, self._first(one.seeds), seed))
        if section.weight_steps is not None:
            steps = section.weight_steps
            checks.append(WeightSteps(steps.points, None, self._first(1), seed, step=steps.step))
        return checks

    def _first(self, n: int) -> list[int]:
        return [1 + i for i in range(n)]

    def _about(self, n_train: int, model: Path | None) -> list[str]:
        scored = (
            "the checkpoint" if model is None else f"a model trained on all {n_train} points from seed {MODEL_SEED}"
        )
        return [f"The scores are of {scored}. Intervals are by the bootstrap over subsets or points, and queries."]

    def _trained(self, bank: RetrainingBank, seed: int) -> Path:
        """Return the checkpoint of the model that was trained on all points, which is made if it is not there."""
        file = self.folder / "models" / f"seed-{seed}-{bank.fingerprint[:12]}.pt"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            self.progress.say(f"training on all {bank.n_train} points from seed {seed}")
            own = cast(nn.Module, self.job.recipe(self.job.model.factory).build()).state_dict()
            state = {
                name: value.to(own[name].dtype) if name in own else value for name, value in self._state(bank, seed)
            }
            with appearing(file) as new:
                torch.save(state, new)
        return file

    @staticmethod
    def _state(bank: RetrainingBank, seed: int) -> Iterable[tuple[str, torch.Tensor]]:
        return bank.model(seed).state_dict().items()

    def _scores(self, client: Client, name: str, method: dict[str, Any], model: Path | None) -> InfluenceResult:
        """Return the scores of a method, computed unless they are there."""
        named = self.job.model if model is None else self.job.model.model_copy(update={"checkpoint": model})
        scored = self.job.model_copy(
            update={
                "method": method,
                "model": named,
                "output": self.folder / "scores" / f"{_file_name(name)}.zarr",
                "mode": "up",
                "scratch": self.scratch / _file_name(name),
                "evaluate": None,
                "self_influence": False,
                "contributions": False,
            }
        )
        self.progress.say(f"scores by {name}")
        try:
            return self._written(client, scored, ExistingResult.RESUME)
        except FingerprintError as error:  # of another model or method of that name; these scores are ours to replace
            self.progress.say(f"the scores there are made again: {error}")
            return self._written(client, scored, ExistingResult.REPLACE)

    def _written(self, client: Client, job: Job, existing: ExistingResult) -> InfluenceResult:
        if job.is_baseline:
            return run_baseline(job, existing, self.progress)
        built, options = job.influence_model(), job.options(existing)
        done = complete_result(job, built[0], options) if options.resumes else None
        return done or run_on(client, job, built, options, self.progress)[0]

    def _mislabelled(self) -> np.ndarray[Any, Any] | None:
        named = self.section.mislabelled
        if named is None:
            return None
        found = self._built("mislabelled", named) if isinstance(named, Reference) else named
        return np.asarray(found) if len(found) else np.zeros(0, dtype=np.int64)

    def _planted(self) -> Any:
        named = self.section.planted
        return None if named is None else self._built("planted", named)

    def _built(self, key: str, reference: Reference) -> Any:
        with self.job.mistakes_of("evaluate", key):
            return self.job.recipe(reference).build()


def _train_losses(scores: Mapping[str, InfluenceResult]) -> np.ndarray[Any, Any]:
    """Return the loss of each training point, which every result of a method with gradients has."""
    for result in scores.values():
        if result.train_loss is not None and np.isfinite(result.train_loss).all():
            return np.asarray(result.train_loss)
    raise SettingError("`mislabelled` needs a method or baseline that looks at training losses. Add `{name: loss}`.")


def _file_name(name: str) -> str:
    """Return a name for a file that no other method has."""
    plain = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII).strip("-.")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


class _Imported:
    """A trainer of the job's folder, which workers import for themselves. Of a class, an instance."""

    def __init__(self, recipe: Recipe, expected: str = "") -> None:
        self.recipe = recipe
        found = cast(Trainer, recipe.resolve())
        called = partial(found, **recipe.arguments) if recipe.arguments else found
        self.__wrapped__ = recipe.build() if isinstance(found, type) else called
        self.fingerprint = fingerprint_settings(self.settings())
        if expected not in ("", self.fingerprint):
            raise RecipeError(
                f"`{recipe.target}` must be the same on the workers, got other code there. Restart the workers: they "
                "have imported an earlier version, or another module of that name."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return cast(Trainer, self.__wrapped__)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Imported, (self.recipe, self.fingerprint))

    def settings(self) -> dict[str, str]:
        """Return what fixes the trainer: what it says of itself, or its code and attributes."""
        return trainer_identity(self.__wrapped__)


def _trainer(job: Job, section: TrainSection, loss: Loss | Objective) -> Trainer:
    factory, data = job.recipe(job.model.factory), job.recipe(job.data.train)
    if section.callable is not None:
        return _Imported(job.recipe(section.callable))
    try:
        if section.small_networks is not None:
            return SmallNetworks(factory, data, loss, **cast(Any, section.small_networks))
        if section.to_minimum is not None:
            return ToMinimum(factory, data, loss, **cast(Any, section.to_minimum))
        beside = {"folder": str(job.path(Path()))}
        return ScriptTrainer(factory=factory, **cast(Any, beside | (section.script or {})))
    except TypeError as error:
        raise ConfigError(f"{error}. Correct the settings.") from error
