"""The layout of the package: folders, sizes, import order, signatures, and docstrings of what it exports."""

import ast
import importlib
import inspect
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from enum import Enum
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Unpack, get_origin

import pytest

from distinfluence import errors
from tests.test_architecture import DOCUMENTED, FILES, imports, module_of, read

PEERS = ("distinfluence/solvers", "distinfluence/influence")  # folders whose files are peers of one kind
MOST_FILES, MOST_PEERS = 16, 24
MOST_LINES = 450
MOST_PARAMETERS = 8
MOST_LEVELS = 11

Graph = Mapping[str, set[str]]


def graph() -> dict[str, set[str]]:
    """Module → the modules of the package that it imports, inside functions and for type checking, too."""
    modules = {module_of(file): file for file in FILES}
    return {
        module: {inner for each in imports(ast.parse(read(file))) if (inner := _inner(each.module)) in modules}
        - {module}
        for module, file in modules.items()
    }


def _inner(module: str) -> str | None:
    top, _, inner = module.partition(".")
    return inner if top == "distinfluence" else None


def folded(modules: Graph, depth: int) -> dict[str, set[str]]:
    """The same with folders for nodes, `depth` names deep."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, others in modules.items():
        room = _room(module, depth)
        rooms[room] |= {_room(other, depth) for other in others} - {room}
    return rooms


def _room(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


def levels(modules: Graph) -> dict[str, int]:
    """Module → its level: 1 for one that imports nothing. Raises CycleError."""
    found: dict[str, int] = {}
    for module in TopologicalSorter(modules).static_order():
        found[module] = 1 + max((found[other] for other in modules[module]), default=0)
    return found


def test_no_module_imports_itself_in_a_circle() -> None:
    levels(graph())


def test_the_package_has_few_levels_at_the_top() -> None:
    found = levels(folded(graph(), 1))
    assert max(found.values()) <= MOST_LEVELS, found


def test_folders_and_files_are_small() -> None:
    folders = Counter(Path(file).parent.as_posix() for file in FILES)
    full = {name: n for name, n in folders.items() if n > (MOST_PEERS if name in PEERS else MOST_FILES)}
    assert full == {}
    lengths = {file: len(read(file).splitlines()) for file in FILES}
    assert {file: n for file, n in lengths.items() if n > MOST_LINES} == {}


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Qualified name and node of each function and method, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{inside}{node.name}", node
            yield from functions(node, f"{inside}{node.name}.")
        else:
            yield from functions(node, f"{inside}{node.name}." if isinstance(node, ast.ClassDef) else inside)


# Signatures that are not ours to shorten: pyDVL's constructors, torch's functions, commands with their options; and one
# keyword for each thing that `annotate` stores.
MIRRORED = (r".*\.__init__", r"attention", r"_batch_norm", r"run", r"browse", r"annotate")


def test_functions_have_few_parameters() -> None:
    long = []
    for file in FILES:
        for name, node in functions(ast.parse(read(file))):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            n = len([a for a in given if a.arg not in ("self", "cls")])
            if n > MOST_PARAMETERS and not any(re.fullmatch(mirrored, name) for mirrored in MIRRORED):
                long.append(f"{file}:{node.lineno}: {name} has {n}")
    assert long == []


def exported() -> Iterator[tuple[str, object]]:
    """Name and value of each exported function and class, and of each public method that an exported class defines."""
    seen = set()
    for package in DOCUMENTED:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) in seen or not callable(value) or get_origin(value) is not None:
                continue
            seen.add(id(value))
            yield f"{package}.{name}", value
            if inspect.isclass(value):
                for method, member in vars(value).items():
                    member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                    if not method.startswith(("_", "test_")) and inspect.isfunction(member):
                        yield f"{package}.{name}.{method}", member


PROJECT_ERRORS = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
SECTIONS = {"Args": r"^(Args|Attributes):$", "Returns": r"^(Returns|Yields):$", "Raises": r"^Raises:$"}


def signature(value: Any) -> inspect.Signature | None:
    """Of a function, or of a class that the package gives a constructor; None of enums, protocols and exceptions."""
    if inspect.isclass(value) and (
        issubclass(value, BaseException | Enum) or getattr(value, "_is_protocol", False) or "__init__" not in dir(value)
    ):
        return None
    try:
        return inspect.signature(value)
    except ValueError:
        return None


def lacking(value: Any) -> list[str]:
    """The sections that the docstring of a callable should have and has not."""
    documented = inspect.cleandoc(value.__doc__ or "")
    asked = signature(value)
    if asked is None or (getattr(value, "__override__", False) and not documented):
        return []  # the base class speaks
    needed = []
    if any(name not in ("self", "cls") for name in asked.parameters):
        needed.append("Args")
    if not inspect.isclass(value) and asked.return_annotation not in (None, "None", asked.empty):
        needed.append("Returns")
    if raises(value.__init__ if inspect.isclass(value) else value):
        needed.append("Raises")
    return [name for name in needed if not re.search(SECTIONS[name], documented, re.M)]


def raises(function: Any) -> bool:
    """Whether a function itself raises an error of the project."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return False  # made by `dataclass`
    raised = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)
    names = (ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in raised)
    return any(name.rpartition(".")[2] in PROJECT_ERRORS for name in names)


@pytest.mark.parametrize(
    ("documentation", "expected"),
    [
        ("Do it.", ["Args", "Returns", "Raises"]),
        ("Do it.\n\nArgs:\n    x: A number.\n\nReturns:\n    Another.", ["Raises"]),
        ("Do it.\n\nArgs:\n    x: A number.\n\nReturns:\n    Another.\n\nRaises:\n    ShapeError: Always.", []),
    ],
)
def test_a_docstring_that_lacks_a_section_is_found(documentation: str, expected: list[str]) -> None:
    def function(x: int) -> int:
        raise errors.ShapeError("no")

    function.__doc__ = documentation
    assert lacking(function) == expected


def test_public_docstrings_list_arguments_results_and_errors() -> None:
    found = [f"{name}: {', '.join(missing)}" for name, value in exported() if (missing := lacking(value))]
    assert found == []


def test_public_signatures_take_no_untyped_keywords() -> None:
    loose = []
    for name, value in exported():
        asked = signature(value)
        for parameter in () if asked is None else asked.parameters.values():
            typed = get_origin(parameter.annotation) is Unpack or "Unpack[" in str(parameter.annotation)
            if parameter.kind is parameter.VAR_KEYWORD and not typed:
                loose.append(f"{name}(**{parameter.name})")
    assert loose == []
