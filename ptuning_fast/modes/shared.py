"""Mode "shared": a causal model pays for the prompt once a batch, and not once a row.

No token comes before the prompt, so in a causal model its virtual tokens are the same in every row, at every layer. All
but the last run once, at batch 1, into a cache; keys and values are expanded over the batch. The last goes with the
tokens, since it is what predicts their first.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..models.embedding import prepend
from ..models.families import family_of
from ..models.info import ModelInfo, is_a, unwrapped
from ..models.probe import is_causal
from ..op import Batch, Embedded, Layout, Prompt
from .base import Mode, places_in_rows

__all__ = ["Shared"]


class Shared(Mode):
    """1 + n columns a row, behind m - 1 that are cached; for a forward of a causal model without dropout.

    Raises:
        TypeError: a model whose virtual tokens depend on the text, or that keeps something else than keys and values.
    """

    name = "shared"

    def __init__(self, model: nn.Module, info: ModelInfo):
        super().__init__(model, info)
        inner = unwrapped(model)
        _check(inner)
        if info.cache is None:
            raise TypeError(f"the forward of {info.name} takes no cache: take mode='prepend'")
        self.shifted_by_padding = _left_padding_shifts(inner, info)
        if self.probe(model):
            self.shifted_by_padding = "gives a text other outputs behind padding on the left"

    def embed(self, model: Any, batch: Batch, prompt: Prompt, layout: Layout) -> Embedded:
        info, batch, cached = self.info, self.info.turned(batch), _cached_length(prompt)
        mask = batch.attention_mask
        if cached and self.shifted_by_padding and mask is not None and (mask[:, :1] == 0).any():
            raise ValueError(
                f"{info.name} {self.shifted_by_padding}: pad on the right (tokenizer.padding_side = 'right'), "
                "or take mode='prepend'"
            )
        start = info.positions_for(mask)
        start = None if start is None else start + cached
        layout = Layout(start, adjacent=info.adjacent, lengths=layout.lengths)
        last = Prompt(prompt.vectors[..., cached:, :], prompt.prompt_index)
        return prepend(model.get_input_embeddings(), batch, last, layout)

    def inputs(self, model: Any, embedded: Embedded, prompt: Prompt) -> dict[str, Any]:
        inputs: dict[str, Any] = embedded.as_inputs()
        cached, name = _cached_length(prompt), self.info.cache
        if cached and name is not None:
            first = Prompt(prompt.vectors[..., :cached, :], prompt.prompt_index)
            inputs[name] = _cached(unwrapped(model), first, len(embedded.inputs_embeds), name)
            if embedded.attention_mask is not None:
                mask = embedded.attention_mask
                inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), cached), mask], 1)
        return inputs

    def places(self, batch: Batch, embedded: Embedded, m: int) -> tuple[list[tuple[int, slice]], int]:
        assert batch.attention_mask is not None
        return places_in_rows(batch.attention_mask, 1)


def _cached_length(prompt: Prompt) -> int:
    return max(prompt.vectors.shape[-2] - 1, 0)


def _check(model: Any) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder or not _is_causal(model):
        raise TypeError(f"{name} is not causal: its virtual tokens depend on the text, so take mode='prepend'")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        raise TypeError(
            f"the rotary positions of {name} depend on the length of what it is given, and a cached prompt's would be "
            "others: take mode='prepend'"
        )
    layers = DynamicCache(config=config).layers
    if is_a(model, "ForQuestionAnswering") or not all(hasattr(layer, "keys") for layer in layers):
        raise TypeError(f"{name} cannot be given keys and values alone: take mode='prepend'")


def _is_causal(model: Any) -> bool:
    try:
        return is_causal(model.base_model)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        reason = f"{type(model).__name__} does not run on input_ids alone ({error}): take mode='prepend'"
        raise TypeError(reason) from None


def _left_padding_shifts(model: Any, info: ModelInfo) -> str | None:
    """Why padding between the cached prompt and a text would change the text's outputs, or None."""
    config, family = model.config.get_text_config(), family_of(model)
    if any(getattr(config, key, None) is not None for key in ("sliding_window", "window_size", "attention_chunk_size")):
        return "has sliding windows, which padding between prompt and text would shift"
    if "position_ids" not in info.takes and not (family is not None and family.positions_from_mask):
        return "counts padding between prompt and text as positions, and cannot be told others"
    return None


class _OneForward(DynamicCache):
    """A cache that is there to be read by one forward, which adds the text's keys and values to it."""

    filled: bool  # with the prompt
    read: set[int]  # the layers that have had their one forward

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.__dict__["filled"], self.__dict__["read"] = False, set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.filled and layer_idx in self.read:
            raise ValueError(
                "the inputs of mode='shared' are for one forward: call the prompt again for another, and take "
                "mode='prepend' for generate"
            )
        if self.filled:
            self.read.add(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_user_defined":  # generate says so, of the cache that it is given
            raise ValueError("the inputs of mode='shared' are for one forward: for generate take mode='prepend'")
        super().__setattr__(name, value)


def _cached(model: Any, prompt: Prompt, batch_size: int, name: str) -> DynamicCache:
    """Keys and values of virtual tokens for every row of a batch, to be given to one forward.

    Args:
        prompt: [m - 1, d], or of a bank [K, m - 1, d] with an index [B].
        name: what the model's forward calls a cache.

    Raises:
        ValueError: dropout, which would draw once for all rows, or gradient checkpointing, under which transformers
            drops the cache.
        TypeError: a model that fills no cache.
    """
    _refuse_training_options(model)
    rows, index = prompt
    bank = rows if rows.dim() == 3 else rows[None]
    cache = _OneForward(model.config.get_text_config())
    bank = bank.to(model.get_input_embeddings().weight.dtype)
    model.base_model(inputs_embeds=bank, use_cache=True, **{name: cache})
    layers: list[Any] = cache.layers
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise TypeError(f"{type(model).__name__} keeps no keys and values of every layer: take mode='prepend'")
    for layer in layers:
        if index is None:
            layer.keys, layer.values = (one.expand(batch_size, -1, -1, -1) for one in (layer.keys, layer.values))
        else:
            layer.keys, layer.values = (one[index] for one in (layer.keys, layer.values))
    cache.filled = True
    return cache


def _refuse_training_options(model: nn.Module) -> None:
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
