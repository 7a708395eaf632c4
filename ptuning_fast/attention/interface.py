"""Packed batches through transformers' models: an attention implementation that is set once and left there.

transformers asks its AttentionInterface for the function that a model's config names, at every layer, and hands it the
keyword arguments of the call. There are two of ours, one over each implementation that a model may have had before:

    sdpa   ->  ptuning_fast_sdpa      with cu_seq_lens_q: each sequence by itself, by varlen.py
    eager  ->  ptuning_fast_eager     without: what sdpa, or the model's own eager attention, makes of the call

So padded calls, `generate`, gradient checkpointing and other threads go on as before. Flash attention takes
`cu_seq_lens_q` by itself, and is left alone.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .arguments import Scores, Sequences
from .by_length import groups_of
from .varlen import varlen_attention

__all__ = ["keeps_attention", "mask_of_packed", "narrowed", "obstacle_of_attention", "serve_packed"]

OURS = "ptuning_fast_"
_MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}  # transformers' own, of the implementations that ours stand over


def serve_packed(model: Any) -> None:
    """From now on, calls of `model` with `cu_seq_lens_q` compute packed attention; others as before.

    Raises:
        TypeError: a model that keeps its implementation.
        ValueError: an implementation that neither knows of sequences nor is one of the two that ours stand over.
    """
    config = model.config
    before = config._attn_implementation
    obstacle = obstacle_of_attention(before)
    if obstacle is not None:
        raise ValueError(f"{type(model).__name__}: {obstacle}")
    if keeps_attention(before):
        return
    model.set_attn_implementation(OURS + before)
    if config._attn_implementation != OURS + before:
        raise TypeError(f"{type(model).__name__} keeps its attention implementation: take mode='prepend'")


def keeps_attention(name: str) -> bool:
    """Whether a model with the attention implementation of this name is prepared as it is: it is ours, or flash."""
    return name.startswith(OURS) or "flash_attention" in name


def obstacle_of_attention(name: str) -> str | None:
    """Why packed batches are not served with the attention implementation of this name; None if they are."""
    base = name.removeprefix(OURS)
    if "flash_attention" in base:
        return None
    if base in _MASKS:
        known = ALL_ATTENTION_FUNCTIONS.get(base), ALL_MASK_ATTENTION_FUNCTIONS.get(base)
        if known == (sdpa_attention_forward if base == "sdpa" else None, _MASKS[base]):
            return None
        return f"somebody has registered an attention or mask of their own as {base!r}: take mode='prepend'"
    return (
        f"the attention implementation is {name!r}, which packed batches are not served with: take mode='prepend', or "
        "load the model with attn_implementation='sdpa'"
    )


def mask_of_packed(model: Any, embeds: Tensor) -> Tensor | None:
    """What to give as `attention_mask` with a packed batch: a model makes none from a 4-D mask, and ours reads none.

    Any other attention adds it to its scores: NaN, so that texts that see each other are never taken for a result.
    """
    ours = model.config._attn_implementation.startswith(OURS)
    return embeds.new_full((1, 1, 1, 1), float("nan")) if ours else None


# In the threads that are in `narrowed`: rows that a sliding window is narrowed to, and what masks have called theirs.
_narrow: dict[int, tuple[int, set[int]]] = {}


@contextlib.contextmanager
def narrowed(rows: int) -> Iterator[None]:
    """Inside, in this thread, models that `serve_packed` has prepared have no wider sliding window than this.

    It is narrowed in the masks that a model asks for and in what it tells its attention, where those who narrow either
    would compute something else. So a text of a few tokens tells the models that do both from those whose masks alone
    know of the window, and which packed attention, without a mask, would serve without it. Whether a row as far away as
    the window is seen stays as the mask has it: those of transformers that see both ways see it, and the attention is
    told one more by some models (ModernBERT) and not by others.
    """
    _narrow[threading.get_ident()] = rows, set()
    try:
        yield
    finally:
        del _narrow[threading.get_ident()]


def _narrowing() -> tuple[int, set[int]] | None:
    return _narrow.get(threading.get_ident()) if _narrow else None


def _window(told: int | None) -> int | None:
    """That of an attention which is told of one."""
    narrowing = _narrowing()
    if told is None or narrowing is None:
        return told
    rows, of_masks = narrowing
    return min(told, rows + (told - 1 in of_masks))


def _mask(base: str, *args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """A mask function of transformers; `local_size` is the window, of which `mask_function` knows as well."""
    narrowing, seen = _narrowing(), kwargs.get("mask_function")
    if narrowing is not None and local_size is not None and seen is not None:
        rows, of_masks = narrowing
        of_masks.add(local_size)
        by = max(local_size - rows, 0)  # farther away than it is; on that side where each function knows of rows
        kwargs["mask_function"] = lambda b, h, q, k: seen(b, h, q, k) & seen(b, h, k + (q - k).abs() + by, k)
        local_size = min(local_size, rows)
    return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, local_size=local_size, **kwargs)


def _base_attention(base: str, module: nn.Module) -> Callable:
    registered: Callable | None = ALL_ATTENTION_FUNCTIONS.get(base)
    if registered is not None:
        return registered
    # Eager: each model's file has its own, and a subclass from elsewhere its parent's.
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))


# What models hand to every attention function and what changes nothing here.
_HARMLESS = {"cu_seq_lens_k", "max_length_k", "position_ids", "use_cache", "deterministic"}
_HARMLESS |= {"output_hidden_states", "return_dict", "token_type_ids", "cache_position"}
_HARMLESS |= {"shift_labels", "num_items_in_batch"}


def _attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    prefix_length: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: [1, heads, T, e] three times, and [1, T, heads, e] back."""
    if cu_seq_lens_q is None:
        return _base_attention(base, module)(module, query, key, value, attention_mask, **kwargs)
    if key.shape[2] != query.shape[2]:
        raise ValueError("a packed batch is for one forward, without a cache: for generate take mode='prepend'")
    causal, window = kwargs.pop("is_causal", None), kwargs.pop("sliding_window", None)
    softcap = kwargs.pop("softcap", None)
    scores = Scores(
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        window=_window(window),
        scale=kwargs.pop("scaling", None),
        softcap=softcap if base == "eager" else None,  # sdpa knows none, and transformers leaves it out or is eager
        dropout=kwargs.pop("dropout", 0.0),
    )
    max_length = kwargs.pop("max_length_q", None)
    if prefix_length and not scores.causal:
        raise TypeError(
            f"{type(module).__name__} is not causal (any more), so texts cannot share a prompt: take mode='packed'"
        )
    unknown = [name for name, value in kwargs.items() if not (name in _HARMLESS or value is None or value is False)]
    if unknown:
        raise TypeError(
            f"{type(module).__name__} asks for attention with {', '.join(unknown)}, which packed batches are not "
            "served with: take mode='prepend'"
        )
    if max_length is None:
        max_length = max((n for _, n in groups_of(cu_seq_lens_q, prefix_length)), default=0)
    sequences = Sequences(cu_seq_lens_q, max_length, prefix_length)
    query, key, value = (one[0].transpose(0, 1) for one in (query, key, value))
    return varlen_attention(query, key, value, sequences, scores)[None], None


# At import, so that a model which is unpickled in another process finds them, too.
for _base in _MASKS:
    AttentionInterface.register(OURS + _base, partial(_attention, _base))
    AttentionMaskInterface.register(OURS + _base, partial(_mask, _base))
