"""Attention of many sequences that share their beginning, which is there once.

    rows   p_0 .. p_{P-1} | sequence 1 | sequence 2 | ...      [T, H, e]

Each sequence attends to itself and to all of the prefix: two calls, whose outputs are merged by their log-sum-exps
(Juravsky et al. 2024, arXiv 2402.05099; Ye et al. 2025, arXiv 2501.01005). In the backward each call gets the merged
output and log-sum-exp, as in ring attention (Liu et al. 2023, arXiv 2310.01889), so that the gradient is exact.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Scores, Sequences
from .by_length import groups_of

__all__ = ["merged"]

aten = torch.ops.aten


class Rows(NamedTuple):
    """Which rows of queries and keys belong together: sequence i of the ones with sequence i of the others."""

    cu_q: Tensor  # [B + 1] int32
    cu_k: Tensor
    max_q: int
    max_k: int
    groups: list[tuple[int, int, int]]  # on a CPU: g sequences of n queries and k keys
    causal: bool


def merged(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """Arguments and result are `varlen_attention`'s; no window, softcap or dropout."""
    if query.is_cpu:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    return _Merged.apply(query, key, value, sequences, scale)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> Tensor:
        cu_seq_lens, max_length, P = sequences
        N = len(query) - P
        own_groups = [(g, n, n) for g, n in groups_of(cu_seq_lens, P) if n] if query.is_cpu else []
        own = Rows(cu_seq_lens, cu_seq_lens, max_length, max_length, own_groups, True)
        texts, prefix = (torch.tensor([0, n], dtype=torch.int32, device=query.device) for n in (N, P))
        first = Rows(texts, prefix, N, P, [(1, N, P)], False)
        out, lse = _forward(query, key, value, own, scale)
        seen, seen_lse = _forward(query[P:], key[:P], value[:P], first, scale)
        both = torch.logaddexp(lse[P:], seen_lse)
        weights = [(one - both).exp()[..., None] for one in (lse[P:], seen_lse)]
        out[P:] = (out[P:] * weights[0] + seen * weights[1]).to(out.dtype)
        lse[P:] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = own, first, P, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's once_differentiable would let torch.autograd.grad pass it by
            raise RuntimeError(
                "attention behind a shared prompt cannot be differentiated twice (create_graph=True): run the forward "
                "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or take mode='prepend'"
            )
        query, key, value, out, lse = ctx.saved_tensors
        own, first, P, scale = ctx.rest
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = _backward(grad, query, key, value, out, lse, own, scale)
        more_q, more_k, more_v = _backward(grad[P:], query[P:], key[:P], value[:P], out[P:], lse[P:], first, scale)
        grad_q[P:] += more_q
        grad_k[:P] += more_k
        grad_v[:P] += more_v
        return grad_q, grad_k, grad_v, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, e] and log-sum-exp of the scores [T, H], fp32."""
    if not q.is_cpu:
        ends = (rows.cu_q, rows.cu_k, rows.max_q, rows.max_k)
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *ends, 0.0, rows.causal, False, scale=scale)
        return out, lse.T.contiguous()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for of_q, _, cut in _groups(rows, (q,), (k, v)):
        found = aten._scaled_dot_product_flash_attention_for_cpu(*cut, 0.0, rows.causal, scale=scale)
        for whole, part in zip((out, lse), found):
            whole[of_q] = part.transpose(1, 2).flatten(0, 1)
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: Rows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by q, k and v, where `out` and `lse` are those of all that the queries see."""
    if not q.is_cpu:
        ends, random = (rows.cu_q, rows.cu_k, rows.max_q, rows.max_k), q.new_zeros(2, dtype=torch.int64)
        return aten._flash_attention_backward(
            *(grad, q, k, v, out, lse.T.contiguous(), *ends, 0.0, rows.causal, random.view(torch.uint64), random),
            scale=scale,
        )
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for of_q, of_k, (grad_, q_, out_, lse_, k_, v_) in _groups(rows, (grad, q, out, lse), (k, v)):
        given = (grad_, q_, k_, v_, out_, lse_, 0.0, rows.causal)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, scale=scale)
        for whole, part, where in zip(grads, found, (of_q, of_k, of_k)):
            whole[where] = part.transpose(1, 2).flatten(0, 1)
    return grads


def _groups(
    rows: Rows, of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...]
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """For each group where its queries and keys are, and the tensors cut to it: [g, H, n, e] of [T, H, e]."""
    q = k = 0
    for g, n, keys in rows.groups:
        at_q, at_k = slice(q, q + g * n), slice(k, k + g * keys)
        cut = [one[at_q].unflatten(0, (g, n)).transpose(1, 2) for one in of_queries]
        cut += [one[at_k].unflatten(0, (g, keys)).transpose(1, 2) for one in of_keys]
        yield at_q, at_k, cut
        q, k = at_q.stop, at_k.stop
