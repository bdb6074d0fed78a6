"""What to say of a mistake in a job or cluster file: the line, the key, what was expected, what came, what to do."""

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from distinfluence.app.yaml_file import Place, YamlFile, plain_value

_EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "is_instance_of": "a path",
    "list_type": "a list",
}
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_BOOLEANS: Mapping[str, str] = {
    **dict.fromkeys(("yes", "on", "y", "true", "1"), "true"),
    **dict.fromkeys(("no", "off", "n", "false", "0"), "false"),
}


def explain(section: type[BaseModel], problem: Any, file: YamlFile, kind: str) -> str:
    """Return a sentence or two about a mistake.

    Args:
        section: What the file was checked against.
        problem: One of pydantic's errors.
        file: The file.
        kind: What the file is: "job file".
    """
    where = ".".join(map(str, problem["loc"]))
    said = _explained(section, problem, where, kind)
    line = line_of(file, problem["loc"], said.removeprefix(f"`{where}`: "))
    return ("" if line is None else f"line {line}: ") + said


def line_of(file: YamlFile, place: Place, said: str) -> int | None:
    """Return the line of a section, or of the key in it that a message begins with; None if it has no line."""
    found = re.match(r"`([\w.-]+)`", said)
    keys = found[1].split(".") if found else []
    dashed = (*place, *(key.replace("_", "-") for key in keys))
    return file.lines.get(dashed) or file.line((*place, *keys))


def _explained(section: type[BaseModel], problem: Any, where: str, kind: str) -> str:
    place, found = problem["loc"], problem["type"]
    if found == "extra_forbidden":
        return f"`{where}` is not a key of a {kind}.{suggestion(str(place[-1]), list(_fields(section, place[:-1])))}"
    if found == "missing":
        required = [key for key, own in _fields(section, place[:-1]).items() if own.is_required()]
        return f"`{where}` is missing. Add it: {', '.join(f'`{key}`' for key in required)} cannot be left out here."
    if found == "value_error":
        text = str(problem["ctx"]["error"])
        return text if not where else f"`{where}` {text}" if text.startswith("must ") else f"`{where}`: {text}"
    if found in ("model_type", "model_attributes_type", "dict_type"):
        keys = list(_fields(section, place))
        of = f" with keys among {', '.join(keys)}" if keys else ""
        return f"`{where}` must be a mapping{of}, got {problem['input']!r}. Indent its keys below it."
    return f"`{where}` {_expectation(problem)}"


def _expectation(problem: Any) -> str:
    """Say what a value must be, what it is, and what to write."""
    found, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if found == "literal_error":
        choices = context["expected"]
        return f"must be {choices}, got {value!r}.{_close(str(value), choices.replace(' or ', ', '))}"
    if found in _BOUNDS:
        words, bound = _BOUNDS[found]
        if isinstance(value, int) and found in ("greater_than", "less_than"):
            words, limit = (
                ("at least", context[bound] + 1) if found == "greater_than" else ("at most", context[bound] - 1)
            )
        else:
            limit = context[bound]
        return f"must be {words} {limit}, got {value!r}. Write such a number, or leave the key out."
    expected = _EXPECTED.get(found)
    if expected is None:
        return f"is not as expected ({problem['msg']}), got {value!r}. Correct it."
    return f"must be {expected}, got {value!r}. {_remedy(found, value)}"


def _remedy(found: str, value: object) -> str:
    if found == "bool_type":
        return f"Write {_BOOLEANS[str(value).lower()]}." if str(value).lower() in _BOOLEANS else "Write one of these."
    if found in ("string_type", "path_type", "is_instance_of"):
        return "Put it in quotes." if isinstance(value, bool | int | float) else "Write a text."
    if isinstance(value, str) and _is_number(value):
        return "Remove the quotes."
    if isinstance(value, float) and value.is_integer():
        return f"Write {value:.0f}."
    return f"Write {_EXPECTED[found]}."


def _is_number(text: str) -> bool:
    try:
        return isinstance(plain_value(text), int | float)
    except ValueError:
        return False


def _close(key: str, choices: str) -> str:
    names = [choice.strip("'") for choice in choices.split(", ")]
    close = ["cuda"] if key == "gpu" else difflib.get_close_matches(key, names, n=1)
    return f" Did you mean `{close[0]}`?" if close else " Write one of these."


def misfit(annotation: Any, value: object) -> str | None:
    """Return why a value is not of a parameter's type, what it must be, and what to write; None if it is.

    Args:
        annotation: The type. Only numbers, booleans, texts and None are looked at.
        value: The value.
    """
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if not set(kinds) <= {int, float, bool, str, type(None)}:
        return None
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        return _expectation(error.errors()[0])
    return None


def suggestion(key: str, known: Sequence[str]) -> str:
    """Return which name may have been meant, or all of them."""
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" Known: {', '.join(known)}." if known else ""


def _fields(section: type[BaseModel], place: tuple[Any, ...]) -> Mapping[str, Any]:
    """Return the keys of a section by the keys that lead to it; none where any key is taken."""
    for part in place:
        own = section.model_fields.get(str(part))
        kinds = [] if own is None else [own.annotation, *get_args(own.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return {}
        section = inner[0]
    return section.model_fields
