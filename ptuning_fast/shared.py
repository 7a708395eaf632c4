"""Mode "shared": a causal model pays for the prompt once a batch, and not once a row.

No token comes before the prompt, so in a causal model its rows are the same in every batch row, at every layer. All but
the last run once, at batch 1, into a cache; keys and values are expanded over the batch. The last row goes with the
tokens, since it is what predicts their first.
"""

import inspect

from torch import Tensor, nn
from transformers import DynamicCache

from .serving import is_a, is_causal

__all__ = ["cache_name", "cached_rows", "check_shareable", "left_padding_shifts"]


def cache_name(takes: frozenset[str]) -> str | None:
    """What a forward that takes these arguments calls the cache; None where it takes none."""
    return next((name for name in ("cache", "past_key_values") if name in takes), None)


def check_shareable(model: nn.Module) -> None:
    """TypeError for a model whose prompt rows depend on the text, or that keeps something else than keys and values."""
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder or not _is_causal(model):
        raise TypeError(f"{name} is not causal: its prompt rows depend on the text, so take mode='prepend'")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        raise TypeError(
            f"the rotary positions of {name} depend on the length of what it is given, and a cached prompt's would be "
            "others: take mode='prepend'"
        )
    layers = DynamicCache(config=config).layers
    if is_a(model, "ForQuestionAnswering") or not all(hasattr(layer, "keys") for layer in layers):
        raise TypeError(f"{name} cannot be given keys and values alone: take mode='prepend'")


def _is_causal(model):
    try:
        return is_causal(model.base_model)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        reason = f"{type(model).__name__} does not run on input_ids alone ({error}): take mode='prepend'"
        raise TypeError(reason) from None


def left_padding_shifts(model: nn.Module, takes: frozenset[str]) -> str | None:
    """Why padding between the cached prompt and a text would change the text's outputs, or None."""
    config = model.config.get_text_config()
    if any(getattr(config, key, None) is not None for key in ("sliding_window", "window_size", "attention_chunk_size")):
        return "has sliding windows, which padding between prompt and text would shift"
    if "position_ids" not in takes and config.model_type != "bloom":  # Bloom's biases count the mask
        return "counts padding between prompt and text as positions, and cannot be told others"
    return None


class _OneForward(DynamicCache):
    """A cache that is there to be read by one forward, which adds the text's keys and values to it."""

    def __init__(self, config):
        super().__init__(config=config)
        self.__dict__["filled"], self.__dict__["read"] = False, set()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.filled and layer_idx in self.read:
            raise ValueError(
                "the inputs of mode='shared' are for one forward: call the prompt again for another, and take "
                "mode='prepend' for generate"
            )
        if self.filled:
            self.read.add(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __setattr__(self, name, value):
        if name == "_is_user_defined":  # generate says so, of the cache that it is given
            raise ValueError("the inputs of mode='shared' are for one forward: for generate take mode='prepend'")
        super().__setattr__(name, value)


def cached_rows(model: nn.Module, rows: Tensor, batch_size: int, prompt_index: Tensor | None) -> DynamicCache:
    """Keys and values of prompt rows for every row of a batch, to be given to one forward.

    Args:
        rows: [m - 1, d], or of a bank [K, m - 1, d] with `prompt_index` [B].

    Raises:
        ValueError: dropout, which would draw once for all rows, or gradient checkpointing, under which transformers
            drops the cache.
        TypeError: a model that fills no cache.
    """
    _refuse_training_options(model)
    bank = rows if rows.dim() == 3 else rows[None]
    cache = _OneForward(model.config.get_text_config())
    bank = bank.to(model.get_input_embeddings().weight.dtype)
    name = cache_name(frozenset(inspect.signature(model.base_model.forward).parameters)) or "past_key_values"
    model.base_model(inputs_embeds=bank, use_cache=True, **{name: cache})
    if not cache.layers or any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise TypeError(f"{type(model).__name__} keeps no keys and values of every layer: take mode='prepend'")
    for layer in cache.layers:
        if prompt_index is None:
            layer.keys, layer.values = (one.expand(batch_size, -1, -1, -1) for one in (layer.keys, layer.values))
        else:
            layer.keys, layer.values = (one[prompt_index] for one in (layer.keys, layer.values))
    cache.filled = True
    return cache


def _refuse_training_options(model):
    for module in model.modules():
        if not module.training:
            continue
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError("under gradient checkpointing transformers drops the cache: take mode='prepend'")
        names = ("p", "attention_dropout", "dropout", "hidden_dropout", "layerdrop")
        if any(isinstance(rate := getattr(module, name, 0), float) and rate > 0 for name in names):
            raise ValueError(
                f"{type(module).__name__} has dropout, which would be drawn once for all rows: set it to 0 in the "
                "config, put the model in eval mode, or take mode='prepend'"
            )
