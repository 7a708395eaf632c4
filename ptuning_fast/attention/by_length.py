"""Attention with one call for the neighbouring sequences of each length, as a CPU does it best.

[T, H, e]  ──  group: g sequences of n rows  ──  [g, H, n, e]  ──  attention  ──  [T, H, e]

And with one call for all of them under a mask, for torch.compile, to which lengths are data.
"""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_length", "groups_of", "under_a_mask"]


def groups_of(cu_seq_lens: Tensor) -> list[tuple[int, int]]:
    """(g, n) for each g sequences of n rows that follow each other: those need no padding among themselves.

    Found out once for a tensor, which keeps them: every layer asks. The first call waits for the device, if any.
    """
    groups = getattr(cu_seq_lens, "_ptuning_fast_groups", None)
    if groups is None:
        lengths = [end - start for start, end in pairwise(cu_seq_lens.tolist())]
        groups = [(len(list(same)), n) for n, same in groupby(lengths)]
        cu_seq_lens._ptuning_fast_groups = groups  # type: ignore[attr-defined]
    return groups


def by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """One call for the neighbouring sequences of each length; the arguments are `varlen_attention`'s."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()  # torch's gradient in half is 5 times as slow
    groups = [(g, n) for g, n in groups_of(cu_seq_lens) if n]
    out = []
    with torch.autocast(query.device.type, enabled=False):
        # Split, not sliced: the gradient is then one concatenation.
        parts = [one.split([g * n for g, n in groups]) for one in (query, key, value)]
        for (g, n), *tensors in zip(groups, *parts):
            q, k, v = [one.view(g, n, *one.shape[1:]).transpose(1, 2) for one in tensors]
            mask = None if window is None or n <= window else _seen(n, window, causal, q.device)
            seen = _attend(q, k, v, mask, causal, scale, softcap, dropout)
            out.append(seen.transpose(1, 2).reshape(tensors[0].shape))
    return (torch.cat(out) if out else torch.zeros_like(query)).to(dtype)


def under_a_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """The same with a mask [T, T]: no shape depends on the lengths, so one graph serves them all."""
    T = len(query)
    sequence = torch.searchsorted(cu_seq_lens[1:], torch.arange(T, device=query.device), right=True)
    mask = (sequence[:, None] == sequence) & _seen(T, T if window is None else window, causal, query.device)
    q, k, v = (one.transpose(0, 1)[None] for one in (query, key, value))
    return _attend(q, k, v, mask, causal, scale, softcap, dropout)[0].transpose(0, 1)


def _seen(n: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """[n, n], True where a query may look."""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    return ((distance >= 0) if causal else (distance > -window)) & (distance < window)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """[g, H, n, e] of [g, H, n, e] and twice [g, G, n, e], under `mask`, or with none as `causal` says."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.tanh((q @ k.transpose(2, 3)) * scale / softcap) * softcap
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v
