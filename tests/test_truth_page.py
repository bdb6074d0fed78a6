"""The tables of the truth page: whole, within their tolerances, and what a slice of their script gives again."""

import re

import pytest

from tests.benchmarks.__main__ import NOT_RUN
from tests.benchmarks.truth import __main__ as truth
from tests.influence import test_truth as convex
from tests.zoo import BUILDERS


def written(name: str) -> str:
    text = (truth.TABLES / f"{name}.md").read_text()
    if text.startswith(NOT_RUN):
        pytest.skip(f"the table {name} has not been made yet")
    return text


def rows(name: str) -> list[list[str]]:
    """The cells of a table's lines, without heads and rules."""
    text = written(name)
    return [cells_of(line) for line in text.splitlines() if line.startswith("|") and "---" not in line]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def dense_cells() -> dict[tuple[str, str, str, str], float]:
    """(dtype, mode, case, solver) → what the page says."""
    text = written("dense")
    parts = re.split(r"^\*\*(\w+), ([\w ]+)\*\*$", text, flags=re.MULTILINE)
    found = {}
    for dtype, mode, table in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        lines = [cells_of(line) for line in table.splitlines() if line.startswith("| ")]
        for name, *cells in lines[1:]:
            for solver, cell in zip(lines[0][1:], cells, strict=True):
                found[dtype, mode.replace(" ", "_"), name, solver] = float(cell)
    return found


def test_the_dense_tables_are_whole_and_within_their_tolerances() -> None:
    cells = dense_cells()
    names = [*BUILDERS, "*tolerance*"]
    assert set(cells) == {
        (dtype, mode, name, solver)
        for dtype in truth.TOLERANCES
        for mode in truth.MODES
        for name in names
        for solver in truth.SOLVERS
    }
    for (dtype, mode, name, solver), error in cells.items():
        assert error <= truth.TOLERANCES[dtype][solver], (dtype, mode, name, solver)
        assert cells[dtype, mode, "*tolerance*", solver] == truth.TOLERANCES[dtype][solver]


@pytest.mark.parametrize(
    ("dtype", "mode", "name", "solver"),
    [
        ("float64", "hessian", "mlp classification", "direct"),
        ("float64", "ggn", "tied weights", "cg"),
        ("float32", "empirical_fisher", "mlp regression", "krylov"),
        ("float32", "ggn", "mlp classification", "lissa"),
    ],
)
def test_a_slice_of_the_dense_tables_comes_out_again(dtype: str, mode: str, name: str, solver: str) -> None:
    error = truth.error_of(solver, mode, name, dtype)
    assert error <= truth.TOLERANCES[dtype][solver]
    said = dense_cells()[dtype, mode, name, solver]
    # rounding differs from processor to processor, what an iteration leaves does not by more than this
    assert error <= max(10 * said, 0.01 * truth.TOLERANCES[dtype][solver])
    assert said <= max(10 * error, 0.01 * truth.TOLERANCES[dtype][solver])


def test_the_retraining_table_is_what_training_again_gives() -> None:
    head, weight, rank, slope = rows("retraining")
    assert head[2:] == ["direct", "cg"]
    matrix = convex.influence_matrix("direct")
    assert truth.reweighting_error(matrix) <= 1e-6
    assert max(map(float, weight[2:])) <= 1e-6
    left = truth.leaving_out()
    found = float((left * matrix).sum() / (matrix * matrix).sum()) * convex.N
    assert [float(cell) for cell in slope[2:]] == pytest.approx([found, found], abs=2e-3)
    assert min(map(float, rank[2:])) >= 0.99


def test_the_peers_table_has_a_row_for_each_question_and_ours_are_right() -> None:
    head, *lines = rows("peers")
    assert head == ["peer", "question", "right", "it returns", "ours"]
    asked = [(peer, defect) for peer, defects in truth.DEFECTS.items() for defect in defects]
    assert len(lines) == len(asked)
    for (peer, defect), line in zip(asked, lines, strict=True):
        assert line[0].lower().startswith(peer)
        assert line[1:3] == [defect.question, defect.right]
        assert line[3]


@pytest.mark.parametrize("defect", [d for defects in truth.DEFECTS.values() for d in defects], ids=lambda d: d.question)
def test_ours_is_right_and_as_the_page_says(defect: truth.Defect) -> None:
    ours = defect.ours()
    assert_right(ours, defect)
    said = next(line[4] for line in rows("peers") if line[1] == defect.question)
    assert_right(said, defect)


def assert_right(text: str, defect: truth.Defect) -> None:
    if bound := re.fullmatch(r"error ≤ (\S+)", defect.right):
        assert float(text.removeprefix("error ")) <= float(bound[1])
    else:
        assert text.split()[0] == defect.right.split()[0]
