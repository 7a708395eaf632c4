"""Attention over a packed batch: each sequence by itself, no padding, through transformers' AttentionInterface.

query, key, value [1, heads, T, head size]  ──  split at cu_seq_lens  ──  attention  ──  [1, T, heads, head size]
"""

import contextlib
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

__all__ = ["check_packable", "packed_attention"]

NAME = "ptuning_fast_varlen"


def check_packable(model: nn.Module) -> None:
    """TypeError for a model whose attention cannot be given a packed batch, with the reason.

    (What shows only in the arguments of an attention call, such as attention sinks, is refused there.)

    Such are models that do not go through transformers' AttentionInterface, most of them because they add a bias of
    their own to the scores: ALiBi (Bloom), relative positions (T5, DeBERTa, MPNet).
    """
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False) or model.config.is_encoder_decoder:
        raise TypeError(
            f"{name} computes its attention by itself (biases on the scores, or an encoder-decoder), so it cannot be "
            "given a packed batch: take mode='prepend'"
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        raise TypeError(f"{name} has layers of {others}, which packed batches are not served with: take mode='prepend'")


@contextlib.contextmanager
def packed_attention(model: nn.Module):
    """Inside, `model` computes attention for packed batches, from the `cu_seq_lens_q` that its forward is given.

    No mask is registered for this attention, so transformers builds none and nothing waits for the GPU.

    Raises:
        RuntimeError: at the end, where not every layer came here: sequences would have seen each other.
    """
    config = model.config
    before, calls = config._attn_implementation, _Calls()
    config._attn_implementation = NAME
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"calls": calls}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()
        config._attn_implementation = before
    layers = config.get_text_config().num_hidden_layers
    if calls.count != layers:
        raise RuntimeError(
            f"{calls.count} of the {layers} layers of {type(model).__name__} computed packed attention: "
            "take mode='prepend'"
        )


class _Calls:
    count = 0


def varlen_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    cu_seq_lens_q,
    calls,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    **kwargs,
):
    """An attention function of transformers; `calls` counts the layers that came here."""
    unknown = [name for name, value in kwargs.items() if name not in _HARMLESS and value is not None]
    if unknown:
        raise TypeError(
            f"{type(module).__name__} asks for attention with {', '.join(unknown)}, which packed batches are not "
            "served with: take mode='prepend'"
        )
    calls.count += 1
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()  # torch's gradient in half is 5 times as slow
    if softcap is not None:
        key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
    groups = _groups(cu_seq_lens_q.tolist())
    out = []
    # Split, not sliced, and along the rows as they lie in memory: the gradient is then one concatenation.
    parts = [one.transpose(1, 2).split([g * n for g, n in groups], 1) for one in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        for (g, n), *rows in zip(groups, *parts):
            q, k, v = (one.view(g, n, *one.shape[2:]).transpose(1, 2) for one in rows)
            mask = _window(n, sliding_window, causal, q.device)
            if softcap is not None:
                seen = _softcapped(q, k, v, mask, causal, scaling, softcap, dropout)
            else:
                seen = F.scaled_dot_product_attention(
                    *(q, k, v),
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=causal and mask is None,
                    scale=scaling,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            out.append(seen.transpose(1, 2).reshape(1, g * n, *seen.shape[1::2]))
    return torch.cat(out, 1).to(dtype), None


# What models hand to every attention function and what changes nothing here.
_HARMLESS = {"cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "use_cache", "deterministic"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "return_dict", "token_type_ids", "cache_position"}


def _groups(ends):
    """(g, n) for g sequences of n rows, one behind the other: those of one length need no padding among themselves."""
    lengths = [end - start for start, end in pairwise(ends)]
    return [(len(list(same)), n) for n, same in groupby(lengths) if n]


def _window(n, sliding_window, causal, device):
    """[n, n], True where a query may look: less than `sliding_window` away, backwards if causal; None: everywhere."""
    if sliding_window is None or n <= sliding_window:
        return None
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    return ((distance >= 0) if causal else (distance > -sliding_window)) & (distance < sliding_window)


def _softcapped(q, k, v, mask, causal, scaling, softcap, dropout):
    scores = (
        torch.tanh((q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling) / softcap) * softcap
    )
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


AttentionInterface.register(NAME, varlen_attention)
