"""Which models may be given a packed batch: by what they say of themselves, and by a trial."""

import inspect
from itertools import accumulate, pairwise

import torch
from torch import nn

from .packing import packed_attention
from .positions import counts_columns, position_start
from .trial import is_known, off_by, ordinary_tokens, tolerance, trial

__all__ = ["check_packable"]


def check_packable(model: nn.Module) -> None:
    """TypeError for a model whose attention cannot be given a packed batch, with the reason.

    Such are models that do not go through transformers' AttentionInterface, most of them because they add a bias of
    their own to the scores: ALiBi (Bloom), relative positions (T5, DeBERTa, MPNet). An architecture that the tests do
    not cover is tried out besides: two texts in a packed batch, against what it says of each alone.
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
    if not is_known(model):
        _try_out(model)


def _try_out(model):
    table, takes = model.get_input_embeddings(), inspect.signature(model.forward).parameters
    if type(table.weight) not in (torch.Tensor, nn.Parameter):  # sharded or quantised: no place for trials
        return
    tokens = torch.tensor(ordinary_tokens(model.config, table.weight.shape[0], 11), device=table.weight.device)
    lengths = [7, 4]
    ends = [0, *accumulate(lengths)]
    places = [slice(start, end) for start, end in pairwise(ends)]
    with trial(model):
        try:
            alone = []
            for place in places:
                ids = tokens[None, place]
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
                alone.append(_per_token(out, ids.shape[1], slice(None)))
            embeds = table(tokens[None])
        except Exception:  # whatever a model that needs more than ids does
            return
        start = position_start(model)
        counted = torch.cat([torch.arange(start, start + length) for length in lengths])
        inputs = {"inputs_embeds": embeds, "max_length_q": max(lengths), "max_length_k": max(lengths)}
        inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = torch.tensor(ends, dtype=torch.int32).to(tokens.device)
        if "position_ids" in takes:
            inputs["position_ids"] = counted[None].to(tokens.device)
        name, mistake = type(model).__name__, None
        try:
            with packed_attention(model) as packed:
                out = model(**inputs, packed=packed)
        except Exception as error:  # what a layer that cannot be served raises
            mistake = str(error).partition(": take mode=")[0]
        if mistake is None:
            off = off_by([_per_token(out, ends[-1], place) for place in places], alone)
            if off > tolerance(model):
                mistake = f"texts in one see each other, or positions differ (outputs off by {off:.2g} of the largest)"
        if mistake is not None:
            raise TypeError(f"{name}, tried out, cannot be given a packed batch ({mistake}): take mode='prepend'")


def _per_token(out, columns, place):
    """The outputs [1, columns, ...] of a model, and of those the columns in `place`."""
    tensors = {name: value for name, value in out.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {name: value[0, place].float() for name, value in tensors.items() if value.shape[:2] == (1, columns)}
