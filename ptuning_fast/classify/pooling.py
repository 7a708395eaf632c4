"""Which rows of the last hidden state stand for a text.

    columns   0 ......... m-1   m ......................... m+n-1
              prompt            tokens, and padding on either side

A packed batch is one row of all texts, from `ends[b]` to `ends[b + 1]` text b with its prompt and without padding.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..op import Embedded

__all__ = ["POOLINGS", "mean_of_tokens", "pooled_columns"]

POOLINGS = ("first", "cls", "mean", "last")


def pooled_columns(pooling: str, m: int, embedded: Embedded, mask: Tensor | None) -> Tensor | int:
    """[B], where the first virtual token ("first"), the text's first token ("cls") or its last ("last") stands.

    A column, or in a packed batch a row; a number where it is the same for every row whatever the mask says. A text
    without tokens is its prompt's last row.

    Args:
        mask: [B, n] or None, that of the tokens alone.
    """
    if embedded.cu_seq_lens is not None:
        start, ends = embedded.cu_seq_lens[:-1].long(), embedded.cu_seq_lens[1:].long()
        return {"first": start, "cls": torch.minimum(start + m, ends - 1), "last": ends - 1}[pooling]
    S, start_of = embedded.inputs_embeds.shape[1], embedded.prompt_start
    if mask is None or m == S or (pooling == "first" and start_of is None):
        return {"first": 0, "cls": min(m, S - 1), "last": S - 1}[pooling]
    start = mask.new_zeros(len(mask), dtype=torch.int64) if start_of is None else start_of.long()
    if pooling == "first":
        return start
    there = (mask != 0).int()
    column = there.argmax(1) if pooling == "cls" else S - m - 1 - there.flip(1).argmax(1)
    return torch.where(there.any(1), m + column, (start + m - 1).clamp(min=0))


def mean_of_tokens(hidden: Tensor, m: int, mask: Tensor | None, ends: Tensor | None) -> Tensor:
    """[B, d], the mean over each text's tokens; zeros for a text without any.

    Args:
        hidden: [B, m + n, d]; or packed [1, T, d], with `ends` [B+1].
        mask: [B, n] or None.
    """
    if ends is not None:
        texts = hidden[0].split([end - start for start, end in pairwise(ends.tolist())])
        return torch.stack([text[m:].sum(0) / max(len(text) - m, 1) for text in texts])
    text = hidden[:, m:]
    if mask is None:
        return text.mean(1)
    there = (mask != 0)[:, :, None]
    return torch.where(there, text, 0).sum(1) / there.sum(1).clamp(min=1)
