"""What the scores predict on a convex model, against training it again."""

from collections.abc import Mapping

import torch
from scipy.stats import spearmanr
from torch import Tensor

from tests.influence import test_truth as convex


def retraining() -> list[str]:
    """Reweighting and leaving out on a softmax regression, against Newton's method to a gradient of 1e-14."""
    lines = ["| what is done to a training sample | measured against predicted | direct | cg |", "|---|---|---|---|"]
    scores = {method: convex.influence_matrix(method) for method in ("direct", "cg")}
    small = {method: f"{reweighting_error(matrix):.1e}" for method, matrix in scores.items()}
    lines.append(f"| its weight moves by ±0.001, training again | largest relative error | {_cells(small)} |")
    left = leaving_out()
    ranks, slopes = {}, {}
    for method, matrix in scores.items():
        ranks[method] = (
            f"{min(spearmanr(a.numpy(), b.numpy()).statistic for a, b in zip(left, matrix, strict=True)):.4f}"
        )
        slopes[method] = f"{float((left * matrix).sum() / (matrix * matrix).sum()) * convex.N:.3f}"
    lines.append(f"| it is left out, training again | least rank correlation of a test point | {_cells(ranks)} |")
    lines.append(f"| | slope of the rise of the loss on I/N | {_cells(slopes)} |")
    return [*lines, ""]


def _cells(by_method: Mapping[str, str]) -> str:
    return " | ".join(by_method.values())


def reweighting_error(matrix: Tensor, step: float = 1e-3) -> float:
    """Of the change of all test losses with the weight of every tenth sample, relative to the largest of each."""
    x, y, x_test, y_test = convex.problem()
    worst = 0.0
    for j in range(0, convex.N, 10):
        sides = []
        for change in (step, -step):
            weights = torch.ones(convex.N).double()
            weights[j] += change
            sides.append(convex.losses(convex.trained(x, y, weights), x_test, y_test))
        measured, predicted = (sides[0] - sides[1]) / (2 * step), -matrix[:, j] / convex.N
        worst = max(worst, float((measured - predicted).abs().max() / predicted.abs().max()))
    return worst


def leaving_out() -> Tensor:
    """The rise of each test loss when each training sample is left out, [n_test, n_train]."""
    x, y, x_test, y_test = convex.problem()
    whole = convex.trained(x, y, torch.ones(convex.N).double())
    before, changes = convex.losses(whole, x_test, y_test), []
    for j in range(convex.N):
        weights = torch.ones(convex.N).double()
        weights[j] = 0
        changes.append(convex.losses(convex.trained(x, y, weights, whole), x_test, y_test) - before)
    return torch.stack(changes, dim=1)
