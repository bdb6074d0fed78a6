"""Which damping should I take?

The damping decides more about the scores than the method does. One fit and one set of gradients serve a whole list: the
digits of `which_digits_are_mislabelled.py`, seven dampings, and a question whose answer is known: for each damping the
script counts how many wrong labels the net harm finds.

About 10 seconds on one core. Prints the table; draws it in dampings.png.

    python examples/sweep_the_damping.py --out .
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distinfluence import KrylovInfluence
from distinfluence.evaluate import mislabel_recall, net_harm

DAMPINGS = [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]
N_TRAIN, N_TEST, N_WRONG = 1000, 200, 100


@dataclass(frozen=True)
class Findings:
    """found: wrong labels among the 100 most harmful digits, one number for each damping; expected: by chance.

    passes: over the training set, for all dampings together, and for the smallest alone. difference: largest one
    between the sweep's scores at 0.01 and those of a fit for 0.01 alone, relative to the largest score.
    """

    found: list[int]
    expected: float
    passes: int
    passes_of_one: int
    difference: float


def main(out: Path) -> Findings:
    """Train, sweep, count, print, draw."""
    x, y, x_test, y_test, wrong = digits()
    model = trained(x, y)

    def fitted(damping: float) -> KrylovInfluence:
        influence = KrylovInfluence(model, nn.CrossEntropyLoss(), damping, rtol=1e-5, second_order_mode="ggn")
        return influence.fit((x, y))

    sweep = fitted(DAMPINGS[0])
    before = sweep.reducer.passes
    scores = sweep.influences_at(DAMPINGS, x_test, y_test, x, y)  # [damping, test, train]
    passes = sweep.reducer.passes - before

    recalls = [mislabel_recall(net_harm(each), wrong, inspected=N_WRONG) for each in scores]
    alone = fitted(0.01)
    by_itself = alone.influences(x_test, y_test, x, y)
    difference = float((scores[DAMPINGS.index(0.01)] - by_itself).abs().max() / by_itself.abs().max())
    smallest = fitted(DAMPINGS[-1])
    before = smallest.reducer.passes
    smallest.influence_factors(x_test, y_test)
    found = Findings(
        found=[recall.found for recall in recalls],
        expected=recalls[0].expected,
        passes=passes,
        passes_of_one=smallest.reducer.passes - before,
        difference=difference,
    )
    print(f"{N_WRONG} of {N_TRAIN} labels are wrong; so many are among the {N_WRONG} most harmful digits:")
    for damping, count in zip(DAMPINGS, found.found, strict=True):
        print(f"  damping {damping:<6g} {count}")
    print(f"  by chance      {found.expected:.0f}")
    print(
        f"{len(DAMPINGS)} dampings took {found.passes} passes over the training set, "
        f"the smallest alone {found.passes_of_one}."
    )
    print(f"Scores at 0.01 differ from those of a fit for 0.01 alone by {difference:.0e} of the largest.")
    draw(out / "dampings.png", found)
    return found


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]:
    """Training digits [1000, 64] with labels, test digits [200, 64] with labels, and which of the former are wrong."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))[: N_TRAIN + N_TEST]
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    wrong = np.sort(random.choice(N_TRAIN, size=N_WRONG, replace=False))
    y[wrong] = (y[wrong] + torch.from_numpy(random.integers(1, 10, size=N_WRONG))) % 10
    return x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:], wrong


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """A network 64-24-10, after 30 epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(30):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def draw(path: Path, found: Findings) -> None:
    """What is found, over the damping."""
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(DAMPINGS, found.found, marker="o")
    axes.axhline(found.expected, color="0.6", linestyle="--")
    axes.text(DAMPINGS[-1], found.expected + 2, "by chance", color="0.4", fontsize=9)
    axes.set(xscale="log", xlabel="damping λ", ylabel=f"wrong labels among {N_WRONG}", ylim=(0, N_WRONG))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(parser.parse_args().out)
