"""Which houses set this price?

Regression on a table. Real sales of houses would have to be downloaded, so the table here is made up, by a rule that is
written down in `houses()`: 800 sales in a town, of which 40 lie at the lake, and only those teach what the lake adds to
a price. A linear model on seven features learns log prices from it. The question is not "which sales change the loss"
but "which sales push *the predicted price* of this lakeside house up, and which down": a measurement of one's own, as
an `Objective`.

The model is at the minimum of its loss with a ridge, where scores are predictions that can be tested: the script leaves
out one sale after the other, fits again, and compares the change of the price with the predicted one.

A few seconds on one core. Prints the sales that move the price most, and how well the changes were predicted; draws
the comparison in prices.png.

    python examples/which_houses_set_this_price.py --out .
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from distinfluence import DirectInfluence, Objective

COLUMNS = ("living area, m²", "rooms", "age, years", "distance to the station, km", "at the lake")
N, N_LAKESIDE = 800, 40
REFERENCE = 300_000  # €: the network learns log(price / REFERENCE)
RIDGE = 1e-4  # λ: the loss is the mean squared error + λ/2 ‖θ‖²
LEFT_OUT = 100


@dataclass(frozen=True)
class Findings:
    """n_lakeside: houses at the lake among the ten that move the price most; expected: by chance.

    correlation: between predicted and actual changes of the log price when one sale is left out. typical_ratio: the
    median of predicted by actual.
    """

    price: float
    n_lakeside: int
    expected: float
    correlation: float
    typical_ratio: float


class PredictedPrice(Objective):
    """Trained on squared errors of log prices; asks for the prediction itself."""

    convex = True

    def outputs(self, model: Callable[..., Tensor], batch: Any) -> Tensor:
        """Log prices [n]."""
        prices: Tensor = model(batch[0])
        return prices[:, 0]

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Half the squared error of each sale."""
        errors: Tensor = outputs - batch[1]
        return errors**2 / 2

    def measurements(self, model: Callable[..., Tensor], batch: Any) -> Tensor:
        """The predicted log price; the known one, if any, is not looked at."""
        return self.outputs(model, batch)


def main(out: Path) -> Findings:
    """Fit, ask, test the answers, print, draw."""
    table, x, y = houses()
    model = fitted(x, y)
    asked = int(np.flatnonzero(table[:, 4])[0])  # a lakeside house, as if it were for sale again
    house = x[asked : asked + 1], y[asked : asked + 1]
    with torch.no_grad():
        before = float(model(house[0]))

    influence = DirectInfluence(model, PredictedPrice(), RIDGE).fit((x, y))
    # without sale j, the log price would change by I_j / N
    predicted = influence.influences(*house, x, y)[0].numpy() / N

    order = np.argsort(-np.abs(predicted))
    actual = {int(j): price_without(int(j), x, y, house[0]) - before for j in order[:LEFT_OUT]}
    pairs = np.array([(predicted[j], change) for j, change in actual.items()])
    found = Findings(
        price=REFERENCE * float(np.exp(before)),
        n_lakeside=int(table[order[:10], 4].sum()),
        expected=10 * N_LAKESIDE / N,
        correlation=float(np.corrcoef(pairs.T)[0, 1]),
        typical_ratio=float(np.median(pairs[:, 0] / pairs[:, 1])),
    )
    print(f"The house is put at {found.price:,.0f} €: " + described(table[asked]))
    print("The ten sales that move this price most, and what they move it by:")
    for j in order[:10]:
        print(f"  {-predicted[j]:+6.1%}  sold for {REFERENCE * float(y[j].exp()):9,.0f} €  {described(table[j])}")
    print(f"{found.n_lakeside} of the ten lie at the lake; by chance {found.expected:.1f} would.")
    print(
        f"Leaving out {LEFT_OUT} sales one by one and fitting again: correlation of predicted and actual changes "
        f"{found.correlation:.3f}, median ratio {found.typical_ratio:.2f}."
    )
    draw(out / "prices.png", pairs)
    return found


def houses() -> tuple[np.ndarray, Tensor, Tensor]:
    """The table [800, 5], features made of it [800, 7], and log(price / REFERENCE) [800]."""
    random = np.random.default_rng(7)
    area = random.gamma(9.0, 14.0, size=N).clip(30, 350)
    rooms = (area / 28 + random.normal(0, 0.8, size=N)).round().clip(1, 12)
    age = random.uniform(0, 110, size=N).round()
    distance = random.exponential(2.5, size=N).clip(0.1, 15)
    lake = np.zeros(N)
    lake[random.choice(N, size=N_LAKESIDE, replace=False)] = 1.0
    table = np.column_stack([area, rooms, age, distance, lake])
    worth = 9.0 + 0.75 * np.log(area) + 0.03 * rooms - 0.004 * age + 0.00003 * age**2 - 0.06 * distance
    worth += lake * (0.1 * np.log(area) - 0.1)  # the lake adds more to a large house
    log_price = worth + random.normal(0, 0.12, size=N)
    features = np.column_stack([np.log(area), rooms, age, age**2, distance, lake, lake * np.log(area)])
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    return table, torch.tensor(standard), torch.tensor(log_price - np.log(REFERENCE))


def fitted(x: Tensor, y: Tensor) -> nn.Linear:
    """At the minimum of the sum of losses / N with the ridge."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    ridge = RIDGE * torch.eye(ones.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(ones.T @ ones / N + ridge, ones.T @ y / N)
    model = nn.Linear(x.shape[1], 1, dtype=x.dtype)
    with torch.no_grad():
        model.weight.copy_(solution[:-1])
        model.bias.copy_(solution[-1])
    return model


def price_without(j: int, x: Tensor, y: Tensor, house: Tensor) -> float:
    """The log price of the house after fitting without sale j."""
    keep = torch.arange(N) != j
    with torch.no_grad():
        return float(fitted(x[keep], y[keep])(house))


def described(row: np.ndarray) -> str:
    """A house in words."""
    area, rooms, age, distance, lake = row
    place = "at the lake" if lake else "in town"
    return f"{area:.0f} m², {rooms:.0f} rooms, {age:.0f} years, {distance:.1f} km, {place}"


def draw(path: Path, pairs: np.ndarray) -> None:
    """Predicted against actual changes, in per cent of the price."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    edge = 110 * np.abs(pairs).max()
    axes.plot([-edge, edge], [-edge, edge], color="0.7", linewidth=1)
    axes.scatter(100 * pairs[:, 0], 100 * pairs[:, 1], s=24)
    axes.set(
        xlabel="predicted by the score, %",
        ylabel="after fitting without the sale, %",
        title="Change of the price, one point for each sale left out",
    )
    axes.title.set_fontsize(10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    main(parser.parse_args().out)
