"""What the pages and messages say can be done: names exist, links lead somewhere, files and commands are taken."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import distinfluence
from distinfluence import EkfacInfluence, InfluenceResult
from distinfluence.app.config import Job
from distinfluence.app.sections import ClusterSection
from distinfluence.app.yaml_file import read_yaml
from distinfluence.cli import main as command_line
from distinfluence.scaling import InfluenceCalculator

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / "examples").glob("*.md"),
    *(ROOT / "deploy").rglob("*.md"),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_has_one_install_is_in_the_checkout_or_a_package(page: Path) -> None:
    for line in re.findall(r"pip install (.*)", page.read_text()):
        assert "distinfluence" not in line, "a checkout installs `.`, whatever an index may hold under the name"
        for extra in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(EXTRAS)


def test_an_error_has_one_install_packages_that_the_extras_know() -> None:
    known = {re.split(r"[><=;\[ ]", package)[0] for extra in EXTRAS.values() for package in extra}
    named = {
        package.strip("'\"").partition(">")[0]
        for file in (ROOT / "distinfluence").rglob("*.py")
        for line in re.findall(r"pip install ([^\"`,\n]+?)\.?[\"`,]", file.read_text())
        for package in line.split()
    }
    assert {"dask-jobqueue", "matplotlib", "scikit-learn", "xarray"} <= named
    assert named - known <= {"aiohttp", "bokeh", "fsspec", "s3fs"}, "what no extra brings"


PLACEHOLDERS: dict[str, type] = {
    "influence": EkfacInfluence,
    "calculator": InfluenceCalculator,
    "result": InfluenceResult,
}


def written_as_calls(page: str) -> list[str]:
    """The code in the last column of the tables of a page for who comes from elsewhere, and in its "here" cells."""
    rows = re.findall(r"^\|.*\| (.*) \|$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    return [code for cell in rows for code in re.findall(r"`([^`]+)`", cell)]


def unknown_in(code: str) -> list[str]:
    """Names, methods and keywords in an expression that distinfluence does not have."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []  # a formula, not code
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            found += [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = PLACEHOLDERS.get(node.value.id) or getattr(distinfluence, node.value.id, None)
            if owner is None or not hasattr(owner, node.attr):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call):
            called = called_by(node.func)
            known = set(inspect.signature(called).parameters) if called is not None else set()
            found += [f"{ast.unparse(node.func)}({k.arg}=)" for k in node.keywords if k.arg not in known]
            if called is None:
                found.append(ast.unparse(node.func))
    return found


def called_by(func: ast.expr) -> Callable[..., object] | None:
    if isinstance(func, ast.Name):
        return getattr(distinfluence, func.id, None)
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        return getattr(PLACEHOLDERS.get(func.value.id), func.attr, None)
    return None


@pytest.mark.parametrize("page", ["from_pydvl.md", "from_kronfluence.md"])
def test_what_is_called_how_here_exists(page: str) -> None:
    calls = [code for code in written_as_calls(page) if "(" in code]
    assert len(calls) > 15
    assert {code: unknown_in(code) for code in calls if unknown_in(code)} == {}


def test_a_name_that_does_not_exist_is_found() -> None:
    assert unknown_in("CgInfluence(..., preconditioner=JacobiPreconditioner(10))") == [
        "CgInfluence(preconditioner=)",
        "JacobiPreconditioner",
    ]
    assert unknown_in("influence.explore(...)") == ["influence.explore", "influence.explore"]
    assert unknown_in("CgInfluence(..., pre_conditioner=JacobiPreConditioner(10))") == []


def slug(heading: str) -> str:
    """As GitHub and the site name a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_link_inside_is_dead(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if file.suffix == ".md" else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            dead.append(target)
    assert dead == []


def blocks(kind: str) -> list[tuple[str, str]]:
    """Page and content of every block of a kind."""
    found = re.compile(rf"^```{kind}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(name_of(page), content) for page in PAGES for content in found.findall(page.read_text())]


YAML = [*blocks("yaml"), *((name_of(f), f.read_text()) for f in (ROOT / "deploy").rglob("*.yaml"))]


@pytest.mark.parametrize(("page", "content"), YAML, ids=[f"{page}-{i}" for i, (page, _) in enumerate(YAML)])
def test_a_job_or_cluster_file_that_is_shown_is_taken(page: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(content)
    shown = read_yaml(file, "file").content
    if "kind" in shown:
        ClusterSection.read(file).spec()
    elif "model" not in shown:  # lines of a cluster's settings
        ClusterSection.model_validate({"kind": "slurm", "workers": 1, "settings": shown})
    else:
        Job.read(file).cluster_spec()


def commands() -> list[tuple[str, str]]:
    """Page and line of every command in the blocks for a shell, without comments and prompts."""
    shown = [*blocks("bash"), *blocks("console")]
    lines = ((page, line) for page, content in shown for line in content.splitlines())
    return [(page, line.partition(" #")[0].removeprefix("$ ").strip()) for page, line in lines]


DISTINFLUENCE = [(page, line) for page, line in commands() if line.startswith("distinfluence ")]


@pytest.mark.parametrize(("page", "line"), DISTINFLUENCE)
def test_a_command_that_is_shown_is_one(page: str, line: str) -> None:
    name, *given = shlex.split(line)[1:]
    command = command_line.commands[name]
    context = click.Context(command, info_name=name)
    values, left, _ = command.make_parser(context).parse_args(given)
    assert left == []
    for parameter in command.params:
        value = values.get(str(parameter.name))
        assert value is not None or not parameter.required, f"{parameter.name} is missing"
        given_here = isinstance(value, (str, list, tuple))  # else it is what click takes for left out
        if given_here and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, value)


def test_scripts_modules_and_targets_of_make_that_are_shown_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing = []
    for page, line in commands():
        made = re.match(r"make ([a-z-]+)", line)
        module = re.search(r"python -m (tests[\w.]*)", line)
        script = re.search(r"python ((?:docs|examples)/\w+\.py)", line)
        job = re.match(r"sbatch .*?(\w+\.sbatch)", line)
        missing += [f"{page}: {line}"] * (
            bool(made and made[1] not in targets)
            or bool(module and importlib.util.find_spec(module[1]) is None)
            or bool(script and not (ROOT / script[1]).is_file())
            or bool(job and not (ROOT / "deploy" / "slurm" / job[1]).is_file())
        )
    assert missing == []


def test_what_the_pages_import_is_in_the_reference() -> None:
    listed = set(re.findall(r"^\.\. auto\w+:: (distinfluence[\w.]*)$", (ROOT / "docs/reference.md").read_text(), re.M))
    imported = {
        f"{node.module}.{alias.name}"
        for _, content in blocks("python")
        for node in ast.walk(ast.parse(content))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("distinfluence")
        for alias in node.names
    }
    assert imported - listed == set()
    assert len(imported) > 30
