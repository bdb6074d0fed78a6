"""`info`, `export` and `plot` as the shell's user runs them."""

import csv
import json
import re
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from distinfluence.browse.views.picture import Pictures, cluster_order
from distinfluence.browse.views.png import encode
from distinfluence.store import InfluenceWriter, Layout, annotate, open_influences
from tests.processes import finished
from tests.test_cli import command


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "i.zarr"
    writer = InfluenceWriter.create(path, Layout(3, 10, 4, top_k=5), {"solver": {"method": "Direct"}})
    writer.write_test(slice(0, 3), loss=np.array([1.0, 3.0, 2.0]), relative_residual=np.array([1e-6, 1e-3, 1e-9]))
    for i in range(3):
        n = writer.layout.strip_shape(i)[1]
        writer.write_strip(i, np.random.default_rng(i).standard_normal((3, n)), loss=np.arange(n) + 1.0)
    writer.finish()
    annotate(path, "train", ["<b>bold</b>"] * 10, kind="text", labels=np.arange(10) % 2, classes=["=1+1", "b"])
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rankings_are_exported_as_csv_and_parquet_alike(result: Path, tmp_path: Path) -> None:
    outcome = command("export", result, "--csv", tmp_path / "t.csv", "--parquet", tmp_path / "t.parquet", "-k", 2)
    assert outcome.exit_code == 0, outcome.output
    rows = rows_of(tmp_path / "t.csv")
    assert len(rows) == 3 * 2 * 2
    assert [row["end"] for row in rows[:4]] == ["helpful", "helpful", "harmful", "harmful"]
    assert int(rows[0]["train"]) == int(open_influences(result).top(0, 1).indices[0])
    assert np.float32(rows[0]["influence"]) == open_influences(result).top(0, 1).values[0]
    assert {row["train_label"] for row in rows} <= {"'=1+1", "b"}
    import pandas

    table = pandas.read_parquet(tmp_path / "t.parquet")
    assert table["train"].tolist() == [int(row["train"]) for row in rows]
    assert set(table["train_label"]) <= {"=1+1", "b"}


def test_a_slice_is_exported_entry_by_entry(result: Path, tmp_path: Path) -> None:
    outcome = command("export", result, "--csv", tmp_path / "s.csv", "--tests", "1:3", "--trains", "2:9")
    assert "14 lines" in outcome.output
    values = open_influences(result)[:]
    for row in rows_of(tmp_path / "s.csv"):
        assert np.float32(row["influence"]) == values[int(row["test"]), int(row["train"])]


def test_an_unfinished_result_is_exported_only_if_told_to(result: Path, tmp_path: Path) -> None:
    InfluenceWriter.open(result).reopen([1])
    outcome = command("export", result, "--csv", tmp_path / "s.csv", "--trains", ":")
    assert outcome.exit_code == 1 and "strip 1 is not written yet" in outcome.output
    assert not list(tmp_path.glob("*.csv")) and not list(tmp_path.glob(".*.partial"))
    assert "18 lines" in command("export", result, "--csv", tmp_path / "s.csv", "--trains", ":", "--partial").output
    assert "running, 2 of 3 strips" in command("info", result).output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "pass --csv, --parquet or --html"),
        (["--csv", "x.csv", "--tests", "5"], "`--tests` must be a range"),
        (["--csv", "x.csv", "--trains", "0:11"], "within 0:10"),
        (["--csv", "/nowhere/at/all.csv"], "cannot write"),
        (["--html", "/nowhere/at/all.html"], "cannot write"),
    ],
)
def test_what_cannot_be_exported_is_said(result: Path, options: list[str], said: str) -> None:
    outcome = command("export", result, *options)
    assert outcome.exit_code == 1
    assert said in outcome.output and "Traceback" not in outcome.output


def test_highlights_are_one_file_without_script_and_with_everything_escaped(result: Path, tmp_path: Path) -> None:
    outcome = command("export", result, "--html", tmp_path / "h.html")
    assert outcome.exit_code == 0, outcome.output
    html = (tmp_path / "h.html").read_text()
    assert "<script" not in html and "http:" not in html and "https:" not in html
    assert "<b>bold" not in html and "&lt;b&gt;bold" in html
    assert html.index("Test point 1<") < html.index("Test point 2<") < html.index("Test point 0<")
    assert "Suspicious labels" in html and 'src="data:image/png;base64,' in html


def test_highlights_of_the_digits_show_digits(digits: Path, tmp_path: Path) -> None:
    command("export", digits, "--html", tmp_path / "h.html")
    html = (tmp_path / "h.html").read_text()
    assert html.count("<img") == 1 + 8 * (1 + 6 + 6) + 24
    assert len(html) < 2**20


@pytest.mark.parametrize("what", ["heatmap", "scores", "residuals"])
@pytest.mark.parametrize("complete", [True, False])
def test_plots_are_pngs(result: Path, tmp_path: Path, what: str, complete: bool) -> None:
    if not complete:
        InfluenceWriter.create(tmp_path / "empty.zarr", Layout(3, 10, 4), {})
    path = result if complete else tmp_path / "empty.zarr"
    outcome = command("plot", path, tmp_path / "p.png", "--what", what)
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_info_tells_whole_running_and_damaged_apart(result: Path) -> None:
    assert "state: complete, 3 of 3 strips," in command("info", result).output
    assert "every byte as it was written" in command("info", result, "--check").output
    shard = result / "influences/c/0/1"
    content = bytearray(shard.read_bytes())
    content[4] ^= 1
    shard.write_bytes(content)
    assert "state: complete" in command("info", result).output
    assert "state: damaged: strips 1;" in command("info", result, "--check").output
    assert json.loads(command("info", result, "--check", "--json").output)["damaged_strips"] == [1]
    shard.unlink()
    assert "state: damaged: strips 1;" in command("info", result).output


def test_a_picture_has_the_largest_entry_of_each_cell_in_any_order(result: Path) -> None:
    pictures, values = Pictures(open_influences(result)), open_influences(result)[:]
    order = np.random.default_rng(0).permutation(10)
    found = pictures.picture(slice(0, 3), slice(0, 10), 2, 4, (None, order)).values
    assert found.shape == (2, 4)
    for r, rows in enumerate((values[:1], values[1:])):
        for c in range(4):
            block = rows[:, order[c * 10 // 4 : (c + 1) * 10 // 4]].ravel()
            assert found[r, c] == block[np.argmax(np.abs(block))]


def test_rows_that_point_the_same_way_stand_together() -> None:
    kind = np.arange(40) % 2
    values = np.random.default_rng(0).standard_normal((2, 30))[kind] + 0.01 * np.random.default_rng(1).random((40, 30))
    for matrix in (values, values[:, :4]):
        assert np.abs(np.diff(kind[cluster_order(matrix.astype(np.float32))])).sum() == 1


def test_png_files_are_read_by_others() -> None:
    from io import BytesIO

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(encode(pixels)))), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(encode(pixels[..., 0])))), pixels[..., 0])


INTERRUPTED_AT_ONCE = """
import os, signal, sys
import click
from distinfluence.cli import main

def interrupting(text, **_options):
    print(text, flush=True)
    os.kill(os.getpid(), signal.SIGINT)

click.echo = interrupting
main(["browse", sys.argv[1], "--no-open"])
"""


def test_the_page_ends_cleanly_at_ctrl_c_as_soon_as_its_address_is_there(result: Path) -> None:
    done = finished([sys.executable, "-W", "error", "-c", INTERRUPTED_AT_ONCE, result])
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S+\n", done.stdout)


def test_every_command_that_looks_opens_urls_too(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://shared/i.zarr"
    fsspec.filesystem("memory").put(str(result), url, recursive=True)
    assert "state: complete, 3 of 3 strips" in command("info", url).output
    here = command("top", result, 1, "--json").output
    assert json.loads(command("top", url, 1, "--json").output) == json.loads(here)
    for arguments in (("export", url, "--csv", tmp_path / "t.csv"), ("plot", url, tmp_path / "p.png")):
        outcome = command(*arguments)
        assert outcome.exit_code == 0, outcome.output
    outcome = command("info", "memory://shared/nothing.zarr")
    assert outcome.exit_code == 1 and "does not exist" in outcome.output
    # the page's server is made, and not run: a loop of the browser's tests may be running in this thread
    monkeypatch.setattr("distinfluence.browse.commands._serve", lambda server, _opened: server)
    monkeypatch.setattr("distinfluence.browse.commands.asyncio.run", lambda server: server._socket.close())
    outcome = command("browse", url, "--no-open")
    assert outcome.exit_code == 0, outcome.output


def test_top_says_bounds_labels_and_ids_where_they_are_known(result: Path) -> None:
    writer = InfluenceWriter.open(result)
    writer.write_test(slice(0, 3), error_bound=np.array([0.5, 1.0, 2.0]))
    for i in range(3):
        writer._array("train_gradient_norm")[writer.layout.strip_slice(i)] = 1.0
    annotate(result, "train", ids=[f"photo {i}" if i else "\x1b[31mred" for i in range(10)])
    lines = command("top", result, 1, "-k", 10).output.splitlines()
    assert lines[2].split() == ["train", "influence", "±", "id", "label"] * 2
    assert {line.split()[2] for line in lines[3:]} == {"1"}
    assert "\x1b" not in "".join(lines) and "photo 3" in "".join(lines)
    first = json.loads(command("top", result, 1, "-k", 1, "--json").output)["helpful"][0]
    best = int(open_influences(result).top(1, 1).indices[0])
    assert first["train"] == best and first["bound"] == 1.0 and first["train_label"] == ("=1+1", "b")[best % 2]


def test_top_ranks_a_set_of_test_samples_or_a_class(result: Path) -> None:
    annotate(result, "test", labels=[0, 1, 1], classes=["cat", "dog"])
    ranking = open_influences(result).top_of([1, 2], 3)
    for options in (("--tests", "1:3"), ("--tests", "2,1"), ("--label", "dog"), ("--label", "1")):
        outcome = command("top", result, *options, "-k", 3, "--json")
        assert [line["train"] for line in json.loads(outcome.output)["helpful"]] == ranking.indices.tolist()
    assert (
        "2 test samples, by the mean of their influences: mean loss 2.5"
        in command("top", result, "--label", "dog").output
    )
    assert "label cat" in command("top", result, "--label", "cat").output  # one sample: its own ranking
    for asked, said in (
        ("", "pass one of them"),
        ("0 --tests 0:2", "pass one of them"),
        ("--label cow", "must be a label of the test samples"),
        ("--tests a:b", "must be a range"),
        ("--tests 0,9", "must be from -3 to 2"),
        ("--tests 2:2", "must name at least one"),
    ):
        outcome = command("top", result, *asked.split())
        assert outcome.exit_code == 1 and said in outcome.output, outcome.output
