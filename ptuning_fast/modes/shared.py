"""Mode "shared": no padding, and one prompt for all texts of a batch. A causal model pays for it once.

    p_0 .. p_{m-2} | p_{m-1} x_1 | p_{m-1} x_2 | ...        T = m - 1 + the sum of 1 + n_i rows

No token comes before the prompt, so in a causal model its virtual tokens are the same in every row, at every layer, and
each text attends to the one copy. The last of them stands before each text, as it is what predicts the first token.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..models.info import ModelInfo, unwrapped
from ..models.probe import is_causal
from ..models.replaced import what_draws
from ..op import Batch, Embedded, Layout, Prompt
from .packed import Packed, obstacle_of_packed, of_sequences

__all__ = ["Shared"]


class Shared(Packed):
    """One row of T; for a causal model that can be given a packed batch, without dropout.

    Raises:
        TypeError: a model that cannot be given a packed batch, or whose virtual tokens depend on the text; a bank.
    """

    name = "shared"

    def __init__(self, model: nn.Module, info: ModelInfo):
        inner = unwrapped(model)
        info.check_per_token()
        # First what may be otherwise later, for which nothing is run: several processes run alike what they run.
        of_flash = _obstacle_of_flash(inner)
        obstacle = f"{info.name}: {of_flash}" if of_flash is not None else obstacle_of_packed(inner)
        if obstacle is not None:
            raise ValueError(obstacle)
        if inner.config.is_encoder_decoder or not _is_causal(inner):
            raise TypeError(f"{info.name} is not causal: its virtual tokens depend on the text, so take mode='prepend'")
        super().__init__(model, info)

    def obstacle(self, model: Any, prompt: Prompt) -> str | None:
        if prompt.prompt_index is not None:
            return "the texts of a bank have different prompts: take mode='packed'"
        of_attention = _obstacle_of_flash(unwrapped(model)) or super().obstacle(model, prompt)
        if of_attention is not None:
            return of_attention
        drawing = what_draws(unwrapped(model))
        if drawing is not None:
            return (
                f"{drawing} has dropout or noise, which would be drawn once for all texts: set it to 0 in the config, "
                "put the model in eval mode, or take mode='packed'"
            )
        return None

    def embed(self, model: Any, batch: Batch, prompt: Prompt, layout: Layout) -> Embedded:
        vectors = prompt.vectors
        P = _prefix_length(prompt)
        if P == 0:
            return super().embed(model, batch, prompt, layout)
        start = self.info.position_start
        texts = self._embed_packed(model, batch, Prompt(vectors[P:]), start + P, layout)
        rows, types, labels, positions, ends = (
            texts.inputs_embeds,
            texts.token_type_ids,
            texts.labels,
            texts.position_ids,
            texts.cu_seq_lens,
        )
        assert positions is not None and ends is not None and texts.max_length is not None
        first = torch.arange(start, start + P, device=rows.device)[None]
        return texts._replace(
            inputs_embeds=torch.cat([vectors[None, :P].to(rows.dtype), rows], 1),
            token_type_ids=_after(types, P, 0),
            labels=_after(labels, P, -100),
            position_ids=torch.cat([first, positions], 1),
            cu_seq_lens=torch.cat([ends.new_zeros(1), ends + P]),
            max_length=max(texts.max_length, P),
        )

    def inputs(self, model: Any, embedded: Embedded, prompt: Prompt) -> dict[str, Any]:
        return super().inputs(model, embedded, prompt) | {"prefix_length": _prefix_length(prompt)}

    def of_tokens(self, rows: Tensor, inputs: dict[str, Any], batch: Batch, m: int) -> Tensor:
        P = inputs["prefix_length"]
        ends = inputs["cu_seq_lens_q"]
        return of_sequences(rows[:, P:], ends[1 if P else 0 : -1] - P, min(m, 1), batch)

    def places(self, batch: Batch, embedded: Embedded, m: int) -> tuple[list[tuple[int, slice]], int]:
        assert embedded.cu_seq_lens is not None
        ends = embedded.cu_seq_lens.tolist()
        return [(0, slice(start, end)) for start, end in pairwise(ends[m > 1 :])], ends[-1]


def _obstacle_of_flash(model: Any) -> str | None:
    name = model.config._attn_implementation
    if "flash_attention" not in name:
        return None
    return (
        f"attn_implementation={name!r} cannot be told that texts share a prompt: load the model with 'sdpa' (which is "
        "flash attention on a GPU), or take mode='packed'"
    )


def _prefix_length(prompt: Prompt) -> int:
    return max(prompt.vectors.shape[-2] - 1, 0)


def _after(values: Tensor | None, P: int, filler: int) -> Tensor | None:
    return None if values is None else torch.cat([values.new_full((1, P), filler), values], 1)


def _is_causal(model: Any) -> bool:
    try:
        return is_causal(model)
    except Exception as error:  # whatever that may be
        reason = f"{type(model).__name__} does not run on input_ids alone ({error}): take mode='prepend'"
        raise TypeError(reason) from None
