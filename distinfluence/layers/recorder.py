"""What meets each parameter in a forward pass: the inputs of layers, and their outputs in the autograd graph.

`Recorder` watches the calls of torch's functions for covered parameters, wherever they are made: a module that is
called twice, a weight that two modules share, attention with packed projections and a functional call in a custom
module all come to the same. The user's model gets no hooks. What it does not know is found out by comparison with
autograd (see `LayerLayout`), never assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Use:
    """One meeting of parameters with an activation.

    rule: "linear", "conv", "embedding" (outer products of input and output gradient), or "pointwise". weight, bias:
    names of covered parameters. transposed: the weight is [in, out]. rows, bias_rows: the range of the weight's output
    rows and of the bias that was used, None for all. input: detached; for "pointwise" what the weight is multiplied
    with, None without a weight. output: in the graph. options: of a convolution. spans: for "pointwise", the
    parameters' shape among the dimensions of the output.
    """

    rule: str
    weight: str | None
    bias: str | None
    input: Tensor | None
    output: Tensor
    transposed: bool = False
    rows: tuple[int, int] | None = None
    bias_rows: tuple[int, int] | None = None
    options: Mapping[str, Any] | None = None
    spans: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Alias:
    """A covered parameter under another tensor: its transpose, or a range of its rows."""

    name: str
    tensor: Tensor  # held, so that its id stays its own
    transposed: bool = False
    rows: tuple[int, int] | None = None


class Recorder(TorchFunctionMode):
    """Records the uses of parameters while it is active.

    rules: function of torch → what to do when it is called (see `rules`). parameters: name → the very tensors that the
    model is called with. n: samples of the batch. expanded: numbers of the
    uses whose output has no sample dimension (position embeddings) and is given one. cloned: hand out copies, for
    models that change a layer's output in place.
    """

    def __init__(
        self,
        rules: Mapping[Any, Rule],
        parameters: Mapping[str, Tensor],
        n: int,
        expanded: Sequence[int] = (),
        cloned: bool = False,
    ) -> None:
        super().__init__()
        self._rules = rules
        self.uses: list[Use] = []
        self.changed_in_place = False
        self._known = {id(tensor): _Alias(name, tensor) for name, tensor in parameters.items()}
        self._n = n
        self._expanded = frozenset(expanded)
        self._cloned = cloned
        self._versions: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the rule of this function handle it, if there is one."""
        rule = self._rules.get(func)
        if rule is None or not torch.is_grad_enabled():  # inside of a custom operator: no gradient gets there
            return func(*args, **(kwargs or {}))
        return rule(self, func, *args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        """Look whether the model changed outputs in place."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        versions = [use.output._version for use in self.uses]
        self.changed_in_place = not self._cloned and versions != self._versions

    def find(self, tensor: object) -> _Alias | None:
        """Return the covered parameter that this tensor is, if any."""
        return self._known.get(id(tensor))

    def alias(self, tensor: Tensor, of: _Alias, *, transposed: bool, rows: tuple[int, int] | None = None) -> Tensor:
        """Know a view of a parameter from now on."""
        self._known[id(tensor)] = _Alias(of.name, tensor, transposed, rows)
        return tensor

    def seen(self, input: Tensor) -> Tensor:
        """Return an input as it is recorded: out of the graph."""
        return input.detach()

    def add(self, use: Use) -> Tensor:
        """Record a use; the output to go on with."""
        output = use.output
        if len(self.uses) in self._expanded:
            output = output if output.ndim and output.shape[0] == 1 else output.unsqueeze(0)
            output = output.expand(self._n, *output.shape[1:])
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.uses.append(Use(**{**use.__dict__, "output": output}))
        self._versions.append(output._version)
        return output.clone() if self._cloned else output

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """input [..., in] · weightᵀ + bias, recorded."""
        out = F.linear(input, weight, bias)
        w, b = self.find(weight), self.find(bias)
        if w is None and b is None:
            return out
        use = Use(
            "linear",
            w.name if w else None,
            b.name if b else None,
            self.seen(input),
            out,
            transposed=w is not None and w.transposed,
            rows=w.rows if w else None,
            bias_rows=b.rows if b else None,
        )
        return self.add(use)


class Shifted(Recorder):
    """Adds a shift to the output of each use, and records inputs in the graph: for derivatives by the outputs.

    shifts: one for each use, of the shape of its output.
    """

    def __init__(
        self, rules: Mapping[Any, Rule], parameters: Mapping[str, Tensor], n: int, shifts: Sequence[Tensor]
    ) -> None:
        super().__init__(rules, parameters, n)
        self._shifts = shifts

    def seen(self, input: Tensor) -> Tensor:
        """In the graph."""
        return input

    def add(self, use: Use) -> Tensor:
        """Record a use; its output plus the shift."""
        output = use.output + self._shifts[len(self.uses)]
        self.uses.append(Use(**{**use.__dict__, "output": output}))
        self._versions.append(output._version)
        return output
