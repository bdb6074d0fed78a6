"""The records of the benchmarks and the page that shows them go together. The benchmarks themselves: `make bench`."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks.__main__ import BENCHES, NOT_RUN, RECORDS, ROOT, Bench
from tests.processes import finished

PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
HERE = Path(__file__).parent / "benchmarks"


def test_every_benchmark_has_its_record_and_the_page_shows_it() -> None:
    shown = re.findall(r"^```\{literalinclude\} benchmarks/([\w-]+)\.txt$", PAGE, re.MULTILINE)
    assert sorted(shown) == sorted(bench.name for bench in BENCHES)
    assert {file.stem for file in RECORDS.glob("*.txt")} == set(shown)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: str(bench.name))
def test_a_record_says_when_where_and_how_it_was_made_or_that_it_was_not(bench: Bench) -> None:
    lines = bench.record.read_text().splitlines()
    if lines[0].startswith(NOT_RUN):
        assert f"make bench ONLY={bench.name}" in lines[0]
        assert len(lines) == 1
    else:
        assert [line.split()[0] for line in lines[:5]] == ["date", "machine", "versions", "command", "took"]
        assert lines[3].split(maxsplit=1)[1] == " ".join(["python", *bench.command])
        assert lines[6:]


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: str(bench.name))
def test_the_script_of_a_benchmark_is_there_and_takes_its_arguments(bench: Bench) -> None:
    script = HERE / f"{bench.module}.py"
    source = (script if script.is_file() else HERE / bench.module / "__main__.py").read_text()
    assert ast.get_docstring(ast.parse(source))
    assert [
        given for given in bench.arguments if not re.fullmatch(r"[\d.]+", given) and f'"{given}"' not in source
    ] == []


def test_a_run_is_recorded_and_one_that_fails_leaves_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "RECORDS", tmp_path)
    assert benchmarks.run(Bench("importing", "importing", 1, ("--help",)))
    record = (tmp_path / "importing.txt").read_text()
    assert record.startswith("date")
    assert "How long one waits" in record
    assert not benchmarks.run(Bench("importing", "importing", 1, ("--repeats", "none")))
    assert (tmp_path / "importing.txt").read_text() == record


def test_an_unknown_benchmark_is_refused() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "pases"]
    done = finished(command, cwd=ROOT)
    assert done.returncode == 2
    assert "no such benchmark: pases" in done.stderr
