"""What a score predicts, checked by training again: sign, mean and damping.

The model is a softmax regression on a small, noisy problem with the ridge (λ/2)‖θ‖², whose Hessian is exactly that of
the mean loss plus λI. So the trained θ minimises L(θ) = (1/N) Σ_j ℓ_j(θ) + (λ/2)‖θ‖², and moving the weight of sample j
from 1 to 1 + ε moves the minimiser by −(ε/N) (A + λI)⁻¹ ∇ℓ_j, hence the test loss by −(ε/N)·I[i, j].
"""

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from distinfluence import CgInfluence, DirectInfluence

N, CLASSES, DAMPING = 120, 3, 0.05


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + 8, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = 1.0  # the intercept
    truth = torch.randn(4, CLASSES, generator=generator, dtype=torch.float64)
    y = torch.multinomial((x @ truth).softmax(dim=1), 1, generator=generator)[:, 0]
    return x[:N], y[:N], x[N:], y[N:]


def losses(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(x @ theta.view(CLASSES, 4).T, y, reduction="none")


def trained(x: Tensor, y: Tensor, weights: Tensor, start: Tensor | None = None) -> Tensor:
    """The minimiser by Newton's method, to a gradient of 1e-14; from zero unless started elsewhere."""

    def objective(theta: Tensor) -> Tensor:
        return (weights * losses(theta, x, y)).sum() / N + DAMPING / 2 * theta @ theta

    theta = torch.zeros(4 * CLASSES, dtype=torch.float64) if start is None else start
    for _ in range(50):
        gradient = torch.func.grad(objective)(theta)
        if gradient.norm() < 1e-14:
            return theta
        theta = theta - torch.linalg.solve(torch.func.hessian(objective)(theta), gradient)
    assert torch.func.grad(objective)(theta).norm() < 1e-12
    return theta


def influence_matrix(method: str) -> Tensor:
    x, y, x_test, y_test = problem()
    model = nn.Linear(4, CLASSES, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(trained(x, y, torch.ones(N).double()).view(CLASSES, 4))
    if method == "direct":
        influence: DirectInfluence | CgInfluence = DirectInfluence(model, nn.CrossEntropyLoss(), DAMPING)
    else:
        influence = CgInfluence(model, nn.CrossEntropyLoss(), DAMPING, rtol=1e-12, atol=0.0)
    return influence.fit([(x[:25], y[:25]), (x[25:], y[25:])]).influences(x_test, y_test, x, y)


def test_the_central_difference_of_retrained_models_agrees_to_a_millionth() -> None:
    x, y, x_test, y_test = problem()
    step = 1e-3
    for method in ("direct", "cg"):
        matrix = influence_matrix(method)
        for j in (0, 7, 23):
            up, down = torch.ones(N).double(), torch.ones(N).double()
            up[j] += step
            down[j] -= step
            measured = (losses(trained(x, y, up), x_test, y_test) - losses(trained(x, y, down), x_test, y_test)) / (
                2 * step
            )
            # positive: the sample helps, so more weight on it lowers the test loss. The difference errs by step²/6
            # times a third derivative in ε/N: about 1e-8 relative.
            predicted = -matrix[:, j] / N
            torch.testing.assert_close(measured, predicted, rtol=1e-6, atol=1e-6 * float(predicted.abs().max()))


def test_leaving_samples_out_raises_the_test_loss_as_the_scores_rank() -> None:
    x, y, x_test, y_test = problem()
    matrix = influence_matrix("direct")
    whole = trained(x, y, torch.ones(N).double())
    before = losses(whole, x_test, y_test)
    changes = []
    for j in range(N):
        without = torch.ones(N).double()
        without[j] = 0
        changes.append(losses(trained(x, y, without, whole), x_test, y_test) - before)
    measured = torch.stack(changes, dim=1)
    for i in range(len(x_test)):
        assert spearmanr(measured[i].numpy(), matrix[i].numpy()).statistic >= 0.99
    slope = float((measured * matrix).sum() / (matrix * matrix).sum()) * N
    assert 0.9 < slope < 1.3  # about I/N; removing a whole sample is no infinitesimal step
