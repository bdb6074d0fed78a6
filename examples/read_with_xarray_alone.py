"""Can I read a result without distinfluence?

A result is a zarr group with named dimensions, so `xarray.open_zarr` opens it, here and in any other tool that reads
zarr. Another process makes a small result, digits again; this one imports xarray and never distinfluence.

About 15 seconds on one core. Prints the rankings, the residuals and where the result comes from; draws the mean
influence of each class on each class in classes.png.

    python examples/read_with_xarray_alone.py --out .
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Findings:
    """shape: of the matrix. best: the training digits that help test digit 0 most, read by xarray.

    own_class_helps: classes that are helped most by their own training digits, of 10.
    """

    shape: tuple[int, int]
    best: list[int]
    own_class_helps: int
    worst_residual: float


def main(out: Path) -> Findings:
    """Have a result made, read it, print, draw."""
    path = out / "digits.zarr"
    subprocess.run([sys.executable, str(Path(__file__).absolute()), "--make", str(path)], check=True)

    dataset = xarray.open_zarr(path, consolidated=False)
    labels = {
        f"{axis}_label": (axis, xarray.open_zarr(path, group=f"samples/{axis}", consolidated=False)["label"].values)
        for axis in ("test", "train")
    }
    influences = dataset["influences"].assign_coords(labels)
    ranked = influences.sel(test=0).compute()
    best = ranked.argsort().values[::-1][:5]
    by_class = influences.groupby("train_label").mean().groupby("test_label").mean().compute()
    by_class = by_class.transpose("test_label", "train_label")

    found = Findings(
        shape=(influences.sizes["test"], influences.sizes["train"]),
        best=best.tolist(),
        own_class_helps=int((by_class.argmax("train_label").values == np.arange(10)).sum()),
        worst_residual=float(dataset["relative_residual"].max()),
    )
    print(dataset["influences"])
    print(f"sign: {dataset.attrs['sign_convention']}" if "sign_convention" in dataset.attrs else sorted(dataset.attrs))
    print(f"worst relative residual {found.worst_residual:.1e}")
    shown = ", ".join(f"{i} (a {int(ranked['train_label'][i])})" for i in best)
    print(f"test digit 0, a {int(ranked['test_label'])}, is helped most by {shown}")
    print(f"{found.own_class_helps} of 10 classes are helped most by their own training digits")
    print(f"distinfluence is imported: {'distinfluence' in sys.modules}")
    draw(out / "classes.png", by_class)
    return found


def draw(path: Path, by_class: xarray.DataArray) -> None:
    """Mean influence of each class on each class."""
    figure = Figure(figsize=(4.8, 4), layout="constrained")
    by_class.plot.imshow(ax=figure.subplots(), cmap="PuOr", cbar_kwargs={"label": "mean influence"})
    figure.axes[0].set(xticks=range(10), yticks=range(10), xlabel="training digits", ylabel="test digits")
    figure.savefig(path, dpi=100)


def make(path: Path) -> None:
    """The result, made elsewhere and by someone else."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from distinfluence import CgInfluence, SequentialInfluenceCalculator, annotate

    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1000]), y[:1000]).backward()
        optimizer.step()
    influence = CgInfluence(model.eval(), nn.CrossEntropyLoss(), 0.01, rtol=1e-4, atol=0.0, second_order_mode="ggn")
    calculator = SequentialInfluenceCalculator(influence).fit(x[:1000], y[:1000], chunk_size=250)
    calculator.to_zarr(path, x[1000:1200], y[1000:1200], existing="replace", progress=False)
    annotate(path, "train", labels=y[:1000].numpy())
    annotate(path, "test", labels=y[1000:1200].numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the result and the picture")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make)
    else:
        main(given.out)
