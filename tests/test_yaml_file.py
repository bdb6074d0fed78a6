"""Files are read by YAML 1.2's core schema, and what is written means the same to readers of 1.1 and 1.2."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from distinfluence.app.yaml_file import MOST_BYTES, MOST_CHARACTERS, MOST_LEVELS, read_yaml, to_yaml
from distinfluence.errors import ConfigError

TEXTS = [
    *("4:00:00", "1:30", "190:20:30", "190:20:30.15", "01:30:00", "2-12", "2026-01-31", "2026-01-31T10:00:00Z"),
    *("on", "off", "yes", "no", "y", "n", "On", "YES", "NO", "tRue", "nULL", "NaN", "nan", "inf", "-inf", ".Nan", "="),
    *("0120", "08", "-012", "00", "01.5", "007e3", "1_000", "1_0.5", "0b11", "0o8", "0xg", "-0x1", "+0o7", "0X1F"),
    *("e5", ".e3", ".", "..", "+", "-.", "1e", "1e+", "1.2.3", "--1", "10GB", "64%", "<<", "~/data", "torch.nn:Linear"),
]
VALUES: dict[str, object] = {
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "null": None, "Null": None, "NULL": None, "~": None,
    "0": 0, "-0": 0, "+7": 7, "-12": -12, "120": 120, "0o14": 12, "0o0": 0, "0x1F": 31, "0xff": 255,
    "1e-3": 1e-3, "1E3": 1e3, "+1E-12": 1e-12, "-1.5e+3": -1500.0, "1.": 1.0, ".5": 0.5, "-.5": -0.5, "0.25": 0.25,
    "1e05": 1e5, "0e0": 0.0, ".inf": math.inf, "-.Inf": -math.inf, "+.INF": math.inf,
}  # fmt: skip


def read(folder: Path, content: str | bytes) -> Any:
    path = folder / "job.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_yaml(path, "job file")


@pytest.mark.parametrize("form", ["{}: {}\n", "{{{}: {}}}", "? {}\n: {}\n"])
def test_each_value_is_what_the_core_schema_says(form: str, tmp_path: Path) -> None:
    for text, value in [*VALUES.items(), *zip(TEXTS, TEXTS, strict=True)]:
        found = read(tmp_path, form.format("key", text)).content["key"]
        assert (found, type(found)) == (value, type(value)), text
        assert read(tmp_path, form.format("key", f"'{text}'")).content["key"] == text
    for text in (".nan", ".NaN", ".NAN"):
        assert math.isnan(read(tmp_path, form.format("key", text)).content["key"])
    assert read(tmp_path, form.format("key", "")).content == {"key": None}


def test_keys_are_texts_as_they_are_written(tmp_path: Path) -> None:
    found = read(tmp_path, "0: a\non: b\n012: c\nnull: d\n1e3: e\n")
    assert found.content == {"0": "a", "on": "b", "012": "c", "null": "d", "1e3": "e"}
    with pytest.raises(ConfigError, match="line 2, column 1: `1` is given twice, first in line 1. Remove one."):
        read(tmp_path, "1: a\n'1': b\n")


def test_values_are_plain_and_belong_to_nothing_else(tmp_path: Path) -> None:
    text = "a: &a {b: [1, {c: 0x10}], d: >-\n  long\n  text\n  }\ne: *a\n".replace("d: >-\n  long\n  text\n  ", "d: x")
    found = read(tmp_path, text).content

    def kinds(value: object) -> set[type]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return {type(value)}.union(*map(kinds, inner))

    assert kinds(found) == {dict, list, int, str}
    assert json.loads(json.dumps(found)) == found
    found["a"]["b"].append(2)
    assert found["e"] == {"b": [1, {"c": 16}], "d": "x"}


def test_anchors_and_merge_keys_work_and_own_keys_go_before_merged_ones(tmp_path: Path) -> None:
    text = "one: &one {a: 1, b: 1}\ntwo: &two {b: 2, c: 2}\n"
    text += "x: {<<: *one, b: 3}\ny: {b: 3, <<: [*one, *two]}\nz: {'<<': 1}\n"
    found = read(tmp_path, text).content
    assert found["x"] == {"a": 1, "b": 3}
    assert found["y"] == {"a": 1, "b": 3, "c": 2}
    assert found["z"] == {"<<": 1}
    assert read(tmp_path, "a: &a 1\nb: &a 2\nc: *a\n").content["c"] == 2


def test_the_line_of_a_value_or_of_its_section_is_known(tmp_path: Path) -> None:
    found = read(tmp_path, "# first\na:\n  b: 1\n  c:\n  - x\n  - {d: 2,\n     e: 3}\n")
    assert [found.line(place) for place in (("a",), ("a", "b"), ("a", "c", 1), ("a", "c", 1, "e"))] == [2, 3, 6, 7]
    assert found.line(("a", "missing")) == 2
    assert found.line(("missing",)) is None
    assert found.line(()) is None


def bombs() -> dict[str, str]:
    doubling = "a0: &a0 {x: 1}\n"
    lists = doubling + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    merges = doubling + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}\n" for i in range(1, 40)
    )
    long = f"a: &a {'x' * 10000}\nb: [{', '.join(['*a'] * 500)}]\n"
    keys = f"a: &a\n  ? {'x' * 10000}\n  : 1\nb: [{', '.join(['*a'] * 500)}]\n"
    return {"lists": lists, "merges": merges, "a long text": long, "a long key": keys}


@pytest.mark.parametrize("name", list(bombs()))
def test_aliases_cannot_make_a_file_grow_without_end(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"aliases .* longer than {MOST_CHARACTERS:,} characters"):
        read(tmp_path, bombs()[name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "` is empty. Pass the path of a job file."),
        ("# nothing\n", "` is empty."),
        ("- a\n- b\n", "must hold a mapping (`key: value` lines), got a list."),
        ("just text\n", "must hold a mapping (`key: value` lines), got a text."),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: a second document begins here, expected one. Remove the `---` line."),
        ("%YAML 1.1\n---\na: 1\n", "files are read as YAML 1.2. Remove the %YAML line."),
        ("a:\n\tb: 1\n", "line 2, column 1: this is not valid YAML: found character '\\t' that cannot st"),
        ("a:\n\tb: 1\n", "The line is indented with a tab: use spaces."),
        ("a: 1\t# b\n", "There is a tab: use spaces."),
        ("a: [1", "line 1, column 6: this is not valid YAML"),
        ("a: {b: 1\nc: 2\n", "Close every `[` and `{`"),
        ("a:\n  b: 1\n c: 2\n", "line 3, column 2: this is not valid YAML"),
        ("a:\n  b: 1\n c: 2\n", "Indent the line like the others of its section."),
        ("a: b: c\n", "put a text that has `: ` in it in quotes"),
        ("a: @b\n", "Put the text in quotes."),
        ("a: 'b\n", "Close every quote."),
        ("a: \x07\n", "line 1, column 4: the character U+0007 has no place in YAML. Remove it."),
        ('a: "\\ud800"\n', "the text has a character that cannot be stored"),
        ('a: "\\0"\n', "the text has a character that cannot be stored"),
        ("a: *b\n", "line 1, column 4: `*b` names nothing above. Write `&b` there."),
        ("a: &a [*a]\n", "`*a` names nothing above"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4: the tag `!!python/object:os.system` is not known"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not known: no file makes objects here. Remove it."),
        ("a: !!timestamp 2026-01-31\n", "the tag `!!timestamp` is not known"),
        ("a: !mine x\n", "the tag `!mine` is not known"),
        ("!!python/name:os.system b: 1\n", "a key must be a text"),
        ("a: !!int x\n", "'x' is not what its tag `!!int` says. Remove the tag."),
        ("[1, 2]: 3\n", "line 1, column 1: a key must be a text. Write `key: value`."),
        (": 3\n", "the key before `:` is missing"),
        ("a: {<<: 3}\n", "`<<` must be followed by a mapping or a list of mappings"),
        ("a: {<<: {b: 1}, <<: {c: 1}}\n", "`<<` is given twice"),
        (f"a: {'[' * (MOST_LEVELS + 1)}", f"there are more than {MOST_LEVELS} levels"),
        ("a: 1e999\n", "1e999 is larger than a number can be; infinity is written .inf. Put it in quotes if it is"),
        (f"a: {'9' * 5000}\n", "a number of 5000 characters is too long"),
        (f"a: 0x{'f' * 5000}\n", "a number of 5002 characters is too long"),
        (b"a: 1\nb: \xff\n", "line 2: this is not UTF-8 text (byte 0xFF). Save the job file as UTF-8."),
        ("a: 1\n".encode("utf-16"), "this is not UTF-8 text"),
        (b"#" * (MOST_BYTES + 1), "is longer than 256 KiB. Pass the path of a job file."),
    ],
)  # fmt: skip
def test_what_is_no_mapping_in_yaml_is_refused_with_its_place(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "job.yaml") in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="cannot be read: .* Pass the path of a cluster file."):
            read_yaml(path, "cluster file")


def test_tags_of_the_core_schema_and_a_byte_order_mark_are_taken(tmp_path: Path) -> None:
    text = "\ufeffa: !!str 12\nb: !!float 3\nc: !!int '4'\nd: ! 5\ne: !!map {f: !!seq [!!null ~, !!bool true]}\r\n"
    found = read(tmp_path, text).content
    assert found == {"a": "12", "b": 3.0, "c": 4, "d": "5", "e": {"f": [None, True]}}
    assert isinstance(found["b"], float)


def test_what_is_written_means_the_same_to_readers_of_both_versions(tmp_path: Path) -> None:
    texts = [
        *TEXTS,
        *VALUES,
        "",
        " a",
        "a ",
        "a: b",
        "a #b",
        "# a",
        "- a",
        "-",
        "1,5",
        "&a",
        "*a",
        "!a",
        "|",
        ">",
        "%a",
    ]
    texts += [
        "@a",
        "`a`",
        "a\nb",
        "\t",
        "é\x85\u2028\U0001f600",
        "'",
        '"',
        "\\",
        "{}",
        "[]",
        "?",
        "? a",
        ("x" * 99 + " ") * 3,
    ]
    numbers = [0, -1, 10**30, 1e-5, 1e20, -1e-300, 0.1, 1.0, 5e-324, math.inf, -math.inf]
    content = {
        "texts": texts,
        "keys": dict.fromkeys(texts, 1),
        "numbers": numbers,
        "others": [True, False, None, {}, [], [[]], {"z": {"b": 1, "a": 2}}],
    }
    written = to_yaml(content)
    assert read(tmp_path, written).content == content
    of_version_1_1 = importlib.import_module("yaml").safe_load(written)  # which dask brings
    assert of_version_1_1 == content
    assert [*map(type, of_version_1_1["numbers"])] == [*map(type, numbers)]
    assert list(content) == list(read(tmp_path, written).content)
    assert to_yaml({"a": "module.sub-1/x_y", "b": [1]}) == "a: module.sub-1/x_y\nb:\n- 1\n"
    shared = [1]
    assert "&" not in to_yaml({"a": shared, "b": shared})
