"""Packed batches through transformers' models: their attention, for one call, is that of varlen.py.

transformers asks its AttentionInterface for the function that `config._attn_implementation` names, at every layer. No
mask is registered for ours, so none is built and nothing waits for the GPU; where the sequences end reaches it as
`cu_seq_lens_q`, among the keyword arguments that models hand down.
"""

import contextlib

from torch import nn
from transformers import AttentionInterface

from .positions import counts_columns
from .varlen import Sequences, varlen_attention

__all__ = ["check_packable", "packed_attention", "refuse_checkpointing", "serve_packed"]

NAME = "ptuning_fast_varlen"


def check_packable(model: nn.Module) -> None:
    """TypeError for a model whose attention cannot be given a packed batch, with the reason.

    (What shows only in the arguments of an attention call, such as attention sinks, is refused there.)

    Such are models that do not go through transformers' AttentionInterface, most of them because they add a bias of
    their own to the scores: ALiBi (Bloom), relative positions (T5, DeBERTa, MPNet).
    """
    name, config = type(model).__name__, model.config
    if not getattr(model, "_supports_attention_backend", False) or config.is_encoder_decoder:
        raise TypeError(
            f"{name} computes its attention by itself (biases on the scores, or an encoder-decoder), so it cannot be "
            "given a packed batch: take mode='prepend'"
        )
    if config.get_text_config() is not config:
        raise TypeError(f"{name} is more than a text model, which packed batches are for: take mode='prepend'")
    if counts_columns(model):
        raise TypeError(f"{name} takes no position_ids, which packed batches need: take mode='prepend'")
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        raise TypeError(f"{name} has layers of {others}, which packed batches are not served with: take mode='prepend'")


class _Packed:
    """One forward of a packed batch: what the attention was before, where the sequences end, and the layers so far."""

    def __init__(self, model):
        self.config, self.name, self.layers = model.config, type(model).__name__, 0
        self.before, self.sequences = self.config._attn_implementation, None
        self.config._attn_implementation = NAME

    def next_layer(self, cu_seq_lens, max_length=None):
        """Count a layer, and say where the sequences are."""
        self.layers += 1
        if self.sequences is None:
            self.sequences = Sequences(cu_seq_lens, max_length)
        return self.sequences

    def end(self, check):
        """Put the attention back; RuntimeError where not every layer came to ours."""
        self.config._attn_implementation = self.before
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
    packed, whole = _Packed(model), False
    try:
        yield packed
        whole = True
    finally:
        packed.end(check=whole)


def serve_packed(model: nn.Module) -> None:
    """From now on, every call of `model` that is given `cu_seq_lens_q` computes packed attention; others as before."""
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, with_kwargs=True, always_call=True)


def _begin(model, args, kwargs):
    if kwargs.get("cu_seq_lens_q") is None or "packed" in kwargs:
        return None
    if kwargs.get("past_key_values") is not None:
        raise ValueError("a packed batch is for one forward, without a cache: for generate take mode='prepend'")
    refuse_checkpointing(model)
    model.__dict__["_ptuning_fast_packed"] = packed = _Packed(model)
    return args, kwargs | {"packed": packed}


def _end(model, args, kwargs, output):
    packed = model.__dict__.get("_ptuning_fast_packed")
    if packed is not None and kwargs.get("packed") is packed:
        del model.__dict__["_ptuning_fast_packed"]
        packed.end(check=output is not None)


def refuse_checkpointing(model: nn.Module) -> None:
    """ValueError where layers would be computed again when what is in force for one forward no longer is."""
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "gradient checkpointing computes layers again when mode='packed' and prune are no longer in force: "
            "take mode='prepend' with prune=False, or do without it"
        )


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
    cu_seq_lens_q,
    packed,
    max_length_q=None,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    **kwargs,
):
    """An attention function of transformers: [1, heads, T, e] three times, and [1, T, heads, e] back."""
    unknown = [name for name, value in kwargs.items() if name not in _HARMLESS and value is not None]
    if unknown:
        raise TypeError(
            f"{type(module).__name__} asks for attention with {', '.join(unknown)}, which packed batches are not "
            "served with: take mode='prepend'"
        )
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


AttentionInterface.register(NAME, attention)
