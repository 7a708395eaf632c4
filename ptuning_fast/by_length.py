"""Attention with one call for the neighbouring sequences of each length, as a CPU does it best.

[T, H, e]  ──  group: g sequences of n rows  ──  [g, H, n, e]  ──  attention  ──  [T, H, e]
"""

import torch
import torch.nn.functional as F

__all__ = ["by_length"]


def by_length(query, key, value, sequences, *, causal, window, scale, softcap, dropout):
    """One call for the neighbouring sequences of each length; the arguments are `varlen_attention`'s."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()  # torch's gradient in half is 5 times as slow
    groups = sequences.groups()
    plain = not (causal or window or softcap) and query.shape[1] == key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        if plain and query.device.type == "cpu" and query.dtype == torch.float32:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            out = _FullAttention.apply(query, key, value, groups, scale, dropout)
        else:
            out = _calls(query, key, value, groups, causal, window, scale, softcap, dropout)
    return out.to(dtype)


def _calls(query, key, value, groups, causal, window, scale, softcap, dropout):
    if softcap is not None:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    out = []
    # Split, not sliced: the gradient is then one concatenation.
    parts = [one.split([g * n for g, n in groups]) for one in (query, key, value)]
    for (g, n), *tensors in zip(groups, *parts):
        if n == 0:
            continue
        q, k, v = (one.view(g, n, *one.shape[1:]).transpose(1, 2) for one in tensors)
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
    return torch.cat(out) if out else torch.zeros_like(query)


def _window_mask(n, window, causal, device):
    """[n, n], True where a query may look; None: everywhere, or what `causal` says."""
    if window is None or n <= window:
        return None
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    return ((distance >= 0) if causal else (distance > -window)) & (distance < window)


def _softcapped(q, k, v, mask, causal, scale, softcap, dropout):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.tanh((q @ k.transpose(2, 3)) * scale / softcap) * softcap
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


class _FullAttention(torch.autograd.Function):
    """Softmax of the scores, every row seeing its whole sequence, in matrix products of a group of sequences at a time.

    torch's own fused attention takes a third longer at the lengths of texts, its gradient above all. The weights are
    kept for the gradient: 4 bytes for each pair of rows and head, and twice as many more under dropout.
    """

    @staticmethod
    def forward(ctx, query, key, value, groups, scale, dropout):
        ctx.groups, ctx.scale, ctx.dropout = groups, scale, dropout
        out, kept = torch.empty_like(query, memory_format=torch.contiguous_format), []
        for g, q, k, v, of_group in _by_group(groups, query, key, value, out):
            q, k, v = _heads_first(q, g), _heads_first(k, g), _heads_first(v, g)
            weights = _scaled(q, k.transpose(1, 2), scale)
            torch.softmax(weights, -1, out=weights)
            kept += [q, k, v, weights]
            if dropout:
                factors = torch.empty_like(weights).bernoulli_(1 - dropout).div_(max(1 - dropout, 1e-9))
                weights = weights * factors
                kept += [factors, weights]
            _rows_first(torch.bmm(weights, v), of_group, g)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kept = iter(ctx.saved_tensors)
        out = [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(3)]
        for g, of_out, of_query, of_key, of_value in _by_group(ctx.groups, grad, *out):
            q, k, v, weights = (next(kept) for _ in range(4))
            factors, dropped = (next(kept), next(kept)) if ctx.dropout else (None, weights)
            of_out = _heads_first(of_out, g)
            _rows_first(torch.bmm(dropped.transpose(1, 2), of_out), of_value, g)
            of_weights = torch.bmm(of_out, v.transpose(1, 2))
            if ctx.dropout:
                of_weights.mul_(factors)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _rows_first(_scaled(of_scores, k, ctx.scale), of_query, g)
            _rows_first(_scaled(of_scores.transpose(1, 2), q, ctx.scale), of_key, g)
        return *out, None, None, None


def _by_group(groups, *tensors):
    """(g, rows of each of `tensors`) for each group that has rows."""
    parts = (one.split([g * n for g, n in groups]) for one in tensors)
    return ((g, *rows) for (g, n), *rows in zip(groups, *parts) if n)


def _scaled(a, b, scale):
    """scale * a @ b, batch by batch."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _heads_first(rows, g):
    """[g * n, H, e] as [g * H, n, e]: for one sequence a view."""
    _, H, e = rows.shape
    if g == 1:
        return rows.transpose(0, 1)
    return rows.view(g, -1, H, e).transpose(1, 2).reshape(g * H, -1, e)


def _rows_first(heads, out, g):
    """Put [g * H, n, e] back as the rows [g * n, H, e]."""
    _, H, e = out.shape
    if g == 1:
        out.copy_(heads.transpose(0, 1))
    else:
        out.view(g, -1, H, e).copy_(heads.view(g, H, -1, e).transpose(1, 2))
