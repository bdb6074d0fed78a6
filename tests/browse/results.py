"""Results to look at: the demo's digits, and one of 2000 x 1,000,000 that takes 70 MB of disk."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from distinfluence import CgInfluence, SequentialInfluenceCalculator
from distinfluence.app.demo import test_data, train_data, train_model
from distinfluence.store import InfluenceWriter, Layout, annotate

WIDE = Layout(n_test=2000, n_train=1_000_000, strip=4096)


def digits(path: Path) -> None:
    """Influences of 1500 training digits, 75 of them with a flipped label, on 297 test digits, and the digits."""
    x, y = train_data()
    x_test, y_test = test_data()
    influence = CgInfluence(
        train_model(), nn.CrossEntropyLoss(), 0.01, rtol=1e-3, atol=0.0, maxiter=20, second_order_mode="ggn"
    )
    calculator = SequentialInfluenceCalculator(influence).fit(x, y, chunk_size=500)
    calculator.to_zarr(path, x_test, y_test, progress=False)
    names = [str(digit) for digit in range(10)]
    annotate(path, "train", x.reshape(-1, 8, 8).numpy(), kind="image", labels=y.numpy(), classes=names)
    annotate(path, "test", x_test.reshape(-1, 8, 8).numpy(), kind="image", labels=y_test.numpy(), classes=names)


def wide_strip() -> NDArray[np.float32]:
    """[2000, 4096]: what every strip of the wide result holds."""
    return np.random.default_rng(0).standard_normal((WIDE.n_test, WIDE.strip), dtype=np.float32)


def wide(path: Path) -> None:
    """A complete result of 8 GB whose strips are all one file, linked: every read reads real bytes."""
    writer = InfluenceWriter.create(path, WIDE, {"solver": {"method": "made for a test"}})
    ones = np.ones(WIDE.n_test)
    writer.write_test(slice(0, WIDE.n_test), loss=ones, relative_residual=1e-6 * ones, converged=ones > 0)
    values, points = wide_strip(), np.ones(WIDE.strip)
    writer.write_strip(0, values, loss=points, gradient_norm=points)
    last = WIDE.n_strips - 1
    _link_files(path, last)
    index, value = writer._array("strips/index"), writer._array("strips/value")
    first_index, first_value = np.asarray(index[0]), np.asarray(value[0])
    for i in range(1, last):
        index[i], value[i] = first_index + i * WIDE.strip, first_value
    writer._write_partial_ranking(last, values[:, : WIDE.n_train - last * WIDE.strip])
    writer.finish()


def _link_files(path: Path, last: int) -> None:
    """The files of strip 0 as those of all others, but for the rankings, which name training points."""
    by_row = [path / "influences/c/0", *(path / f"overview/{level.name}/c/0" for level in WIDE.levels)]
    by_point = [path / name / "c" for name in ("train_loss", "train_gradient_norm", "train_total", "strip_status")]
    for folder in (*by_row, *by_point):
        for i in range(1, last + 1):
            os.link(folder / "0", folder / str(i))


def as_text(image: NDArray[np.float32]) -> str:
    """A digit described in words."""
    return f"a digit with {int((image > 0.5).sum())} dark pixels"


def as_image(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """A digit as it is."""
    return image.reshape(8, 8)


def as_row(image: NDArray[np.float32]) -> dict[str, object]:
    """What is counted of a digit."""
    return {"dark": int((image > 0.5).sum()), "mean": float(image.mean())}


def as_both(image: NDArray[np.float32]) -> list[object]:
    """A picture and its caption, which no page should take for markup."""
    return [as_image(image), "<b>a digit</b>"]


def dimmed_train_data() -> tuple[Tensor, Tensor]:
    """As many samples as the digits, but others."""
    x, y = train_data()
    return x * 0.5, y
