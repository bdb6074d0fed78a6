"""Which digits are mislabelled?

Scikit-learn's 8 × 8 digits, 1500 for training and 297 for testing. A tenth of the training labels are replaced by wrong
ones on purpose, so that what is found can be counted. Two scores rank the training digits by suspicion: self-influence,
for which no test digit is needed, and net harm, minus the sum of a digit's influence on all test digits. Beside them:
the training loss, which costs nothing.

About 15 seconds on one core. Prints how many wrong labels each score finds among the 150 most suspicious digits, and
draws the most suspicious ones in mislabelled.png.

    python examples/which_digits_are_mislabelled.py --out .
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distinfluence import CgInfluence
from distinfluence.evaluate import MislabelRecall, mislabel_recall, net_harm

N_TRAIN, N_WRONG = 1500, 150
SHOWN = 12


@dataclass(frozen=True)
class Findings:
    """What each score finds among the 150 most suspicious digits. accuracy: of the network on the test digits."""

    by_self_influence: MislabelRecall
    by_net_harm: MislabelRecall
    by_training_loss: MislabelRecall
    accuracy: float


def main(out: Path) -> Findings:
    """Train, score, print, draw."""
    x, y, x_test, y_test, wrong = digits()
    model = trained(x, y)
    with torch.no_grad():
        accuracy = float((model(x_test).argmax(dim=1) == y_test).float().mean())
        loss = nn.functional.cross_entropy(model(x), y, reduction="none")

    influence = CgInfluence(model, nn.CrossEntropyLoss(), 0.01, rtol=1e-3, second_order_mode="ggn").fit((x, y))
    harm = net_harm(influence.influences(x_test, y_test, x, y))
    itself = influence.self_influences(x, y, rtol=0.05).values.numpy()

    found = Findings(
        by_self_influence=mislabel_recall(itself, wrong, inspected=N_WRONG),
        by_net_harm=mislabel_recall(harm, wrong, inspected=N_WRONG),
        by_training_loss=mislabel_recall(loss, wrong, inspected=N_WRONG),
        accuracy=accuracy,
    )
    print(f"The network reads {accuracy:.1%} of the test digits right; {N_WRONG} of {N_TRAIN} labels are wrong.")
    print(f"Among the {N_WRONG} most suspicious training digits, so many have a wrong label:")
    print(f"  by net harm        {found.by_net_harm.found}")
    print(f"  by self-influence  {found.by_self_influence.found}")
    print(f"  by training loss   {found.by_training_loss.found}")
    print(f"  by chance          {found.by_net_harm.expected:.0f}")
    draw(out / "mislabelled.png", x, y, {"net harm": harm, "self-influence": itself}, set(wrong.tolist()))
    return found


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor, NDArray[np.int64]]:
    """Training digits [1500, 64] with labels, test digits [297, 64] with labels, and which of the former are wrong."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    wrong = np.sort(random.choice(N_TRAIN, size=N_WRONG, replace=False))
    y[wrong] = (y[wrong] + torch.from_numpy(random.integers(1, 10, size=N_WRONG))) % 10
    return x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:], wrong


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """A network 64-32-10, after 30 epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(30):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def draw(path: Path, x: Tensor, y: Tensor, scores: dict[str, NDArray[np.float64]], wrong: set[int]) -> None:
    """The most suspicious digits by each score, with the labels that they were trained on."""
    figure = Figure(figsize=(10, 2.5), layout="constrained")
    grid = figure.subplots(len(scores), SHOWN)
    for row, (name, values) in enumerate(scores.items()):
        for axes, i in zip(grid[row], np.argsort(-values)[:SHOWN].tolist(), strict=True):
            axes.imshow(x[i].reshape(8, 8).numpy(), cmap="gray_r")
            axes.set_title(f"“{int(y[i])}”", color="tab:red" if i in wrong else "black", fontsize=9)
            axes.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(name, fontsize=9)
    figure.suptitle("The most suspicious training digits, with their labels; red: wrong on purpose", fontsize=10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(parser.parse_args().out)
