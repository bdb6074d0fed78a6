"""Every script of examples/ finds what it says that it finds.

Their `main` runs in this process, which has torch already. Scripts that start processes themselves run as a user runs
them, but for what is imported already (`tests.preloaded`); one that says what it imports, in a fresh interpreter.
"""

import ast
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from distinfluence import open_influences
from tests.processes import finished

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))

# what a user of the script would type, but that its findings are printed as JSON at the end
RUN = """
import dataclasses, json, runpy, sys
from pathlib import Path
found = runpy.run_path(sys.argv[1])["main"](Path(sys.argv[2]))
print()
print(json.dumps(dataclasses.asdict(found) | {"modules": [m for m in sys.modules if "." not in m]}))
"""


@dataclass(frozen=True)
class Outcome:
    """findings: of the script; printed: all that it wrote."""

    findings: dict[str, Any]
    printed: str


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(name: str, out: Path) -> Outcome:
    """The script's `main`, in this process."""
    printed = io.StringIO()
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        found = script["main"](out)
    return Outcome(dataclasses.asdict(found), printed.getvalue())


def run_apart(name: str, out: Path, python: object = sys.executable) -> Outcome:
    """The script's `main`, in a process of its own."""
    done = finished([python, "-c", RUN, EXAMPLES / f"{name}.py", out], env=environment(), check=True)
    printed, _, findings = done.stdout.rstrip("\n").rpartition("\n")
    return Outcome(json.loads(findings), printed)


def beyond_chance(found: int, expected: float, drawn: int) -> bool:
    """Whether a count of `drawn` draws is five standard deviations above what chance gives."""
    return found > expected + 5 * math.sqrt(expected * (1 - expected / drawn))


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_wrong_labels_of_digits_are_found(tmp_path: Path) -> None:
    outcome = run("which_digits_are_mislabelled", tmp_path)
    for score in ("by_self_influence", "by_net_harm"):
        recall = outcome.findings[score]
        assert beyond_chance(recall["found"], recall["expected"], recall["inspected"])
        assert re.search(rf"{score.replace('_', '.')}\s+{recall['found']}\b", outcome.printed)
    assert is_picture(tmp_path / "mislabelled.png")


def test_sales_at_the_lake_set_a_price_there_and_changes_are_predicted(tmp_path: Path) -> None:
    found = run("which_houses_set_this_price", tmp_path).findings
    assert beyond_chance(found["n_lakeside"], found["expected"], 10)
    assert found["correlation"] > 0.99
    # to first order: a sale's own leverage, 8 parameters for 40 lakeside sales, is what is missing
    assert 1 - 8 / 40 < found["typical_ratio"] <= 1.01
    assert is_picture(tmp_path / "prices.png")


def test_a_class_is_lost_without_the_images_that_teach_it(tmp_path: Path) -> None:
    found = run("which_images_teach_this_class", tmp_path).findings
    assert beyond_chance(found["n_of_class"], found["expected"], 60)
    assert np.mean(found["loss_without_teachers"]) > max(found["loss_without_others"])
    assert open_influences(tmp_path / "teaching.zarr").complete
    assert is_picture(tmp_path / "teaching.png")


def test_the_passage_that_holds_a_continuation_is_among_the_first(tmp_path: Path) -> None:
    found = run("which_passages_taught_this_continuation", tmp_path).findings
    assert found["rank"] <= found["n_passages"] / 20
    assert found["difference"] < 1e-3  # float32 sums over 64 characters
    assert found["share_in_continuation"] > 2 * 11 / 64  # 11 of 64 characters
    assert is_picture(tmp_path / "passages.png")


def test_a_hugging_face_model_is_scored_with_padding_or_without(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = run("transformer_from_a_configuration", tmp_path).findings
    assert beyond_chance(found["n_found"], found["expected"], 8)
    assert found["n_parameters"] == found["n_in_model"]
    assert found["difference"] < 1e-3
    assert is_picture(tmp_path / "transformer.png")


def test_one_fit_serves_every_damping(tmp_path: Path) -> None:
    found = run("sweep_the_damping", tmp_path).findings
    assert all(beyond_chance(count, found["expected"], 100) for count in found["found"])
    assert found["difference"] < 1e-3  # both are solved to a residual of 1e-5
    assert found["passes"] < 2 * found["passes_of_one"]
    assert is_picture(tmp_path / "dampings.png")


def test_clusters_give_the_same_bits(tmp_path: Path, python: Path) -> None:
    script = EXAMPLES / "on_a_cluster.py"  # as a user calls it: workers read the file again
    done = finished([python, script, "--out", tmp_path], env=environment(), check=True)
    assert "All bits are equal." in done.stdout
    here, joined = (open_influences(tmp_path / f"{kind}.zarr") for kind in ("local", "address"))
    assert here.complete
    np.testing.assert_array_equal(here[:], joined[:])


def test_a_run_that_is_killed_twice_loses_no_strip(tmp_path: Path, python: Path) -> None:
    found = run_apart("killed_and_resumed", tmp_path, python).findings
    first, second = found["strips_at_kills"]
    assert 0 < first < second < found["n_strips"]
    assert found["remade"] == 0
    assert found["equal"]
    killed, undisturbed = (open_influences(tmp_path / f"{name}.zarr") for name in ("killed", "undisturbed"))
    np.testing.assert_array_equal(killed[:], undisturbed[:])


def test_a_result_is_read_without_distinfluence(tmp_path: Path) -> None:
    found = run_apart("read_with_xarray_alone", tmp_path).findings
    assert "distinfluence" not in found["modules"]
    assert "torch" not in found["modules"]
    result = open_influences(tmp_path / "digits.zarr")
    assert tuple(found["shape"]) == result.shape
    assert found["best"] == result.top(0, 5).indices.tolist()
    assert found["own_class_helps"] >= 9
    assert is_picture(tmp_path / "classes.png")
    with xarray.open_zarr(tmp_path / "digits.zarr", group="samples/train", consolidated=False) as samples:
        assert samples["label"].dims == ("train",)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_run_here_and_told_of_in_the_lists(name: str) -> None:
    tests = (ROOT / "tests" / "test_examples.py").read_text()
    assert f'run("{name}"' in tests or f'run_apart("{name}"' in tests or f'EXAMPLES / "{name}.py"' in tests
    assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text()
    assert f"{name}.py" in (ROOT / "docs" / "examples.md").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_asks_its_question_and_uses_public_names_alone(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    assert (ast.get_docstring(tree) or "").splitlines()[0].endswith("?")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distinfluence"):
            module = __import__(node.module or "", fromlist=["__all__"])
            public = getattr(module, "__all__", dir(module))
            assert {alias.name for alias in node.names} <= set(public)
