"""The YAML files of a user: what a value means, where it stands, and what is wrong with a file that cannot be read.

`read_yaml` is the only reader. ruamel.yaml splits a text into events. Their meaning is decided here, by the core schema
of YAML 1.2, so that no text turns into a number of seconds, a boolean or a date:

- `true` and `false` are booleans; `yes`, `no`, `on` and `off` are text.
- `4:00:00`, `2026-01-31` and `1_000` are text.
- A number has no leading zero: `0120` is text, an account for instance. This alone departs from the core schema.
- Keys are text as they are written: `0:` is the key "0".

Nothing in a file is executed, and the values are plain Python: dict, list, str, int, float, bool and None.
"""

import copy
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from distinfluence.errors import ConfigError
from distinfluence.store.format.fingerprint import Json

MOST_BYTES = 2**18  # A longer file is not a job file, but data or a checkpoint.
MOST_CHARACTERS = 2**20  # What the values of a file may come to once its aliases are replaced by what they name.
MOST_LEVELS = 50  # Collections within collections.
MOST_DIGITS = 400  # The longest numbers that are of use have as many.

Place = tuple[str | int, ...]  # The keys and indices that lead to a value.

_WORDS: Mapping[str, Json] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float(f"{sign}inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_INTEGERS = {
    10: re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    8: re.compile(r"0o[0-7]+"),
    16: re.compile(r"0x[0-9a-fA-F]+"),
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TAG = "tag:yaml.org,2002:"
_TAGGED: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "null": (type(None),),
}

# A text that no reader takes for anything else, be it one of YAML 1.1 or 1.2.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


@dataclass(frozen=True)
class YamlFile:
    """A mapping that was read from a file.

    Attributes:
        name: Name of the file, for messages.
        content: The mapping.
        lines: Keys and indices that lead to a value → the line where the value begins, from 1.
    """

    name: str
    content: Mapping[str, object]
    lines: Mapping[Place, int] = field(default_factory=dict)

    def line(self, place: Place) -> int | None:
        """Return the line of a value, or of the section that lacks it; None if there is none."""
        known = (self.lines.get(place[:length]) for length in range(len(place), 0, -1))
        return next((line for line in known if line is not None), None)


def read_yaml(path: Path, kind: str) -> YamlFile:
    """Read a file that holds one mapping.

    Args:
        path: The file.
        kind: What the file is, for messages: "job file".

    Returns:
        The mapping and its lines.

    Raises:
        ConfigError: If the file cannot be read, or is not one mapping in YAML. The message names the line and column.
    """
    text = _text(path, kind)
    reading = _Reading(text, str(path))
    try:
        content = reading.document()
    except ReaderError as error:
        before = text[: error.position]
        where = before.count("\n"), error.position - (before.rfind("\n") + 1)
        raise reading.error(where, f"the character U+{error.character:04X} has no place in YAML. Remove it.") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = (mark.line, mark.column)
        problem = str(error.problem or error.context)
        raise reading.error(where, f"this is not valid YAML: {problem}. {_remedy(text, where, problem)}") from error
    if content is None:
        raise ConfigError(f"`{path}` is empty. Pass the path of a {kind}.")
    if not isinstance(content, dict):
        shown = {"list": "a list", "str": "a text"}.get(type(content).__name__, repr(content))
        raise ConfigError(
            f"`{path}` must hold a mapping (`key: value` lines), got {shown}. `distinfluence run --help` shows one."
        )
    return YamlFile(str(path), content, reading.lines)


def to_yaml(content: Mapping[str, object]) -> str:
    """Return a mapping as YAML that readers of version 1.1 and of version 1.2 take for the same.

    Args:
        content: Plain values: dict, list, str, int, float, bool and None.

    Returns:
        The text, one line for each value.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 2**16
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    """Writes every value out, and quotes each text that some reader could take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_in_order(self, mapping: Mapping[str, object]) -> Any:
        return self.represent_mapping(f"{_TAG}map", list(mapping.items()))  # a mapping itself would be sorted

    def represent_text(self, text: str) -> Any:
        plain = _PLAIN.fullmatch(text) and text.lower() not in _RESERVED
        return self.represent_scalar(f"{_TAG}str", text, style=None if plain else '"')

    def represent_number(self, number: float) -> Any:
        text = {math.inf: ".inf", -math.inf: "-.inf"}.get(number, ".nan" if math.isnan(number) else repr(number))
        dotted = re.sub(r"^(-?\d+)e", r"\1.0e", text)  # YAML 1.1 takes 1e-05 for a text
        return self.represent_scalar(f"{_TAG}float", dotted)


_Representer.add_representer(dict, _Representer.represent_in_order)
_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(float, _Representer.represent_number)


def plain_value(text: str) -> Json:
    """Return what a text without quotes means.

    Args:
        text: The text, as it is written.

    Returns:
        None, a boolean, a number, or the text itself.

    Raises:
        ValueError: If it is a number too large to be held.
    """
    if text in _WORDS:
        return _WORDS[text]
    bases = [base for base, pattern in _INTEGERS.items() if pattern.fullmatch(text)]
    if (bases or _FLOAT.fullmatch(text)) and len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} characters is too long, expected at most {MOST_DIGITS}")
    if bases:
        return int(text if bases[0] == 10 else text[2:], bases[0])
    if not _FLOAT.fullmatch(text):
        return text
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is larger than a number can be; infinity is written .inf")
    return number


def _text(path: Path, kind: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}. Pass the path of a {kind}.") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"`{path}` is longer than {MOST_BYTES >> 10} KiB. Pass the path of a {kind}.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"`{path}`, line {line}: this is not UTF-8 text (byte 0x{content[error.start]:02X}). Save the {kind} as "
            "UTF-8."
        ) from error


class _Reading:
    """Makes values of the events of a text."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._events: Iterator[Any] = YAML(typ="safe", pure=True).parse(text)
        self._anchors: dict[str, tuple[Json, int]] = {}
        self._characters = 0
        self.lines: dict[Place, int] = {}

    def error(self, where: tuple[int, int], text: str) -> ConfigError:
        """Return the error for a mistake at a line and column, counted from 0."""
        return ConfigError(f"`{self._name}`, line {where[0] + 1}, column {where[1] + 1}: {text}")

    def document(self) -> Json:
        """Return the only value of the text; None if there is none."""
        found: Json = None
        n_documents = 0
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                n_documents += 1
                if event.version not in (None, (1, 2)):
                    raise self._mistake(event, "files are read as YAML 1.2. Remove the %YAML line.")
                if n_documents > 1:
                    raise self._mistake(event, "a second document begins here, expected one. Remove the `---` line.")
            elif isinstance(event, NodeEvent):
                found = self._value(event, ())
        return found

    def _mistake(self, event: Event, text: str) -> ConfigError:
        return self.error((event.start_mark.line, event.start_mark.column), text)

    def _value(self, event: NodeEvent, place: Place) -> Json:
        before = self._characters
        if isinstance(event, AliasEvent):
            if event.anchor not in self._anchors:
                raise self._mistake(event, f"`*{event.anchor}` names nothing above. Write `&{event.anchor}` there.")
            named, size = self._anchors[event.anchor]
            self._count(event, size)
            return copy.deepcopy(named)
        value: Json
        if isinstance(event, ScalarEvent):
            value = self._scalar(event)
            self._count(event, len(event.value) + 1)
        else:
            assert isinstance(event, CollectionStartEvent)
            if len(place) >= MOST_LEVELS:
                raise self._mistake(event, f"there are more than {MOST_LEVELS} levels. Remove some.")
            self._count(event, 1)
            value = self._mapping(event, place) if isinstance(event, MappingStartEvent) else self._list(event, place)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._characters - before
        return value

    def _count(self, event: Event, characters: int) -> None:
        self._characters += characters
        if self._characters > MOST_CHARACTERS:
            raise self._mistake(
                event, f"aliases (`*…`) make the file longer than {MOST_CHARACTERS:,} characters. Use fewer."
            )

    def _scalar(self, event: ScalarEvent) -> Json:
        text: str = event.value
        if "\0" in text or re.search("[\ud800-\udfff]", text):
            raise self._mistake(event, "the text has a character that cannot be stored. Remove it.")
        tag = _tag(event)
        if tag is None and event.style is not None:
            return text
        if tag in ("!", f"{_TAG}str"):
            return text
        try:
            value = plain_value(text)
        except ValueError as error:
            raise self._mistake(event, f"{error}. Put it in quotes if it is text.") from error
        if tag is None:
            return value
        kinds = _TAGGED.get(tag.removeprefix(_TAG)) if tag.startswith(_TAG) else None
        if kinds is None:
            raise self._unknown(event, tag)
        if type(value) not in kinds:
            raise self._mistake(event, f"{text!r} is not what its tag `{_short(tag)}` says. Remove the tag.")
        return float(value) if tag == f"{_TAG}float" and isinstance(value, int) else value

    def _unknown(self, event: Event, tag: str) -> ConfigError:
        return self._mistake(event, f"the tag `{_short(tag)}` is not known: no file makes objects here. Remove it.")

    def _require_tag(self, event: CollectionStartEvent, name: str) -> None:
        tag = _tag(event)
        if tag not in (None, "!", _TAG + name):
            raise self._unknown(event, str(tag))

    def _list(self, event: CollectionStartEvent, place: Place) -> list[Json]:
        self._require_tag(event, "seq")
        values: list[Json] = []
        for item in self._events:
            if isinstance(item, SequenceEndEvent):
                break
            inner = (*place, len(values))
            self.lines[inner] = item.start_mark.line + 1
            values.append(self._value(item, inner))
        return values

    def _mapping(self, event: CollectionStartEvent, place: Place) -> dict[str, Json]:
        self._require_tag(event, "map")
        own: dict[str, Json] = {}
        merged: dict[str, Json] | None = None
        for item in self._events:
            if isinstance(item, MappingEndEvent):
                break
            key = self._key(item)
            inner = (*place, key)
            merges = key == "<<" and item.style is None
            if (merged is not None) if merges else (key in own):
                raise self._mistake(item, f"`{key}` is given twice, first in line {self.lines[inner]}. Remove one.")
            self.lines[inner] = item.start_mark.line + 1
            value = self._value(next(self._events), inner)
            if merges:
                merged = self._merged(item, value)
            else:
                own[key] = value
        return {**(merged or {}), **own}

    def _key(self, event: Any) -> str:
        if not isinstance(event, ScalarEvent) or _tag(event) not in (None, "!", f"{_TAG}str"):
            raise self._mistake(event, "a key must be a text. Write `key: value`.")
        if event.style is None and not event.value:
            raise self._mistake(event, "the key before `:` is missing. Write `key: value`.")
        self._scalar(event)
        self._count(event, len(event.value) + 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = event.value, len(event.value) + 1
        return str(event.value)

    def _merged(self, event: Event, value: Json) -> dict[str, Json]:
        """Return the keys that `<<` brings, of earlier mappings before those of later ones."""
        found: dict[str, Json] = {}
        for each in reversed(value if isinstance(value, list) else [value]):
            if not isinstance(each, dict):
                raise self._mistake(event, "`<<` must be followed by a mapping or a list of mappings, such as `*name`.")
            found.update(each)
        return found


def _tag(event: Any) -> str | None:
    return None if event.tag is None else str(event.tag)


def _short(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag


def _remedy(text: str, where: tuple[int, int], problem: str) -> str:
    """Say what to do about a text that the parser does not take."""
    lines = text.splitlines()
    line = lines[where[0]] if where[0] < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "The line is indented with a tab: use spaces."
    if line[where[1] : where[1] + 1] == "\t":
        return "There is a tab: use spaces."
    if "mapping values are not allowed" in problem:
        return "Indent the line like the others of its section, and put a text that has `: ` in it in quotes."
    if "block end" in problem:
        return "Indent the line like the others of its section."
    if "flow" in problem or "',' or" in problem:
        return "Close every `[` and `{`, and separate what is between them by commas."
    if "cannot start any token" in problem:
        return "Put the text in quotes."
    if "quoted scalar" in problem or "end of stream" in problem:
        return "Close every quote."
    return "Correct the line, or the one above."
