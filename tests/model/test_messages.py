"""What users read when a model, a loss, a target or a number cannot be used: the argument, the cause and the remedy.

Every case is passed through both doors, in memory and chunk by chunk, and must be refused by `fit` or before.
"""

import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    EmpiricalRisk,
    LanguageModelObjective,
    Objective,
    RelativeDamping,
    SequentialInfluenceCalculator,
)
from distinfluence.errors import (
    DistinfluenceError,
    DtypeError,
    EmptyDataError,
    IndexRangeError,
    LossError,
    ModelError,
    ModelModeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    UnsupportedModelError,
)
from distinfluence.model.checks.supported import check_model
from distinfluence.scaling import RunOptions
from distinfluence.solvers import CG, JacobiPreConditioner, NystroemPreConditioner, NystroemSketch

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "own_model.md"
N, CHUNK = 100, 25
torch.manual_seed(0)
X, LABELS, NUMBERS = torch.randn(N, 3), torch.randint(2, (N,)), torch.randn(N)
CROSS_ENTROPY = nn.CrossEntropyLoss()


class Head(nn.Module):
    """A linear model with something done to its outputs."""

    def __init__(self, after: Callable[[Tensor], Any], n_out: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(3, n_out)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.linear(x))


class WithoutGradient(Head):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(x)


class OwnError(Exception):
    """An error that only the user's code knows."""


class Raises(Head):
    """Raises the error in its forward."""

    def __init__(self, error: Exception) -> None:
        super().__init__(torch.tanh)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class Own(Objective):
    """Losses by a function of (outputs, targets)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.function = function

    def outputs(self, model: Any, batch: Any) -> Any:
        return model(batch[0])

    def losses(self, outputs: Tensor, batch: Any) -> Any:
        return self.function(outputs, batch[1])


class Measured(Own):
    """Asks for something without a gradient."""

    def measurements(self, model: Any, batch: Any) -> Tensor:
        right: Tensor = model(batch[0]).argmax(dim=1) == batch[1]
        return right.float()


def linear(n_out: int = 2) -> nn.Linear:
    return nn.Linear(3, n_out)


def with_label(label: int, sample: int = 83) -> Tensor:
    """Labels of which one, far from the first chunk, is another."""
    y = LABELS.clone()
    y[sample] = label
    return y


def ids(largest: int) -> Tensor:
    x = torch.zeros(N, 3, dtype=torch.int64)
    x[:, 0] = largest
    return x


def embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))


def lookup(outputs: Tensor, y: Tensor) -> Tensor:
    weights: dict[str, Tensor] = {}
    return functional.cross_entropy(outputs, y) * weights["of the classes"]


def quantised() -> nn.Module:
    float_model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: nn.Module = torch.ao.quantization.quantize_dynamic(float_model, {nn.Linear}, dtype=torch.qint8)
        return quantised


def whole_numbers() -> nn.Module:
    model = linear()
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(parameter.detach().to(torch.int8), requires_grad=False))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Refused:
    """error, words: what `fit` raises, and a pattern of its message. x, y: the data. cause: of the error, if any."""

    error: type[DistinfluenceError]
    words: str
    model: Callable[[], nn.Module] = linear
    loss: Any = CROSS_ENTROPY
    x: Callable[[], Tensor] = lambda: X
    y: Callable[[], Tensor] = lambda: LABELS
    cause: type[Exception] | None = None


DETACHED = r"`loss` must depend on the model's parameters.*without one\. Take `\.detach\(\)`"
BROADCAST = r"must have targets of the outputs' shape, got outputs \[\d+, 1\] and targets `y` \[\d+\], which broadcast"
OUTSIDE = r"`y` must hold labels from 0 to 1 or -100 \(`ignore_index`\), since the model has 2 outputs, got "

CASES = {
    # the model's kind
    "`nn.DataParallel`": Refused(
        UnsupportedModelError, r"`model` is a DataParallel.*Pass `model\.module`", lambda: nn.DataParallel(linear())
    ),
    "a part in `nn.DataParallel`": Refused(
        UnsupportedModelError,
        r"`model` has at '0' a DataParallel.*Pass `model\.module`",
        lambda: nn.Sequential(nn.DataParallel(linear())),
    ),
    "`torch.jit.trace`": Refused(
        UnsupportedModelError, r"`torch\.jit`.*Pass the eager module", lambda: torch.jit.trace(linear(), X)
    ),
    "`torch.jit.script`": Refused(
        UnsupportedModelError, r"`torch\.jit`.*Pass the eager module", lambda: torch.jit.script(linear())
    ),
    "a part from `torch.jit.trace`": Refused(
        UnsupportedModelError,
        "`model` has at '0' a TopLevelTracedModule.*Pass the eager module",
        lambda: nn.Sequential(torch.jit.trace(linear(), X)),
    ),
    "`nn.LazyLinear`, never called": Refused(
        UnsupportedModelError,
        "parameter 'weight', which is not initialised yet.*on one batch first",
        lambda: nn.LazyLinear(2),
    ),
    "complex parameters": Refused(
        UnsupportedModelError,
        r"parameter 'weight', which is complex64.*`torch\.view_as_real`",
        lambda: nn.Linear(3, 2, dtype=torch.complex64),
    ),
    "a quantised model": Refused(
        UnsupportedModelError, "has at '0' a Linear, whose weights are quantised.*Pass the float model", quantised
    ),
    "parameters in int8": Refused(
        EmptyDataError,
        "one trainable parameter, got 2 parameters, of which some are quantised to int8.*float model",
        whole_numbers,
    ),
    "parameters on the meta device": Refused(
        UnsupportedModelError,
        r"'weight', which is on the meta device.*`load_state_dict`",
        lambda: nn.Linear(3, 2, device="meta"),
    ),
    "sparse parameters": Refused(
        UnsupportedModelError,
        r"'0', whose layout is torch\.sparse_coo.*`to_dense\(\)`",
        lambda: nn.ParameterList([nn.Parameter(torch.eye(3).to_sparse())]),
    ),
    "no trainable parameter": Refused(
        EmptyDataError,
        r"2 parameters, none with `requires_grad`\. Call `requires_grad_\(True\)`",
        lambda: linear().requires_grad_(False),
    ),
    "a module without parameters": Refused(EmptyDataError, "a module without parameters", nn.Tanh),
    "dropout in train mode": Refused(
        ModelModeError,
        r"in train mode with Dropout at '1'.*`model\.eval\(\)`",
        lambda: nn.Sequential(linear(), nn.Dropout()),
    ),
    # its outputs
    "a tuple as output": Refused(
        LossError,
        r"one tensor for a loss of \(outputs, targets\), got tuple of 2.*`Objective`",
        lambda: Head(lambda f: (f, f)),
    ),
    "a dict or `ModelOutput`": Refused(
        LossError, "got dict with 'logits'.*`Objective`.*`outputs`", lambda: Head(lambda f: {"logits": f})
    ),
    "no output": Refused(LossError, "got NoneType.*`Objective`", lambda: Head(lambda f: None)),
    "an objective's tuple": Refused(
        LossError,
        r"`objective\.outputs` must return one tensor, got tuple of 2",
        lambda: Head(lambda f: (f, f)),
        Own(lambda f, y: f[0].sum(dim=1)),
    ),
    "complex outputs": Refused(
        LossError,
        r"`loss` must return real numbers, got torch\.complex64.*`\.abs\(\)`",
        lambda: Head(lambda f: f * 1j),
        lambda f, y: f.mean(),
    ),
    # its errors
    "float64 inputs": Refused(
        DtypeError,
        r"must have the same dtype.*`batch\[0\]` from float64 to float32 with `\.float\(\)`.*`model\.double\(\)`",
        x=lambda: X.double(),
        cause=RuntimeError,
    ),
    "float32 inputs, float64 model": Refused(
        DtypeError, r"from float32 to float64 with `\.double\(\)`.*`model\.float\(\)`", lambda: linear().double()
    ),
    "whole numbers as inputs": Refused(
        DtypeError, r"`batch\[0\]` from int64 to float32 with `\.float\(\)`", x=lambda: X.long(), cause=RuntimeError
    ),
    "complex inputs": Refused(
        DtypeError, r"`batch\[0\]` as real numbers: `torch\.view_as_real`", x=lambda: X.to(torch.complex64)
    ),
    "ids that are not whole": Refused(
        DtypeError, r"`batch\[0\]` from float32 to whole numbers with `\.long\(\)`", embedded, x=lambda: ids(1).float()
    ),
    "inputs of another shape": Refused(
        ShapeError,
        r"\[\d+, 2\].*: mat1 and mat2 shapes cannot be multiplied \(\d+x2 and 3x2\)\. Pass batches of the shape",
        x=lambda: X[:, :2],
        cause=RuntimeError,
    ),
    "ids beyond an embedding": Refused(
        IndexRangeError,
        r"index out of range in self.*below `num_embeddings`; `batch\[0\]` has 0 to 7\.",
        embedded,
        x=lambda: ids(7),
        cause=IndexError,
    ),
    "a model's `KeyError`": Refused(
        ModelError,
        r"`model` raised KeyError: 'mask' \(.*test_messages\.py, line \d+, in forward: `raise self\.error`\)",
        lambda: Raises(KeyError("mask")),
        cause=KeyError,
    ),
    "a model's own kind of error": Refused(
        ModelError, "`model` raised OwnError: no idea", lambda: Raises(OwnError("no idea")), cause=OwnError
    ),
    "a model's own `ValueError` about a size": Refused(
        ModelError,
        "`model` raised ValueError: the size of the garden",
        lambda: Raises(ValueError("the size of the garden")),
        cause=ValueError,
    ),
    "a model's own error without a message": Refused(
        ModelError, "`model` raised AssertionError: no message", lambda: Raises(AssertionError()), cause=AssertionError
    ),
    "a model that takes other arguments": Refused(
        ModelError,
        r"`model` raised TypeError: .*positional argument.*subclass `Objective` if it must be called in another way",
        lambda: nn.Bilinear(3, 3, 2),
        cause=TypeError,
    ),
    # the loss
    "a loss's `KeyError`": Refused(
        ModelError,
        r"`loss` raised KeyError: 'of the classes' \(.*test_messages\.py, line \d+, in lookup",
        loss=lookup,
        cause=KeyError,
    ),
    "an objective's `KeyError`": Refused(
        ModelError, r"`objective\.losses` raised KeyError: 'of the classes'", loss=Own(lookup), cause=KeyError
    ),
    "a loss that returns a number": Refused(
        LossError,
        r"`loss` must return a tensor, got float.*without `\.item\(\)`",
        loss=lambda f, y: functional.cross_entropy(f, y).item(),
    ),
    "a loss that returns NumPy's number": Refused(
        LossError, r"got float32.*`\.numpy\(\)`", loss=lambda f, y: np.float32(functional.cross_entropy(f, y).item())
    ),
    "a loss that returns an array": Refused(
        LossError, r"got ndarray.*`\.numpy\(\)`", loss=lambda f, y: functional.cross_entropy(f, y).numpy()
    ),
    "a loss that returns nothing": Refused(
        LossError, "`loss` must return a tensor, got None. End it with a `return`", loss=lambda f, y: None
    ),
    "a loss of several numbers": Refused(
        LossError, r"one number for a batch, its mean or its sum, got shape \(\d+, 2\)", loss=lambda f, y: f
    ),
    "a detached loss": Refused(LossError, DETACHED, loss=lambda f, y: functional.cross_entropy(f, y).detach()),
    "a loss made anew": Refused(
        LossError, DETACHED, loss=lambda f, y: torch.as_tensor(functional.cross_entropy(f, y).item())
    ),
    "an accuracy as loss": Refused(LossError, DETACHED, loss=lambda f, y: (f.argmax(dim=1) != y).float().mean()),
    "a model under `no_grad`": Refused(LossError, DETACHED, lambda: WithoutGradient(torch.tanh)),
    "a model that detaches": Refused(LossError, DETACHED, lambda: Head(torch.Tensor.detach)),
    "a question without a gradient": Refused(
        LossError,
        r"`objective\.measurements` must depend on the model's parameters",
        loss=Measured(lambda f, y: functional.cross_entropy(f, y, reduction="none")),
    ),
    "an objective that averages": Refused(
        LossError,
        r"`objective\.losses` must return one loss per sample, \[\d+\], got \(\).*reduction='none'",
        loss=Own(functional.cross_entropy),
    ),
    "an objective's number": Refused(
        LossError, r"`objective\.losses` must return a tensor, got float", loss=Own(lambda f, y: f.sum().item())
    ),
    "an objective's array": Refused(
        LossError, r"`objective\.losses` must return a tensor, got ndarray", loss=Own(lambda f, y: f.sum(1).numpy())
    ),
    "an objective's nothing": Refused(
        LossError, r"`objective\.losses` must return a tensor, got None", loss=Own(lambda f, y: None)
    ),
    # outputs and targets
    "`[n, 1]` outputs, `[n]` targets": Refused(
        ShapeError,
        rf"`loss` \(MSELoss\) {BROADCAST}.*`\.squeeze\(-1\)`.*`y\.unsqueeze\(-1\)`",
        lambda: linear(1),
        nn.MSELoss(),
        y=lambda: NUMBERS,
    ),
    "the same without reduction": Refused(
        ShapeError, BROADCAST, lambda: linear(1), nn.MSELoss(reduction="none"), y=lambda: NUMBERS
    ),
    "the same with equal targets": Refused(  # the mean over n × n differences is then the mean over samples
        ShapeError, BROADCAST, lambda: linear(1), nn.MSELoss(), y=lambda: torch.zeros(N)
    ),
    "the same in a function": Refused(
        ShapeError, rf"`loss` \(huber_loss\) {BROADCAST}", lambda: linear(1), functional.huber_loss, y=lambda: NUMBERS
    ),
    "the same in a partial": Refused(
        ShapeError,
        rf"`loss` \(l1_loss\) {BROADCAST}",
        lambda: linear(1),
        functools.partial(functional.l1_loss, reduction="sum"),
        y=lambda: NUMBERS,
    ),
    "the same in a loss of one's own": Refused(
        LossError,
        r"neither the mean .* nor the sum.*`\.squeeze\(-1\)`",
        lambda: linear(1),
        lambda f, y: ((f - y) ** 2).mean(),
        y=lambda: NUMBERS,
    ),
    "`[n]` outputs, `[n, 1]` targets": Refused(
        ShapeError,
        r"got outputs \[\d+\] and targets `y` \[\d+, 1\], which broadcast.*`y\.squeeze\(-1\)`",
        lambda: Head(lambda f: f.squeeze(-1), 1),
        nn.MSELoss(),
        y=lambda: NUMBERS[:, None],
    ),
    "`[n, 1]` probabilities, `[n]` targets": Refused(
        ShapeError,
        r"`loss` cannot take .* Target size .*\. Drop the last dimension of the outputs \(`\.squeeze\(-1\)`\)",
        lambda: linear(1),
        nn.BCEWithLogitsLoss(),
        y=lambda: LABELS.float(),
        cause=ValueError,
    ),
    "labels `[n, 1]`": Refused(
        ShapeError, r"multi-target not supported.*`y\.squeeze\(-1\)`", y=lambda: LABELS[:, None], cause=RuntimeError
    ),
    "labels that are not whole": Refused(
        DtypeError,
        "`loss` cannot take .*Convert the targets to the dtype",
        y=lambda: LABELS.float(),
        cause=RuntimeError,
    ),
    "a label too large": Refused(IndexRangeError, OUTSIDE + r"\[2\] in samples \[\d+\]", y=lambda: with_label(2)),
    "labels from 1 to C": Refused(
        IndexRangeError,
        OUTSIDE + r"\[2\].*Count the classes from 0",
        y=lambda: LABELS + 1,
        loss=functional.cross_entropy,
    ),
    "a label below 0": Refused(IndexRangeError, OUTSIDE + r"\[-1\].*pass `ignore_index=-1`", y=lambda: with_label(-1)),
    "a label of a partial": Refused(
        IndexRangeError,
        r"0 to 1 or 7 \(`ignore_index`\).*got \[-100\]",
        loss=functools.partial(functional.cross_entropy, ignore_index=7, reduction="sum"),
        y=lambda: with_label(-100),
    ),
    "a label in a loss of one's own": Refused(
        IndexRangeError,
        r"Target 2 is out of bounds.*Labels count from 0 and stay below the number of outputs, got \d to 2",
        loss=lambda f, y: functional.cross_entropy(f, y),
        y=lambda: LABELS + 1,
        cause=IndexError,
    ),
    "a margin loss's label": Refused(
        IndexRangeError, "labels from 0 to 1, since", loss=nn.MultiMarginLoss(), y=lambda: with_label(5)
    ),
    "a sample whose labels are all ignored": Refused(
        NonFiniteError, r"only -100 \(`ignore_index`\).*reduction='sum'", y=lambda: with_label(-100)
    ),
    # tensors
    "sparse inputs": Refused(DtypeError, r"must be dense.*`to_dense\(\)`", x=lambda: X.to_sparse()),
}
IN_MEMORY = {  # tensors whose way through chunks is the data's own matter
    "CSR inputs": Refused(DtypeError, r"layout torch\.sparse_csr.*`to_dense\(\)`", x=lambda: X.to_sparse_csr()),
    "nested inputs": Refused(DtypeError, r"got a nested tensor\. Pad", x=lambda: torch.nested.nested_tensor([*X])),
    "inputs on the meta device": Refused(
        DtypeError, "must have values, got a tensor on the meta", x=lambda: X.to("meta")
    ),
}
IN_MEMORY["sparse inputs"] = CASES.pop("sparse inputs")


def told(case: Refused, fit: Callable[[Refused], object]) -> str:
    """The message with which a case is refused, checked."""
    with _quiet(), pytest.raises(case.error, match=case.words) as raised:
        fit(case)
    assert type(raised.value) is case.error
    if case.cause is not None:
        causes = [raised.value]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        assert type(causes[-1]) is case.cause
    return str(raised.value)


def in_memory(case: Refused) -> object:
    x, y = case.x(), case.y()
    batches = (
        (x, y) if x.is_nested or x.layout != torch.strided else [*zip(x.split(CHUNK), y.split(CHUNK), strict=True)]
    )
    return CgInfluence(case.model(), case.loss, 0.1).fit(batches)


def by_chunks(case: Refused) -> object:
    model = CgInfluence(case.model(), case.loss, 0.1)
    return SequentialInfluenceCalculator(model).fit(case.x(), case.y(), chunk_size=CHUNK)


@pytest.mark.parametrize("name", [*CASES, *IN_MEMORY])
def test_a_fit_says_what_is_wrong_and_what_to_do(name: str) -> None:
    told((CASES | IN_MEMORY)[name], in_memory)


@pytest.mark.parametrize("name", CASES)
def test_a_calculator_says_what_is_wrong_and_what_to_do(name: str) -> None:
    told(CASES[name], by_chunks)


def rows() -> list[tuple[str, str]]:
    """First and last column of the table of the page."""
    table = PAGE.read_text().partition("## What is refused, and what to do")[2].partition("\n## ")[0]
    cells = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [(cell[0].strip(), cell[-1].strip()) for cell in cells[1:]]


@pytest.mark.parametrize(("what", "remedy"), rows())
def test_the_page_gives_the_remedy_of_the_message(what: str, remedy: str) -> None:
    message = told((CASES | IN_MEMORY)[what], in_memory)
    for said in re.findall(r"`([^`]+)`", remedy) or [remedy.rstrip(".")]:
        assert said in message


def test_the_page_has_most_of_what_is_refused() -> None:
    assert len(rows()) > 20


@pytest.mark.parametrize("y", [with_label(2), with_label(-1)], ids=["too large", "below 0"])
def test_labels_of_test_points_are_checked_before_a_solve(y: Tensor) -> None:
    model = DirectInfluence(linear(), CROSS_ENTROPY, 0.1, second_order_mode="ggn").fit((X, LABELS))
    passes = model.reducer.passes
    with pytest.raises(IndexRangeError, match=OUTSIDE):
        model.influences(X, y)
    assert model.reducer.passes == passes


def test_labels_of_tokens_are_checked() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(x))
            return out

    tokens = torch.randint(7, (N, 5))
    labels = tokens.clone()
    labels[::2, 3:] = -100
    EmpiricalRisk(Tokens(), LanguageModelObjective(), (tokens, labels))
    labels[60, 2] = 9
    with pytest.raises(IndexRangeError, match=r"`labels` must hold labels from 0 to 6 or.*\[9\] in samples \[60\]"):
        EmpiricalRisk(Tokens(), LanguageModelObjective(), (tokens, labels))


def test_ignored_labels_and_probabilities_are_labels_too() -> None:
    for loss, y in (
        (nn.CrossEntropyLoss(reduction="sum"), with_label(-100)),
        (nn.CrossEntropyLoss(ignore_index=1, reduction="none"), LABELS),
        (nn.CrossEntropyLoss(), functional.one_hot(LABELS, 2).float()),
        (nn.CrossEntropyLoss(), LABELS.to(torch.uint8)),
        (lambda f, y: functional.mse_loss(f.squeeze(-1), y), NUMBERS),  # shapes that a loss mends itself
    ):
        value, gradient = EmpiricalRisk(linear(1 if y is NUMBERS else 2), loss, (X, y)).value_and_gradient()
        assert 0 < value < math.inf and gradient.isfinite().all()


@pytest.mark.parametrize("fit", [in_memory, by_chunks])
def test_complex_inputs_that_a_model_takes_are_taken(fit: Callable[[Refused], object]) -> None:
    class Magnitudes(Head):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.abs())

    fit(Refused(LossError, "", lambda: Magnitudes(torch.tanh), x=lambda: torch.complex(X, X.flip(0))))


def test_covered_parameters_that_are_not_used_have_no_influence() -> None:
    """No gradient reaches them, and none is lost."""
    model = nn.ModuleDict({"used": linear(), "unused": linear()})
    model.forward = model["used"].forward
    blocks = {"unused": ["unused.weight"]}
    fitted = CgInfluence(model, CROSS_ENTROPY, 0.1, block_structure=blocks, second_order_mode="ggn").fit((X, LABELS))
    assert not fitted.influences(X[:2], LABELS[:2]).any()


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_and_replicated_models_are_told_from_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    sharded = linear()
    for name, parameter in list(sharded.named_parameters()):
        setattr(sharded, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    assert isinstance(sharded.weight, DTensor)
    gather = r"`torch\.distributed\.checkpoint\.state_dict\.get_model_state_dict`.*plain module"
    told(Refused(UnsupportedModelError, rf"parameter 'weight', a DTensor.*{gather}", lambda: sharded), in_memory)
    whole = linear()
    fully_shard(whole, mesh=mesh)
    told(Refused(UnsupportedModelError, rf"`model` is a FSDPLinear.*{gather}", lambda: whole), in_memory)
    replicated = nn.parallel.DistributedDataParallel(linear())
    check_model(replicated)  # in one process it computes what its module does
    monkeypatch.setattr(type(replicated.process_group), "size", lambda self: 2)
    with pytest.raises(UnsupportedModelError, match=r"DistributedDataParallel.*Pass `model\.module`"):
        check_model(replicated)


NUMBER_KINDS: dict[str, Callable[[float], Any]] = {
    "np.float32": np.float32,
    "np.float64": np.float64,
    "array": np.array,
    "tensor": torch.tensor,
    "trained tensor": lambda value: torch.tensor(value, requires_grad=True),
}


def plainly(values: Any) -> None:
    """Every number of a JSON value is Python's own."""
    if isinstance(values, dict):
        for value in values.values():
            plainly(value)
    else:
        assert type(values) in (int, float, bool, type(None), list) or isinstance(values, str)
    json.dumps(values)


@pytest.mark.parametrize("kind", NUMBER_KINDS)
def test_any_kind_of_number_is_a_damping(kind: str) -> None:
    damping = NUMBER_KINDS[kind](0.25)
    for given in (damping, {"full": damping}):
        model = CgInfluence(linear(), CROSS_ENTROPY, given, rtol=damping)
        assert type(model.damping["full"]) is float
        assert model.damping == {"full": 0.25}
        plainly(model.settings())
    assert type(RelativeDamping(damping).fraction) is float
    assert type(CG(damping=damping).damping) is float


def test_influences_take_a_damping_of_any_kind() -> None:
    fitted = DirectInfluence(linear(), CROSS_ENTROPY, 1.0, second_order_mode="ggn").fit((X, LABELS))
    other = fitted.with_damping(np.float32(0.25))
    assert type(other.damping["full"]) is float
    both = fitted.influences_at([*torch.tensor([0.25]), 0.25], X[:2], LABELS[:2], X, LABELS)
    assert torch.equal(*both)
    torch.testing.assert_close(other.influences(X[:2], LABELS[:2], X, LABELS), both[0])


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.array, torch.tensor])
def test_any_kind_of_whole_number_is_a_count(whole: Callable[[int], Any]) -> None:
    for solver in (
        NystroemSketch(damping=0.1, rank=whole(3), seed=whole(1)),
        CG(damping=whole(1), maxiter=whole(4)),
        JacobiPreConditioner(num_samples_estimator=whole(2)),
        NystroemPreConditioner(rank=whole(2)),
        RunOptions(chunk_size=whole(4), test_chunk_size=whole(2), panel_size=whole(2), top_k=whole(3)),
    ):
        assert not any(isinstance(getattr(solver, own.name), np.generic | Tensor) for own in fields(solver))
    plainly(EkfacInfluence(linear(), hessian_regularization=0.1, n_draws=whole(2), seed=whole(3)).settings())
    model = ArnoldiInfluence(linear(), CROSS_ENTROPY, 0.1, rank_estimate=whole(4), second_order_mode="ggn")
    plainly(model.settings())


def test_a_run_takes_whole_numbers_of_any_kind(tmp_path: Path) -> None:
    model = DirectInfluence(linear(), CROSS_ENTROPY, np.float32(0.5), second_order_mode="ggn")
    calculator = SequentialInfluenceCalculator(model).fit(X, LABELS, chunk_size=np.int64(50))
    options = RunOptions(test_chunk_size=np.int64(2), top_k=np.int32(3), mantissa_bits=np.int64(10))
    result = calculator.to_zarr(tmp_path / "r", X[:4], LABELS[:4], options=options, progress=False)
    assert result.shape == (4, N)


@pytest.mark.parametrize("wrong", [True, np.True_, "1", None, 1j, np.array([1.0]), torch.tensor([1.0]), -1.0])
def test_what_is_no_number_is_no_damping(wrong: Any) -> None:
    with pytest.raises(SettingError, match="`hessian_regularization` must be a finite number ≥ 0"):
        CgInfluence(linear(), CROSS_ENTROPY, wrong)
    with pytest.raises(SettingError, match="`damping` must be a finite number ≥ 0"):
        CG(damping=wrong)


@pytest.mark.parametrize("wrong", [True, np.True_, 2.0, np.float32(2), "2", 0, -1])
def test_what_is_no_whole_number_is_no_count(wrong: Any) -> None:
    for make in (
        lambda: NystroemSketch(damping=0.1, rank=wrong),
        lambda: CG(damping=0.1, maxiter=wrong),
        lambda: RunOptions(chunk_size=wrong),
        lambda: RunOptions(test_chunk_size=wrong),
        lambda: RunOptions(panel_size=wrong),
    ):
        with pytest.raises(SettingError, match="must be a whole number ≥ 1"):
            make()
    with pytest.raises(DistinfluenceError, match="`chunk_size` must be a whole number of samples ≥ 1"):
        SequentialInfluenceCalculator(CgInfluence(linear(), CROSS_ENTROPY, 0.1)).fit(X, LABELS, chunk_size=wrong)


def test_arguments_in_another_order_are_found() -> None:
    with pytest.raises(
        SettingError, match="`update_diagonal` must be True or False, got CrossEntropyLoss.*by their names"
    ):
        EkfacInfluence(linear(), CROSS_ENTROPY, 0.1)
