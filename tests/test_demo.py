"""The demo is real: it finds flipped labels, draws a picture, and leaves a result that everything opens."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distinfluence import open_influences
from distinfluence.app.config import Job
from distinfluence.app.demo import (
    FLIPPED_SHARE,
    N_TRAIN,
    build_model,
    flipped_labels,
    job_content,
    prepare,
    train_data,
)
from distinfluence.app.demo import (
    test_data as digits_for_testing,
)
from distinfluence.app.yaml_file import read_yaml
from distinfluence.errors import ForeignStoreError
from distinfluence.evaluate import mislabel_recall, net_harm
from distinfluence.scaling import Progress
from tests.processes import finished

ROOT = Path(__file__).parents[1]


def test_one_in_twenty_training_labels_is_flipped_and_no_test_label() -> None:
    from sklearn.datasets import load_digits

    truth: dict[Any, int] = {
        tuple(np.float32(image / 16).tolist()): label
        for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    (x, y), (x_test, y_test) = train_data(), digits_for_testing()
    wrong = [i for i in range(N_TRAIN) if truth[tuple(x[i].tolist())] != int(y[i])]
    np.testing.assert_array_equal(wrong, flipped_labels())
    assert len(wrong) == FLIPPED_SHARE * N_TRAIN
    assert all(truth[tuple(image.tolist())] == int(label) for image, label in zip(x_test, y_test, strict=True))


README = ROOT / "README.md"
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?%?")


def missing_words(readme: str, printed: str) -> list[str]:
    """The lines that the README shows of the demo which it does not print, whatever the numbers of this machine."""
    _, _, after = readme.partition("ends like this:\n\n```text\n")
    came = [NUMBER.sub("#", line).replace("distinfluence-demo", "demo") for line in printed.splitlines()]
    came = [re.sub(r" in \S+influences\.zarr", " in demo/influences.zarr", line).strip() for line in came]
    shown = [
        NUMBER.sub("#", line).replace("distinfluence-demo", "demo") for line in after.partition("```")[0].splitlines()
    ]
    return [line for line in shown if line.strip() not in came]


def test_the_demo_finds_flipped_labels_and_says_what_to_do_next(tmp_path: Path, python: Path) -> None:
    folder = tmp_path / "demo"
    outcome = finished(
        [python, "-m", "distinfluence", "demo", "--output", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    result = open_influences(folder / "influences.zarr")
    assert result.shape == (297, 1500)
    assert result.complete
    assert result.converged.all()
    assert result.relative_residual.max() <= 1e-4
    recall = mislabel_recall(net_harm(result[:]), flipped_labels(), inspected=75)
    assert recall.found >= 40, "a random order finds 4"
    assert f"{recall.found} have a flipped label" in outcome.stdout
    assert "297 of 297 rows converged" in outcome.stdout
    assert missing_words(README.read_text(), outcome.stdout) == []
    assert f" top {folder / 'influences.zarr'} 0" in outcome.stdout
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in folder.iterdir()) == ["digits.png", "influences.zarr", "job.yaml", "model.pt"]


def test_the_demos_job_file_and_checkpoint_are_ordinary_ones(tmp_path: Path) -> None:
    prepare(tmp_path, workers=1, progress=Progress(show=False))
    job = Job.read(tmp_path / "job.yaml")
    assert dict(read_yaml(tmp_path / "job.yaml", "file").content) == job_content(1)
    model, _ = job.influence_model()
    trained = build_model()
    trained.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x, y = digits_for_testing()
    assert (trained(x).argmax(dim=1) == y).float().mean() > 0.95
    assert torch.equal(model.risk.module(x), trained(x))


def test_the_demo_touches_no_folder_that_holds_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ForeignStoreError, match="did not write"):
        prepare(tmp_path, workers=1, progress=Progress(show=False))
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
