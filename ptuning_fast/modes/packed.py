"""Mode "packed": no padding. One row of all sequences, concatenated, each with attention to itself alone."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.interface import keeps_attention, mask_of_packed, narrowed, obstacle_of_attention, serve_packed
from ..models.embedding import prepend
from ..models.families import class_of
from ..models.info import ModelInfo, unwrapped
from ..models.probe import Outcome, of_ids
from ..models.trial import one_at_a_time
from ..op import Batch, Embedded, Layout, Prompt
from .base import Mode

__all__ = ["Packed", "obstacle_of_packed"]

NARROW = 4  # rows that a sliding window has while a model is probed: fewer than the probe's texts


class Packed(Mode):
    """One row of T = all sequences; for models whose attention goes through transformers' AttentionInterface.

    The model gets the attention implementation of attention/interface.py, and keeps it. Each model is probed, known or
    not: layers that somebody has replaced would let texts see each other.

    Raises:
        TypeError: a model that cannot be given a packed batch, with the reason.
        ValueError: one that cannot as it is set now.
    """

    name: str = "packed"
    packed = True

    def __init__(self, model: nn.Module, info: ModelInfo):
        super().__init__(model, info)
        info.check_per_token()
        inner = unwrapped(model)
        _check(inner, info)
        obstacle = obstacle_of_packed(inner)
        if obstacle is not None:  # for now: not as the TypeErrors are, which nothing changes
            raise ValueError(obstacle)
        with one_at_a_time:
            reason = self._probed(inner)
        if reason is None:
            return
        raise TypeError(f"{info.name}, probed, cannot be given a packed batch ({reason}): take mode='prepend'")

    def _probed(self, inner: Any) -> str | None:
        """Why it cannot be given a packed batch; None if it can, and has the attention for it."""
        before = inner.config._attn_implementation
        of_padded = None if keeps_attention(before) else of_ids(inner)
        reason: str | None = "it was interrupted"
        try:
            serve_packed(inner)
            with narrowed(NARROW):
                found = self.probe_always(inner)
            reason = _reason(found)
            if reason is None and of_padded is not None and not _same(of_padded, of_ids(inner)):
                reason = "it computes otherwise where its attention implementation has another name"
        finally:
            if reason is not None and inner.config._attn_implementation != before:
                inner.set_attn_implementation(before)
        return reason

    def obstacle(self, model: Any, prompt: Prompt) -> str | None:
        return obstacle_of_packed(unwrapped(model))

    def embed(self, model: Any, batch: Batch, prompt: Prompt, layout: Layout) -> Embedded:
        return self._embed_packed(model, batch, prompt, self.info.position_start, layout)

    def _embed_packed(self, model: Any, batch: Batch, prompt: Prompt, start: int, layout: Layout) -> Embedded:
        inner = unwrapped(model)
        if not keeps_attention(inner.config._attn_implementation):  # somebody has set another since
            with one_at_a_time:
                serve_packed(inner)
        layout = Layout(start, packed=True, lengths=layout.lengths)
        return prepend(model.get_input_embeddings(), batch, prompt, layout)

    def inputs(self, model: Any, embedded: Embedded, prompt: Prompt) -> dict[str, Any]:
        inputs: dict[str, Any] = embedded.as_inputs()
        if "position_ids" not in self.info.takes:  # distances alone count there, and the attention knows them
            del inputs["position_ids"]
        if "use_cache" in self.info.takes:  # there is no next token, and layers that are checkpointed would add twice
            inputs["use_cache"] = False
        mask = mask_of_packed(unwrapped(model), embedded.inputs_embeds.detach())
        return inputs if mask is None else inputs | {"attention_mask": mask}

    def of_tokens(self, rows: Tensor, inputs: dict[str, Any], batch: Batch, m: int) -> Tensor:
        return of_sequences(rows, inputs["cu_seq_lens_q"][:-1], m, batch)

    def places(self, batch: Batch, embedded: Embedded, m: int) -> tuple[list[tuple[int, slice]], int]:
        assert embedded.cu_seq_lens is not None
        ends = embedded.cu_seq_lens.tolist()
        return [(0, slice(start, end)) for start, end in pairwise(ends)], ends[-1]


def of_sequences(rows: Tensor, starts: Tensor, m: int, batch: Batch) -> Tensor:
    """Packed rows [1, T, ...] as [B, n, ...], 0 on padding; m rows from each of `starts` are virtual tokens.

    Where a text has padding on its left, the column before it has the last virtual token's row, as in mode "prepend",
    which predicts the first token.
    """
    is_token = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
    is_token[(starts[:, None] + torch.arange(m, device=rows.device)).flatten()] = False
    ids, mask = batch.input_ids, batch.attention_mask
    out = rows.new_zeros(*ids.shape, *rows.shape[2:])
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    ones = [1] * (rows.dim() - 2)
    out = out.masked_scatter(there.view(*ids.shape, *ones), rows[0, is_token])
    if mask is None or 0 in (m, ids.shape[1]):
        return out
    first = there.int().argmax(1)
    place = torch.arange(len(ids), device=ids.device), (first - 1).clamp(min=0)
    return out.index_put(place, torch.where((first > 0).view(-1, *ones), rows[0, starts + m - 1], out[place]))


def _reason(found: Outcome) -> str | None:
    """Why a model cannot be given packed batches, by what a probe found; None if it can."""
    if found.error is not None:
        return found.error.partition(": take mode=")[0]
    worst = max((off for off in found[:3] if off is not None), default=float("inf"))
    if worst <= found.most:
        return None
    return (
        "texts in one see each other, positions differ, or a sliding window is in its mask alone "
        f"(outputs off by {worst:.2g} of the largest)"
    )


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.allclose(one, other, rtol=0, atol=1e-5 * one.abs().max().item(), equal_nan=True)


def obstacle_of_packed(model: Any) -> str | None:
    if getattr(model.config, "output_router_logits", False):
        return (
            f"{type(model).__name__} adds a loss over its routers' choices, which counts padding as a mask tells it: "
            "take mode='prepend', or set output_router_logits=False in its config"
        )
    if getattr(model.config, "output_attentions", False):
        return "there are no attention weights to give out (output_attentions in its config): take mode='prepend'"
    return obstacle_of_attention(model.config._attn_implementation)


def _check(model: Any, info: ModelInfo) -> None:
    """TypeError for a model that says of itself that it cannot be given a packed batch.

    Such are models that do not go through transformers' AttentionInterface, most of them because they add a bias of
    their own to the scores: ALiBi (Bloom), relative positions (T5, DeBERTa, MPNet).
    """
    name, config = class_of(model).__name__, model.config
    if not getattr(model, "_supports_attention_backend", False) or config.is_encoder_decoder:
        raise TypeError(
            f"{name} computes its attention by itself (biases on the scores, or an encoder-decoder), so it cannot be "
            "given a packed batch: take mode='prepend'"
        )
    if config.get_text_config() is not config:
        raise TypeError(f"{name} is more than a text model, which packed batches are for: take mode='prepend'")
    if getattr(config, "add_cross_attention", False):
        raise TypeError(f"{name} attends to states of each row, which packed batches do not have: take mode='prepend'")
    if info.counts_columns is not None:
        raise TypeError(
            f"{name} counts columns, and takes no position_ids there, which packed batches need: take mode='prepend'"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        raise TypeError(f"{name} has layers of {others}, which packed batches are not served with: take mode='prepend'")
