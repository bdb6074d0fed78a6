"""Which images teach a small CNN this class?

A convolutional network learns scikit-learn's digits. The influence of every training image on every test image goes to
`teaching.zarr`; its rows, averaged over the test images that show an 8, say what each training image does for that
class. EKFAC makes the scores: two sums over the training set, no solve.

The answer is tested: training images are taken away, the 60 that teach most, or 60 other eights in random order, and
the network is trained anew from three starts. The loss on the test eights must rise more without the first.

About 20 seconds on one core. Prints what the most teaching images show and what taking them away does; draws the images
that teach most and those that harm most in teaching.png.

    python examples/which_images_teach_this_class.py --out .
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distinfluence import EkfacInfluence, RelativeDamping, SequentialInfluenceCalculator

N_TRAIN, CLASS, TAKEN = 1200, 8, 60
STARTS = (1, 2, 3)


@dataclass(frozen=True)
class Findings:
    """n_of_class: images of the class among the `TAKEN` that teach most; expected: by chance.

    The losses: mean on the test images of the class, one for each start, with all training images, without the ones
    that teach most, and without as many others of the class.
    """

    n_of_class: int
    expected: float
    loss_with_all: list[float]
    loss_without_teachers: list[float]
    loss_without_others: list[float]


def main(out: Path) -> Findings:
    """Train, score, take away, print, draw."""
    x, y, x_test, y_test = digits()
    influence = EkfacInfluence(trained(x, y), update_diagonal=True, hessian_regularization=RelativeDamping(0.1))
    calculator = SequentialInfluenceCalculator(influence).fit(x, y, chunk_size=300)
    result = calculator.to_zarr(out / "teaching.zarr", x_test, y_test, existing="replace", progress=False)

    asked = y_test.numpy() == CLASS
    grouped = result.group(test=asked)  # rows: the others, the class; columns: training images
    teaches = grouped.values[list(grouped.test_groups).index(True)]
    order = np.argsort(-teaches)
    teachers = order[:TAKEN]
    eights = np.flatnonzero(y.numpy() == CLASS)
    others = np.random.default_rng(0).permutation(np.setdiff1d(eights, teachers))[:TAKEN]

    def losses_without(taken: np.ndarray) -> list[float]:
        keep = torch.from_numpy(np.setdiff1d(np.arange(N_TRAIN), taken))
        return [loss(trained(x[keep], y[keep], seed), x_test[asked], y_test[asked]) for seed in STARTS]

    found = Findings(
        n_of_class=int((y[torch.from_numpy(teachers)] == CLASS).sum()),
        expected=TAKEN * eights.size / N_TRAIN,
        loss_with_all=losses_without(np.array([], dtype=int)),
        loss_without_teachers=losses_without(teachers),
        loss_without_others=losses_without(others),
    )
    print(
        f"Of the {TAKEN} training images that teach the class {CLASS} most, {found.n_of_class} show it; "
        f"by chance {found.expected:.0f} would."
    )
    print(f"Mean loss on the {asked.sum()} test images of the class, for {len(STARTS)} starts:")
    print(f"  with all training images            {shown(found.loss_with_all)}")
    print(f"  without {len(others)} others of the class      {shown(found.loss_without_others)}")
    print(f"  without the {TAKEN} that teach it most   {shown(found.loss_without_teachers)}")
    draw(out / "teaching.png", x, y, order)
    return found


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1200, 1, 8, 8] with labels, test images [597, 1, 8, 8] with labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels[order])
    return x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:]


def trained(x: Tensor, y: Tensor, seed: int = 0) -> nn.Module:
    """Two convolutions and a linear layer, after 15 epochs."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    for _ in range(15):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy."""
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def shown(losses: list[float]) -> str:
    """Each, and their mean."""
    return "  ".join(f"{value:.3f}" for value in losses) + f"   mean {np.mean(losses):.3f}"


def draw(path: Path, x: Tensor, y: Tensor, order: np.ndarray) -> None:
    """The images that teach the class most, and those that harm it most."""
    rows = {"teach most": order[:12], "harm most": order[::-1][:12]}
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    grid = figure.subplots(len(rows), 12)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, i in zip(line, images.tolist(), strict=True):
            axes.imshow(x[i, 0].numpy(), cmap="gray_r")
            axes.set_title(int(y[i]), fontsize=9)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    figure.suptitle(f"Training images by what they do for the class {CLASS}, with their labels", fontsize=10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the result and the picture")
    main(parser.parse_args().out)
