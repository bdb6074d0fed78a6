"""The demo: find mislabelled digits.

Scikit-learn's 8 × 8 digits, 1500 for training and 297 for testing; 5 % of the training labels are flipped on purpose.
An MLP 64-64-32-10 is trained on them, and the job that the demo writes computes 297 × 1500 influences by conjugate
gradients on the damped Gauss–Newton matrix. Everything is seeded.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distinfluence.app.config import Job
from distinfluence.app.job import run_job
from distinfluence.app.job_data import annotate_job
from distinfluence.app.summary import program, summary
from distinfluence.app.yaml_file import to_yaml
from distinfluence.errors import ForeignStoreError, MissingDependencyError
from distinfluence.evaluate import mislabel_recall, net_harm
from distinfluence.scaling import Progress
from distinfluence.store import InfluenceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_TRAIN = 1500
FLIPPED_SHARE = 0.05
SEED = 0
EPOCHS = 30
SHOWN = 6  # test digits in the picture, with as many training digits on either side


def build_model() -> nn.Module:
    """Return the untrained MLP 64-64-32-10."""
    layers = (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return nn.Sequential(*layers).eval()


def train_data() -> tuple[Tensor, Tensor]:
    """Return training digits [1500, 64], 0 to 1, and labels [1500], of which 75 are wrong."""
    x, y = _digits()
    return x[:N_TRAIN], _with_flips(y[:N_TRAIN])


def test_data() -> tuple[Tensor, Tensor]:
    """Return test digits [297, 64] and their labels, all right."""
    x, y = _digits()
    return x[N_TRAIN:], y[N_TRAIN:]


def flipped_labels() -> NDArray[np.int64]:
    """Return which training labels are wrong, [75], sorted."""
    order = np.random.default_rng(SEED).permutation(N_TRAIN)
    return np.sort(order[: round(FLIPPED_SHARE * N_TRAIN)])


@cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn") from error
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(y))
    return torch.tensor(x[order] / 16.0, dtype=torch.float32), torch.tensor(y[order], dtype=torch.int64)


def _with_flips(labels: Tensor) -> Tensor:
    wrong = flipped_labels()
    shift = np.random.default_rng(SEED + 1).integers(1, 10, size=wrong.size)
    flipped = labels.clone()
    flipped[wrong] = (flipped[wrong] + torch.from_numpy(shift)) % 10
    return flipped


def train_model(on_epoch: Callable[[], None] | None = None) -> nn.Module:
    """Return the MLP, trained for a few seconds with Adam; the caller's random state is left alone."""
    x, y = train_data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        for _ in range(EPOCHS):
            for batch in torch.randperm(N_TRAIN).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            if on_epoch is not None:
                on_epoch()
    return model.eval().requires_grad_(True)


def run_demo(folder: Path, workers: int) -> str:
    """Train, run the job, and say what came out; files go to `folder`. The call is safe to repeat.

    Raises:
        MissingDependencyError: scikit-learn or matplotlib is not installed.
        ForeignStoreError: `folder` holds other files.
    """
    _require_matplotlib()
    progress = Progress()
    prepare(folder, workers, progress)
    job = Job.read(folder / "job.yaml")
    result = run_job(job, existing="replace", progress=progress)
    annotate_job(job, "image", shape=(8, 8), classes=[str(digit) for digit in range(10)])
    picture = folder / "digits.png"
    draw(result, picture)
    return "\n".join([summary(result), *_findings(result), *_what_next(folder, result, picture)])


def prepare(folder: Path, workers: int, progress: Progress) -> None:
    """Train the model and write it with its job file to `folder`."""
    ours = {"model.pt", "job.yaml", "influences.zarr", ".influences.zarr.scratch", "digits.png"}
    if folder.exists() and not {entry.name for entry in folder.iterdir()} <= ours:
        raise ForeignStoreError(f"`output` {folder} holds files that the demo did not write. Pass another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with progress.stage("training", EPOCHS, "epochs") as bar:
        model = train_model(on_epoch=bar.advance)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "job.yaml").write_text(to_yaml(job_content(workers)))


def job_content(workers: int) -> dict[str, object]:
    """Return the demo's job file."""
    return {
        "model": {"factory": "distinfluence.app.demo:build_model", "checkpoint": "model.pt"},
        "loss": "torch.nn:CrossEntropyLoss",
        "data": {"train": "distinfluence.app.demo:train_data", "test": "distinfluence.app.demo:test_data"},
        "method": {
            "name": "cg",
            "second_order_mode": "ggn",
            "hessian_regularization": 0.01,
            "rtol": 1e-4,
            "atol": 0.0,
        },
        "chunks": {"train": 250, "test": 297},
        "cluster": {"kind": "local", "workers": workers},
        "output": "influences.zarr",
    }


def _findings(result: InfluenceResult) -> list[str]:
    wrong = flipped_labels()
    recall = mislabel_recall(net_harm(result[:]), wrong, inspected=wrong.size)
    chance = mislabel_recall(np.random.default_rng(SEED).random(N_TRAIN), wrong, inspected=wrong.size)
    x, y = test_data()
    with torch.no_grad():
        hits = int((trained_from(result)(x).argmax(dim=1) == y).sum())
    return [
        "",
        f"The network reads {hits} of {len(y)} test digits right. {wrong.size} of {N_TRAIN} training labels were "
        "flipped on purpose.",
        f"Among the {wrong.size} training digits that harm the test digits most, {recall.found} have a flipped label; "
        f"among {wrong.size} in random order, {chance.found}.",
    ]


def trained_from(result: InfluenceResult) -> nn.Module:
    """Return the model whose checkpoint lies next to the result."""
    model = build_model()
    model.load_state_dict(torch.load(Path(result.path).parent / "model.pt", weights_only=True))
    return model


def _what_next(folder: Path, result: InfluenceResult, picture: Path) -> list[str]:
    return [
        "",
        f"result   {result.path}",
        f"picture  {picture}   a few test digits with the training digits that help and harm them most",
        f"job      {folder / 'job.yaml'}   copy and edit it for your own model",
        f"next     {program()} info {folder / 'influences.zarr'}",
        f"         {program()} top {folder / 'influences.zarr'} 0",
        f"         {program()} browse {folder / 'influences.zarr'}",
    ]


def draw(result: InfluenceResult, path: Path) -> None:
    """Draw test digits, each next to its most helpful and most harmful training digits."""
    _require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x, y = train_data()
    x_test, y_test = test_data()
    wrong = set(flipped_labels().tolist())
    shown = np.argsort(-result.test_loss, kind="stable")[:SHOWN]
    columns = 2 * SHOWN + 1
    figure = Figure(figsize=(0.85 * columns, 1.2 * SHOWN + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = cast(Any, figure.subplots(SHOWN, columns))
    for row, index in enumerate(shown.tolist()):
        _digit(grid[row, SHOWN], x_test[index], f"test {index}\nis a {int(y_test[index])}", "tab:blue")
        helpful, harmful = result.top(index, SHOWN).indices.tolist(), result.bottom(index, SHOWN).indices.tolist()
        for place, (good, bad) in enumerate(zip(helpful, harmful, strict=True)):
            for axes, i in ((grid[row, SHOWN - 1 - place], good), (grid[row, SHOWN + 1 + place], bad)):
                flipped = i in wrong
                _digit(axes, x[i], f"“{int(y[i])}”" + (" flipped" if flipped else ""), "tab:red" if flipped else "")
    figure.suptitle("← more helpful        training digits with their labels        more harmful →", fontsize=11)
    figure.savefig(path, dpi=110)


def _digit(axes: "Axes", pixels: Tensor, title: str, frame: str) -> None:
    axes.imshow(pixels.reshape(8, 8).numpy(), cmap="gray_r")
    axes.set_title(title, fontsize=7, color=frame or "black")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(bool(frame))
        spine.set_color(frame or "none")
        spine.set_linewidth(2)


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise _missing("matplotlib") from error


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"the demo needs {package}, which is not installed. Run: pip install scikit-learn matplotlib"
    )
