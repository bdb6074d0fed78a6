"""The parts of job files that several files share: references, data, chunks, where the workers are, paths.

Unknown keys are errors that suggest the right one.
"""

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PositiveInt,
    ValidationError,
    model_validator,
)

from distinfluence.app.mistakes import explain, misfit, suggestion
from distinfluence.app.yaml_file import YamlFile, read_yaml
from distinfluence.errors import ConfigError, SettingError
from distinfluence.evaluate.baselines.write import BASELINES
from distinfluence.influence.registry import METHODS
from distinfluence.scaling import ClusterSpec
from distinfluence.store.format.folder import is_local_url

DAMPING = "hessian_regularization"  # The parameter of a method that may also be a rule, or a mapping of blocks.
TEXTS = "texts"  # The parameter of a baseline that is the name of a field, or `module:callable`.


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
        return validated(cls, read_yaml(path, "cluster file"), "cluster file")


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
Pairs = Annotated[bool | int, BeforeValidator(_shown_pairs)]
FolderOrUrl = Annotated[Path | str, BeforeValidator(_path_or_url)]


def _checked_method(method: dict[str, Any]) -> dict[str, Any]:
    """Check the name of a method and its keys now, not after the data are loaded."""
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
        annotation = float if isinstance(value, str | bool) and key == DAMPING else parameters[key].annotation
        annotation = str if key == TEXTS else annotation
        if mistake := misfit(annotation, value):
            raise ValueError(f"`{key}` {mistake}")
    return method


Method = Annotated[dict[str, Any], AfterValidator(_checked_method)]


def validated(section: type[SectionT], file: YamlFile, kind: str) -> SectionT:
    """Check a file against a section.

    Args:
        section: What the file must hold.
        file: The file.
        kind: What the file is, for messages: "job file".

    Returns:
        The section.

    Raises:
        ConfigError: If a key is unknown, missing or of the wrong kind. The message names every one.
    """
    try:
        return section.model_validate(file.content)
    except ValidationError as error:
        lines = [explain(section, problem, file, kind) for problem in error.errors()]
        raise ConfigError(
            f"`{file.name}` has {len(lines)} mistake{'s' if len(lines) > 1 else ''}:\n  " + "\n  ".join(lines)
        ) from None
