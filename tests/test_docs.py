"""What the pages and messages say can be done: names exist, links lead somewhere, files and commands are taken."""

import re
import tomllib
from pathlib import Path

import pytest

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
