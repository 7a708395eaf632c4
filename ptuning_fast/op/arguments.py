"""What the op is given and what it gives, in the groups that are handed on whole."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "Embedded", "Layout", "Prompt"]


class Batch(NamedTuple):
    """A tokenised batch: B rows of n columns."""

    input_ids: Tensor  # [B, n] int32 or int64
    attention_mask: Tensor | None = None  # [B, n]: anything but 0 is a token; None: every column is one
    token_type_ids: Tensor | None = None  # [B, n] integers
    labels: Tensor | None = None  # [B, n] integers, one per token


class Prompt(NamedTuple):
    """The virtual tokens: one prompt for every row, or a bank from which each row chooses."""

    vectors: Tensor  # [m, d], or [K, m, d] with an index
    prompt_index: Tensor | None = None  # [B] integers in [0, K)


class Layout(NamedTuple):
    """How the rows of the output are laid out, and what is asked for beside them."""

    position_start: int | None = None  # position of a row's first real column; None: no position_ids
    embed_scale: float = 1.0  # factor on the token rows
    adjacent: bool = False  # the prompt next to the text, behind padding on the left
    packed: bool = False  # no padding: sequences concatenated in one row
    lengths: Sequence[int] | Tensor | None = None  # with packed: tokens of each row, where the host knows them
    additive_mask: torch.dtype | None = None  # the mask as attention adds it to its scores, in this dtype


class Embedded(NamedTuple):
    """The op's outputs: [B, S, ...], or packed [1, T, ...]; None for what was not asked for."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None
    cu_seq_lens: Tensor | None  # [B + 1] int32, packed: the first row of each sequence, and T
    prompt_start: Tensor | None  # [B]: the column at which each prompt stands, packed its first row; None: column 0
    max_length: int | None  # packed: rows of the longest sequence

    def as_inputs(self) -> dict[str, Tensor | int]:
        """The keyword arguments for a model: what there is, under the names that transformers has."""
        embeds, mask, types, labels, positions, cu_seq_lens, _, max_length = self
        inputs: dict[str, Tensor | int] = {"inputs_embeds": embeds}
        if mask is not None:
            inputs["attention_mask"] = mask
        if types is not None:
            inputs["token_type_ids"] = types
        if labels is not None:
            inputs["labels"] = labels
        if positions is not None:
            inputs["position_ids"] = positions
        if cu_seq_lens is not None and max_length is not None:
            inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = cu_seq_lens
            inputs["max_length_q"] = inputs["max_length_k"] = max_length
        return inputs
