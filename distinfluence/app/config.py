"""Job files: what to compute, checked before anything runs.

A job file is YAML. Unknown keys are errors that suggest the right one; nothing in it is executed but the callables that
it names, and nothing is unpickled. Relative paths and modules are looked up next to the file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)
from torch import nn

from distinfluence.app.evaluate_section import EvaluateSection
from distinfluence.app.mistakes import line_of
from distinfluence.app.sections import (
    DAMPING,
    TEXTS,
    ChunkSection,
    ClusterSection,
    DataSection,
    Folder,
    FolderOrUrl,
    Method,
    ModelSection,
    Pairs,
    Reference,
    Referenced,
    Section,
    validated,
)
from distinfluence.app.yaml_file import YamlFile, read_yaml
from distinfluence.errors import ClusterError, ConfigError, DistinfluenceError, SettingError, UnsupportedModelError
from distinfluence.evaluate import Baseline, PlainLoss
from distinfluence.evaluate.baselines.write import BASELINES
from distinfluence.influence import InfluenceFunctionModel, RelativeDamping
from distinfluence.influence.registry import METHODS
from distinfluence.model.objective import Loss, Objective
from distinfluence.scaling import ClusterSpec, ExistingResult, ModelRecipe, Recipe, RunOptions
from distinfluence.scaling.clusters.slurm import batch_job
from distinfluence.scaling.worker.device import task_device
from distinfluence.store.format.fingerprint import to_json


class Job(Section):
    """A whole run.

    Attributes:
        model: The model.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        data: Training and test data.
        method: `name` (a key of `METHODS` or `BASELINES`) and the parameters of that influence model or baseline.
        output: The folder of the result, or a URL that fsspec can write to.
        mode: "up" or "perturbation".
        chunks: Samples in a chunk.
        cluster: Where the workers are.
        solve: See `RunOptions`.
        top_k: See `RunOptions`.
        mantissa_bits: See `RunOptions`.
        contributions: See `RunOptions`.
        self_influence: See `RunOptions`.
        certify: Whether to find the ends of the spectrum for error bounds, which takes several passes.
        scratch: A folder that every worker sees; by default next to the output.
        device: Where tasks compute; "auto" takes a GPU on every worker that sees one.
        evaluate: What `distinfluence evaluate` does.
    """

    model: ModelSection
    loss: Referenced
    data: DataSection
    method: Method
    output: FolderOrUrl
    mode: Literal["up", "perturbation"] = "up"
    chunks: ChunkSection = ChunkSection()
    cluster: ClusterSection = ClusterSection()
    solve: Literal["auto", "rows", "data"] = "auto"
    top_k: PositiveInt = 50
    mantissa_bits: Annotated[int, Field(ge=1, le=23)] = 23
    contributions: Pairs = False
    self_influence: bool = False
    certify: bool = False
    scratch: Folder | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    evaluate: EvaluateSection | None = None
    _folder: Path = Path()
    _file: YamlFile = YamlFile("job", {})

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read a YAML file. Raises ConfigError naming every key that is unknown, missing or of the wrong kind."""
        return cls._checked(read_yaml(path, "job file"), path.resolve().parent)

    @classmethod
    def parse(cls, content: Mapping[str, object], folder: Path, name: str = "job") -> "Job":
        """Check a mapping. folder: where relative paths and modules are looked up."""
        return cls._checked(YamlFile(name, content), folder)

    @classmethod
    def _checked(cls, file: YamlFile, folder: Path) -> "Job":
        job = validated(cls, file, "job file")
        job._folder, job._file = folder, file
        try:
            to_json(job.model_dump(mode="json"), "job")  # a result keeps it, and says so only once all is computed
        except SettingError as error:
            raise ConfigError(f"`{file.name}`: {error}") from error
        return job

    def on(self, cluster: ClusterSection) -> "Job":
        """Return the same job on another cluster."""
        return self.model_copy(update={"cluster": cluster})

    @property
    def is_baseline(self) -> bool:
        """Whether `method` names a baseline, which is not an influence model."""
        return self.method["name"] in BASELINES

    def baseline(self) -> Baseline:
        """Return the baseline that `method` names, with its model built where it needs one."""
        parameters: dict[str, Any] = {key: value for key, value in self.method.items() if key != "name"}
        kind = BASELINES[self.method["name"]]
        if kind is PlainLoss:
            if self.model.mixed_precision is not None:
                raise ConfigError("`model.mixed_precision` is for gradients, and the plain loss has none. Omit it.")
            module, _ = self._module()
            with self.mistakes_of("loss"):
                parameters |= {"model": module, "loss": self.loss_or_objective(), "device": task_device(self.device)}
        with self.mistakes_of("method"):
            if ":" in parameters.get(TEXTS, ""):
                parameters[TEXTS] = self.recipe(Reference(target=parameters[TEXTS])).resolve()
            return kind(**parameters)

    def method_class(self) -> type[InfluenceFunctionModel]:
        """Return the influence model that `method` names."""
        return METHODS[self.method["name"]]

    def influence_model(self) -> tuple[InfluenceFunctionModel, ModelRecipe]:
        """Return the influence model with its module built here, and the recipe by which workers build theirs."""
        module, recipe = self._module()
        with self.mistakes_of("loss"):
            loss = self.loss_or_objective()
        parameters: dict[str, Any] = {key: value for key, value in self.method.items() if key != "name"}
        with self.mistakes_of("method"):
            if DAMPING in parameters:
                parameters[DAMPING] = _damping(parameters[DAMPING])
            try:
                influence = self.method_class()(module, loss=loss, **parameters)
            except DistinfluenceError:  # Some are TypeErrors, too.
                raise
            except TypeError as error:
                raise ConfigError(f"{self.method} does not fit: {error}. Correct its parameters.") from error
        mixed = self.model.mixed_precision
        return influence if mixed is None else influence.in_mixed_precision(getattr(torch, mixed)), recipe

    def _module(self) -> tuple[nn.Module, ModelRecipe]:
        checkpoint = None if self.model.checkpoint is None else str(self.path(self.model.checkpoint))
        recipe = ModelRecipe(self.recipe(self.model.factory), checkpoint)
        with self.mistakes_of("model"):
            return recipe.build(), recipe

    @contextmanager
    def mistakes_of(self, *place: str) -> Iterator[None]:
        """Have errors say which key of which file they are about."""
        try:
            yield
        except ClusterError:  # which says nothing of what the file says
            raise
        except DistinfluenceError as error:
            place = ("model",) if isinstance(error, UnsupportedModelError) else place
            line = line_of(self._file, place, str(error))
            where = f"`{self._file.name}`{'' if line is None else f', line {line}'}, `{'.'.join(place)}`"
            raise type(error)(f"{where}: {error}") from error

    def loss_or_objective(self) -> Loss | Objective:
        """Return what `loss` names, built. Raises ConfigError if it is neither a loss nor an Objective."""
        found = self.recipe(self.loss).resolve()
        loss = self.recipe(self.loss).build() if isinstance(found, type) or self.loss.arguments else found
        if not callable(loss) and not isinstance(loss, Objective):
            raise ConfigError(f"`loss` {self.loss.target!r} must be a loss or an Objective, got {type(loss).__name__}.")
        return loss

    def recipe(self, reference: Reference) -> Recipe:
        """Return the recipe of a reference, importing from the job file's folder."""
        return Recipe(reference.target, reference.arguments, str(self._folder))

    def path(self, path: Path) -> Path:
        """Return a path of the job file, relative to its folder."""
        return (self._folder / path.expanduser()).resolve()

    @property
    def result(self) -> Path | str:
        """Where the result is: a folder, relative to the job file's, or a URL."""
        return self.path(self.output) if isinstance(self.output, Path) else self.output

    @property
    def scratch_folder(self) -> Path:
        """Where the files of a run are: next to the result, unless the job names a folder."""
        if self.scratch is not None:
            return self.path(self.scratch)
        output = self.path(Path(self.output))
        return output.with_name(f".{output.name}.scratch")

    @property
    def logs_folder(self) -> Path:
        """Where clusters leave what their jobs print: next to the result, or in the scratch folder."""
        if not isinstance(self.output, Path):
            return self.scratch_folder / "logs"
        output = self.path(self.output)
        return output.with_name(f"{output.name}.logs")

    @model_validator(mode="after")
    def _has_what_a_url_lacks(self) -> "Job":
        if isinstance(self.output, Path):
            return self
        if self.scratch is None:
            raise ValueError(f"`scratch` must name a folder where `output` is a URL, got {self.output!r} and none.")
        if self.contributions:
            raise ValueError(f"`contributions` are written to folders alone, got `output` {self.output!r}.")
        return self

    def options(self, existing: ExistingResult | str = ExistingResult.REFUSE) -> RunOptions:
        """Return the options of its run."""
        return RunOptions(
            mode=self.mode,
            chunk_size=self.chunks.train,
            test_chunk_size=self.chunks.test,
            panel_size=self.chunks.panel,
            solve=self.solve,
            top_k=self.top_k,
            mantissa_bits=self.mantissa_bits,
            contributions=self.contributions,
            self_influence=self.self_influence,
            existing=existing,
            attributes={"job": self.model_dump(mode="json"), "batch_job": batch_job()},
        )

    def cluster_spec(self) -> ClusterSpec:
        """Return where to run."""
        return self.cluster.spec()


def _damping(value: Any) -> Any:
    """{fraction: 0.1, of: mean} as a rule, also block by block."""
    if not isinstance(value, dict):
        return value
    if value and set(value) <= {"fraction", "of"}:
        return RelativeDamping(**value)
    return {block: _damping(own) for block, own in value.items()}
