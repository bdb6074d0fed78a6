"""What an import loads, and what a wheel holds: the first minutes of someone who has just installed the package."""

import ast
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import distinfluence
from tests.processes import finished

ROOT = Path(__file__).parents[1]
SLOW = ("dask", "distributed", "matplotlib", "pandas", "pydantic", "tornado", "torch", "xarray", "zarr")


def loaded_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after running `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"]
    return set(finished(command, check=True, cwd=ROOT).stderr.split())


HELP = "from distinfluence.cli import main\nmain(['--help'], standalone_mode=False)"


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("import distinfluence", set()),
        (HELP, set()),
        (HELP.replace("'--help'", "'run', '--help'"), set()),
        ("from distinfluence import DistinfluenceError", set()),
        ("from distinfluence import CgInfluence, EkfacPreConditioner, EmpiricalRisk, HessianOperator", {"torch"}),
        ("from distinfluence import open_influences", {"zarr"}),
        ("import distinfluence.app.summary", {"zarr"}),
    ],
)
def test_an_import_loads_only_what_it_needs(code: str, needed: set[str]) -> None:
    assert loaded_by(code) & set(SLOW) == needed


def test_the_page_is_loaded_by_no_import() -> None:
    assert not {m for m in loaded_by("from distinfluence import *") if m.startswith("distinfluence.browse")}


def test_every_public_name_is_found_listed_and_known_to_the_type_checker() -> None:
    tree = ast.parse(Path(str(distinfluence.__file__)).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: f"distinfluence.{module}" for name, module in distinfluence._HOMES.items()} == typed
    assert sorted(typed) == sorted(distinfluence.__all__)
    assert set(distinfluence.__all__) <= set(dir(distinfluence))
    assert [name for name in distinfluence.__all__ if getattr(distinfluence, name, None) is None] == []


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'distinfluence' has no attribute 'CGInfluence'"):
        getattr(distinfluence, "CGInfluence")  # noqa: B009


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    finished(command, cwd=ROOT, check=True)
    (made,) = folder.iterdir()
    return made


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(files.read(name).decode())


def test_a_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as files:
        held = {name for name in files.namelist() if ".dist-info/" not in name}
    kept = {".py", ".html", ".css", ".js", ".typed"}
    package = (
        path for path in (ROOT / "distinfluence").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    expected = {path.relative_to(ROOT).as_posix() for path in package if path.suffix in kept or path.name == "py.typed"}
    assert held == expected
    assert {"distinfluence/py.typed", "distinfluence/browse/page/index.html"} <= held


def test_a_wheel_is_for_every_platform_and_says_what_it_is(wheel: Path) -> None:
    assert wheel.name == f"distinfluence-{distinfluence.__version__}-py3-none-any.whl"
    found = metadata(wheel)
    assert found["Name"] == "distinfluence"
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert set(found.get_all("Provides-Extra", [])) == {"browse", "cuda", "demo", "docs", "slurm", "test", "texts"}
    assert "# distinfluence" in str(found.get_payload())
    with ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("entry_points.txt"))
        assert "distinfluence = distinfluence.cli:main" in files.read(name).decode()
