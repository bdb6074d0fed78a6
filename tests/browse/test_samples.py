"""Samples of a job's data, stored with its result from the shell."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinfluence.app.demo import prepare, train_data
from distinfluence.app.demo import test_data as held_out
from distinfluence.app.job_points import points_of_job
from distinfluence.app.yaml_file import read_yaml, to_yaml
from distinfluence.browse.export.html_report import write_report
from distinfluence.browse.server.api import ResultApi
from distinfluence.browse.views.rendering import draw
from distinfluence.errors import DtypeError, FingerprintError, SettingError
from distinfluence.influence.arrays import ArrayBatch
from distinfluence.scaling import Progress
from distinfluence.scaling.data.sources import DatasetSource
from distinfluence.store import open_influences
from tests.browse import results
from tests.test_cli import command


@pytest.fixture(scope="module")
def job(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "demo"
    prepare(folder, 1, Progress(False))
    content: dict[str, Any] = dict(read_yaml(folder / "job.yaml", "file").content)
    content["chunks"] = {"train": 500, "test": 297}  # as the result has them: a fingerprint of data is made of chunks
    (folder / "job.yaml").write_text(to_yaml(content))
    shutil.copytree(digits, folder / "influences.zarr")
    shutil.rmtree(folder / "influences.zarr/samples")
    return folder / "job.yaml"


def test_samples_of_a_job_are_stored_as_images(job: Path) -> None:
    outcome = command("annotate", job, "--kind", "image", "--shape", "8x8", "--classes", ",".join("0123456789"))
    assert outcome.exit_code == 0, outcome.output
    assert "train: inputs as image and labels of 1500 samples" in outcome.output
    points = open_influences(job.parent / "influences.zarr").points("train")
    x, y = train_data()
    np.testing.assert_array_equal(points.sample(1234).values, x[1234].reshape(8, 8).numpy())
    np.testing.assert_array_equal(points.labels(), y.numpy())
    assert points.classes == list("0123456789") and points.range == (0.0, 1.0)


def test_samples_are_stored_as_what_a_callable_makes_of_them(job: Path) -> None:
    outcome = command("annotate", job, "--kind", "text", "--render", "tests.browse.results:as_text")
    assert outcome.exit_code == 0, outcome.output
    points = open_influences(job.parent / "influences.zarr").points("test")
    assert points.sample(3).values.startswith("a digit with ")
    command("annotate", job)
    points = open_influences(job.parent / "influences.zarr").points("test")
    assert points.sample(3).values.startswith("a digit with ") and points.labels().size == 297


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "image", "--shape", "8by8"], "`--shape` must be sizes"),
        (["--kind", "image"], "`samples` of kind 'image' must be 1500 arrays"),
        (["--kind", "text", "--render", "tests.browse.results:nothing"], "nothing"),
    ],
)
def test_what_cannot_be_stored_is_said(job: Path, options: list[str], said: str) -> None:
    outcome = command("annotate", job, *options)
    assert outcome.exit_code == 1
    assert said in outcome.output and "Traceback" not in outcome.output


def test_samples_of_other_data_are_refused(job: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = dict(read_yaml(job, "file").content)
    content["data"]["train"] = "distinfluence.app.demo:test_data"
    content["output"] = str(job.parent / "influences.zarr")
    content["model"]["checkpoint"] = str(job.parent / "model.pt")
    (tmp_path / "other.yaml").write_text(to_yaml(content))
    outcome = command("annotate", tmp_path / "other.yaml", "--kind", "image", "--shape", "8x8")
    assert outcome.exit_code == 1
    assert "was made with other" in outcome.output


def asked_of(job: Path, **options: Any) -> ResultApi:
    result = open_influences(job.parent / "influences.zarr")
    return ResultApi(result, points_of_job(job, result, options.get("render"), options.get("compared", True)))


def test_a_page_takes_samples_from_the_data_of_the_job_as_they_are_looked_at(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(job.parent / "influences.zarr/samples", ignore_errors=True)
    x, y = train_data()
    loaded: list[int] = []
    real = DatasetSource.load

    def load(source: DatasetSource) -> ArrayBatch:
        loaded.append(source.stop - source.start)
        return real(source)

    api = asked_of(job, compared=False)
    monkeypatch.setattr(DatasetSource, "load", load)
    sample = api.sources["train"].sample(1234)
    assert loaded == [1]
    np.testing.assert_array_equal(sample, x[1234].numpy())
    found = api.train_point(7, 3)
    assert found["label"] == str(int(y[7])) and found["sample"]["kind"] == "table"
    assert len(found["sample"]["cells"]) == 64 and found["helpful"][0]["label"] is not None
    assert not (job.parent / "influences.zarr/samples").exists()


@pytest.mark.parametrize(
    ("render", "kind"), [("as_text", "text"), ("as_image", "image"), ("as_row", "table"), ("as_both", "parts")]
)
def test_a_renderer_says_what_is_drawn(job: Path, tmp_path: Path, render: str, kind: str) -> None:
    api = asked_of(job, render=f"tests.browse.results:{render}")
    shown = api.test_point(3, 2)["sample"]
    assert shown["kind"] == kind
    x, _ = held_out()
    if kind == "text":
        assert shown["text"] == results.as_text(x[3].numpy())
    if kind == "image":
        assert (shown["width"], shown["height"]) == (8, 8) and shown["uri"].startswith("data:image/png")
    if kind == "table":
        assert shown["cells"] == [("dark", str(int((x[3] > 0.5).sum()))), ("mean", f"{x[3].mean():.5g}")]
    if kind == "parts":
        assert [part["kind"] for part in shown["parts"]] == ["image", "text"]
        write_report(api, tmp_path / "r.html", tests=1, suspects=1)
        report = (tmp_path / "r.html").read_text()
        assert "&lt;b&gt;" in report and "<b>" not in report


@pytest.mark.parametrize("what", [np.array(["a"]), 3, None, np.zeros((2, 2, 2, 2))])
def test_what_cannot_be_drawn_is_said_or_described(what: Any) -> None:
    if isinstance(what, np.ndarray) and what.dtype.kind == "f":
        assert draw(what, small=True)["text"] == "float64 [2, 2, 2, 2], from 0 to 0"
    else:
        with pytest.raises(DtypeError, match="a renderer"):
            draw(what, small=True)


def test_the_data_of_another_job_are_refused_unless_trusted(job: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = dict(read_yaml(job, "file").content)
    content["output"] = str(job.parent / "influences.zarr")
    content["model"]["checkpoint"] = str(job.parent / "model.pt")
    content["data"]["train"] = "tests.browse.results:dimmed_train_data"
    (tmp_path / "other.yaml").write_text(to_yaml(content))
    result = open_influences(job.parent / "influences.zarr")
    with pytest.raises(FingerprintError, match="was made with other"):
        points_of_job(tmp_path / "other.yaml", result, None, True)
    assert points_of_job(tmp_path / "other.yaml", result, None, False)["train"].sample(0) is not None
    content["data"]["train"] = "distinfluence.app.demo:test_data"
    (tmp_path / "other.yaml").write_text(to_yaml(content))
    with pytest.raises(SettingError, match="297 samples"):
        points_of_job(tmp_path / "other.yaml", result, None, False)


def test_the_shell_takes_a_job_and_wants_one_for_a_renderer(job: Path) -> None:
    outcome = command("browse", job.parent / "influences.zarr", "--render", "tests.browse.results:as_text")
    assert outcome.exit_code == 1 and "pass --job too" in outcome.output
    outcome = command("browse", job.parent / "influences.zarr", "--job", job, "--render", "tests.browse.results:none")
    assert outcome.exit_code == 1 and "none" in outcome.output and "Traceback" not in outcome.output
