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
    groups, T = sequences.groups(), len(key)
    rows = [(g, n if len(query) == T else 1, n) for g, n in groups]
    plain = not (causal or window or softcap or dropout) and query.shape[1] == key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        if plain and query.device.type == "cpu" and query.dtype == torch.float32:
            out = _FullAttention.apply(query, key, value, rows, query.shape[-1] ** -0.5 if scale is None else scale)
        else:
            out = _calls(query, key, value, rows, causal, window, scale, softcap, dropout)
    return out.to(dtype)


def _calls(query, key, value, rows, causal, window, scale, softcap, dropout):
    if softcap is not None:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    out = []
    # Split, not sliced: the gradient is then one concatenation.
    parts = [
        query.split([g * n for g, n, _ in rows]),
        *(one.split([g * n for g, _, n in rows]) for one in (key, value)),
    ]
    for (g, _, n), *tensors in zip(rows, *parts):
        if n == 0:
            out.append(torch.zeros_like(tensors[0]))
            continue
        q, k, v = (one.view(g, -1, *one.shape[1:]).transpose(1, 2) for one in tensors)
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
    kept for the gradient: 4 bytes for each pair of rows and head.
    """

    @staticmethod
    def forward(ctx, query, key, value, rows, scale):
        ctx.rows, ctx.scale = rows, scale
        out, kept = torch.empty_like(query, memory_format=torch.contiguous_format), []
        for places, sizes in _places(rows):
            if sizes[2] == 0:
                out[places[0]] = 0
                continue
            q, k, v = (_heads_first(one, place, sizes[0]) for one, place in zip((query, key, value), places))
            q = q.mul_(scale) if q.data_ptr() != query[places[0]].data_ptr() else q * scale
            weights = torch.bmm(q, k.transpose(1, 2))
            torch.softmax(weights, -1, out=weights)
            _rows_first(torch.bmm(weights, v), out, places[0], sizes[0])
            kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kept = iter(ctx.saved_tensors)
        T, queries = (sum(g * n for g, *ns in ctx.rows for n in ns[which : which + 1]) for which in (1, 0))
        grads = [grad.new_empty(length, *grad.shape[1:]) for length in (queries, T, T)]
        for places, sizes in _places(ctx.rows):
            if sizes[2] == 0:
                grads[0][places[0]] = 0
                continue
            q, k, v, weights = (next(kept) for _ in range(4))
            of_out = _heads_first(grad, places[0], sizes[0])
            _rows_first(torch.bmm(weights.transpose(1, 2), of_out), grads[2], places[2], sizes[0])
            of_weights = torch.bmm(of_out, v.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _rows_first(torch.bmm(of_scores, k).mul_(ctx.scale), grads[0], places[0], sizes[0])
            _rows_first(torch.bmm(of_scores.transpose(1, 2), q), grads[1], places[1], sizes[0])
        return *grads, None, None


def _places(rows):
    """For each group: where its queries, keys and values stand, and (sequences, queries each, keys each)."""
    first_q = first_k = 0
    for g, n_q, n_k in rows:
        q, k = slice(first_q, first_q + g * n_q), slice(first_k, first_k + g * n_k)
        yield (q, k, k), (g, n_q, n_k)
        first_q, first_k = q.stop, k.stop


def _heads_first(one, place, g):
    """Rows [g * n, H, e] as [g * H, n, e]."""
    _, H, e = one.shape
    return one[place].view(g, -1, H, e).transpose(1, 2).reshape(g * H, -1, e)


def _rows_first(one, out, place, g):
    """Put [g * H, n, e] back where the rows were."""
    _, H, e = out.shape
    out[place].view(g, -1, H, e).copy_(one.view(g, H, -1, e).transpose(1, 2))
