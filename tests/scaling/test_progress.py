"""Progress for people: lines where there is no terminal, and the seconds of each stage."""

import re

import pytest

from distinfluence.scaling import Progress, progress


def test_without_a_terminal_a_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Progress()
    with bars.stage("factors", 3, "test points") as bar:
        bar.advance(2)
        bar.note("5 passes")
        bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("factors: 3 of 3 test points, 5 passes, ")


def test_long_stages_say_where_they_are_and_do_not_repeat_themselves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress().stage("fit", None, "passes") as bar:
        bar.advance()
        bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(",")[0] for line in lines] == ["fit: 1 pass", "fit: 2 passes"]


def test_quiet_means_quiet_and_times_are_kept_also_of_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Progress(show=False)
    with pytest.raises(ValueError, match="on purpose"), bars.stage("strips", 2, "strips"):
        raise ValueError("on purpose")
    with bars.stage("strips", 2, "strips") as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""
    assert list(bars.seconds) == ["strips"]
    assert bars.seconds["strips"] > 0


def test_a_stage_that_counts_nothing_does_not_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress().stage("fit", None, "passes"):
        pass
    assert re.fullmatch(r"fit: \d+\.\d s\n", capsys.readouterr().err)
