"""The order of the layers, what each may import, and that exports, documentation and contract tests go together."""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import distinfluence
from distinfluence import errors, solvers
from distinfluence.solvers import Solver
from distinfluence.testing import SolverForm
from tests.conftest import CLUSTERS, LONG
from tests.processes import finished
from tests.slurm.conftest import LONGEST, SHORTEST

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "distinfluence").rglob("*.py"))
PACKAGES = [file for file in FILES if file.endswith("__init__.py")]
PUBLIC = ("browse", "curvature", "evaluate", "influence", "scaling", "solvers", "store", "testing")
DOCUMENTED = ["distinfluence", *(f"distinfluence.{name}" for name in PUBLIC)]


@dataclass(frozen=True)
class Layer:
    """about: what it is, in a few words. files: patterns of module names below `distinfluence`.

    sees: other layers or modules that it may import. top: third parties. lazily: third parties that may be imported
    inside a function or for type checking only. docs/make_layers.py draws them.
    """

    about: str
    files: tuple[str, ...]
    sees: tuple[str, ...]
    top: frozenset[str] = frozenset()
    lazily: frozenset[str] = frozenset()


_CORE = ("atomic", "errors", "memory", "model", "curvature", "solvers", "influence")

LAYERS = {
    "atomic": Layer(about="files that appear whole", files=("atomic",), sees=()),
    "errors": Layer(about="what can go wrong", files=("errors",), sees=()),
    "memory": Layer(about="bytes held and bytes free", files=("memory",), sees=(), top=frozenset({"psutil", "torch"})),
    "store": Layer(
        about="the result on disk; fingerprints",
        files=(r"store(\..*)?",),
        sees=("atomic", "errors"),
        top=frozenset({"numpy", "zarr"}),
        lazily=frozenset({"fsspec", "pandas", "xarray"}),
    ),
    "model": Layer(
        about="the user's model, read-only: risk, gradients, layers",
        files=(r"model(\..*)?", r"layers(\..*)?"),
        sees=("atomic", "errors", "memory"),
        top=frozenset({"torch"}),
    ),
    "curvature": Layer(
        about="one file a matrix: products with rows",
        files=(r"curvature(\..*)?",),
        sees=("atomic", "errors", "memory", "model"),
        top=frozenset({"torch"}),
    ),
    "solvers": Layer(
        about="one file a method; knows no models and no data",
        files=(r"solvers(\..*)?",),
        sees=("atomic", "errors", "memory", "curvature.base"),
        top=frozenset({"torch"}),
    ),
    "influence": Layer(
        about="risk + blocks + curvature + solver; torch meets NumPy",
        files=(r"influence(\..*)?",),
        sees=("atomic", "errors", "memory", "model", "curvature", "solvers"),
        top=frozenset({"numpy", "torch"}),
    ),
    "scaling": Layer(
        about="chunks, plan, workers, clusters; no mathematics",
        files=(r"scaling(\..*)?",),
        sees=(*_CORE, "store"),
        top=frozenset({"cloudpickle", "dask", "distributed", "numpy", "psutil", "torch", "tornado", "tqdm", "zarr"}),
        lazily=frozenset({"dask_cuda", "dask_jobqueue"}),
    ),
    "evaluate": Layer(
        about="what the scores are worth",
        files=(r"evaluate(\..*)?",),
        sees=(*_CORE, "store", "scaling"),
        top=frozenset({"cloudpickle", "distributed", "numpy", "torch", "zarr"}),
        lazily=frozenset({"bm25s", "safetensors"}),
    ),
    "testing": Layer(
        about="contracts of solvers and operators, for tests",
        files=(r"testing(\..*)?",),
        sees=("errors", "curvature", "solvers"),
        top=frozenset({"pytest", "torch"}),
    ),
    "package": Layer(about="the public names", files=("",), sees=(*_CORE, "store", "scaling", "evaluate")),
    "browse": Layer(
        about="tables, plots, the page; sees only the result",
        files=(r"browse(\..*)?",),
        sees=("atomic", "errors", "store"),
        top=frozenset({"click", "jinja2", "numpy", "tornado"}),
        lazily=frozenset({"matplotlib", "pandas", "pyarrow"}),
    ),
    "application": Layer(
        about="job files and the command line",
        files=(r"app(\..*)?", "cli", "__main__"),
        sees=(*_CORE, "store", "scaling", "evaluate", "package", "browse"),
        top=frozenset({"click", "distributed", "numpy", "pydantic", "ruamel", "torch"}),
        lazily=frozenset({"matplotlib", "sklearn"}),
    ),
}


@dataclass(frozen=True)
class Import:
    """module: its full name. lazy: inside a function, or for type checking only."""

    module: str
    lazy: bool
    line: int


def module_of(file: str) -> str:
    """`distinfluence/store/format/layout.py` → `store.format.layout`; a package's `__init__` → the package."""
    parts = Path(file).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts and parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    return next((name for name, layer in LAYERS.items() if any(re.fullmatch(p, module) for p in layer.files)), None)


def exists(module: str) -> bool:
    path = ROOT / "distinfluence" / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from package import name` imports a module if there is one of that name
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                ours = module.split(".")[0] == "distinfluence" and exists(inner.partition(".")[2])
                yield Import(inner if ours else module, lazy, node.lineno)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            yield from imports(node, lazy or inside or typing_only)


def violations(file: str, source: str) -> list[str]:
    """What in the source of this file breaks the order of the layers, one sentence each."""
    own = layer_of(module_of(file))
    if own is None:
        return [f"{file}: belongs to no layer; name it in LAYERS"]
    layer = LAYERS[own]
    found = []
    for each in imports(ast.parse(source)):
        where = f"{file}:{each.line}: {own}"
        top, _, inner = each.module.partition(".")
        if top == "distinfluence":
            other = layer_of(inner)
            if other is None or (other != own and other not in layer.sees and inner not in layer.sees):
                found.append(f"{where} must not import {each.module}")
        elif top == "":
            found.append(f"{where} must import by the full name, not {each.module}")
        elif top not in sys.stdlib_module_names and top not in layer.top | {"typing_extensions"}:
            if top not in layer.lazily:
                found.append(f"{where} must not import {each.module}")
            elif not each.lazy:
                found.append(f"{where} must import {each.module} inside the function that needs it")
    return found


def test_the_drawing_of_the_layers_is_theirs() -> None:
    spec = importlib.util.spec_from_file_location("make_layers", ROOT / "docs" / "make_layers.py")
    assert spec is not None
    assert spec.loader is not None
    make_layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_layers)
    assert make_layers.DRAWING.read_text() == make_layers.draw(LAYERS), "run: python docs/make_layers.py"


def unsafe(file: str, source: str) -> list[str]:
    """Uses of what can run code that came with the data."""
    tree = ast.parse(source)
    modules = {"dill", "joblib", "marshal", "pickle", "shelve"}
    modules |= {"yaml"} | (
        {"ruamel"} if file != "distinfluence/app/yaml_file.py" else set()
    )  # one reader, in one place
    found = [f"{file}:{i.line}: {i.module}" for i in imports(tree) if i.module.partition(".")[0] in modules]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile", "__import__"):
            found.append(f"{file}:{node.lineno}: {node.func.id}")
        settings = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        if settings.get("allow_pickle", "False") != "False" or settings.get("weights_only", "True") != "True":
            found.append(f"{file}:{node.lineno}: unpickles")
        if ast.unparse(node.func) == "torch.load" and "weights_only" not in settings:
            found.append(f"{file}:{node.lineno}: torch.load without weights_only=True")
        if ast.unparse(node.func) == "YAML" and (settings.get("typ"), settings.get("pure")) != ("'safe'", "True"):
            found.append(f"{file}:{node.lineno}: YAML without typ='safe', pure=True")
    return found


_STARTS = {"subprocess": ("run", "Popen", "call", "check_call", "check_output"), "os": ("system", "popen")}
_MAY_START = (
    "tests/processes.py",
    "tests/preloaded.py",
    "tests/steps.py",
    "tests/slurm/host.py",
    "tests/first_minutes.py",
)


def processes_of_its_own(file: str, source: str) -> list[str]:
    """Uses of what starts a process, whatever the module or the function is called there; annotations are none."""
    tree = ast.parse(source)
    modules = {"subprocess": "subprocess", "os": "os"}  # by the name that they have in this file
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in _STARTS}
        elif isinstance(node, ast.ImportFrom) and node.module in _STARTS:
            names = [alias.name for alias in node.names if alias.name in (*_STARTS[node.module], "*")]
            found += [f"{file}:{node.lineno}: from {node.module} import {name}" for name in names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and node.attr in _STARTS[module]:
                found.append(f"{file}:{node.lineno}: {module}.{node.attr}")
    return found


def read(file: str) -> str:
    return (ROOT / file).read_text()


def test_files_import_only_what_their_layers_may() -> None:
    assert [found for file in FILES for found in violations(file, read(file))] == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (
            "solvers/new.py",
            "from distinfluence.model.risk import EmpiricalRisk",
            "must not import distinfluence.model.risk",
        ),
        ("solvers/new.py", "from distinfluence.curvature import ggn", "must not import distinfluence.curvature"),
        ("influence/new.py", "def f():\n    import distinfluence.store", "must not import distinfluence.store"),
        ("influence/new.py", "import dask.array as da", "influence must not import dask.array"),
        ("store/new.py", "import torch", "store must not import torch"),
        ("store/new.py", "import xarray", "must import xarray inside the function"),
        ("curvature/new.py", "from distinfluence import EmpiricalRisk", "curvature must not import distinfluence"),
        ("scaling/new.py", "from distinfluence import cli", "scaling must not import distinfluence.cli"),
        ("scaling/new.py", "from .chunks import ChunkedData", "must import by the full name"),
        ("errors.py", "import numpy", "errors must not import numpy"),
        ("app/new.py", "from sklearn.datasets import load_digits", "must import sklearn.datasets inside the function"),
        ("new.py", "import math", "belongs to no layer"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str, expected: str) -> None:
    (found,) = violations(f"distinfluence/{file}", source)
    assert expected in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("solvers/new.py", "import math\nimport torch\nfrom distinfluence.curvature.base import MatrixOperator"),
        ("store/new.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import xarray"),
        ("app/new.py", "def picture():\n    from matplotlib.figure import Figure"),
        ("cli.py", "import click\nimport distinfluence"),
    ],
)
def test_an_allowed_import_is_no_violation(file: str, source: str) -> None:
    assert violations(f"distinfluence/{file}", source) == []


def test_nothing_unpickles_or_evaluates_what_it_reads() -> None:
    assert [found for file in FILES if "/testing/" not in file for found in unsafe(file, read(file))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "eval('1')",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import yaml",
        "from ruamel.yaml import YAML",
        "YAML()",
        "YAML(typ='unsafe', pure=True)",
    ],
)
def test_an_unsafe_read_is_found(source: str) -> None:
    assert len(unsafe("distinfluence/new.py", source)) == 1


def test_processes_of_tests_are_started_where_they_are_ended_too() -> None:
    paths = (path for path in (ROOT / "tests").rglob("*.py") if ROOT / "tests" / "benchmarks" not in path.parents)
    files = sorted({path.relative_to(ROOT).as_posix() for path in paths} - set(_MAY_START))
    found = [each for file in files for each in processes_of_its_own(file, read(file))]
    assert found == [], "use `started` or `finished` of tests/processes.py"


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(['true'])",
        "import subprocess\nwith subprocess.Popen(['true']) as process: pass",
        "import subprocess as sp\ndef f():\n    return sp.check_output(['true'])",
        "import subprocess\nrun = subprocess.call",
        "from subprocess import PIPE, check_call",
        "import os\nos.system('true')",
        "def f():\n    from os import popen",
    ],
)
def test_a_process_that_a_test_starts_by_itself_is_found(source: str) -> None:
    assert len(processes_of_its_own("tests/test_new.py", source)) == 1


def test_the_tests_that_start_first_are_there() -> None:
    """A file or a test that is renamed would otherwise lose its place, and chaos would run beside other chaos."""
    assert [file for file in (*CLUSTERS, *LONG) if not (ROOT / "tests" / file).is_file()] == []
    slurm = "".join(path.read_text() for path in (ROOT / "tests" / "slurm").glob("test_*.py"))
    names = re.findall(r"^def (test_\w+)", slurm, re.MULTILINE)
    assert [part for part in (*LONGEST, *SHORTEST) if not any(part in name for name in names)] == []


def test_names_of_subprocess_that_start_nothing_may_be_used() -> None:
    source = """
import os, subprocess
from subprocess import TimeoutExpired
def f(process: "subprocess.Popen[str]") -> None:
    with started(["true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ): pass
    raise subprocess.CalledProcessError(1, "true")
"""
    assert processes_of_its_own("tests/test_new.py", source) == []


def test_every_module_says_what_is_in_it() -> None:
    assert [file for file in FILES if not ast.get_docstring(ast.parse(read(file)))] == []


def test_no_file_is_named_for_what_it_is_not_about() -> None:
    assert not [file for file in FILES if Path(file).stem in ("common", "helpers", "misc", "util", "utils")]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_package_lists_its_public_names_in_order_and_has_them(name: str) -> None:
    package = importlib.import_module(name)
    names = list(package.__all__)
    assert sorted(set(names), key=_as_ruff_sorts) == names
    assert [name for name in names if not hasattr(package, name)] == []


def test_other_folders_export_nothing() -> None:
    public = {f"{name.replace('.', '/')}/__init__.py" for name in DOCUMENTED}
    assert [file for file in PACKAGES if file not in public and "__all__" in read(file)] == []


def _as_ruff_sorts(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, each by the alphabet: an isort-style sort, as the linter wants it."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def reference() -> set[str]:
    """The names that autodoc documents, without their module."""
    text = read("docs/reference.md")
    return {match.rpartition(".")[2] for match in re.findall(r"^\.\. auto\w+:: (distinfluence[\w.]*)$", text, re.M)}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert set(importlib.import_module(name).__all__) - reference() == set()


def test_every_error_is_in_the_reference() -> None:
    raised = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert raised - reference() == set()


def exported_solvers() -> list[str]:
    public = {name: getattr(solvers, name) for name in solvers.__all__}
    return [n for n, s in public.items() if inspect.isclass(s) and issubclass(s, Solver) and not inspect.isabstract(s)]


def solvers_under_contract() -> set[str]:
    """The classes that a test class of tests/solvers which inherits the contract, or its form, has as its `solver`."""
    found = set()
    for path in (ROOT / "tests" / "solvers").glob("test_*.py"):
        module = importlib.import_module(f"tests.solvers.{path.stem}")
        for name, test in inspect.getmembers(module, inspect.isclass):
            if name.startswith("Test") and issubclass(test, SolverForm):
                found.add(type(test.solver).__name__)
    return found


@pytest.mark.parametrize("name", exported_solvers())
def test_every_solver_has_a_contract_test(name: str) -> None:
    assert name in solvers_under_contract()


@pytest.mark.parametrize("name", exported_solvers())
def test_every_solver_has_a_docs_page(name: str) -> None:
    pages = (ROOT / "docs" / "solvers").glob("*.md")
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in pages)


def test_the_package_is_typed_and_has_a_version() -> None:
    assert (ROOT / "distinfluence" / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", distinfluence.__version__)


def test_every_python_block_of_the_docs_is_run() -> None:
    followed = {ROOT / "docs" / page for page in ("tutorial.md", "howto/own_model.md")}  # as conftest.py says
    pages = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - followed)]
    written = {
        page.relative_to(ROOT).as_posix(): len(re.findall(r"^```python$", page.read_text(), re.MULTILINE))
        for page in pages
    }
    command = [sys.executable, "-m", "pytest", "README.md", "docs", "--collect-only", "-q", "-p", "no:cacheprovider"]
    collected = finished(command, cwd=ROOT, check=True).stdout
    run = Counter(re.findall(r"^(.*?)::line:", collected, re.MULTILINE))
    assert dict(run) == {page: count for page, count in written.items() if count}
