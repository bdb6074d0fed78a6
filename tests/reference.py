"""Dense float64 references, made with plain autograd, one sample at a time, sharing no code with the package."""

import pickle
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from tests.zoo import Case

_MADE: dict[tuple[str, Hashable], Tensor] = {}


def _key(case: Case, names: list[str]) -> Hashable:
    """Everything that a matrix depends on, by value."""
    state = {name: tensor.numpy().tobytes() for name, tensor in case.model.state_dict().items()}
    loss = pickle.dumps(case.loss) if isinstance(case.loss, nn.Module) else case.loss
    data = tuple((tensor.shape, tensor.numpy().tobytes()) for tensor in case.train)
    return repr(case.model), tuple(names), tuple(state.items()), loss, data


class Reference:
    """Matrices and influences of a case by brute force, over its trainable parameters in the model's order."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.names = [name for name, p in case.model.named_parameters() if p.requires_grad]
        parameters = dict(case.model.named_parameters())
        self.theta = torch.cat([parameters[name].detach().double().flatten() for name in self.names])
        self._shapes = [parameters[name].shape for name in self.names]
        self._key = _key(case, self.names)

    def _outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in self._shapes])
        tensors = {n: part.view(s) for n, part, s in zip(self.names, parts, self._shapes, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out: Tensor = torch.func.functional_call(self.case.model, tensors, (x,))
        return out

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.case.loss(self._outputs(theta, x), y)
        return loss

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        theta = self.theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(theta, x, y), theta)
        return g

    def gradients(self, data: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([self.gradient(x[None], y[None]) for x, y in zip(*data, strict=True)])

    def hessian(self) -> Tensor:
        return self._mean(lambda x, y: _hessian(lambda t: self.loss(t, x, y), self.theta))

    def ggn(self) -> Tensor:
        def of_one(x: Tensor, y: Tensor) -> Tensor:
            jacobian = torch.autograd.functional.jacobian(lambda t: self._outputs(t, x).flatten(), self.theta)
            outputs = self._outputs(self.theta, x).detach()
            curvature = _hessian(lambda f: self.case.loss(f.view_as(outputs), y), outputs.flatten())
            result: Tensor = jacobian.T @ curvature @ jacobian
            return result

        return self._mean(of_one)

    def empirical_fisher(self) -> Tensor:
        rows = self.gradients(self.case.train)
        return rows.T @ rows / rows.shape[0]

    def matrix(self, mode: str) -> Tensor:
        """ "hessian", "ggn" or "empirical_fisher"; each made once for a case however often it is asked for."""
        if (mode, self._key) not in _MADE:
            _MADE[mode, self._key] = getattr(self, mode)()
        return _MADE[mode, self._key].clone()

    def factors(self, mode: str, damping: float) -> Tensor:
        matrix = self.matrix(mode) + damping * torch.eye(self.theta.numel(), dtype=torch.float64)
        solved: Tensor = torch.linalg.solve(matrix, self.gradients(self.case.test).T)
        return solved.T

    def influences(self, mode: str, damping: float) -> Tensor:
        return self.factors(mode, damping) @ self.gradients(self.case.train).T

    def perturbation(self, mode: str, damping: float) -> Tensor:
        """[n_test, n_train, *input]: the mixed second derivative of each training loss, contracted with each factor."""
        factors = self.factors(mode, damping)
        result = []
        for x, y in zip(*self.case.train, strict=True):
            jacobian = torch.autograd.functional.jacobian(lambda v, y=y: self._input_gradient(v, y), x[None])
            result.append(torch.tensordot(factors, jacobian[:, 0], dims=1))
        return torch.stack(result, dim=1)

    def _input_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        theta = self.theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(theta, x, y[None]), theta, create_graph=True)
        return g

    def _mean(self, of_one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x, y = self.case.train
        return torch.stack([of_one(a[None], b[None]) for a, b in zip(x, y, strict=True)]).mean(dim=0)


def _hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    result: Tensor = torch.autograd.functional.hessian(function, at)
    return result
