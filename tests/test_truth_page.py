"""The tables of the truth page: whole, within their tolerances, and what a slice of their script gives again."""

import re

import pytest

from tests.benchmarks.truth import __main__ as truth
from tests.benchmarks.truth import dense, peers, retraining
from tests.benchmarks.truth.cases import NAMES
from tests.benchmarks.truth.questions import Defect
from tests.influence import test_truth as convex


def written(name: str) -> str:
    return (truth.TABLES / f"{name}.md").read_text()


def rows(name: str) -> list[list[str]]:
    """The cells of a table's lines, without heads and rules."""
    text = written(name)
    return [cells_of(line) for line in text.splitlines() if line.startswith("|") and "---" not in line]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


Tables = dict[tuple[str, str], dict[tuple[str, str], str]]


@pytest.fixture(scope="module")
def tables() -> Tables:
    """(dtype, title) → (kind of layer, method) → what the page says."""
    parts = re.split(r"^\*\*(\w+), ([\w ]+)\*\*$", written("dense"), flags=re.MULTILINE)
    found: Tables = {}
    for dtype, title, table in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        head, *lines = [cells_of(line) for line in table.splitlines() if line.startswith("| ")]
        found[dtype, title] = {
            (name, method): cell for name, *cells in lines for method, cell in zip(head[1:], cells, strict=True)
        }
    return found


PERTURBATION, OWN = "perturbation mode on the ggn", "matrices of their own"


def test_the_dense_tables_are_whole_and_within_their_tolerances(tables: Tables) -> None:
    titles = [*(mode.replace("_", " ") for mode in dense.MODES), PERTURBATION, OWN]
    assert list(tables) == [(dtype, title) for dtype in dense.TOLERANCES for title in titles]
    for (dtype, title), cells in tables.items():
        methods = dense.OWN if title == OWN else dense.SOLVERS
        assert list(cells) == [(name, method) for name in (*NAMES, "*tolerance*") for method in methods]
        for (name, method), cell in cells.items():
            tolerance = dense.TOLERANCES[dtype][method]
            if name == "*tolerance*":
                assert float(cell) == tolerance
            elif cell != dense.NONE:
                assert float(cell) <= tolerance, (dtype, title, name, method)


def test_cells_without_a_number_are_those_that_cannot_have_one(tables: Tables) -> None:
    empty = {
        (title, *cell) for (_, title), cells in tables.items() for cell, text in cells.items() if text == dense.NONE
    }
    assert empty == {
        *(("hessian", name, "nyström") for name in NAMES),
        *((PERTURBATION, "embedding and layer norm", method) for method in dense.SOLVERS),
        (OWN, "batch norm and dropout in eval mode", "ekfac"),
    }


def agree(error: float | None, said: str, tolerance: float) -> None:
    """What comes is within the tolerance, and about what the page says."""
    assert error is not None
    assert error <= tolerance
    # rounding differs from processor to processor, what an iteration leaves does not by more than this
    assert error <= max(10 * float(said), 0.01 * tolerance)
    assert float(said) <= max(10 * error, 0.01 * tolerance)


@pytest.mark.parametrize(
    ("dtype", "mode", "name", "solver"),
    [
        ("float64", "hessian", "mlp classification", "direct"),
        ("float64", "ggn", "tied weights", "cg"),
        ("float64", "hessian", "a module called twice", "row cg"),
        ("float64", "ggn", "conv2d, two groups", "nyström"),
        ("float32", "empirical_fisher", "mlp regression", "krylov"),
        ("float32", "ggn", "mlp classification", "lissa"),
    ],
)
def test_a_slice_of_the_dense_tables_comes_out_again(
    tables: Tables, dtype: str, mode: str, name: str, solver: str
) -> None:
    error = dense.error_of(solver, mode, name, dtype)
    agree(error, tables[dtype, mode.replace("_", " ")][name, solver], dense.TOLERANCES[dtype][solver])


@pytest.mark.parametrize(("dtype", "name", "solver"), [("float64", "mlp regression", "direct")])
def test_derivatives_by_inputs_come_out_again(tables: Tables, dtype: str, name: str, solver: str) -> None:
    error = dense.perturbation_error_of(solver, "ggn", name, dtype)
    agree(error, tables[dtype, PERTURBATION][name, solver], dense.TOLERANCES[dtype][solver])


def test_token_ids_have_no_derivatives_and_are_refused() -> None:
    assert dense.perturbation_error_of("direct", "ggn", "embedding and layer norm", "float64") is None


@pytest.mark.parametrize(
    ("dtype", "name", "method"),
    [
        ("float64", "conv3d", "ekfac"),
        ("float64", "mlp regression", "kfac"),
        ("float32", "torch's rms norm", "ekfac, empirical"),
        ("float64", "mlp classification", "datainf"),
    ],
)
def test_methods_with_matrices_of_their_own_come_out_again(tables: Tables, dtype: str, name: str, method: str) -> None:
    error = dense.own_error_of(method, name, dtype)
    agree(error, tables[dtype, OWN][name, method], dense.TOLERANCES[dtype][method])


def test_the_page_names_the_tolerances() -> None:
    page = " ".join((truth.TABLES.parent / "truth.md").read_text().split())
    wide, single = dense.TOLERANCES["float64"], dense.TOLERANCES["float32"]
    assert f"factorisations have {_said(wide['direct'])} in float64 and iterations that end" in page
    assert f"1e-10 have {_said(wide['cg'])}. LiSSA ends at 1e-6 and has {_said(wide['lissa'])}" in page
    assert set(single.values()) == {single["direct"], single["cg"]}
    assert (
        f"factorisations have {_said(single['direct'])} and iterations, LiSSA included, {_said(single['cg'])}" in page
    )


def _said(tolerance: float) -> str:
    return f"{tolerance:.0e}".replace("e-0", "e-")


def test_the_retraining_table_is_what_training_again_gives() -> None:
    head, weight, rank, slope = rows("retraining")
    assert head[2:] == ["direct", "cg"]
    matrix = convex.influence_matrix("direct")
    assert retraining.reweighting_error(matrix) <= 1e-6
    assert max(map(float, weight[2:])) <= 1e-6
    left = retraining.leaving_out()
    found = float((left * matrix).sum() / (matrix * matrix).sum()) * convex.N
    assert [float(cell) for cell in slope[2:]] == pytest.approx([found, found], abs=2e-3)
    assert min(map(float, rank[2:])) >= 0.99


def test_the_peers_table_has_a_row_for_each_question_and_ours_are_right() -> None:
    head, *lines = rows("peers")
    assert head == ["peer", "question", "right", "it returns", "ours"]
    asked = [(peer, defect) for peer, defects in peers.DEFECTS.items() for defect in defects]
    assert len(lines) == len(asked)
    for (peer, defect), line in zip(asked, lines, strict=True):
        assert line[0].lower().startswith(peer)
        assert line[1:3] == [defect.question, defect.right]
        assert line[3]


@pytest.mark.parametrize("defect", [d for defects in peers.DEFECTS.values() for d in defects], ids=lambda d: d.question)
def test_ours_is_right_and_as_the_page_says(defect: Defect) -> None:
    ours = defect.ours()
    assert_right(ours, defect)
    said = next(line[4] for line in rows("peers") if line[1] == defect.question)
    assert_right(said, defect)


def assert_right(text: str, defect: Defect) -> None:
    if within := re.fullmatch(r"(.*)≤ (\S+)", defect.right):
        assert text.startswith(within[1])
        assert float(text.removeprefix(within[1])) <= float(within[2])
    elif between := re.fullmatch(r"(\S+) to (\S+)", defect.right):
        assert float(between[1]) <= float(text) <= float(between[2])
    else:
        assert defect.right.startswith(text) and text
