"""Packed batches through transformers' models: their attention, for one call, is that of varlen.py.

transformers asks its AttentionInterface for the function that `config._attn_implementation` names, at every layer. No
mask is registered for ours, so none is built and nothing waits for the GPU; where the sequences end reaches it as
`cu_seq_lens_q`, among the keyword arguments that models hand down.
"""

import contextlib
import threading
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .varlen import Sequences, varlen_attention

__all__ = ["packed_attention", "refuse_checkpointing", "serve_packed"]

NAME = "ptuning_fast_varlen"


# Configs of the forwards that are under way, by their id: [config, its attention before, how many forwards].
_changed, _lock = {}, threading.Lock()


def _locked():
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _lock  # a lock is not traced


class _Packed:
    """One forward of a packed batch: what the attention was before, where the sequences end, and the layers so far."""

    def __init__(self, model):
        self.config, self.name, self.layers = model.config, type(model).__name__, 0
        self.sequences, self.ended = None, False
        with _locked():  # threads, and the replicas of DataParallel, have forwards under way with one config
            entry = _changed.setdefault(id(self.config), [self.config, self.config._attn_implementation, 0])
            entry[2] += 1
            self.replaced = entry[1]
            self.config._attn_implementation = NAME

    def next_layer(self, cu_seq_lens, max_length=None):
        """Count a layer, and say where the sequences are."""
        self.layers += 1
        if self.sequences is None:
            self.sequences = Sequences(cu_seq_lens, max_length)
        return self.sequences

    def end(self, check):
        """Put the attention back; RuntimeError where not every layer came to ours."""
        if self.ended:
            return
        self.ended = True
        with _locked():
            entry = _changed[id(self.config)]
            entry[2] -= 1
            if entry[2] == 0:
                self.config._attn_implementation = entry[1]
                del _changed[id(self.config)]
        if check and self.layers != self.config.num_hidden_layers:
            raise RuntimeError(
                f"{self.layers} of the {self.config.num_hidden_layers} layers of {self.name} computed packed "
                "attention: take mode='prepend'"
            )


@contextlib.contextmanager
def packed_attention(model: nn.Module):
    """Inside, `model(**inputs, packed=...)` with what this yields computes attention from `cu_seq_lens_q`.

    Raises:
        RuntimeError: at the end, where not every layer came here: sequences would have seen each other.
    """
    _register()
    packed, whole = _Packed(model), False
    try:
        yield packed
        whole = True
    finally:
        packed.end(check=whole)


def serve_packed(model: nn.Module) -> None:
    """From now on, every call of `model` that is given `cu_seq_lens_q` computes packed attention; others as before."""
    _register()
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, with_kwargs=True, always_call=True)


# What _begin began, of each model by thread. KeyboardInterrupt passes hooks by: the next call then finds it here.
_begun = WeakKeyDictionary()


def _thread():
    return 0 if torch.compiler.is_compiling() else threading.get_ident()  # a call that is not traced


def _begin(model, args, kwargs):
    if model in _begun:
        _end_interrupted(model)
    if kwargs.get("cu_seq_lens_q") is None or "packed" in kwargs:
        return None
    if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
        raise ValueError("a packed batch is for one forward, without a cache: for generate take mode='prepend'")
    refuse_checkpointing(model)
    packed = _Packed(model)
    _begun.setdefault(model, {})[_thread()] = packed
    return args, kwargs | {"packed": packed}


def _end(model, args, kwargs, output):
    begun = _begun.get(model, {})
    packed = begun.get(_thread())
    if packed is not None and kwargs.get("packed") is packed:
        del begun[_thread()]
        packed.end(check=output is not None)


def _end_interrupted(model):
    packed = _begun[model].pop(_thread(), None)
    if packed is not None:
        packed.end(check=False)


def refuse_checkpointing(model: nn.Module) -> None:
    """ValueError where layers would be computed again when what is in force for one forward no longer is."""
    if model.training and any(map(_is_checkpointed, model.modules())):
        raise ValueError(
            "gradient checkpointing computes layers again when mode='packed' and prune are no longer in force: "
            "take mode='prepend' with prune=False, or do without it"
        )


def _is_checkpointed(module):
    """By transformers, or by torch's checkpoint_wrapper."""
    return getattr(module, "gradient_checkpointing", False) or type(module).__name__ == "CheckpointWrapper"


# What models hand to every attention function and what changes nothing here.
_HARMLESS = {"cu_seq_lens_k", "max_length_k", "position_ids", "use_cache", "deterministic"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "return_dict", "token_type_ids", "cache_position"}


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    cu_seq_lens_q=None,
    packed=None,
    max_length_q=None,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    **kwargs,
):
    """An attention function of transformers: [1, heads, T, e] three times, and [1, T, heads, e] back."""
    if packed is None:
        raise RuntimeError(
            "the model is in the middle of a packed forward, begun in another thread or by a model with the same "
            "config object: what is not packed has to wait for its end"
        )
    unknown = [name for name, value in kwargs.items() if not (name in _HARMLESS or value is None or value is False)]
    if unknown:
        raise TypeError(
            f"{type(module).__name__} asks for attention with {', '.join(unknown)}, which packed batches are not "
            "served with: take mode='prepend'"
        )
    if packed.replaced == "sdpa":  # it knows no softcap: older transformers leave it out there, newer take another
        softcap = None
    out = varlen_attention(
        *(one[0].transpose(0, 1) for one in (query, key, value)),
        packed.next_layer(cu_seq_lens_q, max_length_q),
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        window=sliding_window,
        scale=scaling,
        softcap=softcap,
        dropout=dropout,
    )
    return out[None], None


def _register():
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
