"""How well scores predict what retraining does: `distinfluence evaluate` on the digits.

Run: python -m tests.benchmarks.lds

A network 64-32-16-10 on 1000 digits, 200 queries; 100 random halves of the training set, each trained from 5 seeds, on
two workers. The ceiling is what the mean outcome of two seeds predicts of the mean of the other three.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distinfluence.app import demo
from distinfluence.app.config import Job
from distinfluence.app.evaluation import evaluate_job
from distinfluence.app.yaml_file import to_yaml
from distinfluence.scaling import Progress

N_TRAIN, N_TEST = 1000, 200
TRAINING = {
    "epochs": 60,
    "batch_size": 50,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "schedule": "one_cycle",
}
FEW: dict[str, dict[str, Any]] = {
    "GGN": {"name": "direct", "second_order_mode": "ggn", "hessian_regularization": 1e-2},
    "KFAC": {"name": "ekfac", "update_diagonal": False, "hessian_regularization": {"fraction": 0.1, "of": "mean"}},
    "EKFAC": {"name": "ekfac", "update_diagonal": True, "hessian_regularization": {"fraction": 0.1, "of": "mean"}},
    "EKFAC + 5 CG": {
        "name": "ekfac",
        "update_diagonal": True,
        "hessian_regularization": 1e-2,
        "cg_iterations": 5,
    },
}
MANY: dict[str, dict[str, Any]] = {
    **FEW,
    "GGN, λ = 0.001": {**FEW["GGN"], "hessian_regularization": 1e-3},
    "GGN, λ = 0.1": {**FEW["GGN"], "hessian_regularization": 0.1},
    "EKFAC + 1 CG": {**FEW["EKFAC + 5 CG"], "cg_iterations": 1},
    "EKFAC + 2 CG": {**FEW["EKFAC + 5 CG"], "cg_iterations": 2},
}


def build() -> nn.Module:
    """Return the untrained network."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10))


def train_data() -> tuple[Tensor, Tensor]:
    """Return the training digits."""
    x, y = demo.train_data()
    return x[:N_TRAIN], y[:N_TRAIN]


def test_data() -> tuple[Tensor, Tensor]:
    """Return the queries."""
    x, y = demo.test_data()
    return x[:N_TEST], y[:N_TEST]


def job(methods: dict[str, dict[str, Any]], **evaluate: Any) -> dict[str, Any]:
    """Return the content of the job file. evaluate: further keys of `evaluate`."""
    here = "tests.benchmarks.lds"
    return {
        "model": {"factory": f"{here}:build"},
        "loss": "torch.nn:CrossEntropyLoss",
        "data": {"train": f"{here}:train_data", "test": f"{here}:test_data"},
        "method": FEW["GGN"],
        "output": "influences.zarr",
        "cluster": {"kind": "local", "workers": 2},
        "evaluate": {
            "train": {"small_networks": TRAINING},
            "output": "evaluation",
            "subsets": 100,
            "seeds": 5,
            "methods": methods,
            **evaluate,
        },
    }


def main() -> None:
    """Retrain, score, print: a few methods on an empty bank, more of them on the bank that is there, and removals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="Keep everything there; a temporary folder by default.")
    parser.add_argument("--few", action="store_true", help="Stop after the first four methods.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        removal = {"subsets": 0, "removal": {"queries": 20, "seeds": 3, "controls": 5}}
        two = {name: FEW[name] for name in ("GGN", "EKFAC")}
        for name, methods, keys in (
            ("four methods, an empty bank", FEW, {}),
            ("eight methods, the same bank", MANY, {}),
            ("removals", two, removal),
        ):
            file = folder / "job.yaml"
            file.write_text(to_yaml(job(methods, **keys)))
            start = time.perf_counter()
            found = evaluate_job(Job.read(file), progress=Progress(False))
            print(f"{name}: {time.perf_counter() - start:.0f} s\n{found}\n", flush=True)
            if arguments.few:
                return


if __name__ == "__main__":
    main()
