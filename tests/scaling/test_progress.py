"""Progress for people: lines where there is no terminal, and the seconds of each stage."""

import os
import re
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from distinfluence.scaling import Progress, progress
from distinfluence.store.run_state import RunState, pace_of, read_runs
from tests.processes import started


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


def test_lines_say_how_fast_and_how_long_still(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    own = SimpleNamespace(monotonic=lambda: float(next(clock)), perf_counter=time.perf_counter, time=time.time)
    monkeypatch.setattr(progress, "time", own)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress().stage("strips", 100, "strips") as bar:
        bar.advance(10)
    first = capsys.readouterr().err.splitlines()[0]
    found = re.fullmatch(r"strips: 10 of 100 strips, (\d\.\d) a second, about (\d+) s left, (\d+)\.0 s", first)
    assert found is not None, first
    rate, left = float(found[1]), float(found[2])
    assert left == pytest.approx(90 / rate, abs=1)


def test_a_pace_is_said_in_units_that_people_use() -> None:
    assert pace_of(0, 10, 1.0) == pace_of(5, None, 1.0) == ""
    assert pace_of(5, 10, 2.0) == "2.5 a second, about 2 s left"
    assert pace_of(10, 10, 5.0) == "2.0 a second"
    assert pace_of(1, 101, 60.0) == "60.0 s each, about 100 min left"


# --- the file beside the output ------------------------------------------------------------------------------------


def test_a_run_says_beside_its_output_what_it_does_from_the_first_moment_on(tmp_path: Path) -> None:
    bars, output = Progress(show=False), tmp_path / "new" / "i.zarr"
    with bars.beside(output):
        (state,) = read_runs(output)
        assert (state.host, state.pid, state.condition()) == (socket.gethostname(), os.getpid(), "running")
        assert "run running (beginning; process" in str(state)
        with bars.stage("fit", None, "passes"), bars.beside(output):
            assert read_runs(output)[0].stage == "fit"
        with bars.stage("strips", 4, "strips") as bar:
            bar.advance(3)
            bars._tell()
            (state,) = read_runs(output)
            assert (state.stage, state.done, state.total) == ("strips", 3, 4)
            assert "strips: 3 of 4 strips, " in str(state)
    assert read_runs(output) == []
    assert list(output.parent.iterdir()) == []


def test_the_heart_beats_while_nothing_advances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.01)
    bars, output = Progress(show=False), tmp_path / "i.zarr"
    with bars.beside(output, "1/4"):
        before = read_runs(output)[0].heard
        end = time.monotonic() + 10
        while read_runs(output)[0].heard == before and time.monotonic() < end:
            time.sleep(0.02)
        (state,) = read_runs(output)
        assert state.heard > before
        assert "run part 1/4 running" in str(state)


def test_a_run_that_ended_badly_or_died_says_so(tmp_path: Path) -> None:
    bars, output = Progress(show=False), tmp_path / "i.zarr"
    with pytest.raises(ValueError, match="on purpose"), bars.beside(output):
        raise ValueError("on purpose")
    assert "run failed (beginning" in str(read_runs(output)[0])
    assert str(read_runs(output)[0]).endswith(": on purpose")
    with pytest.raises(KeyboardInterrupt), bars.beside(output):
        raise KeyboardInterrupt
    (state,) = read_runs(output)
    assert state.condition() == "stopped"
    with started([sys.executable, "-c", ""]) as child:
        child.wait()
    gone = replace(RunState.here(), pid=child.pid)
    assert gone.condition() == "dead"
    old = replace(RunState.here(), heard=time.time() - 1000.0)
    assert old.condition() == "silent"  # this process is there, and does not say so: stopped, perhaps
    assert replace(old, host="elsewhere").condition() == "dead"
    assert replace(gone, host="elsewhere").condition() == "running"


def test_a_full_disk_does_not_end_a_run_for_the_sake_of_telling(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Progress(show=False).beside(tmp_path / "file" / "i.zarr"):
        pass
