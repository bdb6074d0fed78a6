"""The user's model is afterwards as it was before, whatever was computed and also after an exception."""

import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import CgInfluence, DirectInfluence, EmpiricalRisk, SecondOrderMode
from distinfluence.errors import DistinfluenceError, ModelError, ModelModeError, NonFiniteError
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.model.gradients import loss_gradients, mixed_gradients
from distinfluence.model.objective import as_objective
from distinfluence.model.sample_risk import SampleRisk
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, Recurrent, build


class Remembering(nn.Module):
    """Writes in `forward` to a buffer, in place and not, and keeps its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls: Tensor
        self.seen: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        self.last = self.layer(x)
        return self.last


class Caching(nn.Module):
    """Makes a table at its first use and keeps it, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones_like(x[0]) * torch.arange(4, dtype=x.dtype)
        out: Tensor = self.layer(x + self.table)
        return out


def normed_by_a_hook() -> nn.Module:
    """Whose weight is an attribute that a hook writes before each forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))


OWN: dict[str, Callable[[], nn.Module]] = {
    "remembering": Remembering,
    "caching": Caching,
    "weight norm by a hook": normed_by_a_hook,
}


def case_of(name: str) -> Case:
    if name not in OWN:
        return build(name)
    base = build("mlp classification")
    return Case(OWN[name]().double().eval(), base.loss, base.train, base.test)


def condition(model: nn.Module) -> dict[str, object]:
    """What must not change of the model and of torch's global switches; parameters by identity and version."""
    parameters = dict(model.named_parameters())
    return {
        "parameters": {name: (id(p), p._version, p.requires_grad, p.is_leaf) for name, p in parameters.items()},
        "gradients": {name: p.grad is not None and bool((p.grad == 7.0).all()) for name, p in parameters.items()},
        "state": {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        "attributes": [{name: id(value) for name, value in vars(m).items()} for m in model.modules()],
        "hooks": [[len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)] for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "random state": torch.get_rng_state().tolist(),
        "gradients on": torch.is_grad_enabled(),
        "attention kernels": (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = condition(model)
    assert all(before["gradients"].values())  # type: ignore[attr-defined]
    yield
    after = condition(model)
    for name, value in before.items():
        assert after[name] == value, name


@pytest.mark.parametrize("name", [*BUILDERS, *OWN])
def test_the_users_model_is_as_before(name: str) -> None:
    case = case_of(name)
    with unchanged(case.model):
        risk = EmpiricalRisk(case.model, case.loss, case.train)
        loss_gradients(risk.sample, case.train)
        if case.train[0].is_floating_point():
            mixed_gradients(risk.sample, case.train, torch.ones(2, risk.n_parameters, dtype=torch.float64))


@pytest.mark.parametrize("mode", SecondOrderMode)
@pytest.mark.parametrize("name", ["attention", "branching", "batch norm and dropout in eval mode", "remembering"])
def test_the_users_model_is_as_before_after_fit_and_influences(name: str, mode: SecondOrderMode) -> None:
    case = case_of(name)
    next(case.model.parameters()).requires_grad_(False)
    with unchanged(case.model):
        loader = DataLoader(TensorDataset(*case.train), batch_size=5, shuffle=True)
        for kind in (DirectInfluence, CgInfluence):
            model = kind(case.model, case.loss, 1.0, second_order_mode=mode, block_structure="layer_wise").fit(loader)
            model.influences(*case.test, *case.train)
            model.influences_by_block(*case.test, *case.train, mode="perturbation")


def test_a_frozen_batch_norm_in_train_mode_of_another_module_stays_so() -> None:
    """Modes may differ from module to module; each stays as found."""
    case = build("mlp classification")
    case.model[0].train()
    with unchanged(case.model):
        EmpiricalRisk(case.model, case.loss, case.train).value_and_gradient()


@pytest.mark.parametrize("name", OWN)
def test_modules_that_keep_things_between_calls_still_give_the_right_gradients(name: str) -> None:
    case = case_of(name)
    risk = EmpiricalRisk(case.model, case.loss, case.train)
    first = next(risk.sample_gradients()).rows
    risk.value_and_gradient()
    torch.testing.assert_close(next(risk.sample_gradients()).rows, first, rtol=1e-12, atol=1e-14)
    if name != "weight norm by a hook":  # whose hook the reference would leave a mark of
        torch.testing.assert_close(first, Reference(case).gradients(case.train), rtol=1e-10, atol=1e-12)
    pickle.dumps(case.model)  # torch.func's wrappers, left behind, would not


def _fails(outputs: Tensor, y: Tensor) -> Tensor:
    raise ArithmeticError("on purpose")


class FailsAt(nn.Module):
    """Raises from one of its calls on, after it has changed what it keeps."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner = inner
        self._left = [call]  # shared by all copies

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self._left[0] -= 1
        if self._left[0] <= 0:
            raise ArithmeticError("on purpose")
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("call", [1, 2, 3, 8, 12])
def test_the_users_model_is_as_before_also_when_it_raises(call: int) -> None:
    case = build("attention")
    model = FailsAt(case.model, call).eval()

    def work() -> None:
        influence = DirectInfluence(model, case.loss, 1.0).fit(case.train)
        influence.influences(*case.test, mode="perturbation")
        pytest.fail("the model has not been called so often")

    with unchanged(model), pytest.raises((ArithmeticError, ModelError), match="on purpose"):
        work()


def test_the_users_model_is_as_before_also_when_the_input_is_refused() -> None:
    case = build("mlp classification")
    broken = case.test[0].clone()
    broken[0, 0] = torch.nan
    with unchanged(case.model):
        with pytest.raises(ModelError, match="on purpose"):
            EmpiricalRisk(case.model, _fails, case.train)
        with pytest.raises(DistinfluenceError):
            EmpiricalRisk(case.model, case.loss, (case.train[0][:, :2], case.train[1]))
        model = DirectInfluence(case.model, case.loss, 1.0).fit(case.train)
        with pytest.raises(NonFiniteError):
            model.influences(broken, case.test[1])


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3).double()])
def test_a_model_that_is_put_in_train_mode_after_the_fit_is_refused(layer: nn.Module) -> None:
    """Between two evaluations training goes on, and `eval()` is easily forgotten: the scores would be random."""
    case = build("mlp classification")
    net = nn.Sequential(case.model, layer).eval()
    model = DirectInfluence(net, case.loss, 1.0, second_order_mode="ggn").fit(case.train)
    expected = model.influences(*case.test)
    net.train()
    calls: list[Callable[[], Any]] = [
        lambda: model.influences(*case.test),
        lambda: model.influence_factors(*case.test),
        lambda: model.influences_from_factors(torch.zeros(1, model.n_parameters), *case.train),
        lambda: model.fit(case.train),
    ]
    for call in calls:
        with pytest.raises(ModelModeError, match=r"train mode.*eval\(\)"):
            call()
    net.eval()
    assert torch.equal(model.influences(*case.test), expected)


def test_fit_takes_parameters_and_buffers_as_they_are_then() -> None:
    """Not as they were when the influence model was made: training may have gone on in between."""
    case = build("batch norm and dropout in eval mode")
    early = DirectInfluence(case.model, case.loss, 0.1, second_order_mode="ggn")
    norm = case.model[1]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
    with torch.no_grad():
        norm.running_mean.add_(1.0)
        case.model[0].weight.mul_(2.0)
    late = DirectInfluence(case.model, case.loss, 0.1, second_order_mode="ggn").fit(case.train)
    # to rounding, which depends on where tensors happen to lie; the changes are of the order of the values
    torch.testing.assert_close(
        early.fit(case.train).influences(*case.test), late.influences(*case.test), rtol=1e-10, atol=1e-12
    )
    with torch.no_grad():
        case.model[0].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="finite parameters"):
        early.fit(case.train)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", SecondOrderMode)
@pytest.mark.parametrize("name", ["mlp classification", "branching"])
def test_callers_who_switched_gradients_off_get_the_same(
    name: str, mode: SecondOrderMode, switched_off: Callable[[], Any]
) -> None:
    """In inference mode autograd gives zeros, without an error."""
    case = build(name)

    def scores(kind: type[DirectInfluence] | type[CgInfluence]) -> Tensor:
        x, y = case.test[0] * 1.0, case.test[1] * 1  # new tensors, which in inference mode cannot be differentiated
        model = kind(case.model, case.loss, 1.0, second_order_mode=mode).fit([tuple(t * 1 for t in case.train)])
        moved = model.influences_from_factors(model.influence_factors(x, y) * 1.0, x, y, mode="perturbation")
        return torch.cat([model.influences(x, y).flatten(), moved.flatten()])

    for kind in (DirectInfluence, CgInfluence):
        expected = scores(kind)
        with switched_off():
            torch.testing.assert_close(scores(kind), expected, rtol=1e-10, atol=1e-12)
        assert not expected.requires_grad


def test_a_model_with_a_lock_can_be_used() -> None:
    """Nothing of the module is copied or pickled here."""
    case = build("mlp classification")
    expected = DirectInfluence(case.model, case.loss, 1.0).fit(case.train).influences(*case.test)
    case.model.lock = threading.Lock()  # type: ignore[assignment]
    with unchanged(case.model):
        found = DirectInfluence(case.model, case.loss, 1.0).fit(case.train).influences(*case.test)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("recurrent", [True, False])
def test_recurrent_layers_run_without_cudnn_which_is_left_as_it_was(recurrent: bool) -> None:
    seen: list[bool] = []
    net = (Recurrent() if recurrent else nn.Linear(3, 2)).double().eval()
    net.register_forward_pre_hook(lambda module, inputs: seen.append(torch.backends.cudnn.enabled))
    shape = (4, 3, 2) if recurrent else (4, 3)
    risk = SampleRisk(net, as_objective(nn.CrossEntropyLoss()), ParameterBlocks.of(net))
    loss_gradients(risk, risk.place((torch.randn(shape).double(), torch.tensor([0, 1, 0, 1]))))
    assert set(seen) == {not recurrent}
    assert torch.backends.cudnn.enabled
