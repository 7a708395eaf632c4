"""Which rows of the last hidden state stand for a text.

    columns   0 ......... m-1   m ......................... m+n-1
              prompt            tokens, and padding on either side

A packed batch is one row of all texts, from `ends[b]` to `ends[b + 1]` text b with its prompt and without padding.
"""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["POOLINGS", "mean_of_tokens", "pooled_columns", "pooled_rows"]

POOLINGS = ("first", "cls", "mean", "last")


def pooled_columns(pooling: str, m: int, n: int, mask: Tensor | None, *, adjacent: bool) -> Tensor | int:
    """[B], the column of the first prompt row, the text's first token ("cls") or its last, behind n token columns.

    A number where it is the same for every row whatever the mask says.

    Args:
        mask: [B, n] or None.
        adjacent: whether the prompt of a row that is padded on the left stands behind that padding.
    """
    if mask is None or n == 0 or (pooling == "first" and not adjacent):
        return {"first": 0, "cls": min(m, m + n - 1), "last": m + n - 1}[pooling]
    there = mask != 0
    if pooling == "first":
        return there.cumsum(1).eq(0).sum(1)  # behind the padding on the left
    if pooling == "cls":
        return m + there.int().argmax(1)
    return m + n - 1 - there.flip(1).int().argmax(1)


def pooled_rows(pooling: str, m: int, ends: Tensor) -> Tensor:
    """The same in a packed batch: [B] rows. A text without tokens is its prompt's last row.

    Args:
        ends: [B+1] int64.
    """
    if pooling == "last":
        return ends[1:] - 1
    return ends[:-1] if pooling == "first" else torch.minimum(ends[:-1] + m, ends[1:] - 1)


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
