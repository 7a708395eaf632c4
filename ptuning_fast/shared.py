"""Mode "shared": a causal model pays for the prompt once a batch, and not once a row.

No token comes before the prompt, so in a causal model its rows are the same in every batch row, at every layer. All but
the last run once, at batch 1, into a cache; keys and values are expanded over the batch. The last row goes with the
tokens, since it is what predicts their first.
"""

from torch import Tensor, nn
from transformers import DynamicCache

from .serving import is_causal

__all__ = ["cached_rows", "check_shareable"]


def check_shareable(model: nn.Module) -> None:
    """TypeError for a model whose prompt rows depend on the text, or that keeps something else than keys and values."""
    name = type(model).__name__
    if model.config.is_encoder_decoder or not is_causal(model.base_model):
        raise TypeError(f"{name} is not causal: its prompt rows depend on the text, so take mode='prepend'")
    layers = DynamicCache(config=model.config.get_text_config()).layers
    if not all(hasattr(layer, "keys") for layer in layers):
        raise TypeError(f"{name} keeps a state that is no keys and values: take mode='prepend'")


def cached_rows(model: nn.Module, rows: Tensor, batch_size: int, prompt_index: Tensor | None) -> DynamicCache:
    """Keys and values of prompt rows for every row of a batch.

    Args:
        rows: [m - 1, d], or of a bank [K, m - 1, d] with `prompt_index` [B].

    Raises:
        ValueError: dropout, which would draw once for all rows, or gradient checkpointing, under which transformers
            drops the cache.
    """
    if model.training:
        _refuse_training_options(model)
    bank = rows if rows.dim() == 3 else rows[None]
    cache = DynamicCache(config=model.config.get_text_config())
    bank = bank.to(model.get_input_embeddings().weight.dtype)
    model.base_model(inputs_embeds=bank, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if prompt_index is None:
            layer.keys, layer.values = (one.expand(batch_size, -1, -1, -1) for one in (layer.keys, layer.values))
        else:
            layer.keys, layer.values = (one[prompt_index] for one in (layer.keys, layer.values))
    return cache


def _refuse_training_options(model):
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError("under gradient checkpointing transformers drops the cache: take mode='prepend'")
        rates = (getattr(module, key, 0) for key in ("p", "attention_dropout", "dropout", "hidden_dropout"))
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise ValueError(
                f"{type(module).__name__} has dropout, which would be drawn once for all rows: set it to 0 in the "
                "config, put the model in eval mode, or take mode='prepend'"
            )
