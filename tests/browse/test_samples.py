"""Samples of a job's data, stored with its result from the shell."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from distinfluence.demo import prepare, train_data
from distinfluence.scaling import Progress
from distinfluence.store import open_influences
from tests.test_cli import command


@pytest.fixture(scope="module")
def job(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "demo"
    prepare(folder, 1, Progress(False))
    content = yaml.safe_load((folder / "job.yaml").read_text())
    content["chunks"] = {"train": 500, "test": 297}  # as the result has them: a fingerprint of data is made of chunks
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
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
    content = yaml.safe_load(job.read_text())
    content["data"]["train"] = "distinfluence.demo:test_data"
    content["output"] = str(job.parent / "influences.zarr")
    content["model"]["checkpoint"] = str(job.parent / "model.pt")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    outcome = command("annotate", tmp_path / "other.yaml", "--kind", "image", "--shape", "8x8")
    assert outcome.exit_code == 1
    assert "was made with other" in outcome.output
