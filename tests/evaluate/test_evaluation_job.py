"""`distinfluence evaluate`: a job's methods against models trained again; interrupted, resumed, refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from distinfluence import open_influences
from distinfluence.app.config import Job
from distinfluence.app.evaluation import evaluate_job
from distinfluence.app.yaml_file import to_yaml
from distinfluence.cli import main
from distinfluence.errors import ConfigError, FingerprintError, RetrainingError, SettingError
from distinfluence.evaluate import Evaluation
from distinfluence.scaling import Progress
from tests.evaluate import toy
from tests.processes import ROOT, below, kill_group, started
from tests.processes import finished as run_to_its_end

HERE = "tests.evaluate.toy"
EXACT = {"name": "direct", "hessian_regularization": 2 * toy.L2}
SUBSETS, SEEDS = 12, 2


def content(folder: Path, train: Any = None, **evaluate: Any) -> dict[str, Any]:
    log = {"log": str(folder / "models.log")}
    return {
        "model": {"factory": f"{HERE}:build"},
        "loss": "torch.nn:MSELoss",
        "data": {"train": f"{HERE}:train_data", "test": f"{HERE}:test_data"},
        "method": EXACT,
        "output": "influences.zarr",
        "cluster": {"kind": "local", "workers": 2},
        "evaluate": {
            "train": train if train is not None else {"target": f"{HERE}:train", "arguments": log},
            "output": "evaluation",
            "methods": {"exact": EXACT},
            "subsets": SUBSETS,
            "fraction": 0.8,
            "seeds": SEEDS,
            **evaluate,
        },
    }


def written(folder: Path, train: Any = None, **evaluate: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(to_yaml(content(folder, train, **evaluate)))
    return folder / "job.yaml"


def evaluated(file: Path) -> Evaluation:
    return evaluate_job(Job.read(file), progress=Progress(False))


def models(folder: Path) -> int:
    log = folder / "models.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluation that was never disturbed."""
    folder = tmp_path_factory.mktemp("made")
    evaluated(written(folder))
    return folder


def predicted(scores: NDArray[np.float64], folder: Path) -> float:
    """The linear datamodeling score, by a loop over queries of its own."""
    from scipy.stats import spearmanr

    from distinfluence.evaluate import random_subsets

    subsets = random_subsets(toy.N_TRAIN, SUBSETS, fraction=0.8, seed=0)
    x, y = toy.test_data()
    losses = np.zeros((SUBSETS, toy.N_TEST))
    for row, members in zip(losses, subsets, strict=True):
        for seed in range(1, 1 + SEEDS):
            row += ((toy.train(np.flatnonzero(members), seed)(x) - y) ** 2).detach().numpy()[:, 0] / SEEDS
    sums = scores @ subsets.T
    return float(np.mean([spearmanr(a, -b).statistic for a, b in zip(sums, losses.T, strict=True)]))


def test_the_table_is_that_of_a_loop_in_plain_torch(made: Path) -> None:
    figures = {
        (f["check"], f["method"]): f for f in json.loads((made / "evaluation/evaluation.json").read_text())["figures"]
    }
    scores = np.asarray(open_influences(made / "evaluation/scores/exact.zarr")[:], dtype=np.float64)
    assert figures["LDS", "exact"]["value"] == pytest.approx(predicted(scores, made), abs=1e-9)
    assert figures["LDS", "exact"]["value"] > 0.8
    for name in ("gradient dot product", "gradient cosine", "plain loss", "random"):
        assert figures["LDS", name]["value"] < figures["LDS", "exact"]["value"]
        assert "baseline" in figures["LDS", name]["remark"]
    # every subset from every seed, one of them again to see whether training repeats itself, and the model itself
    assert models(made) == SUBSETS * SEEDS + 2


def test_a_run_that_is_killed_goes_on_to_the_same_table(made: Path, tmp_path: Path, python: Path) -> None:
    file = written(tmp_path / "again")
    folder = file.parent
    (folder / "models.slow").touch()
    command = [python, "-m", "distinfluence", "evaluate", file, "--quiet"]
    with started(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None and models(folder) < SUBSETS * SEEDS // 2:
            pass
        workers = below(process.pid)
        kill_group(process)
        for pid in workers:
            with pytest.MonkeyPatch.context():
                _end(pid)
    before = models(folder)
    assert before < SUBSETS * SEEDS
    (folder / "models.slow").unlink()
    done = run_to_its_end(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    table = (made / "evaluation/evaluation.txt").read_text()
    assert done.stdout == table == (folder / "evaluation/evaluation.txt").read_text()
    assert models(folder) - before < SUBSETS * SEEDS  # what was in the bank was not trained again


def _end(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return


def test_a_second_method_trains_nothing(made: Path) -> None:
    before = models(made)
    rough = {"name": "datainf", "hessian_regularization": 0.1}
    found = evaluated(written(made, methods={"exact": EXACT, "rough": rough}))
    assert models(made) == before
    assert found.of("LDS", "rough").value < found.of("LDS", "exact").value
    assert found.of("rank agreement", "exact, rough").n_queries == toy.N_TEST


def test_all_checks_of_a_job_are_made(made: Path) -> None:
    found = evaluated(
        written(
            made,
            removal={"fractions": [0.1], "queries": 6, "seeds": 1, "controls": 2},
            leave_one_out=None,
            seed_matched=1,
            mislabelled=f"{HERE}:mislabelled",
            planted=f"{HERE}:planted",
            baselines={"random": {"name": "random"}},
        )
    )
    assert found.of("QLD 10 %", "exact").value > 0 > found.of("QLD 10 %", "exact").value - 10
    assert found.of("leave-one-out, rank correlation", "exact").value > 0.95
    assert found.of("leave-one-out, slope", "exact").value == pytest.approx(1, abs=0.3)
    assert found.of("LDS, seed-matched", "exact").value > 0.8
    assert 0 <= found.of("mislabel AUC", "exact").value <= 1
    assert found.of("mislabel AUC", "plain loss").remark == "baseline"
    assert found.of("planted recall", "exact").n_queries == 2


def test_it_is_a_command(made: Path) -> None:
    file = written(made)
    said = CliRunner().invoke(main, ["evaluate", str(file), "--quiet", "--json"])
    assert said.exit_code == 0
    assert json.loads(said.stdout)["figures"][0]["check"] == "LDS"


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a subset that fails": (
        {"train": {"target": f"{HERE}:train", "arguments": {"bad": 3}}},
        RetrainingError,
        r"failed for \d+ of 24 retrainings:\n  `retrainings\[\d+\]` \(32 of 40 points, seed 1\): .*cannot train with",
    ),
    "other data": (
        {"data": {"train": {"target": f"{HERE}:train_data", "arguments": {"seed": 9}}, "test": f"{HERE}:test_data"}},
        FingerprintError,
        "the training data differ",
    ),
    "another trainer": ({"train": f"{HERE}:train"}, FingerprintError, "`train` differs"),
    "too few subsets": (
        {"subsets": 5},
        SettingError,
        "`n_subsets` must hold at least 8 subsets for an interval, got 5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_evaluated_is_refused_with_its_reason(case: str, made: Path, tmp_path: Path) -> None:
    changes, error, message = BAD[case]
    folder = tmp_path if case == "a subset that fails" else made
    described = content(folder)
    described["evaluate"] |= {key: value for key, value in changes.items() if key != "data"}
    described |= {key: value for key, value in changes.items() if key == "data"}
    before = models(folder)
    with pytest.raises(error, match=message):
        evaluate_job(Job.parse(described, folder), progress=Progress(False))
    assert models(folder) == before


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "two ways to train": (
        {"train": {"small_networks": {}, "to_minimum": {}}},
        "`evaluate.train`.* must have one of callable, .*, got small_networks, to_minimum",
    ),
    "no way to train": ({"train": {}}, "`evaluate.train`.* must have one of .*, got none"),
    "no such key": ({"subset": 3}, "`evaluate.subset` is not a key.*`subsets`"),
    "no such method": ({"methods": {"a": {"name": "direkt"}}}, "`name` must be a method, got 'direkt'.*direct"),
    "a fraction of 1": ({"fraction": 1.0}, "`evaluate.fraction`"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_before_anything_runs(case: str, tmp_path: Path) -> None:
    changes, message = MISTAKES[case]
    with pytest.raises(ConfigError, match=message):
        Job.parse(content(tmp_path, **changes), tmp_path)


def test_a_job_without_the_key_says_what_to_add(tmp_path: Path) -> None:
    described = {key: value for key, value in content(tmp_path).items() if key != "evaluate"}
    with pytest.raises(ConfigError, match="`evaluate` must say how models are trained again"):
        evaluate_job(Job.parse(described, tmp_path))


def test_settings_of_a_trainer_that_do_not_exist_are_named(tmp_path: Path) -> None:
    described = content(tmp_path, {"small_networks": {"epoch": 3}})
    with pytest.raises(ConfigError, match="`evaluate.train`.*epoch"):
        evaluate_job(Job.parse(described, tmp_path), progress=Progress(False))
