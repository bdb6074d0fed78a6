"""Predicted against measured: models trained again without some of their data. Run: python docs/retraining.py.

Draws docs/pictures/retraining.png and writes the table of docs/scores.md, which tests/test_scores_page.py compares
with what `measure` finds. All in float64, some seconds on two cores.
"""

import copy
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distinfluence import DirectInfluence

DOCS = Path(__file__).parent
TABLE = re.compile(r"(?<=<!-- by docs/retraining.py -->\n\n)\|.*?\n(?=\n)", re.DOTALL)
N, N_TEST = 400, 40
RIDGE = 0.01  # of the convex model, and its damping
DECAY, DAMPING = 0.001, 0.01  # of the network
SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    """Changes of the test losses, [retrainings, n_test], by the scores and by retraining. about: model and removal."""

    about: str
    predicted: Tensor
    measured: Tensor

    @property
    def slope(self) -> float:
        """Measured over predicted, by least squares: 1 where the sizes are right."""
        return float((self.predicted * self.measured).sum() / self.predicted.square().sum())

    @property
    def ranking(self) -> float:
        """Spearman's rank correlation over the retrainings, the mean over test points."""
        pairs = zip(self.predicted.T, self.measured.T, strict=True)
        return float(np.mean([np.corrcoef(_ranks(one), _ranks(other))[0, 1] for one, other in pairs]))


def _ranks(values: Tensor) -> NDArray[np.int64]:
    return np.argsort(np.argsort(values.numpy(), kind="stable"), kind="stable")


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """400 training and 40 test digits."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: N + N_TEST]
    x, y = torch.tensor(images)[order] / 16, torch.tensor(labels)[order]
    return x[:N], y[:N], x[N:], y[N:]


def without(groups: Tensor) -> Tensor:
    """groups [r, k] of indices → weights [r, N], 0 for what is left out."""
    return torch.ones(len(groups), N, dtype=torch.float64).scatter(1, groups, 0.0)


def some(size: int, count: int) -> Tensor:
    """`count` random groups of `size` training points."""
    generator = torch.Generator().manual_seed(size)
    return torch.stack([torch.randperm(N, generator=generator)[:size] for _ in range(count)])


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[n]."""
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y, reduction="none")


def softmax_regression(weights: Tensor, start: nn.Module | None = None) -> nn.Module:
    """The minimum of (1/N) Σ w_j ℓ_j + RIDGE/2 ‖θ‖², from a start that does not matter."""
    x, y, _, _ = digits()
    model = copy.deepcopy(start) if start is not None else nn.Linear(64, 10).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        ridge = RIDGE / 2 * sum(p.square().sum() for p in model.parameters())
        loss = (weights * nn.functional.cross_entropy(model(x), y, reduction="none")).mean() + ridge
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return model.eval()


def convex(size: int, count: int) -> Comparison:
    """Random groups left out of the softmax regression, each time trained to the minimum again."""
    x, y, x_test, y_test = digits()
    whole, weights = softmax_regression(torch.ones(N).double()), without(some(size, count))
    scores = DirectInfluence(whole, nn.CrossEntropyLoss(), RIDGE).fit((x, y)).influences(x_test, y_test, x, y)
    before = losses(whole, x_test, y_test)
    measured = torch.stack([losses(softmax_regression(w, whole), x_test, y_test) - before for w in weights])
    return Comparison(f"softmax regression, {size} of {N} left out", (1 - weights) @ scores.T / N, measured)


def networks(weights: Tensor, seed: int) -> list[nn.Module]:
    """One MLP 64-16-10 for each row of weights [r, N], from the same start; all are trained at once."""
    x, y, _, _ = digits()
    torch.manual_seed(seed)
    start, r = network(), len(weights)
    layers = [p.detach().expand(r, *p.shape).clone().requires_grad_() for p in start.parameters()]
    optimizer = torch.optim.AdamW(layers, lr=0.01, weight_decay=DECAY)
    for _ in range(250):
        optimizer.zero_grad()
        hidden = torch.tanh(torch.baddbmm(layers[1][:, None], x.expand(r, -1, -1), layers[0].mT))
        outputs = torch.baddbmm(layers[3][:, None], hidden, layers[2].mT)
        each = nn.functional.cross_entropy(outputs.flatten(0, 1), y.repeat(r), reduction="none").view(r, N)
        (weights * each).mean(dim=1).sum().backward()
        optimizer.step()
    trained = []
    for i in range(r):
        model = network()
        model.load_state_dict(dict(zip(model.state_dict(), (layer[i].detach() for layer in layers), strict=True)))
        trained.append(model.eval())
    return trained


def network() -> nn.Module:
    """Untrained."""
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def nonconvex(size: int, count: int, seeds: int) -> Comparison:
    """Random groups left out of the network's data, both sides averaged over so many seeds."""
    x, y, x_test, y_test = digits()
    weights = without(some(size, count))
    predicted, measured = torch.zeros(count, N_TEST).double(), torch.zeros(count, N_TEST).double()
    for seed in range(seeds):
        whole, *others = networks(torch.cat([torch.ones(1, N).double(), weights]), seed)
        influence = DirectInfluence(whole, nn.CrossEntropyLoss(), DAMPING, second_order_mode="ggn").fit((x, y))
        predicted += (1 - weights) @ influence.influences(x_test, y_test, x, y).T / N / seeds
        before = losses(whole, x_test, y_test)
        measured += torch.stack([losses(other, x_test, y_test) - before for other in others]) / seeds
    trained = "1 seed" if seeds == 1 else f"mean of {seeds} seeds"
    return Comparison(f"network, {trained}, {size} of {N} left out", predicted, measured)


def measure() -> list[Comparison]:
    """What the page shows, in order."""
    return [
        convex(1, 50),
        convex(20, 30),
        convex(200, 30),
        nonconvex(1, 50, 1),
        nonconvex(200, 30, 1),
        nonconvex(200, 30, SEEDS),
    ]


def table(found: list[Comparison]) -> str:
    """Markdown."""
    lines = ["| | rank correlation | measured / predicted |", "|---|---|---|"]
    lines += [f"| {each.about} | {each.ranking:.3f} | {each.slope:.2f} |" for each in found]
    return "\n".join(lines) + "\n"


def draw(found: list[Comparison], path: Path) -> None:
    """One panel for each comparison; on a transparent ground, in colours for light and dark pages."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey = "#808890"
    colours = {f"{part}.{what}": grey for part, what in (("axes", "edgecolor"), ("axes", "labelcolor"))}
    with rc_context({**colours, "text.color": grey, "xtick.color": grey, "ytick.color": grey, "font.size": 9}):
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, each in zip(figure.subplots(2, 3).flat, found, strict=True):
            axes.set_facecolor("none")
            axes.axline((0, 0), slope=1, color=grey, linewidth=0.8, zorder=0)
            colour = "#2f81f7" if "network" not in each.about else "#e8833a"
            axes.plot(each.predicted.flatten(), each.measured.flatten(), ".", color=colour, markersize=2.5, alpha=0.6)
            axes.set_title(each.about.replace(", ", "\n", 1), fontsize=9)
            axes.locator_params(nbins=4)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.supxlabel("predicted change of the loss of a test digit", fontsize=9)
        figure.supylabel("measured", fontsize=9)
        figure.savefig(path, dpi=110, transparent=True)


def main() -> None:
    """Draw, and put the table into the page."""
    found = measure()
    draw(found, DOCS / "pictures" / "retraining.png")
    page = DOCS / "scores.md"
    page.write_text(TABLE.sub(lambda _: table(found), page.read_text()))


if __name__ == "__main__":
    main()
