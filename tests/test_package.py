"""The first minutes: what an import loads, which names there are, what a wheel holds."""

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

import pytest

import distinfluence

ROOT = Path(distinfluence.__file__).parents[1]
SLOW = ("torch", "dask", "distributed", "zarr", "tornado", "xarray", "pandas", "matplotlib", "pydantic")


def loaded_by(code: str, watched: Sequence[str] = SLOW) -> set[str]:
    """Which of the watched packages a fresh interpreter has loaded after this code."""
    code = f"{code}\nimport json, sys\nprint(json.dumps([m for m in {list(watched)!r} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_package_by_itself_loads_nothing_slow() -> None:
    assert not loaded_by("import distinfluence")


def test_a_model_in_memory_needs_torch_alone() -> None:
    names = "CgInfluence, EkfacInfluence, EmpiricalRisk, LanguageModelObjective, NystroemPreConditioner"
    assert loaded_by(f"from distinfluence import {names}") == {"torch"}


def test_whoever_opens_a_result_does_not_wait_for_torch() -> None:
    assert loaded_by("from distinfluence import open_influences") <= {"zarr", "tornado"}


def test_the_command_line_does_not_wait_for_torch_to_say_what_it_can_do() -> None:
    code = (
        "from click.testing import CliRunner\nfrom distinfluence.cli import main\nCliRunner().invoke(main, ['--help'])"
    )
    assert not loaded_by(code) & {"torch", "dask", "distributed", "xarray", "pandas", "matplotlib", "pydantic"}


def test_names_are_the_same_to_users_and_to_type_checkers() -> None:
    tree = ast.parse(Path(distinfluence.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {n.name: i.module for i in block.body if isinstance(i, ast.ImportFrom) for n in i.names}
    homes = {name: module for module, names in distinfluence._HOMES.items() for name in names}
    assert seen == homes
    assert sorted(homes) == distinfluence.__all__
    assert set(distinfluence.__all__) <= set(dir(distinfluence))
    for name in distinfluence.__all__:
        assert getattr(distinfluence, name).__name__ == name


def test_parts_are_found_without_an_import_of_their_own_and_what_is_none_is_named() -> None:
    code = "import distinfluence\nprint(distinfluence.errors.DistinfluenceError, distinfluence.store.Layout)"
    loaded_by(code)  # fails if it does not run
    with pytest.raises(AttributeError, match="'distinfluence' has no attribute 'Influence'"):
        distinfluence.Influence  # noqa: B018


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as it is built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)], check=True)
    (file,) = folder.glob("distinfluence-*.whl")
    return zipfile.ZipFile(file)


def test_a_wheel_holds_all_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "distinfluence"
    there = {
        str(file.relative_to(ROOT))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    assert names == there
    assert {"distinfluence/py.typed", "distinfluence/browse/page/index.html"} <= names
    assert {Path(name).suffix for name in names} <= {".py", ".typed", ".html", ".css", ".js", ".md", ".txt", ""}


def test_a_wheel_is_for_any_machine_and_says_what_it_needs(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "Tag: py3-none-any" in wheel.read(f"{info}/WHEEL").decode()
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == distinfluence.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) >= {"slurm", "cuda", "browse", "demo"}
    assert "distinfluence = distinfluence.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
