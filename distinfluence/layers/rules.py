"""How each operation of torch uses its parameters, one rule an operation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distinfluence.layers.attention import attention
from distinfluence.layers.recorder import Recorder, Rule, Use


def _linear(rec: Recorder, func: Rule, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return rec.linear(input, weight, bias)


def _addmm(rec: Recorder, func: Rule, bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Any:
    out, w, b = func(bias, x, weight, **options), rec.find(weight), rec.find(bias)
    if (w is None and b is None) or options:
        return out
    transposed = w is not None and not w.transposed
    return rec.add(Use("linear", w.name if w else None, b.name if b else None, rec.seen(x), out, transposed=transposed))


def _matmul(rec: Recorder, func: Rule, x: Tensor, weight: Tensor, **options: Any) -> Any:
    out, w = func(x, weight, **options), rec.find(weight)
    if w is None or options or weight.ndim != 2 or x.ndim < 2:
        return out
    return rec.add(Use("linear", w.name, None, rec.seen(x), out, transposed=not w.transposed))


def _conv(
    rec: Recorder, func: Rule, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any
) -> Any:
    out, w, b = func(input, weight, bias, *args, **kw), rec.find(weight), rec.find(bias)
    n_dims = weight.ndim - 2
    if (w is None and b is None) or input.ndim != n_dims + 2:
        return out
    options = dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)) | kw
    options = {"kernel": tuple(weight.shape[2:]), **options}
    names = (w.name if w else None, b.name if b else None)
    return rec.add(Use("conv", *names, rec.seen(input), out, options=options))


def _embedding(rec: Recorder, func: Rule, input: Tensor, weight: Tensor, *args: Any, **kw: Any) -> Any:
    options = (
        dict(zip(("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"), args, strict=False)) | kw
    )
    out, w = func(input, weight, *args, **kw), rec.find(weight)
    # scale_grad_by_freq makes a sample's gradient depend on its batch; max_norm writes to the weight
    if w is None or w.transposed or options.get("max_norm") is not None or options.get("scale_grad_by_freq"):
        return out
    padding = options.get("padding_idx")
    padding = -1 if padding is None else padding % weight.shape[0]
    return rec.add(Use("embedding", w.name, None, rec.seen(input), out, options={"padding": padding}))


def _norm(
    rec: Recorder, out: Tensor, normalised: Callable[[], Tensor], weight: object, bias: object, spans: Sequence[int]
) -> Tensor:
    w, b = rec.find(weight), rec.find(bias)
    if w is None and b is None:
        return out
    with torch.no_grad():
        input = normalised() if w is not None else None
    return rec.add(Use("pointwise", w.name if w else None, b.name if b else None, input, out, spans=tuple(spans)))


def _layer_norm(
    rec: Recorder,
    func: Rule,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = func(input, normalized_shape, weight, bias, eps)
    spans = (1,) * (input.ndim - len(normalized_shape)) + tuple(normalized_shape)
    return _norm(rec, out, lambda: func(input, normalized_shape, None, None, eps), weight, bias, spans)


def _rms_norm(
    rec: Recorder,
    func: Rule,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    out = func(input, normalized_shape, weight, eps)
    spans = (1,) * (input.ndim - len(normalized_shape)) + tuple(normalized_shape)
    return _norm(rec, out, lambda: func(input, normalized_shape, None, eps), weight, None, spans)


def _group_norm(
    rec: Recorder,
    func: Rule,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = func(input, num_groups, weight, bias, eps)
    spans = (1, input.shape[1]) + (1,) * (input.ndim - 2)
    return _norm(rec, out, lambda: func(input, num_groups, None, None, eps), weight, bias, spans)


def _batch_norm(
    rec: Recorder,
    func: Rule,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    out: Tensor = func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training or running_mean is None:
        return out
    spans = (1, input.shape[1]) + (1,) * (input.ndim - 2)
    return _norm(
        rec,
        out,
        lambda: func(input, running_mean, running_var, None, None, False, momentum, eps),
        weight,
        bias,
        spans,
    )


def _pointwise(rec: Recorder, func: Rule, one: Any, other: Any, multiplies: bool, **options: Any) -> Any:
    """Record a parameter times, or plus, an activation; two parameters are left to comparison with autograd."""
    out, first, second = func(one, other, **options), rec.find(one), rec.find(other)
    if (first is None) == (second is None) or options or not isinstance(out, Tensor):
        return out
    known, parameter, activation = (first, one, other) if first else (second, other, one)
    if known is None or known.transposed or parameter.shape == () or parameter.ndim > out.ndim:
        return out
    spans = (1,) * (out.ndim - parameter.ndim) + tuple(parameter.shape)
    if not multiplies:
        return rec.add(Use("pointwise", None, known.name, None, out, spans=spans))
    if not isinstance(activation, Tensor):
        return out
    return rec.add(Use("pointwise", known.name, None, rec.seen(activation).expand_as(out), out, spans=spans))


def _mul(rec: Recorder, func: Rule, one: Any, other: Any, **options: Any) -> Any:
    return _pointwise(rec, func, one, other, True, **options)


def _plus(rec: Recorder, func: Rule, one: Any, other: Any, **options: Any) -> Any:
    return _pointwise(rec, func, one, other, False, **options)


def _transpose(rec: Recorder, func: Rule, tensor: Any, *args: Any, **kw: Any) -> Any:
    out, known = func(tensor, *args, **kw), rec.find(tensor)
    if known is None or tensor.ndim != 2 or known.rows is not None or out.shape != tensor.shape[::-1]:
        return out
    return rec.alias(out, known, transposed=not known.transposed)


def _attention(rec: Recorder, func: Rule, *args: Any, **kw: Any) -> Any:
    """Attention as its projections and the rest, which torch has in one function."""
    weights = [*args, *kw.values()]
    if all(rec.find(weight) is None for weight in weights):
        return func(*args, **kw)
    expected = func(*args, **kw)
    mixed = attention(rec, *args, **kw)
    if mixed is None:
        return expected
    return mixed, expected[1]


RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.multi_head_attention_forward: _attention,
}


RULES |= dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _conv)


RULES |= dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul)


RULES |= dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul)


RULES |= dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _plus)


RULES |= dict.fromkeys((torch.t, Tensor.t, torch.transpose, Tensor.transpose), _transpose)


RULES |= {getattr(Tensor, name).__get__: _transpose for name in ("T", "mT")}
