"""Attention of one row a text, without the keys and values of the others.

A score is (W_q x + b_q) . (W_k y + b_k) = (W_k' (W_q x + b_q)) . y + a number that softmax does not see, and a weighted
sum of values is W_v (weighted sum of y) + b_v. So where one row x a text is asked for, W_k and W_v are applied to it,
and not to every row y.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patching import is_untouched

__all__ = ["attend", "is_understood"]


def is_understood(attention: nn.Module) -> bool:
    """Whether `attention` is a BERT's self-attention of plain linear layers, whose weights may be read."""
    linears = [getattr(attention, name, None) for name in ("query", "key", "value")]
    plain = all(type(one) is nn.Linear and is_untouched(one) for one in linears)
    return plain and hasattr(attention, "num_attention_heads")


def attend(attention: nn.Module, rows: Tensor, texts: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """[B, d], what `attention` makes of `rows`, computed in fp32.

    Args:
        rows: [B, d], one of each text.
        texts: the hidden states of the texts, [g, n, d] for g texts at a time, B in all.
        masks: for each of these what is added to the scores, [g, 1, n], or None.
    """
    H, B, d = attention.num_attention_heads, len(rows), rows.shape[-1]
    dropout = attention.dropout.p if attention.training else 0.0
    dtype = rows.dtype
    with torch.autocast(rows.device.type, enabled=False):
        (w_q, b_q), (w_k, _), (w_v, b_v) = (
            (one.weight.float(), None if one.bias is None else one.bias.float())
            for one in (attention.query, attention.key, attention.value)
        )
        queries = (F.linear(rows.float(), w_q, b_q) * attention.scaling).view(B, H, -1)
        queries = torch.einsum("bhe,hed->bhd", queries, w_k.view(H, -1, w_k.shape[1]))
        sums, totals = [], []
        for query, text, mask in zip(queries.split([len(text) for text in texts]), texts, masks):
            text = text.float()
            # In this order the gradient by `text` comes out in its own layout.
            scores = torch.bmm(text, query.transpose(1, 2)).transpose(1, 2)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            sums.append(torch.bmm(weights, text))
            totals.append(weights.sum(-1, keepdim=True))  # 1, but for dropout
        out = torch.einsum("bhd,hed->bhe", torch.cat(sums), w_v.view(H, -1, d))
        if b_v is not None:
            out = out + torch.cat(totals) * b_v.view(H, -1)
    return out.reshape(B, -1).to(dtype)
