"""Attention with one call for the neighbouring sequences of each length, as a CPU does it best.

[T, H, e]  ──  group: g sequences of n rows  ──  [g, H, n, e]  ──  attention  ──  [T, H, e]

And with one call for all of them under a mask, for torch.compile, to which lengths are data.
"""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Scores, Sequences

__all__ = ["by_length", "groups_of", "under_a_mask"]


def groups_of(cu_seq_lens: Tensor, prefix: int = 0) -> list[tuple[int, int]]:
    """(g, n) for each g sequences of n rows that follow each other: those need no padding among themselves.

    Found out once for a tensor, which keeps them: every layer asks. The first call waits for the device, if any.
    Where the first sequence is a prefix of the others, it is a group by itself.
    """
    groups = getattr(cu_seq_lens, "_ptuning_fast_groups", None)
    if groups is None:
        lengths = [end - start for start, end in pairwise(cu_seq_lens.tolist())]
        first = [(1, lengths.pop(0))] if prefix else []
        groups = first + [(len(list(same)), n) for n, same in groupby(lengths)]
        cu_seq_lens._ptuning_fast_groups = groups  # type: ignore[attr-defined]
    return groups


def by_length(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """One call for the neighbouring sequences of each length; arguments and result are `varlen_attention`'s."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()  # torch's gradient in half is 5 times as slow
    (cu_seq_lens, _, P) = sequences
    groups = [(g, n) for g, n in groups_of(cu_seq_lens, P) if n]
    first = [one[:P].transpose(0, 1) for one in (key, value)]
    out: list[Tensor] = []
    with torch.autocast(query.device.type, enabled=False):
        # Split, not sliced: the gradient is then one concatenation.
        parts = [one.split([g * n for g, n in groups]) for one in (query, key, value)]
        for (g, n), *tensors in zip(groups, *parts):
            q, k, v = [one.view(g, n, *one.shape[1:]).transpose(1, 2) for one in tensors]
            before = P if out else 0  # the prefix does not stand before itself
            if before:
                k, v = (torch.cat([one.expand(g, -1, -1, -1), own], 2) for one, own in zip(first, (k, v)))
            cut = before or (scores.window is not None and n > scores.window)
            seen = _attend(q, k, v, _seen(n, before, scores, q.device) if cut else None, scores)
            out.append(seen.transpose(1, 2).reshape(tensors[0].shape))
    return (torch.cat(out) if out else torch.zeros_like(query)).to(dtype)


def under_a_mask(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """The same with a mask [T, T]: no shape depends on the lengths, so one graph serves them all."""
    cu_seq_lens, _, P = sequences
    row = torch.arange(len(query), device=query.device)
    sequence = torch.searchsorted(cu_seq_lens[1:], row, right=True)
    mask, position = sequence[:, None] == sequence, row - cu_seq_lens[sequence]
    if P:
        mask, position = mask | (row < P), torch.where(row < P, row, position + P)
    mask = mask & _near(position[:, None] - position, scores)
    q, k, v = (one.transpose(0, 1)[None] for one in (query, key, value))
    return _attend(q, k, v, mask, scores)[0].transpose(0, 1)


def _seen(n: int, before: int, scores: Scores, device: torch.device) -> Tensor:
    """[n, before + n], True where one of n queries may look: at the rows before, and at its own sequence's."""
    position = torch.arange(before + n, device=device)
    return _near(position[before:, None] - position, scores)


def _near(distance: Tensor, scores: Scores) -> Tensor:
    """True where a row that is so far behind another may look at it."""
    causal, window, *_ = scores
    if window is None:
        return distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return ((distance >= 0) if causal else (distance > -window)) & (distance < window)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """[g, H, n, e] of [g, H, n, e] and twice [g, G, n, e], under `mask`, or with none as `causal` says."""
    causal, _, scale, softcap, dropout = scores
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
    capped = torch.tanh((q @ k.transpose(2, 3)) * (scale or q.shape[-1] ** -0.5) / softcap) * softcap
    if mask is None and causal:
        mask = torch.ones(capped.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        capped = capped.masked_fill(~mask, float("-inf"))
    return F.dropout(capped.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v
