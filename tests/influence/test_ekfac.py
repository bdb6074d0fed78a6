"""KFAC and EKFAC against explicitly built matrices in float64, for every kind of layer and way of using one."""

import math

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from distinfluence import EkfacInfluence
from distinfluence.curvature import KroneckerOperator
from distinfluence.curvature.kronecker import Eigenbasis
from distinfluence.layers.units import Unit
from tests.layers.networks import NETWORKS, network
from tests.reference import Reference
from tests.zoo import BUILDERS, Case, build

ALL = [*NETWORKS, *BUILDERS]
UNRECORDED = {
    "a weight used off the record": {"layer.weight"},
    "a bilinear layer and an LSTM": {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
        "bilinear.weight",
        "bilinear.bias",
    },
    "lstm": {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"},
    "branching": {"low.weight", "low.bias", "high.weight", "high.bias"},
}


def case_of(name: str) -> Case:
    return network(name) if name in NETWORKS else build(name, n_train=9, n_test=3)


def fitted(case: Case, update_diagonal: bool = True, damping: float = 0.1, **settings: object) -> EkfacInfluence:
    influence = EkfacInfluence(case.model, update_diagonal, damping, loss=case.loss, **settings)
    return influence.fit(case.train)


def bases(influence: EkfacInfluence) -> list[Eigenbasis]:
    operators = [operator for operator in influence.operators.values() if isinstance(operator, KroneckerOperator)]
    return [basis for operator in operators for basis in operator.bases]


def columns(influence: EkfacInfluence, name: str) -> Tensor:
    """Where a parameter is among the rows, [*shape]."""
    shapes, start = influence.risk.blocks.shapes, 0
    for other, shape in shapes.items():
        if other == name:
            return torch.arange(start, start + shape.numel()).view(shape)
        start += shape.numel()
    raise KeyError(name)


def eigenvectors(influence: EkfacInfluence, basis: Eigenbasis) -> Tensor:
    """[p, size]: each eigenvector of a unit as a dense column over all parameters, built from Kronecker products."""
    unit, (g, o, i) = basis.unit, basis.unit.shape
    left = torch.eye(o).expand(g, o, o).double() if basis.left is None else basis.left
    right = torch.eye(i).expand(g, i, i).double() if basis.right is None else basis.right
    places = _places(influence, unit)
    dense = torch.zeros(influence.n_parameters, g * o * i, dtype=torch.float64)
    for group in range(g):
        own = torch.kron(left[group].contiguous(), right[group].contiguous()).double()
        dense[places[group].flatten().unsqueeze(1), torch.arange(group * o * i, (group + 1) * o * i)] = own
    return dense


def _places(influence: EkfacInfluence, unit: Unit) -> Tensor:
    """The row's column of each entry of the unit's matrix [g, o, i], written down independently of the package."""
    g, o, i = unit.shape
    if unit.treatment in ("dense", "diagonal"):
        return torch.cat([columns(influence, name).flatten() for name in unit.parameters]).view(g, o, i)
    weight = columns(influence, unit.parameters[0])
    weight = (weight.T if unit.transposed else weight).reshape(g, o, -1)
    if unit.has_bias:
        weight = torch.cat([weight, columns(influence, unit.parameters[1]).view(g, o, 1)], dim=2)
    return weight


def in_row_order(influence: EkfacInfluence, matrix: Tensor, reference: Reference) -> Tensor:
    """A reference over the parameters in the model's order, in the order of the influence model's rows."""
    shapes, start, places = {n: p.shape for n, p in reference.case.model.named_parameters()}, 0, {}
    for name in reference.names:
        places[name] = torch.arange(start, start + shapes[name].numel())
        start += shapes[name].numel()
    order = torch.cat([places[name] for name in influence.risk.blocks.shapes])
    return matrix[order][:, order] if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] else matrix[:, order]


@pytest.mark.parametrize("name", ALL)
def test_eigenvectors_are_orthonormal_and_cover_every_parameter(name: str) -> None:
    influence = fitted(case_of(name))
    q = torch.cat([eigenvectors(influence, basis) for basis in bases(influence)], dim=1)
    assert q.shape == (influence.n_parameters, influence.n_parameters)
    torch.testing.assert_close(q.T @ q, torch.eye(q.shape[0]).double(), atol=1e-10, rtol=0)
    assert influence.fit_report.coverage == 1 or name == "a LoRA adapter"
    assert set(influence.fit_report.treatments) == set(influence.risk.blocks.shapes)


@pytest.mark.parametrize("name", ALL)
def test_corrected_eigenvalues_are_the_diagonal_of_the_exact_matrix_in_the_eigenbasis(name: str) -> None:
    """For cross-entropy and squared error the Fisher matrix is the Gauss–Newton matrix, built by autograd alone."""
    case = case_of(name)
    if (
        name == "batch norm and dropout in eval mode"
    ):  # SmoothL1: its Gauss–Newton matrix has no predictive distribution
        case = Case(case.model, nn.MSELoss(), case.train, case.test)
    influence = fitted(case, fisher="exact")
    exact = in_row_order(influence, Reference(case).ggn(), Reference(case))
    for basis in bases(influence):
        q = eigenvectors(influence, basis)
        expected = (q * (exact @ q)).sum(dim=0)
        torch.testing.assert_close(basis.values.flatten(), expected, rtol=1e-9, atol=1e-12 * float(exact.trace()))


@pytest.mark.parametrize("name", ALL)
def test_empirical_eigenvalues_are_mean_squared_gradients_in_the_eigenbasis(name: str) -> None:
    case = case_of(name)
    influence = fitted(case, fisher="empirical")
    rows = in_row_order(influence, Reference(case).gradients(case.train), Reference(case))
    scale = float(rows.square().sum()) / rows.shape[0]
    for basis in bases(influence):
        expected = (rows @ eigenvectors(influence, basis)).square().mean(dim=0)
        torch.testing.assert_close(basis.values.flatten(), expected, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("update_diagonal", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_influences_are_those_of_the_dense_matrix(name: str, update_diagonal: bool) -> None:
    case = case_of(name)
    influence = fitted(case, update_diagonal)
    dense = torch.zeros(influence.n_parameters, influence.n_parameters, dtype=torch.float64)
    for basis in bases(influence):
        q = eigenvectors(influence, basis)
        dense += q * basis.values.flatten() @ q.T
    reference = Reference(case)
    test, train = (in_row_order(influence, reference.gradients(data), reference) for data in (case.test, case.train))
    expected = torch.linalg.solve(dense + 0.1 * torch.eye(dense.shape[0]).double(), test.T).T @ train.T
    found = influence.influences(*case.test, *case.train)
    # ten figures less than float64 has: the condition number of A + λI here is below 1e4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
    by_block = influence.influences_by_block(*case.test, *case.train)
    torch.testing.assert_close(torch.stack(list(by_block.values())).sum(dim=0), found)


@pytest.mark.parametrize("name", ALL)
def test_what_is_recorded_and_what_is_not(name: str) -> None:
    influence = fitted(case_of(name))
    by_autograd = {name for unit in influence.layout.units if not unit.uses for name in unit.parameters}
    assert by_autograd == UNRECORDED.get(name, set())


def test_a_half_of_a_fit_is_one_pass() -> None:
    case = case_of("conv2d")
    assert fitted(case, update_diagonal=False).fit_report.passes == 1
    assert fitted(case, update_diagonal=True).fit_report.passes == 2


# the factors themselves, made with hooks of the test's own


def _hooked(case: Case, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(inputs [N, ...], √p_c-weighted output gradients [N·C, ...]) of a layer, sample by sample, label by label."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(out)

    handle = layer.register_forward_hook(hook)
    deltas = []
    for x in case.train[0]:
        logits = case.model(x[None])
        p = torch.softmax(logits.detach(), dim=1)[0]
        for c in range(p.numel()):
            loss = nn.functional.cross_entropy(logits, torch.tensor([c]))
            (delta,) = torch.autograd.grad(loss, outputs[-1], retain_graph=True)
            deltas.append(delta * p[c].sqrt())
    handle.remove()
    return torch.cat(inputs), torch.cat(deltas)


def _off_diagonal(basis: Tensor, moment: Tensor) -> float:
    rotated = basis.T @ moment @ basis
    return float((rotated - torch.diag(rotated.diagonal())).norm() / moment.norm())


@pytest.mark.parametrize("name", ["linear", "linear on a sequence", "linear on rank four", "linear without bias"])
def test_kfac_of_a_linear_layer_is_the_kronecker_product_of_its_moments(name: str) -> None:
    case = network(name)
    influence = fitted(case, update_diagonal=False)
    layer = case.model[0] if isinstance(case.model, nn.Sequential) else case.model.layer
    assert isinstance(layer, nn.Linear)
    inputs, deltas = _hooked(case, layer)
    n, a, d = inputs.shape[0], inputs.flatten(0, -2), deltas.flatten(0, -2)
    if layer.bias is not None:
        a = torch.cat([a, torch.ones(a.shape[0], 1, dtype=a.dtype)], dim=1)
    positions = a.shape[0]
    expected = torch.kron(d.T @ d / positions, a.T @ a / n)  # one factor 1/T in all
    basis = bases(influence)[0]
    q = torch.kron(_only(basis.left), _only(basis.right))
    torch.testing.assert_close(q * basis.values.flatten() @ q.T, expected, rtol=1e-9, atol=1e-12)


def _only(groups: Tensor | None) -> Tensor:
    assert groups is not None and groups.shape[0] == 1
    return groups[0].contiguous()


@pytest.mark.parametrize("name", ["conv2d", "conv2d, two groups", "conv2d, depthwise", "conv2d, circular padding"])
def test_kfac_of_a_convolution_is_made_of_its_patches_group_by_group(name: str) -> None:
    case = network(name)
    influence = fitted(case, update_diagonal=False)
    layer = case.model.layer
    assert isinstance(layer, nn.Conv2d) and isinstance(layer.padding, tuple)
    inputs, deltas = _hooked(case, layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(inputs, [p for p in reversed(layer.padding) for _ in range(2)], mode=mode)
    groups, n = layer.groups, inputs.shape[0]
    basis = bases(influence)[0]
    assert basis.left is not None and basis.right is not None
    for group in range(groups):
        own = padded.chunk(groups, dim=1)[group]
        a = nn.functional.unfold(own, layer.kernel_size, stride=layer.stride).transpose(1, 2).flatten(0, 1)
        a = torch.cat([a, torch.ones(a.shape[0], 1, dtype=a.dtype)], dim=1)
        d = deltas.chunk(groups, dim=1)[group].flatten(2).transpose(1, 2).flatten(0, 1)
        expected = torch.kron(d.T @ d / a.shape[0], a.T @ a / n)
        q = torch.kron(basis.left[group].contiguous(), basis.right[group].contiguous())
        found = q * basis.values[group].flatten() @ q.T
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_reduced_factors_sum_output_gradients_and_average_inputs() -> None:
    case = network("linear on a sequence")
    influence = fitted(case, update_diagonal=False, weight_sharing="reduce")
    inputs, deltas = _hooked(case, case.model.layer)
    a, d = torch.cat([inputs.mean(dim=1), torch.ones(len(inputs), 1).double()], dim=1), deltas.sum(dim=1)
    expected = torch.kron(d.T @ d / len(inputs), a.T @ a / len(inputs))
    basis = bases(influence)[0]
    q = torch.kron(_only(basis.left), _only(basis.right))
    torch.testing.assert_close(q * basis.values.flatten() @ q.T, expected, rtol=1e-9, atol=1e-12)


def test_kfac_is_exact_for_one_sample_and_one_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = torch.randn(1, 3).double(), torch.randn(1, 1).double()
    influence = EkfacInfluence(model, loss=nn.MSELoss(), hessian_regularization=0.1).fit(data)
    exact = Reference(Case(model, nn.MSELoss(), data, data)).ggn()
    for block, operator in influence.operators.items():
        own = influence.risk.blocks.columns[block]
        torch.testing.assert_close(operator.dense(), exact[own, own], rtol=1e-10, atol=1e-12)


def test_kfac_is_exact_for_a_single_linear_layer_with_squared_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    data = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    influence = EkfacInfluence(model, loss=nn.MSELoss(), hessian_regularization=0.1).fit(data)
    exact = Reference(Case(model, nn.MSELoss(), data, data)).ggn()
    (operator,) = influence.operators.values()
    torch.testing.assert_close(operator.dense(), exact, rtol=1e-10, atol=1e-12)


def test_eigenvalues_of_kfac_have_the_trace_of_the_exact_matrix_with_one_position() -> None:
    # E‖δ‖²‖a‖² is not E‖δ‖²·E‖a‖²: only EKFAC's eigenvalues must have the trace
    case = network("linear")
    exact = float(Reference(case).ggn().trace())
    values = torch.cat([basis.values.flatten() for basis in bases(fitted(case))])
    assert math.isclose(float(values.sum()), exact, rel_tol=1e-10)


@pytest.mark.parametrize("update_diagonal", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d", "linear on a sequence"])
def test_curvlinops_agrees(name: str, update_diagonal: bool) -> None:
    case = network(name)
    kind = EKFACLinearOperator if update_diagonal else KFACLinearOperator
    peer = kind(
        case.model,
        nn.CrossEntropyLoss(),
        list(case.model.parameters()),
        [case.train],
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    dense = (peer @ torch.eye(peer.shape[1], dtype=torch.float64)).detach()
    ours = torch.block_diag(*[operator.dense() for operator in fitted(case, update_diagonal).operators.values()])
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
