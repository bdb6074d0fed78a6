"""Influences by the definition: gradients by `backward` of the module itself, matrices by differences of them."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

STEP = 1e-6  # of differences in float64: errors of about 1e-9


class Dense:
    """A copy of a model in float64, whose parameters are moved one by one."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], damping: float, mode: str) -> None:
        self.model, self.loss, self.damping, self.mode = copy.deepcopy(model).double(), loss, damping, mode
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.at = torch.cat([p.detach().flatten() for p in self.parameters])

    def move(self, to: Tensor) -> None:
        start = 0
        for p in self.parameters:
            p.data.copy_(to[start : start + p.numel()].view_as(p))
            start += p.numel()

    def outputs(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(_double(x))
        return found

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the mean of the samples' losses."""
        total = torch.zeros_like(self.at)
        for i in range(len(y)):
            self.model.zero_grad()
            self.loss(self.model(_double(x[i : i + 1])), _double(y[i : i + 1])).sum().backward()
            total += torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        return total / len(y)

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        columns = []
        for i in range(len(self.at)):
            sides = []
            for sign in (1, -1):
                moved = self.at.clone()
                moved[i] += sign * STEP
                self.move(moved)
                sides.append(self.gradient(x, y) if self.mode == "hessian" else self.outputs(x))
            columns.append((sides[0] - sides[1]) / (2 * STEP))
        self.move(self.at)
        if self.mode == "hessian":
            return torch.stack(columns)
        jacobian, outputs = torch.stack(columns, dim=-1), self.outputs(x)  # [n, m, p]
        total = torch.zeros(len(self.at), len(self.at), dtype=torch.float64)
        for i in range(len(y)):
            curved = torch.autograd.functional.hessian(
                lambda f, i=i: self.loss(f, _double(y[i : i + 1])).sum(), outputs[i : i + 1]
            )
            m = outputs[i].numel()
            own = jacobian[i].reshape(m, -1)
            total += own.T @ curved.reshape(m, m) @ own
        return total / len(y)

    def influences(self, test: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]) -> Tensor:
        matrix = self.matrix(*train)
        matrix += self.damping * torch.eye(len(matrix), dtype=torch.float64)
        found: Tensor = torch.linalg.solve(matrix, self.rows(*test).T).T @ self.rows(*train).T
        return found

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.gradient(x[i : i + 1], y[i : i + 1]) for i in range(len(y))])


def _double(tensor: Tensor) -> Tensor:
    return tensor.double().clone() if tensor.is_floating_point() else tensor.clone()
