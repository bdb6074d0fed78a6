"""Job files: what to compute, checked before anything runs.

A job file is YAML. Unknown keys are errors that suggest the right one; nothing in it is executed but the callables that
it names, and nothing is unpickled. Relative paths and modules are looked up next to the file.
"""

import difflib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PositiveInt,
    ValidationError,
    model_validator,
)

from distinfluence.errors import ConfigError, DistinfluenceError, SettingError
from distinfluence.influence import InfluenceFunctionModel, RelativeDamping
from distinfluence.influence.registry import METHODS
from distinfluence.model.objective import Loss, Objective
from distinfluence.scaling import ClusterSpec, ExistingResult, ModelRecipe, Recipe, RunOptions
from distinfluence.scaling.clusters.slurm import batch_job
from distinfluence.store.format.folder import is_local_url


class Section(BaseModel):
    """A mapping of the job file; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SectionT = TypeVar("SectionT", bound=Section)


class Reference(Section):
    """Something importable, `module:name`, and what to call it with. In YAML a plain string is enough."""

    target: str
    arguments: dict[str, JsonValue] = {}


def _expanded(value: object) -> object:
    return {"target": value} if isinstance(value, str) else value


Referenced = Annotated[Reference, BeforeValidator(_expanded)]


class ModelSection(Section):
    """The model: a factory and the checkpoint with its weights, written by `torch.save(model.state_dict(), …)`.

    Attributes:
        factory: A callable that returns the module.
        checkpoint: The file of the weights; None keeps the factory's own.
        mixed_precision: What the passes run in where autocast does so; see `InfluenceFunctionModel.in_mixed_precision`.
    """

    factory: Referenced
    checkpoint: Path | None = None
    mixed_precision: Literal["bfloat16", "float16"] | None = None


class DataSection(Section):
    """Training and test data: callables that return arrays or a map-style data set, called on the workers.

    Attributes:
        train: Returns the training data.
        test: Returns the test data.
    """

    train: Referenced
    test: Referenced


class ChunkSection(Section):
    """Samples in a chunk: a training chunk is a strip of the result, a test chunk is solved together.

    The plan chooses what is omitted.

    Attributes:
        train: Training points in a chunk.
        test: Test points in a chunk.
        panel: Test points whose factors a worker holds at a time.
    """

    train: PositiveInt | None = None
    test: PositiveInt | None = None
    panel: PositiveInt | None = None


class ClusterSection(Section):
    """Where the workers are; see `ClusterSpec`. A file of its own holds the same keys."""

    kind: str = "local"
    workers: PositiveInt | None = None
    minimum: PositiveInt | None = None
    memory_limit: str = "auto"
    address: str = ""
    timeout: float | None = Field(default=None, gt=0)
    on_death: Literal["cancel", "leave"] = "cancel"
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> "ClusterSection":
        try:
            self.spec()
        except SettingError as error:
            raise ValueError(str(error)) from error
        return self

    def spec(self) -> ClusterSpec:
        """Return the same as the scaling layer takes it."""
        return ClusterSpec(**self.model_dump())

    @classmethod
    def read(cls, path: Path) -> "ClusterSection":
        """Read a YAML file. Raises ConfigError naming every key that is unknown or of the wrong kind."""
        return _validated(cls, _yaml(path, "cluster file"), str(path), "cluster file")


def _folder(value: Any) -> Any:
    """Take a path, also as a file:// URL; no other URL."""
    if isinstance(value, str) and is_local_url(value):
        return value.partition("://")[2]
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"must be a folder, got {value!r}. Name one that all workers see: files are mapped and locked there."
        )
    return value


def _folder_or_url(value: Any) -> Any:
    """Take a URL as it is, anything else as a path."""
    return value if isinstance(value, str) and "://" in value and not is_local_url(value) else _path(value)


def _path(value: Any) -> Any:
    value = _folder(value)
    return Path(value) if isinstance(value, str) else value


Folder = Annotated[Path, BeforeValidator(_folder)]
FolderOrUrl = Annotated[Path | str, BeforeValidator(_folder_or_url)]


class Job(Section):
    """A whole run.

    Attributes:
        model: The model.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        data: Training and test data.
        method: `name` (a key of `METHODS`) and the parameters of that influence model.
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
    """

    model: ModelSection
    loss: Referenced
    data: DataSection
    method: dict[str, Any]
    output: FolderOrUrl
    mode: Literal["up", "perturbation"] = "up"
    chunks: ChunkSection = ChunkSection()
    cluster: ClusterSection = ClusterSection()
    solve: Literal["auto", "rows", "data"] = "auto"
    top_k: PositiveInt = 50
    mantissa_bits: Annotated[int, Field(ge=1, le=23)] = 23
    contributions: bool | PositiveInt = False
    self_influence: bool = False
    certify: bool = False
    scratch: Folder | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    _folder: Path = Path()

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read a YAML file. Raises ConfigError naming every key that is unknown, missing or of the wrong kind."""
        return cls.parse(_yaml(path, "job file"), path.resolve().parent, str(path))

    @classmethod
    def parse(cls, content: Mapping[str, object], folder: Path, name: str = "job") -> "Job":
        """Check a mapping. folder: where relative paths and modules are looked up."""
        job = _validated(cls, content, name, "job file")
        job._folder = folder
        job.method_class()  # its name and keys are checked now, not after the data are loaded
        return job

    def on(self, cluster: ClusterSection) -> "Job":
        """Return the same job on another cluster."""
        return self.model_copy(update={"cluster": cluster})

    def method_class(self) -> type[InfluenceFunctionModel]:
        """Return the influence model that `method` names. Raises ConfigError for an unknown name or parameter."""
        name = str(self.method.get("name"))
        if name not in METHODS:
            raise ConfigError(f"`method.name` must name a method, got {name!r}.{_suggestion(name, sorted(METHODS))}")
        known = [
            p
            for p in inspect.signature(METHODS[name]).parameters
            if p not in ("model", "loss", "pre_conditioner", "h0")
        ]
        for key in self.method:
            if key not in known and key != "name":
                raise ConfigError(f"`method.{key}` is no parameter of {name!r}.{_suggestion(key, known)}")
        return METHODS[name]

    def influence_model(self) -> tuple[InfluenceFunctionModel, ModelRecipe]:
        """Return the influence model with its module built here, and the recipe by which workers build theirs."""
        checkpoint = None if self.model.checkpoint is None else str(self.path(self.model.checkpoint))
        recipe = ModelRecipe(self.recipe(self.model.factory), checkpoint)
        parameters: dict[str, Any] = {key: value for key, value in self.method.items() if key != "name"}
        if "hessian_regularization" in parameters:
            parameters["hessian_regularization"] = _damping(parameters["hessian_regularization"])
        method, module, loss = self.method_class(), recipe.build(), self._loss()
        try:
            influence = method(module, loss=loss, **parameters)
        except DistinfluenceError:  # of which some are TypeErrors, too: of the model, which they say
            raise
        except TypeError as error:
            raise ConfigError(f"`method` {self.method} does not fit: {error}. Correct its parameters.") from error
        mixed = self.model.mixed_precision
        return influence if mixed is None else influence.in_mixed_precision(getattr(torch, mixed)), recipe

    def _loss(self) -> Loss | Objective:
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


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML reads 1e-4 as a text, because it has no dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _yaml(path: Path, kind: str) -> Mapping[str, object]:
    try:
        content = _Loader(path.read_text()).get_single_data()
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}. Pass the path of a {kind}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"`{path}` is no YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"`{path}` is no text. Pass the path of a {kind}.") from error
    if content is None:
        raise ConfigError(f"`{path}` is empty. Pass the path of a {kind}.")
    if not isinstance(content, dict):
        raise ConfigError(
            f"`{path}` must hold a mapping, got {type(content).__name__}. `distinfluence run --help` shows one."
        )
    return content


def _validated(section: type[SectionT], content: Mapping[str, object], name: str, kind: str) -> SectionT:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        lines = [_explain(section, problem, kind) for problem in error.errors()]
        raise ConfigError(
            f"`{name}` has {len(lines)} mistake{'s' if len(lines) > 1 else ''}:\n  " + "\n  ".join(lines)
        ) from None


def _explain(job: type[Section], problem: Any, kind: str) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return (
            f"`{where}` is no key of a {kind}.{_suggestion(str(problem['loc'][-1]), _keys(job, problem['loc'][:-1]))}"
        )
    if problem["type"] == "missing":
        return f"`{where}` is missing."
    if problem["type"] == "value_error":
        return f"`{where}`: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        keys = _keys(job, problem["loc"])
        of = f" with keys among {', '.join(keys)}" if keys else ""
        return f"`{where}` must be a mapping{of}, got {problem['input']!r}."
    return f"`{where}`: {problem['msg']}, got {problem['input']!r}."


def _keys(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        field = section.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" Known: {', '.join(known)}." if known else ""
