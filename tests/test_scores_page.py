"""The page on what scores mean shows what training again gives."""

import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_retrainings_is_what_the_script_finds() -> None:
    spec = importlib.util.spec_from_file_location("retraining", DOCS / "retraining.py")
    assert spec is not None
    assert spec.loader is not None
    retraining = importlib.util.module_from_spec(spec)
    sys.modules["retraining"] = retraining
    spec.loader.exec_module(retraining)
    shown = retraining.TABLE.search((DOCS / "scores.md").read_text())
    assert shown is not None
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown[0].strip().splitlines()[2:]]
    # the convex ones: a network's path may differ between machines in its last digits, which training magnifies
    found = [retraining.convex(1, 50), retraining.convex(20, 30), retraining.convex(200, 30)]
    assert [row[0] for row in rows[:3]] == [each.about for each in found]
    for row, each in zip(rows[:3], found, strict=True):
        assert float(row[1]) == pytest.approx(each.ranking, abs=2e-3)
        assert float(row[2]) == pytest.approx(each.slope, abs=2e-2)
    assert found[0].ranking > 0.99
    assert len(rows) == 6
