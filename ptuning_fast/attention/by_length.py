"""Attention with one call for the neighbouring sequences of each length, as a CPU does it best.

[T, H, e]  ──  group: g sequences of n rows  ──  [g, H, n, e]  ──  attention  ──  [T, H, e]
"""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_length", "groups_of"]


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
    if softcap is not None:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    out = []
    with torch.autocast(query.device.type, enabled=False):
        # Split, not sliced: the gradient is then one concatenation.
        parts = [one.split([g * n for g, n in groups]) for one in (query, key, value)]
        for (g, n), *tensors in zip(groups, *parts):
            q, k, v = [one.view(g, n, *one.shape[1:]).transpose(1, 2) for one in tensors]
            mask = _window_mask(n, window, causal, q.device)
            if softcap is not None:
                seen = _softcapped(q, k, v, mask, causal, scale, softcap, dropout)
            else:
                seen = F.scaled_dot_product_attention(
                    *(q, k, v),
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=causal and mask is None,
                    scale=scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            out.append(seen.transpose(1, 2).reshape(tensors[0].shape))
    return (torch.cat(out) if out else torch.zeros_like(query)).to(dtype)


def _window_mask(n: int, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    """[n, n], True where a query may look; None: everywhere, or what `causal` says."""
    if window is None or n <= window:
        return None
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    return ((distance >= 0) if causal else (distance > -window)) & (distance < window)


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.tanh((q @ k.transpose(2, 3)) * scale / softcap) * softcap
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v
