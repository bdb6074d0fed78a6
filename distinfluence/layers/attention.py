"""`torch.nn.functional.multi_head_attention_forward` taken apart: its projections as linear layers of their own."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distinfluence.layers.recorder import Recorder


def attention(
    rec: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Tensor | None:
    """Return the attention's output [T, n, d], recorded; None where an option is not covered here.

    query [T, n, d], key and value [S, n, …], as torch's function takes them; masks are boolean (True: not allowed) or
    added to the scores.
    """
    unusual = (bias_k, bias_v, static_k, static_v)
    if any(tensor is not None for tensor in unusual) or add_zero_attn or query.ndim != 3:
        return None
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
        biases = _thirds(rec, in_proj_bias)
        pairs = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (rec.linear(x, w, b) for x, w, b in pairs if w is not None)
    elif query is key and key is value and in_proj_weight is not None:
        q, k, v = rec.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        pairs = zip((query, key, value), _thirds(rec, in_proj_weight), _thirds(rec, in_proj_bias), strict=True)
        q, k, v = (rec.linear(x, w, b) for x, w, b in pairs if w is not None)
    mixed = _mixed(q, k, v, num_heads, _added(attn_mask, key_padding_mask, is_causal, q, k, num_heads))
    return rec.linear(mixed, out_proj_weight, out_proj_bias)


def _thirds(rec: Recorder, packed: Tensor | None) -> list[Tensor | None]:
    if packed is None:
        return [None, None, None]
    known, parts = rec.find(packed), list(packed.chunk(3))
    size = parts[0].shape[0]
    if known is not None:
        for i, part in enumerate(parts):
            rec.alias(part, known, transposed=False, rows=(i * size, (i + 1) * size))
    return [*parts]


def _added(
    mask: Tensor | None, padding: Tensor | None, is_causal: bool, q: Tensor, k: Tensor, num_heads: int
) -> Tensor | None:
    """All masks as one that is added to scores [n, heads, T, S]."""
    n, length, source = q.shape[1], q.shape[0], k.shape[0]
    total: Tensor | None = None
    if mask is None and is_causal:
        mask = torch.ones(length, source, dtype=torch.bool, device=q.device).triu(1)
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask.reshape(n, num_heads, length, source)
        total = _as_float(mask, q)
    if padding is not None:
        own = _as_float(padding, q).reshape(n, 1, 1, source)
        total = own if total is None else total + own
    return total


def _as_float(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def _mixed(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of [T, n, d] tensors: [T, n, d]."""
    length, n, width = q.shape

    def heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], n, num_heads, -1).permute(1, 2, 0, 3)

    out: Any = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask)
    mixed: Tensor = out.permute(2, 0, 1, 3).reshape(length, n, width)
    return mixed
