"""Runs every ```python block of the README and of the documentation, page by page, each page in an empty folder.

Two pages are followed with their files and commands instead: the tutorial by `make tutorial-test`, the other by
tests/test_tutorial.py.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_plugins = ["tests.timeouts"]
pytest.register_assert_rewrite("distinfluence.testing")


def _enter_folder(namespace: dict[str, Any]) -> None:
    namespace["_before"] = os.getcwd()
    namespace["_folder"] = TemporaryDirectory(prefix="distinfluence-docs-")
    os.chdir(namespace["_folder"].name)


def _leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    excludes=["docs/_build/**", "docs/tutorial.md", "docs/howto/own_model.md"],
    path=str(Path(__file__).parent),
    setup=_enter_folder,
    teardown=_leave_folder,
).pytest()
