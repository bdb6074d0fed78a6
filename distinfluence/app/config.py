"""Job files: what to compute, checked before anything runs.

A job file is YAML. Unknown keys are errors that suggest the right one; nothing in it is executed but the callables that
it names, and nothing is unpickled. Relative paths and modules are looked up next to the file.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import nn

from distinfluence.app.mistakes import explain, line_of, misfit, suggestion
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
from distinfluence.store.format.folder import is_local_url

_DAMPING = "hessian_regularization"  # The parameter of a method that may also be a rule, or a mapping of blocks.

_TEXTS = "texts"  # The parameter of a baseline that is the name of a field, or `module:callable`.


class Section(BaseModel):
    """A mapping of the job file; keys that it does not know are errors, and so is a text where a number is needed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


SectionT = TypeVar("SectionT", bound=Section)


def _text(value: object) -> object:
    """Take a whole number as the text that was meant: a folder or a project may have a number for its name."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _target(value: str) -> str:
    module, colon, name = value.partition(":")
    if not (module and colon and name):
        before, _, last = value.rpartition(".")
        raise ValueError(
            f"must name something as `module:name`, got {value!r}."
            + (f" Did you mean `{before}:{last}`?" if before and not colon else " Write `my_module:my_function`.")
        )
    return value


class Reference(Section):
    """Something importable, `module:name`, and what to call it with. In YAML a plain string is enough."""

    target: Annotated[str, AfterValidator(_target)]
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
    checkpoint: Annotated[Path | None, BeforeValidator(lambda value: _path(value))] = None
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


def _number_as_text(value: object) -> object:
    """Take the number of bytes, or a part of the memory, as Dask does."""
    return str(value) if isinstance(value, float) else _text(value)


class ClusterSection(Section):
    """Where the workers are; see `ClusterSpec`. A file of its own holds the same keys."""

    kind: str = "local"
    workers: PositiveInt | None = None
    minimum: PositiveInt | None = None
    memory_limit: Annotated[str, BeforeValidator(_number_as_text)] = "auto"
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
        return _validated(cls, read_yaml(path, "cluster file"), "cluster file")


def _path(value: object) -> object:
    """Take a path, also as a file:// URL; no other URL."""
    value = _text(value)
    if isinstance(value, str) and is_local_url(value):
        return Path(value.partition("://")[2])
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"must be a file or folder, got {value!r}. Name one that all workers see: files are mapped and locked "
            "there."
        )
    if isinstance(value, str) and not value:
        raise ValueError("must be a path, got ''. Write one, or leave the key out.")
    return Path(value) if isinstance(value, str) else value


def _path_or_url(value: object) -> object:
    """Take a URL as it is, anything else as a path."""
    if isinstance(value, str) and "://" in value and not is_local_url(value):
        return value
    value = _path(value)
    if not isinstance(value, Path):
        raise ValueError(f"must be a folder or a URL, got {value!r}. Put a name in quotes.")
    return value


def _shown_pairs(value: object) -> object:
    if not isinstance(value, int) or (value < 1 and value is not False):
        raise ValueError(f"must be true, false or a whole number of at least 1, got {value!r}. Write one of these.")
    return value


Folder = Annotated[Path, BeforeValidator(_path)]
FolderOrUrl = Annotated[Path | str, BeforeValidator(_path_or_url)]


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
    contributions: Annotated[bool | int, BeforeValidator(_shown_pairs)] = False
    self_influence: bool = False
    certify: bool = False
    scratch: Folder | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
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
        job = _validated(cls, file, "job file")
        job._folder, job._file = folder, file
        try:
            to_json(job.model_dump(mode="json"), "job")  # a result keeps it, and says so only once all is computed
        except SettingError as error:
            raise ConfigError(f"`{file.name}`: {error}") from error
        return job

    def on(self, cluster: ClusterSection) -> "Job":
        """Return the same job on another cluster."""
        return self.model_copy(update={"cluster": cluster})

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, method: dict[str, Any]) -> dict[str, Any]:
        """Check its name and its keys now, not after the data are loaded."""
        name = method.get("name")
        kinds: dict[str, type] = {**METHODS, **BASELINES}
        if not isinstance(name, str) or name not in kinds:
            raise ValueError(f"`name` must be a method, got {name!r}.{suggestion(str(name), sorted(kinds))}")
        parameters = inspect.signature(kinds[name]).parameters
        known = [key for key in parameters if key not in ("model", "loss", "pre_conditioner", "h0", "device")]
        for key, value in method.items():
            if key == "name":
                continue
            if key not in known:
                raise ValueError(f"`{key}` is not a parameter of {name!r}.{suggestion(key, known)}")
            annotation = float if isinstance(value, str | bool) and key == _DAMPING else parameters[key].annotation
            annotation = str if key == _TEXTS else annotation
            if mistake := misfit(annotation, value):
                raise ValueError(f"`{key}` {mistake}")
        return method

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
                parameters |= {"model": module, "loss": self._loss(), "device": task_device(self.device)}
        with self.mistakes_of("method"):
            if ":" in parameters.get(_TEXTS, ""):
                parameters[_TEXTS] = self.recipe(Reference(target=parameters[_TEXTS])).resolve()
            return kind(**parameters)

    def method_class(self) -> type[InfluenceFunctionModel]:
        """Return the influence model that `method` names."""
        return METHODS[self.method["name"]]

    def influence_model(self) -> tuple[InfluenceFunctionModel, ModelRecipe]:
        """Return the influence model with its module built here, and the recipe by which workers build theirs."""
        module, recipe = self._module()
        with self.mistakes_of("loss"):
            loss = self._loss()
        parameters: dict[str, Any] = {key: value for key, value in self.method.items() if key != "name"}
        with self.mistakes_of("method"):
            if _DAMPING in parameters:
                parameters[_DAMPING] = _damping(parameters[_DAMPING])
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


def _validated(section: type[SectionT], file: YamlFile, kind: str) -> SectionT:
    try:
        return section.model_validate(file.content)
    except ValidationError as error:
        lines = [explain(section, problem, file, kind) for problem in error.errors()]
        raise ConfigError(
            f"`{file.name}` has {len(lines)} mistake{'s' if len(lines) > 1 else ''}:\n  " + "\n  ".join(lines)
        ) from None
