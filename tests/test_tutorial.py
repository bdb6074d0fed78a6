"""A page that takes a reader by the hand, followed to the letter. `make tutorial-test` follows the tutorial."""

from pathlib import Path

import pytest

from tests.walkthrough import follow, same

DOCS = Path(__file__).parents[1] / "docs"


def test_a_model_of_ones_own_becomes_a_job_as_the_page_says(tmp_path: Path) -> None:
    steps = list(follow(DOCS / "howto" / "own_model.md", tmp_path))
    wrong = [f"{s.done}\n--- the page shows\n{s.shown}\n--- came\n{s.came}" for s in steps if not s.agrees]
    assert not wrong, "\n\n".join(wrong)
    assert "20 of 20 rows converged" in steps[-1].came


@pytest.mark.parametrize(
    ("shown", "came", "agree"),
    [
        ("6 of 6 strips, 0.3 s", "6 of 6 strips, 12.1 s", True),
        ("6 of 6 strips, 0.3 s", "5 of 6 strips, 0.3 s", False),
        ("loss -1.234", "loss -1.236", True),
        ("loss -1.234", "loss 1.234", False),
        ("residual 3.1e-15", "residual 7.0e-15", True),
        ("residual 3.1e-15", "residual 3.1e-01", False),
        ("…\nstopped", "anything\nat all\nstopped", True),
        ("…\nstopped", "anything\nat all", False),
        ("state: complete", "state: running", False),
    ],
)
def test_what_differs_between_machines_is_let_pass_and_nothing_else(shown: str, came: str, agree: bool) -> None:
    assert same(shown, came) is agree
